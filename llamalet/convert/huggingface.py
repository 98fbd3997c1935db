"""Hugging Face folders of Llama models: config.json, safetensors (one file or several), the tokenizer's files.

Within a head, the rows of their queries and keys are ordered by halves: the first values of all RoPE pairs, then the
second ones. Ours and Meta's have each pair side by side. Everything else differs in names only.

Source: transformers, models/llama: configuration_llama.py, modeling_llama.py, convert_llama_weights_to_hf.py.
"""

import dataclasses
import json
import re
import reprlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamalet import strict, tokenizer
from llamalet.chat_template import TEMPLATE_FILES, TEMPLATE_FOLDER, NoDefault, find_source
from llamalet.config import LinearScaling, Llama3Scaling, ModelConfig, RopeDivisors, RopeScaling
from llamalet.convert import imported_model, safetensors_file, tokenizer_json
from llamalet.convert.imported_model import FileTensor, ImportedModel, Reordered
from llamalet.convert.probes import TEXTS
from llamalet.errors import ConfigError, FormatError, TokenizerError, UsageError
from llamalet.files import refuse_odd, replacing, write_file
from llamalet.hf_names import (
    ADDED_TOKENS_JSON,
    CHAT_TEMPLATE_JINJA,
    CONFIG_JSON,
    GENERATION_CONFIG_JSON,
    MODEL_INDEX_JSON,
    MODEL_SAFETENSORS,
    SPECIAL_TOKENS_MAP_JSON,
    TOKENIZER_CONFIG_JSON,
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
)
from llamalet.model_file.quantize import to_bfloat16
from llamalet.model_file.tensors import Rows, row_blocks, tensor_specs
from llamalet.tokenizer import Tokenizer, declared
from llamalet.tokenizer.huggingface import json_object

NAMES = {
    "tok_embeddings": "model.embed_tokens.weight",
    "layers.*.attention_norm": "model.layers.*.input_layernorm.weight",
    "layers.*.attention.wq": "model.layers.*.self_attn.q_proj.weight",
    "layers.*.attention.wk": "model.layers.*.self_attn.k_proj.weight",
    "layers.*.attention.wv": "model.layers.*.self_attn.v_proj.weight",
    "layers.*.attention.wo": "model.layers.*.self_attn.o_proj.weight",
    "layers.*.ffn_norm": "model.layers.*.post_attention_layernorm.weight",
    "layers.*.feed_forward.w1": "model.layers.*.mlp.gate_proj.weight",
    "layers.*.feed_forward.w2": "model.layers.*.mlp.down_proj.weight",
    "layers.*.feed_forward.w3": "model.layers.*.mlp.up_proj.weight",
    "norm": "model.norm.weight",
    "output": "lm_head.weight",
}
# Our fields -> theirs.
FIELDS = {
    "dim": "hidden_size", "hidden_dim": "intermediate_size", "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads", "vocab_size": "vocab_size", "max_seq_len": "max_position_embeddings",
}  # fmt: skip
# Theirs -> the values with which the arithmetic is a plain Llama's, the default first. Those after model_type are other
# architectures', whose models must not run as something else.
PLAIN = {
    "hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,), "quantization_config": (None,),
    "partial_rotary_factor": (None, 1.0), "model_type": ("llama",),
    "attention_multiplier": (None,), "embedding_multiplier": (None, 1.0), "residual_multiplier": (None, 1.0),
    "logits_scaling": (None, 1.0), "logit_scale": (None, 1.0), "scale_emb": (None, 1.0), "scale_depth": (None,),
    "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,), "query_pre_attn_scalar": (None,),
    "clip_qkv": (None,), "use_qk_norm": (None, False), "no_rope_layers": (None,), "rope_interleave": (None, False),
    "num_local_experts": (None, 0), "num_experts": (None, 0),
}  # fmt: skip
WINDOWS = {"sliding_window": "sliding_attention", "attention_chunk_size": "chunked_attention"}
SCALING_FIELDS = {
    "factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
    "original_max_seq_len": "original_max_position_embeddings",
}  # fmt: skip
# The RoPE parameters that each way of scaling uses.
ROPE_FIELDS = {
    "default": (), "linear": ("factor",), "llama3": tuple(SCALING_FIELDS.values()),
    "longrope": ("short_factor", "long_factor", "factor", "attention_factor", "original_max_position_embeddings"),
}  # fmt: skip
NAMES_OF_FIELDS = FIELDS | {"n_kv_heads": "num_key_value_heads", "norm_eps": "rms_norm_eps"}  # for messages
DEFAULT_NORM_EPS = 1e-6
OWN_ROLES = ("bos_token", "eos_token")
# Our dtypes -> transformers' names of them; safetensors' are ours in capitals.
DTYPE_NAMES = {"f32": "float32", "bf16": "bfloat16"}

