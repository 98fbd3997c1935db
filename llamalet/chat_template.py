"""Chat templates: how a conversation becomes one sequence of tokens, at whose end the model answers.

Messages are text, whatever they look like: only the template's own words can be special tokens.
"""

import os
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llamalet import strict
from llamalet.checks import shown
from llamalet.config import MAX_CONTEXT
from llamalet.errors import FormatError, UsageError
from llamalet.files import refuse_odd
from llamalet.hf_names import CHAT_TEMPLATE_JINJA, TOKENIZER_CONFIG_JSON
from llamalet.marked_text import marks_of
from llamalet.template_process import TemplateProcess
from llamalet.tokenizer import SentencePieceTokenizer, Tokenizer, declared

# Files beside a model, perhaps with NAME. in front for NAME.bin, that may hold a template: the first counts.
TEMPLATE_FOLDER = "additional_chat_templates"
TEMPLATE_FILES = (f"{TEMPLATE_FOLDER}/default.jinja", CHAT_TEMPLATE_JINJA, TOKENIZER_CONFIG_JSON)
BUILT_IN = ("llama2", "llama3")
MAX_FILE_BYTES = 1 << 26
# The vocabulary of Llama 2, whose conversations have no special tokens.
LLAMA2_SHA256 = "50a52ef822ee9e83de5ce9d0be0a025a773d019437f58b5ff9dcafb063ece361"
LLAMA2_MARKS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
HEADER, HEADER_END, TURN_END = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"


class NoDefault(UsageError):
    """There are several chat templates, and none of them is the default one."""


class Message(NamedTuple):
    """A turn of a conversation."""

    role: str
    """system, user or assistant"""
    content: str
    """text; where it is Marked (marked_text.py), names of tokens in its OWN parts may be these tokens"""


Template = Callable[[Sequence[Message]], list[int]]


def find_template(
    model: Path,
    tokenizer: Tokenizer,
    named: str | os.PathLike[str] | None = None,
    inside: str | None = None,
    *,
    context: int = MAX_CONTEXT,
) -> Template:
    """Return the template that a model's conversations follow.

    This is the named one, else the one beside the model, else the one inside it, else Llama 3's if the vocabulary has
    its special tokens, else Llama 2's if this is its vocabulary.

    Args:
        model: the model's file or folder.
        tokenizer: its vocabulary.
        named: "llama2", "llama3" or a file with a Jinja template.
        inside: the Jinja template inside the model's file.
        context: the model's, in tokens.

    Raises:
        FormatError: if something else is in the place of a template.
        TokenizerError: if a file that counts beside the model is damaged.
        UsageError: if the model is not a chat model, or the template cannot be used.
    """
    said = declared.Folder(model if model.is_dir() else model.parent)
    if named is None:
        for prefix in (f"{model.stem}.", ""):
            if (found := find_source(said, prefix)) is not None:
                return _jinja_template(*found, model, said, tokenizer, context)
        if inside is not None:
            return _jinja_template(inside, model, model, said, tokenizer, context)
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
        return lambda messages: tokenizer.encode_nameless(llama3_parts(messages, tokenizer))
    if named == "llama2":
        return lambda messages: tokenizer.encode_nameless(llama2_parts(messages, tokenizer))
    path = Path(named)
    source = read_named(path)
    if path.suffix == ".json":
        model, said = path.parent, declared.Folder(path.parent)
    return _jinja_template(source, path, model, said, tokenizer, context)


def read_named(path: Path) -> str:
    """Return the Jinja template in a file that the user named.

    Raises:
        UsageError: if there is none, or it cannot be read.
    """
    if not path.is_file():
        raise UsageError(f"chat template {path}: must be llama2, llama3 or a file with a Jinja template")
    if (found := read_template(path)) is None:
        raise UsageError(f"{path}: has no chat_template")
    return found


def _jinja_template(
    source: str, path: Path, model: Path, said: declared.Folder, tokenizer: Tokenizer, context: int
) -> Template:
    """Return the Jinja template from `path`, with what the files of its folder say of the tokenizer.

    The files beside a model in one file may be another model's, so they count only for a template of theirs.
    """
    is_folder = model == said.path
    if not is_folder and not _is_of(path, said.path):
        return JinjaTemplate(source, tokenizer, str(path), context=context)
    if said.splits_special:
        raise UsageError(
            f"{said.path / TOKENIZER_CONFIG_JSON}: split_special_tokens=true makes plain text of the special tokens "
            "that a chat template writes; set it to false"
        )
    special = said.template_variables
    if special is not None and not is_folder:
        special = _bos_and_eos(tokenizer) | special
    if isinstance(tokenizer, SentencePieceTokenizer) and (spaces := said.chat_spaces) is not None:
        tokenizer = tokenizer.with_chat_spaces(spaces)
    return JinjaTemplate(source, tokenizer, str(path), special, context=context)


def _is_of(path: Path, folder: Path) -> bool:
    """Return whether a template is one that a folder has for the model in it, not for a NAME.bin."""
    path, folder = path.absolute(), folder.absolute()
    return path in [folder / name for name in TEMPLATE_FILES] or path.parent == folder / TEMPLATE_FOLDER


