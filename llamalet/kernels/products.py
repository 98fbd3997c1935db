"""Products of large matrices, out = left @ right, in whichever way the two lie in memory.

A number here is a float32, or a uint32, which holds a pair of bfloat16: see bfloat16.py. Results are float32.

`right` (depth, n) is packed first, as panels of 16 columns, so that a row of a panel is one vector load. `left`
(m, depth) is read a number at a time. It may lie in memory in any way that keeps the terms of a row near each other;
where they are far apart, it is packed as panels too. So one innermost function, `multiply_tile`, makes the three
products of training from the arrays x (m, cols), weight (rows, cols) and d_y (m, rows):

    forward      y = x @ weight.T           right: weight packed by rows
    by inputs    d_x = d_y @ weight         right: weight packed by columns
    by weights   d_weight = d_y.T @ x       left: d_y packed by columns; right: x packed by columns

A tile of 8 rows and 3 panels is summed in 24 vector registers: each vector of a panel is used 8 times, each number of
`left` 48 times. Each number of the result is a sum of sums of DEPTH terms, from the first to the last. In tile
registers (amx) a tile is 32 rows and 2 panels, and each number is one sum. The number of threads makes no difference: a
block is the work of one thread, and which blocks there are follows from the shape.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from llamalet.kernels import bfloat16, llvm, simd
from llamalet.kernels.bfloat16 import LANES, add_pair_products, begin_tiles, end_tiles, multiply_tiles
from llamalet.kernels.jit import PART, inlined_kernel, inner_kernel
from llamalet.kernels.layers import FLOAT_BYTES, contiguous_at
from llamalet.kernels.llvm import F32, I8, I32, I64, i64
from llamalet.kernels.shared import shared_kernel

WIDE = simd.instruction_path() == "avx512vnni"
"""Whether there are 32 registers of 16 numbers. Else 16 registers of 8 are assumed."""

AMX = bfloat16.instructions() == "amx"
"""Whether pairs are multiplied in tile registers."""

TILE_ROWS, TILE_PANELS = (8, 3) if WIDE else (4, 1)
PAIR_TILE_ROWS, PAIR_TILE_PANELS = (32, 2) if AMX else (TILE_ROWS, TILE_PANELS)

DEPTH = 128
"""Numbers summed at a time: so many rows of the panels of a tile fit into a core's first cache."""

PAIR_DEPTH = 192 if AMX else DEPTH
"""Likewise for pairs."""

TILE, PAIR_TILE = (TILE_ROWS, TILE_PANELS * LANES, DEPTH), (PAIR_TILE_ROWS, PAIR_TILE_PANELS * LANES, PAIR_DEPTH)
"""Rows and columns of a tile, and the numbers summed at a time."""

LARGEST_BLOCK, SMALLEST_BLOCK = (128, 8 * 3 * LANES), (32, 2 * 3 * LANES)
"""Rows and columns of a block: large enough to read the sides seldom, small enough to stay in a core's second cache."""

ENOUGH_BLOCKS = 16

EDGE_SHAPE = max(TILE_ROWS, PAIR_TILE_ROWS), max(TILE_PANELS, PAIR_TILE_PANELS) * LANES
"""A tile that reaches over the edge of the result is computed here, and its part inside copied."""


