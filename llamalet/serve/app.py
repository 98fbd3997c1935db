"""The routes: what each path answers, once the model is loaded; until then, that it is not."""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Route, Router

from llamalet.engine import Begun, Ended, Event, NewToken
from llamalet.errors import LlamaletError, note, one_line
from llamalet.serve import insight, text_routes
from llamalet.serve.answers import Answer
from llamalet.serve.api_error import ApiError
from llamalet.serve.daemon_threads import INLINE_BYTES, DaemonThreads
from llamalet.serve.exchange import Exchange, Receive, Scope, Send
from llamalet.serve.metrics import ServerMetrics
from llamalet.serve.schema import Asked, read_chat, read_completion
from llamalet.serve.served_model import ServedModel
from llamalet.serve.worker import Texts, Worker

N_READERS, MAX_READ = 2, 256
"""Threads that read bodies, and bodies that they read or that wait for them, at most; both for conversations too."""

LONG_PROMPT, MAX_WRITTEN = 128, 1 << 12
"""The JSON of the logprobs of a prompt with more tokens is written in a thread; so many may be, or wait for that."""

STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
)  # fmt: skip


class App:
    """The ASGI application behind the guard.

    Attributes:
        metrics: what is counted.
    """

    def __init__(self, metrics: ServerMetrics) -> None:
        self.metrics = metrics
        self._router: Router | None = None
        self._paths: frozenset[str] = frozenset()
        self._readers = DaemonThreads("readers", N_READERS, MAX_READ)
        self._chats = DaemonThreads("chats", N_READERS, MAX_READ)
        self._writers = DaemonThreads("writers", 1, MAX_WRITTEN)

    def open(self, served: ServedModel, worker: Worker) -> None:
        """Answer for a model from now on."""
        routes = self._routes(served, worker)
        self._router = Router(routes, redirect_slashes=False)
        self._paths = frozenset(route.path for route in routes if isinstance(route, Route))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request.

        Raises:
            ApiError: if it is refused.
            ClientGone: if nobody waits for the answer any more.
        """
        exchange: Exchange = scope["exchange"]
        if self._router is None:
            exchange.route = "loading"
            raise ApiError(503, "the model is loading; try again soon", code="loading", headers={"retry-after": "1"})
        if scope["path"] in self._paths:
            exchange.route = scope["path"]
        scope["app"] = self  # so that the router raises
        try:
            await self._router(scope, receive, send)
        except HTTPException as error:
            raise _not_found(scope, error) from None

    def _routes(self, served: ServedModel, worker: Worker) -> list[BaseRoute]:
        """Return all routes, for one model."""

        def health(_: Scope, __: bytes) -> Mapping[str, Any]:
            return {"status": "ok"}

        def models(_: Scope, __: bytes) -> Mapping[str, Any]:
            return text_routes.models(served)

        def model(scope: Scope, _: bytes) -> Mapping[str, Any]:
            return text_routes.model(served, scope["path_params"]["name"])

        def props(_: Scope, __: bytes) -> Mapping[str, Any]:
            return text_routes.props(served)

        def tokenizer_info(_: Scope, __: bytes) -> Mapping[str, Any]:
            return text_routes.tokenizer_info(served)

        def tokenize(_: Scope, body: bytes) -> Mapping[str, Any]:
            return text_routes.tokenize(body, served)

        def detokenize(_: Scope, body: bytes) -> Mapping[str, Any]:
            return text_routes.detokenize(body, served)

        async def metrics(scope: Scope, receive: Receive, send: Send) -> None:
            gauges = {
                "texts_running": (worker.n_running, "Texts that have a place."),
                "texts_waiting": (worker.n_waiting, "Texts that wait for a place."),
                "kv_reserved_bytes": (worker.reserved_bytes, "Keys and values of the texts that have a place."),
                "kv_spare_bytes": (worker.spare_bytes, "Memory of texts that have ended, kept for the next ones."),
                "prefix_cache_bytes": (worker.prefix_bytes, "Keys and values that are kept for other texts."),
            }
            text = self.metrics.render(gauges).encode()
            await scope["exchange"].answer(200, text, kind="text/plain; version=0.0.4; charset=utf-8")

        completions = _Generation(self, read_completion, served, worker)
        chat = _Generation(self, read_chat, served, worker)
        routes: list[BaseRoute] = [
            Route("/health", _Json(self, health), methods=["GET"]),
            Route("/metrics", _Function(metrics), methods=["GET"]),
            Route("/props", _Json(self, props), methods=["GET"]),
            Route("/tokenizer_info", _Json(self, tokenizer_info), methods=["GET"]),
            Route("/tokenize", _Json(self, tokenize), methods=["POST"]),
            Route("/detokenize", _Json(self, detokenize), methods=["POST"]),
        ]
        for prefix in ("/v1", ""):
            routes += [
                Route(f"{prefix}/completions", completions, methods=["POST"]),
                Route(f"{prefix}/chat/completions", chat, methods=["POST"]),
                Route(f"{prefix}/models", _Json(self, models), methods=["GET"]),
                Route(f"{prefix}/models/{{name:path}}", _Json(self, model), methods=["GET"]),
            ]
        return routes + insight.routes(served, worker)

    async def read(self, exchange: Exchange, body: bytes, read: Callable[[], Any], *, is_chat: bool = False) -> Any:
        """Return what `read` makes of a body: in a thread, if that takes time.

        Raises:
            ApiError: if the body is refused, or too much is being read.
            ClientGone: if the client goes first.
        """
        if len(body) <= INLINE_BYTES and not is_chat:
            return read()
        return await exchange.unless_gone((self._chats if is_chat else self._readers).call(read))

    async def take(self, exchange: Exchange, events: list[tuple[int, Event]], answer: Answer) -> None:
        """Put events into an answer, in a thread if that takes time, and note what has to be known of them here."""
        for number, event in events:
            if type(event) is Begun and len(event.prompt_logprobs or ()) > LONG_PROMPT:
                await self._writers.call(answer.push, number, event)
            else:
                answer.push(number, event)
            if type(event) is Ended and event.error is not None and not isinstance(event.error, LlamaletError):
                note(f"{exchange.id}: {type(event.error).__name__}: {one_line(event.error)}")


class _Function:
    """A function as an ASGI application; starlette would take the function itself for one of a Request."""

    def __init__(self, function: Callable[[Scope, Receive, Send], Any]) -> None:
        self._function = function

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._function(scope, receive, send)


class _Json:
    """Answers with the JSON that a function makes of the scope and the body."""

    def __init__(self, app: App, function: Callable[[Scope, bytes], Mapping[str, Any]]) -> None:
        self._app, self._function = app, function

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope["exchange"]
        body = await exchange.body() if scope["method"] == "POST" else b""
        await exchange.answer_json(await self._app.read(exchange, body, lambda: self._function(scope, body)))


class _Generation:
    """Answers with texts that the engine makes."""

    def __init__(
        self, app: App, read: Callable[[bytes, ServedModel], Asked], served: ServedModel, worker: Worker
    ) -> None:
        """Use `read` for the bodies of requests."""
        self._app, self._read, self._served, self._worker = app, read, served, worker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        exchange: Exchange = scope["exchange"]
        body = await exchange.body()
        is_chat = self._read is read_chat
        asked = await self._app.read(exchange, body, lambda: self._read(body, self._served), is_chat=is_chat)
        if asked.unknown_fields:
            note(f"{exchange.id}: ignored unknown fields: {', '.join(asked.unknown_fields)}")
        exchange.n_prompt = asked.n_prompt_tokens
        answer = Answer(asked, exchange.id.removeprefix("req-"), int(time.time()), self._served)
        with self._worker.run(asked.requests) as texts:
            watch = asyncio.create_task(exchange.watch(texts))
            try:
                if asked.stream:
                    await self._stream(exchange, texts, answer)
                else:
                    texts.hurries = False
                    async for events in texts:
                        await self._app.take(exchange, events, answer)
                        if answer.failure is not None:
                            raise answer.failure
                    await exchange.answer(200, answer.body())
            finally:
                exchange.n_new, exchange.first = answer.n_new_tokens, texts.begun
                watch.cancel()

    async def _stream(self, exchange: Exchange, texts: Texts, answer: Answer) -> None:
        """Send events as they come: one write for all of a step."""

        def take_at_once(events: list[tuple[int, Event]]) -> bool:
            """Send tokens without waking this task, which costs as much as all else; leave the rest to it."""
            if not exchange.can_write_at_once or any(type(event) is not NewToken for _, event in events):
                return False
            for number, event in events:
                answer.push(number, event)
            if chunk := answer.chunk():
                exchange.write_at_once(chunk)
            return True

        texts.take_at_once = take_at_once
        try:
            async for events in texts:
                await self._app.take(exchange, events, answer)
                if answer.failure is not None:
                    raise answer.failure
                chunk = answer.chunk()
                if answer.finished:
                    chunk += answer.done()
                if chunk:
                    await exchange.write(chunk, STREAM_HEADERS, more=not answer.finished)
        except ApiError as error:
            if not exchange.status:  # nothing has been sent: the error can be the answer
                raise
            await exchange.write(answer.chunk() + answer.error_event(error) + answer.done(), more=False)


def _not_found(scope: Scope, error: HTTPException) -> ApiError:
    """Return the refusal of a path that is not there, or of a method that it does not have."""
    if error.status_code == 404:
        return ApiError(404, "there is nothing at this path")
    headers = {name.lower(): ", ".join(sorted(value.split(", "))) for name, value in (error.headers or {}).items()}
    if error.status_code == 405:
        return ApiError(405, f"this path takes {headers['allow']}, not {scope['method'][:20]}", headers=headers)
    return ApiError(error.status_code, error.detail, headers=headers)
