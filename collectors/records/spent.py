"""What the ledger's rows cost, summed by budget window: read from the database once, then kept by adding what is stored. No I/O.

Of every period the current window and the one before are kept, and what lies after them (a clock may have been put back): rows by
worker, key, team, user and project.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from proxy.exchange import Record
from proxy.journal import Checkpoint
from proxy.spend.file import PeriodWindows, Row, SpendFile, WindowRows
from proxy.spend.tally import Amounts, Rows, Tally, Who, add
from proxy.spend.windows import Period, window

Sums = Callable[[int, int], Iterable[tuple[Who, Amounts]]]
"""What the rows of [since, until) cost."""
First = Callable[[int], int | None]
"""When the first request of this time or later was received."""


class Spent:
    """As of `checkpoint`, a position in the journal."""

    def __init__(self, periods: Sequence[Period], currency: str, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._currency = currency
        self._periods = [_PeriodSums(period) for period in periods]
        self._added = Tally(currency)

    def read(self, sums: Sums, first: First, now_ns: int) -> None:
        """Begin with what the ledger has."""
        for period in self._periods:
            period.read(sums, first, now_ns)

    @property
    def periods(self) -> list[Period]:
        return [each.period for each in self._periods]

    def follow(self, periods: Sequence[Period], sums: Sums, first: First, now_ns: int) -> None:
        """Sum these periods from now on. Those that are new begin with what the ledger has, which is what was added here."""
        self._spread()
        known = {each.period: each for each in self._periods}
        made = [_PeriodSums(period) for period in periods if period not in known]
        for each in made:
            each.read(sums, first, now_ns)
        known.update((each.period, each) for each in made)
        self._periods = [known[period] for period in periods]

    def add(self, records: Iterable[Record], checkpoint: Checkpoint) -> None:
        self._added.add(records)
        self.checkpoint = checkpoint

    def file(self, now_ns: int) -> SpendFile:
        """As it is to be written."""
        self._spread()
        for period in self._periods:
            period.forget(now_ns)
        return SpendFile(
            currency=self._currency, checkpoint=self.checkpoint, periods=[period.shown() for period in self._periods]
        )

    def _spread(self) -> None:
        """What was added, over the periods."""
        if self._added:
            quarters, self._added = self._added.quarters(), Tally(self._currency)
            for period in self._periods:
                period.add(quarters)


class _PeriodSums:
    def __init__(self, period: Period) -> None:
        self.period = period
        self._since_ns = 0
        self._windows: dict[int, Rows] = {}

    def read(self, sums: Sums, first: First, now_ns: int) -> None:
        at: int | None
        at = self._since_ns = self._previous(now_ns)
        while at is not None:
            start, end = window(self.period, at)
            for who, amounts in sums(start, end):
                add(self._windows.setdefault(start, {}), who, amounts)
            at = first(end)

    def add(self, quarters: dict[int, Rows]) -> None:
        for quarter, rows in quarters.items():
            start, _ = window(self.period, quarter)
            kept = self._windows.setdefault(start, {})
            for who, amounts in rows.items():
                add(kept, who, amounts)

    def forget(self, now_ns: int) -> None:
        """What lies before the previous window. What was forgotten isn't known again when a clock is put back."""
        self._since_ns = max(self._since_ns, self._previous(now_ns))
        for start in [start for start in self._windows if start < self._since_ns]:
            del self._windows[start]

    def shown(self) -> PeriodWindows:
        windows = [WindowRows(start, [_row(*who, each) for who, each in rows.items()]) for start, rows in self._windows.items()]
        return PeriodWindows(*self.period, self._since_ns, windows)

    def _previous(self, now_ns: int) -> int:
        start, _ = window(self.period, now_ns)
        return window(self.period, max(0, start - 1))[0]


def _row(worker: str, key_id: str, team: str, user: str, project: str, amounts: Amounts) -> Row:
    return Row(worker, key_id, team, amounts.cost_nano, amounts.tokens, amounts.gpu_ns, user, project)
