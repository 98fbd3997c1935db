import dataclasses
import json
import socket
import sys
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import openai_server
import pytest

from benchmarks import random_models, servers, serving, serving_report
from benchmarks.load import ClientConnection, Load, LoadClient, Plan, Received, Reply, read_reply
from benchmarks.report import OURS, Key
from benchmarks.serving import ServingBenchConfig
from benchmarks.serving_report import BATCH, LONG_PROMPT, Case, ServingResults
from benchmarks.shapes import Shape
from llamalet import Model
from llamalet.config import ModelConfig
from llamalet.errors import ConfigError, UsageError

CONFIG = ModelConfig.create(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=320, max_seq_len=64)
FAKE = openai_server.__file__

EVENTS = [
    b'data: {"choices": [{"text": " a"}]}\n\n',
    b'data: {"choices": [{"text": " b"}]}\n\n: a comment\n\ndata: {"choices": [{"delta": {"content": "c"}}]}\n\n',
    b'data: {"choices": [{"text": "", "finish_reason": "length"}]}\n\n',
    b'data: {"choices": [], "usage": {"completion_tokens": 3, "prompt_tokens": 7, "prompt_tokens_details": null}}\n\n',
    b"data: [DONE]\n\n",
]


def answer_of(events: list[bytes]) -> bytes:
    """Return the bytes of an answer in chunks, one for each of `events`."""
    header = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
    return header + b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in [*events, b""])


def reply(start: float, pieces: list[tuple[float, bytes]]) -> Reply:
    """Return what an answer says that came in these pieces."""
    times, content = [when for when, _ in pieces], [data for _, data in pieces]
    return read_reply(Received(start, b"".join(content), times, [*accumulate(map(len, content))]))


@pytest.fixture(scope="module")
def client():
    with LoadClient() as started:
        yield started


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    port = servers.free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    with servers.running(OURS, [sys.executable, FAKE, "--port", str(port)], port, log) as started:
        yield started


def bodies(server: servers.Server, n: int, **fields) -> list[dict]:
    return [server.body([1, 2, 3, 4], 5 + number, stream=True, temperature=0.0, seed=1) | fields for number in range(n)]


# -- answers ----------------------------------------------------------------------------------------------------------


