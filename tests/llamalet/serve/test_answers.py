import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import chat, complete, log_softmax, stream, toy_chat_model, toy_story_model

from llamalet.engine import Begun, Ended, NewToken
from llamalet.errors import NonFiniteError, OutOfMemoryError, UsageError
from llamalet.logprobs import Logprobs
from llamalet.serve.answers import Answer
from llamalet.serve.api_error import ApiError
from llamalet.serve.schema import read_chat, read_completion
from llamalet.serve.served_model import ServedModel

HELLO = [{"role": "user", "content": "the band"}]
HALF_A, HALF_B, HALF_C = (byte + 3 for byte in "\u4e2d".encode())  # byte tokens of one character
PLAIN = [260, 261, 262]  # "a", "b", "n"


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> ServedModel:
    return toy_story_model(tmp_path_factory.mktemp("story"))


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> ServedModel:
    return toy_chat_model(tmp_path_factory.mktemp("chat"))


def likely(*ids: int) -> dict[str, int]:
    """A bias that leaves nothing but these tokens."""
    return {str(id): 100 for id in ids}


# --- completions ---


def test_a_completion_has_openais_fields(served):
    found = complete(served, prompt="and", max_tokens=4, seed=3, ignore_eos=True)
    assert list(found) == ["id", "object", "created", "model", "system_fingerprint", "seed", "choices", "usage"]
    assert (found["id"], found["object"], found["created"], found["seed"]) == ("cmpl-7", "text_completion", 5, 3)
    assert (found["model"], found["system_fingerprint"]) == ("story", "llamalet-0.1.0-f32-kv-f32")
    (choice,) = found["choices"]
    assert list(choice) == ["index", "text", "logprobs", "finish_reason"]
    assert (choice["index"], choice["logprobs"], choice["finish_reason"]) == (0, None, "length")
    n = len(served.tokenizer.encode("and", bos=True))
    assert found["usage"] == {
        "prompt_tokens": n, "completion_tokens": 4, "total_tokens": n + 4, "prompt_tokens_details": {"cached_tokens": 0}
    }  # fmt: skip


def test_the_text_is_that_of_generate(served):
    expected = "".join(served.model.generate("and", temperature=0.7, top_p=1.0, seed=9, max_new_tokens=12))
    assert complete(served, prompt="and", temperature=0.7, seed=9, max_tokens=12)["choices"][0]["text"] == expected
    assert expected


def test_choices_are_those_of_their_seeds_alone(served):
    prompts = ["and", "ban", ""]
    found = complete(served, prompt=prompts, n=2, seed=5, max_tokens=8, ignore_eos=True)
    assert [choice["index"] for choice in found["choices"]] == list(range(6))
    for choice in found["choices"]:
        alone = complete(
            served, prompt=prompts[choice["index"] // 2], seed=5 + choice["index"], max_tokens=8, ignore_eos=True
        )
        assert alone["choices"][0]["text"] == choice["text"]
    assert len({choice["text"] for choice in found["choices"]}) == 6
    assert found["usage"]["prompt_tokens"] == sum(len(served.tokenizer.encode(text, bos=True)) for text in prompts)
    assert found["usage"]["completion_tokens"] == 48


def test_the_seed_that_was_drawn_gives_the_text_again(served):
    first = complete(served, prompt="and", max_tokens=10, ignore_eos=True)
    again = complete(served, prompt="and", max_tokens=10, ignore_eos=True, seed=first["seed"])
    assert again["choices"] == first["choices"]


def test_large_limits_end_with_the_context(served):
    found = complete(served, prompt=[5] * 20, max_tokens=10**9, ignore_eos=True)
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"]["completion_tokens"] == 13


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_stop_string_is_not_in_the_text(served, is_stream):
    options = {"prompt": "and", "logit_bias": likely(*PLAIN), "seed": 4, "max_tokens": 20}
    text = complete(served, **options)["choices"][0]["text"]
    stop = text[7:9]
    expected = text[: text.index(stop)]
    if is_stream:
        choices = [event["choices"][0] for event in stream(served, read_completion, stop=["never", stop], **options)]
        assert "".join(choice["text"] for choice in choices) == expected
        assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]
    else:
        (choice,) = complete(served, stop=["never", stop], **options)["choices"]
        assert (choice["text"], choice["finish_reason"]) == (expected, "stop")


