"""The raw binary model files, byte by byte.

One ordered table of tensors per version drives the reader, the writer and the check of the size. A file is a header
and then every tensor of the version's table, row-major, little-endian, without padding.

    v0  float32, read by llama2.c's run.c. The header is 7 int32: dim, hidden_dim, n_layers, n_heads, n_kv_heads,
        vocab_size, max_seq_len; a negative vocab_size says that the output layer is not tied to the embeddings.
    v1  float32. The header is 256 bytes: uint32 magic 0x616b3432, int32 version, the 7 int32, uint8 tied.
    v2  int8 in groups, read by runq.c: as v1, then int32 group_size at byte 37. Every matrix is its int8 values and
        then one float32 scale per group; norms stay float32.

What the v1 and v2 headers lack and llama2.c hard-codes stands in bytes 41..255, which llama2.c skips: MARKER,
norm_eps, rope_theta, RoPE scaling, the tokenizer's sha256, the payload's CRC32 and a CRC32 of the header itself. A file
without the marker has llama2.c's values. Source of v0-v2: llama2.c, export.py, run.c and runq.c.
"""

import dataclasses
import mmap
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from llamalet.config import ModelConfig, RopeScaling, rope_tables
from llamalet.errors import ConfigError, FormatError, NonFiniteError
from llamalet.files import replacing
from llamalet.quantize import MAX_GROUP_SIZE, MIN_GROUP_SIZE, Quantized, group_size_for, quantize

MAGIC = 0x616B3432
SHAPE = struct.Struct("<7i")  # dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len
PREFIX = struct.Struct("<Ii7iBi")  # magic, version, the shape, tied, group_size (0 in v1)
MARKER = b"LLMT"
# MARKER, norm_eps, rope_theta, scaled?, factor, low_freq_factor, high_freq_factor, original_max_seq_len, the
# tokenizer's sha256, the payload's CRC32; then the CRC32 of everything before it.
EXTRAS = struct.Struct("<4s2dB3dI32sI")
CHECKSUM = struct.Struct("<I")
HEADER_BYTES = 256

# llama2.c's constants, and so the meaning of a header without extras.
LLAMA2C_NORM_EPS = 1e-5
LLAMA2C_ROPE_THETA = 10000.0

# Payload checksums of larger files are verified on request only.
VERIFY_BYTES = 64 << 20

# Caps on what a header may claim, far above every model this project is for.
MAX_WIDTH, MAX_LAYERS, MAX_VOCAB, MAX_CONTEXT = 1 << 18, 1 << 10, 1 << 20, 1 << 20

# The order of the tensors in each version; "*" runs over the layers.
MATRICES = tuple(f"layers.*.attention.{w}" for w in ("wq", "wk", "wv", "wo"))
FEED_FORWARD = tuple(f"layers.*.feed_forward.{w}" for w in ("w1", "w2", "w3"))
NORMS = ("layers.*.attention_norm", "layers.*.ffn_norm", "norm")
V0_ORDER = (
    "tok_embeddings", "layers.*.attention_norm", *MATRICES, "layers.*.ffn_norm", *FEED_FORWARD, "norm",
    "rope_cos", "rope_sin", "output",
)  # fmt: skip
V1_ORDER = (*NORMS, "tok_embeddings", *MATRICES, *FEED_FORWARD, "output")
ORDER = {0: V0_ORDER, 1: V1_ORDER, 2: V1_ORDER}

