"""Tokenizers of every make that people have, as Hugging Face folders: what is in them, and how they differ."""

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from gguf_makes import TEXT_TOKENS, byte_pairs
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from vocabularies import SYLLABLES, from_sentencepiece, train

from llamalet.convert import byte_level as byte_level_table

MARK = "\u2581"
GPT4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def corpus() -> list[str]:
    rng = random.Random(3)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(300)]
    return [" ".join(rng.choices(words, k=12)).capitalize() + " 1905, it's.\n" for _ in range(200)]


def byte_level(
    pre: Any = None,
    *,
    size: int = 340,
    special: tuple[str, ...] = ("<|bos|>", "<|eos|>"),
    norm: Any = None,
    **model: Any,
) -> tokenizers.Tokenizer:
    """Return a byte-level BPE."""
    made = tokenizers.Tokenizer(models.BPE(**model))
    made.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if norm is not None:
        made.normalizer = norm
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=alphabet)
    )
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return made


def begins_with(made: tokenizers.Tokenizer, *names: str, end: str | None = None) -> tokenizers.Tokenizer:
    """Give a tokenizer a post-processor."""
    single = " ".join([*names, "$A", *([end] if end else [])])
    used = {*names, *([end] if end else [])}
    made.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(name, made.token_to_id(name)) for name in sorted(used)]
    )
    return made


