"""The fast forward pass over a KV cache: one compiled call a token, or a chunk of a prompt, on all cores."""

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from llamalet import kernel_cache, kernels
from llamalet.config import rope_tables
from llamalet.format import ModelFile
from llamalet.kernels import Int8Matrix, Int8Rows, Past, Weights, Workspace
from llamalet.kv_cache import KVCache
from llamalet.quantize import Quantized
from llamalet.reference import Array, Tokens, check_tokens
from llamalet.simd import Stack, group_dtype, starts_dtype
from llamalet.team import Team, new_words, thread_count

# Positions that the kernels take through the layers at once.
CHUNK = 64

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
        self._group_size = file.group_size
        self._tensors = file.tensors  # keeps alive what the stacked weights are views of
        self._weights = stack_weights(file)
        self._n_threads = thread_count(threads)
        # What the kernels work in, for one caller and one cache at a time.
        self._lock = threading.Lock()
        self._spaces: dict[int, Workspace] = {}
        self._cos = self._sin = np.zeros((0, self.config.head_dim // 2), np.float32)
        self._arguments: tuple[Weights, Workspace, Past] | None = None
        self._team = Team(compile_work(self._bind(self.new_cache(), 1)), self._n_threads)
        weakref.finalize(self, self._team.stop)

    def new_cache(self, capacity: int = 0) -> KVCache:
        """Return an empty KV cache with memory for `capacity` positions; it grows when they are used up."""
        return KVCache(self.config, capacity)

    def decode(self, cache: KVCache, token: int) -> Array:
        """Append one token to the cache; return the logits after it: float32 (V,).

        Raises:
            UsageError: if it is not in the vocabulary, or the context is full.
        """
        return self._run(cache, check_tokens((token,), self.config), 1)[0]

    def prefill(self, cache: KVCache, tokens: Tokens) -> Array:
        """Append tokens (T,), at least one, to the cache; return the logits after the last one: float32 (V,).

        Raises:
            UsageError: if there are no tokens, one is not in the vocabulary, or they are more than the context holds.
        """
        *chunks, last = self._chunks(cache, tokens)
        for chunk in chunks:
            self._run(cache, chunk, 0)
        return self._run(cache, last, 1)[0]

    def logits(self, tokens: Tokens) -> Array:
        """Return the logits after each of the tokens (T,), on their own: float32 (T, V).

        Raises:
            UsageError: as prefill.
        """
        cache = self.new_cache(len(tokens))
        return np.concatenate([self._run(cache, chunk, len(chunk)) for chunk in self._chunks(cache, tokens)])

    def _chunks(self, cache: KVCache, tokens: Tokens) -> list[NDArray[np.int64]]:
        """Check tokens, make room for all of them and cut them into what the kernels take at once."""
        ids = check_tokens(tokens, self.config)
        cache.reserve(cache.length + len(ids))
        return np.split(ids, range(CHUNK, len(ids), CHUNK))

    def _run(self, cache: KVCache, ids: NDArray[np.int64], n_logits: int) -> Array:
        """Append at most CHUNK tokens to the cache; return the logits after the last `n_logits` of them."""
        with self._lock:
            cache.reserve(cache.length + len(ids))
            _, space, _ = arguments = self._bind(cache, 1 if len(ids) == 1 else CHUNK)
            space.tokens[: len(ids)] = ids
            space.job[kernels.START : kernels.N_LOGITS + 1] = cache.length, len(ids), n_logits
            self._team.run(arguments)
            cache.length += len(ids)
            return space.outputs[kernels.FIRST_MATRIX[kernels.LOGITS]][:n_logits].copy()

    def _bind(self, cache: KVCache, n_positions: int) -> tuple[Weights, Workspace, Past]:
        """Return the arguments of the kernels; the same tuple as long as nothing has moved."""
        if cache.capacity > len(self._cos):
            self._cos, self._sin = rope_tables(self.config, cache.capacity)
            self._spaces = {}
        if n_positions not in self._spaces:
            self._spaces[n_positions] = self._new_workspace(n_positions, len(self._cos))
        space, bound = self._spaces[n_positions], self._arguments
        if bound is None or bound[1] is not space or bound[2].keys is not cache.keys:
            bound = self._weights, space, Past(cache.keys, cache.values, self._cos, self._sin)
            self._arguments = bound
        return bound

    def _new_workspace(self, n_positions: int, capacity: int) -> Workspace:
        """Return memory for passes over up to n_positions new positions, `capacity` with the past ones."""
        c = self.config
        q_dim = c.n_heads * c.head_dim

        def array(width: int) -> Array:
            return np.zeros((n_positions, width), np.float32)

        def operand(x: Array) -> Any:
            return x if self._group_size is None else new_int8_rows(n_positions, x.shape[1], self._group_size)

        q, k, v, gate, up = (array(width) for width in (q_dim, c.kv_dim, c.kv_dim, c.hidden_dim, c.hidden_dim))
        normed, attended, projected = array(c.dim), array(q_dim), array(c.dim)
        from_normed, from_attended, from_gate = operand(normed), operand(attended), operand(gate)
        job = np.zeros(kernels.JOB_WORDS, np.int64)
        job[kernels.N_BLOCKS :] = self._count_blocks()
        return Workspace(
            tokens=np.zeros(n_positions, np.int64),
            x=array(c.dim),
            normed=normed,
            queries=q.reshape(-1, c.head_dim),
            attended=attended,
            scores=np.zeros((c.n_heads, capacity), np.float32),
            operands=(from_normed, from_normed, from_attended, from_normed, from_gate, from_normed),
            outputs=(q, k, v, projected, gate, up, projected, array(c.vocab_size)),
            job=job,
        )

    def _count_blocks(self) -> list[int]:
        """Return the number of blocks of each stage."""
        c = self.config

        def blocks(rows: int, cols: int) -> int:
            n_bytes = rows * cols * (4 if self._group_size is None else 1)
            return max(BLOCKS_PER_THREAD * self._n_threads, -(-n_bytes // BLOCK_BYTES))

        q_dim = c.n_heads * c.head_dim
        return [
            3 * blocks(q_dim, c.dim),
            c.n_heads,
            blocks(c.dim, q_dim),
            blocks(2 * c.hidden_dim, c.dim),
            blocks(c.dim, c.hidden_dim),
            blocks(c.vocab_size, c.dim),
        ]


def compile_work(arguments: tuple[Weights, Workspace, Past]) -> Callable[..., None]:
    """Return `kernels.work` for arguments of these types, compiled or from the cache.

    What is returned takes nothing else and does not look: to find out the types of so many arrays takes numba longer
    than a small model takes for a token.
    """
    if not kernels.work.signatures:
        kernel_cache.enable(kernels.work)
    return kernels.work.compile(tuple(numba.typeof(argument) for argument in (*arguments, new_words(), 0, False)))


def new_int8_rows(n: int, cols: int, group_size: int) -> Int8Rows:
    """Return room for n quantized vectors of `cols` components."""
    shape = (n, cols // group_size)
    values, starts = np.zeros(shape, group_dtype(group_size)), np.zeros(shape, starts_dtype(group_size))
    return Int8Rows(values, np.zeros(shape, np.float32), starts)


def stack_weights(file: ModelFile) -> Weights:
    """Return a model's weights as the kernels take them: the layers of each matrix as one array, without a copy."""
    tensors = file.tensors

    def layers(name: str) -> list[Any]:
        return [tensors[f"layers.{layer}.{name}"] for layer in range(file.config.n_layers)]

    matrices = [layers(f"attention.{name}") for name in kernels.MATRICES[:4]]
    matrices += [layers(f"feed_forward.{name}") for name in kernels.MATRICES[4:7]]
    matrices += [[tensors.get("output", tensors["tok_embeddings"])], [tensors["tok_embeddings"]]]
    return Weights(
        matrices=tuple(as_matrix(matrix) for matrix in matrices),
        attention_norm=np.stack(layers("attention_norm")),
        ffn_norm=np.stack(layers("ffn_norm")),
        norm=np.array(tensors["norm"]),
        norm_eps=np.float32(file.config.norm_eps),
    )


def as_matrix(layers: Sequence[Any]) -> Any:
    """Return the layers of a matrix, float32 or Quantized, as a Stack or as an Int8Matrix of two."""
    if not isinstance(layers[0], Quantized):
        return stack(layers)
    dtype = group_dtype(layers[0].group_size)
    return Int8Matrix(stack([w.values.view(dtype) for w in layers]), stack([w.scales for w in layers]))


def stack(arrays: Sequence[NDArray[Any]]) -> Stack:
    """Return arrays of one shape as a Stack: in place if they are equally far apart, as in our files, else copied.

    The Stack keeps the first array alive; the caller keeps the others.
    """
    addresses = [array.__array_interface__["data"][0] for array in arrays]
    distances = set(np.diff(addresses).tolist())
    if len(distances) > 1 or not all(array.flags.c_contiguous for array in arrays):
        copy = np.ascontiguousarray(np.stack(arrays))
        first, distance = copy[0], copy.strides[0]
    else:
        first, distance = arrays[0].view(), distances.pop() if distances else 0
    # One type of array wherever the weights come from, so that the kernels are compiled once.
    first.flags.writeable = False
    return Stack(first, distance)
