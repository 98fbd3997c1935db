"""A model read from any format, under this project's names, and what the readers have in common.

Every reader returns an `ImportedModel`: the model's shape, its tensors, which are read on demand, and its tokenizer.
Every writer takes one, so that any format is converted to any other with one block of rows in memory at a time.
"""

import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from llamalet import tokenizer
from llamalet.checks import shown
from llamalet.config import CAPS, Llama3Scaling, ModelConfig
from llamalet.errors import ConfigError, FormatError, TokenizerError, UsageError, note
from llamalet.files import reading, refuse_odd
from llamalet.model_file.quantize import from_bfloat16
from llamalet.model_file.tensors import BLOCK_WEIGHTS, Rows, row_blocks, tensor_specs
from llamalet.tokenizer import Llama3Tokenizer, Tokenizer, declared

Floats = NDArray[np.float32]

META_PARAMS = "params.json"  # of Meta's folders
DEFAULT_ROPE_THETA = 10000.0  # Llama 1's and 2's

# What modules that wrap another one put into the names of its tensors.
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

T = TypeVar("T")

REPORT_AFTER_S = 2.0
LOSS_WEIGHTS = 1 << 20
MAX_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class ImportedModel:
    """A model in any format.

    Attributes:
        name: its path, for messages.
        config: its shape.
        tensors: its weights by our names; rows are read from the file, as float32, when they are asked for.
        stored: the types in which its matrices are stored, like F16 or Q4_K.
        tokenizer: its vocabulary; None if there is none, or none that this project reads.
        tokenizer_data: the tokenizer's file, unchanged; empty if there is none.
        tokenizer_problem: why the tokenizer that it should have is missing or cannot be read; empty if it has one, and
            for a model that comes without one.
        tokenizer_sha256: identity of the tokenizer that it was trained with; None if it does not say.
        chat_template: the Jinja template that turns a conversation into a prompt, if there is one.
        stop_tokens: the ids that end a text, if the model itself says; the tokenizer's are the same then.
        notes: what the user should know, a line each.
        files: the files of which it consists, if they are not just the one at `name`.
    """

    name: str
    config: ModelConfig
    tensors: Mapping[str, Rows]
    stored: frozenset[str] = frozenset({"F32"})
    tokenizer: Tokenizer | None = None
    tokenizer_data: bytes = b""
    tokenizer_problem: str = ""
    tokenizer_sha256: str | None = None
    chat_template: str | None = None
    stop_tokens: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    @property
    def dtype(self) -> str:
        """The type, one of model_file's DTYPES, that keeps the width of the stored weights."""
        if self.stored & {"F32", "F64"}:
            return "f32"
        return "bf16" if self.stored <= {"F16", "BF16"} else "q8"


class Reported(dict[str, Rows]):
    """Tensors that report on stderr, every other second, what share of the model has been asked for."""

    def __init__(self, tensors: Mapping[str, Rows], config: ModelConfig) -> None:
        super().__init__(tensors)
        self._sizes = {spec.name: math.prod(spec.shape) for spec in tensor_specs(1, config)}
        self._done, self._reported = 0, time.perf_counter()

    def __getitem__(self, name: str) -> Rows:
        if time.perf_counter() - self._reported > REPORT_AFTER_S:
            self._reported = time.perf_counter()
            note(f"  {self._done / sum(self._sizes.values()):.0%} ({name})")
        self._done += self._sizes[name]
        return super().__getitem__(name)


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a file, whose rows are read and decoded on demand.

    Attributes:
        path: the file.
        offset: byte offset of the tensor.
        shape: (rows, cols) or (cols,), in weights.
        dtype: the type in which it is stored.
        row_bytes: number of bytes of a row.
        decode: converts uint8 (n, row_bytes) to float32 (n, cols).
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str
    row_bytes: int
    decode: Callable[[NDArray[np.uint8]], Floats]

    def __getitem__(self, rows: slice) -> Floats:
        start, stop, _ = rows.indices(self.shape[0])
        n_bytes = max(0, stop - start) * self.row_bytes
        with reading(self.path, FormatError):
            raw = np.fromfile(self.path, np.uint8, n_bytes, offset=self.offset + start * self.row_bytes)
        if len(raw) != n_bytes:
            raise FormatError(f"{self.path}: ends within a tensor: truncated")
        return self.decode(raw.reshape(-1, self.row_bytes)).reshape(-1, *self.shape[1:])


