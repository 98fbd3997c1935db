"""The raw binary (llamalet/model_file has its layout) and its tokenizer, as one more format to read and write."""

import dataclasses
from pathlib import Path

from llamalet import model_file, tokenizer
from llamalet.chat_template import read_template
from llamalet.config import Llama3Scaling
from llamalet.convert.imported_model import ImportedModel, remove_stale, set_aside
from llamalet.errors import ConfigError, FormatError, TokenizerError, UsageError
from llamalet.files import read_file, refuse_odd, write_file
from llamalet.hf_names import CHAT_TEMPLATE_JINJA
from llamalet.model_file.companions import (
    SUFFIXES,
    beside,
    load_tokenizer,
    special_ids,
    special_ids_path,
    tokenizer_paths,
)
from llamalet.model_file.reader import ModelFile
from llamalet.model_file.tensors import BinTensor, Rows
from llamalet.tokenizer import Llama3Tokenizer, SpecialIds, Tokenizer, declared, ids_file
from llamalet.tokenizer.huggingface import json_object
from llamalet.tokenizer.llama2 import check_for_llama2c

TEMPLATE_SUFFIX = f".{CHAT_TEMPLATE_JINJA}"


def read(name: str, *, rope_theta: float | None = None, rope_scaling: Llama3Scaling | None = None) -> ImportedModel:
    """Open a model file of any version, llama2.c's or ours.

    Args:
        name: its path.
        rope_theta: see `llamalet.model_file.read`.
        rope_scaling: how RoPE is scaled, for a file that does not say.

    Raises:
        FormatError: if the file breaks a rule of its format, or does not say its rope_theta.
        ConfigError: if either is given for a file that says it.
        TokenizerError: if what begins and ends texts stands next to it and is damaged.
        UsageError: if the chat template next to it cannot be read.
    """
    file = model_file.read(name, rope_theta=rope_theta)
    config = file.config
    if rope_scaling is not None:
        if file.header.payload_crc32 is not None:
            raise ConfigError(f"rope_scaling={rope_scaling.factor:g}: {name} says how RoPE is scaled; leave it out")
        config = dataclasses.replace(config, rope_scaling=rope_scaling)
    vocabulary, problem, data = None, "", file.tokenizer_data or b""
    try:
        vocabulary = load_tokenizer(file)
        if not data and (found := beside(name)) is not None:
            data = read_file(found)
    except (TokenizerError, UsageError) as error:
        problem = str(error)
    stated = special_ids(file)
    notes: tuple[str, ...] = ()
    if file.group_size is not None:
        notes = (f"its weights were already rounded to {file.dtype}; the export keeps that rounding",)
    template = Path(name).with_suffix(TEMPLATE_SUFFIX)
    refuse_odd([template], FormatError)
    return ImportedModel(
        name=name,
        chat_template=read_template(template) if template.is_file() else None,
        config=config,
        tensors=tensors_of(file),
        stored=frozenset({file.dtype.upper()}),
        tokenizer=vocabulary,
        tokenizer_data=data,
        tokenizer_problem=problem,
        tokenizer_sha256=file.tokenizer_sha256,
        stop_tokens=() if stated is None else tuple(sorted(stated.stops)),
        notes=notes,
    )


def companions(path: Path) -> list[Path]:
    """Return where the files that go with NAME.bin are written, or looked for."""
    return [*tokenizer_paths(path).values(), special_ids_path(path), path.with_suffix(TEMPLATE_SUFFIX)]


def ids_to_state(source: ImportedModel, version: int) -> SpecialIds | None:
    """Return what begins and ends a model's texts, if its tokenizer alone would say something else.

    Inside version 3 a tokenizer says what its names tell; next to the others it is a file like any other.
    """
    if source.tokenizer is None:
        stops = frozenset(source.stop_tokens)
        return SpecialIds(bos=None, eos=None, prefix=(), stops=stops) if stops else None
    alone = source.tokenizer.file_ids
    if version < 3:
        is_json = source.tokenizer.suffix == "json"
        fields = json_object(source.tokenizer_data, source.name) if is_json else None
        alone = declared.ids_alone(source.tokenizer, fields, source.name)
    return None if source.tokenizer.ids == alone else source.tokenizer.ids


