"""Meta's folders: params.json and consolidated.00.pth, or several .pth files that each hold a part of every matrix.

The names of tensors and the order of RoPE's pairs are ours. params.json does not say the context, and says whether RoPE
is scaled but not how; both follow from which of Meta's models it is.

Source: meta-llama/llama and meta-llama/llama-models, llama3/reference_impl/model.py (layers, apply_scaling);
transformers, convert_llama_weights_to_hf.py (contexts, the factor of 3.2).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llamalet import strict
from llamalet.checks import shown
from llamalet.config import RopeScaling
from llamalet.convert.imported_model import DEFAULT_ROPE_THETA, META_PARAMS, ImportedModel, llama3_scaling, unwrapped
from llamalet.convert.pytorch_file import MATRICES, SUFFIX, TorchTensor, check_present, check_weights, imported, load
from llamalet.errors import ConfigError, FormatError
from llamalet.hf_names import TOKENIZER_MODEL
from llamalet.model_file.reader import LLAMA3_VOCAB

IGNORED = ("rope.freqs",)
# The axis along which each matrix is split over several files. Llama 3's embeddings are split along axis 0, those of
# Llama 1 and 2 along axis 1; their shape tells which. Every file has all of the tensors that are not listed.
AXES = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}
SMALL_DIM = 4096  # only Llama 3.2's 1B and 3B are narrower


class Params(NamedTuple):
    """The fields of params.json that are used."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int | None = None
    norm_eps: float = 1e-5
    vocab_size: Any = -1  # Llama 2's files say -1
    rope_theta: float | None = None  # Llama 1 and 2 do not say it
    use_scaled_rope: bool | None = None
    rope_scaling_factor: float | None = None


def read(name: str) -> ImportedModel:
    """Open a folder.

    Args:
        name: its path, or that of a .pth file in it.

    Raises:
        FormatError: if it is not such a folder, or damaged.
        UsageError: if torch is not installed.
    """
    folder = Path(name)
    if folder.is_file():
        folder = folder.parent
    fields = strict.read_json(folder / META_PARAMS, FormatError)
    params = strict.build(Params, fields, str(folder / META_PARAMS), FormatError, ignore_unknown=True)
    tensors = _read_tensors(folder, params)
    check_present(folder, tensors)
    vocab_size, scaling = tensors["tok_embeddings"].shape[0], _scaling(folder / META_PARAMS, params)
    if type(params.vocab_size) is not int or params.vocab_size not in (-1, vocab_size):
        raise FormatError(
            f"{folder / META_PARAMS}: vocab_size={shown(params.vocab_size)}: must be {vocab_size}, the rows of the "
            "embeddings, or -1"
        )
    shape = {
        "dim": params.dim,
        "n_layers": params.n_layers,
        "n_heads": params.n_heads,
        "n_kv_heads": params.n_kv_heads,
        "norm_eps": params.norm_eps,
        "vocab_size": vocab_size,
        "max_seq_len": _context(params, vocab_size, scaling),
        "rope_theta": params.rope_theta,
        "rope_scaling": scaling,
    }
    return imported(
        folder,
        tensors,
        shape,
        [path / TOKENIZER_MODEL for path in (folder, folder.parent)],
        missing=f"{folder}: no {TOKENIZER_MODEL} in it or beside it",
    )


def _read_tensors(folder: Path, params: Params) -> dict[str, TorchTensor]:
    """Return the tensors by our names, each joined from its parts in the files.

    Raises:
        FormatError: if a file is missing, or the files do not fit together.
    """
    paths = sorted(folder.glob("consolidated.*.pth"))
    if not paths or [path.name for path in paths] != [f"consolidated.{i:02d}.pth" for i in range(len(paths))]:
        found = ", ".join(path.name for path in paths) or "none"
        raise FormatError(f"{folder}: needs consolidated.00.pth and all that follow it; found: {found}")
    shards = [
        {key.removesuffix(SUFFIX): tensor for key, tensor in unwrapped(str(path), load(path)).items()} for path in paths
    ]
    names = [key for key in shards[0] if key not in IGNORED]
    for path, shard in zip(paths, shards, strict=True):
        if lost := set(names).symmetric_difference(key for key in shard if key not in IGNORED):
            raise FormatError(f"{path}: {min(lost)} is in one of the folder's files and not in another")
    return {key: _joined(key, paths, [shard[key] for shard in shards], params) for key in names}


def _joined(name: str, paths: Sequence[Path], parts: Sequence[Any], params: Params) -> TorchTensor:
    """Return a tensor whose parts are in several files."""
    for path, part in zip(paths, parts, strict=True):
        check_weights(path, name + SUFFIX, part, (2,) if name in MATRICES else (1, 2))
    axis = AXES.get(name.rpartition(".")[2])
    if name == "tok_embeddings":
        axis = 0 if parts[0].shape[-1] == params.dim else 1
    if axis is None or len(parts) == 1:
        return TorchTensor((parts[0],))
    for path, part in zip(paths, parts, strict=True):
        check_weights(path, name + SUFFIX, part, (2,))
        if part.shape[1 - axis] != parts[0].shape[1 - axis]:
            raise FormatError(f"{path}: {name}{SUFFIX} does not fit its part in {paths[0].name}")
    return TorchTensor(tuple(parts), axis)


def _scaling(path: Path, params: Params) -> RopeScaling | None:
    """Return how RoPE is scaled: by 8 in Llama 3.1 and 3.3, by 32 in 3.2's small models, or as params.json says."""
    if not params.use_scaled_rope:
        return None
    factor = params.rope_scaling_factor or (32.0 if params.dim < SMALL_DIM else 8.0)
    try:
        return llama3_scaling(factor)
    except ConfigError:
        raise FormatError(f"{path}: rope_scaling_factor={factor:g}: must be at least 1") from None


def _context(params: Params, vocab_size: int, scaling: RopeScaling | None) -> int:
    """Return the context that Meta trained this model with."""
    if scaling is not None:
        return 131072  # Llama 3.1 and later
    if vocab_size >= LLAMA3_VOCAB:
        return 8192  # Llama 3
    if params.rope_theta not in (None, DEFAULT_ROPE_THETA):
        return 16384  # Code Llama
    return 2048 if params.norm_eps == 1e-6 else 4096  # Llama 1, Llama 2
