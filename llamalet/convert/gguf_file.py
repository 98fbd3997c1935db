"""GGUF files of Llama models, as llama.cpp reads them, through its `gguf` package.

Queries and keys have our order. llama3's RoPE scaling is a tensor, rope_freqs: the divisor of each pair's frequency.
Quantized rows consist of blocks of 32 weights; a matrix whose rows cannot is stored as float16.

Source: llama.cpp, docs/gguf.md and gguf-py; conversion of Llama models: convert_hf_to_gguf.py.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llamalet.config import ModelConfig, RopeScaling, rope_frequencies
from llamalet.convert import byte_level, imported_model
from llamalet.convert.imported_model import DECODERS, FileTensor, Floats, ImportedModel
from llamalet.convert.tokenizer_json import CONTROLS, FIRST_TEXT_ID
from llamalet.errors import ConfigError, FormatError, TokenizerError, UsageError
from llamalet.files import replacing
from llamalet.model_file.tensors import Rows, row_blocks, tensor_specs
from llamalet.tokenizer import (
    BOS_ID,
    EOS_ID,
    SPACE_MARK,
    BinTokenizer,
    JsonTokenizer,
    Llama3Tokenizer,
    SpecialIds,
    Tokenizer,
    pack,
)

if TYPE_CHECKING:
    import gguf

NAMES = {
    "tok_embeddings": "token_embd.weight",
    "layers.*.attention_norm": "blk.*.attn_norm.weight",
    "layers.*.attention.wq": "blk.*.attn_q.weight",
    "layers.*.attention.wk": "blk.*.attn_k.weight",
    "layers.*.attention.wv": "blk.*.attn_v.weight",
    "layers.*.attention.wo": "blk.*.attn_output.weight",
    "layers.*.ffn_norm": "blk.*.ffn_norm.weight",
    "layers.*.feed_forward.w1": "blk.*.ffn_gate.weight",
    "layers.*.feed_forward.w2": "blk.*.ffn_down.weight",
    "layers.*.feed_forward.w3": "blk.*.ffn_up.weight",
    "norm": "output_norm.weight",
    "output": "output.weight",
}
ROPE_FACTORS = "rope_freqs.weight"
ARCHITECTURE = "llama"
FIELDS = {
    "dim": "embedding_length", "hidden_dim": "feed_forward_length", "n_layers": "block_count",
    "n_heads": "attention.head_count", "max_seq_len": "context_length", "norm_eps": "attention.layer_norm_rms_epsilon",
}  # fmt: skip
# Our dtypes -> the package's names for the tensor type and for a file that mostly has it.
DTYPES = {
    "f32": ("F32", "ALL_F32"), "f16": ("F16", "MOSTLY_F16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"), "q4_0": ("Q4_0", "MOSTLY_Q4_0"),
}  # fmt: skip
BLOCK = 32
END_OF_TURN = "<|eot_id|>"
# The kinds of tokens.
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
# llama.cpp's names for the way Llama 3 splits a text into words.
LLAMA3_WORDS = ("llama-bpe", "llama3", "llama-v3")


def _package() -> Any:
    """Return the gguf package.

    Raises:
        UsageError: if it is not installed.
    """
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise UsageError("GGUF files need the gguf package: pip install gguf") from None
    return gguf


# -- reading ----------------------------------------------------------------------------------------------------------


def read(name: str) -> ImportedModel:
    """Open a file of any type that the package can convert to float32.

    Raises:
        FormatError: if it is damaged, or not a Llama model.
        UsageError: if the gguf package is not installed.
    """
    path = Path(name)
    if not path.is_file():
        raise FormatError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
    try:
        reader = _strict_reader(path)
        fields = _Fields(path, reader)
        stored = {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise FormatError(f"{path}: not a GGUF file, damaged or truncated: {error}") from None
    config = _read_config(path, fields, stored)
    names = imported_model.expand(NAMES, config.n_layers)
    ours = {theirs: our for our, theirs in names.items()}
    found = {ours.get(theirs, theirs): tensor for theirs, tensor in stored.items() if theirs != ROPE_FACTORS}
    imported_model.check_shapes(str(path), config, {our: _shape(tensor) for our, tensor in found.items()}, names)
    tensors = {our: _opened(path, tensor) for our, tensor in found.items()}
    vocabulary: Tokenizer | None = None
    notes = []
    if rounded := sorted({tensor.tensor_type.name for tensor in stored.values()} - DECODERS.keys()):
        notes.append(f"its weights were already rounded to {', '.join(rounded)}; the export keeps that rounding")
    try:
        vocabulary = _read_tokenizer(str(path), fields)
    except (TokenizerError, UsageError) as error:
        notes.append(f"its tokenizer cannot be used: {error}")
    template = fields.get("tokenizer.chat_template")
    stops = {fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")}
    return ImportedModel(
        name=str(path),
        config=config,
        tensors=tensors,
        stored=imported_model.stored_types(tensors.values()),
        tokenizer=vocabulary,
        tokenizer_data=b"" if vocabulary is None else pack(vocabulary.pieces()),
        chat_template=template if isinstance(template, str) else None,
        stop_tokens=tuple(sorted(id for id in stops if isinstance(id, int))),
        notes=tuple(notes),
    )


def _strict_reader(path: Path) -> "gguf.GGUFReader":
    """Return the package's reader, stopped at the end of a damaged file: it would read on until memory runs out.

    Raises:
        ValueError: if the file ends within its metadata; or another of the package's errors.
    """

    class Reader(_package().GGUFReader):  # type: ignore[misc]
        def _get(self, offset: Any, *args: Any, **options: Any) -> Any:
            if offset >= len(self.data):
                raise ValueError("ends within its metadata")
            return super()._get(offset, *args, **options)

    return Reader(path)


class _Fields:
    """A file's metadata by key."""

    def __init__(self, path: Path, reader: "gguf.GGUFReader") -> None:
        self._path, self._reader = path, reader

    def get(self, key: str) -> Any:
        """Return a value as a Python object; None if there is none."""
        field = self._reader.get_field(key)
        try:
            return None if field is None else field.contents()
        except (ValueError, IndexError, TypeError) as error:
            raise FormatError(f"{self._path}: {key} is damaged: {error}") from None

    def needed(self, key: str) -> Any:
        """Return a value that every file must have."""
        value = self.get(key)
        if value is None:
            raise FormatError(f"{self._path}: has no {key}")
        return value


