"""The proof of an export: PyTorch, or plain numpy without it, and the runtime compute the same from one file.

Four comparisons: the file's weights with the checkpoint's, the logits of both programs, their most likely texts, and
their bits per byte on validation data. For a large model PyTorch holds one layer at a time, the texts are shorter, and
validation data is left out.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamalet import model_file, reference, shards, tokenizer
from llamalet.config import ModelConfig
from llamalet.convert.bin_file import tensors_of
from llamalet.forward_pass import ForwardPass, LogitsOf, Tokens
from llamalet.model_file.quantize import Packed, Quantized, to_bfloat16, unpack
from llamalet.model_file.tensors import Rows, row_blocks
from llamalet.runtime import open_backend
from llamalet.scoring import NOTHING, evaluate_windows
from training.backend import has_torch

LOGIT_TOKENS = 256
GREEDY_TOKENS = 128
LARGE_PARAMS = 250_000_000  # a gigabyte in float32
LARGE_TOKENS = 32
EVALUATION_TOKENS = 20_000

# How far the two programs may differ on the file's weights. f32 and bf16 differ by the order of rounding; the bound is
# far above the largest difference seen (1e-5 of the largest logit) and far below the effect of a wrong table or a
# swapped tensor. With q8 and q4 the runtime rounds the activations too.
LOGIT_BOUND = {"f32": 1e-4, "bf16": 1e-4, "q8": 0.1, "q4": 0.1}  # of the largest logit
# How much worse the file may be than the checkpoint. 4 bits cost the smallest models most: 8 % at 0.26 M parameters,
# 0.3 % at 0.8 M.
BITS_BOUND = {"f32": 1e-4, "bf16": 2e-3, "q8": 0.01, "q4": 0.2}  # of the bits per byte
# How far rounded weights may be off. q8: half a step, plus a little float32 rounding. q4: the root mean square error
# over that of the matrix: 0.1 for trained weights, more than 1 if columns are swapped.
WEIGHT_BOUND = {"q8": 0.501, "q4": 0.3}
# With calibration both are root mean square errors.
CALIBRATED_BOUND = {"q8": 0.1, "q4": 0.5}


@dataclass(kw_only=True)
class Proof:
    """The results of the comparisons; without problems the verdict is "proved"."""

    path: Path
    version: int
    dtype: str
    weights: str = "not compared (nothing to compare with)"
    logit_difference: float = 0.0
    largest_logit: float = 0.0
    text: str = ""
    no_bits: str = "no prepared data with this tokenizer; name some with --data"
    expected_bits_per_byte: float | None = None
    runtime_bits_per_byte: float | None = None
    evaluated_tokens: int = 0
    duration_s: float = 0.0
    program: str = field(default_factory=lambda: second_program())
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all comparisons are within their bounds."""
        return not self.problems

    def lines(self) -> list[str]:
        """Return the proof as lines to print, the verdict last."""
        bits = f"not compared ({self.no_bits})"
        if self.expected_bits_per_byte is not None and self.runtime_bits_per_byte is not None:
            bits = (
                f"{self.program} {self.expected_bits_per_byte:.4f}, runtime {self.runtime_bits_per_byte:.4f} bits per "
                f"byte over {self.evaluated_tokens} validation tokens"
            )
        verdict = "proved" if self.ok else "NOT proved: " + "; ".join(self.problems)
        return [
            f"  weights  {self.weights}",
            f"  logits   differ by at most {self.logit_difference:.2g} (the largest is {self.largest_logit:.1f})",
            f"  text     {self.text}",
            f"  bits     {bits}",
            f"  verdict  {self.path} is {verdict} ({self.duration_s:.1f} s)",
        ]


class NumpyLogits:
    """The reference in plain numpy with the runtime's interface: the second program where PyTorch is not installed."""

    losses = staticmethod(reference.losses)

    def __init__(self, weights: Mapping[str, Rows], config: ModelConfig) -> None:
        self.weights = {name: np.asarray(tensor[0 : tensor.shape[0]], np.float32) for name, tensor in weights.items()}
        self.config = config

    def logits(self, tokens: Tokens) -> NDArray[np.float32]:
        """Return float32 (T, V) logits of int64 (T,) ids."""
        return reference.forward(self.weights, self.config, np.asarray(tokens)[None])[0]


