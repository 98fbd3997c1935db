"""The numbers of KV caches as kernels read and write them: where they are, and how they are kept (kv_kinds.KINDS)."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import float32, types
from numba.core import cgutils
from numba.extending import intrinsic

from llamalet.kernels import llvm, simd
from llamalet.kernels.jit import loop_kernel
from llamalet.kernels.layers import FLOAT_BYTES, contiguous_at, floats_at
from llamalet.kernels.llvm import I8, I16, I64, i64
from llamalet.kernels.shared import shared_kernel
from llamalet.kv_cache import KVCache
from llamalet.kv_kinds import KINDS, LANES

AHEAD = 2048
"""How many bytes ahead of the numbers that are widened memory is fetched."""

KIND_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}
F32_KIND, BF16_KIND, Q8_KIND = KIND_NUMBERS.values()

# Where the keys and values of a new position go: the addresses of its sequence's and of their scales, the capacity of
# the sequence's cache, the position, and the number of the cache's kind in KINDS.
CACHE_SLOT = np.dtype(
    [(name, np.int64) for name in ("keys", "values", "key_scales", "value_scales", "capacity", "position", "kind")]
)


def slot_of(cache: KVCache) -> tuple[int, ...]:
    """Return where the next key and value of a cache go, a CACHE_SLOT."""
    return *cache.addresses, cache.capacity, cache.length, KIND_NUMBERS[cache.kind]


@loop_kernel
def place_of_keys(slot: Any, head: int, head_dim: int, start: int) -> int:
    """Return the number of the first number of a head's keys from position `start` on, a multiple of 16."""
    return (head * slot.capacity + start) * head_dim


@loop_kernel
def place_of_values(slot: Any, head: int, width: int, start: int) -> int:
    """Return the number of the first number of a head's values from position `start` on."""
    return (head * slot.capacity + start) * width


@loop_kernel
def kept_bytes(kind: int) -> int:
    """Return the bytes of a number in a cache of this kind."""
    return FLOAT_BYTES if kind == F32_KIND else 2 if kind == BF16_KIND else 1


@loop_kernel
def widen(address: int, n: int, kind: int, out: Any) -> None:
    """Write n numbers of a cache at an address, a multiple of 16, to out as float32."""
    if kind == BF16_KIND:
        widen_bfloat16(address, n, out)
    else:
        widen_int8(address, n, out)


@shared_kernel
def keep_prompt(
    slots: Any, start: int, stop: int, first_head: int, k: Any, v: Any, first: int, last: int, head_dim: int, room: Any
) -> None:
    """Write some heads' keys and values of positions start .. stop - 1, neighbours in a sequence, to their cache.

    Args:
        slots: CACHE_SLOT (T,).
        start: the first of the positions.
        stop: the one after the last.
        first_head: the layer's first key-value head in the cache.
        k: the keys (T, G * D).
        v: the values (T, G * D).
        first: the first head in the layer.
        last: the head after the last.
        head_dim: D.
        room: float32 (D or more, 16), overwritten.
    """
    for head in range(first, last):
        columns, t = slice(head * head_dim, (head + 1) * head_dim), start
        for i in range(start, stop):
            if slots[i].kind == BF16_KIND and head_dim % LANES == 0:
                place = place_of_values(slots[i], first_head + head, head_dim, slots[i].position)
                store_bfloat16s(v[i, columns], head_dim, slots[i].values + 2 * place)
            else:
                keep_value(slots[i], first_head + head, v[i, columns])
        while t < stop:
            slot = slots[t]
            if slot.kind != Q8_KIND and slot.position % LANES == 0 and t + LANES <= stop:
                place = place_of_keys(slot, first_head + head, head_dim, slot.position)
                if slot.kind == F32_KIND:
                    block = floats_at(slot.keys + place * FLOAT_BYTES, head_dim, LANES)
                    simd.rows_to_lanes(k, t, t + LANES - 1, head * head_dim, head_dim, block)
                else:
                    simd.rows_to_lanes(k, t, t + LANES - 1, head * head_dim, head_dim, room)
                    store_bfloat16s(room, head_dim * LANES, slot.keys + 2 * place)
                t += LANES
            else:
                keep_key(slot, first_head + head, k[t, columns])
                t += 1


@loop_kernel
def keep_key(slot: Any, head: int, key: Any) -> None:
    """Write the key (D,) of a head at a new position to its cache, as KVCache.write."""
    position, head_dim = slot.position, len(key)
    # Its components are 16 numbers apart, with those of its neighbours between them.
    first = place_of_keys(slot, head, head_dim, position - position % LANES) + position % LANES
    if slot.kind == Q8_KIND:
        scale = slot.key_scales + (head * slot.capacity + position) * FLOAT_BYTES
        store_int8s(key, slot.keys + first, LANES, floats_at(scale, 1, 1))
    elif slot.kind == BF16_KIND:
        for i in range(head_dim):
            store_bfloat16(slot.keys + 2 * (first + i * LANES), key[i])
    else:
        for i in range(head_dim):
            store_float(slot.keys + FLOAT_BYTES * (first + i * LANES), key[i])


