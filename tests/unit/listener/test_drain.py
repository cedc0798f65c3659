"""A connection of a worker that drains: what was sent is answered, what is announced is kept, and only the idle are closed."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from time import monotonic_ns

import pytest

from tests.support.plane import KEY, Client, Plane
from tests.support.wire_client import request

SECOND = 1_000_000_000
QUIET = 6 * SECOND
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
PROBE = request("/health")
CLOSE = b"connection: close\r\n"


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Plane]:
    with Plane(tmp_path) as made:
        yield made


def ask(*, stream: bool = False) -> bytes:
    return request("/v1/chat/completions", {"model": "m", "messages": [], "stream": stream}, key=KEY)


def event(data: object) -> bytes:
    """In an HTTP chunk of its own."""
    text = b"data: %b\n\n" % (data if isinstance(data, str) else json.dumps(data)).encode()
    return b"%x\r\n%b\r\n" % (len(text), text)


def closed(plane: Plane, client: Client, later_ns: int, quiet_ns: int = QUIET) -> bool:
    plane.server.close_idle(monotonic_ns() + later_ns, quiet_ns)
    return client.closed != ""


def test_an_answer_that_has_not_begun_says_that_it_is_the_last(plane: Plane) -> None:
    client, engine = plane.client(), plane.engine()
    client.says(ask())
    plane.server.drain(monotonic_ns())
    engine.says(ANSWER)
    assert CLOSE in client.heard
    assert client.closed


def test_one_that_has_begun_keeps_its_connection_for_one_more_request(plane: Plane) -> None:
    client, engine = plane.client(), plane.engine()
    client.says(ask(stream=True))
    engine.says(HEAD + event({"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": None}]}))
    plane.server.drain(monotonic_ns())
    engine.says(event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}) + event("[DONE]") + b"0\r\n\r\n")
    assert client.heard.endswith(b"0\r\n\r\n")
    assert CLOSE not in client.heard
    assert not closed(plane, client, 0), "it has only just had its answer"
    client.says(PROBE)
    assert CLOSE in client.heard
    assert client.closed


def test_requests_that_came_before_their_turn_are_all_answered(plane: Plane) -> None:
    async def scenario() -> None:
        client, engine = plane.client(), plane.engine()
        client.says(ask() + PROBE + PROBE)
        plane.server.drain(monotonic_ns())
        engine.says(ANSWER)
        for _ in range(10):
            await asyncio.sleep(0)
        assert client.heard.count(b"HTTP/1.1 200") == 3
        assert client.heard.count(CLOSE) == 1
        assert client.heard.rpartition(b"HTTP/1.1 200")[2].count(CLOSE) == 1

    asyncio.run(scenario())


def test_an_idle_connection_is_closed_when_it_was_idle_for_long_enough(plane: Plane) -> None:
    client = plane.client()
    client.says(PROBE)
    plane.server.drain(monotonic_ns())
    assert not closed(plane, client, 0)
    assert plane.server.expectant
    assert not closed(plane, client, QUIET - SECOND)
    assert closed(plane, client, QUIET + SECOND)
    assert not plane.server.expectant


def test_where_everything_ends_it_is_closed_at_once(plane: Plane) -> None:
    client = plane.client()
    client.says(PROBE)
    plane.server.drain(monotonic_ns())
    assert closed(plane, client, 0, quiet_ns=0)


@pytest.mark.parametrize("said", [ask()[:-1], ask()], ids=["being sent", "being answered"])
def test_a_request_under_way_is_not_cut_off(plane: Plane, said: bytes) -> None:
    client, engine = plane.client(), plane.engine()
    client.says(said)
    plane.server.drain(monotonic_ns())
    assert not closed(plane, client, 1000 * SECOND)
    assert plane.server.expectant
    client.says(ask()[len(said) :])
    engine.says(ANSWER)
    assert b"HTTP/1.1 200" in client.heard


def test_what_lies_in_the_socket_is_a_request_too(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    client = plane.client()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        monkeypatch.setattr(client, "get_extra_info", lambda name, default=None: ours)
        plane.server.drain(monotonic_ns())
        theirs.sendall(PROBE)
        assert not closed(plane, client, QUIET + SECOND)
        client.says(ours.recv(1000))
        assert CLOSE in client.heard


def test_in_the_end_nobody_is_waited_for(plane: Plane) -> None:
    client = plane.client()
    client.says(ask()[:-1])
    plane.server.drain(monotonic_ns())
    plane.server.dismiss()
    assert client.closed
    assert not plane.server.expectant
