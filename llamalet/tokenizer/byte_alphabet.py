"""Byte-level vocabularies: a character stands for each byte, and what a list of merges says as ranks."""

from collections.abc import Collection, Iterator, Sequence

from llamalet.tokenizer.rows import TokenizerRow


def byte_level_bytes() -> dict[str, int]:
    """Return the byte that each character represents in a byte-level vocabulary.

    A visible Latin-1 character is its own byte; the other bytes are the characters from U+0100. Source: GPT-2,
    encoder.py
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def rows_of_table(
    tokens: Sequence[str], merges: Sequence[Sequence[str]], special: Collection[str]
) -> list[TokenizerRow] | None:
    """Return the rows of the rank table (llama3.py) equivalent to a list of merges, or None if there is none.

    Args:
        tokens: the token of each id, with a character for each byte; special tokens by name.
        merges: the pairs, in order of priority.
        special: the names of the special tokens, whose ids must be the last.

    Raises:
        KeyError: if a character does not represent a byte.
    """
    n_ranks = len(tokens) - len(special)
    ids = {token: id for id, token in enumerate(tokens[:n_ranks])}
    pairs = {(left, right) for left, right in merges}
    order = [ids.get(left + right, -1) for left, right in merges]
    if (
        order != sorted(order)
        or pairs != set(pairs_in(ids))
        or set(tokens[n_ranks:]) != set(special)
        or len(ids) != n_ranks
    ):
        return None
    byte_of = byte_level_bytes()
    texts = [bytes(map(byte_of.__getitem__, token)) for token in ids]
    return [(text, float(id)) for id, text in enumerate([*texts, *(name.encode() for name in tokens[n_ranks:])])]


def pairs_in(tokens: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield every way to cut a token into two tokens."""
    for token in tokens:
        for at in range(1, len(token)):
            if token[:at] in tokens and token[at:] in tokens:
                yield token[:at], token[at:]
