"""An error that a client gets, as OpenAI's JSON."""

import json
from collections.abc import Mapping

from llamalet.errors import LlamaletError, NonFiniteError, OutOfMemoryError, UsageError, one_line

CODES = {
    400: "invalid_request", 401: "invalid_api_key", 403: "forbidden", 404: "not_found", 405: "method_not_allowed",
    408: "timeout", 413: "request_too_large", 414: "path_too_long", 415: "unsupported_media_type",
    431: "headers_too_large", 500: "internal_error", 503: "overloaded",
}  # fmt: skip
"""What an error is called unless something more exact is known, by its status."""

CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"


class ApiError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: of HTTP, 400 to 599.
        message: what is wrong, and what to do.
        param: the field of the request that is wrong, if it is one.
        code: a word for programs.
        headers: what the answer has beside the usual ones, in lower case.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, dict(headers or {})
        self.code = code or CODES.get(status, "error")

    @classmethod
    def of(cls, error: BaseException) -> "ApiError":
        """Return what a client is told when an error ends its text; of an unknown error, nothing but that."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, NonFiniteError):
            return cls(500, one_line(error), code="non_finite")
        if isinstance(error, MemoryError | OutOfMemoryError):  # whose own message says how much is free
            message = "the server has no memory for this text; try again later"
            return cls(503, message, code="out_of_memory", headers={"retry-after": "1"})
        if isinstance(error, UsageError):
            return cls(400, one_line(error))
        if isinstance(error, LlamaletError):
            return cls(500, one_line(error))
        return cls(500, "the server could not make this text; its log says more")

    @property
    def fields(self) -> dict[str, object]:
        """The error as OpenAI's JSON has it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def body(self) -> bytes:
        """Return the body of the answer: JSON in ASCII."""
        return json.dumps(self.fields).encode()
