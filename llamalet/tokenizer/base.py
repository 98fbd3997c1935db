"""The interface of all tokenizers: text to ids, ids to bytes, and decoding one token at a time."""

import abc
import codecs
import copy
import dataclasses
import functools
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from llamalet.checks import checked, elements, shown
from llamalet.errors import ConfigError, TokenizerError
from llamalet.marked_text import OTHERS
from llamalet.tokenizer.rows import TokenizerRow, pack

# Texts after which another is encoded to see how it continues them; few vocabularies merge across the first.
CONTINUED = ("\n", ".", "a")


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """The ids that begin and end texts.

    Attributes:
        bos: the token that is called BOS; None if there is none.
        eos: the token that is called EOS; None if there is none.
        prefix: what is put before every text: BOS as a rule, or nothing.
        stops: the ids that end a generated text.
    """

    bos: int | None
    eos: int | None
    prefix: tuple[int, ...]
    stops: frozenset[int]

    @classmethod
    def usual(cls, bos: int | None, eos: int | None, turn_ends: Iterable[int] = ()) -> Self:
        """Return the ids of a vocabulary that says no more than its BOS and EOS.

        A text begins with BOS, and ends at EOS, at the end of a turn, or at BOS, which begins the next document.
        """
        stops = frozenset(id for id in (bos, eos, *turn_ends) if id is not None)
        return cls(bos=bos, eos=eos, prefix=() if bos is None else (bos,), stops=stops)

    @property
    def ordered_stops(self) -> list[int]:
        """The ids that end a text, EOS first, as files list them."""
        return sorted(self.stops, key=lambda id: (id != self.eos, id))


