"""Build a checked configuration from a dataclass, a TOML file and the command line.

Precedence: the dataclass defaults < the TOML file < `--key=value`. Nothing is ever executed. Every script declares its
options as a frozen dataclass, with a string under each field as its help text, and calls `parse`:

    config = parse(ExportConfig, argv, program="export.py", description=__doc__, positional=("out",))

llamalet/options.py reads the words; this module adds the TOML file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llamalet import strict
from llamalet.checks import KINDS, checked
from llamalet.errors import ConfigError
from llamalet.options import Option, read_options, unknown_option

Config = TypeVar("Config")


def parse(config_class: type[Config], argv: Sequence[str], *, toml: bool = False, **shown: Any) -> Config:
    """Parse a command line into a `config_class`; `--help` prints the options and exits with 0.

    Args:
        config_class: a dataclass whose fields all have defaults, each followed by a string as its help text.
        argv: the arguments, without the program's name.
        toml: whether a bare word ending in .toml is a file of field values.
        shown: the other arguments of `read_options`: program, description, positional.

    Returns:
        The configuration, checked by its own __post_init__.

    Raises:
        UsageError: on an unknown option, an unexpected word, or a missing or unreadable value.
        ConfigError: on a bad TOML file, or from the dataclass on values out of range.
    """
    return read_options(config_class, argv, read_file=read_toml if toml else None, **shown)


def read_toml(path: Path, options: Mapping[str, Option]) -> dict[str, Any]:
    """Return the values in a TOML file, by field.

    Raises:
        ConfigError: if the file is missing, is not TOML, has a key that is not an option, or a value of another type:
            unlike on the command line, "1" is no number there and "no" no switch.
        UsageError: if the option has no such value.
    """
    table = strict.read_toml(path, ConfigError)
    problems = [f"{path}: {unknown_option(key, options)}" for key in table if key.replace("-", "_") not in options]
    problems += [f"{path}: {key}: must be one value" for key, value in table.items() if isinstance(value, dict | list)]
    ConfigError.raise_for(problems)
    names = {key: key.replace("-", "_") for key in table}
    for key, name in names.items():
        _check_type(table[key], options[name], f"{path}: {key}")
    return {name: options[name].convert(str(table[key]), f"{path}: {key}") for key, name in names.items()}


def _check_type(value: Any, option: Option, shown: str) -> None:
    """Raise a ConfigError if a value of TOML is not of the option's type. For a text a number will do, as in 500."""
    if option.may_be_none and value == "None":  # TOML has none
        return
    if option.kind in (bool, int, float):
        checked(shown, value, option.kind)
    elif isinstance(value, bool) and option.bare is None or not isinstance(value, str | int | float):
        raise ConfigError(f"{shown}={value}: must be {KINDS[str]}")
