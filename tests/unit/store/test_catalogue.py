"""Keys: made once, shown once, ended for good."""

from __future__ import annotations

import hashlib
import re

import pytest
from sqlalchemy import Engine, text

from proxy.store import (
    NameTaken,
    NoSuchKey,
    UnusableName,
    create_key,
    hash_key,
    list_keys,
    live_keys,
    revision,
    revoke_key,
)


def test_a_key_is_32_random_bytes_in_url_safe_text(engine: Engine) -> None:
    with engine.begin() as connection:
        secret, row = create_key(connection, "alice")
        other, _ = create_key(connection, "bob")
    assert re.fullmatch(r"gh-[A-Za-z0-9_-]{43}", secret)
    assert secret != other
    assert re.fullmatch(r"key_[0-9a-f]{16}", row.id)
    assert row.prefix == secret[:7]
    assert row.revoked_at is None


def test_the_table_holds_the_hash_and_not_the_key(engine: Engine) -> None:  # failure 69
    with engine.begin() as connection:
        secret, row = create_key(connection, "alice")
    with engine.connect() as connection:
        stored = connection.execute(text("SELECT * FROM keys")).mappings().one()
        assert [(key.hash, key.id, key.name) for key in live_keys(connection)] == [
            (hashlib.sha256(secret.encode()).digest(), row.id, "alice")
        ]
    assert secret[7:] not in repr(dict(stored))


def test_the_hash_is_no_key(engine: Engine) -> None:  # failure 69
    with engine.begin() as connection:
        secret, _ = create_key(connection, "alice")
        known = {key.hash for key in live_keys(connection)}
    digest = hash_key(secret)
    assert digest in known
    for presented in (digest.hex(), digest.decode("latin-1"), f"gh-{digest.hex()}"):
        assert hash_key(presented) not in known


def test_every_change_counts_the_revision_up_in_its_own_transaction(engine: Engine) -> None:
    with engine.begin() as connection:
        assert revision(connection) == 0
        create_key(connection, "alice")
        assert revision(connection) == 1
    with engine.connect() as connection:
        create_key(connection, "bob")  # and no commit
    with engine.begin() as connection:
        assert revision(connection) == 1
        assert [row.name for row in list_keys(connection)] == ["alice"]
        revoke_key(connection, "alice")
        assert revision(connection) == 2


def test_a_name_is_taken_until_its_key_is_revoked(engine: Engine) -> None:
    with engine.begin() as connection:
        create_key(connection, "alice")
    with pytest.raises(NameTaken, match="'alice'"), engine.begin() as connection:
        create_key(connection, "alice")
    with engine.begin() as connection:
        assert revision(connection) == 1, "a refused change is no change"
        revoke_key(connection, "alice")
        create_key(connection, "alice")
        rows = list_keys(connection)
    assert [(row.name, row.revoked_at is None) for row in rows] == [("alice", False), ("alice", True)]


@pytest.mark.parametrize("by", ["id", "name"])
def test_revoking(engine: Engine, by: str) -> None:
    with engine.begin() as connection:
        _, row = create_key(connection, "alice")
        create_key(connection, "bob")
        revoked = revoke_key(connection, getattr(row, by))
        assert revoked.id == row.id
        assert revoked.revoked_at is not None
        assert [key.name for key in live_keys(connection)] == ["bob"]
        assert list_keys(connection)[0] == revoked


def test_revoking_twice_changes_nothing_the_second_time(engine: Engine) -> None:
    with engine.begin() as connection:
        _, row = create_key(connection, "alice")
        first = revoke_key(connection, row.id)
        assert revoke_key(connection, row.id) == first
        assert revision(connection) == 2


@pytest.mark.parametrize("unknown", ["nobody", "key_0000000000000000", "", "' OR 1=1 --", "%"])  # failure 70, 71
def test_revoking_what_is_not_there(engine: Engine, unknown: str) -> None:
    with engine.begin() as connection:
        create_key(connection, "alice")
        with pytest.raises(NoSuchKey):
            revoke_key(connection, unknown)
        assert revision(connection) == 1


def test_a_secret_given_by_mistake_is_not_repeated(engine: Engine) -> None:  # failure 76
    with engine.begin() as connection:
        secret, _ = create_key(connection, "alice")
        with pytest.raises(NoSuchKey) as caught:
            revoke_key(connection, secret)
        with pytest.raises(UnusableName) as refused:
            create_key(connection, secret)
    assert secret not in str(caught.value) + str(refused.value)


@pytest.mark.parametrize("name", ["", " alice", "alice ", "a\nb", "a\x1b[31m", "a\u202eb", "\ud800", "x" * 65, "gh-x", "key_x"])
def test_names_that_would_do_harm_elsewhere(engine: Engine, name: str) -> None:  # failure 78
    with engine.begin() as connection, pytest.raises(UnusableName):
        create_key(connection, name)


@pytest.mark.parametrize("name", ["alice", "Zoë's laptop", "ci/nightly", "=1+1", "x" * 64])
def test_names_that_are_fine(engine: Engine, name: str) -> None:
    with engine.begin() as connection:
        assert create_key(connection, name)[1].name == name
