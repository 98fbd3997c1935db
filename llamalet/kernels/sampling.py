"""From logits to a token, compiled: `sampler.choose_token`, with the same sums in the same order.

Almost all of its time goes into passes over the whole vocabulary: the powers, their sum, and the search for the few
tokens that can be drawn. Only those are divided by the sum, and sorted.

The sums have to be those of a loop in C, which waits four cycles for each addition. `add_in_order` gets the same bits
from whole vectors.
"""

import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import float32, int64, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from llamalet.kernels import cache, llvm, simd
from llamalet.kernels.jit import inner_kernel, kernel
from llamalet.kernels.llvm import F32, I32, I64, i64
from llamalet.kernels.powers import write_powers
from llamalet.sampler import NOT_FINITE, Rule, SamplingConfig

LANES = 16
CHUNK = 128
"""Numbers that are added at once."""
WHOLE = 1 << 24
"""A float32 has 24 bits, so a sum is a whole number of units below this."""
DIGITS = 4
"""Of 8 bits: what the bits of a float32 are sorted by, one after the other."""
NEAR_EXPONENT = -8
"""The tokens above 2 to this, as a share of the largest probability, are tried first."""
NEAR, TINY = 2.0**NEAR_EXPONENT, 2.0**-100


class Room(NamedTuple):
    """Memory for a vocabulary of V: scaled logits, powers, and those that were picked, the most likely first.

    scaled: float32 (V,).
    weights: float32 (V + 16,).
    bits: of the probabilities that were picked, and room to sort them, uint32 (2, V).
    tokens: theirs, int32 (2, V).
    sums: of these probabilities, from the first on, float32 (V,).
    counts: how many of them have each value of each digit, int32 (DIGITS, 256).
    """

    scaled: Any
    weights: Any
    bits: Any
    tokens: Any
    sums: Any
    counts: Any


class TokenChooser:
    """A compiled `sampler.choose_token` for vocabularies of one size; one caller at a time, the others wait."""

    def __init__(self, vocab_size: int) -> None:
        """Take memory for vocab_size tokens."""
        self.begin()
        self._room = Room(
            scaled=np.empty(vocab_size, np.float32),
            weights=np.empty(vocab_size + LANES, np.float32),
            bits=np.empty((2, vocab_size), np.uint32),
            tokens=np.empty((2, vocab_size), np.int32),
            sums=np.empty(vocab_size, np.float32),
            counts=np.empty((DIGITS, 256), np.int32),
        )
        self._choose: Callable[..., int] | None = None

    def compile(self) -> None:
        """Compile what chooses, unless it has been; the first call would do it otherwise."""
        if self._choose is None:
            n = len(self._room.scaled)
            self._choose = compile_choose(
                (np.empty(n, np.float32), Rule.create(SamplingConfig(), n), np.float32(0), self._room)
            )

    def begin(self) -> None:
        """Begin without a caller, as a forked process must."""
        self._lock = threading.Lock()

    def __call__(self, logits: NDArray[np.float32], rule: Rule, coin: np.float32) -> int:
        """See sampler.choose_token."""
        with self._lock:
            self.compile()
            assert self._choose is not None
            return self._choose(np.ascontiguousarray(logits), rule, coin, self._room)

    def __deepcopy__(self, memo: dict[int, Any]) -> "TokenChooser":
        """Return this one: a copied sampler shares it, as all of a model do."""
        return self


def compile_choose(arguments: tuple[Any, ...]) -> Callable[..., int]:
    """Return `choose` for arguments of these types, compiled or from the cache; it does not look at the types again."""
    if not choose.signatures:
        cache.enable(choose)
    with cache.without_collecting():
        return choose.compile(tuple(numba.typeof(argument) for argument in arguments))


