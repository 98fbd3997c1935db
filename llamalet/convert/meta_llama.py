"""Meta's folders: params.json and consolidated.00.pth, or one such file for each processor of a group.

The names are ours, and RoPE's order too. Of several files, each has a part of every matrix. params.json says neither
the context nor how RoPE is scaled, only whether; both follow from which of Meta's models it is.

Source: meta-llama/llama and meta-llama/llama-models, llama3/reference_impl/model.py (layers, apply_scaling);
transformers, convert_llama_weights_to_hf.py (contexts, the factor of 3.2).
"""

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamalet.config import RopeScaling
from llamalet.convert.imported_model import (
    ImportedModel,
    build_config,
    check_shapes,
    find_tokenizer,
    llama3_scaling,
    read_json,
)
from llamalet.convert.pytorch_file import MATRICES, TorchTensor, check_weights, load, same
from llamalet.errors import FormatError
from llamalet.model_file.tensors import LLAMA3_VOCAB, tensor_specs

PARAMS = "params.json"
SUFFIX = ".weight"
IGNORED = ("rope.freqs",)
# Along which axis a group of processors cuts each matrix; the embeddings of Llama 1 and 2 are cut along the other one
# than Llama 3's, which their shape tells. What is not here, every processor has whole.
AXES = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}
DEFAULT_ROPE_THETA = 10000.0
SMALL_DIM = 4096  # Llama 3.2's models of text only are narrower than this, all others at least as wide


def read(name: str) -> ImportedModel:
    """Open a folder.

    Args:
        name: its path, or that of a .pth file in it.

    Raises:
        FormatError: if it is no such folder, or damaged.
        UsageError: if torch is not installed.
    """
    folder = Path(name)
    if folder.is_file():
        folder = folder.parent
    params = read_json(folder / PARAMS)
    paths = sorted(folder.glob("consolidated.*.pth"))
    if not paths or [path.name for path in paths] != [f"consolidated.{i:02d}.pth" for i in range(len(paths))]:
        found = ", ".join(path.name for path in paths) or "none"
        raise FormatError(f"{folder}: needs consolidated.00.pth and all that follow it; found: {found}")
    shards = [{key.removesuffix(SUFFIX): tensor for key, tensor in load(path).items()} for path in paths]
    names = [key for key in shards[0] if key not in IGNORED]
    for path, shard in zip(paths, shards, strict=True):
        if lost := set(names).symmetric_difference(key for key in shard if key not in IGNORED):
            raise FormatError(f"{path}: {min(lost)} is in one of the folder's files and not in another")
    found_tensors = {key: _joined(key, paths, [shard[key] for shard in shards], params) for key in names}
    for needed in MATRICES[:2]:
        if needed not in found_tensors:
            raise FormatError(f"{folder}: {needed}{SUFFIX} is missing")
    vocab_size, hidden_dim = (found_tensors[key].shape[0] for key in MATRICES[:2])
    tied = "output" not in found_tensors or same(found_tensors["output"], found_tensors["tok_embeddings"])
    if tied:
        found_tensors.pop("output", None)
    dim, n_heads = params.get("dim"), params.get("n_heads")
    if not isinstance(dim, int) or not isinstance(n_heads, int) or n_heads < 1 or dim % n_heads:
        raise FormatError(f"{folder / PARAMS}: dim={dim!r} must be a multiple of n_heads={n_heads!r}")
    n_kv_heads = params.get("n_kv_heads")
    scaling = _scaling(folder / PARAMS, params)
    config = build_config(
        str(folder / PARAMS),
        {
            "dim": dim, "hidden_dim": hidden_dim, "n_layers": params.get("n_layers"), "n_heads": n_heads,
            "n_kv_heads": n_heads if n_kv_heads is None else n_kv_heads, "head_dim": dim // n_heads,
            "vocab_size": vocab_size, "max_seq_len": _context(params, vocab_size, scaling),
            "norm_eps": params.get("norm_eps", 1e-5), "rope_theta": _theta(params), "rope_scaling": scaling,
            "tied": tied,
        },
    )  # fmt: skip
    claimed = params.get("vocab_size", -1)
    if claimed not in (-1, vocab_size):  # Llama 2's files say -1
        raise FormatError(
            f"{folder}: vocab_size is {claimed} in params.json, and the embeddings have {vocab_size} rows"
        )
    shapes = {key: tensor.shape for key, tensor in found_tensors.items()}
    check_shapes(str(folder), config, shapes, {spec.name: spec.name + SUFFIX for spec in tensor_specs(1, config)})
    vocabulary, data, notes = find_tokenizer(
        [folder / "tokenizer.model", folder.parent / "tokenizer.model"], vocab_size
    )
    return ImportedModel(
        name=str(folder),
        config=config,
        tensors=found_tensors,
        stored=frozenset(tensor.dtype for tensor in found_tensors.values() if len(tensor.shape) == 2),
        tokenizer=vocabulary,
        tokenizer_data=data,
        notes=notes,
    )


def _joined(name: str, paths: Sequence[Path], parts: Sequence[Any], params: Mapping[str, Any]) -> TorchTensor:
    """Return the whole of a tensor whose parts lie in several files."""
    for path, part in zip(paths, parts, strict=True):
        check_weights(path, name + SUFFIX, part, (2,) if name in MATRICES else (1, 2))
    axis = AXES.get(name.rpartition(".")[2])
    if name == "tok_embeddings":
        axis = 0 if parts[0].shape[-1] == params.get("dim") else 1
    if axis is None or len(parts) == 1:
        return TorchTensor((parts[0],))
    for path, part in zip(paths, parts, strict=True):
        check_weights(path, name + SUFFIX, part, (2,))
        if part.shape[1 - axis] != parts[0].shape[1 - axis]:
            raise FormatError(f"{path}: {name}{SUFFIX} does not fit its part in {paths[0].name}")
    return TorchTensor(tuple(parts), axis)


def _theta(params: Mapping[str, Any]) -> float:
    """Return rope_theta; Llama 1 and 2 do not say it."""
    theta = params.get("rope_theta")
    return DEFAULT_ROPE_THETA if theta is None else theta


def _scaling(path: Path, params: Mapping[str, Any]) -> RopeScaling | None:
    """Return how RoPE is scaled: by 8 in Llama 3.1 and 3.3, by 32 in 3.2's small models, or as params.json says."""
    if not params.get("use_scaled_rope"):
        return None
    factor = params.get("rope_scaling_factor") or (32.0 if params.get("dim", 0) < SMALL_DIM else 8.0)
    try:
        return llama3_scaling(float(factor))
    except (TypeError, ValueError, OverflowError):
        raise FormatError(f"{path}: rope_scaling_factor={reprlib.repr(factor)}: must be a number, at least 1") from None


def _context(params: Mapping[str, Any], vocab_size: int, scaling: RopeScaling | None) -> int:
    """Return the context that Meta trained such a model with."""
    if scaling is not None:
        return 131072  # Llama 3.1 and later
    if vocab_size >= LLAMA3_VOCAB:
        return 8192  # Llama 3
    if _theta(params) != DEFAULT_ROPE_THETA:
        return 16384  # Code Llama
    return 2048 if params.get("norm_eps") == 1e-6 else 4096  # Llama 1, Llama 2
