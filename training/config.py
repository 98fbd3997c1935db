"""The options of train.py. Torch is not imported, so --help and a mistyped option answer at once."""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from llamalet import strict
from llamalet.config import ModelConfig, RopeScaling
from llamalet.errors import CheckpointError, ConfigError
from training.schedule import Schedule, learning_rate

SHAPE = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "norm_eps", "rope_theta", "tied")
LONGEST = 1024
"""Default limit on the context of a model to train further: its whole context may not fit into memory."""

FURTHER = {"max_iters": 500, "warmup_iters": 50, "learning_rate": 5e-4}
"""Defaults for training a model further: most is learnt already, and a high rate would undo it."""

ALWAYS_SAVED = ("data", "optimizer", "save_every", "seed", "align_documents", "total_batch_tokens")
"""The settings that the oldest checkpoints have too, and that resuming needs."""

BEFORE_THE_OPTION = {"schedule": "cosine", "random_starts": 0.0}
"""What checkpoints mean that are older than an option whose default is something else."""

_INTERVAL = re.compile(r"(\d+) *(|[smh])")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """All settings of a run; the defaults are the shape of stories15M."""

    out_dir: str = field(default="out", metadata={"heading": "files"})
    """Folder of the run."""
    data: str | None = None
    """Folder of prepared data, or a folder above it; by default the newest in data/."""
    source: str | None = None
    """Text to prepare first, as tinystories.py pretokenize does: tinyshakespeare, a file, a folder, or the ID of a
    downloaded Hub dataset. With --init_from, that model's vocabulary is used."""
    resume: str | None = field(default=None, metadata={"bare": "latest"})
    """Continue from the newest valid checkpoint in out_dir, or from the checkpoint folder given; auto starts a new run
    if there is none."""
    init_from: str = "scratch"
    """Initial weights: scratch; or a model to train further (a run, a checkpoint, a .bin, a .gguf, a Hugging Face or
    Meta folder, llama2.c's .pt); or resume, which is the same as --resume."""
    overwrite: bool = False
    """Remove the checkpoints of an earlier run in out_dir instead of refusing to start."""

    dim: int = field(default=288, metadata={"heading": "model"})
    """Width of the residual stream."""
    n_layers: int = 6
    """Number of layers."""
    n_heads: int = 6
    """Number of query heads."""
    n_kv_heads: int | None = None
    """Number of key and value heads; n_heads by default."""
    head_dim: int | None = None
    """Width of a head; dim / n_heads by default."""
    hidden_dim: int | None = None
    """Width of the feed-forward layer; 8/3 dim, rounded up to a multiple of multiple_of, by default."""
    multiple_of: int = 32
    """See hidden_dim."""
    vocab_size: int | None = None
    """Number of tokens in the vocabulary. The data decide it; another value is an error."""
    max_seq_len: int = 256
    """Context length, which is also the length of training sequences, in tokens."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    rope_theta: float = 10000.0
    """Base of the RoPE frequencies."""
    tied: bool = True
    """Use the embedding table as the output projection too."""
    dropout: float = 0.0
    """Share of activations dropped in training."""

    init: Literal["normal", "copying"] = "copying"
    """Initial weights: normal is GPT-2's initialization; copying makes attention heads start by attending to similar
    tokens and passing them on."""

    batch_size: int = field(default=32, metadata={"heading": "batches"})
    """Sequences per process and micro-step; limited by memory."""
    total_batch_tokens: int | None = None
    """Tokens per optimizer step over all processes; by default one micro-step of each process."""
    align_documents: bool = True
    """Begin sequences at the start of a document where possible; false cuts plain chunks."""
    random_starts: float = 0.5
    """Share of the training sequences that begin at a random token instead. With 0 a model fails in the middle of a
    text, and so where a context rolls."""
    seed: int = 1337
    """Seed of the initial weights, the order of the data and the dropout."""

    optimizer: Literal["adamw", "muon"] = field(default="muon", metadata={"heading": "optimizer"})
    """adamw; or muon for the matrices of the layers and AdamW for the rest, which learns much faster."""
    max_iters: int = 20000
    """Number of optimizer steps of the run."""
    learning_rate: float = 2e-3
    """Peak learning rate, reached after the warm-up."""
    min_lr: float = 0.0
    """Final learning rate."""
    warmup_iters: int = 500
    """Steps of linear warm-up."""
    decay_lr: bool = True
    """Decay the learning rate after the warm-up; false keeps it constant."""
    schedule: Schedule = "wsd"
    """Decay: cosine decays from the warm-up to the end; wsd (warmup-stable-decay) stays at the peak, then decays
    linearly."""
    decay_share: float = 0.5
    """Share of the run in which wsd decays."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices."""
    beta1: float = 0.9
    """AdamW's decay rate of the first moment."""
    beta2: float = 0.95
    """AdamW's decay rate of the second moment."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 disables clipping."""
    spike_factor: float = 10.0
    """Skip a step whose gradient norm exceeds this many times its mean over the last 100 steps; 0 skips none."""
    max_skipped: int = 10
    """Stop the run after more than this many skipped steps in a row (spikes, or losses that are not finite)."""

    eval_interval: int = field(default=1000, metadata={"heading": "evaluation"})
    """Steps between evaluations on the validation split; the last step is always evaluated."""
    eval_iters: int = 100
    """Batches of batch_size sequences per evaluation, over all processes."""
    eval_only: bool = False
    """Score a checkpoint on all validation data instead of training: the best in out_dir; with --resume the newest or
    the one given."""
    save_every: str | None = "15m"
    """Checkpoint interval: steps (500) or time (90s, 15m, 2h). Evaluations also save; 0 saves only then."""
    keep: int = 2
    """Number of newest checkpoints to keep, in addition to the best."""
    log_interval: int = 10
    """Steps between lines of output."""
    sample: bool = True
    """Print the beginning of a story at each evaluation, and a whole one from the exported model at the end."""
    wandb_log: bool = False
    """Log to wandb too; WANDB_MODE=offline works."""
    wandb_project: str = "llamalet"
    """wandb's project."""
    wandb_run_name: str | None = None
    """wandb's name of the run."""

    backend: Literal["auto", "torch", "numba"] = field(default="auto", metadata={"heading": "machine"})
    """What computes: torch; numba, which needs no PyTorch, on one CPU; auto is torch if it is installed."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes share the model: ddp gives each a copy, fsdp (FSDP2) a share of every layer. fsdp
    also works in one process, if torchrun starts it."""
    dtype: str = "auto"
    """Type of the matrix products: float32, bfloat16, or auto (bfloat16 where it is faster). Weights are float32."""
    compile: bool = True
    """Use torch.compile if a compiler works (backend torch only)."""
    threads: int | None = None
    """CPU threads per process; by default its share of the cores."""
    deterministic: bool | None = None
    """Use deterministic algorithms; by default on the CPU, where they cost nothing, and not elsewhere."""
    peak_tflops: float | None = None
    """The device's peak in TFLOP/s at this dtype, for MFU; known for common GPUs."""

    def __post_init__(self) -> None:
        """Raise one ConfigError that lists every value out of range."""
        problems = []
        for name in ("batch_size", "max_iters", "eval_interval", "eval_iters", "keep", "log_interval"):
            if getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("threads", "total_batch_tokens", "peak_tflops"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                problems.append(f"{name}={getattr(self, name)}: must be positive")
        for name in ("seed", "warmup_iters", "min_lr", "weight_decay", "grad_clip", "spike_factor", "max_skipped"):
            if not 0 <= getattr(self, name) < math.inf:
                problems.append(f"{name}={getattr(self, name)}: must not be negative")
        if self.seed >= 2**63:
            problems.append(f"seed={self.seed}: must be less than 2**63")
        for name in ("dropout", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)}: must be in [0, 1)")
        for name in ("random_starts", "decay_share"):
            if not 0 <= getattr(self, name) <= 1:
                problems.append(f"{name}={getattr(self, name)}: must be in [0, 1]")
        if not 0 < self.learning_rate < math.inf:
            problems.append(f"learning_rate={self.learning_rate}: must be positive")
        if self.decay_lr and self.min_lr > self.learning_rate:
            problems.append(f"min_lr={self.min_lr}: must not exceed learning_rate={self.learning_rate}")
        if not _INTERVAL.fullmatch(str(self.save_every or "0")):
            problems.append(f"save_every={self.save_every}: must be steps, as in 500, or a time, as in 90s, 15m, 2h")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            problems.append(f"dtype={self.dtype}: must be auto, float32 or bfloat16")
        ConfigError.raise_for(problems)

    @property
    def save_steps(self) -> int | None:
        """Steps between checkpoints; None if save_every is 0 or a time."""
        count, unit = self._save_every
        return count if count and not unit else None

    @property
    def save_seconds(self) -> float | None:
        """Seconds between checkpoints; None if save_every is 0 or counts steps."""
        count, unit = self._save_every
        return count * {"s": 1.0, "m": 60.0, "h": 3600.0}[unit] if count and unit else None

    @property
    def _save_every(self) -> tuple[int, str]:
        """The number and the unit of save_every; an empty unit means steps."""
        found = _INTERVAL.fullmatch(str(self.save_every or "0"))
        assert found is not None  # checked by __post_init__
        return int(found[1]), found[2]

    def model_config(self, vocab_size: int, rope_scaling: RopeScaling | None = None) -> ModelConfig:
        """Return the shape of the model for a vocabulary of `vocab_size` tokens."""
        values = {name: getattr(self, name) for name in (*SHAPE, "multiple_of", "max_seq_len")}
        return ModelConfig.create(vocab_size=vocab_size, rope_scaling=rope_scaling, **values)

    def rate(self, step: int) -> float:
        """Return the learning rate of optimizer step `step`, counted from 0."""
        return learning_rate(
            step,
            peak=self.learning_rate,
            floor=self.min_lr if self.decay_lr else self.learning_rate,
            warmup=self.warmup_iters,
            total=self.max_iters,
            schedule=self.schedule,
            decay=round(self.decay_share * self.max_iters),
        )

    def accumulation(self, n_processes: int) -> int:
        """Return the number of micro-steps per process in an optimizer step.

        Raises:
            ConfigError: if total_batch_tokens is not a multiple of a micro-step; it gives the nearest multiples.
        """
        micro_step = self.batch_size * self.max_seq_len * n_processes
        total = self.total_batch_tokens or micro_step
        if total % micro_step:
            below = total // micro_step * micro_step
            nearest = [str(value) for value in (below, below + micro_step) if value]
            raise ConfigError(
                f"total_batch_tokens={total}: must be a multiple of batch_size {self.batch_size} x max_seq_len "
                f"{self.max_seq_len} x {n_processes} processes = {micro_step}; nearest: {' or '.join(nearest)}"
            )
        return total // micro_step


