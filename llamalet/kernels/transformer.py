"""The fast forward pass over a KV cache: one compiled call a token, a batch, or a chunk of a prompt, on all cores."""

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from llamalet.config import rope_tables
from llamalet.errors import UsageError
from llamalet.kernels import cache as kernel_cache
from llamalet.kernels import ops
from llamalet.kernels.ops import Angles, PackedMatrix, QuantizedRows, Weights, Workspace
from llamalet.kernels.simd import BLOCK_ROWS, Stack, chunk_dtype, group_dtype, scales_dtype
from llamalet.kernels.threads import Team, new_words, thread_count
from llamalet.kv_cache import KVCache
from llamalet.model_file.quantize import Packed, Quantized, pack
from llamalet.model_file.tensors import ModelFile
from llamalet.reference import Array, Tokens, check_tokens

# Positions that the kernels take through the layers at once.
CHUNK = 128

# A stage has this many blocks for each thread, so that a late thread finds something left to do, or more where a block
# would be larger than BLOCK_BYTES. Not many: memory is read best in long runs.
BLOCKS_PER_THREAD = 2
BLOCK_BYTES = 1 << 20


class Transformer:
    """A model file with a KV cache, on compiled kernels.

    Args:
        file: the model; its weights are used where they are mapped, not copied.
        threads: how many threads compute; None takes one for each physical core, see `team.thread_count`.

    Raises:
        ConfigError: if the number of threads is not positive.
    """

    def __init__(self, file: ModelFile, threads: int | None = None) -> None:
        self.config = file.config
        self._tensors = file.tensors  # keeps alive what the stacked weights are views of
        self._weights = stack_weights(file)
        self._bits = bits_of(file.tensors["tok_embeddings"])
        self._n_threads = thread_count(threads)
        # What the kernels work in, for one caller at a time.
        self._lock = threading.Lock()
        self._angles = Angles(*rope_tables(self.config, 0))
        self._arguments: dict[int, tuple[Weights, Workspace, Angles]] = {}
        self._team = Team(compile_work(self._bind(1, 0)), self._n_threads)
        weakref.finalize(self, self._team.stop)

    def new_cache(self, capacity: int = 0) -> KVCache:
        """Return an empty KV cache with memory for `capacity` positions; it grows when they are used up."""
        return KVCache(self.config, capacity)

    def decode(self, cache: KVCache, token: int) -> Array:
        """Append one token to the cache; return the logits after it: float32 (V,).

        Raises:
            UsageError: if it is not in the vocabulary, or the context is full.
        """
        return self._extend(cache, check_tokens((token,), self.config), 1)[0]

    def decode_batch(self, caches: Sequence[KVCache], tokens: Sequence[int]) -> Array:
        """Append one token to each of B caches; return the logits after each: float32 (B, V), as `decode` alone would.

        Raises:
            UsageError: if there are no tokens or not one for each cache, two caches are the same, a token is not in the
                vocabulary, or a context is full; then nothing has been appended.
        """
        ids = check_tokens(tokens, self.config)
        if len(ids) != len(caches) or len({id(cache) for cache in caches}) != len(caches):
            raise UsageError(f"{len(ids)} tokens for {len(caches)} caches: each cache takes one")
        for cache in caches:
            cache.reserve(cache.length + 1)
        parts = [slice(first, first + CHUNK) for first in range(0, len(ids), CHUNK)]
        logits = [self._run(caches[part], ids[part], CHUNK) for part in parts]
        return logits[0] if len(logits) == 1 else np.concatenate(logits)

    def prefill(self, cache: KVCache, tokens: Tokens) -> Array:
        """Append tokens (T,), at least one, to the cache; return the logits after the last one: float32 (V,).

        Raises:
            UsageError: if there are no tokens, one is not in the vocabulary, or they are more than the context holds.
        """
        *chunks, last = self._chunks(cache, tokens)
        for chunk in chunks:
            self._extend(cache, chunk, 0)
        return self._extend(cache, last, 1)[0]

    def logits(self, tokens: Tokens) -> Array:
        """Return the logits after each of the tokens (T,), on their own: float32 (T, V).

        Raises:
            UsageError: as prefill.
        """
        ids = check_tokens(tokens, self.config)
        cache = self.new_cache(len(ids))
        return np.concatenate([self._extend(cache, chunk, len(chunk)) for chunk in self._chunks(cache, ids)])

    def _chunks(self, cache: KVCache, tokens: Tokens) -> list[NDArray[np.int64]]:
        """Check tokens, make room for all of them and cut them into what the kernels take at once."""
        ids = check_tokens(tokens, self.config)
        cache.reserve(cache.length + len(ids))
        return np.split(ids, range(CHUNK, len(ids), CHUNK))

    def _check_cache(self, cache: KVCache) -> None:
        """Raise a UsageError if a cache is another model's; the kernels take its memory as it is."""
        (n_layers, n_kv_heads, _, head_dim), c = cache.keys.shape, self.config
        if (n_layers, n_kv_heads, head_dim) != (c.n_layers, c.n_kv_heads, c.head_dim):
            raise UsageError(
                f"a cache of {n_layers} layers, {n_kv_heads} heads of {head_dim} for a model of "
                f"{c.n_layers}, {c.n_kv_heads} of {c.head_dim}: it is another model's"
            )

    def _extend(self, cache: KVCache, ids: NDArray[np.int64], n_logits: int) -> Array:
        """Append at most CHUNK tokens to a cache; return the logits after the last `n_logits` of them."""
        cache.reserve(cache.length + len(ids))
        return self._run([cache], ids, n_logits)

    def _run(self, caches: Sequence[KVCache], ids: NDArray[np.int64], n_logits: int) -> Array:
        """Append at most CHUNK tokens to one cache, which has room for them, or one to each of several.

        Returns:
            The logits after the last `n_logits` of them.
        """
        for cache in caches:
            self._check_cache(cache)
        count, one_sequence = len(ids), len(caches) == 1
        logits = np.empty((min(n_logits, count), self.config.vocab_size), np.float32)
        with self._lock:
            arguments = self._bind(1 if count == 1 else CHUNK, max(cache.capacity for cache in caches))
            _, space, _ = arguments
            space.tokens[:count] = ids
            if one_sequence:
                space.places[:count] = _place(caches[0])
                space.places[:count, ops.POSITION] += np.arange(count)
            else:
                space.places[:count] = [_place(cache) for cache in caches]
            space.job[: ops.N_BLOCKS] = count, one_sequence, len(logits), _address(logits)
            self._team.run(arguments)
            for cache in caches:
                cache.length += count // len(caches)
            return logits

    def _bind(self, n_positions: int, capacity: int) -> tuple[Weights, Workspace, Angles]:
        """Return the arguments of the kernels for n_positions new positions, in caches of up to `capacity`.

        They are the same tuple as long as the memory is large enough.
        """
        if capacity > len(self._angles.cos):
            self._angles = Angles(*rope_tables(self.config, capacity))
            self._arguments = {}
        if n_positions not in self._arguments:
            space = self._new_workspace(n_positions, len(self._angles.cos))
            self._arguments[n_positions] = self._weights, space, self._angles
        return self._arguments[n_positions]

    def _new_workspace(self, n_positions: int, capacity: int) -> Workspace:
        """Return memory for passes over up to n_positions new positions, `capacity` with the past ones."""
        c = self.config
        q_dim = c.n_heads * c.head_dim

        def array(width: int) -> Array:
            return np.zeros((n_positions, width), np.float32)

        def operand(x: Array) -> Any:
            group_size = self._weights.group_size
            return new_quantized_rows(n_positions, x.shape[1], group_size, self._bits) if group_size else x

        q, k, v, gate, up = (array(width) for width in (q_dim, c.kv_dim, c.kv_dim, c.hidden_dim, c.hidden_dim))
        normed, attended, projected = array(c.dim), array(q_dim), array(c.dim)
        from_normed = operand(normed)
        operands = {ops.PROJECTION: operand(attended), ops.DOWN: operand(gate)}
        scratch_cols = 0 if self._weights.group_size else max(c.dim, q_dim, c.hidden_dim)
        job = np.zeros(ops.JOB_WORDS, np.int64)
        job[ops.N_BLOCKS :] = self._count_blocks(n_positions)
        return Workspace(
            tokens=np.zeros(n_positions, np.int64),
            places=np.zeros((n_positions, ops.PLACE_WORDS), np.int64),
            x=array(c.dim),
            normed=normed,
            queries=q.reshape(-1, c.head_dim),
            attended=attended,
            scores=np.zeros((c.n_heads, capacity), np.float32),
            lane_scores=np.zeros((c.n_heads, capacity, ops.QUERY_LANES), np.float32),
            lane_queries=np.zeros((c.n_heads, c.head_dim, ops.QUERY_LANES), np.float32),
            scratch=np.zeros((self._n_threads, scratch_cols, BLOCK_ROWS), np.float32),
            operands=tuple(operands.get(kind, from_normed) for kind in range(ops.LOGITS + 1)),
            outputs=(q, k, v, projected, gate, up, projected, array(c.vocab_size)[:0]),
            job=job,
        )

    def _count_blocks(self, n_positions: int) -> list[int]:
        """Return the number of blocks of each stage."""
        c = self.config
        q_dim = c.n_heads * c.head_dim

        def blocks(rows: int, cols: int) -> int:
            n_bytes = rows * cols * self._bits // 8
            return max(BLOCKS_PER_THREAD * self._n_threads, -(-n_bytes // BLOCK_BYTES))

        n_blocks = {
            ops.QKV: 3 * blocks(q_dim, c.dim),
            ops.ATTENTION: c.n_heads,
            ops.PROJECTION: blocks(c.dim, q_dim),
            ops.GATE: blocks(2 * c.hidden_dim, c.dim),
            ops.DOWN: blocks(c.dim, c.hidden_dim),
            ops.LOGITS: blocks(c.vocab_size, c.dim),
        }
        # One position is dealt with by the thread that is there already.
        pieces = 1 if n_positions == 1 else BLOCKS_PER_THREAD * self._n_threads
        return [n_blocks.get(kind, pieces) for kind in range(ops.LOGITS + 1)]


def _place(cache: KVCache) -> tuple[int, int, int, int]:
    """Return where a sequence's next position goes: a row of Workspace.places."""
    return _address(cache.keys), _address(cache.values), cache.capacity, cache.length


def _address(array: NDArray[Any]) -> int:
    """Return where an array's first element is."""
    address: int = array.__array_interface__["data"][0]
    return address


def compile_work(arguments: tuple[Weights, Workspace, Angles]) -> Callable[..., None]:
    """Return `kernels.work` for arguments of these types, compiled or from the cache.

    What is returned takes nothing else and does not look: to find out the types of so many arrays takes numba longer
    than a small model takes for a token.
    """
    if not ops.work.signatures:
        kernel_cache.enable(ops.work)
    return ops.work.compile(tuple(numba.typeof(argument) for argument in (*arguments, new_words(), 0, 0)))


def bits_of(weight: Any) -> int:
    """Return how many bits a number of a matrix has, scales apart."""
    if isinstance(weight, Packed):
        return weight.bits
    return 8 if isinstance(weight, Quantized) else 8 * weight.itemsize


def new_quantized_rows(n: int, cols: int, group_size: int, bits: int) -> QuantizedRows:
    """Return room for n vectors of `cols` components, to be multiplied by matrices of so many bits."""
    shape = (n, -(-cols // group_size))
    values = np.zeros(shape, group_dtype(group_size))
    return QuantizedRows(values, np.zeros(shape, np.float32), np.zeros(shape, np.int32), 1 << (bits - 1))


def stack_weights(file: ModelFile) -> Weights:
    """Return a model's weights as the kernels take them: the layers of each matrix as one array, without a copy."""
    tensors = file.tensors

    def layers(name: str) -> list[Any]:
        return [tensors[f"layers.{layer}.{name}"] for layer in range(file.config.n_layers)]

    matrices = [layers(f"attention.{name}") for name in ops.MATRICES[:4]]
    matrices += [layers(f"feed_forward.{name}") for name in ops.MATRICES[4:7]]
    matrices += [[tensors.get("output", tensors["tok_embeddings"])], [tensors["tok_embeddings"]]]
    return Weights(
        matrices=tuple(as_matrix(matrix) for matrix in matrices),
        attention_norm=np.stack(layers("attention_norm")),
        ffn_norm=np.stack(layers("ffn_norm")),
        norm=np.array(tensors["norm"]),
        norm_eps=np.float32(file.config.norm_eps),
        group_size=getattr(tensors["tok_embeddings"], "group_size", 0),
    )


def as_matrix(layers: Sequence[Any]) -> Any:
    """Return the layers of a matrix as a Stack, or of quantized ones as a PackedMatrix of two; int8 is packed anew."""
    if isinstance(layers[0], Quantized):
        packed = [pack(layer) for layer in layers]
        # In one array, whose parts keep it alive.
        values, scales = (list(np.stack([matrix[part] for matrix in packed])) for part in range(2))
    elif isinstance(layers[0], Packed):
        values, scales = [layer.values for layer in layers], [layer.scales for layer in layers]
    else:
        return stack(layers)
    chunk, lanes = chunk_dtype(values[0].shape[2]), scales_dtype(scales[0].dtype)
    return PackedMatrix(stack([v.view(chunk)[..., 0] for v in values]), stack([s.view(lanes)[..., 0] for s in scales]))


def stack(arrays: Sequence[NDArray[Any]]) -> Stack:
    """Return arrays of one shape as a Stack: in place if they are equally far apart, as in our files, else copied.

    The Stack keeps the first array alive; the caller keeps the others.
    """
    addresses = [_address(array) for array in arrays]
    distances = set(np.diff(addresses).tolist())
    if len(distances) > 1 or not all(array.flags.c_contiguous for array in arrays):
        copy = np.ascontiguousarray(np.stack(arrays))
        first, distance = copy[0], copy.strides[0]
    else:
        first, distance = arrays[0].view(), distances.pop() if distances else 0
    # One type of array wherever the weights come from, so that the kernels are compiled once.
    first.flags.writeable = False
    return Stack(first, distance)
