"""transformers' tokenizer classes: what each makes of a tokenizer.json, and which are refused."""

import json
from pathlib import Path

import pytest
import transformers
from makes import CHAT, SPM, begins_with, byte_level, metaspace, prepend, with_added
from tokenizers import AddedToken
from transformers.models.auto import tokenization_auto
from vocabularies import from_sentencepiece, train

from llamalet import tokenizer
from llamalet.convert import huggingface
from llamalet.errors import TokenizerError
from llamalet.tokenizer.classes import CLASSES, REFUSED
from llamalet.tokenizer.declared import Folder

# Names in transformers that are no tokenizers, or read a tokenizer.json as it is.
PARTS = {"AutoTokenizer", "BasicTokenizer", "CharacterTokenizer", "MecabTokenizer", "WordpieceTokenizer"}
PLAIN = {"TokenizersBackend", "PreTrainedTokenizer", "ParakeetTokenizer"}
OBJECT = {"__type": "AddedToken", "lstrip": False, "single_word": False, "normalized": False, "special": True}


def write(folder: Path, text: str, tokenizer_config: dict, **files: dict) -> Path:
    """Write a folder with a tokenizer.json; its vocab_size is 576."""
    files = {"tokenizer_config": tokenizer_config, "config": {"model_type": "llama", "vocab_size": 576}} | files
    folder.mkdir(exist_ok=True)
    for name, fields in files.items():
        (folder / f"{name}.json").write_text(json.dumps(fields))
    (folder / "tokenizer.json").write_text(text)
    return folder


def test_every_class_of_transformers_has_a_place():
    names = {name for name in dir(transformers) if name.endswith(("Tokenizer", "TokenizerFast"))}
    names |= {name for name in tokenization_auto.TOKENIZER_MAPPING_NAMES.values() if name}
    assert {name.removesuffix("Fast") for name in names} - PARTS - PLAIN <= CLASSES.keys() | REFUSED
    assert not CLASSES.keys() & REFUSED


SAID = {
    "nothing": {},
    "names": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": None},
    "spaces": {"add_prefix_space": True, "legacy": True},
    "no spaces": {"add_prefix_space": False, "mask_token": "<mask>"},
    "objects": {
        "bos_token": OBJECT | {"content": "<B>", "rstrip": True}, "image_token": OBJECT | {"content": "<i>"},
        "prefix_token": OBJECT | {"content": "<think>", "lstrip": True}, "eos_token": "<tool>",
    },
    "lists": {
        "added_tokens_decoder": {
            "342": {"content": "<tool>", "rstrip": True, "special": True}, "0": {"content": "<s>", "lstrip": True},
            "7": {"content": "<i>", "special": False},
        },
        "additional_special_tokens": ["<mask>", "<i>"], "suffix_token": "<think>",
    },
    "by name": {"extra_special_tokens": {"a_token": "<B>", "b_token": "<i>"}, "middle_token": None},
}  # fmt: skip
MAPS = ({}, {"special_tokens_map": {"eos_token": {"content": "<i>", "lstrip": True}}})
TEXTS = (
    *("", " ", "den  DEN's 12345 e\u0301\u00e9 \U0001f642", "a <tool> b<mask> c", "<s>x </s> y<unk>", "<B> a <i>b"),
    *("<|im_start|>user\n<|im_end|>", "<|endoftext|> a<|padding|>", "<think> a </think>", "\u2581<PRE> a<PAD>b<pad>"),
)


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_does_what_the_files_beside_it_say(tmp_path, name):
    added = (AddedToken("<tool>", lstrip=True, special=True), AddedToken("<mask>"), AddedToken("<think>"))
    pieces = with_added(begins_with(prepend(), "<s>"), *added).to_str()
    text = (
        pieces if CLASSES[name].pieces else begins_with(with_added(byte_level(special=CHAT), *added), CHAT[0]).to_str()
    )
    for kind, config in SAID.items():
        for n, maps in enumerate(MAPS if kind in ("names", "lists") else MAPS[:1]):
            folder = write(tmp_path / f"{kind}{n}", text, config | {"tokenizer_class": name}, **maps)
            theirs = transformers.AutoTokenizer.from_pretrained(folder)
            ours = tokenizer.load(folder / "tokenizer.json", 576)
            expected = [theirs(text)["input_ids"] for text in TEXTS]
            assert [ours.encode(text, bos=True, special=True) for text in TEXTS] == expected, (kind, maps)
            assert Folder(folder).template_variables == theirs.special_tokens_map, (kind, maps)
            assert {**ours.special, **ours.added}.items() <= theirs.get_vocab().items()
            special = {token.content for token in theirs.added_tokens_decoder.values() if token.special}
            assert ours.special.keys() == special, (kind, maps)


