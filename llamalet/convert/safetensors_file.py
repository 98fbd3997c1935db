"""safetensors files, a block of rows at a time, in numpy, which has no bfloat16.

Little-endian: uint64 length of the header; the header, a JSON object of tensor name -> dtype, shape and data_offsets,
which count from the header's end; the data, row-major, without gaps.

Source: https://github.com/huggingface/safetensors, "Format".
"""

import json
import math
import operator
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llamalet.convert.imported_model import DECODERS, ITEM_BYTES, FileTensor
from llamalet.errors import FormatError
from llamalet.files import replacing
from llamalet.model_file.quantize import to_bfloat16
from llamalet.model_file.tensors import Rows, row_blocks

LENGTH = struct.Struct("<Q")
MAX_HEADER_BYTES = 100_000_000  # the library's own limit
METADATA = "__metadata__"
ALIGNMENT = 8
DTYPES = {"f32": "F32", "bf16": "BF16"}


def read(path: Path) -> dict[str, FileTensor]:
    """Return the tensors of a file by their names; their rows are read when they are asked for.

    Raises:
        FormatError: if the file is damaged, or holds anything but float32, float16 and bfloat16.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = LENGTH.unpack(file.read(LENGTH.size))[0] if size >= LENGTH.size else MAX_HEADER_BYTES + 1
        if length > min(MAX_HEADER_BYTES, size - LENGTH.size):
            raise FormatError(f"{path}: not a safetensors file, or truncated (is it a Git LFS pointer?)")
        try:
            header = json.loads(file.read(length))
            rows = {name: fields for name, fields in header.items() if name != METADATA}
            found = {
                name: (str(fields["dtype"]), tuple(map(operator.index, fields["shape"])), *_offsets(fields))
                for name, fields in rows.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FormatError(f"{path}: its header is damaged: {error!r}") from None
    data, tensors = LENGTH.size + length, {}
    for name, (dtype, shape, begin, end) in found.items():
        if dtype not in DECODERS:
            raise FormatError(f"{path}: {name} is {dtype}: only {', '.join(DECODERS)} weights can be read")
        n_bytes = math.prod(shape) * ITEM_BYTES[dtype]
        if min(shape, default=0) < 1 or begin < 0 or end - begin != n_bytes or data + end > size:
            raise FormatError(f"{path}: {name}, {shape} of {dtype}, does not fit bytes {begin}..{end}: damaged")
        row_bytes = n_bytes // shape[0]
        tensors[name] = FileTensor(path, data + begin, shape, row_bytes, DECODERS[dtype])
    return tensors


def _offsets(fields: Mapping[str, Any]) -> tuple[int, int]:
    """Return where a tensor begins and ends."""
    begin, end = map(operator.index, fields["data_offsets"])
    return begin, end


def write(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    tensors: Iterable[tuple[str, Rows]],
    dtype: str,
) -> None:
    """Write a file.

    Args:
        path: the file to make or replace.
        shapes: the tensors' shapes by name, in their order.
        tensors: the tensors in the same order.
        dtype: f32 or bf16 (rounded to nearest).

    Raises:
        NonFiniteError: if a weight is NaN or infinite.
    """
    header: dict[str, object] = {METADATA: {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * ITEM_BYTES[DTYPES[dtype]]
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    packed = json.dumps(header, separators=(",", ":")).encode()
    packed += b" " * (-len(packed) % ALIGNMENT)
    with replacing(path) as file:
        file.write(LENGTH.pack(len(packed)) + packed)
        for (name, tensor), expected in zip(tensors, shapes, strict=True):
            assert name == expected
            for block in row_blocks(name, tensor):
                stored = block.astype("<f4", copy=False) if dtype == "f32" else to_bfloat16(block).astype("<u2")
                file.write(np.ascontiguousarray(stored).data.cast("B"))