def _shape(tensor: "gguf.ReaderTensor") -> tuple[int, ...]:
    """Return the shape; GGUF stores the columns first."""
    return tuple(int(size) for size in tensor.shape[::-1])


def _opened(path: Path, tensor: "gguf.ReaderTensor") -> FileTensor:
    """Return a tensor whose rows are read and converted to float32 on demand.

    Raises:
        FormatError: if the package cannot convert its type.
    """
    gguf, kind, shape = _package(), tensor.tensor_type, _shape(tensor)
    row_bytes = int(tensor.n_bytes) // shape[0]
    if kind.name in DECODERS:
        return FileTensor(path, int(tensor.data_offset), shape, kind.name, row_bytes, DECODERS[kind.name])
    try:
        gguf.quants.dequantize(np.zeros((1, row_bytes), np.uint8), kind)
    except NotImplementedError:
        raise FormatError(f"{path}: {tensor.name} is {kind.name}, which cannot be converted to float32") from None

    def decode(raw: NDArray[np.uint8]) -> Floats:
        with np.errstate(invalid="ignore", over="ignore"):  # damaged scales; NaN is refused later, by name
            return gguf.quants.dequantize(raw, kind)

    return FileTensor(path, int(tensor.data_offset), shape, kind.name, row_bytes, decode)


