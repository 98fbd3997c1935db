"""The fast forward pass over a KV cache: one compiled call a token, a batch, or a chunk of a prompt, on all cores."""

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
from numba import types
from numpy.typing import NDArray

from llamalet.aligned import address_of
from llamalet.checks import token_ids
from llamalet.config import rope_tables
from llamalet.cores import thread_count
from llamalet.errors import UsageError
from llamalet.forward_pass import POSITIONS_PER_PASS
from llamalet.kernels import bfloat16, stages
from llamalet.kernels import cache as kernel_cache
from llamalet.kernels.attention import RUN, new_context_space
from llamalet.kernels.kv_slots import CACHE_SLOT, slot_of
from llamalet.kernels.layers import Weights, stack_weights
from llamalet.kernels.losses import Losses
from llamalet.kernels.ops import new_quantized_rows
from llamalet.kernels.sampling import TokenChooser
from llamalet.kernels.shared import SECOND_PROCESS
from llamalet.kernels.split_rows import new_scratch, new_split_rows
from llamalet.kernels.stages import JOB, RopeTables, Workspace
from llamalet.kernels.threads import ThreadTeam, new_words
from llamalet.kv_cache import KVCache
from llamalet.kv_kinds import kind_for
from llamalet.model_file.quantize import bits_of
from llamalet.model_file.reader import ModelFile
from llamalet.reference import Array, Tokens

# A stage has this many blocks for each thread, so that a late thread still finds one, or more where a block would be
# larger than BLOCK_BYTES. Not many: memory is read fastest in long runs.
BLOCKS_PER_THREAD = 2
BLOCK_BYTES = 1 << 20

# Late positions of a prompt attend to more than early ones, so attention needs more blocks.
ATTEND_BLOCKS_PER_THREAD = 8