Tensor = NDArray[np.float32] | Quantized


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a file: its checkpoint name, its shape, and its group size where it is quantized."""

    name: str
    shape: tuple[int, ...]
    group_size: int | None

    @property
    def n_values(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=object))

    @property
    def n_bytes(self) -> int:
        """Bytes in the file, scales included."""
        return 4 * self.n_values if self.group_size is None else self.n_values + 4 * (self.n_values // self.group_size)


@dataclass(frozen=True)
class Header:
    """What a file says of itself before its tensors."""

    version: int
    config: ModelConfig
    group_size: int | None = None
    tokenizer_sha256: str | None = None
    payload_crc32: int | None = None

    @property
    def n_bytes(self) -> int:
        """Offset of the first tensor."""
        return SHAPE.size if self.version == 0 else HEADER_BYTES


@dataclass(frozen=True)
class ModelFile:
    """A model file, mapped: its header and its tensors as read-only views of the file."""

    path: Path
    header: Header
    tensors: Mapping[str, Tensor]

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
        """Width of the quantization groups; None for float32."""
        return self.header.group_size

    @property
    def tokenizer_sha256(self) -> str | None:
        """Identity of the tokenizer that the model was trained with, where the file says."""
        return self.header.tokenizer_sha256


def tensor_specs(version: int, config: ModelConfig, group_size: int | None = None) -> Iterator[TensorSpec]:
    """Yield the tensors of a file in their order.

    Args:
        version: 0, 1 or 2.
        config: the model's shape.
        group_size: v2's quantization group; None for float32.
    """
    c = config
    q_dim = c.n_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings": (c.vocab_size, c.dim), "output": (c.vocab_size, c.dim), "norm": (c.dim,),
        "attention_norm": (c.dim,), "ffn_norm": (c.dim,),
        "wq": (q_dim, c.dim), "wk": (c.kv_dim, c.dim), "wv": (c.kv_dim, c.dim), "wo": (c.dim, q_dim),
        "w1": (c.hidden_dim, c.dim), "w2": (c.dim, c.hidden_dim), "w3": (c.hidden_dim, c.dim),
        "rope_cos": (c.max_seq_len, c.head_dim // 2), "rope_sin": (c.max_seq_len, c.head_dim // 2),
    }  # fmt: skip
    for pattern in ORDER[version]:
        if pattern == "output" and c.tied:
            continue
        shape = shapes[pattern.rpartition(".")[2]]
        for layer in range(c.n_layers) if "*" in pattern else (0,):
            yield TensorSpec(pattern.replace("*", str(layer)), shape, group_size if len(shape) == 2 else None)


def read(path: str | os.PathLike[str], *, verify: bool | None = None) -> ModelFile:
    """Map a model file and check it: header, ranges, exact size, and its checksum where it has one.

    Args:
        path: a .bin of version 0, 1 or 2.
        verify: whether to verify the payload's checksum; None means: if the file has at most VERIFY_BYTES.

    Returns:
        The header and every tensor but v0's RoPE tables, as views: float32 (rows, cols) or (cols,), or Quantized.
        Nothing proportional to the file is allocated.

    Raises:
        FormatError: naming the file, the field, its value and the rule that it breaks.
    """
    path = Path(path)
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        raise FormatError(f"{path}: no such model file") from None
    except IsADirectoryError:
        raise FormatError(f"{path}: is a folder, not a model file") from None
    with file:
        n_bytes = os.fstat(file.fileno()).st_size
        header = _read_header(path, file.read(HEADER_BYTES))
        specs = list(tensor_specs(header.version, header.config, header.group_size))
        expected = header.n_bytes + sum(spec.n_bytes for spec in specs)
        if n_bytes != expected:
            kind = "truncated or of another shape" if n_bytes < expected else "longer than its header says"
            raise FormatError(f"{path}: {n_bytes} bytes where the header asks for {expected}: {kind}")
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if verify or (verify is None and n_bytes <= VERIFY_BYTES):
        _verify_payload(path, header, buffer)
    tensors = dict(_map_tensors(specs, buffer, header.n_bytes))
    if header.version == 0:
        config = _with_rope_theta_of_tables(path, header.config, tensors.pop("rope_cos"), tensors.pop("rope_sin"))
        header = dataclasses.replace(header, config=config)
    return ModelFile(path, header, tensors)


def write(
    path: str | os.PathLike[str],
    version: int,
    config: ModelConfig,
    tensors: Mapping[str, NDArray[np.float32]],
    *,
    tokenizer_sha256: str | None = None,
    force: bool = False,
) -> ModelFile:
    """Write a model file aside, sync it, rename it into place, read it back and compare.

    Args:
        path: the file to make or replace.
        version: 0, 1 or 2.
        config: the model's shape.
        tensors: every tensor by its checkpoint name, float32; "output" only for an untied model. Not changed.
        tokenizer_sha256: identity of the tokenizer, 64 hex digits; v0 has no room for it.
        force: write v0 even where llama2.c would compute something else; norm_eps is lost then.

    Returns:
        The file as `read` gives it.

    Raises:
        ConfigError: if the version cannot carry the model.
        NonFiniteError: if a weight is NaN or infinite.
        FormatError: if what came back from the disk is not what was written.
    """
    path = Path(path)
    check_can_carry(version, config, force=force)
    group_size = group_size_for(config.dim, config.hidden_dim) if version == 2 else None
    specs = list(tensor_specs(version, config, group_size))
    sources = {name: np.ascontiguousarray(tensor, dtype=np.float32) for name, tensor in tensors.items()}
    if version == 0:
        sources["rope_cos"], sources["rope_sin"] = rope_tables(config, config.max_seq_len)
    _check_tensors(specs, sources)
    with replacing(path) as file:
        file.write(bytes(Header(version, config).n_bytes))
        crc = 0
        for spec in specs:
            for part in _parts(spec, sources[spec.name]):
                crc = zlib.crc32(part, crc)
                file.write(part)
        header = Header(version, config, group_size, tokenizer_sha256, crc)
        if version == 0:  # no room for the rest; norm_eps becomes llama2.c's
            header = Header(0, dataclasses.replace(config, norm_eps=LLAMA2C_NORM_EPS))
        file.seek(0)
        file.write(_pack_header(header))
        file.flush()
        os.fsync(file.fileno())
        _compare(path, file, header, crc)
    return read(path, verify=False)


def check_can_carry(version: int, config: ModelConfig, *, force: bool = False) -> None:
    """Raise a ConfigError that says why a version cannot hold a model; return if it can.

    Args:
        version: 0, 1 or 2.
        config: the model's shape.
        force: accept a v0 file although llama2.c would compute something else from it.
    """
    if version not in ORDER:
        raise ConfigError(f"version {version}: must be one of {', '.join(map(str, ORDER))}")
    if config.head_dim * config.n_heads != config.dim:
        raise ConfigError(
            f"head_dim={config.head_dim}: version {version} has no field for it, so dim={config.dim} must be "
            f"n_heads={config.n_heads} times head_dim"
        )
    if version == 0 and not force and (lost := llama2c_differences(config)):
        raise ConfigError(f"version 0 cannot say that {', '.join(lost)}; take --version 1, or --force to lose it")
    if version == 0 and config.rope_scaling is not None:
        raise ConfigError("version 0 cannot say how RoPE is scaled; take --version 1")
    if version == 2 and group_size_for(config.dim, config.hidden_dim) < MIN_GROUP_SIZE:
        _refuse_group(config)


def llama2c_differences(config: ModelConfig) -> list[str]:
    """Return what llama2.c's programs, which hard-code these values, would take to be something else."""
    found = []
    if config.norm_eps != LLAMA2C_NORM_EPS:
        found.append(f"norm_eps is {config.norm_eps:g} (llama2.c: {LLAMA2C_NORM_EPS:g})")
    if config.rope_theta != LLAMA2C_ROPE_THETA:
        found.append(f"rope_theta is {config.rope_theta:g} (llama2.c: {LLAMA2C_ROPE_THETA:g})")
    if config.rope_scaling is not None:
        found.append("RoPE is scaled (llama2.c: not)")
    return found


