"""The fast forward pass over a KV cache: one compiled call a token, or a chunk of a prompt, on all cores."""

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamalet import kernel_cache, kernels
from llamalet.config import rope_tables
from llamalet.format import ModelFile
from llamalet.kernels import Int8Matrix, Int8Rows, Past, Weights, Workspace
from llamalet.quantize import Quantized
from llamalet.reference import Array, KVCache, NumpyTransformer, Tokens, check_tokens
from llamalet.simd import group_dtype, starts_dtype
from llamalet.team import Team, thread_count

# Positions that the kernels take through the layers at once.
CHUNK = 32

# From this many positions on, numpy's float32 matrix product is faster than the kernels, which compute row by row.
BLAS_POSITIONS = 8

# A block of a stage is at most this much of a matrix, small enough that the threads finish a stage together; and a
# stage has at least so many blocks per thread.
BLOCK_BYTES = 1 << 16
BLOCKS_PER_THREAD = 4


class Transformer(NumpyTransformer):
    """A model file with a KV cache, on compiled kernels.

    Args:
        file: the model; its weights are used where they are mapped, not copied.
        threads: how many threads compute; None takes one for each physical core, see `team.thread_count`.

    Raises:
        ConfigError: if the number of threads is not positive.
    """

    def __init__(self, file: ModelFile, threads: int | None = None) -> None:
        super().__init__(file)
        self._group_size = file.group_size
        if not kernels.work.signatures:
            kernel_cache.enable(kernels.work)
        self._team = Team(kernels.work, thread_count(threads))
        weakref.finalize(self, self._team.stop)
        self._stacked = stack_weights(file)
        self._spaces: dict[int, Workspace] = {}
        self._arguments: tuple[Weights, Workspace, Past] | None = None

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
        ids = check_tokens(tokens, self.config)
        if self._group_size is None and len(ids) >= BLAS_POSITIONS:
            return super().prefill(cache, ids)
        cache.reserve(cache.length + len(ids))
        for chunk in np.split(ids, range(CHUNK, len(ids), CHUNK)):
            logits = self._run(cache, chunk, 1)
        return logits[0]

    def logits(self, tokens: Tokens) -> Array:
        """Return the logits after each of the tokens (T,), on their own: float32 (T, V).

        Raises:
            UsageError: as prefill.
        """
        if self._group_size is None:
            return super().logits(tokens)
        ids = check_tokens(tokens, self.config)
        cache = self.new_cache(len(ids))
        cache.reserve(len(ids))
        chunks = np.split(ids, range(CHUNK, len(ids), CHUNK))
        return np.concatenate([self._run(cache, chunk, len(chunk)) for chunk in chunks])

    def _run(self, cache: KVCache, ids: NDArray[np.int64], n_logits: int) -> Array:
        """Append at most CHUNK tokens to the cache; return the logits (n_logits, V) after the last of them."""
        cache.reserve(cache.length + len(ids))
        weights, space, past = arguments = self._bind(cache, 1 if len(ids) == 1 else CHUNK)
        space.tokens[: len(ids)] = ids
        space.job[kernels.START : kernels.N_LOGITS + 1] = cache.length, len(ids), n_logits
        self._team.run(arguments)
        cache.length += len(ids)
        return space.logits[:n_logits].copy()

    def _bind(self, cache: KVCache, n_positions: int) -> tuple[Weights, Workspace, Past]:
        """Return the arguments of the kernels; the same tuple as long as nothing has moved."""
        if self._arguments is None or self._arguments[2].keys is not cache.keys:
            self._spaces = {}
            cos, sin = rope_tables(self.config, cache.capacity)
            past = Past(cache.keys, cache.values, cos, sin)
        elif self._arguments[1].tokens.size == n_positions:
            return self._arguments
        else:
            past = self._arguments[2]
        if n_positions not in self._spaces:
            self._spaces[n_positions] = self._new_workspace(n_positions, cache.capacity)
        self._arguments = (self._stacked, self._spaces[n_positions], past)
        return self._arguments

    def _new_workspace(self, n_positions: int, capacity: int) -> Workspace:
        """Return memory for passes over up to n_positions new positions and `capacity` in all."""
        c = self.config

        def array(width: int) -> Array:
            return np.zeros((n_positions, width), np.float32)

        def operand(x: Array) -> Any:
            return x if self._group_size is None else new_int8_rows(n_positions, x.shape[1], self._group_size)

        job = np.zeros(kernels.JOB_WORDS, np.int64)
        q_dim, rows = c.n_heads * c.head_dim, c.n_heads * c.head_dim + 2 * c.kv_dim
        matrices = {
            kernels.QKV: (rows, c.dim), kernels.PROJECTION: (c.dim, q_dim), kernels.GATE: (c.hidden_dim, 2 * c.dim),
            kernels.DOWN: (c.dim, c.hidden_dim), kernels.LOGITS: (c.vocab_size, c.dim),
        }  # fmt: skip
        for stage, (n_rows, n_cols) in matrices.items():
            row_bytes = 4 * n_cols if self._group_size is None else n_cols + 4 * n_cols // self._group_size
            even = -(-n_rows // (BLOCKS_PER_THREAD * self._team.n_threads))
            job[kernels.BLOCK_ROWS + stage] = max(min(even, BLOCK_BYTES // row_bytes), 4)
        normed, attended, hidden = array(c.dim), array(q_dim), array(c.hidden_dim)
        return Workspace(
            tokens=np.zeros(n_positions, np.int64), x=array(c.dim), normed=normed, normed_operand=operand(normed),
            q=array(q_dim), k=array(c.kv_dim), v=array(c.kv_dim), scores=np.zeros((c.n_heads, capacity), np.float32),
            attended=attended, attended_operand=operand(attended), projected=array(c.dim),
            gate=array(c.hidden_dim), up=array(c.hidden_dim), hidden=hidden, hidden_operand=operand(hidden),
            logits=array(c.vocab_size), job=job,
        )  # fmt: skip


def new_int8_rows(n: int, cols: int, group_size: int) -> Int8Rows:
    """Return room for n quantized vectors of `cols` components."""
    shape = (n, cols // group_size)
    values, starts = np.zeros(shape, group_dtype(group_size)), np.zeros(shape, starts_dtype(group_size))
    return Int8Rows(values, np.zeros(shape, np.float32), starts)


def stack_weights(file: ModelFile) -> Weights:
    """Return a model's weights as the kernels take them: the layers of each matrix as one array, without a copy."""
    layers, tensors = range(file.config.n_layers), file.tensors

    def matrix(names: Sequence[str]) -> Any:
        return as_matrix([tensors[name] for name in names])

    def of_layers(name: str) -> Any:
        return [f"layers.{layer}.{name}" for layer in layers]

    def norms(name: str) -> Any:
        return stack([tensors[layer_name] for layer_name in of_layers(name)])

    tables = ["tok_embeddings"], ["output" if "output" in tensors else "tok_embeddings"]
    return Weights(
        tok_embeddings=matrix(tables[0]), output=matrix(tables[1]), norm=stack([tensors["norm"]])[0],
        attention_norm=norms("attention_norm"), ffn_norm=norms("ffn_norm"),
        wq=matrix(of_layers("attention.wq")), wk=matrix(of_layers("attention.wk")),
        wv=matrix(of_layers("attention.wv")), wo=matrix(of_layers("attention.wo")),
        w1=matrix(of_layers("feed_forward.w1")), w2=matrix(of_layers("feed_forward.w2")),
        w3=matrix(of_layers("feed_forward.w3")), norm_eps=np.float32(file.config.norm_eps),
    )  # fmt: skip


def as_matrix(layers: Sequence[Any]) -> Any:
    """Return the layers of a matrix as one float32 array (L, rows, cols) or one Int8Matrix."""
    if not isinstance(layers[0], Quantized):
        return stack(layers)
    dtype = group_dtype(layers[0].group_size)
    return Int8Matrix(stack([w.values.view(dtype) for w in layers]), stack([w.scales for w in layers]))


def stack(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return arrays of one shape as a single one (L, ...): a view where they lie at equal distances, as in our files.

    The view keeps only the first array alive; the caller keeps the others.
    """
    addresses = [array.__array_interface__["data"][0] for array in arrays]
    distances = set(np.diff(addresses).tolist())
    first = arrays[0]
    if len(distances) > 1 or not all(array.flags.c_contiguous for array in arrays):
        stacked = np.stack(arrays)
    else:
        distance = distances.pop() if distances else first.nbytes
        stacked = np.lib.stride_tricks.as_strided(first, (len(arrays), *first.shape), (distance, *first.strides))
    # One type of array, so that the kernels are compiled once, wherever the weights come from.
    stacked.flags.writeable = False
    return stacked
