"""Prove that a changed checkout computes what an earlier one does, byte for byte.

    python tests/compare_checkouts.py OLD NEW                           all groups; exit code 1 on any difference
    python tests/compare_checkouts.py OLD NEW --only=exports,texts      some of them
    python tests/compare_checkouts.py OLD NEW --test-data=DIR           where stories260K.bin and the vocabularies lie

    data       stories and token shards that tinystories.py makes
    exports    all that export.py makes of six models, and of its own files in other formats
    logits     of those models in all types, on every instruction path, with 1 and 2 threads, and in numpy
    texts      what sample.py and llamalet.Model tell, with all kinds of settings; tokens and scores
    training   weights, moments, exports and metrics of short runs: 1 and 2 processes, eager and compiled
    resume     the same of runs that OLD began and the checkout ends

Each checkout needs a .venv with the same packages; all that counts runs in processes of its own. What goes in is made
by OLD alone. OLD's results stay in --cache until OLD or the processor changes.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSION = 1  # of what is computed here: with another one OLD's results are computed anew
SHOWN = 8  # differences of a group that are named
Found = dict[str, Any]

CONTEXTS = {"demo": 320, "stories260K": 512, "gqa-tied": 32, "gqa-untied": 32, "mqa-tied": 32, "mha-untied": 32}
TARGETS = {
    "v0": "model.bin --version=0", "v1": "model.bin --version=1", "v2": "model.bin --version=2",
    "v3-f32": "model.bin --dtype=f32", "v3-bf16": "model.bin --dtype=bf16",
    "v3-q8": "model.bin --dtype=q8", "v3-q4": "model.bin --dtype=q4",
    "gguf-f32": "model.gguf --dtype=f32", "gguf-f16": "model.gguf --dtype=f16",
    "gguf-q8_0": "model.gguf --dtype=q8_0", "gguf-q4_0": "model.gguf --dtype=q4_0",
    "hf-f32": "model --dtype=f32", "hf-bf16": "model --dtype=bf16",
}  # fmt: skip
# What OLD made above and export.py reads again, by its options.
SOURCES = {"hf": "hf-bf16/model", "gguf": "gguf-q4_0/model.gguf", "llama2c": "v0/model.bin", "bin": "v3-q4/model.bin"}
IN_LOGITS = ("v1", "v2", "v3-f32", "v3-bf16", "v3-q8", "v3-q4")
PATHS = ("portable", "avxvnni", "avx512vnni")

# Options of sample.py; the seed is the place in the list.
TALES = (
    "-t 0", "-t 1", "-t 0.8", "-t 0.5 -p 0.95", "-t 1.3 -p 0.5", "-p 1", "-p 0 --top-k=40", "--top-k=1",
    "--top-k=5 -t 2", "--min-p=0.1 -p 1", "--min-p=0.02 --top-k=100 -p 0.8 -t 1.1", "-i 'Once upon a time' -n 100",
    "-i 'The dog' --max-new-tokens=50", "-i 'One day, Zo\u00eb said: \"\u4f60\u597d\"' -t 0.7",
    "--num-samples=5 -n 120 -t 0.9", "--overflow=roll -n 500 --ignore-eos",
    "--overflow=roll --keep=9 -n 700 --ignore-eos -t 0.6 --num-samples=3",
    "-n 0 --ignore-eos", "--threads=1 -t 0.9", "--backend=numpy -n 80 -t 0.9",
)  # fmt: skip
CHAT = "-m chat --chat-template=llama2 -y 'You are kind.' --max-new-tokens=20 -s 5"
TEXTS = (
    'Once upon a time there was a boy. He said: "Hello!"\n\n',
    "Zo\u00eb \u4f60\u597d \U0001f600  \t 12345 it's",
    "<s> </s>",
)

TRAIN = (
    "--dim=48 --n_layers=2 --n_heads=4 --n_kv_heads=2 --max_seq_len=64 --data=data/synthetic/tok512 --out_dir=out "
    "--max_iters=50 --eval_interval=25 --eval_iters=4 --save_every=25 --log_interval=1 --warmup_iters=5 --keep=9 "
    "--batch_size=4 --total_batch_tokens=512 --device=cpu --threads=1 --sample=False"
)
# The processes and options of each run.
RUNS = {
    "one": (1, "--compile=False --dropout=0.1"),
    "adamw": (1, "--compile=False --dtype=float32 --optimizer=adamw --schedule=cosine --init=normal --tied=False"),
    "two": (2, "--compile=False --dtype=float32"),
    "fsdp": (2, "--compile=False --parallel=fsdp"),
    "compiled": (1, "--compile=True"),
}
CLOCKS = {"tokens_per_s", "tflops", "mfu", "eta_s", "elapsed_s"}
LAST = "out/checkpoints/step-00000050"


class Broken(Exception):
    """A command that failed where it must not."""


@dataclass(frozen=True)
class Checkout:
    """OLD or NEW, and the folder for what it makes."""

    name: str
    root: Path
    cache: Path

    def run(self, *words: str, at: Path, text: str = "", **environment: str) -> str:
        """Run the checkout's Python with these words and return what it prints."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LLAMALET", "OMP"))}
        kept |= {"PYTHONPATH": str(self.root), "XDG_CACHE_HOME": f"{self.cache}/kernels-{self.name}"}
        kept |= {"TORCHINDUCTOR_CACHE_DIR": f"{self.cache}/torch", "OPENBLAS_NUM_THREADS": "1"}
        command = [str(self.root / ".venv" / "bin" / "python"), *words]
        done = subprocess.run(command, cwd=at, env=kept | environment, input=text.encode(), capture_output=True)
        if done.returncode:
            end = done.stderr.decode(errors="replace").strip()[-1500:]
            raise Broken(f"{shlex.join(words)} in {at}: exit code {done.returncode}\n{end}")
        return done.stdout.decode()

    def command(self, script: str, options: str, at: Path, *, processes: int = 1, text: str = "") -> str:
        """Run one of the checkout's scripts and return what it prints."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        words = [*(torchrun if processes > 1 else []), str(self.root / script), *shlex.split(options)]
        return self.run(*words, at=at, text=text)

    def work(self, worker: Callable[..., Any], *arguments: Any, at: Path, **environment: str) -> Any:
        """Run a function of this script in a process of the checkout's and return what it returns."""
        words = ["-P", str(Path(__file__).resolve()), "--worker", worker.__name__]
        return json.loads(self.run(*words, str(self.root), json.dumps(arguments), at=at, **environment))


