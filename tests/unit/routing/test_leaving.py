"""Clients that leave at the moment at which they are let in."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from proxy.errors import Outcome
from tests.support.plane import KEY, Plane
from tests.support.wire_client import request

BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hi"}]}).encode()
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"


def test_who_leaves_between_being_let_in_and_going_on_gives_his_place_back(tmp_path: Path) -> None:
    # failure 55
    async def main() -> None:
        with Plane(tmp_path) as plane:
            plane.pipeline.follow()
            router = plane.pipeline.router
            standing = router.standings["b0"]
            standing.depth = 1
            first, second, engine = plane.client(), plane.client(), plane.engine()
            for client in (first, second):
                client.says(request("/v1/chat/completions", BODY, key=KEY))
            assert (standing.in_flight, router.waiting) == (1, 1)
            engine.says(ANSWER)
            assert b"200 OK" in first.heard
            assert (standing.in_flight, router.waiting) == (1, 0), "the second one has the place, and goes on in a moment"
            second.leaves()
            assert (standing.in_flight, standing.tokens, standing.prefilling) == (0, 0, 0)
            await asyncio.sleep(0)
            assert [record.outcome for record in plane.records()] == [Outcome.OK, Outcome.CLIENT_GONE]

    asyncio.run(main())
