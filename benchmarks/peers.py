"""Model files with random weights, ours and the peers', and the programs that the runtime is compared with.

llama.cpp's llama-bench and llama-batched-bench read GGUF files; llama2.c's run and runq read versions 0 and 2.
"""

import json
import os
import re
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.report import LLAMA_CPP, LLAMA_CPP_FLASH
from llamalet import model_file, tokenizer
from llamalet.config import ModelConfig
from llamalet.convert import gguf_file
from llamalet.convert.imported_model import expand
from llamalet.errors import ConfigError, UsageError
from llamalet.model_file.header import HEADER_BYTES, Header, pack_header
from llamalet.model_file.quantize import ENCODINGS, to_bfloat16

GGUF_TYPES = {"f32": "F32", "bf16": "BF16", "q8": "Q8_0", "q4": "Q4_0"}

# The versions of llama2.c's files, by type.
LLAMA2C_VERSIONS = {"f32": 0, "q8": 2}

# Prompt tokens of each sequence in a batch.
BATCH_PROMPT = 8

# The build settings that determine llama.cpp's speed.
CMAKE_SWITCHES = ("GGML_NATIVE", "GGML_OPENMP", "GGML_CPU_REPACK", "GGML_LLAMAFILE", "GGML_BLAS", "GGML_LTO")

# Tokens/s by (contender, figure).
Rates = dict[tuple[str, str], float]


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


# -- GGUF -------------------------------------------------------------------------------------------------------------


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


# -- llama.cpp --------------------------------------------------------------------------------------------------------


def llama_bench(program: str, model: Path, threads: int, *, prompts: Sequence[int], tokens: int, repeats: int) -> Rates:
    """Let llama-bench take one turn at prefill and decode, flash attention off and on.

    Args:
        program: the path of llama-bench.
        model: a GGUF file.
        threads: number of compute threads.
        prompts: lengths of the prompts to process.
        tokens: number of tokens to decode; 0 for none.
        repeats: measurements of each, after a warm-up; the mean counts.
    """
    options = ["-p", ",".join(map(str, prompts)) or "0", "-n", str(tokens), "-r", str(repeats)]
    output = _run([program, "-m", str(model), "-t", str(threads), "-fa", "off,on", "-o", "jsonl", *options])
    return _parsed(program, parse_llama_bench, output)


def _parsed(program: str, parse: Callable[[str], Iterator[tuple[tuple[str, str], float]]], output: str) -> Rates:
    """Return what a program measured; raise a UsageError if its output is something else."""
    try:
        return dict(parse(output))
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{program}: prints no measurements of this kind; is it llama.cpp's?") from None


def parse_llama_bench(output: str) -> Iterator[tuple[tuple[str, str], float]]:
    """Yield (contender, figure) and tokens/s for each line of llama-bench's JSON."""
    for row in _json_lines(output):
        figure = f"prefill {row['n_prompt']}" if row["n_prompt"] else "decode"
        yield (_contender(row["flash_attn"]), figure), float(row["avg_ts"])


def batched_bench(program: str, model: Path, threads: int, *, batches: Sequence[int], tokens: int) -> Rates:
    """Let llama-batched-bench take one turn, flash attention off and on.

    Args:
        program: the path of llama-batched-bench.
        model: a GGUF file.
        threads: number of compute threads.
        batches: numbers of sequences.
        tokens: number of tokens per sequence; the rates are totals over all sequences.
    """
    found: Rates = {}
    lengths = ["-npp", str(BATCH_PROMPT), "-ntg", str(tokens), "-npl", ",".join(map(str, batches))]
    context = ["-c", str(max(batches) * (BATCH_PROMPT + tokens))]
    for flash in ("off", "on"):
        options = [*lengths, *context, "-t", str(threads), "-fa", flash, "--output-format", "jsonl"]
        found.update(_parsed(program, parse_batched_bench, _run([program, "-m", str(model), *options])))
    return found


def parse_batched_bench(output: str) -> Iterator[tuple[tuple[str, str], float]]:
    """Yield (contender, figure) and tokens/s for each line of llama-batched-bench's JSON."""
    for row in _json_lines(output):
        yield (_contender(row["flash_attn"]), f"batch {row['pl']}"), float(row["speed_tg"])


