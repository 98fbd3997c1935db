"""Long runs against a server with the demo model; pytest runs only short ones of the same kind.

    PYTHONPATH=tests:. python tests/serve_campaign.py                          all of it, about half an hour
    PYTHONPATH=tests:. python tests/serve_campaign.py --only=raw,disconnects   some runs
    PYTHONPATH=tests:. python tests/serve_campaign.py --scale=0.01             a hundredth of the cases

Each run prints a line, and ends with 1 if something is wrong. After every batch the probe must tell what it told first.
"""

import argparse
import json
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from serving import LONG, PROBE, Reply, RunningServer, events, read_reply, request

COMPLETIONS = "/v1/completions"
GOOD: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"prompt": "Once upon", "max_tokens": 4, "seed": 1, "temperature": 0.5, "top_p": 0.9, "stop": ["."]}),
    (COMPLETIONS, {"prompt": [[1, 5, 9], [7]], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}),
    (COMPLETIONS, {"prompt": ["a", "b"], "n": 2, "max_tokens": 3, "stream": True, "logit_bias": {"5": 1}}),
    (COMPLETIONS, {"prompt": "A", "stream": True, "stream_options": {"include_usage": True}, "top_k": 3, "min_p": 0.1}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "top_logprobs": 2}),
    ("/tokenize", {"prompt": "Once upon", "add_special_tokens": True}),
    ("/detokenize", {"tokens": [1, 2, 300]}),
]  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 257, 10**9, 2**63, 2**64, -(2**70), 10**400, 0.5, -0.0, 1e308, 1e-320, "",
    "a", "\0", "\u2581", "\U0001f600", "a" * 5000, [], [[]], {}, {"a": 1}, [1], [-1], [2**40], ["a"], [None], [1, "a"],
    [[1], "a"], ["a"] * 300, [1] * 400, {"5": 200}, {"-1": 1}, {"x": 1}, {"5": None}, [{"role": "user"}],
    [{"content": "a"}],
    [{"role": "user", "content": [{"type": "text", "text": "a"}]}], [{"role": 1, "content": []}], "demo", "none",
]  # fmt: skip
FIELDS = (
    "prompt", "model", "max_tokens", "max_completion_tokens", "n", "best_of", "seed", "temperature", "top_p", "top_k",
    "min_p", "stop", "stream", "stream_options", "logprobs", "top_logprobs", "echo", "logit_bias", "suffix", "tools",
    "response_format", "messages", "tokens", "content", "cache_salt", "user", "ignore_eos", "return_token_ids",
)  # fmt: skip
SNIPPETS = (
    b"NaN", b"Infinity", b"1e999", b"-", b'"\\ud800"', b"\xff", b"\xf0\x9f", b"[" * 3000, b"{" * 3000, b'{"a":' * 2000,
    b"9" * 5000, b"0x1", b"'", b"//", b"\0", b'"\\u0000"', b",", b":", b"true", b"\xef\xbb\xbf", b"}", b"]", b'"',
)  # fmt: skip


class Run:
    """Results of one kind of cases; `wrong` collects what must not be."""

    def __init__(self, server: RunningServer, rng: random.Random, scale: float) -> None:
        self.server, self.rng, self.scale = server, rng, scale
        self.expected = server.probe()
        self.wrong: list[str] = []
        self.statuses: Counter[int] = Counter()

    def cases(self, n: int) -> int:
        return max(1, round(n * self.scale))

    def check(self, where: object) -> None:
        """Check that the server is well."""
        if self.server.ask("/health").status != 200 or self.server.probe() != self.expected:
            self.wrong.append(f"{where}: the probe differs")

    def note(self, reply: Reply, data: bytes) -> None:
        """Count an answer, and check what every answer must be."""
        self.statuses[reply.status] += 1
        if reply.status >= 500:
            self.wrong.append(f"{reply.status} for {data[-300:]!r}: {reply.body[:200]!r}")
        elif reply.status >= 400 and "application/json" in reply.headers.get("content-type", ""):
            json.loads(reply.body)["error"]["message"]


