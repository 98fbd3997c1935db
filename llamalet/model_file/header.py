"""The header of a model file, byte by byte. All numbers are little-endian.

    v0      0  7 int32: dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len; a negative vocab_size
               means that the output layer is not tied to the embeddings
    v1-v3   0  uint32 magic 0x616b3432 and int32 version
            8  the 7 int32, vocab_size positive
           36  uint8 tied
           37  int32 group_size: columns that share a scale, 0 if nothing is quantized
           41  MARKER, float64 norm_eps and rope_theta
           61  uint8 how RoPE is scaled: 0 not, 1 as in Llama 3, 2 linearly, 3 (in v3) by the tensor rope_divisors;
               float64 factor, low_freq_factor, high_freq_factor and int32 original_max_seq_len, of which 2 has only
               the factor and 3 none: the others are zero
           90  the tokenizer's sha256, zeros if unknown
          122  CRC32 of the payload: of every byte from 256 to the end of the tensors
    v3    126  int32 head_dim, uint8 dtype: its index in DTYPES
    v1-v3      then the CRC32 of all bytes before it
    v3    135  zeros, or the place of the tokenizer's file after the tensors: uint64 offset, uint32 length, uint32
               CRC32, uint8 kind: its index in TOKENIZER_KINDS plus 1; then the CRC32 of all bytes before it
          156  zeros, or the ids that begin and end texts: uint8 1, int32 BOS and EOS (-1: none), uint8 numbers of ids
               before every text and of ids that end one, int32[16] these ids; then the CRC32 of all bytes before it
    v1-v3      then zeros up to 256, reserved for later fields. Readers refuse other bytes, so that no reader skips a
               field that it does not know

llama2.c's v1 and v2 end at byte 41 and skip the rest. If that is all zero, norm_eps and rope_theta are the constants in
llama2.c's programs. Source of v0-v2: llama2.c, export.py, run.c and runq.c.
"""

import dataclasses
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamalet.config import CAPS, MAX_VOCAB, LinearScaling, Llama3Scaling, ModelConfig, RopeDivisors, RopeScaling
from llamalet.errors import ConfigError, FormatError
from llamalet.model_file.quantize import ENCODINGS
from llamalet.tokenizer.base import SpecialIds

MAGIC = 0x616B3432
SHAPE = struct.Struct("<7i")
PREFIX = struct.Struct("<Ii7iBi")  # magic, version, the shape, tied, group_size
MARKER = b"LLMT"
EXTRAS = struct.Struct("<4s2dB3dI32sI")  # MARKER .. CRC32 of the payload
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len")  # fields in EXTRAS
# How RoPE is scaled, by its code in EXTRAS, and how many of these fields that has.
SCALINGS = {None: 0, Llama3Scaling: 4, LinearScaling: 1, RopeDivisors: 0}
V3_FIELDS = struct.Struct("<iB")  # head_dim, dtype
CHECKSUM = struct.Struct("<I")
TOKENIZER = struct.Struct("<QIIB")  # offset, length, CRC32, kind
MAX_IDS = 16
SPECIAL_IDS = struct.Struct(f"<B2i2B{MAX_IDS}i")  # 1, BOS, EOS, number of ids in front, number of stops, all these
HEADER_BYTES = 256

# The types of a file's matrices. v0 and v1 are f32, v2 is q8 with float32 scales.
DTYPES = tuple(ENCODINGS)
# The kinds of tokenizer files that can be inside, by the suffix that they have next to a model.
TOKENIZER_KINDS = ("model", "bin", "json", "tiktoken")