def _contender(flash_attention: Any) -> str:
    """Return the contender's name; llama.cpp prints 0 or false for off, 1 or true for on."""
    return LLAMA_CPP_FLASH if int(flash_attention) else LLAMA_CPP


def _json_lines(output: str) -> Iterator[Mapping[str, Any]]:
    """Yield the JSON objects among the lines of an output."""
    for line in output.splitlines():
        if line.startswith("{"):
            yield json.loads(line)


def llama_cpp_build(program: str) -> str:
    """Describe a build of llama.cpp: the version that the program prints, and the flags in its build folder."""
    done = _start([program, "--version"])
    version = "version unknown" if done.returncode else "; ".join((done.stdout + done.stderr).strip().splitlines())
    caches = [folder / "CMakeCache.txt" for folder in Path(program).resolve().parents[:3]]
    cache = next((cache for cache in caches if cache.is_file()), None)
    return f"{version}; {cmake_flags(cache.read_text()) if cache else 'build flags unknown'}"


def cmake_flags(cache: str) -> str:
    """Return the settings of a CMakeCache.txt that determine llama.cpp's speed."""
    values = dict(re.findall(r"^(\w+):\w+=(.*)$", cache, re.MULTILINE))
    build = values.get("CMAKE_BUILD_TYPE", "")
    flags = [values.get(f"CMAKE_CXX_FLAGS{suffix}", "") for suffix in ("", f"_{build.upper()}")]
    switches = [f"{name}={values[name]}" for name in CMAKE_SWITCHES if name in values]
    return " ".join(part for part in (build, *flags, *switches) if part)


# -- llama2.c ---------------------------------------------------------------------------------------------------------


def write_vocabulary(path: Path, vocab_size: int) -> None:
    """Write a tokenizer.bin with made-up words."""
    controls = [b"<unk>", b"\n<s>\n", b"\n</s>\n"]
    byte_pieces = [f"<0x{byte:02X}>".encode() for byte in range(256)]
    words = [b" "] + [f" w{number}".encode() for number in range(vocab_size - len(controls) - len(byte_pieces) - 1)]
    pieces = [(piece, -float(rank)) for rank, piece in enumerate(controls + byte_pieces + words)]
    path.write_bytes(tokenizer.pack(pieces))


def llama2c_decode(program: str, model: Path, vocabulary: Path, threads: int, tokens: int) -> float:
    """Return the tokens/s that llama2.c's run or runq reports for a story of `tokens` tokens."""
    command = [program, str(model), "-z", str(vocabulary), "-t", "0", "-n", str(tokens), "-i", ""]
    found = re.search(r"achieved tok/s: ([0-9.]+)", _run(command, OMP_NUM_THREADS=str(threads)))
    if found is None:
        raise UsageError(f"{program}: reports no tok/s for {model}; is it llama2.c's?")
    return float(found[1])


def llama2c_build(program: str) -> str:
    """Describe a build of llama2.c: its commit, its compiler, whether it uses OpenMP."""
    try:
        content = Path(program).read_bytes()
    except OSError as error:
        raise UsageError(f"{program}: cannot be read: {error.strerror}") from None
    compiler = re.search(rb"(GCC: \([^)]*\) [0-9.]+|clang version [0-9.]+)", content)
    openmp = re.search(rb"lib[gi]?omp[0-9]*\.so", content)
    git = ["git", "-C", str(Path(program).resolve().parent), "log", "-1", "--format=commit %h of %cs"]
    commit = _start(git).stdout.strip() if shutil.which("git") else ""
    words = [commit, compiler[1].decode() if compiler else "", "with OpenMP" if openmp else "without OpenMP"]
    return ", ".join(word for word in words if word)


def _run(command: Sequence[str], **environment: str) -> str:
    """Run a program; return its stdout and stderr."""
    done = _start(command, **environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UsageError(f"{command[0]} stopped with exit code {done.returncode}: {last}; run it by itself")
    return done.stdout + "\n" + done.stderr


def _start(command: Sequence[str], **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a program to its end, without stdin.

    Raises:
        UsageError: if it cannot be started.
    """
    try:
        return subprocess.run(
            command, env=os.environ | environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace",
        )  # fmt: skip
    except OSError as error:
        raise UsageError(f"{command[0]}: cannot be started: {error.strerror}") from None
