"""GGUF files of Llama models, as llama.cpp reads them, through its `gguf` package.

Queries and keys have our order. RoPE is scaled linearly, as a key says, or by a tensor, rope_freqs: the divisor of each
pair's frequency; so llama3's scaling is stored. A model may be split over files named NAME-00001-of-00002.gguf; the
first has all metadata. Quantized rows consist of blocks of 32 weights; a matrix whose rows cannot is stored as float16.

Source: llama.cpp, docs/gguf.md and gguf-py; conversion of Llama models: convert_hf_to_gguf.py.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from llamalet.config import LinearScaling, ModelConfig, RopeDivisors, RopeScaling, rope_frequencies
from llamalet.convert import gguf_tokenizer, imported_model
from llamalet.convert.gguf_metadata import ARCHITECTURE, Metadata, first_part, package, read_parts, shortest
from llamalet.convert.imported_model import DECODERS, FileTensor, Floats, ImportedModel
from llamalet.errors import ConfigError, FormatError, TokenizerError, UsageError
from llamalet.files import replacing
from llamalet.model_file.tensors import Rows, row_blocks, tensor_specs
from llamalet.tokenizer import Tokenizer

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
FIELDS = {
    "dim": "embedding_length", "hidden_dim": "feed_forward_length", "n_layers": "block_count",
    "n_heads": "attention.head_count", "max_seq_len": "context_length", "norm_eps": "attention.layer_norm_rms_epsilon",
}  # fmt: skip
NAMES_OF_FIELDS = FIELDS | {  # for messages
    "n_kv_heads": "attention.head_count_kv", "head_dim": "attention.key_length", "rope_theta": "rope.freq_base",
}  # fmt: skip
# Our dtypes -> the package's names for the tensor type and for a file that mostly has it.
DTYPES = {
    "f32": ("F32", "ALL_F32"), "f16": ("F16", "MOSTLY_F16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"), "q4_0": ("Q4_0", "MOSTLY_Q4_0"),
}  # fmt: skip
BLOCK = 32


# -- reading ----------------------------------------------------------------------------------------------------------


def read(name: str) -> ImportedModel:
    """Open a file of any type that the package can convert to float32.

    Args:
        name: its path; of a split file, any part's or NAME.

    Raises:
        FormatError: if it is damaged, a part is missing, or it is not a Llama model.
        UsageError: if the gguf package is not installed.
    """
    path = first_part(Path(name)) or Path(name)
    if not path.is_file():
        raise FormatError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
    parts = read_parts(path)
    fields = parts[0]
    path = fields.path
    stored = {tensor.name: (part.path, tensor) for part in parts for tensor in part.tensors}
    config = _read_config(fields, {name: tensor for name, (_, tensor) in stored.items()})
    names = imported_model.expand(NAMES, config.n_layers)
    ours = {theirs: our for our, theirs in names.items()}
    found = {ours.get(theirs, theirs): place for theirs, place in stored.items() if theirs != ROPE_FACTORS}
    imported_model.check_shapes(str(path), config, {our: _shape(tensor) for our, (_, tensor) in found.items()}, names)
    tensors = {our: _opened(*place) for our, place in found.items()}
    notes = []
    if rounded := sorted({tensor.tensor_type.name for _, tensor in stored.values()} - DECODERS.keys()):
        notes.append(f"its weights were already rounded to {', '.join(rounded)}; the export keeps that rounding")
    vocabulary, data, problem = _read_tokenizer(fields, config.vocab_size)
    stops = frozenset[int]() if vocabulary is None else vocabulary.stop_ids
    if vocabulary is None:
        try:
            stops = gguf_tokenizer.stops(fields.get, str(path))
        except TokenizerError as error:
            problem = problem or str(error)
            notes.append(f"where its texts end is not known: {error}")
    return ImportedModel(
        name=str(path),
        config=config,
        tensors=tensors,
        stored=imported_model.stored_types(tensors.values()),
        tokenizer=vocabulary,
        tokenizer_data=data,
        tokenizer_problem=problem,
        chat_template=fields.typed("tokenizer.chat_template", str),
        stop_tokens=tuple(sorted(stops)),
        notes=tuple(notes),
        files=tuple(part.path for part in parts),
    )


def _read_tokenizer(fields: Metadata, n_rows: int) -> tuple[Tokenizer | None, bytes, str]:
    """Return the vocabulary and its file's bytes, or what is wrong with it."""
    try:
        return *(gguf_tokenizer.read(fields.get, str(fields.path), n_rows) or (None, b"")), ""
    except (TokenizerError, UsageError) as error:
        return None, b"", str(error)


