"""What scripts import, and what the runtime takes from elsewhere; lint-imports checks the rooms (pyproject.toml)."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
ALLOWED = {
    "configurator": {"llamalet"},
    "export": {"configurator", "corpus", "llamalet", "parity", "training"},
    "model": {"llamalet"},
    "sample": {"llamalet"},
    "tinystories": {"configurator", "corpus", "llamalet"},
    "train": {"configurator", "corpus", "llamalet", "training"},
}
PIP_INSTALLS = {"numpy", "numba", "llvmlite", "sentencepiece"}
EXTRA = {"tokenizers", "gguf", "regex", "jinja2", "huggingface_hub", "starlette", "uvicorn", "h11"}


def imported(source: str) -> set[str]:
    """The packages that a program imports anywhere, by their first names."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module if node.module and not node.level else ".relative")
    return {name.partition(".")[0] for name in names}


def test_every_script_has_its_rule():
    assert {path.stem for path in ROOT.glob("*.py")} == ALLOWED.keys()
    assert {"llamalet", "corpus", "training", "parity", "benchmarks", "train"} <= OURS


@pytest.mark.parametrize("name", ALLOWED)
def test_a_script_imports_rooms_but_no_script(name):
    assert imported((ROOT / f"{name}.py").read_text()) & OURS <= ALLOWED[name]


@pytest.mark.parametrize("path", sorted((ROOT / "llamalet").rglob("*.py")), ids=lambda path: path.stem)
def test_the_runtime_imports_what_pip_installs_or_an_extra_names(path):
    known = {"llamalet"} | PIP_INSTALLS | EXTRA | sys.stdlib_module_names
    torch = {"torch"} if path.name == "pytorch_file.py" else set()
    assert imported(path.read_text()) <= known | torch


@pytest.mark.parametrize(
    "line", ["import train", "from train import main", "def f():\n    from train import main", "import train.x as y"]
)
def test_a_planted_import_is_seen(line):
    assert imported(f"import os\n{line}\n") == {"os", "train"}


def test_no_two_classes_outside_the_tests_share_a_name():
    found: dict[str, str] = {}
    for path in sorted(ROOT.glob("*.py")) + [p for room in OURS for p in sorted((ROOT / room).rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                assert found.setdefault(node.name, str(path)) == str(path), f"{node.name} in {path}"
    assert len(found) > 100
