"""The raw binary model files: their tensors, reading and writing.

A file is a header (see header.py) followed by the tensors in the version's order, row-major and little-endian. One
table of that order drives the reader, the writer and the check of the size.

    v0  float32, read by llama2.c's run.c.
    v1  float32, in another order.
    v2  int8 in groups, read by runq.c: every matrix is its int8 values followed by one float32 scale per group.
    v3  float32 (f32), bfloat16 (bf16), 8 bits (q8) or 4 bits (q4), in v1's order. A q8 or q4 matrix is its values
        followed by its scales, both laid out for the kernels as in `quantize.Packed`. Every array starts at a multiple
        of 64 bytes, with zeros before it. The layers of a matrix are equally far apart. The last tensor is
        rope_divisors, float32 (D / 2,), if the header says that RoPE is scaled by it. The model's tokenizer may follow
        the tensors: its file, unchanged.

Norms are float32 in every version. Source of v0-v2: llama2.c, export.py, run.c and runq.c.
"""

import dataclasses
import mmap
import os
import shlex
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from llamalet.checks import file_path
from llamalet.config import ModelConfig, RopeDivisors, rope_tables
from llamalet.errors import ConfigError, FormatError, NonFiniteError
from llamalet.files import open_file, replacing
from llamalet.model_file import quantize
from llamalet.model_file.header import (
    DTYPES,
    HEADER_BYTES,
    LLAMA2C,
    MAX_IDS,
    Header,
    TokenizerSection,
    llama2c_differences,
    pack_header,
    read_header,
)
from llamalet.model_file.quantize import Packed, Quantized, Weight
from llamalet.tokenizer.base import SpecialIds

# Payload checksums of larger files are only verified on request.
VERIFY_BYTES = 64 << 20

# Weights that are converted, and bytes that are checked, at a time: memory use does not depend on the model's size.
BLOCK_WEIGHTS = 1 << 22
BLOCK_BYTES = 1 << 24

# Only Llama 3's models have so large a vocabulary, and their rope_theta is not llama2.c's.
LLAMA3_VOCAB = 128_000

# Alignment of v3's arrays: a cache line, and the widest vector.
ALIGNMENT = 64

# The order of the tensors in each version; "*" runs over the layers.
MATRICES = tuple(f"layers.*.attention.{w}" for w in ("wq", "wk", "wv", "wo"))
FEED_FORWARD = tuple(f"layers.*.feed_forward.{w}" for w in ("w1", "w2", "w3"))
NORMS = ("layers.*.attention_norm", "layers.*.ffn_norm", "norm")
V0_ORDER = (
    "tok_embeddings", "layers.*.attention_norm", *MATRICES, "layers.*.ffn_norm", *FEED_FORWARD, "norm",
    "rope_cos", "rope_sin", "output",
)  # fmt: skip
V1_ORDER = (*NORMS, "tok_embeddings", *MATRICES, *FEED_FORWARD, "output")
V3_ORDER = (*V1_ORDER, "rope_divisors")
ORDER = {0: V0_ORDER, 1: V1_ORDER, 2: V1_ORDER, 3: V3_ORDER}
DEFAULT_DTYPES = {0: "f32", 1: "f32", 2: "q8", 3: "q8"}


class Rows(Protocol):
    """A tensor that gives its rows as float32 on demand: an array, or a tensor in a file of any format."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, (rows, cols) or (cols,)."""

    def __getitem__(self, rows: slice, /) -> NDArray[np.float32]:
        """Return some rows."""


