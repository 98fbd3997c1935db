"""Train a Llama on prepared data, on a CPU, a GPU, or several of either.

  python train.py                                    stories15M on the newest data in data/, into out/
  python train.py configs/stories42M.toml --out_dir=out/42M --max_iters=5000
  torchrun --standalone --nproc_per_node=2 train.py  the same run on two processes
  python train.py --resume                           continue from the newest checkpoint in out/
  python train.py --source=tinyshakespeare           prepare that text first
  python train.py --source=my_novel.txt --init_from=stories15M.bin         train an existing model further
  python train.py --backend=numba                    without PyTorch, on one CPU
  python train.py --eval_only                        score the best checkpoint in out/ on the whole validation split

A run leaves its settings (config.toml), metrics.jsonl, loss.png, checkpoints/ and the exported model.bin in out_dir.
Ctrl-C and SIGTERM save the state and exit with code 75; --resume continues from there, bit for bit.
"""

if __name__ == "__main__":
    import _signal

    if hasattr(_signal, "pthread_sigmask"):  # until `begin` handles Ctrl-C, it has to wait
        _signal.pthread_sigmask(_signal.SIG_BLOCK, [_signal.SIGINT])
    from llamalet import startup

    startup.begin()  # before imports that take seconds

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from configurator import parse
from llamalet import Model, model_file, tokenizer
from llamalet.command import nothing_to_lose, run
from llamalet.config import ModelConfig
from llamalet.convert import bin_file, formats
from llamalet.errors import CheckpointError, ConfigError
from llamalet.kernels.environment import check_variables, import_numba
from llamalet.model_file.checkpoint import find_best
from training.backend import has_torch
from training.config import TrainConfig, with_defaults, with_shape
from training.data import open_data
from training.machine import compiler_cache
from training.run import checkpoint, plot, run_folder
from training.run.checkpoint import Checkpoint
from training.run.interrupts import EXIT_CODE, Interrupted, Interrupts
from training.samples import as_in_training

if TYPE_CHECKING:
    from training.backend import Arrays
    from training.machine.group import Group
    from training.trainer import MakeBackend, Trainer


def main(argv: Sequence[str]) -> int:
    """Train as the command line says."""
    config = read_options(TrainConfig, argv)
    if config.eval_only:
        return evaluate(config, argv)
    check_variables()  # for the stories, before the training that they end
    if config.source is not None:
        argv = [*argv, f"--data={prepare_source(config)}"]
        config = read_options(TrainConfig, argv)
    is_main = os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"
    with Interrupts() as signals:
        if is_main:
            print(f"{'run':8} {config.out_dir}", flush=True)
        return train(config, argv, signals)


def train(config: TrainConfig, argv: Sequence[str], signals: Interrupts) -> int:
    """Start or resume a run, train it to its end and export its best checkpoint; return the exit code."""
    # Imports that take long wait until here, where a signal no longer kills the process but ends the run.
    from training import init_from
    from training.trainer import Trainer

    with (
        processes(config, signals) as (group, make_backend),
        run_folder.lock(Path(config.out_dir)) if group.is_main else nullcontext(),
    ):
        config, resumed = resume(config, argv, group)
        start = None
        if resumed is None and config.init_from != "scratch":
            start = init_from.read(config.init_from)
            config = read_options(with_shape(start.config), argv)
        trainer = Trainer(config, group, make_backend, resumed, start, signals)
        del resumed, start  # the trainer has copied their tensors
        problem = bin_file.llama2c_problem(tokenizer.load(trainer.data.tokenizer_path))
        try:
            if problem is not None:
                group.print(f"{'export':8} without a tokenizer.bin, so not for llama2.c: {problem}")
            trainer.train()
            if group.is_main:
                with signals.at_once():  # whatever is interrupted here can be repeated
                    finish(trainer)
        except Interrupted:
            command = resume_command(config, group)
            group.print(f"interrupted at step {trainer.step} of {config.max_iters}, resume with: {command}")
            return EXIT_CODE
    return 0


