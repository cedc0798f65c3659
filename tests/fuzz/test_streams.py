"""What an engine may send as a stream: whatever it is, the client gets what the contract says, and the record can be kept.

Streams of real servers, their events dropped, doubled, moved and mixed with others', with other values, bytes and line ends.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from proxy.exchange import Phase, Record, decode_record, encode_record
from proxy.wire.events import EventObserver
from proxy.wire.messages import MessagesObserver
from proxy.wire.observer import MAX_WITHHELD_BYTES, Observer
from proxy.wire.operation import Watch
from proxy.wire.responses import ResponsesObserver
from proxy.wire.sse import Framer, OversizedEvent, data_of
from proxy.wire.stream import StreamObserver, Terms
from tests.fuzz.effort import effort
from tests.fuzz.mutation import cuts, edits, odd_values
from tests.support.scripted_vllm import captured

MAX_COUNT: Final = 2**63 - 1
RECORD_BYTES: Final = 4096
"""A record of one choice, however odd its stream was; each further choice may take `CHOICE_BYTES`."""
CHOICE_BYTES: Final = 300

STREAMS: Final = {name: captured.load(name).blocks() for name in captured.names(streamed=True)}
TYPED: Final = ("messages_stream", "responses_stream")
CHUNKED: Final = tuple(name for name in STREAMS if name not in TYPED)

ODD_EVENTS: Final = (
    *(
        b"\n\n",
        b"\r\n\r\n",
        b"\r\r",
        b"\n",
        b"\r",
        b":\n\n",
        b": keep-alive\n\n",
        b"id: 1\nretry: 2\n\n",
        b"event: ping\n\n",
        b"data\n\n",
    ),
    *(
        b"data: [DONE]\n\n",
        b"data:[DONE]\n\n",
        b"data: [DONE]",
        b"data: {}\n\n",
        b"data: []\n\n",
        b"data: null\n\n",
        b"data: {\n\n",
    ),
    *(b"\xef\xbb\xbf", b"\xef\xbb\xbfdata: {}\n\n", b"data: \xff\n\n", b"data: " + b"[" * 3000 + b"\n\n", b"x" * 5000),
    b'data: {"error":{"message":"no","type":"x","code":500}}\n\n',
    b'data: {"error":null}\n\n',
    b'data: {"choices":null,"error":{"message":"no"}}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":4},'
    b'"completion_tokens_details":{"reasoning_tokens":3}},"system_fingerprint":"f"}\n\n',
    b'data: {"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":"stop"}]}\n\n',
    b'data: {"choices":[{"index":1,"delta":{"content":"x"},"finish_reason":"length"}],"usage":{"prompt_tokens":5,'
    b'"completion_tokens":6}}\n\n',
    b'data: {"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": null}], "usage": null}\n\n',
    b'data: {"choices":[{"finish_reason":"%b"}]}\n\n' % (b"s" * 3000),
    b'event: error\ndata: {"type":"error","error":{"type":"x","message":"no"}}\n\n',
    b'event: error\ndata: {"type":"error","code":"x","message":"no","sequence_number":3}\n\n',
    b"event: error\ndata: \xff\n\n",
    b'data: {"type":"message_stop"}\n\n',
    b'event: message_delta\ndata: {"delta":{"stop_reason":"%b"},"usage":{"input_tokens":3,"output_tokens":%d}}\n\n'
    % (b"s" * 3000, MAX_COUNT),
    b'event: message_start\ndata: {"message":{"usage":{"input_tokens":%d,"cache_read_input_tokens":9}}}\n\n' % MAX_COUNT,
    b'event: response.failed\ndata: {"response":{"status":"failed","error":{"message":"no"}}}\n\n',
    b'event: response.incomplete\ndata: {"response":{"incomplete_details":{"reason":"%b"}}}\n\n' % (b"s" * 3000),
)

ALL_EVENTS: Final = tuple(event for events in STREAMS.values() for event in events)
LINE_ENDS: Final = (b"\n", b"\r\n", b"\r")


class Case(NamedTuple):
    """A stream, and who watches it."""

    body: bytes
    watch: Watch
    terms: Terms
    choices: int
    limit: int

    def record(self) -> Record:
        return Record(b"i" * 16, b"t" * 16, 1, 0, choices=self.choices, request_bytes=400)

    def observer(self, record: Record) -> Observer:
        return self.watch(record, self.terms, limit=self.limit, fingerprint=b',"system_fingerprint":"known"')


class Watched(NamedTuple):
    out: bytes
    """What could go out before the end."""
    tail: bytes
    """What was withheld until then."""
    record: Record
    observer: Observer
    oversized: bool

    @property
    def client(self) -> bytes:
        return self.out + self.tail

    @property
    def facts(self) -> tuple[object, ...]:
        seen = self.observer
        return (
            self.client,
            self.record,
            seen.done,
            seen.answered,
            seen.whole,
            seen.first_error,
            seen.error_event,
            seen.fingerprint,
        )


def watch(case: Case, reads: Iterable[bytes], settle_after: Sequence[int] = ()) -> Watched:
    """Feed a stream in these reads, all at the same time; write a progress record after some of them."""
    record = case.record()
    observer = case.observer(record)
    out = b""
    oversized = False
    try:
        for number, data in enumerate(reads):
            out += observer.feed(data, 5)
            assert len(observer.tail) <= MAX_WITHHELD_BYTES + case.limit + len(data)
            if number in settle_after:
                observer.settle()
                check(record)
            if observer.done:
                break
        observer.end(5)
    except OversizedEvent:
        oversized = True
    observer.settle()
    return Watched(out, observer.tail, record, observer, oversized)


def check(record: Record) -> None:
    """It can be kept, and a ledger can hold what it says."""
    for phase in Phase:
        kept = encode_record(phase, record)
        assert decode_record(kept) == record
        assert len(kept) <= RECORD_BYTES + CHOICE_BYTES * record.choices
    for name in record.__struct_fields__:
        value = getattr(record, name)
        for number in value if name == "inter_token_counts" else [value]:
            assert not isinstance(number, int) or 0 <= number <= MAX_COUNT, name
    assert record.cached_tokens <= record.input_tokens
    assert record.reasoning_tokens <= record.output_tokens


# --- streams ----------------------------------------------------------------------------------------------------------


def _event_edit(position: int, what: str, other: bytes) -> Callable[[list[bytes]], list[bytes]]:
    def edit(events: list[bytes]) -> list[bytes]:
        at = position % (len(events) + 1)
        match what:
            case "drop":
                return events[:at] + events[at + 1 :]
            case "double":
                return events[: at + 1] + events[at:]
            case "swap":
                return events[:at] + events[at : at + 2][::-1] + events[at + 2 :]
            case "stop":
                return events[:at]
            case _:
                return [*events[:at], other, *events[at:]]

    return edit


_place = st.integers(0, 30)
_others = st.sampled_from(ODD_EVENTS) | st.sampled_from(ALL_EVENTS)
_event_edits = st.lists(
    st.builds(_event_edit, _place, st.sampled_from(["insert", "insert", "drop", "double", "swap", "stop"]), _others), max_size=5
)
_value_edits = st.lists(st.tuples(_place, odd_values()), max_size=3)
_byte_edits = st.lists(edits(ODD_EVENTS), max_size=3)
_line_ends = st.none() | st.lists(st.sampled_from(LINE_ENDS), min_size=1, max_size=4)


@st.composite
def _streams(draw: st.DrawFn, events: st.SearchStrategy[list[bytes]]) -> bytes:
    stream = draw(events)
    for edit in draw(_event_edits):
        stream = edit(stream)
    for place, change in draw(_value_edits):
        if stream:
            at = place % len(stream)
            stream = [*stream[:at], change(stream[at]), *stream[at + 1 :]]
    body = b"".join(stream)
    if ends := draw(_line_ends):
        *lines, rest = body.split(b"\n")
        body = b"".join([line + ends[number % len(ends)] for number, line in enumerate(lines)]) + rest
    for change in draw(_byte_edits):
        body = change(body)
    return body


def streams(names: Sequence[str]) -> st.SearchStrategy[bytes]:
    """A real one with some changes, or a few events of any, with some changes."""
    return _streams(st.sampled_from([STREAMS[name] for name in names]) | st.lists(_others, max_size=8))


_chunked, _typed = streams(CHUNKED), streams(TYPED)
_observers: st.SearchStrategy[type[EventObserver]] = st.sampled_from([MessagesObserver, ResponsesObserver])
_numbers = st.integers(1, 4)
_agreed = st.one_of(
    st.builds(Terms, n=st.integers(1, 3)),
    st.builds(Terms, cut_usage=st.just(True), n=st.integers(1, 3)),
    st.builds(
        Terms, cut_usage=st.just(True), drop_usage_chunk=st.just(True), move_fingerprint=st.booleans(), n=st.integers(1, 3)
    ),
)
_limits = st.sampled_from([1 << 20, 1 << 20, 1000, 300])
_settled = st.lists(st.integers(0, 30), max_size=4)


@st.composite
def chunk_cases(draw: st.DrawFn) -> Case:
    return Case(draw(_chunked), StreamObserver, draw(_agreed), draw(_numbers), draw(_limits))


@st.composite
def typed_cases(draw: st.DrawFn) -> Case:
    return Case(draw(_typed), draw(_observers), Terms(), 1, draw(_limits))


# --- what must hold ---------------------------------------------------------------------------------------------------


def events_of(body: bytes) -> list[bytes]:
    framer = Framer(len(body) + 1)
    events = framer.feed(body)
    return [*events, rest] if (rest := framer.rest()) else events


def look(case: Case, cut: Callable[[bytes], list[bytes]], settle_after: list[int]) -> Watched:
    """Watch it in three ways, which must come to the same."""
    whole = watch(case, [case.body])
    check(whole.record)
    longest = max(map(len, events_of(case.body)), default=0)
    for other in (watch(case, cut(case.body)), watch(case, cut(case.body), settle_after)):
        check(other.record)
        if other.oversized or whole.oversized:
            assert longest > case.limit
        else:
            assert other.facts == whole.facts
    return whole


@effort(150)
@given(typed_cases(), cuts(), _settled)
def test_typed_events_pass_as_they_came_up_to_their_end(
    case: Case, cut: Callable[[bytes], list[bytes]], settle_after: list[int]
) -> None:  # failures 13, 16, 24
    seen = look(case, cut, settle_after)
    if seen.observer.first_error is not None:
        assert seen.client == b""
        msgspec.json.decode(seen.observer.first_error, type=dict[str, msgspec.Raw])
    elif seen.oversized:
        assert case.body.startswith(seen.out)
    else:
        assert seen.client == case.body[: len(seen.client)]
        assert seen.observer.done or seen.client == case.body


@effort(300)
@given(chunk_cases(), cuts(), _settled)
def test_of_chunks_only_what_was_not_asked_for_is_taken_out(
    case: Case, cut: Callable[[bytes], list[bytes]], settle_after: list[int]
) -> None:  # failures 13, 16, 17, 24
    seen = look(case, cut, settle_after)
    if seen.observer.first_error is not None:
        assert seen.client == b""
        msgspec.json.decode(seen.observer.first_error, type=dict[str, msgspec.Raw])
    elif not seen.oversized:
        expected = Expected(case.terms, events_of(case.body))
        assert expected.allows(seen.client, seen.observer.done)
    assert not any(is_done(event) for event in events_of(seen.out))


@effort(60)
@given(chunk_cases() | typed_cases(), cuts())
def test_what_follows_the_end_is_nobodys(case: Case, cut: Callable[[bytes], list[bytes]]) -> None:
    """Fed on although it is over, as a read may bring more than the end."""
    record = case.record()
    observer = case.observer(record)
    try:
        for data in cut(case.body):
            done, tail, known = observer.done, observer.tail, encode_record(Phase.CLOSING, record)
            out = observer.feed(data, 5)
            if done:
                assert (out, observer.tail, encode_record(Phase.CLOSING, record)) == (b"", tail, known)
    except OversizedEvent:
        pass


def is_done(event: bytes) -> bool:
    return (data_of(event) or b"").strip() == b"[DONE]"


class Expected:
    """What a client may see of chunks, by Python's own JSON."""

    def __init__(self, terms: Terms, events: list[bytes]) -> None:
        self._terms = terms
        self._events = events
        self._fingerprints = [b',"system_fingerprint":"known"', *(found for event in events for found in _fingerprints(event))]

    def allows(self, client: bytes, done: bool) -> bool:
        ends = {0}
        for event in self._events:
            if done and is_done(event):
                return any(client[end:] == event for end in ends)
            ends = {end + len(may) for end in ends for may in self._may_be(event) if client.startswith(may, end)}
        return not done and len(client) in ends

    def _may_be(self, event: bytes) -> set[bytes]:
        """What may become of an event that is no end."""
        terms = self._terms
        without = set(_without_usage(event)) if terms.cut_usage else set()
        chunk = _plain_chunk(event)
        if chunk is None:
            may = {event, *without}  # not as any engine writes: cutting is best effort
            if terms.drop_usage_chunk:
                may.add(b"")
        elif not chunk["choices"]:
            may = {b"" if terms.drop_usage_chunk and chunk.get("usage") is not None else event}
        elif self._uninvited(chunk):
            rest = {name: value for name, value in chunk.items() if name != "usage"}
            may = {each for each in without if _plain_chunk(each) == rest}
        else:
            may = {event}
        if terms.move_fingerprint and b'"finish_reason"' in event:
            may |= {each[:at] + field + each[at:] for each in may for field in self._fingerprints if (at := each.rfind(b"}"))}
        return may

    def _uninvited(self, chunk: dict[str, Any]) -> bool:
        """Its usage is what the proxy asked for, and not the client."""
        if chunk.get("usage", "") is None:
            return self._terms.drop_usage_chunk
        return self._terms.cut_usage and isinstance(chunk.get("usage"), dict)


