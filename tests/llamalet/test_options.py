from dataclasses import dataclass
from typing import Literal

import pytest

from llamalet.errors import UsageError
from llamalet.options import read_options

ALIASES = {"steps": "-n", "temperature": "-t", "mode": "-m"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Some options."""

    model: str | None = None
    """the first word"""
    data_folder: str | None = None
    """the second word"""
    steps: int | None = None
    """a number"""
    temperature: float = 1.0
    """another one, 100 % of the time"""
    check: bool | None = None
    """a switch"""
    mode: Literal["generate", "chat"] = "chat"
    """one of two"""


def read(*words: str) -> Config:
    return read_options(
        Config, words, program="program", description="", positional=("model", "data_folder"), aliases=ALIASES
    )


def test_help_shows_each_field_with_its_string_and_default(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    out = " ".join(capsys.readouterr().out.split())
    for shown in (
        "usage: program [MODEL] [DATA_FOLDER]", "--data-folder TEXT the second word", "-n INT, --steps INT a number",
        "another one, 100 % of the time (1.0)", "--check [BOOL]", "one of two (chat)", "some options:",
    ):  # fmt: skip
        assert shown in out


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--data-folder=x"], "data_folder", "x"),
        (["--data_folder=x"], "data_folder", "x"),
        (["--data-folder", "x"], "data_folder", "x"),
        (["--data_folder", "x"], "data_folder", "x"),
        (["--data-folder=a=b_c"], "data_folder", "a=b_c"),
        (["--data-folder", "-x"], "data_folder", "-x"),
        (["m", "x"], "data_folder", "x"),
        (["m", "-n", "5", "-"], "data_folder", "-"),
        (["--model=a", "m"], "model", "m"),
        (["-n", "5"], "steps", 5),
        (["-n=5"], "steps", 5),
        (["-n", "-5"], "steps", -5),
        (["-n", "5", "-n", "6"], "steps", 6),
        (["-t", "1e-3"], "temperature", 1e-3),
        (["-t", "-1"], "temperature", -1.0),
        (["--check"], "check", True),
        (["--check", "-n", "1"], "check", True),
        (["--check", "m"], "check", True),
        (["--check", "no"], "check", False),
        (["--check=Off"], "check", False),
        (["--check=TRUE"], "check", True),
        (["--no-check"], "check", False),
        (["--no_check"], "check", False),
        ([], "check", None),
    ],
)
def test_every_spelling_is_read(words, name, value):
    assert getattr(read(*words), name) == value


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--stps=1"], "unknown option --stps; did you mean --steps?"),
        (["--data_foldr", "x"], "unknown option --data_foldr; did you mean --data_folder?"),
        (["-q"], "unknown option -q; see --help"),
        (["--ste=1"], "unknown option --ste; did you mean --steps?"),
        (["--no-steps"], "unknown option --no-steps"),
        (["--no-check=1"], "unknown option --no-check"),
        (["a", "b", "c"], "unexpected argument 'c'; options start with --, see --help"),
        (["--steps"], "--steps: needs a value, as in --steps=VALUE"),
        (["--steps", "--check"], "--steps: needs a value"),
        (["-n", "five"], "-n=five: must be a whole number"),
        (["-t", "hot"], "-t=hot: must be a number"),
        (["-m", "poem"], "-m=poem: must be one of generate, chat"),
        (["--check=maybe"], "--check=maybe: must be true or false"),
        (["--data-folder=\udcff"], "--data-folder=.*: not valid UTF-8"),
        (["--data-folder="], "--data-folder='': must not be empty"),
        (["--data-folder", "a\0b"], r"--data-folder='a.x00b': has a null character"),
    ],
)
def test_a_mistake_is_one_line(words, complaint):
    with pytest.raises(UsageError, match=complaint.replace("?", "[?]")) as caught:
        read(*words)
    assert "\n" not in str(caught.value)