# The fields of ModelConfig that llama2.c's headers lack, and the values that its programs assume.
LLAMA2C: dict[str, Any] = {"norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None}

MAX_TOKENIZER_BYTES = 1 << 26


@dataclass(frozen=True)
class TokenizerSection:
    """The place of the tokenizer's file in a model file, and its kind, one of TOKENIZER_KINDS."""

    offset: int
    n_bytes: int
    crc32: int
    kind: str


@dataclass(frozen=True)
class Header:
    """The fields of a header.

    group_size is None if nothing is quantized; the last four are None if the file does not have them. special_ids are
    what begins and ends texts, where the tokenizer's file alone would say something else.
    """

    version: int
    config: ModelConfig
    dtype: str = "f32"
    group_size: int | None = None
    tokenizer_sha256: str | None = None
    payload_crc32: int | None = None
    tokenizer: TokenizerSection | None = None
    special_ids: SpecialIds | None = None

    @property
    def n_bytes(self) -> int:
        """Offset of the first tensor."""
        return SHAPE.size if self.version == 0 else HEADER_BYTES


def pack_header(header: Header) -> bytes:
    """Return the header's bytes."""
    c = header.config
    shape = (c.dim, c.hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads)
    if header.version == 0:
        return SHAPE.pack(*shape, c.vocab_size if c.tied else -c.vocab_size, c.max_seq_len)
    packed = PREFIX.pack(MAGIC, header.version, *shape, c.vocab_size, c.max_seq_len, c.tied, header.group_size or 0)
    scaled = 0 if c.rope_scaling is None else list(SCALINGS).index(type(c.rope_scaling))
    scaling = [getattr(c.rope_scaling, name, 0) for name in SCALING]
    sha256 = bytes.fromhex(header.tokenizer_sha256 or "")
    packed += EXTRAS.pack(MARKER, c.norm_eps, c.rope_theta, scaled, *scaling, sha256, header.payload_crc32 or 0)
    if header.version == 3:
        packed += V3_FIELDS.pack(c.head_dim, DTYPES.index(header.dtype))
    packed += CHECKSUM.pack(zlib.crc32(packed))
    if (t := header.tokenizer) is not None:
        packed += TOKENIZER.pack(t.offset, t.n_bytes, t.crc32, TOKENIZER_KINDS.index(t.kind) + 1)
        packed += CHECKSUM.pack(zlib.crc32(packed))
    elif header.special_ids is not None:
        packed += bytes(TOKENIZER.size + CHECKSUM.size)
    if (ids := header.special_ids) is not None:
        bos, eos = (-1 if id is None else id for id in (ids.bos, ids.eos))
        listed = [*ids.prefix, *sorted(ids.stops)]
        zeros = [0] * (MAX_IDS - len(listed))
        packed += SPECIAL_IDS.pack(1, bos, eos, len(ids.prefix), len(ids.stops), *listed, *zeros)
        packed += CHECKSUM.pack(zlib.crc32(packed))
    return packed.ljust(HEADER_BYTES, b"\0")


def read_header(path: Path, head: bytes) -> Header:
    """Decode and check a header; every value is checked before it is used.

    Args:
        path: the file, for the messages.
        head: its first HEADER_BYTES bytes, or all if it has fewer.

    Raises:
        FormatError: naming the file, the field, its value and the rule that it breaks.
    """
    if len(head) < SHAPE.size:
        raise FormatError(f"{path}: {len(head)} bytes are too few for a model file")
    magic = int.from_bytes(head[:4], "little")
    if magic == int.from_bytes(MAGIC.to_bytes(4, "big"), "little"):
        raise FormatError(f"{path}: the magic number is byte-swapped: written on a big-endian machine")
    if magic != MAGIC:
        return _read_v0(path, head)
    if len(head) < HEADER_BYTES:
        raise FormatError(f"{path}: {len(head)} bytes are too few for the {HEADER_BYTES}-byte header")
    _, version, *shape, tied, group_size = PREFIX.unpack_from(head)
    if version not in (1, 2, 3):
        raise FormatError(f"{path}: version {version} is unknown; this program reads versions 0, 1, 2 and 3")
    if tied not in (0, 1):
        raise FormatError(f"{path}: tied flag is {tied}: must be 0 or 1")
    extras = _read_extras(path, head, version)
    config = _checked_config(path, shape, bool(tied), extras)
    dtype = {1: "f32", 2: "q8", 3: extras.dtype}[version]
    _check_group_size(path, version, dtype, group_size, config)
    return Header(
        version, config, dtype, group_size or None, extras.tokenizer_sha256, extras.payload_crc32, extras.tokenizer,
        extras.special_ids,
    )  # fmt: skip


def _read_v0(path: Path, head: bytes) -> Header:
    """Decode a header without a magic number; it may be any other file, so the messages say what was tried."""
    *shape, vocab_size, max_seq_len = SHAPE.unpack_from(head)
    try:
        config = _checked_config(path, [*shape, abs(vocab_size), max_seq_len], vocab_size > 0, _Extras())
    except FormatError as error:
        raise FormatError(f"{error} (no magic number, so read as version 0: is this a model file?)") from None
    return Header(0, config)


def llama2c_differences(config: ModelConfig) -> list[str]:
    """Return what llama2.c's programs, whose values are constants, take to be something else in this model."""

    def shown(value: Any) -> str:
        return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

    found = {name: (getattr(config, name), assumed) for name, assumed in LLAMA2C.items()}
    return [f"{name} is {shown(a)} (llama2.c: {shown(b)})" for name, (a, b) in found.items() if a != b]


@dataclass(frozen=True)
class _Extras:
    """The fields that llama2.c does not have; the defaults are what a header without them means."""

    config: Mapping[str, Any] = dataclasses.field(default_factory=lambda: LLAMA2C)
    has_divisors: bool = False  # RoPE is scaled by a tensor
    tokenizer_sha256: str | None = None
    payload_crc32: int | None = None
    head_dim: int | None = None  # dim / n_heads
    dtype: str = "f32"
    tokenizer: TokenizerSection | None = None
    special_ids: SpecialIds | None = None


def _read_extras(path: Path, head: bytes, version: int) -> _Extras:
    """Decode the bytes from 41 on: marked and checksummed fields, then zeros; in v1 and v2 all may be zero."""
    if version < 3 and not any(head[PREFIX.size :]):
        return _Extras()
    marker, eps, theta, scaled, *scaling, sha256, payload_crc = EXTRAS.unpack_from(head, PREFIX.size)
    end = PREFIX.size + EXTRAS.size
    if marker != MARKER:
        raise FormatError(f"{path}: bytes {PREFIX.size}..{HEADER_BYTES - 1} are neither zero nor llamalet's fields")
    head_dim, code = None, 0
    if version == 3:
        head_dim, code = V3_FIELDS.unpack_from(head, end)
        end += V3_FIELDS.size
    if CHECKSUM.unpack_from(head, end)[0] != zlib.crc32(head[:end]):
        raise FormatError(f"{path}: the header's checksum does not match: the file is damaged")
    end += CHECKSUM.size
    section = ids = None
    if version == 3 and any(head[end:]):
        section, end = _read_section(path, head, end)
        ids, end = _read_special_ids(path, head, end)
    if any(head[end:]):
        raise FormatError(f"{path}: the header has bytes set that must be zero")
    if code >= len(DTYPES):
        raise FormatError(f"{path}: dtype {code}: must be one of 0..{len(DTYPES) - 1} ({', '.join(DTYPES)})")
    sha256_hex = sha256.hex() if any(sha256) else None
    kind, rope_scaling = _read_scaling(path, version, scaled, scaling)
    fields, has_divisors = {"norm_eps": eps, "rope_theta": theta, "rope_scaling": rope_scaling}, kind is RopeDivisors
    return _Extras(fields, has_divisors, sha256_hex, payload_crc, head_dim, DTYPES[code], section, ids)


def _read_scaling(
    path: Path, version: int, code: int, values: Sequence[Any]
) -> tuple[type[RopeScaling] | None, RopeScaling | None]:
    """Return how RoPE is scaled: the kind, and its fields if the header has them."""
    kinds = [kind for kind in SCALINGS if kind is not RopeDivisors or version == 3]
    if code >= len(kinds):
        raise FormatError(f"{path}: RoPE scaling {code}: must be one of 0..{len(kinds) - 1} in version {version}")
    kind = kinds[code]
    if any(values[SCALINGS[kind] :]):
        raise FormatError(f"{path}: the header has bytes set that must be zero")
    if kind is None or kind is RopeDivisors:
        return kind, None
    try:
        return kind, kind(**dict(zip(SCALING, values[: SCALINGS[kind]], strict=False)))
    except ConfigError as error:
        raise FormatError(f"{path}: {error}") from None


def _read_section(path: Path, head: bytes, at: int) -> tuple[TokenizerSection | None, int]:
    """Decode the place of the tokenizer; return it, or None if there is none, and the end of its fields."""
    offset, n_bytes, crc, kind = TOKENIZER.unpack_from(head, at)
    end = at + TOKENIZER.size
    if not any(head[at : end + CHECKSUM.size]):
        return None, end + CHECKSUM.size
    if CHECKSUM.unpack_from(head, end)[0] != zlib.crc32(head[:end]):
        raise FormatError(f"{path}: the checksum of the tokenizer's fields does not match: the file is damaged")
    if not 1 <= kind <= len(TOKENIZER_KINDS):
        raise FormatError(f"{path}: tokenizer kind {kind}: must be one of 1..{len(TOKENIZER_KINDS)}")
    if not 1 <= n_bytes <= MAX_TOKENIZER_BYTES:
        raise FormatError(f"{path}: tokenizer length {n_bytes}: must be in 1..{MAX_TOKENIZER_BYTES}")
    return TokenizerSection(offset, n_bytes, crc, TOKENIZER_KINDS[kind - 1]), end + CHECKSUM.size


def _read_special_ids(path: Path, head: bytes, at: int) -> tuple[SpecialIds | None, int]:
    """Decode the ids that begin and end texts; return them, or None if there are none, and the end of their fields."""
    flag, bos, eos, n_prefix, n_stops, *listed = SPECIAL_IDS.unpack_from(head, at)
    end = at + SPECIAL_IDS.size
    if not any(head[at : end + CHECKSUM.size]):
        return None, end + CHECKSUM.size
    if CHECKSUM.unpack_from(head, end)[0] != zlib.crc32(head[:end]):
        raise FormatError(f"{path}: the checksum of the ids that begin and end texts does not match: damaged")
    n = n_prefix + n_stops
    if flag != 1 or n > MAX_IDS or any(listed[n:]) or not all(-1 <= id < MAX_VOCAB for id in (bos, eos)):
        raise FormatError(f"{path}: the ids that begin and end texts break their rules")
    if not all(0 <= id < MAX_VOCAB for id in listed):
        raise FormatError(f"{path}: the ids that begin and end texts are {listed[:n]}: must be in 0..{MAX_VOCAB - 1}")
    ids = SpecialIds(
        bos=None if bos < 0 else bos,
        eos=None if eos < 0 else eos,
        prefix=tuple(listed[:n_prefix]),
        stops=frozenset(listed[n_prefix:n]),
    )
    return ids, end + CHECKSUM.size


def _checked_config(path: Path, shape: Sequence[int], tied: bool, extras: _Extras) -> ModelConfig:
    """Return the config of a header's integers, after checking them against the caps."""
    sizes: dict[str, Any] = dict(zip(CAPS, [*shape, 1 if extras.head_dim is None else extras.head_dim], strict=True))
    for name, value in sizes.items():
        if not 1 <= value <= CAPS[name]:
            raise FormatError(f"{path}: {name} is {value}: must be in 1..{CAPS[name]}")
    if extras.head_dim is None:
        sizes["head_dim"], rest = divmod(sizes["dim"], sizes["n_heads"])
        if rest:
            raise FormatError(f"{path}: dim {sizes['dim']} is not a multiple of n_heads {sizes['n_heads']}")
    config = dict(extras.config)
    if extras.has_divisors:  # their values come from the tensor
        config["rope_scaling"] = RopeDivisors(divisors=(1.0,) * (sizes["head_dim"] // 2))
    try:
        return ModelConfig(**sizes, tied=tied, **config)
    except ConfigError as error:
        raise FormatError(f"{path}: {error}") from None


def _check_group_size(path: Path, version: int, dtype: str, group_size: int, config: ModelConfig) -> None:
    """Raise a FormatError if a group size is not the version's, or in v2 does not divide the rows."""
    if version != 2:
        expected = ENCODINGS[dtype].group_size or 0
        if group_size != expected:
            raise FormatError(f"{path}: group_size {group_size}: must be {expected} in version {version} with {dtype}")
        return
    power_of_two = group_size >= 4 and group_size & (group_size - 1) == 0
    if not power_of_two or config.dim % group_size or config.hidden_dim % group_size:
        raise FormatError(
            f"{path}: group_size {group_size} must be a power of two from 4 up that divides dim {config.dim} and "
            f"hidden_dim {config.hidden_dim}"
        )
