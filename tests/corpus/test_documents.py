import itertools
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus import documents
from corpus.documents import expected_chars, first_documents, pieces, with_text
from llamalet import tokenizer
from llamalet.errors import DataError


def read(path, *, split="train", document="file", column="text", val_fraction=0.05, val=None):
    files = {"train": [path]} if val is None else {"train": [path], "val": [val]}
    return list(pieces(files, split, document=document, column=column, val_fraction=val_fraction))


def texts(stream):
    """Join the pieces of each document with the spaces that were left out."""
    joined = []
    for piece in stream:
        if piece.starts:
            joined.append(piece.text)
        else:
            joined[-1] += " " + piece.text
    return joined


def all_texts(path, **options):
    return texts(read(path, val=path, **options))


@pytest.mark.parametrize(
    ("document", "content", "expected"),
    [
        ("file", "a b\n\n c\n", ["a b\n\n c"]),
        ("file", "\n\na\n \nb\n\n\n", ["a\n \nb"]),
        ("file", "a\nb\n<|endoftext|>\n\nc\n\nd\n<|endoftext|>\n", ["a\nb", "c\n\nd"]),
        ("file", "a\r\nb\r\n", ["a\nb"]),
        ("file", "\ufeffa", ["a"]),
        ("blankline", "a\nb\n\n\n  \nc\n", ["a\nb", "c"]),
        ("blankline", "\n\n a\n<|endoftext|>\nb", [" a", "b"]),
        ("line", "a\n\n  b \nc", ["a", "  b ", "c"]),
        ("line", "a\n<|endoftext|>\nb\n", ["a", "b"]),
    ],
)
def test_what_a_document_is(tmp_path, document, content, expected):
    path = tmp_path / "a.txt"
    path.write_bytes(content.encode())
    assert all_texts(path, document=document) == expected


def test_documents_know_their_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\na\n\n\nb\nb\n\nc\n")
    found = [(piece.text, piece.where) for piece in read(path, val=path, document="blankline")]
    assert found == [("a", f"{path}, line 2"), ("b\nb", f"{path}, line 5"), ("c", f"{path}, line 8")]


@pytest.mark.parametrize("content", ["", "\n\n", " \n<|endoftext|>\n"])
@pytest.mark.parametrize("document", ["file", "blankline", "line"])
def test_a_file_without_text_is_one_empty_document(tmp_path, content, document):
    path = tmp_path / "a.txt"
    path.write_text(content)
    empty = []
    assert list(with_text(read(path, val=path, document=document), empty)) == []
    assert empty == [f"{path}, line 1"]


def test_jsonl_and_parquet_give_the_same_documents(tmp_path):
    rows = ["first story", "", "second\n\nstory ", None, " \n", "third \u00e9\u4e2d"]
    jsonl, parquet = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    jsonl.write_text("\n".join(json.dumps({"id": 1, "text": row or ""}) for row in rows) + "\n\n", encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(6)), "text": rows}), parquet, row_group_size=2)
    expected = ["first story", "", "second\n\nstory ", "", "", "third \u00e9\u4e2d"]
    assert all_texts(jsonl) == all_texts(parquet) == expected
    assert [piece.line for piece in read(jsonl, val=jsonl)] == [piece.line for piece in read(parquet, val=parquet)]
    assert read(parquet, val=parquet)[5].where == f"{parquet}, row 6"
    assert expected_chars({"train": [jsonl]}, "text") == jsonl.stat().st_size
    assert 20 < expected_chars({"train": [parquet]}, "text") < 1000


GOOD = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (GOOD + b"{bad}\n", ["line 2", "not valid JSON"]),
        (GOOD + GOOD + b'{"text": "cut of', ["line 3", "not valid JSON"]),
        (b"<!DOCTYPE html><html>", ["line 1", "not valid JSON"]),
        (GOOD + b'{"story": "x", "id": 3}\n', ["line 2", "'text'", "'story', 'id'", "--text-column"]),
        (GOOD + b'{"text": 5}\n', ["line 2", "'text'"]),
        (GOOD + b'["text"]\n', ["line 2", "a list"]),
        (GOOD + b'{"text": "\\ud800"}\n', ["line 2", "surrogate"]),
        (GOOD + b'{"text": "a\xffb"}\n', ["line 2", "byte 12 (0xff)", "UTF-8"]),
        (GOOD + b"[" * 100_000 + b"\n", ["line 2", "not valid JSON"]),
        (GOOD + b'{"text": ' + b"9" * 5000 + b"}\n", ["line 2", "not valid JSON"]),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path, content, words):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(path, val=path)
    assert all(word in str(caught.value) for word in [str(path), *words]), str(caught.value)
    assert "\n" not in str(caught.value)


