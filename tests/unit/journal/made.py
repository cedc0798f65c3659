"""Journals for tests: real ones, and the file of a writer that was killed."""

from __future__ import annotations

import os
from pathlib import Path

from proxy.exchange import Phase, Record, encode_record
from proxy.journal import Batch, Checkpoint, Journal, Tail

SEGMENT_BYTES = 64 * 1024


def opening(record: Record) -> bytes:
    return encode_record(Phase.OPENING, record)


def progress(record: Record) -> bytes:
    return encode_record(Phase.PROGRESS, record)


def closing(record: Record) -> bytes:
    return encode_record(Phase.CLOSING, record)


def kill(journal: Journal) -> None:
    """What SIGKILL leaves of a writer: no END mark, no lock, the file at its full size."""
    journal._closing = True
    journal._wanted.set()
    journal._thread.join()
    for left in (journal._current, journal._next):
        if left is not None:
            left.map.close()
            os.close(left.fd)


def dead_segment(directory: Path, *payloads: bytes) -> Path:
    """One segment of a killed writer; the path of its file."""
    journal = Journal(directory, SEGMENT_BYTES)
    for payload in payloads:
        journal.append(payload)
    kill(journal)
    return directory / f"{journal.incarnation}-000001.seg"


def read_all(directory: Path, checkpoint: Checkpoint | None = None, limit: int = 2000) -> tuple[list[Record], Batch]:
    """Poll until there is no more → (what ended, the last batch)."""
    tail = Tail(directory)
    records: list[Record] = []
    position = checkpoint or Checkpoint()
    while True:
        batch = tail.poll(position, limit)
        records += batch.records
        position = batch.checkpoint
        if not batch.more:
            return records, batch
