"""How fast the runtime is on this machine, compared with its memory and, if given, with llama.cpp and llama2.c.

make bench
make bench ARGS="--peer-llama-bench=PATH/llama-bench --peer-run=PATH/run --peer-runq=PATH/runq"
python -m benchmarks.runtime --shapes=110M --dtypes=q8 --figures=decode,depths --turns=3
python -m benchmarks.runtime --figures=drafts --draft-target=PATH/large.bin --draft=PATH/small.bin

The figures:

decode     from the start of a story, beside the speed of memory
positions  time per token at several positions
depths     decoding after up to 8192 positions with each kind of cache, and a prompt of 512 after 4096
passes     time of a pass over 4 and 8 positions of one text, which drafts need, relative to a decode
prefill    prompts of 128 and 512 tokens
batch      1, 16 and 64 texts at once
start      sample.py's time to its first word, and its memory
sampling   choosing a token, compiled and in numpy
caches     bytes of each kind of cache
drafts     stories with and without drafts, from trained models; left out without --draft-target

The models have random weights, which cost as much as trained ones, and only as much context as the figures need.
Machines are noisy, so all contenders take turns, and every figure is the median over the turns; drafts and plain
generation take turns text by text, once. Build llama.cpp and ik_llama.cpp as Release with GGML_NATIVE, llama2.c with
`make runomp`.
"""

if __name__ == "__main__":
    import _signal

    if hasattr(_signal, "pthread_sigmask"):  # until `begin` handles Ctrl-C, it has to wait
        _signal.pthread_sigmask(_signal.SIG_BLOCK, [_signal.SIGINT])
    from llamalet import startup

    startup.begin()  # before imports that take seconds

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import drafts, figures, peers, random_models, report
from benchmarks.figures import BATCHES, PROMPT_DEPTH, PROMPTS, Contest, Found, late_prompt
from benchmarks.harness import OUT, kind_and_message, load_average, machine, run_benchmark
from benchmarks.report import ANY_DTYPE, DRAFTS, IK_LLAMA_CPP, LLAMA2C, Key, Results
from benchmarks.shapes import CONTEXT, SHAPES, Shape
from configurator import parse
from llamalet import model_file, tokenizer
from llamalet.checks import not_positive
from llamalet.command import run
from llamalet.cores import thread_count
from llamalet.errors import ConfigError, note
from llamalet.kernels.transformer import Transformer
from llamalet.model_file.header import DTYPES

FIGURES = (*figures.OF_MODEL, *figures.OF_SHAPE, DRAFTS)

# Above this load at the start, the comparison with the peers is not reliable.
BUSY = 0.5

# The options that name a peer's program.
PROGRAMS = ("peer_llama_bench", "peer_batched_bench", "peer_ik_bench", "peer_run", "peer_runq")


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeBenchConfig:
    """The options of benchmarks/runtime.py."""

    shapes: str = ",".join(SHAPES)
    """The models, separated by commas: 15M, 110M, 1B."""
    dtypes: str | None = None
    """The weights' types: f32, bf16, q8, q4. By default all, and q8 and q4 for 1B."""
    figures: str = ",".join(FIGURES)
    """What to measure; see above."""
    turns: int = 5
    """Turns of each contender."""
    tokens: int | None = None
    """Tokens decoded per turn; by default 128, or 32 for 1B."""
    threads: int | None = None
    """Threads, the peers' too; by default one per physical core."""
    out: str = str(OUT)
    """Folder for runtime.json and runtime.png."""
    peer_llama_bench: str | None = None
    """llama.cpp's llama-bench, on GGUF files of the same shapes."""
    peer_batched_bench: str | None = None
    """llama.cpp's llama-batched-bench; by default the one next to llama-bench."""
    peer_ik_bench: str | None = None
    """ik_llama.cpp's llama-bench, on the same files."""
    peer_run: str | None = None
    """llama2.c's run, on float32 files of the same shapes."""
    peer_runq: str | None = None
    """llama2.c's runq, on int8 files of the same shapes."""
    draft_target: str | None = None
    """The trained model whose texts are drafted, in any format."""
    draft: str | None = None
    """A smaller trained model of the same vocabulary; without it only lookup drafts."""
    draft_data: str | None = None
    """Folder of prepared data with the same vocabulary, whose validation stories begin the texts; by default these
    begin with fixed sentences."""

    def __post_init__(self) -> None:
        """Raise one ConfigError that lists every value out of range."""
        problems = not_positive(self, "turns")
        for option, known in (("shapes", SHAPES), ("dtypes", DTYPES), ("figures", FIGURES)):
            unknown = [name for name in self.names(option) if name not in known]
            problems += [f"{option}={name}: must be one of {', '.join(known)}" for name in unknown]
        if self.tokens is not None and not 2 <= self.tokens <= CONTEXT:
            problems.append(f"tokens={self.tokens}: must lie between 2 and {CONTEXT}")
        for option in PROGRAMS:
            path = getattr(self, option)
            if path is not None and not os.access(path, os.X_OK):
                problems.append(f"{option}={path}: not an executable program")
        for option in ("draft", "draft_data"):
            if getattr(self, option) is not None and self.draft_target is None:
                problems.append(f"{option}={getattr(self, option)}: needs draft_target, the model that it is for")
        ConfigError.raise_for(problems)

    def names(self, option: str) -> list[str]:
        """Return the names listed in an option."""
        return [name.strip() for name in (getattr(self, option) or "").split(",") if name.strip()]

    def shape(self, name: str) -> Shape:
        """Return a shape with the dtypes and tokens that the options ask for."""
        shape = SHAPES[name]
        dtypes = tuple(self.names("dtypes")) or shape.dtypes
        return dataclasses.replace(shape, dtypes=dtypes, tokens=self.tokens or shape.tokens)

    @property
    def batched_bench(self) -> str | None:
        """The path of llama-batched-bench, if there is one."""
        if self.peer_batched_bench is not None or self.peer_llama_bench is None:
            return self.peer_batched_bench
        neighbour = Path(self.peer_llama_bench).with_name("llama-batched-bench")
        return str(neighbour) if os.access(neighbour, os.X_OK) else None

    def llama2c(self, dtype: str) -> str | None:
        """Return llama2.c's program for models of this type, if there is one."""
        return {"f32": self.peer_run, "q8": self.peer_runq}.get(dtype)


