"""The shapes of models that the runtime is measured with, and the amount of work per turn."""

from dataclasses import dataclass

from llamalet.config import Llama3Scaling, ModelConfig
from llamalet.model_file.header import DTYPES

# Positions for the figures: 8192 and what is decoded after them.
CONTEXT = 8192 + 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A model's shape, and the amount of work per turn, the same for us and the peers.

    Attributes:
        config: the shape.
        dtypes: of the weights that are measured by default.
        tokens: number of tokens of a story.
        batch_tokens: number of tokens of each text in a batch.
        repeats: how often short measurements are repeated; their mean counts.
        depths: numbers of positions in the cache after which decoding is measured.
        depth_tokens: number of tokens decoded there.
    """

    config: ModelConfig
    dtypes: tuple[str, ...] = DTYPES
    tokens: int = 128
    batch_tokens: int = 16
    repeats: int = 1
    depths: tuple[int, ...] = (0, 1024, 4096, 8192)
    depth_tokens: int = 16


SHAPES = {
    "15M": Shape(
        config=ModelConfig.create(
            dim=288, n_layers=6, n_heads=6, hidden_dim=768, vocab_size=32000, max_seq_len=CONTEXT
        ),
        batch_tokens=32,
        repeats=5,
        depth_tokens=64,
    ),
    "110M": Shape(
        config=ModelConfig.create(
            dim=768, n_layers=12, n_heads=12, hidden_dim=2048, vocab_size=32000, max_seq_len=CONTEXT
        ),
        repeats=2,
    ),
    # Llama 3.2 1B. Its float32 file has 5 GB, so it is only written on request.
    "1B": Shape(
        config=ModelConfig.create(
            dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, hidden_dim=8192, vocab_size=128256, max_seq_len=CONTEXT,
            rope_theta=500000.0,
            rope_scaling=Llama3Scaling(
                factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192
            ),
        ),
        dtypes=("q8", "q4"),
        tokens=32,
        batch_tokens=8,
        depths=(0, 2048, 8192),
        depth_tokens=8,
    ),
}  # fmt: skip
