"""Commands in anyone's environment: streams, locales, variables, homes, caches, files that are no files."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from toy import SMALL_MODELS, toy_data, toy_model

from configurator import read_toml
from llamalet import cli, files, shards
from llamalet.convert import pytorch_file
from llamalet.errors import ConfigError, DataError, FormatError, TokenizerError
from llamalet.kernels import cache

ROOT = Path(__file__).parents[2]
CONFIG = SMALL_MODELS["gqa-tied"]
SAMPLE = [sys.executable, str(ROOT / "sample.py")]
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses Linux's /proc or bash")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("a folder")
    toy_model(folder, CONFIG)
    toy_model(folder, CONFIG, name="\u00e9")
    return folder


def shell(folder: Path, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line in bash, with $SAMPLE for sample.py and a small model on the numpy backend."""
    # Where this is set, Python buffers nothing, and what it does with a buffer that cannot be written is not seen.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    sample = shlex.join([*SAMPLE, "model.bin", "-n", "8", "-s", "1", "--backend=numpy"])
    return subprocess.run(
        ["bash", "-c", command.replace("$SAMPLE", sample).replace("$PYTHON", sys.executable)], cwd=folder,
        env=inherited | {"PYTHONPATH": str(ROOT)} | environment, capture_output=True, text=True, encoding="utf-8",
        timeout=100,
    )  # fmt: skip


# --- packages ---


@pytest.mark.parametrize(
    ("package", "script", "words"),
    [
        ("tqdm", "tinystories.py", []),  # among the imports at the top
        ("datasets", "tinystories.py", ["download"]),  # later
        ("numpy", "sample.py", []),
    ],
)
def test_a_package_that_is_missing_is_named_in_a_line(tmp_path, package, script, words):
    code = "import runpy, sys; sys.modules[sys.argv[1]] = None; del sys.argv[:2]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, package, ROOT / script, *words], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith(f"error: needs the package {package}: pip install {package}")
    assert done.stderr.count("\n") == 1


def test_other_errors_keep_their_traceback():
    for line in ("1 / 0", "import json.gone", "from os import gone"):
        code = f"from llamalet import startup; startup.begin(); {line}"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
        assert done.returncode == 1 and "Traceback" in done.stderr


# --- streams ---


@LINUX
@pytest.mark.parametrize("closed", ["2>&-", "<&- 2>&-", "<&-"])
def test_a_story_with_closed_streams_is_the_same(folder, closed):
    expected = shell(folder, "$SAMPLE").stdout
    done = shell(folder, f"$SAMPLE {closed}")
    assert (done.returncode, done.stdout) == (0, expected) and len(expected) > 1
    assert ("seed 1" in done.stderr) == ("2>" not in closed)


@LINUX
def test_no_file_gets_the_number_of_a_closed_stream(folder):
    code = (
        "import os, sys; from llamalet import startup; startup.begin(); file = open('note', 'w+');"
        "print('x', file=sys.stderr, flush=True); os.write(2, b'y'); os.write(1, b'z'); print(file.fileno(), file=file)"
    )
    done = shell(folder, f"$PYTHON -c {shlex.quote(code)} <&- >&- 2>&-")
    assert done.returncode == 0 and (folder / "note").read_text() == "3\n"


@LINUX
@pytest.mark.parametrize("words", ["$SAMPLE 2>/dev/full", "$SAMPLE 2>&1 >/dev/null | true; exit 0"])
def test_notes_that_nobody_can_read_stop_nothing(folder, words):
    done = shell(folder, words)
    assert done.returncode == 0 and "Traceback" not in done.stderr


@LINUX
@pytest.mark.parametrize("program", ["sample.py", "train.py", "export.py", "tinystories.py", "-m llamalet"])
@pytest.mark.parametrize(
    ("redirection", "code", "words"),
    [(">/dev/full", 8, "error: stdout: No space left on device\n"), ("| head -c 1 >/dev/null", 0, "")],
)
def test_help_into_a_full_disk_or_a_closed_pipe(folder, program, redirection, code, words):
    path = program if program.startswith("-") else ROOT / program
    done = shell(folder, f"$PYTHON {path} --help {redirection}")
    assert (done.returncode, done.stderr) == (code, words)


# --- locales ---


