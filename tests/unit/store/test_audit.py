"""The audit log: what is in it is found, and what is done again is known."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import Connection, Engine

from proxy.nouns import AllowanceSettings, KeySettings, ModelSettings, ProjectSettings, TeamSettings, UserSettings
from proxy.store import (
    MODELS,
    PROJECTS,
    TEAMS,
    USERS,
    AuditRow,
    Author,
    Repeated,
    audit_rows,
    change_key,
    create_admin_key,
    create_key,
    entries,
    find,
    note,
    prune_audit,
    put,
    put_everyone,
    reader,
    remove,
    repeated,
    revision,
    revoke_admin_key,
    revoke_key,
    rotate_key,
)
from tests.unit.store.conftest import Store
from tests.unit.store.test_catalogue import ALICE

BOB = Author("bob", "manager", "2001:db8::1")


def _work(connection: Connection) -> None:
    put(connection, TEAMS, "red", TeamSettings(), ALICE)
    put(connection, USERS, "zoe", UserSettings(team="red"), BOB)
    put(connection, USERS, "zoe", UserSettings(team="red", blocked=True), BOB)
    put(connection, MODELS, "red", ModelSettings(), ALICE)
    create_key(connection, "laptop", KeySettings(team="red"), BOB)


def _told(rows: list[AuditRow]) -> list[tuple[str, str, str, str]]:
    return [(row.author, row.action, row.noun, row.name) for row in rows]


def test_the_newest_comes_first(store: Store) -> None:
    store.write(_work)
    rows = store.read(audit_rows)
    assert _told(rows) == [
        ("bob", "create", "keys", "laptop"),
        ("alice", "create", "models", "red"),
        ("bob", "change", "users", "zoe"),
        ("bob", "create", "users", "zoe"),
        ("alice", "create", "teams", "red"),
    ]
    assert [row.at for row in rows] == sorted((row.at for row in rows), reverse=True)
    assert len({row.id for row in rows}) == 5
    assert (rows[2].role, rows[2].address, rows[2].team) == ("manager", "2001:db8::1", "red")
    assert (rows[2].before, rows[2].after) == ({"team": "red"}, {"team": "red", "blocked": True})


def test_it_comes_in_pages(store: Store) -> None:
    store.write(_work)
    rows = store.read(audit_rows)
    pages, before = [], ""
    while page := store.read(audit_rows, before_id=before, limit=2):
        pages += page
        before = page[-1].id
    assert pages == rows


def test_it_is_searched_by_what_people_ask(store: Store) -> None:
    store.write(_work)
    rows = store.read(audit_rows)
    assert store.read(audit_rows, noun="users") == rows[2:4]
    assert store.read(audit_rows, name="red") == [rows[1], rows[4]]
    assert store.read(audit_rows, noun="models", name="red") == [rows[1]]
    assert store.read(audit_rows, author="bob") == [rows[0], rows[2], rows[3]]
    assert store.read(audit_rows, team="red") == [rows[0], rows[2], rows[3], rows[4]]
    assert store.read(audit_rows, since=rows[2].at) == rows[:3]
    assert store.read(audit_rows, until=rows[2].at) == rows[3:]
    for odd in ("", "%", "re_", "' OR 1=1 --", "\0", "\ud800"):  # failure 70, 71
        assert store.read(audit_rows, name=odd) == []
        assert store.read(audit_rows, author=odd) == []
        assert store.read(audit_rows, team=odd or "no") == []
    for odd in ("0", "-1", "x", "1 OR 1=1", "٣", "9" * 30, "\0", " 3"):
        assert store.read(audit_rows, before_id=odd) == []
    assert store.read(audit_rows, before_id="9" * 18) == rows


def test_every_kind_of_change_is_in_it(store: Store) -> None:
    def change(connection: Connection) -> None:
        _work(connection)
        put(connection, PROJECTS, "p", ProjectSettings(), ALICE)
        remove(connection, PROJECTS, "p", ALICE)
        put_everyone(connection, AllowanceSettings(concurrent_requests=1), ALICE)
        change_key(connection, "laptop", KeySettings(), ALICE)
        rotate_key(connection, "laptop", 60, ALICE)
        revoke_key(connection, "laptop", ALICE)
        create_admin_key(connection, "root", "admin", author=ALICE)
        revoke_admin_key(connection, "root", ALICE)

    store.write(change)
    rows = store.read(audit_rows)
    assert _told(rows)[:8] == [
        ("alice", "revoke", "admins", "root"),
        ("alice", "create", "admins", "root"),
        ("alice", "revoke", "keys", "laptop"),
        ("alice", "rotate", "keys", "laptop"),
        ("alice", "change", "keys", "laptop"),
        ("alice", "change", "everyone", "everyone"),
        ("alice", "remove", "projects", "p"),
        ("alice", "create", "projects", "p"),
    ]
    assert rows[4].team == "red", "whose it was"
    assert store.read(revision) == len(rows)


def test_what_is_refused_leaves_no_row(store: Store) -> None:
    store.write(_work)
    before = store.read(audit_rows)

    def refused(connection: Connection) -> None:
        put(connection, TEAMS, "blue", TeamSettings(), ALICE)
        remove(connection, TEAMS, "red", ALICE)

    with pytest.raises(Exception, match="in use"):
        store.write(refused)
    assert store.read(audit_rows) == before
    assert store.read(find, TEAMS, "blue") is None


# -- what is done again --


def test_what_was_done_under_a_key_is_found(store: Store) -> None:
    keyed = ALICE._replace(idempotency_key="k1")
    assert store.read(repeated, keyed) is None
    store.write(put, TEAMS, "red", TeamSettings(), keyed)
    row = store.read(repeated, keyed)
    assert row is not None
    assert (row.action, row.noun, row.name) == ("create", "teams", "red")
    assert store.read(repeated, keyed._replace(address="elsewhere", role="manager")) == row
    for other in (ALICE, ALICE._replace(idempotency_key="k2"), BOB._replace(idempotency_key="k1")):
        assert store.read(repeated, other) is None


def test_a_second_change_under_a_key_is_refused(store: Store) -> None:
    keyed = ALICE._replace(idempotency_key="k1")
    store.write(put, TEAMS, "red", TeamSettings(), keyed)
    with pytest.raises(Repeated):
        store.write(put, TEAMS, "blue", TeamSettings(), keyed)
    with pytest.raises(Repeated):
        store.write(create_key, "laptop", KeySettings(), keyed)
    assert [entry.name for entry in store.read(entries, TEAMS)] == ["red"]
    assert store.read(revision) == 1
    store.write(put, TEAMS, "red", TeamSettings(), keyed)  # which changes nothing
    store.write(put, TEAMS, "blue", TeamSettings(), BOB._replace(idempotency_key="k1"))
    for name in ("a", "b"):
        store.write(put, TEAMS, name, TeamSettings(), ALICE)  # without a key as often as one likes


def test_of_two_at_once_under_one_key_one_is_done(engine: Engine) -> None:
    together = threading.Barrier(6)
    done, refused = [], []

    def create(number: int) -> None:
        keyed = ALICE._replace(idempotency_key="once")
        try:
            together.wait(30)
            with engine.begin() as connection:
                create_key(connection, f"key {number}", KeySettings(), keyed)
            done.append(number)
        except Repeated:
            refused.append(number)

    threads = [threading.Thread(target=create, args=[number]) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(done), len(refused)) == (1, 5)
    with reader(engine).begin() as connection:
        assert [row.name for row in audit_rows(connection)] == [f"key {done[0]}"]


# -- forgetting --


def test_old_rows_go_in_small_steps(store: Store) -> None:
    def several(connection: Connection) -> None:
        for number in range(10):
            note(connection, ALICE, "create", "teams", str(number))

    store.write(several)
    rows = store.read(audit_rows)
    border = rows[2].at
    assert store.write(prune_audit, border, 4) == 4
    assert store.read(audit_rows) == rows[:6], "the oldest first"
    assert store.write(prune_audit, border, 4) == 3
    assert store.write(prune_audit, border, 4) == 0
    assert store.read(audit_rows) == rows[:3]
    store.write(note, ALICE, "create", "teams", "new")
    assert int(store.read(audit_rows)[0].id) > int(rows[0].id)