def metaspace(scheme: str, *, fallback: bool = True, kind: str = "bpe") -> tokenizers.Tokenizer:
    """Return a tokenizer as SentencePiece's are converted now: with a Metaspace."""
    special = ["<unk>", "<s>", "</s>"]
    spell = [f"<0x{byte:02X}>" for byte in range(256)] if fallback else []
    if kind == "unigram":
        made = tokenizers.Tokenizer(models.Unigram())
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=420, show_progress=False, special_tokens=special, unk_token="<unk>"
        )
    else:
        made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=fallback))
        trainer = trainers.BpeTrainer(vocab_size=520, show_progress=False, special_tokens=special + spell)
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=kind == "unigram")
    made.train_from_iterator(corpus(), trainer)
    if kind == "unigram":
        made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    else:
        strip = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
        made.decoder = decoders.Sequence(
            [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        table = json.loads(made.to_str())  # the bytes are no added tokens
        table["added_tokens"] = [token for token in table["added_tokens"] if token["content"] in special]
        made = tokenizers.Tokenizer.from_str(json.dumps(table))
    return made


def prepend() -> tokenizers.Tokenizer:
    """Return a tokenizer as SentencePiece's were converted before: with normalizers."""
    made = metaspace("always")
    table = json.loads(made.to_str())
    table["pre_tokenizer"] = None
    made = tokenizers.Tokenizer.from_str(json.dumps(table))
    made.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    return made


def with_added(made: tokenizers.Tokenizer, *added: AddedToken) -> tokenizers.Tokenizer:
    """Add tokens at the end of the list."""
    for token in added:
        (made.add_special_tokens if token.special else made.add_tokens)([token])
    return made


def with_gap(made: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Give the last added token an id some places further on."""
    table = json.loads(made.to_str())
    table["added_tokens"][-1]["id"] += 7
    return tokenizers.Tokenizer.from_str(json.dumps(table))


def in_front(made: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Move the special tokens to the front of the vocabulary, as GPT-NeoX has them."""
    table = json.loads(made.to_str())
    names = [token["content"] for token in table["added_tokens"]]
    order = [*names, *(token for token in sorted(table["model"]["vocab"], key=table["model"]["vocab"].get))]
    order = list(dict.fromkeys(order))
    table["model"]["vocab"] = {token: id for id, token in enumerate(order)}
    for token in table["added_tokens"]:
        token["id"] = order.index(token["content"])
    return tokenizers.Tokenizer.from_str(json.dumps(table))


BOS_EOS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
SPM = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
AS_OBJECT = {
    "bos_token": {"__type": "AddedToken", "content": "<|bos|>", "lstrip": False, "normalized": False, "rstrip": False,
                  "single_word": False},
    "eos_token": {"__type": "AddedToken", "content": "<|eos|>", "lstrip": False, "normalized": True, "rstrip": False,
                  "single_word": False},
}  # fmt: skip
CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def split(words: str) -> Any:
    """Return a pre-tokenizer that cuts with a regular expression."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def digits() -> Any:
    """Return a pre-tokenizer that takes digits apart."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


# Name -> what makes tokenizer.json (or None), and the other files by name; *.model is bytes.
MAKES: dict[str, tuple[Callable[[], tokenizers.Tokenizer] | None, dict[str, Any]]] = {
    "bytes, nothing declared": (byte_level, {}),
    "bytes, declared, nothing in front": (byte_level, {"tokenizer_config.json": BOS_EOS | FAST}),
    "bytes, add_bos_token without effect": (byte_level, {"tokenizer_config.json": BOS_EOS | {"add_bos_token": True}}),
    "bytes, BOS in front": (lambda: begins_with(byte_level(), "<|bos|>"), {"tokenizer_config.json": BOS_EOS}),
    "bytes, BOS in front, undeclared": (lambda: begins_with(byte_level(), "<|bos|>"), {}),
    "bytes, BOS in front, add_bos_token false": (
        lambda: begins_with(byte_level(), "<|bos|>"), {"tokenizer_config.json": BOS_EOS | {"add_bos_token": False}},
    ),
    "bytes, BOS and EOS around": (
        lambda: begins_with(byte_level(), "<|bos|>", end="<|eos|>"), {"tokenizer_config.json": BOS_EOS},
    ),
    "bytes, two in front": (
        lambda: begins_with(byte_level(special=("[gMASK]", "<sop>", "<|eos|>")), "[gMASK]", "<sop>"),
        {"tokenizer_config.json": {"bos_token": "<sop>", "eos_token": "<|eos|>"}},
    ),
    "bytes, declared as objects": (byte_level, {"tokenizer_config.json": AS_OBJECT}),
    "bytes, declared in special_tokens_map": (byte_level, {"special_tokens_map.json": BOS_EOS}),
    "bytes, the map counts over the config": (
        byte_level,
        {
            "tokenizer_config.json": {"bos_token": "<|eos|>"},
            "special_tokens_map.json": {
                "bos_token": {"content": "<|bos|>", "lstrip": False, "rstrip": False}, "eos_token": "<|eos|>",
            },
        },
    ),
    "bytes, BOS is EOS": (
        lambda: byte_level(special=CHAT),
        {"tokenizer_config.json": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}},
    ),
    "bytes, no BOS": (
        lambda: byte_level(special=CHAT), {"tokenizer_config.json": {"bos_token": None, "eos_token": "<|im_end|>"}},
    ),
    "bytes, digits apart": (
        lambda: byte_level(digits(), special=CHAT), {"tokenizer_config.json": {"eos_token": CHAT[0]}},
    ),
    "bytes, words of GPT-4": (lambda: byte_level(split(GPT4_WORDS)), {"tokenizer_config.json": BOS_EOS | FAST}),
    "bytes, NFC": (lambda: byte_level(norm=normalizers.NFC()), {"tokenizer_config.json": BOS_EOS}),
    "bytes, a space in front": (
        lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), {"tokenizer_config.json": BOS_EOS},
    ),
    "bytes, words kept whole": (lambda: byte_level(ignore_merges=True), {"tokenizer_config.json": BOS_EOS}),
    "bytes, special tokens first": (
        lambda: begins_with(in_front(byte_level(special=("<|pad|>", "<|bos|>", "<|eos|>"))), "<|bos|>"),
        {"tokenizer_config.json": BOS_EOS},
    ),
    "bytes, a gap before the last": (lambda: with_gap(byte_level()), {"tokenizer_config.json": BOS_EOS}),
    "bytes, added lstrip": (
        lambda: with_added(byte_level(), AddedToken("<mask>", lstrip=True, special=True)),
        {"tokenizer_config.json": BOS_EOS},
    ),
    "bytes, added rstrip": (
        lambda: with_added(byte_level(), AddedToken("<|user|>", rstrip=True, special=True, normalized=False)),
        {"tokenizer_config.json": BOS_EOS},
    ),
    "bytes, added single word": (
        lambda: with_added(byte_level(), AddedToken("ba", single_word=True, normalized=True)),
        {"tokenizer_config.json": BOS_EOS},
    ),
    "bytes, added text": (
        lambda: with_added(byte_level(), AddedToken("<think>"), AddedToken("</think>")),
        {"tokenizer_config.json": BOS_EOS},
    ),
    "bytes, added spaces": (
        lambda: with_added(byte_level(), *(AddedToken(" " * n, normalized=False) for n in (4, 3, 2))),
        {"tokenizer_config.json": BOS_EOS},
    ),
    "bytes, added normalized under NFKC": (
        lambda: with_added(byte_level(norm=normalizers.NFKC()), AddedToken("\uff21\uff22", normalized=True)),
        {"tokenizer_config.json": BOS_EOS},
    ),
    "bytes, added by tokenizer_config": (
        byte_level,
        {"tokenizer_config.json": BOS_EOS | {"added_tokens_decoder": {
            "342": {"content": "<|tool|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False},
            "343": {"content": "<text>", "special": False, "lstrip": False, "rstrip": True, "normalized": True},
        }}},
    ),
    "bytes, other flags in tokenizer_config": (
        lambda: with_added(byte_level(), AddedToken("<|im_start|>", special=True, normalized=False)),
        {"tokenizer_config.json": BOS_EOS | {"added_tokens_decoder": {
            "342": {"content": "<|im_start|>", "special": True, "lstrip": True, "rstrip": True, "normalized": False},
        }}},
    ),
    "bytes, EOS is declared empty": (byte_level, {"tokenizer_config.json": {"bos_token": "<|bos|>", "eos_token": ""}}),
    "bytes, added by added_tokens.json": (byte_level, {"added_tokens.json": {"<|a|>": 342, "<|b|>": 343}}),
    "bytes, additional special tokens": (
        byte_level, {"tokenizer_config.json": BOS_EOS | {"additional_special_tokens": ["<|x|>", "<|y|>"]}},
    ),
    "bytes, special tokens of the model": (
        byte_level, {"tokenizer_config.json": BOS_EOS | {"image_token": "<image>", "pad_token": "[PAD]"}},
    ),
    "bytes, a declared token that is text": (
        byte_level, {"tokenizer_config.json": {"bos_token": "<|bos|>", "eos_token": "ba"}},
    ),
    "bytes, Roberta's processor": (
        lambda: _with(byte_level(), processors.RobertaProcessing(("<|eos|>", 341), ("<|bos|>", 340))),
        {"tokenizer_config.json": BOS_EOS},
    ),
    "pieces, a space in front of the first": (lambda: metaspace("first"), {"tokenizer_config.json": SPM | FAST}),
    "pieces, a space in front of all": (
        lambda: begins_with(metaspace("always"), "<s>"), {"tokenizer_config.json": SPM | FAST},
    ),
    "pieces, no space in front": (lambda: metaspace("never"), {"tokenizer_config.json": SPM | FAST}),
    "pieces, Prepend": (lambda: begins_with(prepend(), "<s>"), {"tokenizer_config.json": SPM | FAST}),
    "pieces, no bytes": (lambda: metaspace("first", fallback=False), {"tokenizer_config.json": SPM | FAST}),
    "pieces, unigram": (lambda: metaspace("always", kind="unigram"), {"tokenizer_config.json": SPM | FAST}),
    "pieces, chat tokens": (
        lambda: with_added(begins_with(prepend(), "<s>"), *(AddedToken(name, special=True) for name in CHAT[1:])),
        {"tokenizer_config.json": SPM | FAST | {"eos_token": "<|im_end|>"}},
    ),
    "pieces, chat tokens that are text": (
        lambda: with_added(metaspace("first"), *(AddedToken(name, normalized=False) for name in CHAT[1:])),
        {"tokenizer_config.json": SPM | FAST},
    ),
    "pieces, LlamaTokenizer": (
        lambda: begins_with(prepend(), "<s>"), {"tokenizer_config.json": SPM | {"tokenizer_class": "LlamaTokenizer"}},
    ),
    "pieces, LlamaTokenizerFast, legacy": (
        lambda: begins_with(prepend(), "<s>"),
        {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizerFast", "legacy": True}},
    ),
    "pieces, LlamaTokenizer, no space": (
        lambda: metaspace("first"),
        {"tokenizer_config.json": SPM | {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}},
    ),
    "bytes, GPT2Tokenizer": (
        lambda: byte_level(digits(), special=CHAT),
        {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "eos_token": CHAT[2]}},
    ),
    "bytes, GPT2TokenizerFast, a space in front": (
        lambda: begins_with(byte_level(norm=normalizers.NFC()), "<|bos|>"),
        {"tokenizer_config.json": BOS_EOS | {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}},
    ),
    "bytes, GPT2Tokenizer, a gap and other tokens": (
        lambda: with_gap(with_added(byte_level(), AddedToken("<mask>", lstrip=True, special=True))),
        {"tokenizer_config.json": BOS_EOS | {
            "tokenizer_class": "GPT2Tokenizer", "unk_token": None, "image_token": "<image>",
            "pad_token": {"__type": "AddedToken", "content": "[PAD]", "rstrip": True},
        }},
    ),
    "bytes, GPT2Tokenizer, other added tokens": (
        lambda: with_added(byte_level(), AddedToken("<mask>", special=True)),
        {"tokenizer_config.json": BOS_EOS | {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": {
            "340": {"content": "<|bos|>", "special": True}, "341": {"content": "<|eos|>", "special": False},
            "342": {"content": "<|tool|>", "special": True},
        }}},
    ),
    "bytes, GPT2Tokenizer, the map names others": (
        byte_level,
        {
            "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "additional_special_tokens": ["<|x|>"]},
            "special_tokens_map.json": {
                "eos_token": {"content": "<|eos|>", "rstrip": True}, "additional_special_tokens": ["<|y|>"],
                "image_token": "<image>",
            },
        },
    ),
    "bytes, CodeGenTokenizer": (
        lambda: byte_level(split(GPT4_WORDS)),
        {"tokenizer_config.json": BOS_EOS | {"tokenizer_class": "CodeGenTokenizer"}},
    ),
    "bytes, GPTNeoXTokenizerFast": (
        lambda: begins_with(in_front(byte_level(special=("<|bos|>", "<|eos|>", "<|padding|>"))), "<|bos|>"),
        {"tokenizer_config.json": BOS_EOS | {"tokenizer_class": "GPTNeoXTokenizerFast", "add_bos_token": True}},
    ),
    "bytes, CohereTokenizer": (
        lambda: begins_with(with_added(byte_level(), AddedToken("<PAD>", lstrip=True)), "<|bos|>"),
        {"tokenizer_config.json": BOS_EOS | {
            "tokenizer_class": "CohereTokenizer", "additional_special_tokens": ["<|x|>"],
        }},
    ),
    "bytes, Qwen2Tokenizer": (
        lambda: with_added(byte_level(special=CHAT), AddedToken("<think>"), AddedToken("<tool>", lstrip=True)),
        {"tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer", "eos_token": CHAT[2], "additional_special_tokens": ["<tool>"],
        }},
    ),
    "bytes, Qwen3_5Tokenizer": (
        lambda: byte_level(special=CHAT),
        {"tokenizer_config.json": {"tokenizer_class": "Qwen3_5Tokenizer", "eos_token": CHAT[2]}},
    ),
    "bytes, a class that reads the file as it is": (
        lambda: byte_level(digits()), {"tokenizer_config.json": BOS_EOS | {"tokenizer_class": "ParakeetTokenizerFast"}},
    ),
    "bytes, a class that nobody knows": (
        lambda: byte_level(digits()), {"tokenizer_config.json": BOS_EOS | {"tokenizer_class": "OwnTokenizer"}},
    ),
    "pieces, CodeLlamaTokenizer": (
        prepend, {"tokenizer_config.json": SPM | {"tokenizer_class": "CodeLlamaTokenizer", "add_bos_token": False}},
    ),
    "pieces, CodeLlamaTokenizerFast, other names": (
        lambda: metaspace("always"),
        {"tokenizer_config.json": SPM | {
            "tokenizer_class": "CodeLlamaTokenizerFast", "add_prefix_space": False, "prefix_token": "<think>",
            "suffix_token": None, "eot_token": {"__type": "AddedToken", "content": "<|im_end|>", "rstrip": True},
        }},
    ),
    "pieces, GemmaTokenizer": (
        lambda: begins_with(prepend(), "<s>"),
        {"tokenizer_config.json": SPM | {"tokenizer_class": "GemmaTokenizer"}},
    ),
    "bytes, LlamaTokenizer": (
        byte_level, {"tokenizer_config.json": BOS_EOS | {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}},
    ),
}  # fmt: skip


