"""Tokenizers of every make: the ids of transformers from the folder, then from our .bin, then from our GGUF."""

import json
from pathlib import Path

import pytest
import sentencepiece
import transformers
from makes import FAST, MAKES, SPM, begins_with, write_make
from toy import SMALL_MODELS, random_tensors
from vocabularies import HARD, from_sentencepiece, train

from llamalet import model_file
from llamalet.convert import bin_file, gguf_file, huggingface
from llamalet.convert.imported_model import ImportedModel
from llamalet.errors import TokenizerError
from llamalet.model_file.companions import load_tokenizer
from llamalet.tokenizer import Tokenizer
from llamalet.tokenizer.declared import Folder

TEXTS = [
    *HARD,
    *("<|bos|> a<|eos|>", "x <mask> y", " <|user|>  hi", "ba ba, baba", "<think>\nden\n</think>ok", "a    b   c  d"),
    *("\uff21\uff22 AB", "<|tool|> x<text>  y", "<|im_start|>user\nden<|im_end|>\n", "<s>den</s>", " den", "  den"),
    *("[PAD] [gMASK]<sop>", "<image> <|x|><|y|>", "<|a|> <|b|>", "den<|eos|>den", "\u2581den \u2581", "ILO ilo Ilo"),
    *("\ufb01x \u2460\u00bd", "e\u0301 \u00e9", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "\U0001f1e9\U0001f1ea flag"),
    *("\u05e9\u05b8\u05dc\u05d5\u05b9\u05dd", "https://x.yz/?a=1&b=2#c", "{'a': [1, 2.5e-3]}", "x\ty\tz\n\tw"),
    *("\r\r\n\n\r", "...!!!???", "don't DON'T don\u2019t", "1,234,567.89", "_snake_case camelCase", "-- \u2014 \u2013"),
    *("\ufeffden", "den\u200dden", "\x7f\x80\x9f", "qu" * 40, " " * 17 + "x", "\n" * 5, "\u1e9e\u0130\u0131"),
    *("a\u00a0b\u2003c", "\U00020000"),
]  # fmt: skip
CONFIG = SMALL_MODELS["gqa-tied"]


# Those that llama.cpp would cut differently, and why a GGUF file is refused.
NOT_IN_GGUF = {
    "bytes, two in front": "with llama.cpp with one token",
    "bytes, NFC": "normalizes texts",
    "bytes, a space in front": "llama.cpp has no name",
    "bytes, added lstrip": "has lstrip",
    "bytes, added rstrip": "has rstrip",
    "bytes, added single word": "has single_word",
    "bytes, added normalized under NFKC": "normalizes texts",
    "bytes, added by tokenizer_config": "has rstrip",
    "bytes, other flags in tokenizer_config": "has lstrip",
    "bytes, GPT2TokenizerFast, a space in front": "llama.cpp has no name",
    "bytes, GPT2Tokenizer, a gap and other tokens": "has lstrip",
    "pieces, CodeLlamaTokenizerFast, other names": "has rstrip",
    "pieces, GemmaTokenizer": "changes texts by Replace, Split",
    **dict.fromkeys(
        (
            "bytes, GPTNeoXTokenizerFast", "bytes, CohereTokenizer", "bytes, Qwen2Tokenizer", "bytes, Qwen3_5Tokenizer",
        ),
        "normalizes texts",
    ),
    "pieces, unigram": "a Unigram model",
    **dict.fromkeys(("pieces, no space in front", "pieces, Prepend", "pieces, chat tokens"), "not merged in the order"),
    "pieces, LlamaTokenizer, no space": "not merged in the order",
    **dict.fromkeys(
        (
            "pieces, a space in front of the first", "pieces, a space in front of all", "pieces, no bytes",
            "pieces, chat tokens that are text", "pieces, LlamaTokenizer", "pieces, LlamaTokenizerFast, legacy",
            "pieces, CodeLlamaTokenizer",
        ),
        "a space before a text",
    ),
}  # fmt: skip


def test_there_are_enough_of_both():
    assert len(MAKES.keys() - NOT_IN_GGUF.keys()) >= 40 and len(set(TEXTS)) >= 60


def ids_of(ours: Tokenizer, text: str) -> list[int]:
    return ours.encode(text, bos=True, special=True)


@pytest.mark.parametrize("name", MAKES)
def test_ids_are_those_of_transformers(tmp_path, name):
    n_tokens = write_make(tmp_path, name)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": n_tokens}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    n_rows = -(-len(theirs) // 64) * 64  # padded, as most are
    ours, data, notes = huggingface._read_tokenizer(Folder(tmp_path), n_rows)
    assert ours is not None and notes == ()
    behind = theirs("")["input_ids"][len(ours.ids.prefix) :]
    expected = {text: theirs(text)["input_ids"] for text in TEXTS}
    assert {text: ids_of(ours, text) + behind for text in TEXTS} == expected
    assert ours.bos_id == theirs.bos_token_id or theirs.bos_token_id is None and "undeclared" in name
    assert ours.eos_id == theirs.eos_token_id
    # The same from a .bin, with the tokenizer inside or beside it.
    config = huggingface.ModelConfig(**CONFIG.to_dict() | {"vocab_size": n_rows})
    source = ImportedModel(
        name=name, config=config, tensors=random_tensors(config), tokenizer=ours, tokenizer_data=data
    )
    for version in (1, 3):
        bin_file.write(tmp_path / f"m{version}.bin", source, version)
        again = load_tokenizer(model_file.read(tmp_path / f"m{version}.bin"))
        assert again is not None and again.ids == ours.ids and again.unused == ours.unused
        assert {text: ids_of(again, text) + behind for text in TEXTS} == expected
    if name in NOT_IN_GGUF:
        with pytest.raises(TokenizerError, match=NOT_IN_GGUF[name]):
            gguf_file.write(tmp_path / "m.gguf", source)
        return
    gguf_file.write(tmp_path / "m.gguf", source)
    again = gguf_file.read(str(tmp_path / "m.gguf")).tokenizer
    assert again is not None and again.ids == ours.ids
    assert {text: ids_of(again, text) + behind for text in TEXTS} == expected


