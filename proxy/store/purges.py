"""Which answers of the cache aren't to be given again: marks, each for all that it fits and that were complete before its moment.

A mark stays until every answer that it is about has expired (`LONGEST_NS`), and there are `MOST` of them at most. One that a
later and broader one covers goes. Of more than that the oldest become one mark, for everything that was complete before the
youngest of them: it takes more than was asked for, and nothing that is newer than that.

Moments are the database's, which all hosts ask. Answers are dated by the clocks of those that had them, so a clock that is fast
by a second may keep answers of that second.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Row, delete, insert, select, update

from proxy.snapshot import Purge
from proxy.store.audit import GLASSHOUSE, Author, lock, note
from proxy.store.engine import now_ns
from proxy.store.tables import catalogue, purges

MOST: Final = 256
"""A worker goes through all of them for each answer that it finds."""

LONGEST_NS: Final = 30 * 86_400 * 10**9
"""No answer is kept for longer (`proxy.nouns.Ttl`)."""


class Mark(NamedTuple):
    """One of them. `made_at`: ns since 1970, UTC. `deleted`: so many answers went from Redis when it was looked through, for this
    mark and others of that moment; None: that is still to come, or there is no Redis."""

    id: str
    purge: Purge
    made_at: int
    author: str
    deleted: int | None


def cache_secret(connection: Connection) -> bytes:
    """With which the cache makes its keys: 32 random bytes that this database has had from the beginning."""
    return bytes(connection.execute(select(catalogue.c.cache_secret)).scalar_one() or b"")


def marks(connection: Connection) -> list[Mark]:
    """All that are still of use, the newest first."""
    since = now_ns(connection) - LONGEST_NS
    return [each for each in _marks(connection) if each.purge.before_unix_ns > since]


def purge(
    connection: Connection,
    author: Author,
    *,
    model: str = "",
    key_id: str = "",
    team: str = "",
    user: str = "",
    age_ns: int = 0,
) -> Mark:
    """Withdraw answers, and note it; "": any. `age_ns`: only those that are older. Raises Repeated."""
    made = withdraw(connection, author, model=model, key_id=key_id, team=team, user=user, age_ns=age_ns)
    said = {"model": model, "key_id": key_id, "team": team, "user": user}
    after = {"id": made.id, "before_at": made.purge.before_unix_ns, "made_at": made.made_at}
    after |= {name: text for name, text in said.items() if text}
    note(connection, author, "purge", "cache", "cache", team=team, after=after)
    return made


def withdraw(
    connection: Connection,
    author: Author,
    *,
    model: str = "",
    key_id: str = "",
    team: str = "",
    user: str = "",
    age_ns: int = 0,
) -> Mark:
    """The same as part of another change, which is noted by itself."""
    lock(connection)
    now = now_ns(connection)
    made = Purge(now - age_ns, model, key_id, team, user)
    there = _marks(connection)
    mark = _add(connection, made, now, author.name)  # first: SQLite gives the number of the last row again once that is gone
    _remove(connection, [each for each in there if _covers(made, each.purge) or each.purge.before_unix_ns <= now - LONGEST_NS])
    _bound(connection, now)
    return mark


def swept(connection: Connection, ids: Collection[str], deleted: int) -> None:
    """Redis was looked through for these, and had so many answers."""
    looked = purges.c.id.in_(map(int, ids)), purges.c.deleted.is_(None)
    connection.execute(update(purges).where(*looked).values(deleted=deleted))


def _bound(connection: Connection, now: int) -> None:
    there = sorted(_marks(connection), key=lambda each: each.purge.before_unix_ns)
    if len(there) > MOST:
        oldest = there[: len(there) - MOST + 1]
        _add(connection, Purge(oldest[-1].purge.before_unix_ns), now, GLASSHOUSE.name)
        _remove(connection, oldest)


def _covers(new: Purge, old: Purge) -> bool:
    """Whatever `old` withdraws, `new` does too."""
    return old.before_unix_ns <= new.before_unix_ns and all(
        wanted in ("", other)
        for wanted, other in ((new.model, old.model), (new.key_id, old.key_id), (new.team, old.team), (new.user, old.user))
    )


def _marks(connection: Connection) -> list[Mark]:
    rows = connection.execute(select(purges).order_by(purges.c.id.desc()))
    return [Mark(str(row.id), _purge(row), row.made_at, row.author, row.deleted) for row in rows]


def _purge(row: Row[Any]) -> Purge:
    return Purge(row.before_at, row.model, row.key_id, row.team, row.user_name)


def _add(connection: Connection, made: Purge, now: int, author: str) -> Mark:
    row = {
        "before_at": made.before_unix_ns,
        "model": made.model,
        "key_id": made.key_id,
        "team": made.team,
        "user_name": made.user,
        "made_at": now,
        "author": author,
    }
    made_id = connection.execute(insert(purges).values(row).returning(purges.c.id)).scalar_one()
    return Mark(str(made_id), made, now, author, None)


def _remove(connection: Connection, gone: Collection[Mark]) -> None:
    if gone:
        connection.execute(delete(purges).where(purges.c.id.in_([int(each.id) for each in gone])))
