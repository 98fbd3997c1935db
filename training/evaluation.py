"""Loss and bits per byte of a checkpoint on the whole validation split, as `llamalet evaluate` finds them.

The text is cut in the same way and computed in float32, but with a training backend, in batches, and on all processes
of the run. The evaluations during training are faster and rougher: some windows, in the precision of training. Needs no
torch.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from llamalet import tokenizer
from llamalet.config import IGNORED, ModelConfig
from llamalet.errors import ConfigError, NonFiniteError
from llamalet.evaluate import report, with_progress
from llamalet.scoring import NOTHING, Evaluation, Ids, Tally, cut, read_documents
from llamalet.shards import Shards
from llamalet.tokenizer import Tokenizer
from training.machine.group import Group
from training.run.checkpoint import Checkpoint

LOGITS_BYTES = 1 << 27
"""Largest size of a batch's logits in float32, for a CPU."""

Rows = NDArray[np.int64]

Scorer = Callable[[Rows, Rows], Sequence[float]]
"""Ids (B, T) and the ids that follow, IGNORED where they do not count -> the negative log-likelihood of each row."""


def evaluate_checkpoint(
    checkpoint: Checkpoint,
    data: Shards,
    group: Group,
    new_scorer: Callable[[Checkpoint], Scorer],
    logits_bytes: int,
) -> str:
    """Return what was evaluated and the table of results, the same in every process.

    Args:
        checkpoint: whose model.
        data: whose validation split.
        group: the processes that share the work.
        new_scorer: from a backend.
        logits_bytes: the largest size of a batch's logits.

    Raises:
        ConfigError: if the data have another vocabulary than the model.
        DataError: if the split has no text.
        NonFiniteError: if the loss is NaN or infinite.
    """
    if checkpoint.state.tokenizer_sha256 != data.tokenizer_sha256:
        raise ConfigError(
            f"data={data.folder}: its vocabulary is not that of {checkpoint.path}; name other data with --data"
        )
    documents = list(read_documents(data.split("val"), data.meta.bos_id))[group.rank :: group.count]
    vocabulary = tokenizer.load(data.tokenizer_path)
    scores = evaluate_batches(new_scorer(checkpoint), checkpoint.model_config, vocabulary, documents, logits_bytes)
    if group.is_main:
        scores = with_progress(scores, sum(len(document) - 1 for document in documents))
    own = sum(scores, NOTHING)
    nats, *counts = group.sum([own.nats, own.tokens, own.text_bytes, own.documents])
    total = Evaluation(nats, *map(int, counts))
    return f"{checkpoint.path} on the val split of {data.folder}\n{report(total, data.meta.entropy)}"


def evaluate_batches(
    score: Scorer, config: ModelConfig, vocabulary: Tokenizer, documents: Sequence[Ids], logits_bytes: int
) -> Iterator[Evaluation]:
    """Yield scores of documents, cut as `llamalet.scoring.evaluate_documents` cuts them, in batches of similar length.

    Args:
        score: what computes.
        config: the model's shape.
        vocabulary: the model's tokenizer.
        documents: ids (T + 1,) of each: BOS, its tokens, BOS.
        logits_bytes: the largest size of a batch's logits.
    """
    tally = Tally(vocabulary)
    parts = sorted((part for document in documents for part in cut(document, config.max_seq_len)), key=_length)
    while parts:
        longest = _length(parts[-1])
        size = max(1, logits_bytes // (4 * config.vocab_size * longest))
        batch, parts = parts[-size:], parts[:-size]
        # Padding comes after all scored tokens, so it changes nothing.
        inputs = np.zeros((len(batch), longest), np.int64)
        targets = np.full_like(inputs, IGNORED)
        for row, (tokens, first) in enumerate(batch):
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            targets[row, first - 1 : len(tokens) - 1] = tokens[first:]
        nats = score(inputs, targets)
        if not all(map(math.isfinite, nats)):
            raise NonFiniteError("the loss is NaN or infinite: the weights are damaged, or the training diverged")
        yield sum((tally.of(*part, loss) for part, loss in zip(batch, nats, strict=True)), NOTHING)


def _length(part: tuple[Ids, int]) -> int:
    """Return the number of positions of a sequence that go into the model."""
    return len(part[0]) - 1
