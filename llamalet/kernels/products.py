"""Products of large float32 matrices, out = left @ right, in whichever way the two lie in memory.

`right` (depth, n) is packed first, as panels of 16 columns, so that a row of a panel is one vector load. `left`
(m, depth) is read a number at a time. It may lie in memory in any way that keeps the terms of a row near each other;
where they are far apart, it is packed as panels too. So one innermost function, `multiply_tile`, makes the three
products of training from the arrays x (m, cols), weight (rows, cols) and d_y (m, rows):

    forward      y = x @ weight.T           right: weight packed by rows
    by inputs    d_x = d_y @ weight         right: weight packed by columns
    by weights   d_weight = d_y.T @ x       left: d_y packed by columns; right: x packed by columns

A tile of 8 rows and 3 panels is summed in 24 vector registers: each vector of a panel is used 8 times, each number of
`left` 48 times. Each number of the result is a sum of sums of DEPTH terms, from the first to the last, whatever the
number of threads: a block is the work of one thread, and which blocks there are follows from the shape.
"""

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from llamalet.kernels import llvm, simd
from llamalet.kernels.layers import FLOAT_BYTES, array_at
from llamalet.kernels.llvm import F32, I8, I64, i64
from llamalet.kernels.ops import OPTIONS, kernel

LANES = 16
"""Columns of a panel."""

WIDE = simd.instruction_path() == "avx512vnni"
"""Whether there are 32 registers of 16 numbers. Else 16 registers of 8 are assumed."""

TILE_ROWS, TILE_PANELS = (8, 3) if WIDE else (4, 1)

DEPTH = 128
"""Terms summed at a time: so many rows of the panels of a tile fit into a core's first cache."""

LARGEST_BLOCK, SMALLEST_BLOCK = (128, 8 * 3 * LANES), (32, 2 * 3 * LANES)
"""Rows and columns of a block: large enough to read the sides seldom, small enough to stay in a core's second cache."""

ENOUGH_BLOCKS = 16

EDGE_SHAPE = (TILE_ROWS, TILE_PANELS * LANES)
"""A tile that reaches over the edge of the result is computed here, and its part inside copied."""


