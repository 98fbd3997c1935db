"""The tokenizer of a model file: inside it or next to it."""

import os
from pathlib import Path

from llamalet import tokenizer
from llamalet.errors import TokenizerError
from llamalet.model_file.tensors import ModelFile
from llamalet.tokenizer import Tokenizer

# A tokenizer next to NAME.bin is NAME.tokenizer.SUFFIX. If there are several, the first of these is read: the more a
# format says, the earlier it comes.
SUFFIXES = ("model", "json", "tiktoken", "bin")


def beside(model_path: str | os.PathLike[str]) -> Path | None:
    """Return the tokenizer next to NAME.bin, which is NAME.tokenizer.SUFFIX; None if there is none."""
    paths = (Path(model_path).with_suffix(f".tokenizer.{suffix}") for suffix in SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def load_tokenizer(file: ModelFile, path: Path | None = None) -> Tokenizer:
    """Read a model's tokenizer and check that the model was trained with it.

    Args:
        file: the model.
        path: the tokenizer's file; None takes the one inside the model file, else the one next to it.

    Raises:
        TokenizerError: if there is none, it is damaged, or it is another model's.
    """
    if path is None and file.tokenizer_data is not None:
        name = f"{file.path}, tokenizer inside"
        found = tokenizer.parse(file.tokenizer_data, name, file.config.vocab_size)
        if file.header.tokenizer is not None and found.suffix != file.header.tokenizer.kind:
            raise TokenizerError(f"{name}: is of kind {found.suffix}, the header says {file.header.tokenizer.kind}")
        check_identity(found, str(file.path), file.path, file.tokenizer_sha256)
        return found
    path = path or beside(file.path)
    if path is None:
        names = f"{file.path.stem}.tokenizer.{{{','.join(SUFFIXES)}}}"
        raise TokenizerError(
            f"{file.path}: no tokenizer inside it and no tokenizer beside it ({names}); name one with --tokenizer"
        )
    found = tokenizer.load(path, file.config.vocab_size)
    check_identity(found, str(path), file.path, file.tokenizer_sha256)
    return found


def check_identity(found: Tokenizer, name: str, model: Path | str, sha256: str | None) -> None:
    """Raise a TokenizerError if a model says that it was trained with another tokenizer than `found`.

    Args:
        found: the tokenizer.
        name: where it is from, for the message.
        model: the model's path.
        sha256: the identity of the tokenizer that the model was trained with; None if it does not say.
    """
    if sha256 not in (None, found.sha256):
        raise TokenizerError(
            f"{name}: not the vocabulary that {model} was trained with: sha256 is {found.sha256[:12]}..., "
            f"must be {str(sha256)[:12]}..."
        )