@contextmanager
def processes(config: TrainConfig, signals: Interrupts) -> Iterator[tuple["Group", "MakeBackend"]]:
    """Join the processes of the run; yield them, and what makes the backend that the settings ask for.

    Raises:
        ConfigError: if the backend is not installed, or cannot do what the settings or torchrun ask for.
    """
    if choose_backend(config) == "numba":
        from training import step_numba
        from training.machine.group import OneProcess

        step_numba.check_settings(config)
        if config.backend == "auto":
            why = "as the run has it" if has_torch() else "because PyTorch is not installed"
            print(f"{'backend':8} numba, {why}", flush=True)
        yield OneProcess(), partial(step_numba.NumbaBackend, interrupts=signals)
        return
    compiler_cache.ensure_folder()
    from training.machine.distributed import process_group
    from training.machine.hardware import memory_errors
    from training.step_torch import TorchBackend

    # Before all that can fail, so that no process waits for one that failed.
    with memory_errors(), process_group() as group:

        def make(settled: TrainConfig, model_config: ModelConfig, weights: "Arrays | None") -> TorchBackend:
            return TorchBackend(settled, model_config, group.on(settled.device), weights, signals)

        yield group, make


def choose_backend(config: TrainConfig) -> str:
    """Return torch or numba; unless told otherwise, a run of one process goes on with the backend that it has.

    Raises:
        ConfigError: if it is not installed, or told not to compile.
    """
    chosen = config.backend
    if chosen == "torch" and not has_torch():
        raise ConfigError("backend=torch: PyTorch is not installed; install it, or leave the option out")
    if chosen == "auto":
        one = os.environ.get("WORLD_SIZE", "1") == "1" and not config.eval_only
        goes_on_with_numba = one and run_folder.earlier_backend(config) == "numba"
        chosen = "torch" if has_torch() and not goes_on_with_numba else "numba"
    if chosen == "numba" and not import_numba():
        raise ConfigError("backend=numba: NUMBA_DISABLE_JIT is set, so that numba compiles nothing; unset it")
    return chosen


def evaluate(config: TrainConfig, argv: Sequence[str]) -> int:
    """Print the loss of a checkpoint on the whole validation split."""
    with nothing_to_lose():
        from training.evaluation import LOGITS_BYTES, evaluate_checkpoint

    if choose_backend(config) == "numba":
        check_variables()
        with nothing_to_lose():
            from training import step_numba
            from training.machine.group import OneProcess

        step_numba.check_settings(config)
        config, evaluated = resume(config, argv, OneProcess())
        assert evaluated is not None  # find_checkpoint raises if there is none to evaluate
        new_scorer = partial(step_numba.new_scorer, threads=config.threads)
        print(evaluate_checkpoint(evaluated, open_data(config), OneProcess(), new_scorer, LOGITS_BYTES))
        return 0
    compiler_cache.ensure_folder()
    with nothing_to_lose():
        from training import step_torch
        from training.machine.distributed import process_group
        from training.machine.hardware import memory_errors, set_threads, tune_allocator

    with memory_errors(), process_group() as group:
        config, evaluated = resume(config, argv, group)
        assert evaluated is not None
        group = group.on(config.device)
        set_threads(config.threads, group.local_count)
        tune_allocator(group.device)
        new_scorer = partial(step_torch.new_scorer, device=group.device)
        logits_bytes = LOGITS_BYTES if group.device.type == "cpu" else 8 * LOGITS_BYTES
        group.print(evaluate_checkpoint(evaluated, open_data(config), group, new_scorer, logits_bytes))
    return 0


def prepare_source(config: TrainConfig) -> Path:
    """Make token shards of the text `config.source`, unless they exist; return their folder.

    Raises:
        ConfigError: if --data is given too, or there are several processes.
        DataError: if there is no such text.
    """
    with nothing_to_lose():
        from corpus.prepare import PretokenizeConfig, prepare_shards  # not needed by other runs, and slow to import

    if config.data is not None:
        raise ConfigError(f"source={config.source}: goes to a folder of its own; leave --data={config.data} out")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            f"source={config.source}: several processes cannot prepare it; first run "
            f"`python tinystories.py pretokenize {shlex.quote(str(config.source))}`"
        )
    check_settings(config)
    vocab = None if config.init_from in ("scratch", "resume") else Path(config.init_from)
    return prepare_shards(PretokenizeConfig(source=config.source, vocab=vocab))


