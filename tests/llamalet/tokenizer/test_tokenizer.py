import random
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from vocabularies import NASTY, train

from llamalet import tokenizer
from llamalet.errors import TokenizerError
from llamalet.tokenizer import BinTokenizer, StreamDecoder, Tokenizer, bpe, load, rows, write_bin

# Text of ordinary words, odd spaces and any character at all. A lone surrogate is no text.
texts = st.lists(
    st.one_of(
        st.sampled_from(["the ", " ", "  ", "den", "ant", "\n", "7", "\t", "\u00e9", "\U0001f600", "<s>", "<0x0A>"]),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    ),
    max_size=12,
).map("".join)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "small.model"
    path.write_bytes(train())
    return path


@pytest.fixture(scope="module")
def bin_path(model_path) -> Path:
    path = model_path.with_suffix(".bin")
    write_bin(path, load(model_path))
    return path


@pytest.fixture(scope="module", params=["model", "bin"])
def any_tokenizer(request) -> Tokenizer:
    return load(request.getfixturevalue(f"{request.param}_path"))


@pytest.fixture(scope="module")
def both(model_path, bin_path) -> tuple[Tokenizer, Tokenizer]:
    return load(model_path), load(bin_path)


def test_a_bin_gives_the_ids_of_its_model(both):
    @settings(max_examples=400, deadline=None)
    @given(texts)
    def check(text):
        assert both[1].encode(text) == both[0].encode(text)

    check()
    for text in [*NASTY, "\u2581 a\u2581b"]:
        assert both[1].encode(text) == both[0].encode(text), text


def test_decoding_gives_the_text_back(any_tokenizer):
    @settings(max_examples=200, deadline=None)
    @given(texts.filter(lambda text: tokenizer.SPACE_MARK not in text))
    def check(text):
        assert any_tokenizer.decode(any_tokenizer.encode(text, bos=True, eos=True)) == text

    check()
    for text in NASTY:
        assert any_tokenizer.decode(any_tokenizer.encode(text)) == text


def test_streamed_text_is_the_whole_text(any_tokenizer):
    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.integers(0, any_tokenizer.vocab_size - 1), max_size=40))
    def check(ids):
        decoder = StreamDecoder(any_tokenizer)
        parts = [decoder.push(token) for token in ids] + [decoder.finish()]
        for part in parts:
            part.encode("utf-8")
        assert "".join(parts) == any_tokenizer.decode(ids)

    check()


def test_a_character_of_several_tokens_comes_out_whole(any_tokenizer):
    decoder = StreamDecoder(any_tokenizer)
    ids = any_tokenizer.encode("\U0001f600!")
    assert len(ids) > 4
    assert [part for part in map(decoder.push, ids) if part] == ["\U0001f600", "!"]
    assert decoder.finish() == ""


def test_half_a_character_ends_as_a_replacement(any_tokenizer):
    decoder = StreamDecoder(any_tokenizer)
    assert decoder.push(3 + 0xF0) + decoder.push(3 + 0x9F) == ""
    assert decoder.finish() == "\ufffd"


def test_only_the_first_space_of_a_text_is_taken_away(any_tokenizer):
    bos, space_ids = any_tokenizer.bos_id, any_tokenizer.encode("den den")
    assert any_tokenizer.decode([bos, *space_ids, bos, *space_ids]) == "den den den den"


def test_bos_and_eos_are_added_and_silent(any_tokenizer):
    ids = any_tokenizer.encode("den", bos=True, eos=True)
    assert (ids[0], ids[-1]) == (1, 2)
    assert ids[1:-1] == any_tokenizer.encode("den")
    assert [any_tokenizer.token_bytes(token) for token in (0, 1, 2)] == [b""] * 3
    assert any_tokenizer.encode("", bos=True) == [1]


@pytest.mark.parametrize("token", [-1, 420])
def test_an_id_outside_the_vocabulary_is_refused(any_tokenizer, token):
    with pytest.raises(TokenizerError, match=f"token {token}: not in the vocabulary of 420"):
        any_tokenizer.decode([5, token])


