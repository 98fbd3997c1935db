"""A client that loads an OpenAI-compatible server, in a process of its own, so that it takes no turn from the server.

asyncio on raw sockets. While it runs it only stores what arrives, with the time; it parses afterwards. A plan is one
line of JSON on stdin, its result one line on stdout. `LoadClient` is the other end of the pipe.
"""

import asyncio
import bisect
import contextlib
import json
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

# Seconds between looks at how far the other texts are.
LOOK_S = 0.002

Piece = tuple[float, bytes]


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
        arrivals: if not empty, the seconds after which each request is sent instead, whether or not others have ended.
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


class ClientConnection(asyncio.Protocol):
    """A connection that sends one request after another and keeps what arrives."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.closing = False  # whether it takes no further request
        self._done: asyncio.Future[None] | None = None
        self._n_bytes: int | None = None  # of the answer, as soon as its header says
        self._size, self._tail = 0, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Keep a piece of the answer; it is the last one if the answer says so."""
        self.pieces.append((time.perf_counter(), data))
        self._size += len(data)
        if self._n_bytes is None:
            self._read_header()
        if self._n_bytes == CHUNKED:
            self._tail = (self._tail + data)[-len(LAST_CHUNK) :]
            complete = self._tail == LAST_CHUNK
        else:
            complete = self._n_bytes is not None and self._size >= self._n_bytes
        if complete:
            self._end()

    def connection_lost(self, error: Exception | None) -> None:
        """End an answer that lasts until the connection closes."""
        self.closing = True
        self._end()

    def _end(self) -> None:
        """Let `ask` return."""
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _read_header(self) -> None:
        """Find out how many bytes the answer has, as soon as its header is complete."""
        header, separator, _ = b"".join(data for _, data in self.pieces).partition(b"\r\n\r\n")
        if separator:
            fields = header_fields(header)
            self.closing = fields.get("connection") == "close"
            if "chunked" in fields.get("transfer-encoding", ""):
                self._n_bytes = CHUNKED
            elif "content-length" in fields:
                self._n_bytes = len(header) + len(separator) + int(fields["content-length"])

    async def ask(self, request: bytes) -> list[Piece]:
        """Send a request; return what comes back."""
        self.pieces, self._size, self._tail, self._n_bytes = [], 0, b"", None
        self._done = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        await self._done
        return self.pieces


# In place of a number of bytes: the answer says at its end that it ends.
CHUNKED = -1


async def send_all(plan: Plan) -> list[tuple[float, list[Piece]]]:
    """Send all requests of a plan; return when each was sent and what came back, in the order of its bodies."""
    requests = [request_bytes(plan, body) for body in plan.bodies]
    found: dict[int, tuple[float, list[Piece]]] = {}

    async def connect() -> ClientConnection:
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(ClientConnection, "127.0.0.1", plan.port))[1]

    async def ask(number: int, connection: ClientConnection, start: float | None = None) -> None:
        start = time.perf_counter() if start is None else start
        found[number] = start, await connection.ask(requests[number])

    async def one_after_another(connection: ClientConnection) -> None:
        while waiting:
            number = waiting.popleft()
            if connection.closing:
                connection.transport.close()
                connection = await connect()
            await ask(number, connection)
            if not found[number][1]:  # it had been closed after the last answer, as llama-server does with streams
                connection = await connect()
                await ask(number, connection)
        connection.transport.close()

    async def at(number: int, start: float) -> None:
        await asyncio.sleep(start - time.perf_counter())
        connection = await connect()
        await ask(number, connection, start)
        connection.transport.close()

    waiting = deque(range(len(requests)))
    if plan.arrivals:
        begin = time.perf_counter()
        await asyncio.gather(*(at(number, begin + after) for number, after in enumerate(plan.arrivals)))
    elif plan.late_after:
        *others, late = [await connect() for _ in requests]
        tasks = [asyncio.create_task(ask(number, connection)) for number, connection in enumerate(others)]
        for other, task in zip(others, tasks, strict=True):
            while len(other.pieces) < plan.late_after and not task.done():
                await asyncio.sleep(LOOK_S)
        await asyncio.gather(*tasks, ask(len(others), late))
        for connection in (*others, late):
            connection.transport.close()
    else:
        connections = [await connect() for _ in range(plan.clients)]
        await asyncio.gather(*map(one_after_another, connections))
    return [found[number] for number in range(len(requests))]


