"""A client that leaves stops the engine: in mid-stream, before its first token, and where it does not stream.

With the engine that is slow, so that there is a middle to leave in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from typing import Any, Final

import pytest

from tests.conftest import Start
from tests.engine.answers import events_of, piece_of
from tests.engine.operations import GENERATING, Generating
from tests.engine.vllm import NAME, PATIENCE, Engine, wait_until
from tests.support.glasshouse import Glasshouse
from tests.support.wire_client import WireClient, request

LONG: Final = 900
"""Tokens: half a minute of work."""
LATE_TOKENS: Final = 32
"""What may be generated after the last event that the client has taken: a second's worth."""
PROMPT: Final = "Tell a story."
OPERATIONS: Final = pytest.mark.parametrize("operation", GENERATING, ids=lambda operation: operation.name)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
_names = count(1)


class Leaver:
    """A client of the proxy, and how its request was booked."""

    def __init__(self, proxy: Glasshouse, operation: Generating, stream: bool) -> None:
        self.name = f"leaver-{next(_names)}"
        self._proxy = proxy
        self.client = WireClient(proxy.url, timeout=PATIENCE)
        body = {"model": NAME, **operation.body(PROMPT, LONG), "stream": stream}
        self.client.send(request(operation.path, body, key=proxy.key, headers={"X-Request-Id": self.name}))

    def row(self) -> dict[str, Any]:
        wait_until(self._rows, f"the row of {self.name}")
        (row,) = self._rows()
        return row

    def _rows(self) -> list[dict[str, Any]]:
        return [row for row in self._proxy.rows() if row["client_request_id"] == self.name]


Ask = Callable[..., Leaver]


@pytest.fixture(scope="module")
def proxy(shared_glasshouse: Start, smollm2: Engine) -> Glasshouse:
    return shared_glasshouse([smollm2.url])


@pytest.fixture
def leaver(proxy: Glasshouse) -> Iterator[Ask]:
    with ExitStack() as stack:

        def ask(operation: Generating, *, stream: bool) -> Leaver:
            made = Leaver(proxy, operation, stream)
            stack.enter_context(made.client)
            return made

        yield ask


@OPERATIONS
def test_in_mid_stream(leaver: Ask, smollm2: Engine, operation: Generating) -> None:  # failure 1
    before = smollm2.counts()
    leaving = leaver(operation, stream=True)
    delivered = sum(1 for _, data in events_of(leaving.client.read(events=15)) if piece_of(data))
    leaving.client.close()
    generated = (smollm2.counts() - before).generated  # of an engine that has come to rest
    row = leaving.row()
    assert (row["outcome"], row["status"]) == ("client_gone", 200)
    assert 5 <= delivered <= row["output_tokens"] <= generated <= row["output_tokens"] + LATE_TOKENS
    assert generated < LONG
    if operation.counts_on_request:  # and on each chunk, if asked
        assert (row["usage_source"], row["input_tokens"]) == ("engine", smollm2.tokenize(operation.prompt(PROMPT)))
    else:
        assert row["usage_source"] == "estimated"


@OPERATIONS
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_before_the_first_token(leaver: Ask, smollm2: Engine, operation: Generating, stream: bool) -> None:  # failure 2
    """It waits behind others in the engine's queue, and is gone from there before its turn: nothing is ever computed for it."""
    before, choices = smollm2.counts(), smollm2.kind.requests
    busy = {"model": NAME, "prompt": PROMPT, "n": choices, "max_tokens": LONG, "ignore_eos": True, "stream": True}
    with WireClient(smollm2.url, timeout=PATIENCE) as others:
        others.send(request("/v1/completions", busy))
        wait_until(lambda: smollm2.running_and_waiting() == (choices, 0), "the engine to be busy")
        leaving = leaver(operation, stream=stream)
        wait_until(lambda: smollm2.running_and_waiting() == (choices, 1), "the request to wait")
        leaving.client.close()
        wait_until(lambda: smollm2.running_and_waiting() == (choices, 0), "nobody to wait")
    prompt = (smollm2.counts() - before).prompt
    assert prompt == choices * smollm2.tokenize({"prompt": PROMPT}), "the request that left was begun"
    row = leaving.row()
    assert (row["outcome"], row["output_tokens"]) == ("client_gone", 0)


@OPERATIONS
def test_where_nothing_streams(leaver: Ask, smollm2: Engine, operation: Generating) -> None:  # failure 3
    before = smollm2.counts()
    leaving = leaver(operation, stream=False)
    wait_until(lambda: smollm2.running_and_waiting() == (1, 0), "the engine to work on it")
    leaving.client.close()
    generated = (smollm2.counts() - before).generated
    row = leaving.row()
    assert (row["outcome"], row["chunks"]) == ("client_gone", 0)
    assert row["output_tokens"] <= generated < LONG