# --- logprobs as lm-evaluation-harness reads them ---


@pytest.mark.parametrize("echo", [True, False])
@pytest.mark.parametrize("n_top", [0, 1, 5, 20])
def test_logprobs_are_the_log_softmax_of_the_models_logits(served, n_top, echo):
    prompt = [7, 260, 263, 99]
    found = complete(served, prompt=prompt, max_tokens=5, logprobs=n_top, echo=echo, seed=8, return_token_ids=True,
                     return_tokens_as_token_ids=True, ignore_eos=True, temperature=0.5)  # fmt: skip
    (choice,) = found["choices"]
    assert choice["prompt_token_ids"] == prompt
    ids = prompt + choice["token_ids"]
    rows = log_softmax(served.model.logits(ids))
    expected = [None] + [rows[at, token] for at, token in enumerate(ids[1:])]
    logprobs = choice["logprobs"]
    first = 0 if echo else len(prompt)
    assert logprobs["tokens"] == [f"token_id:{id}" for id in ids[first:]]
    assert len(logprobs["token_logprobs"]) == len(ids) - first
    for value, wanted in zip(logprobs["token_logprobs"], expected[first:], strict=True):
        assert value == wanted if wanted is None else math.isclose(value, wanted, abs_tol=1e-5)
    for at, (top, token) in enumerate(zip(logprobs["top_logprobs"], ids[first:], strict=True), first):
        if at == 0:
            assert top is None
            continue
        row = rows[at - 1]
        likeliest = {f"token_id:{id}" for id in np.argsort(-row, kind="stable")[:n_top]}
        assert set(top) == likeliest | {f"token_id:{token}"}
        assert top[f"token_id:{token}"] == logprobs["token_logprobs"][at - first]
        if n_top:
            is_greedy = int(np.argmax(row)) == token
            assert (logprobs["token_logprobs"][at - first] == max(top.values())) == is_greedy


@pytest.mark.parametrize("prompt", [[1, 260, 263], [7], "and a"])
@pytest.mark.parametrize("is_stop", [False, True])
def test_there_are_as_many_entries_as_tokens_and_one_even_if_that_ends_the_text(served, prompt, is_stop):
    bias = likely(2 if is_stop else 260)
    found = complete(
        served, prompt=prompt, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True, logit_bias=bias
    )
    (choice,) = found["choices"]
    n = found["usage"]["prompt_tokens"] + 1
    assert {len(values) for values in choice["logprobs"].values()} == {n}
    assert choice["logprobs"]["token_logprobs"][0] is choice["logprobs"]["top_logprobs"][0] is None
    assert choice["logprobs"]["tokens"][-1] == ("" if is_stop else "a")
    assert choice["finish_reason"] == ("stop" if is_stop else "length")
    assert found["usage"]["completion_tokens"] == 1
    text = prompt if isinstance(prompt, str) else served.tokenizer.decode(prompt)
    assert choice["text"] == text + ("" if is_stop else "a")


def test_logprobs_sum_to_the_score_of_a_text(served):
    text = "and a ban and bad"
    ids = served.tokenizer.encode(text, bos=True)
    (choice,) = complete(served, prompt=[ids], max_tokens=1, logprobs=1, echo=True)["choices"]
    total = sum(choice["logprobs"]["token_logprobs"][1:-1])
    assert math.isclose(-total, served.model.score(text).nats, abs_tol=1e-4)


def test_without_new_tokens_the_prompt_alone_comes_back(served):
    (choice,) = complete(served, prompt="and a", max_tokens=0, echo=True, logprobs=2)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("and a", "length")
    assert len(choice["logprobs"]["tokens"]) == len(served.tokenizer.encode("and a", bos=True))
    assert complete(served, prompt="and a", max_tokens=0, echo=True)["choices"][0]["text"] == "and a"
    assert complete(served, prompt="and a", max_tokens=0)["choices"][0]["text"] == ""


