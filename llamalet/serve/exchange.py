"""One HTTP request and its answer: the body within its limits, the answer's headers, the line of the log."""

import asyncio
import contextlib
import json
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeVar

from llamalet.errors import note
from llamalet.serve.api_error import ApiError
from llamalet.serve.metrics import ServerMetrics
from llamalet.serve.worker import ClientGone, Texts

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Result = TypeVar("Result")
Headers = Iterable[tuple[bytes, bytes]]

LINGER_S, LINGER_BYTES = 2.0, 1 << 26
"""How much longer and how much more is read of a request that is refused, so that its sender reads the answer."""

GONE = 499
"""The log's status of a request whose client has gone, as nginx has it."""

MAX_SHOWN = 100  # characters of a path in the log


@dataclass(kw_only=True)
class Bodies:
    """What the bodies of requests may be.

    Attributes:
        max_bytes: of one body.
        max_total_bytes: of all bodies that are being read.
        seconds: from the request's first byte to its last.
        n_bytes: of all that are being read now.
    """

    max_bytes: int
    max_total_bytes: int
    seconds: float
    n_bytes: int = 0


class Exchange:
    """A request and its answer.

    Attributes:
        id: names the request, in its answer and in the log.
        route: for metrics; of few values.
        status: of the answer; 0 before it begins.
        origin_headers: what lets a page of another origin read the answer.
        n_prompt, n_new: tokens of the prompts, and those made, for the log.
        start, first: when it came, and when it had its first token, by time.perf_counter.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, bodies: Bodies) -> None:
        self.id = f"req-{secrets.token_hex(12)}"
        self.route = "other"
        self.status = 0
        self.origin_headers: list[tuple[bytes, bytes]] = []
        self.n_prompt = self.n_new = 0
        self.start = time.perf_counter()
        self.first: float | None = None
        self._scope, self._receive, self._send, self._bodies = scope, receive, send, bodies
        self._deadline = asyncio.get_running_loop().time() + bodies.seconds
        self._n_bytes = 0  # of the body so far
        self._is_read = False

    # --- the request ---

    def header(self, name: bytes) -> bytes | None:
        """Return the value of a header, given in lower case; None if there is none, or if there are several."""
        found = [value for key, value in self._scope["headers"] if key == name]
        return found[0] if len(found) == 1 else None

    async def receive(self) -> Message:
        """Return the next part of the request, or wait for the client to go.

        Raises:
            ApiError: if the body is too large or too slow, or the bodies of all requests are too large.
            ClientGone: if the client goes before the body has ended.
        """
        if self._is_read:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            seconds = self._bodies.seconds
            raise ApiError(408, f"the body did not arrive in {seconds:g} s; send it faster", code="slow_body") from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        n = len(message.get("body", b""))
        self._n_bytes += n
        self._bodies.n_bytes += n
        if self._n_bytes > self._bodies.max_bytes:
            raise self.too_large()
        if self._bodies.n_bytes > self._bodies.max_total_bytes:
            raise ApiError(
                503, "too many large requests at once; try again later", code="bodies_full",
                headers={"retry-after": "1"},
            )  # fmt: skip
        self._is_read = not message.get("more_body", False)
        return message

    def too_large(self) -> ApiError:
        """Return the refusal of a body that is larger than allowed."""
        return ApiError(
            413, f"the body is larger than {self._bodies.max_bytes} bytes; send less", code="body_too_large"
        )

    async def body(self) -> bytes:
        """Return the whole body.

        Raises:
            ApiError, ClientGone: see receive.
        """
        parts = []
        while not self._is_read:
            parts.append((await self.receive()).get("body", b""))
        return b"".join(parts)

    async def watch(self, texts: Texts) -> None:
        """Wait until the client goes, and let its texts end."""
        await self._gone()
        texts.fail(ClientGone())

    async def unless_gone(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Return what `work` returns, once the body has been read.

        Raises:
            ClientGone: if the client goes first; `work` is cancelled then.
        """
        task, gone = asyncio.create_task(work), asyncio.create_task(self._gone())
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientGone
            return await task
        finally:
            task.cancel()
            gone.cancel()

    async def _gone(self) -> None:
        """Wait until the client goes."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    # --- the answer ---

    async def send(self, message: Message) -> None:
        """Send a part of the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._forget_body()
            own = [(b"x-request-id", self.id.encode()), (b"x-content-type-options", b"nosniff")]
            message["headers"] = [*message.get("headers", ()), *own, *self.origin_headers]
        await self._send(message)

    async def answer(self, status: int, body: bytes, headers: Headers = (), *, kind: str = "application/json") -> None:
        """Send a whole answer."""
        length = str(len(body)).encode()
        headers = [(b"content-type", kind.encode()), (b"content-length", length), *headers]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    async def write(self, data: bytes, headers: Headers = (), *, more: bool) -> None:
        """Send a part of an answer of unknown length, with its headers first if it is the first part."""
        if not self.status:
            await self.send({"type": "http.response.start", "status": 200, "headers": headers})
        elif more and (connection := self._scope.get("connection")) and await connection.write_part(data):
            return
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    @property
    def can_write_at_once(self) -> bool:
        """Whether the next part of an answer that has begun can be written without waiting."""
        connection = self._scope.get("connection")
        return bool(self.status) and connection is not None and connection.can_write_part

    def write_at_once(self, data: bytes) -> None:
        """Write a part of an answer; only where `can_write_at_once`."""
        self._scope["connection"].write_part_at_once(data)

    async def answer_json(self, content: Mapping[str, Any]) -> None:
        """Send a whole answer of JSON."""
        await self.answer(200, json.dumps(content).encode())

    async def refuse(self, error: ApiError) -> None:
        """Answer with an error. What comes of a body that was not read is read and dropped, within limits."""
        headers = [(name.encode(), value.encode()) for name, value in error.headers.items()]
        if self._is_read or not self._has_body():
            await self.answer(error.status, error.body(), headers)
            return
        body = error.body()
        headers += [
            (b"connection", b"close"), (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]  # fmt: skip
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
        n_left = LINGER_BYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                message: Message = {"more_body": True}
                while message.get("more_body") and n_left > 0:
                    message = await self._receive()
                    n_left -= len(message.get("body", b""))
        await self._send({"type": "http.response.body", "body": b""})

    def _has_body(self) -> bool:
        """Return whether the request says that it has a body."""
        return any(
            name == b"transfer-encoding" or name == b"content-length" and value.strip() != b"0"
            for name, value in self._scope["headers"]
        )

    def _forget_body(self) -> None:
        """Count the body no longer: it has been read, or never will be."""
        self._bodies.n_bytes -= self._n_bytes
        self._n_bytes = 0

    def finish(self, metrics: ServerMetrics, logs: bool) -> None:
        """Count the exchange, and print its line, which has nothing of the texts."""
        self._forget_body()
        now = time.perf_counter()
        metrics.answers[self.route, self.status] += 1
        metrics.request_s.add(now - self.start)
        if self.first is not None:
            metrics.first_token_s.add(self.first - self.start)
        if not logs:
            return
        path = re.sub(r"[^!-~]", "?", self._scope["raw_path"].decode("latin-1"))[:MAX_SHOWN]
        words = [time.strftime("%H:%M:%S"), self._scope["method"][:MAX_SHOWN], path, str(self.status)]
        if self.n_prompt:
            words.append(f"{self.n_prompt}+{self.n_new} tokens")
        if self.first is not None:
            words.append(f"first {self.first - self.start:.3f} s")
        note(" ".join([*words, f"{now - self.start:.3f} s", self.id]))