BESIDE_TOKENIZER = (TOKENIZER_MODEL, TOKENIZER_CONFIG_JSON, SPECIAL_TOKENS_MAP_JSON, ADDED_TOKENS_JSON)
WANTED = ("*.json", "*.safetensors", TOKENIZER_MODEL, "*.jinja")
UNWANTED = ("original/*", "onnx/*")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
READ = (
    CONFIG_JSON, MODEL_SAFETENSORS, MODEL_INDEX_JSON, TOKENIZER_JSON, *BESIDE_TOKENIZER, GENERATION_CONFIG_JSON,
    *TEMPLATE_FILES,
)  # fmt: skip
IGNORED = re.compile(r".*rotary_emb\.inv_freq")


# -- reading ----------------------------------------------------------------------------------------------------------


def read(name: str) -> ImportedModel:
    """Open a folder, or a repository on the Hub, which is downloaded first.

    Args:
        name: the folder, or the repository's ID, ORGANIZATION/NAME.

    Raises:
        FormatError: if it is damaged, or not a Llama model in safetensors.
        UsageError: if the repository does not exist, needs a login, or the Hub cannot be reached; or if the chat
            template cannot be read.
    """
    folder = Path(name)
    if not folder.is_dir():
        if not HUB_ID.fullmatch(name) or folder.exists():
            raise FormatError(f"{name}: neither a folder nor the ID of a repository on the Hub (ORGANIZATION/NAME)")
        folder = fetch(name)
    refuse_odd(companions(folder), FormatError)
    fields = strict.read_json(folder / CONFIG_JSON, FormatError)
    stored = _with_prefix(imported_model.unwrapped(str(folder), _stored_tensors(folder)))
    config = _read_config(str(folder / CONFIG_JSON), fields)
    tied, notes = _tie(str(folder / CONFIG_JSON), fields, stored)
    config = dataclasses.replace(config, tied=tied)
    if unused := _unused_rope_fields(fields):
        notes.append(unused)
    names = imported_model.expand(NAMES, config.n_layers)
    ours = {theirs: our for our, theirs in names.items()}
    found = {ours.get(theirs, theirs): tensor for theirs, tensor in stored.items() if not IGNORED.fullmatch(theirs)}
    imported_model.check_shapes(str(folder), config, {our: tensor.shape for our, tensor in found.items()}, names)
    tensors = {our: _reordered(our, tensor, config, (2, -1)) for our, tensor in found.items()}
    said = declared.Folder(folder, {CONFIG_JSON: fields})
    vocabulary, data, problems = _read_tokenizer(said, config.vocab_size)
    return ImportedModel(
        name=str(folder),
        config=config,
        tensors=tensors,
        stored=imported_model.stored_types(found.values()),
        tokenizer=vocabulary,
        tokenizer_data=data,
        tokenizer_problem="; ".join(problems) if vocabulary is None else "",
        chat_template=_chat_template(said),
        stop_tokens=said.stops,
        notes=tuple(notes) if vocabulary is None else (*notes, *problems),
    )


def companions(folder: Path) -> list[Path]:
    """Return where the files of a model are written, or looked for."""
    return [folder / name for name in READ]


