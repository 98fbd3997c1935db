"""Products of bfloat16 matrices with float32 vectors on tile registers (amx), without rounding the vectors to bfloat16.

A tile register multiplies bfloat16 with bfloat16. So a vector becomes the sum of three of bfloat16, with 8 bits each of
a float32's 24: `high` is the vector rounded, `middle` what that left, rounded too, `low` the rest.

    W x = (W high + W middle) + W low

They are the vector as long as its numbers are below bfloat16's largest, 3.39e38; what is not finite gives NaN.

The matrix stays where it is: 16 of its rows, 32 columns wide, fill a register. The vectors are packed in panels as
bfloat16.py packs the right side of a product. Each of the three products is a sum of its own in one order, whether
there is one vector or many. So a token has the same products, bit for bit, decoded, in a batch or in a prompt.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from llamalet.aligned import aligned_zeros
from llamalet.kernels import llvm
from llamalet.kernels.bfloat16 import (
    LANES,
    PAIRS,
    PARTS,
    TERMS,
    TILE_BYTES,
    TILE_ROWS,
    begin_tiles,
    end_tiles,
    filled,
    round_vector,
    tile_call,
)
from llamalet.kernels.jit import inner_kernel
from llamalet.kernels.layers import address_of_row, contiguous_at
from llamalet.kernels.llvm import F32, I8, I16, I32, I64, Table, i64

N_REGISTERS = 8

# A thread's scratch: first the sums of 2 blocks of 16 rows with the 3 parts of a panel. Then copies of up to 2 blocks,
# or of one block and the parts of a vector that is a lane among others.
SUM_ROWS, COPIES = 2 * PARTS * TILE_ROWS, 2


class SplitRows(NamedTuple):
    """Vectors (T, cols) as sums of three of bfloat16: vector t is lane t % lanes of panel t // lanes.

    parts: uint32 (panels, pairs, 3, lanes), pairs of numbers of high, middle and low, filled up with zeros to a
        multiple of 16 pairs. There is one lane if there is one vector, else 16.
    """

    parts: Any


def new_split_rows(n: int, cols: int) -> SplitRows:
    """Return room for n vectors of `cols` components."""
    lanes = 1 if n == 1 else LANES
    return SplitRows(aligned_zeros((-(-n // lanes), filled(cols) // 2, PARTS, lanes), np.uint32))


def new_scratch(threads: int, cols: int) -> NDArray[np.float32]:
    """Return scratch of threads that multiply matrices of up to `cols` columns: float32 (threads, n, 16)."""
    rows_of_copy = filled(cols) // TERMS * TILE_ROWS
    return aligned_zeros((threads, SUM_ROWS + COPIES * rows_of_copy, LANES), np.float32)


# -- splitting --------------------------------------------------------------------------------------------------------


@inner_kernel
def split_rows(x: Any, rows: Any, first: int, last: int) -> None:
    """Split x[first:last] (T, cols). With 16 lanes, `first` must begin a panel, and rows after `last` may be split."""
    lanes = rows.parts.shape[3]
    for panel in range(first // lanes, (last + lanes - 1) // lanes):
        if lanes == 1:
            split_vector(x, panel, rows.parts)
        else:
            split_panel(x, panel, rows.parts)


@intrinsic
def split_vector(typing_context: Any, x: Any, row: Any, parts: Any) -> Any:
    """Split a row of x, float32 (T, cols), into panel `row` of parts, which has one lane."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        with _pairs_of(context, builder, signature, args) as (table, pair, target):
            high, middle, low = _parts(builder, table, args[1], pair)
            # Pair by pair high, middle, low; the 48 pairs of 32 numbers fill three vectors.
            for number in range(PARTS):
                pairs, turns = zip(*(divmod(PAIRS * number + lane, PARTS) for lane in range(PAIRS)), strict=True)
                lanes = [pair + PAIRS * (turn == 1) for pair, turn in zip(pairs, turns, strict=True)]
                vector = llvm.shuffle(builder, high, lanes, middle)
                lanes = [
                    PAIRS + pair if turn == 2 else i for i, (pair, turn) in enumerate(zip(pairs, turns, strict=True))
                ]
                vector = llvm.shuffle(builder, vector, lanes, low)
                place = builder.gep(target, [i64(PAIRS * number)])
                builder.store(vector, builder.bitcast(place, vector.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(x, types.intp, parts), build


@intrinsic
def split_panel(typing_context: Any, x: Any, panel: Any, parts: Any) -> Any:
    """Split 16 rows of x, float32 (T, cols), into a panel of parts, which has 16 lanes.

    Rows that x does not have repeat its last.
    """

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        with _pairs_of(context, builder, signature, args) as (table, pair, target):
            last, rows = builder.sub(table.length, i64(1)), []
            for lane in range(LANES):
                number = builder.add(builder.mul(args[1], i64(LANES)), i64(lane))
                number = builder.select(builder.icmp_signed(">", number, last), last, number)
                rows.append(_parts(builder, table, number, pair))
            for part, square in enumerate(zip(*rows, strict=True)):
                for column, vector in enumerate(llvm.transpose(builder, square)):
                    place = builder.gep(target, [i64((column * PARTS + part) * LANES)])
                    builder.store(vector, builder.bitcast(place, vector.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(x, types.intp, parts), build


@contextmanager
def _pairs_of(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Iterator[tuple[Table, Any, Any]]:
    """Loop over a panel, 16 pairs at a time: yield x, the number of the first pair, and its place in `parts`."""
    x, _, parts = signature.args
    array = context.make_array(parts)(context, builder, args[2])
    _, n_pairs, _, lanes = cgutils.unpack_tuple(builder, array.shape)
    with cgutils.for_range_slice(builder, i64(0), n_pairs, i64(PAIRS), I64) as (pair, _):
        number = builder.add(builder.mul(args[1], n_pairs), pair)
        yield (
            Table(context, builder, x, args[0]),
            pair,
            builder.gep(array.data, [builder.mul(number, builder.mul(lanes, i64(PARTS)))]),
        )


def _parts(builder: ir.IRBuilder, x: Table, row: Any, pair: Any) -> list[Any]:
    """Return the parts of 32 numbers of a row, 16 pairs each; numbers after its end are zeros."""
    column = builder.mul(pair, i64(2))
    rest = llvm.load_some(builder, builder.gep(x.row(row), [column]), builder.sub(x.width, column), TERMS)
    parts = []
    for _ in range(PARTS):
        bits = round_vector(builder, rest)
        parts.append(builder.bitcast(bits, ir.VectorType(I32, PAIRS)))
        rest = builder.fsub(rest, llvm.widen(builder, bits))
    return parts


# -- products ---------------------------------------------------------------------------------------------------------


@inner_kernel
def matmul_split(matrix: Any, x: Any, first_t: int, count: int, out: Any, first: int, last: int, scratch: Any) -> None:
    """Be `ops.matmul` for a bfloat16 matrix and SplitRows; scratch is a thread's part of `new_scratch`."""
    if count == 0:
        return
    begin, end = first * TILE_ROWS, min(last * TILE_ROWS, len(matrix))
    begin_tiles(count == 1)
    if x.parts.shape[3] == 1:
        multiply_vector(matrix, x.parts, out, begin, end, scratch)
    elif count == 1:
        parts = as_parts(scratch, SUM_ROWS + copy_rows(matrix.shape[1]), x.parts.shape[1])
        copy_lane(x.parts, first_t, parts)
        multiply_vector(matrix, parts, out, begin, end, scratch)
    else:
        for row in range(begin, end, 2 * TILE_ROWS):
            multiply_panels(matrix, x.parts, first_t, count, out, row, end, scratch)
    end_tiles()


@inner_kernel
def copy_lane(panels: Any, t: int, parts: Any) -> None:
    """Copy the parts of vector t (panels, pairs, 3, 16) to those of a single one (1, pairs, 3, 1)."""
    for pair in range(panels.shape[1]):
        for part in range(PARTS):
            parts[0, pair, part, 0] = panels[t // LANES, pair, part, t % LANES]


@inner_kernel
def multiply_vector(matrix: Any, parts: Any, out: Any, begin: int, end: int, scratch: Any) -> None:
    """Multiply rows begin..end of a matrix with a vector; its three parts are columns of one register.

    The rows in a register are far apart: processors prefetch best from a few long sequential streams.
    """
    distance = (end - begin) // TILE_ROWS if matrix.shape[1] % TERMS == 0 else 0
    for row in range(begin, begin + distance):
        blocks = (address_of_row(matrix, row),)
        multiply_tiles(blocks, distance * row_bytes(matrix), parts, 0, (0,), scratch, 0, 0)
        add_columns(scratch, out, row, distance, TILE_ROWS)
    for row in range(begin + TILE_ROWS * distance, end, TILE_ROWS):
        blocks = (block_at(matrix, row, scratch, 0),)
        multiply_tiles(blocks, row_bytes(matrix), parts, 0, (0,), scratch, 0, 0)
        add_columns(scratch, out, row, 1, min(TILE_ROWS, end - row))


@inner_kernel
def multiply_panels(
    matrix: Any, parts: Any, first_t: int, count: int, out: Any, row: int, end: int, scratch: Any
) -> None:
    """Multiply up to 32 rows of a matrix with vectors, 16 at a time; each of their parts has a register.

    Meanwhile the next 32 rows are fetched from memory, a share with each panel.
    """
    second = min(row + TILE_ROWS, (end - 1) // TILE_ROWS * TILE_ROWS)  # the first again if there are no more
    blocks = block_at(matrix, row, scratch, 0), block_at(matrix, second, scratch, 1)
    first_panel, last_panel = first_t // LANES, (first_t + count - 1) // LANES
    n_panels = last_panel - first_panel + 1
    lines = (2 * TILE_ROWS + n_panels - 1) // n_panels
    ahead = address_of_row(matrix, row) + 2 * TILE_ROWS * row_bytes(matrix)
    for panel in range(first_panel, last_panel + 1):
        multiply_tiles(blocks, row_bytes(matrix), parts, panel, (0, 1, 2), scratch, ahead, lines)
        ahead += lines * row_bytes(matrix)
        first, last = max(first_t, panel * LANES), min(first_t + count, (panel + 1) * LANES)
        for i in range(2):
            add_tiles(scratch, i)
            for t in range(first, last):
                store_row(scratch, i * PARTS * TILE_ROWS + t - panel * LANES, out, t - first_t, (row, second)[i])


@inner_kernel
def copy_rows(cols: int) -> int:
    """Return the rows of scratch, 16 float32 each, that 16 rows of bfloat16 take, filled up."""
    return (cols + TERMS - 1) // TERMS * TILE_ROWS


@inner_kernel
def row_bytes(matrix: Any) -> int:
    """Return the bytes of a row of a bfloat16 matrix, filled up."""
    return (matrix.shape[1] + TERMS - 1) // TERMS * TILE_BYTES


@inner_kernel
def block_at(matrix: Any, first: int, scratch: Any, place: int) -> int:
    """Return the address of 16 rows of a matrix, row_bytes apart.

    Rows that are missing or do not fill registers are copied to a place in scratch, with zeros after them.
    """
    n_rows, cols = matrix.shape
    if cols % TERMS == 0 and first + TILE_ROWS <= n_rows:
        return address_of_row(matrix, first)
    copy = as_bfloat16(scratch, SUM_ROWS + place * copy_rows(cols), row_bytes(matrix) // 2)
    for r in range(TILE_ROWS):
        for i in range(copy.shape[1]):
            copy[r, i] = matrix[first + r, i] if first + r < n_rows and i < cols else np.uint16(0)
    return address_of_row(copy, 0)


@intrinsic
def multiply_tiles(
    typing_context: Any, blocks: Any, distance: Any, parts: Any, panel: Any, tiles: Any, scratch: Any, ahead: Any,
    lines: Any,
) -> Any:  # fmt: skip
    """Multiply blocks of 16 rows of a bfloat16 matrix with a panel; write the sums to scratch.

    Args:
        typing_context: numba's.
        blocks: a tuple of the addresses of their first rows.
        distance: bytes from one row of a block to the next.
        parts: of SplitRows.
        panel: its number.
        tiles: a tuple: (0, 1, 2), the parts, if there are 16 lanes; (0,) if there is one lane, for all three parts.
        scratch: float32 (n, 16). A tile has 16 rows: of 16 lanes, or of 3 parts. A block's tiles follow each other.
        ahead: an address from which to fetch memory for later, meanwhile.
        lines: cache lines to fetch for 32 columns.
    """

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        x, target = (context.make_array(signature.args[at])(context, builder, args[at]) for at in (2, 5))
        _, n_pairs, _, lanes = cgutils.unpack_tuple(builder, x.shape)
        pair_bytes = builder.mul(lanes, i64(4 * PARTS))
        rows = [builder.inttoptr(address, I8.as_pointer()) for address in cgutils.unpack_tuple(builder, args[0])]
        x_data, out_data = (builder.bitcast(array.data, I8.as_pointer()) for array in (x, target))
        x_start = builder.gep(x_data, [builder.mul(builder.mul(args[3], n_pairs), pair_bytes)])
        # Registers: the sums first, then one for the parts, and the last one for a block.
        n_sums, block = len(rows) * tiles.count, N_REGISTERS - 1
        for number in range(n_sums):
            tile_call(builder, "tilezero", number)
        with cgutils.for_range(builder, builder.udiv(n_pairs, i64(PAIRS)), intp=I64) as loop:
            offset = builder.mul(loop.index, i64(TILE_BYTES))
            x_offset = builder.mul(builder.mul(loop.index, i64(PAIRS)), pair_bytes)
            with cgutils.for_range(builder, args[7], intp=I64) as line:
                number = builder.add(builder.mul(loop.index, args[7]), line.index)
                place = builder.add(args[6], builder.mul(number, i64(TILE_BYTES)))
                llvm.prefetch(builder, builder.inttoptr(place, I8.as_pointer()))
            for i, row in enumerate(rows):
                tile_call(builder, "tileloadd64", block, builder.gep(row, [offset]), args[1])
                for j in range(tiles.count):
                    place = builder.gep(x_start, [builder.add(x_offset, i64(TILE_BYTES * j))])
                    tile_call(builder, "tileloadd64", n_sums, place, pair_bytes)
                    tile_call(builder, "tdpbf16ps", i * tiles.count + j, block, n_sums)
        out_bytes = i64(TILE_BYTES if tiles.count > 1 else 4 * PARTS)
        for number in range(n_sums):
            place = builder.gep(out_data, [builder.mul(out_bytes, i64(number * TILE_ROWS))])
            tile_call(builder, "tilestored64", number, place, out_bytes)
        return context.get_dummy_value()

    return types.none(blocks, types.intp, parts, types.intp, tiles, scratch, types.intp, types.intp), build


@inner_kernel
def add_columns(scratch: Any, out: Any, row: int, distance: int, n: int) -> None:
    """Add the three sums of each of n rows of a tile; write them to out[0, row + distance * i]."""
    sums = scratch.reshape(scratch.size)
    for i in range(n):
        out[0, row + distance * i] = (sums[PARTS * i] + sums[PARTS * i + 1]) + sums[PARTS * i + 2]


@intrinsic
def add_tiles(typing_context: Any, scratch: Any, block: Any) -> Any:
    """Add the three tiles of a block, transpose the result, and write it to the place of the first."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        table = Table(context, builder, scratch, args[0])
        first = builder.mul(args[1], i64(PARTS * TILE_ROWS))
        square = []
        for row in range(TILE_ROWS):
            places = [table.row(builder.add(first, i64(part * TILE_ROWS + row))) for part in range(PARTS)]
            high, middle, low = (llvm.load_vector(builder, place, F32, LANES) for place in places)
            square.append(builder.fadd(builder.fadd(high, middle), low))
        for row, vector in enumerate(llvm.transpose(builder, square)):
            place = builder.bitcast(table.row(builder.add(first, i64(row))), vector.type.as_pointer())
            builder.store(vector, place, align=4)
        return context.get_dummy_value()

    return types.none(scratch, types.intp), build


@intrinsic
def store_row(typing_context: Any, scratch: Any, row: Any, out: Any, t: Any, column: Any) -> Any:
    """Copy a row of scratch, float32 (n, 16), to out[t, column:], or as much of it as out (T, rows) has room for."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        source, target = Table(context, builder, scratch, args[0]), Table(context, builder, out, args[2])
        vector = llvm.load_vector(builder, source.row(args[1]), F32, LANES)
        place = builder.gep(target.row(args[3]), [args[4]])
        llvm.store_lanes(builder, vector, place, builder.sub(target.width, args[4]))
        return context.get_dummy_value()

    return types.none(scratch, types.intp, out, types.intp, types.intp), build


@intrinsic
def as_bfloat16(typing_context: Any, scratch: Any, first: Any, width: Any) -> Any:
    """Return memory of scratch, float32 (n, 16), from a row on, as 16 rows of bfloat16 (16, width)."""
    result = types.Array(types.uint16, 2, "C")

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        place = builder.bitcast(Table(context, builder, scratch, args[0]).row(args[1]), I16.as_pointer())
        return contiguous_at(context, builder, result, place, (i64(TILE_ROWS), args[2]), 2)

    return result(scratch, types.intp, types.intp), build


@intrinsic
def as_parts(typing_context: Any, scratch: Any, first: Any, n_pairs: Any) -> Any:
    """Return memory of scratch, float32 (n, 16), from a row on, as the parts of one vector (1, pairs, 3, 1)."""
    result = types.Array(types.uint32, 4, "C")

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        place = builder.bitcast(Table(context, builder, scratch, args[0]).row(args[1]), I32.as_pointer())
        return contiguous_at(context, builder, result, place, (i64(1), args[2], i64(PARTS), i64(1)), 4)

    return result(scratch, types.intp, types.intp), build