def test_half_a_surrogate_pair_is_refused(any_tokenizer):
    with pytest.raises(TokenizerError, match="character 2 of the text"):
        any_tokenizer.encode("ab\ud800")


def test_model_and_bin_of_one_vocabulary_share_the_digest(both, bin_path, tmp_path):
    assert both[0].sha256 == both[1].sha256 and len(both[0].sha256) == 64
    assert both[0].pieces() == both[1].pieces()
    write_bin(tmp_path / "again.bin", both[1])
    assert (tmp_path / "again.bin").read_bytes() == bin_path.read_bytes()


def spell_out(scores: dict[str, float], text: str) -> list[str]:
    """The rule as llama2.c states it: join the best neighbours, the leftmost of equals, until none is left."""
    parts = list(text)
    while True:
        pairs = [a + b for a, b in zip(parts, parts[1:], strict=False)]
        joinable = [(-scores[pair], i) for i, pair in enumerate(pairs) if pair in scores]
        if not joinable:
            return parts
        i = min(joinable)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.mark.parametrize("long_word", [1, 1024])
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    joined=st.dictionaries(st.text("ab c", min_size=2, max_size=5), st.integers(-4, 0), max_size=25),
    text=st.text("ab cd", min_size=1, max_size=30) | st.text("ab", min_size=1, max_size=30),
    single=st.tuples(*[st.integers(-4, 0)] * 4),
)
# A piece that was joined to its left neighbour must not be joined again by an entry that the queue still holds for it.
@example(joined={"  ": -2, "    ": -3, "  a ": 0, " b ba": -3}, text="b  a     a", single=(-2, 0, -1, 0))
def test_any_scores_are_merged_best_first_leftmost_first(long_word, joined, text, single):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "LONG_WORD", long_word)
        check_merging(joined, text, single)


def check_merging(joined, text, single):
    scores = {piece: float(score) for piece, score in [*zip(" abc", single, strict=True), *joined.items()]}
    controls = [(b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0)]
    byte_rows = [(b"<0x%02X>" % byte, 0.0) for byte in range(256)]
    vocabulary = BinTokenizer(controls + byte_rows + [(p.encode(), s) for p, s in scores.items()], "test")
    ids = {piece: 259 + i for i, piece in enumerate(scores)} | {"d": 3 + ord("d")}
    assert vocabulary.encode(text) == [ids[piece] for piece in spell_out(scores, " " + text)]


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ({"ab": 0, "ba": 0}, "acbab"),  # two pairs are equally good
        ({"ab": 5, "cab": 1, "caba": 2}, "cabab"),  # a join makes a better pair with what is left of it
        ({"ab": 5, "aba": 1}, "abab"),  # or with what follows, which is the next occurrence's first half
        ({"ab": 5, "aba": 5}, "abab"),
    ],
)
def test_joining_what_is_repeated_keeps_the_order(monkeypatch, ranks, text):
    monkeypatch.setattr(bpe, "LONG_WORD", 1)
    expected = spell_out({piece: -float(rank) for piece, rank in ranks.items()}, text)
    assert bpe.merge(text, ranks) == expected


