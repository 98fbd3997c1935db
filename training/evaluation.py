"""Loss and bits per byte of a checkpoint on the whole validation split, as `llamalet evaluate` finds them.

The text is cut in the same way and computed in float32, but with PyTorch, in batches, and on all processes of the run.
The evaluations during training are faster and rougher: some windows, in the precision of training.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional as F

from llamalet import tokenizer
from llamalet.config import IGNORED
from llamalet.errors import ConfigError, NonFiniteError
from llamalet.evaluate import report, with_progress
from llamalet.scoring import NOTHING, Evaluation, Ids, Tally, cut, read_documents
from llamalet.shards import Shards
from llamalet.tokenizer import Tokenizer
from model import Llama
from training.machine.distributed import Processes
from training.run.checkpoint import Checkpoint
from training.weights import load_model, to_torch

LOGITS_BYTES = 1 << 27
"""Largest size of a batch's logits in float32 on a CPU; on a GPU, 8 times that."""


def evaluate_checkpoint(checkpoint: Checkpoint, data: Shards, group: Processes) -> str:
    """Return what was evaluated and the table of results, the same in every process.

    Raises:
        ConfigError: if the data have another vocabulary than the model.
        DataError: if the split has no text.
        NonFiniteError: if the loss is NaN or infinite.
    """
    if checkpoint.state.tokenizer_sha256 != data.tokenizer_sha256:
        raise ConfigError(
            f"data={data.folder}: its vocabulary is not that of {checkpoint.path}; name other data with --data"
        )
    model = load_model(checkpoint.model_config, to_torch(checkpoint.model_state)).to(group.device)
    documents = list(read_documents(data.split("val"), data.meta.bos_id))[group.rank :: group.count]
    scores = evaluate_batches(model, tokenizer.load(data.tokenizer_path), documents, group.device)
    if group.is_main:
        scores = with_progress(scores, sum(len(document) - 1 for document in documents))
    own = sum(scores, NOTHING)
    nats, *counts = group.sum([own.nats, own.tokens, own.text_bytes, own.documents])
    total = Evaluation(nats, *map(int, counts))
    return f"{checkpoint.path} on the val split of {data.folder}\n{report(total, data.meta.entropy)}"


@torch.inference_mode()
def evaluate_batches(
    model: Llama, vocabulary: Tokenizer, documents: Sequence[Ids], device: torch.device
) -> Iterator[Evaluation]:
    """Yield scores of documents, cut as `llamalet.scoring.evaluate_documents` cuts them, in batches of similar length.

    Args:
        model: in evaluation mode, on `device`.
        vocabulary: the model's tokenizer.
        documents: ids (T + 1,) of each: BOS, its tokens, BOS.
        device: where to compute.
    """
    config, tally = model.config, Tally(vocabulary)
    parts = sorted((part for document in documents for part in cut(document, config.max_seq_len)), key=_length)
    while parts:
        longest = _length(parts[-1])
        room = LOGITS_BYTES if device.type == "cpu" else 8 * LOGITS_BYTES
        size = max(1, room // (4 * config.vocab_size * longest))
        batch, parts = parts[-size:], parts[:-size]
        # Padding comes after all scored tokens, so it changes nothing.
        inputs = torch.zeros(len(batch), longest, dtype=torch.int64)
        targets = torch.full_like(inputs, IGNORED)
        for row, (tokens, first) in enumerate(batch):
            inputs[row, : len(tokens) - 1] = torch.from_numpy(tokens[:-1])
            targets[row, first - 1 : len(tokens) - 1] = torch.from_numpy(tokens[first:])
        logits, targets = model(inputs.to(device)).float(), targets.to(device)
        losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
        nats = losses.cpu().double().sum(1)
        if not nats.isfinite().all():
            raise NonFiniteError("the loss is NaN or infinite: the weights are damaged, or the training diverged")
        yield sum((tally.of(*part, loss) for part, loss in zip(batch, nats.tolist(), strict=True)), NOTHING)


def _length(part: tuple[Ids, int]) -> int:
    """Return the number of positions of a sequence that go into the model."""
    return len(part[0]) - 1
