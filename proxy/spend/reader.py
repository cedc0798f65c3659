"""The truth about what was spent: the `spend` file, and what the journal has since. Blocking; nothing here asks a database.

Another process replaces the file, and then deletes from the journal what is in it. So a look is right if the file was still the
same when the journal's segments had been listed, and those are still there when they have been read; otherwise it begins again.
What can't be read of the journal the collector reports, which reads the same.

Without a file nothing is known, unless the journal is there from its beginning: no collector has ever worked here, or it hasn't
stored anything.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from proxy.exchange import Record
from proxy.journal import Checkpoint, Tail
from proxy.spend.file import Row, SpendError, SpendFile, decode_spend
from proxy.spend.tally import Amounts, Holder, Rows, Tally, add
from proxy.spend.windows import Period, window

log = logging.getLogger(__name__)

COLLECTOR_ID = "collector-id"
"""What a collector makes when it first works in a state directory."""


class Spend:
    """What was known at one moment; it doesn't change. Without arguments: nothing."""

    def __init__(
        self,
        stored: _Stored | None = None,
        since: Mapping[int, Rows] | None = None,
        open_requests: Sequence[Record] = (),
    ) -> None:
        self._stored = stored
        self._since = since or {}
        self.open = list(open_requests)
        """Requests of living workers that haven't ended, as they were last recorded."""

    def totals(self, period: Period, window_start_ns: int) -> dict[str, dict[Holder, Amounts]] | None:
        """What was spent in a window → worker → whose → amounts. None: it isn't known."""
        rows = None if self._stored is None else self._stored.rows(period, window_start_ns)
        if rows is None:
            return None
        start, end = window(period, window_start_ns)
        totals: Rows = {}
        for row in rows:
            who = (row.worker, row.key_id, row.team, row.user, row.project)
            totals[who] = Amounts(row.cost_nano, row.tokens, row.gpu_ns)
        for quarter, more in self._since.items():
            if start <= quarter < end:
                for who, amounts in more.items():
                    add(totals, who, amounts)
        by_worker: dict[str, dict[Holder, Amounts]] = {}
        for (worker, *holder), amounts in totals.items():
            by_worker.setdefault(worker, {})[Holder(*holder)] = amounts
        return by_worker


class _Stored:
    """What one file says."""

    def __init__(self, file: SpendFile) -> None:
        self._whole = file.checkpoint == Checkpoint()
        self._since = {Period(each.per, each.time_zone): each.since_ns for each in file.periods}
        self._rows = {
            (Period(period.per, period.time_zone), each.start_ns): each.rows for period in file.periods for each in period.windows
        }

    def rows(self, period: Period, window_start_ns: int) -> list[Row] | None:
        """None: not known."""
        since = self._since.get(period)
        if since is None:
            return [] if self._whole else None
        return self._rows.get((period, window_start_ns), []) if window_start_ns >= since else None


class SpendReader:
    """Looks again and again; a look reads only what is new. For one thread at a time."""

    def __init__(self, spend_path: Path, journal_path: Path, currency: str) -> None:
        self._path = spend_path
        self._tail = Tail(journal_path)
        self._currency = currency
        self._read: _Stamp | None = None
        self._stored: _Stored | None = None
        self._position = Checkpoint()
        self._since = Tally(currency)

    def look(self) -> Spend:
        """Raises OSError."""
        while True:
            if self._read is None:
                self._begin()
            present = self._tail.segments()
            if self._stamp() == self._read:
                self._follow()
                if all(self._tail.path(name).exists() for name in present):
                    return Spend(self._stored, self._since.quarters(), list(self._position.requests()))
            self._read = None

    def since_look(self) -> list[Record] | None:
        """The requests that have ended since the last look; None if that can't be told just now. For who looked a moment ago: it
        takes as long as there is something to read."""
        known = [name for name in self._position.positions if name not in self._position.done]
        batch = self._tail.poll(self._position)
        present = {str(name) for name in self._tail.segments()}
        return None if batch.more or not present.issuperset(known) else batch.records

    def _begin(self) -> None:
        stamp = self._stamp()
        file = self._load()
        self._stored = None if file is None else _Stored(file)
        self._position = Checkpoint() if file is None else file.checkpoint
        self._since = Tally(self._currency)
        self._read = stamp

    def _follow(self) -> None:
        while True:
            batch = self._tail.poll(self._position)
            self._since.add(batch.records)
            self._position = batch.checkpoint
            if not batch.more:
                return

    def _load(self) -> SpendFile | None:
        """What is stored; None if that isn't known."""
        try:
            file = decode_spend(self._path.read_bytes())
        except FileNotFoundError:
            return None if self._path.with_name(COLLECTOR_ID).exists() else SpendFile()
        except SpendError as error:
            log.error("what was spent is not readable", extra={"file": str(self._path), "error": str(error)})
            return None
        return file if file.currency == self._currency else None  # the collector has still to count in the new one

    def _stamp(self) -> _Stamp:
        """Says whether the file is the same as before. A collector that comes to an empty directory is a change too."""
        try:
            info = self._path.stat()
        except FileNotFoundError:
            return (0, 0, int(self._path.with_name(COLLECTOR_ID).exists()))
        return (info.st_ino, info.st_mtime_ns, info.st_size)


_Stamp = tuple[int, int, int]
