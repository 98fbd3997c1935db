"""Build a checked configuration from a dataclass, a TOML file and the command line.

Precedence: the dataclass defaults < the TOML file < `--key=value`. Nothing is ever executed. Every script declares its
options as a frozen dataclass, with a string under each field as its help text, and calls `parse`:

    config = parse(SampleConfig, argv, program="sample.py", description=__doc__, positional=("checkpoint",))

tyro converts the values to the fields' types and writes `--help`. It accepts only one spelling of switches and dashes
at a time, so the words are normalized first: `--key=value`, `--key value`, `-` and `_` alike, `--switch`,
`--switch=True`, `--no-switch`. A field with metadata {"bare": "latest"} may be given without a value, like `--resume`.
A field with metadata {"heading": "model"} begins a group of options in `--help`.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import re
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from llamalet.errors import ConfigError, UsageError

Config = TypeVar("Config")

TRUE_WORDS = ("true", "yes", "on", "1")
FALSE_WORDS = ("false", "no", "off", "0")
TOML_FILE = "CONFIG.toml"


def parse(
    config_class: type[Config],
    argv: Sequence[str],
    *,
    program: str,
    description: str,
    positional: Sequence[str] = (),
    toml: bool = False,
) -> Config:
    """Parse a command line into a `config_class`; `--help` prints the options and exits with 0.

    Args:
        config_class: a dataclass whose fields all have defaults, each followed by a string as its help text.
        argv: the arguments, without the program's name.
        program: the program's name in the usage line.
        description: shown above the options.
        positional: fields filled by bare words, in this order.
        toml: whether a bare word ending in .toml is a file of field values.

    Returns:
        The configuration, checked by its own __post_init__.

    Raises:
        UsageError: on an unknown option, an unexpected word, or a missing or unreadable value.
        ConfigError: on a bad TOML file, or from the dataclass on values out of range.
    """
    fields = {field.name: _Field.of(field, hint) for field, hint in _fields_with_hints(config_class)}
    usage = " ".join([program, *([f"[{TOML_FILE}]"] if toml else []), *(f"[{name.upper()}]" for name in positional)])
    if any(word in ("-h", "--help") for word in argv):
        tyro.cli(_for_help(config_class), prog=usage, description=description, args=["--help"], config=_TYRO)
    values = _read_words(list(argv), fields, list(positional), toml)
    if (path := values.pop(TOML_FILE, None)) is not None:
        values = _read_toml(Path(path), fields) | values
    return _convert(config_class, values)


_TYRO = (tyro.conf.FlagConversionOff,)


@dataclasses.dataclass(frozen=True)
class _Field:
    """The facts about a field that determine how its option may be spelled."""

    name: str
    is_switch: bool
    bare: str | None
    aliases: tuple[str, ...]

    @classmethod
    def of(cls, field: "dataclasses.Field[Any]", hint: Any) -> "_Field":
        """Read a field's type, its metadata and the aliases that tyro's annotation gives it."""
        aliases: tuple[str, ...] = ()
        if typing.get_origin(hint) is typing.Annotated:
            aliases = tuple(alias for note in hint.__metadata__ for alias in getattr(note, "aliases", None) or ())
            hint = typing.get_args(hint)[0]
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        is_switch = bool in typing.get_args(hint) if union else hint is bool
        return cls(field.name, is_switch, field.metadata.get("bare"), aliases)

    def spell(self, value: str) -> str:
        """Return `value` as tyro expects it: a word for true or false becomes True, False or the field's bare value."""
        word = value.lower()
        if self.is_switch and word in TRUE_WORDS + FALSE_WORDS:
            return str(word in TRUE_WORDS)
        if self.bare is not None and word in ("true", "false"):
            return self.bare if word == "true" else "None"
        return value


