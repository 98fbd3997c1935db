"""Write a vocabulary as tokenizer.json, the file of Hugging Face's tokenizers library, with the same ids.

SentencePiece merges the neighbours whose merged piece has the highest score; the library merges pairs in the order of a
list. So each piece gives one pair for every way to split it in two, highest scores first. Llama 3's kind goes through
byte_level.py.

Source: tokenizers, https://huggingface.co/docs/tokenizers/components; transformers, convert_slow_tokenizer.py.
"""

import json
from typing import Any

from llamalet.convert import byte_level
from llamalet.convert.probes import difference
from llamalet.errors import TokenizerError, UsageError
from llamalet.tokenizer import SPACE_MARK, JsonTokenizer, Llama3Tokenizer, Tokenizer
from llamalet.tokenizer.huggingface import BYTE_TOKEN, pairs_in, prefix_of
from llamalet.tokenizer.llama3 import WORDS

UNKNOWN, BOS, EOS = "<unk>", "<s>", "</s>"
CONTROLS = (UNKNOWN, BOS, EOS)
FIRST_TEXT_ID = len(CONTROLS) + 256  # after the bytes


def build(vocabulary: Tokenizer, data: bytes) -> bytes:
    """Return the tokenizer.json of a vocabulary.

    Args:
        vocabulary: any.
        data: its file; a tokenizer.json is returned unchanged, if it begins texts with what the vocabulary's ids say.

    Raises:
        TokenizerError: if the library would encode texts differently.
        UsageError: if the library is not installed.
    """
    if isinstance(vocabulary, JsonTokenizer):
        fields = json.loads(data)
        if prefix_of(fields) == vocabulary.ids.prefix:
            return data
        return (json.dumps(fields | {"post_processor": _puts_in_front(vocabulary)}, ensure_ascii=False) + "\n").encode()
    try:
        import tokenizers
    except ImportError:
        raise UsageError("a tokenizer.json needs the tokenizers library: pip install tokenizers") from None
    found = tokenizers.Tokenizer.from_str(
        json.dumps(_llama3_fields(vocabulary) if isinstance(vocabulary, Llama3Tokenizer) else _fields(vocabulary))
    )
    built = (found.to_str(pretty=True) + "\n").encode()
    probe = difference(vocabulary, JsonTokenizer(built, "tokenizer.json"))
    if probe is not None:
        raise TokenizerError(
            f"the tokenizers library would cut {probe[:40]!r} differently: only SentencePiece's BPE without a "
            "normalizer can become a tokenizer.json"
        )
    return built


def config(vocabulary: Tokenizer, max_seq_len: int, chat_template: str | None) -> dict[str, Any]:
    """Return tokenizer_config.json's fields.

    The class is the one that uses tokenizer.json unchanged; LlamaTokenizer would treat spaces differently.
    """
    ids = vocabulary.ids
    fields: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{
            role: vocabulary.name_of(id)
            for role, id in (("bos_token", ids.bos), ("eos_token", ids.eos))
            if id is not None
        },
        "add_bos_token": bool(ids.prefix),
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
    }
    if UNKNOWN in vocabulary.special:
        fields["unk_token"] = UNKNOWN
    return fields if chat_template is None else fields | {"chat_template": chat_template}


def _fields(vocabulary: Tokenizer) -> dict[str, Any]:
    """Return tokenizer.json's contents for Llama 2's kind; the steps that are left out are none."""
    names = [piece.decode().replace(" ", SPACE_MARK) for piece, _ in vocabulary.pieces()]
    apart = {id: name for named in (vocabulary.special, vocabulary.added) for name, id in named.items()}
    for id, name in apart.items():
        names[id] = name
    ids = {name: id for id, name in enumerate(names)}
    scores = [score for _, score in vocabulary.pieces()]
    mergeable = {name for id, name in enumerate(names) if id not in apart and not BYTE_TOKEN.fullmatch(name)}
    merges = [(ids[left + right], ids[left], ids[right]) for left, right in pairs_in(mergeable)]
    merges.sort(key=lambda merge: (-scores[merge[0]], *merge))
    steps = [{"type": "Prepend", "prepend": SPACE_MARK}] if vocabulary.adds_space else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if vocabulary.adds_space else []
    return {
        "version": "1.0",
        "added_tokens": [_added(name, id, name in vocabulary.special) for id, name in sorted(apart.items())],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*steps, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}],
        },
        "post_processor": _puts_in_front(vocabulary),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": UNKNOWN if UNKNOWN in vocabulary.special else None,
            "fuse_unk": True,
            "byte_fallback": any(map(BYTE_TOKEN.fullmatch, names)),
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
        "added_tokens": [_added(name, id, True) for id, name in sorted(names.items())],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, bytes_in_words]},
        "post_processor": _puts_in_front(vocabulary),
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


def _added(name: str, id: int, special: bool) -> dict[str, Any]:
    """Return the entry of a token that is found by name, before anything is merged."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": id, "content": name, **flags}


def _puts_in_front(vocabulary: Tokenizer) -> dict[str, Any] | None:
    """Return the post-processor that puts before each text what begins it; None if nothing does."""
    if not vocabulary.ids.prefix:
        return None
    named = [(vocabulary.name_of(id), id) for id in vocabulary.ids.prefix]
    prefix = [{"SpecialToken": {"id": name, "type_id": 0}} for name, _ in named]
    first, second = ({"Sequence": {"id": text, "type_id": number}} for number, text in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [*prefix, first],
        "pair": [*prefix, first, *prefix, second],
        "special_tokens": {name: {"id": name, "ids": [id], "tokens": [name]} for name, id in named},
    }