def _read_config(path: Path, fields: _Fields, stored: Mapping[str, "gguf.ReaderTensor"]) -> ModelConfig:
    """Return the config that the metadata describes.

    Raises:
        FormatError: if it is another architecture, or a variant of Llama that cannot be run here.
    """
    if (architecture := fields.needed("general.architecture")) != ARCHITECTURE:
        raise FormatError(f"{path}: is a {architecture!r} model: only {ARCHITECTURE!r} ones can be read")
    of = functools.partial("{}.{}".format, ARCHITECTURE)
    if fields.get(of("expert_count")):
        raise FormatError(f"{path}: is a mixture of {fields.get(of('expert_count'))} experts, not a plain Llama")
    scaling = fields.get(of("rope.scaling.type"))
    if scaling not in (None, "none") and fields.get(of("rope.scaling.factor")) not in (None, 1.0):
        raise FormatError(f"{path}: RoPE is scaled the {scaling!r} way, not in llama3's")
    values = {ours: fields.needed(of(theirs)) for ours, theirs in FIELDS.items()}
    if NAMES["tok_embeddings"] not in stored:
        raise FormatError(f"{path}: {NAMES['tok_embeddings']} is missing")
    config = imported_model.build_config(
        str(path),
        values
        | {
            "n_kv_heads": fields.get(of("attention.head_count_kv")),
            "head_dim": fields.get(of("attention.key_length")),
            "vocab_size": _shape(stored[NAMES["tok_embeddings"]])[0],
            "norm_eps": _shortest(values["norm_eps"]),
            "rope_theta": _shortest(fields.get(of("rope.freq_base"))),
            "rope_scaling": None,
            "tied": NAMES["output"] not in stored,
        },
    )
    for other in ("attention.value_length", "rope.dimension_count"):
        if fields.get(of(other)) not in (None, config.head_dim):
            raise FormatError(
                f"{path}: {of(other)} is {fields.get(of(other))}: must be the width of a head, {config.head_dim}"
            )
    if ROPE_FACTORS not in stored:
        return config
    factors = np.asarray(stored[ROPE_FACTORS].data, np.float64)
    return dataclasses.replace(config, rope_scaling=_scaling_of(path, config, factors))


def _shortest(value: Any) -> Any:
    """Return the shortest number that rounds to a float32: 1e-5, not 9.999999747378752e-06; other types unchanged."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def rope_factors(config: ModelConfig) -> Floats:
    """Return the divisor of each frequency under llama3's scaling, float32 (D / 2,)."""
    plain = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
    return (plain / rope_frequencies(config)).astype(np.float32)


def _scaling_of(path: Path, config: ModelConfig, factors: NDArray[np.float64]) -> RopeScaling:
    """Return llama3's scaling with these divisors.

    Raises:
        FormatError: if Llama 3.1's constants do not give them with any factor.
    """
    scaling = imported_model.llama3_scaling(max(1.0, round(float(factors.max()), 4)))
    expected = rope_factors(dataclasses.replace(config, rope_scaling=scaling))
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise FormatError(f"{path}: {ROPE_FACTORS} is not what Llama 3.1's RoPE scaling gives with any factor")
    return scaling