def test_invalid_utf8_and_endless_lines_of_text(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\nb\nc caf\xe9\n")
    with pytest.raises(DataError, match=r"a\.txt, line 3: byte 6 \(0xe9\) is not valid UTF-8"):
        read(path, val=path)
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 1 << 20)
    path.write_bytes(b"a\n" + b"x" * ((1 << 20) - 1) + b"\n" + b"x" * (1 << 20) + b"\n")
    with pytest.raises(DataError, match=r"a\.txt, line 3: longer than 1 MiB"):
        read(path, val=path)


def test_bad_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"story": ["a", "b"], "n": [1, 2]})
    pyarrow.parquet.write_table(table, path)
    for column in ("text", "n"):
        with pytest.raises(DataError, match=f"a.parquet: no text in a column '{column}': it has 'story', 'n'"):
            read(path, val=path, column=column)
    assert all_texts(path, column="story") == ["a", "b"]
    whole = path.read_bytes()
    for content in (b"", b"<html>not found</html>", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.parquet: not a valid parquet file"):
            read(path, val=path)


def test_parquet_damaged_within(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"story {i} " * 50 for i in range(200)]})
    pyarrow.parquet.write_table(table, path, row_group_size=100, write_page_checksum=True, use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    data[40:60] = bytes(20)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet, row \d+: damaged"):
        read(path, val=path)


# --- cutting long documents ---------------------------------------------------------------------------------------

WORDS = st.text(st.sampled_from("ab \n\u00e9\u4e2d.\t\u3000"), max_size=60)


@given(st.lists(WORDS, max_size=6), st.integers(1, 9))
def test_pieces_join_to_the_document(parts, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_CHARS", size)
        found = list(documents._cut(iter(parts), "p", 7))
    assert texts(found) == ["".join(parts)]
    assert [piece.starts for piece in found] == [True] + [False] * (len(found) - 1)
    for piece in found[:-1]:
        assert len(piece.text) >= size and not piece.text.endswith(" ")
    # However the parts come, the cuts are the same.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_CHARS", size)
        assert list(documents._cut(iter("".join(parts)), "p", 7)) == found


@pytest.fixture(scope="module")
def llama2(shared_data):
    return tokenizer.load(shared_data / "llama2-tokenizer.model")


@given(text=st.text(st.sampled_from("theo dgs  \n.T1\u00e9"), min_size=1, max_size=200), size=st.integers(1, 20))
def test_the_ids_of_the_pieces_are_the_ids_of_the_document(llama2, text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_CHARS", size)
        found = list(documents._cut([text], "p", 1))
    assert list(itertools.chain.from_iterable(llama2.encode(piece.text) for piece in found)) == llama2.encode(text)


# --- validation ---------------------------------------------------------------------------------------------------


def test_every_nth_document_is_for_validation(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"story {i}"}) + "\n" for i in range(45)))
    train, val = (texts(read(path, split=split, val_fraction=0.1)) for split in ("train", "val"))
    assert val == ["story 9", "story 19", "story 29", "story 39"]
    assert sorted(train + val) == sorted(f"story {i}" for i in range(45)) and len(train) == 41


def test_own_validation_files_are_used(tmp_path):
    train, val = tmp_path / "train.txt", tmp_path / "val.txt"
    train.write_text("t\n" * 100)
    val.write_text("v\n")
    assert texts(read(train, split="train", val=val, document="line")) == ["t"] * 100
    assert texts(read(train, split="val", val=val, document="line")) == ["v"]


@pytest.mark.parametrize("size", [10, 200, 100_000])
@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3])
def test_the_end_of_few_long_documents_is_for_validation(tmp_path, monkeypatch, size, fraction):
    monkeypatch.setattr(documents, "PIECE_CHARS", size)
    path = tmp_path / "a.txt"
    whole = ["\n".join(f"{name} line {i} has some words" for i in range(100)) for name in ("one", "two")]
    path.write_text("\n<|endoftext|>\n".join(whole))
    heads, tails = (texts(read(path, split=split, val_fraction=fraction)) for split in ("train", "val"))
    for head, tail, text in zip(heads, tails, whole, strict=True):
        assert head + text[len(head)] + tail == text and text[len(head)] in "\n "
    for tail, text in zip(tails, whole, strict=True):
        assert abs(len(tail) / len(text) - fraction) < 0.02


def test_first_documents(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a\nb\nc\n")
    stream = read(path, val=path, document="line")
    assert texts(first_documents(stream, 2)) == ["a", "b"]
    assert texts(first_documents(stream, 9)) == ["a", "b", "c"]
