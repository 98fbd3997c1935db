"""The vector instructions of the kernels, as functions that numba code can call.

Numba widens every product of a loop over int8 to 64 bits and so never vectorizes it. The products of quantized
matrices are therefore built here as LLVM vector code. The instruction path is chosen when a kernel is compiled;
LLAMALET_SIMD=NAME forces one:

    avx512vnni   vpdpbusd, 64 bytes at a time
    avxvnni      vpdpbusd, 32 bytes at a time
    neoni8mm     usdot, 16 bytes at a time
    neondot      sdot, 16 bytes at a time
    neon         smull and sadalp: any 64-bit Arm processor
    avx2         vpmaddubsw and vpmaddwd, 32 bytes at a time
    portable     widen, multiply, add: any processor (pmaddwd on x86)

All of them give the same bits; byte_products.py has what differs.

vpdpbusd multiplies 4 unsigned bytes by 4 signed ones and adds the products to a lane. So a packed matrix
(quantize.Packed) stores 16 rows side by side, one a lane, as unsigned weights w + zero_point. A register of weights is
multiplied by 4 neighbouring activations, repeated in every lane, and nothing is ever summed across lanes. The zero
point adds zero_point * sum(x) to every row; this depends on the vector alone, so it is computed once for all rows, and
sums start at minus that.

The intrinsics do not check indices. Each sums in one fixed order, whatever else is computed in the same call.
"""

import functools
import itertools
import math
import os
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from llamalet.errors import ConfigError
from llamalet.kernels import llvm, processor
from llamalet.kernels.byte_products import PATHS
from llamalet.kernels.llvm import F32, I8, I16, I32, I64, Table, i64
from llamalet.model_file.quantize import CHUNK_COLS, ROW_BLOCK

PATH_VARIABLE = "LLAMALET_SIMD"

# Elements of a float32 row multiplied at a time; LLVM uses as many registers as the processor needs for them.
FLOAT_LANES = 16

# The bytes of a packed matrix's chunk at 8 bits a weight; at 4 bits it has half of them.
Q8_CHUNK_BYTES = ROW_BLOCK * CHUNK_COLS

# The first bits of ln 2: few enough that n * LN2_HIGH is exact for every exponent n.
LN2_HIGH = 0.693359375


def instruction_path() -> str:
    """Return the name of the best path for this processor, or the one that LLAMALET_SIMD names.

    Raises:
        ConfigError: if LLAMALET_SIMD names no path, or one whose instructions the processor lacks.
    """
    paths = available_paths()
    forced = os.environ.get(PATH_VARIABLE) or paths[0]
    if forced not in paths:
        missing = "this processor does not have it" if forced in PATHS else "there is no such path"
        raise ConfigError(f"{PATH_VARIABLE}={forced}: {missing}; take one of {', '.join(paths)}")
    return forced


def available_paths() -> list[str]:
    """Return the paths whose instructions numba compiles for and the processor has, the best first."""
    features, on_arm = processor.features(), processor.is_arm()
    wide = {"avx512vnni", "avx512vl"} <= features
    has = {
        "avx512vnni": wide,
        "avxvnni": wide or "avxvnni" in features,
        "neoni8mm": on_arm and "i8mm" in features,
        "neondot": on_arm and "dotprod" in features,
        "neon": on_arm,
        "avx2": not on_arm and "avx2" in features,
        "portable": True,
    }
    return [path for path in PATHS if has[path]]


def tile_blocks() -> int:
    """Return how many blocks of a packed matrix meet 4 vectors at once: as many as the registers hold sums."""
    return PATHS[instruction_path()].tile_blocks


def float_tile() -> tuple[int, int]:
    """Return how many rows of a matrix of floats meet how many vectors at once.

    Their products are sums of 16 lanes each. AVX-512 has registers for all of them, others for fewer.
    """
    if instruction_path() == "avx512vnni":
        return 4, 4
    return (2, 2) if processor.is_arm() else (2, 3)


# -- products of matrices of floats -----------------------------------------------------------------------------------


