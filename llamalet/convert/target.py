"""What a conversion writes: its format, version and dtype, checked together, and the writing itself."""

import dataclasses
import functools
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llamalet import model_file
from llamalet.config import ModelConfig, rope_frequencies
from llamalet.convert import bin_file, formats, gguf_file, huggingface
from llamalet.convert.imported_model import ImportedModel, Reported, difference, rounding_losses
from llamalet.convert.probes import TEXTS, check_same
from llamalet.errors import ConfigError, DiskError, TokenizerError
from llamalet.files import check_name, check_writable, refuse_odd
from llamalet.model_file.companions import load_tokenizer
from llamalet.model_file.header import DTYPES, LLAMA2C
from llamalet.model_file.reader import ModelFile
from llamalet.tokenizer import BOS_ID, Tokenizer, load

REMEDIES = "name its tokenizer with --tokenizer FILE, or write the model without one: --no-tokenizer"
VERSIONS = (0, 1, 2, 3)
DEFAULT_NAMES = {0: "model_v0.bin", 1: "model.bin", 2: "model_q8.bin"}
SUFFIXES = {".bin": "bin", ".gguf": "gguf"}
FORMAT_DTYPES = {"bin": DTYPES, "hf": tuple(huggingface.DTYPE_NAMES), "gguf": tuple(gguf_file.DTYPES)}
# How far rounding to a dtype may move a matrix, as a share of its root mean square: a bit less than the last bit of
# the type; for blocks of 32 with a scale, about three times the largest value observed.
ROUNDING = {"f32": 0.0, "bf16": 2.0**-8, "f16": 2.0**-10, "q8_0": 0.02, "q4_0": 0.3}
# Stored types whose numbers have no scales in common: they were not rounded in groups.
UNROUNDED = {"F64", "F32", "F16", "BF16"}
# How far float32 may round a number of the config, as a share of it.
FLOAT32_ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A file or folder to write.

    Attributes:
        out: where; None: a name that says what it is.
        named_format: bin, hf or gguf; None: what the ending of `out` says, or bin.
        named_version: of a .bin; None: 3 if there is a dtype, else 1.
        dtype: of the weights, one of the format's; None: its default.
        without_tokenizer: whether to write no tokenizer, although the format should have one.
    """

    out: str | None
    named_format: str | None = None
    named_version: int | None = None
    dtype: str | None = None
    without_tokenizer: bool = False

    def __post_init__(self) -> None:
        """Raise a ConfigError about a value or combination that means nothing."""
        named, version = self.named_format, self.named_version
        ending = "" if self.out is None else Path(self.out).suffix
        if version is not None and version not in VERSIONS:
            raise ConfigError(f"version={version}: must be one of {', '.join(map(str, VERSIONS))}")
        if named is not None and named not in FORMAT_DTYPES:
            raise ConfigError(f"format={named}: must be one of {', '.join(FORMAT_DTYPES)}")
        if self.out == "":
            raise ConfigError("out='': names no file or folder")
        if self.out is not None and self.out.endswith("/") and self.format != "hf":
            raise ConfigError(f"out={self.out}: is the name of a folder, and a .{self.format} is a file")
        if named is None and ending not in SUFFIXES and ending[1:2].isalpha():
            raise ConfigError(f"out={self.out}: must end in .bin or .gguf; for a folder of this name add --format=hf")
        if self.out is not None and named is not None and SUFFIXES.get(ending, "hf") != named:
            if named == "hf" or ending in SUFFIXES:
                raise ConfigError(f"format={named}: OUT is {self.out}; leave one of them out")
            raise ConfigError(f"out={self.out}: must end in .{named}")
        if self.dtype is not None and self.dtype not in FORMAT_DTYPES[self.format]:
            dtypes = ", ".join(FORMAT_DTYPES[self.format])
            raise ConfigError(f"dtype={self.dtype}: must be one of {dtypes} in a {self.format}")
        if version is not None and self.format != "bin":
            raise ConfigError(f"version={version}: only a .bin has versions, and OUT is {self.out}")
        if self.dtype is not None and version not in (None, 3):
            raise ConfigError(f"dtype={self.dtype}: version {version} has one dtype; leave out --dtype or --version")

    def check_writable(self) -> None:
        """Check that what is to be written can be, before a model is downloaded or read.

        Raises:
            ConfigError: if something else is in its place.
            DiskError: if its folder cannot be written to, or something else is in the place of a file with it.
            UsageError: if the name is not allowed (check_name).
        """
        if self.out is not None:
            path = Path(self.out)
            check_name(path)
            self.check_place(path)
            check_writable(path if self.format == "hf" else path.parent)

    def check_place(self, path: Path) -> None:
        """Check that only what would be replaced is at `path`, a file or with hf a folder, and where its files go.

        Raises:
            ConfigError: if something else is at `path`.
            DiskError: if something else is in the place of a file that goes with it.
        """
        if path.exists() and not (path.is_dir() if self.format == "hf" else path.is_file()):
            what = "a folder" if path.is_dir() else "a file" if path.is_file() else "a pipe or a device"
            wanted = "a Hugging Face model is a folder" if self.format == "hf" else f"a .{self.format} is a file"
            raise ConfigError(f"{path}: is {what}; {wanted}")
        companions = {"bin": bin_file.companions, "hf": huggingface.companions}.get(self.format)
        if companions is not None:
            refuse_odd(companions(path), DiskError)

    @property
    def format(self) -> str:
        """The format to write: bin, hf or gguf."""
        if self.named_format is not None:
            return self.named_format
        return "bin" if self.out is None else SUFFIXES.get(Path(self.out).suffix, "hf")

    @property
    def version(self) -> int:
        """The version of the .bin to write."""
        if self.named_version is not None:
            return self.named_version
        return 1 if self.dtype is None else 3

    def path(self, folder: Path) -> Path:
        """Return the file or folder to write, in `folder` if it was not named."""
        if self.out is not None:
            return Path(self.out)
        if self.format != "bin":
            return folder / {"hf": "model_hf", "gguf": "model.gguf"}[self.format]
        return folder / (DEFAULT_NAMES[self.version] if self.version < 3 else f"model_v3_{self.dtype or 'q8'}.bin")


def describe(c: ModelConfig) -> str:
    """Return a model's shape as a line."""
    scaling = "" if c.rope_scaling is None else f", {c.rope_scaling}"
    return (
        f"{c.n_params:,} parameters, dim {c.dim}, {c.n_layers} layers, {c.n_heads} heads of {c.head_dim}, "
        f"{c.n_kv_heads} kv heads, vocabulary {c.vocab_size}, context {c.max_seq_len}, rope_theta {c.rope_theta:g}"
        f"{scaling}"
    )


