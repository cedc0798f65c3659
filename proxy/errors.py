"""Everything that can go wrong with a request, by whose fault it is.

    ProxyError
    ├── ClientFault            the caller must change something
    │   ├── InvalidRequest         400
    │   │   └── PromptTooLong          400
    │   ├── Unauthenticated        401
    │   ├── Forbidden              403
    │   ├── NotFound               404  (path or model)
    │   ├── MethodNotAllowed       405
    │   ├── RequestTimeout         408
    │   ├── BodyTooLarge           413
    │   ├── UnsupportedMedia       415
    │   ├── ExpectationFailed      417
    │   ├── RateLimited            429
    │   │   └── QuotaExceeded          429
    │   ├── HeadersTooLarge        431
    │   ├── EngineRefused          as the engine answered (4xx; its own words went to the client)
    │   └── ClientGone             499  (nobody is left to read it)
    ├── ProxyFault             we must change something
    │   ├── InternalError          500
    │   ├── NotReady               503  (no snapshot yet, journal full)
    │   ├── Overloaded             503  (too many wait for an engine)
    │   ├── TooManyConnections     503
    │   └── ShuttingDown           503
    └── UpstreamFault          the engine failed
        ├── BackendLost            503  (given up before it answered; another one is asked)
        ├── EngineFailed           as the engine answered (5xx, 429, an error event in a stream)
        ├── UpstreamUnreachable    503
        ├── UpstreamDisconnected   502
        ├── UpstreamMalformed      502
        └── UpstreamTimeout        504

Each carries the HTTP status, OpenAI's `type` and `code`, and the Outcome under which the request is booked. A class is an
error's meaning; there is no switch on its text anywhere.
"""

from __future__ import annotations

import json
import math
from enum import IntEnum
from typing import ClassVar


class Outcome(IntEnum):
    """How an accepted request ended. The numbers are part of the record format: append, never renumber."""

    OK = 0
    CACHED = 1
    COALESCED = 2
    REJECTED = 3
    CLIENT_ERROR = 4
    CLIENT_GONE = 5
    UPSTREAM_ERROR = 6
    TIMEOUT = 7
    INTERNAL_ERROR = 8
    CRASHED = 9

    @property
    def label(self) -> str:
        return self.name.lower()


class ProxyError(Exception):
    """An error that has an answer in OpenAI's shape."""

    status: ClassVar[int] = 500
    type: str = "internal_error"
    code: ClassVar[str | None] = None
    outcome: ClassVar[Outcome] = Outcome.INTERNAL_ERROR
    retry_after_s: int | None = None
    refused_by: str = ""
    """`level.limit`, if it was a limit that said no."""
    lines: bytes = b""
    """Header lines that its answer has besides the usual ones, each with CR LF before it."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.error_code = code if code is not None else self.code

    def body(self) -> bytes:
        """`{"error": {"message", "type", "param", "code"}}`, as OpenAI's API reference gives it."""
        return json.dumps(
            {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.error_code}},
            ensure_ascii=False,
            separators=(",", ":"),
        ).encode("utf-8", "backslashreplace")


class ClientFault(ProxyError):
    status = 400
    type = "invalid_request_error"
    outcome = Outcome.CLIENT_ERROR


class InvalidRequest(ClientFault):
    pass


class PromptTooLong(InvalidRequest):
    """By how many tokens it is guessed to have, for a limit of `level`."""

    code = "context_length_exceeded"
    outcome = Outcome.REJECTED

    def __init__(self, tokens: int, most: int, level: str) -> None:
        super().__init__(f"The prompt is too long: about {tokens} tokens, and at most {most} are allowed here.")
        self.refused_by = f"{level}.max_input_tokens"


class Unauthenticated(ClientFault):
    status = 401
    code = "invalid_api_key"


class Forbidden(ClientFault):
    status = 403
    code = "permission_denied"
    outcome = Outcome.REJECTED