def _read_tokenizer(name: str, fields: _Fields) -> Tokenizer:
    """Return the vocabulary of a file.

    Raises:
        TokenizerError: if it is neither Llama 3's, nor SentencePiece's BPE with byte fallback and a space before texts.
    """
    kind, words = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind == "gpt2" and words in LLAMA3_WORDS:
        tokens, merges, kinds = (
            fields.get(f"tokenizer.ggml.{part}") or [] for part in ("tokens", "merges", "token_type")
        )
        special = [id for id, kind in enumerate(kinds) if kind == CONTROL]
        return byte_level.from_table(tokens, merges, special, name)
    if kind != "llama":
        raise TokenizerError(f"{name}: is of kind {kind!r} with {words!r}: only Llama 2's and Llama 3's can be read")
    if fields.get("tokenizer.ggml.add_space_prefix") is False:
        raise TokenizerError(f"{name}: puts no space before a text")
    tokens, scores, kinds = (fields.get(f"tokenizer.ggml.{part}") or [] for part in ("tokens", "scores", "token_type"))
    ids = fields.get("tokenizer.ggml.bos_token_id"), fields.get("tokenizer.ggml.eos_token_id")
    if not len(tokens) == len(scores) == len(kinds) or ids not in ((BOS_ID, EOS_ID), (None, None)):
        raise TokenizerError(
            f"{name}: has {len(tokens)} tokens, {len(scores)} scores, {len(kinds)} kinds, BOS, EOS {ids}"
        )
    pieces = [
        (token.replace(SPACE_MARK, " ").encode(), float(np.float32(score)))
        for token, score in zip(tokens, scores, strict=True)
    ]
    if any(kind != NORMAL for kind in kinds[FIRST_TEXT_ID:]):
        raise TokenizerError(f"{name}: has special tokens other than the control tokens")
    if tuple(tokens[: len(CONTROLS)]) != CONTROLS:
        raise TokenizerError(f"{name}: its first tokens are {tokens[: len(CONTROLS)]}, not {', '.join(CONTROLS)}")
    for id, row in ((BOS_ID, b"\n<s>\n"), (EOS_ID, b"\n</s>\n")):
        pieces[id] = (row, pieces[id][1])
    return BinTokenizer(pieces, name)


# -- writing ----------------------------------------------------------------------------------------------------------


def _check(source: ImportedModel) -> None:
    """Raise an error if GGUF, or llama.cpp, cannot hold the model."""
    if source.tokenizer is None:
        raise TokenizerError(
            f"{source.name}: llama.cpp needs the tokenizer inside a GGUF file; name it with --tokenizer"
        )
    scaling = source.config.rope_scaling
    if scaling is not None and scaling != imported_model.llama3_scaling(scaling.factor):
        raise ConfigError(f"{scaling}: a GGUF file can only hold Llama 3.1's constants, with any factor")


