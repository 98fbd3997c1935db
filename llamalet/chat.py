"""Conversations with models that were trained for them.

from llamalet import Chat, Model
chat = Chat(Model.load("Llama-3.2-1B-Instruct.bin"), system="You are a pirate.")
print("".join(chat.say("Where is the treasure?")))

A template turns the messages so far into one sequence of tokens, at whose end the model answers. The KV cache holds
what the model has read and said, so that only what is new is read. What people and models write is text, whatever it
looks like: only the template's own words can be special tokens.
"""

import datetime
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from llamalet.errors import UsageError
from llamalet.generate import KEEP, Overflow, check_limits, make_room, read
from llamalet.runtime import Model
from llamalet.sampler import Sampler, random_seed
from llamalet.tokenizer import StreamDecoder, Tokenizer

# Files beside a model, or with NAME. in front beside NAME.bin, that may hold a template.
TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json")
# The vocabulary of Llama 2, whose conversations have no special tokens of their own.
LLAMA2_SHA256 = "50a52ef822ee9e83de5ce9d0be0a025a773d019437f58b5ff9dcafb063ece361"
LLAMA2_MARKS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
HEADER, HEADER_END, TURN_END = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
# Characters that stand for others while a template is filled in; what they are used for has none of them.
PRIVATE = range(0xF0000, 0xFFFFE)


class Message(NamedTuple):
    """A turn of a conversation."""

    role: str
    """system, user or assistant"""
    content: str


Template = Callable[[Sequence[Message]], list[int]]


class Chat:
    """A conversation.

    Attributes:
        messages: what has been said so far.
        n_read: how many tokens the model had to read before its last answer.
    """

    def __init__(
        self,
        model: Model,
        *,
        system: str | None = None,
        template: str | os.PathLike[str] | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_p: float = 0.9,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int = -1,
        overflow: Overflow = "stop",
        keep: int = KEEP,
    ) -> None:
        """Begin a conversation.

        Args:
            model: a chat model.
            system: how the model shall answer.
            template: "llama2", "llama3" or a file with a Jinja template; None takes the model's own.
            max_new_tokens: end each answer after this many tokens; None lets the model end it.
            temperature: see Sampler, as for top_p, top_k and min_p.
            top_p: see Sampler.
            top_k: see Sampler.
            min_p: see Sampler.
            seed: the same seed gives the same answers; -1 is another one each time.
            overflow: "stop" ends the conversation where the context is full; "roll" forgets the older half of it.
            keep: how many of the first tokens a rolling context never forgets.

        Raises:
            UsageError: if the model is no chat model, the template cannot be used, or a limit is out of range.
            ConfigError: listing every sampling setting out of range.
        """
        check_limits(model.config.max_seq_len, max_new_tokens, overflow, keep)
        self.messages: list[Message] = [] if system is None else [Message("system", system)]
        self.n_read = 0
        self._model = model
        self._template = find_template(model, template)
        self._max_new_tokens, self._overflow, self._keep = max_new_tokens, overflow, keep
        self._sampler = Sampler(
            model.config.vocab_size,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=random_seed() if seed == -1 else seed,
        )
        self._cache = model.transformer.new_cache()
        self._seen: list[int] = []  # all tokens that the cache was given, also those that it forgot when it rolled

    def say(self, text: str) -> Iterator[str]:
        """Return the model's answer to a message, piece by piece as it is made; it is said when it is asked for.

        Raises:
            UsageError: if there is no room for the message, or the template refuses it; then it was not said.
        """
        messages = [*self.messages, Message("user", text)]
        ids, context = self._template(messages), self._model.config.max_seq_len
        if self._overflow == "stop" and len(ids) > context:
            raise UsageError(
                f"the conversation has {len(ids)} tokens, the model's context {context}: overflow=roll forgets the "
                "oldest ones"
            )
        return self._answer(messages, ids)

    def _answer(self, messages: list[Message], ids: list[int]) -> Iterator[str]:
        """Yield the answer to messages with these ids."""
        self.messages = messages
        transformer, decoder = self._model.transformer, StreamDecoder(self._model.tokenizer)
        answer: list[int] = []
        try:
            logits = self._read(ids)
            while self._max_new_tokens is None or len(answer) < self._max_new_tokens:
                token = self._sampler.sample(logits)
                if token in self._model.stop_tokens:
                    break
                answer.append(token)
                if piece := decoder.push(token):
                    yield piece
                if self._overflow == "stop" and self._cache.length == self._cache.context:
                    break
                make_room(self._cache, self._keep)
                logits = transformer.decode(self._cache, token)
                self._seen.append(token)
            if piece := decoder.finish():
                yield piece
        except GeneratorExit:
            raise
        except BaseException:  # what the cache holds by now is not known
            self._cache, self._seen = transformer.new_cache(), []
            raise
        finally:  # an answer that is broken off has been said as far as it went
            self.messages = [*messages, Message("assistant", self._model.tokenizer.decode(answer))]

    def _read(self, ids: list[int]) -> Any:
        """Bring the cache to these ids, of which it needs to read only what is new; return the logits after them."""
        known = 0
        for ours, theirs in zip(self._seen, ids[:-1], strict=False):  # the last one gives the logits
            if ours != theirs:
                break
            known += 1
        if known < len(self._seen):
            if self._cache.length == len(self._seen):
                self._cache.truncate(known)
            else:  # it has forgotten what would have to be there now
                self._cache, known = self._model.transformer.new_cache(), 0
        self.n_read = len(ids) - known
        logits = read(self._model.transformer, self._cache, ids[known:], self._keep)
        self._seen = ids
        return logits


