"""What begins and ends texts: as transformers has it, and the same wherever the model goes."""

import dataclasses
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from makes import BOS_EOS, CHAT, begins_with, byte_level
from toy import SMALL_MODELS, random_tensors, toy_model
from vocabularies import train

from llamalet import Chat, Model, model_file, tokenizer
from llamalet.convert import bin_file, formats, huggingface
from llamalet.convert.imported_model import ImportedModel
from llamalet.errors import ConfigError, FormatError, TokenizerError, UsageError
from llamalet.model_file.header import EXTRAS, HEADER_BYTES, PREFIX, SPECIAL_IDS, V3_FIELDS
from llamalet.tokenizer import JsonTokenizer, SpecialIds, ids_file, load, parse
from llamalet.tokenizer.declared import Folder

NAMES = (*BOS_EOS.values(), "<|user|>", "<|assistant|>", "<|end_of_turn|>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end_of_turn|>{% endfor %}"
    "<|assistant|>"
)
CONFIG = dataclasses.replace(SMALL_MODELS["gqa-tied"], vocab_size=345, tied=False)
END = 344  # of a turn


def folder_of(path: Path, made, likely: int, config: dict, **more: dict) -> Path:
    """Write a Hugging Face folder whose model finds one token most likely everywhere."""
    tensors = random_tensors(CONFIG) | {"output": np.zeros((345, CONFIG.dim), np.float32)}
    tensors["tok_embeddings"][:, 0] = 5.0
    tensors["norm"] = np.zeros(CONFIG.dim, np.float32)
    tensors["norm"][0] = 1.0
    tensors["output"][likely, 0] = 50.0
    huggingface.write(path, ImportedModel(name="toy", config=CONFIG, tensors=tensors))
    (path / "tokenizer.json").write_text(made.to_str())
    for name, fields in ({"tokenizer_config": config} | more).items():
        (path / f"{name}.json").write_text(json.dumps(fields))
    return path


@pytest.fixture
def turns(tmp_path) -> Path:
    """A folder whose model always ends the turn, which only generation_config.json says is an end."""
    return folder_of(
        tmp_path / "hf", byte_level(special=NAMES), END, BOS_EOS | {"chat_template": TEMPLATE},
        generation_config={"eos_token_id": [END, 341], "bos_token_id": 340},
    )  # fmt: skip


def test_transformers_stops_there_too(turns):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(turns)
    new = model.generate(torch.tensor([[70, 71, 72]]), max_new_tokens=5, do_sample=False)[0, 3:]
    assert new.tolist() == [END]


def copies(folder: Path, tmp_path: Path) -> list[Path]:
    """The model of a folder in every format, one made from the other."""
    made = [folder]
    for name in ("a1.bin", "a3.bin", "a0.bin", "b2.bin", "hf again", "c3.bin"):
        source = formats.read(formats.kind_of(made[-1]), str(made[-1]))
        made.append(tmp_path / name)
        if name.endswith(".bin"):
            bin_file.write(made[-1], source, int(name[1]), dtype="f32" if name[1] == "3" else None)
        else:
            huggingface.write(made[-1], source)
    return made


def test_the_ids_that_end_a_text_go_wherever_the_model_goes(turns, tmp_path):
    for path in copies(turns, tmp_path):
        model = Model.load(path, backend="numpy")
        assert (path.name, model.stop_tokens) == (path.name, {END, 341})
        assert model.tokenizer.ids == SpecialIds(bos=340, eos=341, prefix=(), stops=frozenset({END, 341}))
        assert "".join(model.generate("den", max_new_tokens=5)) == ""
        assert list(model.generate_batch(["den", "ba"], max_new_tokens=5)) == []
        chat = Chat(model, max_new_tokens=5)
        assert "".join(chat.say("ba")) == "" and chat.n_read == len(model.tokenizer.encode("ba")) + 4
        assert len("".join(model.generate("den", max_new_tokens=5, ignore_eos=True))) == 0