def write(path: Path, source: ImportedModel, dtype: str = "f32") -> list[str]:
    """Write a model and its tokenizer as one file, which llama.cpp runs.

    Args:
        path: the file to make or replace.
        source: the model; its tensors are read once, in blocks.
        dtype: f32, f16, q8_0 or q4_0; norms are always float32.

    Returns:
        The names of the matrices stored as float16, because their rows are not a multiple of BLOCK.

    Raises:
        ConfigError: if the file cannot say how RoPE is scaled, or float16 cannot hold a weight.
        TokenizerError: if llama.cpp would encode texts differently.
        NonFiniteError: if a weight is NaN or infinite.
        UsageError: if the gguf package is not installed.
    """
    gguf, config = _package(), source.config
    _check(source)
    kinds = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    _add_fields(writer, source, path.stem, gguf.LlamaFileType[DTYPES[dtype][1]])
    names, others = imported_model.expand(NAMES, config.n_layers), []
    plan: list[tuple[str, str, Any]] = []
    if config.rope_scaling is not None:
        plan.append((ROPE_FACTORS, ROPE_FACTORS, kinds.F32))
        add_tensor_info(writer, ROPE_FACTORS, (config.head_dim // 2,), kinds.F32)
    for spec in tensor_specs(1, config):
        kind = kinds.F32 if len(spec.shape) == 1 else kinds[DTYPES[dtype][0]]
        if kind in (kinds.Q8_0, kinds.Q4_0) and spec.shape[-1] % BLOCK:
            kind = kinds.F16
            others.append(spec.name)
        plan.append((spec.name, names[spec.name], kind))
        add_tensor_info(writer, names[spec.name], spec.shape, kind)
    with replacing(path) as file:
        # The writer would open a file by name; its state machine accepts an open one too.
        writer.fout, writer.state = [file], type(writer.state).EMPTY
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for ours, _, kind in plan:
            tensor = rope_factors(config) if ours == ROPE_FACTORS else source.tensors[ours]
            writer.write_padding(file, file.tell())
            for data in _encoded(ours, tensor, kind):
                file.write(data)
        writer.write_padding(file, file.tell())
    return others


def add_tensor_info(writer: "gguf.GGUFWriter", name: str, shape: tuple[int, ...], kind: Any) -> None:
    """Announce a tensor."""
    block, block_bytes = _package().GGML_QUANT_SIZES[kind]
    n_bytes = math.prod(shape) // block * block_bytes
    writer.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes, raw_dtype=kind)


def _encoded(name: str, tensor: Rows, kind: Any) -> Iterator[memoryview]:
    """Yield a tensor's bytes in a file, a block of rows at a time."""
    quants = _package().quants
    for block in row_blocks(name, tensor):
        if kind.name == "F16" and np.abs(block).max() > np.finfo(np.float16).max:
            raise ConfigError(f"{name}: has a weight that float16 cannot hold; take --dtype f32")
        yield np.ascontiguousarray(quants.quantize(block, kind)).data.cast("B")


def _add_fields(writer: "gguf.GGUFWriter", source: ImportedModel, name: str, file_type: Any) -> None:
    """Put the model's shape and its tokenizer into the metadata."""
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(_package().GGML_QUANT_VERSION)
    add_shape(writer, source.config)
    assert source.tokenizer is not None  # _check
    if isinstance(source.tokenizer, Llama3Tokenizer | JsonTokenizer):
        _add_llama3(writer, byte_level.table(source.tokenizer, source.tokenizer_data))
    else:
        _add_llama2(writer, source.tokenizer, source.name)
    _add_special_ids(writer, source.tokenizer.ids)
    writer.add_add_eos_token(False)
    if source.chat_template is not None:
        writer.add_chat_template(source.chat_template)


def _add_special_ids(writer: "gguf.GGUFWriter", ids: SpecialIds) -> None:
    """Put the ids that begin and end texts into the metadata.

    llama.cpp has three places for ids that end one: EOS, the end of a turn (EOT) and of a message (EOM).
    """
    if ids.bos is not None:
        writer.add_bos_token_id(ids.bos)
    if ids.eos is not None:
        writer.add_eos_token_id(ids.eos)
    writer.add_add_bos_token(bool(ids.prefix))


def add_shape(writer: "gguf.GGUFWriter", config: ModelConfig) -> None:
    """Put a model's shape into the metadata."""
    c = config
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_seq_len)
    writer.add_embedding_length(c.dim)
    writer.add_block_count(c.n_layers)
    writer.add_feed_forward_length(c.hidden_dim)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)


def _add_llama3(writer: "gguf.GGUFWriter", table: byte_level.MergeTable) -> None:
    """Put a vocabulary of Llama 3's kind into the metadata."""
    special = set(table.special.values())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(LLAMA3_WORDS[0])
    writer.add_token_list(table.tokens)
    writer.add_token_types([CONTROL if id in special else NORMAL for id in range(len(table.tokens))])
    writer.add_token_merges([" ".join(pair) for pair in table.merges])
    if END_OF_TURN in table.special:
        writer.add_eot_token_id(table.special[END_OF_TURN])


def _add_llama2(writer: "gguf.GGUFWriter", vocabulary: Tokenizer, name: str) -> None:
    """Put a vocabulary of Llama 2's kind into the metadata.

    Raises:
        TokenizerError: if llama.cpp would encode texts differently.
    """
    copy = BinTokenizer(vocabulary.pieces(), name)  # raises if it is not of this kind
    tokens = [piece.decode().replace(" ", SPACE_MARK) for piece, _ in copy.pieces()]
    tokens[: len(CONTROLS)] = CONTROLS
    kinds = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * (FIRST_TEXT_ID - len(CONTROLS))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([score for _, score in copy.pieces()])
    writer.add_token_types(kinds + [NORMAL] * (len(tokens) - FIRST_TEXT_ID))
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(vocabulary.adds_space)
    writer.add_remove_extra_whitespaces(False)
