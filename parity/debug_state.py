"""Compare two implementations of training, number by number: one writes what it computes, the other checks it.

    python -m parity.debug_state write model.bin state.safetensors                   with PyTorch
    python -m parity.debug_state check model.bin state.safetensors --backend=numba   and without

The file holds, in the safetensors format, which libraries for most languages read:

    tokens, targets          int64 (B, T): one batch
    layers.N.NAME            float32: activations of the forward pass; x and middle are the residual stream before
                             attention and feed-forward, mixed is what wo is given, hidden what w2 is given
    normed, logits           float32 (B, T, C) and (B, T, V)
    loss                     float32 (1,): the mean cross-entropy in nats
    gradients.WEIGHT         float32: the gradient of each weight, by its name in a checkpoint without ".weight"
    steps.loss               float32 (10,): the losses of ten steps on this batch
    steps.norms.WEIGHT       float32 (10,): the norm of each weight after each of them

and as metadata weights_sha256, the SHA-256 of all weights before the first step: of each float32 tensor in the order of
their names. The steps are AdamW's: rate 1e-3, betas 0.9 and 0.95, eps 1e-8, decay 0.1 for matrices, no clipping.
"""

if __name__ == "__main__":
    import _signal

    if hasattr(_signal, "pthread_sigmask"):  # until `begin` handles Ctrl-C, it has to wait
        _signal.pthread_sigmask(_signal.SIG_BLOCK, [_signal.SIGINT])
    from llamalet import startup

    startup.begin()  # before imports that take seconds

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from configurator import parse
from llamalet.checks import not_positive
from llamalet.command import run
from llamalet.config import IGNORED, ModelConfig
from llamalet.convert import formats, safetensors_file
from llamalet.errors import ConfigError, FormatError, LlamaletError
from llamalet.files import replacing

Array = NDArray[Any]
Arrays = dict[str, Array]

STEPS, RATE, BETAS, WEIGHT_DECAY = 10, 1e-3, (0.9, 0.95), 0.1
BOUNDS = {"gradients.": 1e-4, "steps.loss": 1e-5, "steps.norms.": 1e-5}
"""Largest difference over the largest number of a tensor, by the beginning of its name; 1e-5 for all others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DebugConfig:
    """Options of python -m parity.debug_state."""

    command: Literal["write", "check"] = "write"
    """write the file; or check it: compute everything again and compare."""
    model: str = ""
    """A model in any format."""
    state: str = ""
    """The file."""
    backend: Literal["torch", "numba"] = "torch"
    """What computes."""
    batch_size: int = 2
    """Sequences in the batch."""
    positions: int = 16
    """Tokens of each."""
    seed: int = 1337
    """Of the batch, which is random."""


class Different(LlamaletError):
    """What was computed is not what the file says."""

    exit_code = 4


class Implementation(Protocol):
    """One implementation of training."""

    def activations(self, tokens: Array, targets: Array) -> Arrays:
        """Return the forward pass of a batch, as the file names it, but for the loss."""

    def gradients(self, tokens: Array, targets: Array) -> tuple[float, Arrays]:
        """Return the loss of a batch and the gradient of each weight by name."""

    def step(self, tokens: Array, targets: Array) -> tuple[float, Arrays]:
        """Take a step; return the loss before it and the weights after it."""


class WithNumba:
    """llamalet/backward."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Array], shape: tuple[int, int]) -> None:
        from llamalet.backward.optimizer import NumbaOptimizer
        from llamalet.backward.training_model import TrainingModel
        from llamalet.cores import physical_cores

        self._model = TrainingModel(
            config, weights, batch_size=shape[0], n_positions=shape[1], n_threads=max(1, physical_cores())
        )
        self._optimizer = NumbaOptimizer(
            self._model.runner, self._model.weights, kind="adamw", betas=BETAS, weight_decay=WEIGHT_DECAY
        )

    def activations(self, tokens: Array, targets: Array) -> Arrays:
        """Return the forward pass of a batch."""
        return self._model.activations(tokens)

    def gradients(self, tokens: Array, targets: Array) -> tuple[float, Arrays]:
        """Return the loss of a batch and its gradients."""
        return self._model.loss_and_gradients(tokens, targets), self._model.gradients

    def step(self, tokens: Array, targets: Array) -> tuple[float, Arrays]:
        """Take a step."""
        loss, gradients = self.gradients(tokens, targets)
        self._optimizer.step(gradients, RATE)
        return loss, self._model.weights