def test_a_template_keeps_its_variables_wherever_the_model_goes(turns, tmp_path):
    config = json.loads((turns / "tokenizer_config.json").read_text())
    template = "\n{{ pad_token }}{{ sep_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    more = {"chat_template": template, "pad_token": "<|user|>", "sep_token": "<|assistant|>"}
    (turns / "tokenizer_config.json").write_text(json.dumps(config | more))
    expected = None
    for path in copies(turns, tmp_path):
        model = Model.load(path, backend="numpy")
        chat = Chat(model, max_new_tokens=1)
        "".join(chat.say("ba"))
        expected = expected or chat._seen
        assert (path.name, chat._seen) == (path.name, expected)
    names = [model.tokenizer.special[name] for name in ("<|user|>", "<|assistant|>")]
    assert expected == [*model.tokenizer.encode("\n"), *names, *model.tokenizer.encode("ba"), 341]


def test_without_its_tokenizer_a_model_still_says_where_texts_end(turns, tmp_path):
    source = dataclasses.replace(formats.read("hf", str(turns)), tokenizer=None, tokenizer_data=b"")
    for version in (1, 3):
        bin_file.write(tmp_path / "m.bin", source, version)
        assert Model.load(tmp_path / "m.bin", backend="numpy").stop_tokens == {END, 341}


def test_a_named_tokenizer_brings_its_bos_and_the_model_keeps_its_ends(turns, tmp_path):
    other = begins_with(byte_level(special=("<|pad|>", *NAMES[:4])), "<|eos|>")
    (tmp_path / "other.json").write_text(other.to_str())
    for path in copies(turns, tmp_path)[:4]:
        if path.name == "a3.bin":  # knows its vocabulary by its sha256
            continue
        if path.suffix == ".bin" and model_file.read(path).tokenizer_sha256 is not None:
            continue
        model = Model.load(path, tokenizer=tmp_path / "other.json", backend="numpy")
        assert model.tokenizer.ids.prefix == (other.token_to_id("<|eos|>"),)
        assert model.stop_tokens == {END, 341}


def test_without_bos_an_empty_prompt_is_refused_and_documents_follow_eos(tmp_path):
    made = byte_level(special=CHAT)
    path = folder_of(tmp_path / "hf", made, 70, {"eos_token": CHAT[0]})
    model = Model.load(path, backend="numpy")
    for prompts in ([""], ["den", ""]):
        with pytest.raises(UsageError, match="the prompt is empty"):
            model.generate_batch(prompts)
    ids = made.encode("den").ids
    assert model.tokenizer.encode("den", bos=True) == ids
    assert model.tokenizer.encode_document("den") == [made.token_to_id(CHAT[0]), *ids]


def test_a_name_that_looks_like_bos_is_not_one(tmp_path):
    """An EOS is never put before texts, unless it is declared as BOS too and the post-processor puts it there."""
    (tmp_path / "tokenizer.json").write_text(byte_level(special=("<|endoftext|>", "<|im_end|>")).to_str())
    found = load(tmp_path / "tokenizer.json")
    assert (found.bos_id, found.ids.prefix, found.encode("", bos=True)) == (None, (), [])
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}')
    found = load(tmp_path / "tokenizer.json")
    assert (found.bos_id, found.eos_id, found.ids.prefix) == (340, 340, ())


def test_model_files_from_before_the_ids_had_a_place_load_as_before(tmp_path):
    """The names of BOS and EOS were guessed then, and BOS was put before every text."""
    data = byte_level(special=("<s>", "<|im_end|>", "</s>")).to_str().encode()
    vocabulary = parse(data, "t")
    path, config = tmp_path / "m.bin", dataclasses.replace(CONFIG, vocab_size=343)
    tensors = random_tensors(config)
    model_file.write(
        path, 3, config, tensors, tokenizer_sha256=vocabulary.sha256, tokenizer=("json", data), dtype="f32"
    )
    assert not any(path.read_bytes()[156:HEADER_BYTES])
    found = Model.load(path, backend="numpy").tokenizer
    assert found.ids == SpecialIds(bos=340, eos=342, prefix=(340,), stops=frozenset({340, 341, 342}))


# --- the header's fields ---

AT = PREFIX.size + EXTRAS.size + V3_FIELDS.size + 4 + 17 + 4


