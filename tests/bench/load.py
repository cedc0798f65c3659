"""The load generator, a process of its own: `python -m tests.bench.load` does what JSON lines on standard input say.

It parses as little as it can, so that it isn't what is measured: the length of a whole answer, the end of a stream. An
answer that isn't a complete 200 is a failure and is counted. How long the first byte of an answer took is noted.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import re
import sys
import time
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import urlsplit

import uvloop

_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_LAST_CHUNK: Final = b"0\r\n\r\n"
_DONE: Final = b"data: [DONE]\n\n"
_NUMBER: Final = b"00000000"
"""What is different in requests that aren't all the same."""
_TAIL: Final = 64  # bytes: more than [DONE] and the last chunk, even when each is in an HTTP chunk of its own


class Client(asyncio.Protocol):
    """One connection with one request at a time. `finished` is called after each answer: with whether it was good."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.finished: Callable[[Client, bool], None] = lambda client, good: None
        self.noticed: Callable[[Client], None] | None = None
        self.streams = False
        self.busy = False
        self.buffer = b""
        self.events = 0
        self.sent = 0.0
        """When, until there is an answer."""
        self.waits: list[float] = []
        """Seconds until each answer's first byte."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # a TCP connection's transport is always a Transport

    def send(self, request: bytes) -> None:
        self.busy = True
        self.buffer = b""
        self.events = 0
        self.sent = time.perf_counter()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        if self.sent:
            self.waits.append(time.perf_counter() - self.sent)
            self.sent = 0.0
        if self.streams:
            self._stream(data)
        else:
            self._whole(self.buffer + data if self.buffer else data)

    def _whole(self, data: bytes) -> None:
        end = data.find(b"\r\n\r\n") + 4
        length = _LENGTH.search(data, 0, end) if end > 3 else None
        complete = len(data) >= end + int(length[1]) if length else data.endswith(_LAST_CHUNK)
        if complete:
            self._finish(data.startswith(b"HTTP/1.1 200"))
        else:
            self.buffer = data

    def _stream(self, data: bytes) -> None:
        if not self.events and not self.buffer and not data.startswith(b"HTTP/1.1 200"):
            self.transport.abort()  # an error, of whatever length
            return
        self.events += data.count(b"data: ")
        self.buffer = (self.buffer + data)[-_TAIL:]
        if self.buffer.endswith(_LAST_CHUNK):
            self._finish(_DONE in self.buffer)
        elif self.noticed is not None:
            self.noticed(self)

    def _finish(self, good: bool) -> None:
        self.busy = False
        self.finished(self, good)

    def connection_lost(self, error: Exception | None) -> None:
        if self.busy:
            self._finish(False)


class Load:
    """What the commands act on: some open connections."""

    def __init__(self) -> None:
        self.clients: list[Client] = []
        self._numbers = itertools.count(1_000_000)

    async def open(self, url: str, connections: int) -> dict[str, Any]:
        """Connect. Sixteen at a time, so that no backlog overflows."""
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 80
        loop = asyncio.get_running_loop()
        for start in range(0, connections, 16):
            batch = min(16, connections - start)
            made = await asyncio.gather(*(loop.create_connection(Client, host, port) for _ in range(batch)))
            self.clients += [client for _, client in made]
        return {"open": len(self.clients)}

    async def run(
        self, request: str, count: int, stream: bool, at_once: int, different: int = 1, waits: bool = False
    ) -> dict[str, Any]:
        """So many requests over the connections, each sending its next one when its answer is complete. `different`: how many of
        them are, in turns; 0: no two are the same. `waits`: tell how long each took to its first byte."""
        data = request.encode("latin-1")
        before, after = (data, b"") if different == 1 else data.split(_NUMBER)
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        left, running, good, events = count, 0, 0, 0

        def next_request() -> bytes:
            if different == 1:
                return data
            number = next(self._numbers)
            return b"%b%08d%b" % (before, number % different if different else number, after)

        def finished(client: Client, was_good: bool) -> None:
            nonlocal left, running, good, events
            good += was_good
            events += client.events
            if left > 0 and not client.transport.is_closing():
                left -= 1
                client.send(next_request())
                return
            running -= 1
            if not running and not ready.done():
                ready.set_result(None)

        begun = time.perf_counter()
        for client in self.clients[:at_once]:
            client.streams, client.finished, client.noticed = stream, finished, None
            client.waits.clear()
            if left > 0:
                left -= 1
                running += 1
                client.send(next_request())
        await ready
        seconds = time.perf_counter() - begun
        took = [round(wait * 1e6) for client in self.clients[:at_once] for wait in client.waits] if waits else []
        return {"completed": good, "failed": count - good, "events": events, "seconds": seconds, "waits_us": took}

    async def touch(self, request: str) -> dict[str, Any]:
        """One whole request on every connection, 16 at a time, so that each has been in use."""
        total = 0
        clients, self.clients = self.clients, []
        for start in range(0, len(clients), 16):
            self.clients = clients[start : start + 16]
            total += (await self.run(request, len(self.clients), False, 16))["completed"]
        self.clients = clients
        return {"completed": total}

    async def hold(self, request: str, events: int) -> dict[str, Any]:
        """A stream on every connection; come back when each has brought so many events."""
        waiting = set(self.clients)
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def noticed(client: Client) -> None:
            if client.events >= events:
                waiting.discard(client)
            if not waiting and not ready.done():
                ready.set_result(None)

        def finished(client: Client, was_good: bool) -> None:
            if not ready.done():
                ready.set_exception(RuntimeError("a stream ended that was to be held open"))

        for client in self.clients:
            client.streams, client.noticed, client.finished = True, noticed, finished
            client.send(request.encode("latin-1"))
        await ready
        return {"held": len(self.clients)}

    async def close(self) -> dict[str, Any]:
        for client in self.clients:
            client.finished = lambda client, good: None
            client.transport.abort()
        self.clients.clear()
        await asyncio.sleep(0)
        return {}


def main() -> None:
    load = Load()
    gc.disable()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for line in sys.stdin:
            command = json.loads(line)
            answer = runner.run(getattr(load, command.pop("do"))(**command))
            gc.collect()
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
