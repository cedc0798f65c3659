"""What clients and engines may send over a connection: whatever it is, each request gets one answer at most, what reaches an
engine is a request that every reader takes for one, and nothing is left when both have gone.

A worker's listener and relay on transports of our own (tests/support/plane.py); the other readers are httptools and h11.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import h11
import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.auth.guesses import Guesses
from proxy.errors import Outcome, ShuttingDown
from proxy.exchange import Record
from proxy.journal import Checkpoint, Tail
from tests.fuzz.effort import effort
from tests.fuzz.mutation import cuts, edits
from tests.server import hostile
from tests.support.plane import KEY, Client, Engine, Plane
from tests.support.scripted_vllm import captured
from tests.support.wire_client import request

CHAT: Final = "/v1/chat/completions"
BODY: Final[dict[str, Any]] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


class Bench:
    """One worker's plane, an event loop, and an engine that is there whenever one is needed."""

    def __init__(self, plane: Plane, loop: asyncio.AbstractEventLoop) -> None:
        self.plane = plane
        self.loop = loop
        self.bugs: list[dict[str, Any]] = []
        self._tail = Tail(plane.settings.journal_path)
        self._checkpoint = Checkpoint()
        loop.set_exception_handler(lambda _, bug: self.bugs.append(bug))

    def records(self) -> list[Record]:
        """Those of requests that ended since this was asked last."""
        batch = self._tail.poll(self._checkpoint)
        assert batch.corrupt == []
        self._checkpoint = batch.checkpoint
        return batch.records

    @contextmanager
    def client(self) -> Iterator[Client]:
        """When it has gone nothing of it is left, and nothing went wrong that nobody thought of."""
        self.plane.pipeline.authenticator._guesses = Guesses()  # it comes from where nobody has tried wrong keys yet
        client = self.plane.client()
        try:
            yield client
        except BaseException:
            self._forget(client)
            raise
        client.leaves()
        assert not self.plane.pipeline.admission.in_flight
        assert not self.plane.server.connections
        assert not len(self.plane.server.crowd)
        assert self.bugs == []

    def _forget(self, client: Client) -> None:
        """The next example must not fail for this one's reason."""
        with suppress(Exception):
            client.leaves()
        self.plane.pipeline.interrupt_all(ShuttingDown("It has failed."))
        self.records()
        self.bugs.clear()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    loop = asyncio.new_event_loop()
    with Plane(tmp_path_factory.mktemp("plane")) as plane:
        yield Bench(plane, loop)
    loop.close()


class Requests:
    """The requests in what an engine heard, by httptools."""

    def __init__(self, data: bytes) -> None:
        self.targets: list[bytes] = []
        self.bodies: list[bytes] = []
        self.whole = 0
        httptools.HttpRequestParser(self).feed_data(data)

    def on_url(self, url: bytes) -> None:
        self.targets.append(url)
        self.bodies.append(b"")

    def on_body(self, data: bytes) -> None:
        self.bodies[-1] += data

    def on_message_complete(self) -> None:
        self.whole += 1


class Answers:
    """The answers in what a client heard, by httptools; those that only announce another don't count."""

    def __init__(self, data: bytes) -> None:
        self.statuses: list[int] = []
        self.bodies: list[bytes] = []
        self.whole = 0
        self._parser = httptools.HttpResponseParser(self)
        self._parser.feed_data(data)

    def on_headers_complete(self) -> None:
        if (status := self._parser.get_status_code()) >= 200:
            self.statuses.append(status)
            self.bodies.append(b"")

    def on_body(self, data: bytes) -> None:
        self.bodies[-1] += data

    def on_message_complete(self) -> None:
        self.whole += self._parser.get_status_code() >= 200


def bodies_by_h11(data: bytes) -> list[bytes]:
    """The bodies of the requests in `data`, by another reader. Raises h11.RemoteProtocolError."""
    found = []
    while data:
        connection = h11.Connection(h11.SERVER)
        connection.receive_data(data)
        body = b""
        while not isinstance(event := connection.next_event(), h11.EndOfMessage):
            assert isinstance(event, h11.Request | h11.Data), "it is whole"
            body += bytes(event.data) if isinstance(event, h11.Data) else b""
        found.append(body)
        data = bytes(connection.trailing_data[0])
    return found


# --- clients ----------------------------------------------------------------------------------------------------------

ANSWER: Final = b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 11\r\n\r\n{"a":"b"} \n'


def ask(**more: Any) -> bytes:
    return request(CHAT, {**BODY, **more}, key=KEY)