def panels_shape(depth: int, n: int) -> tuple[int, int, int]:
    """Return the shape of a packed matrix (depth, n): float32 (panels, depth, 16)."""
    return -(-n // LANES), depth, LANES


class Kind(NamedTuple):
    """How the sides of a product lie in memory: the types of their numbers, and the shapes of packed matrices.

    operand: of a left side.
    width: of a left side's rows with what fills them up, given its columns.
    packed: of a right side.
    panels_shape: (depth, n) to the shape of a right side.
    left_shape: (depth, m) to the shape of a left side that is the transpose of a matrix.
    """

    operand: type[np.generic]
    width: Callable[[int], int]
    packed: type[np.generic]
    panels_shape: Callable[[int, int], tuple[int, ...]]
    left_shape: Callable[[int, int], tuple[int, ...]]


FLOATS = Kind(np.float32, int, np.float32, panels_shape, panels_shape)
PAIRS = Kind(np.uint16, bfloat16.filled, np.uint32, bfloat16.panels_shape, bfloat16.transposed_shape)


class Blocks(NamedTuple):
    """How a product is cut into blocks: `n` of them, of `rows` x `columns` numbers each."""

    rows: int
    columns: int
    n: int


def blocks_of(m: int, n: int) -> Blocks:
    """Return the blocks of a product with m rows and n columns: as large as they may be, but not too few."""
    rows, columns = LARGEST_BLOCK
    while (n_blocks := -(-m // rows) * -(-n // columns)) < ENOUGH_BLOCKS and (rows, columns) != SMALLEST_BLOCK:
        if rows * SMALLEST_BLOCK[1] >= columns * SMALLEST_BLOCK[0]:
            rows //= 2
        else:
            columns //= 2
    return Blocks(rows, columns, n_blocks)


@intrinsic
def panels_in(typing_context: Any, memory: Any, depth: Any, n: Any) -> Any:
    """Return the part of `memory` (numbers,) that a packed matrix (depth, n) takes: `panels_shape`."""
    result, of_pairs = types.Array(memory.dtype, 3, "C"), memory.dtype == types.uint32

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        data = context.make_array(memory)(context, builder, args[0]).data
        _, depth, n = args
        n_rows = bfloat16.filled_pairs(builder, depth) if of_pairs else depth
        n_panels = builder.udiv(builder.add(n, i64(LANES - 1)), i64(LANES))
        return contiguous_at(context, builder, result, data, (n_panels, n_rows, i64(LANES)), FLOAT_BYTES)

    return result(memory, types.intp, types.intp), build


@intrinsic
def matrix_in(typing_context: Any, memory: Any, rows: Any, cols: Any) -> Any:
    """Return the part of `memory` (numbers,) that a matrix (rows, cols) takes; those of bfloat16 are filled up."""
    result, rounded = types.Array(memory.dtype, 2, "C"), memory.dtype == types.uint16

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        data = context.make_array(memory)(context, builder, args[0]).data
        _, rows, cols = args
        width = builder.mul(bfloat16.filled_pairs(builder, cols), i64(2)) if rounded else cols
        return contiguous_at(context, builder, result, data, (rows, width), 2 if rounded else FLOAT_BYTES)

    return result(memory, types.intp, types.intp), build


def pack_rows(weight: Any, panels: Any, panel: int) -> None:
    """Pack 16 rows of a contiguous matrix (n, depth) as a panel: the right side is its transpose."""


@overload(pack_rows, jit_options=PART, strict=False)
def _pack_rows(weight: Any, panels: Any, panel: Any) -> Any:
    if panels.dtype == types.uint32:
        return lambda weight, panels, panel: bfloat16.pack_rows(weight, panel * LANES, panels[panel])
    return lambda weight, panels, panel: simd.rows_to_lanes(
        weight, panel * LANES, len(weight) - 1, 0, weight.shape[1], panels[panel]
    )


def pack_columns(x: Any, panels: Any, first: int, last: int) -> None:
    """Pack rows first..last of a matrix (depth, n) into all panels: the right side is the matrix itself."""


@overload(pack_columns, jit_options=PART, strict=False)
def _pack_columns(x: Any, panels: Any, first: Any, last: Any) -> Any:
    return bfloat16.pack_columns if panels.dtype == types.uint32 else pack_columns_of_floats


def pack_columns_of_floats(x: Any, panels: Any, first: int, last: int) -> None:
    """Do what pack_columns does, for float32."""
    n = x.shape[1]
    whole = n // LANES
    for k in range(first, last):
        for panel in range(whole):
            for lane in range(LANES):
                panels[panel, k, lane] = x[k, panel * LANES + lane]
        for panel in range(whole, len(panels)):
            for lane in range(LANES):
                panels[panel, k, lane] = x[k, min(panel * LANES + lane, n - 1)]


# A left side is used where it lies, or from a room that it is first rounded or transposed into. (A kernel cannot return
# a view of an array, so preparing and taking it are two functions.)


def prepare_left(x: Any, room: Any) -> None:
    """Round a matrix (m, depth) into the room for it, if products of this kind need that; see `left_of`."""


@overload(prepare_left, jit_options=PART, strict=False)
def _prepare_left(x: Any, room: Any) -> Any:
    if x.dtype == room.dtype:
        return lambda x, room: None
    return lambda x, room: bfloat16.round_rows(x, room)


@intrinsic
def left_of(typing_context: Any, x: Any, room: Any) -> Any:
    """Return a matrix as a left side.

    Args:
        typing_context: numba's.
        x: float32 or bfloat16 (m, depth), its rows contiguous; bfloat16 is filled up.
        room: bfloat16 (m or more, filled(depth) or more) if products multiply bfloat16; used if x is float32.
    """
    rounded, of_bits = room.dtype == types.uint16, x.dtype == types.uint16
    source = x if of_bits else room
    result = types.Array(types.uint32, 2, source.layout) if rounded else x

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return bfloat16.as_pairs(context, builder, source, args[0 if of_bits else 1], result) if rounded else args[0]

    return result(x, room), build


def prepare_transpose(x: Any, room: Any) -> None:
    """Write the transpose of a matrix (depth, m) into the room for it; see `transpose_of`."""


@overload(prepare_transpose, jit_options=PART, strict=False)
def _prepare_transpose(x: Any, room: Any) -> Any:
    def of_pairs(x: Any, room: Any) -> None:
        for first in range(0, len(x), bfloat16.TERMS):
            bfloat16.transpose(x, first, room)

    return of_pairs if room.dtype == types.uint16 else lambda x, room: pack_columns(x, room, 0, len(x))


def prepare_transpose_of_lower(x: Any, room: Any) -> None:
    """Do what prepare_transpose does, for a lower triangle (T, T), zero up to the end of its 32 rows."""


@overload(prepare_transpose_of_lower, jit_options=PART, strict=False)
def _prepare_transpose_of_lower(x: Any, room: Any) -> Any:
    def of_pairs(x: Any, room: Any) -> None:
        for first in range(0, len(x), bfloat16.TERMS):
            bfloat16.transpose(x[:, : first + bfloat16.TERMS], first, room)

    def of_floats(x: Any, room: Any) -> None:
        for first in range(0, len(x), bfloat16.TERMS):
            end = min(first + bfloat16.TERMS, len(x))
            pack_columns(x[:, :end], room[: (end + LANES - 1) // LANES], first, end)

    return of_pairs if room.dtype == types.uint16 else of_floats


@intrinsic
def transpose_of(typing_context: Any, room: Any) -> Any:
    """Return the transpose of a matrix (depth, m) as a left side.

    Args:
        typing_context: numba's.
        room: where it was prepared: bfloat16.transposed_shape(depth, m) or more, or float32 panels_shape(depth, m).
    """
    rounded = room.dtype == types.uint16
    result = types.Array(types.uint32, 2, room.layout) if rounded else room

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return bfloat16.as_pairs(context, builder, room, args[0], result) if rounded else args[0]

    return result(room), build


def terms_of(left: Any, first: int, end: int) -> tuple[int, int]:
    """Return a range of terms in numbers of this left side; the first must be even."""
    return (first // 2, (end + 1) // 2) if left.dtype == np.uint32 else (first, end)


@overload(terms_of, jit_options=PART, strict=False)
def _terms_of(left: Any, first: Any, end: Any) -> Any:
    if left.dtype == types.uint32:
        return lambda left, first, end: (first // 2, (end + 1) // 2)
    return lambda left, first, end: (first, end)


@inlined_kernel
def multiply(left: Any, panels: Any, out: Any, add: bool, blocks: Any, block: int, edge: Any) -> None:
    """Compute one block of a product.

    Args:
        left: (m, depth), or packed panels of its transpose.
        panels: the packed right side.
        out: (m, n), its rows contiguous.
        add: whether to add to what is there.
        blocks: blocks_of(m, n).
        block: its number; neighbours share the same panels.
        edge: EDGE_SHAPE, overwritten.
    """
    m, n = out.shape
    n_row_blocks = (m + blocks.rows - 1) // blocks.rows
    row, column = block % n_row_blocks * blocks.rows, block // n_row_blocks * blocks.columns
    rows, columns = (row, min(row + blocks.rows, m)), (column, min(column + blocks.columns, n))
    multiply_range(left, panels, out, add, rows, columns, (0, panels.shape[1]), edge)


@shared_kernel
def multiply_range(left: Any, panels: Any, out: Any, add: bool, rows: Any, columns: Any, terms: Any, edge: Any) -> None:
    """Compute some rows and columns of a product, from some of the terms: each a pair of the first and the end.

    The first row must be a multiple of a tile's, the first column one of LANES, with amx the first pair one of 16. The
    other arguments are `multiply`'s.
    """
    tile_rows, tile_columns, depth = tile_shape(left)
    begin(left)
    for k in range(terms[0], terms[1], depth):
        k_end = min(k + depth, terms[1])
        for column in range(columns[0], columns[1], tile_columns):
            for row in range(rows[0], rows[1], tile_rows):
                tile = out[row : min(row + tile_rows, rows[1]), column : min(column + tile_columns, columns[1])]
                compute_tile(left, row, k, k_end, panels, column // LANES, tile, add or k > terms[0], edge)
    end(left)


def tile_shape(left: Any) -> tuple[int, int, int]:
    """Return rows and columns of a tile, and the numbers summed at a time, for this kind of left side."""
    return PAIR_TILE if left.dtype == np.uint32 else TILE


@overload(tile_shape, jit_options=PART, strict=False)
def _tile_shape(left: Any) -> Any:
    shape = PAIR_TILE if left.dtype == types.uint32 else TILE
    return lambda left: shape


def begin(left: Any) -> None:
    """Set up what products with this kind of left side need."""


@overload(begin, jit_options=PART, strict=False)
def _begin(left: Any) -> Any:
    return (lambda left: begin_tiles(False)) if AMX and left.dtype == types.uint32 else lambda left: None


def end(left: Any) -> None:
    """Undo `begin`."""


@overload(end, jit_options=PART, strict=False)
def _end(left: Any) -> Any:
    return (lambda left: end_tiles()) if AMX and left.dtype == types.uint32 else lambda left: None


@inlined_kernel
def compute_tile(
    left: Any, row: int, k: int, k_end: int, panels: Any, panel: int, out: Any, add: bool, edge: Any
) -> None:
    """Compute a tile `out` or what part of it there is; its first row and panel are given."""
    rows, columns = out.shape
    tile_rows, tile_columns, _ = tile_shape(left)
    whole = rows == tile_rows and columns == tile_columns
    tile = out if whole else edge[:, :]
    if add and not whole:
        copy(out, tile)
    multiply_rows(left, row, rows, k, k_end, panels, panel, (columns + LANES - 1) // LANES, tile, add)
    if not whole:
        copy(tile, out)


def multiply_rows(
    left: Any, row: int, count: int, k: int, k_end: int, panels: Any, panel: int, width: int, out: Any, add: bool
) -> None:
    """Multiply `count` rows of the left side, a matrix or packed, by `width` panels: terms k up to k_end."""


@overload(multiply_rows, jit_options=PART, strict=False)
def _multiply_rows(
    left: Any, row: Any, count: Any, k: Any, k_end: Any, panels: Any, panel: Any, width: Any, out: Any, add: Any
) -> Any:
    def of_matrix(
        left: Any, row: Any, count: Any, k: Any, k_end: Any, panels: Any, panel: Any, width: Any, out: Any, add: Any
    ) -> None:
        multiply_panels(left[row : row + count, k:k_end], panels, panel, width, k, out, add)

    def of_panels(
        left: Any, row: Any, count: Any, k: Any, k_end: Any, panels: Any, panel: Any, width: Any, out: Any, add: Any
    ) -> None:
        lane = row % LANES  # TILE_ROWS divides LANES, so the rows are lanes of one panel
        lanes = left[row // LANES, k:k_end, lane : lane + count]
        multiply_panels(lanes.T, panels, panel, width, k, out, add)

    def of_pairs(
        left: Any, row: Any, count: Any, k: Any, k_end: Any, panels: Any, panel: Any, width: Any, out: Any, add: Any
    ) -> None:
        multiply_tiles(left, row, count <= 16, k, k_end, panels, panel, width, out, add)

    if AMX and left.dtype == types.uint32:
        return of_pairs
    return of_matrix if left.ndim == 2 else of_panels


@inlined_kernel
def multiply_panels(left: Any, panels: Any, panel: int, width: int, k: int, out: Any, add: bool) -> None:
    """Multiply TILE_ROWS rows by `width` panels, terms k and after: all at once if there are registers for them."""
    if WIDE and width == 3:
        multiply_tile(left, panels, (panel, panel + 1, panel + 2), k, out, 0, add)
    elif WIDE and width == 2:
        multiply_tile(left, panels, (panel, panel + 1), k, out, 0, add)
    else:
        for i in range(width):
            multiply_tile(left, panels, (panel + i,), k, out, i * LANES, add)


@inner_kernel
def copy(source: Any, target: Any) -> None:
    """Copy what both matrices have room for."""
    for i in range(min(len(source), len(target))):
        for j in range(min(source.shape[1], target.shape[1])):
            target[i, j] = source[i, j]


@intrinsic
def multiply_tile(
    typing_context: Any, left: Any, panels: Any, numbers: Any, first: Any, out: Any, column: Any, add: Any
) -> Any:
    """Write to out[i, column + 16 j + lane] the sum of left[i, k] * panels[numbers[j], first + k, lane] over all k.

    Args:
        typing_context: numba's.
        left: float32 or pairs (1 to TILE_ROWS, terms), any strides; the last row stands in for missing ones.
        panels: of the same kind (panels, depth, 16), contiguous.
        numbers: a tuple of panels.
        first: their row for k = 0.
        out: float32 (TILE_ROWS, columns), its rows contiguous.
        column: the first column.
        add: whether to add to what is there.
    """
    vector = ir.VectorType(F32, LANES)
    of_pairs = left.dtype == types.uint32
    number_type = I32 if of_pairs else F32

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        x, w, y = (
            context.make_array(array)(context, builder, args[at]) for array, at in ((left, 0), (panels, 1), (out, 4))
        )
        (n_rows, depth), (row_bytes, term_bytes) = (
            cgutils.unpack_tuple(builder, part) for part in (x.shape, x.strides)
        )
        _, panel_rows, _ = cgutils.unpack_tuple(builder, w.shape)
        out_bytes, _ = cgutils.unpack_tuple(builder, y.strides)

        def moved(pointer: Any, n_bytes: Any, element: Any) -> Any:
            return builder.bitcast(
                builder.gep(builder.bitcast(pointer, I8.as_pointer()), [n_bytes]), element.as_pointer()
            )

        last = builder.sub(n_rows, i64(1))
        x_rows, targets = [], []
        for i in range(TILE_ROWS):
            number = builder.select(builder.icmp_signed("<", last, i64(i)), last, i64(i))
            x_rows.append(moved(x.data, builder.mul(number, row_bytes), number_type))
            row = moved(y.data, builder.mul(i64(i), out_bytes), F32)
            targets += [builder.gep(row, [builder.add(args[5], i64(LANES * j))]) for j in range(numbers.count)]
        w_panels = [
            builder.gep(w.data, [builder.mul(builder.add(builder.mul(number, panel_rows), args[3]), i64(LANES))])
            for number in cgutils.unpack_tuple(builder, args[2])
        ]
        sums = llvm.variables(builder, [llvm.splat_constant(F32, 0.0, LANES)] * len(targets))
        with cgutils.for_range(builder, depth, intp=I64) as loop:
            k = loop.index
            rows = [
                llvm.load_vector(builder, builder.gep(p, [builder.mul(k, i64(LANES))]), number_type, LANES)
                for p in w_panels
            ]
            offset = builder.mul(k, term_bytes)
            for i, x_row in enumerate(x_rows):
                number = llvm.splat(builder, builder.load(moved(x_row, offset, number_type)), LANES)
                for total, row in zip(sums[i * len(rows) : (i + 1) * len(rows)], rows, strict=True):
                    (add_pair_products if of_pairs else llvm.add_product)(builder, total, number, row)
        # What is there is added last: sums of few terms each lose less to rounding than one of all terms.
        with builder.if_then(args[6]):
            for total, target in zip(sums, targets, strict=True):
                before = llvm.load_vector(builder, target, F32, LANES)
                builder.store(builder.fadd(before, builder.load(total)), total)
        for total, target in zip(sums, targets, strict=True):
            builder.store(builder.load(total), builder.bitcast(target, vector.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(left, panels, numbers, types.intp, out, types.intp, types.boolean), build