@LINUX
@pytest.mark.parametrize(
    "locale", ["LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0", "LC_ALL=C", "PYTHONIOENCODING=ascii"]
)
def test_arguments_are_utf8_in_every_locale(folder, locale):
    expected = shell(folder, "$SAMPLE -i caf\u00e9").stdout
    done = shell(folder, f"env {locale} {shlex.join(SAMPLE)} \u00e9.bin -n 8 -s 1 --backend=numpy -i caf\u00e9")
    assert (done.returncode, done.stdout) == (0, expected) and expected.startswith("caf\u00e9")
    done = shell(folder, f"env {locale} {shlex.join(SAMPLE)} \u00f1.bin")
    assert done.returncode == 4 and done.stderr.count("\n") == 1 and "no such model file" in done.stderr


# --- numba's variables ---


@pytest.mark.parametrize(
    ("variable", "code", "line"),
    [
        ("NUMBA_NUM_THREADS=-3", 2, "error: NUMBA_NUM_THREADS=-3: must be a positive number, at most 1024"),
        ("NUMBA_NUM_THREADS=abc", 2, "error: NUMBA_NUM_THREADS=abc: must be a positive number, at most 1024"),
        ("NUMBA_NUM_THREADS=99999", 2, "error: NUMBA_NUM_THREADS=99999: must be a positive number, at most 1024"),
        ("NUMBA_CPU_FEATURES=fast", 2, "error: NUMBA_CPU_FEATURES=fast: must be names with + or - before them"),
        ("NUMBA_DISABLE_JIT=1", 0, "llamalet: NUMBA_DISABLE_JIT is set, so that numba compiles nothing: taking"),
    ],
)
def test_a_bad_variable_ends_in_one_line(folder, variable, code, line):
    name, _, value = variable.partition("=")
    for threads in ([], ["--threads=2"]):
        done = subprocess.run(
            [*SAMPLE, "model.bin", "-n", "8", "-s", "1", *threads], cwd=folder, capture_output=True, text=True,
            env=os.environ | {name: value},
        )  # fmt: skip
        assert done.returncode == code and "Traceback" not in done.stderr
        assert sum(found.startswith(line) for found in done.stderr.splitlines()) == 1, done.stderr


def test_a_variable_that_numba_cannot_read_is_ignored_with_a_line(folder):
    code = "from llamalet.kernels.environment import import_numba; print(import_numba())"
    done = shell(folder, f"$PYTHON -c {shlex.quote(code)}", NUMBA_OPT="abc", NUMBA_DISABLE_JIT="no")
    assert done.stdout == "True\n"
    assert done.stderr.splitlines() == [
        "llamalet: NUMBA_OPT=abc: not a value that numba can read; ignored",
        "llamalet: NUMBA_DISABLE_JIT=no: not a value that numba can read; ignored",
    ]


# --- homes and caches ---


def test_without_a_home_the_kernels_go_to_a_temporary_folder(monkeypatch, tmp_path):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
    assert files.home_folder() is None
    assert [root.parent for root in cache.roots()] == [tmp_path]

    def none():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(cache.tempfile, "gettempdir", none)
    assert list(cache.roots()) == []