@intrinsic
def dot_rows(typing_context: Any, matrix: Any, rows: Any, x: Any, vectors: Any) -> Any:
    """Return the dot products of some rows with some vectors: a tuple of float32, those of the first row first.

    Computing several at a time saves memory traffic: each row is loaded once for all vectors, each vector once for all
    rows.

    Args:
        typing_context: numba's.
        matrix: float32 (rows, cols), or uint16, the bits of bfloat16.
        rows: a tuple of row numbers.
        x: float32 (T, cols).
        vectors: a tuple of row numbers of x.
    """
    result = types.UniTuple(types.float32, rows.count * vectors.count)

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        table, x_table = (Table(context, builder, *typed) for typed in ((matrix, args[0]), (x, args[2])))
        w_rows = [table.row(row) for row in cgutils.unpack_tuple(builder, args[1])]
        x_rows = [x_table.row(vector) for vector in cgutils.unpack_tuple(builder, args[3])]
        return context.make_tuple(builder, result, _dots(builder, w_rows, x_rows, table.width))

    return result(matrix, rows, x, vectors), build


def _dots(builder: ir.IRBuilder, w_rows: Any, x_rows: Any, width: Any) -> list[Any]:
    """Return the dot products of rows with vectors, `width` elements each."""
    lanes = i64(FLOAT_LANES)
    n_whole = builder.mul(builder.udiv(width, lanes), lanes)
    zeros = llvm.splat_constant(F32, 0.0, FLOAT_LANES)
    totals = llvm.variables(builder, [zeros] * (len(w_rows) * len(x_rows)))
    with cgutils.for_range_slice(builder, i64(0), n_whole, lanes, I64) as (col, _):
        addresses = ([builder.gep(row, [col]) for row in rows] for rows in (x_rows, w_rows))
        x, w = ([llvm.load_floats(builder, address, FLOAT_LANES) for address in group] for group in addresses)
        llvm.add_products(builder, totals, w, x)
    totals = llvm.variables(builder, llvm.sums_of_lanes(builder, [builder.load(total) for total in totals]))
    with cgutils.for_range_slice(builder, n_whole, width, i64(1), I64) as (col, _):
        x, w = ([llvm.load_float(builder, builder.gep(row, [col])) for row in rows] for rows in (x_rows, w_rows))
        # LLVM decides anew in each place whether to fuse scalar operations. The bits must not depend on that.
        llvm.add_products(builder, totals, w, x, fused=False)
    return [builder.load(total) for total in totals]


@intrinsic
def rows_to_lanes(
    typing_context: Any, matrix: Any, first: Any, last: Any, column: Any, n_columns: Any, out: Any
) -> Any:
    """Write 16 rows of a matrix side by side: out[k, i] = matrix[min(first + i, last), column + k] for k < n_columns.

    Args:
        typing_context: numba's.
        matrix: float32 (rows, cols), or uint16, the bits of bfloat16.
        first: the first row.
        last: the last row of the matrix; it also fills the lanes that have no row.
        column: the first column.
        n_columns: number of columns.
        out: float32 (n_columns or more, 16).
    """

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        table, out_table = (Table(context, builder, *typed) for typed in ((matrix, args[0]), (out, args[5])))
        rows = []
        for lane in range(ROW_BLOCK):
            number = builder.add(args[1], i64(lane))
            missing = builder.icmp_signed(">", number, args[2])
            row = table.row(builder.select(missing, args[2], number))
            rows.append(builder.gep(row, [args[3]]))
        step = i64(ROW_BLOCK)
        n_whole = builder.mul(builder.udiv(args[4], step), step)

        def store(vector: Any, k: Any) -> None:
            llvm.store_lanes(builder, vector, out_table.row(k), step)

        with cgutils.for_range_slice(builder, i64(0), n_whole, step, I64) as (k, _):
            square = [llvm.load_floats(builder, builder.gep(row, [k]), ROW_BLOCK) for row in rows]
            for column, vector in enumerate(llvm.transpose(builder, square)):
                store(vector, builder.add(k, i64(column)))
        with cgutils.for_range_slice(builder, n_whole, args[4], i64(1), I64) as (k, _):
            vector = ir.Constant(ir.VectorType(F32, ROW_BLOCK), ir.Undefined)
            for lane, row in enumerate(rows):
                value = llvm.load_float(builder, builder.gep(row, [k]))
                vector = builder.insert_element(vector, value, ir.Constant(I32, lane))
            store(vector, k)
        return context.get_dummy_value()

    return types.none(matrix, types.intp, types.intp, types.intp, types.intp, out), build


# -- products of packed matrices --------------------------------------------------------------------------------------