def fetch(repository: str) -> Path:
    """Download a repository into the Hub library's cache and return its folder.

    Raises:
        UsageError: if that fails, with what to do.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise UsageError(
            f"{repository}: no such folder; fetching it from the Hub needs: pip install huggingface_hub"
        ) from None
    try:
        return Path(
            huggingface_hub.snapshot_download(repository, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED))
        )
    except errors.GatedRepoError:
        raise UsageError(
            f"{repository}: is gated: accept its licence at https://huggingface.co/{repository}, then log in: "
            f"hf auth login (older versions: huggingface-cli login)"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UsageError(
            f"{repository}: no such folder here, and no such repository on the Hub that you may see; if it is private: "
            f"hf auth login (older versions: huggingface-cli login)"
        ) from None
    except Exception as error:  # the library raises its HTTP client's, the system's and its own
        what = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UsageError(
            f"{repository}: no such folder here, and the Hub cannot be reached: {what}; type the command again with a "
            f"network (if it asks for a login: hf auth login, or huggingface-cli login)"
        ) from None


def _read_config(name: str, fields: Mapping[str, Any]) -> ModelConfig:
    """Return the config that config.json describes, with the RoPE parameters in the old spelling or the new one.

    Whether the output is tied depends on the tensors too: see `_tie`.

    Raises:
        FormatError: if it is another architecture, or a variant of Llama that cannot be run here.
    """
    _, rope = _rope_fields(name, fields)
    for key, plain in PLAIN.items():
        value = fields.get(key, plain[0])
        if key == "partial_rotary_factor":
            value = rope.get(key, value)
        if not any(value == other and isinstance(value, bool) is isinstance(other, bool) for other in plain):
            wanted = "without it" if plain[0] is None else f"with {plain[0]!r}"
            raise FormatError(f"{name}: {key} is {reprlib.repr(value)}: only Llama models {wanted} can be read")
    if missing := [theirs for theirs in FIELDS.values() if fields.get(theirs) is None]:
        raise FormatError(f"{name}: has no {', '.join(missing)}")
    values = {ours: fields[theirs] for ours, theirs in FIELDS.items()}
    config = imported_model.build_config(
        name,
        values
        | {
            "n_kv_heads": fields.get("num_key_value_heads"),
            "head_dim": fields.get("head_dim"),
            "norm_eps": fields.get("rms_norm_eps", DEFAULT_NORM_EPS),
            "rope_theta": rope.get("rope_theta", fields.get("rope_theta")),
            "rope_scaling": None,
        },
        NAMES_OF_FIELDS,
    )
    _check_windows(name, fields, config)
    try:
        return dataclasses.replace(config, rope_scaling=_read_scaling(name, fields, config.max_seq_len))
    except ConfigError as error:
        raise FormatError(f"{name}: {error}") from None


def _check_windows(name: str, fields: Mapping[str, Any], config: ModelConfig) -> None:
    """Raise a FormatError if a layer attends to less than the context."""
    harmless = ["full_attention"]
    for key, kind in WINDOWS.items():
        window = fields.get(key)
        if window is None or key == "sliding_window" and fields.get("use_sliding_window") is False:
            continue
        if not isinstance(window, int | float) or isinstance(window, bool) or not window >= config.max_seq_len:
            what = f"{key} is {reprlib.repr(window)}: only windows"
            raise FormatError(f"{name}: {what} of at least max_position_embeddings, {config.max_seq_len}, can be read")
        harmless.append(kind)
    kinds = fields.get("layer_types")
    if kinds is None:
        return
    if not isinstance(kinds, list) or len(kinds) != config.n_layers:
        what = f"must be a list with a kind for each of the {config.n_layers} layers"
        raise FormatError(f"{name}: layer_types is {reprlib.repr(kinds)}: {what}")
    for layer, kind in enumerate(kinds):
        if kind not in harmless:
            what = f"only {' or '.join(map(repr, harmless))} can be read"
            raise FormatError(f"{name}: layer_types[{layer}] is {reprlib.repr(kind)}: {what}")


def _rope_fields(name: str, fields: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the RoPE parameters and their key; if both spellings are there, the old one counts for transformers."""
    key = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = fields.get(key) or {}
    if not isinstance(rope, dict):
        raise FormatError(f"{name}: {key} is {reprlib.repr(rope)}: must be an object")
    if nested := [kind for kind, value in rope.items() if isinstance(value, dict)]:
        raise FormatError(f"{name}: {key} has an object {nested[0]!r}: only the same for all layers can be read")
    return key, rope