@pytest.mark.parametrize("word", ["a", "den", " ", "a ", "\u00e9"])
def test_a_megabyte_of_one_word(both, word):
    text = word * ((1 << 20) // len(word))
    ids = both[1].encode(text)
    assert ids == both[0].encode(text)
    assert both[1].decode(ids) == text


# --- files that are no tokenizer of ours ---


def entry(piece: bytes, score: float = 0.0, length: int | None = None) -> bytes:
    return struct.pack("<fI", score, len(piece) if length is None else length) + piece


def rows_of(bin_path: Path) -> list[bytes]:
    return [entry(piece, score) for piece, score in load(bin_path).pieces()]


@pytest.mark.parametrize(
    ("at", "row", "complaint"),
    [
        (300, entry(b"", length=0), "entry 300: length 0"),
        (300, entry(b"x", length=0xFFFFFFFF), "entry 300: length 4294967295"),
        (300, entry(b"x", length=1 << 30), "entry 300: length 1073741824"),
        (300, entry(b"zzz", float("nan")), "entry 300: score nan"),
        (300, entry(b"zzz", float("-inf")), "entry 300: score -inf"),
        (300, entry(b"a\0b"), "entry 300: .* NUL"),
        (300, entry(b"\xff\xfe"), "entry 300: .* not valid UTF-8"),
        (300, entry(b"<unk>"), "entry 300: b'<unk>' is already entry 0"),
        (68, entry(b"<0x41"), "entry 68: .* instead of <0x41>"),
        (68, entry(b"<0x42>"), "entry 68: .* instead of <0x41>"),
        (3, entry(b"$"), "entry 3: .* Llama 3"),
    ],
)
def test_a_bad_row_is_named(bin_path, tmp_path, at, row, complaint):
    rows = rows_of(bin_path)
    rows[at] = row
    path = tmp_path / "bad.bin"
    path.write_bytes(bin_path.read_bytes()[:4] + b"".join(rows))
    with pytest.raises(TokenizerError, match=complaint):
        load(path)


def test_a_vocabulary_without_the_space_is_refused(bin_path, tmp_path):
    rows = rows_of(bin_path)
    rows[rows.index(next(row for row in rows if row[8:] == b" "))] = entry(b"qqq")
    (tmp_path / "bad.bin").write_bytes(bin_path.read_bytes()[:4] + b"".join(rows))
    with pytest.raises(TokenizerError, match="no entry for the space"):
        load(tmp_path / "bad.bin")


@pytest.mark.parametrize("n_rows", [0, 1, 258])
def test_a_vocabulary_of_a_few_rows_is_refused(bin_path, tmp_path, n_rows):
    rows = rows_of(bin_path)[:n_rows]
    longest = max((len(row) - 8 for row in rows), default=0)
    (tmp_path / "few.bin").write_bytes(struct.pack("<I", longest) + b"".join(rows))
    with pytest.raises(TokenizerError, match=f"{n_rows} entries: at least 259"):
        load(tmp_path / "few.bin")


@pytest.mark.parametrize("longest", [0, 1, 1000, 0x7FFFFFFF])
def test_the_length_of_the_longest_entry_must_be_true(bin_path, tmp_path, longest):
    (tmp_path / "bad.bin").write_bytes(struct.pack("<I", longest) + bin_path.read_bytes()[4:])
    with pytest.raises(TokenizerError, match="longest entry|neither"):
        load(tmp_path / "bad.bin")


def test_every_truncation_is_refused(bin_path, tmp_path):
    data = bin_path.read_bytes()
    path = tmp_path / "torn.bin"
    for size in [*range(0, 40), *range(40, len(data), 37), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(TokenizerError):
            load(path, 420)


def test_a_tail_is_refused(bin_path, tmp_path):
    for tail in (b"\0", entry(b"qqqq"), b"more than enough bytes"):
        (tmp_path / "long.bin").write_bytes(bin_path.read_bytes() + tail)
        with pytest.raises(TokenizerError):
            load(tmp_path / "long.bin", 420)


def test_another_vocabulary_size_is_refused(any_tokenizer, model_path, bin_path):
    for path in (model_path, bin_path):
        assert load(path, 420).vocab_size == 420
        with pytest.raises(TokenizerError, match="420 entries where the model has vocab_size=32000"):
            load(path, 32000)


def test_damaged_models_are_refused_or_keep_every_text(model_path, tmp_path):
    rng = random.Random(1)
    data = model_path.read_bytes()
    path = tmp_path / "damaged.model"
    refused, worked = 0, 0
    for _ in range(300):
        damaged = bytearray(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data)
        for _ in range(rng.randint(1, 3)):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            found = load(path)
        except TokenizerError:
            refused += 1
        else:
            assert found.decode(found.encode("the den")) == "the den"
            worked += 1
    assert refused > 50 and worked > 10


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"abc",
        b"<!DOCTYPE html><html></html>",
        b"version https://git-lfs.github.com/spec/v1\n",
        b'{"model": {"type": "BPE"}}',
        b"\n\x0e\n\x05<unk>",
        bytes(1000),
    ],
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "what").write_bytes(content)
    with pytest.raises(TokenizerError, match=str(tmp_path / "what")):
        load(tmp_path / "what")


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match="no such tokenizer file"):
        load(tmp_path / "missing.model")
    with pytest.raises(TokenizerError, match="not a file"):
        load(tmp_path)


