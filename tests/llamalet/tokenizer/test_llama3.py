import base64
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from toy import N_RANKS, toy_llama3, toy_ranks
from vocabularies import HARD, by_library, texts

from llamalet import tokenizer
from llamalet.errors import TokenizerError, UsageError
from llamalet.tokenizer import Llama3Tokenizer, StreamDecoder, Tokenizer, bpe, load, pack, write_bin
from llamalet.tokenizer.llama3 import WORDS


@pytest.fixture(scope="module")
def toy() -> Llama3Tokenizer:
    return toy_llama3()


def test_ids_are_those_of_the_tokenizers_library(toy):
    library = by_library()
    library.encode_special_tokens = True

    @settings(max_examples=500, deadline=None)
    @given(texts)
    @example("a" * 100 + " " * 50)
    def check(text):
        assert toy.encode(text) == library.encode(text, add_special_tokens=False).ids

    check()
    for text in HARD:
        assert toy.encode(text) == library.encode(text, add_special_tokens=False).ids, text


def test_special_tokens_are_sought_only_when_asked(toy):
    library = by_library()
    text = "the<|eot_id|>and<|begin_of_text|><|x|> <|eot_id|"
    assert toy.encode(text, special=True) == library.encode(text, add_special_tokens=False).ids
    assert not set(toy.encode(text)) & set(toy.special.values())
    assert toy.decode(toy.encode(text)) == text
    assert toy.decode(toy.encode(text, special=True)) == "theand<|x|> <|eot_id|"
    assert toy.encode("a", bos=True, eos=True) == [toy.bos_id, *toy.encode("a"), toy.eos_id]


@pytest.mark.parametrize("long_word", [1, 1024])
@given(text=st.text("aban", max_size=60))
@settings(max_examples=200, deadline=None)
def test_repeated_words_are_joined_in_the_same_order(toy, long_word, text):
    ranks = {piece.decode("latin-1"): id for id, (piece, _) in enumerate(toy_ranks())}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "LONG_WORD", long_word)
        found = bpe.merge(text, ranks)
    parts = list(text)
    while pairs := [
        (ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in ranks
    ]:
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    assert found == parts


@given(texts)
def test_text_comes_back_whole_and_streamed(toy, text):
    ids = toy.encode(text, bos=True)
    assert toy.decode(ids) == text
    decoder = StreamDecoder(toy)
    assert "".join([*map(decoder.push, ids), decoder.finish()]) == text


def test_a_text_ends_at_any_of_several_tokens(toy):
    names = {"<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"}
    assert toy.stop_ids == {toy.special[name] for name in names}
    assert (toy.bos_id, toy.eos_id) == (N_RANKS, N_RANKS + 1)


@pytest.mark.slow
def test_a_megabyte_of_one_letter(toy):
    for letter in "aq \n\u00e9":
        assert toy.decode(toy.encode(letter * (1 << 20))) == letter * (1 << 20)


# --- its files ---


def tiktoken_file(rows: list) -> bytes:
    return b"".join(base64.b64encode(piece) + b" %d\n" % id for id, (piece, _) in enumerate(rows))


def test_both_files_hold_the_same_vocabulary(toy, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tiktoken_file(toy_ranks()[:N_RANKS]))
    write_bin(tmp_path / "t.bin", toy)
    for path, suffix in ((tmp_path / "tokenizer.model", "tiktoken"), (tmp_path / "t.bin", "bin")):
        found = load(path, toy.vocab_size)
        assert isinstance(found, Llama3Tokenizer) and found.suffix == suffix
        assert found.sha256 == toy.sha256 and found.pieces() == toy.pieces()
        assert found.encode("the band") == toy.encode("the band")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda rows: rows[:-256], "<|begin_of_text|> is missing"),
        (lambda rows: rows[1:], "byte 0xff has no rank"),
        (lambda rows: [*rows[:260], rows[259], *rows[260:]], "occurs twice"),
        (lambda rows: [*rows, rows[-1]], "occurs twice"),
    ],
)
def test_bad_tables_are_refused(tmp_path, change, complaint):
    rows = [(piece, float(id)) for id, (piece, _) in enumerate(change(toy_ranks()))]
    (tmp_path / "t.bin").write_bytes(pack(rows))
    with pytest.raises(TokenizerError, match="t.bin: not a Llama 3 vocabulary") as caught:
        load(tmp_path / "t.bin")
    assert complaint in str(caught.value)