def main() -> int:
    """Compare and say what is alike; return 1 if anything is not, 2 if OLD itself fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--only", default=",".join(GROUPS), help="groups, with commas between them")
    parser.add_argument("--cache", type=Path, default=Path("same-cache"), help="where OLD's results stay; 300 MB")
    parser.add_argument("--test-data", default=os.environ.get("LLAMALET_TEST_DATA"), help="../shared/data beside OLD")
    parser.add_argument("--fresh-kernels", action="store_true", help="let NEW compile its kernels anew")
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - set(GROUPS):
        parser.error(f"--only={','.join(sorted(unknown))}: must be among {', '.join(GROUPS)}")
    cache, failed = options.cache.resolve(), 0
    old, new = (Checkout(name, getattr(options, name).resolve(), cache) for name in ("old", "new"))
    for side in (old, new):
        if not (side.root / ".venv" / "bin" / "python").exists():
            parser.error(f"{side.root}: has no .venv/bin/python")
    if options.fresh_kernels:
        shutil.rmtree(cache / "kernels-new", ignore_errors=True)
    try:
        prepare(old, Path(options.test_data or old.root.parent / "shared" / "data"))
        for group in [name for name in GROUPS if name in options.only.split(",")]:
            failed += not compare(group, results_of_old(old, group), new)
    except Broken as error:
        print(f"OLD itself fails: {error}", file=sys.stderr)
        return 2
    return 1 if failed else 0


def compare(group: str, expected: Found, new: Checkout) -> bool:
    """Let NEW compute a group, print what became of it, and return whether all of it is as expected."""
    start, trouble, found = time.monotonic(), "", {}
    try:
        found = compute(new, group)
        (new.cache / "new" / f"{group}.json").write_text(json.dumps(found, indent=1))
    except Broken as error:
        trouble = str(error)
    keys = list(expected | found)
    wrong = [key for key in keys if key not in expected or key not in found or expected[key] != found[key]]
    verdict = f"{'FAIL' if wrong else 'PASS'} {group:<9} {len(keys) - len(wrong)} of {len(keys)} alike"
    lines = [f"{key}: {difference(str(expected.get(key)), str(found.get(key)))}" for key in wrong[:SHOWN]]
    print(f"{verdict}, {time.monotonic() - start:.0f} s", *trouble.splitlines() or lines, sep="\n     ", flush=True)
    return not wrong


def difference(one: str, other: str) -> str:
    """Return what stands in two texts where they begin to differ."""
    start = max(len(os.path.commonprefix([one, other])) - 10, 0)
    return f"from character {start} on {one[start : start + 40]!r} became {other[start : start + 40]!r}"


def prepare(old: Checkout, test_data: Path) -> None:
    """Make what goes in, by OLD, unless it is there; forget all results where OLD is not what it was last time."""
    commit = ["git", "-C", str(old.root), "describe", "--always", "--dirty", "--abbrev=40"]
    cpu = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    stamp = [VERSION, test_data.is_dir(), *sorted({line for line in cpu if line.startswith(("model name", "flags"))})]
    text = json.dumps([*stamp, subprocess.check_output(commit, text=True)], indent=1)
    inputs, note = old.cache / "inputs", old.cache / "stamp.json"
    if note.is_file() and note.read_text() == text:
        return
    for folder in (inputs, old.cache / "old"):
        shutil.rmtree(folder, ignore_errors=True)
    inputs.mkdir(parents=True)
    assets = [*(old.root / "assets").glob("demo.*"), *(old.root / "llamalet" / "assets").glob("demo.*")]
    files = {path.name: path for path in assets}
    if test_data.is_dir():
        files |= {path.name: path for path in test_data.glob("llama*-tokenizer.*")}
        files |= {"stories260K.bin": test_data / "stories260K.bin"}
        files |= {"stories260K.tokenizer.bin": test_data / "tok512.bin"}
    else:
        print(f"note: there is no {test_data}, so stories260K and real vocabularies are left out; see --test-data")
    for name, path in files.items():
        shutil.copyfile(path, inputs / name)
    old.work(write_toys, at=inputs)
    old.command("tinystories.py", "synthesize --stories=3000 --val-stories=300 --workers=2", inputs)
    old.command("tinystories.py", "pretokenize synthetic --vocab-size=512 --workers=2", inputs)
    note.write_text(text)


def results_of_old(old: Checkout, group: str) -> Found:
    """Return OLD's results of a group, computed now where the cache has none."""
    if group in NEEDS:
        results_of_old(old, NEEDS[group])
    path = old.cache / "old" / f"{group}.json"
    if not path.is_file():
        start = time.monotonic()
        path.with_suffix(".tmp").write_text(json.dumps(compute(old, group), indent=1))
        path.with_suffix(".tmp").rename(path)
        print(f"     {group:<9} computed by OLD, {time.monotonic() - start:.0f} s", flush=True)
    return dict(json.loads(path.read_text()))


