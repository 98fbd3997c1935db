"""Train a Llama on prepared data, on one CPU, one GPU, or many of either.

  python train.py                                    stories15M on the newest data below data/, into out/
  python train.py configs/stories42M.toml --out_dir=out/42M --max_iters=5000
  torchrun --standalone --nproc_per_node=2 train.py  the same run on two processes
  python train.py --resume                           go on from the newest checkpoint in out/

A run leaves its settings (config.toml), metrics.jsonl, loss.png, checkpoints/ and the exported model.bin in out_dir.
"""

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from configurator import parse
from llamalet import errors, tokenizer
from llamalet.config import ModelConfig
from llamalet.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from llamalet.files import replacing
from llamalet.shards import Shards, find_newest
from model import Llama
from training import checkpoint, metrics
from training.batches import IGNORED, Batch, Windows
from training.checkpoint import Checkpoint
from training.cpu import use_cpu_kernels
from training.distributed import Processes, processes
from training.hardware import choose_dtype, compile_problem, count_threads, peak_tflops, tune_allocator
from training.optimizer import Optimizer, clip_gradients, learning_rate
from training.weights import write_bin


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything that can be set; the defaults train stories15M."""

    # Files
    out_dir: str = "out"
    """Where the run goes."""
    data: str | None = None
    """Folder of prepared data, or one above it; the newest below data/ where not given."""
    resume: str | None = field(default=None, metadata={"bare": "latest"})
    """Go on from the newest sound checkpoint in out_dir, or from the checkpoint folder given."""
    init_from: str = "scratch"
    """scratch, or resume: another spelling of --resume."""
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

    init: Literal["normal", "copying"] = "normal"
    """copying lets attention begin by passing on what it attends to; for few steps on texts that repeat themselves."""

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
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon takes the layers' matrices out of AdamW's hands; small models learn much faster with it."""
    max_iters: int = 20000
    """Optimizer steps of the whole run."""
    learning_rate: float = 1e-3
    """Highest learning rate, reached after the warm-up."""
    min_lr: float = 1e-4
    """Learning rate at the end."""
    warmup_iters: int = 500
    """Steps of linear warm-up."""
    decay_lr: bool = True
    """Decay along a cosine after the warm-up; false stays at learning_rate."""
    weight_decay: float = 0.1
    """Decay of the matrices, in AdamW's sense."""
    beta1: float = 0.9
    """AdamW's first moment."""
    beta2: float = 0.95
    """AdamW's second moment."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 does not clip."""

    # Evaluation and records
    eval_interval: int = 1000
    """Steps between evaluations on the validation split; there is one at the end in any case."""
    eval_iters: int = 100
    """Batches of batch_size sequences in an evaluation, over all processes."""
    eval_only: bool = False
    """Evaluate the newest checkpoint in out_dir and stop."""
    save_every: int | None = None
    """Steps between checkpoints; one after each evaluation where not given."""
    keep: int = 2
    """How many of the newest checkpoints stay, beside the best."""
    log_interval: int = 10
    """Steps between lines of output."""
    sample: bool = True
    """Let the exported model tell a story at the end."""
    wandb_log: bool = False
    """Record the run with wandb too; WANDB_MODE=offline works."""
    wandb_project: str = "llamalet"
    """Project in wandb."""
    wandb_run_name: str | None = None
    """Name of the run in wandb."""

    # Machine
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
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
        for name in ("save_every", "threads", "total_batch_tokens", "peak_tflops"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                problems.append(f"{name}={getattr(self, name)}: must be positive")
        for name in ("seed", "warmup_iters", "min_lr", "weight_decay", "grad_clip"):
            if not 0 <= getattr(self, name) < math.inf:
                problems.append(f"{name}={getattr(self, name)}: must not be negative")
        for name in ("dropout", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)}: must lie in [0, 1)")
        if not 0 < self.learning_rate < math.inf:
            problems.append(f"learning_rate={self.learning_rate}: must be positive")
        if self.decay_lr and self.min_lr > self.learning_rate:
            problems.append(f"min_lr={self.min_lr}: must not exceed learning_rate={self.learning_rate}")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            problems.append(f"dtype={self.dtype}: must be auto, float32 or bfloat16")
        if self.init_from not in ("scratch", "resume"):
            problems.append(f"init_from={self.init_from}: must be scratch or resume")
        if problems:
            raise ConfigError.from_problems(problems)

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


