"""Sums of products of bytes on each instruction path: the inside of simd.multiply_blocks.

A packed matrix (quantize.Packed) has chunks of 8 columns of 16 rows; half a chunk is 64 unsigned weights, 4 of each
row. They meet 4 signed activations. A path says how: the instructions, and what its sums look like meanwhile.

    vpdpbusd, usdot    multiply 4 unsigned bytes by 4 signed ones and add the products to a lane
    sdot               the same of signed bytes
    vpmaddubsw         multiply unsigned bytes by signed ones, add neighbours to lanes of 16 bits
    smull, sadalp      multiply signed bytes to 16 bits, add neighbours to lanes of 32 bits

Sums start at zero_offset = -zero_point * sum(x), because the stored weights are w + zero_point. Where weights must be
signed, those of 8 bits become w again, and sums start at zero; those of 4 bits are small enough to stay.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from llamalet.kernels import llvm
from llamalet.kernels.llvm import I8, I16, I32
from llamalet.model_file.quantize import ROW_BLOCK

FALSE = ir.Constant(ir.IntType(1), 0)


class _Lanes:
    """A path with one sum for each row: the instruction `name` takes so many lanes."""

    tile_blocks = 2
    """See simd.tile_blocks."""

    unrolls = True
    """Whether the chunks of a group are code one after the other, which LLVM mixes: that takes more registers."""

    def __init__(self, name: str = "", lanes: int = ROW_BLOCK, *, signed: bool = False) -> None:
        self.name, self.lanes, self.signed = name, lanes, signed

    def first_sums(self, builder: ir.IRBuilder, zero_offset: Any, bits: int) -> Any:
        """Return the initial sums of a group; each lane of `zero_offset` is that of a row."""
        return llvm.splat_constant(I32, 0, ROW_BLOCK) if self.signed and bits == 8 else zero_offset

    def weights(self, builder: ir.IRBuilder, halves: Sequence[Any], bits: int) -> Sequence[Any]:
        """Return the weights of a chunk for each step, given the unsigned ones of its halves."""
        return [signed(builder, half) for half in halves] if self.signed and bits == 8 else halves

    def activations(self, builder: ir.IRBuilder, address: Any, step: int) -> Any:
        """Return a chunk's activations for a step, of the 8 bytes at an address: 4, repeated in every lane."""
        quad = builder.bitcast(builder.gep(address, [llvm.i64(4 * step)]), I32.as_pointer())
        return llvm.splat(builder, builder.load(quad, align=1), ROW_BLOCK)

    def add(self, builder: ir.IRBuilder, sums: Any, w: Any, x: Any) -> Any:
        """Add the products of a step to the sums."""
        w, parts = builder.bitcast(w, x.type), []
        for first in range(0, ROW_BLOCK, self.lanes):
            args = [llvm.shuffle(builder, vector, range(first, first + self.lanes)) for vector in (sums, w, x)]
            parts.append(self.call(builder, *args))
        return concatenated(builder, parts)

    def call(self, builder: ir.IRBuilder, *args: Any) -> Any:
        """Call the instruction with sums, weights and activations."""
        return llvm.call(builder, self.name, args[0].type, args)

    def last_sums(self, builder: ir.IRBuilder, sums: Any) -> Any:
        """Return the sum of each row."""
        return sums


class _ArmLanes(_Lanes):
    """The same on Arm, whose instructions take a lane of the activations by its number."""

    tile_blocks = 1

    def activations(self, builder: ir.IRBuilder, address: Any, step: int) -> Any:
        """Return a chunk's activations for a step; they are loaded once for both."""
        return llvm.shuffle(builder, eight_bytes(builder, address), [step] * ROW_BLOCK)

    def call(self, builder: ir.IRBuilder, *args: Any) -> Any:
        """Call the instruction with sums, weights and activations."""
        sums, *numbers = args
        vectors = [builder.bitcast(vector, ir.VectorType(I8, 4 * self.lanes)) for vector in numbers]
        return llvm.call(builder, self.name, sums.type, (sums, *vectors))


class _Avx2(_Lanes):
    """x86 with AVX2 and no VNNI.

    Two products are added in 16 bits. They fit: of 8 bits, a weight's magnitude meets an activation with the weight's
    sign, which gives at most 2 * 128 * 127; of 4 bits, even four products are at most 4 * 15 * 127.
    """

    tile_blocks = 1
    unrolls = False
    rows = 8
    """Rows whose sums fill a register."""

    def weights(self, builder: ir.IRBuilder, halves: Sequence[Any], bits: int) -> Sequence[Any]:
        """Return the weights of a chunk for each step: of 8 bits, one for each half; of 4 bits, one for both.

        A step has a part for each register of rows. A part has, for each of its halves, its number, the unsigned
        factors, and what gives the activations their sign.
        """
        n = 4 * self.rows
        parts = [
            [llvm.shuffle(builder, half, range(first, first + n)) for first in range(0, half.type.count, n)]
            for half in halves
        ]
        if bits == 4:
            return [[[(0, left, None), (1, right, None)] for left, right in zip(*parts, strict=True)]]
        signs = [[signed(builder, w) for w in half] for half in parts]
        return [
            [[(number, llvm.call(builder, "llvm.abs.v32i8", w.type, (w, FALSE)), w)] for w in half]
            for number, half in enumerate(signs)
        ]

    def activations(self, builder: ir.IRBuilder, address: Any, step: int) -> Any:
        """Return a chunk's activations: those of each half, repeated for every row of a register."""
        kind, found = ir.VectorType(I8, 4 * self.rows), []
        for half in range(2):
            quad = builder.bitcast(builder.gep(address, [llvm.i64(4 * half)]), I32.as_pointer())
            found.append(builder.bitcast(llvm.splat(builder, builder.load(quad, align=1), self.rows), kind))
        return found

    def add(self, builder: ir.IRBuilder, sums: Any, w: Any, x: Any) -> Any:
        """Add the products of a chunk to the sums."""
        words, results = ir.VectorType(I16, 2 * self.rows), []
        ones = llvm.splat_constant(I16, 1, words.count)
        for number, part in enumerate(w):
            total = llvm.shuffle(builder, sums, range(number * self.rows, (number + 1) * self.rows))
            pairs = []
            for half, factors, sign in part:
                values = x[half]
                if sign is not None:
                    values = llvm.call(builder, "llvm.x86.avx2.psign.b", values.type, (values, sign))
                pairs.append(llvm.call(builder, "llvm.x86.avx2.pmadd.ub.sw", words, (factors, values)))
            sum_of_pairs = pairs[0] if len(pairs) == 1 else builder.add(*pairs)
            more = llvm.call(builder, "llvm.x86.avx2.pmadd.wd", total.type, (sum_of_pairs, ones))
            results.append(builder.add(total, more))
        return concatenated(builder, results)


