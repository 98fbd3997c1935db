"""Helpers that build LLVM code: constants, vectors, loads and stores, running sums, rows of arrays.

Each takes the `builder` of the function being compiled and appends instructions to it. Sizes and offsets are in
elements unless a name says bytes; addresses are typed pointers and may have any alignment.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from llamalet.kernels import processor

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


def i64(value: int) -> Any:
    """Return a 64-bit constant."""
    return ir.Constant(I64, value)


def splat_constant(element: Any, value: float, count: int) -> Any:
    """Return a vector of `count` copies of a constant."""
    return ir.Constant(ir.VectorType(element, count), [ir.Constant(element, value)] * count)


def splat(builder: ir.IRBuilder, value: Any, count: int) -> Any:
    """Return a vector of `count` copies of a value."""
    undefined = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    return shuffle(builder, builder.insert_element(undefined, value, ir.Constant(I32, 0)), [0] * count)


def shuffle(builder: ir.IRBuilder, vector: Any, lanes: Sequence[int], second: Any = None) -> Any:
    """Return these lanes of `vector`, or of `vector` and `second` one after the other."""
    mask = ir.Constant(ir.VectorType(I32, len(lanes)), [ir.Constant(I32, lane) for lane in lanes])
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined) if second is None else second, mask)


def transpose(builder: ir.IRBuilder, rows: Sequence[Any]) -> list[Any]:
    """Transpose a square of vectors: swap the off-diagonal corners of squares of 2, 4, 8 and 16 lanes a side."""
    size, block = len(rows), list(rows)
    side = 1
    while side < size:
        swapped = list(block)
        for row in range(size):
            if not row & side:
                upper, lower = block[row], block[row + side]
                # The upper row keeps its left squares and gets the lower row's left ones as its right squares.
                left = [column if not column & side else size + column - side for column in range(size)]
                right = [column + side if not column & side else size + column for column in range(size)]
                swapped[row] = shuffle(builder, upper, left, lower)
                swapped[row + side] = shuffle(builder, upper, right, lower)
        block, side = swapped, 2 * side
    return block


def call(builder: ir.IRBuilder, name: str, result: Any, args: Sequence[Any], fastmath: tuple[str, ...] = ()) -> Any:
    """Call an external function or an LLVM intrinsic by its name."""
    signature = ir.FunctionType(result, [arg.type for arg in args])
    function = cgutils.get_or_insert_function(builder.module, signature, name)
    return builder.call(function, args, fastmath=fastmath)


def sum_lanes(builder: ir.IRBuilder, vector: Any) -> Any:
    """Return the sum of the lanes of a float32 vector, in the order that suits the processor."""
    name = f"llvm.vector.reduce.fadd.v{vector.type.count}f32"
    return call(builder, name, F32, (ir.Constant(F32, -0.0), vector), fastmath=("reassoc",))


def sums_of_lanes(builder: ir.IRBuilder, vectors: Sequence[Any]) -> list[Any]:
    """Return the sum of the lanes of each float32 vector: of its halves, then of the halves of that, and so on.

    Two vectors are halved by one addition. There may be any number of them; the order of each sum is the same.
    """
    count, n = len(vectors), vectors[0].type.count
    segments = list(vectors)  # each holds `per_vector` vectors, `length` lanes of each
    per_vector, length = 1, n
    while length > 1:
        half = length // 2
        starts = [segment * length for segment in range(per_vector)]
        lower = [start + lane for start in starts for lane in range(half)]
        upper = [lane + half for lane in lower]
        if len(segments) > 1:
            pairs = zip(segments[::2], [*segments[1::2], segments[-1]], strict=False)
            size = segments[0].type.count
            both = [([*low, *(size + lane for lane in low)]) for low in (lower, upper)]
            segments = [
                builder.fadd(shuffle(builder, a, both[0], b), shuffle(builder, a, both[1], b)) for a, b in pairs
            ]
            per_vector *= 2
        else:
            segments = [builder.fadd(shuffle(builder, segments[0], lower), shuffle(builder, segments[0], upper))]
        length = half
    return [builder.extract_element(segments[i // per_vector], ir.Constant(I32, i % per_vector)) for i in range(count)]


def load_vector(builder: ir.IRBuilder, pointer: Any, element: Any, count: int) -> Any:
    """Load `count` elements."""
    return builder.load(builder.bitcast(pointer, ir.VectorType(element, count).as_pointer()), align=1)


def load_some(builder: ir.IRBuilder, pointer: Any, room: Any, count: int, missing: float = 0) -> Any:
    """Load `count` elements; those after the first `room` are not read, but `missing`."""
    element = pointer.type.pointee
    vector = ir.VectorType(element, count)
    numbers = ir.Constant(ir.VectorType(I64, count), [i64(lane) for lane in range(count)])
    mask = builder.icmp_signed("<", numbers, splat(builder, room, count))
    name = f"llvm.masked.load.v{count}{'f32' if element == F32 else 'i16'}.p0"
    address = builder.bitcast(pointer, vector.as_pointer())
    return call(builder, name, vector, (address, ir.Constant(I32, 1), mask, splat_constant(element, missing, count)))


def load_floats(builder: ir.IRBuilder, pointer: Any, count: int) -> Any:
    """Load `count` float32, or int8 as float32, or bfloat16 widened to float32: their bits are its upper 16."""
    if pointer.type.pointee == F32:
        return load_vector(builder, pointer, F32, count)
    if pointer.type.pointee == I8:
        integers = builder.sext(load_vector(builder, pointer, I8, count), ir.VectorType(I32, count))
        return builder.sitofp(integers, ir.VectorType(F32, count))
    return widen(builder, load_vector(builder, pointer, I16, count))


def widen(builder: ir.IRBuilder, bits: Any) -> Any:
    """Return a vector of bfloat16, 16 bits each, as float32."""
    count = bits.type.count
    bits = builder.zext(bits, ir.VectorType(I32, count))
    return builder.bitcast(builder.shl(bits, splat_constant(I32, 16, count)), ir.VectorType(F32, count))


def round_to_bfloat16(builder: ir.IRBuilder, x: Any) -> Any:
    """Return the bits of the bfloat16 nearest to a float32, or to each of a vector, half to even; NaN stays NaN.

    On any processor.
    """
    count = x.type.count if isinstance(x.type, ir.VectorType) else 0

    def constant(value: int) -> Any:
        return splat_constant(I32, value, count) if count else ir.Constant(I32, value)

    bits = builder.bitcast(x, ir.VectorType(I32, count) if count else I32)
    upper = builder.lshr(bits, constant(16))
    half = builder.add(constant(0x7FFF), builder.and_(upper, constant(1)))
    rounded = builder.lshr(builder.add(bits, half), constant(16))
    result = builder.select(builder.fcmp_unordered("uno", x, x), builder.or_(upper, constant(0x40)), rounded)
    return builder.trunc(result, ir.VectorType(I16, count) if count else I16)


def load_float(builder: ir.IRBuilder, pointer: Any) -> Any:
    """Load one float32, or one bfloat16 widened to float32."""
    return builder.extract_element(load_floats(builder, pointer, 1), ir.Constant(I32, 0))


def store_lanes(builder: ir.IRBuilder, vector: Any, pointer: Any, room: Any) -> None:
    """Store a vector of float32 or 16-bit numbers, or only its first `room` lanes if there is no more room."""
    lanes = vector.type.count
    pointer = builder.bitcast(pointer, vector.type.as_pointer())
    with builder.if_else(builder.icmp_signed(">=", room, i64(lanes))) as (whole, part):
        with whole:
            builder.store(vector, pointer, align=1)
        with part:
            numbers = ir.Constant(ir.VectorType(I64, lanes), [i64(lane) for lane in range(lanes)])
            mask = builder.icmp_signed("<", numbers, splat(builder, room, lanes))
            name = f"llvm.masked.store.v{lanes}{'f32' if vector.type.element == F32 else 'i16'}.p0"
            call(builder, name, ir.VoidType(), (vector, pointer, ir.Constant(I32, 1), mask))


def prefetch(builder: ir.IRBuilder, pointer: Any, *, for_writing: bool = False) -> None:
    """Begin to load a cache line into the core's second cache."""
    into_second_cache, of_data = 2, 1
    options = [ir.Constant(I32, value) for value in (int(for_writing), into_second_cache, of_data)]
    call(builder, "llvm.prefetch.p0", ir.VoidType(), (builder.bitcast(pointer, I8.as_pointer()), *options))


