"""Llama 3's vocabularies as Hugging Face and llama.cpp store them: a visible character per byte, and pairs to merge.

In our files a token's id is its rank, and the ranks decide what is merged. In theirs a list of pairs does, so each
token gives one pair for every way to split it into two tokens, in the order of the ids.

Source: transformers, convert_llama_weights_to_hf.py and convert_slow_tokenizer.py (TikTokenConverter).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llamalet.errors import TokenizerError
from llamalet.tokenizer import JsonTokenizer, Llama3Tokenizer, Tokenizer
from llamalet.tokenizer.huggingface import byte_level_bytes, pairs_in, rows_of_table
from llamalet.tokenizer.llama3 import WORDS


class MergeTable(NamedTuple):
    """A vocabulary of this kind.

    tokens: the token of each id, one character per byte; special tokens by name.
    merges: the pairs, in the order in which they are merged.
    special: the special tokens' ids by name.
    """

    tokens: list[str]
    merges: list[tuple[str, str]]
    special: Mapping[str, int]


def table(vocabulary: Tokenizer, data: bytes) -> MergeTable:
    """Return a vocabulary as a table.

    Args:
        vocabulary: of Llama 3's kind.
        data: its file; a tokenizer.json has the pairs.

    Raises:
        TokenizerError: if it is a tokenizer.json that splits texts into other words than Llama 3's.
    """
    if isinstance(vocabulary, JsonTokenizer):
        return _of_json(vocabulary, json.loads(data))
    assert isinstance(vocabulary, Llama3Tokenizer)
    characters = {byte: character for character, byte in byte_level_bytes().items()}
    n_ranks = vocabulary.vocab_size - len(vocabulary.special)
    rows = [piece for piece, _ in vocabulary.pieces()]
    tokens = ["".join(map(characters.__getitem__, row)) for row in rows[:n_ranks]]
    ids = {token: id for id, token in enumerate(tokens)}
    merges = sorted(pairs_in(ids), key=lambda pair: (ids[pair[0] + pair[1]], ids[pair[0]], ids[pair[1]]))
    return MergeTable(tokens + [row.decode() for row in rows[n_ranks:]], merges, vocabulary.special)


def _of_json(vocabulary: JsonTokenizer, fields: Mapping[str, Any]) -> MergeTable:
    """Return the table in a tokenizer.json."""
    model = fields["model"]
    if model.get("type") != "BPE" or json.dumps(WORDS) not in json.dumps(fields.get("pre_tokenizer")):
        raise TokenizerError("the tokenizer.json does not split texts as Llama 3 does; no other can be written here")
    names = {id: token for token, id in (model["vocab"] | vocabulary.special).items()}
    if sorted(names) != list(range(vocabulary.vocab_size)):
        raise TokenizerError("the tokenizer.json has no token for some ids")
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return MergeTable(
        [names[id] for id in range(len(names))], [(left, right) for left, right in pairs], vocabulary.special
    )


def from_table(tokens: Sequence[str], merges: Sequence[str], special: Sequence[int], name: str) -> Llama3Tokenizer:
    """Return the vocabulary that a table describes.

    Args:
        tokens: see MergeTable.
        merges: the pairs, as "LEFT RIGHT".
        special: the special tokens' ids.
        name: where the table is from, for messages.

    Raises:
        TokenizerError: if it is damaged, or not of Llama 3's kind, where ids are ranks.
    """
    try:
        rows = rows_of_table(tokens, [merge.split(" ") for merge in merges], [tokens[id] for id in special])
    except (KeyError, ValueError, IndexError) as error:
        raise TokenizerError(f"{name}: its tokens are damaged, or not written byte by byte: {error}") from None
    if rows is None:
        raise TokenizerError(f"{name}: its pairs are not merged in the order of the ids, as Llama 3's are")
    return Llama3Tokenizer(rows, name, suffix="bin")
