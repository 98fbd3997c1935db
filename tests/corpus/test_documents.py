import itertools
import json
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus import documents, text_files
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
            joined[-1] += piece.gap + piece.text
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
    path = tmp_path / "a.jsonl"
    monkeypatch.setattr(text_files, "MAX_LINE_CHARS", 1 << 20)
    path.write_bytes(b'{"text": "a"}\n{"text": "' + b"x" * (1 << 20) + b'"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: longer than 1048576 characters"):
        read(path, val=path)


def test_bad_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"story": ["a", "b"], "n": [1, 2]})
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(DataError, match=r"a\.parquet: no column 'text'; the columns are 'story', 'n'; --text-column"):
        read(path, val=path)
    with pytest.raises(DataError, match=r"a\.parquet: the column 'n' is int64, not text; the columns are 'story', 'n'"):
        read(path, val=path, column="n")
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


def test_null_rows_and_odd_jsonl_are_read_as_they_come(tmp_path):
    path, parquet = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    rows = [{"text": "one"}, {"text": None, "id": 1}, {"id": 2, "text": "two"}]
    lines = b"\r\n\r\n \t\r\n".join(json.dumps(row).encode() for row in rows)
    path.write_bytes(b"\xef\xbb\xbf" + lines)
    assert all_texts(path) == ["one", "", "two"]
    empty = []
    assert [piece.text for piece in with_text(read(path, val=path), empty)] == ["one", "two"]
    assert empty == [f"{path}, line 4"]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", None, "two"]}), parquet)
    assert all_texts(parquet) == ["one", "", "two"]
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.nulls(3)}), parquet)
    assert all_texts(parquet) == ["", "", ""]


STORIES = ["caf\u00e9", None, "one ", "one ", "\u4e2d\u6587"]
BYTES = [text and text.encode() for text in STORIES]


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array(STORIES, pyarrow.large_string()),
        pyarrow.array(STORIES, pyarrow.string_view()),
        pyarrow.array(STORIES).dictionary_encode(),
        pyarrow.DictionaryArray.from_arrays(pyarrow.array([1, None, 0, 0, 2], pyarrow.int8()), ["one ", *STORIES[::4]]),
        pyarrow.array(BYTES, pyarrow.binary()),
        pyarrow.array(BYTES, pyarrow.large_binary()),
        pyarrow.array(BYTES, pyarrow.binary_view()),
        pyarrow.array(BYTES, pyarrow.binary()).dictionary_encode(),
        pyarrow.ExtensionArray.from_storage(pyarrow.json_(), pyarrow.array(STORIES)),
    ],
    ids=lambda column: str(column.type),
)
def test_every_column_of_text_is_read(tmp_path, column):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    assert all_texts(path) == [text or "" for text in STORIES]


@pytest.mark.parametrize("kind", [pyarrow.binary(), pyarrow.string()])
def test_bytes_that_are_no_text_name_the_row(tmp_path, kind):
    path = tmp_path / "a.parquet"
    offsets, data = pyarrow.py_buffer(np.array([0, 2, 2, 6], np.int32)), pyarrow.py_buffer(b"okcaf\xe9")
    column = pyarrow.Array.from_buffers(kind, 3, [None, offsets, data])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    with pytest.raises(DataError, match=r"a\.parquet, row 3: byte 4 \(0xe9\) of 'text' is not valid UTF-8"):
        read(path, val=path)


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pyarrow.array([["a"], ["b"]]), "list<element: string>"),
        (pyarrow.array([{"content": "a"}, {"content": "b"}]), "struct<content: string>"),
        (pyarrow.array([1, 2]), "int64"),
        (pyarrow.array([True, None]), "bool"),
        (pyarrow.array([[("a", "b")], []], pyarrow.map_(pyarrow.string(), pyarrow.string())), "map<string, string"),
    ],
)
def test_a_column_of_something_else_says_what_it_is(tmp_path, column, kind):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "text": column}), path)
    with pytest.raises(DataError) as caught:
        read(path, val=path)
    assert f"a.parquet: the column 'text' is {kind}" in str(caught.value)
    assert "not text; the columns are 'id', 'text'; --text-column" in str(caught.value)