def panels_shape(depth: int, n: int) -> tuple[int, int, int]:
    """Return the shape of a packed matrix (depth, n): float32 (panels, depth, 16)."""
    return -(-n // LANES), depth, LANES


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
def panels_at(typing_context: Any, address: Any, n_panels: Any, depth: Any) -> Any:
    """Return the packed matrix (panels, depth, 16) at an address; the caller keeps that memory alive."""
    result = types.Array(types.float32, 3, "C")

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        address, n_panels, depth = args
        data, row_bytes = builder.inttoptr(address, F32.as_pointer()), i64(LANES * FLOAT_BYTES)
        strides = (builder.mul(depth, row_bytes), row_bytes, i64(FLOAT_BYTES))
        return array_at(context, builder, result, data, (n_panels, depth, i64(LANES)), strides, i64(FLOAT_BYTES))

    return result(types.intp, types.intp, types.intp), build


@kernel
def pack_rows(weight: Any, panels: Any, block: int) -> None:
    """Pack 16 rows of a contiguous matrix (n, depth) as a panel: the right side is its transpose."""
    simd.rows_to_lanes(weight, block * LANES, len(weight) - 1, panels[block])


@kernel
def pack_columns(x: Any, panels: Any, first: int, last: int) -> None:
    """Pack rows first..last of a matrix (depth, n) into all panels: the right side is the matrix itself."""
    n = x.shape[1]
    whole = n // LANES
    for k in range(first, last):
        for panel in range(whole):
            for lane in range(LANES):
                panels[panel, k, lane] = x[k, panel * LANES + lane]
        for panel in range(whole, len(panels)):
            for lane in range(LANES):
                panels[panel, k, lane] = x[k, min(panel * LANES + lane, n - 1)]


@kernel
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


@kernel
def multiply_range(left: Any, panels: Any, out: Any, add: bool, rows: Any, columns: Any, terms: Any, edge: Any) -> None:
    """Compute some rows and columns of a product, from some of the terms: each a pair of the first and the end.

    The first row must be a multiple of TILE_ROWS, the first column one of LANES. The other arguments are `multiply`'s.
    """
    for k in range(terms[0], terms[1], DEPTH):
        k_end = min(k + DEPTH, terms[1])
        for column in range(columns[0], columns[1], TILE_PANELS * LANES):
            for row in range(rows[0], rows[1], TILE_ROWS):
                tile = out[row : min(row + TILE_ROWS, rows[1]), column : min(column + TILE_PANELS * LANES, columns[1])]
                compute_tile(left, row, k, k_end, panels, column // LANES, tile, add or k > terms[0], edge)


@kernel
def compute_tile(
    left: Any, row: int, k: int, k_end: int, panels: Any, panel: int, out: Any, add: bool, edge: Any
) -> None:
    """Compute a tile out (up to TILE_ROWS, up to TILE_PANELS * LANES), whose first row and panel are given."""
    rows, columns = out.shape
    if rows == TILE_ROWS and columns == TILE_PANELS * LANES:
        multiply_rows(left, row, rows, k, k_end, panels, panel, TILE_PANELS, out, add)
        return
    if add:
        copy(out, edge, rows, columns)
    multiply_rows(left, row, rows, k, k_end, panels, panel, (columns + LANES - 1) // LANES, edge[:, :], add)
    copy(edge, out, rows, columns)


def multiply_rows(
    left: Any, row: int, count: int, k: int, k_end: int, panels: Any, panel: int, width: int, out: Any, add: bool
) -> None:
    """Multiply `count` rows of the left side, a matrix or packed, by `width` panels: terms k up to k_end."""


@overload(multiply_rows, jit_options=OPTIONS, strict=False)
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

    return of_matrix if left.ndim == 2 else of_panels


@kernel
def multiply_panels(left: Any, panels: Any, panel: int, width: int, k: int, out: Any, add: bool) -> None:
    """Multiply TILE_ROWS rows by `width` panels, terms k and after: all at once if there are registers for them."""
    if WIDE and width == 3:
        multiply_tile(left, panels, (panel, panel + 1, panel + 2), k, out, 0, add)
    elif WIDE and width == 2:
        multiply_tile(left, panels, (panel, panel + 1), k, out, 0, add)
    else:
        for i in range(width):
            multiply_tile(left, panels, (panel + i,), k, out, i * LANES, add)


@kernel
def copy(source: Any, target: Any, rows: int, columns: int) -> None:
    """Copy the first rows and columns of a matrix."""
    for i in range(rows):
        for j in range(columns):
            target[i, j] = source[i, j]


@intrinsic
def multiply_tile(
    typing_context: Any, left: Any, panels: Any, numbers: Any, first: Any, out: Any, column: Any, add: Any
) -> Any:
    """Write to out[i, column + 16 j + lane] the sum of left[i, k] * panels[numbers[j], first + k, lane] over all k.

    Args:
        typing_context: numba's.
        left: float32 (1 to TILE_ROWS, terms), any strides; the last row stands in for missing ones.
        panels: float32 (panels, depth, 16), contiguous.
        numbers: a tuple of panels.
        first: their row for k = 0.
        out: float32 (TILE_ROWS, columns), its rows contiguous.
        column: the first column.
        add: whether to add to what is there.
    """
    vector = ir.VectorType(F32, LANES)

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
            x_rows.append(moved(x.data, builder.mul(number, row_bytes), F32))
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
                llvm.load_vector(builder, builder.gep(p, [builder.mul(k, i64(LANES))]), F32, LANES) for p in w_panels
            ]
            offset = builder.mul(k, term_bytes)
            for i, x_row in enumerate(x_rows):
                number = llvm.splat(builder, builder.load(moved(x_row, offset, F32)), LANES)
                llvm.add_products(builder, sums[i * len(rows) : (i + 1) * len(rows)], [number], rows)
        # What is there is added last: sums of few terms each lose less to rounding than one of all terms.
        with builder.if_then(args[6]):
            for total, target in zip(sums, targets, strict=True):
                before = llvm.load_vector(builder, target, F32, LANES)
                builder.store(builder.fadd(before, builder.load(total)), total)
        for total, target in zip(sums, targets, strict=True):
            builder.store(builder.load(total), builder.bitcast(target, vector.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(left, panels, numbers, types.intp, out, types.intp, types.boolean), build
