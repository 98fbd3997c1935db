"""Write a model file, and read it back."""

import dataclasses
import mmap
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np

from llamalet.config import ModelConfig, RopeDivisors, rope_tables
from llamalet.errors import ConfigError, FormatError, NonFiniteError
from llamalet.files import replacing
from llamalet.model_file import quantize
from llamalet.model_file.header import (
    DTYPES,
    LLAMA2C,
    MAX_IDS,
    Header,
    TokenizerSection,
    llama2c_differences,
    pack_header,
)
from llamalet.model_file.quantize import Packed, Quantized, Weight
from llamalet.model_file.reader import ModelFile, map_tensors, read
from llamalet.model_file.tensors import ORDER, BinTensor, Rows, TensorSpec, row_blocks, tensor_specs
from llamalet.tokenizer.base import SpecialIds

DEFAULT_DTYPES = {0: "f32", 1: "f32", 2: "q8", 3: "q8"}
BLOCK_BYTES = 1 << 24  # that are read back at a time


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
    if tokenizer is not None or special_ids is not None:
        _check_tokenizer(version, special_ids)
    dtype = dtype or DEFAULT_DTYPES[version]
    group_size = quantize.ENCODINGS[dtype].group_size  # of version 3; None in versions 0 and 1, which are f32
    if version == 2:
        group_size = quantize.group_size_for(config.dim, config.hidden_dim)
    specs = list(tensor_specs(version, config, dtype, group_size))
    tables = _rope_tensors(version, config)
    _check_names([spec.name for spec in specs if spec.name not in tables], tensors)
    with replacing(path) as file:
        file.write(bytes(Header(version, config).n_bytes))
        crc = 0
        for spec in specs:
            for block in _encoded(spec, tables[spec.name] if spec.name in tables else tensors[spec.name]):
                crc = zlib.crc32(block, crc)
                file.write(block)
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
    return ModelFile(path, header, dict(map_tensors(path, specs, buffer, 0)))


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


def _check_tokenizer(version: int, special_ids: SpecialIds | None) -> None:
    """Raise a ConfigError if a version has no room for a tokenizer and for what begins and ends its texts."""
    if version != 3:
        raise ConfigError(f"version {version} has no place for a tokenizer; take --version 3")
    n_ids = 0 if special_ids is None else len(special_ids.prefix) + len(special_ids.stops)
    if n_ids > MAX_IDS:
        raise ConfigError(f"{n_ids} ids begin every text or end one: version 3 has room for {MAX_IDS}")


def _refuse_group(config: ModelConfig) -> NoReturn:
    """Raise a ConfigError that names the width that int8 groups do not divide, and the nearest good value."""
    name = "dim" if quantize.group_size_for(config.dim) < quantize.MIN_GROUP_SIZE else "hidden_dim"
    width = getattr(config, name)
    nearest = max(1, round(width / quantize.MAX_GROUP_SIZE)) * quantize.MAX_GROUP_SIZE
    raise ConfigError(
        f"{name}={width}: int8 needs groups of at least {quantize.MIN_GROUP_SIZE} weights that divide every row; the "
        f"nearest good value is {nearest}. Versions 0 and 1 (float32) and 3 can carry this model"
    )


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
    """Yield a tensor's bytes, encoding a block of rows at a time; scales follow all values.

    A matrix that is in the file's form already is copied, so its integers and scales stay.
    """
    if tuple(weights.shape) != spec.shape:
        raise FormatError(f"{spec.name} has shape {tuple(weights.shape)} where the config asks for {spec.shape}")
    first, *others = spec.parts
    scales = []
    if isinstance(weights, BinTensor) and spec.stores(weights.weight):
        encoded: Iterable[Weight] = [weights.weight]
    else:
        encoded = map(spec.encode, row_blocks(spec.name, weights))
    for tensor in encoded:
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
