"""The server as a process, over real sockets: what it answers, and what cannot hurt it."""

import itertools
import json
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import DEMO, LONG, PROBE, ROOT, RunningServer, events, read_reply, request, serving

from llamalet import Model, cli
from llamalet.errors import ConfigError, UsageError
from llamalet.serve.options import ServeOptions

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses signals and /proc")
pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def server():
    with serving("--client-seconds=1.5", "--max-body-mb=0.25", "--alias=demo,story") as running:
        yield running


@pytest.fixture(scope="module")
def probe(server):
    return server.probe()


@pytest.fixture(autouse=True)
def unharmed(request):
    """After every test with the server, it is well, idle, and tells what it told before."""
    if "server" not in request.fixturenames:
        yield
        return
    running, probe = request.getfixturevalue("server"), request.getfixturevalue("probe")
    yield
    assert running.ask("/health").status == 200
    assert running.probe() == probe
    running.wait_until_idle()


# --- texts ---


def test_a_text_is_the_one_that_python_gets(server):
    fields = {"prompt": "Once upon", "max_tokens": 60, "seed": 5, "temperature": 0.9, "top_p": 0.9}
    expected = "".join(Model.load(DEMO).generate("Once upon", max_new_tokens=60, seed=5, temperature=0.9, top_p=0.9))
    whole = server.ask("/v1/completions", fields).json
    streamed = events(server.ask("/v1/completions", fields | {"stream": True}).body)
    assert whole["choices"][0]["text"] == expected and len(expected) > 100
    assert "".join(event["choices"][0]["text"] for event in streamed) == expected


def test_texts_of_many_clients_at_once_are_those_alone(server):
    bodies = [
        PROBE
        | {"seed": seed, "max_tokens": 10 + seed, "prompt": PROBE["prompt"][: 4 + seed % 8], "stream": seed % 2 == 0}
        for seed in range(64)
    ]

    def text(body):
        reply = server.ask("/v1/completions", body)
        assert reply.status == 200
        parts = events(reply.body) if body["stream"] else [reply.json]
        return "".join(part["choices"][0]["text"] for part in parts)

    alone = list(map(text, bodies))
    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(text, bodies)) == alone
    assert len(set(alone)) > 50


def test_a_stream_comes_piece_by_piece_and_ends_with_usage(server):
    body = {"prompt": "Once", "max_tokens": 200, "ignore_eos": True, "stream": True, "n": 8, "seed": 1}
    body |= {"stream_options": {"include_usage": True}}
    found = events(server.ask("/v1/completions", body).body)
    assert len(found) > 100 and found[-1]["choices"] == [] and found[-1]["usage"]["completion_tokens"] == 1600
    assert {event["choices"][0]["index"] for event in found[:-1]} == set(range(8))


def test_the_openai_client(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)
    made = client.completions.create(model="story", prompt="Once", max_tokens=9, seed=1, logprobs=2)
    assert made.model == "story" and made.usage.completion_tokens == 9 and len(made.choices[0].logprobs.tokens) == 9
    stream = client.completions.create(model="demo", prompt="Once", max_tokens=9, seed=1, stream=True)
    assert "".join(part.choices[0].text for part in stream) == made.choices[0].text
    assert [model.id for model in client.models.list()] == ["demo", "story"]
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="other", prompt="Once")
    assert caught.value.code == "model_not_found" and caught.value.request_id.startswith("req-")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="demo", prompt="Once", temperature=-1)
    assert caught.value.param == "temperature"


@pytest.mark.parametrize("path", ["/v1/models", "/models", "/v1/models/demo", "/props", "/tokenizer_info", "/health"])
def test_routes_that_only_tell(server, path):
    assert server.ask(path).json and server.ask(path, method="HEAD").status == 200


def test_tokens_and_back(server):
    ids = server.ask("/tokenize", {"prompt": "Once upon", "add_special_tokens": False}).json["tokens"]
    assert server.ask("/detokenize", {"tokens": ids}).json["prompt"] == "Once upon"
    assert server.ask("/completions", {"prompt": ids, "max_tokens": 1}).json["usage"]["prompt_tokens"] == len(ids)


# --- what is refused ---

