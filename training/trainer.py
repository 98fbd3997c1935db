"""The training loop: what is set up once, what happens in every step, and what happens now and then."""

import dataclasses
import math
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from llamalet.config import IGNORED
from llamalet.errors import DataError, NonFiniteError
from model import Llama
from training import resume_check
from training.batches import Batch, Prefetcher, Windows
from training.config import TrainConfig
from training.data import fingerprint, open_data, read_tokenizer
from training.guard import Guard
from training.init_from import StartingPoint
from training.machine.cpu import use_cpu_kernels
from training.machine.distributed import Processes, parallelize, sum_gradients, whole_weights
from training.machine.hardware import (
    choose_dtype,
    compile_problem,
    peak_tflops,
    set_precision,
    set_threads,
    tune_allocator,
)
from training.optimizer import Optimizer, clip_gradients
from training.run import checkpoint, metrics, run_folder
from training.run.checkpoint import Checkpoint
from training.run.interrupts import Interrupted, Interrupts
from training.run.progress import Timer, evaluation_line, opening, progress_line, say, training_flops
from training.samples import Storyteller


class Trainer:
    """A run: its data, model and optimizer, and the loop over them.

    The processes of a run exchange something in every method that trains, evaluates, saves, compiles or tells, so all
    of them must call those, in the same order.

    Attributes:
        step: optimizer steps done so far, earlier stretches of a resumed run included.
        val_loss: validation loss of the state after `step`, once it is known.
        saved: step and val_loss of the newest checkpoint in the run's folder.
    """

    def __init__(
        self,
        config: TrainConfig,
        group: Processes,
        resumed: Checkpoint | None = None,
        start: StartingPoint | None = None,
        interrupts: Interrupts | None = None,
    ) -> None:
        self.config, self.group, self.interrupts = config, group, interrupts or Interrupts()
        self.run_dir = Path(config.out_dir)
        self.data = open_data(config, start)
        self.tokenizer_data = read_tokenizer(self.data)
        if len(set(group.all(fingerprint(self.data)))) > 1:
            raise DataError(f"{self.data.folder}: not the same prepared data in all processes; name them with --data")
        earlier = resumed.model_config if resumed else start.config if start else None
        scaling = earlier.rope_scaling if earlier else None  # no option of a run's own, but models come with it
        self.model_config = dataclasses.replace(config.model_config(self.data.vocab_size), rope_scaling=scaling)
        self.accumulation = config.accumulation(group.count)
        self.tokens_per_step = self.accumulation * group.count * config.batch_size * config.max_seq_len
        # What follows from the moment becomes a setting: a resumed run has the same steps and data.
        self.config = config = dataclasses.replace(
            config, total_batch_tokens=self.tokens_per_step, data=str(self.data.folder)
        )
        if resumed:
            resume_check.check(resumed, config, self.model_config, self.data)
        if start:
            start.check(self.model_config, self.data)
        self.train_windows, self.val_windows = self.open_windows("train"), self.open_windows("val")
        self.batches = Prefetcher(self.training_batch, stride=group.count)

        self.dtype = choose_dtype(config.dtype, group.device)
        set_threads(config.threads, group.local_count)
        set_precision(group.device, config.deterministic)
        tune_allocator(group.device)
        self.not_compiled = self.find_compiler()
        self.machine = resume_check.machine(config, group, self.dtype, compiled=self.not_compiled is None)
        torch.manual_seed(config.seed)
        self.model = Llama(self.model_config, config.dropout)
        if config.init == "copying":
            self.model.start_by_copying()
        self.model.to(group.device)
        if known := resumed.model_state if resumed else start.state if start else None:
            self.model.load_state_dict(known)
        if group.device.type == "cpu":
            use_cpu_kernels(self.model, compiled=self.not_compiled is None)
        # Checkpoints and evaluation use the model itself; only training goes through what sums gradients.
        self.parallel = parallelize(self.model, config.parallel, group, compiled=self.not_compiled is None)
        self.optimizer = Optimizer(
            self.model,
            kind=config.optimizer,
            rate=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
        )
        self.guard = Guard(group.device, spike_factor=config.spike_factor, max_skipped=config.max_skipped)
        self.step = 0
        self.val_loss: float | None = None
        self.saved: tuple[int, float | None] | None = None
        self.saved_at = time.monotonic()
        self.saved_here = False  # whether the run goes on from a checkpoint of its own folder, and so with its record
        self.resumed_from = (resumed.path, resumed.state) if resumed else None
        self.started_from = start.name if start else None
        self.storyteller = (
            Storyteller(self.model_config, self.data.tokenizer_path, config.seed, torch.get_num_threads())
            if config.sample and group.is_main
            else None
        )
        if resumed:
            self.load(resumed)

    def train(self) -> None:
        """Run the loop from the current step to the last.

        Raises:
            Interrupted: if a signal came; the last whole step is saved then.
            NonFiniteError: if the loss or the gradients stay NaN or infinite.
            DiskError: if a checkpoint or the record cannot be written.
        """
        self.group.wait()  # all have read their checkpoint; its folder may change now
        if self.group.is_main:
            run_folder.prepare(self.run_dir, self.config, self.step, goes_on=self.saved_here)
            self.describe()
        self.group.wait()
        try:
            self.save()  # there is something to go on from at any time, and a full disk shows now
            with self.record() as record:
                self.compile()
                self.loop(record)
        except Interrupted:
            self.save()
            raise
        finally:
            self.batches.close()

    def loop(self, record: metrics.Metrics | None) -> None:
        """Alternate between optimizer steps and what is done between them: evaluating, saving, telling."""
        config, first = self.config, self.step + 1
        timer = Timer(self.step)
        while True:
            at_end = self.step >= config.max_iters
            with timer.paused():
                if self.evaluation_is_due():
                    self.val_loss = self.evaluate()
                    self.group.print(evaluation_line(self.step, config.max_iters, self.val_loss, self.floor))
                    self.log(record, {"val_loss": self.val_loss, "entropy": self.floor})
                    self.save()  # after the rows of all that it holds: a run that goes on from here repeats none
                    if not at_end:  # then the exported model tells a whole story
                        self.tell(record)
                elif self.save_is_due():
                    self.save()
            if at_end:
                return
            loss, gradient_norm = self.optimizer_step()
            if self.step in (first, config.max_iters) or self.step % config.log_interval == 0:
                row = self.progress(loss, gradient_norm, timer)
                self.group.print(progress_line(self.step, config.max_iters, row))
                self.log(record, row)

    def optimizer_step(self) -> tuple[Tensor, Tensor]:
        """Do one optimizer step, unless the guard refuses it; the step counts and its data are used up either way.

        Returns:
            The mean loss and the gradient norm over all processes, still on the device.

        Raises:
            Interrupted: if a signal came to any process; what was accumulated is thrown away.
            NonFiniteError: if the guard has refused too many steps in a row.
        """
        config, group = self.config, self.group
        total = torch.zeros((), device=group.device)
        for micro_step in range(self.accumulation):
            self.stop_if_asked()
            # The place in the run decides the data and the dropout, and nothing else does: resuming needs no generator
            # state, and the number of processes makes no difference.
            place = (self.step * self.accumulation + micro_step) * group.count + group.rank
            if config.dropout:
                torch.manual_seed(config.seed + 0x9E3779B97F4A7C15 * (place + 1) % 2**63)
            sum_gradients(self.parallel, micro_step == self.accumulation - 1)
            loss = self.loss(self.parallel, self.batches.batch(place)) / self.accumulation
            loss.backward()
            total += loss.detach()
        loss = group.mean(total)
        gradient_norm = clip_gradients(self.model.parameters(), config.grad_clip)
        self.optimizer.step(config.rate(self.step), skip=self.guard.refuses(loss, gradient_norm))
        self.step, self.val_loss = self.step + 1, None
        if group.device.type == "cpu":  # elsewhere looking at it means waiting, which is done when a line is due
            self.guard.check()
        return loss, gradient_norm

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of a batch, computed in the chosen precision."""
        device = self.group.device
        tokens, targets = map(torch.from_numpy, batch)
        if device.type == "cuda":  # from pinned memory a copy goes on by itself; from any other the host would wait
            tokens, targets = tokens.pin_memory(), targets.pin_memory()
        tokens, targets = tokens.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        reduced = self.dtype != torch.float32
        with torch.autocast(device.type, dtype=self.dtype) if reduced else nullcontext():
            return model(tokens, targets)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the validation loss in nats per token; each process takes its share of the batches.

        Raises:
            Interrupted: if a signal came to any process.
            NonFiniteError: if the loss is not a number.
        """
        config, group = self.config, self.group
        self.model.eval()
        losses, counts = [], []
        for batch in self.val_windows.evaluation_batches(config.batch_size, config.eval_iters, group.rank, group.count):
            self.stop_if_asked()
            losses.append(self.loss(self.model, batch))
            counts.append(int((batch[1] != IGNORED).sum()))
        self.model.train()
        means = torch.stack(losses).tolist()  # the device is waited for only here
        total, count = group.sum([sum(m * n for m, n in zip(means, counts, strict=True) if n), sum(counts)])
        if not math.isfinite(total):
            raise NonFiniteError(f"step {self.step}: the validation loss is {total}; this state is not saved")
        return total / count

    def stop_if_asked(self) -> None:
        """Raise Interrupted, in all processes at the same place, if a signal came to any of them."""
        if self.group.any(self.interrupts.requested):
            raise Interrupted

    def evaluation_is_due(self) -> bool:
        """Return whether the current step ends an interval, or the run, and was not evaluated already."""
        at_interval = self.step % self.config.eval_interval == 0 or self.step >= self.config.max_iters
        return self.step > 0 and at_interval and self.val_loss is None

    def save_is_due(self) -> bool:
        """Return whether the interval between checkpoints is over; of a time, the main process's clock decides."""
        steps, seconds = self.config.save_steps, self.config.save_seconds
        if seconds is not None:
            return self.group.any(self.group.is_main and time.monotonic() - self.saved_at > seconds)
        return steps is not None and self.step % steps == 0

    def save(self) -> None:
        """Write a checkpoint, unless this very state is saved already.

        Raises:
            DiskError: if it cannot be written; older checkpoints are untouched.
            NonFiniteError: if a weight is not finite.
        """
        if self.saved == (self.step, self.val_loss):
            return
        weights, moments = whole_weights(self.model), self.optimizer.state_dict()
        if self.group.is_main:
            checkpoint.save(
                self.run_dir,
                model_config=self.model_config,
                model_state=weights,
                optimizer_state=moments,
                state={
                    "step": self.step,
                    "val_loss": self.val_loss,
                    "guard": self.guard.state(),
                    "tokenizer_sha256": self.data.tokenizer_sha256,
                    "data": str(self.data.folder),
                    "train_config": dataclasses.asdict(self.config),
                    "machine": self.machine,
                    "launch": self.group.launch,
                },
                tokenizer_name=self.data.meta.tokenizer,
                tokenizer_data=self.tokenizer_data,
                keep=self.config.keep,
            )
        self.group.wait()
        self.saved, self.saved_at = (self.step, self.val_loss), time.monotonic()

    def compile(self) -> None:
        """Run each kind of pass once and forget what it computed, so that compiling is no part of a step."""
        self.stop_if_asked()
        if self.not_compiled is not None:
            return
        config, start = self.config, time.perf_counter()
        self.group.print(f"{'compile':8} takes up to a minute the first time")
        sharded = isinstance(self.model, FSDPModule)
        # A compiler can be at it for long, and what there is to lose is saved. With shards the others wait for this
        # process in the middle of a pass; they notice that it leaves, and cannot be asked first.
        with nullcontext() if sharded else suppress(Interrupted), self.interrupts.at_once():
            sum_gradients(self.parallel, sharded)  # FSDP would keep what it did not sum
            self.loss(self.parallel, self.training_batch(0)).backward()
            self.model.zero_grad(set_to_none=True)
            self.model.eval()
            with torch.no_grad():
                self.loss(self.model, next(self.val_windows.evaluation_batches(config.batch_size, 1)))
            self.model.train()
        self.stop_if_asked()  # all together, also where the signal came to one process alone
        self.group.print(f"{'compile':8} took {time.perf_counter() - start:.1f} s")

    def tell(self, record: metrics.Metrics | None) -> None:
        """Let the model tell the beginning of a story, in the main process; a signal ends it."""
        weights = whole_weights(self.model) if self.config.sample else {}
        if self.storyteller and record:
            story = self.storyteller.tell(weights, self.interrupts)
            if story:
                record.log_story(self.step, story)

    def progress(self, loss: Tensor, gradient_norm: Tensor, timer: Timer) -> dict[str, Any]:
        """Return the figures of the last steps; this waits for the device.

        Raises:
            NonFiniteError: if the guard has refused too many steps in a row.
        """
        row: dict[str, Any] = {
            "loss": loss.item(),
            "lr": self.config.rate(self.step - 1),
            "gnorm": gradient_norm.item(),
        }
        row["skipped"] = self.guard.check()
        seconds = timer.lap(self.step)
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
        resumed_at = (self.step, self.val_loss is not None) if self.saved_here else None
        return metrics.Metrics(self.run_dir, resumed_at=resumed_at, wandb=wandb if config.wandb_log else None)

    def log(self, record: metrics.Metrics | None, row: dict[str, Any]) -> None:
        """Put figures of the current step on record."""
        if record:
            record.log({"step": self.step, "tokens": self.step * self.tokens_per_step} | row)

    def find_compiler(self) -> str | None:
        """Return why torch.compile is not used, or None if it is: by all processes, or by none."""
        if not self.config.compile:
            return "switched off"
        problem: str | None = "interrupted"
        with suppress(Interrupted), self.interrupts.at_once():  # a compiler's first use takes long, even for little
            problem = compile_problem(self.group.device)
        others = self.group.any(problem is not None)
        return problem or ("another process has no compiler that works" if others else None)

    def open_windows(self, split: str) -> Windows:
        """Cut a split into sequences."""
        starts = self.data.document_starts(split) if self.config.align_documents else None
        return Windows(self.data.split(split), self.config.max_seq_len, starts)

    def training_batch(self, place: int) -> Batch:
        """Return the batch of micro-step `place`, counted over all processes from the start of the run."""
        size = self.config.batch_size
        return self.train_windows.training_batch(self.config.seed, place * size, size)

    def load(self, resumed: Checkpoint) -> None:
        """Go on from a checkpoint, whose weights the model has already."""
        self.optimizer.load_state_dict(resumed.optimizer_state)
        if "guard" in resumed.state:
            self.guard.load_state(resumed.state["guard"])
        self.step, self.val_loss = resumed.state["step"], resumed.state["val_loss"]
        if resumed.path.resolve().parent == (self.run_dir / checkpoint.FOLDER).resolve():
            self.saved, self.saved_here = (self.step, self.val_loss), True

    @property
    def floor(self) -> float | None:
        """The corpus entropy in nats per token, which no model can get below, where it is known."""
        return self.data.meta.entropy.nats_per_token if self.data.meta.entropy else None

    def describe(self) -> None:
        """Print what is about to run."""
        config, threads = self.config, torch.get_num_threads()
        compiled = "compiled" if self.not_compiled is None else f"not compiled: {self.not_compiled}"
        dtype = str(self.dtype).removeprefix("torch.")
        say(
            opening(
                config,
                self.model_config,
                self.data,
                n_windows=len(self.train_windows),
                n_processes=self.group.count,
                machine=f"{self.group.device}, {threads} thread{'s' * (threads > 1)}, {dtype}, {compiled}",
                dtype=self.dtype,
            )
        )
        if self.started_from:
            say(f"{'start':8} with the weights of {self.started_from}")
        if self.resumed_from:
            path, state = self.resumed_from
            say(f"{'resume':8} after step {self.step} of {config.max_iters}, from {path}")
            if changes := resume_check.changes(state, config, self.machine):
                say(f"{'':8} not to the last bit what an unstopped run gives: {'; '.join(changes)}")
