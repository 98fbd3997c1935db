"""Every format that a model can come in: telling them apart, reading them, and opening any of them to run it.

A format's name is one of FORMATS, which are export.py's options and llamalet convert's --from. The readers
are imported when they are needed: a .bin needs none.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from llamalet import model_file, tokenizer
from llamalet.checks import choice, file_path
from llamalet.config import ModelConfig
from llamalet.convert.imported_model import META_PARAMS, ImportedModel, Reported, compact, llama3_scaling
from llamalet.errors import ConfigError, FormatError, TokenizerError
from llamalet.files import open_file, reading, refuse_odd
from llamalet.hf_names import CONFIG_JSON, MODEL_SAFETENSORS
from llamalet.model_file.checkpoint import MANIFEST, STATE, list_steps
from llamalet.model_file.companions import check_identity, load_tokenizer, no_tokenizer, stops_of
from llamalet.model_file.header import DTYPES
from llamalet.model_file.reader import ModelFile
from llamalet.tokenizer import Tokenizer

FORMATS = ("hf", "meta_llama", "llama2c", "gguf", "bin")
FILES = (".bin", ".gguf", ".pt", ".pth")
PYTORCH_STARTS = (b"PK", b"\x80\x02")  # of torch.save's files, new and old
GGUF_START = b"GGUF"


# What looks at a model's path, shape, tokenizer and the chat template inside it.
Check = Callable[[Path, ModelConfig, Tokenizer, str | None], object]


class OpenModel(NamedTuple):
    """A model to run.

    file: its weights as the runtime takes them: a model file, or the same in memory.
    tokenizer: its vocabulary; None if there is none that can be read.
    problem: what is missing, in a sentence, if there is no tokenizer.
    stop_ids: the ids that end a text.
    chat_template: the Jinja template inside the model, if it has one.
    stored: the types of its matrices before they were converted, like F16 or Q4_K; empty if they were not.
    """

    file: ModelFile
    tokenizer: Tokenizer | None
    problem: str
    stop_ids: frozenset[int]
    chat_template: str | None
    stored: str


def open_model(
    path: Path,
    *,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    verify: bool | None = None,
    check: Check | None = None,
) -> OpenModel:
    """Open a model in any format. A .bin is mapped, anything else is converted in memory, a block of rows at a time.

    Args:
        path: see `kind_of`.
        dtype: what the matrices become, one of DTYPES; None keeps the stored width: f32; bf16 for all 16-bit types;
            q8 for quantized ones, unless it is a .bin.
        tokenizer: the tokenizer's file; None takes the model's own.
        verify: whether to verify checksums: of a .bin's weights (None: of small files only) or a checkpoint's files.
        check: is called before any weights are converted; what it raises ends the opening. It needs a tokenizer.

    Raises:
        FormatError: if there is no model, it is damaged, or cannot be read.
        CheckpointError: the same for a checkpoint.
        TokenizerError: if the tokenizer is damaged, or another model's.
        ConfigError: on an unknown dtype.
        UsageError: if the format needs a library that is not installed.
    """
    dtype = None if dtype is None else choice("dtype", dtype, DTYPES)
    path = file_path("path", path)
    kind = kind_of(path)
    if kind == "bin":
        file = model_file.read(path, verify=verify)
        vocabulary, problem = load_tokenizer(file, tokenizer), no_tokenizer(path)
        stop_ids = stops_of(file) if vocabulary is None else vocabulary.stop_ids
        if check is not None:
            check(file.path, file.config, _present(vocabulary, problem), None)
        if dtype in (None, file.dtype):
            return OpenModel(file, vocabulary, problem, stop_ids, None, "")
        from llamalet.convert.bin_file import tensors_of

        source = ImportedModel(
            name=str(path), config=file.config, tensors=tensors_of(file), stored=frozenset({file.dtype.upper()})
        )
    else:
        if kind == "checkpoint":
            from llamalet.convert import checkpoint_file

            source = checkpoint_file.read(str(path), check=verify is True)
        else:
            source = read(kind, str(path))
        vocabulary = tokenizer_of(source, tokenizer)
        problem = f"{source.name}: has no tokenizer that can be read"
        problem += f": {source.tokenizer_problem}" if source.tokenizer_problem else ""
        problem += "; name one with --tokenizer"
        stop_ids = frozenset(source.stop_tokens) if vocabulary is None else vocabulary.stop_ids
        if check is not None:
            check(Path(source.name), source.config, _present(vocabulary, problem), source.chat_template)
    dtype = dtype or source.dtype
    tensors = Reported(source.tensors, source.config)
    file = model_file.in_memory(Path(source.name), source.config, tensors, dtype)
    stored = "" if source.stored == {dtype.upper()} else ", ".join(sorted(source.stored))
    return OpenModel(file, vocabulary, problem, stop_ids, source.chat_template, stored)


def _present(found: Tokenizer | None, problem: str) -> Tokenizer:
    """Return a tokenizer; raise a TokenizerError with the problem if there is none."""
    if found is None:
        raise TokenizerError(problem)
    return found


def tokenizer_of(source: ImportedModel, named: Path | None = None) -> Tokenizer | None:
    """Return the tokenizer at `named`, else the model's own; None if there is none.

    A named one brings its own BOS, while the model's texts end where they always do.

    Raises:
        TokenizerError: if it is damaged, or another model's.
    """
    if named is not None:
        source = with_tokenizer(source, named)
    found = source.tokenizer
    if found is not None:
        check_identity(found, str(named or source.name), source.name, source.tokenizer_sha256)
    return found


def read(kind: str, name: str, *, rope_theta: float | None = None, rope_scaling: float | None = None) -> ImportedModel:
    """Open a model to convert it.

    Args:
        kind: one of FORMATS, or checkpoint: that is verified, and of a run's folder the best valid one is taken.
        name: its path, or with hf the ID of a repository on the Hub.
        rope_theta: what the model was trained with, for llama2.c's files, which do not say.
        rope_scaling: the factor of Llama 3.1's RoPE scaling, for the same files.

    Raises:
        FormatError: if it is damaged or in another format.
        ConfigError: if the file itself says what is given.
        UsageError: if a library is missing, or the Hub refuses.
    """
    choice("kind", kind, ("checkpoint", *FORMATS))
    name = str(file_path("name", name))
    if kind not in ("llama2c", "bin") and (rope_theta is not None or rope_scaling is not None):
        raise ConfigError(f"rope_theta, rope_scaling: {name} says what they are; leave them out")
    from llamalet.convert import bin_file, checkpoint_file, gguf_file, huggingface, llama2c, meta_llama

    try:
        if kind in ("llama2c", "bin"):
            scaling = None if rope_scaling is None else llama3_scaling(rope_scaling)
            reader = llama2c.read if kind == "llama2c" and _is_pytorch(Path(name)) else bin_file.read
            return reader(name, rope_theta=rope_theta, rope_scaling=scaling)
        if kind == "checkpoint":
            return checkpoint_file.read(name, check=True)
        return {"hf": huggingface.read, "meta_llama": meta_llama.read, "gguf": gguf_file.read}[kind](name)
    except FormatError as error:
        if other := other_kind(kind, Path(name)):
            raise FormatError(f"{error}; it looks like --from={other} (export.py: --{other})") from None
        raise


def other_kind(kind: str, path: Path) -> str | None:
    """Return the format of a path, if that is certain and not `kind`."""
    try:
        found = kind_of(path)
    except FormatError:
        return None
    certain = found != "bin" or kind != "llama2c" and path.suffix == ".bin" and path.stat().st_size > 0
    return found if certain and found != kind else None


def with_tokenizer(source: ImportedModel, path: Path) -> ImportedModel:
    """Return a model with the tokenizer at `path` instead of its own."""
    vocabulary, data = compact(*tokenizer.read(path, source.config.vocab_size))
    check_identity(vocabulary, str(path), source.name, source.tokenizer_sha256)
    stops = source.stop_tokens or (source.tokenizer.stop_ids if source.tokenizer else ())
    if stops:
        vocabulary = vocabulary.with_stops(stops)
    return dataclasses.replace(source, tokenizer=vocabulary, tokenizer_data=data, tokenizer_problem="")


def without_tokenizer(source: ImportedModel) -> ImportedModel:
    """Return a model without its tokenizer; its texts end where they always did."""
    stops = source.stop_tokens or tuple(sorted(source.tokenizer.stop_ids) if source.tokenizer else ())
    return dataclasses.replace(source, tokenizer=None, tokenizer_data=b"", tokenizer_problem="", stop_tokens=stops)


def read_tokenizer(path: Path) -> tuple[Tokenizer, bytes]:
    """Return the vocabulary at `path`, or that of the model there, and its file.

    Raises:
        TokenizerError: if there is neither, it is damaged, or the model comes without a tokenizer.
        UsageError: if a library is missing.
    """
    try:
        return compact(*tokenizer.read(path))
    except TokenizerError as error:
        problem = error
    try:
        source = read(kind_of(path), str(path))
    except FormatError:
        raise problem from None
    if source.tokenizer is None:
        why = f" ({source.tokenizer_problem})" if source.tokenizer_problem else ""
        raise TokenizerError(f"{path}: a model without a tokenizer inside or beside it{why}; name the tokenizer itself")
    return source.tokenizer, source.tokenizer_data


def kind_of(path: Path) -> str:
    """Return the format of a path: checkpoint (a run's folder too), or one of FORMATS.

    Raises:
        FormatError: if there is no model, or a split GGUF file's name could be two.
    """
    path = file_path("path", path)
    if path.is_dir():
        refuse_odd((path / name for name in (CONFIG_JSON, META_PARAMS, MANIFEST, STATE)), FormatError)
        if (path / CONFIG_JSON).is_file():
            return "hf"
        if (path / META_PARAMS).is_file():
            return "meta_llama"
        if list_steps(path) or (path / MANIFEST).is_file() or (path / STATE).is_file():
            return "checkpoint"
        if (path / MODEL_SAFETENSORS).is_file():
            raise FormatError(
                f"{path}: holds {MODEL_SAFETENSORS} but no {CONFIG_JSON} (Hugging Face) and no {STATE} (a checkpoint)"
            )
        raise FormatError(
            f"{path}: holds no model: neither a checkpoint nor a run with checkpoints, no {CONFIG_JSON} "
            f"(Hugging Face), no {META_PARAMS} (Meta)"
        )
    if not path.is_file():
        from llamalet.convert.gguf_metadata import first_part
        from llamalet.convert.huggingface import HUB_ID

        if first_part(path) is not None:
            return "gguf"
        on_the_hub = HUB_ID.fullmatch(str(path)) and path.suffix not in FILES
        advice = f"; if it is one of the Hub: llamalet convert {path} NAME.bin --from=hf" if on_the_hub else ""
        if path.exists():
            raise FormatError(f"{path}: neither a regular file nor a folder, so no model")
        raise FormatError(f"{path}: no such model file or folder{advice}")
    if path.name == CONFIG_JSON or path.suffix == ".safetensors":
        raise FormatError(f"{path}: is one file of a Hugging Face model; name its folder: {path.parent}")
    if _is_pytorch(path):
        return "meta_llama" if (path.parent / META_PARAMS).is_file() else "llama2c"
    return "gguf" if _head(path) == GGUF_START else "bin"


def _is_pytorch(path: Path) -> bool:
    """Return whether a file is one of torch.save's."""
    return path.is_file() and _head(path).startswith(PYTORCH_STARTS)


def _head(path: Path) -> bytes:
    """Return a file's first 4 bytes."""
    with reading(path, FormatError), open_file(path) as file:
        return file.read(4)
