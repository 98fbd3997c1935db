"""What `pip install llamalet` brings: the wheel is built, installed into an empty folder, and used from another."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import llvmlite
import numba
import numpy
import pytest
import sentencepiece

import llamalet

ROOT = Path(__file__).parents[2]
DEPENDENCIES = (numpy, numba, llvmlite, sentencepiece)
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="links the dependencies")]


# Not needed for the wheel, or not part of the project.
IGNORED = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "data", "out", "wandb", "shared", "tests", "benchmarks"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the checkout without a network."""
    checkout, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, checkout, ignore=IGNORED, dirs_exist_ok=True)
    assert (checkout / "training").is_dir() and (checkout / "model.py").is_file()
    build = [*PIP, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", out, checkout]
    subprocess.run(build, check=True, timeout=300)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with the package alone."""
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "--target", folder, wheel], check=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def run(installed, tmp_path_factory):
    """Run llamalet's command elsewhere, where only the package and its dependencies can be imported."""
    linked, elsewhere = tmp_path_factory.mktemp("dependencies"), tmp_path_factory.mktemp("elsewhere")
    for package in DEPENDENCIES:
        folder = Path(package.__file__).parent
        (linked / folder.name).symlink_to(folder)
        for libraries in folder.parent.glob(f"{folder.name}.libs"):
            (linked / libraries.name).symlink_to(libraries)
    # -S: no site-packages, and so neither an editable install of the checkout nor anything else.
    start = f"import sys; sys.path[:0] = {[str(installed), str(linked)]}; from llamalet.__main__ import run; run()"

    def run(*words: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", "-S", "-c", start, *map(str, words)]
        return subprocess.run(command, cwd=elsewhere, input=stdin, capture_output=True, text=True, timeout=300)

    return run


def test_the_wheel_holds_the_runtime_and_the_demo_model(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    package = {name for name in names if name.startswith("llamalet/")}
    assert {name.partition("/")[0] for name in names} == {"llamalet", f"llamalet-{llamalet.__version__}.dist-info"}
    files = [path for path in (ROOT / "llamalet").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert package == {path.relative_to(ROOT).as_posix() for path in files}
    assert {"llamalet/assets/demo.bin", "llamalet/cli.py", "llamalet/serve/page/index.html"} <= package
    demo = zipfile.ZipFile(wheel).read("llamalet/assets/demo.bin")
    assert demo == (ROOT / "llamalet" / "assets" / "demo.bin").read_bytes()


def test_the_wheel_requires_three_packages_and_has_one_command(wheel):
    (info,) = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist() if ".dist-info" in name}
    metadata = zipfile.ZipFile(wheel).read(f"{info}/METADATA").decode().partition("\n\n")[0].splitlines()
    needed = [line.split()[1] for line in metadata if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert {name.partition(">")[0] for name in needed} == {"numpy", "numba", "sentencepiece"}
    assert zipfile.ZipFile(wheel).read(f"{info}/entry_points.txt").decode().split() == [
        "[console_scripts]", "llamalet", "=", "llamalet.__main__:run",
    ]  # fmt: skip


def test_nothing_else_arrives(installed):
    arrived = {path.name for path in installed.iterdir()}
    assert arrived == {"llamalet", "bin", f"llamalet-{llamalet.__version__}.dist-info"}
    assert [path.name for path in (installed / "bin").iterdir()] == ["llamalet"]


def test_the_commands_run_elsewhere(run, installed):
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"llamalet {llamalet.__version__}\n"), done.stderr
    assert "llamalet generate" in run().stdout
    story = run("generate", "-i", "Once upon a time", "-t", 0.8, "-s", 7)
    assert story.returncode == 0, story.stderr
    assert story.stdout.startswith("Once upon a time") and len(story.stdout) > 200
    assert f"the demo model {installed}" in story.stderr
    demo = installed / "llamalet" / "assets" / "demo.bin"
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    assert "pip install jinja2" in run("chat", demo, f"--chat-template={_file(installed, template)}").stderr
    assert "not a chat model" in run("chat").stderr
    answer = run("chat", demo, "--chat-template=llama2", "--max-new-tokens=5", "-s", 1, stdin="Hello\n")
    assert answer.returncode == 0 and answer.stdout.strip(), answer.stderr
    scored = run("evaluate", demo, _file(installed, story.stdout))
    assert scored.returncode == 0 and "bits per byte" in scored.stdout, scored.stderr
    small = installed.with_name(f"{installed.name}-small.bin")
    done = run("convert", demo, small, "--dtype=q4")
    assert done.returncode == 0 and small.stat().st_size < demo.stat().st_size / 1.5, done.stderr
    assert run("generate", small, "-i", "Once", "-n", 9).stdout.startswith("Once")


def _file(folder: Path, text: str) -> Path:
    """Return a new file beside `folder` with this text."""
    path = folder.with_name(f"{folder.name}-{len(text)}.txt")
    path.write_text(text)
    return path
