"""Texts that a tokenizer and its copy in another format must cut alike."""

from collections.abc import Iterator

from llamalet.errors import TokenizerError
from llamalet.tokenizer import Tokenizer

# Spaces, tabs, line ends, digits, contractions, emoji, accents composed and not, other scripts, ligatures and wide
# letters (which some vocabularies normalize), control characters, text that looks like tokens, long repetitions.
TEXTS = (
    "", " ", "  ", "Once upon a time", " leading and trailing ", "a\tb\n\nc\r\n", "1234567890 3.14", "\u00e9\u4e2d",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467", "zero\u200bwidth", "a" * 21, "x" + " " * 33 + "y",
    "\x00\x01\x7f", "e\u0301", "<0x41> [INST]", "double  spaces   inside", "\n", "\n\n \n", "I'm you'LL don't",
    "the old man went to sea with his red boat", "\ufb01sh \uff21\uff22 \u2460 \u00bd",
    "\u65e5\u672c\u8a9e\u306e\u6587",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627", "<s> </s> <unk>", "\u2581x \u2581", "UPPER lower",
    "def f(x):\n\treturn x  # 1\n", "\u00a0\u3000\u2028", "trailing\n",
)  # fmt: skip
MAX_WORDS = 1 << 15


def differing_text(ours: Tokenizer, theirs: Tokenizer) -> str | None:
    """Return a text that two tokenizers encode differently, or None if there is none among the probes.

    The probes are TEXTS, and the first tokenizer's own tokens, by their texts and by their names.
    """
    names = [*ours.special, *theirs.special]
    for text in probes(ours):
        has_name = any(name in text for name in names)
        for special in (False, True) if has_name else (False,):
            if ours.encode(text, special=special) != theirs.encode(text, special=special):
                return text
    return None


def check_same(ours: Tokenizer, theirs: Tokenizer, where: str) -> int:
    """Return the number of texts for which a tokenizer and its copy give the same ids.

    Args:
        ours: the tokenizer.
        theirs: its copy.
        where: the copy's file, for the message.

    Raises:
        TokenizerError: if the copy encodes a text differently, or begins or ends texts differently.
    """
    text = differing_text(ours, theirs)
    if text is not None:
        raise TokenizerError(
            f"{where}: its tokenizer would cut {text[:40]!r} into {len(theirs.encode(text))} tokens, the model's own "
            f"into {len(ours.encode(text))}: the format cannot carry this tokenizer"
        )
    if (ours.ids.prefix, ours.stop_ids) != (theirs.ids.prefix, theirs.stop_ids):
        raise TokenizerError(
            f"{where}: its texts begin with {list(theirs.ids.prefix)} and end at {sorted(theirs.stop_ids)}, the "
            f"model's own begin with {list(ours.ids.prefix)} and end at {sorted(ours.stop_ids)}"
        )
    return sum(1 for _ in probes(ours))


def probes(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the texts to compare; the tokens' own texts in one, as words, and after one another.

    Of a large vocabulary an even share is taken: merging all of Llama 3's would take most of an export's time.
    """
    yield from TEXTS
    names = [*tokenizer.special, *tokenizer.added][:64]
    for name in names:
        yield f"a {name} b{name}{name}\n"
    texts = (tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size))
    words = [text.decode() for text in texts if _is_text(text)]
    words = words[:: len(words) // MAX_WORDS + 1]
    yield " ".join(words)
    yield "".join(words)


def _is_text(data: bytes) -> bool:
    """Return whether a token's bytes are text on their own."""
    try:
        return bool(data.decode())
    except UnicodeDecodeError:
        return False