def with_tokenizer(source: ImportedModel, target: Target, named: Path | None) -> ImportedModel:
    """Return a model with the tokenizer that is to be written: the one at `named`, its own, or none.

    Raises:
        ConfigError: if one is named and none is wanted.
        TokenizerError: if the named one is damaged, or another model's.
    """
    if named is not None and target.without_tokenizer:
        raise ConfigError(f"tokenizer={named}: --no-tokenizer writes none; leave one of them out")
    if target.without_tokenizer:
        return formats.without_tokenizer(source)
    return source if named is None else formats.with_tokenizer(source, named)


def write(source: ImportedModel, target: Target, path: Path, *, keep: Path | None = None, force: bool = False) -> None:
    """Write a model and its tokenizer, and print what was read and written.

    Args:
        source: the model.
        target: what to write.
        path: where.
        keep: a file that is never removed: the tokenizer that the user named.
        force: write version 0 even if it loses the norm_eps.

    Raises:
        ConfigError: if the format cannot hold the model, or `path` is the model itself, or nothing to replace.
        TokenizerError: if the model's tokenizer cannot be read, or the format cannot hold it.
        NonFiniteError: if a weight is NaN or infinite.
    """
    target.check_place(path)
    if path.exists() and any(path.samefile(file) for file in source.files or (source.name,)):
        raise ConfigError(f"{path}: is the model to export, which would be lost; name another file or folder")
    if problem := _tokenizer_problem(source, target):
        raise TokenizerError(f"{source.name}: {problem}; {REMEDIES}")
    print(f"{source.name}: {describe(source.config)}")
    for note in source.notes:
        print(f"note: {note}")
    start = time.perf_counter()
    watched = dataclasses.replace(source, tensors=Reported(source.tensors, source.config))
    try:
        what, notes = _write(watched, target, path, keep, force)
    except TokenizerError as error:
        raise TokenizerError(f"{error}; {REMEDIES}") from None
    files = path.iterdir() if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files if file.is_file())
    print(f"wrote {path}: {what}, {size:,} bytes in {time.perf_counter() - start:.2f} s")
    if source.tokenizer is None and not target.without_tokenizer:
        notes.append("without a tokenizer, because the model has none; name one with --tokenizer")
    for note in notes:
        print(f"note: {note}")
    if target.format == "bin":
        print(f"read back: every byte is equal{_same_ids(source, load_tokenizer(model_file.read(path)), path)}")


def _tokenizer_problem(source: ImportedModel, target: Target) -> str:
    """Return why a model cannot be written with its tokenizer; empty if it can, and for one that never had any."""
    if source.tokenizer is not None or target.without_tokenizer:
        return ""
    if source.tokenizer_problem:
        return f"its tokenizer cannot be taken along: {source.tokenizer_problem}"
    return "llama.cpp needs a tokenizer inside a GGUF file, and the model has none" if target.format == "gguf" else ""


