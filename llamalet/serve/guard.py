"""Who may ask: the checks of Host, Origin and key, and of sizes, before a request gets to its route.

A server on a loopback address can be reached by every page that the user's browser shows. So a request must name a host
that is this server's (a name that an attacker lets point to 127.0.0.1 is none), and one that a browser sends for a page
must come from this server's own pages, or from an origin that was allowed by name.
"""

import hmac
import ipaddress
import re
from collections.abc import Collection
from dataclasses import dataclass, field

from llamalet.errors import note, one_line, place_of
from llamalet.serve.api_error import ApiError
from llamalet.serve.exchange import GONE, Application, Bodies, Exchange, Receive, Scope, Send
from llamalet.serve.metrics import ServerMetrics
from llamalet.serve.worker import ClientGone

LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
MAX_HEADERS, MAX_HEADER_BYTES, MAX_TARGET_BYTES = 100, 1 << 15, 1 << 13
ANY = "*"

HOST = re.compile(rb"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]{1,5})?", re.IGNORECASE)
"""An address in brackets or a name, and a port. Source: RFC 9110, section 7.2."""

NEEDS_NO_KEY = re.compile(r"/health|/|/favicon\.ico|/page/[^/]*\.[^/]*")
"""The page must come before it can send a key; /health is for those who watch the process."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What is allowed.

    Attributes:
        hosts: names and addresses in Host, lower case, without ports; ANY allows all.
        any_address: whether every address in digits is allowed: a browser cannot be tricked into sending one.
        origins: those whose pages may ask, like https://example.org; ANY allows all.
        keys: one of these must come with a request; none are asked for if there are none.
    """

    hosts: Collection[str] = LOCAL
    any_address: bool = False
    origins: Collection[str] = ()
    keys: Collection[bytes] = field(default=(), repr=False)

    def allows_host(self, value: bytes | None) -> bool:
        """Return whether the value of a Host header is one of this server's."""
        if ANY in self.hosts:
            return True
        match = HOST.fullmatch(value or b"")
        if match is None:
            return False
        name = (match[1] or match[2]).decode().lower().removesuffix(".")
        return name in self.hosts or self.any_address and _is_address(name)

    def allows_key(self, value: bytes | None) -> bool:
        """Return whether the value of an Authorization header has one of the keys."""
        scheme, _, given = (value or b"").partition(b" ")
        # All are compared, each in constant time.
        found = [hmac.compare_digest(given.strip(), key) for key in self.keys]
        return not found or scheme.lower() == b"bearer" and any(found)


