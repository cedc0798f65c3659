"""A head that comes again needn't be parsed again."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path
from time import monotonic_ns
from typing import Any

import pytest

from proxy.listener.repeated import LESSONS, Repeated, learn
from tests.support.plane import KEY, Client, Plane
from tests.support.wire_client import request

HEAD = b"POST /v1/x HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nX-A: b\r\n\r\n"
FIELDS = {b"host": b"h", b"content-length": b"3"}
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"


def learnt(read: bytes, body: bytes = b"abc") -> Repeated | None:
    return learn(read, b"POST", b"/v1/x", FIELDS, body)


@pytest.mark.parametrize("read", [HEAD, HEAD + b"abc"])
def test_a_head_alone_or_with_its_body_is_learnt(read: bytes) -> None:
    head = learnt(read)
    assert head is not None
    assert head.before + b"3" + head.after == HEAD
    assert head[2:] == (b"POST", b"/v1/x", {b"host": b"h"})


@pytest.mark.parametrize(
    "read",
    [
        HEAD + b"abcd",  # what follows is the next request's
        HEAD + b"ab",
        HEAD.replace(b"Content-Length: 3\r\n", b""),
        HEAD.replace(b"Content-Length: 3", b"Content-Length: 3x"),
        HEAD.replace(b"\r\n", b"\n"),
        b"",
    ],
)
def test_what_isnt_one_request_is_not_learnt(read: bytes) -> None:
    assert learnt(read) is None


@pytest.mark.parametrize(
    ("read", "found"),
    [
        (HEAD, (len(HEAD), 3)),
        (HEAD.replace(b": 3", b": 1234"), (len(HEAD) + 3, 1234)),
        (HEAD.replace(b": 3", b": 0"), (len(HEAD), 0)),
        (HEAD.replace(b": 3", b": 12345"), None),
        (HEAD.replace(b": 3", b": "), None),
        (HEAD.replace(b": 3", b": +3"), None),
        (HEAD.replace(b": 3", b": 3 "), None),
        (HEAD.replace(b": 3", b": 0x3"), None),
        (HEAD.replace(b": 3", b": \xb2"), None),
        (HEAD.replace(b": 3", b": 3,3"), None),
        (HEAD.replace(b"X-A", b"X-B"), None),
        (HEAD.replace(b"Host: h", b"Host: g"), None),
        (HEAD[:-1], None),
        (HEAD[:-2], None),
        (HEAD[:20], None),
    ],
)
def test_only_the_length_may_differ(read: bytes, found: tuple[int, int] | None) -> None:
    head = learnt(HEAD)
    assert head is not None
    assert head.body_in(read, most_digits=4) == found


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Plane]:
    with Plane(tmp_path, {"timeouts": {"client_request": 5}, "limits": {"decompressed_body_bytes": 100_000}}) as plane:
        yield plane


class Parser:
    """How often it was asked."""

    def __init__(self, client: Client) -> None:
        self.reads = 0
        self._parser = client.connection._parser
        client.connection._parser = self  # type: ignore[assignment]

    def feed_data(self, data: bytes) -> None:
        self.reads += 1
        self._parser.feed_data(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)


def chat(words: int = 1, headers: dict[str, str] | None = None) -> bytes:
    body = {"model": "m", "messages": [{"role": "user", "content": "word " * words}]}
    return request("/v1/chat/completions", body, key=KEY, headers=headers)


def parts(data: bytes) -> tuple[bytes, bytes]:
    at = data.find(b"\r\n\r\n") + 4
    return data[:at], data[at:]


def test_the_parser_sees_the_first_one_only(plane: Plane) -> None:
    client, engine = plane.client(), plane.engine()
    parser = Parser(client)
    for words in (1, 3, 50, 1000):
        asked = chat(words)
        for reads in ([asked], parts(asked)):
            client.heard = engine.heard = b""
            for read in reads:
                client.says(read)
            assert json.loads(parts(engine.heard)[1]) == json.loads(parts(asked)[1])
            engine.says(ANSWER)
            assert client.heard.startswith(b"HTTP/1.1 200 OK\r\n")
    assert parser.reads == 1
    assert [each.status for each in plane.records()] == [200] * 8


def test_it_begins_with_its_first_byte(plane: Plane) -> None:
    client, engine = plane.client(), plane.engine()
    for reads in ([chat()], [chat()], parts(chat())):
        for read in reads:
            time.sleep(0.02)
            client.says(read)
        engine.says(ANSWER)
    first, again, halves = plane.records()
    assert again.received_unix_ns - first.received_unix_ns >= 0.02e9
    assert halves.read_ns >= 0.02e9
    assert halves.received_unix_ns - again.received_unix_ns >= again.ended_ns + 0.02e9


def test_one_that_waits_for_its_turn(plane: Plane) -> None:
    client, engine = plane.client(), plane.engine()
    client.says(chat())
    client.says(chat(2))
    for read in parts(chat(3)):
        client.says(read)
    assert engine.heard.count(b"POST ") == 1
    assert len(client.connection._waiting) == 2
    client.leaves()


def test_a_body_may_look_like_a_request(plane: Plane) -> None:
    client, engine = plane.client(), plane.engine()
    client.says(chat())
    engine.says(ANSWER)
    engine.heard = b""
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}]}).encode() + b" " * len(chat())
    head = chat().replace(b"Content-Length: %d" % len(parts(chat())[1]), b"Content-Length: %d" % len(body))
    head = parts(head)[0]
    assert head != parts(chat())[0]
    client.says(head + body[: -len(chat())])
    client.says(chat())
    assert engine.heard == b""
    assert client.heard.count(b"HTTP/1.1 400 ") == 1, "it isn't JSON"


@pytest.mark.parametrize("begun", [b"P", b"POS", b"POST", b"POST ", b"POST /v1"])
def test_what_has_begun_is_no_other_request(plane: Plane, begun: bytes) -> None:
    client, engine = plane.client(), plane.engine()
    client.says(chat())
    engine.says(ANSWER)
    client.heard = engine.heard = b""
    client.says(begun)
    client.says(chat())
    assert engine.heard == b""
    assert client.heard.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 404 "))


def test_what_a_head_asks_for_is_done_each_time(plane: Plane) -> None:
    client, engine = plane.client(), plane.engine()
    for _ in range(3):
        client.heard = engine.heard = b""
        head, body = parts(chat(headers={"expect": "100-continue"}))
        client.says(head)
        assert client.heard == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.says(body)
        engine.says(ANSWER)
        assert b"HTTP/1.1 200 OK" in client.heard
    for _ in range(3):
        client.heard = engine.heard = b""
        head, body = parts(chat(headers={"content-encoding": "gzip"}))
        packed = gzip.compress(body)
        client.says(head.replace(b"Content-Length: %d" % len(body), b"Content-Length: %d" % len(packed)) + packed)
        assert parts(engine.heard)[1] == body
        engine.says(ANSWER)


def test_nothing_comes_after_the_last_one(plane: Plane) -> None:
    client, engine = plane.client(), plane.engine()
    client.says(chat(headers={"connection": "close"}))
    client.says(chat(headers={"connection": "close"}))
    engine.says(ANSWER)
    assert engine.heard.count(b"POST ") == 1
    assert client.closed
    assert len(plane.records()) == 1


def test_heads_that_never_come_again_arent_learnt_for_ever(plane: Plane) -> None:
    client, engine = plane.client(), plane.engine()
    parser = Parser(client)
    for number in range(1, 10):
        client.says(chat(headers={"traceparent": f"00-{number:032x}-{number:016x}-01"}))
        engine.says(ANSWER)
    assert parser.reads == 9
    assert client.connection._lessons == 0
    assert len({each.trace_id for each in plane.records()}) == 9
    assert LESSONS < 9


def test_a_body_that_never_comes_is_waited_for_as_ever(plane: Plane) -> None:
    client, engine = plane.client(), plane.engine()
    body = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}]}
    asked = request("/v1/messages", body, key=KEY)
    client.says(asked)
    engine.says(ANSWER)
    client.heard = b""
    client.says(parts(asked)[0])
    plane.server.sweep(monotonic_ns() + 4 * 10**9)
    assert client.heard == b""
    plane.server.sweep(monotonic_ns() + 6 * 10**9)
    assert client.heard.startswith(b"HTTP/1.1 408 ")
    assert b'"type":"error"' in client.heard, "in the shape of the API that was asked"
    assert client.closed
