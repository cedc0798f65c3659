"""Counters and histograms as plain lists of integers, and the bounds on their labels.

A series is `labels → [value]` for a counter and `labels → [count per bucket ..., sum]` for a histogram. All values are integers
(nanoseconds, tokens, nano-units of currency), so sums are exact whatever the order; they become floats when they are exposed.
No clock, no I/O, no lock: whoever owns a `Series` sees to that.

Labels are bounded twice: a label takes so many values (`LabelBounds`), a metric has so many series (`Series`). What comes later
is counted under `other`, so a caller who invents names costs nothing and no request goes uncounted.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

OTHER = "other"
MAX_VALUES = 1000
MAX_SERIES = 10_000


class Exemplar(NamedTuple):
    """One observation that fell into a bucket, and the trace that tells its story."""

    trace_id: bytes
    value: int
    unix_ns: int


class LabelBounds:
    """The values that each label has taken."""

    def __init__(self, limit: int = MAX_VALUES) -> None:
        self._limit = limit
        self._known: dict[str, dict[str, str]] = {}

    def bound(self, label: str, value: str) -> str:
        """`value`, or `other` if the label has as many values as it may have."""
        known = self._known.get(label)
        if known is None:
            known = self._known[label] = {}
        found = known.get(value)
        if found is None:
            if len(known) >= self._limit:
                return OTHER
            found = known[value] = value
        return found

    def knows(self, label: str, value: str) -> bool:
        return value in self._known.get(label, ())

    def saved(self) -> dict[str, list[str]]:
        return {label: list(values) for label, values in self._known.items()}

    def restore(self, saved: dict[str, list[str]]) -> None:
        self._known = {label: {value: value for value in values} for label, values in saved.items()}


class Series:
    """All series of one metric. `bounds`: upper bounds of a histogram's buckets, inclusive; none for a counter."""

    __slots__ = ("_limit", "_size", "bounds", "exemplars", "names", "rows")

    def __init__(self, names: Sequence[str], bounds: Sequence[int] = (), limit: int = MAX_SERIES) -> None:
        self.names = tuple(names)
        self.bounds = tuple(bounds)
        self.rows: dict[tuple[str, ...], list[int]] = {}
        self.exemplars: dict[tuple[str, ...], dict[int, Exemplar]] = {}
        self._limit = limit
        self._size = len(self.bounds) + 2 if self.bounds else 1

    def add(self, labels: tuple[str, ...], amount: int = 1) -> None:
        """Count `amount`."""
        row = self.rows.get(labels)
        if row is None:
            row = self._begin(labels)
        row[0] += amount

    def observe(self, labels: tuple[str, ...], value: int, trace_id: bytes = b"", unix_ns: int = 0) -> None:
        """One observation; with `trace_id` it becomes its bucket's exemplar."""
        row = self.rows.get(labels)
        if row is None:
            row = self._begin(labels)
        bucket = bisect_left(self.bounds, value)
        row[bucket] += 1
        row[-1] += value
        if trace_id:
            self.exemplars.setdefault(labels, {})[bucket] = Exemplar(trace_id, value, unix_ns)

    def merge(self, labels: tuple[str, ...], counts: Sequence[int], total: int) -> None:
        """A histogram over the same bounds: its counts and the sum of its observations."""
        row = self.rows.get(labels)
        if row is None:
            row = self._begin(labels)
        for bucket, count in enumerate(counts):
            if count:
                row[bucket] += count
        row[-1] += total

    def _begin(self, labels: tuple[str, ...]) -> list[int]:
        if len(self.rows) >= self._limit:
            labels = (OTHER,) * len(labels)
        return self.rows.setdefault(labels, [0] * self._size)

    def copy(self) -> Series:
        other = Series(self.names, self.bounds, self._limit)
        other.rows = {labels: list(row) for labels, row in self.rows.items()}
        other.exemplars = {labels: dict(exemplars) for labels, exemplars in self.exemplars.items()}
        return other

    def saved(self) -> list[tuple[list[str], list[int]]]:
        return [(list(labels), row) for labels, row in self.rows.items()]

    def restore(self, saved: Sequence[tuple[Sequence[str], list[int]]]) -> None:
        """Raises ValueError if the rows are another metric's."""
        rows = {tuple(labels): list(row) for labels, row in saved}
        if any(len(labels) != len(self.names) or len(row) != self._size for labels, row in rows.items()):
            raise ValueError("rows of another shape")
        self.rows = rows