def _bos_and_eos(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the variables that a template may use if no file says more."""
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    return {variable: tokenizer.name_of(id) for variable, id in ids.items() if id is not None}


def llama3_parts(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int | str]:
    """Return a conversation as Llama 3 was trained on it. Source: llama3, tokenizer.py, ChatFormat."""
    begin, end, turn_end = (tokenizer.special[name] for name in (HEADER, HEADER_END, TURN_END))
    parts: list[int | str] = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
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
            parts += [] if tokenizer.bos_id is None else [tokenizer.bos_id]
            parts += [f"[INST] {(system + content).strip()} [/INST]"]
            system = ""
        elif not parts or not isinstance(parts[-1], str):
            raise UsageError("in Llama 2's conversations an assistant's message must follow a user's")
        else:
            parts[-1] = f"{parts[-1]} {content.strip()} "
            parts += [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return parts


class JinjaTemplate:
    """A chat template in the form that Hugging Face's models use; needs the jinja2 package.

    Attributes:
        source: the template.
        name: where it comes from; messages begin with it.
    """

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        name: str,
        special: Mapping[str, str] | None = None,
        *,
        context: int = MAX_CONTEXT,
    ) -> None:
        """Start a process for a template, which ends with this object.

        Args:
            source: the template.
            tokenizer: the model's.
            name: where the template comes from, for error messages.
            special: the special tokens that the template may use, like bos_token; None: the tokenizer's BOS and EOS.
            context: the model's, in tokens.

        Raises:
            UsageError: if it is not a template, or jinja2 is not installed.
        """
        self.source, self.name = source, name
        self._tokenizer = tokenizer
        self._process = TemplateProcess(source, _bos_and_eos(tokenizer) if special is None else special, name)
        self._max_chars = context * _longest(tokenizer)

    def __call__(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a conversation, up to the point where the model answers.

        The template gets the messages unchanged, and says of each character of its text whether it wrote that itself.

        Raises:
            UsageError: if the template refuses the messages, or cannot be used.
        """
        # A conversation of which a rolling context forgets the beginning can be longer than the context.
        n_chars = sum(len(message.content) for message in messages)
        turns = [{"role": role, "content": text, "marks": marks_of(text)} for role, text in messages]
        text, marks = self._process.render(turns, self._max_chars + 2 * n_chars)
        return self._tokenizer.encode_marked(text, marks)


def find_source(folder: declared.Folder, prefix: str = "") -> tuple[str, Path] | None:
    """Return the chat template in a folder and its file, chosen as transformers does; None if there is none.

    Args:
        folder: the folder.
        prefix: what the names of the files begin with.

    Raises:
        NoDefault: if there are several, and none of them is the default one.
        FormatError: if something else is in the place of one.
        TokenizerError: if tokenizer_config.json is damaged.
        UsageError: if it cannot be read.
    """
    *files, config = paths = [folder.path / f"{prefix}{name}" for name in TEMPLATE_FILES]
    refuse_odd(paths, FormatError)
    for path in files:
        if path.is_file():
            return _read_text(path), path
    more = folder.path / f"{prefix}{TEMPLATE_FOLDER}"
    if names := sorted(path.stem for path in more.glob("*.jinja")):
        raise NoDefault(_no_default(more, names))
    found = _template_in(folder.fields_of(config.name), config)
    return None if found is None else (found, config)


def _no_default(path: Path, names: Iterable[str]) -> str:
    """Return what is missing where all templates have other names."""
    found = reprlib.repr(list(names))
    return f"{path}: has no default chat template, only {found}; name the file of one with --chat-template"


def read_template(path: Path) -> str | None:
    """Return the chat template in a file, or None if there is none.

    Args:
        path: a template, or a tokenizer_config.json, which may have several by name: the default one counts.

    Raises:
        NoDefault: if there are several, and none of them is the default one.
        UsageError: if it cannot be read.
    """
    if path.suffix != ".json":
        return _read_text(path)
    return _template_in(strict.read_json(path, UsageError), path)


def _template_in(fields: Mapping[str, Any], path: Path) -> str | None:
    """Return the chat template among the fields of a tokenizer_config.json; see read_template."""
    said = found = fields.get("chat_template")
    if isinstance(found, list) and all(_is_entry(entry) for entry in found):
        found = {entry["name"]: entry["template"] for entry in found}
    if isinstance(found, dict):
        if "default" not in found:
            raise NoDefault(_no_default(path, found))
        found = found["default"]
    if found is not None and not isinstance(found, str):
        raise UsageError(
            f"{path}: chat_template is {shown(said)}: must be a text, an object of texts by name, or a list of objects "
            "with a name and a template"
        )
    return found


def _is_entry(entry: object) -> bool:
    """Return whether this is a template with its name, as in a list of several."""
    return isinstance(entry, dict) and isinstance(entry.get("name"), str) and "template" in entry


def _read_text(path: Path) -> str:
    """Return the text in a file, with line ends as Python reads them."""
    data = strict.read_bytes(path, UsageError, "no such file", MAX_FILE_BYTES)
    try:
        return data.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: its chat template cannot be read: {error}") from None


def _longest(tokenizer: Tokenizer) -> int:
    """Return the largest number of characters that one token can stand for."""
    texts = max(len(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size))
    return max([texts, *map(len, tokenizer.special)])
