"""Weights on their way between the training model and the files that carry them.

The names are the same everywhere; PyTorch's state dict alone ends each with ".weight".
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llamalet import model_file, tokenizer
from llamalet.config import ModelConfig
from llamalet.convert import bin_file
from llamalet.convert.imported_model import ImportedModel
from llamalet.model_file.checkpoint import SUFFIX
from llamalet.model_file.quantize import dequantize
from llamalet.model_file.tensors import ModelFile, Rows
from model import Llama


def to_arrays(state: Mapping[str, torch.Tensor]) -> dict[str, NDArray[np.float32]]:
    """Return a state dict's tensors by their names in files, float32; float32 tensors on the CPU share their memory."""
    return {name.removesuffix(SUFFIX): tensor.detach().float().cpu().numpy() for name, tensor in state.items()}


def to_numpy(tensors: Mapping[str, torch.Tensor]) -> dict[str, NDArray[Any]]:
    """Return tensors as arrays of the same names and types; those of tensors on the CPU share their memory."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}


def to_torch(arrays: Mapping[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
    """Return arrays as tensors of the same names and types, which share their memory."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def to_state(tensors: Mapping[str, model_file.Tensor]) -> dict[str, torch.Tensor]:
    """Return a file's tensors, in whatever form, as a state dict of float32 copies."""
    return {name + SUFFIX: torch.tensor(dequantize(tensor)) for name, tensor in tensors.items()}


def read_state(tensors: Mapping[str, Rows]) -> dict[str, torch.Tensor]:
    """Return the tensors of a model from anywhere (llamalet/convert) as a state dict of float32 copies."""
    return {name + SUFFIX: torch.tensor(tensor[0 : tensor.shape[0]]) for name, tensor in tensors.items()}


def load_model(config: ModelConfig, state: Mapping[str, torch.Tensor]) -> Llama:
    """Return the training model with these weights, float32 on the CPU, in evaluation mode; every name must match."""
    model = Llama(config)
    model.load_state_dict(state, strict=True)
    return model.eval()


def load_bin(path: str | Path) -> Llama:
    """Return the training model with the weights of a .bin of any version, float32 on the CPU, in evaluation mode.

    Raises:
        FormatError: if the file breaks a rule of its format.
    """
    file = model_file.read(path)
    return load_model(file.config, to_state(file.tensors))


def write_bin(
    path: str | Path,
    version: int,
    config: ModelConfig,
    state: Mapping[str, torch.Tensor],
    tokenizer_path: Path,
    *,
    dtype: str | None = None,
    force: bool = False,
) -> ModelFile:
    """Write a model file and its tokenizer, from PyTorch's weights: see `llamalet.convert.bin_file.write`.

    Args:
        path: NAME.bin, the file to make or replace.
        version: 0 to 3.
        config: the model's shape.
        state: the model's state dict; not changed.
        tokenizer_path: the tokenizer the model was trained with.
        dtype: see `llamalet.model_file.tensors.write`.
        force: see `llamalet.model_file.tensors.write`.

    Raises:
        ConfigError: if the version cannot carry the model.
        TokenizerError: if the tokenizer is damaged or of another vocabulary size.
        NonFiniteError: if a weight is NaN or infinite.
    """
    vocabulary = tokenizer.load(tokenizer_path, config.vocab_size)
    source = ImportedModel(
        name=str(path),
        config=config,
        tensors=to_arrays(state),
        tokenizer=vocabulary,
        tokenizer_data=tokenizer_path.read_bytes(),
    )
    return bin_file.write(path, source, version, dtype=dtype, force=force)
