"""Which learns faster, llama2.c's train.py or ours, with the same model, tokens, context and micro-batch?

  python tinystories.py synthesize --seed=1 --size=20MB --val-stories=400
  python tinystories.py train-vocab synthetic --vocab-size=2048
  python tinystories.py pretokenize synthetic
  python -m benchmarks.learning --data=data/synthetic/tok2048 --peer_train=PATH/llama2.c
  python -m benchmarks.learning --data=data/synthetic/tok2048 --peer_train=PATH/llama2.c --time
  python -m benchmarks.learning --data=data/synthetic/tok2048 --attempt="--optimizer=adamw --learning_rate=4e-3"

The fourth line sweeps llama2.c's learning rate and batch size, repeats the best setting with more seeds, and trains our
setting on several shares of its tokens, each in a separate run with a complete learning rate schedule. The next line
times a step of both, in turns. The last adds one run of ours with other options.

One function computes the loss of both, over the whole validation split. Finished runs are recorded in --out and not
repeated, so an interrupted campaign continues. Each command ends by printing the table.
"""

if __name__ == "__main__":
    import _signal

    if hasattr(_signal, "pthread_sigmask"):  # until `begin` handles Ctrl-C, it has to wait
        _signal.pthread_sigmask(_signal.SIG_BLOCK, [_signal.SIGINT])
    from llamalet import startup

    startup.begin()  # before imports that take seconds

import dataclasses
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import llama2c
from benchmarks import training as speed
from benchmarks.harness import save_chart
from configurator import parse
from llamalet import strict
from llamalet.checks import not_positive
from llamalet.command import run
from llamalet.config import IGNORED
from llamalet.convert import formats
from llamalet.errors import ConfigError, UsageError
from llamalet.files import check_replaceable, check_writable, write_file
from llamalet.shards import Shards
from model import Llama
from training import weights
from training.batches import Windows
from training.config import TrainConfig
from training.machine.hardware import count_threads
from training.run import metrics

PEER, OURS = "llama2.c", "ours"
WARMUP = 0.03
"""Share of the run in which the learning rate rises; llama2.c's then follows a cosine down to 0."""
POINTS = 10
"""Evaluations during a run."""
TRAIN = Path(__file__).resolve().parent.parent / "train.py"


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnConfig:
    """The options of benchmarks/learning.py."""

    data: str = "data/synthetic/tok2048"
    """Folder of prepared data: both train on its training split and are measured on its validation split."""
    peer_train: str | None = None
    """Folder of llama2.c; without it only ours is trained."""
    peer_rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    """llama2.c's learning rates to try."""
    peer_batches: tuple[int, ...] = (1, 4)
    """Its micro-batches per step to try."""
    out: str | None = None
    """File of results; by default out/learning/SOURCE.json."""
    dim: int = 128
    """Width of the model."""
    n_layers: int = 3
    """Number of layers."""
    n_heads: int = 4
    """Number of heads."""
    max_seq_len: int = 256
    """Tokens of a sequence."""
    batch_size: int = 8
    """Sequences of a micro-batch."""
    tokens: int = 4_096_000
    """Training tokens of each run of llama2.c."""
    shares: tuple[float, ...] = (0.25, 0.33, 0.5)
    """Our runs' shares of these tokens."""
    setting: str = (
        "--optimizer=muon --init=copying --learning_rate=5e-3 --min_lr=0 "
        "--schedule=wsd --decay_share=0.5 --random_starts=0.5"
    )
    """Our options of train.py, apart from shape, data and length of the run."""
    seeds: int = 3
    """Runs of each best setting, with different seeds."""
    attempt: str | None = None
    """Options of train.py for a single run of ours, on the smallest share."""
    time: bool = False
    """Time a step of both best settings, in turns."""
    turns: int = 8
    """Turns of each, with --time."""
    threads: int | None = None
    """Threads of a run; by default each program's own choice."""
    picture: str | None = None
    """PNG file for the losses by tokens."""

    def __post_init__(self) -> None:
        """Raise one ConfigError that lists every value out of range."""
        problems = not_positive(self, "batch_size", "max_seq_len", "tokens", "seeds", "turns")
        problems += [f"shares={share}: must lie in (0, 1]" for share in self.shares if not 0 < share <= 1]
        problems += [f"peer_rates={rate}: must be positive" for rate in self.peer_rates if not 0 < rate < math.inf]
        problems += [f"peer_batches={batch}: must be at least 1" for batch in self.peer_batches if batch < 1]
        if self.peer_train is not None and not (Path(self.peer_train) / "train.py").is_file():
            problems.append(f"peer_train={self.peer_train}: has no train.py")
        if self.time and self.peer_train is None:
            problems.append("time: needs --peer_train=PATH/llama2.c")
        ConfigError.raise_for(problems)

    def steps(self, share: float, accumulation: int = 1) -> int:
        """Return the optimizer steps of a run on a share of the tokens, a multiple of POINTS."""
        step_tokens = self.batch_size * self.max_seq_len * accumulation
        return max(round(self.tokens * share / step_tokens / POINTS), 1) * POINTS


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningRun:
    """A training run and its result."""

    side: str
    """PEER or OURS."""
    options: str
    """Its options, apart from shape and data."""
    seed: int
    tokens: int
    """Tokens trained on, in all steps."""
    seconds: float
    """Total time with evaluations and compilation; unreliable on a busy machine."""
    loss: float
    """Nats per token over the validation split, in windows that start at documents."""
    chunked_loss: float
    """The same over plain chunks, as in llama2.c's training."""
    curve: list[list[float]]
    """[tokens, validation loss] during training, as measured by the trainer itself."""

    @property
    def setting(self) -> tuple[str, str, int]:
        """What runs that differ only in their seed have in common."""
        return self.side, self.options, self.tokens