LLAMA = SPM | {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
CHATML = ("<|im_end|>", "<|im_start|>")
# What stands beside a tokenizer.model, and whether there is a tokenizer.json too.
BESIDE_A_MODEL = {
    "the same json": (True, {"tokenizer_config.json": SPM | FAST}),
    "LlamaTokenizer's json": (True, {"tokenizer_config.json": LLAMA}),
    "LlamaTokenizer's json, legacy": (True, {"tokenizer_config.json": LLAMA | {"legacy": True}}),
    "added tokens": (
        False, {"tokenizer_config.json": LLAMA, "added_tokens.json": {name: 420 + i for i, name in enumerate(CHATML)}},
    ),
    "added tokens, listed": (
        False,
        {"tokenizer_config.json": LLAMA | {"added_tokens_decoder": {
            str(420 + i): {"content": name, "special": i == 0, "lstrip": False, "rstrip": False, "normalized": i == 1}
            for i, name in enumerate(CHATML)
        }}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE_A_MODEL)
def test_what_stands_beside_a_tokenizer_model_counts_as_for_transformers(tmp_path, name):
    has_json, files = BESIDE_A_MODEL[name]
    (tmp_path / "tokenizer.model").write_bytes(train())
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 448}')
    if has_json:
        (tmp_path / "tokenizer.json").write_text(begins_with(from_sentencepiece(prepend=True), "<s>").to_str())
    for file, fields in files.items():
        (tmp_path / file).write_text(json.dumps(fields))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours, _, problems = huggingface._read_tokenizer(Folder(tmp_path), 448)
    assert ours is not None and problems == ()
    assert (ours.suffix == "model") is (name == "the same json")
    texts = [*TEXTS, " den", "den</s>den", "<|im_start|>a<|im_end|>\n<|im_start|>b c<|im_end|>"]
    assert {text: ids_of(ours, text) for text in texts} == {text: theirs(text)["input_ids"] for text in texts}


PIECES = {
    "bpe": {},
    "user-defined": {"user_defined_symbols": ["<|im_start|>", "<|im_end|>"]},
    "control": {"control_symbols": ["<|im_start|>", "<|im_end|>"]},
    "unigram": {"model_type": "unigram", "vocab_size": 340},
    "normalized": {"normalization_rule_name": "nmt_nfkc"},
    "spaces removed": {"remove_extra_whitespaces": True},
    "no byte fallback": {"byte_fallback": False},
    "no space in front": {"add_dummy_prefix": False},
    "pad_id": {"pad_id": 3},
    "no BOS": {"bos_id": -1},
}


@pytest.mark.parametrize("options", PIECES.values(), ids=PIECES)
def test_a_tokenizer_model_is_sentencepieces_wherever_it_goes(tmp_path, options):
    """transformers 5 makes something else of some of them: it drops the space before a text that begins with one."""
    data = train(**options)
    (tmp_path / "tokenizer.model").write_bytes(data)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    library = sentencepiece.SentencePieceProcessor(model_proto=data)
    ours, kept, notes = huggingface._read_tokenizer(Folder(tmp_path), 448)
    assert ours is not None and (kept, notes) == (data, ())
    expected = {text: library.encode(text) for text in TEXTS}
    assert {text: ours.encode(text) for text in TEXTS} == expected
    config = huggingface.ModelConfig(**CONFIG.to_dict() | {"vocab_size": 448})
    source = ImportedModel(name="m", config=config, tensors=random_tensors(config), tokenizer=ours, tokenizer_data=data)
    for version in (0, 3):
        bin_file.write(tmp_path / f"m{version}.bin", source, version)
        again = load_tokenizer(model_file.read(tmp_path / f"m{version}.bin"))
        assert again is not None and again.ids == ours.ids
        assert {text: again.encode(text) for text in TEXTS} == expected


def test_a_tokenizer_bin_is_filled_up_to_the_models_rows(tmp_path):
    """run.c reads one entry for each row; the fillers are known again."""
    (tmp_path / "tokenizer.model").write_bytes(train())
    ours, data, _ = huggingface._read_tokenizer(Folder(tmp_path), 448)
    config = huggingface.ModelConfig(**CONFIG.to_dict() | {"vocab_size": 448})
    source = ImportedModel(name="m", config=config, tensors=random_tensors(config), tokenizer=ours, tokenizer_data=data)
    bin_file.write(tmp_path / "m.bin", source, 2)
    (tmp_path / "m.tokenizer.model").unlink()
    entries, at, raw = 0, 4, Path(tmp_path / "m.tokenizer.bin").read_bytes()
    while at < len(raw):
        at += 8 + int.from_bytes(raw[at + 4 : at + 8], "little")
        entries += 1
    assert entries == 448
    again = load_tokenizer(model_file.read(tmp_path / "m.bin"))
    assert again is not None and again.vocab_size == 420
    for text in TEXTS:
        assert again.encode(text) == ours.encode(text)
