"""Tokenizers in GGUF files. Ids of foreign files are llama.cpp's (0.3.36 of llama-cpp-python, on the same files)."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf_makes import CHATML, MAKES, OTHERS, byte_pairs, made, rows
from toy import random_tensors, toy_tokenizer

from llamalet.config import ModelConfig
from llamalet.convert import formats, gguf_file
from llamalet.convert.gguf_table import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from llamalet.convert.imported_model import ImportedModel
from llamalet.convert.probes import check_same
from llamalet.errors import TokenizerError
from llamalet.tokenizer import BinTokenizer, JsonTokenizer, SpecialIds, Tokenizer, parse, write_bin

TINY = ModelConfig.create(dim=16, n_layers=1, n_heads=2, hidden_dim=32, vocab_size=300, max_seq_len=8)


def source_of(vocabulary: Tokenizer, data: bytes, n_pads: int = 0) -> ImportedModel:
    config = dataclasses.replace(TINY, vocab_size=vocabulary.vocab_size + n_pads)
    return ImportedModel(
        name="toy", config=config, tensors=random_tensors(config), tokenizer=vocabulary, tokenizer_data=data
    )


@pytest.mark.parametrize("make", MAKES)
def test_what_goes_out_comes_back(tmp_path, make):
    vocabulary, data = MAKES[make]()
    gguf_file.write(tmp_path / "m.gguf", source_of(vocabulary, data, n_pads=7))
    found = gguf_file.read(str(tmp_path / "m.gguf"))
    assert check_same(vocabulary, found.tokenizer, make) > 20
    assert found.tokenizer.ids == vocabulary.ids and found.stop_tokens == tuple(sorted(vocabulary.stop_ids))
    assert found.tokenizer.vocab_size == vocabulary.vocab_size
    assert (found.tokenizer.special, found.tokenizer.added) == (vocabulary.special, vocabulary.added)
    tokens = gguf.GGUFReader(tmp_path / "m.gguf").get_field("tokenizer.ggml.tokens").contents()
    assert len(tokens) == len(set(tokens)) == found.config.vocab_size  # llama.cpp aborts otherwise
    again = parse(found.tokenizer_data, "inside a .bin").with_ids(found.tokenizer.ids)
    check_same(vocabulary, again, make)


@pytest.mark.parametrize("make", OTHERS)
def test_what_llama_cpp_would_cut_differently_is_refused_in_one_line(tmp_path, make):
    build, words = OTHERS[make]
    with pytest.raises(TokenizerError, match=words) as refused:
        gguf_file.write(tmp_path / "m.gguf", source_of(*build()))
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_the_kinds_and_pads_are_those_of_llama_cpp_s_converter(tmp_path):
    vocabulary, data = made(byte_pairs("smollm", special=("<bos>",), added=("<tool>",)))
    gguf_file.write(tmp_path / "m.gguf", source_of(vocabulary, data, 2))
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tokens, kinds = (reader.get_field(f"tokenizer.ggml.{key}").contents() for key in ("tokens", "token_type"))
    n = vocabulary.vocab_size
    assert tokens[-4:] == ["<bos>", "<tool>", f"[PAD{n}]", f"[PAD{n + 1}]"]
    assert kinds[-5:] == [NORMAL, CONTROL, USER_DEFINED, UNUSED, UNUSED]
    assert reader.get_field("tokenizer.ggml.pre").contents() == "smollm"


# -- the ids that begin and end texts ---------------------------------------------------------------------------------

NAMES = ("<A>", "<B>", "<C>", "<D>", "<E>", "<F>")


@pytest.mark.parametrize(
    ("ids", "keys", "note"),
    [
        # BOS, EOS, prefix, stops -> bos, eos, eot, eom and add_bos in the file
        ((0, 1, (0,), {1}), (0, 1, None, None, True), None),
        ((0, 1, (), {1}), (0, 1, None, None, False), None),
        ((None, 1, (), {1, 2, 3}), (None, 1, 2, 3, False), None),
        ((0, 1, (0,), {1, 2, 3, 4}), (0, 1, 2, 3, True), "llama.cpp stops at 0, 1, 2, this model at 0, 1, 2, 3"),
        ((0, 1, (2,), {1}), (2, 1, None, None, True), None),
        ((None, None, (), set()), (None, 0, None, None, False), "llama.cpp stops at 0, this model at no token"),
        ((0, 1, (0,), {2}), (0, 1, 2, None, True), "llama.cpp stops at 0, 1, this model at 1"),
    ],
)
def test_what_begins_and_ends_texts_goes_along(tmp_path, ids, keys, note):
    vocabulary, data = made(byte_pairs("qwen2", special=NAMES))
    first = vocabulary.special["<A>"]
    bos, eos, prefix, stops = ids
    moved = SpecialIds(
        bos=None if bos is None else first + bos,
        eos=None if eos is None else first + eos,
        prefix=tuple(first + id for id in prefix),
        stops=frozenset(first + id for id in stops),
    )
    notes = gguf_file.write(tmp_path / "m.gguf", source_of(vocabulary.with_ids(moved), data))
    assert len(notes) == (note is not None)
    found = gguf_file.read(str(tmp_path / "m.gguf"))
    assert found.tokenizer.ids == moved and set(found.stop_tokens) == moved.stops
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    said = [reader.get_field(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot", "eom")]
    said = [None if field is None else field.contents() for field in said]
    assert (*(id if id is None else id - first for id in said),) == keys[:4]
    assert reader.get_field("tokenizer.ggml.add_bos_token").contents() is keys[4]


def test_two_tokens_before_every_text_are_refused(tmp_path):
    vocabulary, data = made(byte_pairs(special=NAMES))
    ids = dataclasses.replace(vocabulary.ids, prefix=(256, 257))
    with pytest.raises(TokenizerError, match=r"begin with \[256, 257\], and with llama.cpp with one token"):
        gguf_file.write(tmp_path / "m.gguf", source_of(vocabulary.with_ids(ids), data))


def test_tokens_that_llama_cpp_knows_by_name_are_said_aloud(tmp_path):
    notes = gguf_file.write(tmp_path / "m.gguf", source_of(*made(byte_pairs(added=CHATML))))
    assert any("decides by their names which tokens are special" in note and "<|im_end|>" in note for note in notes)
    assert any("llama.cpp stops at" in note for note in notes)


# -- files of other programs ------------------------------------------------------------------------------------------


def foreign(
    path: Path,
    tokens: Sequence[str],
    kinds: Sequence[int] | None,
    *,
    scores: Sequence[float] | None = None,
    n_rows: int = 0,
    kind: str = "llama",
    words: str | None = "default",
    merges: Sequence[str] | None = None,
    extra: Callable[[gguf.GGUFWriter], Any] = lambda writer: None,
) -> ImportedModel:
    """Write a file as converters do, and read it."""
    config = dataclasses.replace(TINY, vocab_size=n_rows or len(tokens))
    writer = gguf.GGUFWriter(path, "llama")
    gguf_file.add_shape(writer, config)
    writer.add_tokenizer_model(kind)
    if words is not None:
        writer.add_tokenizer_pre(words)
    writer.add_token_list(list(tokens))
    if kinds is not None:
        writer.add_token_types(list(kinds))
    if kind == "llama":
        writer.add_token_scores([-float(id) for id in range(len(tokens))] if scores is None else list(scores))
    if merges is not None:
        writer.add_token_merges(list(merges))
    extra(writer)
    names = gguf_file.imported_model.expand(gguf_file.NAMES, config.n_layers)
    for name, tensor in random_tensors(config).items():
        writer.add_tensor(names[name], tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf_file.read(str(path))


PLAIN = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a", "ab"]
PLAIN_KINDS = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * 5
SPACE, A, B, SPACE_A, AB = range(259, 264)
BYTE_TOKENS = [token for token, _ in sorted(byte_pairs().get_vocab().items(), key=lambda item: item[1])][:256]


def test_a_plain_table_is_a_tokenizer_bin(tmp_path):
    found = foreign(tmp_path / "m.gguf", PLAIN, PLAIN_KINDS)
    assert isinstance(found.tokenizer, BinTokenizer) and found.tokenizer.encode("ab a", bos=True) == [
        1,
        SPACE_A,
        B,
        SPACE_A,
    ]
    assert found.stop_tokens == (2,)


def test_unused_tokens_at_the_end_are_padding(tmp_path):
    pads = [f"[PAD{id}]" for id in range(20)]
    found = foreign(tmp_path / "m.gguf", PLAIN + pads, PLAIN_KINDS + [UNUSED] * 20)
    assert (found.config.vocab_size, found.tokenizer.vocab_size) == (len(PLAIN) + 20, len(PLAIN))
    assert found.tokenizer.unused == frozenset() and isinstance(found.tokenizer, BinTokenizer)


def test_chat_tokens_behind_the_pieces(tmp_path):
    names = [*CHATML, "[PAD]"]
    found = foreign(tmp_path / "m.gguf", PLAIN + names, PLAIN_KINDS + [USER_DEFINED, USER_DEFINED, CONTROL])
    n, text = len(PLAIN), "<|im_start|>a<|im_end|>b[PAD]"
    assert found.tokenizer.added == {"<|im_start|>": n}  # <|im_end|> is special for llama.cpp, by its name
    assert found.tokenizer.encode(text, bos=True, special=True) == [1, n, SPACE_A, n + 1, SPACE, B, n + 2]
    plain = [1, n, SPACE_A, *(byte + 3 for byte in b"<|im_end|>"), B, *(byte + 3 for byte in b"[PAD]")]
    assert found.tokenizer.encode(text, bos=True) == plain
    assert found.stop_tokens == (2, n + 1, n + 2)  # llama.cpp stops at a [PAD], too


@pytest.mark.parametrize("at", [3, 259, 261])
def test_tokens_of_every_kind_in_any_place(tmp_path, at):
    names, kinds = ["<x>", "<y>", "[PAD7]"], [USER_DEFINED, CONTROL, UNUSED]
    found = foreign(tmp_path / "m.gguf", PLAIN[:at] + names + PLAIN[at:], PLAIN_KINDS[:at] + kinds + PLAIN_KINDS[at:])
    a, b = (id + 3 * (id >= at) for id in (SPACE_A, B))
    assert found.tokenizer.encode("a<x>ab<y>", special=True) == [a, at, a, b, at + 1]
    assert found.tokenizer.unused == {at + 2} and found.tokenizer.vocab_size == len(PLAIN) + 3


@pytest.mark.parametrize(
    ("extra", "prefix", "bos", "stops"),
    [
        (lambda writer: writer.add_add_bos_token(False), (), 1, (2,)),
        (lambda writer: writer.add_bos_token_id(0), (0,), 0, (2,)),
        (lambda writer: writer.add_bos_token_id(9999), (1,), 1, (2,)),  # out of range: llama.cpp's default
        (lambda writer: writer.add_eos_token_id(5), (1,), 1, (2, 5)),  # </s> by its name
        (lambda writer: (writer.add_eot_token_id(7), writer.add_eom_token_id(8)), (1,), 1, (2, 7, 8)),
        (lambda writer: writer.add_uint32("tokenizer.ggml.fim_pad_token_id", 9), (1,), 1, (2, 9)),
    ],
)
def test_the_ids_of_pieces(tmp_path, extra, prefix, bos, stops):
    found = foreign(tmp_path / "m.gguf", PLAIN, PLAIN_KINDS, extra=extra)
    assert (found.tokenizer.ids.prefix, found.tokenizer.bos_id, found.stop_tokens) == (prefix, bos, stops)


def test_with_a_damaged_eos_another_tokenizer_can_be_named(tmp_path):
    add = lambda writer: writer.add_string("tokenizer.ggml.eos_token_id", "x")  # noqa: E731
    found = foreign(tmp_path / "m.gguf", PLAIN, PLAIN_KINDS, extra=add)
    assert found.tokenizer is None and found.stop_tokens == ()
    assert "eos_token_id='x': must be a whole number" in found.tokenizer_problem
    assert any(note.startswith("where its texts end is not known") for note in found.notes)
    with pytest.raises(TokenizerError, match="eos_token_id='x'.*; name one with --tokenizer"):
        formats.open_model(tmp_path / "m.gguf", check=lambda *_: None)
    path = tmp_path / "tokenizer.bin"
    write_bin(path, toy_tokenizer(len(PLAIN)))
    assert formats.tokenizer_of(found, path).stop_ids


@pytest.mark.parametrize(("words", "begins"), [("llama-bpe", True), ("glm4", False), ("gpt-2", False), (None, False)])
def test_the_ids_of_bytes(tmp_path, words, begins):
    tokens = [*BYTE_TOKENS, "<bos>", "ab"]
    kinds = [NORMAL] * 256 + [CONTROL, NORMAL]
    add = lambda writer: writer.add_bos_token_id(256)  # noqa: E731
    found = foreign(tmp_path / "m.gguf", tokens, kinds, kind="gpt2", words=words, merges=["a b"], extra=add)
    assert isinstance(found.tokenizer, JsonTokenizer)
    assert found.tokenizer.ids == SpecialIds(bos=256, eos=None, prefix=(256,) if begins else (), stops=frozenset())
    assert found.tokenizer.encode("ab", bos=True) == [256] * begins + [257]


def test_no_space_before_a_text(tmp_path):
    add = lambda writer: writer.add_add_space_prefix(False)  # noqa: E731
    found = foreign(tmp_path / "m.gguf", PLAIN, PLAIN_KINDS, extra=add)
    assert found.tokenizer.encode("ab a") == [AB, SPACE_A]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": [*PLAIN[:-1], "a"]}, "tokens 260 and 263 are both 'a'"),
        ({"kinds": [NORMAL] * len(PLAIN)}, "no token for 256 of the 256 bytes"),
        ({"kinds": None}, "no token for 256 of the 256 bytes"),
        ({"kinds": PLAIN_KINDS[:-1]}, "has 264 tokens, 264 scores, 263 kinds"),
        ({"scores": [0.0] * 3}, "has 264 tokens, 3 scores, 264 kinds"),
        ({"n_rows": 200}, "264 entries where the model has vocab_size=200"),
        ({"kind": "bert"}, "is of type 'bert' with 'default', which cannot be read"),
        ({"kind": "gpt2", "words": "of-tomorrow", "merges": ["a b"]}, "'gpt2' with 'of-tomorrow', which cannot"),
        ({"kind": "gpt2", "merges": ["a b"]}, "no token for .* of the 256 bytes"),
    ],
)
def test_damaged_and_unknown_tables_are_named(tmp_path, changes, words):
    arguments = {"tokens": PLAIN, "kinds": PLAIN_KINDS} | changes
    found = foreign(tmp_path / "m.gguf", **arguments)
    assert found.tokenizer is None
    with pytest.raises(TokenizerError, match=words):
        raise TokenizerError(found.tokenizer_problem)


def test_pieces_of_the_same_score_that_merge_in_another_order(tmp_path):
    """llama.cpp merges the leftmost of equals, the library one kind of pair after another."""
    tokens, kinds = [*PLAIN, "ba", "<x>"], [*PLAIN_KINDS, NORMAL, CONTROL]
    assert foreign(tmp_path / "m.gguf", tokens, kinds).tokenizer.encode("bab")[1:] == [B, AB]
    found = foreign(tmp_path / "n.gguf", tokens, kinds, scores=[0.0] * len(tokens))
    assert found.tokenizer is None and "has pieces of the same score, which the" in found.tokenizer_problem
    plain = foreign(tmp_path / "o.gguf", tokens[:-1], kinds[:-1], scores=[0.0] * (len(tokens) - 1))
    assert plain.tokenizer.encode("bab")[1:] == [len(PLAIN), B]  # "ba" is the leftmost


def test_pieces_of_the_same_score_that_do_not_meet_are_read(tmp_path):
    """Llama 2's vocabulary has them: runs of spaces, in this order, all with the score -1e9."""
    runs = ["\u2581" * n for n in (2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11, 15)]
    tokens, kinds = [*PLAIN, *runs, "<pad>"], [*PLAIN_KINDS, *[NORMAL] * len(runs), CONTROL]
    scores = [*(-float(id) for id in range(len(PLAIN))), *[-1e9] * len(runs), 0.0]
    found = foreign(tmp_path / "m.gguf", tokens, kinds, scores=scores)
    plain = foreign(tmp_path / "n.gguf", tokens[:-1], kinds[:-1], scores=scores[:-1])
    assert isinstance(found.tokenizer, JsonTokenizer) and isinstance(plain.tokenizer, BinTokenizer)
    for n in range(40):
        assert found.tokenizer.encode("b" + " " * n + "ab") == plain.tokenizer.encode("b" + " " * n + "ab")


def test_a_file_says_that_it_has_no_tokenizer(tmp_path):
    source = dataclasses.replace(source_of(*rows(toy_tokenizer(300))), tokenizer=None, stop_tokens=(2, 5))
    gguf_file.write(tmp_path / "m.gguf", source)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.get_field("tokenizer.ggml.model").contents() == "none"
    assert reader.get_field("llama.vocab_size").contents() == 300
    found = gguf_file.read(str(tmp_path / "m.gguf"))
    assert (found.tokenizer, found.tokenizer_problem, found.stop_tokens) == (None, "", (2, 5))
