"""What a sink is, and the table of them: to add a telemetry destination, add a file and a row."""

from __future__ import annotations

from typing import Protocol

from proxy.journal import Batch, Checkpoint


class Sink(Protocol):
    """A destination that sees every record. Called from one thread, its follower's; `stored` may be read from others."""

    name: str
    failures: tuple[type[Exception], ...]
    """What may happen to it in its world; anything else that it raises is a bug."""
    up: bool
    """False: it takes records, but can't pass them on right now."""

    @property
    def stored(self) -> Checkpoint | None:
        """How far it has come for good: what precedes this may be deleted. None: not known yet."""

    def load(self) -> Checkpoint:
        """Where to go on. Raises whatever keeps it from knowing; it will be asked again."""

    def write(self, batch: Batch) -> None:
        """Take the records and the position that goes with them, both or neither. Raises if it couldn't: nothing has changed,
        and the same will be offered again."""

    def tend(self) -> None:
        """Called between batches, many times a second: keep what was only taken so far. Raises if that fails."""

    def close(self, seconds: float) -> None:
        """No more will come. Keep everything that can be kept within `seconds`."""
