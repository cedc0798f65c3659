"""Streams of typed events: what is seen in those of a real vLLM, what is held back, and how each API says that one broke."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import UpstreamDisconnected
from proxy.exchange import Record, UsageSource
from proxy.wire.events import EventObserver
from proxy.wire.messages import MessagesObserver
from proxy.wire.responses import ResponsesObserver
from proxy.wire.stream import Terms
from tests.support.scripted_vllm import captured

MESSAGES = captured.load("messages_stream").body
RESPONSES = captured.load("responses_stream").body
KINDS: dict[str, tuple[type[EventObserver], bytes, bytes]] = {
    "messages": (MessagesObserver, MESSAGES, b"event: message_delta"),
    "responses": (ResponsesObserver, RESPONSES, b"event: response.completed"),
}
"""Kind → what watches it, a whole stream of a real vLLM, where its terminal bytes begin."""


def blank() -> Record:
    return Record(b"i" * 16, b"t" * 16, 1, 0, request_bytes=400)


def watch(kind: str, *pieces: bytes) -> tuple[EventObserver, Record, bytes]:
    """Feed the pieces, one a millisecond; → what watched, what it wrote down, what went out before the end."""
    record = blank()
    observer = KINDS[kind][0](record, Terms(), limit=1 << 20)
    out = b"".join([observer.feed(piece, (at + 1) * 1_000_000) for at, piece in enumerate(pieces)])
    return observer, record, out


def events(body: bytes) -> list[bytes]:
    return [event + b"\n\n" for event in body.split(b"\n\n") if event]


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_stream(kind: str) -> None:
    _, body, _ = KINDS[kind]
    observer, record, out = watch(kind, *events(body))
    observer.settle()
    assert out + observer.tail == body
    assert (record.input_tokens, record.output_tokens, record.usage_source) == (37, 8, UsageSource.ENGINE)
    assert (observer.done, observer.whole, observer.answered) == (True, True, True)
    assert record.first_token_ns == record.first_content_ns > 0
    assert sum(record.inter_token_counts) == 6  # seven tokens; the end of the sequence makes no event
    assert record.finish_reasons == {"messages": ["end_turn"], "responses": ["completed"]}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_terminal_bytes_are_held_back(kind: str) -> None:
    _, body, terminal = KINDS[kind]
    observer, _, out = watch(kind, body)
    assert out == body[: body.index(terminal)]
    assert observer.tail == body[body.index(terminal) :]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(KINDS)), st.lists(st.integers(1, 5400), max_size=12))
def test_any_borders_give_the_same(kind: str, cuts: list[int]) -> None:  # failure 13
    _, body, terminal = KINDS[kind]
    borders = [0, *sorted({min(cut, len(body)) for cut in cuts}), len(body)]
    pieces = [body[start:stop] for start, stop in pairwise(borders)]
    observer, record, out = watch(kind, *pieces)
    observer.settle()
    assert (out, observer.tail) == (body[: body.index(terminal)], body[body.index(terminal) :])
    assert (record.input_tokens, record.output_tokens, record.finish_reasons != []) == (37, 8, True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", [b"\r\n", b"\r"])
def test_other_line_ends_are_understood(kind: str, end: bytes) -> None:  # failure 13
    body = KINDS[kind][1].replace(b"\n", end)
    observer, record, out = watch(kind, body)
    observer.end(2)
    assert out + observer.tail == body
    assert (record.input_tokens, record.output_tokens) == (37, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_that_stops_early_is_broken_and_estimated(kind: str) -> None:  # failure 5
    observer, record, out = watch(kind, *events(KINDS[kind][1])[:8])
    observer.end(9)
    observer.settle()
    assert not observer.whole
    assert not observer.answered
    assert record.usage_source == UsageSource.ESTIMATED
    assert record.output_tokens > 0
    assert record.input_tokens == {"messages": 37, "responses": 100}[kind]  # messages say it at the beginning
    assert out


def test_how_messages_say_that_they_broke() -> None:  # failure 4
    observer, _, _ = watch("messages", *events(MESSAGES)[:5])
    event = observer.broken(UpstreamDisconnected('It said "no"\n.'))
    assert event.startswith(b"event: error\ndata: ")
    assert event.endswith(b"\n\n")
    assert json.loads(event[19:]) == {"type": "error", "error": {"type": "api_error", "message": 'It said "no"\n.'}}


@pytest.mark.parametrize(("seen", "number"), [(0, 0), (1, 1), (7, 7)])
def test_how_responses_say_that_they_broke(seen: int, number: int) -> None:  # failure 4
    observer, _, _ = watch("responses", *events(RESPONSES)[:seen])
    event = observer.broken(UpstreamDisconnected("Gone."))
    assert event.startswith(b"event: error\ndata: ")
    said = json.loads(event[19:])
    assert said == {
        "type": "error",
        "code": "upstream_disconnected",
        "message": "Gone.",
        "param": None,
        "sequence_number": number,
    }


def _event(name: str, **data: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), json.dumps({"type": name, **data}).encode())


def test_an_error_event_of_messages() -> None:  # failure 6
    error = _event("error", error={"type": "internal_error", "message": "Broken."})
    observer, _, out = watch("messages", error)
    assert (out, observer.tail, observer.done) == (b"", b"", True)
    assert json.loads(observer.first_error or b"") == {
        "type": "error",
        "error": {"type": "internal_error", "message": "Broken."},
    }
    observer, _, out = watch("messages", *events(MESSAGES)[:4], error)
    assert out.endswith(error)
    assert json.loads(observer.error_event or b"") == {"type": "internal_error", "message": "Broken."}
    assert observer.first_error is None


def test_an_error_event_of_responses() -> None:  # failure 6
    error = _event("error", code="server_error", message="Broken.", param=None, sequence_number=5)
    observer, _, out = watch("responses", error)
    assert out == b""
    assert json.loads(observer.first_error or b"")["error"]["message"] == "Broken."
    observer, _, out = watch("responses", *events(RESPONSES)[:4], error)
    assert out.endswith(error)
    assert json.loads(observer.error_event or b"")["code"] == "server_error"


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_after_something_has_gone_out_is_an_event(kind: str) -> None:  # failure 6
    error = _event("error", code="server_error", error={"type": "internal_error"})
    observer, _, out = watch(kind, b": keep-alive\n\n", error)
    assert out == b": keep-alive\n\n" + error
    assert (observer.first_error, observer.error_event is None) == (None, False)


def test_a_failed_response_has_an_end_and_an_error() -> None:
    failed = _event(
        "response.failed",
        response={"status": "failed", "error": {"code": "server_error", "message": "Broken."}, "usage": None},
        sequence_number=4,
    )
    observer, record, _ = watch("responses", *events(RESPONSES)[:4], failed)
    assert (observer.done, observer.tail) == (True, failed)
    assert json.loads(observer.error_event or b"")["message"] == "Broken."
    assert record.finish_reasons == ["failed"]


@pytest.mark.parametrize("name", ["response.completed", "response.incomplete"])
def test_a_response_that_ran_into_its_limit_says_why(name: str) -> None:
    usage = {"input_tokens": 5, "output_tokens": 3, "input_tokens_details": {"cached_tokens": 4}}
    response = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}, "usage": usage}
    observer, record, _ = watch("responses", _event(name, response=response, sequence_number=0))
    assert record.finish_reasons == ["max_output_tokens"]
    assert (record.input_tokens, record.cached_tokens, record.output_tokens) == (5, 4, 3)
    assert observer.done


@pytest.mark.parametrize(
    ("start", "end", "counts"),
    [
        ({"input_tokens": 30}, {"input_tokens": 7, "output_tokens": 3, "cache_read_input_tokens": 20}, (27, 20, 3)),
        ({"input_tokens": 30}, {"output_tokens": 3}, (30, 0, 3)),
        (
            {"input_tokens": 30},
            {"input_tokens": 7, "output_tokens": 0, "cache_creation_input_tokens": 2, "cache_read_input_tokens": 1},
            (10, 1, 0),
        ),
    ],
)
def test_messages_count_what_was_cached_apart(
    start: dict[str, int], end: dict[str, int], counts: tuple[int, int, int]
) -> None:  # failure 16
    observer, record, _ = watch(
        "messages",
        _event("message_start", message={"usage": start}),
        _event("message_delta", delta={"stop_reason": "end_turn"}, usage=end),
    )
    observer.settle()
    assert (record.input_tokens, record.cached_tokens, record.output_tokens) == counts
    assert record.usage_source == UsageSource.ENGINE


def test_what_messages_said_at_the_beginning_holds_until_they_say_otherwise() -> None:
    start, nothing = (
        _event("message_start", message={"usage": {"input_tokens": 30}}),
        _event("message_start", message={"usage": {}}),
    )
    observer, record, _ = watch("messages", start, nothing)
    observer.settle()
    assert record.input_tokens == 30
    observer, record, _ = watch("messages", _event("content_block_delta", delta={"type": "text_delta", "text": "a"}))
    observer.settle()
    observer.feed(_event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 3}), 1)
    assert (record.input_tokens, record.output_tokens, record.usage_source) == (0, 3, UsageSource.ENGINE), (
        "an estimate is no count"
    )


@pytest.mark.parametrize("usage", [None, {}, {"output_tokens": -1}, {"output_tokens": "x"}, {"output_tokens": 1.5}, 7])
def test_usage_that_says_nothing_is_estimated(usage: object) -> None:  # failure 16
    observer, record, _ = watch(
        "messages",
        _event("content_block_delta", delta={"type": "text_delta", "text": "a"}),
        _event("message_delta", delta={"stop_reason": "end_turn"}, usage=usage),
        _event("message_stop"),
    )
    observer.settle()
    assert (record.usage_source, record.output_tokens) == (UsageSource.ESTIMATED, 1)
    assert observer.whole


@pytest.mark.parametrize(
    ("kind", "event", "token", "content"),
    [
        ("messages", _event("content_block_delta", delta={"type": "thinking_delta", "thinking": "a"}), True, False),
        ("messages", _event("content_block_delta", delta={"type": "text_delta", "text": ""}), False, False),
        ("messages", _event("content_block_delta", delta={"type": "input_json_delta", "partial_json": "{"}), True, False),
        ("messages", _event("content_block_start", content_block={"type": "tool_use", "name": "f"}), True, False),
        ("messages", _event("content_block_start", content_block={"type": "text", "text": ""}), False, False),
        ("messages", _event("ping"), False, False),
        ("messages", b": comment\n\n", False, False),
        ("responses", _event("response.reasoning_text.delta", delta="a"), True, False),
        ("responses", _event("response.function_call_arguments.delta", delta="{"), True, False),
        ("responses", _event("response.output_text.delta", delta=""), False, False),
        ("responses", _event("response.output_text.delta", delta="a"), True, True),
        ("responses", b'data: {"type":"response.output_text.delta","delta":"a"}\n\n', True, True),
        ("responses", b"data: rubbish\n\n", False, False),
    ],
)
def test_what_a_token_is(kind: str, event: bytes, token: bool, content: bool) -> None:  # failure 15
    _, record, out = watch(kind, event)
    assert out == event
    assert (record.first_token_ns > 0, record.first_content_ns > 0) == (token, content)


@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_the_end_is_nobodys(kind: str) -> None:
    observer, _, _ = watch(kind, KINDS[kind][1], b"data: [DONE]\n\n")
    assert b"DONE" not in observer.tail