class Tokenizer(abc.ABC):
    """A vocabulary and its rule for splitting text into tokens.

    Attributes:
        ids: the ids that begin and end texts.
        file_ids: what the tokenizer's file alone says they are; files beside it or a model may know better.
        special: name -> id of the tokens that are not text: BOS, EOS, the markers of a conversation. A name in a text
            is plain text unless `encode` is called with special=True.
        added: name -> id of the tokens that any text may contain by name, and that are text all the same.
        unused: ids below vocab_size without a token; a model never draws them.
        adds_space: whether `encode` puts a space before a text, which `decode` removes again.
        suffix: file suffix of this kind, as in NAME.tokenizer.SUFFIX.
    """

    suffix: ClassVar[str]
    _rows: list[TokenizerRow]

    def __init__(
        self,
        texts: list[bytes],
        *,
        ids: SpecialIds,
        special: Mapping[str, int],
        added: Mapping[str, int] | None = None,
        unused: Iterable[int] = (),
        adds_space: bool,
    ) -> None:
        """Store the vocabulary.

        Args:
            texts: the bytes of each id; empty for special tokens.
            ids: see above; they are file_ids too.
            special: see above.
            added: see above.
            unused: see above.
            adds_space: see above.
        """
        self._texts = texts
        self.ids = self.file_ids = ids
        self.special = special
        self.added = added or {}
        self.unused = frozenset(unused)
        self.adds_space = adds_space

    def with_ids(self, ids: SpecialIds, name: str = "special ids") -> Self:
        """Return the same tokenizer with other ids that begin and end texts.

        Args:
            ids: the ids.
            name: the file that says them, for messages.

        Raises:
            TokenizerError: if one of them is not in the vocabulary; stops may be any.
        """
        for id in (ids.bos, ids.eos, *ids.prefix):
            if id is not None and not (type(id) is int and 0 <= id < self.vocab_size):
                raise TokenizerError(
                    f"{name}: BOS, EOS or prefix {shown(id)}: not in the vocabulary of {self.vocab_size}; "
                    "correct the file"
                )
        other = copy.copy(self)
        other.ids = ids
        return other

    def with_stops(self, stops: Iterable[int]) -> Self:
        """Return the same tokenizer with other ids that end a generated text."""
        return self.with_ids(dataclasses.replace(self.ids, stops=frozenset(stops)))

    @property
    def bos_id(self) -> int | None:
        """The id of BOS, which may be put before texts or not; None if there is none."""
        return self.ids.bos

    @property
    def eos_id(self) -> int | None:
        """The id of EOS; None if there is none."""
        return self.ids.eos

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end a generated text."""
        return self.ids.stops

    @property
    def separator_id(self) -> int:
        """The id before each document of training data: what begins every text, or EOS if nothing does.

        Raises:
            TokenizerError: if there is neither.
        """
        found = self.ids.prefix[0] if self.ids.prefix else self.ids.eos
        if found is None:
            raise TokenizerError("the vocabulary has neither BOS nor EOS, so documents cannot be told apart")
        return found

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Tokenizer":
        """Read a tokenizer's file, of any kind; see `llamalet.tokenizer.load`."""
        from llamalet.tokenizer import load

        return load(path)

    @property
    def vocab_size(self) -> int:
        """Number of ids (V)."""
        return len(self._texts)

    @functools.cached_property
    def sha256(self) -> str:
        """Identity of the vocabulary: the sha256 of its tokenizer.bin, in hex, whatever file it was read from."""
        return hashlib.sha256(pack(self.pieces())).hexdigest()

    def pieces(self) -> list[TokenizerRow]:
        """Return (bytes, score) per id, the rows of its tokenizer.bin.

        Raises:
            TokenizerError: if that layout cannot represent the vocabulary.
        """
        return self._rows

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token in the middle of a text; empty for special and unknown tokens.

        Raises:
            TokenizerError: if the id is not in the vocabulary.
        """
        number = _whole(token)
        if not 0 <= number < len(self._texts):
            raise TokenizerError(f"token {token}: not in the vocabulary of {self.vocab_size}")
        return self._texts[number]

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, special: bool = False) -> list[int]:
        """Return the ids of a text.

        Args:
            text: any Unicode text.
            bos: whether to put before it what begins every text: BOS, or nothing if the vocabulary begins with nothing.
            eos: whether to append EOS, if there is one.
            special: whether names of special tokens in the text become these tokens. Only for text that the program
                wrote itself; a user's text must not be able to contain them.

        Raises:
            TokenizerError: if it is no text, or contains half of a surrogate pair.
        """
        if not isinstance(text, str):
            raise TokenizerError(f"{shown(text)}: is not text")
        first = list(self.ids.prefix) if bos else []
        last = [self.ids.eos] if eos and self.ids.eos is not None else []
        return first + (self._encode_named(text) if special else self.encode_parts([text])) + last

    def _encode_named(self, text: str) -> list[int]:
        """Return the ids of a text in which names of special tokens become these tokens."""
        return self.encode_parts(self.split_special(text))

    def encode_document(self, text: str) -> list[int]:
        """Return the ids of a document of training data, from its separator_id on.

        Raises:
            TokenizerError: as encode and separator_id.
        """
        return (list(self.ids.prefix) or [self.separator_id]) + self.encode(text)

    def has_same_tokens(self, other: "Tokenizer") -> bool:
        """Return whether each id is the same token as in another tokenizer; they may split texts differently."""
        return (self._texts, self.special, self.added) == (other._texts, other.special, other.added)

    def id_of(self, name: str) -> int | None:
        """Return the id of a token by its name or its text; None if there is none."""
        found = self.special.get(name, self.added.get(name))
        if found is not None or name.encode() not in self._texts:
            return found
        return self._texts.index(name.encode())

    def name_of(self, token: int) -> str:
        """Return the name of a special token, or the text of any other."""
        return next((name for name, id in self.special.items() if id == token), None) or self.token_bytes(token).decode(
            errors="replace"
        )

    def encode_parts(self, parts: Sequence[int | str]) -> list[int]:
        """Return the ids of texts and special tokens in a row.

        Args:
            parts: ids, kept as they are, and texts, encoded as plain text.

        Raises:
            TokenizerError: as encode.
        """
        ids: list[int] = []
        for number, part in enumerate(parts):
            if not isinstance(part, str):
                ids.append(_whole(part))
            else:
                ids += self._encode_after_special(valid(part)) if number else self._encode(valid(part))
        return ids

    def split_special(self, text: str) -> list[int | str]:
        """Split a text into parts for `encode_parts`, replacing each name of a special token by its id."""
        parts = self._special_name.split(text) if self.special else [text]
        return [self.special.get(part, part) for part in parts if part]

    # --- chats, in which a name is a token only where a template wrote it ---

    def encode_marked(self, text: str, marks: str) -> list[int]:
        """Return the ids of a text in which the names of special and added tokens are plain text unless marked.

        Args:
            text: any Unicode text.
            marks: OWN or OTHERS for each character (marked_text.py); a name of which all is OWN becomes its token.

        Raises:
            TokenizerError: as encode.
        """
        parts: list[int | str] = []
        start = at = 0
        while match := self._any_name.search(text, at):
            if OTHERS in marks[match.start() : match.end()]:
                at = match.start() + 1
                continue
            parts += [text[start : match.start()], self._names[match[0]]]
            start = at = match.end()
        parts = [part for part in (*parts, text[start:]) if part != ""]
        return self._encode_nameless(parts, self._encode_in_chat)

    def encode_nameless(self, parts: Sequence[int | str]) -> list[int]:
        """Return the ids of texts and tokens in a row; unlike `encode_parts`, no name in a text becomes its token."""
        return self._encode_nameless(parts, self._encode_part)

    def _encode_nameless(self, parts: Sequence[int | str], encode: Callable[[str, bool], list[int]]) -> list[int]:
        """See encode_nameless; `encode` encodes a text, which may be the first part."""
        ids: list[int] = []
        for number, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
                continue
            first, *others = self._cut_added(valid(part))
            found = encode(first, number == 0)
            for other in others:
                found += self._encode_inside(other)
            if self._marker_ids.isdisjoint(found):
                ids += found
            else:  # a vocabulary that normalizes texts makes a name of other characters; of one alone it cannot
                ids += [id for character in part for id in self._encode_inside(character) if id not in self._marker_ids]
        return ids

    @functools.cached_property
    def _marker_ids(self) -> frozenset[int]:
        """The tokens in `_names`, but for the unknown one, which stands for any text."""
        return frozenset(id for name, id in self._names.items() if "unk" not in name.lower())

    @functools.cached_property
    def _names(self) -> dict[str, int]:
        """The tokens that nobody but a template may name; white space and single characters are anyone's."""
        return {**self.special, **{name: id for name, id in self.added.items() if len(name.strip()) > 1}}

    @functools.cached_property
    def _any_name(self) -> re.Pattern[str]:
        """Matches a name in `_names`, preferring longer ones."""
        return re.compile("|".join(map(re.escape, sorted(self._names, key=len, reverse=True))) or "(?!)")

    def _cut_added(self, text: str) -> list[str]:
        """Split a text inside each name of a special or added token; only where tokens were added."""
        return cut_inside(text, self._any_name) if self.added else [text]

    def _encode_inside(self, text: str) -> list[int]:
        """Return the ids of a valid text that continues another, so that no space is put before it."""
        for before in CONTINUED:
            ids, both = self._encode(before), self._encode(before + text)
            # A character that the vocabulary does not know could become one <unk> with the text's first.
            if both[: len(ids)] == ids and not self._special_ids.intersection(ids):
                return both[len(ids) :]
        return self._encode(text)

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        """The ids of the special tokens."""
        return frozenset(self.special.values())

    def _encode_part(self, text: str, is_first: bool) -> list[int]:
        """Return the ids of a valid text that begins a whole, or follows a special token."""
        return self._encode(text) if is_first else self._encode_after_special(text)

    def _encode_in_chat(self, text: str, is_first: bool) -> list[int]:
        """Return the ids of a valid text that begins a rendered chat, or follows a token there."""
        return self._encode_part(text, is_first)

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of ids, without the space that `encode` adds; invalid UTF-8 becomes U+FFFD.

        Raises:
            UsageError: if they are no list.
            TokenizerError: if one is no id of the vocabulary.
        """
        data = b"".join(map(self.token_bytes, elements("tokens", tokens)))
        return (data.removeprefix(b" ") if self.adds_space else data).decode("utf-8", errors="replace")

    @functools.cached_property
    def _special_name(self) -> re.Pattern[str]:
        """Matches the name of a special token, preferring longer names."""
        names = sorted(self.special, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, names)) + ")")

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Return the ids of a valid text."""

    def _encode_after_special(self, text: str) -> list[int]:
        """Return the ids of a valid text that follows a special token."""
        return self._encode(text)


