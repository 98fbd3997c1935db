"""Read a model file: map it, check it, and give its tensors as views of it."""

import dataclasses
import mmap
import os
import shlex
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llamalet.checks import file_path
from llamalet.config import ModelConfig, RopeDivisors, rope_tables
from llamalet.errors import ConfigError, FormatError
from llamalet.files import open_file, reading
from llamalet.model_file.header import HEADER_BYTES, LLAMA2C, Header, TokenizerSection, read_header
from llamalet.model_file.quantize import Weight
from llamalet.model_file.tensors import TensorSpec, tensor_specs

# Payload checksums of larger files are only verified on request.
VERIFY_BYTES = 64 << 20

# Only Llama 3's models have so large a vocabulary, and their rope_theta is not llama2.c's.
LLAMA3_VOCAB = 128_000


@dataclass(frozen=True)
class ModelFile:
    """A model file, mapped: its header and its tensors as read-only views of the file."""

    path: Path
    header: Header
    tensors: Mapping[str, Weight]
    tokenizer_data: bytes | None = None
    """The tokenizer's file, if it is inside."""

    @property
    def version(self) -> int:
        """The format's version."""
        return self.header.version

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self.header.config

    @property
    def group_size(self) -> int | None:
        """Columns that share a scale; None if nothing is quantized."""
        return self.header.group_size

    @property
    def dtype(self) -> str:
        """The type of the matrices, one of DTYPES."""
        return self.header.dtype

    @property
    def tokenizer_sha256(self) -> str | None:
        """Identity of the tokenizer that the model was trained with; None if the file does not say."""
        return self.header.tokenizer_sha256


def read(path: str | os.PathLike[str], *, verify: bool | None = None, rope_theta: float | None = None) -> ModelFile:
    """Map a model file and check it: header, ranges, exact size, and the checksum if it has one.

    Args:
        path: a .bin of version 0 to 3.
        verify: whether to verify the payload's checksum; None verifies files of at most VERIFY_BYTES.
        rope_theta: what the model was trained with, for a file that does not say; refused for one that does.

    Returns:
        The header and all tensors except those of RoPE, as views of the mapped file: norms float32 (cols,), matrices
        (rows, cols) in one of the forms of `quantize.Weight`. What RoPE's tensors say is in the header's config.

    Raises:
        FormatError: naming the file, the field, its value and the rule that it breaks.
    """
    path = file_path("path", path)
    try:
        file = open_file(path)
    except FileNotFoundError:
        raise FormatError(f"{path}: no such model file") from None
    except IsADirectoryError:
        raise FormatError(f"{path}: is a folder, not a model file") from None
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from None
    with file, reading(path, FormatError):
        n_bytes = os.fstat(file.fileno()).st_size
        header = read_header(path, file.read(HEADER_BYTES))
        specs = list(tensor_specs(header.version, header.config, header.dtype, header.group_size))
        end = header.n_bytes + sum(spec.n_bytes for spec in specs)
        expected = end + (header.tokenizer.n_bytes if header.tokenizer else 0)
        if n_bytes != expected:
            kind = "truncated or of another shape" if n_bytes < expected else "longer than its header says"
            raise FormatError(f"{path}: {n_bytes} bytes where the header asks for {expected}: {kind}")
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if verify or (verify is None and n_bytes <= VERIFY_BYTES):
        _verify_payload(path, header, buffer, end)
    tensors = dict(map_tensors(path, specs, buffer, header.n_bytes))
    config = header.config
    if header.version == 0:
        config = _with_rope_theta_of_tables(path, config, tensors.pop("rope_cos"), tensors.pop("rope_sin"))
    elif (divisors := tensors.pop("rope_divisors", None)) is not None:
        config = _with_rope_divisors(path, config, divisors)
    header = dataclasses.replace(header, config=_with_rope_theta(path, header, config, rope_theta))
    return ModelFile(path, header, tensors, _read_tokenizer(path, header.tokenizer, buffer, end))


