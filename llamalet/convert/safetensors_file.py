"""safetensors files: written in pieces; read whole, or a block of rows at a time.

Little-endian: uint64 length of the header; the header, a JSON object of tensor name -> dtype, shape and data_offsets,
which count from the header's end; the data, row-major, without gaps.

Source: https://github.com/huggingface/safetensors, "Format".
"""

import json
import math
import os
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llamalet import strict
from llamalet.convert.imported_model import DECODERS, FileTensor
from llamalet.errors import FormatError
from llamalet.files import open_file, reading

LENGTH = struct.Struct("<Q")
MAX_HEADER_BYTES = strict.MAX_BYTES
MAX_AXES = 8
METADATA = "__metadata__"
ALIGNMENT = 8
# The types that are read and written, and numpy's names of them; bfloat16, which numpy lacks, is uint16: its bits.
DTYPES = {"F64": "<f8", "I64": "<i8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}

Entry = tuple[str, tuple[int, ...], int, int]
"""A tensor's type (one of DTYPES if it can be read), its shape, and where its bytes begin and end in the file."""


def read(path: Path) -> dict[str, FileTensor]:
    """Return the tensors of a file by name; their rows are read, as float32, when they are asked for.

    Raises:
        FormatError: if the file is damaged, or holds anything but float32, float16 and bfloat16.
    """
    tensors = {}
    for name, (dtype, shape, begin, end) in _read_header(path, DECODERS).items():
        if min(shape, default=0) < 1:
            raise FormatError(f"{path}: {name} has shape {shape}, where weights are a matrix or a vector")
        tensors[name] = FileTensor(path, begin, shape, dtype, (end - begin) // shape[0], DECODERS[dtype])
    return tensors


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the tensors of a file by name, as arrays of their own types; see DTYPES.

    They are views of the mapped file, and stay readable if it is removed. Writing to them does not change the file.

    Raises:
        FormatError: if the file is damaged, or holds a type that is not in DTYPES.
    """
    entries = _read_header(path, DTYPES)
    data = np.asarray(np.memmap(path, np.uint8, "c"))
    return {
        name: data[begin:end].view(DTYPES[dtype]).reshape(shape) for name, (dtype, shape, begin, end) in entries.items()
    }


def encode(
    layout: Mapping[str, tuple[str, Sequence[int]]],
    pieces: Callable[[str], Iterable[NDArray[Any]]],
    metadata: Mapping[str, str] | None = None,
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a file, never holding more than a piece of a tensor.

    Args:
        layout: the type (one of DTYPES) and shape of each tensor, in their order; but wider types go first, so that
            every tensor is aligned.
        pieces: called with each name in turn; returns the tensor's contents as consecutive arrays.
        metadata: what else the header says.
    """
    ordered = sorted(layout.items(), key=lambda item: -np.dtype(DTYPES[item[1][0]]).itemsize)
    header: dict[str, object] = {METADATA: metadata} if metadata else {}
    end = 0
    for name, (dtype, shape) in ordered:
        begin, end = end, end + math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    packed = json.dumps(header, separators=(",", ":")).encode()
    packed += b" " * (-len(packed) % ALIGNMENT)
    yield LENGTH.pack(len(packed)) + packed
    for name, _ in ordered:
        for piece in pieces(name):
            yield np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data


def read_metadata(path: Path) -> dict[str, str]:
    """Return what a file's header says besides its tensors.

    Raises:
        FormatError: if the header is damaged.
    """
    found = _parse_header(path)[0].get(METADATA, {})
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _parse_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return a file's header, where the data begin, and the file's size.

    Raises:
        FormatError: if the header is damaged.
    """
    with reading(path, FormatError), open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = LENGTH.unpack(file.read(LENGTH.size))[0] if size >= LENGTH.size else MAX_HEADER_BYTES + 1
        if length > min(MAX_HEADER_BYTES, size - LENGTH.size):
            raise FormatError(f"{path}: not a safetensors file, or truncated (is it a Git LFS pointer?)")
        header = strict.parse_json(file.read(length), f"{path}: its header is damaged", FormatError)
    if not isinstance(header, dict):
        raise FormatError(f"{path}: its header is damaged: it is no JSON object")
    return header, LENGTH.size + length, size


def _read_header(path: Path, dtypes: Collection[str]) -> dict[str, Entry]:
    """Return what a file's header says of its tensors, after checking it against the file.

    Raises:
        FormatError: if it is damaged, or a tensor's type is not among `dtypes`.
    """
    header, data, size = _parse_header(path)
    header.pop(METADATA, None)
    damaged = f"{path}: its header is damaged"
    found = {name: _entry(fields, data, f"{damaged}: {name}") for name, fields in header.items()}
    for name, (dtype, shape, begin, end) in found.items():
        if dtype not in dtypes:
            raise FormatError(f"{path}: {name} is {dtype}: only {', '.join(dtypes)} can be read")
        n_bytes = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        if end - begin != n_bytes or end > size:
            raise FormatError(f"{path}: {name}, {shape} of {dtype}, does not fit bytes {begin}..{end}: damaged")
    return found


class _Fields(NamedTuple):
    """What the header says of a tensor."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


def _entry(fields: object, data: int, name: str) -> Entry:
    """Return a tensor's entry from its fields in the header, where all tensors begin at `data`."""
    found = strict.build(_Fields, fields, name, FormatError)
    if len(found.data_offsets) != 2 or len(found.shape) > MAX_AXES:
        raise FormatError(f"{name}: has {len(found.data_offsets)} data_offsets and {len(found.shape)} axes")
    begin, end = found.data_offsets
    return found.dtype, tuple(found.shape), data + begin, data + end
