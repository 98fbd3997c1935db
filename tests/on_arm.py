"""Run the runtime's tests as 64-bit Arm code, emulated on another processor: `make test-arm`.

    python tests/on_arm.py                                   the runtime's tests, at most 30 minutes
    python tests/on_arm.py tests/llamalet/kernels -k matmul  some of them; what follows goes to pytest
    python tests/on_arm.py --cpu=cortex-a72                  as another processor: this one has no dot products

It needs Debian or a relative of it, and qemu's user-mode emulator. Everything else comes from the machine's own package
sources and Python index, and goes to build/arm, which can be deleted: a Python with its libraries (Debian packages for
arm64, unpacked there and not installed), wheels, and the compiled kernels. A second run finds it all done.

Emulation proves that the code computes the right numbers. It says nothing about speed, and little about threads: x86
keeps its memory in order, and so does an Arm processor emulated on it.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOME = ROOT / "build" / "arm"
EMULATOR = "qemu-aarch64-static"

LISTS = ("pyproject.toml", "constraints.txt")
PACKAGES = ("python3", "libstdc++6", "libgomp1")
EXTRAS = ("lite", "hub")  # of pyproject.toml, beside what the runtime needs
TEST_WHEELS = ("pytest", "pytest-xdist", "hypothesis", "safetensors")
# The kinds of wheels that Debian's C library can load, those for the oldest one last.
PLATFORMS = [f"manylinux_2_{minor}_aarch64" for minor in range(36, 16, -1)] + ["manylinux2014_aarch64"]

LIMIT_S, REPORT_S = 30 * 60, 60
TESTS = "tests/llamalet"
NEEDS_TORCH, NEEDS_TRANSFORMERS = "needs PyTorch", "needs transformers"
NO_KERNELS = "numpy or Python alone, for minutes"
# What is not run of TESTS, and why.
LEFT_OUT = {
    "tests/llamalet/backward": "training, whose kernels take minutes to compile",
    "tests/llamalet/convert": NEEDS_TORCH,
    "tests/llamalet/serve": "the server, which computes nothing and needs other packages",
    "tests/llamalet/test_startup.py": "the first second of commands, in dozens of processes",
    "tests/llamalet/test_template_process.py": "chat templates, whose limits in seconds an emulated Python exceeds",
    "tests/llamalet/test_story_grammar.py": NO_KERNELS,
    "tests/llamalet/test_calibration.py": NO_KERNELS,
    "tests/llamalet/test_checks.py": NEEDS_TORCH,
    "tests/llamalet/test_chat.py": NEEDS_TRANSFORMERS,
    "tests/llamalet/test_chat_templates.py": NEEDS_TRANSFORMERS,
    "tests/llamalet/test_template_filters.py": NEEDS_TRANSFORMERS,
    "tests/llamalet/tokenizer/test_classes.py": NEEDS_TRANSFORMERS,
    "tests/llamalet/tokenizer/test_declared.py": NEEDS_TRANSFORMERS,
    "tests/llamalet/tokenizer/test_huggingface.py": NEEDS_TRANSFORMERS,
}
QUICK = "not compiles and not slow and not trains"


class Missing(Exception):
    """Something that the user must provide."""


def main() -> int:
    """Set up what is missing and run the tests; return pytest's exit code, or 2 if something is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", default="max", help="a processor that qemu knows (default: %(default)s)")
    options, chosen = parser.parse_known_args()
    start = time.monotonic()
    try:
        check_programs()
        python = set_up()
    except Missing as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: {error.cmd[0]} failed (exit code {error.returncode}); its messages are above", file=sys.stderr)
        return 2
    code = run_tests(python, options.cpu, chosen, LIMIT_S - (time.monotonic() - start))
    if not chosen:
        print("not run, beside what was skipped above:")
        for path, reason in LEFT_OUT.items():
            print(f"  {path}: {reason}")
        print("  what is marked compiles, slow or trains: would take hours")
    print(f"{(time.monotonic() - start) / 60:.1f} minutes, emulating {options.cpu}")
    return code


def check_programs() -> None:
    """Raise Missing if this is not Debian or the like, or the emulator is not installed."""
    for program in ("apt-get", "dpkg-deb"):
        if not shutil.which(program):
            raise Missing(f"{program}: not found; this needs Debian or a relative of it")
    if not shutil.which(EMULATOR):
        raise Missing(f"{EMULATOR}: not found; install it with: sudo apt-get install qemu-user-static")


