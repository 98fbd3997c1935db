"""Training checkpoints as models. model_file/checkpoint.py has their layout."""

import dataclasses
from pathlib import Path

from llamalet import tokenizer
from llamalet.convert import safetensors_file
from llamalet.convert.imported_model import ImportedModel, check_shapes
from llamalet.errors import CheckpointError, FormatError, TokenizerError, UsageError
from llamalet.hf_names import MODEL_SAFETENSORS
from llamalet.model_file.checkpoint import SUFFIX, best_first, best_of, list_steps, read_facts, verify
from llamalet.model_file.tensors import BinTensor, tensor_specs


def read(name: str, *, check: bool = False) -> ImportedModel:
    """Open a checkpoint, or the best one of a run's folder.

    Args:
        name: the checkpoint's folder or the run's.
        check: whether to compare the checkpoint's files with their digests; of a run, the best valid one is taken then.

    Raises:
        CheckpointError: if a file is missing or damaged, or the tensors do not match the config.
    """
    folder = Path(name)
    if steps := list_steps(folder):
        folder = best_of(folder) if check else best_first(steps)[0]
    elif check:
        verify(folder)
    facts = read_facts(folder)
    config, tokenizer_path = facts.model_config, folder / Path(facts.tokenizer).name
    try:
        stored = safetensors_file.read_arrays(folder / MODEL_SAFETENSORS)
        tensors = {theirs.removesuffix(SUFFIX): BinTensor(array) for theirs, array in stored.items()}
        names = {spec.name: spec.name + SUFFIX for spec in tensor_specs(1, config)}
        check_shapes(MODEL_SAFETENSORS, config, {ours: tensor.shape for ours, tensor in tensors.items()}, names)
    except (OSError, FormatError) as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from None
    model = ImportedModel(name=str(folder), config=config, tensors=tensors, tokenizer_sha256=facts.tokenizer_sha256)
    try:
        vocabulary, data = tokenizer.read(tokenizer_path, config.vocab_size)
    except (TokenizerError, UsageError) as error:
        return dataclasses.replace(model, tokenizer_problem=str(error))
    return dataclasses.replace(model, tokenizer=vocabulary, tokenizer_data=data)