@intrinsic
def multiply_blocks(
    typing_context: Any, matrix: Any, blocks: Any, x: Any, vectors: Any, out: Any, first_vector: Any
) -> Any:
    """Multiply blocks of 16 rows of a packed matrix with quantized vectors.

    Within a group the products are summed exactly; the groups are added one after the other.

    Args:
        typing_context: numba's.
        matrix: a layers.PackedMatrix of arrays (blocks, chunks) and (blocks, groups).
        blocks: a tuple of block numbers.
        x: ops.QuantizedRows, all (T, groups). Values after the last column must be zeros.
        vectors: a tuple of row numbers of x.
        out: float32 (n, rows); the last block may have fewer than 16 rows.
        first_vector: the vector whose products go to out's first row.
    """

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        values, scales = llvm.tables(context, builder, matrix, args[0])
        x_tables = llvm.tables(context, builder, x, args[2])
        numbers, vector_numbers = (cgutils.unpack_tuple(builder, args[i]) for i in (1, 3))
        w_rows = [(values.row(number), scales.row(number)) for number in numbers]
        x_rows = [[table.row(number) for table in x_tables] for number in vector_numbers]
        totals = _block_products(builder, w_rows, x_rows, values, x_tables[0].dtype.size)
        out_table = Table(context, builder, out, args[4])
        for (number, vector), total in zip(itertools.product(numbers, vector_numbers), totals, strict=True):
            first = builder.mul(number, i64(ROW_BLOCK))
            address = builder.gep(out_table.row(builder.sub(vector, args[5])), [first])
            llvm.store_lanes(builder, builder.load(total), address, builder.sub(out_table.width, first))
        return context.get_dummy_value()

    return types.none(matrix, blocks, x, vectors, out, types.intp), build


def _block_products(builder: ir.IRBuilder, w_rows: Any, x_rows: Any, values: Table, group_size: int) -> list[Any]:
    """Return variables with the products of blocks and vectors, those of the first block first."""
    n_bytes, path = values.dtype.size, PATHS[instruction_path()]
    bits = 8 if n_bytes == Q8_CHUNK_BYTES else 4
    chunks_per_group = group_size // CHUNK_COLS
    zeros = llvm.splat_constant(F32, 0.0, ROW_BLOCK)
    totals = llvm.variables(builder, [zeros] * (len(w_rows) * len(x_rows)))

    def add_group(group: Any, add_chunks: Any) -> None:
        """Add the products of a group, whose chunks `add_chunks` adds to the integer sums."""
        x = [[builder.gep(pointer, [group]) for pointer in pointers] for pointers in x_rows]
        zero_offsets = [llvm.splat(builder, builder.load(zero_offset), ROW_BLOCK) for _, _, zero_offset in x]
        starts = [path.first_sums(builder, offset, bits) for offset in zero_offsets]
        sums = llvm.variables(builder, starts * len(w_rows))
        first_chunk = builder.mul(group, i64(chunks_per_group))
        w_chunks = [builder.gep(chunks, [first_chunk]) for chunks, _ in w_rows]
        add_chunks(sums, w_chunks, [builder.bitcast(x_values, I8.as_pointer()) for x_values, _, _ in x])
        x_scales = [llvm.splat(builder, builder.load(scale), ROW_BLOCK) for _, scale, _ in x]
        w_scales = [_load_scales(builder, builder.gep(scales, [group])) for _, scales in w_rows]
        scale_pairs = itertools.product(w_scales, x_scales)
        for total, group_sums, (w_scale, x_scale) in zip(totals, sums, scale_pairs, strict=True):
            product = builder.sitofp(path.last_sums(builder, builder.load(group_sums)), x_scale.type)
            llvm.add_product(builder, total, builder.fmul(product, x_scale), w_scale)

    def add_chunk(sums: Any, chunks: Any, x_values: Any, index: Any) -> None:
        """Add the products of chunk number `index` of a group."""
        halves = [_chunk_halves(builder, builder.gep(chunk, [index]), n_bytes) for chunk in chunks]
        w = [path.weights(builder, pair, bits) for pair in halves]
        offset = builder.mul(index, i64(CHUNK_COLS))
        for step in range(len(w[0])):
            x = [path.activations(builder, builder.gep(values, [offset]), step) for values in x_values]
            for total, (left, right) in zip(sums, itertools.product([steps[step] for steps in w], x), strict=True):
                builder.store(path.add(builder, builder.load(total), left, right), total)

    def add_whole(sums: Any, chunks: Any, x_values: Any) -> None:
        for index in range(chunks_per_group):
            add_chunk(sums, chunks, x_values, i64(index))

    def add_some(n_chunks: Any, sums: Any, chunks: Any, x_values: Any) -> None:
        with cgutils.for_range(builder, n_chunks, intp=I64) as loop:
            add_chunk(sums, chunks, x_values, loop.index)

    n_whole = builder.udiv(values.width, i64(chunks_per_group))
    rest = builder.urem(values.width, i64(chunks_per_group))
    has_rest = builder.icmp_unsigned("!=", rest, i64(0))
    if path.unrolls:
        with cgutils.for_range(builder, n_whole, intp=I64) as loop:
            add_group(loop.index, add_whole)
        with builder.if_then(has_rest):
            add_group(n_whole, functools.partial(add_some, rest))
    else:
        n_groups = builder.add(n_whole, builder.zext(has_rest, I64))
        with cgutils.for_range(builder, n_groups, intp=I64) as loop:
            n_chunks = builder.select(builder.icmp_unsigned("<", loop.index, n_whole), i64(chunks_per_group), rest)
            add_group(loop.index, functools.partial(add_some, n_chunks))
    return totals


