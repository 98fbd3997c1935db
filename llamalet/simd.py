"""The few vector instructions under the kernels, as functions that numba code can call.

A loop over int8 does not vectorise in numba, which widens every product to 64 bits. So the inner step, the dot product
of two groups of int8, is built here as LLVM vector code, with a type `Lanes` for the vectors that it works on. Which
instructions it becomes is chosen when a kernel is compiled; LLAMALET_SIMD=NAME forces one path:

    avx512vnni   vpdpbusd, 64 bytes at a time
    avxvnni      vpdpbusd, 32 bytes at a time
    portable     widen, multiply, add: any processor

vpdpbusd multiplies unsigned by signed bytes. The weights become unsigned by flipping their top bit, which adds 128 to
each: dot(w + 128, x) = dot(w, x) + 128 * sum(x). What this is too much depends on the activations alone, so it is
computed once per vector, for all rows, and is what the sums start from (`starts`).

A group is a numpy record of dtype `group_dtype(size)`: numba sees its size in its type, so every loop over a group
unrolls, and an element of an array of groups is a pointer that needs no reference counting.
"""

import os
from collections.abc import Sequence
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from llamalet.errors import ConfigError

PATH_VARIABLE = "LLAMALET_SIMD"
PATHS = ("avx512vnni", "avxvnni", "portable")

I8, I32, F32 = ir.IntType(8), ir.IntType(32), ir.FloatType()


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


class Lanes(types.Type):
    """A vector register: `count` elements of type i32 or f32."""

    def __init__(self, element: str, count: int) -> None:
        self.element, self.count = element, count
        super().__init__(name=f"Lanes({element} x {count})")


@register_model(Lanes)
class LanesModel(models.PrimitiveModel):
    """Lanes are an LLVM vector."""

    def __init__(self, manager: Any, lanes: Lanes) -> None:
        super().__init__(manager, lanes, ir.VectorType({"i32": I32, "f32": F32}[lanes.element], lanes.count))


@intrinsic
def int8_dot(typing_context: Any, weights: Any, x: Any, starts: Any) -> Any:
    """Multiply two groups of int8 and sum the products, 4 of them in each lane, exactly.

    Args:
        typing_context: numba's.
        weights: a group of weights.
        x: a group of activations of the same size.
        starts: as `start_sums` computes them from x.

    Returns:
        Lanes(i32, size / 4), whose total is the dot product.
    """
    size = weights.size

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        w_bytes, x_bytes = (_load(builder, pointer, I8, size) for pointer in args[:2])
        path = instruction_path()
        if path == "portable" or size % 16:
            return _portable_dot(builder, w_bytes, x_bytes)
        w_bytes = builder.xor(w_bytes, _splat_constant(I8, -128, size))
        sums = _load(builder, args[2], I32, size // 4)
        return _vnni_dot(builder, sums, w_bytes, x_bytes, 64 if path == "avx512vnni" else 32)

    return Lanes("i32", size // 4)(weights, x, starts), build


@intrinsic
def zero_lanes(typing_context: Any, group: Any) -> Any:
    """Return Lanes(f32) of zeros, as many as `int8_dot` returns for such a group."""
    lanes = Lanes("f32", group.size // 4)

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return _splat_constant(F32, 0.0, lanes.count)

    return lanes(group), build


@intrinsic
def add_scaled(typing_context: Any, total: Any, dot: Any, x_scale: Any, w_scale: Any) -> Any:
    """Return total + dot * x_scale * w_scale, lane by lane, in float32."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        floats = builder.sitofp(args[1], args[0].type)
        scaled = builder.fmul(floats, _splat(builder, args[2], total.count))
        product = builder.fmul(scaled, _splat(builder, args[3], total.count), flags=("contract",))
        return builder.fadd(args[0], product, flags=("contract",))

    return total(total, dot, types.float32, types.float32), build


@intrinsic
def sum_lanes(typing_context: Any, lanes: Any) -> Any:
    """Return the sum of all lanes."""
    result, element = (types.int32, I32) if lanes.element == "i32" else (types.float32, F32)
    name = f"v{lanes.count}{lanes.element}"

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        if lanes.element == "i32":
            return _call(builder, f"llvm.vector.reduce.add.{name}", element, args)
        start = ir.Constant(F32, -0.0)
        return _call(builder, f"llvm.vector.reduce.fadd.{name}", element, (start, *args), fastmath=("reassoc",))

    return result(lanes), build


@intrinsic
def layer_of(typing_context: Any, stack: Any, index: Any) -> Any:
    """Return stack[index] of an array (L, ...), or of a named tuple of such arrays.

    What indexing in numba would return is reference counted, and of unknown strides wherever the layers do not follow
    each other at once. This one is neither: each layer must be contiguous, wherever it lies.
    """

    def array_type(array: Any) -> Any:
        return types.Array(array.dtype, array.ndim - 1, "C", readonly=not array.mutable)

    arrays = stack.types if isinstance(stack, types.BaseTuple) else [stack]
    results = [array_type(array) for array in arrays]
    result = types.NamedTuple(results, stack.instance_class) if isinstance(stack, types.BaseTuple) else results[0]

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        values = cgutils.unpack_tuple(builder, args[0]) if isinstance(stack, types.BaseTuple) else [args[0]]
        layers = [_layer_of(context, builder, *triple, args[1]) for triple in zip(arrays, results, values, strict=True)]
        return context.make_tuple(builder, result, layers) if isinstance(stack, types.BaseTuple) else layers[0]

    return result(stack, types.intp), build


def _layer_of(context: Any, builder: ir.IRBuilder, stack: Any, result: Any, value: Any, index: Any) -> Any:
    """Return value[index] as an array of type `result`."""
    outer, inner = context.make_array(stack)(context, builder, value), context.make_array(result)(context, builder)
    (distance, *strides), (_, *shape) = (cgutils.unpack_tuple(builder, x) for x in (outer.strides, outer.shape))
    first = builder.bitcast(outer.data, I8.as_pointer())
    data = builder.bitcast(builder.gep(first, [builder.mul(index, distance)]), outer.data.type)
    context.populate_array(inner, data=data, shape=shape, strides=strides, itemsize=outer.itemsize, meminfo=None)
    return inner._getvalue()


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
