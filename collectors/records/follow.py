"""One sink after the journal: a thread that polls, hands on, and waits when there is nothing or when the sink can't take it."""

from __future__ import annotations

import logging
import threading
import time

from collectors.records.metrics import SinkView
from collectors.records.sinks import Sink
from proxy.journal import Checkpoint, Tail

log = logging.getLogger(__name__)

IDLE_SECONDS = 0.1
FIRST_DELAY, LONGEST_DELAY = 0.1, 5.0


class Follower:
    """Owns the sink's position: only what the sink has taken moves it."""

    def __init__(self, tail: Tail, sink: Sink) -> None:
        self.sink = sink
        self._tail = tail
        self._position: Checkpoint | None = None
        self._up = True
        self._caught_up = False
        self._caught_up_at = time.monotonic()
        self._delay = 0.0
        self._wake = threading.Event()
        self._stopping = False
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._run, name=sink.name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, deadline: float) -> None:
        """Read to the end, then close the sink; give up at `deadline` (monotonic). May be called again with an earlier one."""
        self._deadline = deadline
        self._stopping = True
        self._wake.set()

    def join(self, timeout: float) -> bool:
        """True if it has ended."""
        self._thread.join(max(0.0, timeout))
        return not self._thread.is_alive()

    def view(self, written: dict[str, tuple[int, int]], now: float) -> SinkView:
        position = self._position or Checkpoint()
        behind = 0.0 if self._caught_up else now - self._caught_up_at
        return SinkView(self.sink.name, self._up and self.sink.up, self._tail.unread_bytes(position, written), max(0.0, behind))

    # -- the thread --

    def _run(self) -> None:
        while True:
            stopping = self._stopping  # read before the poll: that poll sees all that was written before the stop
            wait = self.turn()
            if stopping and (self._caught_up or time.monotonic() >= self._deadline):
                break
            self._wake.wait(min(wait, max(0.0, self._deadline - time.monotonic())))
            self._wake.clear()
        self._close()

    def turn(self) -> float:
        """One poll → seconds to wait before the next."""
        began = time.monotonic()
        try:
            more = self._advance()
            self.sink.tend()
        except Exception as error:
            return self._failed(error)
        self._worked()
        if more:
            self._caught_up = False
            return 0.0
        self._caught_up, self._caught_up_at = True, began
        return IDLE_SECONDS

    def _advance(self) -> bool:
        if self._position is None:
            self._position = self.sink.load()
        batch = self._tail.poll(self._position)
        if batch.records or batch.checkpoint.done != self._position.done:
            self._caught_up = False  # there is more than the sink has, however long it now takes over it
            self.sink.write(batch)
        self._position = batch.checkpoint
        for reason in batch.corrupt:
            log.error("unreadable bytes in the journal", extra={"sink": self.sink.name, "what": reason})
        return batch.more

    def _failed(self, error: Exception) -> float:
        self._caught_up = False
        if self._up:
            bug = not isinstance(error, self.sink.failures)
            facts = {"sink": self.sink.name, "error": _said(error)}
            log.error("sink down; records wait in the journal", extra=facts, exc_info=bug)
        self._up = False
        self._delay = min(LONGEST_DELAY, self._delay * 2 or FIRST_DELAY)
        return self._delay

    def _worked(self) -> None:
        if not self._up:
            log.info("sink up again", extra={"sink": self.sink.name})
        self._up = True
        self._delay = 0.0

    def _close(self) -> None:
        left = self._deadline - time.monotonic()
        if not self._caught_up:
            log.error("stopped before the journal's end; the rest waits there", extra={"sink": self.sink.name})
        try:
            self.sink.close(left)
        except Exception as error:
            log.error("sink not closed well", extra={"sink": self.sink.name, "error": _said(error)})


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {getattr(error, 'orig', None) or error}"[:500]