def _refuse_group(config: ModelConfig) -> NoReturn:
    """Raise the ConfigError that names the width to change for int8 groups, and its nearest good value."""
    name = "dim" if group_size_for(config.dim) < MIN_GROUP_SIZE else "hidden_dim"
    width = getattr(config, name)
    nearest = max(1, round(width / MAX_GROUP_SIZE)) * MAX_GROUP_SIZE
    raise ConfigError(
        f"{name}={width}: int8 needs groups of at least {MIN_GROUP_SIZE} weights that divide every row; the nearest "
        f"good value is {nearest}. Versions 0 and 1 (float32) can carry this model"
    )


# -- reading ----------------------------------------------------------------------------------------------------------


def _read_header(path: Path, head: bytes) -> Header:
    """Decode and check the header; nothing in it is trusted before its range is known."""
    if len(head) < SHAPE.size:
        raise FormatError(f"{path}: {len(head)} bytes are too few for a model file")
    magic = int.from_bytes(head[:4], "little")
    if magic == int.from_bytes(MAGIC.to_bytes(4, "big"), "little"):
        raise FormatError(f"{path}: the magic number is byte-swapped: written on a big-endian machine")
    if magic != MAGIC:
        return _read_header_v0(path, head)
    if len(head) < HEADER_BYTES:
        raise FormatError(f"{path}: {len(head)} bytes are too few for the {HEADER_BYTES}-byte header")
    _, version, *shape, tied, group_size = PREFIX.unpack_from(head)
    if version not in (1, 2):
        raise FormatError(f"{path}: version {version} is unknown; this program reads versions 0, 1 and 2")
    if tied not in (0, 1):
        raise FormatError(f"{path}: tied flag is {tied}: must be 0 or 1")
    extras = _read_extras(path, head)
    config = _checked_config(path, shape, bool(tied), extras)
    if version == 1:
        if group_size != 0:
            raise FormatError(f"{path}: bytes 37..40 of a version 1 header must be zero")
        return Header(1, config, None, extras.tokenizer_sha256, extras.payload_crc32)
    too_wide = group_size < 4 or group_size & (group_size - 1) != 0
    if too_wide or config.dim % group_size or config.hidden_dim % group_size:
        raise FormatError(
            f"{path}: group_size {group_size} must be a power of two from 4 up that divides dim {config.dim} and "
            f"hidden_dim {config.hidden_dim}"
        )
    return Header(2, config, group_size, extras.tokenizer_sha256, extras.payload_crc32)


