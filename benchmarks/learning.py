"""Which learns faster, llama2.c's train.py or this project's: the same model, tokens, context and micro-batch.

  python tinystories.py synthesize --seed=1 --size=20MB --val-stories=400
  python tinystories.py train-vocab synthetic --vocab-size=2048
  python tinystories.py pretokenize synthetic
  python -m benchmarks.learning --data=data/synthetic/tok2048 --peer_train=PATH/llama2.c
  python -m benchmarks.learning --data=data/synthetic/tok2048 --peer_train=PATH/llama2.c --time
  python -m benchmarks.learning --data=data/synthetic/tok2048 --attempt="--optimizer=adamw --learning_rate=4e-3"

The fourth line sweeps llama2.c's learning rate and batch, repeats the best setting with more seeds, and trains our own
setting on a share of its tokens, each share a run of its own whose learning rate has come down at its end. The next
times a step of both, which take turns. The last adds one run of ours with other options.

One function computes the loss of both, over all of the validation split. Every finished run stands in --out; a run that
stands there is not repeated, so a campaign that was stopped goes on. The table is printed at each end.
"""

import dataclasses
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import llama2c
from benchmarks import training as speed
from configurator import parse
from llamalet.config import IGNORED, ModelConfig
from llamalet.errors import ConfigError, UsageError, run
from llamalet.files import replacing
from llamalet.shards import Shards
from model import Llama
from training.batches import Windows
from training.config import TrainConfig
from training.machine.hardware import count_threads
from training.run import checkpoint, metrics
from training.weights import to_torch

