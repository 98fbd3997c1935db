"""Text to token ids and back: SentencePiece .model files and llama2.c's tokenizer.bin.

Both kinds hold the same vocabulary. An id below 3 is a control token (unknown, BOS, EOS), the next 256 are raw bytes
for what the vocabulary cannot spell, the rest are pieces of text. A text gets one space in front (SentencePiece's dummy
prefix, which llama2.c always adds), so the first word reads like any other; decoding takes it away again.

tokenizer.bin, little-endian: uint32 length of the longest entry, then per id: float32 score, uint32 length, the bytes.
The number of entries is the rest of the file's. Source: llama2.c, tokenizer.py and run.c.
"""

import abc
import codecs
import functools
import hashlib
import heapq
import math
import os
import struct
from collections.abc import Iterable
from pathlib import Path

from llamalet.errors import TokenizerError
from llamalet.files import replacing

# SentencePiece writes a space inside a piece as this character.
SPACE_MARK = "\u2581"
BOS_ID, EOS_ID = 1, 2
N_CONTROLS = 3
N_BYTES = 256
FIRST_TEXT_ID = N_CONTROLS + N_BYTES

LONGEST = struct.Struct("<I")
ENTRY = struct.Struct("<fI")
# Above every real vocabulary. They keep a wrong file (a model, a device) from being read into memory.
MAX_PIECE_BYTES, MAX_VOCAB, MAX_FILE_BYTES = 1 << 16, 1 << 20, 1 << 26

Piece = tuple[bytes, float]  # the entry's bytes as tokenizer.bin has them, and its score


class Tokenizer(abc.ABC):
    """A vocabulary: everything but the way a text is cut."""

    def __init__(self, pieces: list[Piece], texts: list[bytes], bos_id: int, eos_id: int) -> None:
        """Keep the tables.

        Args:
            pieces: the rows of tokenizer.bin, by id.
            texts: the bytes that each id adds to a text.
            bos_id: the id that begins a document.
            eos_id: the id that ends one.
        """
        self._pieces = pieces
        self._texts = texts
        self.bos_id = bos_id
        self.eos_id = eos_id

    @property
    def vocab_size(self) -> int:
        """Number of ids (V)."""
        return len(self._pieces)

    @functools.cached_property
    def sha256(self) -> str:
        """Identity of the vocabulary: the sha256, in hex, of its tokenizer.bin; a .model and its .bin share it."""
        return hashlib.sha256(pack(self._pieces)).hexdigest()

    def pieces(self) -> list[Piece]:
        """Return (bytes, score) per id, as they stand in tokenizer.bin."""
        return self._pieces

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token adds in the middle of a text; none for BOS, EOS and the unknown token.

        Raises:
            TokenizerError: if the id is not in the vocabulary.
        """
        if not 0 <= token < len(self._texts):
            raise TokenizerError(f"token {token}: not in the vocabulary of {self.vocab_size}")
        return self._texts[token]

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the ids of a text.

        Args:
            text: any Unicode text.
            bos: whether to put BOS in front.
            eos: whether to put EOS behind.

        Raises:
            TokenizerError: if the text holds half of a surrogate pair, which is no character.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(f"character {error.start} of the text: not valid Unicode ({error.reason})") from None
        return [self.bos_id] * bos + self._encode(text) + [self.eos_id] * eos

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of ids, without the dummy prefix; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, tokens)).removeprefix(b" ").decode("utf-8", errors="replace")

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Return the ids of a valid text."""