class WithTorch:
    """model.py, in float32 on the CPU."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Array], shape: tuple[int, int]) -> None:
        import torch

        from training.optimizer import Optimizer
        from training.weights import load_model, to_state_dict

        self._model = load_model(config, to_state_dict(weights))
        self._optimizer = Optimizer(
            self._model, kind="adamw", rate=RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, dtype=torch.float32
        )

    def activations(self, tokens: Array, targets: Array) -> Arrays:
        """Return the forward pass of a batch, read where modules are given their inputs."""
        import torch

        from model import Block

        found: Arrays = {}
        handles = []

        def keep(module: Any, *, inputs: str = "", output: str = "") -> None:
            def read(module: Any, given: tuple[Any, ...], returned: Any) -> None:
                for name, value in ((inputs, given[0]), (output, returned)):
                    if name:
                        found[name] = value.numpy().copy()

            handles.append(module.register_forward_hook(read))

        for number, layer in enumerate(self._model.layers):
            assert isinstance(layer, Block)
            prefix = f"layers.{number}."
            keep(layer.attention_norm, inputs=prefix + "x", output=prefix + "attention_normed")
            keep(layer.attention.wo, inputs=prefix + "mixed")
            keep(layer.ffn_norm, inputs=prefix + "middle", output=prefix + "ffn_normed")
            keep(layer.feed_forward.w1, output=prefix + "gate")
            keep(layer.feed_forward.w3, output=prefix + "up")
            keep(layer.feed_forward.w2, inputs=prefix + "hidden")
        keep(self._model.norm, output="normed")
        with torch.no_grad():
            logits = self._model(torch.from_numpy(tokens))
        for handle in handles:
            handle.remove()
        return found | {"logits": logits.numpy()}

    def gradients(self, tokens: Array, targets: Array) -> tuple[float, Arrays]:
        """Return the loss of a batch and its gradients."""
        import torch

        self._model.zero_grad(set_to_none=True)
        loss = self._model(torch.from_numpy(tokens), torch.from_numpy(targets))
        loss.backward()
        gradients = {name: weight.grad for name, weight in self._model.named_parameters()}
        return float(loss.detach()), {
            name.removesuffix(".weight"): gradient.numpy().copy()
            for name, gradient in gradients.items()
            if gradient is not None
        }

    def step(self, tokens: Array, targets: Array) -> tuple[float, Arrays]:
        """Take a step."""
        from training.weights import to_arrays

        loss, _ = self.gradients(tokens, targets)
        self._optimizer.step(RATE)
        return loss, to_arrays(self._model.state_dict())


IMPLEMENTATIONS: dict[str, Callable[..., Implementation]] = {"numba": WithNumba, "torch": WithTorch}


def compute(implementation: Implementation, tokens: Array, targets: Array) -> Arrays:
    """Return all tensors of the file but the batch."""
    found = implementation.activations(tokens, targets)
    loss, gradients = implementation.gradients(tokens, targets)
    found |= {"loss": np.array([loss], np.float32)}
    found |= {f"gradients.{name}": gradient.copy() for name, gradient in gradients.items()}
    losses, norms = [], []
    for _ in range(STEPS):
        loss, weights = implementation.step(tokens, targets)
        losses.append(loss)
        norms.append({name: float(np.linalg.norm(weight.astype(np.float64))) for name, weight in weights.items()})
    found["steps.loss"] = np.array(losses, np.float32)
    return found | {f"steps.norms.{name}": np.array([row[name] for row in norms], np.float32) for name in norms[0]}


def compare(found: Mapping[str, Array], expected: Mapping[str, Array]) -> Iterator[tuple[str, float, bool]]:
    """Yield each tensor's name, its largest difference over its largest number, and whether this is small enough."""
    for name in sorted(found.keys() | expected.keys()):
        tensor = expected.get(name)
        if tensor is None or name not in found or found[name].shape != tensor.shape:
            yield name, np.inf, False
            continue
        largest = float(np.abs(tensor).max()) or 1.0
        difference = float(np.abs(found[name] - tensor).max()) / largest
        bound = next((bound for prefix, bound in BOUNDS.items() if name.startswith(prefix)), 1e-5)
        yield name, difference, difference <= bound