@dataclass(frozen=True)
class Reordered:
    """A tensor with its rows in another order: row i is row order[i] of `tensor`."""

    tensor: Rows
    order: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, that of `tensor` too."""
        return self.tensor.shape

    def __getitem__(self, rows: slice) -> Floats:
        wanted = self.order[rows]
        first, last = int(wanted.min()), int(wanted.max())
        return self.tensor[first : last + 1][wanted - first]


# The plain types of other formats, and their conversion to float32.
DECODERS: Mapping[str, Callable[[NDArray[np.uint8]], Floats]] = {
    "F32": lambda raw: raw.view("<f4"),
    "F16": lambda raw: raw.view("<f2").astype(np.float32),
    "BF16": lambda raw: from_bfloat16(raw.view("<u2")),
}


def difference(tensors: Mapping[str, Rows], others: Mapping[str, Rows]) -> float:
    """Return the largest relative difference of two models' tensors; infinity if their names differ.

    A tensor's relative difference is the root mean square of the difference over that of the tensor.
    """
    worst = 0.0 if tensors.keys() == others.keys() else math.inf
    for name in tensors if not worst else ():
        error = total = 0.0
        start, other = 0, others[name]
        for block in row_blocks(name, tensors[name]):
            gap = block - other[start : start + len(block)]
            error, total = error + float(np.vdot(gap, gap)), total + float(np.vdot(block, block))
            start += len(block)
        worst = max(worst, math.sqrt(error / total) if total else math.inf * error if error else 0.0)
    return worst


def rounding_losses(tensors: Mapping[str, Rows], rounded: Mapping[str, Rows]) -> dict[str, float]:
    """Return how far matrices are off by their names, as a share of their root mean square.

    Of a large matrix the first LOSS_WEIGHTS weights are compared: rounding treats all rows alike.
    """
    losses = {}
    for name, tensor in tensors.items():
        if len(tensor.shape) == 2:
            rows = slice(0, max(1, LOSS_WEIGHTS // tensor.shape[1]))
            weights = tensor[rows]
            gap = weights - rounded[name][rows]
            losses[name] = math.sqrt(float(np.vdot(gap, gap)) / max(float(np.vdot(weights, weights)), 1e-30))
    return losses


def same(a: Rows, b: Rows) -> bool:
    """Return whether two matrices hold the same values."""
    step = max(1, BLOCK_WEIGHTS // a.shape[-1])
    return tuple(a.shape) == tuple(b.shape) and all(
        np.array_equal(a[at : at + step], b[at : at + step]) for at in range(0, a.shape[0], step)
    )


def unwrapped(name: str, tensors: Mapping[str, T]) -> dict[str, T]:
    """Return tensors by their names without what torch.compile, DDP and the like put in, at any place.

    Raises:
        FormatError: naming the file, if two names become one.
    """
    found: dict[str, T] = {}
    for theirs, tensor in tensors.items():
        plain = ".".join(part for part in theirs.split(".") if part not in WRAPPERS)
        if plain in found:
            raise FormatError(f"{name}: {theirs} occurs twice, as {plain}")
        found[plain] = tensor
    return found


def expand(table: Mapping[str, str], n_layers: int) -> dict[str, str]:
    """Return a format's table of names, ours -> theirs, with one row per layer for names with a *."""
    return {
        ours.replace("*", str(layer)): theirs.replace("*", str(layer))
        for ours, theirs in table.items()
        for layer in (range(n_layers) if "*" in ours else (0,))
    }


def check_shapes(name: str, config: ModelConfig, found: Mapping[str, Sequence[int]], names: Mapping[str, str]) -> None:
    """Raise a FormatError that names tensors which are missing, unknown or of another shape than the config says.

    Args:
        name: the model, for the message.
        config: its shape.
        found: the shapes of its tensors by our names; unknown tensors by theirs.
        names: ours -> theirs, for the message.
    """
    expected = {spec.name: spec.shape for spec in tensor_specs(1, config)}
    problems = [f"{names[ours]} is missing" for ours in expected if ours not in found]
    problems += [
        f"{names[ours]} has shape {tuple(found[ours])} where the config asks for {shape}"
        for ours, shape in expected.items()
        if ours in found and tuple(found[ours]) != shape
    ]
    problems += [f"{names.get(ours, ours)} is not part of a Llama model" for ours in found if ours not in expected]
    if problems:
        rest = f"; and {len(problems) - MAX_SHOWN} more" if len(problems) > MAX_SHOWN else ""
        raise FormatError(f"{name}: {'; '.join(problems[:MAX_SHOWN])}{rest}")


