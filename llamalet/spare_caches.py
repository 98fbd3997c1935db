"""KV caches of texts that have ended, for texts that begin.

The system clears and maps new memory when it is first used: up to 1.5 ms for a megabyte on a virtual machine. In a
model of 110M parameters a text of 30 tokens takes one megabyte with a bfloat16 cache. Growing also copies what is
there.
"""

from llamalet.kv_cache import KVCache


class SpareCaches:
    """Caches without an owner, of at most `max_bytes`.

    Attributes:
        n_bytes: of all of them.
    """

    def __init__(self, max_bytes: float) -> None:
        self.n_bytes = 0
        self._max_bytes = max_bytes
        self._caches: list[KVCache] = []  # the longest unused first

    def __len__(self) -> int:
        return len(self._caches)

    def take(self, least: int, wanted: int, max_bytes: float) -> KVCache | None:
        """Return an empty cache with room for at least so many positions, or None if there is none.

        The smallest with room for `wanted` is taken, or the largest if none has; none has more than `max_bytes`.
        """
        best: tuple[bool, int, int] | None = None
        for index in reversed(range(len(self._caches))):  # of equals the one used last: it may be in the CPU's cache
            cache = self._caches[index]
            if cache.capacity >= least and cache.n_bytes <= max_bytes:
                rank = cache.capacity < wanted, abs(cache.capacity - wanted)
                if best is None or rank < best[:2]:
                    best = *rank, index
        return None if best is None else self._remove(best[2])

    def give(self, cache: KVCache) -> None:
        """Keep a cache that nobody uses any more, unless it is too large; others leave if there is no room for it."""
        if cache.n_bytes > self._max_bytes:
            return
        cache.truncate(0)
        self._caches.append(cache)
        self.n_bytes += cache.n_bytes
        self.shrink_to(self._max_bytes)

    def shrink_to(self, n_bytes: float, number: float = float("inf")) -> None:
        """Drop caches until there are at most so many, with at most so many bytes: the longest unused first."""
        while self._caches and (self.n_bytes > n_bytes or len(self._caches) > number):
            self._remove(0)

    def _remove(self, index: int) -> KVCache:
        cache = self._caches.pop(index)
        self.n_bytes -= cache.n_bytes
        return cache
