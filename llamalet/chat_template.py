"""Chat templates: how a conversation becomes one sequence of tokens, at whose end the model answers.

Messages are text, whatever they look like: only the template's own words can be special tokens.
"""

import datetime
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from llamalet.errors import UsageError
from llamalet.tokenizer import Tokenizer

# Files beside a model, perhaps with NAME. in front for NAME.bin, that may hold a template.
TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json")
# The vocabulary of Llama 2, whose conversations have no special tokens.
LLAMA2_SHA256 = "50a52ef822ee9e83de5ce9d0be0a025a773d019437f58b5ff9dcafb063ece361"
LLAMA2_MARKS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
HEADER, HEADER_END, TURN_END = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
# Characters that stand in for others while a template is filled in; only those absent from the messages are used.
PRIVATE = range(0xF0000, 0xFFFFE)


class Message(NamedTuple):
    """A turn of a conversation."""

    role: str
    """system, user or assistant"""
    content: str


Template = Callable[[Sequence[Message]], list[int]]


def find_template(
    model: Path, tokenizer: Tokenizer, named: str | os.PathLike[str] | None = None, inside: str | None = None
) -> Template:
    """Return the template that a model's conversations follow.

    This is the named one, else the one beside the model, else the one inside it, else Llama 3's if the vocabulary has
    its special tokens, else Llama 2's if this is its vocabulary.

    Args:
        model: the model's file or folder.
        tokenizer: its vocabulary.
        named: "llama2", "llama3" or a file with a Jinja template.
        inside: the Jinja template inside the model's file.

    Raises:
        UsageError: if the model is not a chat model, or the template cannot be used.
    """
    if named is None:
        for path in _candidates(model):
            if path.is_file() and (found := read_template(path)) is not None:
                return JinjaTemplate(found[0], tokenizer, str(path), found[1])
        if inside is not None:
            return JinjaTemplate(inside, tokenizer, str(model))
        if {HEADER, HEADER_END, TURN_END} <= tokenizer.special.keys():
            named = "llama3"
        elif tokenizer.sha256 == LLAMA2_SHA256:
            named = "llama2"
        else:
            raise UsageError(
                f"{model}: not a chat model: there is no chat template beside it, and its vocabulary has no special "
                "tokens for conversations; if it was trained to chat, name its --chat-template: llama2, llama3 or a "
                "file"
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
        UsageError: if a message contains one of the format's marks, which are plain text, not special tokens.
    """
    parts: list[int | str] = []
    system = ""
    for role, content in messages:
        if role != "assistant" and (marks := [mark for mark in LLAMA2_MARKS if mark in content]):
            raise UsageError(f"a message cannot contain {marks[0]}: it marks the turns of Llama 2's conversations")
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
    """A chat template in the form that Hugging Face's models use; needs the jinja2 package."""

    def __init__(self, source: str, tokenizer: Tokenizer, name: str, special: dict[str, str] | None = None) -> None:
        """Compile a template.

        Args:
            source: the template.
            tokenizer: the model's.
            name: where the template comes from, for error messages.
            special: the special tokens that the template may use, like bos_token.

        Raises:
            UsageError: if it is not a template, or jinja2 is not installed.
        """
        try:
            import jinja2
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise UsageError(f"{name}: a chat template needs the jinja2 package: pip install jinja2") from None
        self._tokenizer, self._name, self._error = tokenizer, name, jinja2.TemplateError
        # Templates are written for the environment that transformers sets up: this is the same one.
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
        # The characters that special tokens' names begin and end with.
        self._ends = sorted({name[i] for name in tokenizer.special for i in (0, -1)})

    def __call__(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a conversation, up to the point where the model answers.

        Before the messages go through the template, private characters replace those that special tokens' names begin
        and end with. So every special token in the result is the template's own. Then the replacement is undone.

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
    """Return a value as JSON; templates call this, and jinja2's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    """Refuse the conversation; templates call this."""
    raise ValueError(message)


def _candidates(model: Path) -> Iterator[Path]:
    """Yield the files that may hold a model's chat template, the most specific first."""
    folder = model if model.is_dir() else model.parent
    for name in TEMPLATE_FILES:
        yield folder / f"{model.stem}.{name}"
    for name in TEMPLATE_FILES:
        yield folder / name


def read_template(path: Path) -> tuple[str, dict[str, str]] | None:
    """Return the chat template in a file and the special tokens that it may use, or None if there is no template.

    Args:
        path: a template, or a tokenizer_config.json, which may have several templates by name.

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
                raise TypeError(f"{key} is not text")
            value.encode()  # refuses half a surrogate pair
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path}: its chat template cannot be read: {error}") from None
    return (found, names) if found else None
