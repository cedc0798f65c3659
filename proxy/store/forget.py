"""Taking out of the ledger what requests say of one person, and leaving what they took.

What was asked and answered is never in the ledger, it is in traces. Here are an address, what the caller said of itself and of
whom it asked for, and the text of an error. These are blanked, and so is the trace's id: whoever blanks a row has deleted its
trace before. Whose key it was stays, as everything does that sums and budgets are made of: they are the same before and after.

The steps are small: a step looks at one day. What was done once isn't found again, so whoever is interrupted begins anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import date
from itertools import groupby
from typing import Final, Literal, NamedTuple

from sqlalchemy import Connection, select, update

from proxy.store.audit import Author, note, storable
from proxy.store.purges import withdraw
from proxy.store.tables import requests

Whose = Literal["user", "end_user"]
"""By whose key it was, or by whom the caller named (OpenAI's `user`)."""

BLANKED: Final = ("client_address", "client_request_id", "end_user", "error", "trace_id", "parent_span_id")
BEGINNING: Final = (date.min, "")
_COLUMNS: Final = {"user": requests.c.user_name, "end_user": requests.c.end_user}


class Said(NamedTuple):
    """One request that says something of the person, and its trace (32 hex digits). `received_at`: ns since 1970."""

    day: date
    id: str
    trace_id: str
    received_at: int


Place = tuple[date, str]
"""A day, and an id of that day after which to go on."""


def said_of(connection: Connection, whose: Whose, name: str, after: Place, most: int) -> tuple[list[Said], Place | None]:
    """Some that are still to be blanked, `most` at most, and where to go on; None: there are no more. A scan of a day at most."""
    day, last = after
    if not name or not storable(name):
        return [], None
    row = requests.c
    if not last:
        later = select(row.day).where(row.day >= day).order_by(row.day).limit(1)
        found_day = connection.execute(later).scalar_one_or_none()
        if found_day is None:
            return [], None
        day = found_day
    wanted = (row.day == day, row.id > last, _COLUMNS[whose] == name, row.trace_id != "")
    query = select(row.day, row.id, row.trace_id, row.received_at).where(*wanted).order_by(row.id).limit(most)
    found = [Said(*each) for each in connection.execute(query)]
    if len(found) == most:
        return found, (day, found[-1].id)
    if day == date.max:
        return found, None
    return found, (date.fromordinal(day.toordinal() + 1), "")


def blank(connection: Connection, found: Iterable[Said]) -> int:
    """Blank these rows → how many of them there were."""
    changed = 0
    for day, some in groupby(sorted(found), key=lambda each: each.day):
        rows = update(requests).where(requests.c.day == day, requests.c.id.in_([each.id for each in some]))
        changed += connection.execute(rows.values(dict.fromkeys(BLANKED, ""))).rowcount
    return changed


def note_forgetting(connection: Connection, whose: Whose, name: str, author: Author, done: Mapping[str, int]) -> None:
    """Who has whom forgotten, and what was done; what the cache has of that person isn't given any more. The log doesn't name
    again whom only callers named. Raises Repeated."""
    withdraw(connection, author, user=name)
    if whose == "user":
        note(connection, author, "forget", "users", name, after=dict(done))
    else:
        note(connection, author, "forget", "requests", "", after=dict(done))