def test_rows_of_any_size_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    monkeypatch.setattr(text_files, "BATCH_BYTES", 1000)
    texts = [f"{i} " * 300 for i in range(20)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, use_dictionary=False)
    sizes = []
    batches = pyarrow.parquet.ParquetFile.iter_batches

    def watched(file, batch_size, **options):
        sizes.append(batch_size)
        return batches(file, batch_size, **options)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", watched)
    assert all_texts(path) == texts and sizes == [1]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_utf16_is_told(tmp_path, encoding, name):
    path = tmp_path / name
    path.write_bytes('{"text": "hello"}\n'.encode(encoding))
    with pytest.raises(DataError, match=rf"{name}: is UTF-16 or not text, must be UTF-8; convert it: iconv"):
        read(path, val=path)


def test_latin1_and_a_character_cut_off_are_told(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("na\u00efve\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.txt, line 1: byte 3 \(0xef\) is not valid UTF-8; .* iconv -f LATIN1"):
        read(path, val=path)
    path.write_bytes("ab\n\u4e2d".encode()[:-1])
    with pytest.raises(DataError, match=r"a\.txt, line 2: byte 1 \(0xe4\) is not valid UTF-8"):
        read(path, val=path)
    path.write_bytes(b"a few \0 zeros \0 are text")
    assert all_texts(path) == ["a few \0 zeros \0 are text"]


@pytest.mark.parametrize("begin", ['[{"text": "a"}, {"text": "b"}]', "[\n  {\n", '\n ["a", "b"]\n{"text": "c"}'])
def test_a_json_array_says_how_to_convert_it(tmp_path, begin):
    path = tmp_path / "a b.jsonl"
    path.write_text(begin)
    with pytest.raises(DataError, match=r"line \d: begins a JSON array, .*: jq -c '\.\[\]' '.*a b\.jsonl' > NEW"):
        read(path, val=path)


def test_the_beginning_of_every_file_is_checked(tmp_path):
    good, bad = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    good.write_bytes(GOOD)
    bad.write_bytes(b'{"story": "x"}\n')
    documents.check_readable({"train": [good]}, document="file", column="text")
    for files in ({"train": [good, bad]}, {"train": [good], "val": [bad]}):
        with pytest.raises(DataError, match=r"b\.jsonl, line 1: no text under the key 'text'"):
            documents.check_readable(files, document="file", column="text")


# --- lines and documents of any length -----------------------------------------------------------------------------

LINES = st.lists(st.text(st.sampled_from("ab \u4e2d\U0001f600\r\ufeff"), max_size=12), max_size=8)


@given(LINES, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.integers(1, 9))
def test_lines_in_parts_are_the_lines(tmp_path_factory, lines, end, closed, part):
    path = tmp_path_factory.getbasetemp() / "parts.txt"
    data = (end.join(lines) + end * closed).encode()
    path.write_bytes(data)
    expected = [line.removesuffix("\r") for line in data.decode("utf-8-sig").split("\n")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "PART_BYTES", part)
        found = list(text_files._lines(path))
    assert [number for number, _ in found] == list(range(1, len(found) + 1))
    assert [text for _, text in found] == (expected if expected[-1] or data.endswith(b"\r") else expected[:-1])


def test_a_huge_line_is_read_in_little_memory(tmp_path):
    path = tmp_path / "a.txt"
    with path.open("w") as file:
        for _ in range(400):
            file.write("\u4e2d\u6587\u3002" * 5000)  # 18 MB
    tracemalloc.start()
    try:
        sizes = [(len(piece.text.encode()), piece.gap) for piece in _generated(path)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(size for size, _ in sizes) == path.stat().st_size and max(sizes) <= (1_000_000, "")
    assert peak < 9 << 20


def _generated(path):
    return pieces({"train": [path], "val": [path]}, "val", document="file", column="text", val_fraction=0.05)


# --- cutting long documents ---------------------------------------------------------------------------------------

WORDS = st.text(st.sampled_from("ab \n\u00e9\u4e2d.\t\u3000"), max_size=60)


@given(st.lists(WORDS, max_size=6), st.integers(1, 9), st.integers(1, 9))
def test_pieces_join_to_the_document(parts, size, more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_CHARS", size)
        patch.setattr(documents, "MAX_PIECE_CHARS", size + more)
        found = list(documents._cut(iter(parts), "p", 7))
        # However the parts come, the cuts are the same.
        assert list(documents._cut(iter("".join(parts)), "p", 7)) == found
    assert texts(found) == ["".join(parts)]
    assert [piece.starts for piece in found] == [True] + [False] * (len(found) - 1)
    for piece, following in itertools.pairwise(found):
        assert size <= len(piece.text) <= size + more
        assert not following.gap or not piece.text.endswith(" ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abcdefghijkl mn", ["abcdefgh", "ijkl", "mn"]),  # no space in time
        ("abc\ndefghijklm", ["abc\n", "defghijk", "lm"]),
        ("abcdefge\u0301ijklm", ["abcdefg", "e\u0301ijklm"]),
        ("abcdef\U0001f468\u200d\U0001f469xyz", ["abcdef", "\U0001f468\u200d\U0001f469xyz"]),
        ("abcdefg\r\nxyz", ["abcdefg", "\r\nxyz"]),
        ("a" + 12 * "\u0301", ["a" + 7 * "\u0301", 5 * "\u0301"]),  # no end to accents
    ],
)
def test_text_without_spaces_is_cut_at_line_ends_or_between_characters(monkeypatch, text, expected):
    monkeypatch.setattr(documents, "PIECE_CHARS", 3)
    monkeypatch.setattr(documents, "MAX_PIECE_CHARS", 8)
    assert [piece.text for piece in documents._cut([text], "p", 1)] == expected


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


CHINESE = "".join(chr(0x4E00 + 7 * i % 5000) for i in range(4000))


@pytest.mark.parametrize("line_end", ["", "\u3002\n", "\n"])
@pytest.mark.parametrize("size", [300, 100_000])
@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_text_without_spaces_is_divided_fairly(tmp_path, monkeypatch, line_end, size, fraction):
    monkeypatch.setattr(documents, "PIECE_CHARS", size)
    monkeypatch.setattr(documents, "MAX_PIECE_CHARS", 2 * size)
    path = tmp_path / "a.txt"
    text = line_end.join(CHINESE[i : i + 80] for i in range(0, len(CHINESE), 80))
    path.write_text(text)
    (head,), (tail,) = (texts(read(path, split=split, val_fraction=fraction)) for split in ("train", "val"))
    assert abs(len(tail) / len(text) - fraction) < 0.03
    assert (head + tail if line_end == "" else head + "\n" + tail) == text


def test_a_line_end_far_behind_does_not_take_the_validation_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(CHINESE * 10 + "\n\u5b8c")
    (head,), (tail,) = (texts(read(path, split=split)) for split in ("train", "val"))
    assert head + tail == CHINESE * 10 + "\n\u5b8c" and len(tail) == 2001


def test_the_end_of_a_piece_in_the_last_word_of_a_head(tmp_path, monkeypatch):
    """The next piece is then divided near its beginning."""
    monkeypatch.setattr(documents, "PIECE_CHARS", 50)
    words = [f"word{i:04}" for i in range(100)]
    path = tmp_path / "a.txt"
    path.write_text(" ".join(words))
    for fraction in np.linspace(0.02, 0.5, 60):
        (head,), (tail,) = (texts(read(path, split=split, val_fraction=fraction)) for split in ("train", "val"))
        assert f"{head} {tail}" == " ".join(words) and abs(len(tail) / 899 - fraction) < 0.021


def test_first_documents(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a\nb\nc\n")
    stream = read(path, val=path, document="line")
    assert texts(first_documents(stream, 2)) == ["a", "b"]
    assert texts(first_documents(stream, 9)) == ["a", "b", "c"]
