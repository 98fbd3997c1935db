"""Write a vocabulary as tokenizer.json, the file of Hugging Face's tokenizers library, with the same ids.

SentencePiece merges the neighbours whose merged piece has the highest score; the library merges pairs in the order of a
list. So each piece gives one pair for every way to split it in two, highest scores first. Llama 3's kind goes through
byte_level.py.

Source: tokenizers, https://huggingface.co/docs/tokenizers/components; transformers, convert_slow_tokenizer.py.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llamalet.convert import byte_level
from llamalet.convert.probes import differing_text
from llamalet.errors import TokenizerError, UsageError
from llamalet.tokenizer import SPACE_MARK, JsonTokenizer, Llama3Tokenizer, Tokenizer
from llamalet.tokenizer.byte_alphabet import pairs_in
from llamalet.tokenizer.huggingface import BYTE_TOKEN, piece_decoder, prefix_of, refusals

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
CONTROLS = (UNK, BOS, EOS)
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
    with refusals("the vocabulary's tokenizer.json"):
        found = tokenizers.Tokenizer.from_str(json.dumps(_fields(vocabulary)))
    built = (found.to_str(pretty=True) + "\n").encode()
    probe = differing_text(vocabulary, JsonTokenizer(built, "tokenizer.json"))
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
    if UNK in vocabulary.special:
        fields["unk_token"] = UNK
    return fields if chat_template is None else fields | {"chat_template": chat_template}


def _fields(vocabulary: Tokenizer) -> dict[str, Any]:
    """Return tokenizer.json's contents for a vocabulary of any kind but tokenizer.json's own."""
    named = {"special": vocabulary.special, "added": vocabulary.added}
    if isinstance(vocabulary, Llama3Tokenizer):
        tokens, merges = byte_level.table(vocabulary)
        fields = byte_level_fields(tokens, merges, words=byte_level.NAMES["llama-bpe"], **named)
    else:
        names = [piece.decode().replace(" ", SPACE_MARK) for piece, _ in vocabulary.pieces()]
        scores = [score for _, score in vocabulary.pieces()]
        fields = sentencepiece_fields(names, scores, adds_space=vocabulary.adds_space, **named)
    return fields | {"post_processor": _puts_in_front(vocabulary)}


def sentencepiece_fields(
    tokens: Sequence[str | None],
    scores: Sequence[float],
    *,
    special: Mapping[str, int],
    added: Mapping[str, int],
    adds_space: bool,
) -> dict[str, Any]:
    """Return tokenizer.json's contents for Llama 2's kind; the steps that are left out are none.

    Args:
        tokens: the piece of each id, with SPACE_MARK for a space; None for ids without a token.
        scores: the score of each id; pieces are merged in the order of their scores.
        special: name -> id of the special tokens, whatever their piece is.
        added: name -> id of the tokens that are found by name too, but are text.
        adds_space: whether a space is put before each text.
    """
    names = list(tokens)
    apart = {id: name for named in (special, added) for name, id in named.items()}
    for id, name in apart.items():
        names[id] = name
    ids = {name: id for id, name in enumerate(names) if name is not None}
    mergeable = {name for name, id in ids.items() if id not in apart and not BYTE_TOKEN.fullmatch(name)}
    merges = [(ids[left + right], ids[left], ids[right]) for left, right in pairs_in(mergeable)]
    merges.sort(key=lambda merge: (-scores[merge[0]], *merge))
    steps = [{"type": "Prepend", "prepend": SPACE_MARK}] if adds_space else []
    return {
        "version": "1.0",
        "added_tokens": _listed(special, added),
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*steps, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}],
        },
        "decoder": piece_decoder(strips=adds_space),
        "model": {
            "type": "BPE",
            "unk_token": UNK if UNK in special else None,
            "fuse_unk": True,
            "byte_fallback": any(map(BYTE_TOKEN.fullmatch, ids)),
            "ignore_merges": False,
            "vocab": ids,
            "merges": [[names[left], names[right]] for _, left, right in merges],
        },
    }


def byte_level_fields(
    tokens: Sequence[str | None],
    merges: Iterable[Sequence[str]],
    *,
    words: byte_level.Words,
    special: Mapping[str, int],
    added: Mapping[str, int],
) -> dict[str, Any]:
    """Return tokenizer.json's contents for a byte-level vocabulary.

    Args:
        tokens: the token of each id, one character per byte, or its name; None for ids without a token.
        merges: the pairs, in the order in which they are merged.
        words: how texts are split into words.
        special: name -> id of the special tokens.
        added: name -> id of the tokens that are found by name too, but are text.
    """
    vocab = {token: id for id, token in enumerate(tokens) if token is not None}
    apart = {*special.values(), *added.values()}
    n_others = len(tokens) - len(apart)
    if apart == set(range(n_others, len(tokens))):  # then the library gives them these ids by itself
        vocab = {token: id for token, id in vocab.items() if id < n_others}
    return {
        "version": "1.0",
        "added_tokens": _listed(special, added),
        "normalizer": None,
        "pre_tokenizer": byte_level.pre_tokenizer(words),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": words.ignore_merges,
            "vocab": vocab,
            "merges": [list(pair) for pair in merges],
        },
    }


def _listed(special: Mapping[str, int], added: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return the entries of the tokens that are found by name, before anything is merged, in the order of their ids."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    named = [(id, name, True) for name, id in special.items()] + [(id, name, False) for name, id in added.items()]
    return [{"id": id, "content": name, **flags, "special": is_special} for id, name, is_special in sorted(named)]


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