DEEP = b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BAD = {
    "empty": b"", "no JSON": b"{", "not UTF-8": b'{"prompt":"\xff"}', "a list": b"[]", "a number": b"5", "deep": DEEP,
    "NaN": b'{"prompt":"a","temperature":NaN}', "infinite": b'{"prompt":"a","temperature":1e999}',
    "long number": b'{"prompt":"a","seed":' + b"9" * 5000 + b"}", "half": b'{"prompt":"\\ud800"}',
    "stream": {"stream": "true"}, "bool": {"max_tokens": True}, "id": {"prompt": [-1]}, "id 2": {"prompt": [10**6]},
    "mixed": {"prompt": ["a", [1]]}, "n": {"n": 10**9}, "prompts": {"prompt": ["a"] * 50_000},
    "stops": {"stop": ["a"] * 50_000}, "logprobs": {"logprobs": -1}, "logprobs 2": {"logprobs": 10**6},
    "bias": {"logit_bias": {"999999": 1}}, "negative": {"max_tokens": -1}, "long": {"prompt": "a" * 200_000},
    "suffix": {"suffix": "x"}, "best_of": {"best_of": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_bodies_are_refused(server, name):
    body = BAD[name] if isinstance(BAD[name], bytes) else json.dumps({"prompt": "a"} | BAD[name]).encode()
    start = time.monotonic()
    reply = server.ask("/v1/completions", body)
    assert reply.status == 400 and time.monotonic() - start < 3
    error = reply.json["error"]
    assert error["message"] and set(error) == {"message", "type", "param", "code"}
    if isinstance(BAD[name], dict):
        assert error["param"] in BAD[name]


def test_a_prompt_that_is_too_long_has_its_code(server):
    for prompt in ("Once upon a time " * 100, [5] * 321):
        assert server.ask("/v1/completions", {"prompt": prompt}).json["error"]["code"] == "context_length_exceeded"
    assert server.ask("/v1/completions", {"prompt": "a", "max_tokens": 10**9}).status == 200


def test_a_look_takes_no_more_than_a_context_of_tokens(server):
    for path in ("/page/distribution", "/page/attention", "/page/truth"):
        assert server.ask(path, {"tokens": [5] * 20_000}).status == 413
        assert server.ask(path, b'{"tokens": [5' + b" " * 9000 + b"]}").status == 200  # read in a thread
        assert server.ask(path, b'{"tokens": [-5' + b" " * 9000 + b"]}").status == 400


def test_a_chat_with_a_story_model_is_refused(server):
    reply = server.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]})
    assert reply.status == 400 and reply.json["error"]["code"] == "no_chat_template"


@pytest.mark.parametrize(
    ("path", "body", "method", "status"),
    [
        ("/nowhere", None, "", 404), ("/v1/completions", None, "GET", 405), ("/v1/models", b"", "DELETE", 405),
        ("/v1/completions", {"prompt": "a", "model": "x"}, "", 404), ("/v1/models/x", None, "", 404),
        ("/v1/completions/", {"prompt": "a"}, "", 404), ("/v1/models", None, "OPTIONS", 405),
    ],
)  # fmt: skip
def test_wrong_paths_methods_and_models(server, path, body, method, status):
    reply = server.ask(path, body, method=method)
    assert reply.status == status and reply.json["error"]["message"]
    assert ("allow" in reply.headers) == (status == 405)


def test_a_body_over_the_limit(server):
    size = 1 << 20
    assert server.ask("/v1/completions", bytes(size)).status == 413
    chunked = b"".join(b"10000\r\n" + bytes(1 << 16) + b"\r\n" for _ in range(size >> 16)) + b"0\r\n\r\n"
    assert server.ask("/v1/completions", chunked, headers=["Transfer-Encoding: chunked"]).status == 413
    start = time.monotonic()
    head = request("/v1/completions", b"", headers=["Content-Length: 99999999999"])
    assert server.raw(head).status == 413 and time.monotonic() - start < 6  # not a byte of it is waited for much longer


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\na",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 300_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 500 + b"\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\0\1\2\r\n\r\n",
        b"GET http://x/ HTTP/9.9\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
    ],
)  # fmt: skip
def test_malformed_requests(server, head):
    with server.connect() as connection:
        connection.sendall(head)
        reply = read_reply(connection)
        assert 400 <= reply.status < 500
        if reply.status == 400:  # and closed, for nobody knows where the next request would begin
            assert connection.recv(1) == b""


ENCODED = ("..", "%2e%2e", "%252e%252e", ".%2e", "..%2f..", "..%5c", "%c0%ae%c0%ae", "%00", "..\\..", "....//")