def map_tensors(
    path: Path, specs: Iterable[TensorSpec], buffer: mmap.mmap, offset: int
) -> Iterator[tuple[str, Weight]]:
    """Yield every tensor as a view of the buffer; every array is aligned for its type."""
    for spec in specs:
        arrays = []
        for part in spec.parts:
            arrays.append(np.frombuffer(buffer, part.dtype, part.n_values, offset).reshape(part.shape))
            offset += part.n_bytes + spec.padding(part)
            if any(buffer[offset - spec.padding(part) : offset]):
                raise FormatError(f"{path}: the bytes after {spec.name}, up to {offset}, must be zero")
        yield spec.name, spec.assemble(arrays)


def _read_tokenizer(path: Path, section: TokenizerSection | None, buffer: mmap.mmap, end: int) -> bytes | None:
    """Return the tokenizer's file, which follows the tensors, after comparing its CRC32."""
    if section is None:
        return None
    if section.offset != end:
        raise FormatError(f"{path}: tokenizer offset {section.offset}: must be {end}, where the tensors end")
    data = buffer[end : end + section.n_bytes]
    if zlib.crc32(data) != section.crc32:
        raise FormatError(
            f"{path}: the tokenizer's checksum is {zlib.crc32(data):08x}, not {section.crc32:08x}: damaged"
        )
    return data


def _verify_payload(path: Path, header: Header, buffer: mmap.mmap, end: int) -> None:
    """Compare the CRC32 of the tensors with the header's, if it has one."""
    if header.payload_crc32 is None:
        return
    with memoryview(buffer) as view, view[header.n_bytes : end] as payload:
        found = zlib.crc32(payload)
    if found != header.payload_crc32:
        raise FormatError(f"{path}: the weights' checksum is {found:08x}, not {header.payload_crc32:08x}: damaged")


def _with_rope_theta_of_tables(path: Path, config: ModelConfig, cos: Weight, sin: Weight) -> ModelConfig:
    """Return `config` with the rope_theta of v0's RoPE tables; v0 has no field for it.

    In row 1 the angle of pair i is theta ** (-2i / D), so pair 1 gives theta, to 5 digits in float32.
    """
    found_cos, found_sin = np.asarray(cos)[:64], np.asarray(sin)[:64]
    angle = float(np.arctan2(found_sin[1, 1], found_cos[1, 1])) if min(found_cos.shape) > 1 else 0.0
    if 0 < angle < 1:
        config = dataclasses.replace(config, rope_theta=float(f"{angle ** (-config.head_dim / 2):.5g}"))
    expected_cos, expected_sin = rope_tables(config, len(found_cos))
    if not (np.allclose(found_cos, expected_cos, atol=1e-3) and np.allclose(found_sin, expected_sin, atol=1e-3)):
        raise FormatError(
            f"{path}: its RoPE tables match no rope_theta at head_dim {config.head_dim} without scaling; version 0 "
            f"cannot say what the model was trained with, so it would run wrongly"
        )
    return config


def _with_rope_divisors(path: Path, config: ModelConfig, divisors: Weight) -> ModelConfig:
    """Return `config` with the RoPE divisors of v3's tensor."""
    try:
        scaling = RopeDivisors(divisors=tuple(np.asarray(divisors).tolist()))
        return dataclasses.replace(config, rope_scaling=scaling)
    except ConfigError as error:
        raise FormatError(f"{path}: {error}") from None


def _with_rope_theta(path: Path, header: Header, config: ModelConfig, rope_theta: float | None) -> ModelConfig:
    """Return `config` with the user's rope_theta if the file does not say it; it is never guessed."""
    if header.version == 0 or header.payload_crc32 is not None:
        if rope_theta not in (None, config.rope_theta):
            raise ConfigError(f"rope_theta={rope_theta:g}: {path} says that it is {config.rope_theta:g}; leave it out")
        return config
    if rope_theta is not None:
        return dataclasses.replace(config, rope_theta=rope_theta)
    if config.vocab_size >= LLAMA3_VOCAB:
        raise FormatError(
            f"{path}: does not say its rope_theta, and with Llama 3's vocabulary ({config.vocab_size}) it is not "
            f"llama2.c's {LLAMA2C['rope_theta']:g}: python export.py NEW.bin --bin {shlex.quote(str(path))} "
            "--rope_theta 500000"
        )
    return config
