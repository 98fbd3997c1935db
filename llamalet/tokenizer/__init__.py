"""Text to token ids and back, with the vocabularies of Llama models.

base.py           the interface of all tokenizers; decoding one token at a time
bpe.py            byte-pair encoding
byte_alphabet.py  the characters that stand for bytes in byte-level vocabularies
rows.py           the layout of tokenizer.bin
llama2.py         SentencePiece .model | llama2.c's tokenizer.bin
llama3.py         merge ranks in a tokenizer.bin | Meta's tiktoken file
huggingface.py    tokenizer.json, through the tokenizers library unless it is Llama 3's
added_tokens.py   tokens that are found by name, as the files beside a tokenizer list them
classes.py        what transformers' tokenizer classes make of a tokenizer.json
declared.py       what the files beside a tokenizer say of it
ids_file.py       what begins and ends texts, in a file of this project's own
"""

import codecs
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamalet.checks import file_path
from llamalet.errors import TokenizerError
from llamalet.files import write_file
from llamalet.hf_names import TOKENIZER_JSON
from llamalet.tokenizer import declared, llama2, llama3
from llamalet.tokenizer.base import SpecialIds, StreamDecoder, Tokenizer
from llamalet.tokenizer.huggingface import JsonTokenizer, json_object, rank_rows
from llamalet.tokenizer.llama2 import BOS_ID, EOS_ID, SPACE_MARK, BinTokenizer, SentencePieceTokenizer
from llamalet.tokenizer.llama3 import Llama3Tokenizer
from llamalet.tokenizer.rows import looks_like_rows, pack, unpack

__all__ = [
    "BOS_ID", "EOS_ID", "SPACE_MARK", "BinTokenizer", "JsonTokenizer", "Llama3Tokenizer",
    "SentencePieceTokenizer", "SpecialIds", "StreamDecoder", "Tokenizer", "load", "pack", "parse", "read", "unpack",
    "write_bin",
]  # fmt: skip

# More rows than this for each token are no padding: the tokenizer is another model's.
MAX_PADDING = 2


def load(path: str | os.PathLike[str], vocab_size: int | None = None) -> Tokenizer:
    """Read a tokenizer of any kind; the content determines the kind, not the name. See `read`."""
    return read(path, vocab_size)[0]


def read(
    path: str | os.PathLike[str], vocab_size: int | None = None, folder: declared.Folder | None = None
) -> tuple[Tokenizer, bytes]:
    """Read a tokenizer of any kind, and what the files beside it say of it (declared.py).

    Args:
        path: a SentencePiece .model, a tokenizer.bin, Llama 3's tiktoken file or a tokenizer.json.
        vocab_size: the model's vocab_size, which must have room for all tokens.
        folder: the files beside it, if some are read already.

    Returns:
        The tokenizer, and its file's bytes; with a tokenizer.json, the tokens that other files add are in them.

    Raises:
        TokenizerError: if the file is missing, damaged, of an unknown kind, or does not match vocab_size.
        UsageError: if it needs a package that is not installed.
    """
    path = file_path("tokenizer", path)
    if not path.exists():
        raise TokenizerError(f"{path}: no such tokenizer file")
    if not path.is_file():
        raise TokenizerError(f"{path}: not a file; name a tokenizer: a .model, tokenizer.bin or tokenizer.json")
    folder = folder or declared.Folder(path.parent)
    in_folder = path.name == TOKENIZER_JSON
    data = (folder.json_bytes if in_folder else declared.file_bytes(path)).removeprefix(codecs.BOM_UTF8)
    fields = None
    if data.startswith(b"{"):
        fields = folder.tokenizer_json if in_folder else json_object(data, str(path))
        if in_folder:
            data, fields = folder.completed(data, fields, vocab_size)
    found = parse(data, str(path), vocab_size, fields=fields)
    return found.with_ids(folder.special_ids(path, found, fields), str(path)), data


def parse(
    data: bytes, name: str, vocab_size: int | None = None, *, fields: Mapping[str, Any] | None = None
) -> Tokenizer:
    """Return the tokenizer in a file's bytes.

    Args:
        data: the bytes.
        name: the file's name, for messages.
        vocab_size: see read.
        fields: a tokenizer.json's, if it is parsed already.

    Raises:
        TokenizerError: as read.
        UsageError: as read.
    """
    found = _parse(data, name, fields)
    if vocab_size is not None and not found.vocab_size <= vocab_size <= MAX_PADDING * found.vocab_size:
        raise TokenizerError(
            f"{name}: {found.vocab_size} entries where the model has vocab_size={vocab_size}: "
            "it is another model's tokenizer"
        )
    return found


def _parse(data: bytes, name: str, fields: Mapping[str, Any] | None) -> Tokenizer:
    """Recognize the kind by its first bytes, which differ for each."""
    data = data.removeprefix(codecs.BOM_UTF8)  # of a JSON file that passed through an editor
    if looks_like_rows(data):
        pieces = unpack(data, name)
        if llama3.is_rank_table(pieces):
            return Llama3Tokenizer(pieces, name, suffix="bin")
        return BinTokenizer(pieces, name)
    if data.startswith(b"{"):
        fields = json_object(data, name) if fields is None else fields
        rows = rank_rows(fields)
        return JsonTokenizer(data, name, fields) if rows is None else Llama3Tokenizer(rows, name, suffix="json")
    if llama3.looks_like_tiktoken(data):
        return Llama3Tokenizer(llama3.parse_tiktoken(data, name), name, suffix="tiktoken")
    if data.startswith(b"\n"):  # the tag of a protobuf's first field
        return SentencePieceTokenizer(data, name)
    raise TokenizerError(
        f"{name}: neither a SentencePiece .model, a tokenizer.bin, a tokenizer.json nor a tiktoken file"
    )


def write_bin(path: str | os.PathLike[str], tokenizer: Tokenizer, n_rows: int = 0) -> None:
    """Write a vocabulary as tokenizer.bin: Llama 2's exactly as llama2.c exports it, Llama 3's as a rank table.

    Args:
        path: the file to create or replace.
        tokenizer: any but a JsonTokenizer.
        n_rows: the model's vocab_size; fillers make up for what the vocabulary lacks.

    Raises:
        TokenizerError: if the format cannot represent the vocabulary, so that it would give different ids.
    """
    if not isinstance(tokenizer, Llama3Tokenizer):
        llama2.check_for_llama2c(tokenizer, str(path))
    data = pack(tokenizer.pieces(), n_rows)
    write_file(Path(path), data)
