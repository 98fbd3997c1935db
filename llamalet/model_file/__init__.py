"""The raw binary (header, tensors, quantized weights, the files that go with it) and the layout of a checkpoint.

May import llamalet's config, errors, files and tokenizer. What an existing file means must not change: a new layout is
a new version, with a reader, a golden file and a line in docs/formats.md.
"""

from llamalet.model_file.header import Header, llama2c_differences
from llamalet.model_file.reader import ModelFile, read
from llamalet.model_file.tensors import tensor_specs
from llamalet.model_file.writer import float_version, in_memory, write

__all__ = ["Header", "ModelFile", "float_version", "in_memory", "llama2c_differences", "read", "tensor_specs", "write"]
