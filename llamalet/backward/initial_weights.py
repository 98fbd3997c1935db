"""The weights that a new model begins with: those of model.py, drawn by numpy.

The numbers come from numpy's RandomState (Mersenne Twister), whose stream of a seed never changes (NEP 19). Tensors are
drawn in the order of the model file, version 1.
"""

import math

import numpy as np
from numpy.typing import NDArray

from llamalet.config import ModelConfig
from llamalet.model_file.tensors import tensor_specs

Array = NDArray[np.float32]


def initial_weights(config: ModelConfig, seed: int, init: str) -> dict[str, Array]:
    """Return the checkpoint's tensors by name, without ".weight": float32.

    Args:
        config: the model's shape.
        seed: any whole number from 0.
        init: normal, or copying.

    Source: as in model.py, `init_weights` and `start_by_copying`.
    """
    random = np.random.RandomState([seed % 2**32, seed >> 32])
    weights = {}
    for spec in tensor_specs(1, config):
        if len(spec.shape) == 1:
            weights[spec.name] = np.ones(spec.shape, np.float32)
            continue
        adds_to_residual = spec.name.endswith(("wo", "w2"))
        std = 0.02 / math.sqrt(2 * config.n_layers) if adds_to_residual else 0.02
        weights[spec.name] = _normal(random, std, spec.shape)
    if init == "copying":
        _start_by_copying(weights, config, random)
    return weights


def _start_by_copying(weights: dict[str, Array], config: ModelConfig, random: np.random.RandomState) -> None:
    """Draw the matrices of attention anew, so that each head attends to similar tokens and copies them."""
    c = config
    std_k = math.sqrt(math.log(c.max_seq_len) / (c.dim * math.sqrt(c.head_dim)))

    def per_query_head(weight: Array) -> Array:
        """Repeat each head of (G D, C) for every query head that shares it: (H D, C)."""
        heads = weight.reshape(c.n_kv_heads, c.head_dim, c.dim)
        return np.repeat(heads, c.n_heads // c.n_kv_heads, axis=0).reshape(-1, c.dim)

    for layer in range(c.n_layers):
        prefix = f"layers.{layer}.attention."
        wv = weights[prefix + "wv"] = _normal(random, c.dim**-0.5, (c.kv_dim, c.dim))
        wk = weights[prefix + "wk"] = _normal(random, std_k, (c.kv_dim, c.dim))
        weights[prefix + "wo"] = np.ascontiguousarray(per_query_head(wv).T)
        weights[prefix + "wq"] = per_query_head(wk)


def _normal(random: np.random.RandomState, std: float, shape: tuple[int, ...]) -> Array:
    """Return numbers around 0 with a standard deviation."""
    return (std * random.standard_normal(shape)).astype(np.float32)