class StreamDecoder:
    """Decodes one token at a time: what `push` and `finish` return, joined, is what `Tokenizer.decode` returns.

    A character whose bytes are spread over several tokens comes out whole, with the last of them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = True

    def push(self, token: int) -> str:
        """Return the text that `token` completes, often empty."""
        data = self._tokenizer.token_bytes(token)
        if self._at_start and data:
            data = data.removeprefix(b" ")
            self._at_start = False
        return self._utf8.decode(data)

    def finish(self) -> str:
        """Return U+FFFD if the tokens ended within a character, else nothing."""
        return self._utf8.decode(b"", final=True)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece .model, encoded by the sentencepiece library."""

    def __init__(self, data: bytes, name: str) -> None:
        """Parse a .model.

        Args:
            data: the file's bytes.
            name: the file's name, for messages.

        Raises:
            TokenizerError: if the library refuses it, or it has no BOS and EOS.
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
        bos_id, eos_id = self._processor.bos_id(), self._processor.eos_id()
        if bos_id < 0 or eos_id < 0:
            raise TokenizerError(f"{name}: bos_id={bos_id}, eos_id={eos_id}: the vocabulary must have both")
        rows = {bos_id: b"\n<s>\n", eos_id: b"\n</s>\n"}
        pieces = [(rows.get(id, text), score) for id, text, score in zip(ids, texts, scores, strict=True)]
        for id in ids:
            if self._processor.is_byte(id):
                texts[id] = bytes([int(texts[id][3:5], 16)])
            elif self._processor.is_control(id) or self._processor.is_unknown(id):
                texts[id] = b""
        super().__init__(pieces, texts, bos_id, eos_id)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids


class BinTokenizer(Tokenizer):
    """llama2.c's tokenizer.bin, encoded here, with the ids that SentencePiece's BPE gives.

    The text starts as single characters. Of all neighbours that join to a piece of the vocabulary, those with the
    highest score are joined, the leftmost first, until none is left; a character outside the vocabulary becomes bytes.
    """

    def __init__(self, pieces: list[Piece], name: str) -> None:
        """Take the rows of a tokenizer.bin.

        Args:
            pieces: (bytes, score) per id.
            name: the file's name, for messages.

        Raises:
            TokenizerError: if the rows are not a vocabulary of llama2.c's layout.
        """
        check_pieces(pieces, name)
        texts = [piece for piece, _ in pieces]
        texts[:FIRST_TEXT_ID] = [b""] * N_CONTROLS + [bytes([byte]) for byte in range(N_BYTES)]
        super().__init__(pieces, texts, BOS_ID, EOS_ID)

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        """The id of each piece of text."""
        return {self._texts[id].decode(): id for id in range(FIRST_TEXT_ID, self.vocab_size)}

    @functools.cached_property
    def _ranks(self) -> dict[str, int]:
        """The rank of each piece's score: 0 is the highest, equal scores share one."""
        scores = sorted({score for _, score in self._pieces}, reverse=True)
        rank = {score: number for number, score in enumerate(scores)}
        return {piece: rank[self._pieces[id][1]] for piece, id in self._ids.items()}

    def _encode(self, text: str) -> list[int]:
        ids = []
        for piece in self._merge(" " + text.replace(SPACE_MARK, " ")) if text else []:
            if piece in self._ids:
                ids.append(self._ids[piece])
            else:
                ids.extend(byte + N_CONTROLS for byte in piece.encode())
        return ids

    def _merge(self, text: str) -> list[str]:
        """Return the pieces of a text, in O(n log n).

        A piece is known by the position of its first character. The queue holds rank * n + position for every pair of
        neighbours that may join, so its smallest number is the best pair, leftmost first. Joining changes the pairs on
        both sides and leaves their old entries in the queue; an entry whose pair no longer has its rank is skipped.
        """
        ranks, n = self._ranks, len(text)
        pieces = list(text)
        left, right = list(range(-1, n - 1)), list(range(1, n + 1))
        queue = [ranks[text[i : i + 2]] * n + i for i in range(n - 1) if text[i : i + 2] in ranks]
        heapq.heapify(queue)
        while queue:
            rank, first = divmod(heapq.heappop(queue), n)
            second = right[first]
            if not pieces[first] or second == n:
                continue
            joined = pieces[first] + pieces[second]
            if ranks.get(joined) != rank:
                continue
            pieces[first], pieces[second] = joined, ""
            before, after = left[first], right[second]
            right[first] = after
            if after < n:
                left[after] = first
                pair = joined + pieces[after]
                if pair in ranks:
                    heapq.heappush(queue, ranks[pair] * n + first)
            if before >= 0:
                pair = pieces[before] + joined
                if pair in ranks:
                    heapq.heappush(queue, ranks[pair] * n + before)
        return [piece for piece in pieces if piece]


def load(path: str | os.PathLike[str], vocab_size: int | None = None) -> Tokenizer:
    """Read a tokenizer; the content tells the kind, not the name.

    Args:
        path: a SentencePiece .model or a tokenizer.bin.
        vocab_size: the model's vocabulary, which the tokenizer must have.

    Raises:
        TokenizerError: if the file is missing, damaged, of another kind or of another vocabulary.
    """
    path = Path(path)
    if not path.exists():
        raise TokenizerError(f"{path}: no such tokenizer file")
    if not path.is_file():
        raise TokenizerError(f"{path}: not a file; name a SentencePiece .model or a tokenizer.bin")
    n_bytes = path.stat().st_size
    if n_bytes > MAX_FILE_BYTES:
        raise TokenizerError(f"{path}: {n_bytes} bytes: too large for a tokenizer; is it a model?")
    data = path.read_bytes()
    tokenizer: Tokenizer
    # A .model starts with a protobuf tag; read as the length of a tokenizer.bin's longest entry, it is out of range.
    if len(data) >= LONGEST.size and LONGEST.unpack_from(data)[0] <= MAX_PIECE_BYTES:
        tokenizer = BinTokenizer(unpack(data, str(path)), str(path))
    elif data.startswith(b"\n"):
        tokenizer = SentencePieceTokenizer(data, str(path))
    else:
        raise TokenizerError(f"{path}: neither a SentencePiece .model nor a llama2.c tokenizer.bin")
    if vocab_size is not None and tokenizer.vocab_size != vocab_size:
        raise TokenizerError(
            f"{path}: {tokenizer.vocab_size} entries where the model has vocab_size={vocab_size}: "
            "it is another model's tokenizer"
        )
    return tokenizer