def main(argv: Sequence[str]) -> int:
    """Train as the command line says."""
    program, about = "train.py", __doc__ or ""
    config = parse(TrainConfig, argv, program=program, description=about, toml=True)
    resumed = None
    if config.resume or config.init_from == "resume" or config.eval_only:
        resumed = open_checkpoint(config)
        config = parse(
            with_defaults(resumed.state["train_config"]), argv, program=program, description=about, toml=True
        )
    if not config.eval_only:
        check_out_dir(config, resumed)
    with memory_errors(), processes(config.device) as group:
        trainer = Trainer(config, group, resumed)
        if config.eval_only:
            loss = trainer.evaluate()
            group.print(f"step {trainer.step} | validation loss {loss:.4f} nats per token")
            return 0
        trainer.train()
        if group.is_main:
            finish(config, trainer.data)
    return 0


class Trainer:
    """A run: its data, model and optimizer, and the loop over them.

    Attributes:
        step: optimizer steps done so far, earlier stretches of a resumed run included.
    """

    def __init__(self, config: TrainConfig, group: Processes, resumed: Checkpoint | None = None) -> None:
        self.config, self.group = config, group
        self.run_dir = Path(config.out_dir)
        self.data = open_data(config)
        self.tokenizer_data = read_tokenizer(self.data)
        self.model_config = config.model_config(self.data.vocab_size)
        self.accumulation = config.accumulation(group.count)
        self.tokens_per_step = self.accumulation * group.count * config.batch_size * config.max_seq_len
        if resumed:
            check_continuity(resumed, config, self.model_config, self.data)
        self.train_windows, self.val_windows = self.open_windows("train"), self.open_windows("val")

        self.dtype = choose_dtype(config.dtype, group.device)
        self.not_compiled = set_up_machine(config, group)
        torch.manual_seed(config.seed)
        self.model = Llama(self.model_config, config.dropout)
        if config.init == "copying":
            self.model.start_by_copying()
        self.model.to(group.device)
        self.optimizer = Optimizer(
            self.model,
            kind=config.optimizer,
            rate=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
        )
        self.step = 0
        if resumed:
            self.model.load_state_dict(resumed.model_state)
            self.optimizer.load_state_dict(resumed.optimizer_state)
            self.step = resumed.state["step"]
        self.resumed_step = self.step if resumed else None
        if group.device.type == "cpu":
            use_cpu_kernels(self.model, compiled=self.not_compiled is None)
        if self.not_compiled is None:
            self.model.compile()
        # Checkpoints and evaluation use the model itself; only training goes through the wrapper that sums gradients.
        self.parallel = DistributedDataParallel(self.model, broadcast_buffers=False) if group.count > 1 else self.model

    def open_windows(self, split: str) -> Windows:
        """Cut a split into sequences."""
        starts = self.data.document_starts(split) if self.config.align_documents else None
        return Windows(self.data.split(split), self.config.max_seq_len, starts)

    def train(self) -> None:
        """Run the loop from the current step to the last."""
        config, group = self.config, self.group
        if group.is_main:
            prepare_run_dir(self.run_dir, config, self.step)
            describe(self)
        group.wait()
        timer = Timer(self.step)
        with self.record() as record:
            while self.step < config.max_iters:
                loss, gradient_norm = self.optimizer_step()
                at_end = self.step == config.max_iters
                row: dict[str, Any] = {}
                if at_end or self.step % config.log_interval == 0 or timer.is_new:
                    row = self.progress(loss, gradient_norm, timer)
                    group.print(progress_line(self.step, config.max_iters, row))
                if at_end or self.step % config.eval_interval == 0:
                    with timer.paused():
                        row["val_loss"] = self.evaluate()
                        group.print(f"step {self.step}/{config.max_iters} | validation loss {row['val_loss']:.4f}")
                if "val_loss" in row or (config.save_every and self.step % config.save_every == 0):
                    with timer.paused():
                        self.save(row.get("val_loss"))
                if row and record:
                    record.log({"step": self.step, "tokens": self.step * self.tokens_per_step} | row)

    def optimizer_step(self) -> tuple[Tensor, Tensor]:
        """Do one optimizer step; return this process's mean loss and the common gradient norm, still on the device."""
        config, group = self.config, self.group
        total = torch.zeros((), device=group.device)
        for micro_step in range(self.accumulation):
            # The place in the run decides the data and the dropout, and nothing else does: resuming needs no generator
            # state, and the number of processes makes no difference.
            place = (self.step * self.accumulation + micro_step) * group.count + group.rank
            if config.dropout:
                torch.manual_seed(config.seed + 0x9E3779B97F4A7C15 * (place + 1) % 2**63)
            batch = self.train_windows.training_batch(config.seed, place * config.batch_size, config.batch_size)
            if isinstance(self.parallel, DistributedDataParallel):
                self.parallel.require_backward_grad_sync = micro_step == self.accumulation - 1
            loss = self.loss(self.parallel, batch) / self.accumulation
            loss.backward()
            total += loss.detach()
        gradient_norm = clip_gradients(self.model.parameters(), config.grad_clip)
        self.optimizer.step(config.rate(self.step))
        self.step += 1
        return total, gradient_norm

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of a batch, computed in the chosen precision."""
        device = self.group.device
        tokens, targets = (torch.from_numpy(array).to(device, non_blocking=True) for array in batch)
        reduced = self.dtype != torch.float32
        with torch.autocast(device.type, dtype=self.dtype) if reduced else nullcontext():
            return model(tokens, targets)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the validation loss in nats per token; each process takes its share of the batches.

        Raises:
            NonFiniteError: if it is not a number.
        """
        config, group = self.config, self.group
        self.model.eval()
        total, count = 0.0, 0.0
        for batch in self.val_windows.evaluation_batches(config.batch_size, config.eval_iters, group.rank, group.count):
            counted = int((batch[1] != IGNORED).sum())
            total += self.loss(self.model, batch).item() * counted
            count += counted
        self.model.train()
        total, count = group.sum([total, count])
        if not math.isfinite(total):
            raise NonFiniteError(f"step {self.step}: the validation loss is {total}; this state is not saved")
        return total / count

    def save(self, val_loss: float | None) -> None:
        """Write a checkpoint; all processes hold the same state, so the main one does it."""
        if self.group.is_main:
            checkpoint.save(
                self.run_dir,
                model_config=self.model_config,
                model_state=self.model.state_dict(),
                optimizer_state=self.optimizer.state_dict(),
                state={
                    "step": self.step,
                    "val_loss": val_loss,
                    "tokenizer_sha256": self.data.tokenizer_sha256,
                    "data": str(self.data.folder),
                    "train_config": dataclasses.asdict(self.config),
                },
                tokenizer_name=self.data.meta.tokenizer,
                tokenizer_data=self.tokenizer_data,
                keep=self.config.keep,
            )
        self.group.wait()

    def progress(self, loss: Tensor, gradient_norm: Tensor, timer: "Timer") -> dict[str, Any]:
        """Return the figures of the last steps.

        Raises:
            NonFiniteError: if the loss or the gradient is not a number.
        """
        mean_loss = self.group.sum([loss.item()])[0] / self.group.count
        norm = gradient_norm.item()
        if not (math.isfinite(mean_loss) and math.isfinite(norm)):
            raise NonFiniteError(
                f"step {self.step}: loss {mean_loss}, gradient norm {norm}; lower --learning_rate, now "
                f"{self.config.learning_rate:g}, or lengthen --warmup_iters, and go on with --resume"
            )
        row: dict[str, float | None] = {"loss": mean_loss, "lr": self.config.rate(self.step - 1), "gnorm": norm}
        seconds = timer.lap(self.step)
        if seconds is not None:
            row["tokens_per_s"] = tokens_per_s = self.tokens_per_step / seconds
            row["tflops"] = tflops = training_flops(self.model_config) * tokens_per_s / 1e12
            row["eta_s"] = seconds * (self.config.max_iters - self.step)
            peak = self.config.peak_tflops or peak_tflops(self.group.device, self.dtype)
            row["mfu"] = tflops / (peak * self.group.count) if peak else None
        return row

    def record(self) -> AbstractContextManager[metrics.Metrics | None]:
        """Open the record of the run, in the main process alone."""
        if not self.group.is_main:
            return nullcontext()
        config = self.config
        wandb = {"project": config.wandb_project, "name": config.wandb_run_name, "config": dataclasses.asdict(config)}
        return metrics.Metrics(self.run_dir, resume_step=self.resumed_step, wandb=wandb if config.wandb_log else None)