def _rope_type(rope: Mapping[str, Any]) -> Any:
    """Return how RoPE is scaled, by transformers' name."""
    kind = rope.get("rope_type", rope.get("type"))
    return "default" if kind is None else kind


def _read_scaling(name: str, fields: Mapping[str, Any], max_seq_len: int) -> RopeScaling | None:
    """Return how RoPE is scaled.

    Raises:
        ConfigError: if a parameter is missing, of another type or out of range.
        FormatError: if it is scaled in a way that is not supported.

    Source: transformers, modeling_rope_utils.py.
    """
    key, rope = _rope_fields(name, fields)
    kind, factor = _rope_type(rope), rope.get("factor")
    if kind == "default":
        return None
    if kind == "linear":
        return None if factor == 1 and factor is not True else LinearScaling(factor=factor)  # type: ignore[arg-type]
    original = fields.get("original_max_position_embeddings", rope.get("original_max_position_embeddings", max_seq_len))
    if kind == "llama3":
        values = {ours: rope.get(theirs) for ours, theirs in SCALING_FIELDS.items()}
        return Llama3Scaling(**values | {"original_max_seq_len": original})  # type: ignore[arg-type]
    divisors = rope.get("short_factor")
    # Factors that depend on the length of the text, or scale attention too, are not supported.
    if kind == "longrope" and isinstance(divisors, list) and divisors == rope.get("long_factor"):
        if rope.get("attention_factor") == 1:
            return RopeDivisors(divisors=tuple(divisors))
    raise FormatError(
        f"{name}: {key} is of type {reprlib.repr(kind)}, factor {reprlib.repr(factor)}: only 'linear', 'llama3' and "
        f"'default' can be read, and 'longrope' if short_factor and long_factor are equal and attention_factor is 1"
    )


def _unused_rope_fields(fields: Mapping[str, Any]) -> str | None:
    """Return a note on RoPE parameters that have no effect, here as in transformers; None if there are none."""
    key, rope = _rope_fields("", fields)
    kind = _rope_type(rope)
    used = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *ROPE_FIELDS.get(kind, rope)}
    names = ", ".join(reprlib.repr(name) for name in sorted(rope.keys() - used))
    return f"{key} has {names}, which type {kind!r} does not use, here as in transformers" if names else None


def _with_prefix(stored: dict[str, FileTensor]) -> dict[str, FileTensor]:
    """Return tensors by LlamaForCausalLM's names; a LlamaModel, saved without the output, lacks their prefix."""
    prefix, _, embeddings = NAMES["tok_embeddings"].partition(".")
    if embeddings not in stored:
        return stored
    return {theirs if theirs == NAMES["output"] else f"{prefix}.{theirs}": tensor for theirs, tensor in stored.items()}


def _tie(name: str, fields: Mapping[str, Any], stored: dict[str, FileTensor]) -> tuple[bool, list[str]]:
    """Return whether the output is the embeddings, and notes; then only the embeddings stay in `stored`.

    A tied model may store either, or both.

    Source: transformers, modeling_utils.py, `tie_weights`.

    Raises:
        FormatError: if config.json does not say true or false.
    """
    tied = fields.get("tie_word_embeddings", False)
    if not isinstance(tied, bool | None):
        raise FormatError(f"{name}: tie_word_embeddings is {reprlib.repr(tied)}: must be true or false")
    embeddings, output = NAMES["tok_embeddings"], NAMES["output"]
    if output not in stored:
        return True, [] if tied else [f"{output} is missing: the output is tied to the embeddings"]
    if not tied:
        return False, []
    if embeddings in stored and not imported_model.same(stored[embeddings], stored[output]):
        return False, [f"{output} is not equal to the embeddings, so it is not tied to them, whatever config.json says"]
    stored[embeddings] = stored.pop(output)
    return True, []


