"""Vocabularies and texts for the tests of several tokenizers."""

import io
import random

import sentencepiece
import tokenizers
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from toy import MERGES, N_RANKS, WHOLE_WORD, toy_ranks

from llamalet.tokenizer import parse
from llamalet.tokenizer.byte_alphabet import byte_level_bytes
from llamalet.tokenizer.llama3 import WORDS

SYLLABLES = ("ba", "den", "ilo", "mur", "the", "s", "qu", "ant", "\u00e9", "na")


# SentencePiece options under which decode(encode(text)) == text.
LOSSLESS = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
}


# Texts that tokenizers get wrong: spaces, line ends, rare letters, text that looks like special tokens.
NASTY = [
    "",
    " ",
    "   ",
    "\n",
    "\t\t x",
    " leading",
    "trailing ",
    "double  space   and more",
    "one\r\ntwo\r\n",
    "caf\u00e9 na\u00efve \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\u4f60\u597d\uff0c\u4e16\u754c \u05e9\u05dc\u05d5\u05dd",
    "<s> </s> <unk> <0x41> \n<s>\n",
    "12345 007 3.14",
    "nul\0inside",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "\u0301combining\ufeff\u200b",
]


HARD = [
    *NASTY,
    "I'M you'Ll 'S it\u2019s 's'T '\u017f",
    "\x1c\x1d\x1e\x1f a \x85\xa0\u2028\u3000x",
    "  \n  \n x  \r\n\r\n",
    "1234567890 \u0660\u0661\u0662\u0663 \u2167\u00bd\u00b2",
    "def f(x):\n\treturn  x # 1\n\n\n",
    "<|begin_of_text|><|eot_id|> <|x|>",
    f"{WHOLE_WORD} {WHOLE_WORD}",
]


def train(vocab_size: int = 420, **options) -> bytes:
    """Train a small SentencePiece vocabulary and return its file."""
    rng = random.Random(7)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(300)]
    lines = [" ".join(rng.choices(words, k=12)) + " 1905." for _ in range(400)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=vocab_size,
        minloglevel=2,
        **{**LOSSLESS, **options},
    )
    return model.getvalue()


# No unassigned characters (Cn): newer libraries count more of them as letters than older ones.
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=12),
    st.text(" \t\n\r\x0b\x85\xa0\u2028a1.'sLtnd", max_size=12),
    st.lists(
        st.sampled_from(["the", " and", "'s", "'LL", "12", "\n", " ", "  ", "aaa", "\U0001f600", "<|eot_id|>"])
    ).map("".join),
)


def in_byte_level(text: str) -> str:
    characters = {byte: character for character, byte in byte_level_bytes().items()}
    return "".join(characters[byte] for byte in text.encode("latin-1"))


def by_library() -> tokenizers.Tokenizer:
    """Return the small vocabulary in Hugging Face's library."""
    rows = toy_ranks()
    vocab = {in_byte_level(piece.decode("latin-1")): id for id, (piece, _) in enumerate(rows[:N_RANKS])}
    merges = [(in_byte_level(a), in_byte_level(b)) for a, b in MERGES]
    built = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([piece.decode() for piece, _ in rows[N_RANKS:]])
    return built


def byte_level() -> tokenizers.Tokenizer:
    """Return a tokenizer of the kind in Llama 3's tokenizer.json."""
    built = by_library()
    bos = "<|begin_of_text|>"
    built.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, built.token_to_id(bos))]
    )
    return built


def from_sentencepiece(*, prepend: bool) -> tokenizers.Tokenizer:
    """Return a tokenizer of the kind in Llama 2's tokenizer.json, with the older normalizer or a Metaspace."""
    model = parse(train(**LOSSLESS), "small")
    pieces = [piece.decode().replace(" ", "\u2581") for piece, _ in model.pieces()]
    pieces[:3] = ["<unk>", "<s>", "</s>"]
    scores = dict(zip(pieces, (score for _, score in model.pieces()), strict=True))
    pairs = [(p[:i], p[i:]) for p in pieces[259:] for i in range(1, len(p)) if p[:i] in scores and p[i:] in scores]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    merges = sorted(pairs, key=lambda pair: -scores["".join(pair)])
    built = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tail = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    if prepend:
        built.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        built.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), *tail])
    else:
        built.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="first", split=False)
        built.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), *tail])
    built.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in pieces[:3]])
    return built