class _Pairs(_Lanes):
    """A path with two sums for each row, side by side: of the products of columns 0 and 1, 4 and 5, and of the rest."""

    def first_sums(self, builder: ir.IRBuilder, zero_offset: Any, bits: int) -> Any:
        """Return the initial sums; the second of each row starts at zero."""
        zeros = llvm.splat_constant(I32, 0, ROW_BLOCK)
        lanes = [lane // 2 + ROW_BLOCK * (lane % 2) for lane in range(2 * ROW_BLOCK)]
        return llvm.shuffle(builder, super().first_sums(builder, zero_offset, bits), lanes, zeros)

    def last_sums(self, builder: ir.IRBuilder, sums: Any) -> Any:
        """Return the sum of each row."""
        even, odd = (llvm.shuffle(builder, sums, range(first, 2 * ROW_BLOCK, 2)) for first in range(2))
        return builder.add(even, odd)


class _Portable(_Pairs):
    """Any processor."""

    def add(self, builder: ir.IRBuilder, sums: Any, w: Any, x: Any) -> Any:
        """Widen to 32 bits, multiply, add neighbours and add that."""
        kind = ir.VectorType(I32, w.type.count)
        products = builder.mul(builder.zext(w, kind), builder.sext(builder.bitcast(x, w.type), kind))
        # Many processors have one instruction for the sum of neighbouring products; LLVM recognizes this form.
        even, odd = (llvm.shuffle(builder, products, range(first, w.type.count, 2)) for first in range(2))
        return builder.add(sums, builder.add(even, odd))


class _Neon(_Pairs):
    """64-bit Arm without dot products.

    Two products are added in 16 bits. They fit: an activation is at least -127, so none is larger than 128 * 127.
    """

    tile_blocks = 1

    def weights(self, builder: ir.IRBuilder, halves: Sequence[Any], bits: int) -> Sequence[Any]:
        """Return the weights of a chunk, its halves, for the only step."""
        return [super().weights(builder, halves, bits)]

    def activations(self, builder: ir.IRBuilder, address: Any, step: int) -> Any:
        """Return a chunk's activations: those of each half, repeated for every row."""
        quads = eight_bytes(builder, address)
        return [llvm.shuffle(builder, quads, [half] * ROW_BLOCK) for half in range(2)]

    def add(self, builder: ir.IRBuilder, sums: Any, w: Any, x: Any) -> Any:
        """Add the products of a chunk to the sums."""
        count = 4 * ROW_BLOCK
        kind = ir.VectorType(I16, count)
        left, right = (
            [builder.sext(builder.bitcast(half, ir.VectorType(I8, count)), kind) for half in side] for side in (w, x)
        )
        products = builder.add(builder.mul(left[0], right[0]), builder.mul(left[1], right[1]))
        pieces = [llvm.shuffle(builder, products, range(first, first + 8)) for first in range(0, count, 8)]
        name, four = "llvm.aarch64.neon.saddlp.v4i32.v8i16", ir.VectorType(I32, 4)
        return builder.add(sums, concatenated(builder, [llvm.call(builder, name, four, (p,)) for p in pieces]))


def eight_bytes(builder: ir.IRBuilder, address: Any) -> Any:
    """Load 8 bytes as two numbers."""
    return llvm.load_vector(builder, builder.bitcast(address, I32.as_pointer()), I32, 2)


def signed(builder: ir.IRBuilder, w: Any) -> Any:
    """Return bytes w + 128 as the signed bytes w."""
    return builder.xor(w, llvm.splat_constant(I8, 0x80, w.type.count))


def concatenated(builder: ir.IRBuilder, parts: Sequence[Any]) -> Any:
    """Return vectors of equal length as one; there are 1, 2, 4, ... of them."""
    while len(parts) > 1:
        lanes = range(2 * parts[0].type.count)
        parts = [llvm.shuffle(builder, low, lanes, high) for low, high in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


PATHS: dict[str, _Lanes] = {
    "avx512vnni": _Lanes("llvm.x86.avx512.vpdpbusd.512", 16),
    "avxvnni": _Lanes("llvm.x86.avx512.vpdpbusd.256", 8),
    "neoni8mm": _ArmLanes("llvm.aarch64.neon.usdot.v4i32.v16i8", 4),
    "neondot": _ArmLanes("llvm.aarch64.neon.sdot.v4i32.v16i8", 4, signed=True),
    "neon": _Neon(signed=True),
    "avx2": _Avx2(signed=True),
    "portable": _Portable(),
}
"""The best first."""
