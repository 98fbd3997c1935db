"""The vector instructions under the kernels, as functions that numba code can call.

A loop over int8 does not vectorise in numba, which widens every product to 64 bits. So the dot product of quantized
rows is built here as LLVM vector code. Which instructions it becomes is chosen when a kernel is compiled;
LLAMALET_SIMD=NAME forces one path:

    avx512vnni   vpdpbusd, 64 bytes at a time
    avxvnni      vpdpbusd, 32 bytes at a time
    portable     widen, multiply, add: any processor

vpdpbusd multiplies unsigned by signed bytes. The weights become unsigned by flipping their top bit, which adds 128 to
each: dot(w + 128, x) = dot(w, x) + 128 * sum(x). What this is too much depends on the vector alone, so it is computed
once for all rows, and is what the sums start from (`starts`).

A group is a numpy record of dtype `group_dtype(size)`: so numba knows its size when it compiles.
"""

import itertools
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import llvmlite.binding
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

# The first bits of ln 2: few enough that n * LN2_HIGH is exact for every exponent n.
LN2_HIGH = 0.693359375

I8, I32, I64, F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()


def group_dtype(size: int) -> np.dtype[Any]:
    """Return the dtype of a group of `size` int8 values, a multiple of 4."""
    return np.dtype([("values", np.int8, (size,))])


