"""The training loop: what every step does, and what happens between steps. setup.py has what comes before it.

The loop comes first and only calls what computes; the methods that compute with PyTorch come after it.
"""

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
from llamalet.errors import NonFiniteError
from llamalet.model_file.checkpoint import FOLDER
from training import resume_check
from training.batches import Batch, Prefetcher
from training.config import TrainConfig
from training.guard import Guard
from training.init_from import StartingPoint
from training.machine import hardware
from training.machine.distributed import Processes, gather_weights, parallelize, sum_gradients
from training.optimizer import Optimizer, clip_gradients
from training.run import checkpoint, metrics, run_folder
from training.run.checkpoint import Checkpoint
from training.run.interrupts import Interrupted, Interrupts
from training.run.progress import Timer, evaluation_line, progress_line, run_summary, say, training_flops
from training.run.run_state import RunState
from training.samples import SamplePrinter
from training.setup import build_model, open_same_data, open_windows, set_up_machine, settle
from training.weights import to_arrays, to_numpy, to_torch


class Trainer:
    """A run: its data, model and optimizer, and the loop over them.

    The processes of a run communicate in every method that trains, evaluates, saves, compiles or samples, so all of
    them must call these methods, in the same order.

    Attributes:
        config: the settings, with the data folder and the tokens of a step filled in.
        step: optimizer steps done so far, including those before the run was resumed.
        val_loss: validation loss after `step`, once it is known.
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
        self.group, self.interrupts, self.run_dir = group, interrupts or Interrupts(), Path(config.out_dir)

        self.data, (self.tokenizer_data, self.tokenizer_ids) = open_same_data(config, group, start)
        self.config, self.model_config = config, model_config = settle(config, group, self.data, resumed, start)
        self.accumulation = config.accumulation(group.count)
        self.tokens_per_step = self.accumulation * group.count * config.batch_size * config.max_seq_len
        self.train_windows, self.val_windows = (open_windows(self.data, name, config) for name in ("train", "val"))
        self.batches = Prefetcher(self.training_batch, stride=group.count)

        self.machine = machine = set_up_machine(config, group, self.interrupts)
        weights = to_torch(resumed.model_state) if resumed else start.state if start else None
        self.model = build_model(config, model_config, weights, group.device, compiled=machine.compiled)
        # `model` is for checkpoints and evaluation; training calls `parallel`, which also sums the gradients.
        self.parallel = parallelize(self.model, config.parallel, group, compiled=machine.compiled)
        self.optimizer = Optimizer(
            self.model,
            kind=config.optimizer,
            rate=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
        )
        self.guard = Guard(group.device, spike_factor=config.spike_factor, max_skipped=config.max_skipped)
        self.sample_printer: SamplePrinter | None = None
        if config.sample and group.is_main:
            threads = torch.get_num_threads()
            self.sample_printer = SamplePrinter(model_config, self.data.tokenizer_path, config.seed, threads)

        self.step = 0
        self.val_loss: float | None = None
        self.saved: tuple[int, float | None] | None = None
        self.saved_at = time.monotonic()
        self.continues = False  # whether the checkpoint resumed from is in the run's own folder, and so is its record
        self.resumed_from = (resumed.path, resumed.state) if resumed else None
        self.started_from = start.name if start else None
        if resumed:
            self.load(resumed)

    def train(self) -> None:
        """Run the loop from the current step to the last.

        Raises:
            Interrupted: if a signal came; the last complete step has been saved then.
            NonFiniteError: if the loss or the gradients stay NaN or infinite.
            DiskError: if a checkpoint or config.toml cannot be written.
        """
        self.group.barrier()  # every process has read its checkpoint: the folder may change now
        if self.group.is_main:
            run_folder.set_up(self.run_dir, self.config, self.step, continues=self.continues)
            self.print_summary()
        self.group.barrier()
        try:
            self.save()  # so that there is always a checkpoint to resume from, and a full disk shows at once
            with self.open_record() as record:
                self.compile()
                self.loop(record)
        except Interrupted:
            self.save()
            raise
        finally:
            self.batches.close()

    def loop(self, record: metrics.Metrics | None) -> None:
        """Alternate between optimizer steps and what happens between them: evaluating, saving, sampling."""
        config, first = self.config, self.step + 1
        timer = Timer(self.step)
        while True:
            at_end = self.step >= config.max_iters
            with timer.paused():
                if self.evaluation_is_due():
                    self.val_loss = self.evaluate()
                    self.group.print(evaluation_line(self.step, config.max_iters, self.val_loss, self.floor))
                    self.log(record, {"val_loss": self.val_loss, "entropy": self.floor})
                    self.save()  # after the rows that belong to it, so that a run resumed from it repeats none of them
                    if not at_end:  # at the end, the exported model writes a whole story
                        self.print_sample(record)
                elif self.save_is_due():
                    self.save()
            if at_end:
                return
            loss, gradient_norm = self.optimizer_step()
            if self.step in (first, config.max_iters) or self.step % config.log_interval == 0:
                row = self.progress(loss, gradient_norm, timer)
                self.group.print(progress_line(self.step, config.max_iters, row))
                self.log(record, row)

    def stop_if_asked(self) -> None:
        """Raise Interrupted, in all processes at the same point, if a signal came to any of them."""
        if self.group.any(self.interrupts.requested):
            raise Interrupted

    def evaluation_is_due(self) -> bool:
        """Return whether the current step ends an interval, or the run, and has not been evaluated."""
        at_interval = self.step % self.config.eval_interval == 0 or self.step >= self.config.max_iters
        return self.step > 0 and at_interval and self.val_loss is None

    def save_is_due(self) -> bool:
        """Return whether the interval between checkpoints is over; for a time, the main process's clock decides."""
        steps, seconds = self.config.save_steps, self.config.save_seconds
        if seconds is not None:
            return self.group.any(self.group.is_main and time.monotonic() - self.saved_at > seconds)
        return steps is not None and self.step % steps == 0

    def save(self) -> None:
        """Write a checkpoint, unless this state is already saved.

        Raises:
            DiskError: if it cannot be written; older checkpoints are untouched.
            NonFiniteError: if a weight is not finite.
        """
        if self.saved == (self.step, self.val_loss):
            return
        weights, moments = gather_weights(self.model), self.optimizer.state_dict()
        if self.group.is_main:
            state = RunState(
                step=self.step,
                val_loss=self.val_loss,
                guard=self.guard.state(),
                tokenizer_sha256=self.data.tokenizer_sha256,
                data=str(self.data.folder),
                train_config=dataclasses.asdict(self.config),
                machine=self.machine.facts,
                launch=self.group.launch,
                model_config=self.model_config,
                tokenizer=self.data.meta.tokenizer,
            )
            checkpoint.save(
                self.run_dir,
                state,
                model_state=to_numpy(weights),
                optimizer_state=to_numpy(moments),
                tokenizer_data=self.tokenizer_data,
                tokenizer_ids=self.tokenizer_ids,
                keep=self.config.keep,
            )
        self.group.barrier()
        self.saved, self.saved_at = (self.step, self.val_loss), time.monotonic()

    def load(self, resumed: Checkpoint) -> None:
        """Take everything but the weights, which the model has already, from a checkpoint."""
        state = resumed.state
        self.optimizer.load_state_dict(to_torch(resumed.optimizer_state))
        if state.guard is not None:
            self.guard.load_state(state.guard)
        self.step, self.val_loss = state.step, state.val_loss
        if resumed.path.resolve().parent == (self.run_dir / FOLDER).resolve():
            self.saved, self.continues = (self.step, self.val_loss), True

    def print_sample(self, record: metrics.Metrics | None) -> None:
        """Print the beginning of a story, in the main process; a signal ends it."""
        weights = gather_weights(self.model) if self.config.sample else {}
        if self.sample_printer and record:
            story = self.sample_printer.print(to_arrays(weights), self.interrupts)
            if story:
                record.log_story(self.step, story)

    def open_record(self) -> AbstractContextManager[metrics.Metrics | None]:
        """Open metrics.jsonl and wandb, in the main process only."""
        if not self.group.is_main:
            return nullcontext()
        config = self.config
        wandb = {"project": config.wandb_project, "name": config.wandb_run_name, "config": dataclasses.asdict(config)}
        resumed_at = (self.step, self.val_loss is not None) if self.continues else None
        return metrics.Metrics(self.run_dir, resumed_at=resumed_at, wandb=wandb if config.wandb_log else None)

    def log(self, record: metrics.Metrics | None, row: dict[str, Any]) -> None:
        """Record figures of the current step."""
        if record:
            record.log({"step": self.step, "tokens": self.step * self.tokens_per_step} | row)

    def training_batch(self, index: int) -> Batch:
        """Return micro-batch `index`, counted over all processes from the start of the run."""
        size = self.config.batch_size
        return self.train_windows.training_batch(self.config.seed, index * size, size)

    @property
    def floor(self) -> float | None:
        """The corpus entropy in nats per token, below which no model can get; None if it is unknown."""
        return self.data.meta.entropy.nats_per_token if self.data.meta.entropy else None

    def print_summary(self) -> None:
        """Print what is about to run."""
        config, threads = self.config, torch.get_num_threads()
        compiled = "compiled" if self.machine.not_compiled is None else f"not compiled: {self.machine.not_compiled}"
        dtype = str(self.machine.dtype).removeprefix("torch.")
        say(
            run_summary(
                config,
                self.model_config,
                self.data,
                n_windows=len(self.train_windows),
                n_processes=self.group.count,
                machine=f"{self.group.device}, {threads} thread{'s' * (threads > 1)}, {dtype}, {compiled}",
                itemsize=self.machine.dtype.itemsize,
            )
        )
        if self.started_from:
            say(f"{'start':8} with the weights of {self.started_from}")
        if self.resumed_from:
            path, state = self.resumed_from
            say(f"{'resume':8} after step {self.step} of {config.max_iters}, from {path}")
            if changes := resume_check.changes(state, config, self.machine.facts):
                say(f"{'':8} not to the last bit what an unstopped run gives: {'; '.join(changes)}")

    # ---- what computes, with PyTorch ----

    def optimizer_step(self) -> tuple[Tensor, Tensor]:
        """Do one optimizer step. If the guard refuses it, the weights stay, but the step counts and its data are used.

        Returns:
            The mean loss and the gradient norm over all processes, still on the device.

        Raises:
            Interrupted: if a signal came to any process; the gradients so far are discarded.
            NonFiniteError: if the guard has refused too many steps in a row.
        """
        config, group = self.config, self.group
        total = torch.zeros((), device=group.device)
        for micro_step in range(self.accumulation):
            self.stop_if_asked()
            # Data and dropout depend on this index and the seed alone: there is no RNG state to save, and the number of
            # processes makes no difference.
            index = (self.step * self.accumulation + micro_step) * group.count + group.rank
            if config.dropout:
                torch.manual_seed(config.seed + 0x9E3779B97F4A7C15 * (index + 1) % 2**63)
            sum_gradients(self.parallel, micro_step == self.accumulation - 1)
            loss = self.loss(self.parallel, self.batches.batch(index)) / self.accumulation
            loss.backward()
            total += loss.detach()
        loss = group.mean(total)
        gradient_norm = clip_gradients(self.model.parameters(), config.grad_clip)
        self.optimizer.step(config.rate(self.step), skip=self.guard.refuses(loss, gradient_norm))
        self.step, self.val_loss = self.step + 1, None
        if group.device.type == "cpu":
            self.guard.check()  # on a GPU this waits for the device, so it is done only for a progress line
        return loss, gradient_norm

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of a batch, computed in the chosen precision."""
        device = self.group.device
        tokens, targets = map(torch.from_numpy, batch)
        if device.type == "cuda":  # copies from pinned memory are asynchronous
            tokens, targets = tokens.pin_memory(), targets.pin_memory()
        tokens, targets = tokens.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        reduced = self.machine.dtype != torch.float32
        with torch.autocast(device.type, dtype=self.machine.dtype) if reduced else nullcontext():
            return model(tokens, targets)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the validation loss in nats per token; each process scores its share of the batches.

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
        means = torch.stack(losses).tolist()  # the only place that waits for the device
        total, count = group.sum([sum(m * n for m, n in zip(means, counts, strict=True) if n), sum(counts)])
        if not math.isfinite(total):
            raise NonFiniteError(f"step {self.step}: the validation loss is {total}; this state is not saved")
        return total / count

    def compile(self) -> None:
        """Run each kind of pass once and discard the results, so that compiling is not part of a step."""
        self.stop_if_asked()
        if self.machine.not_compiled is not None:
            return
        config, start = self.config, time.perf_counter()
        self.group.print(f"{'compile':8} takes up to a minute the first time")
        sharded = isinstance(self.model, FSDPModule)
        # Compiling can take long, and everything is saved, so a signal interrupts it at once. With sharded weights the
        # other processes wait for this one in the middle of a pass: they cannot be asked first, but notice its exit.
        with nullcontext() if sharded else suppress(Interrupted), self.interrupts.at_once():
            sum_gradients(self.parallel, sharded)  # FSDP would keep gradients that it did not sum
            self.loss(self.parallel, self.training_batch(0)).backward()
            self.model.zero_grad(set_to_none=True)
            self.model.eval()
            with torch.no_grad():
                self.loss(self.model, next(self.val_windows.evaluation_batches(config.batch_size, 1)))
            self.model.train()
        self.stop_if_asked()  # in all processes, also if the signal came to only one
        self.group.print(f"{'compile':8} took {time.perf_counter() - start:.1f} s")

    def progress(self, loss: Tensor, gradient_norm: Tensor, timer: Timer) -> dict[str, Any]:
        """Return the figures for a progress line; this waits for the device.

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
        peak = self.config.peak_tflops or hardware.peak_tflops(self.group.device, self.machine.dtype)
        row["mfu"] = tflops / (peak * self.group.count) if peak else None
        return row