def main(argv: Sequence[str]) -> int:
    """Measure and print; return 0."""
    config = parse(RuntimeBenchConfig, argv, program="python -m benchmarks.runtime", description=__doc__)
    threads = thread_count(config.threads)
    if (busy := load_average()) > BUSY:
        note(f"warning: load {busy:.1f}: other programs are running, which slows the peers more than us")

    def measure(name: str, folder: Path, results: Results) -> Iterator[str]:
        if name == DRAFTS:
            drafts.measure(config.draft_target, config.draft, config.draft_data, threads, results)
            return report.draft_lines(results)
        measure_shape(config, name, folder, threads, results)
        return report.shape_lines(results, name, SHAPES[name].config, config.turns)

    def draw(figure: Any, results: Results, names: Sequence[str]) -> None:
        if shapes := [name for name in names if name != DRAFTS]:
            report.draw_runtime(figure, results, shapes)

    facts = {"builds": machine(threads) | peer_builds(config), "options": config}
    asked, measured = config.names("figures"), dict[str, Any]()
    if asked != [DRAFTS]:
        measured |= {name: config.shape(name) for name in config.names("shapes")}
    if DRAFTS in asked:
        measured[DRAFTS] = drafts.SETTINGS
    results = run_benchmark("runtime", facts, measured, measure, draw, Path(config.out))
    for check in results.checks():
        print(check)
    return 0


def peer_builds(config: RuntimeBenchConfig) -> dict[str, str]:
    """Return the peers' versions and build flags."""
    llama_cpp = {
        "llama-bench": config.peer_llama_bench,
        "llama-batched-bench": config.batched_bench,
        f"{IK_LLAMA_CPP}'s llama-bench": config.peer_ik_bench,
    }
    llama2c = {"run": config.peer_run, "runq": config.peer_runq}
    builds = {name: peers.llama_cpp_build(program) for name, program in llama_cpp.items() if program is not None}
    return builds | {name: peers.llama2c_build(program) for name, program in llama2c.items() if program is not None}


def measure_shape(config: RuntimeBenchConfig, name: str, folder: Path, threads: int, results: Results) -> None:
    """Write the files of a shape and let all contenders take their turns."""
    of_model = [group for group in config.names("figures") if group in figures.OF_MODEL]
    dtypes = config.shape(name).dtypes if of_model else ()
    contests = [make_contest(config, name, dtype, folder, threads, results) for dtype in dtypes]
    for turn in range(config.turns):
        add_turn(results, name, f"turn {turn + 1} of {config.turns}", shape_turn(config, name, results))
        for contest in contests:
            found = chain(our_turn(config, contest, results), peer_turns(config, contest, results))
            add_turn(results, name, f"{contest.dtype} turn {turn + 1} of {config.turns}", found)


def add_turn(results: Results, name: str, turn: str, found: Found) -> None:
    """Record and print what was measured in a turn, if anything was."""
    words = []
    for key, value in found:
        results.add(key, value)
        words.append(f"{key.contender} {key.figure} {value:.4g}")
    if words:
        note(f"{name} {turn}: {', '.join(words)}")