def variables(builder: ir.IRBuilder, values: Iterable[Any]) -> list[Any]:
    """Return variables with these initial values."""
    return [cgutils.alloca_once_value(builder, value) for value in values]


def add_product(builder: ir.IRBuilder, total: Any, left: Any, right: Any, *, fused: bool = True) -> None:
    """Add left * right to a variable, rounding once where the processor can and `fused` allows it.

    LLVM is told to fuse, not allowed to: it would decide anew in each loop, and the bits must not depend on the loop.
    """
    before = builder.load(total)
    if fused and processor.fuses():
        kind = left.type
        suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
        builder.store(call(builder, f"llvm.fma.{suffix}", kind, (left, right, before)), total)
    else:
        builder.store(builder.fadd(before, builder.fmul(left, right)), total)


def add_products(builder: ir.IRBuilder, totals: Any, w: Iterable[Any], x: Iterable[Any], *, fused: bool = True) -> None:
    """Add the product of each of w and each of x to its variable, those of the first w first."""
    for total, (left, right) in zip(totals, itertools.product(w, x), strict=True):
        add_product(builder, total, left, right, fused=fused)


class Table:
    """A contiguous array (n, width): its address, its lengths as LLVM values, its numba element type."""

    def __init__(self, context: Any, builder: ir.IRBuilder, array_type: Any, value: Any) -> None:
        array = context.make_array(array_type)(context, builder, value)
        self._builder, self._data = builder, array.data
        self.dtype = array_type.dtype
        self.length, self.width = cgutils.unpack_tuple(builder, array.shape)

    def row(self, index: Any) -> Any:
        """Return the address of the first element of a row."""
        return self._builder.gep(self._data, [self._builder.mul(index, self.width)])


def tables(context: Any, builder: ir.IRBuilder, tuple_type: Any, value: Any) -> list[Table]:
    """Return the arrays of a tuple."""
    parts = zip(tuple_type.types, cgutils.unpack_tuple(builder, value), strict=True)
    return [Table(context, builder, *part) for part in parts if isinstance(part[0], types.Array)]
