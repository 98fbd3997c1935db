"""What the files beside a tokenizer.json say, against transformers, and what damaged ones are refused for."""

import json
import os
from pathlib import Path

import pytest
import transformers
from makes import byte_level
from tokenizers import AddedToken, normalizers

from llamalet import tokenizer
from llamalet.errors import TokenizerError
from llamalet.marked_text import OTHERS
from llamalet.tokenizer import declared
from llamalet.tokenizer.declared import Folder

SPECIFIC = {"model_specific_special_tokens": {"img_token": "<img>"}}
OBJECT = {"__type": "AddedToken", "content": "<o>", "special": True}


def write(folder: Path, text: str, **files: object) -> Path:
    """Write a tokenizer.json and files beside it; return its path."""
    for name, fields in ({"config": {"model_type": "llama", "vocab_size": 999}} | files).items():
        (folder / f"{name}.json").write_text(json.dumps(fields))
    (folder / "tokenizer.json").write_text(text)
    return folder / "tokenizer.json"


@pytest.mark.parametrize(
    ("config", "map"),
    [
        ({"extra_special_tokens": ["<e>"]}, {}),
        ({"additional_special_tokens": ["<e>"]}, {}),
        ({"extra_special_tokens": {"e_token": "<e>"}}, {}),
        ({"x_token": OBJECT}, {}),
        ({"x_token": "<o>"}, {}),
        ({"x_token": ""}, {}),
        ({"x_token": None}, {}),
        ({}, {"y_token": "<s>"}),
        ({}, {"additional_special_tokens": ["<m>"]}),
        ({}, {"extra_special_tokens": ["<m>"]}),
        ({}, {"extra_special_tokens": {"m_token": "<m>", "img_token": "<i>"}}),
        ({"x_token": "<o>"}, {"extra_special_tokens": {"m_token": "<m>"}}),
        ({"extra_special_tokens": ["<e>"]}, {"extra_special_tokens": {"m_token": "<m>"}}),
        ({"x_token": ""}, {"x_token": "<m>", "extra_special_tokens": [], "additional_special_tokens": ["<s>"]}),
        ({"extra_special_tokens": {"e_token": "<e>"}, "additional_special_tokens": ["<o>"]}, {}),
        ({"x_token": OBJECT}, {"extra_special_tokens": {"m_token": "<m>"}, "additional_special_tokens": ["<s>"]}),
    ],
)
def test_model_specific_tokens_count_unless_the_config_replaces_them(tmp_path, config, map):
    files = {"tokenizer_config": SPECIFIC | config} | ({"special_tokens_map": map} if map else {})
    path = write(tmp_path, byte_level().to_str(), **files)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = tokenizer.load(path)
    for text in ("a<img>", "b<e>c<m><s>", "<i><o>"):
        assert ours.encode(text, special=True) == theirs(text, add_special_tokens=False)["input_ids"], text
    assert Folder(tmp_path).template_variables == theirs.special_tokens_map


def test_model_specific_tokens_must_be_an_object(tmp_path):
    path = write(tmp_path, byte_level().to_str(), tokenizer_config={"model_specific_special_tokens": ["<img>"]})
    with pytest.raises(TokenizerError, match="tokenizer_config.json: model_specific_special_tokens is .*an object"):
        tokenizer.load(path)


@pytest.mark.parametrize("size", ["sparse", "system"])
def test_a_file_that_cannot_be_read_is_named_once(tmp_path, size):
    """LlamaTokenizer is the class for which the file is looked at before it is read as a tokenizer."""
    path = write(tmp_path, "", tokenizer_config={"tokenizer_class": "LlamaTokenizer"})
    if size == "sparse":
        os.truncate(path, declared.MAX_FILE_BYTES + 1)
    else:
        path.unlink()
        path.symlink_to("/proc/self/mem")
    for read in (Folder(tmp_path).check, lambda: tokenizer.load(path)):
        with pytest.raises(TokenizerError) as info:
            read()
        reason = "too large for a tokenizer" if size == "sparse" else "cannot be read"
        assert reason in str(info.value) and str(info.value).count(str(path)) == 1