class Timer:
    """Times steps, leaving out the first one (which compiles) and whatever happens while it is paused."""

    def __init__(self, step: int) -> None:
        self.is_new = True
        self._step, self._start = step, 0.0

    def lap(self, step: int) -> float | None:
        """Return the seconds a step took on average since the last lap; None at the first."""
        now = time.perf_counter()
        seconds = None if self.is_new else (now - self._start) / (step - self._step)
        self.is_new, self._step, self._start = False, step, now
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time of the block."""
        begin = time.perf_counter()
        yield
        self._start += time.perf_counter() - begin


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raise what torch raises when memory runs out, a RuntimeError, as a MemoryError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise MemoryError from error
        raise


def training_flops(config: ModelConfig) -> float:
    """Return the floating-point operations that training spends on a token of a full sequence.

    Source: PaLM, https://arxiv.org/abs/2204.02311, appendix B: 6 a weight, 12 a layer, head, position and head value.
    The embedding lookup multiplies nothing, so its table counts only where it is the output projection too.
    """
    weights = config.n_params - (0 if config.tied else config.vocab_size * config.dim)
    return 6 * weights + 12 * config.n_layers * config.n_heads * config.head_dim * config.max_seq_len


def set_up_machine(config: TrainConfig, group: Processes) -> str | None:
    """Set threads, memory, repeatability; return why torch.compile is not used, or None if it is."""
    torch.set_num_threads(config.threads or count_threads(group.local_count))
    tune_allocator(group.device)
    if config.deterministic or (config.deterministic is None and group.device.type == "cpu"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is repeatable with a fixed workspace only
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid that costs a pass over memory
    if group.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays float32
    return compile_problem(group.device) if config.compile else "switched off"


def open_data(config: TrainConfig) -> Shards:
    """Open the prepared data that the config names, or the newest.

    Raises:
        DataError: if there are none.
        ConfigError: if their vocabulary is not the one asked for.
    """
    root = config.data or "data"
    folder = find_newest(root)
    if folder is None:
        raise DataError(
            f"{root}: no prepared data; make some with `python tinystories.py download` (offline: `synthesize`), then "
            "`python tinystories.py pretokenize`"
        )
    data = Shards.open(folder)
    if config.vocab_size not in (None, data.vocab_size):
        raise ConfigError(
            f"vocab_size={config.vocab_size}: the data in {folder} have {data.vocab_size}; leave the option out, or "
            f"prepare data with `python tinystories.py pretokenize --vocab-size={config.vocab_size}`"
        )
    return data


def read_tokenizer(data: Shards) -> bytes:
    """Return the file of the data's tokenizer, which goes into each checkpoint.

    Raises:
        DataError: if it is not the one that the data were made with.
        TokenizerError: if it is missing or damaged.
    """
    if tokenizer.load(data.tokenizer_path).sha256 != data.tokenizer_sha256:
        raise DataError(f"{data.tokenizer_path}: not the vocabulary that the data were made with; prepare them again")
    return data.tokenizer_path.read_bytes()


def open_checkpoint(config: TrainConfig) -> Checkpoint:
    """Load the checkpoint to go on from.

    Raises:
        CheckpointError: if there is none, or the one named is not sound.
    """
    if config.resume not in (None, "latest"):
        return checkpoint.load(config.resume)
    newest = checkpoint.find_latest(config.out_dir)
    if newest is None:
        raise CheckpointError(f"{config.out_dir}: no sound checkpoint to go on from; start with `python train.py`")
    return checkpoint.load(newest)


def check_out_dir(config: TrainConfig, resumed: Checkpoint | None) -> None:
    """Refuse to mix the checkpoints of two runs, or to remove the one to go on from.

    Raises:
        CheckpointError: saying what the folder holds and what to do.
    """
    earlier = checkpoint.list_steps(config.out_dir)
    if earlier and resumed is not None and resumed.path.resolve().parent == earlier[0].resolve().parent:
        if config.overwrite:
            raise CheckpointError(f"{config.out_dir}: --overwrite would remove {resumed.path}; leave it out to go on")
    elif earlier and not config.overwrite:
        raise CheckpointError(
            f"{config.out_dir}: holds the checkpoints of an earlier run; go on with --resume, keep them with "
            f"--out_dir=OTHER, or lose them with --overwrite"
        )


def with_defaults(saved: dict[str, Any]) -> type[TrainConfig]:
    """Return TrainConfig with a run's settings as defaults, so that only what is typed now changes them."""
    what_to_do = ("out_dir", "resume", "init_from", "overwrite", "eval_only")
    fields = [
        (field.name, field.type, dataclasses.field(default=saved[field.name], metadata=field.metadata))
        for field in dataclasses.fields(TrainConfig)
        if field.name in saved and field.name not in what_to_do
    ]
    return dataclasses.make_dataclass("TrainConfig", fields, bases=(TrainConfig,), frozen=True, kw_only=True)