@loop_kernel
def keep_value(slot: Any, head: int, value: Any) -> None:
    """Write the value (D,) of a head at a new position to its cache, as KVCache.write."""
    head_dim, place = len(value), head * slot.capacity + slot.position
    first = place * ((head_dim + LANES - 1) // LANES * LANES)
    if slot.kind == Q8_KIND:
        store_int8s(value, slot.values + first, 1, floats_at(slot.value_scales + place * FLOAT_BYTES, 1, 1))
    elif slot.kind == BF16_KIND:
        for i in range(head_dim):
            store_bfloat16(slot.values + 2 * (first + i), value[i])
    else:
        kept = floats_at(slot.values + FLOAT_BYTES * first, 1, head_dim)
        for i in range(head_dim):
            kept[0, i] = value[i]


@loop_kernel
def store_int8s(x: Any, address: int, step: int, scale: Any) -> None:
    """Write x (n,) over its scale as int8, `step` bytes apart, and the scale, so that 127 is its largest magnitude."""
    bits = np.int32(0)
    for i in range(len(x)):
        bits = max(bits, simd.magnitude_bits(x[i]))
    largest = simd.float_of_bits(bits)
    scale[0, 0] = (largest + float32(0) * largest) / float32(127)  # NaN if any is infinite
    inverse = float32(127) / largest
    if not inverse < np.inf:  # zeros, or numbers too small to invert, or a NaN, which the scale keeps
        inverse = float32(0)
    for i in range(len(x)):
        store_int8(address + i * step, np.rint(x[i] * inverse))


def _widening(element: Any) -> Any:
    """Return an intrinsic that writes n numbers at an address, a multiple of 16, to out, float32 and contiguous."""

    @intrinsic
    def widening(typing_context: Any, address: Any, n: Any, out: Any) -> Any:
        def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            source = builder.inttoptr(args[0], element.as_pointer())
            target = context.make_array(out)(context, builder, args[2]).data
            with cgutils.for_range_slice(builder, i64(0), args[1], i64(LANES), I64) as (i, _):
                llvm.prefetch(builder, builder.gep(source, [builder.add(i, i64(8 * AHEAD // element.width))]))
                numbers = llvm.load_floats(builder, builder.gep(source, [i]), LANES)
                place = builder.bitcast(builder.gep(target, [i]), numbers.type.as_pointer())
                builder.store(numbers, place, align=FLOAT_BYTES)
            return context.get_dummy_value()

        return types.none(types.intp, types.intp, out), build

    return widening


widen_bfloat16, widen_int8 = _widening(I16), _widening(I8)


def _array_at(dtype: Any) -> Any:
    """Return an intrinsic that returns the contiguous array (rows, cols) at an address."""
    result, itemsize = types.Array(dtype, 2, "C"), dtype.bitwidth // 8

    @intrinsic
    def array_there(typing_context: Any, address: Any, rows: Any, cols: Any) -> Any:
        def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            data = builder.inttoptr(args[0], ir.IntType(dtype.bitwidth).as_pointer())
            return contiguous_at(context, builder, result, data, (args[1], args[2]), itemsize)

        return result(types.intp, types.intp, types.intp), build

    return array_there


bfloat16s_at, int8s_at = _array_at(types.uint16), _array_at(types.int8)


@intrinsic
def store_bfloat16s(typing_context: Any, x: Any, n: Any, address: Any) -> Any:
    """Write the first n numbers of x, float32 and contiguous, to an address as bfloat16; n is a multiple of 16."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        source = context.make_array(x)(context, builder, args[0]).data
        target = builder.inttoptr(args[2], I16.as_pointer())
        with cgutils.for_range_slice(builder, i64(0), args[1], i64(LANES), I64) as (i, _):
            bits = llvm.round_to_bfloat16(builder, llvm.load_floats(builder, builder.gep(source, [i]), LANES))
            builder.store(bits, builder.bitcast(builder.gep(target, [i]), bits.type.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.none(x, types.intp, types.intp), build


def _storing(from_float: Any) -> Any:
    """Return an intrinsic that stores a float32 at an address."""

    @intrinsic
    def storing(typing_context: Any, address: Any, x: Any) -> Any:
        def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            value = from_float(builder, args[1])
            builder.store(value, builder.inttoptr(args[0], value.type.as_pointer()), align=1)
            return context.get_dummy_value()

        return types.none(types.intp, types.float32), build

    return storing


store_float = _storing(lambda builder, x: x)
store_bfloat16 = _storing(llvm.round_to_bfloat16)
store_int8 = _storing(lambda builder, x: llvm.call(builder, "llvm.fptosi.sat.i8.f32", I8, (x,)))  # NaN becomes 0
