"""Every format that a model can come in, by the name of export.py's option."""

from pathlib import Path

from llamalet import tokenizer
from llamalet.convert import bin_file, gguf_file, huggingface, llama2c, meta_llama
from llamalet.convert.imported_model import Source, compact, llama3_scaling
from llamalet.errors import ConfigError, FormatError, TokenizerError
from llamalet.tokenizer import Tokenizer

FORMATS = ("hf", "meta_llama", "llama2c", "gguf", "bin")
FILES = (".bin", ".gguf", ".pt")
PYTORCH_STARTS = (b"PK", b"\x80\x02")  # of torch.save's files, new and old


def read(kind: str, name: str, *, rope_theta: float | None = None, rope_scaling: float | None = None) -> Source:
    """Open a model.

    Args:
        kind: one of FORMATS.
        name: its path, or with hf the ID of a repository on the Hub.
        rope_theta: what the model was trained with, for llama2.c's files, which do not say.
        rope_scaling: the factor of Llama 3.1's RoPE scaling, for the same files.

    Raises:
        FormatError: if it is damaged or of another kind.
        ConfigError: if the file says itself what is given.
        UsageError: if a library is missing, or the Hub does not give it.
    """
    if kind not in ("llama2c", "bin") and (rope_theta is not None or rope_scaling is not None):
        raise ConfigError(f"rope_theta, rope_scaling: {name} says what they are; leave them out")
    try:
        if kind in ("llama2c", "bin"):
            scaling = None if rope_scaling is None else llama3_scaling(rope_scaling)
            reader = llama2c.read if kind == "llama2c" and _is_pytorch(Path(name)) else bin_file.read
            return reader(name, rope_theta=rope_theta, rope_scaling=scaling)
        return {"hf": huggingface.read, "meta_llama": meta_llama.read, "gguf": gguf_file.read}[kind](name)
    except FormatError as error:
        if other := other_kind(kind, Path(name)):
            raise FormatError(f"{error}; it looks as if it were for --{other}") from None
        raise


def other_kind(kind: str, path: Path) -> str | None:
    """Return which of FORMATS a path is, if that is surely another one than `kind`."""
    try:
        found = kind_of(path)
    except FormatError:
        return None
    sure = found != "bin" or kind != "llama2c" and path.suffix == ".bin" and path.stat().st_size > 0
    return found if sure and found != kind else None


def read_tokenizer(path: Path) -> tuple[Tokenizer, bytes]:
    """Return a vocabulary and its file: the one at `path`, or that of the model there.

    Raises:
        TokenizerError: if neither is there, it is damaged, or the model comes without a tokenizer.
        UsageError: if a library is missing.
    """
    try:
        return compact(tokenizer.load(path), path.read_bytes())
    except TokenizerError as error:
        problem = error
    try:
        source = read(kind_of(path), str(path))
    except FormatError:
        raise problem from None
    if source.tokenizer is None:
        raise TokenizerError(f"{path}: a model without a tokenizer inside or beside it; name the tokenizer itself")
    return source.tokenizer, source.tokenizer_data


def kind_of(path: Path) -> str:
    """Return which of FORMATS a path is.

    Raises:
        FormatError: if it is none.
    """
    if path.is_dir():
        for kind, file in (("hf", huggingface.CONFIG), ("meta_llama", meta_llama.PARAMS)):
            if (path / file).is_file():
                return kind
        raise FormatError(
            f"{path}: holds no model: no checkpoint of a run, no {huggingface.CONFIG} (Hugging Face), no "
            f"{meta_llama.PARAMS} (Meta)"
        )
    if not path.is_file():
        on_the_hub = huggingface.HUB_ID.fullmatch(str(path)) and path.suffix not in FILES
        advice = f"; if it is one of the Hub: python export.py NAME.bin --hf {path}" if on_the_hub else ""
        raise FormatError(f"{path}: no such file or folder{advice}")
    if _is_pytorch(path):
        return "llama2c"
    return "gguf" if _head(path) == gguf_file.MAGIC else "bin"


def _is_pytorch(path: Path) -> bool:
    """Return whether a file is one of torch.save's."""
    return path.is_file() and _head(path).startswith(PYTORCH_STARTS)


def _head(path: Path) -> bytes:
    """Return a file's first 4 bytes."""
    with open(path, "rb") as file:
        return file.read(4)