def _write(source: ImportedModel, target: Target, path: Path, keep: Path | None, force: bool) -> tuple[str, list[str]]:
    """Write a model; return what was written, and what the user should know."""
    dtype = target.dtype or "f32"
    if target.format == "hf":
        huggingface.write(path, source, dtype, keep=keep)
        return f"hf, {dtype}", []
    if target.format == "gguf":
        return f"gguf, {dtype}", gguf_file.write(path, source, dtype)
    written = bin_file.write(path, source, target.version, dtype=target.dtype, keep=keep, force=force)
    kind = written.dtype if written.group_size is None else f"{written.dtype} in groups of {written.group_size}"
    notes = _rounded_again(source, written)
    if target.version < 3 and (lost := model_file.llama2c_differences(source.config)):
        notes.append(f"llama2.c's programs will compute something else from this file: {', '.join(lost)}")
    if target.version < 3 and source.tokenizer is not None:
        notes += _llama2c_notes(source.tokenizer, path.with_suffix(".tokenizer.bin"))
    return f"version {target.version}, {kind}", notes


def _rounded_again(source: ImportedModel, written: ModelFile) -> list[str]:
    """Return a note on what it cost to round weights a second time, if they came rounded and were."""
    types = sorted(source.stored - UNROUNDED)
    if not types or written.group_size is None:
        return []
    losses = rounding_losses(source.tensors, bin_file.tensors_of(written))
    worst = max(losses, key=lambda name: losses[name])
    if not losses[worst]:
        return []
    mean = math.sqrt(sum(loss**2 for loss in losses.values()) / len(losses))
    better = "; --dtype q8 adds far less" if written.dtype == "q4" else "; --dtype bf16 adds next to nothing"
    return [
        f"its weights were {', '.join(types)} and are now rounded again, to {written.dtype}: off by another {mean:.2%} "
        f"of their root mean square ({worst}, the worst: {losses[worst]:.2%}){better}"
    ]


def _same_ids(source: ImportedModel, found: Tokenizer | None, path: Path, problem: str = "") -> str:
    """Return in words that the tokenizer that was written gives the same ids as the model's own; nothing without one.

    Raises:
        TokenizerError: if it does not.
    """
    if source.tokenizer is None:
        return ""
    if found is None:
        raise TokenizerError(f"{path}: the tokenizer that was written cannot be read: {problem}; do not use this file")
    return f", and {check_same(source.tokenizer, found, str(path))} texts give the same ids"


def _llama2c_notes(vocabulary: Tokenizer, path: Path) -> list[str]:
    """Return what llama2.c's programs do differently with a vocabulary, whose tokenizer.bin may be at `path`."""
    if problem := bin_file.llama2c_problem(vocabulary):
        return [f"llama2.c's programs cannot read texts with it: {problem}"]
    notes = []
    theirs = load(path)
    if (text := next((text for text in TEXTS if theirs.encode(text) != vocabulary.encode(text)), None)) is not None:
        counts = f"{len(theirs.encode(text))} tokens, this model into {len(vocabulary.encode(text))}"
        notes.append(f"llama2.c's programs cut {text!r} into {counts}")
    if vocabulary.ids.prefix != (BOS_ID,):
        ours = ", ".join(map(str, vocabulary.ids.prefix)) or "nothing"
        notes.append(f"llama2.c's programs begin every text with token {BOS_ID}, this model with {ours}")
    return notes


def read_back(source: ImportedModel, target: Target, path: Path) -> bool:
    """Compare a Hugging Face folder or a GGUF file with what it was written from, print and return the result.

    Raises:
        TokenizerError: if the tokenizer in it gives other ids.
    """
    found = formats.read(target.format, str(path))
    ids = _same_ids(source, found.tokenizer, path, found.tokenizer_problem)
    off = difference(source.tensors, found.tensors)
    same = _compute_the_same(found.config, source.config) and off <= ROUNDING[target.dtype or "f32"]
    words = "every weight is equal" if not off else f"off by at most {off:.2%} of a matrix's root mean square"
    print(f"read back: {words}{ids}{'' if same else ', NOT what was meant'}")
    return same


def _compute_the_same(a: ModelConfig, b: ModelConfig) -> bool:
    """Return whether two configs mean the same arithmetic, up to the float32 numbers of GGUF.

    Formats say in different ways how RoPE is scaled, so its frequencies are compared.
    """
    shapes = [dataclasses.replace(c, norm_eps=LLAMA2C["norm_eps"], rope_theta=1.0, rope_scaling=None) for c in (a, b)]
    close = functools.partial(np.allclose, rtol=FLOAT32_ROUNDING, atol=0)
    return shapes[0] == shapes[1] and close(a.norm_eps, b.norm_eps) and close(rope_frequencies(a), rope_frequencies(b))