class Part(NamedTuple):
    """One array of a file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def n_values(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=object))

    @property
    def n_bytes(self) -> int:
        """Bytes of the elements."""
        return self.n_values * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a file: its checkpoint name, its shape and how it is stored.

    dtype is one of DTYPES; group_size is None if it is not quantized.
    """

    name: str
    shape: tuple[int, ...]
    version: int
    dtype: str
    group_size: int | None

    @property
    def parts(self) -> tuple[Part, ...]:
        """The arrays that it consists of: one, or values and scales."""
        if self.group_size is None:
            return (Part("<f4" if self.dtype == "f32" else "<u2", self.shape),)
        rows, cols = self.shape
        if self.version == 2:
            return Part("i1", self.shape), Part("<f4", (rows, cols // self.group_size))
        values, scales = quantize.packed_shapes(rows, cols, quantize.ENCODINGS[self.dtype].bits, self.group_size)
        return Part("u1", values), Part("<u2", scales)

    @property
    def n_bytes(self) -> int:
        """Bytes in the file, up to the start of the next tensor."""
        return sum(part.n_bytes + self.padding(part) for part in self.parts)

    def padding(self, part: Part) -> int:
        """Return the number of zeros after one of its parts."""
        return -part.n_bytes % ALIGNMENT if self.version == 3 else 0

    def encode(self, weights: NDArray[np.float32]) -> Weight:
        """Return float32 weights as they are stored."""
        if self.version == 2 and self.group_size is not None:
            return quantize.quantize(weights, self.group_size)
        return quantize.ENCODINGS[self.dtype].encode(weights)

    def assemble(self, arrays: Sequence[NDArray[Any]]) -> Weight:
        """Return the tensor with these parts."""
        if self.group_size is None:
            return arrays[0]
        (values, scales), (rows, cols) = arrays, self.shape
        return Quantized(values, scales) if self.version == 2 else Packed(values, scales, rows, cols, self.group_size)


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


def tensor_specs(
    version: int, config: ModelConfig, dtype: str = "f32", group_size: int | None = None
) -> Iterator[TensorSpec]:
    """Yield the tensors of a file in their order.

    Args:
        version: 0 to 3.
        config: the model's shape.
        dtype: one of DTYPES that the version has; norms are always f32.
        group_size: columns that share a scale; None if nothing is quantized.
    """
    c = config
    q_dim = c.n_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings": (c.vocab_size, c.dim), "output": (c.vocab_size, c.dim), "norm": (c.dim,),
        "attention_norm": (c.dim,), "ffn_norm": (c.dim,),
        "wq": (q_dim, c.dim), "wk": (c.kv_dim, c.dim), "wv": (c.kv_dim, c.dim), "wo": (c.dim, q_dim),
        "w1": (c.hidden_dim, c.dim), "w2": (c.dim, c.hidden_dim), "w3": (c.hidden_dim, c.dim),
        "rope_cos": (c.max_seq_len, c.head_dim // 2), "rope_sin": (c.max_seq_len, c.head_dim // 2),
        "rope_divisors": (c.head_dim // 2,),
    }  # fmt: skip
    absent = {"output": c.tied, "rope_divisors": not isinstance(c.rope_scaling, RopeDivisors)}
    for pattern in ORDER[version]:
        if absent.get(pattern):
            continue
        shape = shapes[pattern.rpartition(".")[2]]
        for layer in range(c.n_layers) if "*" in pattern else (0,):
            kind = (dtype, group_size) if len(shape) == 2 else ("f32", None)
            yield TensorSpec(pattern.replace("*", str(layer)), shape, version, *kind)


def row_blocks(name: str, tensor: Rows) -> Iterator[NDArray[np.float32]]:
    """Yield a tensor as blocks of rows, about BLOCK_WEIGHTS each; all but the last are a multiple of ROW_BLOCK rows.

    Raises:
        NonFiniteError: naming the tensor, if a weight is NaN or infinite.
    """
    rows, *cols = tensor.shape
    step = max(1, BLOCK_WEIGHTS // (int(np.prod(cols)) * quantize.ROW_BLOCK)) * quantize.ROW_BLOCK
    for start in range(0, rows, step):
        block = np.ascontiguousarray(tensor[start : start + step], dtype=np.float32)
        # The sum is NaN or infinite if any weight is: one pass, no temporary.
        if not np.isfinite(block.sum(dtype=np.float64)):
            raise NonFiniteError(f"{name} holds NaN or infinite weights")
        yield block


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
    with file:
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
    tensors = dict(_map_tensors(path, specs, buffer, header.n_bytes))
    config = header.config
    if header.version == 0:
        config = _with_rope_theta_of_tables(path, config, tensors.pop("rope_cos"), tensors.pop("rope_sin"))
    elif (divisors := tensors.pop("rope_divisors", None)) is not None:
        config = _with_rope_divisors(path, config, divisors)
    header = dataclasses.replace(header, config=_with_rope_theta(path, header, config, rope_theta))
    return ModelFile(path, header, tensors, _read_tokenizer(path, header.tokenizer, buffer, end))


def write(
    path: str | os.PathLike[str],
    version: int,
    config: ModelConfig,
    tensors: Mapping[str, Rows],
    *,
    dtype: str | None = None,
    tokenizer_sha256: str | None = None,
    tokenizer: tuple[str, bytes] | None = None,
    special_ids: SpecialIds | None = None,
    force: bool = False,
) -> ModelFile:
    """Write a model file to a temporary name, sync it, read it back, compare, and rename it into place.

    Args:
        path: the file to make or replace.
        version: 0 to 3.
        config: the model's shape.
        tensors: every tensor by its checkpoint name, float32; "output" only for an untied model. Each is asked for
            once, in the file's order, and read in blocks, so a mapping may create them on demand.
        dtype: the type of v3's matrices, one of DTYPES; None takes q8. The other versions have one dtype each.
        tokenizer_sha256: identity of the tokenizer, 64 hex digits; v0 has no field for it.
        tokenizer: the kind of the tokenizer, one of TOKENIZER_KINDS, and its file, to put inside; version 3 only.
        special_ids: what begins and ends texts, if the tokenizer's file alone would say something else; version 3 only.
        force: write v0 even if llama2.c would compute something else from it; norm_eps is lost then.

    Returns:
        The file as `read` gives it.

    Raises:
        ConfigError: if the version cannot hold the model.
        NonFiniteError: if a weight is NaN or infinite.
        FormatError: if the bytes read back differ from those written.
    """
    path = Path(path)
    check_can_carry(version, config, dtype=dtype, force=force)
    if (tokenizer is not None or special_ids is not None) and version != 3:
        raise ConfigError(f"version {version} has no place for a tokenizer; take --version 3")
    if special_ids is not None and len(special_ids.prefix) + len(special_ids.stops) > MAX_IDS:
        n = len(special_ids.prefix) + len(special_ids.stops)
        raise ConfigError(f"{n} ids begin every text or end one: version 3 has room for {MAX_IDS}")
    dtype = dtype or DEFAULT_DTYPES[version]
    group_size = {
        2: quantize.group_size_for(config.dim, config.hidden_dim),
        3: quantize.ENCODINGS[dtype].group_size,
    }.get(version)
    specs = list(tensor_specs(version, config, dtype, group_size))
    tables = _rope_tensors(version, config)
    _check_names([spec.name for spec in specs if spec.name not in tables], tensors)
    with replacing(path) as file:
        file.write(bytes(Header(version, config).n_bytes))
        crc = 0
        for spec in specs:
            for data in _encoded(spec, tables[spec.name] if spec.name in tables else tensors[spec.name]):
                crc = zlib.crc32(data, crc)
                file.write(data)
        section = None
        if tokenizer is not None:
            kind, data = tokenizer
            section = TokenizerSection(file.tell(), len(data), zlib.crc32(data), kind)
            file.write(data)
        header = Header(version, config, dtype, group_size, tokenizer_sha256, crc, section, special_ids)
        if version == 0:  # has no other fields; norm_eps becomes llama2.c's
            header = Header(0, dataclasses.replace(config, norm_eps=LLAMA2C["norm_eps"]))
        file.seek(0)
        file.write(pack_header(header))
        file.flush()
        os.fsync(file.fileno())
        _compare(path, file, header, crc)
    return read(path, verify=False)


def in_memory(path: Path, config: ModelConfig, tensors: Mapping[str, Rows], dtype: str) -> ModelFile:
    """Return what version 3 would hold of a model, without writing a file.

    Args:
        path: where the model is from.
        config: its shape.
        tensors: see `write`.
        dtype: what the matrices become, one of DTYPES.

    Raises:
        NonFiniteError: if a weight is NaN or infinite.
    """
    header = Header(3, config, dtype, quantize.ENCODINGS[dtype].group_size)
    specs = [spec for spec in tensor_specs(3, config, dtype, header.group_size) if spec.name != "rope_divisors"]
    buffer = mmap.mmap(-1, sum(spec.n_bytes for spec in specs))
    try:
        for spec in specs:
            for data in _encoded(spec, tensors[spec.name]):
                buffer.write(data)
    except NonFiniteError as error:
        raise NonFiniteError(f"{path}: {error}") from None
    return ModelFile(path, header, dict(_map_tensors(path, specs, buffer, 0)))


def float_version(config: ModelConfig) -> int:
    """Return the version that holds a model in float32: 1, or 3 if the model needs what only that has."""
    needs_v3 = config.head_dim * config.n_heads != config.dim or isinstance(config.rope_scaling, RopeDivisors)
    return 3 if needs_v3 else 1


def check_can_carry(version: int, config: ModelConfig, *, dtype: str | None = None, force: bool = False) -> None:
    """Raise a ConfigError if a version cannot hold a model.

    Args:
        version: 0 to 3.
        config: the model's shape.
        dtype: see `write`.
        force: see `write`.
    """
    if version not in ORDER:
        raise ConfigError(f"version {version}: must be one of {', '.join(map(str, ORDER))}")
    if dtype is not None and version != 3:
        raise ConfigError(
            f"dtype={dtype}: version {version} is {DEFAULT_DTYPES[version]} always; --version 3 has a choice"
        )
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype}: must be one of {', '.join(DTYPES)}")
    if version == 3:
        return
    if config.head_dim * config.n_heads != config.dim:
        raise ConfigError(
            f"head_dim={config.head_dim}: version {version} has no field for it, so dim={config.dim} must be "
            f"n_heads={config.n_heads} times head_dim; take --version 3"
        )
    if isinstance(config.rope_scaling, RopeDivisors):
        raise ConfigError(f"version {version} cannot say that RoPE has {config.rope_scaling}; take --version 3")
    if version == 0 and not force and (lost := llama2c_differences(config)):
        raise ConfigError(f"version 0 cannot say that {', '.join(lost)}; take --version 1, or --force to lose it")
    if version == 0 and config.rope_scaling is not None:
        raise ConfigError("version 0 cannot say how RoPE is scaled; take --version 1")
    if version == 2 and quantize.group_size_for(config.dim, config.hidden_dim) < quantize.MIN_GROUP_SIZE:
        _refuse_group(config)


def _refuse_group(config: ModelConfig) -> NoReturn:
    """Raise a ConfigError that names the width that int8 groups do not divide, and the nearest good value."""
    name = "dim" if quantize.group_size_for(config.dim) < quantize.MIN_GROUP_SIZE else "hidden_dim"
    width = getattr(config, name)
    nearest = max(1, round(width / quantize.MAX_GROUP_SIZE)) * quantize.MAX_GROUP_SIZE
    raise ConfigError(
        f"{name}={width}: int8 needs groups of at least {quantize.MIN_GROUP_SIZE} weights that divide every row; the "
        f"nearest good value is {nearest}. Versions 0 and 1 (float32) and 3 can carry this model"
    )


# -- reading ----------------------------------------------------------------------------------------------------------


def _map_tensors(
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


# -- writing ----------------------------------------------------------------------------------------------------------


def _rope_tensors(version: int, config: ModelConfig) -> dict[str, Rows]:
    """Return the tensors of a version that say how RoPE rotates, by their names."""
    if version == 0:
        return dict(zip(("rope_cos", "rope_sin"), rope_tables(config, config.max_seq_len), strict=True))
    if version == 3 and isinstance(config.rope_scaling, RopeDivisors):
        return {"rope_divisors": np.array(config.rope_scaling.divisors, np.float32)}
    return {}


def _check_names(expected: Sequence[str], tensors: Mapping[str, Rows]) -> None:
    """Raise a FormatError that names missing and extra tensors."""
    problems = [f"{name} is missing" for name in set(expected) - tensors.keys()]
    problems += [f"{name} is not part of the model" for name in tensors.keys() - set(expected)]
    if problems:
        raise FormatError("; ".join(sorted(problems)))


def _encoded(spec: TensorSpec, weights: Rows) -> Iterator[memoryview | bytes]:
    """Yield a tensor's bytes, encoding a block of rows at a time; scales follow all values."""
    if tuple(weights.shape) != spec.shape:
        raise FormatError(f"{spec.name} has shape {tuple(weights.shape)} where the config asks for {spec.shape}")
    first, *others = spec.parts
    scales = []
    for block in row_blocks(spec.name, weights):
        tensor = spec.encode(block)
        if isinstance(tensor, Quantized | Packed):
            scales.append(tensor.scales)
            yield tensor.values.data.cast("B")
        else:
            yield tensor.astype(first.dtype, copy=False).data.cast("B")
    yield bytes(spec.padding(first))
    for part in others:
        yield from (np.ascontiguousarray(some, part.dtype).data.cast("B") for some in scales)
        yield bytes(spec.padding(part))


def _compare(path: Path, file: BinaryIO, header: Header, crc: int) -> None:
    """Read back the file that will be renamed to `path`; raise a FormatError if it is not what was written."""
    found = read(file.name, verify=False).header
    end = header.tokenizer.offset if header.tokenizer else file.seek(0, os.SEEK_END)
    found_crc, at = 0, file.seek(header.n_bytes)
    while at < end:
        data = file.read(min(BLOCK_BYTES, end - at))
        found_crc, at = zlib.crc32(data, found_crc), at + len(data)
    if found != header or found_crc != crc:
        raise FormatError(f"{path}: what was read back is not what was written: the disk may be failing")
