"""Attention over KV caches: queries of one position, of a prompt, or of many sequences, with the same sums for all.

A context is cut into pieces of PIECE positions, always the same ones. For each piece a query gets the largest score,
the sum of the powers, and the sum of the values times the powers; then pieces are joined from the first to the last,
as an online softmax does (https://arxiv.org/abs/2205.14135). Every sum runs over the positions, or the components, one
after the other. So a position has the same result, bit for bit, whether it is decoded or read with a prompt, alone or
among others, by one thread or many.

Work is cut into items: a key-value head, a run of neighbouring positions of a sequence, and one piece of its context,
or all of them if there are more than FEW positions. The query heads that share a head's keys read them together. A pass
has the runs first, and then single positions, the last or only new ones of their sequences.

Keys lie in the cache with 16 positions side by side, values with their components side by side (see kv_kinds.py). So
both steps are the same loop, `add_combinations`: several rows of numbers meet vectors of 16, which are read once for
all rows. Bfloat16 and int8 are widened to float32 in registers for a few queries, in memory for many.
"""

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import float32, types
from numba.core import cgutils
from numba.extending import intrinsic

from llamalet.aligned import aligned_zeros
from llamalet.kernels import llvm, simd
from llamalet.kernels.by_address import by_address_inside
from llamalet.kernels.jit import inner_kernel, loop_kernel
from llamalet.kernels.kv_slots import (
    AHEAD,
    BF16_KIND,
    F32_KIND,
    Q8_KIND,
    bfloat16s_at,
    int8s_at,
    keep_key,
    keep_value,
    kept_bytes,
    place_of_keys,
    place_of_values,
    widen,
)
from llamalet.kernels.layers import FLOAT_BYTES, address_of_row, floats_at
from llamalet.kernels.llvm import F32, I64, Table, i64
from llamalet.kernels.powers import write_powers
from llamalet.kernels.shared import shared_kernel
from llamalet.kv_kinds import LANES

PIECE = 256
"""Positions of a context whose results are joined as one."""
RUN = 32
"""Positions of a sequence that read a piece together, at most."""
FEW = 16
"""Up to this many positions a pass cuts its contexts into pieces that different threads may take."""
ROWS, BLOCKS = (8, 2) if simd.instruction_path() == "avx512vnni" else (4, 1)
"""Queries that meet the same vectors at once, and these vectors: as many as the registers hold sums."""


LINE = 8
"""At least ROWS, so that each thread has cache lines of its own for them."""


@by_address_inside
class ContextSpace(NamedTuple):
    """The memory of attention, float32. W is D filled up to a multiple of 16.

    mixed: for each query (position, head) and part of its context, the sum of the values times their powers (n, W).
    sums: for the same, the largest score, and the sum of the powers (n, 2).
    components: int64 (ROWS,), D.
    counts: for each thread, how many positions of a piece each of ROWS queries sees, int64 (threads, LINE).
    queries: these queries (threads, ROWS, D).
    keys: a piece (threads, PIECE / 16 * D, 16).
    values: (threads, PIECE, W).
    scores: of the queries for the piece, then the powers (threads, ROWS, PIECE).
    tile: what goes into mixed (threads, ROWS, W).
    tile_sums: what goes into sums (threads, LINE, 2).
    """

    mixed: Any
    sums: Any
    components: Any
    counts: Any
    queries: Any
    keys: Any
    values: Any
    scores: Any
    tile: Any
    tile_sums: Any


