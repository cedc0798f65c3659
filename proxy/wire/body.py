"""A request's top level: what the proxy must know of it, and how it is changed without touching the rest.

Only `model` and `stream` must be of their type, since the proxy acts on them. Everything else is the engine's to judge: a field
of the wrong type is read as absent here and goes upstream as it came. A rewrite keeps every value's own bytes.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw, Struct

from proxy.errors import InvalidRequest

Integer = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
"""What a record can hold; a larger one is the engine's to judge, like anything else that is odd."""


class StreamOptions(Struct, gc=False):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Request(Struct, kw_only=True):
    """What the proxy reads of a generation request."""

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Integer | None = None
    max_tokens: Integer | None = None
    max_completion_tokens: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    user: str | None = None
    prompt: Raw = Raw(b"")
    """Only `/v1/completions` has one."""


_request = msgspec.json.Decoder(Request)
_object = msgspec.json.Decoder(dict[str, Raw])
_OPTIONAL = ("stream_options", "n", "max_tokens", "max_completion_tokens", "temperature", "top_p", "user")
_TYPES = {field.name: field.type for field in msgspec.structs.fields(Request)}


def read_request(body: bytes) -> Request:
    """Raises InvalidRequest, in words for the caller, if the proxy can't act on the body."""
    try:
        return _request.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return _read_field_by_field(body)


def read_object(body: bytes) -> dict[str, Raw]:
    """The top level, every value as the bytes that the client sent. Raises InvalidRequest."""
    try:
        return _object.decode(body)
    except RecursionError:
        raise InvalidRequest("The request body is nested too deeply.") from None
    except msgspec.ValidationError:
        raise InvalidRequest("The request body must be a JSON object.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The request body isn't valid JSON: {error}.") from None


def write_object(fields: dict[str, Raw]) -> bytes:
    return msgspec.json.encode(fields)


def with_stream_options(body: bytes, options: bytes) -> bytes:
    """A body that has no `stream_options`, with the JSON `options`."""
    start = body.index(b"{") + 1
    return b'%b"stream_options":%b,%b' % (body[:start], options, body[start:])


def with_more_stream_options(body: bytes, options: bytes, said: StreamOptions | None) -> bytes | None:
    """A body that may have `stream_options`, with the JSON `options` among them. None if it has some that couldn't be read as
    `said`: they are the engine's to judge."""
    fields = read_object(body)
    former = fields.get("stream_options")
    if former is None or bytes(former) == b"null":
        fields["stream_options"] = Raw(options)
    elif said is None:
        return None
    else:
        fields["stream_options"] = Raw(write_object({**read_object(bytes(former)), **read_object(options)}))
    return write_object(fields)


def _read_field_by_field(body: bytes) -> Request:
    fields = read_object(body)
    model = _decode(fields, "model", str)
    if model is None:
        raise InvalidRequest("You must name a model: `model` must be a string.", param="model")
    stream: bool | None = False
    if "stream" in fields:
        stream = _decode(fields, "stream", bool)
        if stream is None and bytes(fields["stream"]) != b"null":
            raise InvalidRequest("`stream` must be true or false.", param="stream")
    known = {name: _decode(fields, name, _TYPES[name]) for name in _OPTIONAL if name in fields}
    return Request(model=model, stream=stream, prompt=fields.get("prompt", Raw(b"")), **known)


def _decode(fields: dict[str, Raw], name: str, expected: object) -> Any:
    raw = fields.get(name)
    if raw is None:
        return None
    try:
        return msgspec.json.decode(raw, type=expected)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
