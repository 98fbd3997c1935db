"""The vector instructions under the kernels, as functions that numba code can call.

A loop over int8 does not vectorise in numba, which widens every product to 64 bits. So the products of quantized
matrices are built here as LLVM vector code. Which instructions it becomes is chosen when a kernel is compiled;
LLAMALET_SIMD=NAME forces one path:

    avx512vnni   vpdpbusd, 64 bytes at a time
    avxvnni      vpdpbusd, 32 bytes at a time
    portable     widen, multiply, add: any processor (pmaddwd on x86)

vpdpbusd multiplies 4 unsigned bytes by 4 signed ones and adds the products to a lane. So a matrix is stored with 16
rows side by side, a lane each, as unsigned weights w + zero (quantize.Packed): a register of weights is multiplied by 4
neighbours of the vector, repeated in every lane, and nothing is ever summed across lanes. What the sums are too much
by, zero * sum(x), depends on the vector alone, so it is computed once for all rows; they start from minus that.

Groups, chunks and scales are numpy records (`group_dtype`, ...), so that numba knows their sizes when it compiles.
"""

import itertools
import math
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from llamalet.errors import ConfigError

PATH_VARIABLE = "LLAMALET_SIMD"
PATHS = ("avx512vnni", "avxvnni", "portable")

# Elements of a float32 row multiplied at a time; LLVM takes as many registers as the processor needs for them.
FLOAT_LANES = 16

# A packed matrix has blocks of so many rows, in chunks of so many columns.
BLOCK_ROWS, CHUNK_COLS = 16, 8
FLOAT_BYTES = 4
BYTES_OF_8_BITS = BLOCK_ROWS * CHUNK_COLS

# The first bits of ln 2: few enough that n * LN2_HIGH is exact for every exponent n.
LN2_HIGH = 0.693359375

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


def group_dtype(size: int) -> np.dtype[Any]:
    """Return the dtype of a group of `size` int8 values of a quantized vector, a multiple of CHUNK_COLS."""
    return np.dtype([("values", np.int8, (size,))])


def chunk_dtype(n_bytes: int) -> np.dtype[Any]:
    """Return the dtype of a chunk of a packed matrix: 128 bytes hold 8 bits a weight, 64 bytes 4."""
    return np.dtype([("values", np.uint8, (n_bytes,))])


