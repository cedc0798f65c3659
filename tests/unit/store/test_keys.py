"""Keys: made, changed, rotated, ended for good; their secrets shown once."""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime
from decimal import Decimal

import msgspec
import pytest
from sqlalchemy import Connection, text

from proxy.nouns import BudgetSettings, KeySettings, ProjectSettings, TeamSettings, UserSettings
from proxy.store import (
    PROJECTS,
    TEAMS,
    USERS,
    KeyRow,
    LiveKey,
    NameTaken,
    NoSuch,
    NotAllowed,
    UnknownName,
    UnusableName,
    audit_rows,
    change_key,
    create_key,
    find_key,
    hash_key,
    holder,
    list_keys,
    live_keys,
    put,
    revision,
    revoke_key,
    rotate_key,
)
from tests.unit.store.conftest import Store
from tests.unit.store.test_catalogue import ALICE

HOUR_S = 3600
HOUR_NS = HOUR_S * 10**9
FULL = KeySettings(
    team="research",
    user="zoe",
    project="search",
    tags=("prod", "tier:1"),
    requests_per_minute=60,
    models=("qwen*",),
    operations=("chat",),
    expires=datetime(2027, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
    budgets=(BudgetSettings(money=Decimal("12.50"), per="month", time_zone="Europe/Vienna"),),
    blocked=True,
)


def _live(connection: Connection) -> list[LiveKey]:
    return list(live_keys(connection))


def _with_names(connection: Connection) -> None:
    """What FULL refers to."""
    put(connection, TEAMS, "research", TeamSettings(), ALICE)
    put(connection, USERS, "zoe", UserSettings(), ALICE)
    put(connection, PROJECTS, "search", ProjectSettings(), ALICE)


# -- making --


def test_a_key_is_32_random_bytes_in_url_safe_text(store: Store) -> None:
    secret, row = store.write(create_key, "alice")
    other, _ = store.write(create_key, "bob")
    assert re.fullmatch(r"gh-[A-Za-z0-9_-]{43}", secret)
    assert secret != other
    assert re.fullmatch(r"key_[0-9a-f]{16}", row.id)
    assert row.prefix == secret[:7]
    assert row.revoked_at is None
    assert row.created_at == row.changed_at == row.secrets[0].created_at
    assert store.read(find_key, "alice") == store.read(find_key, row.id) == row


def test_the_tables_hold_the_hash_and_not_the_key(store: Store) -> None:  # failure 69
    secret, row = store.write(create_key, "alice")
    rotated, _ = store.write(rotate_key, "alice", HOUR_S, ALICE)
    hashes = [hashlib.sha256(each.encode()).digest() for each in (secret, rotated)]
    assert {key.hash for key in store.read(_live)} == set(hashes)
    assert {key.id for key in store.read(_live)} == {row.id}

    def everything(connection: Connection) -> str:
        tables = ("keys", "key_secrets", "key_tags", "audit")
        return repr([connection.execute(text(f"SELECT * FROM {table}")).all() for table in tables])  # noqa: S608

    def the_log(connection: Connection) -> str:
        return repr(connection.execute(text("SELECT * FROM audit")).all())

    for each, digest in zip((secret, rotated), hashes, strict=True):
        assert each[7:] not in store.read(everything)
        assert digest.hex() not in store.read(the_log)
        assert repr(digest)[2:-1] not in store.read(the_log)


def test_the_hash_is_no_key(store: Store) -> None:  # failure 69
    secret, _ = store.write(create_key, "alice")
    digest = hash_key(secret)
    assert store.read(holder, digest, 0) is not None
    for presented in (digest.hex(), digest.decode("latin-1"), f"gh-{digest.hex()}"):
        assert store.read(holder, hash_key(presented), 0) is None


def test_a_name_is_taken_until_its_key_is_revoked(store: Store) -> None:
    store.write(create_key, "alice")
    with pytest.raises(NameTaken, match="'alice'"):
        store.write(create_key, "alice")
    assert store.read(revision) == 1, "a refused change is no change"
    store.write(revoke_key, "alice")
    _, second = store.write(create_key, "alice")
    assert store.read(find_key, "alice") == second
    rows = sorted(store.read(list_keys), key=lambda row: row.created_at)
    assert [(row.name, row.revoked_at is None) for row in rows] == [("alice", False), ("alice", True)]


def test_what_a_key_may_is_kept_to_the_letter(store: Store) -> None:
    store.write(_with_names)
    _, row = store.write(create_key, "alice", FULL, ALICE)
    assert row.value == FULL
    assert store.read(find_key, "alice") == row
    assert [(key.name, key.value) for key in store.read(_live)] == [("alice", FULL)]


def test_what_a_key_refers_to_must_be_there(store: Store) -> None:
    for field in ("team", "user", "project"):
        value = msgspec.convert({field: "nobody"}, KeySettings)
        with pytest.raises(UnknownName, match=f"no {field} named 'nobody'"):
            store.write(create_key, field, value)
        _, row = store.write(create_key, field, value, ALICE, {f"{field}s": {"nobody"}})
        assert row.value == value
        with pytest.raises(UnknownName, match=f"no {field} named 'nobody'"):
            store.write(change_key, field, value, ALICE)


def test_a_hash_is_for_the_settings_file(store: Store) -> None:
    value = KeySettings(hash="sha256:" + "0" * 64)
    with pytest.raises(NotAllowed, match="settings file"):
        store.write(create_key, "alice", value)
    store.write(create_key, "alice")
    with pytest.raises(NotAllowed, match="settings file"):
        store.write(change_key, "alice", value)


def test_names_that_would_do_harm_elsewhere(store: Store) -> None:  # failure 78
    controls = ["a\nb", "a\x1b[31m", "a\u202eb", "\ud800", "a\0"]
    for name in ("", " alice", "alice ", "x" * 65, "gh-x", "gha-x", "key_x", "adm_x", "system", *controls):
        with pytest.raises(UnusableName):
            store.write(create_key, name)
    assert store.read(list_keys) == []


def test_names_that_are_fine(store: Store) -> None:
    for name in ("alice", "Zoë's laptop", "ci/nightly", "=1+1", "x" * 64):
        assert store.write(create_key, name)[1].name == name


# -- changing --


def test_changing(store: Store) -> None:
    store.write(_with_names)
    _, made = store.write(create_key, "alice", KeySettings(tags=("old", "prod")))
    changed = store.write(change_key, made.id, FULL, ALICE)
    assert changed.value == FULL
    assert changed.changed_at > made.changed_at
    assert changed._replace(value=made.value, changed_at=made.changed_at) == made
    assert store.read(find_key, "alice") == changed
    newest = store.read(audit_rows, limit=1)[0]
    assert (newest.action, newest.noun, newest.name, newest.team) == ("change", "keys", "alice", "research")
    assert newest.before["tags"] == ["old", "prod"]
    assert newest.after["budgets"] == [{"money": "12.50", "per": "month", "time_zone": "Europe/Vienna"}]


def test_a_change_to_the_same_changes_nothing(store: Store) -> None:
    store.write(_with_names)
    _, made = store.write(create_key, "alice", FULL)
    before = store.read(revision)
    assert store.write(change_key, "alice", FULL, ALICE) == made
    assert store.read(revision) == before
    assert len(store.read(audit_rows)) == before


def test_a_key_that_is_not_there(store: Store) -> None:  # failure 70, 71
    store.write(create_key, "alice")
    names = ("nobody", "key_0000000000000000", "", "' OR 1=1 --", "%", "al_ce", "\0", "\ud800", "x" * 10_000)
    for unknown in names:
        assert store.read(find_key, unknown) is None
        with pytest.raises(NoSuch):
            store.write(revoke_key, unknown)
        with pytest.raises(NoSuch):
            store.write(change_key, unknown, KeySettings())
        with pytest.raises(NoSuch):
            store.write(rotate_key, unknown, 0)
    assert store.read(revision) == 1


def test_a_secret_given_by_mistake_is_not_repeated(store: Store) -> None:  # failure 76
    secret, _ = store.write(create_key, "alice")
    with pytest.raises(NoSuch) as caught:
        store.write(revoke_key, secret)
    with pytest.raises(UnusableName) as refused:
        store.write(create_key, secret)
    assert secret not in str(caught.value) + str(refused.value)


# -- rotating --


def test_rotating_leaves_the_former_secret_its_time(store: Store) -> None:
    first, made = store.write(create_key, "alice")
    second, row = store.write(rotate_key, "alice", HOUR_S, ALICE)
    assert re.fullmatch(r"gh-[A-Za-z0-9_-]{43}", second)
    newest, former = row.secrets
    assert (newest.prefix, newest.ends_at, former.prefix) == (second[:7], None, first[:7])
    assert former.ends_at == newest.created_at + HOUR_NS
    assert row.prefix == second[:7]
    assert (row.id, row.name, row.value) == (made.id, made.name, made.value)
    live = {key.hash: key.ends_at for key in store.read(_live)}
    assert live == {hash_key(first): former.ends_at, hash_key(second): 0}
    for secret, at, works in (
        (first, former.ends_at - 1, True),
        (first, former.ends_at, False),
        (second, former.ends_at + HOUR_NS, True),
    ):
        assert store.read(holder, hash_key(secret), at) == (row if works else None)


def test_rotating_without_an_overlap_ends_the_former_secret(store: Store) -> None:
    first, _ = store.write(create_key, "alice")
    second, row = store.write(rotate_key, "alice", 0, ALICE)
    assert [key.hash for key in store.read(_live)] == [hash_key(second)]
    assert len(row.secrets) == 1
    assert store.read(holder, hash_key(first), 0) is None


def test_a_rotation_never_lengthens_a_secrets_time(store: Store) -> None:
    first, _ = store.write(create_key, "alice")
    _, row = store.write(rotate_key, "alice", HOUR_S, ALICE)
    soon = row.secrets[1].ends_at
    assert soon is not None
    _, row = store.write(rotate_key, "alice", 10 * HOUR_S, ALICE)
    ends = {secret.prefix: secret.ends_at for secret in row.secrets}
    assert ends[first[:7]] == soon
    assert sorted(secret.ends_at is None for secret in row.secrets) == [False, False, True]
    _, row = store.write(rotate_key, "alice", 60, ALICE)
    assert all(secret.ends_at < soon for secret in row.secrets if secret.ends_at is not None)


def test_rotating_is_noted_without_secrets(store: Store) -> None:
    first, _ = store.write(create_key, "alice")
    second, _ = store.write(rotate_key, "alice", HOUR_S, ALICE)
    row = store.read(audit_rows, limit=1)[0]
    assert (row.author, row.action, row.noun, row.name) == (ALICE.name, "rotate", "keys", "alice")
    assert [secret["prefix"] for secret in row.before["secrets"]] == [first[:7]]
    assert [secret["prefix"] for secret in row.after["secrets"]] == [second[:7], first[:7]]


def test_an_overlap_has_bounds(store: Store) -> None:
    store.write(create_key, "alice")
    for overlap_s in (-1, 10**12):
        with pytest.raises(NotAllowed, match="allowed: 0 to"):
            store.write(rotate_key, "alice", overlap_s, ALICE)


# -- revoking --


def test_revoking(store: Store) -> None:
    _, other = store.write(create_key, "bob")
    for by in ("id", "name"):
        secret, row = store.write(create_key, "alice")
        revoked = store.write(revoke_key, getattr(row, by))
        assert revoked.id == row.id
        assert revoked.revoked_at is not None
        assert [key.id for key in store.read(_live)] == [other.id]
        assert store.read(holder, hash_key(secret), 0) is None
        assert store.read(find_key, "alice") is None
        assert store.read(find_key, row.id) == revoked


def test_revoking_ends_every_secret(store: Store) -> None:
    first, _ = store.write(create_key, "alice")
    second, _ = store.write(rotate_key, "alice", HOUR_S, ALICE)
    store.write(revoke_key, "alice")
    assert store.read(_live) == []
    assert store.read(holder, hash_key(first), 0) is store.read(holder, hash_key(second), 0) is None


def test_revoking_twice_changes_nothing_the_second_time(store: Store) -> None:
    _, row = store.write(create_key, "alice")
    first = store.write(revoke_key, row.id)
    assert store.write(revoke_key, row.id) == first
    assert store.read(revision) == 2


def test_a_revoked_key_stays_as_it_is(store: Store) -> None:
    _, row = store.write(create_key, "alice")
    store.write(revoke_key, "alice")
    with pytest.raises(NotAllowed, match="was revoked"):
        store.write(change_key, row.id, KeySettings(blocked=True))
    with pytest.raises(NotAllowed, match="was revoked"):
        store.write(rotate_key, row.id, HOUR_S)


# -- finding --


def _names(rows: list[KeyRow]) -> list[str]:
    return [row.name for row in rows]


def test_keys_come_by_name_and_in_pages(store: Store) -> None:
    names = ["b", "a", "Zoë", "C", "ä", "_x", "z" * 64, "b 2"]

    def make(connection: Connection) -> None:
        for name in names:
            create_key(connection, name)
        for _ in range(3):  # of one name, all but the last revoked
            revoke_key(connection, "b")
            create_key(connection, "b")
        rotate_key(connection, "a", HOUR_S)

    store.write(make)
    rows = store.read(list_keys)
    assert [(row.name, row.id) for row in rows] == sorted((row.name, row.id) for row in rows)
    assert sorted(set(_names(rows))) == sorted(names)
    assert len(rows) == len(names) + 3
    pages, after = [], ""
    while page := store.read(list_keys, after=after, limit=2):
        assert len(page) <= 2
        pages += page
        after = f"{page[-1].name}\0{page[-1].id}"
    assert pages == rows
    assert _names(store.read(list_keys, revoked=False)) == sorted(names)


def test_keys_are_found_by_what_they_are_of(store: Store) -> None:
    store.write(_with_names)
    store.write(create_key, "alice", KeySettings(team="research", tags=("prod", "eu")))
    store.write(create_key, "bob", KeySettings(team="research", user="zoe", tags=("prod",)))
    store.write(create_key, "carol", KeySettings(project="search", tags=("pro", "eu:prod")))
    assert _names(store.read(list_keys, team="research")) == ["alice", "bob"]
    assert _names(store.read(list_keys, user="zoe")) == ["bob"]
    assert _names(store.read(list_keys, project="search")) == ["carol"]
    assert _names(store.read(list_keys, tag="prod")) == ["alice", "bob"]
    assert _names(store.read(list_keys, tag="eu", team="research")) == ["alice"]
    store.write(change_key, "alice", KeySettings(team="research", tags=("eu",)))
    assert _names(store.read(list_keys, tag="prod")) == ["bob"]


def test_a_tag_is_found_exactly(store: Store) -> None:  # failure 70, 71
    store.write(create_key, "alice", KeySettings(tags=("prod", "tier:1")))
    for tag in ("pro", "prod%", "%", "_rod", '"prod"', "prod\0", "\ud800", "", "' OR 1=1 --"):
        assert store.read(list_keys, tag=tag) == []


def test_a_tag_said_twice_is_one(store: Store) -> None:
    _, row = store.write(create_key, "alice", KeySettings(tags=("prod", "prod")))
    assert row.value.tags == ("prod", "prod")
    assert _names(store.read(list_keys, tag="prod")) == ["alice"]


def test_a_search_means_what_it_says(store: Store) -> None:  # failure 71
    names = ["100%", "a_b", "aXb", "a\\b", "aaa", "it's", "Ä"]

    def make(connection: Connection) -> None:
        for name in names:
            create_key(connection, name)

    store.write(make)
    for part in ("", "a", "%", "_", "a_b", "\\", "'", "aa", "x", "ä", "Ä", "%%%%%%%%", "\0", "\ud800", "a" * 100_000):
        assert _names(store.read(list_keys, containing=part)) == sorted(name for name in names if part in name)
