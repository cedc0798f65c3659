"""Which web pages may read answers (the Fetch standard's CORS protocol). vLLM's own default is any page; so is ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

_METHODS = b"GET, HEAD, OPTIONS, POST"
_EXPOSED = b"\r\naccess-control-expose-headers: x-request-id, x-glasshouse-cache, age"
_PREFLIGHT = (
    b"\r\naccess-control-allow-methods: " + _METHODS + b"\r\naccess-control-max-age: 600"
    b"\r\nvary: Origin, Access-Control-Request-Method, Access-Control-Request-Headers"
)


class Cors:
    """`origins`: those that are allowed, or `*`; none: no page gets any of these headers."""

    def __init__(self, origins: Iterable[str]) -> None:
        self._origins = frozenset(origin.encode() for origin in origins)
        self._any = b"*" in self._origins

    def lines(self, origin: bytes) -> bytes:
        """Header lines of the answer to a page of this origin."""
        if self._any:
            return b"\r\naccess-control-allow-origin: *" + _EXPOSED
        if origin in self._origins:
            return b"\r\naccess-control-allow-origin: " + origin + b"\r\nvary: Origin" + _EXPOSED
        return b""

    def preflight(self, headers: Mapping[bytes, bytes]) -> tuple[int, bytes, bytes] | None:
        """(status, text, header lines) of the answer to a browser that asks before it sends a request, as Starlette's
        middleware has them; None if that isn't what is asked, or nobody may."""
        origin, method = headers.get(b"origin"), headers.get(b"access-control-request-method")
        if origin is None or method is None or not self._origins:
            return None
        lines = _PREFLIGHT
        if self._any:
            lines += b"\r\naccess-control-allow-origin: *"
        elif origin in self._origins:
            lines += b"\r\naccess-control-allow-origin: " + origin
        else:
            return 400, b"Disallowed CORS origin", lines
        if method not in _METHODS.split(b", "):
            return 400, b"Disallowed CORS method", lines
        if wanted := headers.get(b"access-control-request-headers"):
            lines += b"\r\naccess-control-allow-headers: " + wanted
        return 200, b"OK", lines
