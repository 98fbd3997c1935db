"""Command-line options from a dataclass, in every spelling that people try.

Each field of a frozen dataclass is an option, and the string under the field is its help. --key=value and --key value
both work, with - or _ in the name; a switch is --x, --no-x, --x=false or --x false. A field's metadata may have `bare`,
the value of the option when it stands alone, like --resume; `may_be_empty`, for a text that is more than a name; and
`heading`, the group that it begins in --help.
"""

import argparse
import ast
import difflib
import inspect
import itertools
import textwrap
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from llamalet.checks import KINDS
from llamalet.errors import UsageError

Config = TypeVar("Config")

TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
MAX_WHOLE = 2**64 - 1
MAX_SHOWN = 100  # characters of a value in a message
METAVARS = {bool: "[BOOL]", int: "INT", float: "FLOAT"}  # of any other type: TEXT


@dataclass(frozen=True)
class Option:
    """One field as an option; kind is its type, without None."""

    name: str
    kind: Any
    may_be_none: bool
    default: Any
    bare: str | None
    may_be_empty: bool

    def convert(self, text: str, shown: str) -> Any:
        """Return the value that a word stands for.

        Args:
            text: the word.
            shown: what error messages call the option.

        Raises:
            UsageError: if the field's type has no such value.
        """
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UsageError(f"{shown}={text!a}: not valid UTF-8")
        if "\0" in text:
            raise UsageError(f"{shown}={text!a}: has a null character")
        if not text and not self.may_be_empty:
            raise UsageError(f"{shown}='': must not be empty")
        if self.bare is not None and text.lower() in ("true", "false"):
            return self.bare if text.lower() == "true" else None
        if self.may_be_none and text == "None":
            return None
        if get_origin(self.kind) is Literal:
            choices = {str(choice): choice for choice in get_args(self.kind)}
            if text not in choices:
                raise UsageError(f"{shown}={text}: must be one of {', '.join(choices)}")
            return choices[text]
        several = get_origin(self.kind) is tuple
        kind = get_args(self.kind)[0] if several else self.kind
        parts = text.split(",") if several else [text]
        try:
            values = [TRUTH[part.lower()] if kind is bool else kind(part) for part in parts]
            if kind is int and max(map(abs, values)) > MAX_WHOLE:
                raise ValueError
            return tuple(values) if several else values[0]
        except (ValueError, KeyError):
            text = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
            commas = ", or several with commas between them" if several else ""
            raise UsageError(f"{shown}={text}: must be {KINDS[kind]}{commas}") from None


def read_options(
    config_class: type[Config],
    argv: Sequence[str],
    *,
    program: str,
    description: str | None,
    positional: Sequence[str] = (),
    aliases: Mapping[str, str] | None = None,
    hidden: Collection[str] = (),
    read_file: Callable[[Path, Mapping[str, Option]], Mapping[str, Any]] | None = None,
    **fixed: Any,
) -> Config:
    """Build a `config_class` from a command line; `--help` prints the options and exits with 0.

    Args:
        config_class: a dataclass whose fields all have defaults.
        argv: the words of the command line, without the program's name.
        program: the program's name in the usage line.
        description: shown above the options.
        positional: fields that words without a dash fill, in this order.
        aliases: other spellings, field name -> option.
        hidden: fields that `--help` does not list.
        read_file: reads a word without a dash that ends in .toml: values below those of the command line.
        fixed: values of fields that are not options.

    Raises:
        UsageError: on an unknown option, an unexpected word, or a missing or unreadable value.
        ConfigError: from `read_file`, or from the dataclass on values out of range.
    """
    options = {option.name: option for option in _options(config_class) if option.name not in fixed}
    aliases = {name: alias for name, alias in (aliases or {}).items() if name in options}
    flags = {f"--{name}": option for name, option in options.items()}
    flags |= {alias: options[name] for name, alias in aliases.items()}
    left, names = list(argv), list(positional)
    values: dict[str, Any] = {}
    from_file: Mapping[str, Any] | None = None
    while left:
        word = left.pop(0)
        if word in ("-h", "--help"):
            bare_words = [*(["CONFIG.toml"] if read_file else []), *(name.upper() for name in positional)]
            usage = " ".join([program, *(f"[{word}]" for word in bare_words), "[--option=value ...]"])
            listed = {name: option for name, option in options.items() if name not in hidden}
            # argparse's own printing hides that a long text could not be written.
            print(_help(config_class, listed, aliases, usage, description).format_help(), end="")
            raise SystemExit(0)
        if word.startswith("-") and word != "-":
            option, text = _read_option(word, left, flags)
            values[option.name] = option.convert(text, word.partition("=")[0])
        elif read_file is not None and word.endswith(".toml") and from_file is None:
            from_file = read_file(Path(word), options)
        elif names:
            option = options[names.pop(0)]
            values[option.name] = option.convert(word, option.name.upper())
        else:
            raise UsageError(f"unexpected argument '{word}'; options start with --, see --help")
    return config_class(**{**(from_file or {}), **values, **fixed})