def with_fields(path: Path, *values: int) -> None:
    """Write the fields as somebody who knows how to compute their checksum."""
    data = bytearray(path.read_bytes())
    SPECIAL_IDS.pack_into(data, AT, *values, *[0] * (21 - len(values)))
    struct.pack_into("<I", data, AT + SPECIAL_IDS.size, zlib.crc32(data[: AT + SPECIAL_IDS.size]))
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((2, 1, 2, 0, 1, 5), "break their rules"),
        ((1, -2, 2, 0, 1, 5), "break their rules"),
        ((1, 1, 1 << 20, 0, 1, 5), "break their rules"),
        ((1, 1, 2, 9, 9), "break their rules"),
        ((1, 1, 2, 0, 1, 5, 6), "break their rules"),
        ((1, 1, 2, 1, 1, 5, -1), r"are \[5, -1\]: must be in 0"),
    ],
)
def test_ids_that_break_a_rule_are_refused(tmp_path, values, message):
    path = toy_model(tmp_path, SMALL_MODELS["gqa-tied"], version=3)
    with_fields(path, 1, 1, 2, 1, 2, 1, 5, 6)
    assert model_file.read(path).header.special_ids == SpecialIds(bos=1, eos=2, prefix=(1,), stops=frozenset({5, 6}))
    with_fields(path, *values)
    with pytest.raises(FormatError, match=message):
        model_file.read(path)


def test_ids_outside_the_vocabulary_are_refused(tmp_path):
    path = toy_model(tmp_path, SMALL_MODELS["gqa-tied"], version=3)
    with_fields(path, 1, 300, 2, 0, 1, 5)
    with pytest.raises(TokenizerError, match="300: not in the vocabulary of 300"):
        Model.load(path, backend="numpy")


def test_more_ids_than_the_header_has_room_for_are_refused(turns, tmp_path):
    source = formats.read("hf", str(turns))
    many = dataclasses.replace(source, tokenizer=source.tokenizer.with_stops(range(17)))
    with pytest.raises(ConfigError, match="17 ids begin every text or end one: version 3 has room for 16"):
        bin_file.write(tmp_path / "m.bin", many, 3)


# --- the files beside a tokenizer ---


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", "[1", "tokenizer_config.json: not valid JSON"),
        ("tokenizer_config.json", "[1]", "must hold a JSON object"),
        ("tokenizer_config.json", '{"bos_token": 5}', "bos_token is 5: must be a token"),
        ("tokenizer_config.json", '{"eos_token": {"lstrip": true}}', "eos_token is .*must be a token"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"x": {"content": "<a>"}}}',
            "must be a whole number from 0",
        ),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"3": "<a>"}}', "not an object of tokens by id"),
        ("tokenizer_config.json", '{"additional_special_tokens": 5}', "must be a list of tokens"),
        ("special_tokens_map.json", '{"eos_token": []}', r"eos_token is \[\]"),
        ("added_tokens.json", '{"<a>": "x"}', "must be a whole number from 0"),
        ("added_tokens.json", '{"<a>": [1]}', "must be a whole number from 0"),
        ("generation_config.json", '{"prefix_token_ids": [], "prefix_token_ids": [1]}', "there twice"),
        ("generation_config.json", '{"eos_token_id": "2"}', "eos_token_id is '2': must be a token's id"),
        ("generation_config.json", '{"eos_token_id": [true]}', "must be a token's id"),
        ("generation_config.json", '{"prefix_token_ids": 1}', "must be ids and lists of ids"),
        ("generation_config.json", '{"prefix_token_ids": [1e9], "eos_token_id": []}', "must be ids and lists of ids"),
        ("generation_config.json", '{"prefix_token_ids": [999], "eos_token_id": []}', "999: not in the vocabulary"),
    ],
)
def test_damaged_files_beside_a_tokenizer_are_refused_by_name(tmp_path, file, content, message):
    (tmp_path / "tokenizer.json").write_text(byte_level().to_str())
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(BOS_EOS))
    if file in ("special_tokens_map.json", "added_tokens.json"):
        (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / file).write_text(content)
    with pytest.raises(TokenizerError, match=message):
        load(tmp_path / "tokenizer.json")


