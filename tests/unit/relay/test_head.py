"""The head of an engine's answer: forwarded as it is, but for what belongs to one hop."""

from __future__ import annotations

import pytest

from proxy.relay.head import Shape, shape_of, without_hop_by_hop, without_length
from tests.support.scripted_vllm import captured
from tests.support.scripted_vllm.answers import render_head

OK = b"HTTP/1.1 200 OK"


@pytest.mark.parametrize(
    ("lines", "shape"),
    [
        (b"", Shape(sized=False, until_close=True, event_stream=False, hop_by_hop=False)),
        (b"content-length: 5", Shape(sized=True, until_close=False, event_stream=False, hop_by_hop=False)),
        (b"Content-Length: 5", Shape(sized=True, until_close=False, event_stream=False, hop_by_hop=False)),
        (b"Transfer-Encoding: chunked", Shape(sized=False, until_close=False, event_stream=False, hop_by_hop=True)),
        (b"connection: close", Shape(sized=False, until_close=True, event_stream=False, hop_by_hop=True)),
        (b"content-type: text/event-stream", Shape(sized=False, until_close=True, event_stream=True, hop_by_hop=False)),
        (
            b"Content-Type: Text/Event-Stream; charset=utf-8\r\ncontent-length: 1",
            Shape(sized=True, until_close=False, event_stream=True, hop_by_hop=False),
        ),
        (
            b"content-type: Text/Plain; charset=utf-8\r\nContent-Encoding: gzip\r\ncontent-length: 1",
            Shape(sized=True, until_close=False, event_stream=False, hop_by_hop=False, encoded=True, text=True),
        ),
        (
            b"content-encoding: Identity\r\ncontent-length: 1",
            Shape(sized=True, until_close=False, event_stream=False, hop_by_hop=False),
        ),
        (b"x-note: content-length: 5", Shape(sized=False, until_close=True, event_stream=False, hop_by_hop=False)),
    ],
)
def test_what_a_head_says(lines: bytes, shape: Shape) -> None:
    head = OK + b"\r\n" + lines if lines else OK
    assert shape_of(head) == shape
    assert shape_of(head) == shape, "what was learnt is what was found"


def test_heads_that_differ_in_digits_are_alike() -> None:
    for name in captured.names(streamed=False):
        sample = captured.load(name)
        head = render_head(sample.status, sample.headers)[:-4]
        assert shape_of(head).sized == any(key == b"content-length" for key, _ in sample.headers)


def test_many_different_heads_are_no_memory() -> None:
    from proxy.relay import head

    for i in range(head._MAX_SHAPES + 100):
        name = "".join(chr(ord("a") + int(digit)) for digit in str(i)).encode()
        assert not shape_of(OK + b"\r\nx-%b: 1" % name).sized
    assert len(head._shapes) <= head._MAX_SHAPES


@pytest.mark.parametrize(
    ("head", "kept"),
    [
        (b"\r\nconnection: close\r\nx: 1", b"\r\nx: 1"),
        (b"\r\nX-Request-ID : a\r\nx: 1\r\nKeep-Alive: timeout=5", b"\r\nx: 1"),
        (b"\r\nTE: trailers\r\ntrailer: x\r\nUpgrade: h2c\r\nProxy-Connection: x\r\ntransfer-encoding: chunked", b""),
        (
            b"\r\nx-connection: a\r\nconnection-x: b\r\nx: connection: close",
            b"\r\nx-connection: a\r\nconnection-x: b\r\nx: connection: close",
        ),
    ],
)
def test_what_belongs_to_one_hop_stays_there(head: bytes, kept: bytes) -> None:
    assert without_hop_by_hop(OK + head) == OK + kept


def test_a_length_that_is_no_longer_true() -> None:
    head = OK + b"\r\nContent-Length: 55\r\nx-content-length: 7\r\nx: 1"
    assert without_length(head) == OK + b"\r\nx-content-length: 7\r\nx: 1"
