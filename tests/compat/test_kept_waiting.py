"""An answer whose head was made up to keep a client that had to wait is that one's alone: others get an engine's."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

import msgspec
import pytest

from proxy.snapshot import SnapshotFile
from tests.support.plane import Plane
from tests.unit.cache.test_flight import ANSWER, END, body, line, publish, stream
from tests.unit.test_pipeline import DONE, chunk, text

COMMENT: Final = b": waiting\n\n"
HEAD: Final = (
    b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
SAID: Final = HEAD + chunk(text()) + chunk(text(count=2)) + chunk(text("", "stop", 3)) + chunk(DONE) + END


def narrow(file: SnapshotFile) -> None:
    file.backends["b0"] = msgspec.structs.replace(file.backends["b0"], depth=1)


@pytest.mark.parametrize("kept_alive", [False, True])
def test_a_head_of_ours_is_not_given_again(tmp_path: Path, kept_alive: bool) -> None:
    async def wait() -> None:
        busy, first, second = plane.client(), plane.client(), plane.client()
        engine = plane.engine()
        busy.says(stream(seed=1))
        first.says(stream())
        if kept_alive:
            plane.sweep(later_s=6)
        engine.says(SAID)
        await asyncio.sleep(0)  # it is the next one's turn
        engine.says(SAID)
        assert body(first) == (COMMENT if kept_alive else b"") + ANSWER
        assert line(first, "server") == (None if kept_alive else "uvicorn")
        second.says(stream())
        if kept_alive:
            engine.says(SAID)
        assert line(second, "x-glasshouse-cache") == ("miss" if kept_alive else "hit")
        assert (line(second, "server"), body(second)) == ("uvicorn", ANSWER)

    with Plane(tmp_path, {"cache": {}, "waiting": {"keep_alive": 5}}) as plane:
        publish(plane, narrow)
        asyncio.run(wait())
