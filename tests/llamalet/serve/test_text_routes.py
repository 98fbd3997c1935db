import json

import pytest
from served import toy_chat_model, toy_story_model

from llamalet import chat_template
from llamalet.serve.api_error import ApiError
from llamalet.serve.served_model import ServedModel
from llamalet.serve.text_routes import detokenize, model, models, props, tokenize, tokenizer_info


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> ServedModel:
    return toy_story_model(tmp_path_factory.mktemp("story"), names=["tale", "other"], created=5)


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> ServedModel:
    return toy_chat_model(tmp_path_factory.mktemp("chat"))


def body(**fields) -> bytes:
    return json.dumps(fields).encode()


def refused(answer, served, **fields) -> ApiError:
    with pytest.raises(ApiError) as caught:
        answer(body(**fields), served)
    return caught.value


def test_a_prompt_is_tokenized_as_vllm_does(served):
    ids = served.tokenizer.encode("and a ban")
    assert tokenize(body(prompt="and a ban"), served) == {
        "tokens": [1, *ids],
        "count": len(ids) + 1,
        "max_model_len": 32,
    }
    assert tokenize(body(prompt="and a ban", add_special_tokens=False, model="other"), served)["tokens"] == ids
    assert tokenize(body(prompt="", add_special_tokens=False), served)["tokens"] == []


def test_content_is_tokenized_as_llama_cpp_does(served):
    ids = served.tokenizer.encode("and a ban")
    assert tokenize(body(content="and a ban"), served)["tokens"] == ids
    assert tokenize(body(content="and a ban", add_special=True), served)["tokens"] == [1, *ids]


def test_names_of_special_tokens_become_tokens(served, talker):
    assert tokenize(body(prompt="</s>", add_special_tokens=False), served)["tokens"] == [2]
    eot = talker.tokenizer.special["<|eot_id|>"]
    assert tokenize(body(content="a<|eot_id|>"), talker)["tokens"][-1] == eot
    assert eot not in tokenize(body(content="a<|eot_id|>", parse_special=False), talker)["tokens"]


def test_a_text_longer_than_the_context_is_tokenized(served):
    assert tokenize(body(prompt="ab" * 5000), served)["count"] > 5000


def test_ids_are_decoded_under_both_names(served):
    ids = served.tokenizer.encode("and a \u4e2d ban", bos=True)
    assert detokenize(body(tokens=ids), served) == {"prompt": "and a \u4e2d ban", "content": "and a \u4e2d ban"}
    assert detokenize(body(tokens=[]), served)["prompt"] == ""
    assert detokenize(body(tokens=[0x0E4 + 3]), served)["prompt"] == "\ufffd"


def test_special_tokens_are_written_on_request(talker):
    ids = [talker.tokenizer.bos_id, *talker.tokenizer.encode("the band"), talker.tokenizer.special["<|eot_id|>"]]
    assert detokenize(body(tokens=ids), talker)["prompt"] == "the band"
    text = "<|begin_of_text|>the band<|eot_id|>"
    assert detokenize(body(tokens=ids, skip_special_tokens=False), talker)["prompt"] == text
    assert tokenize(body(content=text), talker)["tokens"] == ids


@pytest.mark.parametrize(
    ("answer", "fields", "param"),
    [
        (tokenize, {}, "prompt"),
        (tokenize, {"prompt": "a", "content": "a"}, "prompt"),
        (tokenize, {"prompt": 5}, "prompt"),
        (tokenize, {"prompt": ["a"]}, "prompt"),
        (tokenize, {"content": True}, "content"),
        (tokenize, {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        (tokenize, {"prompt": "a", "parse_special": "no"}, "parse_special"),
        (tokenize, {"prompt": "\ud800"}, "prompt"),
        (detokenize, {}, "tokens"),
        (detokenize, {"tokens": "a"}, "tokens"),
        (detokenize, {"tokens": 5}, "tokens"),
        (detokenize, {"tokens": [300]}, "tokens"),
        (detokenize, {"tokens": [-1]}, "tokens"),
        (detokenize, {"tokens": [True]}, "tokens"),
        (detokenize, {"tokens": [1.0]}, "tokens"),
        (detokenize, {"tokens": [5], "skip_special_tokens": 0}, "skip_special_tokens"),
    ],
)
def test_bad_values_are_refused_by_name(served, answer, fields, param):
    error = refused(answer, served, **fields)
    assert (error.status, error.param) == (400, param)


@pytest.mark.parametrize(("answer", "fields"), [(tokenize, {"prompt": "a"}), (detokenize, {"tokens": [5]})])
def test_another_model_is_not_found(served, answer, fields):
    assert refused(answer, served, model="gpt-4", **fields).status == 404


def test_models_are_listed_under_all_names(served):
    found = models(served)
    assert found["object"] == "list" and [entry["id"] for entry in found["data"]] == ["tale", "other"]
    assert model(served, "other") == found["data"][1]
    assert found["data"][1] == {
        "id": "other", "object": "model", "created": 5, "owned_by": "llamalet", "root": "tale", "max_model_len": 32
    }  # fmt: skip
    with pytest.raises(ApiError) as caught:
        model(served, "../../etc/passwd")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


def test_a_model_without_names_is_called_like_its_file(talker):
    assert talker.names == ("chat",)


def test_what_a_tokenizer_is_for_a_client_that_encodes_there(served, talker):
    info = tokenizer_info(served)
    assert (info["bos_token"], info["eos_token"], info["chat_template"]) == ("<s>", "</s>", None)
    assert (info["bos_token_id"], info["eos_token_id"], info["add_bos_token"]) == (1, 2, True)
    for id, name in ((info["bos_token_id"], info["bos_token"]), (info["eos_token_id"], info["eos_token"])):
        assert tokenize(body(prompt=name, add_special_tokens=False), served)["tokens"] == [id]
    assert tokenizer_info(talker)["bos_token"] == "<|begin_of_text|>"


def test_no_answer_names_a_path(served, talker):
    for found in (served, talker):
        text = json.dumps([models(found), tokenizer_info(found), props(found)])
        assert str(found.model.path.parent) not in text and ".bin" not in text


def test_props_have_the_shape_and_the_limits(served, talker):
    found = props(served)
    assert (found["model"], found["aliases"], found["n_ctx"], found["n_vocab"]) == ("tale", ["other"], 32, 300)
    assert (found["dtype"], found["kv"], found["chat"]) == ("f32", "f32", False)
    assert props(talker)["chat"] and found["limits"]["texts"] == served.limits.texts


def test_a_named_template_that_cannot_be_used_stops_the_start(tmp_path):
    with pytest.raises(chat_template.UsageError, match="llama3"):
        toy_story_model(tmp_path, chat_template="llama3")