def _plain_chunk(event: bytes) -> dict[str, Any] | None:
    """A chunk written as engines write: one `data:` line, compact or as Python's `json.dumps` does, nothing twice."""
    lines = event.rstrip(b"\r\n").splitlines()
    if len(lines) != 1 or (data := data_of(event)) is None:
        return None
    try:
        chunk = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    written = [json.dumps(chunk, separators=style, ensure_ascii=False).encode("utf-8", "replace") for style in ((",", ":"), None)]
    if data not in written or not isinstance(chunk, dict) or not isinstance(chunk.get("choices"), list):
        return None
    usage = chunk.get("usage", {})
    usable = all(isinstance(choice, dict) for choice in chunk["choices"]) and not isinstance(usage, (int, float))
    return chunk if usable and not _has_braces_in_strings(usage) else None


def _has_braces_in_strings(value: object) -> bool:
    """By its braces the end of a usage, an object of numbers, is found."""
    if isinstance(value, dict):
        return any(map(_has_braces_in_strings, (*value, *value.values())))
    if isinstance(value, list):
        return any(map(_has_braces_in_strings, value))
    return isinstance(value, str) and ("{" in value or "}" in value)


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _without_usage(event: bytes) -> Iterable[bytes]:
    """Every way to take out a member `"usage"` with the comma before it."""
    for name in (b',"usage":', b', "usage": '):
        at = event.find(name)
        while at >= 0:
            yield from (event[:at] + event[stop:] for stop in _ends(event, at + len(name)))
            at = event.find(name, at + 1)


def _ends(event: bytes, start: int) -> list[int]:
    if event.startswith(b"null", start):
        return [start + 4]
    return [at + 1 for at in range(start, len(event)) if event[at : at + 1] == b"}"]


def _fingerprints(event: bytes) -> list[bytes]:
    at = event.find(b',"system_fingerprint":"')
    return [event[at : event.index(b'"', at + 23) + 1]] if at >= 0 and b'"' in event[at + 23 :] else []