def make_contest(
    config: RuntimeBenchConfig, name: str, dtype: str, folder: Path, threads: int, results: Results
) -> Contest:
    """Write our file and the peers', load our model and compile its kernels."""
    shape, rng = config.shape(name), np.random.default_rng(0)
    note(f"{name} {dtype}: writing files")
    vocabulary = folder / "tokenizer.bin"
    contest = Contest(name, shape, dtype, files=folder, vocabulary=vocabulary, threads=threads, transformer=None)
    random_models.write_vocabulary(vocabulary, shape.config.vocab_size)
    if config.peer_llama_bench or config.batched_bench or config.peer_ik_bench:
        random_models.write_gguf(contest.file("gguf"), shape.config, dtype, rng)
    if config.llama2c(dtype) and shape.config.rope_scaling is None:
        random_models.write_llama2c(contest.file("llama2c"), shape.config, dtype, rng)
    try:
        random_models.write_llamalet(contest.file("bin"), shape.config, dtype, rng)
        transformer = Transformer(model_file.read(contest.file("bin")), threads=threads)
        # One warm-up of everything that is compiled or allocated at first use.
        transformer.decode(transformer.new_cache(), tokenizer.BOS_ID)
        transformer.prefill(transformer.new_cache(), range(1, PROMPTS[0] + 1))
    except Exception as error:  # the other models are measured even if this one fails
        results.missing[contest.key("decode")] = kind_and_message(error)
        return contest
    results.add(contest.key("file"), contest.file("bin").stat().st_size)
    return dataclasses.replace(contest, transformer=transformer)


# -- turns ------------------------------------------------------------------------------------------------------------


def shape_turn(config: RuntimeBenchConfig, name: str, results: Results) -> Found:
    """Measure each of the figures that depend on the shape alone once."""
    for group in config.names("figures"):
        if group in figures.OF_SHAPE:
            measure = partial(figures.OF_SHAPE[group], name, SHAPES[name])
            yield from attempt(measure, Key(name, ANY_DTYPE, group), results)


def our_turn(config: RuntimeBenchConfig, contest: Contest, results: Results) -> Found:
    """Measure each of our figures once."""
    for group in config.names("figures"):
        if group in figures.OF_MODEL and contest.transformer is not None:
            measure = partial(figures.OF_MODEL[group], contest, contest.transformer)
            yield from attempt(measure, contest.key(group), results)


def peer_turns(config: RuntimeBenchConfig, contest: Contest, results: Results) -> Found:
    """Let each peer take its turn at the figures that it can measure."""
    for name, measure in peer_measures(config, contest).items():
        yield from attempt(measure, contest.key(name, name), results)


def attempt(measure: Callable[[], Found], key: Key, results: Results) -> Found:
    """Yield what is measured; if that fails, record why, as the key's: the other figures are measured all the same."""
    try:
        yield from measure()
    except Exception as error:
        results.missing[key] = f"{key.figure}: {kind_and_message(error)}"


def peer_measures(config: RuntimeBenchConfig, contest: Contest) -> dict[str, Callable[[], Found]]:
    """Return what measures the peers' figures, by the programs' names."""
    asked, shape = config.names("figures"), contest.shape
    prompts, tokens = PROMPTS if "prefill" in asked else (), shape.tokens if "decode" in asked else 0
    gguf, threads = contest.file("gguf"), contest.threads
    rates: dict[str, Callable[[], peers.Rates]] = {}
    if config.peer_llama_bench and (prompts or tokens):
        rates["llama-bench"] = partial(
            peers.llama_bench, config.peer_llama_bench, gguf, threads,
            prompts=prompts, tokens=tokens, repeats=shape.repeats,
        )  # fmt: skip
    if config.peer_llama_bench and "depths" in asked:
        for depth in shape.depths:
            rates[f"llama-bench after {depth}"] = partial(
                peers.llama_bench_after, config.peer_llama_bench, gguf, threads,
                depth=depth, prompt=late_prompt(shape) if depth == PROMPT_DEPTH else 0, tokens=shape.depth_tokens,
                q8=shape.config.head_dim % 32 == 0,
            )  # fmt: skip
    if config.peer_ik_bench and (prompts or tokens):
        rates[IK_LLAMA_CPP] = partial(
            peers.ik_llama_bench, config.peer_ik_bench, gguf, threads,
            prompts=prompts, tokens=tokens, repeats=shape.repeats,
        )  # fmt: skip
    if config.batched_bench and "batch" in asked:
        rates["llama-batched-bench"] = partial(
            peers.batched_bench, config.batched_bench, gguf, threads, batches=BATCHES, tokens=shape.batch_tokens
        )
    program, file = config.llama2c(contest.dtype), contest.file("llama2c")
    if program and tokens and file.exists():
        rates[LLAMA2C] = partial(peers.llama2c_decode, program, file, contest.vocabulary, threads, tokens)

    def found(measure: Callable[[], peers.Rates]) -> Found:
        for (contender, figure), rate in measure().items():
            yield contest.key(figure, contender), rate

    return {name: partial(found, measure) for name, measure in rates.items()}


if __name__ == "__main__":
    run(main)
