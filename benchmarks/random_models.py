"""Model files with random weights, in our format and the peers', and a vocabulary of made-up words.

Random weights cost as much as trained ones. llama.cpp reads GGUF files, llama2.c's run and runq versions 0 and 2.
"""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamalet import model_file, tokenizer
from llamalet.config import ModelConfig
from llamalet.convert import bin_file, gguf_file
from llamalet.convert.imported_model import ImportedModel, expand
from llamalet.errors import ConfigError
from llamalet.model_file.header import HEADER_BYTES, Header, pack_header
from llamalet.model_file.quantize import ENCODINGS, to_bfloat16

GGUF_TYPES = {"f32": "F32", "bf16": "BF16", "q8": "Q8_0", "q4": "Q4_0"}

# The versions of llama2.c's files, by type.
LLAMA2C_VERSIONS = {"f32": 0, "q8": 2}

# The first id that is a word: before it are three controls, the bytes and the space.
FIRST_WORD = 3 + 256 + 1


def random_weights(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return a norm of ones, or a matrix of float32 weights of either sign between 2 ** -7 and 2 ** -5.

    These are random bits with the high bits of the exponent fixed.
    """
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    bits = rng.integers(0, 1 << 32, shape, np.uint32)
    return ((bits & np.uint32(0x80FFFFFF)) | np.uint32(0x3C000000)).view(np.float32)


def write_llamalet(path: Path, config: ModelConfig, dtype: str, rng: np.random.Generator) -> None:
    """Write a file of version 3 with random weights, an array at a time.

    Quantized weights are random bytes with one scale: they cost as much as rounded ones and are made much faster.

    Args:
        path: the file to create.
        config: the model's shape; its matrices need rows in multiples of 16 and columns in multiples of 8, because
            packed ones would otherwise be padded with zeros.
        dtype: one of DTYPES.
        rng: the source of the weights.
    """
    group_size, crc = ENCODINGS[dtype].group_size, 0
    with open(path, "wb") as file:
        file.write(bytes(HEADER_BYTES))
        for spec in model_file.tensor_specs(3, config, dtype, group_size):
            for part in spec.parts:
                if part.dtype == "u1":  # 0 would be -128, which q8 does not use
                    array: NDArray[Any] = rng.integers(1, 256, part.shape, np.uint8)
                elif len(spec.parts) > 1:  # makes the weights as large as those of random_weights
                    array = to_bfloat16(np.full(part.shape, 0.07 / (256 if dtype == "q8" else 16), np.float32))
                else:
                    weights = random_weights(rng, part.shape)
                    array = to_bfloat16(weights) if part.dtype == "<u2" else weights
                content = array.tobytes() + bytes(spec.padding(part))
                crc = zlib.crc32(content, crc)
                file.write(content)
        file.seek(0)
        file.write(pack_header(Header(3, config, dtype, group_size, payload_crc32=crc)))


def write_llama2c(path: Path, config: ModelConfig, dtype: str, rng: np.random.Generator) -> None:
    """Write a file for llama2.c's run (f32) or runq (q8), with random weights."""
    tensors = {spec.name: random_weights(rng, spec.shape) for spec in model_file.tensor_specs(1, config)}
    model_file.write(path, LLAMA2C_VERSIONS[dtype], config, tensors)


def write_gguf(path: Path, config: ModelConfig, dtype: str, rng: np.random.Generator) -> None:
    """Write a GGUF file of a Llama model with random weights, a tensor at a time.

    Args:
        path: the file to create.
        config: the model's shape; quantized rows must be multiples of 32.
        dtype: one of DTYPES, for the matrices; norms are float32.
        rng: the source of the weights.

    Raises:
        ConfigError: if the gguf package is missing.

    Source: the gguf package's constants; llama.cpp keeps RoPE's pairs adjacent as we do, so no row moves.
    """
    try:
        import gguf
    except ImportError:
        raise ConfigError("llama.cpp's files need the gguf package: pip install gguf") from None
    writer = gguf.GGUFWriter(None, "llama")
    gguf_file.add_shape(writer, config)
    writer.add_tokenizer_model("no_vocab")
    types = {1: gguf.GGMLQuantizationType.F32, 2: gguf.GGMLQuantizationType[GGUF_TYPES[dtype]]}
    names = expand(gguf_file.NAMES, config.n_layers)
    shapes = {names[spec.name]: spec.shape for spec in model_file.tensor_specs(1, config)}
    if (divisors := gguf_file.rope_factors(config)) is not None:
        shapes[gguf_file.ROPE_FACTORS] = divisors.shape
    for name, shape in shapes.items():
        gguf_file.add_tensor_info(writer, name, shape, types[len(shape)])
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in shapes.items():
        weights = random_weights(rng, shape) if divisors is None or name != gguf_file.ROPE_FACTORS else divisors
        writer.write_tensor_data(gguf.quants.quantize(weights, types[len(shape)]))
    writer.close()


def write_served(folder: Path, config: ModelConfig, dtype: str, rng: np.random.Generator) -> tuple[Path, Path]:
    """Write one model with random weights twice, as a .bin and as a .gguf, each with the vocabulary inside.

    Its logits have a deviation of about 5, so that as in trained models a nucleus of 0.9 has tens of tokens. Tokens
    that are no word, and no whole character, have logits of 0 and so are never drawn: every token is a piece of text.

    Args:
        folder: of the files.
        config: the shape.
        dtype: f32, q8 or q4.
        rng: the source of the weights.

    Returns:
        The paths of the .bin and of the .gguf.
    """
    tensors = {spec.name: random_weights(rng, spec.shape) for spec in model_file.tensor_specs(1, config)}
    output = tensors.get("output", tensors["tok_embeddings"])
    tensors["norm"] *= np.float32(5 / (np.sqrt(config.dim) * output.std()))
    output[:FIRST_WORD] = 0
    path = folder / "tokenizer.bin"
    write_vocabulary(path, config.vocab_size)
    vocabulary, data = tokenizer.read(path)
    source = ImportedModel(
        name="random", config=config, tensors=tensors, tokenizer=vocabulary, tokenizer_data=data,
        stop_tokens=tuple(sorted(vocabulary.stop_ids)),
    )  # fmt: skip
    ours, theirs = folder / f"{dtype}.bin", folder / f"{dtype}.gguf"
    bin_file.write(ours, source, 3, dtype=dtype)
    gguf_file.write(theirs, source, {"f32": "f32", "q8": "q8_0", "q4": "q4_0"}[dtype])
    return ours, theirs


def write_vocabulary(path: Path, vocab_size: int) -> None:
    """Write a tokenizer.bin with made-up words, which begin at FIRST_WORD."""
    controls = [b"<unk>", b"\n<s>\n", b"\n</s>\n"]
    byte_pieces = [f"<0x{byte:02X}>".encode() for byte in range(256)]
    words = [b" "] + [f" w{number}".encode() for number in range(vocab_size - len(controls) - len(byte_pieces) - 1)]
    pieces = [(piece, -float(rank)) for rank, piece in enumerate(controls + byte_pieces + words)]
    path.write_bytes(tokenizer.pack(pieces))