def check_continuity(resumed: Checkpoint, config: TrainConfig, model_config: ModelConfig, data: Shards) -> None:
    """Refuse to go on with another shape, optimizer or vocabulary.

    Raises:
        ConfigError: listing what differs.
    """
    old, new = resumed.model_config.to_dict(), model_config.to_dict()
    problems = [f"{key}={new[key]}: the checkpoint has {old[key]}" for key in old if old[key] != new[key]]
    optimizer = resumed.state["train_config"]["optimizer"]
    if config.optimizer != optimizer:
        problems.append(f"optimizer={config.optimizer}: the checkpoint has {optimizer}'s state")
    if resumed.state["tokenizer_sha256"] != data.tokenizer_sha256:
        problems.append(f"{data.folder}: its vocabulary is not that of {resumed.state['data']}, which the run used")
    if problems:
        raise ConfigError.from_problems(problems)


def prepare_run_dir(run_dir: Path, config: TrainConfig, step: int) -> None:
    """Make out_dir ready to go on after `step`, with the settings in a config.toml that train.py reads back."""
    if config.overwrite:
        checkpoint.remove_all(run_dir)
    for path in checkpoint.go_back(run_dir, step):
        print(f"a later checkpoint is out of the way: {path}")
    settings = {
        key: value
        for key, value in dataclasses.asdict(config).items()
        if value is not None and key not in ("resume", "init_from", "overwrite")
    }
    with replacing(run_dir / "config.toml") as file:
        # Numbers, booleans and strings are written alike in JSON and TOML, but for this one character.
        lines = (f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in settings.items())
        file.write("".join(lines).replace("\x7f", "\\u007f").encode())