def with_defaults(saved: dict[str, Any]) -> type[TrainConfig]:
    """Return TrainConfig with the settings of a saved run as defaults, for options to override.

    Raises:
        CheckpointError: if one is missing that every run has saved, or has the wrong type, or is out of range.
    """
    if missing := [name for name in ALWAYS_SAVED if name not in saved]:
        raise CheckpointError(f"the settings of the saved run lack {', '.join(missing)}")
    saved = BEFORE_THE_OPTION | saved
    if type(steps := saved["save_every"]) is int:  # in the oldest checkpoints
        saved["save_every"] = str(steps)
    strict.build(TrainConfig, saved, "the settings of the saved run", CheckpointError, ignore_unknown=True)
    not_inherited = ("out_dir", "source", "resume", "init_from", "overwrite", "eval_only")
    fields = [
        (field.name, field.type, dataclasses.field(default=saved[field.name], metadata=field.metadata))
        for field in dataclasses.fields(TrainConfig)
        if field.name in saved and field.name not in not_inherited
    ]
    return dataclasses.make_dataclass("TrainConfig", fields, bases=(TrainConfig,), frozen=True, kw_only=True)


def with_shape(model: ModelConfig) -> type[TrainConfig]:
    """Return TrainConfig with the defaults for training a model further: its shape, its context up to LONGEST."""
    shape = {field.name: getattr(model, field.name) for field in dataclasses.fields(model) if field.name in SHAPE}
    context = {"max_seq_len": min(model.max_seq_len, LONGEST)}
    return with_defaults(dataclasses.asdict(TrainConfig()) | FURTHER | shape | context)