@pytest.mark.parametrize("root", ["/page/", "/", "/v1/models/", "/static/"])
def test_no_path_leads_to_a_file(server, root):
    for dots, end in itertools.product(
        ENCODED, ("/etc/passwd", "/../pyproject.toml", "app.py%00.html", "%2fetc%2fpasswd")
    ):
        reply = server.ask(f"{root}{dots}{end}")
        assert reply.status in (400, 404) and b"root:" not in reply.body and b"llamalet" not in reply.body, (dots, end)


@pytest.mark.parametrize(
    "headers",
    [
        ["Host: evil.example"], ["Host: 127.0.0.1.evil.example"], ["Host:"], ["Host: 10.0.0.1"],
        ["Host: localhost:x"], ["Origin: http://evil.example"], ["Origin: null"], ["Origin: http://localhost:1234"],
        ["Sec-Fetch-Site: cross-site"], ["Sec-Fetch-Site: same-site"], ["Origin: http://a", "Origin: http://localhost"],
    ],
)  # fmt: skip
def test_foreign_hosts_and_pages_are_refused(server, headers):
    for path, body in (("/v1/models", None), ("/v1/completions", PROBE), ("/health", None), ("/", None)):
        reply = server.ask(path, body, headers=headers)
        assert reply.status == 403 and not [name for name in reply.headers if name.startswith("access-control")]
    preflight = server.ask(
        "/v1/completions", method="OPTIONS", headers=[*headers, "Access-Control-Request-Method: POST"]
    )
    assert preflight.status == 403


@pytest.mark.parametrize(
    "headers", [["Host: LOCALHOST:8080"], ["Host: [::1]:1"], ["Host: 127.0.0.1"], ["Origin: http://localhost"]]
)
def test_own_hosts_and_pages_are_served(server, headers):
    assert server.ask("/v1/models", headers=headers).status == 200


# --- clients that go, or do nothing ---


def test_a_client_that_goes_is_forgotten(server, probe):
    whole = request("/v1/completions", LONG)
    streamed = request("/v1/completions", LONG | {"stream": True})
    for data, wait, reads in (
        (whole[:-5], 0.02, 0),
        (whole, 0.0, 0),
        (whole, 0.2, 0),
        (streamed, 0.1, 1),
        (streamed, 0, 9),
    ):
        with server.connect() as connection:
            connection.sendall(data)
            time.sleep(wait)
            for _ in range(reads):
                assert connection.recv(4096)
            assert server.probe() == probe  # and others do not notice
        assert server.wait_until_idle() < 2


def test_a_client_that_sends_a_second_request_and_goes_is_forgotten(server):
    for body in (LONG, LONG | {"stream": True}):
        with server.connect() as connection:
            connection.sendall(request("/v1/completions", body).replace(b"Connection: close\r\n", b""))
            time.sleep(0.1)
            connection.sendall(request("/health"))
            time.sleep(0.1)
        assert server.wait_until_idle() < 2


def test_a_reader_that_does_not_read_is_cut_off(server, probe):
    body = LONG | {"n": 200, "stream": True, "logprobs": 5}
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(request("/v1/completions", body))
        time.sleep(0.3)
        assert server.probe() == probe
        assert server.wait_until_idle(20) < 10
        data = b""
        while part := connection.recv(1 << 16):
            data += part
        assert len(data) > 10_000 and not data.endswith(b"0\r\n\r\n")  # it was cut


def test_slow_clients_are_cut_off_and_slow_nobody_down(server):
    n_files = server.n_files()
    heads = [
        b"GET /health HTTP/1.1\r\nHost: loc",
        b"",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
    ]
    slow = [server.connect() for _ in range(99)]
    try:
        for number, connection in enumerate(slow):
            connection.sendall(heads[number % 3])
        start = time.monotonic()
        assert server.probe() and time.monotonic() - start < 1
        ends = []
        for number, connection in enumerate(slow):
            if number % 3 == 2:
                ends.append(read_reply(connection).status)
            else:
                try:
                    ends.append(len(connection.recv(1)))
                except ConnectionResetError:
                    ends.append(0)
        assert ends == [0, 0, 408] * 33 and time.monotonic() - start < 10
    finally:
        for connection in slow:
            connection.close()
    time.sleep(0.1)
    assert server.n_files() <= n_files


def test_bytes_one_by_one_make_a_request(server):
    with server.connect() as connection:
        for byte in request("/v1/completions", {"prompt": "a", "max_tokens": 1}):
            connection.send(bytes([byte]))
        assert read_reply(connection).status == 200