# The splits that llama.cpp has a name for, and pieces of SentencePiece's own training: these go into a GGUF too.
for _words in byte_level_table.NAMES:
    MAKES |= {
        f"bytes, split as {_words}, BOS in front": (
            functools.partial(byte_pairs, _words, bos="<bos>"),
            {"tokenizer_config.json": {"bos_token": "<bos>", "eos_token": "<|endoftext|>"}},
        ),
        f"bytes, split as {_words}, chat tokens": (
            functools.partial(byte_pairs, _words, special=CHAT, added=TEXT_TOKENS),
            {"tokenizer_config.json": {"eos_token": "<|im_end|>"}},
        ),
        f"bytes, split as {_words}, special tokens first": (
            functools.partial(byte_pairs, _words, first=("<pad>", "<bos>"), bos="<bos>"),
            {"tokenizer_config.json": {"bos_token": "<bos>", "eos_token": "<|endoftext|>", "pad_token": "<pad>"}},
        ),
    }
MAKES |= {
    "SentencePiece's pieces": (lambda: from_sentencepiece(prepend=True), {"tokenizer_config.json": SPM | FAST}),
    "SentencePiece's pieces, BOS in front": (
        lambda: begins_with(from_sentencepiece(prepend=True), "<s>"), {"tokenizer_config.json": SPM | FAST},
    ),
    "SentencePiece's pieces, chat tokens": (
        lambda: with_added(from_sentencepiece(prepend=True), *(AddedToken(name, special=True) for name in CHAT[1:])),
        {"tokenizer_config.json": SPM | FAST | {"eos_token": "<|im_end|>"}},
    ),
}  # fmt: skip


def _with(made: tokenizers.Tokenizer, processor: Any) -> tokenizers.Tokenizer:
    made.post_processor = processor
    return made


def write_make(folder: Path, name: str) -> int:
    """Write a folder's tokenizer files; return the number of tokens in tokenizer.json."""
    build, files = MAKES[name]
    folder.mkdir(parents=True, exist_ok=True)
    n = 0
    if build is not None:
        made = build()
        (folder / "tokenizer.json").write_text(made.to_str())
        n = max(made.get_vocab().values()) + 1
    for file, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / file).write_bytes(data)
    return n


__all__ = ["MAKES", "train", "write_make"]
