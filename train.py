"""Train a Llama on prepared data, on one CPU, one GPU, or many of either.

  python train.py                                    stories15M on the newest data below data/, into out/
  python train.py configs/stories42M.toml --out_dir=out/42M --max_iters=5000
  torchrun --standalone --nproc_per_node=2 train.py  the same run on two processes
  python train.py --resume                           go on from the newest checkpoint in out/
  python train.py --source=tinyshakespeare           prepare that text first
  python train.py --source=my_novel.txt --init_from=stories15M.bin         train a model from elsewhere further
  python train.py --eval_only                        score the best checkpoint in out/ on the whole validation split

A run leaves its settings (config.toml), metrics.jsonl, loss.png, checkpoints/ and the exported model.bin in out_dir.
Ctrl-C and SIGTERM save what is done and end with exit code 75; --resume goes on from there to the last bit.
"""

import contextlib
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from configurator import parse
from llamalet import errors
from llamalet.errors import CheckpointError, ConfigError
from training.config import TrainConfig, with_defaults, with_shape
from training.run import interrupts
from training.run.interrupts import Interrupted, Interrupts

if TYPE_CHECKING:
    from training.machine.distributed import Processes
    from training.run.checkpoint import Checkpoint
    from training.trainer import Trainer


def main(argv: Sequence[str]) -> int:
    """Train as the command line says."""
    config = read_options(TrainConfig, argv)
    if config.eval_only:
        return evaluate(config, argv)
    if config.source is not None:
        argv = [*argv, f"--data={prepare(config)}"]
    is_main = os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"
    with Interrupts() as signals, contextlib.ExitStack() as stack:
        if is_main:
            print(f"{'run':8} {config.out_dir}", flush=True)
        # A signal now ends the run in order, so it is time for what takes seconds: torch.
        from training import init_from
        from training.machine.distributed import processes
        from training.machine.hardware import memory_errors
        from training.run import run_folder
        from training.trainer import Trainer

        stack.enter_context(memory_errors())
        group = stack.enter_context(processes())  # first, so that no process waits for one that cannot start
        if is_main:
            stack.enter_context(run_folder.lock(Path(config.out_dir)))
        config, resumed = resume(config, argv, group)
        start = None
        if resumed is None and config.init_from != "scratch":
            start = init_from.read(config.init_from)
            config = read_options(with_shape(start.config), argv)
        trainer = Trainer(config, group.on(config.device), resumed, start, signals)
        del resumed, start  # their tensors have been copied
        try:
            trainer.train()
            if is_main:
                with signals.at_once():  # what is left to do can be done again
                    finish(trainer)
        except Interrupted:
            group.print(
                f"interrupted at step {trainer.step} of {config.max_iters}, resume with: {resume_command(trainer)}"
            )
            return interrupts.EXIT_CODE
    return 0


def prepare(config: TrainConfig) -> Path:
    """Make token shards of the text that the run shall read, where there are none yet, and return their folder.

    Raises:
        ConfigError: if there is no text to prepare, or several processes that would.
        DataError: if there is no such source.
    """
    from corpus.prepare import PretokenizeConfig, prepare_shards

    if config.data is not None:
        raise ConfigError(f"source={config.source}: goes to a folder of its own; leave --data={config.data} out")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            f"source={config.source}: several processes cannot prepare it; first type "
            f"`python tinystories.py pretokenize {shlex.quote(str(config.source))}`"
        )
    vocab = None if config.init_from in ("scratch", "resume") else Path(config.init_from)
    return prepare_shards(PretokenizeConfig(source=config.source, vocab=vocab))


def evaluate(config: TrainConfig, argv: Sequence[str]) -> int:
    """Print what a checkpoint costs on the whole validation split."""
    from training.data import open_data
    from training.evaluation import evaluate_checkpoint
    from training.machine.distributed import processes
    from training.machine.hardware import memory_errors, set_threads, tune_allocator

    with memory_errors(), processes() as group:
        config, checkpoint = resume(config, argv, group)
        assert checkpoint is not None  # there is no evaluation without one
        group = group.on(config.device)
        set_threads(config.threads, group.local_count)
        tune_allocator(group.device)
        group.print(evaluate_checkpoint(checkpoint, open_data(config), group))
    return 0


def resume_command(trainer: "Trainer") -> str:
    """Return what to type to go on with the same steps on as many processes."""
    group = trainer.group
    several = (
        f"torchrun --standalone --nproc_per_node={group.count}" if group.local_count == group.count else "torchrun ..."
    )
    launcher = "python" if group.count == 1 else several
    return f"{launcher} train.py --resume --out_dir={shlex.quote(trainer.config.out_dir)}"


def read_options(config_class: type[TrainConfig], argv: Sequence[str]) -> TrainConfig:
    """Return what the command line says, over the defaults of `config_class`."""
    return parse(config_class, argv, program="train.py", description=__doc__ or "", toml=True)


def resume(config: TrainConfig, argv: Sequence[str], group: "Processes") -> tuple[TrainConfig, "Checkpoint | None"]:
    """Return the settings of the run and the checkpoint to go on from, None for a fresh start.

    A resumed run keeps its settings, but for those on the command line.

    Raises:
        CheckpointError: if there is no such checkpoint, or others are in the way, or processes find different ones.
    """
    from training.run import checkpoint, run_folder

    found = run_folder.find_checkpoint(config, group.launch)
    names = group.all(checkpoint.label(found) if found else "none")
    if len(set(names)) > 1:
        seen = ", ".join(f"process {rank} {name}" for rank, name in enumerate(names))
        raise CheckpointError(
            f"{config.out_dir}: the processes find different checkpoints to go on from ({seen}); "
            "out_dir must be one folder that all of them share"
        )
    if not config.eval_only:
        run_folder.check(config, found, group.launch)
    if found is None:
        return config, None
    resumed = checkpoint.load(found)
    # The data are named, for those prepared since would be newer.
    settings = resumed.state["train_config"] | {"data": resumed.state["data"]}
    return read_options(with_defaults(settings), argv), resumed


def finish(trainer: "Trainer") -> None:
    """Draw the loss, export the best checkpoint and let it tell a story."""
    from llamalet import model_file
    from training.run import checkpoint, plot
    from training.weights import write_bin

    run_dir = trainer.run_dir
    if picture := plot.draw_or_warn(run_dir):
        print(f"loss curve: {picture}")
    best_path = checkpoint.find_best(run_dir)
    if best_path is None:
        raise CheckpointError(f"{run_dir}: no sound checkpoint to export")
    best, target = checkpoint.load(best_path), run_dir / "model.bin"
    version = model_file.float_version(best.model_config)
    dtype = "f32" if version == 3 else None
    write_bin(target, version, best.model_config, best.model_state, best.tokenizer_path, dtype=dtype)
    print(f"best checkpoint: {best_path}, exported to {target}")
    if trainer.config.sample:
        from llamalet import Model  # the runtime and its compiler are needed here alone

        print()
        for text in Model.load(target).generate("", temperature=1.0, top_p=0.9, seed=trainer.config.seed):
            print(text, end="", flush=True)
        print("\n")
    print(f"run it with: python sample.py {target}")


if __name__ == "__main__":
    errors.run(main)
