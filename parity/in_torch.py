"""The PyTorch model with the runtime's interface, so that both are evaluated by the same code."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from llamalet.config import ModelConfig, rope_tables
from llamalet.forward_pass import Tokens
from llamalet.model_file.tensors import Rows, row_blocks
from llamalet.reference import losses
from model import Block
from training import weights


class TorchLogits:
    """The training model with the runtime's interface, so that both are evaluated by the same code."""

    losses = staticmethod(losses)

    def __init__(self, tensors: Mapping[str, Rows], config: ModelConfig) -> None:
        self.model = weights.load_model(config, weights.to_state_dict(tensors))
        self.config = config

    @torch.inference_mode()
    def logits(self, tokens: Tokens) -> NDArray[np.float32]:
        """Return float32 (T, V) logits of int64 (T,) ids."""
        return self.model(torch.from_numpy(np.asarray(tokens, np.int64))[None])[0].float().numpy()


class LayeredLogits:
    """The same for a large model: one layer is in memory at a time."""

    losses = staticmethod(losses)

    def __init__(self, tensors: Mapping[str, Rows], config: ModelConfig) -> None:
        self.tensors = tensors
        self.config = config

    @torch.inference_mode()
    def logits(self, tokens: Tokens) -> NDArray[np.float32]:
        """Return float32 (T, V) logits of int64 (T,) ids."""
        c = self.config
        cos, sin = (torch.from_numpy(table)[:, None] for table in rope_tables(c, len(tokens)))
        table = self.tensors["tok_embeddings"]
        x = torch.from_numpy(np.concatenate([table[id : id + 1] for id in map(int, tokens)]))[None]  # (1, T, C)
        block = Block(c, 0.0).eval()
        for layer in range(c.n_layers):
            prefix = f"layers.{layer}."
            names = [name for name in self.tensors if name.startswith(prefix)]
            state = weights.to_state_dict({name.removeprefix(prefix): self.tensors[name] for name in names})
            block.load_state_dict(state, assign=True)
            x = block(x, cos, sin)
        norm = torch.from_numpy(np.array(self.tensors["norm"][0 : c.dim]))
        x = F.rms_norm(x[0], (c.dim,), norm, c.norm_eps)
        output = "tok_embeddings" if c.tied else "output"
        columns = [F.linear(x, torch.from_numpy(rows)) for rows in row_blocks(output, self.tensors[output])]
        return torch.cat(columns, dim=1).numpy()
