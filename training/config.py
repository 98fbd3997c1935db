"""Every option of train.py. Needs no torch, so that --help and a mistyped option answer at once."""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from llamalet.config import ModelConfig
from llamalet.errors import ConfigError
from training.schedule import Schedule, learning_rate

SHAPE = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "norm_eps", "rope_theta", "tied")
LONGEST = 1024
"""Context that a model from elsewhere is trained further with, unless another is given: attention over all that large
models have would not fit into memory."""

_INTERVAL = re.compile(r"(\d+) *(|[smh])")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything that can be set; the defaults are the shape of stories15M."""

    # Files
    out_dir: str = "out"
    """Where the run goes."""
    data: str | None = None
    """Folder of prepared data, or one above it; the newest below data/ where not given."""
    source: str | None = None
    """Text to prepare first, where it is not prepared yet, as tinystories.py pretokenize does: tinyshakespeare, a file,
    a folder, a Hub ID that was downloaded; with the vocabulary of --init_from's model, where there is one."""
    resume: str | None = field(default=None, metadata={"bare": "latest"})
    """Go on from the newest sound checkpoint in out_dir, or from the checkpoint folder given; auto starts afresh where
    there is none."""
    init_from: str = "scratch"
    """scratch; or a model to train further: a run, a checkpoint, a .bin, a .gguf, a Hugging Face or Meta folder,
    llama2.c's .pt; or resume, another spelling of --resume."""
    overwrite: bool = False
    """Remove the checkpoints that an earlier run left in out_dir, instead of refusing to start."""

    # Model
    dim: int = 288
    """Width of the residual stream."""
    n_layers: int = 6
    """Number of layers."""
    n_heads: int = 6
    """Query heads."""
    n_kv_heads: int | None = None
    """Key and value heads; as many as query heads where not given."""
    head_dim: int | None = None
    """Width of a head; dim / n_heads where not given."""
    hidden_dim: int | None = None
    """Width of the feed-forward layer; 8/3 dim rounded up to multiple_of where not given."""
    multiple_of: int = 32
    """See hidden_dim."""
    vocab_size: int | None = None
    """Tokens in the vocabulary; always that of the data, and refused where it differs."""
    max_seq_len: int = 256
    """Tokens of context, and of each training sequence."""
    norm_eps: float = 1e-5
    """Added to the mean square in each norm."""
    rope_theta: float = 10000.0
    """Base of the RoPE wavelengths."""
    tied: bool = True
    """Use the embedding table as the output projection too."""
    dropout: float = 0.0
    """Share of activations dropped in training."""

    init: Literal["normal", "copying"] = "copying"
    """copying lets attention begin by passing on what it attends to, its like; normal is GPT-2's start."""

    # Batches
    batch_size: int = 32
    """Sequences per process and micro-step: what must fit into memory."""
    total_batch_tokens: int | None = None
    """Tokens of an optimizer step over all processes; one micro-step of each where not given."""
    align_documents: bool = True
    """Begin sequences at the start of a document where possible; false cuts plain chunks."""
    seed: int = 1337
    """Names the initial weights, the order of the data and the dropout."""

    # Optimizer
    optimizer: Literal["adamw", "muon"] = "muon"
    """muon takes the layers' matrices out of AdamW's hands: models learn much faster with it."""
    max_iters: int = 20000
    """Optimizer steps of the whole run."""
    learning_rate: float = 2e-3
    """Highest learning rate, reached after the warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end."""
    warmup_iters: int = 500
    """Steps of linear warm-up."""
    decay_lr: bool = True
    """Come down after the warm-up; false stays at learning_rate."""
    schedule: Schedule = "wsd"
    """How: cosine falls all the way; wsd (warm-up, stable, decay) stays at learning_rate, then falls in a line."""
    decay_share: float = 0.5
    """Share of the run in which wsd falls."""
    weight_decay: float = 0.1
    """Decay of the matrices, in AdamW's sense."""
    beta1: float = 0.9
    """AdamW's first moment."""
    beta2: float = 0.95
    """AdamW's second moment."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 does not clip."""
    spike_factor: float = 10.0
    """Skip a step whose gradient norm is this many times its mean over the last 100; 0 skips none for its norm."""
    max_skipped: int = 10
    """Steps in a row that may be skipped, for a spike or a loss that is not finite, before the run stops."""

    # Evaluation and records
    eval_interval: int = 1000
    """Steps between evaluations on the validation split; there is one at the end in any case."""
    eval_iters: int = 100
    """Batches of batch_size sequences in an evaluation, over all processes."""
    eval_only: bool = False
    """Score the best checkpoint in out_dir, or the newest or another with --resume, on all validation data."""
    save_every: str | None = "15m"
    """Between checkpoints: steps (500) or time (90s, 15m, 2h); so does each evaluation, with 0 nothing else."""
    keep: int = 2
    """How many of the newest checkpoints stay, beside the best."""
    log_interval: int = 10
    """Steps between lines of output."""
    sample: bool = True
    """Let the model begin a story at each evaluation, and the exported one tell a whole one at the end."""
    wandb_log: bool = False
    """Record the run with wandb too; WANDB_MODE=offline works."""
    wandb_project: str = "llamalet"
    """Project in wandb."""
    wandb_run_name: str | None = None
    """Name of the run in wandb."""

    # Machine
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes share the model: each has all of it, or a share of every layer (FSDP2)."""
    dtype: str = "auto"
    """auto (bfloat16 where the hardware has it), float32 or bfloat16 for the matrix products; weights are float32."""
    compile: bool = True
    """Use torch.compile where a compiler works."""
    threads: int | None = None
    """CPU threads of a process; its share of the cores where not given."""
    deterministic: bool | None = None
    """Repeatable results to the last bit; on on the CPU, where it costs nothing, off elsewhere."""
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
                problems.append(f"{name}={getattr(self, name)}: must lie in [0, 1)")
        if not 0 <= self.decay_share <= 1:
            problems.append(f"decay_share={self.decay_share}: must lie in [0, 1]")
        if not 0 < self.learning_rate < math.inf:
            problems.append(f"learning_rate={self.learning_rate}: must be positive")
        if self.decay_lr and self.min_lr > self.learning_rate:
            problems.append(f"min_lr={self.min_lr}: must not exceed learning_rate={self.learning_rate}")
        if not _INTERVAL.fullmatch(str(self.save_every or "0")):
            problems.append(f"save_every={self.save_every}: must be steps, as in 500, or a time, as in 90s, 15m, 2h")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            problems.append(f"dtype={self.dtype}: must be auto, float32 or bfloat16")
        if problems:
            raise ConfigError.from_problems(problems)

    @property
    def save_steps(self) -> int | None:
        """Steps between checkpoints, where save_every counts steps."""
        count, unit = self._save_every
        return count if count and not unit else None

    @property
    def save_seconds(self) -> float | None:
        """Seconds between checkpoints, where save_every is a time."""
        count, unit = self._save_every
        return count * {"s": 1.0, "m": 60.0, "h": 3600.0}[unit] if count and unit else None

    @property
    def _save_every(self) -> tuple[int, str]:
        """The number and the unit of save_every; no unit means steps."""
        found = _INTERVAL.fullmatch(str(self.save_every or "0"))
        assert found is not None  # __post_init__ saw to it
        return int(found[1]), found[2]

    def model_config(self, vocab_size: int) -> ModelConfig:
        """Return the shape of the model over a vocabulary of `vocab_size` tokens."""
        names = ["dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "multiple_of", "max_seq_len"]
        names += ["norm_eps", "rope_theta", "tied"]
        return ModelConfig.create(vocab_size=vocab_size, **{name: getattr(self, name) for name in names})

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
        """Return the micro-steps of each process in an optimizer step.

        Raises:
            ConfigError: if total_batch_tokens is no whole number of micro-steps, naming the nearest that are.
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
    """Return TrainConfig with a run's settings as defaults, so that only what is typed now changes them."""
    saved = {"schedule": "cosine"} | saved  # what there was before there was a choice
    if isinstance(steps := saved["save_every"], int):  # as checkpoints of the first version have it
        saved["save_every"] = str(steps)
    what_to_do = ("out_dir", "source", "resume", "init_from", "overwrite", "eval_only")
    fields = [
        (field.name, field.type, dataclasses.field(default=saved[field.name], metadata=field.metadata))
        for field in dataclasses.fields(TrainConfig)
        if field.name in saved and field.name not in what_to_do
    ]
    return dataclasses.make_dataclass("TrainConfig", fields, bases=(TrainConfig,), frozen=True, kw_only=True)


def with_shape(model: ModelConfig) -> type[TrainConfig]:
    """Return TrainConfig with a model's shape as defaults, and no more than LONGEST of its context."""
    shape = {field.name: getattr(model, field.name) for field in dataclasses.fields(model) if field.name in SHAPE}
    return with_defaults(dataclasses.asdict(TrainConfig()) | shape | {"max_seq_len": min(model.max_seq_len, LONGEST)})
