"""Llama 2's kind of vocabulary: SentencePiece .model files and llama2.c's tokenizer.bin.

Both have the same content. Ids below 3 are control tokens (unknown, BOS, EOS), the next 256 are raw bytes for text that
the vocabulary cannot spell, the rest are pieces of text. Encoding puts one space before a text (SentencePiece's dummy
prefix, which llama2.c always adds), so the first word is encoded like any other; decoding removes it again.
"""

import copy
import functools
import math
import re
from collections.abc import Iterator
from typing import Self

from llamalet.errors import TokenizerError
from llamalet.tokenizer.base import SpecialIds, Tokenizer
from llamalet.tokenizer.bpe import MergingTokenizer, merge
from llamalet.tokenizer.rows import TokenizerRow

# SentencePiece writes a space inside a piece as this character.
SPACE_MARK = "\u2581"
BOS_ID, EOS_ID = 1, 2
BOS_ROW, EOS_ROW = b"\n<s>\n", b"\n</s>\n"
N_CONTROLS = 3
N_BYTES = 256
FIRST_TEXT_ID = N_CONTROLS + N_BYTES

# A word with the spaces before it, or the spaces at the end of a text.
WORD = re.compile(" *[^ ]+| +")
SPACE_INSIDE = re.compile("[^ ] ")
USER_DEFINED = b"\x18\x04"  # as a piece's type is written
MODEL_TYPES, BPE = {1: "unigram", 3: "word", 4: "character"}, 2


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece .model, encoded by the sentencepiece library."""

    suffix = "model"
    _chat_spaces = "first"

    def __init__(self, data: bytes, name: str) -> None:
        """Parse a .model.

        Args:
            data: the file's bytes.
            name: the file's name, for messages.

        Raises:
            TokenizerError: if the library rejects it.
        """
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.load_from_serialized_proto(data)
            ids = list(range(self._processor.get_piece_size()))
            texts = [piece.replace(SPACE_MARK, " ").encode() for piece in self._processor.id_to_piece(ids)]
            scores = self._processor.get_score(ids)
        except (RuntimeError, UnicodeError) as error:
            raise TokenizerError(f"{name}: not a usable SentencePiece model: {error}") from None
        bos, eos = (id if id >= 0 else None for id in (self._processor.bos_id(), self._processor.eos_id()))
        rows = {bos: BOS_ROW, eos: EOS_ROW}
        self._rows = [(rows.get(id, text), score) for id, text, score in zip(ids, texts, scores, strict=True)]
        added = {texts[id].decode(): id for id in user_defined(data)}
        special = {}
        for id in ids:
            if self._processor.is_byte(id):
                texts[id] = bytes([int(texts[id][3:5], 16)])
            elif self._processor.is_control(id) or self._processor.is_unknown(id):
                special[texts[id].decode()] = id
                texts[id] = b""
        first = self._processor.id_to_piece(self._processor.encode("a")[:1])
        adds_space = bool(first) and first[0].startswith(SPACE_MARK)
        unused = [id for id in ids if self._processor.is_unused(id)]
        super().__init__(
            texts, ids=SpecialIds.usual(bos, eos), special=special, added=added, unused=unused, adds_space=adds_space
        )

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def with_chat_spaces(self, scheme: str) -> Self:
        """Return the same tokenizer, where texts of a rendered chat begin with a space always, first or never.

        The file does not say it; in transformers it depends on the files beside it (declared.py).
        """
        other = copy.copy(self)
        other._chat_spaces = scheme
        return other

    def _encode_in_chat(self, text: str, is_first: bool) -> list[int]:
        """Return the ids of a text: see Tokenizer."""
        has_space = self._chat_spaces == "always" or self._chat_spaces == "first" and is_first
        return self._encode(text) if has_space else self._encode_inside(text)


def user_defined(data: bytes) -> list[int]:
    """Return the ids of a .model's user-defined symbols, which any text may contain by name.

    The library does not tell them from other pieces, so their types are read here. A .model is a protobuf message
    whose field 1 is repeated, once for each piece; a piece's field 3 is its type. Source: sentencepiece_model.proto;
    https://protobuf.dev/programming-guides/encoding/
    """
    if USER_DEFINED not in data:
        return []
    pieces = [piece for field, piece in _fields(data) if field == 1 and isinstance(piece, bytes)]
    return [id for id, piece in enumerate(pieces) if (3, 4) in _fields(piece)]


def peculiarity(data: bytes) -> str | None:
    """Return what a .model does that BPE with byte fallback does not, in words; None if there is nothing.

    Field 2 of the message says how it was trained, field 3 how it changes texts. Source: sentencepiece_model.proto
    """
    message = [(field, value) for field, value in _fields(data) if isinstance(value, bytes)]
    trained, changes = (dict(_fields(b"".join(value for field, value in message if field == n))) for n in (2, 3))
    found = []
    if (kind := trained.get(3, 1)) != BPE:
        found.append(f"is a {MODEL_TYPES.get(kind, 'foreign') if isinstance(kind, int) else 'foreign'} model")
    if changes.get(2):
        name = changes.get(1, b"")
        found.append(f"normalizes texts ({name.decode(errors='replace') if isinstance(name, bytes) else name})")
    if changes.get(4, 1):
        found.append("removes extra spaces")
    if trained.get(24):
        found.append("puts spaces behind words")
    if not trained.get(35):
        found.append("has no byte fallback")
    return " and ".join(found) or None


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the number and the value of each field of a protobuf message."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            value |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                return value

    while at < len(message):
        field, wire = divmod(varint(), 8)
        if wire == 0:
            yield field, varint()
            continue
        n_bytes = {1: 8, 5: 4}.get(wire) or varint()
        yield field, message[at : at + n_bytes]
        at += n_bytes


class BinTokenizer(MergingTokenizer):
    """llama2.c's tokenizer.bin; encodes as SentencePiece's BPE does.

    The text starts as single characters. Of all neighbours that merge to a piece of the vocabulary, those with the
    highest score are merged, the leftmost first, until none is left; a character outside the vocabulary becomes bytes.
    """

    suffix = "bin"

    def __init__(self, pieces: list[TokenizerRow], name: str) -> None:
        """Use the rows of a tokenizer.bin.

        Args:
            pieces: (bytes, score) per id.
            name: the file's name, for messages.

        Raises:
            TokenizerError: if the rows are not a vocabulary as llama2.c needs it.
        """
        check_pieces(pieces, name)
        texts = [piece for piece, _ in pieces]
        texts[:FIRST_TEXT_ID] = [b""] * N_CONTROLS + [bytes([byte]) for byte in range(N_BYTES)]
        special = {"<unk>": 0, "<s>": BOS_ID, "</s>": EOS_ID}
        super().__init__(texts, ids=SpecialIds.usual(BOS_ID, EOS_ID), special=special, adds_space=True)
        self._rows = pieces

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        """The id of each piece of text."""
        return {self._texts[id].decode(): id for id in range(FIRST_TEXT_ID, self.vocab_size)}

    @functools.cached_property
    def _ranks(self) -> dict[str, int]:
        """The rank of each piece's score: 0 is the highest score, equal scores share a rank."""
        scores = sorted({score for _, score in self._rows}, reverse=True)
        rank = {score: number for number, score in enumerate(scores)}
        return {piece: rank[self._rows[id][1]] for piece, id in self._ids.items()}

    @functools.cached_property
    def _words_are_apart(self) -> bool:
        """Whether no piece continues past the end of a word, so that words can be encoded separately."""
        return not any(map(SPACE_INSIDE.search, self._ids))

    def _words(self, text: str) -> list[str]:
        text = " " + text.replace(SPACE_MARK, " ") if text else ""
        return WORD.findall(text) if self._words_are_apart else [text]

    def _word_ids(self, word: str) -> tuple[int, ...]:
        ids: list[int] = []
        for piece in merge(word, self._ranks):
            if piece in self._ids:
                ids.append(self._ids[piece])
            else:
                ids.extend(byte + N_CONTROLS for byte in piece.encode())
        return tuple(ids)