class RunsTable(NamedTuple):
    """What the file of all runs holds; see RunsFile."""

    about: Mapping[str, Any]
    tokens_per_s: Mapping[str, float]
    runs: list[LearningRun]


@dataclass
class RunsFile:
    """The file of all runs; it is rewritten after each."""

    path: Path
    about: dict[str, Any]
    """The shape and the data, common to all runs."""
    runs: list[LearningRun] = field(default_factory=list)
    tokens_per_s: dict[str, float] = field(default_factory=dict)
    """Training speed of each side."""

    @classmethod
    def open(cls, path: Path, about: dict[str, Any]) -> "RunsFile":
        """Read the file; without one there are no runs yet.

        Raises:
            ConfigError: if its runs are of another shape or other data, or it is damaged.
            DiskError: if it cannot be written.
        """
        check_writable(path.parent)
        check_replaceable(path)
        if not path.exists():
            return cls(path, about)
        table = strict.build(RunsTable, strict.read_json(path, ConfigError), str(path), ConfigError)
        if table.about != about:
            raise ConfigError(f"{path}: has runs of {table.about}, not of {about}; choose another file with --out")
        return cls(path, about, table.runs, dict(table.tokens_per_s))

    def save(self) -> None:
        """Write the file."""
        runs = [dataclasses.asdict(run) for run in self.runs]
        table = {"about": self.about, "tokens_per_s": self.tokens_per_s, "runs": runs}
        write_file(self.path, (json.dumps(table, indent=1) + "\n").encode())

    def add(self, run: LearningRun) -> None:
        """Add a run, and those that another process may have added meanwhile; save and print it."""
        self.runs = [*RunsFile.open(self.path, self.about).runs, run]
        self.save()
        print(f"{run.side} {run.options} seed {run.seed}: {run.tokens:,} tokens, loss {run.loss:.4f}", flush=True)

    def has(self, side: str, options: str, seed: int, tokens: int) -> bool:
        """Return whether this run exists."""
        return any(run.setting == (side, options, tokens) and run.seed == seed for run in self.runs)


