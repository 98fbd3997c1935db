"""The last step of `make demo`: export and prove every version, compare the loss with the corpus entropy, tell a story.

python -m parity.demo out/demo
"""

if __name__ == "__main__":
    import _signal

    if hasattr(_signal, "pthread_sigmask"):  # until `begin` handles Ctrl-C, it has to wait
        _signal.pthread_sigmask(_signal.SIG_BLOCK, [_signal.SIGINT])
    from llamalet import startup

    startup.begin()  # before imports that take seconds

import math
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from configurator import parse
from llamalet.checks import not_positive
from llamalet.command import run
from llamalet.convert import bin_file, formats
from llamalet.convert.imported_model import ImportedModel
from llamalet.errors import CheckpointError, ConfigError, DataError, FormatError
from llamalet.evaluate import report
from llamalet.model_file.checkpoint import find_best, read_facts
from llamalet.runtime import Model
from llamalet.scoring import NOTHING, Evaluation, evaluate_documents, read_documents
from llamalet.shards import Shards
from llamalet.story_grammar import log_prob
from parity.proof import Proof, prove, second_program

# The version, v3's dtype, and the name of each file.
FILES = (
    (0, None, "model_v0.bin"),
    (1, None, "model.bin"),
    (2, None, "model_q8.bin"),
    (3, "q8", "model_v3_q8.bin"),
    (3, "q4", "model_v3_q4.bin"),
)
FLOAT_FILE, TOLD_WITH = "model.bin", "model_v3_q8.bin"


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """The options of `python -m parity.demo`."""

    run: str = "out/demo"
    """The folder of the trained run, also as the first word."""
    stories: int = 100
    """Number of stories to sample and check against the grammar."""
    seed: int = 1
    """Seed of the first sampled story."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        ConfigError.raise_for(not_positive(self, "stories"))


def main(argv: Sequence[str]) -> int:
    """Report on a run; return 0, or FormatError's code if a file is not proved."""
    config = parse(DemoConfig, argv, program="python -m parity.demo", description=__doc__, positional=("run",))
    folder = Path(config.run)
    best = find_best(folder)
    if best is None:
        raise CheckpointError(f"{folder}: holds no checkpoint; train one first: python train.py configs/demo.toml")
    source = formats.read("checkpoint", str(best))
    data = Shards.open(read_facts(best).data or "")
    if data.meta.entropy is None:
        raise DataError(f"{data.folder}: has no known entropy; only data from `tinystories.py synthesize` has")
    proofs = [_export(folder / name, version, dtype, source, data) for version, dtype, name in FILES]
    print(f"\nParity of {second_program()} and the runtime\n" + _parity_table(proofs))
    model = Model.load(folder / FLOAT_FILE)
    found = _evaluate(model, data)
    print("\nValidation loss beside the corpus entropy, on held-out stories, each whole and up to its closing BOS")
    if found.documents != data.meta.entropy.stories:
        raise DataError(f"{data.folder}: its entropy is that of {data.meta.entropy.stories} stories; prepare it again")
    print(report(found, data.meta.entropy))
    texts = list(_stories(model, config.stories, config.seed))
    recognised = [text for text in texts if log_prob(text) > -math.inf]
    share = f"{len(recognised)} of {len(texts)}"
    print(f"\nThe grammar recognises {share} stories that the model told at temperature 1.0. One of them:\n")
    print((recognised or texts)[0])
    told_with = shlex.quote(str(folder / TOLD_WITH))
    print(f"\nTell more: .venv/bin/python sample.py {told_with} -t 0.8")
    print(f"See it think: .venv/bin/llamalet serve {told_with} and open http://127.0.0.1:8080/ in a browser")
    return 0 if all(proof.ok for proof in proofs) else FormatError.exit_code


def _export(path: Path, version: int, dtype: str | None, source: ImportedModel, data: Shards) -> Proof:
    """Write one version and prove it."""
    print(f"exporting and proving {path} ...", flush=True)
    bin_file.write(path, source, version, dtype=dtype)
    return prove(path, originals=source.tensors, data=data)


def _parity_table(proofs: list[Proof]) -> str:
    """Return one line per version: size, largest logit difference, bits per byte of both, verdict and text."""
    lines = [f"  version           bytes   logits differ by   {second_program():>7}   runtime bits/byte   verdict"]
    for proof in proofs:
        size = proof.path.stat().st_size
        difference = f"{proof.logit_difference:.1e} of {proof.largest_logit:.0f}"
        bits = f"{proof.expected_bits_per_byte:7.4f}   {proof.runtime_bits_per_byte:17.4f}"
        verdict = "proved" if proof.ok else "NOT proved: " + "; ".join(proof.problems)
        name = f"v{proof.version} {proof.dtype}"
        lines.append(f"  {name:9} {size:13,}   {difference:>16}   {bits}   {verdict}; {proof.text}")
    return "\n".join(lines)


def _evaluate(model: Model, data: Shards) -> Evaluation:
    """Score every validation story whole, from its BOS up to and including the closing BOS."""
    documents = read_documents(data.split("val"), data.meta.bos_id)
    return sum(evaluate_documents(model.transformer, model.tokenizer, documents), start=NOTHING)


def _stories(model: Model, count: int, seed: int) -> Iterator[str]:
    """Yield `count` stories sampled from BOS at temperature 1.0 without top-p."""
    reported = time.monotonic()
    for i in range(count):
        yield "".join(model.generate(temperature=1.0, top_p=1.0, seed=seed + i))
        if time.monotonic() - reported > 2:
            reported = time.monotonic()
            print(f"{i + 1} of {count} stories sampled", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