def unknown_option(shown: str, names: Collection[str]) -> str:
    """Return the error message for an option that is not one of `names`, with the nearest, in the user's spelling."""
    shown = shown[:MAX_SHOWN]
    near = difflib.get_close_matches(shown.lstrip("-").replace("-", "_"), names, n=1, cutoff=0.5)
    dashes = "--" if shown.startswith("-") else ""
    nearest = near[0] if near and "_" in shown else near[0].replace("_", "-") if near else ""
    return f"unknown option {shown}; {f'did you mean {dashes}{nearest}?' if near else 'see --help'}"


def _options(config_class: type) -> Iterator[Option]:
    """Yield the options of a dataclass."""
    hints = get_type_hints(config_class)
    for field in fields(config_class):
        hint = hints[field.name]
        kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        kind = next(kind for kind in kinds if kind is not types.NoneType)
        may_be_empty = field.default == "" or field.metadata.get("may_be_empty", False)
        bare = field.metadata.get("bare")
        yield Option(field.name, kind, types.NoneType in kinds, field.default, bare, may_be_empty)


def _read_option(word: str, left: list[str], flags: Mapping[str, Option]) -> tuple[Option, str]:
    """Return an option and its value, which may be the first of the words that are left; that is then removed."""
    shown, equals, text = word.partition("=")
    flag = "--" + shown[2:].replace("-", "_") if shown.startswith("--") else shown
    option = flags.get(flag)
    negated = flags.get("--" + flag.removeprefix("--no_"))
    if option is None and negated is not None and (negated.kind is bool or negated.bare) and not equals:
        return negated, "false"
    if option is None:
        raise UsageError(unknown_option(shown, [name[2:] for name in flags if name.startswith("--")]))
    if equals:
        return option, text
    if option.kind is bool:
        return option, left.pop(0) if left and left[0].lower() in TRUTH else "true"
    if option.bare is not None and (not left or left[0].startswith("-")):
        return option, "true"
    if not left or left[0].startswith("--"):
        raise UsageError(f"{word}: needs a value, as in {word}=VALUE")
    return option, left.pop(0)


def _help(
    config_class: type, options: Mapping[str, Option], aliases: Mapping[str, str], usage: str, description: str | None
) -> argparse.ArgumentParser:
    """Return a parser that only prints help: each dataclass's options under its first sentence or their headings."""
    parser = argparse.ArgumentParser(
        usage=usage, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    metadata = {field.name: field.metadata for field in fields(config_class)}
    for owner in [owner for owner in config_class.__mro__ if is_dataclass(owner)]:
        group = parser.add_argument_group((inspect.getdoc(owner) or "").partition(".")[0].lower())
        for name, text in _field_help(owner).items():
            if heading := metadata[name].get("heading"):
                group = parser.add_argument_group(heading)
            if (option := options.get(name)) is None:
                continue
            shown = (
                f" ({option.default})" if option.default not in (None, "", ()) and option.default is not False else ""
            )
            literal = get_origin(option.kind) is Literal
            metavar = (
                f"{{{','.join(map(str, get_args(option.kind)))}}}" if literal else METAVARS.get(option.kind, "TEXT")
            )
            flags = [*([aliases[name]] if name in aliases else []), "--" + name.replace("_", "-")]
            group.add_argument(*flags, metavar=metavar, help=text.replace("%", "%%") + shown)
    return parser


def _field_help(config_class: type) -> dict[str, str]:
    """Return the string under each field that a class itself defines, as one line."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, text in itertools.pairwise(tree.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return found