def llama2c_problem(vocabulary: Tokenizer) -> str | None:
    """Return why llama2.c's programs cannot use a vocabulary, or None if they can."""
    if isinstance(vocabulary, Llama3Tokenizer):  # for its forks
        return None
    try:
        check_for_llama2c(vocabulary, "its tokenizer")
    except TokenizerError as error:
        return str(error)
    return None


def tensors_of(file: ModelFile) -> dict[str, Rows]:
    """Return a model file's tensors, converted to float32 on demand."""
    return {name: BinTensor(tensor) for name, tensor in file.tensors.items()}


def write(
    path: str | Path,
    source: ImportedModel,
    version: int,
    *,
    dtype: str | None = None,
    force: bool = False,
    keep: Path | None = None,
) -> ModelFile:
    """Write a model file and its tokenizer.

    Version 3 has the tokenizer inside. The other versions get it next to them, unchanged, as NAME.tokenizer.SUFFIX, and
    for llama2.c as NAME.tokenizer.bin too, if that layout can hold it; what begins and ends texts goes into
    NAME.generation_config.json, unless the tokenizer says the same. The chat template goes into
    NAME.chat_template.jinja. If NAME.bin existed, what else is next to it belongs to the model that was replaced.

    Args:
        path: NAME.bin, the file to make or replace.
        source: the model; its tensors are read once, in blocks.
        version: 0 to 3.
        dtype: see `llamalet.model_file.write`.
        force: see `llamalet.model_file.write`.
        keep: a file that is never removed: the tokenizer that the user named.

    Raises:
        ConfigError: if the version cannot hold the model.
        NonFiniteError: if a weight is NaN or infinite.
    """
    path, vocabulary = Path(path), source.tokenizer
    replaces = path.is_file()
    sha256 = None if vocabulary is None else vocabulary.sha256
    inside = (vocabulary.suffix, source.tokenizer_data) if vocabulary is not None and version == 3 else None
    ids = ids_to_state(source, version)
    written = model_file.write(
        path, version, source.config, source.tensors, dtype=dtype, tokenizer_sha256=sha256, tokenizer=inside,
        special_ids=ids if version == 3 else None, force=force,
    )  # fmt: skip
    if inside is None:
        _write_tokenizer(path, source, replaces, keep)
    if ids is not None and version < 3:
        write_file(special_ids_path(path), ids_file.ids_json(ids))
    else:
        remove_stale([special_ids_path(path)], keep)
    if source.chat_template is not None:
        write_file(path.with_suffix(TEMPLATE_SUFFIX), source.chat_template.encode())
    elif replaces:
        set_aside([path.with_suffix(TEMPLATE_SUFFIX)], keep)
    return written


def _write_tokenizer(path: Path, source: ImportedModel, replaces: bool, keep: Path | None) -> None:
    """Write a model's tokenizer next to its file, and see to those of the model that this one replaces."""
    paths = tokenizer_paths(path)
    written = set()
    if source.tokenizer is not None:
        suffix = source.tokenizer.suffix
        if llama2c_problem(source.tokenizer) is None:
            tokenizer.write_bin(paths["bin"], source.tokenizer, source.config.vocab_size)
            written.add("bin")
        if suffix != "bin":
            write_file(paths[suffix], source.tokenizer_data)
            written.add(suffix)
        remove_stale([paths[earlier] for earlier in SUFFIXES[: SUFFIXES.index(suffix)]], keep)
    if replaces:
        set_aside([paths[suffix] for suffix in SUFFIXES if suffix not in written], keep)
