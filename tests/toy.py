"""Small vocabularies, models and data for many tests, and a forward pass that counts."""

import ctypes
import mmap
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamalet import model_file, shards
from llamalet.config import ModelConfig
from llamalet.model_file import quantize
from llamalet.model_file.tensors import tensor_specs
from llamalet.reference import losses
from llamalet.sampler import choose_token
from llamalet.tokenizer import BOS_ID, BinTokenizer, Llama3Tokenizer, Tokenizer, write_bin
from llamalet.tokenizer.llama3 import special_names
from llamalet.tokenizer.rows import TokenizerRow
from training.run.run_state import RunState

# One small model of each kind that Llama files come in.
SMALL_MODELS = {
    "gqa-tied": ModelConfig.create(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=192, vocab_size=300, max_seq_len=32
    ),
    "gqa-untied": ModelConfig.create(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=300, max_seq_len=32, tied=False
    ),
    "mqa-tied": ModelConfig.create(
        dim=96, n_layers=2, n_heads=6, n_kv_heads=1, hidden_dim=160, vocab_size=300, max_seq_len=32
    ),
    "mha-untied": ModelConfig.create(
        dim=48, n_layers=2, n_heads=3, hidden_dim=112, vocab_size=300, max_seq_len=32, tied=False
    ),
}