def build_config(name: str, fields: Mapping[str, Any], theirs: Mapping[str, str] | None = None) -> ModelConfig:
    """Return a config with these fields. Types must be right: only a whole number may stand for a float.

    Three fields may be None or left out: head_dim is dim / n_heads then, n_kv_heads is n_heads, and rope_theta is
    DEFAULT_ROPE_THETA.

    Args:
        name: the file, for messages.
        fields: the values by our names.
        theirs: the file's names of fields, where they are not ours, for messages.

    Raises:
        FormatError: naming every value that is missing, of another type or out of range.
    """
    defaults = {"n_kv_heads": fields["n_heads"], "rope_theta": DEFAULT_ROPE_THETA}
    values = {**fields, **{key: value for key, value in defaults.items() if fields.get(key) is None}}
    if values.get("head_dim") is None:
        values.pop("head_dim", None)
    problems = []
    for key, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key in CAPS and not (is_number and isinstance(value, int)):
            problems.append(f"{key}={shown(value)}: must be a whole number")
        elif key in CAPS and abs(value) > CAPS[key]:
            problems.append(f"{key}={shown(value)}: must be a whole number from 1 to {CAPS[key]}")
        elif key in ("norm_eps", "rope_theta") and not (is_number and abs(value) <= sys.float_info.max):
            problems.append(f"{key}={shown(value)}: must be a number")
    try:
        ConfigError.raise_for(problems)
        values |= {key: float(values[key]) for key in ("norm_eps", "rope_theta")}
        return ModelConfig(**_with_head_dim(values))
    except ConfigError as error:
        words = re.sub(r"\w+(?==)", lambda found: (theirs or {}).get(found[0], found[0]), str(error))
        raise FormatError(f"{name}: {words}") from None


def _with_head_dim(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a config's values, with the usual head_dim if there is none.

    Raises:
        ConfigError: if n_heads does not divide dim.
    """
    if "head_dim" in values:
        return values
    dim, n_heads = values["dim"], values["n_heads"]
    if n_heads < 1 or dim % n_heads:
        raise ConfigError(f"dim={dim}: must be a multiple of n_heads={n_heads}")
    return {**values, "head_dim": dim // n_heads}


def stored_types(tensors: Iterable[Any]) -> frozenset[str]:
    """Return the types of the matrices among some tensors, which have a shape and a dtype."""
    return frozenset(tensor.dtype for tensor in tensors if len(tensor.shape) == 2)


def llama3_scaling(factor: float) -> Llama3Scaling:
    """Return the RoPE scaling of Llama 3.1 and later models; only the factor differs: 8, or 32 in 3.2's 1B and 3B."""
    return Llama3Scaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)


def find_tokenizer(
    paths: Sequence[Path], vocab_size: int, folder: declared.Folder | None = None
) -> tuple[Tokenizer | None, bytes, tuple[str, ...]]:
    """Return the first usable tokenizer among some files, its bytes, and what is wrong with those that are not usable.

    Args:
        paths: the files, the best first; they need not exist.
        vocab_size: the size that the tokenizer must have.
        folder: the files beside them, if some are read already.

    Raises:
        TokenizerError: if something else is in the place of one.
    """
    problems = []
    refuse_odd(paths, TokenizerError)
    for path in paths:
        if path.is_file():
            try:
                return *compact(*tokenizer.read(path, vocab_size, folder)), ()
            except (TokenizerError, UsageError) as error:
                problems.append(str(error))
    return None, b"", tuple(problems)


def remove_stale(paths: Iterable[Path], keep: Path | None) -> None:
    """Remove files that would be read instead of those just written, except `keep`, and print a note for each."""
    for path in paths:
        if path.is_file() and not (keep is not None and keep.exists() and path.samefile(keep)):
            path.unlink()
            print(f"note: removed {path}, which would be read instead of what was written")


def set_aside(paths: Iterable[Path], keep: Path | None) -> None:
    """Rename files of a model that was replaced, which would be read with the new one, except `keep`; say which."""
    for path in paths:
        if path.is_file() and not (keep is not None and keep.exists() and path.samefile(keep)):
            path.replace(path.with_name(f"{path.name}.old"))
            print(f"note: renamed {path} to {path.name}.old: it belongs to the model that was replaced")


def compact(vocabulary: Tokenizer, data: bytes) -> tuple[Tokenizer, bytes]:
    """Return a vocabulary and its file; a Llama 3 tokenizer.json (17 MB) becomes a rank table of a tenth the size."""
    if not isinstance(vocabulary, Llama3Tokenizer) or vocabulary.suffix != "json":
        return vocabulary, data
    rows = vocabulary.pieces()
    return Llama3Tokenizer(rows, "tokenizer.json", suffix="bin").with_ids(vocabulary.ids), tokenizer.pack(rows)