def _shape(tensor: "gguf.ReaderTensor") -> tuple[int, ...]:
    """Return the shape; GGUF stores the columns first."""
    return tuple(int(size) for size in tensor.shape[::-1])


def _opened(path: Path, tensor: "gguf.ReaderTensor") -> FileTensor:
    """Return a tensor whose rows are read and converted to float32 on demand.

    Raises:
        FormatError: if the package cannot convert its type.
    """
    gguf, kind, shape = package(), tensor.tensor_type, _shape(tensor)
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


def _read_config(fields: Metadata, stored: Mapping[str, "gguf.ReaderTensor"]) -> ModelConfig:
    """Return the config that the metadata describes.

    Raises:
        FormatError: if it is another architecture, or a variant of Llama that cannot be run here.
    """
    _refuse_other_models(fields)
    values = {ours: fields.needed(_key(theirs)) for ours, theirs in FIELDS.items()}
    values |= {ours: fields.of_layers(_key(FIELDS[ours]), values["n_layers"]) for ours in ("n_heads", "hidden_dim")}
    if NAMES["tok_embeddings"] not in stored:
        raise FormatError(f"{fields.path}: {NAMES['tok_embeddings']} is missing")
    config = imported_model.build_config(
        str(fields.path),
        values
        | {
            "n_kv_heads": fields.of_layers(_key("attention.head_count_kv"), values["n_layers"]),
            "head_dim": fields.get(_key("attention.key_length")),
            "vocab_size": _shape(stored[NAMES["tok_embeddings"]])[0],
            "norm_eps": shortest(values["norm_eps"]),
            "rope_theta": shortest(fields.get(_key("rope.freq_base"))),
            "rope_scaling": None,
            "tied": NAMES["output"] not in stored,
        },
        {ours: _key(theirs) for ours, theirs in NAMES_OF_FIELDS.items()},
    )
    _refuse_other_attention(fields, config)
    scaling = _read_scaling(fields.path, config, _linear_factor(fields), stored.get(ROPE_FACTORS))
    return dataclasses.replace(config, rope_scaling=scaling)


def _key(name: str) -> str:
    """Return the key of a fact that depends on the architecture."""
    return f"{ARCHITECTURE}.{name}"


def _refuse_other_models(fields: Metadata) -> None:
    """Raise a FormatError for another architecture, an encoder or a mixture of experts."""
    if (architecture := fields.needed("general.architecture")) != ARCHITECTURE:
        raise FormatError(f"{fields.path}: is a {architecture!r} model: only {ARCHITECTURE!r} ones can be read")
    if fields.typed(_key("attention.causal"), bool) is False:
        raise FormatError(f"{fields.path}: {_key('attention.causal')} is false: only models that look back can be read")
    if n_experts := fields.typed(_key("expert_count"), int):
        raise FormatError(f"{fields.path}: is a mixture of {n_experts} experts, not a plain Llama")


def _refuse_other_attention(fields: Metadata, config: ModelConfig) -> None:
    """Raise a FormatError for values or a rotation of another width than a head, and for a sliding window."""
    for key in map(_key, ("attention.value_length", "rope.dimension_count")):
        if fields.typed(key, int) not in (None, config.head_dim):
            raise FormatError(
                f"{fields.path}: {key} is {fields.get(key)}: must be the width of a head, {config.head_dim}"
            )
    key = _key("attention.sliding_window")
    window = fields.number(key, config.max_seq_len)
    if 0 < window < config.max_seq_len:
        raise FormatError(f"{fields.path}: {key} is {window:g}, below the context {config.max_seq_len}")