def test_a_stream_is_read_however_it_is_cut():
    whole = answer_of(EVENTS)
    ends = [whole.index(event) + len(event) for event in EVENTS]
    for size in (1, 2, 3, 7, 50, len(whole)):
        pieces = [(float(at), whole[at : at + size]) for at in range(0, len(whole), size)]
        found = reply(-1.0, pieces)
        assert (found.tokens, found.prompt_tokens, found.cached_tokens, found.problem) == (3, 7, 0, "")
        # An event counts when its last byte is here.
        assert found.times == [float((ends[event] - 1) // size * size) for event in (0, 1, 1)]
        assert found.end == pieces[-1][0]
    assert Reply(1.0, 9.0, [3.0, 4.0, 8.0]).gaps_s == [1.0, 4.0]
    assert Reply(1.0, 9.0, [3.0, 4.0, 8.0]).first_s == 2.0 and Reply(1.0, 9.0, []).first_s == 8.0


def test_a_connection_finds_the_end_of_a_stream_cut_at_every_position():
    whole = answer_of(EVENTS)
    times = reply(0.0, [(1.0, whole)]).times
    here, there = socket.socketpair()
    with here, there:
        connection = ClientConnection(here)
        connection.buffer = bytearray(16)  # so that it also grows
        connection.view = memoryview(connection.buffer)
        for at in range(1, len(whole)):
            connection.ask(at, b"", 0.0)
            there.sendall(whole[:at])
            while connection.size < at:
                assert not connection.receive()
            there.sendall(whole[at:])
            while not connection.receive():
                assert connection.size < len(whole)
            answer = connection.answer()
            assert (answer.content, answer.ends[-1], at in answer.ends) == (whole, len(whole), True)
            found = read_reply(answer)
            assert (found.tokens, len(found.times), found.problem) == (3, len(times), "")
            # Each event has the time of the piece that has its last byte.
            first = answer.times[answer.ends.index(at)]
            n_first = sum(end <= at for end in (whole.index(event) + len(event) for event in EVENTS[:2]))
            assert sum(when <= first for when in found.times) == (0, 1, 3)[n_first]


def test_an_event_without_text_is_no_token_and_quotes_in_texts_are_no_keys():
    for choice, n in (
        (rb'{"text": "\"text\": \"x"}', 1),
        (rb'{"delta":{"content":"\""}}', 1),
        (rb'{"text":"","finish_reason":"\"text\": \"x"}', 0),
        (rb'{"delta": {"role": "assistant", "content": null}}', 0),
    ):
        event = b'data: {"choices": [%b], "usage": null}\r\n\r\n' % choice
        assert len(reply(0.0, [(1.0, answer_of([event, *EVENTS[3:]]))]).times) == n


def test_an_event_may_be_spread_over_chunks():
    joined = b"".join(EVENTS)
    for size in (1, 13, 100):
        whole = answer_of([joined[at : at + size] for at in range(0, len(joined), size)])
        found = reply(0.0, [(1.0, whole[:-1]), (2.0, whole[-1:])])
        assert (found.tokens, found.times, found.problem) == (3, [1.0, 1.0, 1.0], "")


def test_an_answer_in_one_piece_with_a_length_or_until_the_end():
    body = b'{"choices": [{"text": " a b"}], "usage": {"completion_tokens": 2, "prompt_tokens": 4}}'
    for length in (b"Content-Length: %d\r\n" % len(body), b""):
        content = b"HTTP/1.1 200 OK\r\n" + length + b"\r\n" + body
        found = reply(0.0, [(1.0, content[:30]), (2.0, content[30:70]), (3.0, content[70:])])
        assert found == Reply(0.0, 3.0, [], 2, 4, 0)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "closed the connection without an answer"),
        (b'HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nfull', "status 503: full"),
        (answer_of([EVENTS[0], b'data: {"error": {"message": "broken"}}\n\n']), "broken"),
        (answer_of([EVENTS[0]]), "no usage"),
    ],
)  # fmt: skip
def test_what_is_no_answer_has_a_problem(content, problem):
    assert problem in reply(0.0, [(1.0, content)] if content else []).problem


# -- loads ------------------------------------------------------------------------------------------------------------


def test_a_closed_loop_asks_everything_once(client, server):
    assert server.model == "made-up"
    load = client.run(Plan(port=server.port, bodies=bodies(server, 20), clients=3))
    assert [answer.tokens for answer in load.answers] == [5 + number for number in range(20)]
    assert [len(answer.times) for answer in load.answers] == [5 + number for number in range(20)]
    assert all((answer.prompt_tokens, answer.cached_tokens) == (4, 2) for answer in load.answers)
    # At most three at once, and the next only after an answer.
    starts = sorted(answer.start for answer in load.answers)
    ends = sorted(answer.end for answer in load.answers)
    assert all(end <= start for end, start in zip(ends, starts[3:], strict=False))
    assert load.tokens_per_s == sum(range(5, 25)) / load.seconds
    load = client.run(Plan(port=server.port, bodies=bodies(server, 2, stream=False), clients=2))
    assert [answer.tokens for answer in load.answers] == [5, 6] and not load.answers[0].times


def test_a_request_may_be_larger_than_what_a_socket_takes_at_once(client, server):
    [asked] = bodies(server, 1, padding="x" * 16_000_000)
    assert [answer.tokens for answer in client.run(Plan(port=server.port, bodies=[asked])).answers] == [5]


def test_random_arrivals_count_from_when_they_should_have_come(client, server):
    arrivals = [0.0, 0.03, 0.03, 0.09]
    load = client.run(Plan(port=server.port, bodies=bodies(server, 4), arrivals=arrivals))
    begin = load.answers[0].start
    assert [answer.start - begin for answer in load.answers] == pytest.approx(arrivals, abs=1e-9)
    assert all(answer.end > answer.start for answer in load.answers)


def test_a_late_request_comes_after_the_others_have_begun(client, server):
    asked = [*bodies(server, 3, max_tokens=120), *bodies(server, 1)]
    *others, late = client.run(Plan(port=server.port, bodies=asked, late_after=3)).answers
    assert max(answer.times[0] for answer in others) < late.start < min(answer.end for answer in others)
    assert [answer.tokens for answer in (*others, late)] == [120, 120, 120, 5]


