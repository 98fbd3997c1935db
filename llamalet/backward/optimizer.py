"""AdamW and Muon on the weights and gradients of a TrainingModel, and the norm of all gradients."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numba import float32

from llamalet.aligned import address_of
from llamalet.backward.groups import (
    MUON_A,
    MUON_B,
    MUON_C,
    MUON_EPS,
    MUON_ITERATIONS,
    MUON_MOMENTUM,
    Group,
    group_of,
    muon_rate,
)
from llamalet.backward.memory import Array, Take, allocate, bytes_of
from llamalet.backward.runner import Runner
from llamalet.kernels import bfloat16, products
from llamalet.kernels.jit import inlined_kernel, inner_kernel, kernel
from llamalet.kernels.layers import floats_at
from llamalet.kernels.ops import dot
from llamalet.kernels.shared import shared_kernel
from llamalet.kernels.threads import blocks

BLOCK = 1 << 14
"""Numbers in a block of the functions that treat each number by itself."""

ADAMW_EPS = 1e-8

NEGLIGIBLE = np.float32(1e-17)
"""Gradients and averages below this become zero, mean squares below its square: far less than ADAMW_EPS, they change no
weight. The averages of a gradient that stays zero, as of a token that never comes, would otherwise end as numbers too
small to be normalised, with which processors compute 20 times slower."""

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
        rounded: bool = False,
    ) -> None:
        """Begin with a state of zeros.

        Args:
            runner: the threads.
            weights: by name, changed in place by `step`.
            kind: adamw or muon.
            betas: AdamW's decay rates of the moments.
            weight_decay: decay of the matrices, as a multiple of the learning rate.
            rounded: whether Muon's products multiply bfloat16.

        Raises:
            MemoryError: if there is not as much memory as `n_bytes` says.
        """
        self._runner, self._weights, self._betas, self._decay = runner, weights, betas, weight_decay
        shapes = {name: weight.shape for name, weight in weights.items()}
        self._groups = groups_of(shapes, kind)
        self._space = space = allocate(partial(lay_out, shapes, kind, runner.n_threads, rounded))
        self.state: dict[str, Array] = space.state
        self._muon = [name for name, group in self._groups.items() if group == "muon"]

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
        self._runner.run(muon, len(jobs), jobs, *factors, self._space.muon)


# -- memory -----------------------------------------------------------------------------------------------------------

Shapes = Mapping[str, tuple[int, ...]]


class MuonSpace(NamedTuple):
    """Memory for the iterations on a matrix, for each thread, enough for the largest.

    other: (threads, numbers), a matrix.
    gram: (threads, numbers), the products of its rows with each other.
    square: (threads, numbers), the product of gram with itself.
    right: (threads, numbers), a packed right side.
    left: (threads, numbers), a left side.
    edges: (threads, *products.EDGE_SHAPE).
    """

    other: Any
    gram: Any
    square: Any
    right: Any
    left: Any
    edges: Any


@dataclass
class OptimizerSpace:
    """The arrays of an optimizer.

    state: see NumbaOptimizer, float32.
    parts: the sums of squares of a gradient's blocks, float32.
    muon: see MuonSpace.
    """

    state: dict[str, Any]
    parts: Any
    muon: MuonSpace


def n_bytes(shapes: Shapes, kind: str, n_threads: int, *, rounded: bool) -> int:
    """Return the bytes that a NumbaOptimizer takes for weights of these shapes."""
    return bytes_of(partial(lay_out, shapes, kind, n_threads, rounded))


def lay_out(shapes: Shapes, kind: str, n_threads: int, rounded: bool, take: Take) -> OptimizerSpace:
    """Return the space of arrays that `take(*shape, dtype=)` returns; the other arguments are those of `n_bytes`."""
    state = {}
    for name, group in groups_of(shapes, kind).items():
        if group == "muon":
            state[f"{name}:momentum_buffer"] = take(*shapes[name])
        else:
            state[f"{name}:step"] = take()
            state[f"{name}:exp_avg"] = take(*shapes[name])
            state[f"{name}:exp_avg_sq"] = take(*shapes[name])
    kind_of_product = products.PAIRS if rounded else products.FLOATS
    matrices = [sorted(shapes[name]) for name, group in groups_of(shapes, kind).items() if group == "muon"] or [[1, 1]]
    largest, widest = max(math.prod(pair) for pair in matrices), max(side for side, _ in matrices)
    right = max(
        math.prod(kind_of_product.panels_shape(*pair))
        for side, long in matrices
        for pair in ((long, side), (side, long))
    )
    # A float32 matrix is a left side where it lies. Products of bfloat16 read whole tiles of rows.
    left = max(math.prod(bfloat16.transposed_shape(long, side)) for side, long in matrices) if rounded else 1
    return OptimizerSpace(
        state=state,
        parts=take(max(_blocks(math.prod(shape)) for shape in shapes.values())),
        muon=MuonSpace(
            other=take(n_threads, largest),
            gram=take(n_threads, widest * widest),
            square=take(n_threads, widest * widest),
            right=take(n_threads, right, dtype=kind_of_product.packed),
            left=take(n_threads, left, dtype=kind_of_product.operand),
            edges=take(n_threads, *products.EDGE_SHAPE),
        ),
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


@inner_kernel
def unless_below(least: float, x: float) -> float:
    """Return x, but zero if it is smaller than `least`; NaN stays."""
    return float32(0) if abs(x) < least else x


# -- Muon: a block is a whole matrix ----------------------------------------------------------------------------------


@kernel
def muon(jobs: Any, scale: float, keep: float, space: Any, team: Any) -> None:
    """Update the matrices of jobs (n,), MUON_JOB.

    Args:
        jobs: what to update.
        scale: what gradients are multiplied with first.
        keep: what weights are multiplied with: they decay.
        space: MuonSpace.
        team: see threads.Team.
    """
    for block in blocks(team):
        job, thread = jobs[block], team.thread
        weight, gradient, momentum = (
            floats_at(job.weight, job.rows, job.cols),
            floats_at(job.gradient, job.rows, job.cols),
            floats_at(job.momentum, job.rows, job.cols),
        )
        follow(momentum, gradient, scale)
        shrink(gradient)
        if job.rows <= job.cols:
            found = products.matrix_in(space.other[thread], job.rows, job.cols)
            orthogonalize(gradient, found, space, thread)
            for i in range(len(weight)):
                row, update = weight[i], found[i]
                for j in range(len(row)):
                    row[j] = row[j] * keep - update[j] * job.step
        else:  # of the two products with itself, the smaller: the columns become rows
            turned = products.matrix_in(space.other[thread], job.cols, job.rows)
            found = floats_at(job.gradient, job.cols, job.rows)
            write_transpose(gradient, turned)
            orthogonalize(turned, found, space, thread)
            for i in range(len(weight)):
                row = weight[i]
                for j in range(len(row)):
                    row[j] = row[j] * keep - found[j, i] * job.step


@inlined_kernel
def write_transpose(x: Any, out: Any) -> None:
    """Write the transpose of x to out, square by square of 16, so that a line of memory is used while it is near."""
    rows, cols = x.shape
    for first_row in range(0, rows, 16):
        for first_column in range(0, cols, 16):
            for j in range(first_column, min(first_column + 16, cols)):
                for i in range(first_row, min(first_row + 16, rows)):
                    out[j, i] = x[i, j]


@inlined_kernel
def follow(momentum: Any, gradient: Any, scale: float) -> None:
    """Move the momentum towards the gradient, and replace the gradient by where it will be a step later."""
    beta = float32(MUON_MOMENTUM)
    for i in range(len(momentum)):
        m, g = momentum[i], gradient[i]
        for j in range(len(m)):
            slope = unless_below(NEGLIGIBLE, g[j] * scale)
            m[j] = unless_below(NEGLIGIBLE, m[j] + (slope - m[j]) * (float32(1) - beta))
            g[j] = slope + (m[j] - slope) * beta


@inlined_kernel
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


@inner_kernel
def orthogonalize(x: Any, out: Any, space: Any, thread: int) -> None:
    """Take all singular values of x (side, long) near 1, into out; x is overwritten."""
    for _ in range(MUON_ITERATIONS // 2):
        iterate(x, out, space, thread)
        iterate(out, x, space, thread)
    iterate(x, out, space, thread)


@shared_kernel
def iterate(x: Any, out: Any, space: Any, thread: int) -> None:
    """Write (a I + b A + c A^2) X to out, where A is X X^T; both are (side, long)."""
    side, long = x.shape
    a, b, c = float32(MUON_A), float32(MUON_B), float32(MUON_C)
    gram, square = (
        products.matrix_in(space.gram[thread], side, side),
        products.matrix_in(space.square[thread], side, side),
    )
    by_rows = products.panels_in(space.right[thread], long, side)
    for panel in range(len(by_rows)):
        products.pack_rows(x, by_rows, panel)
    multiply(x, by_rows, gram, False, space, thread)
    of_gram = products.panels_in(space.right[thread], side, side)
    products.pack_columns(gram, of_gram, 0, side)
    multiply(gram, of_gram, square, False, space, thread)
    for i in range(side):
        row, squared = gram[i], square[i]
        for j in range(side):
            row[j] = row[j] * b + squared[j] * c
    for i in range(side):
        row, result = x[i], out[i]
        for j in range(long):
            result[j] = row[j] * a
    by_columns = products.panels_in(space.right[thread], side, long)
    products.pack_columns(x, by_columns, 0, side)
    multiply(gram, by_columns, out, True, space, thread)


@shared_kernel
def multiply(x: Any, right: Any, out: Any, add: bool, space: Any, thread: int) -> None:
    """Compute out = x @ right, or add it to out, where x is a float32 matrix and right is packed."""
    rows, terms = (0, out.shape[0]), (0, right.shape[1])
    left = products.matrix_in(space.left[thread], x.shape[0], x.shape[1])
    products.prepare_left(x, left)
    products.multiply_range(
        products.left_of(x, left), right, out, add, rows, (0, out.shape[1]), terms, space.edges[thread]
    )
