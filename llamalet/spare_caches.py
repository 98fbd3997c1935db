"""KV caches of texts that have ended, for texts that begin.

Memory that is new to a process is cleared and mapped when it is first used. On a virtual machine that took 1.5 ms for a
megabyte, of which a text of 30 tokens has one in a model of 110M parameters; and growing copies what is there.
"""

from llamalet.kv_cache import KVCache


class SpareCaches:
    """Caches without an owner, of at most `max_bytes`.

    Attributes:
        n_bytes: of all of them.
    """

    def __init__(self, max_bytes: float) -> None:
        self.max_bytes = max_bytes
        self.n_bytes = 0
        self._caches: list[KVCache] = []  # the longest unused first

    def __len__(self) -> int:
        return len(self._caches)

    def take(self, least: int, wanted: int, max_bytes: float) -> KVCache | None:
        """Return an empty cache with room for at least so many positions, or None if there is none.

        The smallest with room for `wanted` is taken, or the largest if none has; none has more than `max_bytes`.
        """
        fitting = [cache for cache in self._caches if cache.capacity >= least and cache.n_bytes <= max_bytes]
        if not fitting:
            return None
        cache = min(fitting, key=lambda cache: (cache.capacity < wanted, abs(cache.capacity - wanted)))
        self._remove(cache)
        return cache

    def give(self, cache: KVCache) -> None:
        """Keep a cache that nobody uses any more; others leave if there is no room for it."""
        cache.truncate(0)
        self._caches.append(cache)
        self.n_bytes += cache.n_bytes
        self.shrink_to(self.max_bytes)

    def shrink_to(self, n_bytes: float) -> None:
        """Drop caches until they have at most so many bytes: the longest unused first."""
        while self.n_bytes > n_bytes:
            self._remove(self._caches[0])

    def _remove(self, cache: KVCache) -> None:
        self._caches.remove(cache)
        self.n_bytes -= cache.n_bytes