class StreamDecoder:
    """Decodes one token at a time; the returned texts, joined, equal `Tokenizer.decode` of all tokens.

    A character whose bytes span several tokens is returned with the last of them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = tokenizer.adds_space

    def fork(self) -> "StreamDecoder":
        """Return a decoder that continues the same tokens; what it decodes does not change this one."""
        twin = StreamDecoder(self._tokenizer)
        twin._utf8.setstate(self._utf8.getstate())
        twin._at_start = self._at_start
        return twin

    def push(self, token: int) -> str:
        """Return the text that `token` completes, which may be empty."""
        data = self._tokenizer.token_bytes(token)
        if self._at_start and data:
            data = data.removeprefix(b" ")
            self._at_start = False
        return self._utf8.decode(data)

    def finish(self) -> str:
        """Return U+FFFD if the tokens ended inside a character, else an empty text."""
        return self._utf8.decode(b"", final=True)


def cut_inside(text: str, name: re.Pattern[str]) -> list[str]:
    """Split a text inside each name, after its first character, so that it is none any more."""
    cuts = [0]
    while match := name.search(text, cuts[-1]):
        cuts.append(match.start() + 1)
    return [text[start:end] for start, end in itertools.pairwise([*cuts, len(text)])]


def valid(text: str) -> str:
    """Return the text; raise a TokenizerError if it contains half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(f"character {error.start} of the text: not valid Unicode ({error.reason})") from None
    return text


def _whole(token: object) -> int:
    """Return an id as an int; raise a TokenizerError if it is no whole number."""
    if type(token) is int:
        return token
    try:
        return int(checked("token", token, int))
    except ConfigError as error:
        raise TokenizerError(str(error)) from None