def test_the_files_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "tokenizer.json").write_text(byte_level().to_str())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(BOS_EOS), encoding="utf-8-sig")
    assert load(tmp_path / "tokenizer.json").bos_id == 340


def test_a_tokenizer_json_may_begin_with_one_too_and_is_read_alike(tmp_path):
    made = byte_level()
    (tmp_path / "tokenizer.json").write_text(made.to_str(), encoding="utf-8-sig")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(BOS_EOS | {"pad_token": "[PAD]"}))
    found, data = tokenizer.read(tmp_path / "tokenizer.json")
    assert found.special["[PAD]"] == 342 and data.startswith(b"{")


def test_an_id_far_off_is_refused_before_memory_is_filled(tmp_path):
    fields = json.loads(byte_level().to_str())
    fields["model"]["vocab"]["x" * 9] = 10**9
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(TokenizerError, match="it has the id 1000000000: must be below"):
        load(tmp_path / "tokenizer.json")


def test_a_panic_of_the_library_while_tokens_are_added_is_a_refusal(tmp_path, capfd):
    fields = json.loads(byte_level().to_str()) | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(BOS_EOS | {"pad_token": "[PAD]"}))
    with pytest.raises(TokenizerError, match="not a usable tokenizer.json"):
        load(tmp_path / "tokenizer.json")


def test_ids_written_beside_a_tokenizer_are_read_again(tmp_path):
    (tmp_path / "t.tokenizer.model").write_bytes(train())
    ids = SpecialIds(bos=1, eos=None, prefix=(5, 1), stops=frozenset({7, 2}))
    ids_file.ids_path(tmp_path / "t.tokenizer.model").write_bytes(ids_file.ids_json(ids))
    assert (tmp_path / "t.generation_config.json").is_file()
    assert load(tmp_path / "t.tokenizer.model").ids == ids


def test_a_generation_config_beside_any_tokenizer_says_where_texts_end(tmp_path):
    (tmp_path / "t.tokenizer.model").write_bytes(train())
    (tmp_path / "t.generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert load(tmp_path / "t.tokenizer.model").ids == SpecialIds(bos=1, eos=2, prefix=(1,), stops=frozenset({7, 2}))


def test_a_large_tokenizer_json_is_read(tmp_path):
    """Llama 3's has 17 MB, more than other JSON files may have."""
    made = begins_with(byte_level(), "<|bos|>")
    (tmp_path / "tokenizer.json").write_text(made.to_str() + " " * (17 << 20))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(BOS_EOS))
    assert load(tmp_path / "tokenizer.json").ids.prefix == (340,)


def test_added_tokens_alone_beside_a_tokenizer_model_are_read(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train())
    (tmp_path / "added_tokens.json").write_text('{"<tool>": 420}')
    found, _, problems = huggingface._read_tokenizer(Folder(tmp_path), 448)
    assert problems == () and found.added["<tool>"] == 420


def test_what_is_no_text_is_refused_with_names_too():
    for special in (False, True):
        with pytest.raises(TokenizerError, match="is not text"):
            parse(byte_level().to_str().encode(), "t").encode(None, special=special)


def test_tokens_that_transformers_adds_are_in_the_tokenizer_that_goes_along(tmp_path):
    made = byte_level()
    (tmp_path / "tokenizer.json").write_text(made.to_str())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(BOS_EOS | {"pad_token": "[PAD]"}))
    (tmp_path / "config.json").write_text("{}")
    found, data, _ = huggingface._read_tokenizer(Folder(tmp_path), 345)
    assert isinstance(found, JsonTokenizer) and parse(data, "t").special["[PAD]"] == 342


@pytest.mark.parametrize("content", ["{", "[]"])
def test_what_is_wrong_with_one_of_two_tokenizers_is_said_once(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(train())
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    vocabulary, _, problems = huggingface._read_tokenizer(Folder(tmp_path), 420)
    assert vocabulary is None and len(problems) == 1 and str(tmp_path / "tokenizer.json") in problems[0]
