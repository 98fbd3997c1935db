"""Hugging Face's tokenizer.json, encoded by the tokenizers library.

The library does not expose the bytes of each token. They follow from the file: its decoder says whether tokens spell
bytes, as in GPT-2 (ByteLevel: Llama 3), or text, as in SentencePiece (Llama 2). Llama 3's tokenizer.json is read
without the library: its list of merges follows from the ids, so it is equivalent to a rank table of llama3.py.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llamalet.errors import TokenizerError, UsageError
from llamalet.marked_text import OTHERS
from llamalet.tokenizer.base import CONTINUED, SpecialIds, Tokenizer, cut_inside, valid
from llamalet.tokenizer.byte_alphabet import byte_level_bytes, rows_of_table
from llamalet.tokenizer.llama2 import SPACE_MARK
from llamalet.tokenizer.llama3 import BOS, EOS, SPECIAL_NAME, TURN_ENDS, WORDS
from llamalet.tokenizer.rows import MAX_VOCAB, TokenizerRow

MAX_BYTE_LEVELS, MAX_STEPS = 3, 64
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
# Names of BOS and EOS to try, in this order, in files that do not say which they are.
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "<|im_start|>", "<|endoftext|>")
EOS_NAMES = ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>", "<|im_end|>")
CHAT_TURN_ENDS = (*TURN_ENDS, "<|im_end|>", "<|end|>", "<|eot|>")
# How Llama 3's tokenizer.json splits a text into words and merges within them.
LLAMA3_STEPS = (
    {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False},
    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
)
LLAMA3_MODEL = {
    "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
    "byte_fallback": False, "ignore_merges": True,
}  # fmt: skip


class JsonTokenizer(Tokenizer):
    """A tokenizer.json; needs the tokenizers package."""

    suffix = "json"

    def __init__(self, data: bytes, name: str, fields: Mapping[str, Any] | None = None) -> None:
        """Parse a tokenizer.json.

        Args:
            data: the file's bytes.
            name: the file's name, for messages.
            fields: what `json_object` makes of them, if they are parsed already.

        Raises:
            TokenizerError: if it is damaged, or spells its tokens in another way.
            UsageError: if the tokenizers package is not installed.
        """
        try:
            import tokenizers
        except ImportError:
            raise UsageError(f"{name}: a tokenizer.json needs the tokenizers package: pip install tokenizers") from None
        self._name = name
        with refusals(self._name):
            table = json_object(data, name) if fields is None else fields
            _check_steps(table)
            self._library = tokenizers.Tokenizer.from_str(data.decode())
            decoders = parts_of(table.get("decoder"), "decoders")
            vocab = self._library.get_vocab()
            texts = _texts(vocab, table["added_tokens"], decoders)
            special, added = (
                {
                    token["content"]: vocab[token["content"]]
                    for token in table["added_tokens"]
                    if token["special"] is is_special
                }
                for is_special in (True, False)
            )
            ids = _guessed_ids(table, special)
            model = table["model"]
            self._unknown_id = vocab.get(model.get("unk_token"), model.get("unk_id"))
        if isinstance(self._library.model, tokenizers.models.BPE):
            self._library.model.dropout = None  # meant for training: each encoding of a text would differ
        self._library.no_truncation()
        self._library.no_padding()
        super().__init__(
            texts,
            ids=ids,
            special=special,
            added=added,
            unused=set(range(len(texts))).difference(vocab.values()),
            adds_space=any(d["type"] == "Strip" or d["type"] == "Metaspace" and _strips(d) for d in decoders),
        )
        self.sha256 = hashlib.sha256(data).hexdigest()
        # Older files for Llama 2 put a space before each text between special tokens, newer ones do not.
        self._marker = next(iter(special), None)
        self._first_text_is_like_others = self._marker is None or self._encode_behind_marker("a") == self._encode("a")

    def id_of(self, name: str) -> int | None:
        """Return the id of a token by its name or its text; None if there is none."""
        found: int | None = self._library.token_to_id(name)
        return found

    def pieces(self) -> list[TokenizerRow]:
        """Raise a TokenizerError: a tokenizer.bin cannot represent a tokenizer.json."""
        raise TokenizerError(f"{self._name}: a tokenizer.json cannot be written in the layout of tokenizer.bin")

    def _encode(self, text: str) -> list[int]:
        self._library.encode_special_tokens = True  # encode their names as plain text
        with refusals(self._name):
            ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids

    def _encode_named(self, text: str) -> list[int]:
        # The library knows which spaces around a special token belong to it.
        self._library.encode_special_tokens = False
        with refusals(self._name):
            ids: list[int] = self._library.encode(valid(text), add_special_tokens=False).ids
        return ids

    def _encode_after_special(self, text: str) -> list[int]:
        if self._first_text_is_like_others:
            return self._encode(text)
        return [id for piece in cut_inside(text, self._special_name) for id in self._encode_behind_marker(piece)]

    def _encode_behind_marker(self, text: str) -> list[int]:
        """Return the ids of a text, free of special tokens' names, that follows a special token."""
        self._library.encode_special_tokens = False
        with refusals(self._name):
            ids: list[int] = self._library.encode(f"{self._marker}{text}", add_special_tokens=False).ids
        return ids[1:]

    def encode_marked(self, text: str, marks: str) -> list[int]:
        """Return the ids of a text: see Tokenizer. The library finds the names, as only it knows how each is matched.

        Where it finds one in someone else's text, the text before it, the name and the text after it are encoded apart.
        """
        ids: list[int] = []
        names: dict[str, list[int]] = {}
        pieces = [(0, len(valid(text)), False)]  # from where to where, and whether it is a name; the next is the last
        while pieces:
            start, end, is_name = pieces.pop()
            piece = text[start:end]
            if is_name:
                if piece not in names:
                    names[piece] = self._encode_name(piece)
                ids += names[piece]
                continue
            found, spans = self._encode_with_names(piece, inside=start > 0)
            cuts = [start]
            for id, (first, last) in zip(found, spans, strict=True):
                first, last = _without_space(text, start + first, start + last)
                if id in self._name_ids and OTHERS in marks[first:last] and not self._is_unknown(id, text[first:last]):
                    cuts += [first, last]
            if len(cuts) == 1:
                ids += found
                continue
            cuts.append(end)
            pieces += [(a, b, number % 2 == 1) for number, (a, b) in enumerate(itertools.pairwise(cuts))][::-1]
        return ids

    def _encode_with_names(self, text: str, *, inside: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a text in which names are tokens, and from where to where in the text each reaches.

        Args:
            text: a valid text; it may be empty.
            inside: whether it continues another text.
        """
        self._library.encode_special_tokens = False
        with refusals(self._name):
            for before in CONTINUED if inside else ():
                ids = self._library.encode(before, add_special_tokens=False).ids
                both = self._library.encode(before + text, add_special_tokens=False)
                n, shift = len(ids), len(before)
                if both.ids[:n] == ids and not self._special_ids.intersection(ids):
                    return both.ids[n:], [(max(0, start - shift), end - shift) for start, end in both.offsets[n:]]
            alone = self._library.encode(text, add_special_tokens=False)
            return alone.ids, alone.offsets

    def _encode_name(self, name: str) -> list[int]:
        """Return the ids of a token's name as plain text."""
        ids = self._encode_inside(name)
        if self._marker_ids.isdisjoint(ids):
            return ids
        if len(name) == 1:  # a normalizer wrote another token's name for this character, or it is itself a token
            return [id for id in ids if id not in self._marker_ids or self._names.get(name) == id]
        return self._encode_name(name[:1]) + self._encode_name(name[1:])

    def _is_unknown(self, id: int, text: str) -> bool:
        """Return whether an id stands for text that the vocabulary does not know, and not for its own name."""
        return id == self._unknown_id and self._names.get(text) != id

    @functools.cached_property
    def _marker_ids(self) -> frozenset[int]:
        """The tokens that nobody but a template may name, but for the unknown one, which stands for any text."""
        return self._name_ids - {self._unknown_id}

    @functools.cached_property
    def _name_ids(self) -> frozenset[int]:
        """The tokens that nobody but a template may name."""
        return frozenset(self._names.values())


def _without_space(text: str, start: int, end: int) -> tuple[int, int]:
    """Return where a name in a text begins and ends without the white space beside it, which its token may include."""
    name = text[start:end]
    if not name.strip():
        return start, end
    left = len(name) - len(name.lstrip())
    right = len(name) - len(name.rstrip())
    return start + left, end - right


@contextlib.contextmanager
def refusals(name: str) -> Iterator[None]:
    """Turn whatever the library raises, a panic of its Rust code included, into a TokenizerError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, TokenizerError):
        raise
    except KeyError as error:
        raise TokenizerError(f"{name}: not a usable tokenizer.json: {error} is missing") from None
    except (TypeError, AttributeError, IndexError):  # Python's words would say nothing of the file
        raise TokenizerError(f"{name}: not a usable tokenizer.json: a field has the wrong type") from None
    except BaseException as error:  # a panic is no Exception
        raise TokenizerError(f"{name}: not a usable tokenizer.json: {error}") from None


def json_object(data: bytes, name: str) -> dict[str, Any]:
    """Return the object in a tokenizer.json, which may be larger than other files and is checked by the library.

    Raises:
        TokenizerError: if they are no JSON object.
    """
    try:
        fields = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{name}: not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise TokenizerError(f"{name}: must hold a JSON object")
    return fields


def rank_rows(fields: Mapping[str, Any]) -> list[TokenizerRow] | None:
    """Return the rows of the rank table equivalent to a tokenizer.json's fields, or None if there is none."""
    try:
        model, added = fields["model"], fields["added_tokens"]
        steps = parts_of(fields["pre_tokenizer"], "pretokenizers")
        names = {token["content"] for token in added if token["special"] and not token["normalized"]}
        if (
            fields["normalizer"] is not None
            or [part["type"] for part in parts_of(fields["decoder"], "decoders")] != ["ByteLevel"]
            or any(model.get(key) != value for key, value in LLAMA3_MODEL.items())
            or [{key: step.get(key) for key in LLAMA3_STEPS[i]} for i, step in enumerate(steps)] != [*LLAMA3_STEPS]
            or len(names) != len(added)
            or any(token.get(flag) for token in added for flag in ("single_word", "lstrip", "rstrip"))
            or not {BOS, EOS} <= names
            or not all(SPECIAL_NAME.fullmatch(name.encode()) for name in names)
        ):
            return None
        tokens = {id: token for token, id in model["vocab"].items()} | {
            token["id"]: token["content"] for token in added
        }
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        return rows_of_table([tokens[id] for id in range(len(tokens))], merges, names)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return None  # damaged or of another kind; JsonTokenizer says what is wrong


def _guessed_ids(table: Mapping[str, Any], special: Mapping[str, int]) -> SpecialIds:
    """Return the ids that begin and end texts, as far as names tell; files beside a tokenizer.json know better.

    Files of this project from before it asked the others rely on the guess.
    """
    names = {id: token for token, id in special.items()}
    begin = [names[id] for id in prefix_of(table) if id in names]
    bos = next((name for name in (*begin[:1], *BOS_NAMES) if name in special), None)
    eos = next((name for name in EOS_NAMES if name in special), None)
    ends = [special[end] for end in CHAT_TURN_ENDS if end in special]
    return SpecialIds.usual(special.get(bos or ""), special.get(eos or ""), ends)


def prefix_of(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the ids that the post-processor of a tokenizer.json puts before every text.

    Source: tokenizers, https://huggingface.co/docs/tokenizers/api/post-processors

    Raises:
        KeyError, TypeError, ValueError: if the fields are damaged.
    """
    prefix: list[int] = []
    for part in parts_of(fields.get("post_processor"), "processors"):
        if part["type"] in ("BertProcessing", "RobertaProcessing"):
            prefix.append(int(part["cls"][1]))
        elif part["type"] == "TemplateProcessing":
            for piece in part["single"]:
                if "Sequence" in piece:
                    break
                prefix += part["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return tuple(prefix)


def parts_of(decoder: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """Return the parts of a Sequence of decoders, pre-tokenizers or post-processors, or the single one."""
    if decoder is None:
        return []
    return list(decoder[key]) if decoder["type"] == "Sequence" else [decoder]


def _strips(metaspace: Mapping[str, Any]) -> bool:
    """Return whether a Metaspace puts a space before a text."""
    return bool(metaspace.get("add_prefix_space", True)) and metaspace.get("prepend_scheme", "always") != "never"


def _check_steps(table: Mapping[str, Any]) -> None:
    """Raise a ValueError if a text passes through so many steps, each of which may double it, that memory runs out."""
    for key in ("normalizer", "pre_tokenizer", "decoder"):
        steps = json.dumps(table.get(key))
        if steps.count('"ByteLevel"') > MAX_BYTE_LEVELS or steps.count('"type"') > MAX_STEPS:
            raise ValueError(f"its {key} has more steps than any tokenizer needs")


def _texts(
    vocab: Mapping[str, int], added_tokens: Sequence[Mapping[str, Any]], decoders: Sequence[Mapping[str, Any]]
) -> list[bytes]:
    """Return the bytes of each id, empty for special tokens and for ids that the file skips."""
    kinds = {decoder["type"] for decoder in decoders}
    if not kinds & {"ByteLevel", "Metaspace", "Replace"}:
        raise ValueError(f"its decoder is {'+'.join(sorted(kinds)) or 'missing'}: must be ByteLevel or SentencePiece's")
    bytes_of = byte_level_bytes()
    if max(vocab.values()) >= MAX_VOCAB:
        raise ValueError(f"it has the id {max(vocab.values())}: must be below {MAX_VOCAB}")
    texts = [b""] * (max(vocab.values()) + 1)
    added = {token["content"]: token for token in added_tokens}
    for token, id in vocab.items():
        if token in added:
            texts[id] = b"" if added[token]["special"] else token.encode()
        elif "ByteLevel" in kinds and bytes_of.keys() >= set(token):
            texts[id] = bytes(bytes_of[character] for character in token)
        elif "ByteFallback" in kinds and BYTE_TOKEN.fullmatch(token):
            texts[id] = bytes([int(token[3:5], 16)])
        else:
            texts[id] = token.replace(SPACE_MARK, " ").encode()
    return texts


def piece_decoder(*, strips: bool) -> dict[str, Any]:
    """Return the decoder of a tokenizer.json with SentencePiece's pieces; `strips` takes the first space away again."""
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    return {"type": "Sequence", "decoders": steps + [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * strips}
