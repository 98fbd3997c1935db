"""Powers of many numbers, for softmax: e ** ((x - largest) * scale), where no number is above `largest`.

The loops are written as vectors: numba would use half the processor's width, and not its instruction for powers of two.
"""

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from llamalet.kernels import bfloat16, llvm, simd
from llamalet.kernels.llvm import F32, I16, I32, I64, i64

LANES = 16
SCALEF = simd.instruction_path() == "avx512vnni"
"""Whether one instruction multiplies with a power of two."""


@intrinsic
def sum_of_powers(typing_context: Any, x: Any, largest: Any, scale: Any) -> Any:
    """Return the sum of the powers of x (n,), float32 and contiguous."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        (total,) = llvm.variables(builder, [llvm.splat_constant(F32, 0.0, LANES)])
        for _, _, power in _powers(context, builder, x, args):
            builder.store(builder.fadd(builder.load(total), power), total)
        return llvm.sum_lanes(builder, builder.load(total))

    return types.float32(x, types.float32, types.float32), build


@intrinsic
def write_powers(typing_context: Any, x: Any, largest: Any, scale: Any, factor: Any, out: Any) -> Any:
    """Write the powers of x (n,), times `factor`, to out (n or more,), and return the sum of what it writes.

    x is float32, out float32 or bfloat16; both are contiguous, and may be the same. The sum is taken before rounding.
    """

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        target = context.make_array(out)(context, builder, args[4])
        factors = llvm.splat(builder, args[3], LANES)
        (total,) = llvm.variables(builder, [llvm.splat_constant(F32, 0.0, LANES)])
        for i, count, power in _powers(context, builder, x, args):
            product = builder.fmul(power, factors)
            builder.store(builder.fadd(builder.load(total), product), total)
            value = product if out.dtype == types.float32 else bfloat16.round_vector(builder, product)
            llvm.store_lanes(builder, value, builder.gep(target.data, [i]), count)
        return llvm.sum_lanes(builder, builder.load(total))

    return types.float32(x, types.float32, types.float32, types.float32, out), build


def _powers(context: Any, builder: ir.IRBuilder, x: Any, args: Any) -> Any:
    """Open a loop over 16 numbers at a time, then a block for the rest, and yield inside of each.

    Yields:
        The index of the first number, how many there are, and their powers; 0 for those that are not there.
    """
    array = context.make_array(x)(context, builder, args[0])
    (width,) = cgutils.unpack_tuple(builder, array.shape)
    largest, scale = (llvm.splat(builder, value, LANES) for value in args[1:3])
    n_whole = builder.mul(builder.udiv(width, i64(LANES)), i64(LANES))
    with cgutils.for_range_slice(builder, i64(0), n_whole, i64(LANES), I64) as (i, _):
        numbers = llvm.load_vector(builder, builder.gep(array.data, [i]), F32, LANES)
        yield i, i64(LANES), _exp(builder, builder.fmul(builder.fsub(numbers, largest), scale))
    count = builder.sub(width, n_whole)
    with builder.if_then(builder.icmp_signed(">", count, i64(0))):
        numbers = llvm.load_some(builder, builder.gep(array.data, [n_whole]), count, LANES, -math.inf)
        yield n_whole, count, _exp(builder, builder.fmul(builder.fsub(numbers, largest), scale))


def _exp(builder: ir.IRBuilder, x: Any) -> Any:
    """Return e ** x of each lane, none above 0; where there is an instruction for powers of two, by that.

    Powers below about 2 ** -126 are 0, as in simd.exp. The instruction could compute them, but took 20 times as long.
    """
    if not SCALEF:
        return simd.exp_vector(builder, x)
    zero, least = (llvm.splat_constant(F32, value, LANES) for value in (0.0, -126 * math.log(2)))
    too_small = builder.fcmp_ordered("<", x, least)
    power, n = simd.exp_parts(builder, builder.select(too_small, zero, x))  # minus infinity would give NaN
    lanes, current_rounding = builder.bitcast(builder.not_(too_small), I16), ir.Constant(I32, 4)
    scalef = (power, n, zero, lanes, current_rounding)
    return llvm.call(builder, "llvm.x86.avx512.mask.scalef.ps.512", x.type, scalef)