class Transformer:
    """A model file with a KV cache, on compiled kernels.

    Args:
        file: the model; its weights are used where they are mapped, not copied.
        threads: number of threads; None takes one for each physical core, see `cores.thread_count`.
        kv: the kind of its KV caches, a name of KINDS; see `kv_kinds.kind_for`.

    Raises:
        ConfigError: if the number of threads is not positive.
    """

    def __init__(self, file: ModelFile, threads: int | None = None, kv: str | None = None) -> None:
        self.config = file.config
        self.kv = kind_for(file.tensors["tok_embeddings"], kv)
        self.tensors = file.tensors  # keeps the memory alive that the stacked weights refer to
        self._weights = stack_weights(file)
        self._bits = bits_of(file.tensors["tok_embeddings"])
        self._on_tiles = self._bits == 16 and bfloat16.instructions() == "amx"
        self._n_threads = thread_count(threads)
        self.choose, self.losses = TokenChooser(self.config.vocab_size), Losses()
        self._begin()
        self._team = ThreadTeam(compile_work(self._arguments_for(1, 0), self.choose.compile), self._n_threads)
        self.choose.compile()
        weakref.finalize(self, self._team.stop)
        _alive.add(self)

    def _begin(self) -> None:
        """Create the memory of the kernels, for one caller at a time."""
        self._lock = threading.Lock()
        self.choose.begin()
        self._rope_tables = RopeTables(*rope_tables(self.config, 0))
        self._arguments: dict[int, tuple[Weights, Workspace, RopeTables]] = {}

    def new_cache(self, capacity: int = 0) -> KVCache:
        """Return an empty KV cache with memory for `capacity` positions; it grows when they are used up."""
        return KVCache(self.config, capacity, self.kv)

    def decode(self, cache: KVCache, token: int) -> Array:
        """Append one token to the cache; return the logits after it: float32 (V,).

        Raises:
            UsageError: if it is not in the vocabulary, or the context is full.
        """
        ids = token_ids((token,), self.config.vocab_size)
        cache.reserve(cache.length + 1)
        return self._run([cache], ids, 1)[0]

    def decode_batch(self, caches: Sequence[KVCache], tokens: Sequence[int]) -> Array:
        """Append one token to each of B caches; return the logits after each: float32 (B, V), as `decode` alone would.

        Raises:
            UsageError: if there are no tokens or not one for each cache, two caches are the same, a token is not in the
                vocabulary, or a context is full; then nothing has been appended.
        """
        ids = token_ids(tokens, self.config.vocab_size)
        check_caches(caches, "tokens", len(ids))
        for cache in caches:
            cache.reserve(cache.length + 1)
        parts = [slice(first, first + POSITIONS_PER_PASS) for first in range(0, len(ids), POSITIONS_PER_PASS)]
        logits = [self._run(caches[part], ids[part], POSITIONS_PER_PASS) for part in parts]
        return logits[0] if len(logits) == 1 else np.concatenate(logits)

    def extend_batch(self, caches: Sequence[KVCache], pieces: Sequence[Tokens]) -> list[Array]:
        """Append some tokens (T,), at least one, to each of B caches, in one pass: the weights are read once for all.

        Returns:
            The logits after each piece, those that `prefill` gives: float32 (V,).

        Raises:
            UsageError: as decode_batch, or if there are more than POSITIONS_PER_PASS tokens; then nothing has been
                appended.
        """
        check_caches(caches, "pieces", len(pieces))
        ids = [token_ids(piece, self.config.vocab_size) for piece in pieces]
        lengths = [len(piece) for piece in ids]
        if sum(lengths) > POSITIONS_PER_PASS:
            raise UsageError(f"{sum(lengths)} tokens for a pass: it takes up to {POSITIONS_PER_PASS}")
        for cache, length in zip(caches, lengths, strict=True):
            cache.reserve(cache.length + length)
        # Logits are those of the last positions: the last of the longest piece, which is read as a whole, and the last
        # of each other piece, as a single position.
        longest = int(np.argmax(lengths))
        others = [number for number in range(len(ids)) if number != longest]
        runs = [(caches[number], ids[number][:-1]) for number in others if lengths[number] > 1]
        runs.append((caches[longest], ids[longest]))
        singles = [(caches[number], ids[number][-1:]) for number in others]
        logits = self._run(
            [cache for cache, _ in (*runs, *singles)], np.concatenate([piece for _, piece in (*runs, *singles)]),
            len(ids), [len(piece) for _, piece in runs], [lengths[number] - 1 for number in others],
        )  # fmt: skip
        rows = list(logits[1:])
        rows.insert(longest, logits[0])
        return rows

    def prefill(self, cache: KVCache, tokens: Tokens) -> Array:
        """Append tokens (T,), at least one, to the cache; return the logits after the last one: float32 (V,).

        Raises:
            UsageError: if there are no tokens, one is not in the vocabulary, or they are more than the context holds.
        """
        return self._append(cache, tokens, all_logits=False)[0]

    def extend(self, cache: KVCache, tokens: Tokens) -> Array:
        """Append tokens (T,), at least one; return the logits after each, those that `decode` gives: float32 (T, V).

        Raises:
            UsageError: as prefill.
        """
        return self._append(cache, tokens, all_logits=True)

    def logits(self, tokens: Tokens) -> Array:
        """Return the logits after each of the tokens (T,), computed from an empty cache: float32 (T, V).

        Raises:
            UsageError: as prefill.
        """
        ids = token_ids(tokens, self.config.vocab_size)
        return self._append(self.new_cache(len(ids)), ids, all_logits=True)

    def _append(self, cache: KVCache, tokens: Tokens, *, all_logits: bool) -> Array:
        """Append tokens to the cache, some at a time; return the logits after each of them, or after the last one."""
        ids = token_ids(tokens, self.config.vocab_size)
        cache.reserve(cache.length + len(ids))
        if len(ids) <= POSITIONS_PER_PASS:
            return self._run([cache], ids, len(ids) if all_logits else 1, [len(ids)])
        *chunks, last = np.split(ids, range(POSITIONS_PER_PASS, len(ids), POSITIONS_PER_PASS))
        logits = [self._run([cache], chunk, len(chunk) if all_logits else 0, [len(chunk)]) for chunk in chunks]
        logits.append(self._run([cache], last, len(last) if all_logits else 1, [len(last)]))
        return np.concatenate(logits) if all_logits else logits[-1]

    def _run(
        self, caches: Sequence[KVCache], ids: NDArray[np.int64], n_logits: int,
        lengths: Sequence[int] = (), later: Sequence[int] = (),
    ) -> Array:  # fmt: skip
        """Append at most POSITIONS_PER_PASS tokens: some to each of the first caches, one to each of the others.

        Args:
            caches: all with room for the new positions; one may come twice, first with many tokens.
            ids: all tokens (T,), cache by cache.
            n_logits: how many logits at most are wanted.
            lengths: how many tokens each of the first caches gets.
            later: for each of the others, how many tokens its cache gets earlier in this pass; empty if none does.

        Returns:
            The logits after the last `n_logits` tokens.
        """
        c = self.config
        for cache in caches:  # the kernels do not check the memory they are given
            n_layers, n_kv_heads, _, head_dim, _ = cache.keys.shape
            if (n_layers, n_kv_heads, head_dim) != (c.n_layers, c.n_kv_heads, c.head_dim):
                raise UsageError(
                    f"a cache of {n_layers} layers, {n_kv_heads} heads of {head_dim} for a model of "
                    f"{c.n_layers}, {c.n_kv_heads} of {c.head_dim}: it is another model's"
                )
        count = len(ids)
        logits = np.empty((min(n_logits, count), c.vocab_size), np.float32)
        with self._lock:
            capacity = max(cache.capacity for cache in caches)
            arguments = self._arguments_for(1 if count == 1 else POSITIONS_PER_PASS, capacity)
            _, space, _ = arguments
            space.tokens[:count] = ids
            slots, starts, n = space.cache_slots[:count], [0], 0
            for cache, length in zip(caches, lengths, strict=False):
                slots[n : n + length] = slot_of(cache)
                slots["position"][n : n + length] += np.arange(length)
                # Runs end where blocks of keys do, of which many are kept at once.
                starts += [*range(n + RUN - cache.length % RUN, n + length, RUN), n + length]
                n += length
            slots[n:] = [slot_of(cache) for cache in caches[len(lengths) :]]
            if later:
                slots["position"][n:] += later
            space.runs[: len(starts)] = starts
            space.job[0] = count, len(starts) - 1, len(logits), address_of(logits)
            self._team.run(arguments)
            for number, cache in enumerate(caches):
                cache.length += lengths[number] if number < len(lengths) else 1
            return logits

    def _arguments_for(self, n_positions: int, capacity: int) -> tuple[Weights, Workspace, RopeTables]:
        """Return the arguments of the kernels for n_positions new positions, in caches of up to `capacity`.

        The tuple stays the same until a larger cache needs more memory.
        """
        if capacity > len(self._rope_tables.cos):
            self._rope_tables = RopeTables(*rope_tables(self.config, capacity))
            self._arguments = {}
        if n_positions not in self._arguments:
            space = self._new_workspace(n_positions, len(self._rope_tables.cos))
            self._arguments[n_positions] = self._weights, space, self._rope_tables
        return self._arguments[n_positions]

    def _new_workspace(self, n_positions: int, capacity: int) -> Workspace:
        """Return memory for passes over up to n_positions new positions, in caches of up to `capacity`."""
        c, group_size = self.config, self._weights.group_size
        q_dim = c.n_heads * c.head_dim

        def zeros(*shape: int) -> Array:
            return np.zeros(shape, np.float32)

        def activations(x: Array) -> Any:
            if group_size:
                return new_quantized_rows(n_positions, x.shape[1], group_size, self._bits)
            return new_split_rows(n_positions, x.shape[1]) if self._on_tiles else x

        normed, attended, gate = (zeros(n_positions, width) for width in (c.dim, q_dim, c.hidden_dim))
        q = zeros(n_positions, q_dim)
        threads = self._n_threads
        return Workspace(
            job=np.zeros(1, JOB),
            n_blocks=self._count_blocks(n_positions),
            tokens=np.zeros(n_positions, np.int64),
            cache_slots=np.zeros(n_positions, CACHE_SLOT),
            runs=np.zeros(n_positions + 1, np.int64),
            x=zeros(n_positions, c.dim),
            normed=normed,
            q=q,
            q_heads=q.reshape(-1, c.head_dim),
            k=zeros(n_positions, c.kv_dim),
            v=zeros(n_positions, c.kv_dim),
            attended=attended,
            projected=zeros(n_positions, c.dim),
            gate=gate,
            up=zeros(n_positions, c.hidden_dim),
            normed_activations=activations(normed),
            attended_activations=activations(attended),
            hidden_activations=activations(gate),
            context=new_context_space(n_positions, c.n_heads, c.head_dim, capacity, threads),
            scratch=new_scratch(threads, max(c.dim, q_dim, c.hidden_dim) if self._on_tiles else 0),
        )

    def _count_blocks(self, n_positions: int) -> NDArray[np.int64]:
        """Return the number of blocks of each stage of a pass; 0 after the last one."""
        c = self.config
        q_dim = c.n_heads * c.head_dim

        def matrix(rows: int, cols: int) -> int:
            n_bytes = rows * cols * self._bits // 8
            return max(BLOCKS_PER_THREAD * self._n_threads, -(-n_bytes // BLOCK_BYTES))

        n_blocks = {
            stages.QKV: 3 * matrix(q_dim, c.dim),
            stages.ATTEND: ATTEND_BLOCKS_PER_THREAD * self._n_threads,
            stages.ATTENTION_OUTPUT: matrix(c.dim, q_dim),
            stages.GATE_UP: matrix(2 * c.hidden_dim, c.dim),
            stages.DOWN: matrix(c.dim, c.hidden_dim),
            stages.LOGITS: matrix(c.vocab_size, c.dim),
        }
        # The other stages cut the positions. A single one is left to the thread that finished the stage before.
        shares = 1 if n_positions == 1 else BLOCKS_PER_THREAD * self._n_threads
        *layer, final_norm, logits = (n_blocks.get(stage, shares) for stage in range(stages.LOGITS + 1))
        return np.array([*layer * c.n_layers, final_norm, logits, 0])


def check_caches(caches: Sequence[KVCache], what: str, n: int) -> None:
    """Raise a UsageError unless there is a cache of its own for each of n tokens or pieces, at least one."""
    if not 0 < n == len(caches) == len({id(cache) for cache in caches}):
        raise UsageError(f"{n} {what} for {len(caches)} caches: each cache takes one")


_alive = weakref.WeakSet[Transformer]()


def _begin_in_child() -> None:
    """Let transformers compute in a forked process, where another thread's lock and unfinished job would stay."""
    for transformer in _alive:
        transformer._begin()
        transformer._team.begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_in_child)


def compile_work(
    arguments: tuple[Weights, Workspace, RopeTables], meanwhile: Callable[[], None]
) -> Callable[..., None]:
    """Return `stages.work` for arguments of these types, compiled or from the cache.

    `meanwhile` is called if part of it is compiled in a second process, which this one would have to wait for.

    The returned function accepts these types only and does not look at them: finding out the types of so many arrays
    takes numba longer than a small model needs for a token.
    """
    can_share, kinds = kernel_cache.enable(stages.work), [*arguments, new_words(), 0, 0]
    with (
        kernel_cache.without_collecting(),
        SECOND_PROCESS.while_compiling(
            can_share=can_share, at_once=not kernel_cache.holds(stages.work), meanwhile=meanwhile
        ),
    ):
        return stages.work.compile(tuple(map(kind_of, kinds)))


def kind_of(value: Any) -> Any:
    """Return numba's type of an argument: what numba.typeof does, without an import of numpy.ma."""
    if isinstance(value, np.ndarray):
        element = numba.from_dtype(value.dtype)
        return types.Array(element, value.ndim, "C", readonly=not value.flags.writeable, aligned=value.flags.aligned)
    if isinstance(value, tuple):
        return types.BaseTuple.from_types([kind_of(field) for field in value], type(value))
    return types.float32 if isinstance(value, np.float32) else types.int64