def test_a_file_as_large_as_a_model_is_not_read(tmp_path):
    with open(tmp_path / "model.bin", "wb") as file:
        file.truncate(tokenizer.declared.MAX_FILE_BYTES + 1)
    with pytest.raises(TokenizerError, match="too large for a tokenizer"):
        load(tmp_path / "model.bin")


def test_entries_beyond_every_vocabulary_are_not_read(bin_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_VOCAB", 419)
    with pytest.raises(TokenizerError, match="more than 419 entries"):
        load(bin_path)


def test_a_vocabulary_without_bos_puts_nothing_before_a_text(tmp_path):
    (tmp_path / "m.model").write_bytes(train(bos_id=-1))
    found = load(tmp_path / "m.model")
    assert (found.bos_id, found.ids.prefix, found.stop_ids) == (None, (), {2})
    assert found.encode("den", bos=True) == found.encode("den")
    assert found.encode_document("den") == [found.eos_id, *found.encode("den")]
    (tmp_path / "n.model").write_bytes(train(bos_id=-1, eos_id=-1))
    with pytest.raises(TokenizerError, match="neither BOS nor EOS"):
        load(tmp_path / "n.model").encode_document("den")


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram", "vocab_size": 360},
        {"byte_fallback": False, "vocab_size": 100},
        {"add_dummy_prefix": False},
        {"bos_id": 2, "eos_id": 1},
        {"user_defined_symbols": ["dent"]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_llama2c_would_cut_differently_is_not_written(tmp_path, options):
    (tmp_path / "m.model").write_bytes(train(**options))
    found = load(tmp_path / "m.model")
    with pytest.raises(TokenizerError, match="t.bin"):
        write_bin(tmp_path / "t.bin", found)
    assert not (tmp_path / "t.bin").exists()


def test_a_model_that_drops_extra_spaces_is_written(tmp_path):
    (tmp_path / "m.model").write_bytes(train(remove_extra_whitespaces=True))
    found = load(tmp_path / "m.model")
    write_bin(tmp_path / "t.bin", found)
    assert load(tmp_path / "t.bin").encode("the den") == found.encode("the den")


# --- the real vocabularies ---


def test_llama_2_is_written_as_llama2c_writes_it(shared_data, tmp_path):
    write_bin(tmp_path / "tokenizer.bin", load(shared_data / "llama2-tokenizer.model", 32000))
    assert (tmp_path / "tokenizer.bin").read_bytes() == (shared_data / "llama2-tokenizer.bin").read_bytes()


def test_llama_2_ids_are_the_same_from_both_files(shared_data):
    ours, theirs = load(shared_data / "llama2-tokenizer.bin"), load(shared_data / "llama2-tokenizer.model")
    assert ours.sha256 == theirs.sha256
    stories = (shared_data / "tinyshakespeare.txt").read_text()[:100_000]
    for text in [*NASTY, "\u2581x", stories, "I believe the meaning of life is"]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == text.replace("\u2581", " ")


def test_tok512_is_read_and_written(shared_data, tmp_path):
    found = load(shared_data / "tok512.bin", 512)
    assert found.decode(found.encode("Once upon a time, \U0001f600")) == "Once upon a time, \U0001f600"
    write_bin(tmp_path / "t.bin", found)
    assert (tmp_path / "t.bin").read_bytes() == (shared_data / "tok512.bin").read_bytes()