def compute(side: Checkout, group: str) -> Found:
    """Return the results of a group, made in an empty folder with links to what goes in."""
    folder = side.cache / side.name / group
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "inputs").symlink_to(side.cache / "inputs")
    (folder / "exported").symlink_to(side.cache / "old" / "exports")
    return dict(json.loads(json.dumps(GROUPS[group](side, folder))))


def digests(folder: Path, *patterns: str) -> Found:
    """Return the sha256 of the files in a folder that match, by their names there; links are not followed."""
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def models(folder: Path) -> list[str]:
    """Return the models that there are."""
    return [name for name in CONTEXTS if (folder / "inputs" / f"{name}.bin").is_file()]


# -- groups -----------------------------------------------------------------------------------------------------------


def data(side: Checkout, folder: Path) -> Found:
    """Make stories, a vocabulary and shards."""
    (folder / "poems.txt").write_text("\n\n".join(f"{text} {number}" for number in range(40) for text in TEXTS))
    side.command("tinystories.py", "synthesize --size=400kB --val-stories=150 --seed=3 --workers=2", folder)
    for options in ("synthetic --vocab-size=400", "poems.txt --document=blankline --vocab=inputs/demo.bin"):
        side.command("tinystories.py", f"pretokenize {options} --workers=2", folder)
    return digests(folder, "data/**/*")