def _read_header_v0(path: Path, head: bytes) -> Header:
    """Decode a header that has no magic number: any file could be meant, so every message says what was tried."""
    *shape, vocab_size, max_seq_len = SHAPE.unpack_from(head)
    try:
        config = _checked_config(path, [*shape, abs(vocab_size), max_seq_len], vocab_size > 0, _Extras())
    except FormatError as error:
        raise FormatError(f"{error} (no magic number, so read as version 0: is this a model file?)") from None
    return Header(0, config)


@dataclass(frozen=True)
class _Extras:
    """The header's facts that llama2.c does not know, with llama2.c's values as defaults."""

    norm_eps: float = LLAMA2C_NORM_EPS
    rope_theta: float = LLAMA2C_ROPE_THETA
    rope_scaling: RopeScaling | None = None
    tokenizer_sha256: str | None = None
    payload_crc32: int | None = None


def _read_extras(path: Path, head: bytes) -> _Extras:
    """Decode bytes 41..255 of a v1 or v2 header: all zero, or the marked and checksummed fields and then zeros."""
    if not any(head[PREFIX.size :]):
        return _Extras()
    marker, eps, theta, scaled, factor, low, high, original, sha256, payload_crc = EXTRAS.unpack_from(head, PREFIX.size)
    end = PREFIX.size + EXTRAS.size
    if marker != MARKER:
        raise FormatError(f"{path}: bytes {PREFIX.size}..{HEADER_BYTES - 1} are neither zero nor llamalet's fields")
    if CHECKSUM.unpack_from(head, end)[0] != zlib.crc32(head[:end]):
        raise FormatError(f"{path}: the header's checksum does not match: the file is damaged")
    if any(head[end + CHECKSUM.size :]) or scaled not in (0, 1):
        raise FormatError(f"{path}: the header has bytes set that must be zero")
    try:
        rope_scaling = (
            RopeScaling(factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_seq_len=original)
            if scaled
            else None
        )
    except ConfigError as error:
        raise FormatError(f"{path}: {error}") from None
    return _Extras(eps, theta, rope_scaling, sha256.hex() if any(sha256) else None, payload_crc)


def _checked_config(path: Path, shape: Sequence[int], tied: bool, extras: _Extras) -> ModelConfig:
    """Build the config of a header's 7 integers, refusing what no sane model has before anything is computed."""
    names = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
    caps = (MAX_WIDTH, MAX_WIDTH, MAX_LAYERS, MAX_WIDTH, MAX_WIDTH, MAX_VOCAB, MAX_CONTEXT)
    for name, value, cap in zip(names, shape, caps, strict=True):
        if not 1 <= value <= cap:
            raise FormatError(f"{path}: {name} is {value}: must lie in 1..{cap}")
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len = shape
    if dim % n_heads:
        raise FormatError(f"{path}: dim {dim} is no multiple of n_heads {n_heads}")
    try:
        return ModelConfig(
            dim=dim, hidden_dim=hidden_dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads,
            head_dim=dim // n_heads, vocab_size=vocab_size, max_seq_len=max_seq_len, tied=tied,
            norm_eps=extras.norm_eps, rope_theta=extras.rope_theta, rope_scaling=extras.rope_scaling,
        )  # fmt: skip
    except ConfigError as error:
        raise FormatError(f"{path}: {error}") from None