@pytest.mark.parametrize(("first", "problem"), [(13, "unlucky"), (14, "broken"), (15, "without an answer")])
def test_a_request_that_fails_ends_the_run_with_its_reason(client, server, first, problem):
    with pytest.raises(UsageError, match=problem):
        client.run(Plan(port=server.port, bodies=bodies(server, 3) + bodies(server, 1, prompt=[first]), clients=2))


def test_no_server_and_no_client(client, tmp_path):
    port = servers.free_port()
    with pytest.raises(UsageError, match=f"port {port}: no connection: "):
        client.run(Plan(port=port, bodies=[{}]))
    with pytest.raises(UsageError, match="fails: not ready, exit code 3: no model"):
        with servers.running("fails", ["sh", "-c", "echo no model; exit 3"], port, tmp_path / "log"):
            pass
    with pytest.raises(UsageError, match="missing: cannot be started"):
        with servers.running("missing", [str(tmp_path / "missing")], port, tmp_path / "log"):
            pass
    with LoadClient() as other:
        other._process.kill()
        with pytest.raises(UsageError, match="the load client stopped with exit code -9"):
            other.run(Plan(port=port, bodies=[{}]))


def test_requests_are_alike_for_both_servers():
    ours, theirs = (servers.Server(name, 1, 1, "m") for name in (OURS, servers.LLAMA_SERVER_FLASH))
    for temperature, top_p, added in ((0.0, 1.0, {"samplers": ["top_k"], "top_k": 1}),
                                      (1.0, 0.9, {"samplers": ["temperature", "top_p"], "top_k": 0})):  # fmt: skip
        ask = {"prompt": [1, 5], "tokens": 8, "stream": True, "temperature": temperature, "seed": 3}
        assert theirs.body(**ask) == ours.body(**ask) | added
        assert ours.body(**ask) == {
            "model": "m", "prompt": [1, 5], "max_tokens": 8, "temperature": temperature, "top_p": top_p, "seed": 3,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip


# -- figures ----------------------------------------------------------------------------------------------------------


class Answering:
    """In place of a client: answers plans with what is given."""

    def __init__(self, *loads):
        self.loads = list(loads)

    def run(self, plan):
        return self.loads.pop(0)


def test_figures_of_a_load(monkeypatch):
    answers = [Reply(0.0, 4.0, [1.0, 2.0, 4.0], 3, 10, 5), Reply(1.0, 5.0, [4.0, 5.0], 2, 10, 0)]
    seconds = iter([2.0, 12.0])
    monkeypatch.setattr(serving, "cpu_seconds", lambda process: next(seconds))
    client = Answering(Load(answers, cpu_s=1.0))
    found = dict(serving.load_figures(client, Plan(port=1, bodies=[]), servers.Server(OURS, 1, 1, "m")))
    assert found == pytest.approx(
        {
            "tokens/s": 1.0, "first p50": 2.0, "first p99": 2.98, "between p50": 1.0, "between p99": 1.98,
            "cached": 0.25, "server cpu/s": 2.0, "client cpu/s": 0.2,
        }
    )  # fmt: skip


def test_figures_of_a_long_prompt():
    """Others have gaps of 1 before the prompt comes at 10.2, of 3 until its first token at 14, then of 1."""
    times = [*map(float, range(1, 11)), 13.0, 16.0, 17.0, 18.0]
    # What one of them waited before the other had begun does not count.
    others = [Reply(0.0, 18.0, times), Reply(0.0, 18.0, [-5.0, *times])]
    client = Answering(Load([Reply(0.0, 3.0, [2.0])], 0.0), Load([*others, Reply(10.2, 15.0, [14.0])], 0.0))
    found = dict(serving.long_prompt_figures(client, Plan(port=1, bodies=[]), Plan(port=1, bodies=[])))
    assert found == pytest.approx(
        {
            "first alone": 2.0, "first among others": 3.8, "between before p50": 1.0, "between before p99": 1.0,
            "between while p50": 3.0, "between while p99": 3.0,
        }
    )  # fmt: skip


def results_with(**rates: float) -> tuple[ServingResults, Case]:
    """Return results of one case of 16 streams: ours, llama-server's two settings, in-process batches."""
    results, case = ServingResults(), Case(clients=16, prompt=16, stream=True, temperature=1.0)
    results.cases["15M"] = [case]
    for name, rate in rates.items():
        figure = f"{case.batch}: tokens/s" if name == "batch" else case.figure("tokens/s")
        contender = {"ours": OURS, "batch": BATCH, "fa": servers.LLAMA_SERVER_FLASH, "plain": servers.LLAMA_SERVER}[
            name
        ]
        for value in (rate, rate, 1e9):  # the median counts
            results.add(Key("15M", "q8", figure, contender), value)
    return results, case


def test_bars_compare_with_batches_and_with_the_best_setting():
    results, case = results_with(ours=90.0, batch=100.0, plain=50.0, fa=75.0)
    assert results.best_peer("15M", "q8", case) == servers.LLAMA_SERVER_FLASH
    assert [(check.value, check.bar, check.met) for check in results.checks()] == [(0.9, 0.85, True), (1.2, 1.5, False)]
    # Random arrivals have no bar: the tokens/s are those that were asked for.
    results.cases["15M"] = [dataclasses.replace(case, poisson=True)]
    results.add(Key("15M", "q8", results.cases["15M"][0].figure("tokens/s")), 90.0)
    assert results.batch_ratio("15M", "q8", results.cases["15M"][0]) is None and not list(results.checks())
    results.cases["15M"] = []
    for contender, factor in ((OURS, 1.0), (servers.LLAMA_SERVER, 9.0)):
        for what, value in (("between before p99", 2.0), ("between while p99", 4.2 * factor),
                            ("first alone", 1.0), ("first among others", 2.5 * factor)):  # fmt: skip
            results.add(Key("15M", "q8", f"{LONG_PROMPT}: {what}", contender), value)
    assert [(check.value, check.bar, check.met) for check in results.checks()] == [(2.1, 2.0, False), (2.5, 3.0, True)]
    lines = list(serving_report.shape_lines(results, "15M", "q8"))
    assert "p99: 2000.0 -> 4200.0 ms; its first token 1000.0 -> 2500.0 ms (2.10 times, 2.50 times)" in lines[0]
    assert lines[1].startswith("  llama-server: a long prompt")


# -- models and the whole ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", serving.DTYPES)
def test_both_servers_get_the_same_model(tmp_path, dtype):
    pytest.importorskip("gguf")
    paths = random_models.write_served(tmp_path, CONFIG, dtype, np.random.default_rng(0))
    ours, theirs = (Model.load(path, backend="numpy") for path in paths)
    assert ours.stop_tokens == theirs.stop_tokens and ours.tokenizer.vocab_size == CONFIG.vocab_size
    ids = [1, 300, 270, 319]
    assert ours.tokenizer.decode(ids) == theirs.tokenizer.decode(ids) == "w40 w10 w59"
    found, expected = ours.logits(ids)[1:], theirs.logits(ids)[1:]
    if dtype != "q4":  # the rounding of 4 bits is not the same; that of 8 bits and of scales is nearly
        assert np.abs(found - expected).max() < 0.2
    assert 2.5 < found[:, random_models.FIRST_WORD :].std() < 10
    assert (found[:, : random_models.FIRST_WORD] == 0).all() and (found.max(1) > 0).all()


def test_the_command_measures_all_cases_and_writes_a_table_a_picture_and_figures(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf")
    asked = tmp_path / "asked.jsonl"
    monkeypatch.setenv("BODIES", str(asked))
    monkeypatch.setitem(serving.SHAPES, "15M", Shape(config=CONFIG))
    monkeypatch.setattr(serving.Model, "load", partial(Model.load, backend="numpy"))
    monkeypatch.setattr(serving, "our_command", lambda model, port, *_: [sys.executable, FAKE, "--port", str(port)])
    peer = tmp_path / "llama-server"
    peer.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
    peer.chmod(0o755)
    words = ["--shapes=15M", "--clients=1", "--prompts=half", "--temperatures=1", "--tokens=3", "--context=128"]
    words += [f"--peer-llama-server={peer}", "--peer-settings=llama-server fa", f"--out={tmp_path / 'out'}"]
    assert serving.main([*words, "--turns=2"]) == 0
    out = capsys.readouterr().out
    rows = [line[2:30].strip() for line in out.splitlines() if line.startswith("  ") and " x 64" in line]
    assert rows == ["1 x 64, T=1, streamed", "1 x 64, T=1, whole", "16 x 64, T=1, poisson, streason"[:28]]
    assert out.count("a long prompt: the others' time") == 2
    found = json.loads((tmp_path / "out" / "serving.json").read_bytes())
    assert not found["missing"]
    figures = {(row["figure"], row["contender"]): row["turns"] for row in found["figures"]}
    assert len(figures["1 x 64, T=1: tokens/s", BATCH]) == 2
    assert len(figures["1 x 64, T=1, whole: tokens/s", servers.LLAMA_SERVER_FLASH]) == 2
    assert figures["1 x 64, T=1, streamed: cached", OURS] == [0.5, 0.5]
    assert ("1 x 64, T=1, streamed: between p99", OURS) in figures
    assert ("1 x 64, T=1, whole: between p99", OURS) not in figures
    assert [bar["bar"] for bar in found["bars"]] == [1.0, 1.0, 2.0, 3.0]
    assert (tmp_path / "out" / "serving.png").read_bytes().startswith(b"\x89PNG")
    prompts = [json.loads(line)["prompt"] for line in asked.read_text().splitlines()]
    half = [tuple(prompt) for prompt in prompts if len(prompt) == 64]
    # Both servers get the same prompts, and none gets one twice: in 2 turns, 16 streamed, 16 whole, 32 at random times.
    assert len(half) == 2 * len(set(half)) == 2 * 2 * (16 + 16 + 32)
    assert len({prompt[:8] for prompt in half}) == len(set(half))


def test_a_server_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf")
    monkeypatch.setitem(serving.SHAPES, "15M", Shape(config=CONFIG))
    monkeypatch.setattr(serving.Model, "load", partial(Model.load, backend="numpy"))
    monkeypatch.setattr(serving, "our_command", lambda *_: ["sh", "-c", "echo out of order; exit 1"])
    words = ["--shapes=15M", "--cases=closed", "--clients=1", "--prompts=4", "--tokens=2", "--context=64"]
    assert serving.main([*words, "--turns=1", "--streams=yes", "--temperatures=0", f"--out={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "not available: llamalet: UsageError: llamalet: not ready, exit code 1: out of order" in out
    assert json.loads((tmp_path / "serving.json").read_bytes())["missing"][0]["contender"] == OURS


def test_a_request_that_fails_leaves_the_other_cases(client, server):
    contest = serving.ServingContest(
        "15M", ServingBenchConfig(), (Path(), Path()), SimpleModel(), client, 1, ServingResults()
    )

    def fail():
        yield "tokens/s", 5.0
        raise UsageError("port 1: status 503: full")

    found = list(serving.attempt(contest, server, "1 x 16", fail))
    assert found == [(Key("15M", "q8", "1 x 16: tokens/s"), 5.0)]
    assert contest.results.missing == {Key("15M", "q8", "1 x 16"): "1 x 16: port 1: status 503: full"}
    lines = list(serving_report.shape_lines(contest.results, "15M", "q8"))
    assert lines == ["  not available: llamalet: 1 x 16: port 1: status 503: full"]


def test_prompts_may_begin_alike():
    config = ServingBenchConfig(shared=5)
    contest = serving.ServingContest("15M", config, (Path(), Path()), SimpleModel(), None, 1, ServingResults())
    rows = contest.prompts(6, 12, 1)
    assert {row[0] for row in rows} == {1} and len({tuple(row[:5]) for row in rows}) == 1
    assert (
        all(a[5:] != b[5:] for a, b in pairwise(rows)) and min(min(row[1:]) for row in rows) >= random_models.FIRST_WORD
    )
    assert contest.prompts(6, 12, 1) == rows != contest.prompts(6, 12, 2)


class SimpleModel:
    config = CONFIG


@pytest.mark.parametrize(
    "words",
    ["shapes=7M", "dtype=bf16", "cases=open", "clients=65", "prompts=1", "prompts=1000", "streams=1", "temperatures=-1",
     "turns=0", "context=60", "peer_settings=fast", "peer_llama_server=/no/such/program"],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_name(words):
    option, value = words.split("=")
    with pytest.raises(ConfigError, match=f"{option}={value}: "):
        ServingBenchConfig(**{option: int(value) if option in ("turns", "context") else value})