def prove(
    path: Path,
    *,
    originals: Mapping[str, Rows] | None = None,
    data: shards.Shards | None = None,
    calibrated: bool = False,
) -> Proof:
    """Compare the runtime with PyTorch, or with plain numpy where that is not installed, on one model file.

    Args:
        path: the .bin; its checksum is verified.
        originals: the weights it was made from, by name: they are compared, and the other program's bits per byte
            use them.
        data: prepared data with the model's tokenizer; without it the logits are compared on random ids.
        calibrated: whether weights were rounded so that errors cancel, and may be off by more than half a step.

    Returns:
        The proof; its problems name every bound that was exceeded.

    Raises:
        FormatError: if the file breaks a rule of its format.
    """
    start = time.perf_counter()
    file = model_file.read(path, verify=True)
    config = file.config
    proof = Proof(path=path, version=file.version, dtype=file.dtype)
    large = config.n_params > LARGE_PARAMS
    from_file = _in_second_program(tensors_of(file), config)
    runtime = open_backend(file, "numba", None, "f32")
    if originals is not None:
        _compare_weights(proof, file, originals, calibrated)
    tokens = _some_tokens(config, data, LARGE_TOKENS if large else LOGIT_TOKENS)
    _compare_logits(proof, from_file.logits(tokens), runtime.logits(tokens))
    _compare_text(proof, from_file, runtime, data, LARGE_TOKENS if large else GREEDY_TOKENS)
    if large:
        proof.no_bits = "the model is large"
    elif data is not None:
        original = from_file if originals is None else _in_second_program(originals, config)
        _compare_bits(proof, original, runtime, data)
    proof.duration_s = time.perf_counter() - start
    return proof


def second_program() -> str:
    """Return the name of what the runtime is compared with: PyTorch, or numpy where that is not installed."""
    return "PyTorch" if has_torch() else "numpy"


def _in_second_program(tensors: Mapping[str, Rows], config: ModelConfig) -> LogitsOf:
    """Return a model with these weights in the second program; PyTorch computes a large one a layer at a time."""
    if second_program() == "numpy":
        return NumpyLogits(tensors, config)
    from parity.in_torch import LayeredLogits, TorchLogits

    return (LayeredLogits if config.n_params > LARGE_PARAMS else TorchLogits)(tensors, config)


def _compare_weights(proof: Proof, file: model_file.ModelFile, originals: Mapping[str, Rows], calibrated: bool) -> None:
    """Check that the weights are the checkpoint's, rounded if the file's type is narrower."""
    errors = []
    in_steps = file.dtype == "q8" and not calibrated
    for name, found in file.tensors.items():
        if isinstance(found, Quantized | Packed):
            errors.append(_error(name, found, originals[name], in_steps))
            continue
        start = 0
        for block in row_blocks(name, originals[name]):
            rows = found[start : start + len(block)]
            if not np.array_equal(rows, block if found.dtype == np.float32 else to_bfloat16(block)):
                proof.problems.append(f"{name} is not the checkpoint's")
                break
            start += len(block)
    if file.group_size is None:
        rounded = "" if file.dtype == "f32" else " in bfloat16"
        proof.weights = f"every one equal to the checkpoint's{rounded}" if proof.ok else "differ from the checkpoint's"
        return
    worst, bound = float(np.max(errors)), (CALIBRATED_BOUND if calibrated else WEIGHT_BOUND)[file.dtype]
    off = f"{worst:.3f} steps" if in_steps else f"{worst:.1%} of a matrix's root mean square"
    proof.weights = f"{file.dtype} in groups of {file.group_size}, off by at most {off}"
    if not worst <= bound:
        proof.problems.append(f"{file.dtype} weights are off by {worst:.3f} (at most {bound})")


