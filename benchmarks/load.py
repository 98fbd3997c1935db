"""A client that loads an OpenAI-compatible server, in a process of its own, so that it takes no turn from the server.

It shares the processors with the server, so a token costs it little more than the system calls: one loop over
non-blocking sockets, which stores what arrives, with the time, and parses it when all is over. A plan is one line of
JSON on stdin, its result one line on stdout. `LoadClient` is the other end of the pipe.
"""

import bisect
import contextlib
import errno
import json
import os
import re
import selectors
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from llamalet.errors import UsageError

ROOT = Path(__file__).parent.parent

# What ends an answer in chunks; no event has a carriage return in it.
LAST_CHUNK = b"\r\n0\r\n\r\n"

# Room for an answer of a few hundred tokens; it doubles when it is full.
BUFFER_BYTES = 65536

EVENT_END = re.compile(rb"\r?\n\r?\n")
# Text that is not empty. JSON has no quote inside a string without a backslash, so these can only be keys.
TEXT = re.compile(rb'"(?:text|content)":\s*"[^"]')


class Received(NamedTuple):
    """The bytes that came back for one request. Times are seconds of one clock.

    Attributes:
        start: when it was sent, or should have been.
        content: header and body.
        times: when each piece of it came.
        ends: number of bytes that were here by then.
    """

    start: float
    content: bytes
    times: list[float]
    ends: list[int]

    def time_of(self, end: int) -> float:
        """Return when the first `end` bytes were here."""
        return self.times[bisect.bisect_left(self.ends, end)]


class Reply(NamedTuple):
    """What the server answered to one request. Times are seconds of one clock.

    Attributes:
        start: when it was sent, or should have been.
        end: when its last byte came.
        times: when each event with text came; of an answer in one piece, empty.
        tokens: number of tokens generated, as `usage` says, and the same of the prompt and of what was cached of it.
        problem: why there is no text; empty if there is.
    """

    start: float
    end: float
    times: list[float]
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    problem: str = ""

    @property
    def first_s(self) -> float:
        """Seconds from the request to the first text, of an answer in one piece to all of it."""
        return (self.times[0] if self.times else self.end) - self.start

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between texts of a stream."""
        return [after - before for before, after in pairwise(self.times)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Requests to one server.

    Attributes:
        port: on this machine.
        bodies: the JSON of each request.
        clients: number of clients that send the next request when they have an answer.
        arrivals: if not empty, the seconds after which each request is sent instead, ascending, whether or not others
            have ended.
        late_after: if not 0, all but the last request are sent at once, and the last when each of the others has
            received so many pieces or all of its answer.
        api_path: of the endpoint.
    """

    port: int
    bodies: Sequence[Mapping[str, Any]]
    clients: int = 1
    arrivals: Sequence[float] = ()
    late_after: int = 0
    api_path: str = "/v1/completions"


@dataclass(frozen=True, slots=True)
class Load:
    """What came of a plan: the answers, in the order of its bodies, and the client's own CPU time."""

    answers: list[Reply]
    cpu_s: float

    @property
    def seconds(self) -> float:
        """Return the time from the first request to the last answer."""
        return max(answer.end for answer in self.answers) - min(answer.start for answer in self.answers)

    @property
    def tokens_per_s(self) -> float:
        """Return the generated tokens of all answers per second."""
        return sum(answer.tokens for answer in self.answers) / self.seconds


