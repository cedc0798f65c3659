"""All engines of the catalogue, once a second: each is asked in a thread of its own, and what they said is written to the file.

One that is slow or hangs delays nobody: the file is written a moment after the questions went out, with what has come by then;
what comes later is in the next one. Backends are those of the snapshot, as workers know them.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Final

from collectors.engines.engine import Engine, address
from collectors.engines.kinds import KINDS
from collectors.records.metrics import EngineView
from proxy.engines import VERSION, Engines, write_engines
from proxy.snapshot import SnapshotFeed

log = logging.getLogger(__name__)

EVERY_SECONDS: Final = 1.0
GATHER_SECONDS: Final = 0.3
"""How long the answers that are there wait for the others; a file that is older by this is as good."""


class EngineWatch:
    """Runs between `start` and `stop`. `snapshot`: the file that control publishes; `file`: the one that is written."""

    def __init__(self, snapshot: Path, file: Path) -> None:
        self._feed = SnapshotFeed(snapshot)
        self._file = file
        self._engines: dict[str, Engine] = {}
        self._well = True
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engines", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Questions that are under way end with the process."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def view(self) -> list[EngineView]:
        now = time.monotonic()
        return [engine.view(now) for engine in self._engines.values()]

    # -- the thread --

    def _run(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                self._round(began)
            except Exception:
                log.exception("a bug in what asks the engines")
            self._stop.wait(max(0.0, began + EVERY_SECONDS - time.monotonic()))

    def _round(self, began: float) -> None:
        if self._feed.poll():
            self._follow()
        engines = self._engines
        for engine in engines.values():
            engine.ask()
        for engine in engines.values():
            engine.wait(began + GATHER_SECONDS - time.monotonic())
        now = time.monotonic()
        loads = {name: load for name, engine in engines.items() if (load := engine.load(now)) is not None}
        self._write(Engines(VERSION, time.time_ns(), loads))

    def _follow(self) -> None:
        """The catalogue has changed. An engine whose address stayed goes on; the table is replaced, for others read it."""
        followed = {}
        for name, backend in self._feed.current.backends.items() if self._feed.current is not None else ():
            if (kind := KINDS.get(backend.kind)) is not None:
                known = self._engines.get(name)
                followed[name] = known if known is not None and known.address == address(backend) else Engine(backend, kind)
        self._engines = followed

    def _write(self, engines: Engines) -> None:
        try:
            write_engines(self._file, engines)
        except OSError as error:
            if self._well:
                log.error(
                    "what engines say can't be written; workers go by what they know themselves", extra={"error": str(error)}
                )
            self._well = False
        else:
            self._well = True
