"""AdamW and Muon on the weights and gradients of a TrainingModel, and the norm of all gradients."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numba import float32

from llamalet.backward.groups import Group, group_of, muon_rate
from llamalet.backward.memory import Array, Take, allocate, bytes_of
from llamalet.backward.runner import Runner
from llamalet.kernels import products
from llamalet.kernels.layers import address_of, floats_at
from llamalet.kernels.ops import dot, kernel
from llamalet.kernels.products import EDGE_SHAPE, LANES, panels_at, panels_shape
from llamalet.kernels.threads import blocks

BLOCK = 1 << 14
"""Numbers in a block of the functions that treat each number by itself."""

ADAMW_EPS = 1e-8

NEGLIGIBLE = np.float32(1e-17)
"""Gradients and averages below this become zero, mean squares below its square: far less than ADAMW_EPS, they change no
weight. The averages of a gradient that stays zero, as of a token that never comes, would otherwise end as numbers too
small to be normalised, with which processors compute 20 times slower."""

MUON_MOMENTUM, MUON_EPS, MUON_ITERATIONS = 0.95, 1e-7, 5
MUON_A, MUON_B, MUON_C = 3.4445, -4.775, 2.0315
"""Of the polynomial a x + b x^3 + c x^5, which takes singular values from (0, 1] near 1 in five iterations."""

# A matrix to update: the addresses of three arrays (rows, cols), and what the update is multiplied with.
MUON_JOB = np.dtype([
    ("weight", np.int64), ("gradient", np.int64), ("momentum", np.int64), ("rows", np.int64), ("cols", np.int64),
    ("step", np.float32),
])  # fmt: skip


class AdamFactors(NamedTuple):
    """What a step of AdamW multiplies with, float32.

    scale: the gradient.
    keep: the weight, which decays.
    beta1, beta2: the averages.
    step: mean / root.
    root_factor: the root of the mean square: 1 / sqrt(1 - beta2^step) undoes that the average began at zero.
    eps: added to the root.
    """

    scale: Any
    keep: Any
    beta1: Any
    beta2: Any
    step: Any
    root_factor: Any
    eps: Any


class NumbaOptimizer:
    """AdamW for all weights, or Muon for the matrices of the layers and AdamW for the rest.

    Attributes:
        state: what both remember, named as torch's optimizers name it: "WEIGHT:exp_avg", "WEIGHT:exp_avg_sq" and
            "WEIGHT:step" of AdamW, "WEIGHT:momentum_buffer" of Muon.

    Source: AdamW, https://arxiv.org/abs/1711.05101; Muon, https://kellerjordan.github.io/posts/muon/.
    """

    def __init__(
        self,
        runner: Runner,
        weights: Mapping[str, Array],
        *,
        kind: str,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        """Begin with a state of zeros.

        Args:
            runner: the threads.
            weights: by name, changed in place by `step`.
            kind: adamw or muon.
            betas: AdamW's decay rates of the moments.
            weight_decay: decay of the matrices, as a multiple of the learning rate.

        Raises:
            MemoryError: if there is not as much memory as `n_bytes` says.
        """
        self._runner, self._weights, self._betas, self._decay = runner, weights, betas, weight_decay
        shapes = {name: weight.shape for name, weight in weights.items()}
        self._groups = groups_of(shapes, kind)
        self._space = space = allocate(partial(lay_out, shapes, kind, runner.n_threads))
        self.state: dict[str, Array] = space.state
        self._muon = [name for name, group in self._groups.items() if group == "muon"]
        self._muon_addresses = np.array([[address_of(array) for array in arrays] for arrays in space.muon])

    def norm(self, gradients: Mapping[str, Array]) -> float:
        """Return the norm of all gradients together; a number is squared in float32, and blocks added in float64."""
        squares = 0.0
        for gradient in gradients.values():
            parts = self._space.parts[: _blocks(gradient.size)]
            self._runner.run(sum_squares, len(parts), gradient.reshape(-1), parts)
            squares += float(parts.sum(dtype=np.float64))
        return float(np.sqrt(squares))

    def step(self, gradients: Mapping[str, Array], rate: float, scale: float = 1.0) -> None:
        """Update the weights.

        Args:
            gradients: by name; those that Muon uses are overwritten.
            rate: the learning rate.
            scale: what gradients are multiplied with first, to clip them.
        """
        for name, weight in self._weights.items():
            if self._groups[name] != "muon":
                self._adamw(name, weight, gradients[name], rate, scale)
        if self._muon:
            self._muon_step(gradients, rate, scale)

    def _adamw(self, name: str, weight: Array, gradient: Array, rate: float, scale: float) -> None:
        """Update a weight by its mean gradient over the root of its mean square."""
        self.state[f"{name}:step"] += 1
        count = float(self.state[f"{name}:step"])
        beta1, beta2 = self._betas
        decay = self._decay if self._groups[name] == "decayed" else 0.0
        # The averages begin at zero; these two divide out how much of them is still that zero.
        correction1, correction2 = 1 - beta1**count, 1 - beta2**count
        flat = (array.reshape(-1) for array in (
            weight, gradient, self.state[f"{name}:exp_avg"], self.state[f"{name}:exp_avg_sq"],
        ))  # fmt: skip
        factors = AdamFactors(
            *map(np.float32, (scale, 1 - rate * decay, beta1, beta2, rate / correction1, correction2**-0.5, ADAMW_EPS))
        )
        self._runner.run(adamw, _blocks(weight.size), *flat, factors)

    def _muon_step(self, gradients: Mapping[str, Array], rate: float, scale: float) -> None:
        """Update the matrices of the layers, each on one thread."""
        jobs = np.zeros(len(self._muon), MUON_JOB)
        for job, name in zip(jobs, self._muon, strict=True):
            weight = self._weights[name]
            arrays = weight, gradients[name], self.state[f"{name}:momentum_buffer"]
            job["weight"], job["gradient"], job["momentum"] = map(address_of, arrays)
            job["rows"], job["cols"] = weight.shape
            job["step"] = muon_rate(rate, *weight.shape)
        factors = np.float32(scale), np.float32(1 - rate * self._decay)
        self._runner.run(muon, len(jobs), jobs, *factors, self._muon_addresses, self._space.edges)


# -- memory -----------------------------------------------------------------------------------------------------------

Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class OptimizerSpace:
    """The arrays of an optimizer, float32.

    state: see NumbaOptimizer.
    parts: the sums of squares of a gradient's blocks.
    muon: `other`, `gram`, `square` and `packed` of `iterate` for each thread, flat, for the largest matrix.
    edges: (threads, *products.EDGE_SHAPE).
    """

    state: dict[str, Any]
    parts: Any
    muon: list[list[Any]]
    edges: Any


def n_bytes(shapes: Shapes, kind: str, n_threads: int) -> int:
    """Return the bytes that a NumbaOptimizer takes for weights of these shapes."""
    return bytes_of(partial(lay_out, shapes, kind, n_threads))


def lay_out(shapes: Shapes, kind: str, n_threads: int, take: Take) -> OptimizerSpace:
    """Return the space of arrays that `take(*shape)` returns; the other arguments are those of `n_bytes`."""
    state = {}
    for name, group in groups_of(shapes, kind).items():
        if group == "muon":
            state[f"{name}:momentum_buffer"] = take(*shapes[name])
        else:
            state[f"{name}:step"] = take()
            state[f"{name}:exp_avg"] = take(*shapes[name])
            state[f"{name}:exp_avg_sq"] = take(*shapes[name])
    sizes = [0, 0, 0, 0]
    for name, group in groups_of(shapes, kind).items():
        if group == "muon":
            rows, cols = shapes[name]
            side = min(rows, cols)
            packed = panels_shape(rows, cols), panels_shape(cols, rows), panels_shape(side, side)
            needed = rows * cols, side * side, side * side, max(map(math.prod, packed))
            sizes = [max(pair) for pair in zip(sizes, needed, strict=True)]
    return OptimizerSpace(
        state=state,
        parts=take(max(_blocks(math.prod(shape)) for shape in shapes.values())),
        muon=[[take(size) for size in sizes] for _ in range(n_threads)],
        edges=take(n_threads, *EDGE_SHAPE),
    )


def groups_of(shapes: Shapes, kind: str) -> dict[str, Group]:
    """Return how each weight is trained."""
    return {name: group_of(name, len(shape), kind) for name, shape in shapes.items()}


def _blocks(size: int) -> int:
    """Return the number of blocks of BLOCK numbers."""
    return -(-size // BLOCK)


# -- each number by itself: all arrays are flat, (n,) -----------------------------------------------------------------


@kernel
def sum_squares(x: Any, parts: Any, team: Any) -> None:
    """Write the sum of the squares of each block of x to parts (blocks,)."""
    for block in blocks(team):
        part = x[block * BLOCK : (block + 1) * BLOCK]
        parts[block] = dot(part, part)


@kernel
def adamw(weight: Any, gradient: Any, mean: Any, mean_square: Any, f: Any, team: Any) -> None:
    """Update a weight and its two averages; f is AdamFactors."""
    for block in blocks(team):
        first, last = block * BLOCK, (block + 1) * BLOCK
        w, g, m, v = weight[first:last], gradient[first:last], mean[first:last], mean_square[first:last]
        for i in range(len(w)):
            slope = unless_below(NEGLIGIBLE, g[i] * f.scale)
            m[i] = unless_below(NEGLIGIBLE, m[i] + (slope - m[i]) * (float32(1) - f.beta1))
            mean_of_squares = v[i] * f.beta2 + slope * slope * (float32(1) - f.beta2)
            v[i] = unless_below(NEGLIGIBLE * NEGLIGIBLE, mean_of_squares)
            w[i] = w[i] * f.keep - f.step * m[i] / (np.sqrt(v[i]) * f.root_factor + f.eps)


@kernel
def unless_below(least: float, x: float) -> float:
    """Return x, but zero if it is smaller than `least`; NaN stays."""
    return float32(0) if abs(x) < least else x


# -- Muon: a block is a whole matrix ----------------------------------------------------------------------------------


@kernel
def muon(jobs: Any, scale: float, keep: float, addresses: Any, edges: Any, team: Any) -> None:
    """Update the matrices of jobs (n,), MUON_JOB.

    Args:
        jobs: what to update.
        scale: what gradients are multiplied with first.
        keep: what weights are multiplied with: they decay.
        addresses: of OptimizerSpace.muon, int64 (threads, 4).
        edges: see OptimizerSpace.
        team: see threads.Team.
    """
    for block in blocks(team):
        job, thread = jobs[block], team.thread
        weight = floats_at(job.weight, job.rows, job.cols)
        x = floats_at(job.gradient, job.rows, job.cols)
        follow(floats_at(job.momentum, job.rows, job.cols), x, scale)
        other = floats_at(addresses[thread, 0], job.rows, job.cols)
        side = min(job.rows, job.cols)
        gram, square = floats_at(addresses[thread, 1], side, side), floats_at(addresses[thread, 2], side, side)
        shrink(x)
        for _ in range(MUON_ITERATIONS // 2):
            iterate(x, other, gram, square, addresses[thread, 3], edges[thread])
            iterate(other, x, gram, square, addresses[thread, 3], edges[thread])
        iterate(x, other, gram, square, addresses[thread, 3], edges[thread])
        for i in range(len(x)):
            row, update = weight[i], other[i]
            for j in range(len(row)):
                row[j] = row[j] * keep - update[j] * job.step


@kernel
def follow(momentum: Any, gradient: Any, scale: float) -> None:
    """Move the momentum towards the gradient, and replace the gradient by where it will be a step later."""
    beta = float32(MUON_MOMENTUM)
    for i in range(len(momentum)):
        m, g = momentum[i], gradient[i]
        for j in range(len(m)):
            slope = unless_below(NEGLIGIBLE, g[j] * scale)
            m[j] = unless_below(NEGLIGIBLE, m[j] + (slope - m[j]) * (float32(1) - beta))
            g[j] = slope + (m[j] - slope) * beta


@kernel
def shrink(x: Any) -> None:
    """Divide a matrix by its norm, so that no singular value is above 1."""
    squares = 0.0
    for i in range(len(x)):
        squares += dot(x[i], x[i])
    factor = float32(1 / max(np.sqrt(squares), MUON_EPS))
    for i in range(len(x)):
        row = x[i]
        for j in range(len(row)):
            row[j] *= factor


@kernel
def iterate(x: Any, out: Any, gram: Any, square: Any, packed: int, edge: Any) -> None:
    """Write (a I + b A + c A^2) X to out, or from the right: A is X X^T, or X^T X if that is smaller.

    Args:
        x: (rows, cols).
        out: (rows, cols).
        gram: (side, side) for the smaller side, overwritten.
        square: likewise.
        packed: address of memory for a packed matrix.
        edge: products.EDGE_SHAPE, overwritten.
    """
    rows, cols = x.shape
    side = len(gram)
    a, b, c = float32(MUON_A), float32(MUON_B), float32(MUON_C)
    if rows > cols:
        panels = panels_at(packed, (cols + LANES - 1) // LANES, rows)
        products.pack_columns(x, panels, 0, rows)
        products.multiply_range(panels, panels, gram, False, (0, side), (0, side), (0, rows), edge)
    else:
        panels = panels_at(packed, (rows + LANES - 1) // LANES, cols)
        for panel in range(len(panels)):
            products.pack_rows(x, panels, panel)
        products.multiply_range(x, panels, gram, False, (0, side), (0, side), (0, cols), edge)
    of_gram = panels_at(packed, (side + LANES - 1) // LANES, side)
    products.pack_columns(gram, of_gram, 0, side)
    products.multiply_range(gram, of_gram, square, False, (0, side), (0, side), (0, side), edge)
    for i in range(side):
        row, squared = gram[i], square[i]
        for j in range(side):
            row[j] = row[j] * b + squared[j] * c
    for i in range(rows):
        row, result = x[i], out[i]
        for j in range(cols):
            result[j] = row[j] * a
    if rows > cols:
        products.pack_columns(gram, of_gram, 0, side)
        products.multiply_range(x, of_gram, out, True, (0, rows), (0, cols), (0, side), edge)
    else:
        of_x = panels_at(packed, (cols + LANES - 1) // LANES, rows)
        products.pack_columns(x, of_x, 0, rows)
        products.multiply_range(gram, of_x, out, True, (0, rows), (0, cols), (0, side), edge)