def find_template(model: Model, named: str | os.PathLike[str] | None = None) -> Template:
    """Return the template that a model's conversations follow.

    That is the one that is named, else the one that lies beside the model, else Llama 3's if the vocabulary has its
    special tokens, else Llama 2's if the vocabulary is that one.

    Raises:
        UsageError: if the model is no chat model, or the template cannot be used.
    """
    tokenizer = model.tokenizer
    if named is None:
        for path in _places(model):
            if path.is_file() and (found := read_template(path)) is not None:
                return JinjaTemplate(found[0], tokenizer, str(path), found[1])
        if {HEADER, HEADER_END, TURN_END} <= tokenizer.special.keys():
            named = "llama3"
        elif tokenizer.sha256 == LLAMA2_SHA256:
            named = "llama2"
        else:
            raise UsageError(
                f"{model.path}: no chat model: there is no chat template beside it, and its vocabulary has no special "
                "tokens for conversations; --chat-template=llama2, llama3 or FILE says how it was trained"
            )
    if named == "llama3":
        if missing := {HEADER, HEADER_END, TURN_END} - tokenizer.special.keys():
            raise UsageError(f"chat template llama3: the model's vocabulary has no {min(missing)}")
        return lambda messages: tokenizer.encode_parts(llama3_parts(messages, tokenizer))
    if named == "llama2":
        return lambda messages: tokenizer.encode_parts(llama2_parts(messages, tokenizer))
    path = Path(named)
    if not path.is_file():
        raise UsageError(f"chat template {path}: must be llama2, llama3 or a file with a Jinja template")
    if (found := read_template(path)) is None:
        raise UsageError(f"{path}: has no chat_template")
    return JinjaTemplate(found[0], tokenizer, str(path), found[1])


def llama3_parts(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int | str]:
    """Return a conversation as Llama 3 was trained on it. Source: llama3, tokenizer.py, ChatFormat."""
    begin, end, turn_end = (tokenizer.special[name] for name in (HEADER, HEADER_END, TURN_END))
    parts: list[int | str] = [tokenizer.bos_id]
    for role, content in messages:
        parts += [begin, role, end, "\n\n" + content.strip(), turn_end]
    return [*parts, begin, "assistant", end, "\n\n"]