def test_offsets_are_characters_of_the_text(served):
    text = "a \u4e2d\u6587\u00e9 ban"
    (choice,) = complete(served, prompt=text, max_tokens=6, echo=True, logprobs=0, ignore_eos=True)["choices"]
    ids = served.tokenizer.encode(text, bos=True)
    offsets = choice["logprobs"]["text_offset"]
    pieces = [served.tokenizer.decode(ids[:n]) for n in range(len(ids))]
    whole = [n for n, piece in enumerate(pieces) if not piece.endswith("\ufffd")]
    assert [offsets[n] for n in whole] == [len(pieces[n]) for n in whole]
    assert offsets[0] == offsets[1] == 0 and offsets[len(ids)] == len(text)
    assert offsets == sorted(offsets)
    (after,) = complete(served, prompt=text, max_tokens=6, logprobs=0, ignore_eos=True)["choices"]
    assert after["logprobs"]["text_offset"][0] == 0


def test_halves_of_characters_are_told_apart_and_joined(served):
    found = complete(
        served, prompt=[HALF_A], max_tokens=2, logprobs=0, echo=True, temperature=0, logit_bias=likely(HALF_B),
    )["choices"][0]  # fmt: skip
    assert found["logprobs"]["tokens"] == ["bytes:\\xe4", "bytes:\\xb8", "bytes:\\xb8"]
    assert found["text"] == b"\xe4\xb8\xb8".decode()
    cut = complete(
        served, prompt=[260, HALF_A, HALF_B], max_tokens=1, temperature=0, logit_bias=likely(HALF_C), echo=True
    )
    assert cut["choices"][0]["text"] == "a\u4e2d"
    assert complete(served, prompt=[260, HALF_A, HALF_B], max_tokens=0, echo=True)["choices"][0]["text"] == "a\ufffd"


def test_of_two_tokens_with_one_text_the_likelier_stays(served):
    """A byte token and a token of text have the same text."""
    prompt, text = [7, 263], "a"
    twin = ord("a") + 3
    assert served.token_text(twin) == served.token_text(260) == text
    (choice,) = complete(served, prompt=prompt, max_tokens=1, logprobs=20, temperature=0, logit_bias=likely(twin))[
        "choices"
    ]
    row = log_softmax(served.model.logits(prompt))[-1]
    top = choice["logprobs"]["top_logprobs"][0]
    wanted = max(row[twin], row[260] if 260 in np.argsort(-row)[:20] else -np.inf)
    assert math.isclose(top[text], wanted, abs_tol=1e-5)
    answer = Answer(read_completion(b'{"prompt": [7], "logprobs": 2}', served), "7", 5, served)
    for values in ((-1.0, -2.0), (-2.0, -1.0)):
        chosen, other = values
        answer.push(0, NewToken(0, twin, "a", Logprobs(chosen, 0, 0.0, ((260, other), (261, -3.0)))))
    answer.push(0, Ended(0, "", "length", None))
    found = json.loads(answer.body())["choices"][0]["logprobs"]
    assert found["token_logprobs"] == [-1.0, -2.0]
    assert found["top_logprobs"] == [{"a": -1.0, "b": -3.0}] * 2


# --- streams ---


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_of_a_completion_has_openais_events(served, usage):
    options = {"prompt": "and", "seed": 3, "max_tokens": 5, "logit_bias": likely(*PLAIN)}
    more = {"stream_options": {"include_usage": True}} if usage else {}
    events = stream(served, read_completion, **options, **more)
    whole = complete(served, **options)
    if usage:
        *events, last = events
        assert last["choices"] == [] and last["usage"] == whole["usage"]
        assert all(event.pop("usage", 0) is None for event in events)
    assert all(
        list(event) == ["id", "object", "created", "model", "system_fingerprint", "seed", "choices"] for event in events
    )
    assert {event["object"] for event in events} == {"text_completion"} and {event["seed"] for event in events} == {3}
    choices = [event["choices"][0] for event in events]
    assert all(list(choice) == ["index", "text", "logprobs", "finish_reason"] for choice in choices)
    assert len(choices) == 5 and all(choice["text"] for choice in choices)
    assert [choice["finish_reason"] for choice in choices] == [None] * 4 + ["length"]
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]


