"""The server's life: it listens, loads the model, answers, and ends after the texts in progress."""

import asyncio
import contextlib
import functools
import gc
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from llamalet import startup
from llamalet.engine import Engine
from llamalet.errors import note, one_line
from llamalet.kv_cache import free_memory
from llamalet.serve.api_error import ApiError
from llamalet.serve.app import App
from llamalet.serve.connection import Connection, ConnectionLimits
from llamalet.serve.exchange import Bodies
from llamalet.serve.guard import MAX_HEADER_BYTES, AccessGuard, Rules
from llamalet.serve.metrics import ServerMetrics
from llamalet.serve.options import WILDCARDS, ServeOptions
from llamalet.serve.served_model import ServedModel
from llamalet.serve.worker import QueueLimits, Worker

MB = 1 << 20
MAX_QUEUED_TOKENS = 1 << 20
MAX_BODIES = 16
"""All bodies that are being read may have this many times the size that one may have."""

SWITCH_S = 2e-4
"""How long the engine waits for Python while a request is read; Python's own limit is that of several passes."""

READING_SHARE = 0.9
"""While prompts are read, the others' time between tokens grows by this share for each, up to MOST_SHARES of them."""

MAX_CONNECTIONS, SPARE_FILES = 4096, 64
"""Connections at once, and file descriptors that are kept for other things."""

KEEP_ALIVE_S = 30
CUT_S = 2.0
"""After the last texts were ended, clients have this long to read that."""


class HttpServer(uvicorn.Server):
    """uvicorn's server, which leaves signals alone."""

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        """Do nothing; see Service."""
        return contextlib.nullcontext()


class Service:
    """A model on a port."""

    def __init__(self, options: ServeOptions, rules: Rules, listener: socket.socket) -> None:
        """Serve on a socket that listens already, so that /health can say that the model is loading."""
        self._options, self._rules, self._listener = options, rules, listener
        self._worker: Worker | None = None
        self._stopping = False

    async def run(self, path: str | Path) -> int:
        """Load the model at a path, and serve it until a signal comes; return the exit code.

        Raises:
            LlamaletError: if the model cannot be loaded.
        """
        options, loop = self._options, asyncio.get_running_loop()
        loop.set_exception_handler(_note_error)
        metrics = ServerMetrics()
        app = App(metrics)
        max_bytes = int(options.max_body_mb * MB)
        bodies = Bodies(max_bytes=max_bytes, max_total_bytes=MAX_BODIES * max_bytes, seconds=options.client_seconds)
        limits = ConnectionLimits(options.client_seconds, options.client_seconds, _max_connections())
        config = uvicorn.Config(
            AccessGuard(app, self._rules, bodies, metrics, options.log), interface="asgi3", lifespan="off", ws="none",
            http=functools.partial(Connection, limits=limits),  # type: ignore[arg-type]
            h11_max_incomplete_event_size=MAX_HEADER_BYTES, timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=options.drain_seconds + CUT_S,  # type: ignore[arg-type]
            log_config=None, log_level=logging.CRITICAL, access_log=False, proxy_headers=False, server_header=False,
        )  # fmt: skip
        self._server = HttpServer(config)
        with self._signals(loop):
            serving = asyncio.create_task(self._server.serve([self._listener]))
            try:
                served = await asyncio.to_thread(self._load, path)
                self._worker = Worker(
                    functools.partial(self._new_engine, served), served.context,
                    QueueLimits(options.max_queue, MAX_QUEUED_TOKENS, options.queue_seconds), metrics,
                )  # fmt: skip
                app.open(served, self._worker)
                gc.collect()
                gc.freeze()  # what was loaded stays; looking through it again and again would hold up all texts
                sys.setswitchinterval(SWITCH_S)
                self._announce()
            except BaseException:
                self._server.should_exit = True
                await serving
                raise
            await serving
            self._worker.stop(CUT_S)
        return 0

    def _load(self, path: str | Path) -> ServedModel:
        """Return the model, in a thread of its own."""
        options, start = self._options, time.perf_counter()
        model = options.load(path)
        served = ServedModel(model, options.alias, created=int(time.time()), chat_template=options.chat_template)
        size = f"{model.config.n_params / 1e6:.2f}M parameters"
        note(f"model {model.path}: {size}, {model.dtype}, loaded in {time.perf_counter() - start:.2f} s")
        if served.no_template:
            note(f"no /v1/chat/completions: {served.no_template}")
        return served

    def _new_engine(self, served: ServedModel) -> Engine:
        """Return an engine for the model."""
        options = self._options
        return Engine(
            served.model.transformer, undrawn=served.model.undrawn, batch_size=options.batch_size,
            kv_bytes=free_memory() // 2 if options.kv_mb is None else options.kv_mb * MB,
            prefix_bytes=options.prefix_cache_mb * MB, reading_share=READING_SHARE,
        )  # fmt: skip

    def _announce(self) -> None:
        """Say where the server is."""
        port = self._listener.getsockname()[1]
        host = "127.0.0.1" if self._options.host in WILDCARDS else self._options.host
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        note(f"open {address}/ in a browser; clients take {address}/v1; Ctrl-C ends")

    # --- the end ---

    @contextlib.contextmanager
    def _signals(self, loop: asyncio.AbstractEventLoop) -> Any:
        """Let Ctrl-C and SIGTERM end the server inside the block."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self._worker is None and number != signal.SIGINT:
                os._exit(0)  # nothing can be lost while the model is loading
            if number == signal.SIGINT and (self._worker is None or self._stopping):
                startup.end_at_once(number, frame)
            if not self._stopping:
                self._stopping = True
                loop.call_soon_threadsafe(self._stop)

        numbers = [signal.SIGINT, signal.SIGTERM]
        before = {number: signal.getsignal(number) for number in numbers}
        for number in numbers:
            if before[number] is not signal.SIG_IGN:  # as a shell starts what is in the background
                signal.signal(number, handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self) -> None:
        """Take no more requests, and give those that are there some time."""
        assert self._worker is not None
        self._server.should_exit = True
        seconds = self._options.drain_seconds
        if n := self._worker.n_running + self._worker.n_waiting:
            what = "1 text has" if n == 1 else f"{n} texts have"
            note(f"stopping: {what} {seconds:g} s to end; Ctrl-C ends at once")
        error = ApiError(503, "the server is stopping", code="stopping", headers={"retry-after": "1"})
        asyncio.get_running_loop().call_later(seconds, self._worker.fail_all, error)


def _max_connections() -> int:
    """Return how many connections there may be, after asking the system for more file descriptors than usual."""
    if sys.platform == "win32":
        return 400  # Python's select takes 512 sockets there
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(1, min(MAX_CONNECTIONS, soft - SPARE_FILES))


def _note_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Print what went wrong in the event loop, in one line; it concerns one connection."""
    error = context.get("exception")
    what = f": {type(error).__name__}: {one_line(error)}" if isinstance(error, BaseException) else ""
    note(f"event loop: {context.get('message', '')}{what}")
