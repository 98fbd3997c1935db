"""llama2.c's training checkpoints: the ckpt.pt that its train.py saves. Its names are ours.

Source: llama2.c, model.py and train.py.
"""

from pathlib import Path

from llamalet.config import RopeScaling
from llamalet.convert.imported_model import ImportedModel, build_config, check_shapes, find_tokenizer
from llamalet.convert.pytorch_file import MATRICES, TorchTensor, check_weights, load, same
from llamalet.errors import FormatError
from llamalet.model_file.header import LLAMA2C
from llamalet.model_file.tensors import LLAMA3_VOCAB, tensor_specs

SUFFIX = ".weight"
PREFIXES = ("_orig_mod.", "module.")  # torch.compile's and DDP's
IGNORED = ("freqs_cis", "freqs_cos", "freqs_sin")  # RoPE's tables
WIDTHS = ("dim", "n_layers", "n_heads", "vocab_size", "max_seq_len")


def read(name: str, *, rope_theta: float | None = None, rope_scaling: RopeScaling | None = None) -> ImportedModel:
    """Open a checkpoint.

    Args:
        name: its path.
        rope_theta: what the model was trained with, if not llama2.c's: the file does not say.
        rope_scaling: how RoPE is scaled, if it is.

    Raises:
        FormatError: if it is damaged, or holds another model than llama2.c's.
        UsageError: if torch is not installed.
    """
    path = Path(name)
    saved = load(path)
    arguments, state = saved.get("model_args"), saved.get("model")
    if not isinstance(arguments, dict) or not isinstance(state, dict):
        raise FormatError(f"{path}: no checkpoint of llama2.c's: it has no model and model_args")
    found: dict[str, TorchTensor] = {}
    for key, tensor in state.items():
        ours = _without_prefixes(str(key)).removesuffix(SUFFIX)
        if ours in found:
            raise FormatError(f"{path}: {key} stands there twice")
        if ours not in IGNORED:
            check_weights(path, str(key), tensor, (2,) if ours in MATRICES else (1, 2))
            found[ours] = TorchTensor((tensor,))
    for needed in MATRICES[:2]:
        if needed not in found:
            raise FormatError(f"{path}: {needed}{SUFFIX} is missing")
    tied = "output" not in found or same(found["output"], found["tok_embeddings"])
    if tied:
        found.pop("output", None)
    dim, n_heads = arguments.get("dim"), arguments.get("n_heads")
    if not isinstance(dim, int) or not isinstance(n_heads, int) or n_heads < 1 or dim % n_heads:
        raise FormatError(f"{path}: dim={dim!r} must be a multiple of n_heads={n_heads!r}")
    if rope_theta is None and found["tok_embeddings"].shape[0] >= LLAMA3_VOCAB:
        raise FormatError(
            f"{path}: does not say its rope_theta, and with Llama 3's vocabulary it is not llama2.c's: "
            f"python export.py NEW.bin --llama2c {path} --rope_theta 500000"
        )
    n_kv_heads = arguments.get("n_kv_heads")
    config = build_config(
        str(path),
        {key: arguments.get(key) for key in WIDTHS}
        | {
            "n_kv_heads": n_heads if n_kv_heads is None else n_kv_heads,
            "head_dim": dim // n_heads,
            "hidden_dim": found["layers.0.feed_forward.w1"].shape[0],
            "norm_eps": arguments.get("norm_eps", LLAMA2C["norm_eps"]),
            "rope_theta": LLAMA2C["rope_theta"] if rope_theta is None else rope_theta,
            "rope_scaling": rope_scaling,
            "tied": tied,
        },
    )
    names = {spec.name: spec.name + SUFFIX for spec in tensor_specs(1, config)}
    check_shapes(str(path), config, {ours: tensor.shape for ours, tensor in found.items()}, names)
    vocabulary, data, notes = find_tokenizer([path.parent / "tokenizer.model"], config.vocab_size)
    return ImportedModel(
        name=str(path),
        config=config,
        tensors=found,
        stored=frozenset(tensor.dtype for tensor in found.values() if len(tensor.shape) == 2),
        tokenizer=vocabulary,
        tokenizer_data=data,
        notes=notes,
    )


def _without_prefixes(name: str) -> str:
    """Return a parameter's name without what wrappers put before it, however often."""
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name