def _linear_factor(fields: Metadata) -> float:
    """Return the factor by which RoPE is scaled linearly, 1 if it is not.

    Raises:
        FormatError: if it is scaled in another way.

    Source: llama.cpp, src/llama-model.cpp (load_hparams) and src/llama-context.cpp: the way is linear where the file
    does not say it, the older key counts where the newer is missing, 0 is 1, and with a factor of 1 all ways are equal.
    """
    path = fields.path
    kind, key = fields.get(_key("rope.scaling.type")), _key("rope.scaling.factor")
    if fields.get(key) is None:
        key = _key("rope.scale_linear")
    factor = 1.0 if kind == "none" else fields.number(key, 1.0) or 1.0
    if kind not in (None, "none", "linear") and (factor != 1 or kind not in ("yarn", "longrope")):
        raise FormatError(
            f"{path}: {_key('rope.scaling.type')} is {kind!r}, the factor {factor:g}: only 'linear' can be read"
        )
    if not 0 < factor < math.inf:
        raise FormatError(f"{path}: {key} is {factor:g}: must be a positive number")
    if (attention := fields.number(_key("rope.scaling.attn_factor"), 1.0)) != 1:
        raise FormatError(f"{path}: {_key('rope.scaling.attn_factor')} is {attention:g}: only 1 can be read")
    return factor


def _read_scaling(
    path: Path, config: ModelConfig, factor: float, divisors: "gguf.ReaderTensor | None"
) -> RopeScaling | None:
    """Return how RoPE is scaled.

    Args:
        path: the file.
        config: its shape, without scaling.
        factor: see `_linear_factor`.
        divisors: the tensor ROPE_FACTORS, if there is one; llama.cpp divides by both.

    Raises:
        FormatError: if the divisors are damaged.
    """
    if divisors is None:
        return None if factor == 1 else LinearScaling(factor=factor)
    if divisors.tensor_type.name != "F32" or _shape(divisors) != (config.head_dim // 2,):
        found = f"{divisors.tensor_type.name} of shape {_shape(divisors)}"
        raise FormatError(f"{path}: {ROPE_FACTORS} is {found}: must be F32 of shape ({config.head_dim // 2},)")
    try:
        return _simplest(config, RopeDivisors(divisors=tuple(factor * float(value) for value in divisors.data)))
    except ConfigError as error:
        raise FormatError(f"{path}: {ROPE_FACTORS}: {error}") from None


def _simplest(config: ModelConfig, found: RopeDivisors) -> RopeScaling | None:
    """Return what gives some divisors: nothing, one factor, Llama 3.1's scaling with a factor, or only themselves."""
    divisors, last = np.array(found.divisors), found.divisors[-1]
    if (divisors == last).all():
        return None if last == 1 else LinearScaling(factor=shortest(last))
    factor = rounded if math.isclose(rounded := round(last, 4), last, rel_tol=1e-6) else shortest(last)
    if factor >= 1:
        scaling, plain = imported_model.llama3_scaling(factor), rope_frequencies(config)
        # Converters compute with float32 numbers.
        if np.allclose(plain / scaling.scaled(plain), divisors, rtol=1e-4, atol=0):
            return scaling
    return found


def rope_factors(config: ModelConfig) -> Floats | None:
    """Return the divisor of each frequency, float32 (D / 2,); None if a key says how RoPE is scaled, or it is not."""
    if isinstance(config.rope_scaling, LinearScaling | None):
        return None
    plain = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
    return (plain / rope_frequencies(config)).astype(np.float32)


# -- writing ----------------------------------------------------------------------------------------------------------


def write(path: Path, source: ImportedModel, dtype: str = "f32") -> list[str]:
    """Write a model and its tokenizer, if it has one, as one file, which llama.cpp runs.

    Args:
        path: the file to make or replace.
        source: the model; its tensors are read once, in blocks.
        dtype: f32, f16, q8_0 or q4_0; norms are always float32.

    Returns:
        What the user should know, a line each.

    Raises:
        ConfigError: if float16 cannot hold a weight.
        TokenizerError: if llama.cpp would encode texts differently.
        NonFiniteError: if a weight is NaN or infinite.
        UsageError: if the gguf package is not installed.
    """
    gguf, config = package(), source.config
    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    notes = _add_fields(writer, source, path, gguf.LlamaFileType[DTYPES[dtype][1]])
    names, divisors = imported_model.expand(NAMES, config.n_layers), rope_factors(config)
    if divisors is not None:
        add_tensor_info(writer, ROPE_FACTORS, divisors.shape, gguf.GGMLQuantizationType.F32)
    types = {}
    for spec in tensor_specs(1, config):
        types[spec.name] = _type_for(spec.shape, dtype)
        add_tensor_info(writer, names[spec.name], spec.shape, types[spec.name])
    with replacing(path) as file:
        # The writer would open a file by name; its state machine accepts an open one too.
        writer.fout, writer.state = [file], type(writer.state).EMPTY
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if divisors is not None:
            _write_tensor(writer, file, ROPE_FACTORS, divisors, gguf.GGMLQuantizationType.F32)
        for name, kind in types.items():
            _write_tensor(writer, file, name, source.tensors[name], kind)
        writer.write_padding(file, file.tell())
    if dtype != "f16" and (others := [name for name, kind in types.items() if kind.name == "F16"]):
        notes.append(
            f"{len(others)} matrices are f16, because their rows are not a multiple of {BLOCK}: {others[0]} ..."
        )
    return notes


def _type_for(shape: tuple[int, ...], dtype: str) -> Any:
    """Return the package's type for a tensor in a file of `dtype`: norms stay float32, blocks must fill the rows."""
    types = package().GGMLQuantizationType
    if len(shape) == 1:
        return types.F32
    has_blocks = dtype in ("q8_0", "q4_0")
    return types.F16 if has_blocks and shape[-1] % BLOCK else types[DTYPES[dtype][0]]


def add_tensor_info(writer: "gguf.GGUFWriter", name: str, shape: tuple[int, ...], kind: Any) -> None:
    """Announce a tensor."""
    block, block_bytes = package().GGML_QUANT_SIZES[kind]
    n_bytes = math.prod(shape) // block * block_bytes
    writer.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes, raw_dtype=kind)