def scales_dtype(scale: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of the scales of a group, one for each row of a block; uint16 are the bits of bfloat16."""
    return np.dtype([("values", scale, (BLOCK_ROWS,))])


def instruction_path() -> str:
    """Return the name of the best path for this processor, or the one that LLAMALET_SIMD names.

    Raises:
        ConfigError: if LLAMALET_SIMD names none, or one whose instructions the processor lacks.
    """
    paths = available_paths()
    forced = os.environ.get(PATH_VARIABLE) or paths[0]
    if forced not in paths:
        missing = "this processor does not have it" if forced in PATHS else "there is no such path"
        raise ConfigError(f"{PATH_VARIABLE}={forced}: {missing}; take one of {', '.join(paths)}")
    return forced


def available_paths() -> list[str]:
    """Return the paths whose instructions the processor has that numba compiles for, the best first."""
    target, host = numba.config.CPU_NAME, llvmlite.binding.get_host_cpu_name()
    features = llvmlite.binding.get_host_cpu_features()
    if numba.config.CPU_FEATURES is not None:
        features = dict.fromkeys(re.findall(r"\+([\w.-]+)", numba.config.CPU_FEATURES), True)
    elif target not in (None, host):
        features = {}
    wide = features.get("avx512vnni") and features.get("avx512vl")
    has = {"avx512vnni": wide, "avxvnni": wide or features.get("avxvnni"), "portable": True}
    return [path for path in PATHS if has[path]]


@intrinsic
def dot_rows(typing_context: Any, matrix: Any, rows: Any, operand: Any, vectors: Any) -> Any:
    """Return the dot products of rows of a matrix with vectors: a tuple of float32, those of the first row first.

    Several at a time because what is loaded of a row serves all vectors, and the other way round. Each is summed in the
    same order whatever it is computed together with. Indices are not checked.

    Args:
        typing_context: numba's.
        matrix: float32 (rows, cols), or uint16, the bits of bfloat16.
        rows: a tuple of row numbers.
        operand: float32 (T, cols).
        vectors: a tuple of numbers below T.
    """
    result = types.UniTuple(types.float32, rows.count * vectors.count)

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        table, x_table = (_Table(context, builder, *typed) for typed in ((matrix, args[0]), (operand, args[2])))
        w_rows = [table.row(row) for row in cgutils.unpack_tuple(builder, args[1])]
        x_rows = [x_table.row(vector) for vector in cgutils.unpack_tuple(builder, args[3])]
        return context.make_tuple(builder, result, _dots(builder, w_rows, x_rows, table.width))

    return result(matrix, rows, operand, vectors), build


def _dots(builder: ir.IRBuilder, w_rows: Any, x_rows: Any, width: Any) -> list[Any]:
    """Return the dot products of rows with vectors, `width` elements each."""
    lanes = _index(FLOAT_LANES)
    n_whole = builder.mul(builder.udiv(width, lanes), lanes)
    totals = _totals(builder, [_splat_constant(F32, 0.0, FLOAT_LANES)] * (len(w_rows) * len(x_rows)))
    with cgutils.for_range_slice(builder, _index(0), n_whole, lanes, I64) as (col, _):
        x, w = (
            [_load_floats(builder, builder.gep(row, [col]), FLOAT_LANES) for row in rows] for rows in (x_rows, w_rows)
        )
        _add_products(builder, totals, w, x)
    totals = _totals(builder, [_sum_lanes(builder, builder.load(total)) for total in totals])
    with cgutils.for_range_slice(builder, n_whole, width, _index(1), I64) as (col, _):
        x, w = ([_load_float(builder, builder.gep(row, [col])) for row in rows] for rows in (x_rows, w_rows))
        # LLVM may fuse single multiplications and additions or not, whatever lies around them: here it must not.
        _add_products(builder, totals, w, x, fused=False)
    return [builder.load(total) for total in totals]


@intrinsic
def multiply_blocks(
    typing_context: Any, matrix: Any, blocks: Any, operand: Any, vectors: Any, out: Any, first_vector: Any
) -> Any:
    """Multiply blocks of rows of a packed matrix with quantized vectors.

    Within a group the products are summed exactly; the groups are added one after the other, whatever is computed
    together. Indices are not checked.

    Args:
        typing_context: numba's.
        matrix: a tuple of values, chunk_dtype (blocks, chunks), and scales, scales_dtype (blocks, groups).
        blocks: a tuple of block numbers.
        operand: a tuple of values, group_dtype, float32 scales and int32 starts, all (T, groups). The values after the
            last column are zeros. The starts are minus the group's sum times what makes the weights unsigned, 128 or 8.
        vectors: a tuple of numbers below T.
        out: float32 (n, rows); the last block may have fewer rows than BLOCK_ROWS.
        first_vector: the number of the vector whose products are out's first row.
    """

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        values, scales = _tables(context, builder, matrix, args[0])
        x_tables = _tables(context, builder, operand, args[2])
        numbers, vector_numbers = (cgutils.unpack_tuple(builder, args[place]) for place in (1, 3))
        w_rows = [(values.row(number), scales.row(number)) for number in numbers]
        x_rows = [[table.row(number) for table in x_tables] for number in vector_numbers]
        totals = _block_products(builder, w_rows, x_rows, values, x_tables[0].dtype.size)
        table = _Table(context, builder, out, args[4])
        for (number, vector), total in zip(itertools.product(numbers, vector_numbers), totals, strict=True):
            first = builder.mul(number, _index(BLOCK_ROWS))
            address = builder.gep(table.row(builder.sub(vector, args[5])), [first])
            _store_lanes(builder, builder.load(total), address, builder.sub(table.width, first))
        return context.get_dummy_value()

    return types.none(matrix, blocks, operand, vectors, out, types.intp), build


@intrinsic
def combine_lanes(
    typing_context: Any,
    matrix: Any,
    rows: Any,
    row_distance: Any,
    term_distance: Any,
    lanes: Any,
    n_terms: Any,
    out: Any,
    column: Any,
) -> Any:
    """Write to out[row, column:] the sum of m[row, k] * lanes[k] over k < n_terms, for each of `rows`.

    Each lane is a sum of its own: 16 queries look at a key, or 16 rows of a matrix at a vector, with one instruction.
    Sums run from the first term to the last, whatever is computed together. Indices are not checked.

    Args:
        typing_context: numba's.
        matrix: float32, contiguous; m[row, k] is element row * row_distance + k * term_distance of it.
        rows: a tuple of row numbers.
        row_distance: elements from one row to the next.
        term_distance: elements from one term to the next.
        lanes: float32 (n, 16).
        n_terms: how many terms.
        out: float32 (n, width); where less than 16 columns are left, the other lanes are dropped.
        column: the first of 16 columns of out.
    """

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        data = context.make_array(matrix)(context, builder, args[0]).data
        lane_table, out_table = (_Table(context, builder, *typed) for typed in ((lanes, args[4]), (out, args[6])))
        numbers = cgutils.unpack_tuple(builder, args[1])
        starts = [builder.gep(data, [builder.mul(number, args[2])]) for number in numbers]
        totals = _totals(builder, [_splat_constant(F32, 0.0, BLOCK_ROWS)] * len(numbers))
        with cgutils.for_range(builder, args[5], intp=I64) as loop:
            vector = _load(builder, lane_table.row(loop.index), F32, BLOCK_ROWS)
            place = builder.mul(loop.index, args[3])
            for total, start in zip(totals, starts, strict=True):
                weight = _splat(builder, builder.load(builder.gep(start, [place])), BLOCK_ROWS)
                _add_product(builder, total, weight, vector)
        room = builder.sub(out_table.width, args[7])
        for number, total in zip(numbers, totals, strict=True):
            address = builder.gep(out_table.row(number), [args[7]])
            _store_lanes(builder, builder.load(total), address, room)
        return context.get_dummy_value()

    return types.none(matrix, rows, types.intp, types.intp, lanes, types.intp, out, types.intp), build


@intrinsic
def rows_to_lanes(typing_context: Any, matrix: Any, first: Any, last: Any, out: Any) -> Any:
    """Write 16 rows of a matrix side by side: out[k, i] = matrix[min(first + i, last), k]. Indices are not checked.

    Args:
        typing_context: numba's.
        matrix: float32 (rows, cols), or uint16, the bits of bfloat16.
        first: the first row.
        last: the last row that there is; it fills the lanes for which there is none.
        out: float32 (cols or more, 16).
    """

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        table, out_table = (_Table(context, builder, *typed) for typed in ((matrix, args[0]), (out, args[3])))
        rows = []
        for lane in range(BLOCK_ROWS):
            number = builder.add(args[1], _index(lane))
            missing = builder.icmp_signed(">", number, args[2])
            rows.append(table.row(builder.select(missing, args[2], number)))
        step = _index(BLOCK_ROWS)
        n_whole = builder.mul(builder.udiv(table.width, step), step)

        def store(vector: Any, k: Any) -> None:
            _store_lanes(builder, vector, out_table.row(k), step)

        with cgutils.for_range_slice(builder, _index(0), n_whole, step, I64) as (k, _):
            block = [_load_floats(builder, builder.gep(row, [k]), BLOCK_ROWS) for row in rows]
            for place, vector in enumerate(_transposed(builder, block)):
                store(vector, builder.add(k, _index(place)))
        with cgutils.for_range_slice(builder, n_whole, table.width, _index(1), I64) as (k, _):
            vector = ir.Constant(ir.VectorType(F32, BLOCK_ROWS), ir.Undefined)
            for lane, row in enumerate(rows):
                value = _load_float(builder, builder.gep(row, [k]))
                vector = builder.insert_element(vector, value, ir.Constant(I32, lane))
            store(vector, k)
        return context.get_dummy_value()

    return types.none(matrix, types.intp, types.intp, out), build


def _transposed(builder: ir.IRBuilder, rows: Sequence[Any]) -> list[Any]:
    """Transpose a square of vectors: swap the corners of ever larger squares in it, 1, 2, 4 and 8 on a side."""
    size, block = len(rows), list(rows)
    side = 1
    while side < size:
        swapped = list(block)
        for row in range(size):
            if not row & side:
                upper, lower = block[row], block[row + side]
                # Of each pair of squares the upper row keeps the left one and gets the lower row's left one beside it.
                left = [column if not column & side else size + column - side for column in range(size)]
                right = [column + side if not column & side else size + column for column in range(size)]
                swapped[row] = _select(builder, upper, left, lower)
                swapped[row + side] = _select(builder, upper, right, lower)
        block, side = swapped, 2 * side
    return block


def _block_products(builder: ir.IRBuilder, w_rows: Any, x_rows: Any, values: "_Table", group_size: int) -> list[Any]:
    """Return variables with the products of blocks and vectors, those of the first block first."""
    n_bytes = values.dtype.size
    chunks_per_group = group_size // CHUNK_COLS
    totals = _totals(builder, [_splat_constant(F32, 0.0, BLOCK_ROWS)] * (len(w_rows) * len(x_rows)))

    def add_group(group: Any, add_chunks: Any) -> None:
        """Add the products of a group, whose chunks `add_chunks` adds to the sums."""
        x = [[builder.gep(pointer, [group]) for pointer in pointers] for pointers in x_rows]
        starts = [_splat(builder, builder.load(start), BLOCK_ROWS) for _, _, start in x]
        sums = _totals(builder, [_first_sums(builder, start) for _ in w_rows for start in starts])
        first_chunk = builder.mul(group, _index(chunks_per_group))
        add_chunks(
            sums,
            [builder.gep(chunks, [first_chunk]) for chunks, _ in w_rows],
            [builder.bitcast(x_values, I8.as_pointer()) for x_values, _, _ in x],
        )
        x_scales = [_splat(builder, builder.load(scale), BLOCK_ROWS) for _, scale, _ in x]
        w_scales = [_load_scales(builder, builder.gep(scales, [group])) for _, scales in w_rows]
        for total, group_sums, (w_scale, x_scale) in zip(
            totals, sums, itertools.product(w_scales, x_scales), strict=True
        ):
            product = builder.sitofp(_last_sums(builder, builder.load(group_sums)), x_scale.type)
            _add_product(builder, total, builder.fmul(product, x_scale), w_scale)

    def add_chunk(sums: Any, chunks: Any, x_values: Any, index: Any) -> None:
        """Add the products of chunk number `index` of a group."""
        halves = [_chunk_halves(builder, builder.gep(chunk, [index]), n_bytes) for chunk in chunks]
        for half in range(2):
            place = builder.add(builder.mul(index, _index(CHUNK_COLS)), _index(4 * half))
            quads = [
                builder.load(builder.bitcast(builder.gep(x, [place]), I32.as_pointer()), align=1) for x in x_values
            ]
            quads = [_splat(builder, quad, BLOCK_ROWS) for quad in quads]
            for total, (w, x) in zip(sums, itertools.product([pair[half] for pair in halves], quads), strict=True):
                builder.store(_add_quads(builder, builder.load(total), w, x), total)

    def add_whole(sums: Any, chunks: Any, x_values: Any) -> None:
        for index in range(chunks_per_group):
            add_chunk(sums, chunks, x_values, _index(index))

    n_whole = builder.udiv(values.width, _index(chunks_per_group))
    rest = builder.urem(values.width, _index(chunks_per_group))

    def add_rest(sums: Any, chunks: Any, x_values: Any) -> None:
        with cgutils.for_range(builder, rest, intp=I64) as loop:
            add_chunk(sums, chunks, x_values, loop.index)

    with cgutils.for_range(builder, n_whole, intp=I64) as loop:
        add_group(loop.index, add_whole)
    with builder.if_then(builder.icmp_unsigned("!=", rest, _index(0))):
        add_group(n_whole, add_rest)
    return totals


def _chunk_halves(builder: ir.IRBuilder, chunk: Any, n_bytes: int) -> list[Any]:
    """Return the unsigned weights of the first and the last 4 columns of a chunk: 64 bytes each, 4 for each row."""
    half = BYTES_OF_8_BITS // 2
    chunk = builder.bitcast(chunk, I8.as_pointer())
    if n_bytes == BYTES_OF_8_BITS:
        return [_load(builder, builder.gep(chunk, [_index(place)]), I8, half) for place in (0, half)]
    both = _load(builder, chunk, I8, half)
    return [
        builder.and_(both, _splat_constant(I8, 0x0F, half)),
        builder.lshr(both, _splat_constant(I8, 4, half)),
    ]


def _load_scales(builder: ir.IRBuilder, scales: Any) -> Any:
    """Return the scales of a group, a float32 for each row of a block."""
    is_float = scales.type.pointee.count == 4 * BLOCK_ROWS
    pointer = builder.bitcast(scales, (F32 if is_float else I16).as_pointer())
    return _load_floats(builder, pointer, BLOCK_ROWS)


def _first_sums(builder: ir.IRBuilder, start: Any) -> Any:
    """Return what the sums of a group start from; each lane of `start` is the start of a row."""
    if instruction_path() != "portable":
        return start
    # The portable path has two sums for each row, side by side.
    zeros = _splat_constant(I32, 0, BLOCK_ROWS)
    return _select(builder, start, [place // 2 + BLOCK_ROWS * (place % 2) for place in range(2 * BLOCK_ROWS)], zeros)


def _add_quads(builder: ir.IRBuilder, sums: Any, w: Any, quads: Any) -> Any:
    """Add the products of unsigned and signed bytes, 4 of each lane, to the sums."""
    path = instruction_path()
    if path == "portable":
        products = builder.mul(
            builder.zext(w, ir.VectorType(I32, w.type.count)),
            builder.sext(builder.bitcast(quads, w.type), ir.VectorType(I32, w.type.count)),
        )
        # LLVM knows the sum of neighbouring products as one instruction on many processors.
        even, odd = (_select(builder, products, range(place, w.type.count, 2)) for place in range(2))
        return builder.add(sums, builder.add(even, odd))
    w = builder.bitcast(w, quads.type)
    lanes = BLOCK_ROWS if path == "avx512vnni" else BLOCK_ROWS // 2
    parts = []
    for first in range(0, BLOCK_ROWS, lanes):
        operands = [_select(builder, vector, range(first, first + lanes)) for vector in (sums, w, quads)]
        name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
        parts.append(_call(builder, name, operands[0].type, operands))
    return parts[0] if len(parts) == 1 else _select(builder, parts[0], range(BLOCK_ROWS), parts[1])


def _last_sums(builder: ir.IRBuilder, sums: Any) -> Any:
    """Return the sum of each row."""
    if instruction_path() != "portable":
        return sums
    even, odd = (_select(builder, sums, range(place, 2 * BLOCK_ROWS, 2)) for place in range(2))
    return builder.add(even, odd)


def _store_lanes(builder: ir.IRBuilder, vector: Any, address: Any, room: Any) -> None:
    """Store a vector of float32, or only its first `room` lanes if there is no more room."""
    lanes = vector.type.count
    pointer = builder.bitcast(address, vector.type.as_pointer())
    with builder.if_else(builder.icmp_signed(">=", room, _index(lanes))) as (whole, part):
        with whole:
            builder.store(vector, pointer, align=1)
        with part:
            numbers = ir.Constant(ir.VectorType(I64, lanes), [_index(lane) for lane in range(lanes)])
            mask = builder.icmp_signed("<", numbers, _splat(builder, room, lanes))
            alignment = ir.Constant(I32, 1)
            name = f"llvm.masked.store.v{lanes}f32.p0"
            _call(builder, name, ir.VoidType(), (vector, pointer, alignment, mask))


def _totals(builder: ir.IRBuilder, values: Iterable[Any]) -> list[Any]:
    """Return variables that start from these values."""
    return [cgutils.alloca_once_value(builder, value) for value in values]


def _add_products(
    builder: ir.IRBuilder, totals: Any, w: Iterable[Any], x: Sequence[Any], *, fused: bool = True
) -> None:
    """Add the product of each of w and each of x to its total."""
    for total, (left, right) in zip(totals, itertools.product(w, x), strict=True):
        _add_product(builder, total, left, right, fused=fused)


def _add_product(builder: ir.IRBuilder, total: Any, left: Any, right: Any, *, fused: bool = True) -> None:
    """Add left * right to a variable, as one instruction where there is one and `fused` allows it."""
    flags = ("contract",) if fused else ()
    product = builder.fmul(left, right, flags=flags)
    builder.store(builder.fadd(builder.load(total), product, flags=flags), total)


class _Table:
    """The address, the width and the element type of a contiguous array (n, width)."""

    def __init__(self, context: Any, builder: ir.IRBuilder, array_type: Any, value: Any) -> None:
        array = context.make_array(array_type)(context, builder, value)
        self._builder, self._data = builder, array.data
        self.dtype = array_type.dtype
        _, self.width = cgutils.unpack_tuple(builder, array.shape)

    def row(self, index: Any) -> Any:
        """Return the address of the first element of a row."""
        return self._builder.gep(self._data, [self._builder.mul(index, self.width)])


def _tables(context: Any, builder: ir.IRBuilder, tuple_type: Any, value: Any) -> list[_Table]:
    """Return the arrays of a tuple."""
    parts = zip(tuple_type.types, cgutils.unpack_tuple(builder, value), strict=True)
    return [_Table(context, builder, *part) for part in parts if isinstance(part[0], types.Array)]


@intrinsic
def magnitude_bits(typing_context: Any, x: Any) -> Any:
    """Return the bits of |x| as an integer: in the order of the magnitudes, infinity above all numbers, NaN above it.

    The largest of some floats is a vector instruction for integers, which need no care for NaN.
    """

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.and_(builder.bitcast(args[0], I32), ir.Constant(I32, 0x7FFFFFFF))

    return types.int32(types.float32), build


@intrinsic
def float_of_bits(typing_context: Any, bits: Any) -> Any:
    """Return the float32 that has these bits."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], F32)

    return types.float32(types.int32), build


@intrinsic
def exp(typing_context: Any, x: Any) -> Any:
    """Return e ** x in float32, within two units in the last place; 0 or infinity outside 2 ** -126 to 2 ** 127.

    The C library's takes one number at a time, and one call each; loops with this one become vector code.
    Source: x = n ln 2 + r with a whole n and |r| <= ln 2 / 2; 2 ** n is an exponent's bits, e ** r a polynomial (the
    Taylor series to degree 7, whose next term is below 2 ** -27 there).
    """

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return _exp(builder, args[0])

    return types.float32(types.float32), build


def _exp(builder: ir.IRBuilder, x: Any) -> Any:
    """Return e ** x of a float32 or of each lane of a vector."""
    lanes = getattr(x.type, "count", None)
    suffix = "" if lanes is None else f"v{lanes}"
    integer = I32 if lanes is None else ir.VectorType(I32, lanes)

    def constant(value: float, element: Any = F32) -> Any:
        value = float(np.float32(value)) if element is F32 else value
        return ir.Constant(element, value) if lanes is None else _splat_constant(element, value, lanes)

    def fma(a: Any, b: Any, c: Any) -> Any:
        return _call(builder, f"llvm.fma.{suffix}f32", x.type, (a, b, c))

    n = _call(builder, f"llvm.rint.{suffix}f32", x.type, (builder.fmul(x, constant(1 / math.log(2))),))
    # ln 2 in two parts: n times the first is exact, so that the difference loses nothing.
    r = fma(n, constant(-LN2_HIGH), x)
    r = fma(n, constant(-(math.log(2) - LN2_HIGH)), r)
    power = constant(1 / math.factorial(7))
    for degree in range(6, -1, -1):
        power = fma(power, r, constant(1 / math.factorial(degree)))
    # What has an exponent; a NaN becomes any of these, and stays in the power.
    exponent = _call(builder, f"llvm.minnum.{suffix}f32", x.type, (n, constant(127)))
    exponent = _call(builder, f"llvm.maxnum.{suffix}f32", x.type, (exponent, constant(-126)))
    bits = builder.shl(builder.add(builder.fptosi(exponent, integer), constant(127, I32)), constant(23, I32))
    result = builder.fmul(power, builder.bitcast(bits, x.type))
    result = builder.select(builder.fcmp_ordered("<", n, constant(-126)), constant(0), result)
    return builder.select(builder.fcmp_ordered(">", n, constant(127)), constant(math.inf), result)


@intrinsic
def softmax_lanes(typing_context: Any, x: Any, length: Any, scale: Any) -> Any:
    """Turn each lane of scores x[:length] (n, 16), times a positive scale, into weights that sum to one; unchecked."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        table = _Table(context, builder, x, args[0])
        scale = _splat(builder, args[2], BLOCK_ROWS)
        vector = ir.VectorType(F32, BLOCK_ROWS)
        starts = [_splat_constant(F32, value, BLOCK_ROWS) for value in (-math.inf, 0.0)]
        largest, total = _totals(builder, starts)

        def row(index: Any) -> Any:
            return builder.bitcast(table.row(index), vector.as_pointer())

        with cgutils.for_range(builder, args[1], intp=I64) as loop:
            score = builder.load(row(loop.index), align=4)
            larger = builder.fcmp_ordered(">", score, builder.load(largest))
            builder.store(builder.select(larger, score, builder.load(largest)), largest)
        with cgutils.for_range(builder, args[1], intp=I64) as loop:
            score = builder.fsub(builder.load(row(loop.index), align=4), builder.load(largest))
            power = _exp(builder, builder.fmul(score, scale))
            builder.store(power, row(loop.index), align=4)
            builder.store(builder.fadd(builder.load(total), power), total)
        factor = builder.fdiv(_splat_constant(F32, 1.0, BLOCK_ROWS), builder.load(total))
        with cgutils.for_range(builder, args[1], intp=I64) as loop:
            weight = builder.fmul(builder.load(row(loop.index), align=4), factor)
            builder.store(weight, row(loop.index), align=4)
        return context.get_dummy_value()

    return types.none(x, types.intp, types.float32), build


@intrinsic
def floats_at(typing_context: Any, address: Any, rows: Any, cols: Any) -> Any:
    """Return the float32 array (rows, cols) that lies at an address; the caller sees to it that it stays there."""
    result = types.Array(types.float32, 2, "C")

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        address, rows, cols = args
        row_bytes = builder.mul(cols, _index(FLOAT_BYTES))
        array = context.make_array(result)(context, builder)
        context.populate_array(
            array,
            data=builder.inttoptr(address, F32.as_pointer()),
            shape=(rows, cols),
            strides=(row_bytes, _index(FLOAT_BYTES)),
            itemsize=_index(FLOAT_BYTES),
            meminfo=None,
        )
        return array._getvalue()

    return result(types.intp, types.intp, types.intp), build


class Stack(NamedTuple):
    """The layers of a matrix, equally far apart in memory.

    first: the first layer, a contiguous array.
    distance: bytes from one layer to the next.
    """

    first: Any
    distance: int


@intrinsic
def layer_of(typing_context: Any, layers: Any, index: Any) -> Any:
    """Return one layer of a Stack, of each Stack of a named tuple, or of an array (L, ...), contiguous and unchecked.

    What indexing an array returns in numba is reference counted, this is not.
    """
    result = _layer_type(layers)

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return _layer_of(context, builder, layers, *args)

    return result(layers, types.intp), build


def _is_stack(layers: Any) -> bool:
    """Return whether a numba type is that of a Stack."""
    return isinstance(layers, types.BaseNamedTuple) and layers.instance_class is Stack


def _layer_type(layers: Any) -> Any:
    """Return numba's type of one layer."""
    if _is_stack(layers):
        return layers[0]
    if isinstance(layers, types.BaseNamedTuple):
        return types.NamedTuple([_layer_type(part) for part in layers], layers.instance_class)
    return types.Array(layers.dtype, layers.ndim - 1, "C", readonly=not layers.mutable)


def _layer_of(context: Any, builder: ir.IRBuilder, layers: Any, value: Any, index: Any) -> Any:
    """Return one layer of a value of numba's type `layers`."""
    result = _layer_type(layers)
    if isinstance(layers, types.BaseNamedTuple) and not _is_stack(layers):
        parts = zip(layers, cgutils.unpack_tuple(builder, value), strict=True)
        return context.make_tuple(builder, result, [_layer_of(context, builder, *part, index) for part in parts])
    if _is_stack(layers):
        first, distance = cgutils.unpack_tuple(builder, value)
        array = context.make_array(result)(context, builder, first)
        strides, shape = (cgutils.unpack_tuple(builder, x) for x in (array.strides, array.shape))
    else:
        array = context.make_array(layers)(context, builder, value)
        (distance, *strides), (_, *shape) = (cgutils.unpack_tuple(builder, x) for x in (array.strides, array.shape))
    data = builder.gep(builder.bitcast(array.data, I8.as_pointer()), [builder.mul(index, distance)])
    data = builder.bitcast(data, array.data.type)
    layer = context.make_array(result)(context, builder)
    context.populate_array(layer, data=data, shape=shape, strides=strides, itemsize=array.itemsize, meminfo=None)
    return layer._getvalue()


def _sum_lanes(builder: ir.IRBuilder, vector: Any) -> Any:
    """Return the sum of the lanes of a float32 vector."""
    name = f"llvm.vector.reduce.fadd.v{vector.type.count}f32"
    return _call(builder, name, F32, (ir.Constant(F32, -0.0), vector), fastmath=("reassoc",))


def _load(builder: ir.IRBuilder, pointer: Any, element: Any, count: int) -> Any:
    """Load `count` elements from an address of any alignment."""
    return builder.load(builder.bitcast(pointer, ir.VectorType(element, count).as_pointer()), align=1)


def _load_floats(builder: ir.IRBuilder, pointer: Any, count: int) -> Any:
    """Load `count` float32, or as many bfloat16 and make them float32: theirs are the upper 16 of its bits."""
    if pointer.type.pointee == F32:
        return _load(builder, pointer, F32, count)
    bits = builder.zext(_load(builder, pointer, I16, count), ir.VectorType(I32, count))
    return builder.bitcast(builder.shl(bits, _splat_constant(I32, 16, count)), ir.VectorType(F32, count))


def _load_float(builder: ir.IRBuilder, pointer: Any) -> Any:
    """Load a float32, or a bfloat16 as one."""
    return builder.extract_element(_load_floats(builder, pointer, 1), ir.Constant(I32, 0))


def _index(value: int) -> Any:
    """Return a number as LLVM's constant."""
    return ir.Constant(I64, value)


def _select(builder: ir.IRBuilder, vector: Any, elements: Sequence[int], second: Any = None) -> Any:
    """Return the elements at these places of `vector`, or of `vector` and `second` one after the other."""
    mask = ir.Constant(ir.VectorType(I32, len(elements)), [ir.Constant(I32, place) for place in elements])
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined) if second is None else second, mask)


def _splat(builder: ir.IRBuilder, value: Any, count: int) -> Any:
    """Return `count` copies of a value."""
    undefined = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    return _select(builder, builder.insert_element(undefined, value, ir.Constant(I32, 0)), [0] * count)


def _splat_constant(element: Any, value: float, count: int) -> Any:
    """Return `count` copies of a constant."""
    return ir.Constant(ir.VectorType(element, count), [ir.Constant(element, value)] * count)


def _call(builder: ir.IRBuilder, name: str, result: Any, args: Any, fastmath: tuple[str, ...] = ()) -> Any:
    """Call an LLVM function by its name."""
    signature = ir.FunctionType(result, [arg.type for arg in args])
    function = cgutils.get_or_insert_function(builder.module, signature, name)
    return builder.call(function, args, fastmath=fastmath)