class Client:
    """A connection that is used again."""

    def __init__(self, server: RunningServer) -> None:
        self.server, self.connection = server, server.connect()

    def send(self, path: str, body: bytes) -> Reply:
        data = request(path, body).replace(b"Connection: close\r\n", b"")
        for _ in range(2):
            try:
                self.connection.sendall(data)
                reply = read_reply(self.connection)
                if reply.status:
                    return reply
            except OSError:
                pass
            self.connection.close()
            self.connection = self.server.connect()
        return Reply(0, {}, b"")


def mutated(rng: random.Random) -> tuple[str, bytes]:
    """Return a path and a body in which something is odd."""
    path, fields = rng.choice(GOOD)
    fields = dict(fields)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        name = rng.choice((*fields, rng.choice(FIELDS)))
        value = rng.choice(ODD)
        how = rng.random()
        fields[name] = (
            value if how < 0.7 else [value] if how < 0.8 else {"a": value} if how < 0.9 else [fields.get(name), value]
        )
        if rng.random() < 0.1:
            del fields[name]
    body = json.dumps(fields).encode()
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        at = rng.randrange(len(body) + 1)
        end = min(len(body), at + rng.randrange(9))
        how = rng.random()
        if how < 0.3:
            body = body[:at] + bytes([rng.randrange(256)]) + body[at + 1 :]
        elif how < 0.5:
            body = body[:at] + rng.choice(SNIPPETS) + body[end:]
        elif how < 0.7:
            body = body[:at] + body[end:]
        elif how < 0.85:
            body = body[:at] + body[at:end] * 3 + body[end:]
        else:
            body = body[:at]
    return path, body


def bodies(run: Run) -> str:
    """Mutated bodies."""
    client, slowest = Client(run.server), 0.0
    n = run.cases(20_000)
    for number in range(n):
        path, body = mutated(run.rng)
        start = time.perf_counter()
        reply = client.send(path, body)
        slowest = max(slowest, time.perf_counter() - start)
        run.note(reply, body)
        if not reply.status:
            run.wrong.append(f"no answer for {body[:300]!r}")
        if number % 1000 == 999:
            run.check(number)
    return f"{n} mutated bodies, slowest {slowest:.2f} s"


def raw(run: Run) -> str:
    """Malformed requests."""
    pieces = (
        b"\r\n", b"\n", b"\r", b"\0", b" ", b":", b"Content-Length: -1\r\n", b"Content-Length: 5\r\n", b"\xff", b"\t",
        b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip\r\n", b"Host: x\r\n", b"Expect: 100-continue\r\n",
        b"Upgrade: websocket\r\nConnection: Upgrade\r\n", b"a" * 40_000, b"X: " + b"y" * 70_000 + b"\r\n", b"HTTP/1.0",
        b"HTTP/2.0", b"5\r\nabc", b"ffffffffffffffff\r\n", b"0\r\n\r\n", b"GET ", b"CONNECT a:1 ", b"*", b"http://a/",
        b"X: 1\r\n" * 200, b"Content-Length: 99999999999999999999\r\n", b"Origin: http://evil\r\n", b"/..%2f..%00",
    )  # fmt: skip
    n, rng = run.cases(5000), run.rng
    for number in range(n):
        path, fields = rng.choice([*GOOD, ("/health", {}), ("/", {}), ("/page/x.js", {}), ("/metrics", {})])
        data = request(path, fields) if fields or rng.random() < 0.3 else request(path)
        for _ in range(rng.randrange(1, 4)):
            head = data.find(b"\r\n\r\n") % (len(data) + 1)
            at = rng.randrange(head + 1) if rng.random() < 0.8 else rng.randrange(len(data) + 1)
            how = rng.random()
            if how < 0.5:
                data = data[:at] + rng.choice(pieces) + data[at:]
            elif how < 0.7:
                data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
            elif how < 0.85:
                data = data[:at] + data[at + rng.randrange(20) :]
            else:
                data = data[:at]
        try:
            with run.server.connect(20) as connection:
                connection.sendall(data)
                connection.settimeout(0.1)
                try:
                    run.note(read_reply(connection), data)
                except TimeoutError:  # what is not complete gets no answer
                    connection.settimeout(20)
                    connection.shutdown(socket.SHUT_WR)
                    run.note(read_reply(connection), data)
        except TimeoutError:
            run.wrong.append(f"no end for {data[:300]!r}")
        except OSError:
            run.statuses[0] += 1
        if number % 500 == 499:
            run.check(number)
    return f"{n} malformed requests"


