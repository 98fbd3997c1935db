"""A server in a process of its own, and clients on raw sockets that do what no library would."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "llamalet" / "assets" / "demo.bin"

PROBE = {"prompt": "Once upon a time", "max_tokens": 24, "seed": 7, "temperature": 0.8, "logprobs": 1}
"""A request whose answer must always be the same."""

LONG = {"prompt": "Once", "max_tokens": 300, "seed": 3, "ignore_eos": True, "n": 256}
"""A request that keeps the engine busy for seconds."""


class Reply(NamedTuple):
    """An answer, as raw as it came: status 0 if the connection was closed without one."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class RunningServer:
    """`llamalet serve` on a free port."""

    def __init__(self, *options: str, model: Path | None = DEMO, environment: dict[str, str] | None = None) -> None:
        words = [sys.executable, "-m", "llamalet.serve", *([str(model)] if model else []), "--port=0", *options]
        self.process = subprocess.Popen(
            words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {}), text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8",
        )  # fmt: skip
        self.lines: list[str] = []
        self._ready = threading.Event()
        self.port = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(100) or not self.port:
            self.process.kill()
            raise RuntimeError(f"the server did not start: {self.lines}")

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if match := re.match(r"open http://\S+:(\d+)/ ", line):
                self.port = int(match[1])
                self._ready.set()
        self._ready.set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, timeout: float = 30.0) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def raw(self, data: bytes, timeout: float = 30.0) -> Reply:
        """Send bytes, and return the answer."""
        with self.connect(timeout) as connection:
            try:
                connection.sendall(data)
            except OSError:
                pass  # the answer may have come before the end
            return read_reply(connection)

    def ask(self, path: str, body: Any = None, *, method: str = "", headers: Sequence[str] = ()) -> Reply:
        return self.raw(request(path, body, method=method, headers=headers))

    def probe(self) -> Any:
        """Return what must always be the same of the probe's answer."""
        reply = self.ask("/v1/completions", PROBE)
        assert reply.status == 200, reply
        return reply.json["choices"]

    def gauges(self) -> dict[str, float]:
        """Return the metrics by name."""
        text = self.ask("/metrics").body.decode()
        pairs = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in pairs}

    def wait_until_idle(self, seconds: float = 10.0) -> float:
        """Wait until no text waits or runs; return the time that it took."""
        start = time.monotonic()
        while True:
            now = self.gauges()
            busy = [now[f"llamalet_{name}"] for name in ("texts_running", "texts_waiting", "kv_reserved_bytes")]
            if not any(busy):
                return time.monotonic() - start
            assert time.monotonic() - start < seconds, busy
            time.sleep(0.02)

    def n_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def rss_mb(self) -> float:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024

    def end(self, number: int = signal.SIGTERM, timeout: float = 30.0) -> int:
        """Send a signal; return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(timeout)
        self._reader.join(5)
        return code


@contextmanager
def serving(*options: str, **more: Any):
    """Run a server, which must end well and without a traceback."""
    server = RunningServer(*options, **more)
    try:
        yield server
        assert server.end() == 0
        assert not [line for line in server.lines if "Traceback" in line or "Error" in line], server.lines
    finally:
        server.process.kill()
        server.process.wait()


def request(path: str, body: Any = None, *, method: str = "", headers: Sequence[str] = ()) -> bytes:
    """Return a request: of a body that is bytes or becomes JSON, or without one."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method or ('GET' if body is None else 'POST')} {path} HTTP/1.1", *headers]
    if not any(line.lower().startswith("host:") for line in headers):
        lines.append("Host: localhost")
    if body is not None and not any(line.lower().startswith(("content-length", "transfer-e")) for line in headers):
        lines.append(f"Content-Length: {len(data)}")
    lines.append("Connection: close")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + data


def read_reply(connection: socket.socket) -> Reply:
    """Return the first answer on a connection, and what follows it until the server closes."""
    data = bytearray()
    try:
        while part := connection.recv(1 << 16):
            data += part
            if (reply := _whole(bytes(data))) is not None:
                return reply
    except ConnectionError:
        pass
    return _whole(bytes(data) + b"\r\n\r\n", ended=True) or Reply(0, {}, bytes(data))


def _whole(data: bytes, ended: bool = False) -> Reply | None:
    """Return an answer once it is complete."""
    while data.startswith(b"HTTP/1.1 1"):  # 100 Continue
        data = data.partition(b"\r\n\r\n")[2]
    head, found, body = data.partition(b"\r\n\r\n")
    match = re.match(rb"HTTP/1\.1 (\d{3})", head)
    if not found or match is None:
        return None
    headers = {
        name.strip().lower(): value.strip()
        for name, _, value in (line.partition(":") for line in head.decode("latin-1").split("\r\n")[1:])
    }
    if headers.get("transfer-encoding") == "chunked":
        return Reply(int(match[1]), headers, unchunk(body)) if ended or body.endswith(b"0\r\n\r\n") else None
    length = int(headers.get("content-length", 0))
    return Reply(int(match[1]), headers, body[:length]) if ended or len(body) >= length else None


def unchunk(body: bytes) -> bytes:
    """Return the content of chunks; the last may be incomplete."""
    found = []
    while body:
        size, _, body = body.partition(b"\r\n")
        n = int(size or b"0", 16)
        found.append(body[:n])
        body = body[n + 2 :]
    return b"".join(found)


def events(body: bytes) -> list[Any]:
    """Return the JSON of server-sent events; the last must be [DONE]."""
    parts = [part.removeprefix(b"data: ") for part in body.split(b"\n\n") if part]
    assert parts.pop() == b"[DONE]", body[-200:]
    return [json.loads(part) for part in parts]