def set_up() -> Path:
    """Fill HOME with what is not there yet; return the command that starts Arm's Python."""
    root, site, python = HOME / "root", HOME / "site", HOME / "python"
    HOME.mkdir(parents=True, exist_ok=True)
    once(root, lambda folder: unpack_packages(folder, HOME / "apt"))
    (interpreter,) = (root / "usr" / "bin").glob("python3.[0-9]*[0-9]")
    if site.exists() and any((ROOT / name).stat().st_mtime > site.stat().st_mtime for name in LISTS):
        shutil.rmtree(site)
    once(site, lambda folder: unpack_wheels(folder, HOME / "wheels", interpreter.name.removeprefix("python")))
    # A process that Python starts is a command of the machine, not of the emulator: this script calls the emulator.
    python.write_text(
        f'#!/bin/sh\nexport PYTHONPATH="{site}${{PYTHONPATH:+:$PYTHONPATH}}"\n'
        f'exec {EMULATOR} -L "{root}" "{interpreter}" "$@"\n'
    )
    python.chmod(0o755)
    (site / "sitecustomize.py").write_text(f"import sys\n\nsys.executable = sys._base_executable = {str(python)!r}\n")
    return python


def once(folder: Path, fill) -> None:
    """Create a folder with what `fill` puts into it, unless it is there; an unfinished one is begun anew."""
    if folder.exists():
        return
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    fill(unfinished)
    unfinished.rename(folder)


def unpack_packages(folder: Path, apt: Path) -> None:
    """Download PACKAGES for arm64 and all that they depend on, and unpack them."""
    for name in ("lists/partial", "cache/archives/partial", "state"):
        (apt / name).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()  # of the installed packages: none
    settings = {
        "Dir::State": apt / "state",
        "Dir::State::lists": apt / "lists",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "APT::Architecture": "arm64",
        "APT::Architectures::": "arm64",
        "APT::Sandbox::User": "",  # who may not write here
        "APT::Update::Post-Invoke": "",
        "Debug::NoLocking": "1",
    }
    command = ["apt-get", "-qq", *(word for key, value in settings.items() for word in ("-o", f"{key}={value}"))]
    print("downloading Debian's packages of Python for arm64 (20 MB, and 20 MB of lists)", flush=True)
    subprocess.run([*command, "update"], check=True)
    subprocess.run([*command, "install", "--download-only", "-y", "--no-install-recommends", *PACKAGES], check=True)
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], check=True)


def unpack_wheels(folder: Path, wheels: Path, version: str) -> None:
    """Download the wheels that the tests need, in the versions of constraints.txt, and unpack them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for extra in EXTRAS for name in project["optional-dependencies"][extra]]
    shutil.rmtree(wheels, ignore_errors=True)
    print("downloading wheels for arm64 (90 MB)", flush=True)
    subprocess.run(
        [
            sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", f"--dest={wheels}",
            f"--constraint={ROOT / 'constraints.txt'}", f"--python-version={version}", "--implementation=cp",
            *(f"--platform={platform}" for platform in PLATFORMS),
            *project["dependencies"], *extras, *TEST_WHEELS,
        ],
        check=True,
    )  # fmt: skip
    for wheel in sorted(wheels.glob("*.whl")):
        shutil.unpack_archive(wheel, folder, "zip")


def run_tests(python: Path, cpu: str, chosen: Sequence[str], limit_s: float) -> int:
    """Run pytest on emulated Arm for at most limit_s seconds; return its exit code, or 1 if they are over."""
    default = [TESTS, *(f"--ignore={path}" for path in LEFT_OUT), "-m", QUICK, "--numprocesses=2", "--dist=worksteal"]
    words = list(chosen) or [*default, "--durations=15"]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "QEMU_CPU": cpu,
        "OPENBLAS_CORETYPE": "ARMV8",  # its products with SVE, as emulated, are NaN
        "XDG_CACHE_HOME": str(HOME / "cache"),
    }
    # Hypothesis' profile for slow machines: no limit to the time of one example.
    command = [str(python), "-m", "pytest", "-rs", "--hypothesis-profile=ci", *words]
    tests = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, preexec_fn=lambda: os.nice(10))
    try:
        return tests.wait(limit_s)
    except subprocess.TimeoutExpired:
        print(f"error: the tests took more than {LIMIT_S // 60} minutes", file=sys.stderr)
        os.killpg(tests.pid, signal.SIGINT)  # it still says which tests failed
        with contextlib.suppress(subprocess.TimeoutExpired):
            tests.wait(REPORT_S)
        return 1
    finally:
        if tests.poll() is None:
            os.killpg(tests.pid, signal.SIGKILL)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