def check_batch(path: Path, tokens: Array, targets: Array, config: ModelConfig) -> None:
    """Raise a FormatError unless a file's batch is one for the model."""
    V = config.vocab_size
    if tokens.ndim != 2 or not tokens.size or tokens.shape != targets.shape or tokens.shape[1] > config.max_seq_len:
        what = f"tokens {tokens.shape} and targets {targets.shape}"
        raise FormatError(f"{path}: has {what}: must be two equal (B, T), T at most {config.max_seq_len}")
    if tokens.min() < 0 or targets.min() < IGNORED or max(tokens.max(), targets.max()) >= V:
        raise FormatError(f"{path}: has tokens that are not among the {V} of the model")


def digest(weights: Mapping[str, Array]) -> str:
    """Return weights_sha256."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(np.ascontiguousarray(weights[name], "<f4").tobytes())
    return found.hexdigest()


def write(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file of float32 and int64 tensors."""
    layout = {name: ("I64" if tensor.dtype == np.int64 else "F32", tensor.shape) for name, tensor in tensors.items()}
    with replacing(path) as file:
        file.writelines(safetensors_file.encode(layout, lambda name: [tensors[name]], metadata))


def main(argv: Sequence[str]) -> int:
    """Write the state of a model's training, or check one."""
    config = parse(
        DebugConfig, argv, program="python -m parity.debug_state", description=__doc__,
        positional=("command", "model", "state"),
    )  # fmt: skip
    ConfigError.raise_for(not_positive(config, "batch_size", "positions"))
    if not config.model or not config.state:
        raise ConfigError("name a model and a file: python -m parity.debug_state write MODEL STATE.safetensors")
    source, path = formats.read(formats.kind_of(Path(config.model)), config.model), Path(config.state)
    weights = {name: np.array(tensor[0 : tensor.shape[0]]) for name, tensor in source.tensors.items()}
    shape, expected, sha256 = (config.batch_size, config.positions), dict[str, Array](), digest(weights)
    if config.command == "check":
        expected = safetensors_file.read_arrays(path)
        if safetensors_file.read_metadata(path).get("weights_sha256") != sha256:
            raise FormatError(f"{path}: its weights_sha256 is not that of {config.model}: made from another model")
        tokens, targets = (expected.pop(name, np.zeros(0)).astype(np.int64) for name in ("tokens", "targets"))
        check_batch(path, tokens, targets, source.config)
        shape = tokens.shape
    else:
        if config.positions > source.config.max_seq_len:
            raise ConfigError(f"positions={config.positions}: the model's context is {source.config.max_seq_len}")
        tokens, targets = np.random.default_rng(config.seed).integers(0, source.config.vocab_size, (2, *shape))
    found = compute(IMPLEMENTATIONS[config.backend](source.config, weights, shape), tokens, targets)
    if config.command == "write":
        write(path, {"tokens": tokens, "targets": targets} | found, {"weights_sha256": sha256})
        print(f"{path}: {len(found)} tensors of {config.model}, computed with {config.backend}")
        return 0
    wrong = 0
    for name, difference, fits in compare(found, expected):
        wrong += not fits
        print(f"{'ok ' if fits else 'BAD'} {difference:8.1e}  {name}")
    if wrong:
        raise Different(f"{path}: {wrong} of {len(expected)} tensors are not what {config.backend} computes")
    print("overall okay")
    return 0


if __name__ == "__main__":
    run(main)