def test_config_json_may_name_the_class(tmp_path):
    config = {"model_type": "llama", "vocab_size": 576, "tokenizer_class": "GPTNeoXTokenizerFast"}
    write(tmp_path, begins_with(byte_level(), "<|bos|>").to_str(), {}, config=config)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = tokenizer.load(tmp_path / "tokenizer.json")
    assert ours.encode("e\u0301 den", bos=True) == theirs("e\u0301 den")["input_ids"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"tokenizer_class": "T5Tokenizer"}))
    with pytest.raises(TokenizerError, match="T5Tokenizer .*remove tokenizer_class from config.json"):
        tokenizer.load(tmp_path / "tokenizer.json")


WRONG = {
    "T5TokenizerFast": (lambda: metaspace("always"), "its class T5Tokenizer makes another tokenizer of the file"),
    "BertTokenizer": (byte_level, "its class BertTokenizer makes another tokenizer of the file"),
    "LlamaTokenizer": (
        lambda: metaspace("always", kind="unigram"), "LlamaTokenizer needs the merges of a BPE .*holds a Unigram model",
    ),
    "GPT2Tokenizer": (lambda: metaspace("always", kind="unigram"), "GPT2Tokenizer needs the merges of a BPE model"),
    "CodeLlamaTokenizer": (byte_level, "CodeLlamaTokenizer needs its unk_token or <0x00> to <0xFF> in the vocabulary"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_class_that_does_not_go_with_its_file_is_refused_in_one_line(tmp_path, name):
    build, reason = WRONG[name]
    write(tmp_path, build().to_str(), {"tokenizer_class": name})
    (tmp_path / "tokenizer.model").write_bytes(train())  # not taken instead
    found, _, problems = huggingface._read_tokenizer(Folder(tmp_path), 576)
    assert name in CLASSES or found is None and len(problems) == 1
    with pytest.raises(
        TokenizerError, match=f"{reason}.*; if the file is meant as it is, remove tokenizer_class"
    ) as info:
        tokenizer.load(tmp_path / "tokenizer.json")
    assert str(info.value).count("tokenizer.json: ") == 1 and "\n" not in str(info.value)


def test_a_token_that_only_the_class_names_needs_no_row(tmp_path):
    """GPT2Tokenizer adds <|endoftext|>, and transformers loads the model all the same."""
    write(tmp_path, byte_level().to_str(), {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|bos|>"})
    assert tokenizer.load(tmp_path / "tokenizer.json", 343).special["<|endoftext|>"] == 342
    ours = tokenizer.load(tmp_path / "tokenizer.json", 342)
    assert ours.vocab_size == 342 and "<|endoftext|>" not in ours.special
    assert (
        ours.encode("den 12", bos=True) == transformers.AutoTokenizer.from_pretrained(tmp_path)("den 12")["input_ids"]
    )
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}'
    )
    with pytest.raises(TokenizerError, match="343 entries .* vocab_size=342"):
        tokenizer.load(tmp_path / "tokenizer.json", 342)


@pytest.mark.parametrize("damaged", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
def test_a_damaged_file_is_named_once(tmp_path, damaged):
    write(tmp_path, from_sentencepiece(prepend=True).to_str(), SPM)
    (tmp_path / "tokenizer.model").write_bytes(train())
    (tmp_path / damaged).write_text("{oops")
    found, _, problems = huggingface._read_tokenizer(Folder(tmp_path), 448)
    assert found is None and len(problems) == 1
    assert problems[0].startswith(f"{tmp_path / damaged}: not valid JSON") and problems[0].count("not valid") == 1


def test_each_file_is_parsed_once(tmp_path, monkeypatch):
    write(tmp_path, byte_level().to_str(), {"bos_token": "<|bos|>"}, generation_config={"eos_token_id": 341})
    loads, parsed = json.loads, []

    def count(data: str | bytes, **options):
        parsed.append(data if isinstance(data, bytes) else data.encode())
        return loads(data, **options)

    monkeypatch.setattr(json, "loads", count)
    folder = Folder(tmp_path)
    found, _, _ = huggingface._read_tokenizer(folder, 576)
    assert found is not None and folder.stops == (341,) and folder.template_variables == {"bos_token": "<|bos|>"}
    assert sorted(parsed) == sorted(path.read_bytes() for path in tmp_path.glob("*.json"))