SMALL: Final = tuple(each.data.replace(b"smollm2", b"m") for each in hostile.CORPUS if len(each.data) < 2000)
"""Of other tests; where a body was given a length it is five bytes too long now, and what follows is read for it."""
GOOD: Final = (
    ask(),
    ask(stream=True),
    request("/v1/models", key=KEY),
    request("/health"),
    request(CHAT, b"{", key=KEY),
    request(CHAT, BODY, key="gh-wrong"),
    request(CHAT, BODY, key=KEY, headers={"Connection": "close"}),
    request(CHAT, BODY, key=KEY, headers={"Expect": "100-continue"}),
    ask().replace(b"HTTP/1.1", b"HTTP/1.0"),
    hostile.post("Transfer-Encoding: chunked", data=hostile.chunks(json.dumps(BODY).encode())),
    hostile.post("Connection: Upgrade", "Upgrade: h2c", data=json.dumps(BODY).encode()),
)
_pieces = (
    *(
        b"\r\n",
        b"\n",
        b"\r",
        b"\0",
        b" ",
        b"\t",
        b":",
        b"\r\n\r\n",
        b"HTTP/1.1",
        b"0\r\n\r\n",
        b"5;a=b\r\n",
        b"\xff",
        b"POST / HTTP/1.1\r\n",
    ),
    *(b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Host: y\r\n", b"Connection: close\r\n", b"Upgrade: x\r\n"),
    *(b"Expect: 100-continue\r\n", b"Content-Encoding: gzip\r\n", b"Authorization: Bearer x\r\n", b"x-request-id: \xffy\r\n"),
    *(b"Connection: Upgrade\r\n", b"Trailer: a\r\n", b"Content-Length: 0\r\n\r\n", b"Origin: http://x\r\n"),
)
_said = st.lists(st.sampled_from(GOOD) | st.sampled_from(SMALL), min_size=1, max_size=3).map(b"".join)
_said_edits = st.lists(edits(_pieces), max_size=4)


async def say(bench: Bench, client: Client, reads: list[bytes]) -> bytes:
    """A client says this to a worker whose engine answers everything → what the engine heard."""
    engine, answered = bench.plane.engine(), 0
    for data in reads:
        client.says(data)
        before = -1
        while before != len(client.heard):  # a request that waited for its turn starts in the loop's next one
            before = len(client.heard)
            await asyncio.sleep(0)
            if Requests(engine.heard).whole > answered:
                answered += 1
                engine.says(ANSWER)
    engine.dies()
    await asyncio.sleep(0)
    return engine.heard


@effort(250)
@given(said=_said, changes=_said_edits, cut=cuts())
def test_a_client_may_say_anything(
    bench: Bench, said: bytes, changes: list[Callable[[bytes], bytes]], cut: Callable[[bytes], list[bytes]]
) -> None:  # failures 25, 28, 29, 30, 33, 40
    for change in changes:
        said = change(said)
    statuses = []
    for reads in ([said], cut(said)):
        with bench.client() as client:
            heard = bench.loop.run_until_complete(say(bench, client, reads))
            answers, upstream = Answers(client.heard), Requests(heard)
            assert answers.whole == len(answers.statuses), "an engine has answered each"
            assert len(answers.statuses) <= said.count(b"\n") + 1
            assert upstream.whole == len(upstream.targets) == answers.statuses.count(200) - _own(answers)
            assert bodies_by_h11(heard) == upstream.bodies
            assert set(upstream.targets) <= {CHAT.encode()}
            assert all(isinstance(json.loads(body), dict) for body in upstream.bodies)
        records = bench.records()
        assert len(records) <= len(answers.statuses)
        assert not any(record.outcome == Outcome.INTERNAL_ERROR for record in records)
        statuses.append(answers.statuses)
    both = min(map(len, statuses))  # of a body in several pieces more is known earlier: it may be the last one sooner
    assert statuses[0][:both] == statuses[1][:both]


_again = st.lists(
    st.builds(lambda words: ask(user="u" * words), st.sampled_from([0, 1, 9, 10, 1000])) | st.sampled_from(GOOD),
    min_size=1,
    max_size=3,
).map(b"".join)


@effort(250)
@given(said=_again, changes=st.lists(edits(_pieces), max_size=2), cut=cuts())
def test_a_head_that_comes_again_is_read_as_at_first(
    bench: Bench, said: bytes, changes: list[Callable[[bytes], bytes]], cut: Callable[[bytes], list[bytes]]
) -> None:
    """What a connection has learnt of its client's heads changes nothing, whatever comes after the first, in whatever reads."""
    for change in changes:
        said = change(said)
    told: dict[bool, list[object]] = {True: [], False: []}
    for learns in told:
        for reads in ([said], cut(said), _head_and_body(said), [*cut(said)[:1], ask()]):
            with bench.client() as client:
                if not learns:
                    client.connection._lessons = 0
                heard = bench.loop.run_until_complete(say(bench, client, [ask(), *reads]))
                assert (client.connection._repeated is not None) == learns
                answers, upstream = Answers(client.heard), Requests(heard)
            records = [(each.status, each.operation, each.model, each.request_bytes, each.user) for each in bench.records()]
            told[learns].append((answers.statuses, upstream.targets, upstream.bodies, records, client.closed))
    assert told[True] == told[False]


def _head_and_body(said: bytes) -> list[bytes]:
    """As some clients write a request."""
    at = said.find(b"\r\n\r\n") + 4
    return [said[:at], said[at:]] if 4 <= at < len(said) else [said]


def _own(answers: Answers) -> int:
    """Answers of ours with status 200."""
    return sum(status == 200 and body != b'{"a":"b"} \n' for status, body in zip(answers.statuses, answers.bodies, strict=True))


# --- engines ----------------------------------------------------------------------------------------------------------

CHUNKED: Final = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ntransfer-encoding: chunked\r\n\r\n"
SIZED: Final = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


_json = captured.load("chat").body
_events = captured.load("chat_stream_usage_cont").blocks()
WHOLE: Final = (
    SIZED % (len(_json), _json),
    CHUNKED % b"application/json" + chunked(_json[:100], _json[100:]),
    b"HTTP/1.1 100 Continue\r\n\r\n" + SIZED % (len(_json), _json),
    b"HTTP/1.0 200 OK\r\n\r\n" + _json,
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 4\r\nconnection: close\r\n\r\noops",
    b"HTTP/1.1 301 Moved\r\nlocation: http://x/\r\ncontent-length: 0\r\n\r\n",
    SIZED % (len(_json), _json) * 2,
)
STREAMED: Final = (
    CHUNKED % b"text/event-stream; charset=utf-8" + chunked(*_events),
    CHUNKED % b"text/event-stream" + chunked(b"".join(_events)),
    CHUNKED % b"text/event-stream" + chunked(*_events[:4]),
    CHUNKED % b"text/event-stream" + chunked(b'data: {"error":{"message":"no","code":400}}\n\n'),
    b"HTTP/1.0 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + b"".join(_events),
)
_engine_pieces = (
    *_pieces,
    b"content-type: text/event-stream\r\n",
    b"HTTP/1.1 200 OK\r\n\r\n",
    b"data: [DONE]\n\n",
    b"x-a: b\r\n c\r\n",
)
_engine_edits = st.lists(edits(_engine_pieces), max_size=4)


async def answer(client: Client, engine: Engine, said: bytes, reads: list[bytes], *, clean: bool) -> None:
    """An engine answers what the client says in these reads, and ends its connection."""
    client.says(said)
    for data in reads:
        if engine.closed:
            break
        engine.says(data)
        await asyncio.sleep(0)
    if not engine.closed:
        engine.closed = "closed"
        engine.connection.connection_lost(None if clean else ConnectionResetError())
    elif not engine.connection.closed:
        engine.connection.connection_lost(None)
    while not client.heard and not client.closed:  # noqa: ASYNC110 - it was tried again on a connection of its own, which nobody takes
        await asyncio.sleep(0.001)


@effort(250)
@given(
    stream=st.booleans(),
    data=st.data(),
    changes=_engine_edits,
    cut=cuts(),
    clean=st.booleans(),
)
def test_an_engine_may_say_anything(
    bench: Bench,
    stream: bool,
    data: st.DataObject,
    changes: list[Callable[[bytes], bytes]],
    cut: Callable[[bytes], list[bytes]],
    clean: bool,
) -> None:  # failures 4, 5, 6, 24
    said = data.draw(st.sampled_from(STREAMED if stream else WHOLE) | st.sampled_from(WHOLE))
    for change in changes:
        said = change(said)
    with bench.client() as client:
        engine = bench.plane.engine()
        bench.loop.run_until_complete(answer(client, engine, ask(stream=stream), cut(said), clean=clean))
        answers = Answers(client.heard)
        assert len(answers.statuses) == 1
        assert answers.whole == 1 or client.closed, "broken off for all to see"
    [record] = bench.records()
    assert record.outcome != Outcome.INTERNAL_ERROR
    assert record.status == answers.statuses[0]
    if record.outcome == Outcome.OK:
        assert answers.whole == 1