def _stored_tensors(folder: Path) -> dict[str, FileTensor]:
    """Return the tensors of model.safetensors, or of all the files that the index names."""
    if (folder / MODEL_SAFETENSORS).is_file():
        return safetensors_file.read(folder / MODEL_SAFETENSORS)
    if not (folder / MODEL_INDEX_JSON).is_file():
        others = sorted(path.name for path in folder.glob("*.bin"))
        advice = f"; {others[0]} is PyTorch's format: save it again as safetensors with transformers" if others else ""
        raise FormatError(f"{folder}: has neither {MODEL_SAFETENSORS} nor {MODEL_INDEX_JSON}{advice}")
    table = strict.read_json(folder / MODEL_INDEX_JSON, FormatError).get("weight_map")
    index = folder / MODEL_INDEX_JSON
    if not isinstance(table, dict):
        raise FormatError(f"{index}: weight_map is {reprlib.repr(table)}: must be a table of tensors and files")
    for tensor, file in table.items():
        if not strict.is_file_name(file):
            raise FormatError(f"{index}: {tensor:.80} is in {reprlib.repr(file)}: must be a file beside it")
    tensors: dict[str, FileTensor] = {}
    for file in sorted(set(table.values())):
        if not (folder / file).is_file():
            raise FormatError(f"{folder / file}: is missing; {MODEL_INDEX_JSON} names it")
        tensors |= safetensors_file.read(folder / file)
    if lost := table.keys() - tensors.keys():
        raise FormatError(f"{folder}: {min(lost)} is in none of its files; {MODEL_INDEX_JSON} names it")
    return tensors


def _reordered(our: str, tensor: Rows, config: ModelConfig, pairs: tuple[int, int]) -> Rows:
    """Return a tensor with its rows in the other program's order, which differs for queries and keys.

    Args:
        our: our name of it.
        tensor: its rows.
        config: the model's shape.
        pairs: how `tensor` orders the RoPE pairs of a head: theirs is (2, -1), all first halves, then all second; ours
            is (-1, 2), pairs side by side.
    """
    n_heads = {"wq": config.n_heads, "wk": config.n_kv_heads}.get(our[-2:])
    if n_heads is None:
        return tensor
    return Reordered(tensor, np.arange(tensor.shape[0]).reshape(n_heads, *pairs).swapaxes(1, 2).ravel())


def _chat_template(folder: declared.Folder) -> str | None:
    """Return the chat template: a file of its own, or a field of tokenizer_config.json.

    It begins with the special tokens that it names but BOS and EOS: only these two go with a model otherwise.
    """
    try:
        found = (find_source(folder) or (None,))[0]
    except NoDefault:  # only a chat needs one
        found = None
    known = folder.template_variables if found else None
    used = {role: name for role, name in (known or {}).items() if role not in OWN_ROLES and role in str(found)}
    # The empty text keeps a line end that a template begins with: one right behind a block would be removed.
    sets = "".join(f"{{% set {role} = {json.dumps(name)} %}}" for role, name in used.items())
    return f"{sets}{{{{ '' }}}}{found}" if sets else found