def _chunk_halves(builder: ir.IRBuilder, chunk: Any, n_bytes: int) -> list[Any]:
    """Return the unsigned weights of columns 0-3 and 4-7 of a chunk: 64 bytes each, 4 for each row."""
    half = Q8_CHUNK_BYTES // 2
    chunk = builder.bitcast(chunk, I8.as_pointer())
    if n_bytes == Q8_CHUNK_BYTES:
        return [llvm.load_vector(builder, builder.gep(chunk, [i64(offset)]), I8, half) for offset in (0, half)]
    both = llvm.load_vector(builder, chunk, I8, half)
    low_bits, shift = (llvm.splat_constant(I8, value, half) for value in (0x0F, 4))
    return [builder.and_(both, low_bits), builder.lshr(both, shift)]


def _load_scales(builder: ir.IRBuilder, scales: Any) -> Any:
    """Return the scales of a group, a float32 for each row of a block."""
    is_float = scales.type.pointee.count == 4 * ROW_BLOCK
    pointer = builder.bitcast(scales, (F32 if is_float else I16).as_pointer())
    return llvm.load_floats(builder, pointer, ROW_BLOCK)


# -- single numbers and pairs ---------------------------------------------------------------------------------------


@intrinsic
def magnitude_bits(typing_context: Any, x: Any) -> Any:
    """Return the bits of |x| as an integer, which sorts as |x| does: infinity above all numbers, NaN above infinity.

    The largest of several such integers is one vector instruction, without the special cases for NaN.
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

    Loops with this function vectorize; a call of the C library's handles one number at a time.

    Source: x = n ln 2 + r with a whole n and |r| <= ln 2 / 2; 2 ** n is an exponent's bits, e ** r a polynomial (the
    Taylor series to degree 7, whose next term is below 2 ** -27 there).
    """

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return exp_vector(builder, args[0])

    return types.float32(types.float32), build


def exp_vector(builder: ir.IRBuilder, x: Any) -> Any:
    """Return e ** x of a float32 or of each lane of a vector."""
    power, n = exp_parts(builder, x)
    integer = I32 if x.type == F32 else ir.VectorType(I32, x.type.count)

    def constant(value: float, element: Any = F32) -> Any:
        return _constant(x.type, value, element)

    # Clamp n to valid exponents. A NaN may become any of them: `power` stays NaN.
    at_most = _float_call(builder, "minnum", n, constant(127))
    exponent = _float_call(builder, "maxnum", at_most, constant(-126))
    bits = builder.shl(builder.add(builder.fptosi(exponent, integer), constant(127, I32)), constant(23, I32))
    result = builder.fmul(power, builder.bitcast(bits, x.type))
    result = builder.select(builder.fcmp_ordered("<", n, constant(-126)), constant(0), result)
    return builder.select(builder.fcmp_ordered(">", n, constant(127)), constant(math.inf), result)


