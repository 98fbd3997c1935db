"""A vocabulary as tokenizer.json, the file of Hugging Face's tokenizers library, with the ids that it has here.

SentencePiece joins neighbours by the score of what they become; the library joins pairs by their place in a list. So
each piece gives one pair for every way to cut it in two, those with the highest score first.
"""

import json
from pathlib import Path
from typing import Any

from llamalet.errors import TokenizerError, UsageError
from llamalet.tokenizer import SPACE_MARK, Tokenizer

UNKNOWN, BOS, EOS = "<unk>", "<s>", "</s>"
CONTROLS = (UNKNOWN, BOS, EOS)
FIRST_TEXT_ID = len(CONTROLS) + 256  # behind the bytes

# Texts on which both must agree: spaces, tabs, line ends, emoji and joiners, digits, what the vocabulary cannot spell.
PROBES = (
    "", " ", "  ", "Once upon a time", " leading and trailing ", "a\tb\n\nc\r\n", "1234567890 3.14", "\u00e9\u4e2d",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467", "zero\u200bwidth", "a" * 21, "x" + " " * 33 + "y",
    "\x00\x01\x7f", "e\u0301", "<0x41> [INST]",
)  # fmt: skip


def build(vocabulary: Tokenizer, path: Path | None) -> bytes:
    """Return the tokenizer.json of a vocabulary.

    Args:
        vocabulary: SentencePiece BPE, or llama2.c's tokenizer.bin.
        path: the file that it was read from; a tokenizer.json is passed on as it is.

    Raises:
        TokenizerError: if the library would cut texts differently.
        UsageError: if the library is not installed.
    """
    if path is not None and path.name.endswith(".json"):
        return path.read_bytes()
    try:
        import tokenizers
    except ImportError:
        raise UsageError("a tokenizer.json needs the tokenizers library: pip install tokenizers") from None
    found = tokenizers.Tokenizer.from_str(json.dumps(_fields(vocabulary)))
    for probe in PROBES:
        if found.encode(probe, add_special_tokens=False).ids != vocabulary.encode(probe):
            raise TokenizerError(
                f"the tokenizers library would cut {probe!r} differently: only SentencePiece BPE with byte fallback, a "
                "dummy prefix and no folding of spaces becomes a tokenizer.json"
            )
    return (found.to_str(pretty=True) + "\n").encode()


def config(vocabulary: Tokenizer, max_seq_len: int, chat_template: str | None) -> dict[str, Any]:
    """Return tokenizer_config.json's fields.

    The class is the one that takes tokenizer.json as it is; LlamaTokenizer would change how spaces are treated.
    """
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNKNOWN,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
    }
    return fields if chat_template is None else fields | {"chat_template": chat_template}


def _fields(vocabulary: Tokenizer) -> dict[str, Any]:
    """Return tokenizer.json's contents.

    Source: tokenizers, https://huggingface.co/docs/tokenizers/components; transformers, convert_slow_tokenizer.py.
    """
    names, scores = _names(vocabulary), [score for _, score in vocabulary.pieces()]
    ids = {name: id for id, name in enumerate(names)}
    cuts = [
        (-scores[id], id, ids[name[:at]], ids[name[at:]])
        for id, name in enumerate(names)
        if id >= FIRST_TEXT_ID
        for at in range(1, len(name))
        if ids.get(name[:at], 0) >= FIRST_TEXT_ID and ids.get(name[at:], 0) >= FIRST_TEXT_ID
    ]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bos = {"SpecialToken": {"id": BOS, "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ids[name], "content": name, **special} for name in CONTROLS],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE_MARK},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, bos, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {BOS: {"id": BOS, "ids": [ids[BOS]], "tokens": [BOS]}},
        },
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
            "dropout": None,
            "unk_token": UNKNOWN,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [[names[left], names[right]] for _, _, left, right in sorted(cuts)],
        },
    }


def _names(vocabulary: Tokenizer) -> list[str]:
    """Return how the library writes each token: with a mark for spaces, the control tokens by their usual names."""
    names = [piece.decode().replace(" ", SPACE_MARK) for piece, _ in vocabulary.pieces()]
    if names[0] != UNKNOWN or (vocabulary.bos_id, vocabulary.eos_id) != (1, 2):
        raise TokenizerError("the vocabulary's first tokens are not <unk>, <s> and </s>")
    return [*CONTROLS, *names[len(CONTROLS) :]]
