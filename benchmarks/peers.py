"""The programs that the runtime is compared with: what they are told, what they print, how they were built.

llama.cpp's llama-bench and llama-batched-bench, ik_llama.cpp's llama-bench, llama2.c's run and runq. Their model files
come from random_models.py.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import IK_LLAMA_CPP, LLAMA2C, LLAMA_CPP, LLAMA_CPP_FLASH, LLAMA_CPP_Q8_CACHE, after
from llamalet.errors import UsageError

# Prompt tokens of each sequence in a batch.
BATCH_PROMPT = 8

# The build settings that determine llama.cpp's speed.
CMAKE_SWITCHES = ("GGML_NATIVE", "GGML_OPENMP", "GGML_CPU_REPACK", "GGML_LLAMAFILE", "GGML_BLAS", "GGML_LTO")

# Tokens/s by (contender, figure), and what yields them from a program's output.
Rates = dict[tuple[str, str], float]
Parser = Callable[[str], Iterator[tuple[tuple[str, str], float]]]


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
    options = [*_lengths(prompts, tokens), "-r", str(repeats), "-fa", "off,on"]
    return _llama_bench(program, model, threads, options, parse_llama_bench)


def llama_bench_after(
    program: str, model: Path, threads: int, *, depth: int, prompt: int, tokens: int, q8: bool
) -> Rates:
    """Let llama-bench take one turn after so many positions, with caches of float16 and, if possible, of 8 bits.

    It computes these positions, which takes much longer than what it measures then, so it measures once.

    Args:
        program: the path of llama-bench.
        model: a GGUF file.
        threads: number of compute threads.
        depth: number of positions in the cache before what is measured.
        prompt: length of a prompt to process there; 0 for none.
        tokens: number of tokens to decode there; 0 for none.
        q8: whether to measure caches of Q8_0 too. They need heads of a multiple of 32 components, and values in Q8_0
            need flash attention.
    """
    lengths = [*_lengths([prompt] if prompt else [], tokens), "-d", str(depth), "-r", "1"]
    found = _llama_bench(program, model, threads, [*lengths, "-fa", "off,on"], parse_llama_bench_after)
    if q8:
        options = [*lengths, "-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0"]
        found |= _llama_bench(program, model, threads, options, parse_llama_bench_after)
    return found


def ik_llama_bench(
    program: str, model: Path, threads: int, *, prompts: Sequence[int], tokens: int, repeats: int
) -> Rates:
    """Let ik_llama.cpp's llama-bench take one turn; see llama_bench.

    The fastest of its four settings counts: flash attention off or on, weights as stored or repacked.
    """
    found: Rates = {}
    for repack in ("0", "1"):
        options = [*_lengths(prompts, tokens), "-r", str(repeats), "-fa", "0,1", "-rtr", repack, "-o", "json"]
        output = _run([program, "-m", str(model), "-t", str(threads), *options])
        for key, rate in _parsed(program, parse_ik_llama_bench, output).items():
            found[key] = max(rate, found.get(key, 0.0))
    return found


def _lengths(prompts: Sequence[int], tokens: int) -> list[str]:
    """Return llama-bench's options for prompts and for decoding."""
    return ["-p", ",".join(map(str, prompts)) or "0", "-n", str(tokens)]


def _llama_bench(program: str, model: Path, threads: int, options: Sequence[str], parse: Parser) -> Rates:
    """Run llama.cpp's llama-bench and return its rates."""
    return _parsed(program, parse, _run([program, "-m", str(model), "-t", str(threads), "-o", "jsonl", *options]))


def _parsed(program: str, parse: Parser, output: str) -> Rates:
    """Return what a program measured; raise a UsageError if its output is something else."""
    try:
        return dict(parse(output))
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{program}: prints no measurements of this kind; is it llama.cpp's?") from None


def parse_llama_bench(output: str) -> Iterator[tuple[tuple[str, str], float]]:
    """Yield (contender, figure) and tokens/s for each line of llama-bench's JSON."""
    for row in _json_lines(output):
        yield (_contender(row["flash_attn"]), _figure(row)), float(row["avg_ts"])


def parse_llama_bench_after(output: str) -> Iterator[tuple[tuple[str, str], float]]:
    """Yield the same of what was measured after so many positions."""
    for row in _json_lines(output):
        contender = _contender(row["flash_attn"]) if row["type_k"] == "f16" else LLAMA_CPP_Q8_CACHE
        yield (contender, after(_figure(row), row["n_depth"])), float(row["avg_ts"])


def parse_ik_llama_bench(output: str) -> Iterator[tuple[tuple[str, str], float]]:
    """Yield (contender, figure) and tokens/s, the faster of the settings in ik_llama.cpp's JSON: one array."""
    rows, _ = json.JSONDecoder().raw_decode(output, output.index("["))
    found: Rates = {}
    for row in rows:
        key = IK_LLAMA_CPP, _figure(row)
        found[key] = max(float(row["avg_ts"]), found.get(key, 0.0))
    yield from found.items()


def _figure(row: Mapping[str, Any]) -> str:
    """Return the name of what llama-bench measured."""
    return f"prefill {row['n_prompt']}" if row["n_prompt"] else "decode"


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


def llama2c_decode(program: str, model: Path, vocabulary: Path, threads: int, tokens: int) -> Rates:
    """Let llama2.c's run or runq take one turn at a story of `tokens` tokens; the rate is the one that it reports."""
    command = [program, str(model), "-z", str(vocabulary), "-t", "0", "-n", str(tokens), "-i", ""]
    found = re.search(r"achieved tok/s: ([0-9.]+)", _run(command, OMP_NUM_THREADS=str(threads)))
    if found is None:
        raise UsageError(f"{program}: reports no tok/s for {model}; is it llama2.c's?")
    return {(LLAMA2C, "decode"): float(found[1])}


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
