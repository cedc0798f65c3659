"""What an endpoint is: the shape that every file of this folder fills in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import msgspec
from msgspec import Raw, Struct

from proxy.errors import ProxyError, UpstreamMalformed
from proxy.exchange import Record, UsageSource
from proxy.wire.body import Change, Reader, Request, apply
from proxy.wire.caching import Caching
from proxy.wire.observer import Observer
from proxy.wire.stream import StreamObserver, Terms
from proxy.wire.usage import Usage, read_engine_timings, read_usage, write_finish_reason, write_usage

MAX_TEXT = 256
"""Of a caller's text that goes on the record, characters."""


R = TypeVar("R", bound=Request)

JSON = b"application/json"
FORM = b"multipart/form-data"


_AS_IT_COMES = Terms()


class Upstream(Struct, frozen=True, gc=False):
    """What goes to an engine for a request, and what was agreed about its stream. `body` is the caller's, or an end of it."""

    body: bytes | memoryview
    terms: Terms = _AS_IT_COMES
    content_type: bytes = JSON
    before: bytes = b""
    """What goes before the body: a large one isn't copied to add something to it."""
    changes: tuple[Change, ...] = ()
    """What is different in the body."""

    def changed(self, changes: tuple[Change, ...]) -> Upstream:
        """The same, with these changes too."""
        return msgspec.structs.replace(self, changes=self.changes + changes)

    @property
    def pieces(self) -> tuple[bytes | memoryview, ...]:
        return self.before, *apply(self.changes, self.body)

    @property
    def whole(self) -> bytes:
        return b"".join(self.pieces)


class Watch(Protocol):
    """Makes what watches a stream of this kind."""

    def __call__(self, record: Record, terms: Terms, *, limit: int, fingerprint: bytes = b"") -> Observer: ...


class Operation(Struct, frozen=True, kw_only=True):
    """One endpoint. A plain one is answered from the snapshot and reaches no engine. `error`: an error in this API's shape."""

    name: str
    method: bytes
    path: bytes
    error: Callable[[ProxyError], bytes] = ProxyError.body


def _no_facts(request: Request, record: Record) -> None:
    """Nothing but the model."""


class RelayedOperation(Operation, frozen=True, kw_only=True):
    """One endpoint whose answer comes from elsewhere.

    `prepare` makes what goes there, for an engine of the given kind. `observe` reads a whole answer's facts onto the record
    (raises UpstreamMalformed for what isn't JSON; `text`: an answer may be plain text instead, in which there are none), `watch`
    makes what watches a stream. `usage` reads this API's `usage` object. `estimate` books an answer of so many bytes whose
    engine didn't say what it took.
    """

    prepare: Callable[[bytes, Any, str], Upstream]
    observe: Callable[[bytes, Record], None]
    estimate: Callable[[Record, int], None]
    usage: Callable[[bytes], Usage | None] = read_usage
    watch: Watch = StreamObserver
    text: bool = False


class EngineOperation(RelayedOperation, Generic[R], frozen=True, kw_only=True):
    """One endpoint that an engine answers.

    `read` turns a body and its content type into a Request and writes its facts on the record (raises InvalidRequest); `facts`
    writes them once more, for a request to which something was added. `media`: what a request's body must be. `counted`: it takes
    tokens; `generates`: also for an answer. `lists`: in how many of them content parts lie, which may name URLs; 0: there are
    none. `prompt`: what of a request an engine reads its prompt from, in the order in which it does. `continues`: the
    id of the answer that a request goes on from, "" if it doesn't; `answer_id`: the id that an answer has for that, read from its
    last bytes.
    """

    read: Callable[[bytes, Record, bytes], R]
    prompt: Callable[[R], tuple[bytes, ...]] | None = None
    continues: Callable[[R], str] | None = None
    answer_id: Callable[[bytes], str] | None = None
    facts: Callable[[R, Record], object] = _no_facts
    media: bytes = JSON
    lists: int = 2
    counted: bool = True
    generates: bool = False
    caching: Caching | None = None
    """None: its answers are never given again."""


_read_request = Reader(Request)


def read_without_stream(body: bytes, record: Record, content_type: bytes = b"") -> Request:
    """For `read`: a request that is never answered with a stream, and of which only the model matters."""
    request = _read_request(body)
    request.stream = False
    record.model = (request.model or "")[:MAX_TEXT]
    return request


def as_it_came(body: bytes, request: Request, kind: str) -> Upstream:
    """For `prepare`: the engine tells all there is to know without being asked."""
    return Upstream(body)


class _Choice(Struct, gc=False):
    finish_reason: str | None = None


class _Answer(Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: Usage | None = None
    metrics: Raw = Raw(b"")
    timings: Raw = Raw(b"")


class _AnyAnswer(Struct, gc=False):
    usage: Raw = Raw(b"")


_answer = msgspec.json.Decoder(_Answer)
_any_answer = msgspec.json.Decoder(_AnyAnswer)


def observe_answer(body: bytes, record: Record) -> None:
    """Usage, finish reasons and timings of a whole answer. JSON of another shape goes out as it is, its facts unknown. Raises
    UpstreamMalformed for what isn't JSON."""
    try:
        answer = _answer.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        _observe_odd_answer(body, record)
        return
    for choice in answer.choices or ():
        write_finish_reason(choice.finish_reason, record)
    if answer.usage is not None:
        write_usage(answer.usage, record)
    if len(answer.metrics) > len(b"null") or len(answer.timings):
        record.engine = read_engine_timings(bytes(answer.metrics), bytes(answer.timings))


def observe_end_of_answer(end: bytes, record: Record, read: Callable[[bytes], Usage | None]) -> None:
    """The usage of an answer of which only the end was kept: engines write it last, or nearly so."""
    at = end.rfind(b'"usage":')
    if at < 0:
        return
    start = at + len(b'"usage":')
    for stop in range(end.find(b"}", start) + 1, len(end) + 1):
        if end[stop - 1 : stop] == b"}" and (usage := read(end[start:stop])) is not None:
            write_usage(usage, record)
            return


def _observe_odd_answer(body: bytes, record: Record) -> None:
    raw = read_any_answer(body)
    if (usage := read_usage(raw)) is not None:
        write_usage(usage, record)


def read_any_answer(body: bytes) -> bytes:
    """The `usage` of JSON of any shape, nothing where there is none. Raises UpstreamMalformed for what isn't JSON."""
    try:
        return bytes(_any_answer.decode(body).usage)
    except (msgspec.ValidationError, RecursionError):
        return b""
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise UpstreamMalformed("The engine's answer isn't JSON.") from None


def nothing_to_observe(body: bytes, record: Record) -> None:
    """For `observe`: an answer that says nothing of what it took. Raises UpstreamMalformed."""
    read_any_answer(body)


# -- for `estimate`: an answer without usage. Four bytes a token is the usual guess; the row says that it is one --


def estimate_output(record: Record, answer_bytes: int) -> None:
    record.input_tokens = record.request_bytes // 4
    record.output_tokens = answer_bytes // 4
    record.usage_source = UsageSource.ESTIMATED


def estimate_input(record: Record, answer_bytes: int) -> None:
    """Of an answer that isn't generated."""
    record.input_tokens = record.request_bytes // 4
    record.usage_source = UsageSource.ESTIMATED


def nothing_to_estimate(record: Record, answer_bytes: int) -> None:
    """Of an answer that took no tokens."""
