"""Admin keys: whose they are, and that none can be guessed."""

from __future__ import annotations

import re
import secrets
from base64 import urlsafe_b64encode
from random import Random
from typing import Any

import pytest
from sqlalchemy import Connection, text

from proxy.nouns import TeamSettings
from proxy.store import (
    TEAMS,
    NameTaken,
    NoSuch,
    NotAllowed,
    UnknownName,
    UnusableName,
    WeakSecret,
    audit_rows,
    check_secret,
    create_admin_key,
    create_key,
    find_admin,
    find_admin_key,
    hash_key,
    list_admin_keys,
    put,
    revision,
    revoke_admin_key,
)
from tests.unit.store.conftest import Store
from tests.unit.store.test_catalogue import ALICE


def test_an_admin_key_is_32_random_bytes_in_url_safe_text(store: Store) -> None:
    secret, row = store.write(create_admin_key, "root", "admin")
    other, _ = store.write(create_admin_key, "backup", "admin")
    assert re.fullmatch(r"gha-[A-Za-z0-9_-]{43}", secret)
    assert secret != other
    assert re.fullmatch(r"adm_[0-9a-f]{16}", row.id)
    assert (row.name, row.role, row.team, row.prefix) == ("root", "admin", None, secret[:8])
    assert store.read(find_admin, hash_key(secret), 0) == row
    assert store.read(find_admin_key, "root") == store.read(find_admin_key, row.id) == row
    assert [each.name for each in store.read(list_admin_keys)] == ["backup", "root"]
    assert store.read(revision) == 2


def test_neither_secret_nor_hash_is_anywhere_else(store: Store) -> None:  # failure 69
    secret, _ = store.write(create_admin_key, "root", "admin")
    digest = hash_key(secret)

    def everything(connection: Connection) -> str:
        return repr([connection.execute(text(f"SELECT * FROM {each}")).all() for each in ("admin_keys", "audit")])  # noqa: S608

    assert secret[8:] not in store.read(everything)
    assert digest.hex() not in repr(store.read(audit_rows))
    for presented in (digest.hex(), digest.decode("latin-1"), f"gha-{digest.hex()}"):
        assert store.read(find_admin, hash_key(presented), 0) is None


def test_one_kind_of_key_is_not_the_other(store: Store) -> None:
    """What opens the data plane opens nothing else, whatever it is called."""
    secret, _ = store.write(create_key, "root")
    assert store.read(find_admin, hash_key(secret), 0) is None
    store.write(create_admin_key, "root", "admin")


def test_roles(store: Store) -> None:
    store.write(put, TEAMS, "red", TeamSettings(), ALICE)
    roles: list[tuple[Any, str | None, bool]] = [
        ("admin", None, True),
        ("admin", "red", False),
        ("manager", "red", True),
        ("manager", None, False),
        ("viewer", "red", True),
        ("viewer", None, True),
        ("Admin", None, False),
        ("", None, False),
    ]
    for role, team, fine in roles:
        name = f"{role} of {team}".strip()
        if fine:
            _, row = store.write(create_admin_key, name, role, team)
            assert (row.role, row.team) == (role, team)
        else:
            with pytest.raises(NotAllowed, match=r"^role: .*allowed: "):
                store.write(create_admin_key, name, role, team)
    assert [row.name for row in store.read(list_admin_keys, team="red")] == ["manager of red", "viewer of red"]
    assert [row.name for row in store.read(audit_rows, team="red", noun="admins")] == ["viewer of red", "manager of red"]


def test_the_team_must_be_there(store: Store) -> None:
    with pytest.raises(UnknownName, match="no team named 'red'"):
        store.write(create_admin_key, "boss", "manager", "red")
    store.write(create_admin_key, "boss", "manager", "red", known={"teams": {"red"}})


def test_names(store: Store) -> None:
    store.write(create_admin_key, "root", "admin")
    with pytest.raises(NameTaken, match="'root'"):
        store.write(create_admin_key, "root", "admin")
    for name in ("", " a", "a\nb", "gha-x", "gh-x", "adm_x", "key_x", "x" * 65):
        with pytest.raises(UnusableName):
            store.write(create_admin_key, name, "admin")
    assert store.read(revision) == 1


def test_revoking(store: Store) -> None:
    secret, row = store.write(create_admin_key, "root", "admin")
    revoked = store.write(revoke_admin_key, "root", ALICE)
    assert revoked.revoked_at is not None
    assert revoked._replace(revoked_at=None) == row
    assert store.read(find_admin, hash_key(secret), 0) is None
    assert store.read(find_admin_key, "root") is None
    assert store.write(revoke_admin_key, row.id, ALICE) == revoked == store.read(find_admin_key, row.id)
    assert store.read(revision) == 2
    assert store.read(list_admin_keys, revoked=False) == []
    assert store.read(list_admin_keys) == [revoked]
    newest = store.read(audit_rows)[0]
    assert (newest.action, newest.noun, newest.name, newest.author) == ("revoke", "admins", "root", "alice")
    store.write(create_admin_key, "root", "admin")