def exports(side: Checkout, folder: Path) -> Found:
    """Export every model as everything, and what OLD made of it as a .bin again."""
    jobs = []
    for model in models(folder):
        jobs += [f"{model}/{target}/{options} --bin=inputs/{model}.bin" for target, options in TARGETS.items()]
        for (kind, source), target in itertools.product(SOURCES.items(), ("v1", "v3-q8")):
            jobs.append(f"{model}/{target}-from-{kind}/{TARGETS[target]} --{kind}=exported/{model}/{source}")
    for job in jobs:
        Path(folder, job.split()[0]).parent.mkdir(parents=True)
    codes = side.work(export, [f"{job} --no-check" for job in jobs], at=folder)
    side.command("export.py", "proved.bin --dtype=q8 --bin=inputs/demo.bin", folder)
    return {**codes, **digests(folder, *(f"{model}/**/*" for model in models(folder)), "proved*")}


def logits(side: Checkout, folder: Path) -> Found:
    """Compute the logits of what OLD exported in every way."""
    names = [f"exported/{model}/{kind}/model.bin" for model in models(folder) for kind in IN_LOGITS]
    names = [name for name in names if (folder / name).is_file()]  # version 2 cannot carry every model
    found: Found = side.work(forward, names, "numpy", [1], at=folder)
    for path in PATHS:
        on_path = side.work(forward, names, "numba", [1, 2], at=folder, LLAMALET_SIMD=path)
        found |= {f"{path}, {key}": value for key, value in on_path.items()}
    return found


def texts(side: Checkout, folder: Path) -> Found:
    """Tell stories on the command line and from Python."""
    told = [f"inputs/demo.bin -s {seed} {options}" for seed, options in enumerate(TALES)]
    found: Found = {options: side.command("sample.py", options, folder) for options in told}
    found["chat"] = side.command("sample.py", f"inputs/demo.bin {CHAT}", folder, text="Who are you?\nTell me more.\n")
    vocabularies = [path.name for path in sorted((folder / "inputs").glob("*-tokenizer.*"))]
    return found | side.work(tell, models(folder), vocabularies, at=folder)


def training(side: Checkout, folder: Path) -> Found:
    """Train a small model in every way."""
    found: Found = {}
    for name, (processes, options) in RUNS.items():
        (folder / name).mkdir()
        (folder / name / "data").symlink_to(side.cache / "inputs" / "data")
        side.command("train.py", f"{TRAIN} {options}", folder / name, processes=processes)
        found |= {f"{name}/{key}": value for key, value in left_by(folder / name).items()}
    return found


def resume(side: Checkout, folder: Path) -> Found:
    """Go on from the middle of OLD's runs, and export what OLD ended with."""
    found: Found = {}
    for name in ("one", "two"):
        whole, at = side.cache / "old" / "training" / name, folder / name
        later = shutil.ignore_patterns(Path(LAST).name, "model.bin", "model.tokenizer.*")
        shutil.copytree(whole, at, symlinks=True, ignore=later)
        side.command("train.py", "--resume --out_dir=out", at, processes=RUNS[name][0])
        found |= {f"{name}/{key}": value for key, value in left_by(at).items()}
        found[f"{name} is the run that was never stopped"] = left_by(at) == left_by(whole)
        side.command("export.py", f"{name}.bin --checkpoint={whole / 'out'} --dtype=q4 --no-check", folder)
    return found | digests(folder, "*.bin")


def left_by(at: Path) -> Found:
    """Return what a run has left: digests of weights, moments and exports, and its metrics without the clock."""
    if not (at / LAST).is_dir():
        raise Broken(f"{at}: the run left no {LAST}")
    rows = map(json.loads, (at / "out" / "metrics.jsonl").read_text().splitlines())
    metrics = {f"row {n}": {key: row[key] for key in sorted(row.keys() - CLOCKS)} for n, row in enumerate(rows)}
    return digests(at, "out/checkpoints/step-*/*.safetensors", "out/model*") | metrics


GROUPS: dict[str, Callable[[Checkout, Path], Found]] = {
    group.__name__: group for group in (data, exports, logits, texts, training, resume)
}
NEEDS = {"logits": "exports", "resume": "training"}