def joined(events) -> dict[int, dict]:
    """What the choices of a stream add up to."""
    found: dict[int, dict] = {}
    for event in events:
        for choice in event["choices"]:
            mine = found.setdefault(choice["index"], {"text": "", "logprobs": None, "token_ids": []})
            mine["text"] += choice["text"]
            mine["token_ids"] += choice.get("token_ids", [])
            mine["prompt_token_ids"] = choice.get("prompt_token_ids", mine.get("prompt_token_ids"))
            for name, values in (choice["logprobs"] or {}).items():
                mine["logprobs"] = mine["logprobs"] or {}
                mine["logprobs"][name] = mine["logprobs"].get(name, []) + values
            if choice["finish_reason"]:
                mine["finish_reason"] = choice["finish_reason"]
    return found


@settings(max_examples=60, deadline=None)
@given(
    options=st.fixed_dictionaries(
        {
            "prompt": st.sampled_from(["and", "", ["a", "ban"], [7, HALF_A], [[5], [260, 263]]]),
            "max_tokens": st.integers(0, 6),
            "n": st.integers(1, 2),
            "seed": st.integers(0, 1000),
            "echo": st.booleans(),
            "logprobs": st.none() | st.integers(0, 3),
            "return_token_ids": st.booleans(),
            "stop": st.sampled_from([None, ["a"], ["nb", "ba"]]),
            "logit_bias": st.sampled_from([{}, likely(*PLAIN), likely(HALF_A, HALF_B, HALF_C), likely(2, 260)]),
        }
    )
)
def test_a_stream_adds_up_to_the_answer_in_one_piece(served, options):
    whole = complete(served, **options)["choices"]
    found = joined(stream(served, read_completion, **options))
    assert sorted(found) == [choice["index"] for choice in whole]
    for choice in whole:
        mine = found[choice["index"]]
        for name in ("text", "logprobs", "finish_reason"):
            assert mine[name] == choice[name], name
        if options["return_token_ids"]:
            assert (mine["token_ids"], mine["prompt_token_ids"]) == (choice["token_ids"], choice["prompt_token_ids"])


def test_a_step_gives_one_write_and_nothing_if_nothing_is_certain(served):
    answer = Answer(read_completion(b'{"prompt": ["a", "b"], "stream": true}', served), "7", 5, served)
    assert answer.chunk() == b""
    answer.push(0, Begun(0, 0, None, None))
    assert answer.chunk() == b""
    answer.push(0, NewToken(0, HALF_A, "", None))
    assert answer.chunk() == b""
    answer.push(0, NewToken(0, 260, "a", None))
    answer.push(1, Begun(1, 0, None, None))
    answer.push(1, NewToken(1, 261, "b", None))
    answer.push(0, NewToken(0, 262, "n", None))
    events = answer.chunk().split(b"\n\n")
    assert [json.loads(event[6:])["choices"][0]["text"] for event in events[:-1]] == ["an", "b"] and events[-1] == b""
    assert answer.chunk() == b""
    assert not answer.finished
    answer.push(1, Ended(1, "", "stop", None))
    answer.push(0, Ended(0, "rest", "length", None))
    assert answer.finished and answer.n_new_tokens == 4
    last, first = (json.loads(event[6:])["choices"][0] for event in answer.chunk().split(b"\n\n")[:2])
    assert (last["text"], last["finish_reason"], first["text"], first["finish_reason"]) == (
        "",
        "stop",
        "rest",
        "length",
    )


def test_any_text_is_ascii_on_one_line(served):
    answer = Answer(read_completion(b'{"prompt": "a", "stream": true}', served), "7", 5, served)
    text = '\u2028\u2029\x85\x0b\x00\n\r"\\\U0001f600\u00e9'
    answer.push(0, NewToken(0, 260, text, None))
    data = answer.chunk()
    assert data.isascii() and data.count(b"\n") == 2 and len(data.decode().splitlines()) == 2
    assert json.loads(data[6:])["choices"][0]["text"] == text


