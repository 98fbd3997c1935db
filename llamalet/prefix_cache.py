"""Keys and values of beginnings that many texts share, so that they are computed once.

A position has the same bits however it was computed, so what one text has read or generated, another may take over.
The cache is a tree: a node holds the keys and values of BLOCK tokens, which follow those of its parent.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from llamalet.kv_cache import KVCache

BLOCK = 64
"""Tokens of a node."""


class _Node:
    """BLOCK tokens after those of its parent, and their keys and values, which nobody changes."""

    def __init__(self, parent: "_Node | None", key: Any, arrays: tuple[NDArray[Any], ...]) -> None:
        self.parent, self.key, self.arrays = parent, key, arrays
        self.children: dict[Any, _Node] = {}
        self.n_bytes = sum(array.nbytes for array in arrays)


class PrefixCache:
    """A tree of blocks of at most `max_bytes`; the least recently used leave first.

    Attributes:
        n_bytes: of all blocks.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.n_bytes = 0
        self._root = _Node(None, None, ())
        # A node stands before its parent, so that leaves leave first.
        self._by_age: OrderedDict[_Node, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_age)

    def restore(self, tokens: Sequence[int], salt: str, cache: KVCache) -> int:
        """Write what is known of the first tokens to an empty cache; return how many positions it has now.

        Args:
            tokens: of a text; the last must still be read, so that there are logits after it.
            salt: only what was stored with the same salt is taken.
            cache: an empty one.

        Raises:
            UsageError: if there is no memory for them.
        """
        path = self._path(tokens, salt)[: max(0, len(tokens) - 1) // BLOCK]
        cache.reserve(len(path) * BLOCK)
        for number, node in enumerate(path):
            cache.put_block(number * BLOCK, node.arrays)
        cache.length = len(path) * BLOCK
        self._use(path)
        return cache.length

    def store(self, tokens: Sequence[int], salt: str, cache: KVCache) -> None:
        """Keep a copy of the whole blocks of a cache, which holds these tokens from the first on, as far as they fit.

        Args:
            tokens: those in the cache: `cache.length` of them.
            salt: see restore.
            cache: of a text that has not rolled.

        Raises:
            MemoryError: if there is none for a block; those before it are kept.
        """
        path = self._path(tokens, salt)
        node, n_bytes = path[-1] if path else self._root, cache.block_bytes(BLOCK)
        try:
            for number in range(len(path), len(tokens) // BLOCK):
                memory = None
                if self.n_bytes + n_bytes > self.max_bytes:  # a block has to leave: its memory is the new one's
                    memory = self._evict(path)
                    if memory is None:
                        break
                first, key = number * BLOCK, _key(tokens, number, salt)
                child = _Node(node, key, cache.block(first, first + BLOCK, memory))
                node.children[key] = child
                self.n_bytes += child.n_bytes
                node = child
                path.append(node)
        finally:
            self._use(path)

    def _path(self, tokens: Sequence[int], salt: str) -> list[_Node]:
        """Return the known nodes of the first tokens."""
        path, node = [], self._root
        for number in range(len(tokens) // BLOCK):
            found = node.children.get(_key(tokens, number, salt))
            if found is None:
                break
            path.append(found)
            node = found
        return path

    def _use(self, path: Sequence[_Node]) -> None:
        """Make nodes from the root on the most recent ones."""
        for node in reversed(path):
            self._by_age[node] = None
            self._by_age.move_to_end(node)

    def _evict(self, path: Sequence[_Node]) -> tuple[NDArray[Any], ...] | None:
        """Let the least recently used block leave; return it, or None if there is none but those of a path."""
        self._use(path)
        if len(self._by_age) <= len(path):
            return None
        node, _ = self._by_age.popitem(last=False)
        assert not node.children and node.parent is not None
        del node.parent.children[node.key]
        self.n_bytes -= node.n_bytes
        return node.arrays


def _key(tokens: Sequence[int], number: int, salt: str) -> Any:
    """Return what tells a block from its siblings: its tokens, and for the first one the salt."""
    block = tuple(tokens[number * BLOCK : (number + 1) * BLOCK])
    return block if number else (salt, block)