def disconnects(run: Run) -> str:
    """Clients that go at a random time, and others beside them that must not notice."""
    server, rng = run.server, run.rng
    n, n_others = run.cases(1000), [0]
    server.wait_until_idle()
    n_files, ending = server.n_files(), threading.Event()

    def other() -> None:
        while not ending.is_set():
            if server.probe() != run.expected:
                run.wrong.append("a text changed beside one whose client went")
            n_others[0] += 1
            time.sleep(0.02)

    def goes(seed: int) -> None:
        mine = random.Random(seed)
        body = LONG | {"stream": mine.random() < 0.5, "n": mine.choice((1, 2, 40)), "seed": seed}
        if mine.random() < 0.3:
            body["prompt"] = [5 + i % 300 for i in range(mine.randrange(200, 300))]
        data = request(COMPLETIONS, body)
        if mine.random() < 0.15:
            data = data[: mine.randrange(1, len(data))]
        with server.connect() as connection:
            connection.sendall(data)
            time.sleep(mine.choice((0, 0, 0.002, mine.random() / 50, mine.random() / 3)))
            if mine.random() < 0.3:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset

    with ThreadPoolExecutor(10) as pool:
        others = [pool.submit(other) for _ in range(2)]
        list(pool.map(goes, [rng.randrange(1 << 30) for _ in range(n)]))
        ending.set()
        for future in others:
            future.result()
    took = server.wait_until_idle(30)
    time.sleep(0.5)
    if server.n_files() > n_files:
        run.wrong.append(f"{server.n_files()} files, {n_files} before")
    run.check("end")
    return (
        f"{n} clients gone, {n_others[0]} probes beside them equal, idle {took:.2f} s after the last, {n_files} files"
    )


def load(run: Run) -> str:
    """64 clients with 50 requests each; each text must be the one that it is alone."""
    kinds = [
        {"prompt": "Once upon a time"[: 3 + k % 13], "max_tokens": 5 + 3 * k, "seed": k, "temperature": (k % 3) / 2}
        | ({"top_p": 0.9} if k % 2 else {"logprobs": 2}) | {"stream": k % 4 < 2}
        for k in range(40)
    ]  # fmt: skip

    def texts(reply: Reply, body: dict[str, Any]) -> Any:
        run.note(reply, json.dumps(body).encode())
        parts = events(reply.body) if body["stream"] else [reply.json]
        choices = [part["choices"][0] for part in parts]
        logprobs = [choice["logprobs"]["token_logprobs"] for choice in choices if choice["logprobs"]]
        return "".join(choice["text"] for choice in choices), sum(logprobs, [])

    alone = [texts(run.server.ask(COMPLETIONS, body), body) for body in kinds]
    n_each, differ = run.cases(50), [0]

    def client(number: int) -> None:
        mine, rng = Client(run.server), random.Random(number)
        for _ in range(n_each):
            k = rng.randrange(len(kinds))
            if texts(mine.send(COMPLETIONS, json.dumps(kinds[k]).encode()), kinds[k]) != alone[k]:
                differ[0] += 1

    start = time.perf_counter()
    with ThreadPoolExecutor(64) as pool:
        list(pool.map(client, range(64)))
    if differ[0]:
        run.wrong.append(f"{differ[0]} texts differ")
    return f"64 clients x {n_each} requests, {differ[0]} differ, {time.perf_counter() - start:.0f} s"