def _read_tokenizer(folder: declared.Folder, vocab_size: int) -> tuple[Tokenizer | None, bytes, tuple[str, ...]]:
    """Return the tokenizer, its file's bytes, and what is wrong with files that cannot be used.

    Where tokenizer.json and SentencePiece's tokenizer.model give the same ids, the latter is taken: it is the original,
    and llama2.c's layout can hold it. Tokens that other files add to a tokenizer.model make it a tokenizer.json.
    """
    model_path, json_path = folder.path / TOKENIZER_MODEL, folder.path / TOKENIZER_JSON
    try:
        folder.check()
    except TokenizerError as error:
        return None, b"", (str(error),)
    model, json_file = (imported_model.find_tokenizer([path], vocab_size, folder) for path in (model_path, json_path))
    if model[0] is None or json_file[0] is not None and not _are_alike(model[0], json_file[0]):
        vocabulary, data, problems = json_file
        if vocabulary is not None:
            return vocabulary, data, ()
        # The ids of a tokenizer.model are asked of a tokenizer.json beside it, whose own problem is said once.
        return None, b"", tuple(said for said in model[2] if not said.startswith(f"{json_path}:")) + problems
    if json_path.is_file() or folder.all_names <= {*model[0].special, *model[0].added}:
        return model
    try:
        built = tokenizer_json.build(model[0], model[1])
        data, fields = folder.completed(built, json_object(built, str(model_path)), vocab_size)
        found = tokenizer.parse(data, str(model_path), vocab_size, fields=fields)
        return found.with_ids(folder.special_ids(model_path, found, None)), data, ()
    except (TokenizerError, UsageError) as error:
        return None, b"", (f"tokens added to its tokenizer cannot be used: {error}",)


def _are_alike(model: Tokenizer, other: Tokenizer) -> bool:
    """Return whether two tokenizers have the same tokens and cut difficult texts alike."""
    texts = (*TEXTS, *(f"a {name}b{name} " for name in model.special))
    return model.has_same_tokens(other) and all(
        model.encode(text, special=True) == other.encode(text, special=True) for text in texts
    )


# -- writing ----------------------------------------------------------------------------------------------------------


def write(folder: Path, source: ImportedModel, dtype: str = "f32", *, keep: Path | None = None) -> None:
    """Write a model and its tokenizer as a folder that transformers' Auto classes load.

    Args:
        folder: created if missing, and then completely or not at all; existing files are replaced one by one.
        source: the model; its tensors are read once, in blocks.
        dtype: f32, or bf16, rounded to nearest.
        keep: a file that is never removed: the tokenizer that the user named.

    Raises:
        ConfigError: if the folder holds another model's files, or transformers would refuse the model.
        TokenizerError: if transformers would encode texts differently.
        NonFiniteError: if a weight is NaN or infinite.
    """
    _check(folder, source.config)
    config = source.config
    files = _tokenizer_files(source)
    names = imported_model.expand(NAMES, config.n_layers)
    ours = {theirs: our for our, theirs in names.items()}
    layout = {names[spec.name]: (dtype.upper(), spec.shape) for spec in tensor_specs(1, config)}

    def blocks(theirs: str) -> Iterator[NDArray[Any]]:
        our = ours[theirs]
        for block in row_blocks(theirs, _reordered(our, source.tensors[our], config, (-1, 2))):
            yield block if dtype == "f32" else to_bfloat16(block)

    files[CONFIG_JSON] = _json(config_fields(source, dtype))
    files[GENERATION_CONFIG_JSON] = _json(
        {"_from_model_config": False, **_special_ids(source), "do_sample": True, "top_p": 0.9}
    )
    is_new, replaces = not folder.exists(), (folder / CONFIG_JSON).is_file()
    try:
        with replacing(folder / MODEL_SAFETENSORS) as file:
            file.writelines(safetensors_file.encode(layout, blocks, {"format": "pt"}))
        for name, data in files.items():
            write_file(folder / name, data)
        tokenizer_files = [folder / name for name in (TOKENIZER_JSON, *BESIDE_TOKENIZER) if name not in files]
        if source.tokenizer is not None:
            imported_model.remove_stale(tokenizer_files, keep)
        elif replaces:
            imported_model.set_aside(tokenizer_files, keep)
        # Any in TEMPLATE_FOLDER counts before the one that was written into tokenizer_config.json.
        templates = [folder / CHAT_TEMPLATE_JINJA, *sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))]
        if source.tokenizer is not None and source.chat_template is not None:
            imported_model.remove_stale(templates, keep)
        elif replaces:
            imported_model.set_aside(templates, keep)
    except BaseException:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _check(folder: Path, config: ModelConfig) -> None:
    """Raise a ConfigError if transformers would refuse the model, or the folder holds something else.

    The new files would mix with that or overwrite it.
    """
    if config.dim % config.n_heads:
        raise ConfigError(
            f"dim={config.dim}: transformers wants a multiple of n_heads={config.n_heads}, even with another head_dim"
        )
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; a Hugging Face model is a folder")
    foreign = ("checkpoints", "state.json", MODEL_INDEX_JSON, imported_model.META_PARAMS)
    others = [path.name for path in folder.glob("*") if path.name in foreign or path.suffix in (".bin", ".gguf", ".pt")]
    if others:
        advice = "name another folder for the export, and a run to export with"
        raise ConfigError(f"{folder}: holds {others[0]}, another model's; {advice} --checkpoint={folder}")


