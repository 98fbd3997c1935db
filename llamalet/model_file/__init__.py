"""The raw binary: its header, its tensors, and their quantized forms. Every byte of a .bin is decided here.

May import llamalet's config, errors and files. Nothing here may change what an existing file means: a change of layout
is a new version, with a reader, a golden file and a line in docs/formats.md.
"""

from llamalet.model_file.header import Header
from llamalet.model_file.tensors import (
    ModelFile,
    Rows,
    Tensor,
    float_version,
    llama2c_differences,
    read,
    tensor_specs,
    write,
)

__all__ = [
    "Header", "ModelFile", "Rows", "Tensor", "float_version", "llama2c_differences", "read", "tensor_specs", "write",
]  # fmt: skip
