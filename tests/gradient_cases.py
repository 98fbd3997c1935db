"""Small models of every kind, and batches for them, for the tests of gradients."""

import numpy as np
from toy import SMALL_MODELS

from llamalet.config import IGNORED, Llama3Scaling, ModelConfig

LLAMA3 = Llama3Scaling(factor=4, low_freq_factor=1, high_freq_factor=4, original_max_seq_len=16)
WIDE_HEADS = ModelConfig.create(
    dim=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=24, hidden_dim=48, vocab_size=97, max_seq_len=24,
    rope_scaling=LLAMA3, norm_eps=1e-3, tied=False,
)  # fmt: skip
MODELS = SMALL_MODELS | {"wide-heads-llama3": WIDE_HEADS}


def batch(config, B=2, T=9, ignored=3, seed=0):
    """Random tokens and targets, some of them ignored, and one token that stands several times."""
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(0, config.vocab_size, (2, B, T))
    tokens[:, ::4] = 5
    targets.reshape(-1)[rng.permutation(B * T)[:ignored]] = IGNORED
    return tokens, targets
