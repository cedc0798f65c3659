"""On PostgreSQL each day of `requests` is a table of its own, so that a day goes at once and what is asked of some days reads
only those.

Nothing depends on a day's table being there: rows of a day that has none go into `requests_default`. That is where clocks that
are wrong by years, rows that come after more than a month and writers of older versions end up, and a day that has begun there
stays there. So days are made ahead of need (`prepare`), and when that fails, or somebody's long report keeps it from happening,
no row waits for it.

Making one takes the weakest lock that PostgreSQL has for it (SHARE UPDATE EXCLUSIVE on `requests`; writers and readers go on)
and, for a moment, the default partition for itself.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

log = logging.getLogger(__name__)

DEFAULT = "requests_default"
BACK_DAYS = 31
"""How far back days get a table of their own: as far as none is ever taken away (`retention.requests_days` is more)."""
AGAIN_SECONDS = 60.0
WAIT_MS = 1_000
"""For locks, those of other collectors included."""

_LOCK = 0x676C6461797A  # any number that nobody else takes
_NAME = re.compile(r"requests_(\d{8})")
_OURS = text(
    "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid WHERE i.inhparent = to_regclass('requests')"
)
_known: WeakKeyDictionary[Engine, set[date]] = WeakKeyDictionary()
_not_before: WeakKeyDictionary[Engine, float] = WeakKeyDictionary()


def is_partition(name: str) -> bool:
    return name == DEFAULT or _NAME.fullmatch(name) is not None


def name_of(day: date) -> str:
    return f"requests_{day:%Y%m%d}"


def days_kept_apart(connection: Connection) -> list[date]:
    """The days that have a table of their own, oldest first."""
    names = (_NAME.fullmatch(name) for name in connection.execute(_OURS).scalars())
    return sorted(datetime.strptime(name[1], "%Y%m%d").replace(tzinfo=UTC).date() for name in names if name)


def prepare(engine: Engine, days: Iterable[date]) -> None:
    """See to a table for today, for tomorrow and for each of `days` that isn't older than `BACK_DAYS`. In transactions of its
    own; never fails: what can't be made now is tried again in a minute."""
    today = datetime.now(UTC).date()
    known = _known.setdefault(engine, set())
    wanted = {today, today + timedelta(1)}
    wanted.update(day for day in days if 0 <= (today - day).days <= BACK_DAYS)
    if wanted <= known or time.monotonic() < _not_before.get(engine, 0.0):
        return
    try:
        for day in sorted(wanted - known):
            with engine.begin() as connection:
                _make(connection, day)
            known.add(day)
    except DBAPIError as error:
        _not_before[engine] = time.monotonic() + AGAIN_SECONDS
        log.warning("no partition made; its rows go into the default one", extra={"error": str(error.orig)})


def _make(connection: Connection, day: date) -> None:
    connection.execute(text(f"SET LOCAL lock_timeout = {WAIT_MS}"))
    connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
    if day in days_kept_apart(connection):
        return
    begun = text(f"SELECT EXISTS (SELECT FROM {DEFAULT} WHERE day = :day)")  # noqa: S608 (ours)
    if connection.execute(begun, {"day": day}).scalar_one():
        return
    name = name_of(day)
    connection.execute(text(f"CREATE TABLE {name} (LIKE requests INCLUDING DEFAULTS)"))
    connection.execute(
        text(f"ALTER TABLE requests ATTACH PARTITION {name} FOR VALUES FROM ('{day}') TO ('{day + timedelta(1)}')")
    )
