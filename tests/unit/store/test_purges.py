"""Which answers of the cache aren't to be given again: marked, counted, noted; few at any time, and none for longer than it is of
use."""

from __future__ import annotations

import time
from pathlib import Path
from typing import get_args

import pytest
from sqlalchemy import Connection, update

from proxy.nouns import Ttl
from proxy.snapshot import Purge
from proxy.store import (
    Author,
    Mark,
    Repeated,
    audit_rows,
    cache_secret,
    create_key,
    marks,
    open_database,
    purge,
    revision,
    revoke_key,
    swept,
)
from proxy.store import purges as module
from proxy.store.engine import now_ns
from proxy.store.forget import note_forgetting
from proxy.store.purges import LONGEST_NS
from proxy.store.tables import catalogue, purges
from tests.unit.store.conftest import Store

ALICE = Author("alice", "admin", "192.0.2.1")


def said(store: Store) -> list[tuple[str, ...]]:
    """What is withdrawn, the newest first."""
    return [(each.purge.model, each.purge.key_id, each.purge.team, each.purge.user) for each in store.read(marks)]


def test_a_mark_is_counted_and_noted(store: Store) -> None:
    before, since = store.read(revision), store.read(now_ns)
    made = store.write(purge, ALICE, model="m", team="research")
    assert store.read(marks) == [made]
    assert since < made.purge.before_unix_ns == made.made_at < store.read(now_ns)
    assert made == Mark(made.id, Purge(made.made_at, "m", "", "research", ""), made.made_at, "alice", None)
    assert store.read(revision) == before + 1
    [row] = store.read(audit_rows)
    assert (row.noun, row.name, row.action, row.team, row.author) == ("cache", "cache", "purge", "research", "alice")
    assert row.after == {"id": made.id, "before_at": made.made_at, "made_at": made.made_at, "model": "m", "team": "research"}


def test_only_what_is_older(store: Store) -> None:
    made = store.write(purge, ALICE, age_ns=3600 * 10**9)
    assert made.purge == Purge(made.made_at - 3600 * 10**9)