def random_tensors(config: ModelConfig, seed: int = 0, scale: float = 0.1) -> dict[str, np.ndarray]:
    """Return float32 tensors by their checkpoint names: norms around one, matrices around zero."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for spec in tensor_specs(1, config):
        centre = 1.0 if len(spec.shape) == 1 else 0.0
        tensors[spec.name] = (centre + scale * rng.standard_normal(spec.shape)).astype(np.float32)
    return tensors


WORDS = (" ", "a", "b", "n", "d", "e", "t", ".", " a", " b", "an", "de", " ban", "and", " t", "\u00e9")


def toy_tokenizer(vocab_size: int = 300) -> BinTokenizer:
    """Return a vocabulary of a few words, padded to `vocab_size`."""
    texts = [*WORDS, *(chr(0x4E00 + i) for i in range(vocab_size))][: vocab_size - 259]
    controls = [(b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0)]
    byte_rows = [(b"<0x%02X>" % byte, 0.0) for byte in range(256)]
    return BinTokenizer(controls + byte_rows + [(text.encode(), -float(i)) for i, text in enumerate(texts)], "toy")


# The merges of a small rank table, in order; both halves of each come earlier in the table.
MERGES = (
    ("a", "n"), ("an", "d"), (" ", "a"), (" ", "t"), ("h", "e"), (" t", "he"), (" ", " "), ("  ", "  "), ("a", "a"),
    ("aa", "aa"), ("aaaa", "aaaa"), ("\n", "\n"), ("'", "s"), ("\u00f0", "\u009f"), ("\u00f0\u009f", "\u0098"),
    ("1", "2"), (" ", "and"), ("b", "an"), (" ", "ban"),
)  # fmt: skip


# A token that no merge produces: only the whole word becomes it.
WHOLE_WORD = "zqz"
N_RANKS = 256 + len(MERGES) + 1


def toy_ranks() -> list[TokenizerRow]:
    """Return the rows of a small Llama 3 vocabulary: bytes in reverse order, MERGES, WHOLE_WORD, special tokens."""
    texts = [chr(255 - i) for i in range(256)] + ["".join(pair) for pair in MERGES] + [WHOLE_WORD]
    names = [name.encode() for name in special_names()]
    return [(piece, float(id)) for id, piece in enumerate([text.encode("latin-1") for text in texts] + names)]


def toy_llama3() -> Llama3Tokenizer:
    """Return a small Llama 3 vocabulary."""
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
    tokenizer: BinTokenizer | None = None,
    **changes: np.ndarray,
) -> Path:
    """Write a model of random weights, but for `changes`, and its tokenizer; return the path of NAME.bin."""
    tokenizer = tokenizer or toy_tokenizer(config.vocab_size)
    path = folder / f"{name}.bin"
    tensors = random_tensors(config, seed, scale) | changes
    model_file.write(path, version, config, tensors, dtype=dtype, tokenizer_sha256=tokenizer.sha256)
    write_bin(folder / f"{name}.tokenizer.bin", tokenizer, config.vocab_size)
    return path


def toy_data(
    folder: Path, vocab_size: int, *, n_tokens: int = 700, seed: int = 0, tokenizer: Tokenizer | None = None
) -> Path:
    """Write random tokens as prepared data, in documents of 50 tokens; the vocabulary is the toy one by default."""
    rng = np.random.default_rng(seed)
    splits = {}
    for name in shards.SPLITS:
        ids = rng.integers(259, vocab_size, n_tokens)
        ids[::50] = BOS_ID
        block = shards.TokenBlock(ids=ids, documents=-(-n_tokens // 50), text_bytes=3 * n_tokens)
        splits[name] = shards.Split((shards.write_shard(folder / f"{name}_00000.bin", [block], vocab_size),))
    tokenizer = tokenizer or toy_tokenizer(vocab_size)
    write_bin(folder / "tokenizer.bin", tokenizer)
    meta = shards.Meta(
        source="toy", recipe={}, bos_id=1, eos_id=2, vocab_size=vocab_size, tokenizer="tokenizer.bin",
        tokenizer_sha256=tokenizer.sha256, splits=splits,
    )  # fmt: skip
    shards.write_meta(folder / shards.META_FILE, meta)
    return folder


def toy_state(config: ModelConfig, step: int, val_loss: float | None = None, **more: Any) -> RunState:
    """Return what a checkpoint says of its run, for one that was never made by a run."""
    values = {"tokenizer_sha256": "", "data": "", "train_config": {}, "tokenizer": "tokenizer.bin"} | more
    return RunState(step=step, val_loss=val_loss, model_config=config, **values)


class ListCache(list):
    """A KV cache that holds the tokens themselves."""

    def __init__(self, context: int, tokens: Sequence[int] = ()) -> None:
        super().__init__(tokens)
        self.context = self.capacity = self.n_bytes = context

    @property
    def length(self) -> int:
        return len(self)

    def reserve(self, length: int) -> None:
        assert length <= self.context

    def roll(self, keep: int, drop: int) -> None:
        del self[keep : keep + drop]

    def truncate(self, length: int) -> None:
        del self[length:]

    def copy(self) -> "ListCache":
        return ListCache(self.context, self)

    def copy_from(self, other: "ListCache") -> None:
        self[:] = other


class Counting:
    """A forward pass that predicts token t + 1 after t and checks how it is called."""

    kv = "f32"
    choose, losses = staticmethod(choose_token), staticmethod(losses)

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

    def extend_batch(self, caches: Sequence[ListCache], pieces: Sequence[Sequence[int]]) -> list[np.ndarray]:
        assert len({id(cache) for cache in caches}) == len(caches) == len(pieces) and sum(map(len, pieces)) <= 128
        return [self.prefill(cache, piece) for cache, piece in zip(caches, pieces, strict=True)]

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        assert len(tokens) <= self.config.max_seq_len, "past the end of the context"
        logits = np.zeros((len(tokens), self.config.vocab_size), dtype=np.float32)
        logits[np.arange(len(tokens)), (np.asarray(tokens) + 1) % self.config.vocab_size] = 5.0
        return logits


def in_memory(config: ModelConfig, dtype: str, **changes: np.ndarray) -> model_file.ModelFile:
    """Return a model of random weights as if read from a file of this dtype."""
    convert = {
        "f32": np.asarray,
        "bf16": quantize.to_bfloat16,
        "q8": quantize.pack_q8,
        "q4": quantize.pack_q4,
        "v2": lambda weight: quantize.quantize(weight, 16),
    }[dtype]
    tensors = random_tensors(config) | changes
    weights = {name: convert(tensor) if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
    return model_file.ModelFile(Path("memory"), model_file.Header(1, config), weights)


def at_the_end_of_memory(array: np.ndarray) -> np.ndarray:
    """Return a copy that ends where the next page must not be touched."""
    if sys.platform == "win32":
        pytest.skip("needs mprotect")
    page, size = mmap.PAGESIZE, array.nbytes
    pages = -(-size // page) * page
    memory = mmap.mmap(-1, pages + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + pages), ctypes.c_size_t(page), 0) == 0
    copy = np.frombuffer(memory, array.dtype, array.size, pages - size).reshape(array.shape)
    copy[...] = array
    return copy
