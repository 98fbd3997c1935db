import dataclasses
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from configurator import parse
from llamalet.errors import ConfigError, UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    checkpoint: str | None = None
    """the model"""
    learning_rate: float = 1e-3
    """step size"""
    batch_size: int = 8
    """sequences"""
    compile: bool = True
    """use the compiler"""
    resume: str | None = field(default=None, metadata={"bare": "latest"})
    """where to go on"""
    temperature: float = 1.0
    """heat"""
    seed: int = 1
    """seed"""
    prompt: str = ""
    """prompt"""
    dtype: Literal["auto", "float32"] = "auto"
    """number format"""

    def __post_init__(self):
        problems = []
        if self.batch_size < 1:
            problems.append(f"batch_size={self.batch_size}: must be positive")
        if self.temperature < 0:
            problems.append(f"temperature={self.temperature}: must not be negative")
        ConfigError.raise_for(problems)


def options(*argv, **kwargs):
    return parse(Options, argv, program="x", description="A test.", positional=("checkpoint",), **kwargs)


@pytest.mark.parametrize(
    ("argv", "changed"),
    [
        ((), {}),
        (("--learning_rate=1",), {"learning_rate": 1.0}),
        (("--learning-rate", "3e-4"), {"learning_rate": 3e-4}),
        (("--compile=False",), {"compile": False}),
        (("--compile", "false", "m.bin"), {"compile": False, "checkpoint": "m.bin"}),
        (("--no-compile",), {"compile": False}),
        (("--compile", "m.bin"), {"compile": True, "checkpoint": "m.bin"}),
        (("--resume",), {"resume": "latest"}),
        (("--resume=True",), {"resume": "latest"}),
        (("--resume=false",), {"resume": None}),
        (("--no-resume",), {"resume": None}),
        (("--resume=out/run", "--batch-size=2"), {"resume": "out/run", "batch_size": 2}),
        (("--resume", "--batch-size=2"), {"resume": "latest", "batch_size": 2}),
        (("--temperature", "0.5", "--seed", "-1"), {"temperature": 0.5, "seed": -1}),
        (("--prompt=a=b --c",), {"prompt": "a=b --c"}),
        (("--prompt=",), {"prompt": ""}),
        (("--prompt", "-x"), {"prompt": "-x"}),
        (("--batch_size=2", "--batch_size=3"), {"batch_size": 3}),
    ],
)
def test_spellings(argv, changed):
    assert options(*argv) == dataclasses.replace(Options(), **changed)


@pytest.mark.parametrize(
    ("argv", "error", "words"),
    [
        (("--lerning_rate=1",), UsageError, ["--lerning_rate", "did you mean --learning_rate"]),
        (("--no-such-thing",), UsageError, ["--no-such-thing"]),
        (("--no-batch-size",), UsageError, ["--no-batch-size"]),
        (("-q", "1"), UsageError, ["-q"]),
        (("--batch-size=1.5",), UsageError, ["--batch-size=1.5", "must be a whole number"]),
        (("--learning_rate=abc",), UsageError, ["--learning_rate", "abc"]),
        (("--dtype=float16",), UsageError, ["float16", "float32"]),
        (("--batch-size",), UsageError, ["--batch-size", "needs a value"]),
        (("a.bin", "b.bin"), UsageError, ["unexpected argument 'b.bin'"]),
        (("--prompt=caf\udce9",), UsageError, ["prompt='caf\\udce9': not valid UTF-8"]),
        (("--batch-size=0", "--temperature", "-1"), ConfigError, ["batch_size=0", "temperature=-1.0"]),
    ],
)
def test_mistakes_name_the_option_and_the_value(argv, error, words):
    with pytest.raises(error) as caught:
        options(*argv)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_toml_lies_between_defaults_and_command_line(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('learning_rate = 1\nbatch-size = 4\ncompile = false\nresume = true\nprompt = "True"\n')
    got = options(str(path), "--batch_size=5", toml=True)
    expected = Options(learning_rate=1.0, batch_size=5, compile=False, resume="latest", prompt="True")
    assert got == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lerning_rate = 1\n[model]\nx = 1\n", ["lerning_rate", "learning_rate", "model"]),
        ("batch_size = [1]\n", ["batch_size"]),
        ('batch_size = "1"\n', ["batch_size='1': must be a whole number"]),
        ("batch_size = 1.0\n", ["batch_size=1.0: must be a whole number"]),
        ("batch_size = true\n", ["batch_size=True: must be a whole number"]),
        ('learning-rate = "1"\n', ["learning-rate='1': must be a number"]),
        ("seed = 1979-05-27\n", ["seed=", "must be a whole number"]),
        ('compile = "no"\n', ["compile='no': must be true or false"]),
        ("compile = 0\n", ["compile=0: must be true or false"]),
        ("prompt = true\n", ["prompt=True: must be a text"]),
        ("checkpoint = 07:32:00\n", ["checkpoint=07:32:00: must be a text"]),
        ("batch_size = \n", ["not valid TOML", "line 1"]),
    ],
)
def test_bad_toml_is_one_config_error(tmp_path, text, words):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        options(str(path), toml=True)
    assert all(word in str(caught.value) for word in [str(path), *words]), str(caught.value)
    assert "\n" not in str(caught.value)


