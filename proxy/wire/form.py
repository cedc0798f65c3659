"""Reading a form (multipart/form-data, RFC 7578) where it lies: its fields are found, its files are stepped over, and nothing is
copied but what is asked for of its fields.

Only what every reader reads alike is taken: no text before the first part or after the last, plain names, no part without one, no
transfer encodings. An engine must not see another `model` than the proxy did, so a field that stands twice is refused, unless its
name says that it may (`timestamp_granularities[]`).
"""

from __future__ import annotations

import re

from msgspec import Struct

from proxy.errors import InvalidRequest
from proxy.wire.operation import FORM

MAX_PARTS = 64
MAX_PART_HEAD = 4096
MAX_FIELD = 64 * 1024

_BOUNDARY = re.compile(rb';[ \t]*boundary=(?:"([^"\\\r\n]{1,70})"|([A-Za-z0-9\'()+_,./:=?-]{1,70}))[ \t]*(?:;|$)', re.IGNORECASE)
_DISPOSITION = re.compile(
    rb'\r\n(?i:content-disposition):[ \t]*form-data;[ \t]*name="([^"\\\r\n]*)"'
    rb'(;[ \t]*filename=(?:"(?:[^"\\\r\n]|\\\\)*"|[A-Za-z0-9._-]+)(?:;[ \t]*filename\*=[^;"\r\n]*)?)?[ \t]*(?=\r\n|\Z)'
)
"""`filename*` alone makes a part a file for some readers and a field for others (RFC 7578 §4.2 forbids it)."""
_ENCODED = re.compile(rb"\r\ncontent-transfer-encoding:", re.IGNORECASE)


class Form(Struct):
    """`places`: where in the body (from, to) what isn't a file lies, by name; of those that may stand several times the last.
    `boundary` as it separates parts."""

    body: bytes
    boundary: bytes
    places: dict[str, tuple[int, int]] = {}

    @property
    def fields(self) -> dict[str, bytes]:
        """What they say."""
        return {name: bytes(self.body[start:end]) for name, (start, end) in self.places.items()}


def boundary_of(content_type: bytes) -> bytes:
    """Raises InvalidRequest."""
    match = _BOUNDARY.search(content_type)
    if match is None:
        raise InvalidRequest("The Content-Type has no usable `boundary`.", param="Content-Type")
    return match[1] or match[2]


def form_type(boundary: bytes) -> bytes:
    return b'%b; boundary="%b"' % (FORM, boundary)


def read_form(body: bytes, content_type: bytes) -> Form:
    """Raises InvalidRequest."""
    boundary = boundary_of(content_type)
    between = b"\r\n--" + boundary
    if not body.startswith(between[2:]):
        raise _malformed("it doesn't begin with its boundary")
    form = Form(body, boundary)
    at = len(between) - 2
    for _ in range(MAX_PARTS + 1):
        if body.startswith(b"--", at):
            if bytes(body[at + 2 : at + 8]).strip(b"\r\n"):
                raise _malformed("something follows its end")
            return form
        if not body.startswith(b"\r\n", at):
            raise _malformed("a boundary is followed by something else than a line end")
        start = body.find(b"\r\n\r\n", at, at + MAX_PART_HEAD)
        end = body.find(between, start + 2 if start >= 0 else at)
        if start < 0 or end < start + 4:
            raise _malformed("a part has no end, or no line of its own before it")
        _read_part(form, bytes(body[at:start]), start + 4, end)
        at = end + len(between)
    raise _malformed(f"it has more than {MAX_PARTS} parts")


def _read_part(form: Form, head: bytes, start: int, end: int) -> None:
    dispositions = _DISPOSITION.findall(head)
    if len(dispositions) != 1 or head.lower().count(b"content-disposition") != 1 or _ENCODED.search(head):
        raise _malformed("a part has no name that can be read in one way only")
    name, filename = dispositions[0]
    if filename:
        return
    field = name.decode("utf-8", "replace")
    if field in form.places and not field.endswith("[]"):
        raise InvalidRequest("The form has a field that stands twice.", param=field[:64])
    if end - start > MAX_FIELD:
        raise InvalidRequest(f"A field of the form has more than {MAX_FIELD} bytes.", param=field[:64])
    form.places[field] = (start, end)


def _malformed(why: str) -> InvalidRequest:
    return InvalidRequest(f"The request body isn't a form that can be read: {why}.")
