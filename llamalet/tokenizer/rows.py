"""The layout of llama2.c's tokenizer.bin, little-endian.

    0  uint32 length of the longest entry, in bytes
       then for each id: float32 score, uint32 length, the entry's bytes

The entries fill the rest of the file. Their meaning differs between Llama 2 (llama2.py) and Llama 3 (llama3.py).
llama2.c's programs read one entry for each row of the embeddings. A model may have more rows than its tokenizer has
tokens, so FILLER entries, which no text can become, make up the rest; they are known again and left out.
Source: llama2.c, tokenizer.py and run.c.
"""

import struct

from llamalet.errors import TokenizerError

TokenizerRow = tuple[bytes, float]  # the entry's bytes, and its score

LONGEST = struct.Struct("<I")
ENTRY = struct.Struct("<fI")
FILLER = "\n<unused {}>\n"  # with the entry's own id
# Larger than any real vocabulary; they stop the reading of other files (a model, a device).
MAX_PIECE_BYTES, MAX_VOCAB = 1 << 16, 1 << 20


def looks_like_rows(data: bytes) -> bool:
    """Return whether a file can be a tokenizer.bin; as a length, the first bytes of other kinds are too large."""
    return len(data) >= LONGEST.size and LONGEST.unpack_from(data)[0] <= MAX_PIECE_BYTES


def pack(pieces: list[TokenizerRow], n_rows: int = 0) -> bytes:
    """Return the bytes of the tokenizer.bin with these rows, and fillers up to n_rows.

    A filler's score is its id, so that a rank table (llama3.py) stays one.
    """
    pieces = pieces + [(FILLER.format(id).encode(), float(id)) for id in range(len(pieces), n_rows)]
    rows = [ENTRY.pack(score, len(piece)) + piece for piece, score in pieces]
    return LONGEST.pack(max((len(piece) for piece, _ in pieces), default=0)) + b"".join(rows)


def unpack(data: bytes, name: str) -> list[TokenizerRow]:
    """Return the rows of a tokenizer.bin, without the fillers at its end.

    Args:
        data: the file's bytes.
        name: the file's name, for messages.

    Raises:
        TokenizerError: if the rows do not fill the file exactly, or the recorded longest length is wrong.
    """
    pieces: list[TokenizerRow] = []
    at, longest = LONGEST.size, 0
    while at < len(data):
        if len(data) - at < ENTRY.size:
            raise TokenizerError(f"{name}: ends inside entry {len(pieces)}: truncated, or not a tokenizer.bin")
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
            f"{name}: its longest entry should have {LONGEST.unpack_from(data)[0]} bytes but has {longest}: "
            "damaged, or not a tokenizer.bin"
        )
    while pieces and pieces[-1][0] == FILLER.format(len(pieces) - 1).encode():
        pieces.pop()
    return pieces