class AccessGuard:
    """An ASGI application in front of another one."""

    def __init__(self, app: Application, rules: Rules, bodies: Bodies, metrics: ServerMetrics, logs: bool) -> None:
        """Let requests pass to `app`, with an Exchange in scope["exchange"]; print a line for each if `logs`."""
        self._app, self._rules, self._bodies, self._metrics, self._logs = app, rules, bodies, metrics, logs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        exchange = scope["exchange"] = Exchange(scope, receive, send, self._bodies)
        try:
            if not await self._is_answered(scope, exchange):
                await self._app(scope, exchange.receive, exchange.send)
        except ClientGone:
            exchange.status = GONE
        except Exception as error:
            if not isinstance(error, ApiError):
                note(f"{exchange.id}: {type(error).__name__}: {one_line(error)} ({place_of(error)})")
                error = ApiError(500, "the server has failed; its log says more")
            if exchange.status:  # too late for an answer: only a broken connection says that it is not complete
                raise ConnectionAbortedError from None
            await exchange.refuse(error)
        finally:
            exchange.finish(self._metrics, self._logs)

    async def _is_answered(self, scope: Scope, exchange: Exchange) -> bool:
        """Check a request; return whether it is answered already.

        Raises:
            ApiError: if it is refused.
        """
        headers = scope["headers"]
        size = sum(len(name) + len(value) for name, value in headers)
        if size > MAX_HEADER_BYTES or len(headers) > MAX_HEADERS:
            raise ApiError(431, "the request's headers are too large", headers={"connection": "close"})
        if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_TARGET_BYTES:
            raise ApiError(414, "the request's path is too long", headers={"connection": "close"})
        host = exchange.header(b"host")
        if not self._rules.allows_host(host):
            raise ApiError(
                403, "the request names another host than this server's; start the server with --allow-host=NAME",
                code="host_not_allowed",
            )  # fmt: skip
        self._check_origin(scope, exchange, host or b"")
        if scope["method"] == "OPTIONS" and exchange.header(b"access-control-request-method") is not None:
            await self._answer_preflight(exchange)
            return True
        needs_key = scope["method"] not in ("GET", "HEAD") or not NEEDS_NO_KEY.fullmatch(scope["path"])
        if needs_key and not self._rules.allows_key(exchange.header(b"authorization")):
            raise ApiError(
                401, "the key is wrong or missing; send it as Authorization: Bearer KEY",
                code="invalid_api_key", headers={"www-authenticate": "Bearer"},
            )  # fmt: skip
        names = {name for name, _ in headers}
        if {b"content-length", b"transfer-encoding"} <= names:
            raise ApiError(400, "the request has both Content-Length and Transfer-Encoding")
        if exchange.header(b"content-encoding") not in (None, b"identity"):
            raise ApiError(415, "the body is compressed, which this server does not read")
        length = exchange.header(b"content-length")
        if length is not None and int(length) > self._bodies.max_bytes:
            raise exchange.too_large()
        return False

    def _check_origin(self, scope: Scope, exchange: Exchange, host: bytes) -> None:
        """Check whether the page that a browser sends a request for may ask, and let an allowed one read the answer.

        Raises:
            ApiError: if it may not.
        """
        origin = exchange.header(b"origin")
        if origin is not None:
            name = origin.decode("latin-1").lower()
            if name in self._rules.origins or ANY in self._rules.origins:
                exchange.origin_headers = [
                    (b"access-control-allow-origin", origin), (b"vary", b"origin"),
                    (b"access-control-expose-headers", b"x-request-id, retry-after"),
                ]  # fmt: skip
                return
            own = host.decode("latin-1").lower()
            if scope["method"] != "OPTIONS" and name in (f"http://{own}", f"https://{own}"):  # a proxy may speak TLS
                return
        elif any(name == b"origin" for name, _ in scope["headers"]):  # several
            pass
        elif exchange.header(b"sec-fetch-site") not in (b"cross-site", b"same-site") or _opens_page(scope, exchange):
            return
        raise ApiError(
            403, "a page of another origin may not ask; start the server with --allow-origin=ORIGIN",
            code="origin_not_allowed",
        )  # fmt: skip

    async def _answer_preflight(self, exchange: Exchange) -> None:
        """Tell a browser that a page of an allowed origin may ask."""
        exchange.route = "preflight"
        wanted = exchange.header(b"access-control-request-headers") or b"authorization, content-type"
        headers = [
            (b"access-control-allow-methods", b"GET, POST"), (b"access-control-allow-headers", wanted),
            (b"access-control-max-age", b"600"),
        ]  # fmt: skip
        if exchange.header(b"access-control-request-private-network") == b"true":
            headers.append((b"access-control-allow-private-network", b"true"))
        await exchange.answer(204, b"", headers)


def _opens_page(scope: Scope, exchange: Exchange) -> bool:
    """Return whether a browser opens the page in a window, from a link: another page gets nothing of it."""
    is_document = (
        exchange.header(b"sec-fetch-mode") == b"navigate" and exchange.header(b"sec-fetch-dest") == b"document"
    )
    return is_document and scope["method"] == "GET" and scope["path"] == "/"


def _is_address(name: str) -> bool:
    """Return whether a host's name is an address in digits."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
