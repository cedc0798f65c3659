"""Event framing: bytes in, events out, wherever the bytes are cut."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.wire.sse import Framer, OversizedEvent, data_of

LIMIT = 1 << 20


def frame(*pieces: bytes, limit: int = LIMIT) -> tuple[list[bytes], bytes]:
    """(the whole events, what is left)."""
    framer = Framer(limit)
    events = [event for piece in pieces for event in framer.feed(piece)]
    return events, framer.rest()


def cut(text: bytes, places: list[int]) -> list[bytes]:
    places = [0, *sorted({place % (len(text) + 1) for place in places}), len(text)]
    return [text[start:stop] for start, stop in pairwise(places)]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
def test_events_end_with_a_blank_line(end: bytes) -> None:
    one, two = b"data: 1" + end * 2, b"data: 2" + end * 2
    assert frame(one + two) == ([one, two], b"")


@pytest.mark.parametrize(
    ("text", "events", "rest"),
    [
        (b"", [], b""),
        (b"data: 1", [], b"data: 1"),
        (b"data: 1\n", [], b"data: 1\n"),
        (b"data: 1\n\ndata: 2", [b"data: 1\n\n"], b"data: 2"),
        (b": a comment\n\n", [b": a comment\n\n"], b""),
        (b"\n\ndata: 1\n\n", [b"\n\n", b"data: 1\n\n"], b""),
        (b"data: 1\n\r\ndata: 2\r\n\n", [b"data: 1\n\r\n", b"data: 2\r\n\n"], b""),
        (b"data: a\rb: c\r\r", [b"data: a\rb: c\r\r"], b""),
        # After LF CR the next byte decides where the event ends.
        (b"data: 1\n\r", [], b"data: 1\n\r"),
        (b"data: 1\n\rdata: 2\n\n", [b"data: 1\n\r", b"data: 2\n\n"], b""),
        (b"data: 1\n\r\ndata: 2\n\n", [b"data: 1\n\r\n", b"data: 2\n\n"], b""),
    ],
)
def test_where_an_event_ends(text: bytes, events: list[bytes], rest: bytes) -> None:
    assert frame(text) == (events, rest)


def test_an_event_of_four_byte_characters_may_be_cut_anywhere() -> None:
    event = "data: 👩‍👩‍👧‍👦 日本\n\n".encode()
    for at in range(len(event) + 1):
        assert frame(event[:at], event[at:]) == ([event], b"")


_parts = st.sampled_from(
    [b"\r", b"\n", b"\r\n", b"\n\n", b"\r\r", b"data: x", b"data:", b":", b"id: 7", b"event: e", b"\xf0\x9f\x91\x8b", b"{}", b" "]
)
_texts = st.lists(_parts, max_size=40).map(b"".join)


@settings(deadline=None)
@given(_texts, st.lists(st.integers(0, 1000), max_size=12))
def test_any_cut_gives_the_same_events_and_the_same_bytes(text: bytes, places: list[int]) -> None:
    whole = frame(text)
    assert b"".join(whole[0]) + whole[1] == text
    assert frame(*cut(text, places)) == whole
    assert frame(*(text[i : i + 1] for i in range(len(text)))) == whole


def dispatched(text: bytes) -> list[bytes]:
    """The data of the events, as WHATWG HTML §9.2.6 has them dispatched: line by line."""
    events: list[bytes] = []
    lines: list[bytes] = []
    for line in re.split(rb"\r\n|\n|\r", text):
        if not line:
            events += [b"\n".join(lines)] if lines else []
            lines = []
        field, _, value = line.partition(b":")
        if field == b"data":
            lines.append(value.removeprefix(b" "))
    return events


@settings(deadline=None)
@given(_texts)
def test_the_data_is_what_the_specification_dispatches(text: bytes) -> None:
    text += b"\n\n"  # what isn't ended by a blank line isn't dispatched
    events, rest = frame(text)
    assert rest in (b"", b"\n")
    assert [data for event in events if (data := data_of(event)) is not None] == dispatched(text)


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data: 1\n\n", b"1"),
        (b"data:1\n\n", b"1"),
        (b"data:  1 \n\n", b" 1 "),
        (b"data\n\n", b""),
        (b"data: 1\ndata: 2\n\n", b"1\n2"),
        (b"data: 1\r\ndata: 2\r\n\r\n", b"1\n2"),
        (b"event: e\nid: 1\nretry: 5\ndata: 1\n\n", b"1"),
        (b"\xef\xbb\xbfdata: 1\n\n", b"1"),
        (b": data: 1\n\n", None),
        (b"dataset: 1\n\n", None),
        (b" data: 1\n\n", None),
        (b"\n\n", None),
        (b"data: 1", b"1"),
    ],
)
def test_the_data_of_an_event(event: bytes, data: bytes | None) -> None:
    assert data_of(event) == data


def test_an_event_is_bounded() -> None:  # failure 14
    framer = Framer(100)
    assert framer.feed(b"data: " + b"x" * 94) == []
    with pytest.raises(OversizedEvent, match="more than 100 bytes"):
        framer.feed(b"y")


def test_events_may_be_many_but_not_long() -> None:
    event = b"data: " + b"x" * 50 + b"\n\n"
    assert frame(event * 100, limit=100) == ([event] * 100, b"")


def test_an_empty_framer_says_so() -> None:
    framer = Framer(100)
    assert framer.empty
    framer.feed(b"data")
    assert not framer.empty
    framer.feed(b"\n\n")
    assert framer.empty