class LoadClient:
    """The process that sends requests; use it in a `with`."""

    def __enter__(self) -> "LoadClient":
        command = [sys.executable, "-m", "benchmarks.load"]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def run(self, plan: Plan) -> Load:
        """Send all requests of a plan and wait for all answers.

        Raises:
            UsageError: if a request had no answer, or an error.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # of a client that has stopped, which the empty line shows
            self._process.stdin.write(json.dumps({name: getattr(plan, name) for name in Plan.__slots__}) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise UsageError(f"the load client stopped with exit code {self._process.wait()}")
        found = json.loads(line)
        answers = [Reply(*fields) for fields in found["answers"]]
        problem = found["problem"] or next((answer.problem for answer in answers if answer.problem), "")
        if problem:
            raise UsageError(f"port {plan.port}: {problem}")
        return Load(answers, found["cpu_s"])


# -- the client's process ---------------------------------------------------------------------------------------------


class ClientConnection:
    """A non-blocking connection that sends one request after another and keeps what arrives."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.used = self.closing = False  # whether it has answered, and whether it takes no further request
        self.buffer = bytearray(BUFFER_BYTES)
        self.view = memoryview(self.buffer)

    def ask(self, number: int, request: bytes, start: float) -> None:
        """Take a request, which `send` sends, and forget the last answer."""
        self.number, self.unsent, self.start = number, request, start
        self.size, self.times, self.ends = 0, list[float](), list[int]()
        self.n_bytes: int | None = None  # of the answer, as soon as its header says
        self.chunked = False

    def send(self) -> None:
        """Send as much of the request as the socket takes."""
        try:
            self.unsent = self.unsent[self.socket.send(self.unsent) :]
        except (BrokenPipeError, ConnectionResetError):
            self.unsent = b""  # `receive` finds out that it is closed

    def receive(self) -> bool:
        """Keep a piece of the answer; return whether it is the last one. Called once for each piece: keep it short."""
        if self.size == len(self.buffer):
            self.buffer = self.buffer + bytes(self.size)
            self.view = memoryview(self.buffer)
        try:
            n = self.socket.recv_into(self.view[self.size :])
        except ConnectionResetError:
            n = 0
        if not n:
            self.closing = True
            return True
        self.times.append(time.perf_counter())
        self.size += n
        self.ends.append(self.size)
        if self.n_bytes is None and not self.chunked:
            self.read_header()
        if self.chunked:  # the end may be cut anywhere: the buffer has all of it
            return self.buffer.endswith(LAST_CHUNK, 0, self.size)
        return self.n_bytes is not None and self.size >= self.n_bytes

    def read_header(self) -> None:
        """Find out where the answer ends, as soon as its header is complete; by default the connection ends with it."""
        header, separator, _ = self.buffer[: self.size].partition(b"\r\n\r\n")
        if separator:
            fields = header_fields(header)
            self.closing = fields.get("connection") == "close"
            self.chunked = is_chunked(fields)
            if "content-length" in fields:
                self.n_bytes = len(header) + len(separator) + int(fields["content-length"])

    def answer(self) -> Received:
        """Return what has come since `ask`."""
        return Received(self.start, bytes(self.view[: self.size]), self.times, self.ends)