PEER, OURS = "llama2.c", "ours"
PEER_RATES = (2e-3, 4e-3, 8e-3)
PEER_BATCHES = (1, 4)
"""Micro-batches that it sums up before a step."""
WARMUP = 0.03
"""Share of the run in which the learning rate of both rises. llama2.c's then follows a cosine down to 0."""
POINTS = 10
"""Evaluations in the course of a run."""
TRAIN = Path(__file__).resolve().parent.parent / "train.py"


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnConfig:
    """The options of benchmarks/learning.py."""

    data: str = "data/synthetic/tok2048"
    """Folder of prepared data: both learn its training split, and are measured on its validation split."""
    peer_train: str | None = None
    """Folder of llama2.c; without it only our runs are made."""
    out: str | None = None
    """File of results; out/learning/SOURCE.json where not given."""
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
    """Tokens that llama2.c's train.py is given, in each run."""
    shares: tuple[float, ...] = (0.25, 0.33, 0.5)
    """Our runs' shares of them."""
    setting: str = "--optimizer=muon --init=copying --learning_rate=5e-3 --min_lr=0 --schedule=wsd --decay_share=0.5"
    """Our options of train.py, apart from the shape, the data and the length of the run."""
    seeds: int = 3
    """Runs of the best setting of each, with different seeds."""
    attempt: str | None = None
    """Options of train.py: make one run of ours with them on the smallest share, and print the table."""
    time: bool = False
    """Time a step of both best settings, taking turns."""
    turns: int = 8
    """Turns that each has then."""
    threads: int | None = None
    """Threads of a run; each program's own choice where not given."""
    picture: str | None = None
    """Draw the losses against the tokens into this PNG."""

    def __post_init__(self) -> None:
        """Raise one ConfigError that lists every value out of range."""
        names = ("batch_size", "max_seq_len", "tokens", "seeds", "turns")
        problems = [f"{name}={getattr(self, name)}: must be positive" for name in names if getattr(self, name) < 1]
        problems += [f"shares={share}: must lie in (0, 1]" for share in self.shares if not 0 < share <= 1]
        if self.peer_train is not None and not (Path(self.peer_train) / "train.py").is_file():
            problems.append(f"peer_train={self.peer_train}: holds no train.py")
        if self.time and self.peer_train is None:
            problems.append("time: needs --peer_train=PATH/llama2.c")
        if problems:
            raise ConfigError.from_problems(problems)

    def steps(self, share: float, accumulation: int = 1) -> int:
        """Return the optimizer steps of a run on a share of the tokens, a multiple of POINTS."""
        step_tokens = self.batch_size * self.max_seq_len * accumulation
        return max(round(self.tokens * share / step_tokens / POINTS), 1) * POINTS


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A trained model, and what came of it."""

    side: str
    """PEER or OURS."""
    options: str
    """What was typed, apart from the shape and the data."""
    seed: int
    tokens: int
    """Tokens trained on, in all its steps."""
    seconds: float
    """From start to end, evaluations and compilation too; means little on a machine with other work."""
    loss: float
    """Nats per token over the validation split, in windows that begin at documents."""
    chunked_loss: float
    """The same over plain chunks, as llama2.c cuts them in training."""
    curve: list[list[float]]
    """[tokens, validation loss] in its course, as the trainer itself measured."""

    @property
    def setting(self) -> tuple[str, str, int]:
        """What the seeds have in common."""
        return self.side, self.options, self.tokens


@dataclass
class Results:
    """The file of results: it is written anew after every run."""

    path: Path
    about: dict[str, Any]
    """The shape and the data, which all runs have in common."""
    runs: list[Run] = field(default_factory=list)
    tokens_per_s: dict[str, float] = field(default_factory=dict)
    """Of training steps, by side."""

    @classmethod
    def open(cls, path: Path, about: dict[str, Any]) -> "Results":
        """Read the file, or begin with nothing.

        Raises:
            ConfigError: if its runs are of another shape or other data.
        """
        if not path.exists():
            return cls(path, about)
        table = json.loads(path.read_bytes())
        if table["about"] != about:
            raise ConfigError(f"{path}: holds runs of {table['about']}, not of {about}; name another file with --out")
        return cls(path, about, [Run(**row) for row in table["runs"]], table["tokens_per_s"])

    def save(self) -> None:
        """Write the file."""
        runs = [dataclasses.asdict(run) for run in self.runs]
        table = {"about": self.about, "tokens_per_s": self.tokens_per_s, "runs": runs}
        with replacing(self.path) as file:
            file.write((json.dumps(table, indent=1) + "\n").encode())

    def add(self, run: Run) -> None:
        """Keep a run, beside those that another process may have added meanwhile, and say so."""
        self.runs = [*Results.open(self.path, self.about).runs, run]
        self.save()
        print(f"{run.side} {run.options} seed {run.seed}: {run.tokens:,} tokens, loss {run.loss:.4f}", flush=True)

    def has(self, side: str, options: str, seed: int, tokens: int) -> bool:
        """Return whether this run has been made."""
        return any(run.setting == (side, options, tokens) and run.seed == seed for run in self.runs)


def main(argv: Sequence[str]) -> int:
    """Make the runs that are missing, and print the table."""
    config = parse(LearnConfig, argv, program="python -m benchmarks.learning", description=__doc__ or "")
    data = Shards.open(config.data)
    about = shape(config) | {"train_sha256": [shard.sha256 for shard in data.meta.splits["train"].shards]}
    results = Results.open(Path(config.out or f"out/learning/{Path(data.meta.source).stem}.json"), about)
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
        draw(Path(config.picture), results, data, config.setting)
    return 0


# -- runs ------------------------------------------------------------------------------------------------------------


def train_peers(config: LearnConfig, data: Shards, results: Results) -> None:
    """Sweep llama2.c's learning rate and batch, then repeat the best of them with the other seeds."""
    for accumulation in PEER_BATCHES:
        for rate in PEER_RATES:
            train_peer(config, data, results, rate, accumulation, seed=0)
    options = peer_options(best(results.runs, PEER)[0])
    for seed in range(1, config.seeds):
        train_peer(config, data, results, options["learning_rate"], int(options["gradient_accumulation_steps"]), seed)


def train_peer(config: LearnConfig, data: Shards, results: Results, rate: float, accumulation: int, seed: int) -> None:
    """Let llama2.c's train.py train, and measure the checkpoint that it keeps: the best by its own evaluations."""
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
            raise UsageError(f"llama2.c's train.py failed: {(home / 'stderr.txt').read_text()}")
        curve = [
            [int(step) * tokens / steps, float(loss)]
            for step, loss in re.findall(r"^step (\d+): .* val loss ([\d.]+)$", lines, re.MULTILINE)
        ]
        seconds = time.monotonic() - start
        results.add(measured(load_peer(home, data), data, Run(
            side=PEER, options=options, seed=seed, tokens=tokens, seconds=seconds, loss=0, chunked_loss=0, curve=curve
        )))  # fmt: skip