def describe(trainer: Trainer) -> None:
    """Print what is about to run."""
    config, group, model = trainer.config, trainer.group, trainer.model_config
    windows, batch = len(trainer.train_windows), trainer.tokens_per_step
    tokens = trainer.data.meta.splits["train"].tokens
    compiled = "compiled" if trainer.not_compiled is None else f"not compiled: {trainer.not_compiled}"
    lines = {
        "data": f"{trainer.data.folder}: {tokens:,} tokens, vocabulary {model.vocab_size}",
        "model": f"{model.n_params:,} parameters: dim {model.dim}, {model.n_layers} layers, {model.n_heads} heads "
        f"({model.n_kv_heads} kv), hidden {model.hidden_dim}, context {model.max_seq_len}",
        "step": f"{batch:,} tokens = {config.batch_size} x {config.max_seq_len} tokens x {trainer.accumulation} "
        f"micro-steps x {group.count} processes",
        "epoch": f"{windows * config.max_seq_len // batch:,} steps ({windows:,} sequences); "
        f"{config.max_iters:,} steps are {config.max_iters * batch / (windows * config.max_seq_len):.2f} epochs",
        "machine": f"{group.device}, {torch.get_num_threads()} threads, {str(trainer.dtype).removeprefix('torch.')}, "
        + compiled,
        "memory": f"about {activation_bytes(config, model, trainer.dtype) / 2**20:,.0f} MiB of activations and "
        f"{16 * model.n_params / 2**20:,.0f} MiB of weights, gradients and moments",
    }
    if config.warmup_iters > config.max_iters:
        lines["warm-up"] = (
            f"never done: it has {config.warmup_iters} steps, the run {config.max_iters}; give a lower --warmup_iters"
        )
    for name, text in lines.items():
        print(f"{name:8} {text}")
    if trainer.resumed_step is not None:
        print(f"{'resume':8} after step {trainer.resumed_step} of {config.max_iters}")
    sys.stdout.flush()


