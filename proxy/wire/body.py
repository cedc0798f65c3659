"""A request's top level: what the proxy must know of it, and how it is changed without touching the rest.

Only `model` and `stream` must be of their type, since the proxy acts on them. Everything else is the engine's to judge: a field
of the wrong type is read as absent here and goes upstream as it came. A rewrite keeps every value's own bytes.

What goes upstream is what was read: JSON that two readers could read in two ways is refused. That is a name that stands twice,
text that isn't UTF-8, and a number too long to be one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Generic, NamedTuple, TypeVar, get_args

import msgspec
from msgspec import Meta, Raw, Struct

from proxy.errors import InvalidRequest
from proxy.nouns import EngineParameter

Integer = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
"""What a record can hold; nobody means a larger one."""
MAX_NUMBER = 64
"""Bytes of a number that the proxy reads. A longer one would take a reader quadratic time, and none needs it."""
TOO_LARGE = "integer_above_max_value"
"""OpenAI's code for it."""
INTERNAL = frozenset(get_args(EngineParameter))
"""Parameters that steer an engine from inside: who may say them is for each key's levels to say."""
_NUMERIC = tuple(b"%c" % character for character in b'-0123456789"')


class StreamOptions(Struct, gc=False):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Request(Struct, kw_only=True):
    """What the proxy reads of any request. An endpoint that must know more has a struct of its own, derived from this one."""

    model: str | None = None
    """None: the only one there is."""
    stream: bool | None = False
    internal: tuple[str, ...] = ()
    """What it says of `INTERNAL`, null being nothing said. The reader's to write, whatever the body has under this name."""


R = TypeVar("R", bound=Request)

_object = msgspec.json.Decoder(dict[str, Raw])
_stream_options = msgspec.json.Decoder(StreamOptions)
_name = msgspec.json.Decoder(str)
_unreadable = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)


class Reader(Generic[R]):
    """Reads bodies as one kind of Request."""

    def __init__(self, shape: type[R]) -> None:
        self._shape = shape
        self._decode = msgspec.json.Decoder(shape).decode
        self._types = {field.name: field.type for field in msgspec.structs.fields(shape) if field.name != "internal"}

    def __call__(self, body: bytes) -> R:
        """Raises InvalidRequest, in words for the caller, if the proxy can't act on the body."""
        try:
            request = self._decode(body)
            fields = _object.decode(body)
        except _unreadable:
            return self._field_by_field(body)
        if not body.isascii() or not _as_usual(fields, body):
            _check(fields, body)
        request.internal = () if INTERNAL.isdisjoint(fields) else _internal(fields)
        return request

    def _field_by_field(self, body: bytes) -> R:
        fields = read_object(body)
        known: dict[str, Any] = {}
        for name, expected in self._types.items():
            if (raw := fields.get(name)) is None:
                continue
            value = bytes(raw)
            if expected is Raw:
                known[name] = raw
            elif value != b"null":
                known[name] = _decode(name, value, expected)
        if known.get("model", "") is None:
            raise InvalidRequest("`model` must be a string.", param="model")
        if known.get("stream", False) is None:
            raise InvalidRequest("`stream` must be true or false.", param="stream")
        return self._shape(**known, internal=_internal(fields))


def _internal(fields: Mapping[str, Raw]) -> tuple[str, ...]:
    return tuple(name for name, value in fields.items() if name in INTERNAL and bytes(value) != b"null")


def read_object(body: bytes) -> dict[str, Raw]:
    """The top level, every value as the bytes that the client sent. Raises InvalidRequest."""
    try:
        fields = _object.decode(body)
    except RecursionError:
        raise InvalidRequest("The request body is nested too deeply.") from None
    except msgspec.ValidationError:
        raise InvalidRequest("The request body must be a JSON object.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The request body isn't valid JSON: {error}.") from None
    _check(fields, body)
    return fields


def write_object(fields: dict[str, Raw]) -> bytes:
    return msgspec.json.encode(fields)


def read_stream_options(raw: Raw) -> StreamOptions | None:
    """None: `null`, or something that can't be read as such."""
    try:
        return _stream_options.decode(raw)
    except _unreadable:
        return None


def with_stream_options(body: bytes, options: bytes) -> tuple[bytes, memoryview]:
    """A body that has no `stream_options`, with the JSON `options`, in two pieces: a large one isn't copied."""
    start = body.index(b"{") + 1
    return b'%b"stream_options":%b,' % (body[:start], options), memoryview(body)[start:]


def more_stream_options(body: bytes, options: bytes, said: StreamOptions | None) -> Change | None:
    """Of a body that has `stream_options`: the JSON `options` among them. None if they couldn't be read as `said`: they are the
    engine's to judge."""
    fields = read_object(body)
    former = bytes(fields["stream_options"])
    if former != b"null":
        if said is None:
            return None
        options = write_object({**read_object(former), **read_object(options)})
    return _values(fields, body)["stream_options"].becomes(options)


# -- what is changed in a body, where it lies --


class Change(NamedTuple):
    """In a body, `new` instead of what begins `start` bytes before its end and ends `end` bytes before it: so it can also be told
    of a body that has lost its beginning."""

    start: int
    end: int
    new: bytes

    def becomes(self, new: bytes) -> Change:
        return self._replace(new=new)


def place(body: bytes, start: int, end: int) -> Change:
    """What lies there, which is to be taken out."""
    return Change(len(body) - start, len(body) - end, b"")


