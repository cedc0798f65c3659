"""What a client may send as a body: whatever it is, it is refused in words, or it is what every other reader would make of it.

The other reader is Python's own `json`, which is what vLLM reads bodies with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import InvalidRequest
from proxy.exchange import Phase, Record, decode_record, encode_record
from proxy.snapshot import Bounds
from proxy.wire import audio
from proxy.wire.body import Request
from proxy.wire.bounds import NUMBERS, check_bounds
from proxy.wire.form import read_form
from proxy.wire.operation import JSON, EngineOperation
from proxy.wire.operations import OPERATIONS
from tests.fuzz.effort import effort
from tests.fuzz.mutation import ODD_VALUES, edits, odd_values
from tests.support.scripted_vllm import captured

T = TypeVar("T")

BY_JSON: Final[dict[str, EngineOperation[Any]]] = {
    operation.name: operation for operation in OPERATIONS if isinstance(operation, EngineOperation) and operation.media == JSON
}
REQUESTS: Final = tuple(
    request
    for streamed in (False, True)
    for name in captured.names(streamed=streamed)
    if (request := captured.load(name).request).startswith(b"{")
)
DEEP: Final = 300
"""Readers differ in how deep they can go; what is less deep they must all take."""

NAMES: Final = (
    *(b"model", b"stream", b"stream_options", b"n", b"best_of", b"max_tokens", b"max_completion_tokens", b"max_output_tokens"),
    *(
        b"logprobs",
        b"top_logprobs",
        b"temperature",
        b"user",
        b"stop",
        b"tools",
        b"metadata",
        b"prompt",
        b"background",
        b"request_id",
    ),
    *(
        b"a",
        b"",
        b"\xc3\xa9",
        b"mod\\u0065l",
        b"stream\\u005foptions",
        b"\\u0061",
        b"n\\u0000",
        b"\\ud83d\\ude00",
        b"\\ud800",
        b"\xff",
    ),
)
VALUES: Final = (
    *ODD_VALUES,
    *(b'"m"', b'{"include_usage":true}', b'{"include_usage":false,"x":[1, 2]}', b'{"continuous_usage_stats":true}'),
    *(b'{"include_usage":true,"include_usage":false}', b'{"include_usage":1}', b'["a","b"]', b"[[1,2],[3]]", b'{"user_id":"u"}'),
)
SPACES: Final = (b"", b"", b" ", b"\n", b"\t\r\n ", b"\x0b", b"\xc2\xa0")


def record_of(body: bytes) -> Record:
    return Record(b"i" * 16, b"t" * 16, 1, 0, request_bytes=len(body))


# --- bodies -----------------------------------------------------------------------------------------------------------


@st.composite
def _objects(
    draw: st.DrawFn, members: st.SearchStrategy[list[tuple[bytes, bytes]]], spaces: st.SearchStrategy[list[bytes]]
) -> bytes:
    said, around = draw(members), draw(spaces)
    gap: Callable[[int], bytes] = lambda number: around[number % len(around)]  # noqa: E731
    parts = [
        b'%b"%b"%b:%b%b%b' % (gap(n), name, gap(n + 1), gap(n + 2), value, gap(n + 3)) for n, (name, value) in enumerate(said)
    ]
    return gap(4) + b"{" + b",".join(parts) + (gap(5) if not parts else b"") + b"}" + gap(6)


_sensible = st.sampled_from(
    [
        [(b"model", b'"m"'), (b"stream", b"true")],
        [(b"model", b'"m"'), (b"stream", b"true"), (b"n", b"2"), (b"messages", b'[{"role":"user","content":"\\u00e9\\n"}]')],
        [(b"stream", b"true")],
        [],
    ]
)
_members = st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES)), max_size=4)
_spaces = st.lists(st.sampled_from(SPACES), min_size=1, max_size=7)
_one_line = st.just([b""])
_pieces = (b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\x00", b"\xef\xbb\xbf", b"/**/", b'"model":"x",', b'"stream":true,')
_edits = st.lists(edits(_pieces), max_size=2)
_value_edits = st.lists(odd_values(), max_size=2)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    body = draw(_written | _captured)
    for change in draw(_value_edits):
        body = change(body)
    for change in draw(_edits):
        body = change(body)
    return body


_written = _objects(st.builds(lambda first, more: first + more, _sensible, _members), _spaces | _one_line)
_captured = st.sampled_from(REQUESTS)


# --- by another reader ------------------------------------------------------------------------------------------------


def understood(body: bytes) -> dict[str, Any] | None:
    """The object that a body is, if it can be read in one way only. Numbers as they were written."""
    names: list[str] = []

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names[:] = [name for name, _ in pairs]  # of the outermost object last
        return dict(pairs)

    try:
        value = json.loads(
            body.decode(), object_pairs_hook=members, parse_int=Number, parse_float=Number, parse_constant=_no_constant
        )
        _characters(value)
    except ValueError:  # UnicodeError is one
        return None
    return value if isinstance(value, dict) and len(set(names)) == len(names) else None


class Number(str):
    """As it was written."""

    __slots__ = ()


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _characters(value: object) -> None:
    """Raises UnicodeEncodeError if a text holds half a character."""
    match value:
        case str():
            value.encode()
        case dict():
            for name, inner in value.items():
                name.encode()
                _characters(inner)
        case list():
            for inner in value:
                _characters(inner)


def depth(body: bytes) -> int:
    """At most so deep, whatever it is."""
    level = deepest = 0
    for byte in body:
        level += (byte in b"[{") - (byte in b"]}")
        deepest = max(deepest, level)
    return deepest


def count_of(value: object) -> int | None:
    """What a whole number means, if it can be meant."""
    if not isinstance(value, Number):
        return None
    try:
        number = int(value)
    except ValueError:
        number = int(float(value)) if float(value).is_integer() else 2**63
    return number if -(2**63) <= number < 2**63 else None


def may_refuse(error: InvalidRequest, said: dict[str, Any], operation: EngineOperation[Any]) -> bool:
    """A body that can be read may be refused for one of these fields."""
    value = said.get(error.param or "")
    match error.param:
        case "model":
            return not isinstance(value, str) or isinstance(value, Number)
        case "stream":
            return not isinstance(value, bool)
        case "background" | "request_id":
            return operation.name == "responses" and value is not None
        case "stream_options":
            return isinstance(value, dict)
        case name if name in NUMBERS:
            return isinstance(value, str) and (len(value) > 60 or abs(float(value)) >= 2**63)
        case _:
            return False


# --- what must hold ---------------------------------------------------------------------------------------------------


@effort(500)
@given(bodies(), st.sampled_from(sorted(BY_JSON)), st.sampled_from(["vllm", "openai"]))
def test_a_body_is_refused_or_read_as_others_read_it(body: bytes, name: str, kind: str) -> None:  # failures 36, 37
    if depth(body) > DEEP:
        return
    operation, record = BY_JSON[name], record_of(body)
    said = understood(body)
    request = refused_or(operation.read, body, record, JSON)
    if isinstance(request, InvalidRequest):
        assert said is None or may_refuse(request, said, operation), request.message
        return
    assert said is not None, "others would not have read it"
    assert request.model == said.get("model")
    assert bool(request.stream) == (bool(said.get("stream")) and bool(record.stream))
    for field in ("n", "max_tokens"):
        if hasattr(request, field) and isinstance(value := said.get(field), Number):
            meant = float(value)
            assert getattr(request, field) == (count_of(value) if meant.is_integer() else None)
    assert decode_record(encode_record(Phase.OPENING, record)) == record
    check_sent(operation, body, request, kind, said)
    if isinstance(refused := refused_or(check_bounds, request, Bounds(max_tokens=1000)), InvalidRequest):
        assert refused.param in said


def refused_or(call: Callable[..., T], *arguments: Any) -> T | InvalidRequest:
    """What it returns, or how it refuses."""
    try:
        return call(*arguments)
    except InvalidRequest as refused:
        return refused


def check_sent(operation: EngineOperation[Any], body: bytes, request: Request, kind: str, said: dict[str, Any]) -> None:
    """What goes upstream is what was read, apart from how usage is asked for."""
    upstream = refused_or(operation.prepare, body, request, kind)
    if isinstance(upstream, InvalidRequest):
        assert isinstance(said["stream_options"], dict), upstream.message
        return
    sent = understood(upstream.whole)
    assert sent is not None
    options, wanted = said.pop("stream_options", None), sent.pop("stream_options", None)
    assert sent == said
    if upstream.terms.drop_usage_chunk:
        assert wanted["include_usage"] is True
    if isinstance(options, dict):
        asked = {"include_usage": True, "continuous_usage_stats": True}
        assert {**options, **asked} == {**wanted, **asked}
    elif options is not None:
        assert wanted == options


LARGE: Final[dict[str, Callable[[], bytes]]] = {
    "a count": lambda: b'{"model":"m","n":%b}' % (b"9" * 4_000_000),
    "a number": lambda: b'{"model":"m", "x":%b}' % (b"9" * 4_000_000),
    "members": lambda: b'{"model":"m" , %b}' % b",".join(b'"%d" : %d' % (number, number) for number in range(200_000)),
    "backslashes": lambda: b'{"model":"m" , "x" : "%b"}' % (b"\\\\" * 2_000_000),
    "a name": lambda: b'{"model":"m" , "%b" : 1}' % (b"\\u0041" * 600_000),
    "spaces": lambda: b'{"model":"m"%b, "x":1}' % (b" " * 4_000_000),
    "options": lambda: b'{"stream":true,"stream_options":{%b}}' % b",".join(b'"%d":{}' % number for number in range(200_000)),
    "a batch": lambda: b'{"model":"m","prompt":[%b]}' % (b'"",' * 1_000_000 + b'""'),
    "depth": lambda: b"[" * 4_000_000,
    "depth, closed": lambda: b'{"n":' * 600_000 + b"1" + b"}" * 600_000,
    "a text without an end": lambda: b'{"model":"m","x":"' + b"\xc3\xa9" * 2_000_000,
}


@pytest.mark.parametrize("shape", LARGE)
def test_a_large_body_takes_linear_time(shape: str) -> None:  # failures 36, 37
    """In quadratic time each of these would take many minutes, and the test would be ended."""
    body = LARGE[shape]()
    for name in ("completions", "messages"):
        operation = BY_JSON[name]
        request = refused_or(operation.read, body, record_of(body), JSON)
        if not isinstance(request, InvalidRequest):
            refused_or(operation.prepare, body, request, "vllm")
            refused_or(check_bounds, request, Bounds())


# --- forms ------------------------------------------------------------------------------------------------------------

BOUNDARY: Final = b"XX-7"
FORM_TYPE: Final = b'multipart/form-data; boundary="XX-7"'
FIELD_NAMES: Final = (
    b"model",
    b"stream",
    b"stream_include_usage",
    b"prompt",
    b"timestamp_granularities[]",
    b"file",
    b"\xc3\xa9",
    b"\xff",
)
FIELD_VALUES: Final = (
    b"m",
    b"",
    b"true",
    b"TRUE ",
    b"0",
    b"maybe",
    b"\xff",
    b"\r\n",
    b"--XX-7",
    b"\r\n--XX-",
    b"\r\n--XX-7X",
    b"x" * 70_000,
)
HEADS: Final = (
    b'Content-Disposition: form-data; name="%b"',
    b'content-disposition:form-data;name="%b"\r\nContent-Type: text/plain',
    b'Content-Type: audio/wav\r\nContent-Disposition: form-data; name="%b"; filename="a.wav"',
    b"Content-Disposition: form-data; name=\"%b\"; filename=a.wav; filename*=UTF-8''a.wav",
    b"Content-Disposition: form-data; name=%b",
    b"Content-Disposition: form-data; name=\"%b\"; filename*=UTF-8''a.wav",
)

_parts = st.lists(st.tuples(st.sampled_from(HEADS), st.sampled_from(FIELD_NAMES), st.sampled_from(FIELD_VALUES)), max_size=4)
_form_pieces = (
    b"\r\n",
    b"--",
    b"--XX-7",
    b"\r\n--XX-7--",
    b"\r\n\r\n",
    b'"',
    b"; name=",
    b'; filename="x"',
    b"Content-Transfer-Encoding: x\r\n",
)
_form_edits = st.lists(edits(_form_pieces), max_size=3)
_types = st.sampled_from(
    [FORM_TYPE, FORM_TYPE, FORM_TYPE, b"multipart/form-data; boundary=XX-7; a=b", b"multipart/form-data", b"\xff"]
)


def write_form(parts: list[tuple[bytes, bytes, bytes]]) -> bytes:
    return b"".join(b"--%b\r\n%b\r\n\r\n%b\r\n" % (BOUNDARY, head % name, value) for head, name, value in parts) + b"--XX-7--\r\n"


@effort(300)
@given(_parts, _form_edits, _types, st.sampled_from(audio.OPERATIONS), st.sampled_from(["vllm", "openai"]))
def test_a_form_is_refused_or_read_for_what_is_in_it(
    parts: list[tuple[bytes, bytes, bytes]],
    changes: list[Callable[[bytes], bytes]],
    content_type: bytes,
    operation: EngineOperation[Any],
    kind: str,
) -> None:  # failure 36
    body = write_form(parts)
    for change in changes:
        body = change(body)
    record = record_of(body)
    try:
        form = read_form(body, content_type)
        for value in form.fields.values():
            assert b"\r\n\r\n%b\r\n--%b" % (value, BOUNDARY) in body
        if not changes:
            assert form.fields == dict(_fields(parts))
        request = operation.read(body, record, content_type)
        upstream = operation.prepare(body, request, kind)
    except InvalidRequest:
        return
    assert decode_record(encode_record(Phase.OPENING, record)) == record
    sent = read_form(upstream.whole, upstream.content_type).fields
    added = {name: value for name, value in sent.items() if name not in form.fields}
    assert {name: sent[name] for name in form.fields} == form.fields
    assert set(added) <= {"stream_include_usage", "stream_continuous_usage_stats"}
    assert set(added.values()) <= {b"true"}


def _fields(parts: list[tuple[bytes, bytes, bytes]]) -> Iterator[tuple[str, bytes]]:
    return ((name.decode("utf-8", "replace"), value) for head, name, value in parts if b"filename=" not in head)
