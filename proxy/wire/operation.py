"""What an endpoint is: the shape that every file of this folder fills in."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from msgspec import Raw, Struct

from proxy.exchange import Record, UsageSource
from proxy.wire.body import Request
from proxy.wire.stream import Terms
from proxy.wire.usage import Usage, read_engine_timings, read_usage, write_usage

MAX_TEXT = 256
"""Of a caller's text that goes on the record, characters."""


Upstream = tuple[bytes, Terms]
"""What goes to an engine for a request, and what was agreed about its stream."""


class Operation(Struct, frozen=True, kw_only=True):
    """One endpoint. A plain one is answered from the snapshot and reaches no engine."""

    name: str
    method: bytes
    path: bytes


class EngineOperation(Operation, frozen=True, kw_only=True):
    """One endpoint that an engine answers.

    `read` turns a body into a Request and writes its facts on the record (raises InvalidRequest). `prepare` makes what goes
    upstream, for an engine of the given kind. `observe` reads a whole answer's facts onto the record. `generates`: an answer has
    output tokens.
    """

    read: Callable[[bytes, Record], Request]
    prepare: Callable[[bytes, Request, str], Upstream]
    observe: Callable[[bytes, Record], None]
    generates: bool = True


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
    """Usage, finish reasons and timings of a whole answer. What can't be read is left unknown: the answer goes out as it is."""
    try:
        answer = _answer.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        _observe_odd_answer(body, record)
        return
    for choice in answer.choices or ():
        if choice.finish_reason:
            record.finish_reasons.append(choice.finish_reason)
    if answer.usage is not None:
        write_usage(answer.usage, record)
    if len(answer.metrics) > len(b"null") or len(answer.timings):
        record.engine = read_engine_timings(bytes(answer.metrics), bytes(answer.timings))


def observe_end_of_answer(end: bytes, record: Record) -> None:
    """The usage of an answer of which only the end was kept: engines write it last, or nearly so."""
    at = end.rfind(b'"usage":')
    if at < 0:
        return
    start = at + len(b'"usage":')
    for stop in range(end.find(b"}", start) + 1, len(end) + 1):
        if end[stop - 1 : stop] == b"}" and (usage := read_usage(end[start:stop])) is not None:
            write_usage(usage, record)
            return


def _observe_odd_answer(body: bytes, record: Record) -> None:
    try:
        raw = bytes(_any_answer.decode(body).usage)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return
    if (usage := read_usage(raw)) is not None:
        write_usage(usage, record)


def estimate(record: Record, answer_bytes: int) -> None:
    """An answer without usage: four bytes a token is the usual guess; the row says that it is one."""
    record.input_tokens = record.request_bytes // 4
    record.output_tokens = answer_bytes // 4
    record.usage_source = UsageSource.ESTIMATED