def test_requests_that_follow_one_another_on_a_connection(server):
    one = request("/v1/completions", {"prompt": "a", "max_tokens": 2}).replace(b"Connection: close\r\n", b"")
    with server.connect() as connection:
        connection.sendall(one * 3 + request("/health"))
        data = b""
        while part := connection.recv(4096):
            data += part
        assert data.count(b"HTTP/1.1 200") == 4


def test_small_writes_do_not_wait_for_acknowledgements(server):
    data, times = request("/tokenize", {"prompt": "a"}).replace(b"Connection: close\r\n", b""), []
    with server.connect() as connection:
        for _ in range(21):
            start = time.perf_counter()
            connection.sendall(data)
            assert read_reply(connection).status == 200
            times.append(time.perf_counter() - start)
    assert sorted(times)[10] < 0.03  # with Nagle's algorithm 0.04


# --- other settings ---


def test_keys_and_origins(tmp_path):
    (tmp_path / "keys").write_text("first-key\nsecond-key\n")
    options = (f"--api-key-file={tmp_path / 'keys'}", "--allow-origin=http://good.example", "--allow-host=my.box")
    with serving(*options, environment={"LLAMALET_API_KEY": "third-key"}) as server:
        for path in (
            "/v1/models",
            "/models",
            "/props",
            "/metrics",
            "/tokenizer_info",
            "/nowhere",
            "/v1/models/x",
            "/page/truth",
        ):
            for header in (
                (),
                ("Authorization: Bearer wrong",),
                ("Authorization: Bearer k\xe9y",),
                ("Authorization: first-key",),
            ):
                reply = server.ask(path, headers=header)
                assert reply.status == 401 and reply.json["error"]["code"] == "invalid_api_key"
        for path in ("/v1/completions", "/chat/completions", "/tokenize", "/page/distribution", "/", "/health"):
            assert server.ask(path, {"prompt": "a"}).status == 401
        for key in ("first-key", "second-key", "third-key"):
            assert server.ask("/v1/models", headers=[f"Authorization: bearer {key}", "Host: My.box:1"]).status == 200
        assert server.ask("/health").status == 200
        assert server.ask("/v1/models", headers=["Authorization: Bearer first-key"] * 2).status == 401

        origin = "Origin: http://good.example"
        wanted = [
            "Access-Control-Request-Method: POST",
            "Access-Control-Request-Headers: authorization, x-stainless-os",
        ]
        reply = server.ask("/v1/completions", method="OPTIONS", headers=[origin, *wanted])
        assert reply.status == 204 and reply.headers["access-control-allow-origin"] == "http://good.example"
        assert reply.headers["access-control-allow-headers"] == "authorization, x-stainless-os"
        reply = server.ask("/v1/models", headers=[origin])
        assert reply.status == 401 and reply.headers["access-control-allow-origin"] == "http://good.example"
        assert not [line for line in server.lines if "-key" in line.replace("api-key-file", "")]


def test_a_full_queue(tmp_path):
    with serving("--batch-size=1", "--max-queue=3", "--queue-seconds=0.5") as server:
        with server.connect() as first:
            first.sendall(request("/v1/completions", LONG | {"stream": True}))
            assert first.recv(10)
            reply = server.ask("/v1/completions", PROBE)
            assert reply.status == 503 and reply.json["error"]["code"] == "queue_full"
            assert 1 <= int(reply.headers["retry-after"]) <= 30
        server.wait_until_idle()
        with server.connect() as first:
            first.sendall(request("/v1/completions", LONG | {"stream": True, "n": 3}))
            assert first.recv(10)
            with server.connect() as second:
                second.sendall(request("/v1/completions", PROBE))
                assert read_reply(second).status in (200, 503)  # as soon as one of the three has ended, or late
        server.wait_until_idle()


def test_a_taken_port_ends_in_a_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "llamalet", "serve", str(DEMO), f"--port={port}"], cwd=ROOT, capture_output=True,
            text=True, timeout=60,
        )  # fmt: skip
    line = f"error: 127.0.0.1:{port}: is in use by another program; stop that, or give --port another number\n"
    assert (done.returncode, done.stderr) == (2, line)


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_missing_package_is_named(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError) as caught:
        cli.main(["serve"])
    assert str(caught.value) == f"the server needs the package {package}: pip install 'llamalet[serve]'"


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("--port=99999", "port=99999"), ("--allow-origin=localhost", "allow_origin=localhost"),
        ("--allow-host=a:80", "allow_host=a:80"), ("--host=256.1.1.1", "256.1.1.1:8080: cannot be listened on"),
        ("--api-key-file=nowhere", "nowhere"), ("--batch-size=65", "batch_size=65"), ("--max-queue=0", "max_queue=0"),
        ("--drain-seconds=-1", "drain_seconds=-1"),
    ],
)  # fmt: skip
def test_bad_options(option, problem):
    with pytest.raises((UsageError, ConfigError), match=problem):
        cli.main(["serve", str(DEMO), option])


