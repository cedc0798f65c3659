"""The largest bodies must not keep the event loop from everybody else's streams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from time import sleep, thread_time_ns
from typing import Any

import pytest

from tests.support.plane import KEY, Client, Plane
from tests.support.wire_client import request

READ_BYTES = 256 * 1024
"""What one read of a socket gives at most."""
BODIES = {
    "one long text": [{"role": "user", "content": 'The fox says "hi".\n' * 400_000}],
    "many messages": [{"role": "user", "content": "The fox says hi. " * 20} for _ in range(20_000)],
    "many parts": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 260_000}],
    "an image": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:," + "A" * 8_000_000}}]}],
    "not ASCII": [{"role": "user", "content": "Grüße ☃ " * 650_000}],
}
PARSES = 5
ATTEMPTS = 30
"""What the machine's other users take away, memory's speed above all, only ever adds: the quietest of so many counts."""
PATHS = ("/v1/chat/completions", "/v1/responses", "/v1/messages")


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Plane]:
    with Plane(tmp_path, {"limits": {"body_bytes": 16 * 1024 * 1024}}) as made:
        yield made


def longest_turn_ns(client: Client, said: bytes) -> int:
    """CPU time of the read that kept the loop longest."""
    longest = 0
    for at in range(0, len(said), READ_BYTES):
        data = said[at : at + READ_BYTES]
        began = thread_time_ns()
        client.connection.data_received(data)
        longest = max(longest, thread_time_ns() - began)
    return longest


def parse_ns(body: bytes) -> int:
    began = thread_time_ns()
    json.loads(body)
    return thread_time_ns() - began


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")], ids=["compact", "spaced"])
@pytest.mark.parametrize("kind", BODIES)
def test_a_body_of_8_mb_keeps_the_loop_no_longer_than_a_few_parses_of_it(
    plane: Plane, path: str, separators: tuple[str, str], kind: str
) -> None:  # failure 68
    more: dict[str, Any] = {"stream": True, "temperature": 0.5, "max_tokens": 64}
    asked = {"model": "m", "input" if path.endswith("responses") else "messages": BODIES[kind], **more}
    body = json.dumps(asked, separators=separators, ensure_ascii=False).encode()
    assert len(body) > 6_000_000
    turns: list[int] = []
    parses: list[int] = []
    while not turns or (len(turns) < ATTEMPTS and min(turns) > PARSES * min(parses)):
        client, engine = plane.client(), plane.engine()
        turns.append(longest_turn_ns(client, request(path, body, key=KEY)))
        parses.append(parse_ns(body))
        assert len(engine.heard) > len(body)
        client.leaves()
        assert engine.closed
        if len(turns) > 3:
            sleep(0.2)
    assert min(turns) <= PARSES * min(parses)
