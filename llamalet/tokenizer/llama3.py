"""Llama 3's kind of vocabulary: a regular expression splits a text into words, and merge ranks encode their bytes.

The id of a token is its rank: of all neighbours in a word that merge to a token, those with the lowest id are merged.
The special tokens follow the last rank. The regex package's Unicode version decides what a letter is, so characters
newer than another library's Unicode can get other ids than in that library. The ranks come in two kinds of file:

    tokenizer.bin   llama2.c's layout (rows.py); every score is the id, and the special tokens come last.
                    Source: the Llama 3 forks of llama2.c
    tiktoken        Meta's tokenizer.model: a line "BASE64 RANK" per token, without the special tokens, which are then
                    Llama 3's. Source: https://github.com/openai/tiktoken, load.py; llama3, tokenizer.py
"""

import base64
import binascii
import re
from typing import Any

from llamalet.errors import TokenizerError, UsageError
from llamalet.tokenizer.base import SpecialIds
from llamalet.tokenizer.bpe import MergingTokenizer, merge
from llamalet.tokenizer.rows import MAX_VOCAB, TokenizerRow

# Words: the end of a contraction; letters after at most one other character; up to three digits; other characters and
# the line ends after them; white space up to a line end, up to the space before a word, or all. Source: llama3,
# tokenizer.py
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
TURN_ENDS = ("<|eot_id|>", "<|eom_id|>")
N_SPECIAL = 256

SPECIAL_NAME = re.compile(rb"<\|[A-Za-z0-9_]+\|>")
ADDED_NAME = re.compile(rb"<[^<>\s]+>|\[[^\[\]\s]+\]")
TIKTOKEN_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d+)")


class Llama3Tokenizer(MergingTokenizer):
    """Merge ranks over bytes; needs the regex package, because Python's re lacks Unicode classes."""

    def __init__(self, pieces: list[TokenizerRow], name: str, *, suffix: str) -> None:
        """Use the rows of a rank table.

        Args:
            pieces: (bytes, id) per id, the special tokens last.
            name: the file's name, for messages.
            suffix: the suffix of the file's kind.

        Raises:
            TokenizerError: if they are not a rank table.
            UsageError: if the regex package is not installed.
        """
        self._find_words = _compile_words(name).findall
        n_ranks = _count_ranks([piece for piece, _ in pieces])
        special = {piece.decode(errors="replace"): n_ranks + i for i, (piece, _) in enumerate(pieces[n_ranks:])}
        texts = [piece for piece, _ in pieces[:n_ranks]]
        # Each byte is merged as the character of the same number.
        self._ranks = {text.decode("latin-1"): rank for rank, text in enumerate(texts)}
        if problem := _problem(pieces, n_ranks, special, self._ranks):
            raise TokenizerError(f"{name}: not a Llama 3 vocabulary: {problem}")
        super().__init__(
            texts + [b""] * len(special),
            ids=SpecialIds.usual(special[BOS], special[EOS], (special[end] for end in TURN_ENDS if end in special)),
            special=special,
            adds_space=False,
        )
        self.suffix = suffix  # type: ignore[misc]
        self._rows = pieces

    def _words(self, text: str) -> list[str]:
        words: list[str] = self._find_words(text)
        return words

    def _word_ids(self, word: str) -> tuple[int, ...]:
        parts = word.encode().decode("latin-1")
        if parts in self._ranks:
            return (self._ranks[parts],)
        return tuple(self._ranks[piece] for piece in merge(parts, self._ranks))


def is_rank_table(pieces: list[TokenizerRow]) -> bool:
    """Return whether the rows of a tokenizer.bin are Llama 3's: every score is the id."""
    return len(pieces) > 1 and all(score == id for id, (_, score) in enumerate(pieces))


def looks_like_tiktoken(data: bytes) -> bool:
    """Return whether a file starts like a tiktoken file."""
    return TIKTOKEN_LINE.fullmatch(data[:400].partition(b"\n")[0].rstrip()) is not None


def parse_tiktoken(data: bytes, name: str) -> list[TokenizerRow]:
    """Return the rows of a tiktoken file, followed by Llama 3's special tokens.

    Raises:
        TokenizerError: naming the first bad line; the ranks must be 0, 1, 2, ...
    """
    pieces: list[TokenizerRow] = []
    for number, line in enumerate(data.splitlines(), start=1):
        match = TIKTOKEN_LINE.fullmatch(line)
        try:
            if match is None or int(match[2]) != len(pieces) or len(pieces) > MAX_VOCAB:
                raise ValueError(f"must be BASE64 {len(pieces)}")
            pieces.append((base64.b64decode(match[1], validate=True), float(len(pieces))))
        except (ValueError, binascii.Error) as error:
            raise TokenizerError(f"{name}, line {number}: {line[:40]!r}: {error}") from None
    return pieces + [(text.encode(), float(len(pieces) + i)) for i, text in enumerate(special_names())]


def special_names() -> list[str]:
    """Return the names of Llama 3's special tokens, in order."""
    known = {0: BOS, 1: EOS, 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "<|eot_id|>"}
    reserved = iter(range(N_SPECIAL))
    return [known.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(N_SPECIAL)]


def _count_ranks(texts: list[bytes]) -> int:
    """Return the number of texts before the special tokens, which are last.

    Llama 3's are known by their names. Tokens that others added have names like <pad> or [PAD]; no merge gives them.
    """
    known = set(texts)

    def is_special(text: bytes) -> bool:
        if SPECIAL_NAME.fullmatch(text) or not ADDED_NAME.fullmatch(text):
            return SPECIAL_NAME.fullmatch(text) is not None
        return not any(text[:at] in known and text[at:] in known for at in range(1, len(text)))

    n_ranks = len(texts)
    while n_ranks and is_special(texts[n_ranks - 1]):
        n_ranks -= 1
    return n_ranks


def _problem(pieces: list[TokenizerRow], n_ranks: int, special: dict[str, int], ranks: dict[str, int]) -> str | None:
    """Return what is wrong with a rank table."""
    if missing := [name for name in (BOS, EOS) if name not in special]:
        return f"{missing[0]} is missing"
    if len(ranks) != n_ranks or len(special) != len(pieces) - n_ranks:
        seen: set[bytes] = set()
        twice = next(piece for piece, _ in pieces if piece in seen or seen.add(piece))  # type: ignore[func-returns-value]
        return f"{twice!r} occurs twice"
    if missing_bytes := [byte for byte in range(256) if chr(byte) not in ranks]:
        return f"byte 0x{missing_bytes[0]:02x} has no rank"
    return None


def _compile_words(name: str) -> Any:
    """Return the compiled regular expression for words."""
    try:
        import regex
    except ImportError:
        raise UsageError(f"{name}: a Llama 3 vocabulary needs the regex package: pip install regex") from None
    return regex.compile(WORDS)
