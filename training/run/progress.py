"""What a run prints: a summary at the start, then a line for each logged step and each evaluation."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llamalet.command import forget_output
from llamalet.config import ModelConfig
from llamalet.errors import note
from llamalet.shards import Shards
from training.config import TrainConfig


def say(text: str = "", end: str = "\n") -> None:
    """Print; if stdout fails (`| head`, a full disk), warn once and drop all further output: the run continues."""
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        forget_output(sys.stdout)
        note(f"warning: stdout: {error.strerror}; training continues without it")


class Timer:
    """Times steps, without what happens while it is paused."""

    def __init__(self, step: int) -> None:
        self._step, self._start = step, time.perf_counter()

    def lap(self, step: int) -> float:
        """Return the mean seconds per step since the last lap, or since the start."""
        now = time.perf_counter()
        seconds = (now - self._start) / (step - self._step)
        self._step, self._start = step, now
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of the block."""
        begin = time.perf_counter()
        yield
        self._start += time.perf_counter() - begin


def training_flops(config: ModelConfig) -> float:
    """Return the floating-point operations per token of training on full sequences.

    Source: PaLM, https://arxiv.org/abs/2204.02311, appendix B: 6 per weight, and 12 per layer,
    head, position and head dimension. The embedding table counts only if it is also the output projection: a lookup
    multiplies nothing.
    """
    weights = config.n_params - (0 if config.tied else config.vocab_size * config.dim)
    return 6 * weights + 12 * config.n_layers * config.n_heads * config.head_dim * config.max_seq_len


def activation_bytes(config: TrainConfig, model: ModelConfig, itemsize: int) -> float:
    """Estimate the bytes that the forward pass of a micro-step keeps for the backward pass.

    Per token and layer: the two norms' inputs in float32, and in the type of the products (of `itemsize` bytes) the
    norms' outputs, queries, keys, values, attention outputs and the three hidden vectors of the feed-forward; then the
    logits.
    """
    heads = model.n_heads * model.head_dim
    layer = 8 * model.dim + itemsize * (2 * model.dim + 2 * heads + 2 * model.kv_dim + 3 * model.hidden_dim)
    logits = model.vocab_size * (itemsize + 4)
    return config.batch_size * config.max_seq_len * (model.n_layers * layer + logits)


def run_summary(
    config: TrainConfig,
    model: ModelConfig,
    data: Shards,
    *,
    n_windows: int,
    n_processes: int,
    machine: str,
) -> str:
    """Return the lines that describe a run before it starts.

    Args:
        config: the settings, with `total_batch_tokens` known.
        model: shape of the model.
        data: the prepared data.
        n_windows: sequences of the training split.
        n_processes: processes of the run.
        machine: device, threads, type and compiler, in words.
    """
    batch, sequences, tokens = config.total_batch_tokens or 0, config.batch_size, n_windows * config.max_seq_len
    micro_steps = config.accumulation(n_processes)
    anywhere = f", {100 * config.random_starts:.3g} % of them from a random token" if config.random_starts else ""
    lines = {
        "data": f"{data.folder}: {data.meta.splits['train'].tokens:,} tokens, vocabulary {model.vocab_size}",
        "model": f"{model.n_params:,} parameters: dim {model.dim}, {model.n_layers} layers, {model.n_heads} heads "
        f"({model.n_kv_heads} kv), hidden {model.hidden_dim}, context {model.max_seq_len}",
        "step": f"{batch:,} tokens = {sequences} x {config.max_seq_len} tokens x {micro_steps} "
        f"micro-step{'s' * (micro_steps > 1)} x {n_processes} process{'es' * (n_processes > 1)}",
        "epoch": f"{tokens // batch:,} steps ({n_windows:,} sequences{anywhere}); "
        f"{config.max_iters:,} steps are {config.max_iters * batch / tokens:.2f} epochs",
        "machine": machine,
    }
    if config.warmup_iters > config.max_iters:
        lines["warm-up"] = (
            f"never ends: it has {config.warmup_iters} steps, the run {config.max_iters}; give a lower --warmup_iters"
        )
    return "\n".join(f"{name:8} {text}" for name, text in lines.items())


def progress_line(step: int, total: int, row: dict[str, Any]) -> str:
    """Return the line of output for a logged step."""
    parts = [_step(step, total), f"loss {row['loss']:.4f}", f"lr {row['lr']:.2e}", f"gnorm {row['gnorm']:.2f}"]
    parts += [f"{row['skipped']} skipped"] if row["skipped"] else []
    tflops = row["tflops"]
    speed = f"{tflops:.3g} TFLOP/s" if tflops >= 1 else f"{1000 * tflops:.3g} GFLOP/s"
    parts += [f"{row['tokens_per_s']:,.0f} tok/s", speed]
    parts += [f"MFU {row['mfu']:.1%}"] if row["mfu"] is not None else []
    minutes, seconds = divmod(round(row["eta_s"]), 60)
    parts += [f"ETA {minutes // 60}:{minutes % 60:02}:{seconds:02}"]
    return " | ".join(parts)


def evaluation_line(step: int, total: int, loss: float, floor: float | None) -> str:
    """Return the line of output for an evaluation.

    Args:
        step: optimizer steps done.
        total: steps of the run.
        loss: validation loss in nats per token.
        floor: the corpus entropy in nats per token, if known.
    """
    parts = [_step(step, total), f"loss {loss:.4f} on validation data"]
    parts += [f"corpus entropy {floor:.4f}"] if floor is not None else []
    return " | ".join(parts)


def _step(step: int, total: int) -> str:
    """Return the step, in the same width for the whole run."""
    return f"step {step:{len(str(total))}}/{total}"
