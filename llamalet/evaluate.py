"""Loss and bits per byte of a model on prepared data, without torch.

python -m llamalet.evaluate MODEL.bin [DATA_FOLDER]
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence

from llamalet.errors import DataError, Parser, run
from llamalet.runtime import BACKENDS, Model
from llamalet.scoring import NOTHING, Evaluation, evaluate_documents, evaluate_windows, read_documents
from llamalet.shards import SPLITS, Entropy, Shards, find_newest

PROGRESS_AFTER_S = 2.0


def report(evaluation: Evaluation, entropy: Entropy | None = None) -> str:
    """Return the result as a table, one column per unit.

    Args:
        evaluation: a sum of scores.
        entropy: the corpus entropy of the same documents, each scored whole.

    Raises:
        DataError: if nothing was scored.
    """
    e = evaluation
    if not e.text_bytes:
        raise DataError("no text to score: the split has none")
    lines = [
        f"{e.documents} stories, {e.tokens} tokens, {e.text_bytes} bytes of text",
        f"{'':16}{'nats per token':>16}{'bits per byte':>16}{'bits per story':>16}",
    ]
    model = (e.nats_per_token, e.bits_per_byte, e.bits_per_document if e.documents else math.nan)
    rows = {"model": model}
    if entropy is not None:
        floor = (entropy.nats_per_token, entropy.bits_per_byte, entropy.bits_per_story)
        rows["corpus entropy"] = floor
        rows["distance"] = (model[0] - floor[0], model[1] - floor[1], model[2] - floor[2])
    lines += [f"{name:16}{row[0]:16.4f}{row[1]:16.4f}{row[2]:16.2f}" for name, row in rows.items()]
    if entropy is not None:
        lines.append(f"The model is {100 * rows['distance'][0] / floor[0]:.2f} % above the corpus entropy.")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Evaluate a model as the command line says."""
    args = _parse(argv)
    folder = args.data if args.data is not None else find_newest()
    if folder is None:
        raise DataError("no prepared data below data/; name its folder, or make some with tinystories.py")
    shards = Shards.open(folder)
    model = Model.load(
        args.model, tokenizer=shards.tokenizer_path, backend=args.backend, threads=args.threads, verify=args.verify
    )
    print(f"{model.path} on the {args.split} split of {shards.folder}", flush=True)
    tokens, bos_id = shards.split(args.split), shards.meta.bos_id
    n_tokens = len(tokens) if args.max_tokens is None else min(args.max_tokens, len(tokens))
    if args.windows:
        scores = evaluate_windows(model.transformer, model.tokenizer, tokens, args.max_tokens)
    else:
        documents = read_documents(tokens, bos_id, args.max_tokens)
        scores = evaluate_documents(model.transformer, model.tokenizer, documents)
    total = sum(with_progress(scores, n_tokens), NOTHING)
    entropy = shards.meta.entropy
    comparable = args.split == "val" and not args.windows
    if entropy is not None and comparable and total.documents < entropy.stories:
        print(f"The corpus entropy is that of all {entropy.stories} stories; without --max-tokens it is compared.")
        entropy = None
    print(report(total, entropy if comparable else None))
    return 0


def with_progress(scores: Iterator[Evaluation], n_tokens: int) -> Iterator[Evaluation]:
    """Pass the scores on; tell how far they are on stderr, every few seconds."""
    start = told = time.monotonic()
    done = 0
    for score in scores:
        done += score.tokens
        now = time.monotonic()
        if now - told > PROGRESS_AFTER_S:
            told = now
            speed = done / (now - start)
            print(f"{done} of about {n_tokens} tokens, {speed:.0f} tokens/s", file=sys.stderr, flush=True)
        yield score


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    description = "Loss and bits per byte of a model on prepared data, without torch."
    parser = Parser(prog="python -m llamalet.evaluate", description=description)
    parser.add_argument("model", help="a .bin or a training checkpoint")
    parser.add_argument("data", nargs="?", help="a folder of prepared data; the newest below data/ if not given")
    parser.add_argument("--split", choices=SPLITS, default="val", help="which stories to score (val)")
    parser.add_argument(
        "--max-tokens", "--max_tokens", type=_positive, help="score about this many tokens instead of all"
    )
    parser.add_argument("--windows", action="store_true", help="cut into windows of the context, not into stories")
    parser.add_argument("--backend", choices=BACKENDS, default=BACKENDS[0], help=f"what computes ({BACKENDS[0]})")
    parser.add_argument("--threads", type=_positive, help="how many threads compute; one for each core if not given")
    parser.add_argument("--verify", action="store_true", default=None, help="verify the checksum of a large file too")
    return parser.parse_args(argv)


def _positive(word: str) -> int:
    """Read an integer of at least 1."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word}: must be a positive integer")
    return int(word)


if __name__ == "__main__":
    run(main)