@kernel
def choose(logits: Any, rule: Any, coin: float, room: Any) -> int:
    """Return the token that a coin falls on, or NOT_FINITE; see sampler.choose_token."""
    largest, n = largest_if_finite(logits), rule.n_drawn
    if np.isnan(largest):
        return NOT_FINITE
    scaled, room_for_scaled = logits[:n], room.scaled[:n]
    if len(rule.left_out):
        for i in range(n):
            room_for_scaled[i] = scaled[i]
        for token in rule.left_out:
            room_for_scaled[token] = -np.inf
        scaled = room_for_scaled
    if n < len(logits) or len(rule.left_out):
        largest = simd.largest(scaled)
    peak = largest / rule.temperature
    if not np.isfinite(peak):  # the temperature is 0, or so small that the division overflows
        return first_from(scaled, largest)
    if rule.temperature != 1:
        for i in range(n):
            room_for_scaled[i] = scaled[i] / rule.temperature
        scaled = room_for_scaled
    weights = room.weights[: (n + LANES - 1) // LANES * LANES]
    weights[n:] = 0
    write_powers(scaled, peak, float32(1), float32(1), weights)
    return choose_by_weight(weights, rule, coin, room)


@inner_kernel
def first_from(x: Any, bound: float) -> int:
    """Return the first index at which x (n,) is at least the bound."""
    first = 0
    while first + LANES <= len(x):
        lanes = lanes_from(x, first, bound)
        if lanes:
            return first + lowest_bit(lanes)
        first += LANES
    while x[first] < bound:
        first += 1
    return first


@inner_kernel
def first_above(sums: Any, bound: float) -> int:
    """Return the first index at which a sum exceeds the bound, or the last one."""
    for i in range(len(sums)):
        if sums[i] > bound:
            return i
    return len(sums) - 1


@inner_kernel
def choose_by_weight(weights: Any, rule: Any, coin: float, room: Any) -> int:
    """Return the token that a coin falls on, given the weights, a multiple of 16; see sampler.choose_by_weight."""
    n = rule.n_drawn
    total = add_in_order(weights, 0, n, float32(0))
    if not (rule.top_p > 0 or rule.top_k or rule.min_p > 0):
        return first_sum_above(weights[:n], total, coin)
    found = pick_all_kept(weights, total, rule, room)
    if not found:  # a tiny top-p over equal probabilities: none reaches the floor
        return first_of_most(weights, total)
    if rule.top_k:
        found = min(found, rule.top_k)
    last = found - 1
    if rule.top_p > 0:
        last = first_above(room.sums[:found], rule.top_p * room.sums[last] if rule.top_k else rule.top_p)
    if rule.min_p > 0:
        least, kept = rule.min_p * probability_of(room, 0), 0
        while kept < found and probability_of(room, kept) >= least:
            kept += 1
        last = min(last, kept - 1)
    return room.tokens[0, first_above(room.sums[: last + 1], coin * room.sums[last])]


@inner_kernel
def first_of_most(weights: Any, total: float) -> int:
    """Return the first token of those that are most likely, whose weight is 1 or has the same share of the total."""
    i = 0
    while weights[i] / total < float32(1) / total:
        i += 1
    return i


@inner_kernel
def pick_all_kept(weights: Any, total: float, rule: Any, room: Any) -> int:
    """Put all tokens that the filters may keep into room, sorted; return how many.

    What it puts is always the most likely so many; there may be more of them than are kept. Mostly a few likely tokens
    are enough, which are tried first; next those down to a likely bound.
    """
    n, most = rule.n_drawn, float32(1) / total
    floor, first_try = rule.min_p * most, 2
    if rule.top_k:
        floor = float32(1e-45)  # the smallest: tokens of no probability add nothing to any sum
        first_try = 1
    elif rule.top_p > 0:
        first_try = 0
        if n > 1:
            floor = (float32(1) - rule.top_p) / float32(n - 1)
    found = 0
    for attempt in range(first_try, 3):  # a loop, so that there is one `pick` to compile
        bound = floor
        if attempt == 0:
            bound = most * float32(NEAR)
        elif attempt == 1:
            bound = likely_bound(weights, total, rule)
        if attempt == 2 or bound > floor:
            found = pick(weights, total, bound, n, room)
            if holds_all_kept(rule, found, room):
                break
    return found


@inner_kernel
def holds_all_kept(rule: Any, found: int, room: Any) -> bool:
    """Return whether the filters keep no more than the tokens that were picked."""
    if rule.top_k:
        return found >= rule.top_k
    return found > 0 and room.sums[found - 1] > rule.top_p


@inner_kernel
def likely_bound(weights: Any, total: float, rule: Any) -> float:
    """Return a guess at a bound: about half of the least probability that top-k or top-p keeps.

    It is a power of two, 2 ** -32 at the least, over the total, found by halving an interval of exponents. It may be
    too high: the caller checks.
    """
    low, high = -32, 0 if rule.top_k else NEAR_EXPONENT
    while high - low > 1:
        middle = (low + high) // 2
        weight = float32(2) ** float32(middle)
        if rule.top_k:
            reached = count_from(weights, weight) >= rule.top_k
        else:
            reached = sum_from(weights, weight) > rule.top_p * total * float32(1.001)
        if reached:
            low = middle
        else:
            high = middle
    return float32(2) ** float32(low) / total


@inner_kernel
def pick(weights: Any, total: float, bound: float, n: int, room: Any) -> int:
    """Put the tokens with a probability of at least `bound` into room, sorted, and their sums; return how many."""
    found, least = 0, bound * total * float32(0.999)  # least: below what divided by the total reaches the bound
    for first in range(0, len(weights), LANES):
        lanes = lanes_from(weights, first, least)
        while lanes:
            token = first + lowest_bit(lanes)
            lanes &= lanes - 1
            probability = weights[token] / total
            if probability >= bound and token < n:
                room.bits[0, found], room.tokens[0, found] = simd.magnitude_bits(probability), token
                found += 1
    sort_descending(found, room)
    total = float32(0)
    for i in range(found):
        total += probability_of(room, i)
        room.sums[i] = total
    return found


@inner_kernel
def probability_of(room: Any, i: int) -> float:
    """Return the probability of the token that was picked as number i."""
    return simd.float_of_bits(np.int32(room.bits[0, i]))


@inner_kernel
def sort_descending(n: int, room: Any) -> None:
    """Sort the first n of what was picked: the most likely first, equals as they were.

    A radix sort from the lowest of DIGITS digits to the highest: the bits of positive numbers sort as the numbers do.
    """
    counts = room.counts
    counts[:] = 0
    for i in range(n):
        for digit in range(DIGITS):
            counts[digit, digit_of(room.bits[0, i], digit)] += 1
    for digit in range(DIGITS):
        source, target, place = digit % 2, (digit + 1) % 2, 0
        for value in range(counts.shape[1] - 1, -1, -1):
            count = counts[digit, value]
            counts[digit, value] = place
            place += count
        for i in range(n):
            bits = room.bits[source, i]
            value = digit_of(bits, digit)
            place = counts[digit, value]
            counts[digit, value] = place + 1
            room.bits[target, place], room.tokens[target, place] = bits, room.tokens[source, i]


@inner_kernel
def digit_of(bits: int, digit: int) -> int:
    """Return one of the digits of 8 bits of a number, 0 the lowest."""
    return int64(bits) >> (digit * 8) & 255


@inner_kernel
def first_sum_above(weights: Any, total: float, coin: float) -> int:
    """Return the first token at which the sum of the probabilities exceeds the coin, or the last one.

    The weights become probabilities on the way.
    """
    n, before = len(weights), float32(0)
    for first in range(0, n, CHUNK):
        last = min(n, first + CHUNK)
        for i in range(first, last):
            weights[i] /= total
        after = add_in_order(weights, first, last, before)
        if after > coin:
            for i in range(first, last):
                before += weights[i]
                if before > coin:
                    return i
        before = after
    return n - 1


@inner_kernel
def add_in_order(x: Any, first: int, last: int, total: float) -> float:
    """Return total + x[first] + x[first + 1] and so on, none negative, rounding every sum to float32 as C does.

    Between two powers of two a sum is a whole number of units, and adding x adds x rounded to units: the same integer
    wherever in between the sum is, unless x is half way between two integers. So the integers of a chunk can be added
    in any order. A chunk in which the sum reaches the next power of two, or with a half, is added number by number.
    """
    i = first
    while i < last and x[i] == 0:
        i += 1
    while i < last:
        end = min(i + CHUNK, last)
        if end - i == CHUNK and TINY < total < WHOLE:
            per_unit = units_in_one(total)
            more = add_units(x, i, per_unit)
            whole = int64(total * per_unit) + more
            if more >= 0 and whole <= WHOLE:
                total, i = float32(whole) / per_unit, end
        while i < end:
            total += x[i]
            i += 1
    return total


@inner_kernel
def units_in_one(total: float) -> float:
    """Return how many units make 1, a power of two: the unit of a sum in 2 ** e .. 2 ** (e + 1) is 2 ** (e - 23)."""
    exponent = simd.magnitude_bits(total) >> 23
    return simd.float_of_bits(np.int32((2 * 127 + 23 - exponent) << 23))


@intrinsic
def add_units(typing_context: Any, x: Any, first: Any, per_unit: Any) -> Any:
    """Return the sum of CHUNK numbers x from `first` on, each rounded to a whole number of units, or -1 at a half.

    x is float32 and contiguous. A number of more than WHOLE units counts as that many.
    """

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        data = context.make_array(x)(context, builder, args[0]).data
        integers = ir.VectorType(I32, LANES)
        scale, half, most = (
            llvm.splat(builder, value, LANES)
            for value in (args[2], ir.Constant(F32, 0.5), ir.Constant(F32, float(WHOLE)))
        )
        total, halves = (
            llvm.splat_constant(I32, 0, LANES),
            ir.Constant(ir.VectorType(ir.IntType(1), LANES), [0] * LANES),
        )
        for i in range(0, CHUNK, LANES):
            numbers = llvm.load_vector(builder, builder.gep(data, [builder.add(args[1], i64(i))]), F32, LANES)
            units = builder.fmul(numbers, scale)
            units = builder.select(builder.fcmp_ordered("<", units, most), units, most)
            whole = llvm.call(builder, f"llvm.rint.v{LANES}f32", units.type, (units,))
            difference = llvm.call(builder, f"llvm.fabs.v{LANES}f32", units.type, (builder.fsub(units, whole),))
            halves = builder.or_(halves, builder.fcmp_ordered("==", difference, half))
            total = builder.add(total, builder.fptosi(whole, integers))
        result = llvm.call(builder, f"llvm.vector.reduce.add.v{LANES}i32", I32, (total,))
        any_half = builder.icmp_unsigned(
            "!=", builder.bitcast(halves, ir.IntType(LANES)), ir.Constant(ir.IntType(LANES), 0)
        )
        return builder.sext(builder.select(any_half, ir.Constant(I32, -1), result), I64)

    return types.int64(x, types.int64, types.float32), build


def _sum_of(term: Any) -> Any:
    """Return an intrinsic that adds a term for each number of x (n,), float32 and contiguous, in any order.

    `term` builds the terms of a vector of them, and is given a float32, too; that of a 0 must be 0.
    """

    @intrinsic
    def sum_of(typing_context: Any, x: Any, bound: Any) -> Any:
        def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            array = context.make_array(x)(context, builder, args[0])
            (n,) = cgutils.unpack_tuple(builder, array.shape)
            bounds, step = llvm.splat(builder, args[1], LANES), 4 * LANES
            n_whole = builder.mul(builder.udiv(n, i64(step)), i64(step))
            totals = llvm.variables(builder, [llvm.splat_constant(F32, 0.0, LANES)] * 4)

            def add(total: Any, numbers: Any) -> None:
                builder.store(builder.fadd(builder.load(total), term(builder, numbers, bounds)), total)

            with cgutils.for_range_slice(builder, i64(0), n_whole, i64(step), I64) as (i, _):
                for number, total in enumerate(totals):
                    place = builder.gep(array.data, [builder.add(i, i64(number * LANES))])
                    add(total, llvm.load_vector(builder, place, F32, LANES))
            with cgutils.for_range_slice(builder, n_whole, n, i64(LANES), I64) as (i, _):
                place, left = builder.gep(array.data, [i]), builder.sub(n, i)
                add(totals[0], llvm.load_some(builder, place, left, LANES))
            a, b, c, d = (builder.load(total) for total in totals)
            return llvm.sum_lanes(builder, builder.fadd(builder.fadd(a, b), builder.fadd(c, d)))

        return types.float32(x, types.float32), build

    return sum_of


def _if_from(builder: ir.IRBuilder, numbers: Any, bounds: Any, values: Any) -> Any:
    """Return the values where numbers are at least the bounds, else 0."""
    zero = llvm.splat_constant(F32, 0.0, LANES)
    return builder.select(builder.fcmp_ordered(">=", numbers, bounds), values, zero)


# The sum of the numbers that are at least the bound, and how many these are.
sum_from = _sum_of(lambda builder, x, bounds: _if_from(builder, x, bounds, x))
count_from = _sum_of(lambda builder, x, bounds: _if_from(builder, x, bounds, llvm.splat_constant(F32, 1.0, LANES)))


@intrinsic
def largest_if_finite(typing_context: Any, x: Any) -> Any:
    """Return the largest number of x (n,), float32 and contiguous, or NaN if any is NaN or infinite."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        array = context.make_array(x)(context, builder, args[0])
        (n,) = cgutils.unpack_tuple(builder, array.shape)
        step, zero = 4 * LANES, llvm.splat_constant(F32, 0.0, LANES)
        n_whole = builder.mul(builder.udiv(n, i64(step)), i64(step))
        largest = llvm.variables(builder, [llvm.splat_constant(F32, -math.inf, LANES)] * 4)
        # Times 0, which makes 0, or NaN of what is not finite.
        zeros = llvm.variables(builder, [zero] * 4)

        def take(most: Any, null: Any, numbers: Any, times: Any) -> None:
            before = builder.load(most)
            builder.store(builder.select(builder.fcmp_ordered(">", numbers, before), numbers, before), most)
            builder.store(builder.fadd(builder.load(null), builder.fmul(numbers, times)), null)

        with cgutils.for_range_slice(builder, i64(0), n_whole, i64(step), I64) as (i, _):
            for number, variables in enumerate(zip(largest, zeros, strict=True)):
                place = builder.gep(array.data, [builder.add(i, i64(number * LANES))])
                take(*variables, llvm.load_vector(builder, place, F32, LANES), zero)
        name = f"llvm.vector.reduce.fmax.v{LANES}f32"
        (most,) = llvm.variables(builder, [ir.Constant(F32, -math.inf)])
        (null,) = llvm.variables(builder, [ir.Constant(F32, 0.0)])
        for vectors in zip(largest, zeros, strict=True):
            lanes, sums = (builder.load(variable) for variable in vectors)
            before, value = builder.load(most), llvm.call(builder, name, F32, (lanes,))
            builder.store(builder.select(builder.fcmp_ordered(">", value, before), value, before), most)
            builder.store(builder.fadd(builder.load(null), llvm.sum_lanes(builder, sums)), null)
        with cgutils.for_range_slice(builder, n_whole, n, i64(1), I64) as (i, _):
            take(most, null, builder.load(builder.gep(array.data, [i])), ir.Constant(F32, 0.0))
        return builder.fadd(builder.load(most), builder.load(null))

    return types.float32(x), build


@intrinsic
def lanes_from(typing_context: Any, x: Any, first: Any, bound: Any) -> Any:
    """Return an integer with a bit for each of 16 numbers of x from `first` on, set if it is at least the bound."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        data = context.make_array(x)(context, builder, args[0]).data
        numbers = llvm.load_vector(builder, builder.gep(data, [args[1]]), F32, LANES)
        reached = builder.fcmp_ordered(">=", numbers, llvm.splat(builder, args[2], LANES))
        return builder.zext(builder.bitcast(reached, ir.IntType(LANES)), I64)

    return types.int64(x, types.int64, types.float32), build


@intrinsic
def lowest_bit(typing_context: Any, bits: Any) -> Any:
    """Return the number of the lowest bit that is set, of an integer that is not 0."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), build
