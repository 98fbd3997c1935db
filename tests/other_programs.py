"""Files as other programs write them, and what a Llama computes, without llamalet's readers, writers and runtime."""

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llamalet.config import ModelConfig

N_BYTES = 256


def logits(config: ModelConfig, tensors: Mapping[str, np.ndarray], frequencies: np.ndarray, ids: np.ndarray):
    """Return a Llama's float64 logits (T, V); each position rotates the pairs of a head by `frequencies` (D / 2,)."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    T, D = len(ids), config.head_dim
    turns = np.exp(1j * np.outer(np.arange(T), frequencies))[:, None]  # (T, 1, D / 2)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * w[name]

    def rotated(x: np.ndarray) -> np.ndarray:  # (T, heads * D) -> (heads, T, D)
        pairs = x.reshape(T, -1, D // 2, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * turns
        return np.stack([turned.real, turned.imag], -1).reshape(T, -1, D).swapaxes(0, 1)

    x = w["tok_embeddings"][ids]
    for layer in range(config.n_layers):
        of = f"layers.{layer}.".__add__
        h = norm(x, of("attention_norm"))
        q, k = (rotated(h @ w[of(f"attention.{name}")].T) for name in ("wq", "wk"))
        v = (h @ w[of("attention.wv")].T).reshape(T, -1, D).swapaxes(0, 1)
        k, v = (np.repeat(one, config.n_heads // config.n_kv_heads, axis=0) for one in (k, v))
        scores = q @ k.swapaxes(1, 2) / np.sqrt(D) + np.triu(np.full((T, T), -np.inf), 1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = weights / weights.sum(-1, keepdims=True) @ v
        x = x + mixed.swapaxes(0, 1).reshape(T, -1) @ w[of("attention.wo")].T
        h = norm(x, of("ffn_norm"))
        gate = h @ w[of("feed_forward.w1")].T
        x = x + gate / (1 + np.exp(-gate)) * (h @ w[of("feed_forward.w3")].T) @ w[of("feed_forward.w2")].T
    return norm(x, "norm") @ w.get("output", w["tok_embeddings"]).T


# Source: llama.cpp, gguf-py/gguf/constants.py.
GGUF_NAMES = {
    "attention_norm": "attn_norm", "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v",
    "attention.wo": "attn_output", "ffn_norm": "ffn_norm", "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}  # fmt: skip


@torch.inference_mode()
def transformers_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Return what transformers computes with the model in a folder: float32 (T, V)."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return model(torch.from_numpy(ids)[None]).logits[0].numpy()


def gguf_name(name: str) -> str:
    """Return the name that converters give a tensor of ours."""
    whole = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
    if name in whole:
        return f"{whole[name]}.weight"
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{GGUF_NAMES[rest]}.weight"


def write_gguf(
    path: Path,
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    keys: Mapping[str, Any] | None = None,
    more: Mapping[str, np.ndarray] | None = None,
    tensors_per_part: int = 0,
) -> list[Path]:
    """Write a GGUF file of a Llama by the gguf package alone; return its parts.

    Args:
        path: NAME.gguf; if it is split, the parts are NAME-00001-of-00003.gguf and so on.
        config: the model's shape; how RoPE is scaled is left to `keys` and `more`.
        tensors: float32, by our names.
        keys: metadata to add or replace; None leaves one out.
        more: other tensors, by their names in the file.
        tensors_per_part: 0 for one file.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=tensors_per_part)
    others = ["\u2581", *(f"~{i}" for i in range(1, config.vocab_size - 3 - N_BYTES))]
    values = {
        "llama.context_length": config.max_seq_len, "llama.embedding_length": config.dim,
        "llama.block_count": config.n_layers, "llama.feed_forward_length": config.hidden_dim,
        "llama.attention.head_count": config.n_heads, "llama.attention.head_count_kv": config.n_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps, "llama.rope.freq_base": config.rope_theta,
        "llama.rope.dimension_count": config.head_dim, "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(N_BYTES)), *others],
        "tokenizer.ggml.scores": [-float(i) for i in range(config.vocab_size)],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * N_BYTES, *[1] * len(others)],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    }  # fmt: skip
    for key, value in (values | dict(keys or {})).items():
        _add(writer, key, value)
    for name, tensor in ({gguf_name(name): tensor for name, tensor in tensors.items()} | dict(more or {})).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [path] if not tensors_per_part else sorted(path.parent.glob(f"{glob.escape(path.stem)}-*-of-*.gguf"))


def _add(writer: Any, key: str, value: Any) -> None:
    """Add a value in the type in which converters write it."""
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, Sequence):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


TYPE, FACTOR, OLD = "llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.rope.scale_linear"
# Metadata, and by what llama.cpp divides the RoPE frequencies then; tests/llamalet/convert/test_llama_cpp.py asks it.
LLAMA_CPP_FACTORS = [
    ({}, 1.0),
    ({OLD: 4.0}, 4.0),
    ({FACTOR: 4.0}, 4.0),
    ({TYPE: "linear", FACTOR: 4.0}, 4.0),
    ({TYPE: "linear", OLD: 2.5}, 2.5),
    ({FACTOR: 4.0, OLD: 2.0}, 4.0),
    ({FACTOR: 0.0, OLD: 2.0}, 1.0),
    ({TYPE: "linear", FACTOR: 0.5}, 0.5),
    ({TYPE: "none", FACTOR: 4.0}, 1.0),
    ({TYPE: "linear"}, 1.0),
    ({TYPE: "yarn", FACTOR: 1.0}, 1.0),
    ({TYPE: "longrope"}, 1.0),
]
