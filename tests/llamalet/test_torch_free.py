import subprocess
import sys
from pathlib import Path

from toy import SMALL_MODELS, toy_model

ROOT = Path(__file__).parents[2]

# A process in which some modules are not installed. (None in sys.modules will not do: tyro takes any entry for torch.)
WITHOUT = """
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Without())
"""


def run(code: str, *argv: object, missing: tuple[str, ...] = ("torch",)) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", WITHOUT.format(missing=missing) + code, *map(str, argv)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_blockade_holds():
    assert "No module named 'torch'" in run("import torch").stderr


def test_every_module_of_the_runtime_imports_without_torch():
    paths = [path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / "llamalet").rglob("*.py"))]
    names = [".".join(path.parts) for path in paths]
    assert "llamalet.generate" in names and "llamalet.tokenizer.llama3" in names
    done = run(f"from importlib import import_module\nfor name in {names}: import_module(name)")
    assert done.returncode == 0, done.stderr


def test_no_module_of_the_runtime_imports_torch_or_a_script():
    done = run("import llamalet.evaluate, llamalet.runtime; print(*sys.modules)")
    loaded = set(done.stdout.split())
    assert "llamalet.shards" in loaded
    assert not loaded & {"model", "train", "export", "sample", "tinystories", "configurator", "training", "datasets"}


def test_importing_the_package_is_cheap():
    done = run("import llamalet, llamalet.config, llamalet.errors; print(*sys.modules)")
    assert not set(done.stdout.split()) & {"numba", "sentencepiece", "tyro", "llamalet.runtime"}


def test_sample_tells_a_story_without_torch(tmp_path):
    path = toy_model(tmp_path, SMALL_MODELS["gqa-tied"], version=2)
    done = run("import sample; sys.exit(sample.main(sys.argv[1:]))", path, "-i", "a band", "-n", "12")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("a band") and done.stdout.endswith("\n")


def test_the_numpy_backend_needs_no_numba(tmp_path):
    path = toy_model(tmp_path, SMALL_MODELS["gqa-tied"], version=2)
    words = (path, "-i", "a band", "-n", "12", "--backend=numpy")
    done = run("import sample; sys.exit(sample.main(sys.argv[1:]))", *words, missing=("torch", "numba"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("a band")
