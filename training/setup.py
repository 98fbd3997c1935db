"""What a run needs before its first step: data, settings, the machine and the model. Trainer.__init__ calls it."""

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llamalet.config import ModelConfig
from llamalet.errors import CheckpointError, DataError
from llamalet.shards import Shards
from model import Llama
from training import resume_check
from training.batches import Windows
from training.config import TrainConfig
from training.data import fingerprint, open_data, read_tokenizer
from training.init_from import StartingPoint
from training.machine import hardware
from training.machine.cpu import use_cpu_kernels
from training.machine.distributed import Processes
from training.run.checkpoint import Checkpoint
from training.run.interrupts import Interrupted, Interrupts


def open_same_data(
    config: TrainConfig, group: Processes, start: StartingPoint | None
) -> tuple[Shards, tuple[bytes, bytes | None]]:
    """Open the prepared data; return them and the files of their tokenizer (`read_tokenizer`).

    Raises:
        DataError: if there are none, their tokenizer is not the one they were made with, or the processes find
            different data.
        ConfigError: if the vocabulary is not the one asked for.
    """
    data = open_data(config, start.tokenizer_sha256 if start else None, start.tokenizer_path if start else None)
    files = read_tokenizer(data)
    if len(set(group.all_gather(fingerprint(data)))) > 1:
        raise DataError(f"{data.folder}: the processes found different data; name the folder with --data")
    return data, files


def settle(
    config: TrainConfig, group: Processes, data: Shards, resumed: Checkpoint | None, start: StartingPoint | None
) -> tuple[TrainConfig, ModelConfig]:
    """Return the settings, with the data folder and the tokens of a step filled in, and the shape of the model.

    What is filled in is saved in checkpoints, so a resumed run has the same data and steps.

    Raises:
        ConfigError: if a setting does not fit the data, the processes, or the model to start from.
    """
    earlier = resumed.model_config if resumed else start.config if start else None
    # A model may have more rows than its tokenizer has tokens; whether it is this tokenizer is checked below.
    vocab_size = max(data.vocab_size, earlier.vocab_size if earlier else 0)
    model_config = config.model_config(vocab_size, earlier.rope_scaling if earlier else None)
    tokens_per_step = config.accumulation(group.count) * group.count * config.batch_size * config.max_seq_len
    config = dataclasses.replace(config, total_batch_tokens=tokens_per_step, data=str(data.folder))
    if resumed:
        resume_check.check(resumed, config, model_config, data)
    if start:
        start.check(model_config, data)
    return config, model_config


def open_windows(data: Shards, split: str, config: TrainConfig) -> Windows:
    """Cut a split into sequences."""
    starts = data.document_starts(split) if config.align_documents else None
    return Windows(data.split(split), config.max_seq_len, starts)


@dataclass(frozen=True, slots=True)
class Machine:
    """How this process computes."""

    dtype: torch.dtype
    """Type of the matrix products."""
    not_compiled: str | None
    """Why torch.compile is not used; None if it is."""
    facts: dict[str, Any]
    """`hardware.machine_facts`."""

    @property
    def compiled(self) -> bool:
        """Whether torch.compile is used."""
        return self.not_compiled is None


def set_up_machine(config: TrainConfig, group: Processes, interrupts: Interrupts) -> Machine:
    """Set PyTorch's threads, precision and memory, and find out whether there is a compiler.

    Raises:
        ConfigError: if the device cannot compute in the type asked for.
    """
    dtype = hardware.choose_dtype(config.dtype, group.device)
    hardware.set_threads(config.threads, group.local_count)
    hardware.set_precision(group.device, config.deterministic)
    hardware.tune_allocator(group.device)
    not_compiled = find_compiler(config, group, interrupts)
    return Machine(dtype, not_compiled, hardware.machine_facts(config, group, dtype, compiled=not_compiled is None))


def find_compiler(config: TrainConfig, group: Processes, interrupts: Interrupts) -> str | None:
    """Return why torch.compile is not used, or None if it is; the answer is the same in all processes."""
    if not config.compile:
        return "switched off"
    problem: str | None = "interrupted"
    with suppress(Interrupted), interrupts.at_once():  # the first use of a compiler takes long, even for little
        problem = hardware.compile_problem(group.device)
    others = group.any(problem is not None)
    return problem or ("another process has no compiler that works" if others else None)


def build_model(
    config: TrainConfig,
    model_config: ModelConfig,
    weights: Mapping[str, Tensor] | None,
    device: torch.device,
    *,
    compiled: bool,
) -> Llama:
    """Return the model on `device`, with the kernels for it.

    Args:
        config: the settings; `seed` and `init` decide the initial weights.
        model_config: the shape.
        weights: a state dict to use instead of initial weights.
        device: where to compute.
        compiled: whether torch.compile works here.
    """
    torch.manual_seed(config.seed)
    model = Llama(model_config, config.dropout)
    if config.init == "copying":
        model.start_by_copying()
    model.to(device)
    if weights:
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(f"the weights are not those of the shape: {error}") from None
    if device.type == "cpu":
        use_cpu_kernels(model, compiled=compiled)
    return model
