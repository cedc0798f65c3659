"""An engine that ends or hangs in mid-answer: its clients are told, none is left to wait, and the ledger says that it was the
engine.

What a vLLM 0.32 does depends on the moment. When it loses its generating process it sends an error event, followed by the
`[DONE]` of a proper end, or closes the connection. When it is told to stop it does the same, or falls silent with the connection
open, or ends every answer where it is, with `finish_reason: abort`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Final, NamedTuple

import pytest

from tests.conftest import Start
from tests.engine.answers import events_of, piece_of
from tests.engine.environment import Say
from tests.engine.operations import GENERATING, Generating
from tests.engine.vllm import NAME, PATIENCE, TINY, Engine, Engines
from tests.support.glasshouse import Glasshouse
from tests.support.wire_client import Reply, WireClient, request

LONG: Final = 950
"""Tokens: several seconds of work, with so many requests at once."""
SILENCE: Final = {"timeouts": {"first_byte": 20.0, "between_chunks": 10.0}}

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


class Waiting(NamedTuple):
    """A client in the middle of its answer."""

    name: str
    operation: Generating
    stream: bool
    client: WireClient


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def asking(proxy: Glasshouse, operation: Generating, stream: bool, stack: ExitStack) -> Waiting:
    """With the first words of its answer, if it streams."""
    client = stack.enter_context(WireClient(proxy.url, timeout=PATIENCE))
    name = f"{operation.name}, {'stream' if stream else 'whole'}"
    body = {"model": NAME, **operation.body("Tell a story.", LONG), "stream": stream}
    client.send(request(operation.path, body, key=proxy.key, headers={"X-Request-Id": name}))
    if stream:
        assert any(piece_of(data) for _, data in events_of(client.read(events=8)))
    return Waiting(name, operation, stream, client)


def all_asking(proxy: Glasshouse, stack: ExitStack) -> list[Waiting]:
    """The streams last: when they have begun, the engine works on the others as well."""
    return [asking(proxy, operation, stream, stack) for stream in (False, True) for operation in GENERATING]


def test_an_engine_that_hangs_is_given_up(  # failures 11, 12, 53
    glasshouse: Start, engines: Engines, stack: ExitStack
) -> None:
    engine = engines.get("second", TINY)
    proxy = glasshouse([engine.url], SILENCE)
    waiting = all_asking(proxy, stack)
    with engine.hanging():
        replies = {each.name: each.client.read() for each in waiting}
    rows = {row["client_request_id"]: row for row in proxy.rows(len(waiting))}
    for each in waiting:
        row = rows[each.name]
        if each.stream:
            check_broken_stream(each, replies[each.name])
            assert (row["outcome"], row["error_code"]) == ("timeout", "idle_timeout"), row
        else:
            assert replies[each.name].status == row["status"] == 504
            assert (row["outcome"], row["error_code"]) == ("timeout", "first_byte_timeout"), row
    engine.wait_quiet()  # what was given up was also called off
    with asking(proxy, GENERATING[0], True, stack).client as client:
        assert client.read(events=20).status == 200


@pytest.mark.parametrize("end", [Engine.terminate, Engine.kill_core], ids=["told to stop", "killed"])
def test_its_clients_are_told(  # failures 4, 6, 12
    glasshouse: Start, engines: Engines, say: Say, stack: ExitStack, end: Callable[[Engine], None]
) -> None:
    engine = engines.get("second", TINY)
    proxy = glasshouse([engine.url], SILENCE)
    waiting = all_asking(proxy, stack)
    end(engine)
    replies = {each.name: each.client.read() for each in waiting}
    rows = {row["client_request_id"]: row for row in proxy.rows(len(waiting))}
    for each in waiting:
        row = rows[each.name]
        say(f"{each.name}: {row['outcome']}, {row['error_code']}, {row['output_tokens']} tokens, {row['usage_source']}")
    for each in waiting:
        row, reply = rows[each.name], replies[each.name]
        if cut_short(each, reply) and end is Engine.terminate:
            # It ends as if all were well. Why is on the answer, except for /v1/responses, where it is called completed.
            assert row["outcome"] == "upstream_error" or each.operation.name == "responses", row
            assert 0 < row["output_tokens"] < LONG, row
            continue
        assert row["outcome"] in ("upstream_error", "timeout"), row
        assert row["error_code"]
        if each.stream:
            check_broken_stream(each, reply)
            assert 0 < row["output_tokens"] < LONG, row
        else:
            assert 500 <= reply.status < 600, reply
            assert reply.ending == "complete"
            assert error_of(reply.json())
            assert row["status"] == reply.status


def cut_short(waiting: Waiting, reply: Reply) -> bool:
    """A proper end in the middle: vLLM's `finish_reason: abort`, or what the other APIs make of it."""
    if not waiting.stream:
        return reply.status == 200
    return reply.ending == "complete" and not error_of(last_of(reply)[1])


def last_of(reply: Reply) -> tuple[str, Any]:
    """The last event but `[DONE]`: that may be the engine's own, also after an error."""
    return [event for event in events_of(reply) if event[1] != "[DONE]"][-1]


def check_broken_stream(waiting: Waiting, reply: Reply) -> None:
    """The last that it says is an error, in the shape of its API."""
    assert reply.status == 200
    assert reply.ending != "timeout"
    name, data = last_of(reply)
    assert error_of(data), (name, data)
    if not waiting.operation.counts_on_request:
        assert (name, data["type"]) == ("error", "error")


def error_of(data: Any) -> Any:
    """What went wrong, in any API's words: an object, or (`error` events of /v1/responses) a message."""
    return data.get("error") or data.get("message")
