"""The cost of quantization: bits per byte of one model in every dtype, ours and llama.cpp's.

python -m benchmarks.quantization out/demo/model.bin
python -m benchmarks.quantization stories260K.bin --tokenizer=tok512.bin --text=stories.jsonl

Without --text the stories are drawn from the grammar of the demo's corpus, with a separate seed. The reference computes
everything twice: as the runtime does, which also rounds the activations for q8 and q4 (in groups of 32 for Q8_0 and
Q4_0, like llama.cpp), and with rounded weights alone.
"""

if __name__ == "__main__":
    import _signal

    if hasattr(_signal, "pthread_sigmask"):  # until `begin` handles Ctrl-C, it has to wait
        _signal.pthread_sigmask(_signal.SIG_BLOCK, [_signal.SIGINT])
    from llamalet import startup

    startup.begin()  # before imports that take seconds

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import aligned
from configurator import parse
from llamalet import model_file, story_grammar
from llamalet.checks import not_positive
from llamalet.command import run
from llamalet.errors import ConfigError, DataError, TokenizerError
from llamalet.model_file.companions import load_tokenizer, no_tokenizer
from llamalet.model_file.quantize import ENCODINGS, Floats, Packed, Quantized, Weight, dequantize
from llamalet.reference import NumpyTransformer
from llamalet.scoring import NOTHING, Ids, evaluate_documents
from llamalet.tokenizer import Tokenizer

# Columns in a block of llama.cpp, which share a float16 scale.
GGUF_BLOCK = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationConfig:
    """The options of benchmarks/quantization.py."""

    model: str = "out/demo/model.bin"
    """A model file, float32 if possible: its weights are the baseline. May be given without --model."""
    tokenizer: str | None = None
    """Its tokenizer; by default the one next to it."""
    text: str | None = None
    """Stories to score, a .jsonl with a "text" in each line; by default drawn from the grammar."""
    stories: int = 40
    """Number of stories."""
    seed: int = 20_000
    """Seed of the drawn stories, different from the corpus's."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        ConfigError.raise_for(not_positive(self, "stories"))


def main(argv: Sequence[str]) -> int:
    """Print the table of one model; return 0."""
    program = "python -m benchmarks.quantization"
    config = parse(QuantizationConfig, argv, program=program, description=__doc__, positional=("model",))
    file = model_file.read(config.model)
    tokenizer = load_tokenizer(file, None if config.tokenizer is None else Path(config.tokenizer))
    if tokenizer is None:
        raise TokenizerError(no_tokenizer(file.path))
    texts = islice(_texts(config), config.stories)
    documents = [np.array([*tokenizer.encode_document(text), tokenizer.separator_id]) for text in texts]
    print(
        f"{file.path}: {file.config.n_params:,} parameters, {file.dtype}; {len(documents)} stories, "
        f"{sum(map(len, documents)):,} tokens"
    )
    print("\n".join(aligned(list(_rows(file, tokenizer, documents)))))
    return 0


def _texts(config: QuantizationConfig) -> Iterator[str]:
    """Yield the stories of a file, or new ones endlessly."""
    if config.text is None:
        rng = np.random.default_rng(config.seed)
        while True:
            yield story_grammar.draw(rng)
    try:
        with open(config.text, encoding="utf-8") as file:
            yield from (json.loads(line)["text"] for line in file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f'{config.text}: must be lines of {{"text": ...}}: {error!r}') from None


def _rows(file: model_file.ModelFile, tokenizer: Tokenizer, documents: Sequence[Ids]) -> Iterator[list[str]]:
    """Measure one dtype after another, and yield the table; a cost is the increase in bits per byte over float32."""
    originals = {name: dequantize(tensor) for name, tensor in file.tensors.items()}
    matrices = [name for name, w in originals.items() if w.ndim == 2]
    n_weights = sum(originals[name].size for name in matrices)
    squares = sum(float((originals[name] ** 2).sum()) for name in matrices)

    def bits_per_byte(tensors: Mapping[str, Weight]) -> float:
        model = NumpyTransformer(model_file.ModelFile(file.path, file.header, tensors))
        return sum(evaluate_documents(model, tokenizer, documents), start=NOTHING).bits_per_byte

    yield ["dtype", "bits/weight", "error", "weights alone: bits/byte", "cost", "as run: bits/byte", "cost"]
    exact = None  # the bits of float32, which comes first
    for form, rounding in forms().items():
        rounded = {name: rounding(w) if w.ndim == 2 else w for name, w in originals.items()}
        plain = {name: dequantize(rounded[name])[..., : w.shape[-1]] for name, w in originals.items()}
        bits_per_weight = 8 * sum(_n_bytes(rounded[name]) for name in matrices) / n_weights
        squared_error = sum(float(((plain[name] - originals[name]) ** 2).sum()) for name in matrices)
        row = [form, f"{bits_per_weight:.2f}", f"{(squared_error / squares) ** 0.5:.2%}"]
        for bits in (bits_per_byte(plain), bits_per_byte(rounded)):
            exact = exact or bits
            row += [f"{bits:.5f}", f"{bits / exact - 1:+.2%}"]
        yield row


def forms() -> dict[str, Callable[[Floats], Weight]]:
    """Return a function per dtype that rounds a float32 matrix; llama.cpp's types need the gguf package."""
    found = {dtype: encoding.encode for dtype, encoding in ENCODINGS.items()}
    try:
        import gguf  # noqa: F401
    except ImportError:
        return found
    return found | {name: lambda weights, name=name: through_gguf(weights, name) for name in ("Q8_0", "Q4_0")}


def through_gguf(weights: Floats, kind: str) -> Quantized:
    """Round a matrix as llama.cpp does.

    Args:
        weights: float32 (rows, cols). If cols is not a multiple of GGUF_BLOCK, llama.cpp refuses or uses a larger
            type; here the last block is padded with zeros, which does not change its other values.
        kind: Q8_0 or Q4_0.

    Returns:
        int8 (rows, cols up to a multiple of GGUF_BLOCK) and float32 (rows, groups).

    Source: ggml's block_q8_0 and block_q4_0: a float16 scale, then the values; a byte of 4 bits has value i in its low
    half and i + 16 in its high half.
    """
    import gguf

    rows, cols = weights.shape
    padded = np.pad(weights, ((0, 0), (0, -cols % GGUF_BLOCK)))
    blocks = gguf.quants.quantize(padded, gguf.GGMLQuantizationType[kind]).reshape(
        rows, padded.shape[1] // GGUF_BLOCK, -1
    )
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].astype(np.float32)
    values: NDArray[np.int8] = np.ascontiguousarray(blocks[..., 2:]).view(np.int8)
    if kind == "Q4_0":
        halves = values.view(np.uint8)
        values = np.concatenate([halves & 15, halves >> 4], axis=2).view(np.int8) - np.int8(8)
    return Quantized(values.reshape(rows, -1), scales)


def _n_bytes(weight: Weight) -> int:
    """Return the size of a matrix in a file, in bytes."""
    if isinstance(weight, Packed):
        return weight.values.nbytes + weight.scales.nbytes
    if isinstance(weight, Quantized):
        bits = 4 if np.abs(weight.values.astype(int)).max() <= 8 else 8
        return weight.values.size * bits // 8 + 2 * weight.scales.size
    return weight.nbytes


if __name__ == "__main__":
    run(main)