# --- chats ---


def test_a_chat_has_openais_fields(talker):
    found = chat(talker, messages=HELLO, max_tokens=4, seed=3, ignore_eos=True, return_token_ids=True)
    assert (found["id"], found["object"], found["model"]) == ("chatcmpl-7", "chat.completion", "chat")
    (choice,) = found["choices"]
    assert list(choice) == ["index", "message", "logprobs", "finish_reason", "token_ids"]
    text = talker.tokenizer.decode(choice["token_ids"])
    assert choice["message"] == {"role": "assistant", "content": text} and len(choice["token_ids"]) == 4
    assert found["usage"]["prompt_tokens"] == len(found["prompt_token_ids"])


def test_the_answer_of_a_chat_ends_with_the_turn(talker):
    bias = likely(talker.tokenizer.special["<|eot_id|>"])
    found = chat(talker, messages=HELLO, logit_bias=bias, logprobs=True)
    (choice,) = found["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")
    assert choice["logprobs"] == {"content": [], "refusal": None}
    assert found["usage"]["completion_tokens"] == 1


def test_the_end_of_a_turn_that_is_ignored_is_a_token_like_others(talker):
    bias = likely(talker.tokenizer.special["<|eot_id|>"])
    options = {"logit_bias": bias, "logprobs": True, "ignore_eos": True, "max_tokens": 3}
    (choice,) = chat(talker, messages=HELLO, **options)["choices"]
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["<|eot_id|>"] * 3
    assert choice["finish_reason"] == "length"


def test_logprobs_of_a_chat_have_tokens_and_their_bytes(talker):
    found = chat(talker, messages=HELLO, max_tokens=6, seed=3, ignore_eos=True, logprobs=True, top_logprobs=20,
                 return_token_ids=True)  # fmt: skip
    ids, (choice,) = found["prompt_token_ids"], found["choices"]
    rows = log_softmax(talker.model.logits(ids + choice["token_ids"]))[len(ids) - 1 :]
    special = {id: name for name, id in talker.tokenizer.special.items()}
    content = choice["logprobs"]["content"]
    assert len(content) == 6
    for entry, token, row in zip(content, choice["token_ids"], rows, strict=False):
        assert list(entry) == ["token", "logprob", "bytes", "top_logprobs"]
        assert math.isclose(entry["logprob"], row[token], abs_tol=1e-5)
        data = talker.tokenizer.token_bytes(token)
        assert entry["bytes"] == (list(data) or None)
        assert token not in special or entry["token"] == special[token]
        values = [other["logprob"] for other in entry["top_logprobs"]]
        assert len(values) == 20 and values == sorted(values, reverse=True)
    named = [other for entry in content for other in entry["top_logprobs"] if other["bytes"] is None]
    assert named and all(other["token"] in talker.tokenizer.special or other["token"] == "" for other in named)


def test_the_stream_of_a_chat_begins_with_the_role(talker):
    options = {"messages": HELLO, "max_tokens": 6, "seed": 3, "n": 2, "ignore_eos": True, "logprobs": True,
               "top_logprobs": 2, "return_token_ids": True}  # fmt: skip
    whole = chat(talker, **options)
    events = stream(talker, read_chat, **options)
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    for choice in whole["choices"]:
        mine = [event for event in events if event["choices"][0]["index"] == choice["index"]]
        assert mine[0]["prompt_token_ids"] == whole["prompt_token_ids"]
        first, *rest = (event["choices"][0] for event in mine)
        assert first["delta"] == {"role": "assistant", "content": ""} and first["finish_reason"] is None
        assert all(set(chunk["delta"]) <= {"content"} for chunk in rest)
        assert "".join(chunk["delta"].get("content", "") for chunk in rest) == choice["message"]["content"]
        assert [chunk["finish_reason"] for chunk in rest] == [None] * (len(rest) - 1) + ["length"]
        assert sum((chunk["token_ids"] for chunk in rest), []) == choice["token_ids"]
        assert sum((chunk["logprobs"]["content"] for chunk in rest), []) == choice["logprobs"]["content"]


