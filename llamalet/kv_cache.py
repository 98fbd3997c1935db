"""The keys and values of past positions: with them a new token costs one position instead of all.

Everything here is plain numpy, and reference.py uses it. The kernels read and write the same arrays.
"""

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamalet.aligned import address_of, aligned_zeros
from llamalet.config import ModelConfig, rope_frequencies
from llamalet.errors import OutOfMemoryError, UsageError
from llamalet.kv_kinds import KINDS, LANES, STEP, cache_bytes, decode, encode, shapes, swapped

Array = NDArray[np.float32]

# The largest error of rotating a pair of components once, relative to its length. In units of 2^-24: the rotation is
# rounded in both components (0.8), and a product of complex numbers adds the square root of 5 (2.3).
# Source: https://doi.org/10.1090/S0025-5718-07-01931-X
ROLL_ERROR = 4 * 2.0**-24

MEMINFO = Path("/proc/meminfo")


class KVCache:
    """The keys and values of the positions so far; it grows with them.

    Attributes:
        kind: how numbers are kept, a name of KINDS.
        keys: (L, G, capacity / 16, D, 16), of KINDS[kind].dtype.
        values: (L, G, capacity, D filled up to a multiple of 16), of the same dtype.
        key_scales: float32 (L, G, capacity), what each key is to be multiplied by; (L, G, 0) if the kind has no scales.
        value_scales: likewise.
        addresses: of these four arrays, for the kernels.
        n_bytes: of these arrays.
        length: number of positions.
        context: the largest number of positions allowed.
    """

    def __init__(self, config: ModelConfig, capacity: int = 0, kind: str = "f32") -> None:
        self._config = config
        self.kind = kind
        self.context = config.max_seq_len
        self.length = 0
        self._allocate(min(capacity, self.context))

    @property
    def capacity(self) -> int:
        """Number of positions that fit into the memory allocated so far."""
        return self.values.shape[2]

    def reserve(self, length: int) -> None:
        """Make room for `length` positions, at least doubling the capacity if it must grow, so that copies are rare.

        Raises:
            UsageError: if the model's context is too small for that.
            OutOfMemoryError: if the free memory is.
        """
        if length > self.context:
            raise UsageError(f"{length} positions: the model's context is {self.context}")
        if length > self.capacity:
            capacity = min(max(length, 2 * self.capacity, STEP), self.context)
            n_bytes, n_free = cache_bytes(self._config, capacity, self.kind), free_memory()
            if n_bytes > n_free:
                raise OutOfMemoryError(
                    f"a KV cache of {capacity} positions takes {n_bytes / 1e6:.0f} MB, and {n_free / 1e6:.0f} MB of "
                    "memory are free: use shorter texts or fewer at once"
                )
            self._move_to(capacity)

    def truncate(self, length: int) -> None:
        """Drop all positions from `length` on."""
        if not 0 <= length <= self.length:
            raise UsageError(f"cannot truncate a cache of {self.length} positions to {length}")
        self.length = length

    def copy(self) -> "KVCache":
        """Return an independent copy, with no more spare capacity than it must have."""
        twin = copy.copy(self)
        twin._move_to(self.length)
        return twin

    def copy_from(self, other: "KVCache") -> None:
        """Hold the positions of another cache of the same model and kind, for which there must be room."""
        self._take_positions(other._arrays(), other.length)
        self.length = other.length

    def read(self, layer: int, first: int, last: int) -> tuple[Array, Array]:
        """Return the keys and values of positions first .. last - 1 in a layer: float32 (G, n, D), only to be read."""
        keys, values = self._rows(layer, first, last), self.values[layer, :, first:last, : self._config.head_dim]
        scales = [x[layer, :, first:last] for x in (self.key_scales, self.value_scales)]
        return decode(keys, scales[0]), decode(values, scales[1])

    def write(self, layer: int, first: int, keys: Array, values: Array) -> None:
        """Keep keys and values (G, n, D) of a layer for positions from `first` on, for which there must be room."""
        last = first + keys.shape[1]
        dtype, scaled, _ = KINDS[self.kind]
        rows, key_scales = encode(keys, dtype)
        numbers, value_scales = encode(values, dtype)
        self._put_rows(layer, first, rows)
        self.values[layer, :, first:last, : self._config.head_dim] = numbers
        if scaled:
            self.key_scales[layer, :, first:last], self.value_scales[layer, :, first:last] = key_scales, value_scales

    def block(self, first: int, last: int, memory: tuple[NDArray[Any], ...] | None = None) -> tuple[NDArray[Any], ...]:
        """Return a copy of what is kept of positions first .. last - 1, multiples of LANES, for `put_block`.

        `memory` is a block of as many positions that nobody needs any more; the copy takes its place.
        """
        parts = self._parts(first, last)
        if memory is None:
            return tuple(part.copy() for part in parts)
        for part, copied in zip(parts, memory, strict=True):
            copied[...] = part
        return memory

    def put_block(self, first: int, block: tuple[NDArray[Any], ...]) -> None:
        """Write what `block` returned, for positions from `first` on, a multiple of LANES, for which there is room."""
        for part, kept in zip(self._parts(first, first + block[1].shape[2]), block, strict=True):
            part[...] = kept

    def block_bytes(self, n: int) -> int:
        """Return the size of what `block` returns for n positions, a multiple of STEP."""
        return cache_bytes(self._config, n, self.kind)

    def _parts(self, first: int, last: int) -> tuple[NDArray[Any], ...]:
        """Return the parts of the arrays that hold positions first .. last - 1, multiples of LANES."""
        scales = self.key_scales[:, :, first:last], self.value_scales[:, :, first:last]
        return self.keys[:, :, first // LANES : last // LANES], self.values[:, :, first:last], *scales

    def roll(self, keep: int, drop: int) -> None:
        """Drop positions keep .. keep + drop - 1; later ones move down by `drop`, and the length shrinks.

        RoPE has rotated each pair of a key's components by an angle proportional to its position, so the moved keys are
        rotated back by `drop` positions. A pair is two neighbours, in memory a complex number, and rotating it is one
        product. The angle is computed in float64, so a roll adds an error of at most `ROLL_ERROR` of a pair's length,
        at any position, and that of keeping the result (`CacheKind.error`); n rolls at most n times as much. Values
        move as they are. The arrays are changed in place.

        Args:
            keep: number of first positions that stay as they are.
            drop: number of positions to drop after them.

        Raises:
            UsageError: if the cache has fewer positions.

        Source: https://arxiv.org/abs/2309.17453, section 3.2.
        """
        if not (keep >= 0 <= drop and keep + drop <= self.length):
            raise UsageError(f"cannot keep {keep} and drop {drop} of a cache of {self.length} positions")
        turn = np.exp(-1j * drop * rope_frequencies(self._config)).astype(np.complex64)  # (D / 2,)
        old, new = slice(keep + drop, self.length), slice(keep, self.length - drop)
        # Layer by layer, to keep the temporaries small.
        for layer in range(self._config.n_layers if drop else 0):
            keys = np.ascontiguousarray(self.read(layer, old.start, old.stop)[0])  # (G, n, D)
            pairs = keys.view(np.complex64)  # (G, n, D / 2)
            pairs *= turn
            rows, scales = encode(keys, self.keys.dtype)
            self._put_rows(layer, keep, rows)
            self.values[layer, :, new] = self.values[layer, :, old]
            if self.key_scales.size:
                self.key_scales[layer, :, new] = scales
                self.value_scales[layer, :, new] = self.value_scales[layer, :, old]
        self.length -= drop

    def _rows(self, layer: int, first: int, last: int) -> NDArray[Any]:
        """Return a copy of the stored keys of positions first .. last - 1 in a layer, one a row: (G, n, D)."""
        blocks = slice(first // LANES, -(-last // LANES))
        rows = swapped(self.keys[layer, :, blocks]).reshape(len(self.keys[layer]), -1, self._config.head_dim)
        return rows[:, first - blocks.start * LANES : last - blocks.start * LANES]

    def _put_rows(self, layer: int, first: int, rows: NDArray[Any]) -> None:
        """Store keys (G, n, D), one a row, for positions from `first` on in a layer."""
        last, n_heads = first + rows.shape[1], rows.shape[0]
        blocks = slice(first // LANES, -(-last // LANES))
        whole = self._rows(layer, blocks.start * LANES, blocks.stop * LANES)
        whole[:, first - blocks.start * LANES : last - blocks.start * LANES] = rows
        self.keys[layer, :, blocks] = swapped(whole.reshape(n_heads, -1, LANES, self._config.head_dim))

    def _arrays(self) -> tuple[NDArray[Any], ...]:
        return self.keys, self.values, self.key_scales, self.value_scales

    def _allocate(self, capacity: int) -> None:
        """Take new memory for this many positions, filled up to a multiple of STEP."""
        dtype, scaled, _ = KINDS[self.kind]
        keys, values, scales = shapes(self._config, capacity)
        scales = scales if scaled else (*scales[:2], 0)
        arrays = [aligned_zeros(shape, dtype) for shape in (keys, values)]
        arrays += [aligned_zeros(scales, np.float32) for _ in range(2)]
        self.keys, self.values, self.key_scales, self.value_scales = arrays  # all, or none if the memory was too small
        self.n_bytes = sum(array.nbytes for array in arrays)
        self._take_addresses()

    def _take_addresses(self) -> None:
        """Note where the arrays are: taking an address costs as much time as a small kernel."""
        self.addresses = tuple(map(address_of, self._arrays()))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a pickled or deeply copied cache, whose arrays are elsewhere now."""
        self.__dict__.update(state)
        self._take_addresses()

    def _move_to(self, capacity: int) -> None:
        """Copy the positions in use to new memory for `capacity` positions."""
        before = self._arrays()
        self._allocate(capacity)
        self._take_positions(before, self.length)

    def _take_positions(self, arrays: tuple[NDArray[Any], ...], length: int) -> None:
        """Copy the first positions of such arrays."""
        n_blocks = -(-length // LANES)
        for array, source, n in zip(self._arrays(), arrays, (n_blocks, length, length, length), strict=True):
            array[:, :, :n] = source[:, :, :n]


def free_memory() -> int:
    """Return the bytes that can still be allocated without swapping; if the system does not say, all memory."""
    try:
        fields = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 62