def llama2_parts(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int | str]:
    """Return a conversation as Llama 2 was trained on it. Source: llama, generation.py.

    Raises:
        UsageError: if a message holds one of the format's marks, which are no special tokens but plain text.
    """
    parts: list[int | str] = []
    system = ""
    for role, content in messages:
        if role != "assistant" and (marks := [mark for mark in LLAMA2_MARKS if mark in content]):
            raise UsageError(f"a message cannot hold {marks[0]}: it is a mark of Llama 2's conversations")
        if role == "system":
            system = f"<<SYS>>\n{content}\n<</SYS>>\n\n"
        elif role == "user":
            parts += [tokenizer.bos_id, f"[INST] {(system + content).strip()} [/INST]"]
            system = ""
        else:
            parts[-1] = f"{parts[-1]} {content.strip()} "
            parts.append(tokenizer.eos_id)
    return parts


class JinjaTemplate:
    """A chat template as Hugging Face's models come with; needs the jinja2 package."""

    def __init__(self, source: str, tokenizer: Tokenizer, name: str, special: dict[str, str] | None = None) -> None:
        """Compile a template.

        Args:
            source: the template.
            tokenizer: the model's.
            name: where the template is from, for messages.
            special: names of special tokens that the template may use, like bos_token.

        Raises:
            UsageError: if it is no template, or jinja2 is not installed.
        """
        try:
            import jinja2
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise UsageError(f"{name}: a chat template needs the jinja2 package: pip install jinja2") from None
        self._tokenizer, self._name, self._error = tokenizer, name, jinja2.TemplateError
        # The same environment as in transformers, which templates are written for.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UsageError(f"{name}: not a usable chat template: {error}") from None
        names = {id: token for token, id in tokenizer.special.items()}
        self._special = {"bos_token": names.get(tokenizer.bos_id, ""), "eos_token": names.get(tokenizer.eos_id, "")}
        self._special.update(special or {})
        # What a name of a special token begins and ends with.
        self._ends = sorted({name[i] for name in tokenizer.special for i in (0, -1)})

    def __call__(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a conversation, up to where the model answers.

        The messages go through the template with other characters for those that a special token's name begins and
        ends with; so a name that comes out is the template's. Then they get their own back.

        Raises:
            UsageError: if the template refuses the messages.
        """
        used = set("".join(message.content for message in messages))
        private = [chr(code) for code in PRIVATE if chr(code) not in used][: len(self._ends)]
        hide, show = (
            str.maketrans(dict(zip(a, b, strict=True))) for a, b in ((self._ends, private), (private, self._ends))
        )
        hidden = [{"role": role, "content": content.translate(hide)} for role, content in messages]
        try:
            text = self._template.render(
                messages=hidden, add_generation_prompt=True, tools=None, documents=None, **self._special
            )
        except (self._error, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"{self._name}: the chat template refuses the conversation: {error}") from None
        parts = self._tokenizer.split_special(text)
        return self._tokenizer.encode_parts([part.translate(show) if isinstance(part, str) else part for part in parts])


def _to_json(value: object, indent: int | None = None, **options: Any) -> str:
    """Return a value as JSON, for templates; jinja2's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    """Raise an error, for templates."""
    raise ValueError(message)


def _places(model: Model) -> Iterator[Path]:
    """Yield the files that may hold a model's chat template, the most particular first."""
    folder = model.path if model.path.is_dir() else model.path.parent
    for name in TEMPLATE_FILES:
        yield folder / f"{model.path.stem}.{name}"
    for name in TEMPLATE_FILES:
        yield folder / name


def read_template(path: Path) -> tuple[str, dict[str, str]] | None:
    """Return the chat template in a file, and the names of special tokens that it may use.

    Args:
        path: a template, or a tokenizer_config.json, which may have several by name, or none: then None is returned.

    Raises:
        UsageError: if it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".json":
            return text, {}
        table = json.loads(text)
        found = table.get("chat_template")
        if isinstance(found, list):
            found = next((entry["template"] for entry in found if entry["name"] == "default"), None)
        special = {key: table[key] for key in ("bos_token", "eos_token") if table.get(key)}
        names = {key: value["content"] if isinstance(value, dict) else value for key, value in special.items()}
        for key, value in (("chat_template", found or ""), *names.items()):
            if not isinstance(value, str):
                raise TypeError(f"{key} is no text")
            value.encode()  # half a character cannot be
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path}: its chat template cannot be read: {error}") from None
    return (found, names) if found else None