def beside(model_path: str | os.PathLike[str]) -> Path | None:
    """Return the tokenizer that lies beside a .bin: NAME.tokenizer.model, else NAME.tokenizer.bin, else None."""
    model_path = Path(model_path)
    candidates = [model_path.with_name(f"{model_path.stem}.tokenizer.{kind}") for kind in ("model", "bin")]
    return next((path for path in candidates if path.is_file()), None)


def write_bin(path: str | os.PathLike[str], tokenizer: Tokenizer) -> None:
    """Write a vocabulary as tokenizer.bin, byte for byte as llama2.c exports it.

    Args:
        path: the file to make or replace.
        tokenizer: any tokenizer.

    Raises:
        TokenizerError: if the format cannot carry the vocabulary, so that it would give other ids.
    """
    copy = BinTokenizer(tokenizer.pieces(), str(path))
    # Every piece as a word: a model that is no BPE (unigram) cannot go unnoticed. Spaces stand alone, for a .model may
    # drop extra ones before it cuts; that, like its folding of characters, tokenizer.bin cannot say.
    words = b" ".join(copy.token_bytes(id) for id in range(FIRST_TEXT_ID, copy.vocab_size)).decode().split()
    probe = " ".join(words)
    if (tokenizer.bos_id, tokenizer.eos_id) != (BOS_ID, EOS_ID) or copy.encode(probe) != tokenizer.encode(probe):
        raise TokenizerError(
            f"{path}: llama2.c's readers would cut texts differently: the vocabulary must be SentencePiece BPE with "
            f"byte fallback and dummy prefix, bos_id={BOS_ID} and eos_id={EOS_ID}"
        )
    with replacing(Path(path)) as file:
        file.write(pack(tokenizer.pieces()))


def pack(pieces: list[Piece]) -> bytes:
    """Return the bytes of a tokenizer.bin with these rows."""
    rows = [ENTRY.pack(score, len(piece)) + piece for piece, score in pieces]
    return LONGEST.pack(max((len(piece) for piece, _ in pieces), default=0)) + b"".join(rows)


def unpack(data: bytes, name: str) -> list[Piece]:
    """Return the rows of a tokenizer.bin.

    Args:
        data: the file's bytes.
        name: the file's name, for messages.

    Raises:
        TokenizerError: if they do not fill the file exactly, or the longest is not as long as it says.
    """
    pieces: list[Piece] = []
    at, longest = LONGEST.size, 0
    while at < len(data):
        if len(data) - at < ENTRY.size:
            raise TokenizerError(f"{name}: ends within entry {len(pieces)}: truncated, or not a tokenizer.bin")
        score, length = ENTRY.unpack_from(data, at)
        at += ENTRY.size
        if not 1 <= length <= min(MAX_PIECE_BYTES, len(data) - at):
            raise TokenizerError(
                f"{name}: entry {len(pieces)}: length {length} with {len(data) - at} bytes left: must be positive "
                "and fit; the file is truncated, or not a tokenizer.bin"
            )
        pieces.append((data[at : at + length], score))
        at += length
        longest = max(longest, length)
        if len(pieces) > MAX_VOCAB:
            raise TokenizerError(f"{name}: more than {MAX_VOCAB} entries: not a tokenizer.bin")
    if LONGEST.unpack_from(data)[0] != longest:
        raise TokenizerError(
            f"{name}: says that its longest entry has {LONGEST.unpack_from(data)[0]} bytes, it has {longest}: "
            "damaged, or not a tokenizer.bin"
        )
    return pieces


def check_pieces(pieces: list[Piece], name: str) -> None:
    """Raise a TokenizerError unless llama2.c's readers can rely on these rows."""
    if len(pieces) < FIRST_TEXT_ID:
        raise TokenizerError(
            f"{name}: {len(pieces)} entries: at least {FIRST_TEXT_ID} are needed, {N_CONTROLS} control tokens and "
            f"{N_BYTES} bytes"
        )
    first_at: dict[bytes, int] = {}
    for id, (piece, score) in enumerate(pieces):
        if first_at.setdefault(piece, id) != id:
            raise TokenizerError(f"{name}: entry {id}: {piece!r} stands already at {first_at[piece]}")
        if not math.isfinite(score):
            raise TokenizerError(f"{name}: entry {id}: score {score}: must be finite")
        if N_CONTROLS <= id < FIRST_TEXT_ID and piece != b"<0x%02X>" % (id - N_CONTROLS):
            raise TokenizerError(
                f"{name}: entry {id}: {piece!r} where <0x{id - N_CONTROLS:02X}> must stand: not a Llama 2 style "
                "vocabulary with byte fallback (a Llama 3 one?)"
            )
        try:
            piece.decode()
        except UnicodeDecodeError:
            raise TokenizerError(f"{name}: entry {id}: {piece!r}: not valid UTF-8") from None
        if not piece or b"\0" in piece:
            raise TokenizerError(f"{name}: entry {id}: {piece!r}: empty or with a NUL, where C readers would stop")
    if b" " not in first_at:
        raise TokenizerError(f"{name}: no entry for the space, which every text begins with")
