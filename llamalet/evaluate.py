"""What `llamalet evaluate` computes and prints: a model's loss and bits per byte on prepared data or a text file."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llamalet import scoring
from llamalet.errors import DataError, note
from llamalet.files import read_file
from llamalet.runtime import Model
from llamalet.scoring import NOTHING, Evaluation
from llamalet.shards import Entropy, Shards

PROGRESS_AFTER_S = 2.0


def evaluate_text(model: Model, path: Path, *, windows: bool = False, max_tokens: int | None = None) -> str:
    """Score a text file as one document and return the report.

    Args:
        model: the model.
        path: a text in UTF-8.
        windows: whether to cut it into windows of the context that do not overlap.
        max_tokens: score at most this many tokens.

    Raises:
        DataError: if the file is empty or not text.
    """
    try:
        text = read_file(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not text in UTF-8: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if not text:
        raise DataError(f"{path}: there is no text to score")
    ids = np.array(model.tokenizer.encode(text, bos=True))[: None if max_tokens is None else max_tokens + 1]
    if windows:
        scores = scoring.evaluate_windows(model.transformer, model.tokenizer, ids)
    else:
        scorer = scoring.Scorer(model.transformer, model.tokenizer)
        scores = (scorer.score(*part) for part in scoring.cut(ids, model.config.max_seq_len))
    return report(sum(with_progress(scores, len(ids) - 1), NOTHING))


def evaluate_shards(
    model: Model, shards: Shards, split: str, *, windows: bool = False, max_tokens: int | None = None
) -> str:
    """Score a split of prepared data and return the report, beside the corpus entropy where that is known.

    Args:
        model: the model, with the tokenizer of the data.
        shards: the data.
        split: train or val.
        windows: whether to cut it into windows of the context instead of documents.
        max_tokens: score about this many tokens.

    Raises:
        DataError: if there is no text in the split.
    """
    tokens = shards.split(split)
    n_tokens = len(tokens) if max_tokens is None else min(max_tokens, len(tokens))
    if windows:
        scores = scoring.evaluate_windows(model.transformer, model.tokenizer, tokens, max_tokens)
    else:
        documents = scoring.read_documents(tokens, shards.meta.bos_id, max_tokens)
        scores = scoring.evaluate_documents(model.transformer, model.tokenizer, documents)
    total = sum(with_progress(scores, n_tokens), NOTHING)
    entropy = shards.meta.entropy if split == "val" and not windows else None
    if entropy is not None and total.documents < entropy.stories:
        why = f"The corpus entropy is known for all {entropy.stories} stories; to compare with it, omit --max-tokens."
        return f"{why}\n{report(total)}"
    return report(total, entropy)


def report(evaluation: Evaluation, entropy: Entropy | None = None) -> str:
    """Return the result as a table, one column per unit; only where documents were scored, there are stories.

    Args:
        evaluation: a sum of scores.
        entropy: the corpus entropy of the same documents, each scored whole.

    Raises:
        DataError: if nothing was scored.
    """
    e = evaluation
    if not e.text_bytes:
        why = (
            "none of it is in the vocabulary: all tokens are <unk>" if e.tokens > e.documents else "the split has none"
        )
        raise DataError(f"no text to score: {why}")
    rows = {"model": [e.nats_per_token, e.bits_per_byte]}
    if e.documents:
        rows["model"].append(e.bits_per_document)
    if entropy is not None:
        rows["corpus entropy"] = floor = [entropy.nats_per_token, entropy.bits_per_byte, entropy.bits_per_story]
        rows["distance"] = [ours - least for ours, least in zip(rows["model"], floor, strict=True)]
    units = [f"{unit:>16}" for unit in ("nats per token", "bits per byte", "bits per story")]
    lines = [
        (f"{e.documents} stories, " if e.documents else "") + f"{e.tokens} tokens, {e.text_bytes} bytes of text",
        " " * 16 + "".join(units[: len(rows["model"])]),
    ]
    for name, row in rows.items():
        lines.append(f"{name:16}{row[0]:16.4f}{row[1]:16.4f}" + "".join(f"{bits:16.2f}" for bits in row[2:]))
    if entropy is not None:
        lines.append(f"The model is {100 * rows['distance'][0] / floor[0]:.2f} % above the corpus entropy.")
    return "\n".join(lines)


def with_progress(scores: Iterator[Evaluation], n_tokens: int) -> Iterator[Evaluation]:
    """Pass the scores on, and every few seconds print the progress on stderr."""
    start = shown = time.monotonic()
    done = 0
    for score in scores:
        done += score.tokens
        now = time.monotonic()
        if now - shown > PROGRESS_AFTER_S:
            shown = now
            speed = done / (now - start)
            note(f"{done} of about {n_tokens} tokens, {speed:.0f} tokens/s")
        yield score


if __name__ == "__main__":  # an earlier spelling, which must not look like a success
    raise SystemExit("error: this command is now: llamalet evaluate MODEL [DATA]")
