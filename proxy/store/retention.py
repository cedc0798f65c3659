"""Taking away old rows of `requests`, leaving their sums, in steps that are short and whole.

A step is one transaction: rows and their sums change places in it, so that every request is counted once, whenever a step is
interrupted. On PostgreSQL a step is the oldest day's table, summed by the database and dropped; rows that are in no day's table,
and rows on SQLite, go by `most` at a time. Dropping needs `requests` for itself for a moment: a step that can't have it at once,
because somebody is reading, fails and can be tried again later; writers have waited half a second for it at most.

A row that comes after its day was summed is a row like any other until the next step adds it to the day's sums. A row that comes
*again* after that would be counted twice; the collector's position in the journal, which changes with the rows, keeps it from
coming, and where the position was lost `summed_days` tells which rows may be such.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import date
from typing import Final, NamedTuple

import msgspec
from sqlalchemy import Connection, MetaData, Table, delete, func, insert, select, text

from proxy.store.engine import without_deadline
from proxy.store.ledger import sums_of_halves, whole_sums
from proxy.store.partitions import DEFAULT, days_kept_apart, name_of
from proxy.store.tables import request_sums, requests

LOCK_MS: Final = 500
"""How long a step may keep writers waiting."""

_LOCK: Final = 0x676C676F6E65  # any number that nobody else takes
_MOST: Final = 2**63 - 1
_CHUNK: Final = 500
_AMOUNTS: Final = (
    *("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "audio_seconds", "cost_nano", "gpu_ns"),
    *("saved_input_tokens", "saved_output_tokens", "saved_cost_nano", "saved_ns"),
)
_COUNTED: Final = ("requests", *_AMOUNTS)
_WHO: Final = tuple(column.name for column in request_sums.c if column.name not in ("day", "id", *_COUNTED))
_ELSEWHERE: Final = requests.to_metadata(MetaData(), name=DEFAULT)

Sums = tuple[tuple[str, ...], list[int]]
"""What `_WHO` says, and the amounts of `_COUNTED`."""


class Step(NamedTuple):
    """What one step took away: so many rows of this UTC day."""

    day: date
    rows: int


def remove_expired(connection: Connection, before: date, most: int) -> Step | None:
    """One step on what is of a day before `before`, the oldest first. None: nothing is, or another process is at it.

    Raises DBAPIError, also when somebody reads what is to go.
    """
    if connection.dialect.name != "postgresql":
        return _remove_rows(connection, requests, before, most)
    without_deadline(connection)
    connection.execute(text(f"SET LOCAL lock_timeout = {LOCK_MS}"))
    if not connection.execute(select(func.pg_try_advisory_xact_lock(_LOCK))).scalar_one():
        return None
    apart = [day for day in days_kept_apart(connection) if day < before]
    if apart:
        return _remove_day(connection, apart[0])
    return _remove_rows(connection, _ELSEWHERE, before, most)


def oldest_day(connection: Connection) -> date | None:
    """The UTC day of the oldest rows; None if there are none."""
    return connection.execute(select(requests.c.day).order_by(requests.c.day).limit(1)).scalar_one_or_none()


def summed_days(connection: Connection, collector: str) -> set[date]:
    """The UTC days of which some of this collector's rows have been taken away."""
    query = select(request_sums.c.day).where(request_sums.c.collector.in_((collector, ""))).distinct()
    return set(connection.execute(query).scalars())


def _remove_day(connection: Connection, day: date) -> Step:
    """Who wants to write to it waits until it is gone, and then writes to the default partition."""
    name = name_of(day)
    connection.execute(text(f"LOCK TABLE {name} IN SHARE MODE"))
    table = requests.to_metadata(MetaData(), name=name)
    who = [table.c[each] for each in _WHO]
    amounts = sums_of_halves(*(table.c[each] for each in _AMOUNTS))
    query = select(*who, func.count(), *amounts).group_by(*who)
    found: list[Sums] = []
    for row in connection.execute(query):
        texts, count, halves = row[: len(_WHO)], row[len(_WHO)], row[len(_WHO) + 1 :]
        found.append((tuple(texts), [count, *whole_sums(halves)]))
    _add_up(connection, day, found)
    connection.execute(text(f"DROP TABLE {name}"))
    return Step(day, sum(amounts[0] for _, amounts in found))


def _remove_rows(connection: Connection, table: Table, before: date, most: int) -> Step | None:
    """What is summed is what was deleted, as the deletion itself tells it."""
    day = connection.execute(select(table.c.day).where(table.c.day < before).order_by(table.c.day).limit(1)).scalar_one_or_none()
    if day is None:
        return None
    first = select(table.c.id).where(table.c.day == day).order_by(table.c.id).limit(most).subquery()
    last = connection.execute(select(func.max(first.c.id))).scalar_one()
    gone = delete(table).where(table.c.day == day, table.c.id <= last).returning(*(table.c[name] for name in (*_WHO, *_AMOUNTS)))
    found: dict[tuple[str, ...], list[int]] = {}
    rows = 0
    for row in connection.execute(gone):
        rows += 1
        sums = found.setdefault(tuple(row[: len(_WHO)]), [0] * len(_COUNTED))
        for index, amount in enumerate((1, *row[len(_WHO) :])):
            sums[index] += amount
    _add_up(connection, day, list(found.items()))
    return Step(day, rows)


def _add_up(connection: Connection, day: date, found: list[Sums]) -> None:
    """To what the day has already. What no 63 bits hold is kept as the most that they do: engines claim anything."""
    for start in range(0, len(found), _CHUNK):
        some = found[start : start + _CHUNK]
        ids = [_id(who) for who, _ in some]
        there = dict(_sums_of(connection, day, ids))
        rows = []
        for identity, (who, amounts) in zip(ids, some, strict=True):
            had = there.get(identity, [0] * len(_COUNTED))
            total = [min(old + more, _MOST) for old, more in zip(had, amounts, strict=True)]
            rows.append({"day": day, "id": identity, **dict(zip((*_WHO, *_COUNTED), (*who, *total), strict=True))})
        connection.execute(delete(request_sums).where(request_sums.c.day == day, request_sums.c.id.in_(list(there))))
        connection.execute(insert(request_sums), rows)


def _sums_of(connection: Connection, day: date, ids: list[bytes]) -> Iterator[tuple[bytes, list[int]]]:
    query = select(request_sums.c.id, *(request_sums.c[name] for name in _COUNTED))
    for identity, *amounts in connection.execute(query.where(request_sums.c.day == day, request_sums.c.id.in_(ids))):
        yield bytes(identity), amounts


def _id(who: tuple[str, ...]) -> bytes:
    return hashlib.sha256(msgspec.msgpack.encode(who)).digest()[:16]
