"""The model that is served: its names, its limits, its chat template, and what is looked up for every request."""

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import llamalet
from llamalet.chat_template import Message, Template, find_template
from llamalet.checks import shown
from llamalet.errors import LlamaletError, TokenizerError, one_line
from llamalet.runtime import Model
from llamalet.serve.api_error import CONTEXT_LENGTH_EXCEEDED, ApiError
from llamalet.serve.json_body import top_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one request may ask for."""

    texts: int = 256
    """prompts times n"""
    stops: int = 16
    """stop strings"""
    stop_chars: int = 1000
    """characters of a stop string"""
    biases: int = 1024
    """tokens in logit_bias"""
    logprobs: int = 20
    """alternatives of a token"""
    all_logprobs: int = 1 << 19
    """logprobs of all tokens and their alternatives: about 25 bytes of JSON each, and 100 of memory before"""
    salt_chars: int = 256
    """characters of cache_salt"""


class ServedModel:
    """A model as clients see it.

    Attributes:
        model: the model.
        names: its id, and the other names that clients may use.
        created: seconds since 1970, for OpenAI's field.
        limits: what one request may ask for.
        template: makes token ids of a conversation; None for a model that is not made for it.
        no_template: why there is no template, for the log: it may name files.
        context: number of positions (prompt and new tokens).
        fingerprint: names what determines a text, together with the request and its seed.
    """

    def __init__(
        self,
        model: Model,
        names: Sequence[str] = (),
        *,
        created: int = 0,
        limits: Limits | None = None,
        chat_template: str | None = None,
    ) -> None:
        """Find the model's chat template.

        Args:
            model: the model.
            names: see above; none: the name of its file or folder.
            created: see above.
            limits: see above.
            chat_template: "llama2", "llama3" or a file with a Jinja template; None: the model's own, if it has one.

        Raises:
            TokenizerError: if the model has no tokenizer.
            LlamaletError: if a named chat template cannot be used.
        """
        self.model, self.created, self.limits = model, created, limits or Limits()
        path = Path(model.path)
        self.names = tuple(dict.fromkeys(names)) or (path.name if path.is_dir() else path.stem,)
        self.context = model.config.max_seq_len
        self.tokenizer = model.tokenizer
        self.fingerprint = f"llamalet-{llamalet.__version__}-{model.dtype.split()[0]}-kv-{model.transformer.kv}"
        self.template: Template | None = None
        self.no_template = ""
        self._rendering = threading.Lock()
        try:
            self.template = find_template(
                path, self.tokenizer, chat_template, model.chat_template, context=self.context
            )
        except LlamaletError as error:
            if chat_template is not None:
                raise
            self.no_template = one_line(error)
        self._token_texts: dict[int, str] = {}

    @cached_property
    def undrawn(self) -> frozenset[int]:
        """The ids below V without a token."""
        return self.model.undrawn

    @cached_property
    def special_names(self) -> dict[int, str]:
        """The names of the tokens that are not text, by their ids."""
        return {id: name for name, id in self.tokenizer.special.items()}

    @cached_property
    def longest_token(self) -> int:
        """Number of bytes of the longest token."""
        return max(len(self.tokenizer.token_bytes(id)) for id in range(self.tokenizer.vocab_size))

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token; none for a special one, or a row of the model's that has no token."""
        try:
            return self.tokenizer.token_bytes(token)
        except TokenizerError:
            return b""

    def token_text(self, token: int) -> str:
        r"""Return a token's text, as in OpenAI's logprobs: none of a special one, bytes:\xe4 of half a character."""
        if (found := self._token_texts.get(token)) is None:
            data = self.token_bytes(token)
            try:
                found = data.decode()
            except UnicodeDecodeError:
                found = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
            self._token_texts[token] = found
        return found

    def check_name(self, name: str | None) -> str:
        """Return the name of the model that a client asks for; its id, if the client names none.

        Raises:
            ApiError: 404, if it is another one's.
        """
        if name is None:
            return self.names[0]
        if name not in self.names:
            here = ", ".join(self.names)
            raise ApiError(
                404, f"model={name[:100]!a}: is not here; there is {here}", param="model", code="model_not_found"
            )
        return name

    def check_ids(self, name: str, ids: Sequence[object]) -> list[int]:
        """Return token ids that the vocabulary has.

        Raises:
            ApiError: 400, if one is something else.
        """
        size = self.tokenizer.vocab_size
        if set(map(type, ids)) <= {int}:
            found = cast(list[int], list(ids))
            if not found or 0 <= min(found) and max(found) < size and self.undrawn.isdisjoint(found):
                return found
        at, bad = next((at, id) for at, id in enumerate(ids) if not self._is_id(id))
        raise ApiError(
            400, f"{name}[{at}]={shown(bad)}: must be an id of the model's vocabulary, 0 to {size - 1}",
            param=top_of(name),
        )  # fmt: skip

    def _is_id(self, id: object) -> bool:
        """Return whether this is a token's id."""
        return type(id) is int and 0 <= id < self.tokenizer.vocab_size and id not in self.undrawn

    def check_bytes(self, name: str, n_bytes: int) -> None:
        """Refuse text that is too long for the context, however it is tokenized.

        Raises:
            ApiError: 400.
        """
        most = self.context * self.longest_token
        if n_bytes > most:
            raise ApiError(
                400, f"{name}: has {n_bytes} bytes; the model's context of {self.context} tokens holds at most {most}",
                param=top_of(name), code=CONTEXT_LENGTH_EXCEEDED,
            )  # fmt: skip

    def check_length(self, name: str, prompt: Collection[int]) -> None:
        """Refuse a prompt that is empty or longer than the context.

        Raises:
            ApiError: 400.
        """
        if not prompt:
            raise ApiError(400, f"{name}: has no tokens; give the model something to continue", param=top_of(name))
        if len(prompt) > self.context:
            raise ApiError(
                400, f"{name}: has {len(prompt)} tokens; the model's context holds {self.context}",
                param=top_of(name), code=CONTEXT_LENGTH_EXCEEDED,
            )  # fmt: skip

    def render(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a conversation, up to where the model answers. May be called on several threads.

        Raises:
            ApiError: 400, if the model is not made for conversations, or its template refuses this one.
        """
        if self.template is None:
            raise ApiError(
                400, "messages: this model is not made for conversations, it has no chat template; "
                "use /v1/completions", param="messages", code="no_chat_template",
            )  # fmt: skip
        try:
            with self._rendering:
                return self.template(messages)
        except LlamaletError as error:
            # The name of a template in a file is its path, which is not the client's business.
            words = one_line(error).removeprefix(f"{getattr(self.template, 'name', '')}: ")
            raise ApiError(400, f"messages: {words}", param="messages", code="chat_template_error") from None