def test_the_moment_is_the_databases(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """On PostgreSQL; SQLite's is this host's."""
    monkeypatch.setattr(time, "time_ns", lambda: 5)
    there = store.read(now_ns)
    assert (there == 5) == store.url.startswith("sqlite")
    made = store.write(purge, ALICE)
    assert made.made_at >= there


def test_what_is_sent_twice_is_told(store: Store) -> None:
    once = ALICE._replace(idempotency_key="k")
    made = store.write(purge, once, model="m")
    with pytest.raises(Repeated):
        store.write(purge, once, model="n")
    assert store.read(marks) == [made]


# -- few --


def test_one_that_is_covered_goes(store: Store) -> None:
    store.write(purge, ALICE, model="m", key_id="k")
    store.write(purge, ALICE, model="m", team="t")
    store.write(purge, ALICE, user="u")
    store.write(purge, ALICE, model="n")
    store.write(purge, ALICE, model="m")
    assert said(store) == [("m", "", "", ""), ("n", "", "", ""), ("", "", "", "u")]
    store.write(purge, ALICE, model="m")
    assert len(said(store)) == 3, "the same again is the same, of now"
    store.write(purge, ALICE)
    assert said(store) == [("", "", "", "")]


def test_one_that_is_younger_is_not_covered(store: Store) -> None:
    store.write(purge, ALICE, model="m")
    store.write(purge, ALICE, age_ns=10**9)
    assert said(store) == [("", "", "", ""), ("m", "", "", "")]


def test_a_narrower_one_covers_nothing(store: Store) -> None:
    store.write(purge, ALICE)
    store.write(purge, ALICE, model="m")
    store.write(purge, ALICE, model="m", key_id="k")
    store.write(purge, ALICE, model="m", team="t")
    store.write(purge, ALICE, model="m", user="u")
    assert len(said(store)) == 5


def test_of_too_many_the_oldest_become_one(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 4)
    made = [store.write(purge, ALICE, model=str(number)) for number in range(4)]
    assert store.read(marks) == made[::-1]
    made.append(store.write(purge, ALICE, model="4"))
    newest, *rest = store.read(marks)
    assert (newest.purge, newest.author) == (Purge(made[1].purge.before_unix_ns), "glasshouse")
    assert rest == [made[4], made[3], made[2]]
    made.append(store.write(purge, ALICE, model="5", age_ns=3600 * 10**9))
    assert len(store.read(marks)) == 4
    assert store.read(marks)[0].purge == Purge(made[1].purge.before_unix_ns), "the old one among them too"


def test_numbers_are_not_given_again(store: Store) -> None:
    """Whoever looks Redis through for one mark must not tell it of another."""
    first = store.write(purge, ALICE, model="m")
    second = store.write(purge, ALICE)
    assert int(second.id) > int(first.id)
    store.write(swept, [first.id], 7)
    assert store.read(marks) == [second]


def test_none_is_kept_for_longer_than_an_answer(store: Store) -> None:
    def age(connection: Connection, by_ns: int) -> None:
        connection.execute(update(purges).values(before_at=purges.c.before_at - by_ns))

    _, most = get_args(Ttl)
    assert most.le * 10**9 == LONGEST_NS
    store.write(purge, ALICE, model="m")
    store.write(age, LONGEST_NS - 3600 * 10**9)
    assert len(said(store)) == 1
    store.write(age, 3600 * 10**9)
    assert said(store) == []
    store.write(purge, ALICE, model="n")
    assert store.read(module._marks) == store.read(marks)


# -- Redis --


def test_what_was_deleted_is_told_once(store: Store) -> None:
    one, two, three = (store.write(purge, ALICE, model=name) for name in "mno")
    before = store.read(revision)
    store.write(swept, [one.id, two.id], 7)
    store.write(swept, [two.id, three.id], 0)
    assert [each.deleted for each in store.read(marks)] == [0, 7, 7]
    assert store.read(revision) == before, "workers needn't know"
    store.write(swept, [], 0)


# -- as part of something else --


def test_a_key_that_is_revoked_has_no_answers(store: Store) -> None:
    _, key = store.write(create_key, "laptop")
    before = store.read(revision)
    store.write(revoke_key, "laptop", ALICE)
    assert said(store) == [("", key.id, "", "")]
    assert store.read(revision) == before + 1, "one change"
    assert [row.action for row in store.read(audit_rows)] == ["revoke", "create"]
    store.write(revoke_key, key.id, ALICE)
    assert len(said(store)) == 1


@pytest.mark.parametrize("whose", ["user", "end_user"])
def test_who_is_forgotten_has_no_answers(store: Store, whose: str) -> None:
    store.write(note_forgetting, whose, "ada", ALICE, {})  # type: ignore[arg-type]
    assert said(store) == [("", "", "", "ada")]


# -- the secret --


def test_the_secret_is_made_once(database_url: str) -> None:
    """Also where several processes start at once: see the migrations."""
    found = set()
    for _ in range(2):
        engine = open_database(database_url)
        with engine.connect() as connection:
            found.add(cache_secret(connection))
        engine.dispose()
    [secret] = found
    assert len(secret) == 32


def test_databases_have_secrets_of_their_own(tmp_path: Path) -> None:
    found = set()
    for name in "ab":
        engine = open_database(f"sqlite:///{tmp_path / name}")
        with engine.connect() as connection:
            found.add(cache_secret(connection))
        engine.dispose()
    assert len(found) == 2


def test_without_a_secret(store: Store) -> None:
    def lose(connection: Connection) -> None:
        connection.execute(update(catalogue).values(cache_secret=None))

    kept = store.read(cache_secret)
    store.write(lose)
    assert store.read(cache_secret) == b""
    store.write(lambda connection: connection.execute(update(catalogue).values(cache_secret=kept)).rowcount)