def soak(run: Run) -> str:
    """Many requests: memory and files must not grow."""
    server, n = run.server, run.cases(10_000)

    def some(count: int, seed: int) -> None:
        def client(number: int) -> None:
            mine, rng = Client(server), random.Random(seed + number)
            for _ in range(count // 8):
                path, fields = rng.choice(GOOD[:4] + GOOD[5:])
                if "prompt" in fields and rng.random() < 0.5:
                    fields = fields | {"prompt": f"Story {rng.randrange(10**6)} of a", "max_tokens": rng.randrange(60)}
                body = json.dumps(fields).encode()
                run.note(mine.send(path, body), body)
            mine.connection.close()

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(client, range(8)))
        time.sleep(0.5)

    some(n // 5, 0)
    n_files, before = server.n_files(), server.rss_mb()
    some(n - n // 5, 100)
    after = server.rss_mb()
    if after - before > 50 or server.n_files() > n_files:
        run.wrong.append("memory or files grow")
    run.check("end")
    cached = server.gauges()["llamalet_prefix_cache_bytes"] / 2**20
    memory = f"{before:.0f} MB after a fifth, {after:.0f} MB at the end ({cached:.0f} MB in the prefix cache)"
    return f"{n} requests: {memory}, {n_files} -> {server.n_files()} files"


def slow(run: Run) -> str:
    """200 sockets that send a byte a second: others must not become slow."""

    def p95() -> float:
        times = []
        for _ in range(run.cases(200)):
            start = time.perf_counter()
            run.server.probe()
            times.append(time.perf_counter() - start)
        return sorted(times)[int(0.95 * len(times))]

    n_files, before = run.server.n_files(), p95()
    data, ending = request(COMPLETIONS, PROBE), threading.Event()
    connections = [run.server.connect() for _ in range(200)]

    def drip() -> None:
        for at in range(len(data)):
            for number, connection in enumerate(connections):
                try:
                    connection.send(data[at : at + 1] if number % 2 else b"" if at else data[:-9])
                except OSError:
                    pass
            if ending.wait(1):
                return

    dripping = threading.Thread(target=drip)
    dripping.start()
    during = p95()
    start = time.monotonic()
    while run.server.n_files() > n_files and time.monotonic() - start < 40:
        time.sleep(0.2)
    took = time.monotonic() - start
    ending.set()
    dripping.join()
    for connection in connections:
        connection.close()
    if during > 2 * before or took > 35:
        run.wrong.append("slow sockets hurt")
    return (
        f"p95 {1000 * before:.1f} ms alone, {1000 * during:.1f} ms beside 200 slow sockets; all cut {took:.0f} s later"
    )


def files(run: Run) -> str:
    """No file is opened for writing, nor made, renamed or removed: strace must be there."""
    if shutil.which("strace") is None:
        return "no strace here: skipped"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "trace"
        calls = "trace=open,openat,creat,mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,link,symlink,truncate"
        attached = subprocess.Popen(
            ["strace", "-f", "-e", calls, "-o", str(log), "-p", str(run.server.process.pid)], stderr=subprocess.PIPE
        )
        time.sleep(1)
        for path, fields in GOOD * run.cases(20):
            run.note(run.server.ask(path, fields), b"")
        for path in (
            "/",
            "/health",
            "/metrics",
            "/v1/models",
            "/props",
            "/page/page.js",
            "/../../etc/passwd",
            "/page/..%2f",
        ):
            run.statuses[run.server.ask(path).status] += 1
        attached.terminate()
        said = attached.communicate()[1].decode()
        lines = [line for line in log.read_text().splitlines() if re.search(r"\w+\(", line)]
        reading = re.compile(r"open(at)?\(.*O_RDONLY")
        writing = [line for line in lines if not reading.search(line)]
        if "attached" not in said.lower() and not lines:
            return f"strace cannot attach here: {said.strip()[:100]}"
        run.wrong += writing[:5]
        return f"{len(lines)} files opened for reading, {len(writing)} for writing"


RUNS: dict[str, Callable[[Run], str]] = {
    run.__name__: run for run in (bodies, raw, disconnects, load, slow, soak, files)
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default=",".join(RUNS), help=f"some of {','.join(RUNS)}")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the cases")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--server", default="", help="more options of the server")
    options = parser.parse_args()
    n_wrong = 0
    for name in options.only.split(","):
        seconds = 10 if name == "slow" else 30
        server = RunningServer("--max-queue=2000", f"--client-seconds={seconds}", *options.server.split())
        try:
            run, start = Run(server, random.Random(options.seed), options.scale), time.perf_counter()
            said = RUNS[name](run)
            code = server.end()
            odd = [line for line in server.lines if re.search(r"Traceback|Error|failed", line)]
            run.wrong += odd[:5] + ([f"exit code {code}"] if code else [])
            counts = ", ".join(f"{status}: {n}" for status, n in sorted(run.statuses.items()))
            took = time.perf_counter() - start
            print(f"{name:12} {said}; {counts or 'all well'}; {len(run.wrong)} wrong; {took:.0f} s", flush=True)
            for line in run.wrong[:10]:
                print(f"    {line}", flush=True)
            n_wrong += len(run.wrong)
        finally:
            server.process.kill()
    return int(n_wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
