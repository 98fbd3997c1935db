"""Write a vocabulary as tokenizer.json, the file of Hugging Face's tokenizers library, with the same ids.

SentencePiece merges the neighbours whose merged piece has the highest score; the library merges pairs in the order of a
list. So each piece gives one pair for every way to split it in two, highest scores first. Llama 3's kind goes through
byte_level.py.

Source: tokenizers, https://huggingface.co/docs/tokenizers/components; transformers, convert_slow_tokenizer.py.
"""

import json
from typing import Any

from llamalet.convert import byte_level
from llamalet.errors import TokenizerError, UsageError
from llamalet.tokenizer import SPACE_MARK, JsonTokenizer, Llama3Tokenizer, Tokenizer
from llamalet.tokenizer.huggingface import pairs_in
from llamalet.tokenizer.llama3 import WORDS

UNKNOWN, BOS, EOS = "<unk>", "<s>", "</s>"
CONTROLS = (UNKNOWN, BOS, EOS)
FIRST_TEXT_ID = len(CONTROLS) + 256  # after the bytes

# Texts that both must encode alike: spaces, tabs, line ends, emoji, digits, characters without a token.
PROBES = (
    "", " ", "  ", "Once upon a time", " leading and trailing ", "a\tb\n\nc\r\n", "1234567890 3.14", "\u00e9\u4e2d",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467", "zero\u200bwidth", "a" * 21, "x" + " " * 33 + "y",
    "\x00\x01\x7f", "e\u0301", "<0x41> [INST]",
)  # fmt: skip


def build(vocabulary: Tokenizer, data: bytes) -> bytes:
    """Return the tokenizer.json of a vocabulary.

    Args:
        vocabulary: any.
        data: its file; a tokenizer.json is returned unchanged.

    Raises:
        TokenizerError: if the library would encode texts differently.
        UsageError: if the library is not installed.
    """
    if isinstance(vocabulary, JsonTokenizer):
        return data
    try:
        import tokenizers
    except ImportError:
        raise UsageError("a tokenizer.json needs the tokenizers library: pip install tokenizers") from None
    found = tokenizers.Tokenizer.from_str(
        json.dumps(_llama3_fields(vocabulary) if isinstance(vocabulary, Llama3Tokenizer) else _fields(vocabulary))
    )
    for probe in PROBES:
        if found.encode(probe, add_special_tokens=False).ids != vocabulary.encode(probe):
            raise TokenizerError(
                f"the tokenizers library would cut {probe!r} differently: only SentencePiece's BPE with byte "
                "fallback, a space before each text and no merging of spaces can become a tokenizer.json"
            )
    return (found.to_str(pretty=True) + "\n").encode()


def config(vocabulary: Tokenizer, max_seq_len: int, chat_template: str | None) -> dict[str, Any]:
    """Return tokenizer_config.json's fields.

    The class is the one that uses tokenizer.json unchanged; LlamaTokenizer would treat spaces differently.
    """
    names = {id: name for name, id in vocabulary.special.items()}
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[vocabulary.bos_id],
        "eos_token": names[vocabulary.eos_id],
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
    }
    if UNKNOWN in vocabulary.special:
        fields["unk_token"] = UNKNOWN
    return fields if chat_template is None else fields | {"chat_template": chat_template}


def _fields(vocabulary: Tokenizer) -> dict[str, Any]:
    """Return tokenizer.json's contents for Llama 2's kind; the steps that are left out are none."""
    names, scores = _names(vocabulary), [score for _, score in vocabulary.pieces()]
    ids = {name: id for id, name in enumerate(names)}
    merges = [(ids[left + right], ids[left], ids[right]) for left, right in pairs_in(set(names[FIRST_TEXT_ID:]))]
    merges.sort(key=lambda merge: (-scores[merge[0]], *merge))
    return {
        "version": "1.0",
        "added_tokens": [_special(name, ids[name]) for name in CONTROLS],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE_MARK},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK},
            ],
        },
        "post_processor": _puts_in_front(BOS, ids[BOS]),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": UNKNOWN,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [[names[left], names[right]] for _, left, right in merges],
        },
    }


def _llama3_fields(vocabulary: Llama3Tokenizer) -> dict[str, Any]:
    """Return tokenizer.json's contents for Llama 3's kind."""
    tokens, merges, special = byte_level.table(vocabulary, b"")
    names = {id: name for name, id in special.items()}
    bytes_in_words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    words = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "added_tokens": [_special(name, id) for id, name in sorted(names.items())],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, bytes_in_words]},
        "post_processor": _puts_in_front(names[vocabulary.bos_id], vocabulary.bos_id),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a word that is a token becomes that token, whatever merging would give
            "vocab": {token: id for id, token in enumerate(tokens) if id not in names},
            "merges": [list(pair) for pair in merges],
        },
    }


def _special(name: str, id: int) -> dict[str, Any]:
    """Return the entry of a special token."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": id, "content": name, **flags}


def _puts_in_front(name: str, id: int) -> dict[str, Any]:
    """Return the post-processor that puts BOS before each text."""
    bos = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": text, "type_id": number}} for number, text in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, bos, second],
        "special_tokens": {name: {"id": name, "ids": [id], "tokens": [name]}},
    }


def _names(vocabulary: Tokenizer) -> list[str]:
    """Return the tokens as the library writes them: spaces as marks, control tokens by their usual names."""
    names = [piece.decode().replace(" ", SPACE_MARK) for piece, _ in vocabulary.pieces()]
    if names[0] != UNKNOWN or (vocabulary.bos_id, vocabulary.eos_id) != (1, 2):
        raise TokenizerError("the vocabulary's first tokens are not <unk>, <s> and </s>")
    return [*CONTROLS, *names[len(CONTROLS) :]]
