import json
import sys

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import toy_llama3
from vocabularies import HARD, LOSSLESS, byte_level, from_sentencepiece, texts, train

from llamalet.errors import TokenizerError, UsageError
from llamalet.model_file import companions
from llamalet.tokenizer import BinTokenizer, JsonTokenizer, Llama3Tokenizer, StreamDecoder, load, parse, write_bin
from llamalet.tokenizer.huggingface import rank_rows

LIBRARIES = {
    "byte level": byte_level,
    "prepend": lambda: from_sentencepiece(prepend=True),
    "metaspace": lambda: from_sentencepiece(prepend=False),
}


@pytest.fixture(scope="module", params=LIBRARIES)
def both(request) -> tuple[JsonTokenizer, tokenizers.Tokenizer]:
    library = LIBRARIES[request.param]()
    return JsonTokenizer(library.to_str().encode(), "tokenizer.json"), library


def test_ids_and_text_are_the_librarys(both):
    ours, library = both
    library.encode_special_tokens = True

    @settings(max_examples=200, deadline=None)
    @given(texts.filter(lambda text: "\u2581" not in text))
    def check(text):
        ids = ours.encode(text)
        assert ids == library.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == library.decode(ids)

    try:
        check()
        for text in HARD:
            assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids
    finally:
        library.encode_special_tokens = False


def test_any_ids_are_decoded_as_the_library_does(both):
    ours, library = both
    assert ours.vocab_size == library.get_vocab_size()

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.integers(0, ours.vocab_size - 1), max_size=20))
    def check(ids):
        decoder = StreamDecoder(ours)
        text = "".join([*map(decoder.push, ids), decoder.finish()])
        assert text == ours.decode(ids)
        # Where bytes are no character the library gives up all those around them.
        assert "\ufffd" in text or text == library.decode(ids, skip_special_tokens=True)

    check()


def test_special_tokens_are_sought_only_when_asked(both):
    ours, library = both
    bos, eos = (name for id in (ours.bos_id, ours.eos_id) for name, number in ours.special.items() if number == id)
    for text in (f"{bos}the den{eos}{bos} and", f"the{eos}", f"{bos}", f"x {bos} y"):
        assert ours.encode(text, special=True) == library.encode(text, add_special_tokens=False).ids
        assert not {ours.bos_id, ours.eos_id} & set(ours.encode(text))
    # What a user says in a conversation stands behind special tokens, and names them in vain.
    said = f"a{eos}b{bos[:-1]}{eos}{eos[:3]}{eos} "
    parts = ours.encode_parts([ours.bos_id, "the", ours.eos_id, said])
    assert [id for id in parts if id in ours.special.values()] == [ours.bos_id, ours.eos_id]
    assert ours.decode(parts[parts.index(ours.eos_id) :]).strip(" ") == said.strip(" ")


def test_llama_3s_is_a_rank_table_and_needs_no_library(monkeypatch, tmp_path):
    library = byte_level()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "tokenizer.json").write_text(library.to_str())
    ours, table = load(tmp_path / "tokenizer.json"), toy_llama3()
    assert isinstance(ours, Llama3Tokenizer) and ours.suffix == "json"
    assert ours.sha256 == table.sha256 and ours.pieces() == table.pieces()
    library.encode_special_tokens = True

    @settings(max_examples=300, deadline=None)
    @given(texts)
    def check(text):
        assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids

    check()