def activation_bytes(config: TrainConfig, model: ModelConfig, dtype: torch.dtype) -> float:
    """Estimate what the forward pass of a micro-step keeps for the backward pass.

    Per token and layer: the two norms' inputs in float32, and in `dtype` the norms' outputs, queries, keys, values, the
    mixed heads, and the three hidden vectors of the feed-forward; then the logits.
    """
    heads = model.n_heads * model.head_dim
    layer = 8 * model.dim + dtype.itemsize * (2 * model.dim + 2 * heads + 2 * model.kv_dim + 3 * model.hidden_dim)
    logits = model.vocab_size * (dtype.itemsize + 4)
    return config.batch_size * config.max_seq_len * (model.n_layers * layer + logits)


def progress_line(step: int, total: int, row: dict[str, Any]) -> str:
    """Return the line of output for a logged step."""
    parts = [f"step {step}/{total}", f"loss {row['loss']:.4f}", f"lr {row['lr']:.2e}", f"gnorm {row['gnorm']:.2f}"]
    if "tokens_per_s" in row:
        parts += [f"{row['tokens_per_s']:,.0f} tok/s", f"{row['tflops']:.3g} TFLOP/s"]
        parts += [f"MFU {row['mfu']:.1%}"] if row["mfu"] is not None else []
        minutes, seconds = divmod(round(row["eta_s"]), 60)
        parts += [f"ETA {minutes // 60}:{minutes % 60:02}:{seconds:02}"]
    return " | ".join(parts)


def finish(config: TrainConfig, data: Shards) -> None:
    """Draw the loss, export the best checkpoint and let it tell a story."""
    run_dir = Path(config.out_dir)
    picture = metrics.plot(run_dir, entropy=data.meta.entropy.nats_per_token if data.meta.entropy else None)
    if picture:
        print(f"loss curve: {picture}")
    best_path = checkpoint.find_best(run_dir)
    if best_path is None:
        raise CheckpointError(f"{run_dir}: no sound checkpoint to export")
    best, target = checkpoint.load(best_path), run_dir / "model.bin"
    write_bin(target, 1, best.model_config, best.model_state, best.tokenizer_path)
    print(f"best checkpoint: {best_path}, exported to {target}")
    if config.sample:
        from llamalet import Model  # the runtime and its compiler are needed here alone

        print()
        for text in Model.load(target).generate("", temperature=1.0, top_p=0.9, seed=config.seed):
            print(text, end="", flush=True)
        print("\n")
    print(f"run it with: python sample.py {target}")


if __name__ == "__main__":
    errors.run(main)
