"""A worker's data plane without sockets: a test holds both ends, and time, in its hands.

with Plane(tmp_path) as plane:
    client, engine = plane.client(), plane.engine()
    client.says(request(...))
    engine.says(b"HTTP/1.1 200 OK\\r\\n...")
    assert client.heard == b"..."
    [record] = plane.records()
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic_ns
from typing import Any, Final, Self

from proxy.control.declared import Declared
from proxy.errors import ShuttingDown
from proxy.exchange import Record
from proxy.journal import Checkpoint, Journal, Tail
from proxy.listener.connection import ClientConnection
from proxy.listener.probes import READY, Probes
from proxy.listener.server import Server
from proxy.pipeline import Pipeline
from proxy.relay.connection import UpstreamConnection
from proxy.settings import Settings
from proxy.snapshot import Backend, Model, SnapshotFeed, SnapshotFile, write_snapshot
from proxy.snapshot.model import encode_principal

KEY: Final = "gh-test"
OTHER_KEY: Final = "gh-other"
"""Of another caller, named `other`."""


class Wire(asyncio.Transport):
    """A transport whose other end is the test."""

    def __init__(self) -> None:
        super().__init__()
        self.heard = b""
        """What was written."""
        self.on_write: Callable[[bytes], None] = lambda data: None
        self.unsent = 0
        """What the other end is said not to have taken."""
        self.reading = True
        self.closed = ""
        """How it was closed: "", closed or aborted."""
        self.half_closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.on_write(bytes(data))
        self.heard += data

    def write_eof(self) -> None:
        self.half_closed = True

    def close(self) -> None:
        self.closed = self.closed or "closed"

    def abort(self) -> None:
        self.closed = "aborted"

    def is_closing(self) -> bool:
        return bool(self.closed)

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def get_write_buffer_size(self) -> int:
        return self.unsent


class Client(Wire):
    """A client and its connection."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.connection = ClientConnection(server)
        self.connection.connection_made(self)

    def says(self, data: bytes) -> None:
        self.connection.data_received(data)

    def leaves(self) -> None:
        self.closed = "closed"
        self.connection.connection_lost(None)


class Engine(Wire):
    """A backend's end of a connection."""

    def __init__(self, connection: UpstreamConnection) -> None:
        super().__init__()
        self.connection = connection
        connection.connection_made(self)

    def says(self, data: bytes) -> None:
        self.connection.data_received(data)

    def dies(self) -> None:
        self.closed = "closed"
        self.connection.connection_lost(ConnectionResetError())


class Plane:
    """One worker's steps, listener and relay. Engines are there as soon as they are asked for: as idle, kept connections. There
    is no loop in which they could be asked how they are, so silence makes nobody suspect, and who is out stays out.

    config: settings; what they declare is for a key named `test`.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any] | None = None, *, backends: int = 1) -> None:
        never = 86_400
        health = {"silence": never, "ejection": never, "longest_ejection": never}
        usual = {"journal": {"segment_bytes": 1024 * 1024}, "health": health}
        self.settings = Settings.of({**usual, **(config or {}), "state_dir": str(directory)})
        self.backends = {f"b{i}": Backend(f"b{i}", "127.0.0.1", 9 + i) for i in range(backends)}
        declared = Declared(self.settings)
        keys = {KEY: declared.principal("key_1", "test"), OTHER_KEY: declared.principal("key_2", "other")}
        file = SnapshotFile(
            revision=1,
            keys={hashlib.sha256(key.encode()).digest(): encode_principal(each) for key, each in keys.items()},
            cache_secret=bytes(range(32)),
            everyone=declared.everyone,
            teams=declared.teams,
            users=declared.users,
            projects=declared.projects,
            models={"m": Model("m", tuple(self.backends), 100_000, 20_000, 400_000, b'{"id":"m"}')},
            backends=self.backends,
        )
        write_snapshot(self.settings.snapshot_path, file)
        self.feed = SnapshotFeed(self.settings.snapshot_path)
        assert self.feed.poll()
        self.journal = Journal(self.settings.journal_path, self.settings.journal.segment_bytes)
        self.pipeline = Pipeline(self.settings, self.feed, self.journal)
        self.server = Server(
            self.settings,
            self.pipeline.handle,
            Probes(lambda: READY),
            self.pipeline.count_unaccepted,
            self.pipeline.authenticator.identify,
        )

    def client(self) -> Client:
        return Client(self.server)

    def engine(self, name: str = "b0") -> Engine:
        """A kept connection to this backend."""
        assert self.feed.current is not None
        pool = self.pipeline.relay._pool(self.feed.current.backends[name])
        engine = Engine(UpstreamConnection(pool))
        pool.put(engine.connection, monotonic_ns())
        return engine

    def sweep(self, later_s: float = 0.0) -> None:
        """What the worker does a few times a second, so much later than now. Nobody is probed: there is no loop to connect in."""
        for standing in self.pipeline.router.standings.values():
            standing.health.probing = True
        self.pipeline.sweep(monotonic_ns() + int(later_s * 1e9))

    def records(self) -> list[Record]:
        """The closing records so far."""
        return Tail(self.settings.journal_path).poll(Checkpoint()).records

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # A request that never ended would end whenever its coroutine is collected.
        self.pipeline.interrupt_all(ShuttingDown("The test is over."))
        self.journal.close()