def test_scores_that_are_no_ranks_are_refused(tmp_path):
    rows = [(piece, -score) for piece, score in toy_ranks()]
    (tmp_path / "t.bin").write_bytes(pack(rows))
    with pytest.raises(TokenizerError, match="t.bin: entry 0"):
        load(tmp_path / "t.bin")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [(b"QQ== 7\n", "line 258"), (b"Q 257\n", "line 258"), (b"\xff\n", "line 258"), (b"QQ==\n", "line 258")],
)
def test_bad_lines_are_named(tmp_path, line, complaint):
    (tmp_path / "t").write_bytes(tiktoken_file(toy_ranks()[:257]) + line)
    with pytest.raises(TokenizerError, match=complaint):
        load(tmp_path / "t")


def test_damaged_files_are_refused_or_keep_every_text(tmp_path):
    data, refused, worked = pack(toy_ranks()), 0, 0
    for at in range(4, len(data), 97):
        damaged = bytearray(data)
        damaged[at] ^= 0x55
        (tmp_path / "t.bin").write_bytes(damaged)
        try:
            found = load(tmp_path / "t.bin")
        except TokenizerError:
            refused += 1
        else:
            assert found.decode(found.encode("the band")) == "the band"
            worked += 1
    assert refused > 50 and worked > 20


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "regex", None)
    with pytest.raises(UsageError, match="pip install regex"):
        toy_llama3()


# --- the real one ---


@pytest.fixture(scope="module")
def llama3_path(shared_data) -> Path:
    return shared_data / "llama3-tokenizer.bin"


@pytest.fixture(scope="module")
def llama3(llama3_path) -> Tokenizer:
    return load(llama3_path, 128256)


def test_llama_3_is_known(llama3, llama3_path, tmp_path):
    assert (llama3.bos_id, llama3.eos_id) == (128000, 128001)
    assert llama3.stop_ids == {128000, 128001, 128009}
    # Published examples of its ids. Source: llama3, test_tokenizer.py
    assert llama3.encode("This is a test sentence.", bos=True, eos=True) == [
        128000, 2028, 374, 264, 1296, 11914, 13, 128001,
    ]  # fmt: skip
    assert llama3.encode("<|start_header_id|>user<|end_header_id|>\n\n", special=True) == [128006, 882, 128007, 271]
    assert list(map(llama3.token_bytes, llama3.encode("1234567 It'S"))) == [b"123", b"456", b"7", b" It", b"'S"]
    write_bin(tmp_path / "t.bin", llama3)
    assert (tmp_path / "t.bin").read_bytes() == llama3_path.read_bytes()


def test_llama_3_ids_are_tiktokens(llama3):
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is in the extra [peers]")
    rows = tokenizer.unpack(pack(llama3.pieces()), "llama3")
    reference = tiktoken.Encoding(
        "llama3",
        pat_str=WORDS,
        mergeable_ranks={piece: id for id, (piece, _) in enumerate(rows[:128000])},
        special_tokens={piece.decode(): 128000 + i for i, (piece, _) in enumerate(rows[128000:])},
    )

    @settings(max_examples=2000, deadline=None)
    @given(texts)
    def check(text):
        assert llama3.encode(text) == reference.encode(text, disallowed_special=())
        assert llama3.encode(text, special=True) == reference.encode(text, allowed_special="all")

    check()
    for text in [*HARD, "a" * (1 << 20)]:
        assert llama3.encode(text) == reference.encode(text, disallowed_special=())