def config_fields(source: ImportedModel, dtype: str) -> dict[str, Any]:
    """Return config.json's fields, the RoPE parameters in both spellings: transformers before 5 reads the old one."""
    c, scaling = source.config, scaling_fields(source.config)
    old: Mapping[str, Any] | None = scaling
    if c.rope_scaling is None:
        old = None
    elif isinstance(c.rope_scaling, LinearScaling):  # transformers before 4.43 knows it by this spelling alone
        old = {"type": "linear", "factor": c.rope_scaling.factor}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(c, ours) for ours, theirs in FIELDS.items()},
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": old,
        "rope_parameters": {"rope_theta": c.rope_theta, **scaling},
        "tie_word_embeddings": c.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        **_special_ids(source),
        "dtype": DTYPE_NAMES[dtype],
        "torch_dtype": DTYPE_NAMES[dtype],
    }


def scaling_fields(config: ModelConfig) -> dict[str, Any]:
    """Return transformers' RoPE parameters but rope_theta."""
    match config.rope_scaling:
        case None:
            return {"rope_type": "default"}
        case LinearScaling(factor=factor):
            return {"rope_type": "linear", "factor": factor}
        case Llama3Scaling() as scaling:
            return {"rope_type": "llama3"} | {theirs: getattr(scaling, ours) for ours, theirs in SCALING_FIELDS.items()}
        case RopeDivisors(divisors=divisors):  # one list for texts of any length, and attention as it is
            factors = {"short_factor": list(divisors), "long_factor": list(divisors)}
            rest = {"factor": 1.0, "attention_factor": 1.0, "original_max_position_embeddings": config.max_seq_len}
            return {"rope_type": "longrope"} | factors | rest


def _special_ids(source: ImportedModel) -> dict[str, Any]:
    """Return the ids that begin and end texts, if they are known."""
    ids = None if source.tokenizer is None else source.tokenizer.ids
    stops = source.stop_tokens
    if not stops and ids is not None:
        stops = tuple(ids.ordered_stops)
    ends = {} if not stops else {"eos_token_id": stops[0] if len(stops) == 1 else list(stops)}
    return ends if ids is None else {"bos_token_id": ids.bos, **ends}


def _tokenizer_files(source: ImportedModel) -> dict[str, bytes]:
    """Return the tokenizer's files by name; none if the model has no tokenizer."""
    vocabulary, data = source.tokenizer, source.tokenizer_data
    if vocabulary is None:
        return {}
    files = {
        TOKENIZER_JSON: tokenizer_json.build(vocabulary, data),
        TOKENIZER_CONFIG_JSON: _json(
            tokenizer_json.config(vocabulary, source.config.max_seq_len, source.chat_template)
        ),
    }
    if isinstance(vocabulary, tokenizer.SentencePieceTokenizer):
        files[TOKENIZER_MODEL] = data
    return files


def _json(fields: Mapping[str, Any]) -> bytes:
    """Return a JSON file's bytes."""
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()
