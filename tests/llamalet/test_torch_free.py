import subprocess
import sys
from pathlib import Path

import pytest
from toy import SMALL_MODELS, toy_model

ROOT = Path(__file__).parents[2]

# Lets a process import what `allows` and nothing else, as where nothing more is installed.
# (None in sys.modules will not do: libraries take any entry there for the module.)
ONLY = """
import sys
class Only:
    def find_spec(self, name, path=None, target=None):
        if not ({allows}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Only())
"""
ALL_BUT_TORCH = "name.partition('.')[0] != 'torch'"
# What `pip install llamalet` brings.
INSTALLED = {"llamalet", "numpy", "numba", "llvmlite", "sentencepiece"}
RUNTIME = f"name.partition('.')[0] in {INSTALLED} | sys.stdlib_module_names"


def run(code: str, *argv: object, allows: str = ALL_BUT_TORCH) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", ONLY.format(allows=allows) + code, *map(str, argv)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_blockade_holds():
    assert "No module named 'torch'" in run("import torch").stderr
    for name in ("torch", "train", "corpus", "safetensors"):
        assert f"No module named '{name}'" in run(f"import {name}", allows=RUNTIME).stderr


def test_the_runtime_imports_only_what_pip_installs():
    paths = [path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / "llamalet").rglob("*.py"))]
    # template_child is a program of its own (with template_filters), which template_process starts if jinja2 is there.
    others = ("__main__", "template_child", "template_filters")
    # What imports starlette or uvicorn is for those who installed the extra [serve].
    served = {
        path for path in paths if "serve" in path.parts and path.name in ("app", "connection", "server", "insight")
    }
    names = [".".join(path.parts) for path in paths if path.name not in others and path not in served]
    assert "llamalet.generate" in names and "llamalet.convert.gguf_file" in names
    done = run(f"from importlib import import_module\nfor name in {names}: import_module(name)", allows=RUNTIME)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_is_cheap():
    done = run("import llamalet, llamalet.config, llamalet.errors; print(*sys.modules)")
    assert "llamalet.errors" in done.stdout
    assert not set(done.stdout.split()) & {"numba", "sentencepiece", "llamalet.runtime"}


# sample.py and the command need nothing else, and with --backend=numpy not even numba.
PROGRAMS = {
    "import sample; sys.exit(sample.main(sys.argv[1:]))": INSTALLED | {"sample"},
    "from llamalet import cli; sys.exit(cli.main(['generate', *sys.argv[1:]]))": INSTALLED,
}


@pytest.mark.parametrize("backend", ["numba", "numpy"])
@pytest.mark.parametrize("code", PROGRAMS)
def test_a_story_needs_only_what_pip_installs(tmp_path, code, backend):
    path = toy_model(tmp_path, SMALL_MODELS["gqa-tied"], version=2)
    names = PROGRAMS[code] - ({"numba", "llvmlite"} if backend == "numpy" else set())
    words = (path, "-i", "a band", "-n", "12", f"--backend={backend}")
    done = run(code, *words, allows=f"name.partition('.')[0] in {names} | sys.stdlib_module_names")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("a band") and done.stdout.endswith("\n")
