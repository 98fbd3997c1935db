"""How fast the three products of training are, packing included, beside torch.matmul of the same shapes.

python -m benchmarks.products
python -m benchmarks.products --shapes=15M,110M --dtype=float32

For every matrix of a model, y = x W^T, d_x = d_y W and d_W = d_y^T x over the rows of a batch. Here the right side is
packed in each turn, and for d_W the left side is transposed. torch gets its operands in the type of the product, and
may prepare them as it likes. The two take turns; figures are medians.
"""

if __name__ == "__main__":
    import _signal

    if hasattr(_signal, "pthread_sigmask"):  # until `begin` handles Ctrl-C, it has to wait
        _signal.pthread_sigmask(_signal.SIG_BLOCK, [_signal.SIGINT])
    from llamalet import startup

    startup.begin()  # before imports that take seconds

import statistics
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness import aligned, machine
from benchmarks.training import CONFIGS, SHAPES, VOCABULARY
from configurator import parse
from llamalet.aligned import aligned_zeros
from llamalet.backward.runner import Runner
from llamalet.checks import not_positive
from llamalet.command import run
from llamalet.cores import physical_cores
from llamalet.errors import ConfigError
from llamalet.kernels import bfloat16
from llamalet.kernels.products import EDGE_SHAPE
from llamalet.model_file.quantize import to_bfloat16
from llamalet.model_file.tensors import tensor_specs
from training.config import TrainConfig

TURN_S = 0.4
"""Seconds of a turn."""
Work = Callable[[], Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductBenchConfig:
    """The options of benchmarks/products.py."""

    shapes: str = "15M"
    """The models, separated by commas: 15M, 42M, 110M."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the numbers that are multiplied; sums are float32."""
    rows: int = 2048
    """Rows of x: the tokens of a batch."""
    turns: int = 5
    """Turns of each contender."""
    threads: int | None = None
    """CPU threads; by default one for each core."""

    def __post_init__(self) -> None:
        """Raise one ConfigError that lists every value out of range."""
        problems = not_positive(self, "rows", "turns", "threads")
        unknown = [name for name in self.shapes.split(",") if name not in SHAPES]
        problems += [f"shapes={name}: must be one of {', '.join(SHAPES)}" for name in unknown]
        if self.dtype == "bfloat16" and bfloat16.instructions() is None:
            problems.append(
                "dtype=bfloat16: does not pay on this processor, or LLAMALET_BF16 forbids it; use --dtype=float32"
            )
        ConfigError.raise_for(problems)


def main(argv: Sequence[str]) -> int:
    """Measure and print; return 0."""
    config = parse(ProductBenchConfig, argv, program="python -m benchmarks.products", description=__doc__)
    threads = config.threads or max(physical_cores(), 1)
    torch.set_num_threads(threads)
    for name, text in machine(threads).items():
        print(f"{name}: {text}", flush=True)
    runner = Runner(threads, np.zeros((threads, *EDGE_SHAPE), np.float32))
    for name in config.shapes.split(","):
        rows = [["", "product", "ours GFLOP/s", "torch", "ratio"]]
        for matrix, (out_dim, in_dim) in matrices_of(name).items():
            for product, ours, theirs in products(runner, config, out_dim, in_dim):
                seconds = medians(config.turns, ours, theirs)
                speeds = [2e-9 * config.rows * out_dim * in_dim / second for second in seconds]
                rows.append([matrix, product, *(f"{speed:.0f}" for speed in speeds), f"{speeds[0] / speeds[1]:.2f}"])
        print(f"{name}: {config.rows} rows, {config.dtype}, medians of {config.turns} turns")
        print("\n".join(f"  {line}" for line in aligned(rows)), flush=True)
    return 0


def matrices_of(name: str) -> dict[str, tuple[int, int]]:
    """Return the different matrices of a model: how they are called, and (rows, cols)."""
    options = tomllib.loads((CONFIGS / f"stories{name}.toml").read_text())
    shape = {option: options[option] for option in ("dim", "n_layers", "n_heads", "max_seq_len")}
    found: dict[tuple[int, ...], list[str]] = {}
    for spec in tensor_specs(1, TrainConfig(**shape).model_config(VOCABULARY)):
        if len(spec.shape) == 2 and spec.name.startswith(("layers.0.", "tok_embeddings", "output")):
            found.setdefault(spec.shape, []).append(spec.name.rpartition(".")[2])
    return {f"{', '.join(names)} {rows} x {cols}": (rows, cols) for (rows, cols), names in found.items()}


def products(runner: Runner, config: ProductBenchConfig, out_dim: int, in_dim: int) -> Iterator[tuple[str, Work, Work]]:
    """Yield each product's formula, and how it is computed here and by torch."""
    rng, rounded = np.random.default_rng(0), config.dtype == "bfloat16"
    shapes = (config.rows, in_dim), (out_dim, in_dim), (config.rows, out_dim)
    x, weight, d_y = (aligned_zeros(shape, np.float32) for shape in shapes)
    for array in (x, weight, d_y):
        rng.standard_normal(array.shape, np.float32, array)
    y, d_x, d_weight = (aligned_zeros(array.shape, np.float32) for array in (d_y, x, weight))
    size = 2 * max(x.size, weight.size, d_y.size)
    right = aligned_zeros((size,), np.uint32 if rounded else np.float32)
    left = aligned_zeros((size,), np.uint16 if rounded else np.float32)
    left_x, left_d_y = (as_operand(array) if rounded else array for array in (x, d_y))
    kind = torch.bfloat16 if rounded else torch.float32
    tx, tw, td = (torch.from_numpy(array).to(kind) for array in (x, weight, d_y))
    yield "x W^T", lambda: runner.product(left_x, runner.pack_rows(weight, right), y), lambda: tx @ tw.T
    yield "d_y W", lambda: runner.product(left_d_y, runner.pack_columns(weight, right), d_x), lambda: td @ tw
    yield (
        "d_y^T x",
        lambda: runner.product(runner.transposed(left_d_y, left), runner.pack_columns(left_x, right), d_weight),
        lambda: td.T @ tx,
    )


def as_operand(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return x as a bfloat16 operand: filled up, with rows after the last that may be read."""
    memory = aligned_zeros((len(x) + bfloat16.TILE_ROWS, bfloat16.filled(x.shape[1])), np.uint16)
    memory[: len(x), : x.shape[1]] = to_bfloat16(x)
    return memory[: len(x)]


def medians(turns: int, *works: Work) -> list[float]:
    """Return the median seconds of each work, over its turns of TURN_S seconds.

    The first half of a turn does not count: threads of the other contender may still be waiting busily for more.
    """
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(turns):
        for work, taken in zip(works, seconds, strict=True):
            end = time.perf_counter() + TURN_S
            calls: list[float] = []
            while (start := time.perf_counter()) < end or len(calls) < 2:
                work()
                calls.append(time.perf_counter() - start)
            taken += calls[len(calls) // 2 :]
    return [statistics.median(taken) for taken in seconds]


if __name__ == "__main__":
    run(main)
