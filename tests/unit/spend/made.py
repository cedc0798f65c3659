"""A state directory with its journal, a ledger's sink that is driven by hand, and the sums that the ledger has."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from collectors.records.ledger import LedgerSink
from proxy.journal import Tail
from proxy.spend import Amounts, Holder, Period, SpendReader, window
from proxy.spend.file import SpendFile, write_spend
from proxy.spend.reader import COLLECTOR_ID

Totals = dict[str, dict[Holder, Amounts]]

TOTAL = Period("total")


class Host:
    """`collect` is what the collector does in a second."""

    def __init__(self, directory: Path, periods: Sequence[Period] = (TOTAL,), currency: str = "USD") -> None:
        self.directory = directory
        self.journal = directory / "journal"
        self.spend = directory / "spend"
        self.periods = periods
        self.currency = currency
        self.tail = Tail(self.journal)
        self.reader = self.new_reader()
        self._sink: LedgerSink | None = None

    def new_reader(self) -> SpendReader:
        return SpendReader(self.spend, self.journal, self.currency)

    def start(self) -> LedgerSink:
        """A collector begins, or begins again."""
        if not (self.directory / COLLECTOR_ID).exists():
            write_spend(self.spend, SpendFile(currency=self.currency))
            (self.directory / COLLECTOR_ID).touch()
        database = f"sqlite:///{self.directory / 'ledger.db'}"
        self._sink = LedgerSink(database, "me", self.directory / "unstored", self.spend, lambda: self.periods, self.currency)
        self._position = self._sink.load()
        return self._sink

    def collect(self, limit: int = 2000) -> None:
        """Everything there is, in batches of about `limit`."""
        while self.step(limit):
            pass

    def step(self, limit: int = 2000) -> bool:
        """One batch; True if there is more. Then what is stored goes from the journal."""
        sink = self._sink or self.start()
        batch = self.tail.poll(self._position, limit)
        if batch.records or batch.checkpoint.done != self._position.done:
            sink.write(batch)
        self._position = batch.checkpoint
        sink.tend()
        if sink.stored is not None:
            self.tail.remove([sink.stored])
        return batch.more

    def kill(self) -> None:
        """The collector dies: what it had in memory is gone."""
        self._sink = None

    def truth(self, period: Period = TOTAL, at_ns: int = 0) -> Totals | None:
        """By a reader that has looked before."""
        return self.reader.look().totals(period, window(period, at_ns)[0])

    def ledger(self, period: Period = TOTAL, at_ns: int = 0) -> Totals:
        """By the database."""
        query = """
            SELECT worker, key_id, team, user_name, project,
                sum(cost_nano * (currency = ?)), sum(input_tokens + output_tokens), sum(gpu_ns)
            FROM requests WHERE received_at >= ? AND received_at < ? GROUP BY worker, key_id, team, user_name, project
        """
        totals: Totals = {}
        with closing(sqlite3.connect(self.directory / "ledger.db")) as connection:
            for worker, key_id, team, user, project, *amounts in connection.execute(
                query, (self.currency, *window(period, at_ns))
            ):
                if any(amounts):
                    totals.setdefault(worker, {})[Holder(key_id, team, user, project)] = Amounts(*amounts)
        return totals