def _error(name: str, found: Quantized | Packed, original: Rows, in_steps: bool) -> float:
    """Return the error of a rounded matrix: its largest in steps, or its root mean square over that of the matrix."""
    tiny = np.finfo(np.float32).tiny
    start, steps, squares, total = 0, 0.0, 0.0, 0.0
    for block in row_blocks(name, original):
        rows = np.arange(start, start + len(block))
        values, scales = unpack(found, rows) if isinstance(found, Packed) else (found.values[rows], found.scales[rows])
        widths = np.repeat(scales, found.group_size, axis=1)[:, : block.shape[1]]
        gap = values * widths - block
        steps = float(np.maximum(steps, np.max(np.abs(gap) / np.maximum(widths, tiny))))  # NaN stays
        squares, total = squares + float(np.vdot(gap, gap)), total + float(np.vdot(block, block))
        start += len(block)
    return steps if in_steps else float(np.sqrt(squares / max(total, float(tiny))))


def _some_tokens(config: ModelConfig, data: shards.Shards | None, n: int) -> NDArray[np.int64]:
    """Return n ids, or fewer if the context is shorter: validation data, else seeded random ids."""
    n = min(n, config.max_seq_len)
    if data is not None and len(data.split("val")) >= n:
        return data.split("val")[:n]
    return np.random.default_rng(0).integers(0, config.vocab_size, n)


def _compare_logits(proof: Proof, expected: NDArray[np.float32], found: NDArray[np.float32]) -> None:
    """Check the largest difference of any logit against a bound relative to the largest logit."""
    relative_bound = LOGIT_BOUND[proof.dtype]
    proof.logit_difference = float(np.abs(found - expected).max())
    proof.largest_logit = float(np.abs(expected).max())
    if not proof.logit_difference <= relative_bound * proof.largest_logit:
        proof.problems.append(
            f"logits differ by {proof.logit_difference:.3g}, more than {relative_bound:g} of {proof.largest_logit:.3g}"
        )


def _compare_text(proof: Proof, expected: LogitsOf, runtime: ForwardPass, data: shards.Shards | None, n: int) -> None:
    """Check that the other program too finds each token of the runtime's most likely text the most likely.

    At the first token where they differ, the two logits must be closer than the programs' difference there: a tie that
    rounding decides.
    """
    bos = data.meta.bos_id if data is not None else tokenizer.BOS_ID
    cache = runtime.new_cache()
    ids, logits = [bos], [runtime.decode(cache, bos).copy()]
    while len(ids) < min(n, runtime.config.max_seq_len):
        ids.append(int(logits[-1].argmax()))
        logits.append(runtime.decode(cache, ids[-1]).copy())
    expected_logits = expected.logits(np.array(ids))
    choices = expected_logits.argmax(axis=1)
    parted = np.flatnonzero(choices[:-1] != np.array(ids[1:]))
    if not len(parted):
        proof.text = f"the same {len(ids)} most likely tokens"
        return
    at = int(parted[0])
    ours, theirs = ids[at + 1], int(choices[at])
    gap = float(expected_logits[at, theirs] - expected_logits[at, ours])
    difference = float(np.abs(expected_logits[at] - logits[at]).max())
    proof.text = (
        f"parts at token {at + 1}: {proof.program} has {expected_logits[at, theirs]:.5f} against "
        f"{expected_logits[at, ours]:.5f}, the runtime {logits[at][theirs]:.5f} against {logits[at][ours]:.5f}"
    )
    if gap > 2 * difference:
        proof.problems.append(f"the texts part at token {at + 1} by more than rounding explains")


def _compare_bits(proof: Proof, original: LogitsOf, runtime: ForwardPass, data: shards.Shards) -> None:
    """Check that both programs have the same bits per byte on the same validation tokens."""
    vocabulary = tokenizer.load(data.tokenizer_path, data.meta.vocab_size)
    tokens = data.split("val")[: EVALUATION_TOKENS + 1]
    expected = sum(evaluate_windows(original, vocabulary, tokens), start=NOTHING)
    found = sum(evaluate_windows(runtime, vocabulary, tokens), start=NOTHING)
    proof.expected_bits_per_byte, proof.runtime_bits_per_byte = expected.bits_per_byte, found.bits_per_byte
    proof.evaluated_tokens = found.tokens
    if not abs(found.bits_per_byte - expected.bits_per_byte) <= BITS_BOUND[proof.dtype] * expected.bits_per_byte:
        proof.problems.append(
            f"{found.bits_per_byte:.4f} bits per byte where {proof.program} has {expected.bits_per_byte:.4f}"
        )
