"""bfloat16 for products: rounding to it, packing it in pairs, and the instructions that multiply such pairs.

A bfloat16 number is the upper half of a float32, and is kept as uint16, its bits. The processor multiplies pairs: the
products of a pair with a pair are added to one float32. So an operand is an array of pairs, each a uint32 with the
first of its two numbers in the lower half:

    left    (m, pairs)               a row-major bfloat16 matrix as it is
    panels  (panels, pairs, 16)      the right side, packed: 16 columns side by side, a pair in each lane

The pairs of a row are filled up with zeros to a multiple of 16. products.py does the rest: to it, a pair is one number.

    amx          tdpbf16ps, 16 rows of 16 pairs with 16 columns of 16 pairs (Intel, since Sapphire Rapids)
    avx512bf16   vdpbf16ps, a pair with 16 pairs (Intel since Cooper Lake, AMD since Zen 4)

The default is amx, then avx512bf16 on AMD, then float32. LLAMALET_BF16=NAME forces one, LLAMALET_BF16=none float32.
The sums of the two differ in their last bits.
"""

import ctypes
import functools
import os
import sys
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from llamalet.errors import ConfigError
from llamalet.kernels import llvm, simd
from llamalet.kernels.jit import PART
from llamalet.kernels.layers import array_at
from llamalet.kernels.llvm import F32, I8, I16, I32, I64, i64

LANES = 16
"""Columns of a panel."""

PAIRS = 16
"""Every row of an operand is filled up to a multiple of so many pairs: the width of a tile register."""

TERMS = 2 * PAIRS

VARIABLE = "LLAMALET_BF16"

# Linux lets a process use tile registers once it has asked for them: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA).
ARCH_PRCTL, REQUEST, TILE_DATA = 158, 0x1023, 18

# What ldtilecfg reads, for 8 tiles of 16 rows of 64 bytes. Source: Intel's Software Developer's Manual, volume 1, 18.2.
TILE_ROWS, TILE_BYTES = 16, 64
TILE_CONFIG = np.zeros(64, np.uint8)
TILE_CONFIG[0] = 1  # the palette
TILE_CONFIG[16:32].view(np.uint16)[:] = TILE_BYTES
TILE_CONFIG[48:56] = TILE_ROWS

# The same, with registers 0 and 1 three numbers wide: for the parts of a single vector, see split_rows.py.
PARTS = 3
PARTS_CONFIG = TILE_CONFIG.copy()
PARTS_CONFIG[16:20].view(np.uint16)[:] = 4 * PARTS


@functools.cache
def instructions() -> str | None:
    """Return amx or avx512bf16, the faster that this process may use; None if float32 is faster than what there is.

    Raises:
        ConfigError: if LLAMALET_BF16 names something else.
    """
    paths = available_instructions()
    forced = os.environ.get(VARIABLE) or next((path for path in paths if pays(path)), "none")
    if forced not in (*paths, "none"):
        known = forced in ("amx", "avx512bf16")
        missing = "this processor does not have it" if known else "there are no such instructions"
        raise ConfigError(f"{VARIABLE}={forced}: {missing}; take one of {', '.join((*paths, 'none'))}")
    return None if forced == "none" else forced


def pays(path: str) -> bool:
    """Return whether these instructions are faster than float32 here.

    On Intel, vdpbf16ps is not: a training step of the 15M shape took 1.4 times as long (docs/log.md).
    """
    return path == "amx" or llvmlite.binding.get_host_cpu_name().startswith("znver")


def available_instructions() -> list[str]:
    """Return the instructions that numba compiles for and the machine has, the fastest first."""
    features = llvmlite.binding.get_host_cpu_features()
    native = numba.config.CPU_NAME in (None, llvmlite.binding.get_host_cpu_name()) and not numba.config.CPU_FEATURES
    if not (native and simd.instruction_path() == "avx512vnni" and features.get("avx512bf16")):
        return []
    tiles = features.get("amx-bf16") and features.get("amx-tile") and sys.platform == "linux"
    may_use = tiles and ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST, TILE_DATA) == 0
    return ["amx", "avx512bf16"] if may_use else ["avx512bf16"]


