"""Reading what was sent: JSON, of a bounded size, in which nothing stands twice. It is checked by the types of the file."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec
from fastapi import Request

from proxy.errors import BodyTooLarge, InvalidRequest, UnsupportedMedia
from proxy.settings import SettingsError, explain

T = TypeVar("T")

MOST_BYTES = 1024 * 1024
MERGE_PATCH = "application/merge-patch+json"
_TEXT_LENGTH = 1000

_exact = msgspec.json.Decoder(float_hook=Decimal)
_exactly = msgspec.json.Encoder(decimal_format="number")


def as_written(body: Any) -> Any:
    return body


class Patch(NamedTuple, Generic[T]):
    """A JSON merge patch (RFC 7396) for values of a type."""

    kind: type[T]
    changes: Any
    prepare: Callable[[Any], Any]

    def onto(self, value: T) -> T:
        """The value with the changes. Raises InvalidRequest."""
        merged = _merged(msgspec.to_builtins(value), self.changes)
        return convert(_exactly.encode(self.prepare(merged)), self.kind)


def body_of(kind: type[T], prepare: Callable[[Any], Any] = as_written) -> Callable[[Request], Awaitable[T]]:
    """A dependency: the request's body as a `kind`. `prepare` may fill in what the type doesn't know how to; it raises
    SettingsError."""

    async def read(request: Request) -> T:
        data = await _json(request, "application/json")
        return convert(data if prepare is as_written else _exactly.encode(_prepared(prepare, _exact.decode(data))), kind)

    return read


def patch_of(kind: type[T], prepare: Callable[[Any], Any] = as_written) -> Callable[[Request], Awaitable[Patch[T]]]:
    """A dependency: the request's body as changes to a `kind`."""

    async def read(request: Request) -> Patch[T]:
        data = await _json(request, "application/json", MERGE_PATCH)
        return Patch(kind, _exact.decode(data), lambda merged: _prepared(prepare, merged))

    return read


def convert(data: bytes, kind: type[T]) -> T:
    """Raises InvalidRequest: the field, the value, what is allowed."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        text = explain(str(error), json.loads(data), kind, "the body")
    except msgspec.DecodeError as error:
        text = f"the body: {error}"
    field = text.partition(": ")[0]
    raise InvalidRequest(text[:_TEXT_LENGTH], param=field if field.isprintable() and field != "the body" else None)


def _prepared(prepare: Callable[[Any], Any], body: Any) -> Any:
    try:
        return prepare(body)
    except SettingsError as error:
        raise InvalidRequest(str(error)[:_TEXT_LENGTH], param=str(error).partition(": ")[0]) from None


def _merged(value: Any, changes: Any) -> Any:
    if not isinstance(changes, dict):
        return changes
    result = dict(value) if isinstance(value, dict) else {}
    for name, change in changes.items():
        if change is None:
            result.pop(name, None)
        else:
            result[name] = _merged(result.get(name), change)
    return result


async def _json(request: Request, *types: str) -> bytes:
    """The body, if it is JSON that can be read in one way."""
    said = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if said not in types:
        raise UnsupportedMedia(f"the body's content-type has to be {' or '.join(types)}")
    data = await _whole(request)
    try:
        json.loads(data, object_pairs_hook=_once, parse_constant=_nowhere)
        _exact.decode(data)
    except (ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise InvalidRequest(f"the body isn't JSON that can be read: {str(error)[:_TEXT_LENGTH]}", code="invalid_json") from None
    return data


async def _whole(request: Request) -> bytes:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MOST_BYTES:
            raise BodyTooLarge(f"a body may have {MOST_BYTES} bytes here")
    return bytes(data)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    said: dict[str, Any] = {}
    for name, value in pairs:
        if name in said:
            raise ValueError(f"{name[:100]!r} stands twice in one object")
        said[name] = value
    return said


def _nowhere(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