def train_ours(config: LearnConfig, data: Shards, results: Results, options: str, steps: int, seed: int) -> None:
    """Let our train.py train, and measure the checkpoint that it would export: the best by its own evaluations."""
    tokens = steps * config.batch_size * config.max_seq_len
    if results.has(OURS, options, seed, tokens):
        return
    own = {"data": config.data, "max_iters": steps, "warmup_iters": round(WARMUP * steps), "seed": 1337 + seed}
    own |= {"eval_interval": steps // POINTS, "eval_iters": len(data.split("val")), "keep": 1, "sample": False}
    own |= {"threads": config.threads} if config.threads else {}
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llamalet-ours-") as folder:
        words = [f"--{key}={value}" for key, value in (shape(config) | own | {"out_dir": folder}).items()]
        subprocess.run([sys.executable, str(TRAIN), *words, *options.split()], check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - start
        rows = metrics.read(Path(folder) / metrics.METRICS_FILE)
        path = checkpoint.find_best(Path(folder))
        assert path is not None
        kept = checkpoint.load(path)
        model = Llama(kept.model_config)
        model.load_state_dict(to_torch(kept.model_state))
        results.add(measured(model, data, Run(
            side=OURS, options=options, seed=seed, tokens=tokens, seconds=seconds, loss=0, chunked_loss=0,
            curve=[[row["tokens"], row["val_loss"]] for row in rows if row.get("val_loss") is not None],
        )))  # fmt: skip


def shape(config: LearnConfig) -> dict[str, Any]:
    """Return the options that both programs have by the same names."""
    names = ("dim", "n_layers", "n_heads", "max_seq_len", "batch_size")
    return {name: getattr(config, name) for name in names}


def load_peer(home: Path, data: Shards) -> Llama:
    """Return the model that llama2.c's train.py kept, as a model of ours."""
    kept = torch.load(home / "out" / "ckpt.pt", map_location="cpu", weights_only=True)
    state = {name.removeprefix("_orig_mod."): tensor for name, tensor in kept["model"].items()}
    model = Llama(ModelConfig.create(vocab_size=data.vocab_size, **{
        name: kept["model_args"][name]
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "max_seq_len")
    }))  # fmt: skip
    del state["output.weight"]  # tied to the embeddings
    model.load_state_dict(state)
    return model


def measured(model: Llama, data: Shards, run: Run) -> Run:
    """Return the run with the losses of its model."""
    length = model.config.max_seq_len
    starts = data.document_starts("val")
    return dataclasses.replace(
        run,
        loss=whole_loss(model, Windows(data.split("val"), length, starts)),
        chunked_loss=whole_loss(model, Windows(data.split("val"), length)),
    )


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


def time_steps(config: LearnConfig, data: Shards, results: Results) -> dict[str, float]:
    """Return the tokens per second of both best settings, which take turns; compilation is not counted."""
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


def peer_options(run: Run) -> dict[str, float]:
    """Return the options of a run of llama2.c."""
    return {name: float(value) for name, value in re.findall(r"--(\w+)=(\S+)", run.options)}


def groups(runs: Iterable[Run]) -> list[list[Run]]:
    """Return the runs of each setting, the seeds together, in the order in which the settings appear."""
    by_setting: dict[tuple[str, str, int], list[Run]] = {}
    for one in runs:
        by_setting.setdefault(one.setting, []).append(one)
    return list(by_setting.values())


def best(runs: Iterable[Run], side: str) -> list[Run]:
    """Return the runs of the side's setting whose first seed has the lowest loss.

    Raises:
        UsageError: if it has no runs.
    """
    mine = groups(run for run in runs if run.side == side)
    if not mine:
        raise UsageError(f"no run of {side} yet; run python -m benchmarks.learning --peer_train=PATH first")
    return min(mine, key=lambda group: group[0].loss)


def table(results: Results, data: Shards, setting: str) -> Iterator[str]:
    """Yield every run, and what our setting needs to reach llama2.c's loss."""
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


def median(runs: Iterable[Run], name: str) -> float:
    """Return the median of a figure over runs."""
    return statistics.median(getattr(one, name) for one in runs)


def reached(runs: Iterable[Run], loss: float) -> str:
    """Return the median of the tokens at which the runs first measured `loss` or less."""
    first = [min((point[0] for point in one.curve if point[1] <= loss), default=math.inf) for one in runs]
    tokens = statistics.median(first)
    return f"{tokens:,.0f}" if math.isfinite(tokens) else "never"


def draw(path: Path, results: Results, data: Shards, setting: str) -> None:
    """Draw the losses of the best settings against the tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run(main)