def filled(width: int) -> int:
    """Return the width of a bfloat16 matrix with the zeros that fill it up."""
    return -(-width // TERMS) * TERMS


def filled_pairs(builder: ir.IRBuilder, width: Any) -> Any:
    """Return `filled(width)` in pairs, as an LLVM value."""
    return builder.mul(builder.udiv(builder.add(width, i64(TERMS - 1)), i64(TERMS)), i64(PAIRS))


def panels_shape(depth: int, n: int) -> tuple[int, int, int]:
    """Return the shape of a packed matrix (depth, n): uint32 (panels, pairs, 16)."""
    return -(-n // LANES), filled(depth) // 2, LANES


def transposed_shape(depth: int, n: int) -> tuple[int, int]:
    """Return the shape of the transpose of a matrix (depth, n), as a left side: uint16 (rows, terms)."""
    return -(-n // LANES) * LANES, filled(depth)


# -- rounding ---------------------------------------------------------------------------------------------------------


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not have."""

    def _to_string(self) -> str:
        return "bfloat"


BFLOAT = _BFloat()


def round_vector(builder: ir.IRBuilder, value: Any) -> Any:
    """Return the bits of a float32 or a vector of them, rounded to the nearest bfloat16, ties to even."""
    if not isinstance(value.type, ir.VectorType):
        return builder.bitcast(builder.fptrunc(value, BFLOAT), I16)
    count = value.type.count
    return builder.bitcast(builder.fptrunc(value, ir.VectorType(BFLOAT, count)), ir.VectorType(I16, count))


@intrinsic
def round_float(typing_context: Any, value: Any) -> Any:
    """Return the bits of a float32, rounded to bfloat16."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return round_vector(builder, args[0])

    return types.uint16(types.float32), build


def stored(value: Any, array: Any) -> Any:
    """Return a float32 as an array, of float32 or bfloat16, holds it."""


@overload(stored, jit_options=PART, strict=False)
def _stored(value: Any, array: Any) -> Any:
    if array.dtype == types.float32:
        return lambda value, array: value
    return lambda value, array: round_float(value)


# -- packing ----------------------------------------------------------------------------------------------------------


def as_pairs(context: Any, builder: ir.IRBuilder, kind: Any, value: Any, result: Any) -> Any:
    """Return an array of numba's type `kind`, bfloat16 (m, terms) with contiguous rows, as pairs (m, terms / 2)."""
    array = context.make_array(kind)(context, builder, value)
    rows, terms = cgutils.unpack_tuple(builder, array.shape)
    row_bytes, _ = cgutils.unpack_tuple(builder, array.strides)
    shape, strides = (rows, builder.udiv(terms, i64(2))), (row_bytes, i64(4))
    return array_at(context, builder, result, builder.bitcast(array.data, I32.as_pointer()), shape, strides, i64(4))


@intrinsic
def round_rows(typing_context: Any, x: Any, out: Any) -> Any:
    """Round a float32 matrix (m, depth) into out (m or more, filled(depth) or more), with the zeros that fill it up.

    The rows of both are contiguous.
    """

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        source, target = (context.make_array(array)(context, builder, args[at]) for array, at in ((x, 0), (out, 1)))
        n_rows, depth = cgutils.unpack_tuple(builder, source.shape)
        with cgutils.for_range(builder, n_rows, intp=I64) as loop:
            row, rounded = (row_of(builder, array, loop.index) for array in (source, target))
            with cgutils.for_range_slice(builder, i64(0), depth, i64(TERMS), I64) as (k, _):
                numbers = llvm.load_some(builder, builder.gep(row, [k]), builder.sub(depth, k), TERMS)
                place = builder.gep(rounded, [k])
                vector = round_vector(builder, numbers)
                builder.store(vector, builder.bitcast(place, vector.type.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.none(x, out), build


def row_of(builder: ir.IRBuilder, matrix: Any, index: Any) -> Any:
    """Return the address of a row of a matrix."""
    row_bytes, _ = cgutils.unpack_tuple(builder, matrix.strides)
    place = builder.gep(builder.bitcast(matrix.data, I8.as_pointer()), [builder.mul(index, row_bytes)])
    return builder.bitcast(place, matrix.data.type)


@intrinsic
def pack_rows(typing_context: Any, matrix: Any, first: Any, panel: Any) -> Any:
    """Pack 16 rows of a matrix: panel[k, lane] is pair k of row first + lane; missing rows repeat the last one.

    Args:
        typing_context: numba's.
        matrix: float32 or bfloat16 (rows, cols), contiguous.
        first: the first row.
        panel: uint32 (pairs, 16), all of which is written.
    """

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        source, target = (
            context.make_array(array)(context, builder, args[at]) for array, at in ((matrix, 0), (panel, 2))
        )
        n_rows, width = cgutils.unpack_tuple(builder, source.shape)
        n_pairs, _ = cgutils.unpack_tuple(builder, target.shape)
        last = builder.sub(n_rows, i64(1))
        rows = []
        for lane in range(LANES):
            number = builder.add(args[1], i64(lane))
            number = builder.select(builder.icmp_signed(">", number, last), last, number)
            rows.append(builder.gep(source.data, [builder.mul(number, width)]))
        with cgutils.for_range_slice(builder, i64(0), n_pairs, i64(PAIRS), I64) as (pair, _):
            k = builder.mul(pair, i64(2))
            square = []
            for row in rows:
                terms = llvm.load_some(builder, builder.gep(row, [k]), builder.sub(width, k), TERMS)
                bits = round_vector(builder, terms) if matrix.dtype == types.float32 else terms
                square.append(builder.bitcast(bits, ir.VectorType(I32, PAIRS)))
            for column, vector in enumerate(llvm.transpose(builder, square)):
                place = builder.gep(target.data, [builder.mul(builder.add(pair, i64(column)), i64(LANES))])
                builder.store(vector, builder.bitcast(place, vector.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(matrix, types.intp, panel), build


def _rows_from(builder: ir.IRBuilder, matrix: Any, first: Any, count: int) -> list[tuple[Any, Any]]:
    """Return the addresses and widths of some rows of a matrix; rows that it does not have are 0 wide."""
    n_rows, width = cgutils.unpack_tuple(builder, matrix.shape)
    numbers = [builder.add(first, i64(i)) for i in range(count)]
    widths = [builder.select(builder.icmp_signed("<", number, n_rows), width, i64(0)) for number in numbers]
    return [(row_of(builder, matrix, number), own) for number, own in zip(numbers, widths, strict=True)]


def _load_pairs(builder: ir.IRBuilder, rows: Any, column: Any) -> Any:
    """Load 16 numbers of each of two rows, from a column on, as 16 pairs of bfloat16; missing numbers are zero."""
    halves = []
    for row, width in rows:
        numbers = llvm.load_some(builder, builder.gep(row, [column]), builder.sub(width, column), LANES)
        bits = round_vector(builder, numbers) if row.type.pointee == F32 else numbers
        halves.append(builder.zext(bits, ir.VectorType(I32, LANES)))
    return builder.or_(halves[0], builder.shl(halves[1], llvm.splat_constant(I32, 16, LANES)))


def pack_columns(x: Any, panels: Any, first: int, last: int) -> None:
    """Pack rows first..last of a matrix (depth, n), float32 or bfloat16, into all panels; first must be even.

    The last rows also write the zeros that fill the panels up.
    """
    for pair in range(first // 2, panels.shape[1] if last == len(x) else last // 2):
        pack_two_rows(x, pair, panels)


@intrinsic
def pack_two_rows(typing_context: Any, x: Any, pair: Any, panels: Any) -> Any:
    """Write rows 2 * pair and 2 * pair + 1 of x (depth, n), its rows contiguous, to panels (panels, pairs, 16).

    What x does not have is zero.
    """

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        source, target = (context.make_array(array)(context, builder, args[at]) for array, at in ((x, 0), (panels, 2)))
        n_panels, n_pairs, _ = cgutils.unpack_tuple(builder, target.shape)
        rows = _rows_from(builder, source, builder.mul(args[1], i64(2)), 2)
        with cgutils.for_range(builder, n_panels, intp=I64) as loop:
            column = builder.mul(loop.index, i64(LANES))
            vector = _load_pairs(builder, rows, column)
            place = builder.mul(builder.add(builder.mul(loop.index, n_pairs), args[1]), i64(LANES))
            builder.store(vector, builder.bitcast(builder.gep(target.data, [place]), vector.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(x, types.intp, panels), build


@intrinsic
def transpose(typing_context: Any, x: Any, first: Any, out: Any) -> Any:
    """Write 32 rows of a matrix, from `first` on, as columns: out[c, t] = x[t, c], zero if x has no such number.

    Args:
        typing_context: numba's.
        x: float32 or bfloat16 (depth, n), its rows contiguous.
        first: a multiple of 32.
        out: bfloat16, `transposed_shape` or more, its rows contiguous.
    """

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        source, target = (context.make_array(array)(context, builder, args[at]) for array, at in ((x, 0), (out, 2)))
        n, (n_rows, _) = (cgutils.unpack_tuple(builder, array.shape) for array in (source, target))
        n_columns = builder.select(builder.icmp_signed("<", n[1], n_rows), n[1], n_rows)
        out_bytes, _ = cgutils.unpack_tuple(builder, target.strides)
        out_data = builder.bitcast(target.data, I8.as_pointer())
        rows = _rows_from(builder, source, args[1], TERMS)
        with cgutils.for_range_slice(builder, i64(0), n_columns, i64(LANES), I64) as (column, _):
            square = [_load_pairs(builder, rows[t : t + 2], column) for t in range(0, TERMS, 2)]
            for lane, vector in enumerate(llvm.transpose(builder, square)):
                offset = builder.add(
                    builder.mul(builder.add(column, i64(lane)), out_bytes), builder.mul(args[1], i64(2))
                )
                place = builder.gep(out_data, [offset])
                builder.store(vector, builder.bitcast(place, vector.type.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.none(x, types.intp, out), build


# -- the instructions -------------------------------------------------------------------------------------------------


def add_pair_products(builder: ir.IRBuilder, total: Any, left: Any, right: Any) -> None:
    """Add the products of vectors of 16 pairs to a variable, 16 float32 (avx512bf16)."""
    pairs = ir.VectorType(BFLOAT, 2 * LANES)
    halves = [builder.bitcast(vector, pairs) for vector in (left, right)]
    name, kind = "llvm.x86.avx512bf16.dpbf16ps.512", ir.VectorType(F32, LANES)
    builder.store(llvm.call(builder, name, kind, (builder.load(total), *halves)), total)


def tile_call(builder: ir.IRBuilder, name: str, *args: Any) -> None:
    """Call a tile instruction; a Python number is the number of a register."""
    values = [ir.Constant(I8, arg) if isinstance(arg, int) else arg for arg in args]
    llvm.call(builder, f"llvm.x86.{name}", ir.VoidType(), values)


@intrinsic
def begin_tiles(typing_context: Any, of_parts: Any) -> Any:
    """Set this thread's tile registers up: 16 rows of 64 bytes each, or as PARTS_CONFIG says."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        configs = []
        for name, config in (("parts_config", PARTS_CONFIG), ("tile_config", TILE_CONFIG)):
            bytes_ = ir.Constant(ir.ArrayType(I8, len(config)), bytearray(config.tobytes()))
            constant = cgutils.global_constant(builder, name, bytes_)
            configs.append(builder.bitcast(constant, I8.as_pointer()))
        tile_call(builder, "ldtilecfg", builder.select(args[0], *configs))
        return context.get_dummy_value()

    return types.none(types.boolean), build


@intrinsic
def end_tiles(typing_context: Any) -> Any:
    """Give the tile registers back, so that the kernel need not save them."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        tile_call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.none(), build


@intrinsic
def multiply_tiles(
    typing_context: Any, left: Any, row: Any, upper_only: Any, k: Any, k_end: Any, panels: Any, panel: Any,
    width: Any, out: Any, add: Any,
) -> Any:  # fmt: skip
    """Write to out (32, 32) the products of 32 rows of pairs with two panels, or add them to it (amx).

    Args:
        typing_context: numba's.
        left: pairs (m, pairs), its rows contiguous; up to 15 rows after the last are read, see
            backward/memory.py, and may hold anything.
        row: the first row.
        upper_only: whether there are at most 16 rows; the lower half of `out` is undefined then.
        k: the first pair, a multiple of 16.
        k_end: the pair after the last.
        panels: uint32 (panels, pairs, 16), contiguous.
        panel: the first panel.
        width: how many panels there are, 1 or 2; with 1 the right half of `out` is undefined.
        out: float32, its rows contiguous.
        add: whether to add.
    """

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        a, b, c = (
            context.make_array(array)(context, builder, args[at]) for array, at in ((left, 0), (panels, 5), (out, 8))
        )
        row, upper_only, k, k_end, _, panel, width = args[1:8]
        left_bytes, out_bytes = (cgutils.unpack_tuple(builder, array.strides)[0] for array in (a, c))
        _, n_pairs, _ = cgutils.unpack_tuple(builder, b.shape)

        def at(array: Any, offset: Any) -> Any:
            return builder.gep(builder.bitcast(array.data, I8.as_pointer()), [offset])

        tile = i64(TILE_ROWS * TILE_BYTES)
        second = builder.select(builder.icmp_signed("==", width, i64(1)), panel, builder.add(panel, i64(1)))
        below = builder.select(upper_only, i64(0), builder.mul(left_bytes, i64(TILE_ROWS)))
        upper = builder.add(builder.mul(row, left_bytes), builder.mul(k, i64(4)))
        lefts = upper, builder.add(upper, below)
        rights = [
            builder.mul(builder.add(builder.mul(number, n_pairs), k), i64(TILE_BYTES)) for number in (panel, second)
        ]
        targets = [
            at(c, builder.add(builder.mul(i64(TILE_ROWS * i), out_bytes), i64(TILE_BYTES * j)))
            for i in range(2)
            for j in range(2)
        ]
        # The lines of `out` lie rows apart, where the processor does not expect them: fetch them while multiplying.
        for i in range(2 * TILE_ROWS):
            for j in range(2):
                line = at(c, builder.add(builder.mul(i64(i), out_bytes), i64(TILE_BYTES * j)))
                llvm.prefetch(builder, line, for_writing=True)
        with builder.if_else(args[9]) as (adding, fresh):
            with adding:
                for number, target in enumerate(targets):
                    tile_call(builder, "tileloadd64", number, target, out_bytes)
            with fresh:
                for number in range(4):
                    tile_call(builder, "tilezero", number)
        steps = builder.udiv(builder.add(builder.sub(k_end, k), i64(PAIRS - 1)), i64(PAIRS))
        with cgutils.for_range(builder, steps, intp=I64) as loop:
            left_step, right_step = builder.mul(loop.index, i64(TILE_BYTES)), builder.mul(loop.index, tile)
            for number, offset in zip((4, 5), lefts, strict=True):
                tile_call(builder, "tileloadd64", number, at(a, builder.add(offset, left_step)), left_bytes)
            for number, offset in zip((6, 7), rights, strict=True):
                tile_call(builder, "tileloadd64", number, at(b, builder.add(offset, right_step)), i64(TILE_BYTES))
            for number in range(4):
                tile_call(builder, "tdpbf16ps", number, 4 + number // 2, 6 + number % 2)
        for number, target in enumerate(targets):
            tile_call(builder, "tilestored64", number, target, out_bytes)
        return context.get_dummy_value()

    signature = (
        left, types.intp, types.boolean, types.intp, types.intp, panels, types.intp, types.intp, out, types.boolean,
    )  # fmt: skip
    return types.none(*signature), build