def _fields_with_hints(config_class: type) -> Iterator[tuple["dataclasses.Field[Any]", Any]]:
    """Yield each field of a dataclass with its evaluated annotation."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    for field in dataclasses.fields(config_class):
        yield field, hints[field.name]


def _for_help(config_class: type) -> type:
    """Return a dataclass for --help: fields in groups, and `--seed INT` where tyro would show `--seed {None}|INT`.

    A field with metadata {"heading": "model"} begins the group "model options", a dataclass within the dataclass.
    """
    texts = _help_texts(config_class)
    groups: dict[str, list[tuple[str, Any, Any]]] = {}
    heading = ""
    for field, hint in _fields_with_hints(config_class):
        heading = field.metadata.get("heading", heading)
        annotated = typing.get_origin(hint) is typing.Annotated
        value_types = [t for t in typing.get_args(hint.__origin__ if annotated else hint) if t is not types.NoneType]
        shown: dict[str, Any] = {"help": texts.get(field.name)}
        if field.default is None and value_types:
            name = {bool: "{True,False}", str: "TEXT"}.get(value_types[0], value_types[0].__name__.upper())
            shown |= {"metavar": name, "help_behavior_hint": ""}
        hint = typing.Annotated[hint, tyro.conf.arg(**shown)]
        groups.setdefault(heading, []).append((field.name, hint, dataclasses.field(default=field.default)))
    members = groups.pop("", [])
    for heading, fields in groups.items():
        group = dataclasses.make_dataclass(heading, fields)
        unprefixed = tyro.conf.OmitArgPrefixes[group]  # type: ignore[valid-type]
        members.append((heading, unprefixed, dataclasses.field(default_factory=group)))
    return dataclasses.make_dataclass(config_class.__name__, members)


def _help_texts(config_class: type) -> dict[str, str]:
    """Return the string under each field of a dataclass and of its bases, as one line."""
    texts = {}
    for base in reversed([base for base in config_class.__mro__ if dataclasses.is_dataclass(base)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return texts


def _read_toml(path: Path, fields: dict[str, _Field]) -> dict[str, str]:
    """Return the values of a TOML file, spelled as on a command line."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    unknown = [f"{path}: {_unknown(key, key, fields)}" for key in table if key.replace("-", "_") not in fields]
    nested = [f"{path}: {key}: must be one value" for key, value in table.items() if isinstance(value, (dict, list))]
    if unknown or nested:
        raise ConfigError.from_problems(unknown + nested)
    return {name: fields[name].spell(str(value)) for name, value in ((k.replace("-", "_"), table[k]) for k in table)}


def _read_words(words: list[str], fields: dict[str, _Field], positional: list[str], toml: bool) -> dict[str, str]:
    """Return field name -> value for the words of a command line; the key of a TOML file's path is TOML_FILE."""
    by_flag = {alias: field for field in fields.values() for alias in field.aliases}
    by_flag |= {"--" + name: field for name, field in fields.items()}
    values: dict[str, str] = {}
    while words:
        word = words.pop(0)
        if not word.startswith("-") or word == "-":
            if toml and word.endswith(".toml") and TOML_FILE not in values:
                values[TOML_FILE] = word
                continue
            if not positional:
                raise UsageError(f"unexpected argument '{word}'; options start with --, see --help")
            values[positional.pop(0)] = word
            continue
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            flag = "--" + flag[2:].replace("-", "_")
        negated = by_flag.get("--" + flag.removeprefix("--no_")) if flag.startswith("--no_") else None
        field = by_flag.get(flag)
        if field is None and negated is not None and (negated.is_switch or negated.bare) and not equals:
            values[negated.name] = negated.spell("false")
        elif field is None:
            raise UsageError(_unknown(word.partition("=")[0], flag.lstrip("-"), fields))
        elif equals:
            values[field.name] = field.spell(value)
        elif field.is_switch and not (words and words[0].lower() in TRUE_WORDS + FALSE_WORDS):
            values[field.name] = "True"
        elif field.bare is not None and (not words or words[0].startswith("-")):
            values[field.name] = field.bare
        elif not words or words[0].startswith("--"):
            raise UsageError(f"{word}: needs a value, as in {word}=VALUE")
        else:
            values[field.name] = field.spell(words.pop(0))
    for name, value in values.items():
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise UsageError(f"{name}={value!a}: not valid UTF-8")
    return values


def _unknown(shown: str, key: str, fields: dict[str, _Field]) -> str:
    """Return the error message for an unknown key, with the nearest known one."""
    near = difflib.get_close_matches(key.replace("-", "_"), fields, n=1, cutoff=0.5)
    dashes = "--" if shown.startswith("-") else ""
    hint = f"did you mean {dashes}{near[0]}?" if near else "see --help"
    return f"unknown option {shown}; {hint}"


def _convert(config_class: type[Config], values: dict[str, str]) -> Config:
    """Let tyro convert the words to typed values, then build the config; tyro's boxed error becomes one line."""
    # tyro fills a copy of the dataclass without __post_init__, or it would put that function's ConfigError into a box.
    draft_fields = [
        (f.name, hint, dataclasses.field(default=f.default)) for f, hint in _fields_with_hints(config_class)
    ]
    draft_class = dataclasses.make_dataclass(config_class.__name__, draft_fields, kw_only=True)
    args = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            draft: Any = tyro.cli(draft_class, args=args, config=_TYRO)
    except SystemExit:
        raise UsageError(_unbox(message.getvalue())) from None
    return config_class(**vars(draft))


def _unbox(box: str) -> str:
    """Return the text in tyro's box, up to the first rule, as one line with our spelling of the option."""
    lines = [line.strip("\u2502 ") for line in box.splitlines()[1:]]
    text = " ".join(lines).partition("\u2500\u2500")[0].strip()
    return re.sub(r"^Error parsing --(\S+):", lambda match: f"--{match[1].replace('-', '_')}:", text)