def test_a_stream_of_a_chat_without_text_has_an_empty_last_delta(talker):
    bias = likely(talker.tokenizer.special["<|eot_id|>"])
    first, last = stream(talker, read_chat, messages=HELLO, logit_bias=bias)
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")


def test_the_answer_of_a_chat_is_generates_of_its_prompt(talker):
    found = chat(talker, messages=HELLO, seed=6, max_tokens=9, return_token_ids=True)
    ids = found["prompt_token_ids"]
    again = complete(talker, prompt=ids, seed=6, max_tokens=9, return_token_ids=True)
    assert again["choices"][0]["token_ids"] == found["choices"][0]["token_ids"]


def test_the_openai_package_reads_all_answers(served, talker):
    types = pytest.importorskip("openai.types")
    chats = pytest.importorskip("openai.types.chat")
    usage = {"stream_options": {"include_usage": True}}
    # Its types lack the nulls of the first token of an echo, and of a stream's finish_reason.
    completions = [complete(served, prompt=["and", "a"], max_tokens=3, n=2, logprobs=3)]
    options = {"messages": HELLO, "max_tokens": 3, "n": 2, "logprobs": True, "top_logprobs": 3}
    for kind, found in (
        (types.Completion, completions),
        (chats.ChatCompletion, [chat(talker, **options), chat(talker, messages=HELLO, max_tokens=0)]),
        (chats.ChatCompletionChunk, stream(talker, read_chat, **options, **usage)),
    ):
        for fields in found:
            kind.model_validate(fields)


# --- errors ---


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (NonFiniteError("3 of 5 logits are NaN"), 500, "non_finite"),
        (MemoryError(), 503, "out_of_memory"),
        (OutOfMemoryError("a secret number of MB is free"), 503, "out_of_memory"),
        (UsageError("the prompt is odd"), 400, "invalid_request"),
        (RuntimeError("/home/me/secret"), 500, "internal_error"),
        (None, 500, "internal_error"),
    ],
)
def test_a_text_that_fails_fails_its_request(served, error, status, code):
    answer = Answer(read_completion(b'{"prompt": "a", "n": 2, "stream": true}', served), "7", 5, served)
    answer.push(0, NewToken(0, 260, "a", None))
    answer.push(1, Ended(1, "", "error", error))
    assert answer.finished
    assert (answer.failure.status, answer.failure.code) == (status, code)
    assert ("retry-after" in answer.failure.headers) == (status == 503)
    (event,) = answer.chunk().split(b"\n\n")[:-1]
    assert json.loads(event[6:])["choices"][0]["text"] == "a"
    last = answer.error_event(answer.failure)
    assert last.startswith(b"data: ") and last.endswith(b"\n\n") and b"secret" not in last
    fields = json.loads(last[6:])["error"]
    assert fields["code"] == code and fields["type"] == ("invalid_request_error" if status < 500 else "server_error")


def test_an_error_of_the_api_stays_itself():
    error = ApiError(408, "too late", code="timeout")
    assert ApiError.of(error) is error


def test_tokens_from_the_prefix_cache_are_counted_once_for_a_prompt(served):
    asked = read_completion(b'{"prompt": ["a", "b"], "n": 2, "max_tokens": 1}', served)
    answer = Answer(asked, "7", 5, served)
    for index, n_cached in enumerate((1, 2, 2, 2)):
        answer.push(index, Begun(index, n_cached, None, None))
    assert answer.n_cached_tokens == 3
    assert answer.usage["prompt_tokens_details"] == {"cached_tokens": 3}


def test_a_cancelled_text_finishes_its_answer(served):
    answer = Answer(read_completion(b'{"prompt": "a"}', served), "7", 5, served)
    answer.push(0, Ended(0, "", "cancelled", None))
    assert answer.finished and answer.failure is None