def apply(changes: Iterable[Change], body: bytes | memoryview) -> list[bytes | memoryview]:
    """The changed body, in pieces: nothing of it is copied. No two changes overlap."""
    view, at = memoryview(body), 0
    pieces: list[bytes | memoryview] = []
    for change in sorted(changes, key=lambda change: -change.start):
        pieces += (view[at : len(view) - change.start], change.new)
        at = len(view) - change.end
    return [*pieces, view[at:]]


def new_values(body: bytes, fields: dict[str, Raw], values: Mapping[str, bytes]) -> list[Change]:
    """So that the object has these members (name → JSON): what is there already gets the value, the others come first. `fields`
    are what was read of `body`."""
    places = _values(fields, body) if values else {}
    changes = [places[name].becomes(value) for name, value in values.items() if name in fields]
    more = b",".join([b"%b:%b" % (msgspec.json.encode(name), value) for name, value in values.items() if name not in fields])
    if more:
        start = body.index(b"{") + 1
        changes.append(place(body, start, start).becomes(more + b"," if fields else more))
    return changes


def _values(fields: dict[str, Raw], body: bytes) -> dict[str, Change]:
    """Where the values of an object's members lie. `fields` are what was read of `body`, and each stands there once."""
    return {name: place(body, start, start + len(fields[name])) for name, start in _members(fields, body)}


def _members(fields: dict[str, Raw], body: bytes) -> Iterator[tuple[str, int]]:
    """Walk over the members of an object, as far as each is as long as what was read: its name, and where its value begins."""
    at = body.index(b"{") + 1
    while (key := _STRING.match(body, _past_space(body, at))) is not None:
        name = _name.decode(key[0])
        start = _past_space(body, _past_space(body, key.end()) + 1)
        yield name, start
        at = _past_space(body, start + len(fields[name])) + 1


def _decode(name: str, value: bytes, expected: object) -> Any:
    """`value` as it is expected; None if it is something else."""
    try:
        return msgspec.json.decode(value, type=expected)
    except _unreadable:
        return _count(name, value) if Integer in get_args(expected) else None


def _count(name: str, value: bytes) -> int | None:
    """Engines also take a count as text, or with an exponent: it is read for what they will make of it."""
    if not value.startswith(_NUMERIC):
        return None
    if len(value) > MAX_NUMBER:
        raise InvalidRequest(f"`{name}` isn't a number that can be meant.", param=name)
    try:
        number = float(value.strip(b'"'))
    except ValueError:
        return None
    if abs(number) >= 2**63:
        raise InvalidRequest(f"`{name}` is too large: {value.decode()}.", param=name, code=TOO_LARGE)
    return int(number) if number.is_integer() else None


# -- what two readers could read in two ways --


class _Layout(NamedTuple):
    """How JSON with these names is usually written."""

    compact: int
    """Bytes of the names and the punctuation, without any white space, as SDKs write it."""
    spaces: int
    spaced: bytes
    """With one space after each colon and comma, as Python's json module does by default; the values are to be filled in."""


_layouts: dict[tuple[str, ...], _Layout] = {}
_MOST_LAYOUTS = 1000
_LONGEST_LAYOUT = 1000


def _as_usual(fields: dict[str, Raw], body: bytes) -> bool:
    """There is nothing in the body but what was read of it: if a member had been dropped because its name stands twice, the
    lengths wouldn't add up."""
    names = tuple(fields)
    layout = _layouts.get(names) or _lay_out(names)
    white = len(body) - layout.compact - sum(map(len, fields.values()))
    if not white:
        return True
    return white == layout.spaces and len(body) < _SMALL and body == layout.spaced % tuple(fields.values())


def _lay_out(names: tuple[str, ...]) -> _Layout:
    spaced = b"{%b}" % b", ".join([b'"%b": %%b' % name.encode().replace(b"%", b"%%") for name in names])
    compact = sum(len(name.encode()) for name in names) + 4 * len(names) + 1
    layout = _Layout(compact, 2 * len(names) - 1, spaced)
    if len(_layouts) < _MOST_LAYOUTS and len(spaced) < _LONGEST_LAYOUT:
        _layouts[names] = layout
    return layout


def _check(fields: dict[str, Raw], body: bytes) -> None:
    """Raises InvalidRequest. `fields` are what was read of `body`."""
    try:
        if not body.isascii():
            body.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The request body isn't valid UTF-8: {error.reason} at byte {error.start}.") from None
    if _as_usual(fields, body):
        return
    if (name := _named_twice(fields, body)) is not None:
        raise InvalidRequest("The request body has a name that stands twice.", param=name[:64])


_SMALL = 64 * 1024
"""Bytes of a body that may be written once more."""
_SPACE = re.compile(rb"[ \t\r\n]*")
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def _named_twice(fields: dict[str, Raw], body: bytes) -> str | None:
    """Each member of a well-formed object must be the one that was read."""
    seen: set[str] = set()
    for name, start in _members(fields, body):
        value = bytes(fields[name])
        end = _past_space(body, start + len(value))
        if name in seen or not body.startswith(value, start) or body[end : end + 1] not in (b",", b"}"):
            return name
        seen.add(name)
    return None


def _past_space(body: bytes, at: int) -> int:
    match = _SPACE.match(body, at)
    return at if match is None else match.end()
