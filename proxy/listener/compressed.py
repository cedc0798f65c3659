"""Compressed request bodies, where they are taken at all. What comes out never grows beyond its limit, whatever went in."""

from __future__ import annotations

import zlib

from proxy.errors import BodyTooLarge, InvalidRequest, UnsupportedMedia

_WINDOWS = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}
"""zlib's `wbits`: the window, and which wrapper is expected (RFC 9110 §8.4.1)."""


class Decompressor:
    """One body of one `Content-Encoding`. Raises UnsupportedMedia if it isn't taken; `limit` None: none is."""

    def __init__(self, encoding: bytes, limit: int | None) -> None:
        window = _WINDOWS.get(encoding.lower())
        if limit is None or window is None:
            allowed = "none" if limit is None else "gzip, deflate"
            error = UnsupportedMedia(
                f"The request body's Content-Encoding isn't taken here; allowed: {allowed}.",
                param="Content-Encoding",
                code="unsupported_content_encoding",
            )
            error.lines = b"\r\naccept-encoding: " + (b"identity" if limit is None else b"gzip, deflate")
            raise error
        self._limit = limit
        self._size = 0
        self._stream = zlib.decompressobj(window)

    def feed(self, data: bytes) -> bytes:
        """What `data` adds to the body. Raises InvalidRequest, BodyTooLarge."""
        stream = self._stream
        try:
            plain = stream.decompress(data, self._limit - self._size + 1)
        except zlib.error:
            raise _broken() from None
        self._size += len(plain)
        if self._size > self._limit:
            raise BodyTooLarge(f"The request body is larger than {self._limit} bytes when it is decompressed.")
        if stream.unused_data:
            raise _broken()
        return plain

    def end(self) -> None:
        """Raises InvalidRequest if the body isn't complete."""
        if not self._stream.eof:
            raise _broken()


def _broken() -> InvalidRequest:
    return InvalidRequest("The request body can't be decompressed.", param="Content-Encoding")