def check_settings(config: TrainConfig) -> None:
    """Find what would stop the run before its text is prepared, which may take hours.

    Raises:
        ConfigError: if the settings do not fit together or this machine.
        CheckpointError: if out_dir holds another run, or nothing to resume from.
        DiskError: if out_dir cannot be written to.
    """
    from corpus.vocabulary import DEFAULT_SIZE

    if choose_backend(config) == "torch":
        from training.machine.distributed import find_device
        from training.machine.hardware import choose_dtype

        choose_dtype(config.dtype, find_device(config.device))
    else:
        from training import step_numba

        step_numba.check_settings(config)
    config.accumulation(1)
    if config.init_from == "scratch":  # else the shape is that of a model
        config.model_config(config.vocab_size or DEFAULT_SIZE)
    with run_folder.lock(Path(config.out_dir)):
        run_folder.check(config, run_folder.find_checkpoint(config))


def read_options(config_class: type[TrainConfig], argv: Sequence[str]) -> TrainConfig:
    """Return the settings of the command line, over the defaults of `config_class`."""
    return parse(config_class, argv, program="train.py", description=__doc__ or "", toml=True)


def resume(config: TrainConfig, argv: Sequence[str], group: "Group") -> tuple[TrainConfig, Checkpoint | None]:
    """Return the settings of the run and the checkpoint to resume from, None for a fresh start.

    A resumed run keeps its settings, except for those on the command line.

    Raises:
        CheckpointError: if there is no such checkpoint, or others are in the way, or processes find different ones.
    """
    found = run_folder.find_checkpoint(config, group.launch)
    names = group.all_gather(checkpoint.label(found) if found else "none")
    if len(set(names)) > 1:
        seen = ", ".join(f"process {rank} {name}" for rank, name in enumerate(names))
        raise CheckpointError(
            f"{config.out_dir}: the processes find different checkpoints to resume from ({seen}); "
            "out_dir must be one folder that all of them share"
        )
    if not config.eval_only:
        run_folder.check(config, found, group.launch)
    if found is None:
        return config, None
    resumed = checkpoint.load(found)
    # The data folder is set explicitly: data prepared since then would be newer.
    settings = resumed.state.train_config | {"data": resumed.state.data}
    return read_options(with_defaults(settings), argv), resumed


def resume_command(config: TrainConfig, group: "Group") -> str:
    """Return the command that continues the run on as many processes."""
    several = (
        f"torchrun --standalone --nproc_per_node={group.count}" if group.local_count == group.count else "torchrun ..."
    )
    launcher = "python" if group.count == 1 else several
    return f"{launcher} train.py --resume --out_dir={shlex.quote(config.out_dir)}"


def finish(trainer: "Trainer") -> None:
    """Draw the loss, export the best checkpoint and print a story from it."""
    run_dir = trainer.run_dir
    if picture := plot.draw_or_warn(run_dir):
        print(f"loss curve: {picture}")
    best_path = find_best(run_dir)
    if best_path is None:
        raise CheckpointError(f"{run_dir}: no valid checkpoint to export")
    source, target = formats.read("checkpoint", str(best_path)), run_dir / run_folder.EXPORT
    version = model_file.float_version(source.config)
    bin_file.write(target, source, version, dtype="f32" if version == 3 else None)
    print(f"best checkpoint: {best_path}, exported to {target}")
    if trainer.sample_printer is not None:
        print()
        loaded = Model.load(target, backend=trainer.sample_printer.backend)
        model = Model(target, loaded.transformer, as_in_training(loaded.tokenizer))
        for text in model.generate("", temperature=1.0, top_p=0.9, seed=trainer.config.seed):
            print(text, end="", flush=True)
        print("\n")
    print(f"run it with: python sample.py {shlex.quote(str(target))}")


if __name__ == "__main__":
    run(main)