def test_a_key_must_be_one_that_a_client_can_send(tmp_path):
    for content in (b"", b"\n \n", b"two words", b"k\xe9y"):
        (tmp_path / "keys").write_bytes(content)
        with pytest.raises(UsageError):
            ServeOptions(api_key_file=str(tmp_path / "keys")).rules({})
    with pytest.raises(UsageError, match="LLAMALET_API_KEY"):
        ServeOptions().rules({"LLAMALET_API_KEY": ""})


def test_a_model_that_cannot_be_loaded_ends_the_server():
    done = subprocess.run(
        [sys.executable, "-m", "llamalet.serve", "nowhere.bin", "--port=0"], cwd=ROOT, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 4 and done.stderr.startswith("error: nowhere.bin: ") and done.stderr.count("\n") == 1


# --- the end ---


def stops_listening(server: RunningServer, seconds: float = 30) -> bool:
    """Whether connections are refused within this time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            server.connect().close()
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_sigterm_lets_texts_end():
    with serving("--drain-seconds=100") as server:
        with server.connect() as connection:
            connection.sendall(request("/v1/completions", LONG | {"stream": True, "n": 64}))
            assert connection.recv(10)
            server.process.send_signal(signal.SIGTERM)
            assert stops_listening(server)
            data = b""
            while part := connection.recv(1 << 16):
                data += part
        assert data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") and data.count(b'"finish_reason":"length"') == 64


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_text_that_takes_too_long_ends_with_an_error(number):
    server = RunningServer("--drain-seconds=0.3")
    try:
        with server.connect() as connection, server.connect() as other:
            connection.sendall(request("/v1/completions", LONG | {"stream": True}))
            other.sendall(request("/v1/completions", LONG))
            assert connection.recv(10)
            start = time.monotonic()
            server.process.send_signal(number)
            data = b""
            while part := connection.recv(1 << 16):
                data += part
            assert b'"code": "stopping"' in data and data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            assert read_reply(other).json["error"]["code"] == "stopping"
        assert server.end() == 0 and time.monotonic() - start < 3
        assert not [line for line in server.lines if "Traceback" in line]
    finally:
        server.process.kill()


def test_bodies_that_are_being_read_do_not_hold_up_the_end():
    server = RunningServer("--drain-seconds=0.2", "--max-body-mb=50")
    try:
        with server.connect() as connection:
            # Which takes seconds.
            connection.sendall(request("/tokenize", {"prompt": "ab" * 20_000_000}))
            time.sleep(0.5)
            start = time.monotonic()
            assert server.end() == 0 and time.monotonic() - start < 4
    finally:
        server.process.kill()


def test_a_second_ctrl_c_ends_at_once():
    server = RunningServer()
    try:
        with server.connect() as connection:
            connection.sendall(request("/v1/completions", LONG))
            time.sleep(0.3)
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.3)
            assert server.process.poll() is None
            start = time.monotonic()
            assert server.end(signal.SIGINT) == 130 and time.monotonic() - start < 1
        assert server.lines[-1] == "error: stopped by Ctrl-C"
    finally:
        server.process.kill()


def test_the_log_says_when_the_first_token_came(server):
    server.ask("/v1/completions", {"prompt": "Once", "max_tokens": 250, "ignore_eos": True})
    time.sleep(0.1)
    (found,) = (re.search(r"\+250 tokens first ([\d.]+) s ([\d.]+) s req-", line) for line in server.lines[-1:])
    assert float(found[1]) < float(found[2]) / 2


def test_the_log_has_no_text(server):
    server.ask("/v1/completions?secret=1", {"prompt": "Zanzibar", "max_tokens": 3, "Quagga\n": 1})
    server.ask("/%1b[31m")
    time.sleep(0.1)
    lines = "\n".join(server.lines)
    assert "Zanzibar" not in lines and "secret" not in lines and "\x1b" not in lines
    assert "POST /v1/completions 200 " in lines and "ignored unknown fields: Quagga\\n" in lines