def main(argv: Sequence[str]) -> int:
    """Do the missing runs, and print the table."""
    config = parse(LearnConfig, argv, program="python -m benchmarks.learning", description=__doc__)
    data = Shards.open(config.data)
    about = shape(config) | {"train_sha256": [shard.sha256 for shard in data.meta.splits["train"].shards]}
    results = RunsFile.open(Path(config.out or f"out/learning/{Path(data.meta.source).stem}.json"), about)
    if config.time:
        results.tokens_per_s = time_steps(config, data, results)
        results.save()
    elif config.attempt is not None:
        train_ours(config, data, results, config.attempt, config.steps(min(config.shares)), seed=0)
    else:
        if config.peer_train:
            train_peers(config, data, results)
        for share in config.shares:
            for seed in range(config.seeds):
                train_ours(config, data, results, config.setting, config.steps(share), seed)
    print("\n".join(table(results, data, config.setting)))
    if config.picture:
        save_chart(Path(config.picture), lambda figure: draw_losses(figure, results, data, config.setting))
    return 0


# -- runs ------------------------------------------------------------------------------------------------------------


def train_peers(config: LearnConfig, data: Shards, results: RunsFile) -> None:
    """Sweep llama2.c's learning rate and batch, then repeat the best of them with the other seeds."""
    for accumulation in config.peer_batches:
        for rate in config.peer_rates:
            train_peer(config, data, results, rate, accumulation, seed=0)
    options = peer_options(best(results.runs, PEER)[0])
    for seed in range(1, config.seeds):
        train_peer(config, data, results, options["learning_rate"], int(options["gradient_accumulation_steps"]), seed)


