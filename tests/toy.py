"""Small stand-ins that several tests share: a vocabulary, models on disk, a forward pass that counts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from conftest import random_tensors

from llamalet import format, shards
from llamalet.config import ModelConfig
from llamalet.tokenizer import BOS_ID, BinTokenizer, Llama3Tokenizer, write_bin
from llamalet.tokenizer.llama3 import special_names
from llamalet.tokenizer.rows import Piece

WORDS = (" ", "a", "b", "n", "d", "e", "t", ".", " a", " b", "an", "de", " ban", "and", " t", "\u00e9")


def toy_tokenizer(vocab_size: int = 300) -> BinTokenizer:
    """A vocabulary of few words, filled up to the size that is asked for."""
    texts = [*WORDS, *(f"~{i}" for i in range(vocab_size))][: vocab_size - 259]
    controls = [(b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0)]
    byte_rows = [(b"<0x%02X>" % byte, 0.0) for byte in range(256)]
    return BinTokenizer(controls + byte_rows + [(text.encode(), -float(i)) for i, text in enumerate(texts)], "toy")


# What a small rank table joins, in this order; each has its halves in the table before it.
MERGES = (
    ("a", "n"), ("an", "d"), (" ", "a"), (" ", "t"), ("h", "e"), (" t", "he"), (" ", " "), ("  ", "  "), ("a", "a"),
    ("aa", "aa"), ("aaaa", "aaaa"), ("\n", "\n"), ("'", "s"), ("\u00f0", "\u009f"), ("\u00f0\u009f", "\u0098"),
    ("1", "2"), (" ", "and"), ("b", "an"), (" ", "ban"),
)  # fmt: skip


# A token that no joining leads to: only a word that it is gets it.
WHOLE_WORD = "zqz"
N_RANKS = 256 + len(MERGES) + 1


def toy_ranks() -> list[Piece]:
    """The rows of a small Llama 3 vocabulary: bytes from the last to the first, MERGES, WHOLE_WORD, special tokens."""
    texts = [chr(255 - i) for i in range(256)] + ["".join(pair) for pair in MERGES] + [WHOLE_WORD]
    names = [name.encode() for name in special_names()]
    return [(piece, float(id)) for id, piece in enumerate([text.encode("latin-1") for text in texts] + names)]


def toy_llama3() -> Llama3Tokenizer:
    """A small Llama 3 vocabulary."""
    return Llama3Tokenizer(toy_ranks(), "toy", suffix="bin")


def toy_model(
    folder: Path,
    config: ModelConfig,
    *,
    version: int = 1,
    dtype: str | None = None,
    name: str = "model",
    seed: int = 0,
    scale: float = 0.1,
) -> Path:
    """Write a model of random weights and its tokenizer; return the path of NAME.bin."""
    tokenizer = toy_tokenizer(config.vocab_size)
    path = folder / f"{name}.bin"
    tensors = random_tensors(config, seed, scale)
    format.write(path, version, config, tensors, dtype=dtype, tokenizer_sha256=tokenizer.sha256)
    write_bin(folder / f"{name}.tokenizer.bin", tokenizer)
    return path


def toy_data(folder: Path, vocab_size: int, *, n_tokens: int = 700, seed: int = 0) -> Path:
    """Write random tokens of the toy vocabulary as prepared data, a document every 50 tokens."""
    rng = np.random.default_rng(seed)
    splits = {}
    for name in shards.SPLITS:
        ids = rng.integers(259, vocab_size, n_tokens)
        ids[::50] = BOS_ID
        block = shards.Block(ids=ids, documents=-(-n_tokens // 50), text_bytes=3 * n_tokens)
        splits[name] = shards.Split((shards.write_shard(folder / f"{name}_00000.bin", [block], vocab_size),))
    tokenizer = toy_tokenizer(vocab_size)
    write_bin(folder / "tokenizer.bin", tokenizer)
    meta = shards.Meta(
        source="toy", recipe={}, bos_id=1, eos_id=2, vocab_size=vocab_size, tokenizer="tokenizer.bin",
        tokenizer_sha256=tokenizer.sha256, splits=splits,
    )  # fmt: skip
    shards.write_meta(folder / shards.META_FILE, meta)
    return folder


class ListCache(list):
    """The tokens of a text, used as a KV cache."""

    def __init__(self, context: int, tokens: Sequence[int] = ()) -> None:
        super().__init__(tokens)
        self.context = context

    @property
    def length(self) -> int:
        return len(self)

    def roll(self, keep: int, drop: int) -> None:
        del self[keep : keep + drop]

    def copy(self) -> "ListCache":
        return ListCache(self.context, self)


class Counting:
    """A forward pass that makes token t + 1 the most likely after t, and checks how it is used."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.passes = 0
        self.steps: list[list[int]] = []

    def new_cache(self) -> ListCache:
        return ListCache(self.config.max_seq_len)

    def prefill(self, cache: ListCache, tokens: Sequence[int]) -> np.ndarray:
        cache.extend(tokens)
        assert len(cache) <= self.config.max_seq_len, "past the end of the cache"
        self.passes += 1
        return self.logits([cache[-1]])[0]

    def decode(self, cache: ListCache, token: int) -> np.ndarray:
        return self.prefill(cache, [token])

    def decode_batch(self, caches: Sequence[ListCache], tokens: Sequence[int]) -> np.ndarray:
        assert len({id(cache) for cache in caches}) == len(caches) == len(tokens) <= 64
        self.steps.append(list(tokens))
        return np.stack([self.decode(cache, token) for cache, token in zip(caches, tokens, strict=True)])

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        assert len(tokens) <= self.config.max_seq_len, "past the end of the context"
        logits = np.zeros((len(tokens), self.config.vocab_size), dtype=np.float32)
        logits[np.arange(len(tokens)), (np.asarray(tokens) + 1) % self.config.vocab_size] = 5.0
        return logits