# -- workers: what runs inside a checkout -----------------------------------------------------------------------------


def serve(worker: str, root: str, arguments: str) -> None:
    """Make sure whose code this process runs, run a worker and print what it returns."""
    with contextlib.redirect_stdout(sys.stderr):
        import llamalet

        if not Path(str(llamalet.__file__)).resolve().is_relative_to(root):
            raise SystemExit(f"llamalet comes from {llamalet.__file__}, not from {root}")
        result = globals()[worker](*json.loads(arguments))
    print(json.dumps(result))


def write_toys() -> None:
    """Write small models of random weights and their vocabulary."""
    sys.path.insert(0, str(Path(sys.argv[3]) / "tests"))
    from conftest import SMALL_MODELS
    from toy import toy_model

    for seed, (name, config) in enumerate(SMALL_MODELS.items()):
        toy_model(Path(), config, name=name, seed=seed)


def export(jobs: Iterable[str]) -> Found:
    """Run export.py on each line of options; return the exit codes."""
    script, codes = str(Path(sys.argv[3]) / "export.py"), {}
    for job in jobs:
        sys.argv[:] = [script, *shlex.split(job)]
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as ended:
            codes[job] = ended.code
        except Exception as error:
            codes[job] = repr(error)
    return codes


def forward(files: Iterable[str], backend: str, threads: Iterable[int]) -> Found:
    """Return the digests of logits of all kinds."""
    from llamalet import Model

    found = {}
    for file, count in itertools.product(files, threads):
        try:
            model = Model.load(file, backend=backend, threads=count)
        except Exception as error:
            if "LLAMALET_SIMD" not in str(error):
                raise
            return {"not on this processor": True}
        for name, array in passes(model, CONTEXTS[Path(file).parts[1]]):
            key = f"{backend}, {count} threads, {file}: {name}"
            found[key] = f"{array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"
    return found


def passes(model: Any, context: int) -> Iterator[tuple[str, Any]]:
    """Yield the logits of each kind of pass over random tokens, with a name."""
    import numpy as np

    ids, transformer = np.random.default_rng(context).integers(3, 300, context), model.transformer

    def read(length: int) -> tuple[Any, Any]:
        cache = transformer.new_cache()
        return cache, transformer.prefill(cache, ids[:length])

    for length in (20, context):
        yield f"logits of {length}", model.logits(ids[:length])
    for length in (20, context - 8):
        cache, first = read(length)
        rows = [first, *(transformer.decode(cache, int(token)) for token in ids[length : length + 8])]
        yield f"prefill of {length} and 8 steps", np.stack(rows)
    for lengths in ((1, 3, 8, 13, 21), range(1, 18)):
        caches = [read(length)[0] for length in lengths]
        steps = [transformer.decode_batch(caches, [int(ids[n + step]) for n in lengths]) for step in range(4)]
        yield f"batch of {len(lengths)}", np.stack(steps)


def tell(names: Iterable[str], vocabularies: Iterable[str]) -> Found:
    """Return texts, tokens and scores of the models."""
    from llamalet import Model, Tokenizer

    found: Found = {}
    limits: Found = {"max_new_tokens": 60, "ignore_eos": True, "overflow": "roll"}
    settings: tuple[Found, ...] = ({}, {"temperature": 0.7}, {"top_p": 1.0, "top_k": 30}, {"min_p": 0.05})
    prompts = ["", "One day", "a", *TEXTS]
    for name in names:
        model = Model.load(f"inputs/{name}.bin", threads=2)
        for seed, options in enumerate(settings):
            found[f"{name} {options}"] = list(model.generate("Once", seed=seed, **limits, **options))
        found[f"{name} batch"] = list(model.generate_batch(prompts, seed=9, batch_size=4, **limits))
        found[f"{name} score"] = [repr(model.score(text).nats_per_token) for text in TEXTS]
        found[f"{name} tokens"] = [model.tokenizer.encode(text, bos=True) for text in TEXTS]
    for name in vocabularies:
        vocabulary = Tokenizer.load(f"inputs/{name}")
        found[name] = [(ids := vocabulary.encode(text, bos=True), vocabulary.decode(ids)) for text in TEXTS]
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        serve(*sys.argv[2:5])
    else:
        sys.exit(main())
