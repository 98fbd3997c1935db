"""Tokens and their logprobs as OpenAI's JSON, in the two forms that it has.

Tokens are added as they come, and `take` returns the JSON of those since the last time, so that the parts of a stream
joined are what an answer in one piece holds. Logprobs are written with all digits of the float64.
"""

import json
from collections.abc import Sequence
from typing import Any

from llamalet.logprobs import Logprobs
from llamalet.serve.prompts import Prompt
from llamalet.serve.served_model import ServedModel
from llamalet.tokenizer import StreamDecoder

dumps = json.JSONEncoder(separators=(",", ":")).encode  # in ASCII: some clients take U+2028 for the end of a line


class CompletionLogprobs:
    """Logprobs of /v1/completions: four lists, of offsets, logprobs, tokens and alternatives by their text.

    text_offset counts the characters of the choice's text before a token, in a text that no stop string cut.
    Alternatives are the most likely tokens and the one that was chosen; of two with the same text the likelier stays.
    Where ids are returned there are two more, which OpenAI's API lacks: ranks (0: the most likely token) and entropies
    (of the whole distribution, in nats).
    """

    def __init__(self, served: ServedModel, prompt: Prompt, *, as_ids: bool, echo: bool, ranks: bool) -> None:
        """Begin a choice of this prompt; see Asked for as_ids and echo; `ranks`: whether with the two lists more."""
        self._served, self._as_ids, self._prompt = served, as_ids, prompt
        self._decoder = prompt.decoder.fork()
        self._offset = len(prompt.text) if echo else 0
        self._lists: tuple[list[str], list[str], list[str], list[str]] = ([], [], [], [])
        self._ranks: tuple[list[str], list[str]] | None = ([], []) if ranks else None

    def add_prompt(self, logprobs: Sequence[Logprobs | None]) -> None:
        """Add the tokens of the prompt, of which the first has no logprobs."""
        decoder, offset = StreamDecoder(self._served.tokenizer), 0
        for token, found in zip(self._prompt.ids, logprobs, strict=True):
            self._add(token, found, offset)
            offset += len(decoder.push(token))

    def add(self, token: int, logprobs: Logprobs, is_stop: bool) -> None:
        """Add a new token. The one that ends the text is there too, with no text."""
        self._add(token, logprobs, self._offset)
        if not is_stop:
            self._offset += len(self._decoder.push(token))

    def take(self) -> str:
        """Return the JSON of the tokens since the last time."""
        names, lists = ["text_offset", "token_logprobs", "tokens", "top_logprobs"], [*self._lists]
        if self._ranks is not None:
            names += ["ranks", "entropies"]
            lists += self._ranks
        found = ",".join(f'"{name}":[{",".join(items)}]' for name, items in zip(names, lists, strict=True))
        for items in lists:
            items.clear()
        return "{" + found + "}"

    def _add(self, token: int, logprobs: Logprobs | None, offset: int) -> None:
        """Add a token with this offset."""
        offsets, values, texts, alternatives = self._lists
        offsets.append(str(offset))
        text = self._text(token)
        texts.append(dumps(text))
        if self._ranks is not None:
            ranks, entropies = self._ranks
            ranks.append("null" if logprobs is None else str(logprobs.rank))
            entropies.append("null" if logprobs is None else dumps(logprobs.entropy))
        if logprobs is None:
            values.append("null")
            alternatives.append("null")
            return
        values.append(dumps(logprobs.logprob))
        found: dict[str, float] = {}
        for other, value in (*logprobs.top, (token, logprobs.logprob)):
            if (key := self._text(other)) not in found or value > found[key]:
                found[key] = value
        alternatives.append(dumps(found))

    def _text(self, token: int) -> str:
        """Return what stands for a token."""
        return f"token_id:{token}" if self._as_ids else self._served.token_text(token)


class ChatLogprobs:
    """Logprobs of /v1/chat/completions: a list with token, bytes, logprob and alternatives of each token of the text.

    A special token, which can be among the alternatives, is written by its name, and has no bytes.
    """

    def __init__(self, served: ServedModel, *, as_ids: bool) -> None:
        """Begin a choice; see Asked for as_ids."""
        self._served, self._as_ids = served, as_ids
        self._items: list[str] = []

    def add_prompt(self, logprobs: Sequence[Logprobs | None]) -> None:
        """Do nothing: answers of a chat have no prompt."""

    def add(self, token: int, logprobs: Logprobs, is_stop: bool) -> None:
        """Add a token of the text; the one that ends it is none."""
        if not is_stop:
            top = [self._fields(other, value) for other, value in logprobs.top]
            self._items.append(dumps(self._fields(token, logprobs.logprob) | {"top_logprobs": top}))

    def take(self) -> str:
        """Return the JSON of the tokens since the last time."""
        found = f'{{"content":[{",".join(self._items)}],"refusal":null}}'
        self._items.clear()
        return found

    def _fields(self, token: int, logprob: float) -> dict[str, Any]:
        """Return what JSON says of a token."""
        name = self._served.special_names.get(token)
        text = self._served.token_text(token) if name is None else name
        data = self._served.token_bytes(token)
        return {
            "token": f"token_id:{token}" if self._as_ids else text,
            "logprob": logprob,
            "bytes": list(data) if data else None,
        }
