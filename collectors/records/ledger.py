"""The ledger's sink: rows and position in one transaction, so that every request is there exactly once.

The ledger never drops. A database that is down or locked is asked again; only what no database will ever take (it fails by itself
and for what it is) is put aside, so that one record can't keep all others out.

What the rows cost is summed beside them, for budgets, and written to the `spend` file, together with how far the journal was read
for it: from then on that may be deleted, so that the file and the journal together always tell all that was spent.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError, StatementError

from collectors.records.spent import First, Spent, Sums
from proxy.exchange import Phase, Record, encode_record
from proxy.journal import Batch, Checkpoint
from proxy.spend.file import write_spend
from proxy.spend.tally import Amounts, Who, bounded
from proxy.spend.windows import Period
from proxy.store import (
    StoreError,
    day_of,
    first_since,
    insert_records,
    load_checkpoint,
    open_database,
    reader,
    save_checkpoint,
    spent,
    steady,
    summed_days,
)

log = logging.getLogger(__name__)

WRITE_SECONDS = 1.0
SHARE = 20
"""Writing the spend file may take one in so many seconds, however large it is."""

_FOR_GOOD = (DataError, IntegrityError, ValueError, TypeError, OverflowError)


class LedgerSink:
    name = "ledger"
    failures: tuple[type[Exception], ...] = (StoreError, SQLAlchemyError, OSError)
    up = True

    def __init__(
        self, url: str, collector: str, unstored: Path, spend_path: Path, periods: Callable[[], Sequence[Period]], currency: str
    ) -> None:
        """`periods`: those for which somebody has a budget just now."""
        self._url = url
        self._collector = collector
        self._unstored = unstored
        self._spend_path = spend_path
        self._periods = periods
        self._currency = currency
        self._engine: Engine | None = None
        self._stored: Checkpoint | None = None
        self._spent: Spent | None = None
        """None: to be read from the database."""
        self._behind = False
        """The position is older than the rows, which then can't be told from those that are still to come."""
        self._changed = False
        self._write_at = 0.0

    @property
    def stored(self) -> Checkpoint | None:
        """That of the spend file."""
        return self._stored

    def load(self) -> Checkpoint:
        if self._engine is None:
            self._engine = open_database(self._url)
        self._spent, self._behind, self._changed = None, False, True
        try:
            self._spent = self._read_spent()
        except msgspec.MsgspecError as error:
            log.error("position not readable; the journal is read again, rows stay unique", extra={"error": str(error)})
            self._behind = True
            return Checkpoint()
        return self._spent.checkpoint

    def _read_spent(self) -> Spent:
        """What the database has: position and rows of one moment. Raises msgspec.MsgspecError."""
        with reader(self._connected()).connect() as connection:
            steady(connection)
            blob = load_checkpoint(connection, self._collector, self.name)
            made = Spent(self._periods(), self._currency, Checkpoint() if blob is None else Checkpoint.decode(blob))
            made.read(*self._asking(connection), time.time_ns())
        return made

    def _follow_periods(self) -> None:
        """Sum what somebody has a budget for just now. What was added here is what the database has."""
        if self._spent is not None and self._spent.periods != (wanted := list(self._periods())):
            with reader(self._connected()).connect() as connection:
                steady(connection)
                self._spent.follow(wanted, *self._asking(connection), time.time_ns())
            self._changed = True

    def _asking(self, connection: Connection) -> tuple[Sums, First]:
        return (
            lambda since, until: self._sums(connection, since, until),
            lambda since: first_since(connection, self._collector, since),
        )

    def _sums(self, connection: Connection, since_ns: int, until_ns: int) -> Iterator[tuple[Who, Amounts]]:
        for row in spent(connection, self._collector, self._currency, since_ns, until_ns):
            if any(amounts := (row.cost_nano, row.tokens, row.gpu_ns)):
                yield (row.worker, row.key_id, row.team, row.user_name, row.project), bounded(*amounts)

    def write(self, batch: Batch) -> None:
        try:
            self._store(batch.records, batch.checkpoint)
        except Exception as error:
            if not _is_for_good(error):
                raise
            self._store(self._storable(batch.records), batch.checkpoint)
        if not batch.more:
            self._behind = False

    def _store(self, records: Sequence[Record], checkpoint: Checkpoint) -> None:
        with self._connected().begin() as connection:
            if self._behind:
                records = self._not_counted_yet(connection, records)
            new = insert_records(connection, records, self._collector)
            save_checkpoint(connection, self._collector, self.name, checkpoint.encode())
        self._changed = True
        if new != len(records):
            self._spent = None  # some were there before
        if self._spent is not None:
            self._spent.add(records, checkpoint)

    def _not_counted_yet(self, connection: Connection, records: Sequence[Record]) -> list[Record]:
        """Where rows can't be told from those that are still to come: without those of days whose rows may have been taken away,
        and would be counted twice."""
        summed = summed_days(connection, self._collector)
        kept = [record for record in records if day_of(record) not in summed]
        if len(kept) != len(records):
            facts = {"records": len(records) - len(kept)}
            log.warning("records of days that are no longer kept came again; they are counted already", extra=facts)
        return kept

    def _storable(self, records: Sequence[Record]) -> list[Record]:
        """Those that the database takes; the others are put aside."""
        good = []
        for record in records:
            try:
                with self._connected().connect() as connection:  # never committed
                    insert_records(connection, [record], self._collector)
            except Exception as error:
                if not _is_for_good(error):
                    raise
                self._put_aside(record, error)
            else:
                good.append(record)
        return good

    def _put_aside(self, record: Record, error: Exception) -> None:
        self._unstored.mkdir(mode=0o700, exist_ok=True)
        path = self._unstored / f"{record.hex_id}.record"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as stream:
            stream.write(encode_record(Phase.CLOSING, record))
        log.error("the database refuses a record; it was put aside", extra={"file": str(path), "error": str(error)})

    def _connected(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("load() comes first")
        return self._engine

    def tend(self) -> None:
        """Write the spend file if it is time. The rows are committed; without it they are kept in the journal as well."""
        if time.monotonic() >= self._write_at:
            self._write_spend()

    def _write_spend(self) -> None:
        self._follow_periods()
        began = time.monotonic()
        if not self._behind and (self._changed or not self._spend_path.exists()):
            if self._spent is None:
                self._spent = self._read_spent()
            write_spend(self._spend_path, self._spent.file(time.time_ns()))
            self._stored, self._changed = self._spent.checkpoint, False
        ended = time.monotonic()
        self._write_at = ended + max(WRITE_SECONDS, SHARE * (ended - began))

    def close(self, seconds: float) -> None:
        if self._engine is None:
            return
        try:
            self._write_spend()
        finally:
            self._engine.dispose()


def _is_for_good(error: Exception) -> bool:
    """Would it fail again with the same input?"""
    cause = error.orig if isinstance(error, StatementError) and not isinstance(error, _FOR_GOOD) else error
    return isinstance(error, _FOR_GOOD) or isinstance(cause, _FOR_GOOD)