def exp_parts(builder: ir.IRBuilder, x: Any) -> tuple[Any, Any]:
    """Return two float32, or vectors of them: e ** x is the first times 2 to the second, which is whole."""
    n = _float_call(builder, "rint", builder.fmul(x, _constant(x.type, 1 / math.log(2))))
    # ln 2 in two parts: n times the first is exact, so the difference loses no bits.
    r = _float_call(builder, "fma", n, _constant(x.type, -LN2_HIGH), x)
    r = _float_call(builder, "fma", n, _constant(x.type, -(math.log(2) - LN2_HIGH)), r)
    power = _constant(x.type, 1 / math.factorial(7))
    for degree in range(6, -1, -1):
        power = _float_call(builder, "fma", power, r, _constant(x.type, 1 / math.factorial(degree)))
    return power, n


def _constant(kind: Any, value: float, element: Any = F32) -> Any:
    """Return a constant of the type float32, or of a vector of it; or of as many integers."""
    value = float(np.float32(value)) if element is F32 else value
    return ir.Constant(element, value) if kind == F32 else llvm.splat_constant(element, value, kind.count)


def _float_call(builder: ir.IRBuilder, name: str, *args: Any) -> Any:
    """Call an intrinsic of LLVM on float32, or vectors of it."""
    kind = args[0].type
    return llvm.call(builder, f"llvm.{name}.{'f32' if kind == F32 else f'v{kind.count}f32'}", kind, args)


@intrinsic
def largest(typing_context: Any, x: Any) -> Any:
    """Return the largest number of x (n,), float32 and contiguous; NaNs do not count.

    A loop over `max` does not vectorize, because the order matters to it if there are NaNs.
    """

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        array = context.make_array(x)(context, builder, args[0])
        (width,) = cgutils.unpack_tuple(builder, array.shape)
        n_whole = builder.mul(builder.udiv(width, i64(FLOAT_LANES)), i64(FLOAT_LANES))
        lowest = ir.Constant(F32, -math.inf)
        (lanes,) = llvm.variables(builder, [llvm.splat_constant(F32, -math.inf, FLOAT_LANES)])
        (found,) = llvm.variables(builder, [lowest])

        def keep_larger(variable: Any, value: Any) -> None:
            before = builder.load(variable)
            builder.store(builder.select(builder.fcmp_ordered(">", value, before), value, before), variable)

        with cgutils.for_range_slice(builder, i64(0), n_whole, i64(FLOAT_LANES), I64) as (i, _):
            keep_larger(lanes, llvm.load_vector(builder, builder.gep(array.data, [i]), F32, FLOAT_LANES))
        with cgutils.for_range_slice(builder, n_whole, width, i64(1), I64) as (i, _):
            keep_larger(found, builder.load(builder.gep(array.data, [i])))
        for lane in range(FLOAT_LANES):
            keep_larger(found, builder.extract_element(builder.load(lanes), ir.Constant(I32, lane)))
        return builder.load(found)

    return types.float32(x), build


@intrinsic
def rotate_eights(typing_context: Any, x: Any, start: Any, cos: Any, sin: Any) -> Any:
    """Turn pairs of neighbours of x from element `start` on in place by the angles (n,); the last n % 8 stay.

    Every product is rounded, as in scalar code without fused operations.
    """

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        arrays = [context.make_array(kind)(context, builder, args[i]) for i, kind in ((0, x), (2, cos), (3, sin))]
        (n,) = cgutils.unpack_tuple(builder, arrays[1].shape)
        first = builder.gep(arrays[0].data, [args[1]])
        signs = ir.Constant(ir.VectorType(F32, 16), [ir.Constant(F32, float(sign)) for sign in 8 * (-1, 1)])
        with cgutils.for_range_slice(builder, i64(0), builder.and_(n, i64(-8)), i64(8), I64) as (i, _):
            place = builder.gep(first, [builder.mul(i, i64(2))])
            pairs = llvm.load_vector(builder, place, F32, 16)
            twice = [lane // 2 for lane in range(16)]
            c, s = (
                llvm.shuffle(builder, llvm.load_vector(builder, builder.gep(array.data, [i]), F32, 8), twice)
                for array in arrays[1:]
            )
            swapped = llvm.shuffle(builder, pairs, [lane ^ 1 for lane in range(16)])
            turned = builder.fadd(builder.fmul(pairs, c), builder.fmul(swapped, builder.fmul(s, signs)))
            builder.store(turned, builder.bitcast(place, turned.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(x, types.intp, cos, sin), build