def train_peer(config: LearnConfig, data: Shards, results: RunsFile, rate: float, accumulation: int, seed: int) -> None:
    """Run llama2.c's train.py, and measure the checkpoint that it keeps: the best by its own evaluations."""
    steps = config.steps(1, accumulation)
    options = f"--learning_rate={rate:g} --gradient_accumulation_steps={accumulation}"
    tokens = steps * accumulation * config.batch_size * config.max_seq_len
    if results.has(PEER, options, seed, tokens):
        return
    assert config.peer_train is not None
    own = {"n_kv_heads": config.n_heads, "vocab_size": data.vocab_size, "device": "cpu", "max_iters": steps}
    own |= {"warmup_iters": round(WARMUP * steps), "eval_interval": steps // POINTS, "eval_iters": 12}
    own |= {"learning_rate": rate, "gradient_accumulation_steps": accumulation}
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llamalet-peer-") as folder:
        home = Path(folder) / "llama2.c"
        splits = {split: data.split(split) for split in ("train", "val")}
        llama2c.copy_home(Path(config.peer_train), home, splits, data.vocab_size, seed)
        process = llama2c.start(home, shape(config) | own, config.threads)
        lines, _ = process.communicate()
        if process.returncode:
            raise UsageError(f"llama2.c's train.py failed: {(home / llama2c.LOG).read_text()}")
        model = load_model("llama2c", home / "out" / "ckpt.pt")
    points = re.findall(r"^step (\d+): .* val loss ([\d.]+)$", lines, re.MULTILINE)
    curve = [[int(step) * tokens / steps, float(loss)] for step, loss in points]
    results.add(measured(model, data, start, side=PEER, options=options, seed=seed, tokens=tokens, curve=curve))


def train_ours(config: LearnConfig, data: Shards, results: RunsFile, options: str, steps: int, seed: int) -> None:
    """Run our train.py, and measure the checkpoint that it would export: the best by its own evaluations."""
    tokens = steps * config.batch_size * config.max_seq_len
    if results.has(OURS, options, seed, tokens):
        return
    own = {"data": config.data, "max_iters": steps, "warmup_iters": round(WARMUP * steps), "seed": 1337 + seed}
    own |= {"eval_interval": steps // POINTS, "eval_iters": len(data.split("val")), "keep": 1, "sample": False}
    own |= {"threads": config.threads} if config.threads else {}
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llamalet-ours-") as folder:
        words = [f"--{key}={value}" for key, value in (shape(config) | own | {"out_dir": folder}).items()]
        command = [sys.executable, str(TRAIN), *words, *options.split()]
        if code := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise UsageError(f"train.py stopped with exit code {code}; run it by itself: {shlex.join(command)}")
        rows = metrics.read(Path(folder) / metrics.METRICS_FILE)
        model = load_model("checkpoint", Path(folder))
    curve = [[row["tokens"], row["val_loss"]] for row in rows if row.get("val_loss") is not None]
    results.add(measured(model, data, start, side=OURS, options=options, seed=seed, tokens=tokens, curve=curve))


def shape(config: LearnConfig) -> dict[str, Any]:
    """Return the options that have the same names in both programs."""
    return {name: getattr(config, name) for name in speed.SHAPE_OPTIONS}


def load_model(kind: str, path: Path) -> Llama:
    """Return the model that llama2.c's train.py ("llama2c") or ours ("checkpoint") saved, read as for an export."""
    source = formats.read(kind, str(path))
    return weights.load_model(source.config, weights.to_state_dict(source.tensors))


def measured(model: Llama, data: Shards, start: float, **facts: Any) -> LearningRun:
    """Return the run that began at `start`, in time.monotonic's seconds, with the losses of its model."""
    seconds = time.monotonic() - start
    length, val = model.config.max_seq_len, data.split("val")
    loss = whole_loss(model, Windows(val, length, data.document_starts("val")))
    return LearningRun(seconds=seconds, loss=loss, chunked_loss=whole_loss(model, Windows(val, length)), **facts)


@torch.no_grad()
def whole_loss(model: Llama, windows: Windows, batch_size: int = 16) -> float:
    """Return the loss in nats per token over all windows, each token counted once, in float32."""
    model.eval()
    total, count = 0.0, 0
    for tokens, targets in windows.evaluation_batches(batch_size, len(windows)):
        counted = int((targets != IGNORED).sum())
        total += model(torch.from_numpy(tokens), torch.from_numpy(targets)).item() * counted
        count += counted
    return total / count


# -- time ------------------------------------------------------------------------------------------------------------


def time_steps(config: LearnConfig, data: Shards, results: RunsFile) -> dict[str, float]:
    """Return the tokens per second of both best settings, measured in turns, without compilation."""
    assert config.peer_train is not None
    device, threads, steps = torch.device("cpu"), config.threads or count_threads(1), 5
    accumulation = int(peer_options(best(results.runs, PEER)[0])["gradient_accumulation_steps"])
    peer_shape = shape(config) | {"vocab_size": data.vocab_size, "gradient_accumulation_steps": accumulation}
    setting = dataclasses.asdict(parse(TrainConfig, config.setting.split(), program="train.py", description=""))
    changed = {name: value for name, value in setting.items() if value != getattr(TrainConfig(), name)}
    options = changed | shape(config) | {"data": config.data, "threads": threads}
    rung = speed.Rung(dtype="bf16", plain=False)
    tokens = data.split("train")[: 200 * config.max_seq_len + 1]
    milliseconds: dict[str, list[float]] = {OURS: [], PEER: []}
    with tempfile.TemporaryDirectory(prefix="llamalet-bench-") as folder, ExitStack() as stack:
        home = Path(folder) / "llama2.c"
        turns = {
            OURS: stack.enter_context(speed.ours(options, rung, device, steps)),
            PEER: stack.enter_context(
                speed.peer(Path(config.peer_train), peer_shape, tokens, device, threads, steps, home)
            ),
        }
        for _ in range(config.turns):
            for side, turn in turns.items():
                milliseconds[side].append(turn()["step"])
    step_tokens = {OURS: config.batch_size * config.max_seq_len}
    step_tokens[PEER] = step_tokens[OURS] * accumulation
    return {side: 1e3 * step_tokens[side] / statistics.median(values) for side, values in milliseconds.items()}


# -- reports ---------------------------------------------------------------------------------------------------------


def peer_options(run: LearningRun) -> dict[str, float]:
    """Return the options of a run of llama2.c."""
    return {name: float(value) for name, value in re.findall(r"--(\w+)=(\S+)", run.options)}


def groups(runs: Iterable[LearningRun]) -> list[list[LearningRun]]:
    """Group runs that differ only in their seed, in order of appearance."""
    by_setting: dict[tuple[str, str, int], list[LearningRun]] = {}
    for one in runs:
        by_setting.setdefault(one.setting, []).append(one)
    return list(by_setting.values())


def best(runs: Iterable[LearningRun], side: str) -> list[LearningRun]:
    """Return the runs of the side's best setting, the one whose first seed has the lowest loss.

    Raises:
        UsageError: if it has no runs.
    """
    mine = groups(run for run in runs if run.side == side)
    if not mine:
        raise UsageError(f"no run of {side} yet; run python -m benchmarks.learning --peer_train=PATH first")
    return min(mine, key=lambda group: group[0].loss)


def table(results: RunsFile, data: Shards, setting: str) -> Iterator[str]:
    """Yield the lines about all runs, and about the tokens and time that our setting needs for llama2.c's loss."""
    floor = f"; entropy {data.meta.entropy.nats_per_token:.4f}" if data.meta.entropy else ""
    yield f"{data.meta.source}: validation loss in nats per token{floor}\n"
    yield "| trainer | options | seed | tokens | seconds | loss | in plain chunks |\n|---|---|---|---|---|---|---|"
    for one in (one for group in groups(results.runs) for one in group):
        yield (
            f"| {one.side} | `{one.options}` | {one.seed} | {one.tokens:,} | {one.seconds:.0f} | {one.loss:.4f} "
            f"| {one.chunked_loss:.4f} |"
        )
    if not any(one.side == PEER for one in results.runs):
        return
    peers = best(results.runs, PEER)
    yield "\n| median of the seeds | tokens | loss | in plain chunks | first at its loss | time of its steps |"
    yield "|---|---|---|---|---|---|"
    for group in [peers] + [group for group in groups(results.runs) if group[0].options == setting]:
        side, _, tokens = group[0].setting
        rate = results.tokens_per_s.get(side)
        seconds = f"{tokens / rate:.0f} s at {rate:,.0f} tok/s" if rate else "not timed"
        yield (
            f"| {side}, {len(group)} seeds | {tokens:,} ({tokens / peers[0].tokens:.3g}) | {median(group, 'loss'):.4f} "
            f"| {median(group, 'chunked_loss'):.4f} | {reached(group, median(peers, 'loss'))} | {seconds} |"
        )


def median(runs: Iterable[LearningRun], name: str) -> float:
    """Return the median of a figure over runs."""
    return statistics.median(getattr(one, name) for one in runs)


def reached(runs: Iterable[LearningRun], loss: float) -> str:
    """Return the median of the tokens at which the runs first measured `loss` or less."""
    first = [min((point[0] for point in one.curve if point[1] <= loss), default=math.inf) for one in runs]
    tokens = statistics.median(first)
    return f"{tokens:,.0f}" if math.isfinite(tokens) else "never"


def draw_losses(figure: Any, results: RunsFile, data: Shards, setting: str) -> None:
    """Draw the losses of the best settings by tokens."""
    figure.set_size_inches(8, 5)
    axes = figure.subplots()
    shown = [best(results.runs, PEER)] + [group for group in groups(results.runs) if group[0].options == setting]
    for number, group in enumerate(shown):
        for one in group:
            label = f"{one.side}, {one.tokens / 1e6:.2g} M tokens" if one is group[0] else None
            points = [(tokens / 1e6, loss) for tokens, loss in one.curve if tokens]
            axes.plot(*zip(*points, strict=True), color=f"C{number}", label=label, marker=".", linewidth=1)
    axes.axhline(median(shown[0], "loss"), color="C0", linestyle=":", label="llama2.c's last loss")
    if data.meta.entropy:
        axes.axhline(data.meta.entropy.nats_per_token, color="gray", linestyle="--", label="corpus entropy")
    axes.set(xlabel="million tokens", ylabel="validation loss (nats per token)", xscale="log", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()


if __name__ == "__main__":
    run(main)
