"""llama2.c's training checkpoints: the ckpt.pt that its train.py saves. The names of tensors are ours.

Source: llama2.c, model.py and train.py.
"""

import shlex
from pathlib import Path

from llamalet.config import Llama3Scaling
from llamalet.convert.imported_model import ImportedModel, unwrapped
from llamalet.convert.pytorch_file import MATRICES, SUFFIX, TorchTensor, check_present, check_weights, imported, load
from llamalet.errors import FormatError
from llamalet.hf_names import TOKENIZER_MODEL
from llamalet.model_file.header import LLAMA2C
from llamalet.model_file.reader import LLAMA3_VOCAB

IGNORED = ("freqs_cis", "freqs_cos", "freqs_sin")  # RoPE's tables
FIELDS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")


def read(name: str, *, rope_theta: float | None = None, rope_scaling: Llama3Scaling | None = None) -> ImportedModel:
    """Open a checkpoint.

    Args:
        name: its path.
        rope_theta: what the model was trained with, which the file does not say; None takes llama2.c's.
        rope_scaling: how RoPE is scaled, which the file does not say either.

    Raises:
        FormatError: if it is damaged, or not a checkpoint of llama2.c's.
        UsageError: if torch is not installed.
    """
    path = Path(name)
    saved = load(path)
    arguments, state = saved.get("model_args"), saved.get("model")
    if not isinstance(arguments, dict) or not isinstance(state, dict):
        raise FormatError(f"{path}: not a checkpoint of llama2.c's: it has no model and model_args")
    found: dict[str, TorchTensor] = {}
    for key, tensor in unwrapped(str(path), {str(key): tensor for key, tensor in state.items()}).items():
        ours = key.removesuffix(SUFFIX)
        if ours not in IGNORED:
            check_weights(path, key, tensor, (2,) if ours in MATRICES else (1, 2))
            found[ours] = TorchTensor((tensor,))
    check_present(path, found)
    if rope_theta is None and found["tok_embeddings"].shape[0] >= LLAMA3_VOCAB:
        raise FormatError(
            f"{path}: does not say its rope_theta, and with Llama 3's vocabulary it is not llama2.c's: "
            f"python export.py NEW.bin --llama2c {shlex.quote(str(path))} --rope_theta 500000"
        )
    said = {key: arguments.get(key) for key in FIELDS} | {"norm_eps": arguments.get("norm_eps", LLAMA2C["norm_eps"])}
    rope = {"rope_theta": rope_theta, "rope_scaling": rope_scaling}
    return imported(path, found, said | rope, [path.parent / TOKENIZER_MODEL])
