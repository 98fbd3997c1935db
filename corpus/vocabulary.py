"""A SentencePiece vocabulary, trained the way Llama 2's was.

Byte pairs with byte fallback, no normalisation, every space kept, every digit its own token. Decoding returns the text
that was encoded, except that U+2581, SentencePiece's mark for a space, comes back as a space.
"""

import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

from corpus.documents import Piece
from llamalet.errors import DataError

DEFAULT_SIZE = 4096
SAMPLE_CHARS = 64_000_000  # more text hardly changes a vocabulary, and costs memory
# The rarest characters are left to the byte tokens; otherwise thousands of one-off characters of a large corpus would
# fill a small vocabulary.
CHARACTER_COVERAGE = 0.99999
N_THREADS = 8  # fixed: the number is written into the model file, though the pieces do not depend on it
TOO_LARGE = re.compile(r"Vocabulary size too high .*<= (\d+)")
TOO_SMALL = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")


def sample_lines(stream: Iterable[Piece], every: int) -> Iterator[str]:
    """Yield the lines of every n-th piece; a vocabulary that sees no line ends leaves them to the byte token."""
    for piece in itertools.islice(stream, 0, None, every):
        yield from filter(None, piece.text.split("\n"))


def train(lines: Sequence[str], vocab_size: int, *, at_most: bool = False) -> tuple[bytes, int]:
    """Train a vocabulary; the same lines give the same bytes.

    Args:
        lines: the text.
        vocab_size: number of tokens, including the 3 control and 256 byte tokens.
        at_most: if the text is too small for this vocabulary, train the largest possible one.

    Returns:
        A SentencePiece .model (unknown 0, BOS 1, EOS 2, the bytes 3..258, then pieces and characters) and its size.

    Raises:
        DataError: if the text is too small or too varied for a vocabulary of this size.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=CHARACTER_COVERAGE,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=1 << 30,
            num_threads=N_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        if too_large := TOO_LARGE.search(str(error)):
            largest = int(too_large[1])
            if at_most:
                return train(lines, largest)
            raise DataError(
                f"--vocab-size={vocab_size}: the text is too small; the largest possible is {largest}"
            ) from None
        if too_small := TOO_SMALL.search(str(error)):
            raise DataError(
                f"--vocab-size={vocab_size}: the text's characters alone need {too_small[1]}; choose at least that"
            ) from None
        raise DataError(f"--vocab-size={vocab_size}: SentencePiece cannot train it: {error}") from None
    return model.getvalue(), vocab_size