def test_it_expires(store: Store) -> None:
    secret, row = store.write(create_admin_key, "root", "admin", None, 10**18)
    assert store.read(find_admin, hash_key(secret), 10**18 - 1) == row
    assert store.read(find_admin, hash_key(secret), 10**18) is None


def test_one_that_is_not_there(store: Store) -> None:  # failure 70, 76
    secret, _ = store.write(create_admin_key, "root", "admin")
    for unknown in ("nobody", "", "adm_0000000000000000", "' OR 1=1 --", "%", "\0", "\ud800", secret):
        assert store.read(find_admin_key, unknown) is None
        with pytest.raises(NoSuch) as caught:
            store.write(revoke_admin_key, unknown)
        assert secret not in str(caught.value)


def test_they_come_in_pages(store: Store) -> None:
    def make(connection: Connection) -> None:
        for name in ("b", "a", "C", "ä", "d"):
            create_admin_key(connection, name, "viewer")
        revoke_admin_key(connection, "d")
        create_admin_key(connection, "d", "viewer")

    store.write(make)
    rows = store.read(list_admin_keys)
    assert [row.name for row in rows] == ["C", "a", "b", "d", "d", "ä"]
    pages, after = [], ""
    while page := store.read(list_admin_keys, after=after, limit=2):
        pages += page
        after = f"{page[-1].name}\0{page[-1].id}"
    assert pages == rows


# -- secrets from outside --


def test_a_given_secret(store: Store) -> None:
    given = secrets.token_hex(32)
    secret, row = store.write(create_admin_key, "env", "admin", secret=given)
    assert secret == given
    assert row.prefix == given[:4]
    assert store.read(find_admin, hash_key(given), 0) == row
    with pytest.raises(NameTaken, match="'env'") as caught:
        store.write(create_admin_key, "other", "admin", secret=given)
    assert given not in str(caught.value)
    store.write(revoke_admin_key, "env")
    with pytest.raises(NameTaken, match="is or was"):  # what was revoked doesn't come back under another name
        store.write(create_admin_key, "other", "admin", secret=given)


WEAK = [
    "",
    "sk-1234",
    "changeme",
    "sk-1234" * 8,
    "password" * 4,
    "changeme-changeme-changeme-changeme",
    "your-secret-admin-api-key-change-me",
    "glasshouse-admin-secret-token-example",
    "a" * 64,
    "0123456789abcdef0123456789abcdef",
    "abcdefghijklmnopqrstuvwxyz0123456789",
    "qwertyuiopasdfghjklzxcvbnm1234567890",
    "deadbeefdeadbeefdeadbeefdeadbeefdeadbeef",
    "R4nd0mLook1ng" * 4,
    "k3Fz9" * 12,
    "8402957361593047286105839274168350297416",
    "gh-" + "x7Gk2PqLm9RtVb4NcYw8ZsDf6HjKa1Eu3TiOo5Bv0Xg",
    secrets.token_hex(15),
    "password-" + secrets.token_hex(12),
    secrets.token_hex(20) + " x",
    secrets.token_hex(20) + "\n",
    secrets.token_hex(20) + "\x00",
    secrets.token_hex(20) + "ä",
    secrets.token_hex(20) + "\u200b",
    secrets.token_hex(200),
]


@pytest.mark.parametrize("secret", WEAK, ids=range(len(WEAK)))
def test_weak_secrets_are_refused_and_what_is_allowed_is_said(secret: str) -> None:  # failure 75
    with pytest.raises(WeakSecret, match="allowed: 32 to 256 printable ASCII characters") as caught:
        check_secret(secret)
    assert not secret or secret not in str(caught.value).replace("admin key", "")


def test_a_weak_secret_makes_no_key(store: Store) -> None:  # failure 75
    with pytest.raises(WeakSecret):
        store.write(create_admin_key, "env", "admin", secret="changeme" * 8)
    assert store.read(list_admin_keys) == []


def test_random_secrets_are_strong() -> None:
    random = Random(4)
    for _ in range(200):
        drawn = random.randbytes(32)
        text = urlsafe_b64encode(drawn).decode().rstrip("=")
        for secret in (drawn.hex(), text, f"gha-{text}", f"sk-1234-{text}"):
            check_secret(secret)
