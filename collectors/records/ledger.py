"""The ledger's sink: rows and position in one transaction, so that every request is there exactly once.

The ledger never drops. A database that is down or locked is asked again; only what no database will ever take (it fails by itself
and for what it is) is put aside, so that one record can't keep all others out.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
from sqlalchemy import Engine
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError, StatementError

from proxy.exchange import Phase, Record, encode_record
from proxy.journal import Batch, Checkpoint
from proxy.store import StoreError, insert_records, load_checkpoint, open_database, save_checkpoint

log = logging.getLogger(__name__)

_FOR_GOOD = (DataError, IntegrityError, ValueError, TypeError, OverflowError)


class LedgerSink:
    name = "ledger"
    failures: tuple[type[Exception], ...] = (StoreError, SQLAlchemyError, OSError)
    up = True

    def __init__(self, url: str, collector: str, unstored: Path) -> None:
        self._url = url
        self._collector = collector
        self._unstored = unstored
        self._engine: Engine | None = None
        self._stored: Checkpoint | None = None

    @property
    def stored(self) -> Checkpoint | None:
        return self._stored

    def load(self) -> Checkpoint:
        if self._engine is None:
            self._engine = open_database(self._url)
        with self._engine.begin() as connection:
            blob = load_checkpoint(connection, self._collector, self.name)
        try:
            self._stored = Checkpoint() if blob is None else Checkpoint.decode(blob)
        except msgspec.MsgspecError as error:
            log.error("position not readable; the journal is read again, rows stay unique", extra={"error": str(error)})
            self._stored = Checkpoint()
        return self._stored

    def write(self, batch: Batch) -> None:
        try:
            self._store(batch.records, batch.checkpoint)
        except Exception as error:
            if not _is_for_good(error):
                raise
            self._store(self._storable(batch.records), batch.checkpoint)

    def _store(self, records: Sequence[Record], checkpoint: Checkpoint) -> None:
        with self._connected().begin() as connection:
            insert_records(connection, records)
            save_checkpoint(connection, self._collector, self.name, checkpoint.encode())
        self._stored = checkpoint

    def _storable(self, records: Sequence[Record]) -> list[Record]:
        """Those that the database takes; the others are put aside."""
        good = []
        for record in records:
            try:
                with self._connected().connect() as connection:  # never committed
                    insert_records(connection, [record])
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
        """Nothing: what was written is committed."""

    def close(self, seconds: float) -> None:
        if self._engine is not None:
            self._engine.dispose()


def _is_for_good(error: Exception) -> bool:
    """Would it fail again with the same input?"""
    cause = error.orig if isinstance(error, StatementError) and not isinstance(error, _FOR_GOOD) else error
    return isinstance(error, _FOR_GOOD) or isinstance(cause, _FOR_GOOD)