def _map_tensors(specs: Iterable[TensorSpec], buffer: mmap.mmap, offset: int) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor as a view of the mapped file; every offset is a multiple of 4, so all views are aligned."""
    for spec in specs:
        if spec.group_size is None:
            yield spec.name, np.frombuffer(buffer, "<f4", spec.n_values, offset).reshape(spec.shape)
        else:
            values = np.frombuffer(buffer, np.int8, spec.n_values, offset).reshape(spec.shape)
            scales = np.frombuffer(buffer, "<f4", spec.n_values // spec.group_size, offset + spec.n_values)
            yield spec.name, Quantized(values, scales.reshape(spec.shape[0], -1))
        offset += spec.n_bytes


def _verify_payload(path: Path, header: Header, buffer: mmap.mmap) -> None:
    """Compare the payload's CRC32 with the header's, where the header has one."""
    if header.payload_crc32 is None:
        return
    with memoryview(buffer) as view, view[header.n_bytes :] as payload:
        found = zlib.crc32(payload)
    if found != header.payload_crc32:
        raise FormatError(f"{path}: the weights' checksum is {found:08x}, not {header.payload_crc32:08x}: damaged")


def _with_rope_theta_of_tables(path: Path, config: ModelConfig, cos: Tensor, sin: Tensor) -> ModelConfig:
    """Return `config` with the rope_theta that v0's RoPE tables were made with; v0 has no other trace of it.

    In row 1 the angle of pair i is theta ** (-2i / D), so pair 1 gives theta, to the 5 digits that float32 carries.
    """
    found_cos, found_sin = np.asarray(cos)[:64], np.asarray(sin)[:64]
    angle = float(np.arctan2(found_sin[1, 1], found_cos[1, 1])) if min(found_cos.shape) > 1 else 0.0
    if 0 < angle < 1:
        config = dataclasses.replace(config, rope_theta=float(f"{angle ** (-config.head_dim / 2):.5g}"))
    expected_cos, expected_sin = rope_tables(config, len(found_cos))
    if not (np.allclose(found_cos, expected_cos, atol=1e-3) and np.allclose(found_sin, expected_sin, atol=1e-3)):
        raise FormatError(
            f"{path}: its RoPE tables fit no rope_theta at head_dim {config.head_dim} without scaling; version 0 "
            f"cannot say what the model was trained with, so it would run wrongly"
        )
    return config


# -- writing ----------------------------------------------------------------------------------------------------------


def _check_tensors(specs: Sequence[TensorSpec], tensors: Mapping[str, NDArray[np.float32]]) -> None:
    """Refuse missing, extra, misshapen and non-finite tensors."""
    expected = {spec.name: spec.shape for spec in specs}
    if problems := [f"{name} is missing" for name in expected.keys() - tensors.keys()] + [
        f"{name} is not part of the model" for name in tensors.keys() - expected.keys()
    ]:
        raise FormatError("; ".join(sorted(problems)))
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise FormatError(f"{name} has shape {tensors[name].shape} where the config asks for {shape}")
        # The sum is NaN or infinite if any weight is: one pass, no temporary.
        if not np.isfinite(tensors[name].sum(dtype=np.float64)):
            raise NonFiniteError(f"{name} holds NaN or infinite weights: nothing was written")


def _parts(spec: TensorSpec, tensor: NDArray[np.float32]) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in the file, without a second copy of a float32 one."""
    if spec.group_size is None:
        yield tensor.astype("<f4", copy=False).data.cast("B")
    else:
        quantized = quantize(tensor, spec.group_size)
        yield quantized.values.data.cast("B")
        yield quantized.scales.astype("<f4", copy=False).data.cast("B")


def _pack_header(header: Header) -> bytes:
    """Return the header's bytes."""
    c = header.config
    shape = (c.dim, c.hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads)
    if header.version == 0:
        return SHAPE.pack(*shape, c.vocab_size if c.tied else -c.vocab_size, c.max_seq_len)
    prefix = PREFIX.pack(MAGIC, header.version, *shape, c.vocab_size, c.max_seq_len, c.tied, header.group_size or 0)
    s = c.rope_scaling
    scaling = (s.factor, s.low_freq_factor, s.high_freq_factor, s.original_max_seq_len) if s else (0.0, 0.0, 0.0, 0)
    sha256 = bytes.fromhex(header.tokenizer_sha256 or "")
    fields = EXTRAS.pack(
        MARKER, c.norm_eps, c.rope_theta, s is not None, *scaling, sha256, header.payload_crc32 or 0
    )  # fmt: skip
    packed = prefix + fields
    return (packed + CHECKSUM.pack(zlib.crc32(packed))).ljust(HEADER_BYTES, b"\0")


def _compare(path: Path, file: BinaryIO, header: Header, crc: int) -> None:
    """Read the file that is about to be renamed to `path` back, and compare it with what was meant."""
    found = read(file.name, verify=False)
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer, memoryview(buffer) as view:
        with view[header.n_bytes :] as payload:
            found_crc = zlib.crc32(payload)
    if found.header != header or found_crc != crc:
        raise FormatError(f"{path}: what was read back is not what was written: the disk may be failing")