@pytest.mark.parametrize("id", [3.7, True, -5, "-5", "+5", "1_0", "\u0663", "9" * 5000, 1 << 20, None])
def test_ids_of_added_tokens_are_whole_numbers(tmp_path, id):
    path = write(tmp_path, byte_level().to_str(), added_tokens={"<a>": id})
    with pytest.raises(TokenizerError, match="added_tokens.json: an added token has the id .*must be a whole number"):
        tokenizer.load(path)


@pytest.mark.parametrize("id", [99999, True, -1])
def test_an_id_beyond_the_vocabulary_names_its_file(tmp_path, id):
    text = json.loads(byte_level().to_str())
    bad = {"id": "<s>", "type_id": 0}
    text["post_processor"] = {
        "type": "TemplateProcessing", "single": [{"SpecialToken": bad}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [id], "tokens": ["<s>"]}},
    }  # fmt: skip
    path = write(tmp_path, byte_level().to_str())
    vocabulary = tokenizer.load(path)
    with pytest.raises(TokenizerError, match=f"tokenizer.json: BOS, EOS or prefix {id}: not in .*correct the file"):
        vocabulary.with_ids(declared.ids_alone(vocabulary, text, str(path)), str(path))
    (tmp_path / "generation_config.json").write_text(json.dumps({"prefix_token_ids": [99999], "eos_token_id": []}))
    with pytest.raises(TokenizerError, match=r"generation_config.json: BOS, EOS or prefix 99999: not in .*correct"):
        tokenizer.load(path)


MODELS = {
    "a list": [], "a number": 5, "nothing": None, "without a vocabulary": {"merges": []},
    "a vocabulary of a number": {"vocab": 5, "merges": []}, "a list of tokens": {"vocab": [["a", 1.0]], "merges": []},
    "an unknown token of no name": {"type": "BPE", "vocab": {}, "merges": [], "unk_token": []},
}  # fmt: skip
PYTHON = ("object", "attribute", "subscriptable", "unhashable", "NoneType", "Error", "indices")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["GPT2Tokenizer", "CodeLlamaTokenizer", "PreTrainedTokenizer"])
def test_a_model_of_another_type_is_refused_in_plain_words(tmp_path, name, kind):
    text = json.loads(byte_level().to_str()) | {"model": MODELS[kind]}
    path = write(tmp_path, json.dumps(text), tokenizer_config={"tokenizer_class": name})
    try:
        tokenizer.load(path)
    except TokenizerError as error:
        said = str(error).replace("must be an object", "")
        assert said.startswith(f"{path}: ") and not any(word in said for word in PYTHON), said
    else:
        # The first takes no unknown token from the file; the second takes a list for a unigram vocabulary.
        assert (name, kind) in {
            ("GPT2Tokenizer", "an unknown token of no name"), ("PreTrainedTokenizer", "a list of tokens")
        }  # fmt: skip


def test_a_character_that_a_normalizer_makes_a_name_is_no_token_in_a_chat(tmp_path):
    """transformers finds the token there; nobody but the template may name it."""
    library = byte_level()
    library.normalizer = normalizers.Replace("X", "<tool>")
    library.add_tokens([AddedToken("<tool>", normalized=True), AddedToken("|", normalized=False)])
    path = write(tmp_path, library.to_str())
    ours = tokenizer.load(path)
    tool, bar = library.token_to_id("<tool>"), library.token_to_id("|")
    assert tool in library.encode("aXb").ids
    assert tool not in ours.encode_marked("aXb", OTHERS * 3)
    assert tool not in ours.encode_nameless(["aXb"])
    assert bar in ours.encode_marked("a|b", OTHERS * 3)  # one character is anyone's