class NotFound(ClientFault):
    status = 404


class MethodNotAllowed(ClientFault):
    """`allow`: the methods that are, as in the header of that name."""

    status = 405
    code = "method_not_allowed"

    def __init__(self, message: str, *, allow: bytes) -> None:
        super().__init__(message)
        self.lines = b"\r\nallow: " + allow


class RequestTimeout(ClientFault):
    status = 408
    code = "request_timeout"


class BodyTooLarge(ClientFault):
    status = 413
    code = "request_too_large"


class UnsupportedMedia(ClientFault):
    status = 415
    code = "unsupported_media_type"


class ExpectationFailed(ClientFault):
    status = 417
    code = "expectation_failed"


class RateLimited(ClientFault):
    """`type`: what there was too much of, `requests` or `tokens`. `wait_s`: seconds after which it may be tried again."""

    status = 429
    type = "requests"
    code = "rate_limit_exceeded"
    outcome = Outcome.REJECTED

    def __init__(self, message: str, *, type: str | None = None, wait_s: float | None = None) -> None:  # noqa: A002
        super().__init__(message)
        if type is not None:
            self.type = type
        if wait_s is not None:
            self.retry_after_s = math.ceil(wait_s)
            self.lines = b"\r\nretry-after-ms: %d" % math.ceil(wait_s * 1000)


class QuotaExceeded(RateLimited):
    """A budget is used up. Trying again won't help soon, and clients that ask are told so."""

    type = "insufficient_quota"
    code = "insufficient_quota"

    def __init__(self, message: str, *, wait_s: float | None = None) -> None:
        super().__init__(message, wait_s=wait_s)
        self.lines += b"\r\nx-should-retry: false"


class HeadersTooLarge(ClientFault):
    status = 431
    code = "headers_too_large"


class ClientGone(ClientFault):
    status = 499
    code = "client_disconnected"
    outcome = Outcome.CLIENT_GONE


class EngineRefused(ClientFault):
    """The engine found fault with the request. For the record: the client has the engine's own answer."""


class ProxyFault(ProxyError):
    pass


class InternalError(ProxyFault):
    code = "internal_error"


class NotReady(ProxyFault):
    status = 503
    type = "service_unavailable"
    code = "not_ready"
    outcome = Outcome.REJECTED
    retry_after_s = 1


class Overloaded(ProxyFault):
    """There is no room for it, nor was there for as long as it could wait. `wait_s`: seconds after which there may be."""

    status = 503
    type = "service_unavailable"
    outcome = Outcome.REJECTED

    def __init__(self, message: str, *, code: str, wait_s: float) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = math.ceil(wait_s)


class TooManyConnections(ProxyFault):
    status = 503
    type = "service_unavailable"
    code = "too_many_connections"
    outcome = Outcome.REJECTED
    retry_after_s = 1


class ShuttingDown(ProxyFault):
    status = 503
    type = "service_unavailable"
    code = "shutting_down"
    outcome = Outcome.REJECTED
    retry_after_s = 1


class UpstreamFault(ProxyError):
    status = 502
    type = "upstream_error"
    outcome = Outcome.UPSTREAM_ERROR


class EngineFailed(UpstreamFault):
    """The engine answered with an error. For the record: the client has the engine's own answer."""


class UpstreamUnreachable(UpstreamFault):
    status = 503
    code = "upstream_unreachable"
    retry_after_s = 1


class BackendLost(UpstreamFault):
    """The backend was given up while this request waited for its first token there."""

    status = 503
    code = "backend_lost"
    retry_after_s = 1


class UpstreamDisconnected(UpstreamFault):
    code = "upstream_disconnected"


class UpstreamMalformed(UpstreamFault):
    code = "bad_gateway"


class UpstreamTimeout(UpstreamFault):
    status = 504
    code = "upstream_timeout"
    outcome = Outcome.TIMEOUT
