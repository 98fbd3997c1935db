"""Weights between PyTorch and numpy. Names are the same in both, but a state dict's end in ".weight"."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llamalet.config import ModelConfig
from llamalet.model_file.checkpoint import SUFFIX
from llamalet.model_file.tensors import Rows
from model import Llama


def to_arrays(state: Mapping[str, torch.Tensor]) -> dict[str, NDArray[np.float32]]:
    """Return a state dict as float32 arrays under their names in model files; CPU tensors in float32 share memory."""
    return {name.removesuffix(SUFFIX): tensor.detach().float().cpu().numpy() for name, tensor in state.items()}


def to_state_dict(tensors: Mapping[str, Rows]) -> dict[str, torch.Tensor]:
    """Invert `to_arrays`, for the tensors of any `ImportedModel`; return float32 copies."""
    return {name + SUFFIX: torch.tensor(tensor[0 : tensor.shape[0]]) for name, tensor in tensors.items()}


def to_numpy(tensors: Mapping[str, torch.Tensor]) -> dict[str, NDArray[Any]]:
    """Return tensors as arrays of the same names and types; those of tensors on the CPU share their memory."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}


def to_torch(arrays: Mapping[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
    """Return arrays as tensors of the same names and types, which share their memory."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def load_model(config: ModelConfig, state: Mapping[str, torch.Tensor]) -> Llama:
    """Return the training model with these weights, float32 on the CPU, in evaluation mode; every name must match."""
    model = Llama(config)
    model.load_state_dict(state, strict=True)
    return model.eval()
