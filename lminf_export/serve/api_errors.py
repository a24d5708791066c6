"""Errors as OpenAI's API reports them, and which of ours becomes which."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

from lminf_export.errors import BusyError, ConfigError, InputError, LminfError, shortened

RETRY_SECONDS = 1
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """An error that a client is told instead of an answer.

    Args:
        status: of HTTP.
        message: one line.
        param: the field of the request that is wrong.
        code: a word for programs.
        retry: whether the same request may do later.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = shortened(message, 400)
        self.param = param
        self.code = code
        self.retry = retry

    @property
    def body(self) -> dict[str, Any]:
        """The error object that a response or an event holds."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """Return the HTTP response."""
        # ASCII: a message may quote half of a character, which UTF-8 cannot hold.
        headers = {"retry-after": str(RETRY_SECONDS)} if self.retry else {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.status in (413, 415):
            headers["connection"] = "close"  # what still comes of the body is not worth reading
        return Response(json.dumps(self.body), self.status, headers, media_type="application/json")


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error for a request with a field that cannot be served."""
    return ApiError(400, message, param=param, code=code)


def unsupported(name: str, which: str = "") -> ApiError:
    """Return the error for a field that is known and not served."""
    return invalid(f"{name}{which} is not supported", name, "unsupported_parameter")


def of_ours(error: LminfError) -> ApiError:
    """Return what a client is told of an error of this package."""
    if isinstance(error, BusyError):
        return ApiError(429, str(error), code="queue_full", retry=True)
    if isinstance(error, InputError | ConfigError):
        return invalid(str(error))
    return ApiError(500, str(error), code="engine_error")


def shutting_down() -> ApiError:
    """Return the error for what comes, or is cut, while the server ends."""
    return ApiError(503, "the server is shutting down", code="shutting_down", retry=True)
