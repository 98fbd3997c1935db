"""A model file's tokenizer and the ids that begin and end its texts, inside it or beside it."""

import os
from pathlib import Path

from llamalet import tokenizer
from llamalet.errors import TokenizerError, UsageError
from llamalet.files import refuse_odd
from llamalet.hf_names import GENERATION_CONFIG_JSON
from llamalet.model_file.reader import ModelFile
from llamalet.tokenizer import SpecialIds, Tokenizer, ids_file

# A tokenizer next to NAME.bin is NAME.tokenizer.SUFFIX. If there are several, the first of these is read: the more a
# format says, the earlier it comes.
SUFFIXES = ("model", "json", "tiktoken", "bin")


def tokenizer_paths(model_path: str | os.PathLike[str]) -> dict[str, Path]:
    """Return where tokenizers stand next to NAME.bin, by their suffixes."""
    return {suffix: Path(model_path).with_suffix(f".tokenizer.{suffix}") for suffix in SUFFIXES}


def beside(model_path: str | os.PathLike[str]) -> Path | None:
    """Return the tokenizer next to NAME.bin; None if there is none.

    Raises:
        TokenizerError: if something else is in its place, or in that of the ids that begin and end texts.
    """
    paths = tokenizer_paths(model_path).values()
    refuse_odd([*paths, special_ids_path(model_path)], TokenizerError)
    return next((path for path in paths if path.is_file()), None)


def special_ids(file: ModelFile) -> SpecialIds | None:
    """Return what begins and ends a model's texts, as it says itself or a file next to it; None if neither does.

    Raises:
        TokenizerError: if the file next to it is damaged.
    """
    if file.header.special_ids is not None:
        return file.header.special_ids
    refuse_odd([special_ids_path(file.path)], TokenizerError)
    return ids_file.own_ids(special_ids_path(file.path))


def special_ids_path(model_path: str | os.PathLike[str]) -> Path:
    """Return where the ids that begin and end texts stand next to NAME.bin."""
    return Path(model_path).with_suffix(f".{GENERATION_CONFIG_JSON}")


def load_tokenizer(file: ModelFile, path: Path | None = None) -> Tokenizer | None:
    """Read a model's tokenizer and check that the model was trained with it.

    Args:
        file: the model.
        path: the tokenizer's file, which brings its own BOS, while the model's own texts end where they always do;
            None takes the one inside the model file, else the one next to it.

    Returns:
        The tokenizer; None if there is none.

    Raises:
        TokenizerError: if it is damaged, or another model's.
    """
    if path is not None:
        found = tokenizer.load(path, file.config.vocab_size)
        check_identity(found, str(path), file.path, file.tokenizer_sha256)
        stops = stops_of(file)
        return found.with_stops(stops) if stops else found
    if file.tokenizer_data is not None:
        name = f"{file.path}, tokenizer inside"
        found = tokenizer.parse(file.tokenizer_data, name, file.config.vocab_size)
        if file.header.tokenizer is not None and found.suffix != file.header.tokenizer.kind:
            raise TokenizerError(f"{name}: is of kind {found.suffix}, the header says {file.header.tokenizer.kind}")
        check_identity(found, str(file.path), file.path, file.tokenizer_sha256)
    elif (path := beside(file.path)) is not None:
        found = tokenizer.load(path, file.config.vocab_size)
        check_identity(found, str(path), file.path, file.tokenizer_sha256)
    else:
        return None
    ids = file.header.special_ids
    return found if ids is None else found.with_ids(ids, str(file.path))


def stops_of(file: ModelFile) -> frozenset[int]:
    """Return the ids that end a model's texts; none if neither it nor its own tokenizer says so."""
    stated = special_ids(file)
    if stated is not None:
        return stated.stops
    try:
        own = load_tokenizer(file)
    except (TokenizerError, UsageError):
        return frozenset()
    return frozenset() if own is None else own.stop_ids


def no_tokenizer(path: Path) -> str:
    """Return what is missing where a model file has no tokenizer."""
    names = f"{path.stem}.tokenizer.{{{','.join(SUFFIXES)}}}"
    return f"{path}: no tokenizer inside it and no tokenizer beside it ({names}); name one with --tokenizer"


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
