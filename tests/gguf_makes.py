"""Tokenizers of different make, for the tests of the formats that carry them."""

import json
from collections.abc import Callable, Mapping, Sequence

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from toy import MERGES, toy_llama3, toy_tokenizer
from vocabularies import from_sentencepiece, in_byte_level, train

from llamalet.convert import byte_level
from llamalet.tokenizer import Tokenizer, pack, parse

Made = tuple[Tokenizer, bytes]

CHATML = ("<|im_start|>", "<|im_end|>")
TEXT_TOKENS = ("<tool>", "</tool>", "\n\n\n")


def byte_pairs(
    words: str = "gpt-2",
    *,
    first: Sequence[str] = (),
    special: Sequence[str] = ("<bos>", "<|endoftext|>"),
    added: Sequence[str] = (),
    bos: str | None = None,
    **flags: bool,
) -> tokenizers.Tokenizer:
    """Return a small byte-level vocabulary: special tokens, bytes and merges, more special tokens, added tokens."""
    rule = byte_level.NAMES[words]
    merges = [(in_byte_level(left), in_byte_level(right)) for left, right in MERGES]
    tokens = [*first, *(in_byte_level(chr(byte)) for byte in range(256)), *(left + right for left, right in merges)]
    vocab = {token: id for id, token in enumerate(tokens)}
    built = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=rule.ignore_merges))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(name, normalized=False, **flags) for name in (*first, *special)])
    built.add_tokens([AddedToken(name, normalized=False, **flags) for name in added])
    if bos is not None:
        built.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, built.token_to_id(bos))]
        )
    return built


def made(built: tokenizers.Tokenizer) -> Made:
    """Return a tokenizer of the library as ours."""
    data = built.to_str().encode()
    return parse(data, "tokenizer.json"), data


def rows(vocabulary: Tokenizer) -> Made:
    """Return one of our vocabularies and its tokenizer.bin."""
    return vocabulary, pack(vocabulary.pieces())


def sentencepiece(**options: object) -> Made:
    """Return a SentencePiece model."""
    data = train(**options)
    return parse(data, "tokenizer.model"), data


def without_space() -> tokenizers.Tokenizer:
    """Return a tokenizer.json of Llama 2's kind that puts no space before a text."""
    built = from_sentencepiece(prepend=False)
    built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    built.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return built


def with_added(built: tokenizers.Tokenizer, *, special: Sequence[str] = (), added: Sequence[str] = ()) -> Made:
    """Return a tokenizer with more tokens."""
    built.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    built.add_tokens([AddedToken(name, normalized=False) for name in added])
    return made(built)


def with_step(step: object, **options: object) -> Made:
    """Return a byte-level tokenizer whose words are split in another way."""
    built = byte_pairs(**options)
    built.pre_tokenizer = step
    return made(built)


def normalized() -> Made:
    """Return a byte-level tokenizer that composes accents."""
    built = byte_pairs("qwen2")
    built.normalizer = normalizers.NFC()
    return made(built)


def unigram() -> Made:
    """Return a tokenizer.json of another kind than BPE."""
    built = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("\u2581", -1.0), ("a", -2.0), ("b", -3.0)], unk_id=0))
    built.pre_tokenizer = pre_tokenizers.Metaspace()
    built.decoder = decoders.Metaspace()
    return made(built)


def with_affix(affix: str) -> Made:
    """Return a byte-level tokenizer that marks the ends of words."""
    fields = json.loads(byte_pairs().to_str())
    fields["model"][affix] = "</w>"
    return made(tokenizers.Tokenizer.from_str(json.dumps(fields)))


# What GGUF carries.
MAKES: Mapping[str, Callable[[], Made]] = {
    "tokenizer.bin": lambda: rows(toy_tokenizer(300)),
    "ranks": lambda: rows(toy_llama3()),
    "model": lambda: sentencepiece(),
    "model, pad_id": lambda: sentencepiece(pad_id=3),
    "model, other ids": lambda: sentencepiece(bos_id=0, eos_id=1, unk_id=2),
    "model without BOS": lambda: sentencepiece(bos_id=-1),
    "model without BOS and EOS": lambda: sentencepiece(bos_id=-1, eos_id=-1),
    "model without space": lambda: sentencepiece(add_dummy_prefix=False),
    "model, control symbols": lambda: sentencepiece(control_symbols=[*CHATML]),
    "model, user symbols": lambda: sentencepiece(user_defined_symbols=[*CHATML, *TEXT_TOKENS], add_dummy_prefix=False),
    "json of a model": lambda: made(from_sentencepiece(prepend=True)),
    "json of a model, added": lambda: with_added(from_sentencepiece(prepend=True), special=CHATML, added=TEXT_TOKENS),
    "json of a model without space": lambda: made(without_space()),
    **{f"bytes, {name}": lambda name=name: made(byte_pairs(name)) for name in byte_level.NAMES},  # type: ignore[misc]
    "bytes, BOS": lambda: made(byte_pairs("llama-bpe", bos="<bos>")),
    "bytes, special first": lambda: made(byte_pairs(first=("<|endoftext|>", *CHATML), special=("<x>",))),
    "bytes, added": lambda: made(byte_pairs("smollm", first=("<|endoftext|>",), special=CHATML, added=TEXT_TOKENS)),
    "bytes, chat tokens that are text": lambda: made(byte_pairs("qwen2", added=CHATML)),
    "bytes, special tokens that are text to llama.cpp": lambda: made(byte_pairs(special=("<|message|>", "<eos>"))),
    "bytes, ByteLevel alone": lambda: with_step(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "bytes, Digits": lambda: with_step(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    ),
}
# What it cannot carry -> words of the refusal.
OTHERS: Mapping[str, tuple[Callable[[], Made], str]] = {
    "unigram": (lambda: sentencepiece(model_type="unigram", vocab_size=330), "would cut .* tokens.*is a unigram model"),
    "nfkc": (lambda: sentencepiece(normalization_rule_name="nmt_nfkc"), r"it normalizes texts \(nmt_nfkc\)"),
    "spaces": (lambda: sentencepiece(remove_extra_whitespaces=True), "it removes extra spaces"),
    "no bytes": (lambda: sentencepiece(byte_fallback=False, vocab_size=160), "256 bytes.*it has no byte fallback"),
    "user symbols": (
        lambda: sentencepiece(user_defined_symbols=[*CHATML]),
        "would cut 'a <.im_start.> .*llama.cpp puts a space after each added token",
    ),
    "metaspace": (lambda: made(from_sentencepiece(prepend=False)), "space before a text that does not begin with one"),
    "lstrip": (lambda: made(byte_pairs(lstrip=True)), "token '<bos>' has lstrip, which GGUF cannot say"),
    "NFC": (normalized, r"it normalizes texts \(NFC\), which llama.cpp does not"),
    "prefix space": (
        lambda: with_step(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        r"words by ByteLevel\(add_prefix_space=True, use_regex=True\), for which llama.cpp has no name",
    ),
    "white space": (
        lambda: with_step(pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])),
        r"words by WhitespaceSplit\(\), ByteLevel\(.*llama.cpp has no name",
    ),
    "unigram json": (unigram, "is a Unigram model, and llama.cpp has only plain BPE"),
    "end of word": (lambda: with_affix("end_of_word_suffix"), "is a BPE model with marked parts of words"),
    "overlap": (lambda: made(byte_pairs(added=("ab", "bcd"))), "'ab' and 'bcd' overlap"),
}