def request_bytes(plan: Plan, body: Mapping[str, Any]) -> bytes:
    """Return a request with its header."""
    content = json.dumps(body).encode()
    header = (
        f"POST {plan.api_path} HTTP/1.1\r\nHost: 127.0.0.1:{plan.port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return header.encode() + content


# -- answers ----------------------------------------------------------------------------------------------------------


def read_reply(start: float, pieces: Sequence[Piece]) -> Reply:
    """Return what an answer says, from the bytes of a connection and the times at which they came."""
    if not pieces:
        return Reply(start, start, [], problem="the server closed the connection without an answer")
    end = pieces[-1][0]
    header, _, _ = b"".join(data for _, data in pieces).partition(b"\r\n\r\n")
    fields = header_fields(header)
    parts = list(body_parts(pieces, len(header) + 4, "chunked" in fields.get("transfer-encoding", "")))
    body = b"".join(part for _, part in parts)
    status = header.split(b" ", 2)[1].decode()
    if status != "200":
        return Reply(start, end, [], problem=f"status {status}: {body.decode(errors='replace')[:300]}")
    times: list[float] = []
    usage: Mapping[str, Any] = {}
    streamed = "event-stream" in fields.get("content-type", "")
    for when, content in events(parts) if streamed else [(end, body)]:
        value = json.loads(content)
        if "error" in value:
            return Reply(start, end, [], problem=f"error: {value['error']}")
        if streamed and any(
            choice.get("text") or choice.get("delta", {}).get("content") for choice in value["choices"]
        ):
            times.append(when)
        usage = value.get("usage") or usage
    if not usage:
        return Reply(start, end, times, problem="the answer has no usage")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return Reply(start, end, times, usage["completion_tokens"], usage["prompt_tokens"], cached)


def header_fields(header: bytes) -> dict[str, str]:
    """Return the fields of a header by their names in small letters; the values have small letters too."""
    lines = header.decode("latin-1").lower().split("\r\n")[1:]
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def body_parts(pieces: Sequence[Piece], begin: int, chunked: bool) -> Iterator[Piece]:
    """Yield the parts of a body, without the frames of chunks, and the time at which each was complete.

    Args:
        pieces: what came, and when.
        begin: number of bytes before the body.
        chunked: whether it comes in chunks.

    Source: RFC 9112, section 7.1.
    """
    whole = b"".join(data for _, data in pieces)
    ends = list(accumulate(len(data) for _, data in pieces))
    if not chunked:
        for (when, data), end in zip(pieces, ends, strict=True):
            if end > begin:
                yield when, data[max(0, begin - (end - len(data))) :]
        return
    while (line_end := whole.find(b"\r\n", begin)) >= 0:
        size = int(whole[begin:line_end].split(b";")[0], 16)
        end = line_end + 2 + size
        if not size or end > len(whole):
            return
        yield pieces[bisect.bisect_left(ends, end)][0], whole[line_end + 2 : end]
        begin = end + 2


def events(parts: Sequence[Piece]) -> Iterator[Piece]:
    """Yield the JSON of each server-sent event but the last, [DONE], and the time at which it was complete.

    Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
    """
    rest = b""
    for when, part in parts:
        *whole, rest = (rest + part).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in whole:
            data = b"\n".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
            if data and data != b"[DONE]":
                yield when, data


def main() -> None:
    """Answer each plan with a line of JSON."""
    for line in sys.stdin:
        found, problem, cpu_start = [], "", time.process_time()
        try:
            found = asyncio.run(send_all(Plan(**json.loads(line))))
        except OSError as error:
            problem = f"no connection: {error.strerror or error}"
        cpu_s = time.process_time() - cpu_start
        answers = [read_reply(*pieces) for pieces in found]
        print(json.dumps({"answers": answers, "problem": problem, "cpu_s": cpu_s}), flush=True)


if __name__ == "__main__":
    main()
