"""README.md and docs/: their code runs, its output is the one shown, and everything that they name exists.

After changing code in a page, put the new outputs into it: python tests/test_docs.py docs/tour.md
"""

import contextlib
import functools
import importlib
import io
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
# A block of Python, and the block of text after it, which shows what it prints.
EXAMPLE = re.compile(r"^```python\n(.*?)^```\n(?:\n?^```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"-?\d+\.\d+(?:e[+-]\d+)?")


def run_example(code, namespace):
    """Return what a block prints; the namespace is that of the blocks before it."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "example", "exec"), namespace)
    return printed.getvalue()


def agree(printed, shown):
    """Whether two outputs are the same text, give or take one in the last digit of a decimal number.

    Float32 sums come out differently in the last bit on other processors, and a rounded number may then differ.
    """
    if NUMBER.split(printed) != NUMBER.split(shown):
        return False
    for ours, theirs in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        mantissa, _, exponent = theirs.partition("e")
        last_digit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
        if abs(float(ours) - float(theirs)) > 1.01 * last_digit:
            return False
    return True


@pytest.mark.parametrize(
    "page", [page for page in PAGES if EXAMPLE.search(page.read_text())], ids=lambda page: page.stem
)
def test_the_examples_of_a_page_print_what_it_shows(page):
    namespace = {}
    for code, shown in EXAMPLE.findall(page.read_text()):
        printed = run_example(code, namespace)
        assert not shown or agree(printed, shown), f"{page.name}: this block\n{code}\nprints\n{printed}\nnot\n{shown}"


def test_outputs_agree_up_to_one_in_the_last_digit():
    assert agree("loss 0.6822 after 10 steps\n", "loss 0.6821 after 10 steps\n")
    assert agree("1.25e-05 of 27\n", "1.24e-05 of 27\n")
    assert not agree("loss 0.6823\n", "loss 0.6821\n")
    assert not agree("after 11 steps\n", "after 10 steps\n")
    assert not agree("loss 0.68\nmore\n", "loss 0.68\n")


def anchors(page):
    """Return the names that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page):
    return re.findall(r"\]\(([^)\s]+)\)", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in links(page):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}: no such file"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}: no such heading"


# What a run or a reader makes is named on the pages, but is not in the repository.
NOT_OURS = re.compile(r"(out|data|checkpoints)/|(model|tokenizer|config)\.|stories\d|my_|[A-Z]")


@functools.cache
def our_files():
    """Return the paths of the files here, but not those of what was installed or made."""
    folders = [
        path for path in ROOT.iterdir() if path.is_dir() and path.name not in (".venv", ".venv-lite", "out", "data")
    ]
    return [str(path.relative_to(ROOT)) for folder in folders for path in folder.rglob("*.*")]


def named_files(page):
    return re.findall(r"`((?:\w+/)*\w+\.(?:py|toml|md|log|bin)|(?:\w+/)+)`", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_a_page_names_exist(page):
    for name in named_files(page):
        exists = (
            (ROOT / name).exists()
            or (ROOT / "llamalet" / name).is_dir()
            or any(file.endswith(f"/{name}") for file in our_files())
        )
        assert exists or NOT_OURS.match(name), f"{page.name}: {name}: no such file"


LLAMALET = ("generate", "chat", "serve", "evaluate", "convert")
PROGRAM = re.compile(rf"(torchrun .*)?(python -m [bt]|(python )?\w+\.py|make [a-z]|llamalet ({'|'.join(LLAMALET)}))")
COMMANDS = [f"{script}.py" for script in ("train", "export", "sample")]
COMMANDS += [f"tinystories.py {command}" for command in ("download", "synthesize", "train-vocab", "pretokenize")]
COMMANDS += [f"llamalet {command}" for command in LLAMALET]
COMMANDS += ["-m benchmarks.learning", "-m benchmarks.training", "-m benchmarks.runtime"]


def commands(page):
    """Return the commands on a page, as lists of words: those in indented blocks and those in `code spans`."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE).replace("\\\n", " ")
    lines = re.findall(r"^    (\S.*)$", text, re.MULTILINE) + re.findall(r"`([^`]+)`", text)
    found = [shlex.split(re.sub(r" #.*", "", line)) for line in lines if PROGRAM.match(line) and " " in line]
    found = [words[words.index("train.py") :] if words[0] == "torchrun" else words for words in found]
    return [words[1:] if words[:1] == ["python"] else words for words in found]


def options_of(words):
    """Return the options that a command prints for --help, with - for _, and the words after the command's name."""
    if words[0] == "llamalet":
        module, command, rest = "llamalet.cli", [words[1]], words[2:]
    elif words[0] == "-m":
        module, command, rest = words[1], [], words[2:]
    else:
        module = words[0].removesuffix(".py")
        command, rest = ([words[1]], words[2:]) if module == "tinystories" else ([], words[1:])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        importlib.import_module(module).main([*command, "--help"])
    options = re.findall(r"(?<![\w-])--?\w[\w-]*", printed.getvalue())
    return {"--help"} | {option.replace("_", "-") for option in options}, rest


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_on_a_page_use_options_that_exist(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in commands(page):
        if words[0] == "make":
            assert words[1] in targets, f"{page.name}: make {words[1]}: no such target"
            continue
        options, rest = options_of(words)
        for word in rest:
            option = word.partition("=")[0].replace("_", "-")
            if re.match(r"--?[a-z]", option):
                assert option in options, f"{page.name}: {' '.join(words)}: {option} is no option of it"


def named_options(page):
    return re.findall(r"`(--[\w-]+)", page.read_text())


def test_options_that_a_page_names_exist():
    known = set().union(*(options_of(command.split())[0] for command in COMMANDS))
    known |= {f"--no-{option[2:]}" for option in known} | {"--key", "--max-restarts"}  # a placeholder, and torchrun's
    for page in PAGES:
        for option in named_options(page):
            assert option.replace("_", "-") in known, f"{page.name}: {option}: no command has it"


@pytest.mark.parametrize("find", [links, named_files, commands, named_options], ids=lambda find: find.__name__)
def test_there_is_something_to_check(find):
    """The tests above check what these expressions find, so they must still match what the pages look like."""
    assert sum(len(find(page)) for page in PAGES) > 40
    assert find(README)


def test_the_readme_is_short():
    text = README.read_text()
    assert len(text.splitlines()) <= 200
    assert len(text.split()) <= 1800


def test_the_reading_path_has_the_lengths_that_the_readme_states():
    rows = re.findall(r"^\| \[`[^`]+`\]\(([^)]+)\) \| (\d+) \|", README.read_text(), re.MULTILINE)
    assert 5 <= len(rows) <= 8
    for path, stated in rows:
        n_lines = len((ROOT / path).read_text().splitlines())
        assert abs(n_lines - int(stated)) <= 0.05 * n_lines, f"{path} has {n_lines} lines, README says {stated}"
    assert sum(len((ROOT / path).read_text().splitlines()) for path, _ in rows) <= 2000


def write_outputs(page):
    """Replace the outputs that a page shows by those that its examples print."""
    namespace = {}

    def with_output(example):
        printed = run_example(example[1], namespace)
        return f"```python\n{example[1]}```\n" + (f"\n```text\n{printed}```\n" if printed else "")

    page.write_text(EXAMPLE.sub(with_output, page.read_text()))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.chdir(ROOT)
    for name in sys.argv[1:]:
        write_outputs(ROOT / name)