class LoadRun:
    """The requests of a plan, its connections and the answers so far; use it in a `with`."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.requests = [request_bytes(plan, body) for body in plan.bodies]
        self.answers: dict[int, Received] = {}
        self._selector = selectors.DefaultSelector()
        self._sockets = contextlib.ExitStack()

    def __enter__(self) -> "LoadRun":
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        self._sockets.close()

    @property
    def complete(self) -> bool:
        """Whether all requests have answers."""
        return len(self.answers) == len(self.requests)

    def connect(self) -> ClientConnection:
        """Return a new connection, which may take a while until it can send.

        Raises:
            OSError: if it is refused at once; otherwise `step` raises it.
        """
        connected = self._sockets.enter_context(socket.socket())
        connected.setblocking(False)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        error = connected.connect_ex(("127.0.0.1", self.plan.port))
        if error not in (0, errno.EINPROGRESS):
            raise OSError(error, os.strerror(error))
        return ClientConnection(connected)

    def ask(self, number: int, connection: ClientConnection, start: float | None = None) -> None:
        """Send a request over a connection, or over a new one if it takes no more; by default it starts now."""
        if connection.closing:
            connection.socket.close()
            connection = self.connect()
        connection.ask(number, self.requests[number], time.perf_counter() if start is None else start)
        self._selector.register(connection.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, connection)

    def step(self, timeout_s: float | None = None) -> list[ClientConnection]:
        """Wait until something can be sent or has come, and do it; return connections whose answers are complete."""
        ended = []
        for key, ready in self._selector.select(timeout_s):
            connection: ClientConnection = key.data
            if ready & selectors.EVENT_WRITE:
                connection.send()
                if not connection.unsent:
                    self._selector.modify(connection.socket, selectors.EVENT_READ, connection)
            if ready & selectors.EVENT_READ and connection.receive():
                self._selector.unregister(connection.socket)
                if connection.used and not connection.size:
                    # It had been closed after the last answer, as llama-server does with streams.
                    self.ask(connection.number, connection)
                else:
                    connection.used = True
                    self.answers[connection.number] = connection.answer()
                    ended.append(connection)
        return ended


def send_all(plan: Plan) -> list[Received]:
    """Send all requests of a plan; return the answers, in the order of its bodies.

    Raises:
        OSError: if there is no connection.
    """
    with LoadRun(plan) as run:
        if plan.arrivals:
            send_at_times(run)
        elif plan.late_after:
            send_last_late(run)
        else:
            send_one_after_another(run)
        return [run.answers[number] for number in range(len(plan.bodies))]


def send_one_after_another(run: LoadRun) -> None:
    """Keep all clients busy while there are requests."""
    waiting = deque(range(len(run.requests)))
    idle = [run.connect() for _ in range(run.plan.clients)]
    while not run.complete:
        while waiting and idle:
            run.ask(waiting.popleft(), idle.pop())
        idle += run.step()


def send_at_times(run: LoadRun) -> None:
    """Send each request over a connection of its own when it is due; it starts then, even if it is sent later."""
    begin = time.perf_counter()
    waiting = deque((begin + after, number) for number, after in enumerate(run.plan.arrivals))
    while not run.complete:
        while waiting and waiting[0][0] <= time.perf_counter():
            due, number = waiting.popleft()
            run.ask(number, run.connect(), due)
        wait_s = max(0.0, waiting[0][0] - time.perf_counter()) if waiting else None
        for connection in run.step(wait_s):
            connection.socket.close()


def send_last_late(run: LoadRun) -> None:
    """Send the last request when each of the others has `late_after` pieces of its answer, or all of it."""
    *others, late = [run.connect() for _ in run.requests]
    for number, connection in enumerate(others):
        run.ask(number, connection)
    behind = others
    while behind := [
        other for other in behind if other.number not in run.answers and len(other.times) < run.plan.late_after
    ]:
        run.step()
    run.ask(len(others), late)
    while not run.complete:
        run.step()


def request_bytes(plan: Plan, body: Mapping[str, Any]) -> bytes:
    """Return a request with its header."""
    content = json.dumps(body).encode()
    header = (
        f"POST {plan.api_path} HTTP/1.1\r\nHost: 127.0.0.1:{plan.port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return header.encode() + content


# -- answers ----------------------------------------------------------------------------------------------------------


def read_reply(answer: Received) -> Reply:
    """Return what an answer says. Of a stream only events without text are decoded: the last ones, and errors."""
    start, content = answer.start, answer.content
    if not content:
        return Reply(start, start, [], problem="the server closed the connection without an answer")
    end = answer.times[-1]
    header, _, _ = content.partition(b"\r\n\r\n")
    fields = header_fields(header)
    parts = list(body_parts(answer, len(header) + 4, is_chunked(fields)))
    body = b"".join(content[first:last] for first, last in parts)
    status = header.split(b" ", 2)[1].decode()
    if status != "200":
        return Reply(start, end, [], problem=f"status {status}: {body.decode(errors='replace')[:300]}")
    times: list[float] = []
    decoded = [body]
    if "event-stream" in fields.get("content-type", ""):
        decoded, begin = [], 0
        part_ends = list(accumulate(last - first for first, last in parts))
        for blank in EVENT_END.finditer(body):
            if TEXT.search(body, begin, blank.start()):
                times.append(answer.time_of(parts[bisect.bisect_left(part_ends, blank.end())][1]))
            else:
                decoded.append(event_data(body[begin : blank.start()]))
            begin = blank.end()
    usage: Mapping[str, Any] = {}
    for data in decoded:
        if data not in (b"", b"[DONE]"):
            value = json.loads(data)
            if "error" in value:
                return Reply(start, end, [], problem=f"error: {value['error']}")
            usage = value.get("usage") or usage
    if not usage:
        return Reply(start, end, times, problem="the answer has no usage")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return Reply(start, end, times, usage["completion_tokens"], usage["prompt_tokens"], cached)


def header_fields(header: bytes | bytearray) -> dict[str, str]:
    """Return the fields of a header by their names in small letters; the values have small letters too."""
    lines = header.decode("latin-1").lower().split("\r\n")[1:]
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def is_chunked(fields: Mapping[str, str]) -> bool:
    """Return whether a body comes in chunks."""
    return "chunked" in fields.get("transfer-encoding", "")


def body_parts(answer: Received, begin: int, chunked: bool) -> Iterator[tuple[int, int]]:
    """Yield where the parts of a body are in the answer: its chunks without their frames, or the pieces that came.

    The frames are only read now, from all bytes at once, so it does not matter where the network has cut them.

    Args:
        answer: all of it.
        begin: number of bytes before the body.
        chunked: whether it comes in chunks.

    Source: RFC 9112, section 7.1.
    """
    content = answer.content
    if not chunked:
        yield from pairwise([begin, *(end for end in answer.ends if end > begin)])
        return
    while (line_end := content.find(b"\r\n", begin)) >= 0:
        size = int(content[begin:line_end].split(b";")[0], 16)
        first, last = line_end + 2, line_end + 2 + size
        if not size or last > len(content):
            return
        yield first, last
        begin = last + 2


def event_data(event: bytes) -> bytes:
    """Return the data of a server-sent event, empty if it has none.

    Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
    """
    return b"\n".join(line[5:].strip() for line in event.splitlines() if line.startswith(b"data:"))


def main() -> None:
    """Answer each plan with a line of JSON."""
    for line in sys.stdin:
        found, problem, cpu_start = [], "", time.process_time()
        try:
            found = send_all(Plan(**json.loads(line)))
        except OSError as error:
            problem = f"no connection: {error.strerror or error}"
        cpu_s = time.process_time() - cpu_start
        answers = [read_reply(answer) for answer in found]
        print(json.dumps({"answers": answers, "problem": problem, "cpu_s": cpu_s}), flush=True)


if __name__ == "__main__":
    main()