CHANGES = {
    "words that are tokens are joined all the same": lambda t: t["model"].update(ignore_merges=False),
    "a normalizer": lambda t: t.update(normalizer={"type": "NFC"}),
    "other words": lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+"),
    "one step more": lambda t: t["pre_tokenizer"]["pretokenizers"].insert(
        0, {"type": "Digits", "individual_digits": True}
    ),
    "a space in front": lambda t: t["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    "pairs in another order": lambda t: t["model"]["merges"].reverse(),
    "another decoder": lambda t: t.update(decoder={"type": "Sequence", "decoders": [t["decoder"], {"type": "Fuse"}]}),
    "a pair left out": lambda t: t["model"]["merges"].pop(),
    "an added word": lambda t: t["added_tokens"][5].update(special=False),
    "another kind of name": lambda t: t["added_tokens"][5].update(content="[PAD]"),
    "a name that takes the spaces before it": lambda t: t["added_tokens"][5].update(lstrip=True),
    "a name that takes the spaces after it": lambda t: t["added_tokens"][5].update(rstrip=True),
    "a name that is a word": lambda t: t["added_tokens"][5].update(single_word=True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_not_quite_llama_3s_is_the_librarys(change):
    table = json.loads(byte_level().to_str())
    assert rank_rows(table) == toy_llama3().pieces()
    change(table)
    assert rank_rows(table) is None
    assert isinstance(parse(json.dumps(table).encode(), "x"), JsonTokenizer)


def test_a_name_that_other_files_add_to_llama_3s_takes_its_spaces(tmp_path):
    (tmp_path / "tokenizer.json").write_text(byte_level().to_str())
    token = {"content": "<|x|>", "lstrip": True, "rstrip": True, "single_word": False, "special": True}
    added = {"added_tokens_decoder": {"999": token | {"normalized": False}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(added))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = load(tmp_path / "tokenizer.json")
    assert ours.encode("a <|x|> b", special=True) == theirs("a <|x|> b", add_special_tokens=False)["input_ids"]


def test_the_byte_level_one_is_the_rank_table():
    ours, table = JsonTokenizer(byte_level().to_str().encode(), "x"), toy_llama3()
    assert [ours.token_bytes(id) for id in range(ours.vocab_size)] == [
        table.token_bytes(id) for id in range(table.vocab_size)
    ]
    assert (ours.bos_id, ours.eos_id, ours.stop_ids) == (table.bos_id, table.eos_id, table.stop_ids)
    assert ours.adds_space is False and ours.special == table.special


def test_the_sentencepiece_one_is_the_model():
    model = parse(train(**LOSSLESS), "small")
    ours = BinTokenizer(model.pieces(), "small")
    for prepend in (True, False):
        found = parse(from_sentencepiece(prepend=prepend).to_str().encode(), "x")
        assert (found.bos_id, found.eos_id, found.adds_space) == (1, 2, True)
        for text in HARD:
            if prepend or not text.startswith(" "):  # a Metaspace adds no second space
                assert found.encode(text) == ours.encode(text)


def test_it_lies_beside_a_model_and_is_no_tokenizer_bin(tmp_path):
    path = tmp_path / "story.tokenizer.json"
    path.write_text(from_sentencepiece(prepend=True).to_str())
    assert companions.beside(tmp_path / "story.bin") == path
    with pytest.raises(TokenizerError, match="story.tokenizer.json: .* cannot be written"):
        write_bin(tmp_path / "t.bin", load(path))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda table: table.clear(), "not a usable"),
        (lambda table: table.update(model={"type": "BPE"}), "not a usable"),
        (lambda table: table.update(decoder=None), "its decoder is missing"),
        (lambda table: table.update(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}), "WordPiece"),
    ],
)
def test_bad_files_are_refused(tmp_path, change, complaint):
    table = json.loads(byte_level().to_str())
    change(table)
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(TokenizerError, match=complaint) as caught:
        load(tmp_path / "tokenizer.json")
    assert str(tmp_path) in str(caught.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match="pip install tokenizers"):
        parse(b"{}", "tokenizer.json")


def test_dropout_is_for_training():
    table = json.loads(byte_level().to_str())
    table["model"]["dropout"] = 0.9
    ours = parse(json.dumps(table).encode(), "x")
    assert {tuple(ours.encode("and the band")) for _ in range(20)} == {tuple(toy_llama3().encode("and the band"))}


def test_deep_json_is_refused():
    with pytest.raises(TokenizerError, match="not valid JSON"):
        parse(b'{"a":' * 100_000, "x")
