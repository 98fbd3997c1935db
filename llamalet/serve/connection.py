"""uvicorn's connection, with deadlines: it would wait for ever for a client that sends or reads nothing."""

import asyncio
import socket
from typing import Any, NamedTuple, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from llamalet.errors import note, one_line
from llamalet.serve.api_error import ApiError
from llamalet.serve.exchange import LINGER_BYTES, LINGER_S

MAX_AHEAD = 1 << 16
"""Bytes of further requests that a client may send before it has its answer, until nothing more of it is read."""


class ConnectionLimits(NamedTuple):
    """What a connection may take: seconds to send a request's head and to read what was written, and their number."""

    head_s: float
    write_s: float
    number: int


class Connection(H11Protocol):
    """A connection that is cut if its client is too slow. The deadline of a request's body is the Exchange's."""

    def __init__(self, *, limits: ConnectionLimits, **options: Any) -> None:
        """Take uvicorn's arguments too."""
        super().__init__(**options)
        self._limits = limits
        self._head_deadline: asyncio.TimerHandle | None = None
        self._write_deadline: asyncio.TimerHandle | None = None
        self._n_dropped: int | None = None  # bytes after what was not HTTP
        self._guarded, self.app = self.app, self._run

    async def _run(self, scope: Any, receive: Any, send: Any) -> None:
        """Let the application know the connection, for `write_part`."""
        scope["connection"] = self
        await self._guarded(scope, receive, send)

    async def write_part(self, data: bytes) -> bool:
        """Write a part of an answer of unknown length that has begun; return whether that was possible.

        The bytes are those that h11 makes of it, in a fifth of the time. Source: RFC 9112, section 7.1.
        """
        if self.flow.write_paused:
            await self.flow.drain()
        if self.cycle.disconnected:
            return True
        if not self.can_write_part:
            return False
        self.write_part_at_once(data)
        return True

    @property
    def can_write_part(self) -> bool:
        """Whether a part can be written without waiting."""
        cycle = self.cycle
        can_take = not self.flow.write_paused and not cycle.disconnected
        return can_take and self.conn.our_state is h11.SEND_BODY and cycle.scope["http_version"] == "1.1"

    def write_part_at_once(self, data: bytes) -> None:
        """Write a part as it is sent in chunks; only where `can_write_part`."""
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, unless there are too many connections."""
        super().connection_made(cast(asyncio.Transport, transport))
        if len(self.connections) > self._limits.number:
            self.transport.abort()
            return
        # asyncio does this only for sockets that were made with a protocol number; without it, small writes wait 40 ms.
        self.transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._wait_for_head()

    def connection_lost(self, error: Exception | None) -> None:
        """End."""
        super().connection_lost(error)
        for deadline in (self._head_deadline, self._write_deadline):
            if deadline is not None:
                deadline.cancel()

    def data_received(self, data: bytes) -> None:
        """Take what the client sends."""
        if self._n_dropped is not None:
            self._n_dropped += len(data)
            if self._n_dropped > LINGER_BYTES:
                self.transport.abort()
            return
        try:
            super().data_received(data)
        except Exception as error:  # what h11 or uvicorn does not expect ends this connection alone
            note(f"a connection failed: {type(error).__name__}: {one_line(error)}")
            self.transport.abort()
        if self.flow.read_paused and len(self.conn.trailing_data[0]) <= MAX_AHEAD:
            self.flow.resume_reading()  # uvicorn would not notice that a client goes after it sent a second request
        if self.cycle is None or self.cycle.response_complete:
            self._wait_for_head()
        elif self._head_deadline is not None:
            self._head_deadline.cancel()
            self._head_deadline = None

    def _wait_for_head(self) -> None:
        """Cut the connection if its next request does not begin in time; what it sends meanwhile changes nothing."""
        if self._head_deadline is None:
            self._head_deadline = self.loop.call_later(self._limits.head_s, self.transport.abort)

    def pause_writing(self) -> None:
        """Cut the connection if the client does not read much of what waits for it."""
        super().pause_writing()
        self._cut_unless_read()

    def resume_writing(self) -> None:
        """Let the client read on."""
        super().resume_writing()
        if self._write_deadline is not None and not self.transport.is_closing():
            self._write_deadline.cancel()
            self._write_deadline = None

    def _cut_unless_read(self) -> None:
        """Cut the connection after the time that a client has for reading."""
        if self._write_deadline is None:
            self._write_deadline = self.loop.call_later(self._limits.write_s, self.transport.abort)

    def on_response_complete(self) -> None:
        """Go on with the next request, or close."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._cut_unless_read()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that is not used."""
        self.shutdown()

    def shutdown(self) -> None:
        """Close as soon as there is no request to answer."""
        try:
            super().shutdown()
        except h11.LocalProtocolError:  # it is closing already, or was never sound
            self.transport.close()
        if self.transport.is_closing():
            self._cut_unless_read()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP. What follows is dropped for a while, so that its sender reads the answer."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = ApiError(400, "the request is not valid HTTP").body()
            headers = [
                ("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")
            ]  # fmt: skip
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self._n_dropped = 0
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.abort)