def check_for_llama2c(tokenizer: Tokenizer, name: str) -> None:
    """Raise a TokenizerError unless llama2.c would encode texts as `tokenizer` does; `name` is the file's name."""
    copy = BinTokenizer(tokenizer.pieces(), name)
    # Every piece is a word of the probe, so a model other than BPE (unigram) shows. The spaces are single ones, because
    # a .model may drop extra spaces; tokenizer.bin cannot record that, nor its folding of characters.
    words = b" ".join(copy.token_bytes(id) for id in range(FIRST_TEXT_ID, copy.vocab_size)).decode().split()
    probe = " ".join(words)
    if (tokenizer.file_ids.bos, tokenizer.file_ids.eos) != (BOS_ID, EOS_ID) or copy.encode(probe) != tokenizer.encode(
        probe
    ):
        raise TokenizerError(
            f"{name}: llama2.c would encode texts differently: the vocabulary must be SentencePiece BPE with "
            f"byte fallback and dummy prefix, bos_id={BOS_ID} and eos_id={EOS_ID}"
        )


def check_pieces(pieces: list[TokenizerRow], name: str) -> None:
    """Raise a TokenizerError unless llama2.c can use these rows."""
    if len(pieces) < FIRST_TEXT_ID:
        raise TokenizerError(
            f"{name}: {len(pieces)} entries: at least {FIRST_TEXT_ID} are needed, {N_CONTROLS} control tokens and "
            f"{N_BYTES} bytes"
        )
    first_at: dict[bytes, int] = {}
    for id, (piece, score) in enumerate(pieces):
        if first_at.setdefault(piece, id) != id:
            raise TokenizerError(f"{name}: entry {id}: {piece!r} is already entry {first_at[piece]}")
        if not math.isfinite(score):
            raise TokenizerError(f"{name}: entry {id}: score {score}: must be finite")
        if N_CONTROLS <= id < FIRST_TEXT_ID and piece != b"<0x%02X>" % (id - N_CONTROLS):
            raise TokenizerError(
                f"{name}: entry {id}: {piece!r} instead of <0x{id - N_CONTROLS:02X}>: not a Llama 2 style "
                "vocabulary with byte fallback (a Llama 3 one?)"
            )
        try:
            piece.decode()
        except UnicodeDecodeError:
            raise TokenizerError(f"{name}: entry {id}: {piece!r}: not valid UTF-8") from None
        if not piece or b"\0" in piece:
            raise TokenizerError(
                f"{name}: entry {id}: {piece!r}: empty, or contains a NUL, where C programs would stop"
            )
    if b" " not in first_at:
        raise TokenizerError(f"{name}: no entry for the space, with which every text begins")
