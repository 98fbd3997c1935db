"""The training loop: what every step does, and what happens between steps. setup.py has what comes before it.

The loop needs no torch. What computes is a backend.Backend: step_torch.py's or step_numba.py's.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from llamalet.config import IGNORED, ModelConfig
from llamalet.errors import NonFiniteError
from llamalet.model_file.checkpoint import FOLDER, SUFFIX
from training import resume_check
from training.backend import Arrays, Backend
from training.batches import Batch, Prefetcher
from training.config import TrainConfig
from training.init_from import StartingPoint
from training.machine.group import Group
from training.run import checkpoint, metrics, run_folder
from training.run.checkpoint import Checkpoint
from training.run.interrupts import Interrupted, Interrupts
from training.run.progress import Timer, evaluation_line, progress_line, run_summary, say, training_flops
from training.run.run_state import RunState
from training.samples import SamplePrinter
from training.setup import open_same_data, open_windows, settle

MakeBackend = Callable[[TrainConfig, ModelConfig, Arrays | None], Backend]
"""(settings, shape, weights or None for initial ones) -> what computes."""


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
        group: Group,
        make_backend: MakeBackend,
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

        weights = resumed.model_state if resumed else start.state if start else None
        self.backend = make_backend(config, model_config, weights)
        self.sample_printer: SamplePrinter | None = None
        if config.sample and group.is_main:
            self.sample_printer = SamplePrinter(
                model_config, self.data.tokenizer_path, config.seed, self.backend.threads
            )

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
                self.prepare()
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
            self.optimizer_step()
            if self.step in (first, config.max_iters) or self.step % config.log_interval == 0:
                row = self.progress(timer)
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
        weights, moments = self.backend.weights(), self.backend.state()
        if self.group.is_main:
            state = RunState(
                step=self.step,
                val_loss=self.val_loss,
                guard=self.backend.guard_state(),
                tokenizer_sha256=self.data.tokenizer_sha256,
                data=str(self.data.folder),
                train_config=dataclasses.asdict(self.config),
                machine=self.backend.facts,
                launch=self.group.launch,
                model_config=self.model_config,
                tokenizer=self.data.meta.tokenizer,
            )
            checkpoint.save(
                self.run_dir,
                state,
                model_state=weights,
                optimizer_state=moments,
                tokenizer_data=self.tokenizer_data,
                tokenizer_ids=self.tokenizer_ids,
                keep=self.config.keep,
            )
        self.group.barrier()
        self.saved, self.saved_at = (self.step, self.val_loss), time.monotonic()

    def load(self, resumed: Checkpoint) -> None:
        """Take everything but the weights, which the model has already, from a checkpoint."""
        state = resumed.state
        self.backend.load(resumed.optimizer_state, state.guard)
        self.step, self.val_loss = state.step, state.val_loss
        if resumed.path.resolve().parent == (self.run_dir / FOLDER).resolve():
            self.saved, self.continues = (self.step, self.val_loss), True

    def print_sample(self, record: metrics.Metrics | None) -> None:
        """Print the beginning of a story, in the main process; a signal ends it."""
        weights = self.backend.weights() if self.config.sample else {}
        if self.sample_printer and record:
            tensors = {name.removesuffix(SUFFIX): weight for name, weight in weights.items()}
            story = self.sample_printer.print(tensors, self.interrupts)
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
        config = self.config
        say(
            run_summary(
                config,
                self.model_config,
                self.data,
                n_windows=len(self.train_windows),
                n_processes=self.group.count,
                machine=self.backend.description,
            )
        )
        if self.started_from:
            say(f"{'start':8} with the weights of {self.started_from}")
        if self.resumed_from:
            path, state = self.resumed_from
            say(f"{'resume':8} after step {self.step} of {config.max_iters}, from {path}")
            if changes := resume_check.changes(state, config, self.backend.facts):
                say(f"{'':8} not to the last bit what an unstopped run gives: {'; '.join(changes)}")

    def optimizer_step(self) -> None:
        """Do one optimizer step. If the guard refuses it, the weights stay, but the step counts and its data are used.

        Raises:
            Interrupted: if a signal came to any process; the gradients so far are discarded.
            NonFiniteError: if the guard has refused too many steps in a row.
        """
        self.backend.step(self.micro_batches(), self.config.rate(self.step))
        self.step, self.val_loss = self.step + 1, None

    def micro_batches(self) -> Iterator[tuple[int, Batch]]:
        """Yield this process's micro-batches of the current step, each after its number in the run.

        Data and dropout depend on this number and the seed alone, so the number of processes makes no difference.
        """
        for micro_step in range(self.accumulation):
            self.stop_if_asked()
            index = (self.step * self.accumulation + micro_step) * self.group.count + self.group.rank
            yield index, self.batches.batch(index)

    def evaluate(self) -> float:
        """Return the validation loss in nats per token; each process scores its share of the batches.

        Raises:
            Interrupted: if a signal came to any process.
            NonFiniteError: if the loss is not a number.
        """
        counts: list[int] = []

        def batches() -> Iterator[Batch]:
            for batch in self.evaluation_batches():
                self.stop_if_asked()
                counts.append(int((batch[1] != IGNORED).sum()))
                yield batch

        means = self.backend.losses(batches())
        total, count = self.group.sum([sum(m * n for m, n in zip(means, counts, strict=True) if n), sum(counts)])
        if not math.isfinite(total):
            raise NonFiniteError(f"step {self.step}: the validation loss is {total}; this state is not saved")
        return total / count

    def evaluation_batches(self) -> Iterator[Batch]:
        """Yield this process's batches of an evaluation."""
        config, group = self.config, self.group
        return self.val_windows.evaluation_batches(config.batch_size, config.eval_iters, group.rank, group.count)

    def prepare(self) -> None:
        """Compile, so that it is not part of a step."""
        self.stop_if_asked()
        self.backend.prepare(self.training_batch(0), next(self.evaluation_batches()))
        self.stop_if_asked()  # in all processes, also if the signal came to only one

    def progress(self, timer: Timer) -> dict[str, Any]:
        """Return the figures for a progress line; on a GPU this waits for it.

        Raises:
            NonFiniteError: if the guard has refused too many steps in a row.
        """
        figures = self.backend.figures()
        seconds = timer.lap(self.step)
        tokens_per_s = self.tokens_per_step / seconds
        tflops = training_flops(self.model_config) * tokens_per_s / 1e12
        peak = self.config.peak_tflops or self.backend.peak_tflops
        return {
            "loss": figures.loss,
            "lr": self.config.rate(self.step - 1),
            "gnorm": figures.gradient_norm,
            "skipped": figures.skipped,
            "tokens_per_s": tokens_per_s,
            "tflops": tflops,
            "eta_s": seconds * (self.config.max_iters - self.step),
            "mfu": tflops / (peak * self.group.count) if peak else None,
        }