def test_an_empty_home_and_a_relative_cache_are_none(monkeypatch):
    monkeypatch.setenv("HOME", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert files.home_folder() is None and len(list(cache.roots())) == 1


def test_an_unusable_cache_is_said_in_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    roots = [tmp_path / "file" / "root", tmp_path / "other"]
    assert cache.open_folder(roots, "name") == tmp_path / "other" / "name"
    assert capsys.readouterr().err == f"llamalet: kernel cache: {roots[0]}: Not a directory; taking {roots[1]}\n"
    assert cache.open_folder(roots[:1], "name") is None
    assert capsys.readouterr().err.endswith("Not a directory; the kernels are compiled at every start\n")


# --- files ---


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_a_fifo_is_refused_instead_of_waited_for(folder, tmp_path):
    fifo = tmp_path / "fifo.toml"
    os.mkfifo(fifo)
    with pytest.raises(OSError, match="not a regular file"):
        files.read_file(fifo)
    with pytest.raises(ConfigError, match="not a regular file"):
        read_toml(fifo, {})
    with pytest.raises(FormatError, match="neither a regular file nor a folder"):
        cli.main(["generate", str(fifo)])
    with pytest.raises(TokenizerError, match="not a file"):
        cli.main(["generate", str(folder / "model.bin"), "-z", str(fifo)])
    with pytest.raises(DataError, match="not a regular file"):
        cli.main(["evaluate", str(folder / "model.bin"), str(fifo), "--backend=numpy"])
    os.mkfifo(tmp_path / shards.META_FILE)
    with pytest.raises(DataError, match="not a regular file"):
        shards.Shards.open(tmp_path)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    (tmp_path / "x.toml").write_bytes(b"\xef\xbb\xbf# empty\n")
    assert read_toml(tmp_path / "x.toml", {}) == {}
    toy_data(tmp_path, 300)
    meta = tmp_path / shards.META_FILE
    meta.write_bytes(b"\xef\xbb\xbf" + meta.read_bytes())
    assert shards.Shards.open(tmp_path).vocab_size == 300


def test_a_printed_command_can_be_typed(folder, tmp_path, capsys):
    assert cli.main(["convert", str(folder / "model.bin"), str(tmp_path / "my model.bin"), "--dtype=q8"]) == 0
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("run it: ")
    assert shlex.split(command) == ["llamalet", "generate", str(tmp_path / "my model.bin")]


def test_torch_s_advice_to_run_a_file_is_not_passed_on(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"x": Path("x")}, tmp_path / "x.pt")
    with pytest.raises(FormatError) as caught:
        pytorch_file.load(tmp_path / "x.pt")
    assert str(caught.value).endswith("without running code: it wants to run pathlib.PosixPath")


# --- Ctrl-C ---


def test_ctrl_c_that_became_another_error_or_got_lost_is_ctrl_c(folder):
    code = """
import os, signal, time
from llamalet.command import nothing_to_lose, run
class Lost:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
def other():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    except KeyboardInterrupt:
        raise ImportError("numpy.core failed to import") from None
def lost():
    Lost()
    time.sleep(20)
def in_import():
    with nothing_to_lose():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except BaseException:
            pass
run(lambda argv: {"other": other, "lost": lost, "in_import": in_import}[argv[0]]() or 0)
"""
    for how in ("other", "lost", "in_import"):
        done = shell(folder, f"$PYTHON -c {shlex.quote(code)} {how}")
        assert (done.returncode, done.stderr) == (130, "error: stopped by Ctrl-C\n"), how


def test_a_message_has_no_control_characters(folder):
    message = "\\x1b[1mbold\\x1b[0m a\\x07\\nb"
    code = f"from llamalet import command, errors; command.run(lambda _: errors.ConfigError.raise_for(['{message}']))"
    done = shell(folder, f"$PYTHON -c {shlex.quote(code)}")
    assert done.stderr == "error: bold a\\x07 b\n" and done.returncode == 2


def test_a_command_in_the_background_goes_on_ignoring_ctrl_c(folder):
    code = (
        "import signal; from llamalet import startup; startup.begin(); handler = signal.getsignal(signal.SIGINT);"
        "print(handler == signal.SIG_IGN, handler == startup.end_at_once)"
    )
    assert shell(folder, f"trap '' INT; $PYTHON -c {shlex.quote(code)}").stdout == "True False\n"
    assert shell(folder, f"$PYTHON -c {shlex.quote(code)}").stdout == "False True\n"


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_a_signal_before_the_handler_waits_for_it():
    code = (
        "import os, signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]); os.kill(os.getpid(), 2);"
        "from llamalet import startup; print('before', flush=True); startup.begin(); print('after')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "before\n", "error: stopped by Ctrl-C\n")


def test_every_command_begins_with_the_same_lines():
    first = (ROOT / "sample.py").read_text().partition('"""\n\n')[2].partition("\n\nfrom ")[0]
    assert "SIG_BLOCK" in first and first.endswith("startup.begin()  # before imports that take seconds")
    commands = {}
    for path in (
        path
        for folder in (".", "training/run", "parity", "benchmarks", "llamalet/serve")
        for path in (ROOT / folder).glob("*.py")
    ):
        if re.search(r"^    (command\.)?run\(main\)", text := path.read_text(), re.MULTILINE):
            commands[path.name] = text.partition('"""\n\n')[2].startswith(first)
    assert len(commands) == 16 and all(commands.values()), commands