def starts_dtype(size: int) -> np.dtype[Any]:
    """Return the dtype of what the sums over a group start from: an int32 for every 4 values."""
    return np.dtype([("values", np.int32, (size // 4,))])


def instruction_path() -> str:
    """Return the name of the best path for this processor, or the one that LLAMALET_SIMD names.

    Raises:
        ConfigError: if LLAMALET_SIMD names none.
    """
    forced = os.environ.get(PATH_VARIABLE)
    if forced is not None:
        if forced not in PATHS:
            raise ConfigError(f"{PATH_VARIABLE}={forced}: must be one of {', '.join(PATHS)}")
        return forced
    features = llvmlite.binding.get_host_cpu_features()
    if features.get("avx512vnni") and features.get("avx512vl"):
        return "avx512vnni"
    return "avxvnni" if features.get("avxvnni") else "portable"


@intrinsic
def dot_rows(typing_context: Any, matrix: Any, rows: Any, operand: Any, vectors: Any) -> Any:
    """Return the dot products of rows of a matrix with vectors: a tuple of float32, those of the first row first.

    Several at a time because what is loaded of a row serves all vectors, and the other way round. Each is summed in the
    same order whatever it is computed together with. Indices are not checked.

    Args:
        typing_context: numba's.
        matrix: float32 (rows, cols), or a tuple of group_dtype values and float32 scales, both (rows, groups).
        rows: a tuple of row numbers.
        operand: float32 (T, cols), or a tuple of group_dtype values, float32 scales and starts_dtype starts, all
            (T, groups). The starts are, for every 4 neighbours, -128 times their sum.
        vectors: a tuple of numbers below T.
    """
    result = types.UniTuple(types.float32, rows.count * vectors.count)
    emit = _int8_dots if isinstance(matrix, types.BaseTuple) else _float_dots

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        tables, x_tables = (
            [_Table(context, builder, *pair) for pair in _arrays(builder, *typed)]
            for typed in ((matrix, args[0]), (operand, args[2]))
        )
        w_rows = [[table.row(row) for table in tables] for row in cgutils.unpack_tuple(builder, args[1])]
        x_rows = [[table.row(vector) for table in x_tables] for vector in cgutils.unpack_tuple(builder, args[3])]
        return context.make_tuple(builder, result, emit(builder, w_rows, x_rows, tables[0]))

    return result(matrix, rows, operand, vectors), build


def _float_dots(builder: ir.IRBuilder, w_rows: Any, x_rows: Any, table: "_Table") -> list[Any]:
    """Return the dot products of float32 rows with float32 vectors."""
    lanes = ir.Constant(I64, FLOAT_LANES)
    n_whole = builder.mul(builder.udiv(table.width, lanes), lanes)
    totals = _totals(builder, [_splat_constant(F32, 0.0, FLOAT_LANES)] * (len(w_rows) * len(x_rows)))
    with cgutils.for_range_slice(builder, ir.Constant(I64, 0), n_whole, lanes, I64) as (col, _):
        x, w = (
            [_load(builder, builder.gep(row, [col]), F32, FLOAT_LANES) for (row,) in rows] for rows in (x_rows, w_rows)
        )
        _add_products(builder, totals, w, x)
    totals = _totals(builder, [_sum_lanes(builder, builder.load(total)) for total in totals])
    with cgutils.for_range_slice(builder, n_whole, table.width, ir.Constant(I64, 1), I64) as (col, _):
        x, w = ([builder.load(builder.gep(row, [col])) for (row,) in rows] for rows in (x_rows, w_rows))
        _add_products(builder, totals, w, x)
    return [builder.load(total) for total in totals]


def _int8_dots(builder: ir.IRBuilder, w_rows: Any, x_rows: Any, table: "_Table") -> list[Any]:
    """Return the dot products of quantized rows with quantized vectors."""
    size = table.dtype.size
    lanes = size // 4
    totals = _totals(builder, [_splat_constant(F32, 0.0, lanes)] * (len(w_rows) * len(x_rows)))
    with cgutils.for_range(builder, table.width, intp=I64) as loop:
        x = []
        for pointers in x_rows:
            values, scale, starts = (builder.gep(pointer, [loop.index]) for pointer in pointers)
            scale = _splat(builder, builder.load(scale), lanes)
            x.append((_load(builder, values, I8, size), scale, _load(builder, starts, I32, lanes)))
        for row, (values, scale) in enumerate(w_rows):
            w_bytes = _load(builder, builder.gep(values, [loop.index]), I8, size)
            w_scale = _splat(builder, builder.load(builder.gep(scale, [loop.index])), lanes)
            for total, (x_bytes, x_scale, starts) in zip(totals[row * len(x) :], x, strict=False):
                sums = builder.sitofp(_int8_dot(builder, w_bytes, x_bytes, starts), w_scale.type)
                _add_product(builder, total, builder.fmul(sums, x_scale), w_scale)
    return [_sum_lanes(builder, builder.load(total)) for total in totals]


def _totals(builder: ir.IRBuilder, values: Iterable[Any]) -> list[Any]:
    """Return variables that start from these values."""
    return [cgutils.alloca_once_value(builder, value) for value in values]


def _add_products(builder: ir.IRBuilder, totals: Any, w: Iterable[Any], x: Sequence[Any]) -> None:
    """Add the product of each of w and each of x to its total."""
    for total, (left, right) in zip(totals, itertools.product(w, x), strict=True):
        _add_product(builder, total, left, right)


def _add_product(builder: ir.IRBuilder, total: Any, left: Any, right: Any) -> None:
    """Add left * right to a variable, as one instruction where there is one."""
    product = builder.fmul(left, right, flags=("contract",))
    builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)


def _arrays(builder: ir.IRBuilder, array_type: Any, value: Any) -> Any:
    """Return the (type, value) of an array, or of each array of a tuple."""
    if isinstance(array_type, types.BaseTuple):
        return zip(array_type.types, cgutils.unpack_tuple(builder, value), strict=True)
    return [(array_type, value)]


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


def _int8_dot(builder: ir.IRBuilder, w_bytes: Any, x_bytes: Any, starts: Any) -> Any:
    """Return the products of two vectors of int8, summed over every 4 of them: int32 in a quarter of the lanes."""
    size, path = w_bytes.type.count, instruction_path()
    if path == "portable" or size % 16:
        return _portable_dot(builder, w_bytes, x_bytes)
    w_bytes = builder.xor(w_bytes, _splat_constant(I8, -128, size))
    return _vnni_dot(builder, starts, w_bytes, x_bytes, 64 if path == "avx512vnni" else 32)


@intrinsic
def sum_quads(typing_context: Any, values: Any, starts: Any) -> Any:
    """Write what the sums over a group start from: for every 4 neighbours -128 times their sum.

    Args:
        typing_context: numba's.
        values: an element of an array of group_dtype.
        starts: an element of an array of starts_dtype.
    """
    size = values.size

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        wide = builder.sext(_load(builder, args[0], I8, size), ir.VectorType(I32, size))
        first, second, third, fourth = (_select(builder, wide, range(place, size, 4)) for place in range(4))
        sums = builder.add(builder.add(first, second), builder.add(third, fourth))
        sums = builder.mul(sums, _splat_constant(I32, -128, size // 4))
        builder.store(sums, builder.bitcast(args[1], sums.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.none(values, starts), build


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
        (x,) = args

        def constant(value: float) -> Any:
            return ir.Constant(F32, float(np.float32(value)))

        def fma(a: Any, b: Any, c: Any) -> Any:
            return _call(builder, "llvm.fma.f32", F32, (a, b, c))

        n = _call(builder, "llvm.rint.f32", F32, (builder.fmul(x, constant(1 / math.log(2))),))
        # ln 2 in two parts: n times the first is exact, so that the difference loses nothing.
        r = fma(n, constant(-LN2_HIGH), x)
        r = fma(n, constant(-(math.log(2) - LN2_HIGH)), r)
        power = constant(1 / math.factorial(7))
        for degree in range(6, -1, -1):
            power = fma(power, r, constant(1 / math.factorial(degree)))
        whole = _call(builder, "llvm.fptosi.sat.i32.f32", I32, (n,))
        bits = builder.shl(builder.add(whole, ir.Constant(I32, 127)), ir.Constant(I32, 23))
        result = builder.fmul(power, builder.bitcast(bits, F32))
        small = builder.fcmp_ordered("<", n, constant(-126))
        large = builder.fcmp_ordered(">", n, constant(127))
        result = builder.select(small, constant(0), result)
        return builder.select(large, constant(math.inf), result)

    return types.float32(types.float32), build


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


def _portable_dot(builder: ir.IRBuilder, w_bytes: Any, x_bytes: Any) -> Any:
    """Sum the products of pairs of neighbours, then the pairs of the first half with those of the second.

    LLVM knows the sum of neighbouring products as one instruction on many processors (pmaddwd on x86).
    """
    size = w_bytes.type.count
    wide = ir.VectorType(I32, size)
    products = builder.mul(builder.sext(w_bytes, wide), builder.sext(x_bytes, wide))
    pairs = builder.add(_select(builder, products, range(0, size, 2)), _select(builder, products, range(1, size, 2)))
    return builder.add(_select(builder, pairs, range(size // 4)), _select(builder, pairs, range(size // 4, size // 2)))


def _vnni_dot(builder: ir.IRBuilder, sums: Any, w_bytes: Any, x_bytes: Any, register_bytes: int) -> Any:
    """Add the products of 4 neighbours, unsigned times signed, to each lane of sums, a register at a time."""
    size = w_bytes.type.count
    step = min(size, register_bytes)
    lanes = ir.VectorType(I32, step // 4)
    parts = []
    for first in range(0, size, step):
        part_sums = _select(builder, sums, range(first // 4, (first + step) // 4))
        w_part, x_part = (
            builder.bitcast(_select(builder, part, range(first, first + step)), lanes) for part in (w_bytes, x_bytes)
        )
        name = f"llvm.x86.avx512.vpdpbusd.{8 * step}"
        parts.append(_call(builder, name, lanes, (part_sums, w_part, x_part)))
    while len(parts) > 1:
        pairs = zip(parts[0::2], parts[1::2], strict=True)
        parts = [_select(builder, low, range(2 * low.type.count), high) for low, high in pairs]
    return parts[0]


def _sum_lanes(builder: ir.IRBuilder, vector: Any) -> Any:
    """Return the sum of the lanes of a float32 vector."""
    name = f"llvm.vector.reduce.fadd.v{vector.type.count}f32"
    return _call(builder, name, F32, (ir.Constant(F32, -0.0), vector), fastmath=("reassoc",))


def _load(builder: ir.IRBuilder, pointer: Any, element: Any, count: int) -> Any:
    """Load `count` elements from an address of any alignment."""
    return builder.load(builder.bitcast(pointer, ir.VectorType(element, count).as_pointer()), align=1)


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