def test_toml_may_stand_anywhere(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("batch_size = 4\nseed = 5\n")
    for argv in (("--seed", "6", str(path)), ("--compile", str(path), "--seed=6"), (str(path), "--seed=6")):
        assert options(*argv, toml=True) == Options(batch_size=4, seed=6)
    assert options("m.bin", str(path), toml=True) == Options(batch_size=4, seed=5, checkpoint="m.bin")
    with pytest.raises(UsageError, match="unexpected argument 'two.toml'"):
        options("m.bin", str(path), "two.toml", toml=True)


def test_toml_that_is_a_folder_is_a_config_error(tmp_path):
    (tmp_path / "a.toml").mkdir()
    with pytest.raises(ConfigError, match=r"a\.toml: cannot be read: Is a directory"):
        options(str(tmp_path / "a.toml"), toml=True)


def test_missing_toml_names_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.toml: no such config file"):
        options(str(tmp_path / "gone.toml"), toml=True)


@dataclass(frozen=True, kw_only=True)
class Grouped:
    """What to build."""

    verbose: bool = False
    """tell more"""
    dim: int = field(default=8, metadata={"heading": "model"})
    """width
    of the model"""
    layers: int | None = None
    """depth"""
    rate: float = field(default=1.0, metadata={"heading": "optimizer"})
    """step size"""


def test_help_shows_options_under_their_headings(capsys):
    with pytest.raises(SystemExit):
        parse(Grouped, ["--help"], program="x", description="A test.")
    words = " ".join(capsys.readouterr().out.partition("A test.")[2].split())
    order = ["what to build:", "--verbose", "tell more", "model:", "--dim INT", "width of the model", "--layers INT"]
    order += ["depth", "optimizer:", "--rate FLOAT", "step size"]
    places = [words.index(text) for text in order]
    assert places == sorted(places)
    assert parse(Grouped, ["--rate=2", "--dim=9"], program="x", description="") == Grouped(rate=2.0, dim=9)


def test_help_lists_every_option_and_exits_with_zero(capsys):
    with pytest.raises(SystemExit) as caught:
        options("--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "x [CHECKPOINT]" in shown and "--temperature FLOAT" in shown and "step size" in shown
    assert "--resume TEXT" in shown and "where to go on" in shown and "None" not in shown


def test_run_turns_errors_into_one_line_and_an_exit_code():
    code = (
        "from llamalet import command, errors\n"
        "def main(argv):\n"
        "    raise {'config': errors.ConfigError('a: bad\\nb: bad'), 'ctrl-c': KeyboardInterrupt(),"
        " 'full': OSError(28, 'No space left on device', 'out/model.bin')}[argv[0]]\n"
        "command.run(main)\n"
    )
    root = Path(__file__).parents[2]
    for kind, status, text in (("config", 2, "a: bad b: bad"), ("ctrl-c", 130, "Ctrl-C"), ("full", 8, "out/model.bin")):
        done = subprocess.run([sys.executable, "-c", code, kind], cwd=root, capture_output=True, text=True)
        assert done.returncode == status
        assert text in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("redirection", "status", "words"),
    [("> /dev/full", 8, "error: stdout: No space left on device\n"), (">&-", 0, ""), ("| true", 141, "")],
)
def test_an_output_that_takes_nothing(redirection, status, words):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    code = "from llamalet import command\ncommand.run(lambda argv: print('word ' * 100_000) or 0)"
    command = f'set -o pipefail; {sys.executable} -c "{code}" {redirection}'
    root = Path(__file__).parents[2]
    done = subprocess.run(["bash", "-c", command], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, words)