def _write_tensor(writer: "gguf.GGUFWriter", file: BinaryIO, name: str, tensor: Rows, kind: Any) -> None:
    """Write a tensor to the file, aligned, a block of rows at a time."""
    quantize = package().quants.quantize
    writer.write_padding(file, file.tell())
    for block in row_blocks(name, tensor):
        if kind.name == "F16" and np.abs(block).max() > np.finfo(np.float16).max:
            raise ConfigError(f"{name}: has a weight that float16 cannot hold; take --dtype f32")
        file.write(np.ascontiguousarray(quantize(block, kind)).data.cast("B"))


def _add_fields(writer: "gguf.GGUFWriter", source: ImportedModel, path: Path, file_type: Any) -> list[str]:
    """Put the model's shape and its tokenizer into the metadata; return what llama.cpp does differently."""
    writer.add_name(path.stem)
    writer.add_file_type(file_type)
    writer.add_quantization_version(package().GGML_QUANT_VERSION)
    add_shape(writer, source.config)
    notes = []
    if source.tokenizer is None:
        gguf_tokenizer.add_none(writer, source.stop_tokens)
    else:
        fields = gguf_tokenizer.fields_of(source.tokenizer, source.tokenizer_data, source.config.vocab_size, str(path))
        gguf_tokenizer.add(writer, fields)
        notes = fields.notes
    if source.chat_template is not None:
        writer.add_chat_template(source.chat_template)
    return notes


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
    if isinstance(c.rope_scaling, LinearScaling):
        writer.add_rope_scaling_type(package().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(c.rope_scaling.factor)