def new_context_space(n_positions: int, n_heads: int, head_dim: int, capacity: int, threads: int) -> ContextSpace:
    """Return memory for passes over up to n_positions new positions, in caches of up to `capacity`."""
    width = -(-head_dim // LANES) * LANES
    n = n_heads * max(n_positions, min(n_positions, FEW) * -(-capacity // PIECE))

    def zeros(*shape: int) -> Any:
        return aligned_zeros(shape, np.float32)

    return ContextSpace(
        mixed=zeros(n, width),
        sums=zeros(n, 2),
        components=np.full(ROWS, head_dim),
        counts=aligned_zeros((threads, LINE), np.int64),
        queries=zeros(threads, ROWS, head_dim),
        keys=zeros(threads, PIECE // LANES * head_dim, LANES),
        values=zeros(threads, PIECE, width),
        scores=zeros(threads, ROWS, PIECE),
        tile=zeros(threads, ROWS, width),
        tile_sums=zeros(threads, LINE, 2),
    )


class Run(NamedTuple):
    """The queries of neighbouring positions that share a key-value head, a position's after each other.

    first: the number of the first among all queries.
    size: how many they are.
    group: how many of a position.
    step: queries from a position to the next, H.
    n_parts: rows of space.mixed for each query.
    part: which of them gets a piece's result.
    join_it: whether the result is to be joined to what is there.
    """

    first: int
    size: int
    group: int
    step: int
    n_parts: int
    part: int
    join_it: bool


# -- a pass -----------------------------------------------------------------------------------------------------------


@shared_kernel
def attend(
    q_heads: Any, k: Any, v: Any, slots: Any, count: int, runs: Any, n_runs: int, layer: int, n_heads: int,
    space: Any, block: int, n_blocks: int, thread: int,
) -> None:  # fmt: skip
    """Do a share of a pass's items. `finish` makes results of them when all are done.

    Args:
        q_heads: all queries (T * H, D).
        k: the new keys (T, G * D). Those of single positions are put into the caches here; `kv_slots.keep_prompt` has
            done so with the others.
        v: the new values (T, G * D).
        slots: CACHE_SLOT (T,).
        count: number of positions, T.
        runs: the first position of each run, at most RUN positions long, and then the first single one.
        n_runs: number of runs.
        layer: number of the layer.
        n_heads: H.
        space: ContextSpace.
        block: which share.
        n_blocks: number of shares.
        thread: number of the thread.
    """
    head_dim, n_kv_heads = q_heads.shape[1], k.shape[1] // q_heads.shape[1]
    n_parts, group, n_in_runs = count_parts(slots, count), n_heads // n_kv_heads, runs[n_runs]
    n_places, n_items = n_runs + count - n_in_runs, n_kv_heads * n_parts
    work = 0
    for place in range(n_places):
        work += work_of(place, slots, runs, n_runs, n_parts) * n_items
    first_item = item_at(work * block // n_blocks, n_places, n_items, slots, runs, n_runs, n_parts)
    last_item = item_at(work * (block + 1) // n_blocks, n_places, n_items, slots, runs, n_runs, n_parts)
    # All of them first: reading what has just been written would wait for it.
    for item in range(max(first_item, n_runs * n_items), last_item):
        part, head, place = parts_of_item(item, n_parts, n_kv_heads)
        t = n_in_runs + place - n_runs
        if part == min(n_parts - 1, slots[t].position // PIECE):
            columns = slice(head * head_dim, (head + 1) * head_dim)
            keep_key(slots[t], layer * n_kv_heads + head, k[t, columns])
            keep_value(slots[t], layer * n_kv_heads + head, v[t, columns])
    for item in range(first_item, last_item):
        part, head, place = parts_of_item(item, n_parts, n_kv_heads)
        t = runs[place] if place < n_runs else n_in_runs + place - n_runs
        n = runs[place + 1] - t if place < n_runs else 1
        slot, cached = slots[t], layer * n_kv_heads + head
        n_pieces = slots[t + n - 1].position // PIECE + 1
        first, last = (part, min(part + 1, n_pieces)) if n_parts > 1 else (0, n_pieces)
        for piece in range(first, last):
            start = piece * PIECE
            length = min(PIECE, slots[t + n - 1].position + 1 - start)
            join_it = n_parts == 1 and piece > 0  # to the pieces before; otherwise it has a row of its own
            queries = Run(t * n_heads + head * group, n * group, group, n_heads, n_parts, part, join_it)
            attend_piece(q_heads, queries, slot, cached, start, length, space, thread)


@inner_kernel
def work_of(place: int, slots: Any, runs: Any, n_runs: int, n_parts: int) -> int:
    """Return about how much work an item has: positions times pieces.

    A pass has a place for each run, then one for each single position.
    """
    first = runs[place] if place < n_runs else runs[n_runs] + place - n_runs
    n = runs[place + 1] - first if place < n_runs else 1
    return n if n_parts > 1 else n * (slots[first + n - 1].position // PIECE + 1)


@inner_kernel
def item_at(work: int, n_places: int, n_items: int, slots: Any, runs: Any, n_runs: int, n_parts: int) -> int:
    """Return the item before whose end so much work has been done, counted from the first one; a place has n_items."""
    for place in range(n_places):
        each = work_of(place, slots, runs, n_runs, n_parts)
        if work < each * n_items:
            return place * n_items + work // each
        work -= each * n_items
    return n_places * n_items


@inner_kernel
def parts_of_item(item: int, n_parts: int, n_kv_heads: int) -> Any:
    """Return an item's part of the context, its head, and its place (`work_of`); the parts of a head are neighbours."""
    return item % n_parts, item // n_parts % n_kv_heads, item // n_parts // n_kv_heads


@shared_kernel
def finish(slots: Any, count: int, n_heads: int, head_dim: int, space: Any, out: Any, first: int, last: int) -> None:
    """Join the parts of positions first..last; write the means of the values to out (T, H * D)."""
    n_parts = count_parts(slots, count)
    scale = float32(1) / np.sqrt(float32(head_dim))
    for t in range(first, last):
        n = slots[t].position // PIECE + 1 if n_parts > 1 else 1
        for head in range(n_heads):
            row = (t * n_heads + head) * n_parts
            for part in range(row + 1, row + n):
                join(space.mixed, space.sums, row, space.mixed[part], space.sums[part, 0], space.sums[part, 1], scale)
            factor = float32(1) / space.sums[row, 1]
            scale_into(space.mixed[row], factor, out[t, head * head_dim : (head + 1) * head_dim])


@inner_kernel
def count_parts(slots: Any, count: int) -> int:
    """Return how many results each query has room for: one for each piece of the longest context, or one for all."""
    n = 1
    if count <= FEW:
        for t in range(count):
            n = max(n, slots[t].position // PIECE + 1)
    return n


# -- a run of positions and a piece -----------------------------------------------------------------------------------


@inner_kernel
def attend_piece(
    q_heads: Any, run: Any, slot: Any, cached: int, start: int, length: int, space: Any, thread: int
) -> None:
    """Let a run of positions attend to a piece of their context.

    Many queries meet a piece that has been widened to float32 as a whole. A few widen each vector as they meet it.

    Args:
        q_heads: all queries (T * H, D).
        run: Run.
        slot: the CACHE_SLOT of its first position.
        cached: number of the key-value head in the cache.
        start: the piece's first position.
        length: positions of the piece that the last position of the run sees.
        space: ContextSpace.
        thread: number of the thread.
    """
    head_dim, width, kind = q_heads.shape[1], space.values.shape[2], slot.kind
    key, value = place_of_keys(slot, cached, head_dim, start), place_of_values(slot, cached, width, start)
    keys, values = slot.keys + key * kept_bytes(kind), slot.values + value * kept_bytes(kind)
    if kind != F32_KIND and run.size > ROWS:
        widen(keys, (length + LANES - 1) // LANES * LANES * head_dim, kind, space.keys[thread])
        widen(values, length * width, kind, space.values[thread])
        keys, values = address_of_row(space.keys[thread], 0), address_of_row(space.values[thread], 0)
        kind = F32_KIND
    scale = float32(1) / np.sqrt(float32(head_dim))
    # Positions before the piece do not see it.
    for row in range(max(0, start - slot.position) * run.group, run.size, ROWS):
        n_rows, position = min(ROWS, run.size - row), slot.position - start
        load_queries(q_heads, run, row, n_rows, position, length, space, thread)
        score(n_rows, kind, keys, space, thread)
        soften(n_rows, slot, cached, start, scale, space, thread)
        mix(n_rows, kind, values, length, space, thread)
        for r in range(n_rows):
            deliver(run, row + r, space.tile[thread, r], space.tile_sums[thread, r], space, scale)


@inner_kernel
def query_number(run: Any, row: int) -> int:
    """Return the number among all queries of query `row` of a run."""
    return run.first + row // run.group * run.step + row % run.group


@inner_kernel
def load_queries(
    q_heads: Any, run: Any, row: int, n_rows: int, position: int, length: int, space: Any, thread: int
) -> None:
    """Copy some queries, count how many positions of a piece each sees, and clear their sums.

    `position` is that of the run, counted from the beginning of the piece.
    """
    for r in range(n_rows):
        number, seen = query_number(run, row + r), position + (row + r) // run.group + 1
        space.counts[thread, r] = min(length, seen)
        scale_into(q_heads[number], float32(1), space.queries[thread, r])
    for r in range(n_rows, ROWS):
        space.counts[thread, r] = space.counts[thread, n_rows - 1]
    clear(space.scores[thread], n_rows, (space.counts[thread, ROWS - 1] + LANES - 1) // LANES * LANES)
    clear(space.tile[thread], n_rows, space.tile.shape[2])


@inner_kernel
def score(n_rows: int, kind: int, keys: int, space: Any, thread: int) -> None:
    """Write the products of the queries and a piece's keys to scores, with some of keys that a query does not see.

    `keys` is their address, and `kind` how they are kept there.
    """
    head_dim, n_blocks = space.queries.shape[2], (space.counts[thread, ROWS - 1] + LANES - 1) // LANES
    components, lanes = space.components, space.keys.shape[2]  # all of each query
    combine_kept(
        n_rows, space.queries[thread], components, kind, keys, n_blocks * head_dim, lanes, lanes, head_dim * lanes,
        n_blocks, space.scores[thread],
    )  # fmt: skip


@inner_kernel
def mix(n_rows: int, kind: int, values: int, length: int, space: Any, thread: int) -> None:
    """Add the sum of a piece's values times their powers to the tile; `values` is their address."""
    width, lanes = space.tile.shape[2], space.keys.shape[2]
    combine_kept(
        n_rows, space.scores[thread], space.counts[thread], kind, values, length, width, width, lanes, width // lanes,
        space.tile[thread],
    )  # fmt: skip


@inner_kernel
def soften(n_rows: int, slot: Any, cached: int, start: int, scale: float, space: Any, thread: int) -> None:
    """Turn scores into powers, and keep the largest score and the sum of the powers of each query."""
    for r in range(n_rows):
        row = space.scores[thread, r, : space.counts[thread, r]]
        if slot.kind == Q8_KIND:
            multiply(row, slot.key_scales + (cached * slot.capacity + start) * FLOAT_BYTES)
        largest = simd.largest(row)
        space.tile_sums[thread, r, 0] = largest
        if largest == -np.inf:  # all are: their powers are zero, and not NaN
            largest = float32(0)
        space.tile_sums[thread, r, 1] = write_powers(row, largest, scale, float32(1), row)
        if slot.kind == Q8_KIND:
            multiply(row, slot.value_scales + (cached * slot.capacity + start) * FLOAT_BYTES)


@inner_kernel
def deliver(run: Any, row: int, tile: Any, sums: Any, space: Any, scale: float) -> None:
    """Store a query's result for a piece in a row of space.mixed, or join it to those of the pieces before."""
    target = query_number(run, row) * run.n_parts + run.part
    if run.join_it:
        join(space.mixed, space.sums, target, tile, sums[0], sums[1], scale)
    else:
        space.sums[target, 0], space.sums[target, 1] = sums[0], sums[1]
        scale_into(tile, float32(1), space.mixed[target])


@loop_kernel
def join(mixed: Any, sums: Any, row: int, more: Any, largest: float, total: float, scale: float) -> None:
    """Join the result of the next piece to a row of those before; powers are taken from the largest score of both."""
    if largest == -np.inf:  # all powers are zero, or NaN
        sums[row, 1] += total
        return
    both = max(sums[row, 0], largest)
    old, new = simd.exp((sums[row, 0] - both) * scale), simd.exp((largest - both) * scale)
    sums[row, 0], sums[row, 1] = both, sums[row, 1] * old + total * new
    for i in range(len(more)):
        mixed[row, i] = mixed[row, i] * old + more[i] * new


@loop_kernel
def scale_into(x: Any, factor: float, out: Any) -> None:
    """Write x times a factor to out (n,), at most as long as x."""
    for i in range(len(out)):
        out[i] = x[i] * factor


@loop_kernel
def clear(table: Any, rows: int, cols: int) -> None:
    """Set the first columns of the first rows to zero."""
    for row in range(rows):
        for i in range(cols):
            table[row, i] = float32(0)


@loop_kernel
def multiply(x: Any, scales: int) -> None:
    """Multiply x (n,) by the float32 at an address."""
    factors = floats_at(scales, 1, len(x))
    for i in range(len(x)):
        x[i] *= factors[0, i]


# -- the sums ---------------------------------------------------------------------------------------------------------


@inner_kernel
def combine_kept(
    n_rows: int, weights: Any, counts: Any, kind: int, address: int, length: int, width: int, term_step: int,
    block_step: int, n_blocks: int, out: Any,
) -> None:  # fmt: skip
    """Do what `combine` does with vectors (length, width) at an address, which are kept as `kind` says.

    Numba compiles a function once more for arguments that are constants, so LANES is not written where this is called.
    """
    if kind == F32_KIND:
        vectors = floats_at(address, length, width)
        combine(n_rows, weights, counts, vectors, term_step, block_step, n_blocks, out)
    elif kind == BF16_KIND:
        vectors_16 = bfloat16s_at(address, length, width)
        combine(n_rows, weights, counts, vectors_16, term_step, block_step, n_blocks, out)
    else:
        vectors_8 = int8s_at(address, length, width)
        combine(n_rows, weights, counts, vectors_8, term_step, block_step, n_blocks, out)


@inner_kernel
def combine(
    n_rows: int, weights: Any, counts: Any, vectors: Any, term_step: int, block_step: int, n_blocks: int, out: Any
) -> None:
    """Do what `add_combinations` does with the first rows, at most ROWS, and the first n_blocks blocks.

    Rows up to the next number for which there is code may be added to, too.
    """
    b = 0
    if n_rows == 1:
        while b + 4 <= n_blocks:
            add_combinations(weights, 1, counts, vectors, term_step, block_step, b, 4, out)
            b += 4
        if b + 2 <= n_blocks:
            add_combinations(weights, 1, counts, vectors, term_step, block_step, b, 2, out)
            b += 2
        if b < n_blocks:
            add_combinations(weights, 1, counts, vectors, term_step, block_step, b, 1, out)
    elif n_rows <= 4:
        while b + BLOCKS <= n_blocks:
            add_combinations(weights, 4, counts, vectors, term_step, block_step, b, BLOCKS, out)
            b += BLOCKS
        if b < n_blocks:
            add_combinations(weights, 4, counts, vectors, term_step, block_step, b, 1, out)
    else:
        while b + BLOCKS <= n_blocks:
            add_combinations(weights, ROWS, counts, vectors, term_step, block_step, b, BLOCKS, out)
            b += BLOCKS
        if b < n_blocks:
            add_combinations(weights, ROWS, counts, vectors, term_step, block_step, b, 1, out)


@intrinsic(prefer_literal=True)
def add_combinations(
    typing_context: Any, weights: Any, rows: Any, counts: Any,
    vectors: Any, term_step: Any, block_step: Any, block: Any, blocks: Any, out: Any,
) -> Any:  # fmt: skip
    """Add the sum over k < counts[row] of weights[row, k] * v(k, block) to out[row, 16 * block:], for the first rows.

    A block's vector of a term is the 16 numbers of `vectors` from element k * term_step + block * block_step on. Every
    lane of every result is a sum of its own, from the first term to the last, whatever else is computed in the call.

    Args:
        typing_context: numba's.
        weights: float32 (n, width).
        rows: how many of its first rows; a constant.
        counts: int64 (rows or more,), which must not decrease.
        vectors: contiguous; float32, or int8, or uint16, the bits of bfloat16.
        term_step: elements from a term to the next.
        block_step: elements from a block to the next.
        block: the first block.
        blocks: how many; a constant.
        out: float32 (n, width).
    """
    n_rows, n_blocks = rows.literal_value, blocks.literal_value

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        table, target = Table(context, builder, weights, args[0]), Table(context, builder, out, args[8])
        data = context.make_array(vectors)(context, builder, args[3]).data
        count_data = context.make_array(counts)(context, builder, args[2]).data
        numbers = [builder.add(args[6], i64(i)) for i in range(n_blocks)]
        bases = [builder.gep(data, [builder.mul(number, args[5])]) for number in numbers]
        columns = [builder.mul(number, i64(LANES)) for number in numbers]
        w_rows = [table.row(i64(row)) for row in range(n_rows)]
        places = [
            builder.bitcast(builder.gep(target.row(i64(row)), [column]), ir.VectorType(F32, LANES).as_pointer())
            for row in range(n_rows)
            for column in columns
        ]
        totals = llvm.variables(builder, [builder.load(place, align=FLOAT_BYTES) for place in places])
        # Memory is fetched that the next blocks, or the next terms, will read.
        narrow, next_blocks = vectors.dtype != types.float32, builder.mul(args[5], i64(n_blocks))
        terms_ahead = i64(8 * AHEAD // vectors.dtype.bitwidth)
        ahead = builder.select(builder.icmp_signed(">", next_blocks, terms_ahead), next_blocks, terms_ahead)
        n_terms = [builder.load(builder.gep(count_data, [i64(row)])) for row in range(n_rows)]

        def add_term(k: Any, *, all_rows: bool) -> None:
            offset = builder.mul(k, args[4])
            places_of_term = [builder.gep(base, [offset]) for base in bases]
            for place in places_of_term if narrow else ():
                llvm.prefetch(builder, builder.gep(place, [ahead]))
            lanes = [llvm.load_floats(builder, place, LANES) for place in places_of_term]
            before = [builder.load(total) for total in totals]
            factors = [llvm.splat(builder, builder.load(builder.gep(row, [k])), LANES) for row in w_rows]
            llvm.add_products(builder, totals, factors, lanes)
            for i in range(0 if all_rows else len(totals)):
                has_term = builder.icmp_signed("<", k, n_terms[i // n_blocks])
                builder.store(builder.select(has_term, builder.load(totals[i]), before[i]), totals[i])

        with cgutils.for_range_slice(builder, i64(0), n_terms[0], i64(1), I64) as (k, _):
            add_term(k, all_rows=True)
        if n_rows > 1:
            with cgutils.for_range_slice(builder, n_terms[0], n_terms[-1], i64(1), I64) as (k, _):
                add_term(k, all_rows=False)
        for place, total in zip(places, totals, strict=True):
            builder.store(builder.load(total), place, align=FLOAT_BYTES)
        return context.get_dummy_value()

    ints = types.intp
    arguments = weights, rows, counts, vectors, ints, ints, ints, blocks, out
    return types.none(*arguments), build
