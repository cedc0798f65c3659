"""`glasshouse keys`: the secret on standard output, everything else beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from proxy import __version__
from proxy.store import hash_key, live_keys, open_database
from tests.unit.cli.conftest import Command


def test_the_secret_alone_is_on_standard_output(command: Command, here: Path) -> None:
    result = command("keys", "create", "alice")
    assert re.fullmatch(r"gh-[A-Za-z0-9_-]{43}\n", result.stdout)
    assert "shown only now" in result.stderr
    assert result.stdout.strip() not in result.stderr
    with open_database(f"sqlite:///{here / '.glasshouse/glasshouse.db'}").connect() as connection:
        assert [key.hash for key in live_keys(connection)] == [hash_key(result.stdout.strip())]


def test_the_secret_is_in_no_file(command: Command, here: Path) -> None:  # failure 69, 76
    secret = command("keys", "create", "alice").stdout.strip().encode()
    written = b"".join(file.read_bytes() for file in here.rglob("*") if file.is_file())
    assert secret[:7] in written, "the prefix is meant to be"
    assert secret[7:] not in written
    assert hash_key(secret.decode()).hex().encode() not in written


def test_list(command: Command) -> None:
    secret = command("keys", "create", "Zoë's laptop").stdout.strip()
    command("keys", "create", "bob")
    command("keys", "revoke", "bob")
    head, first, second = command("keys", "list").stdout.splitlines()
    assert head.split() == ["ID", "NAME", "KEY", "CREATED", "REVOKED"]
    assert "Zoë's laptop" in first
    assert f"{secret[:7]}…" in first
    assert re.search(r"bob +gh-....… +\S+Z +\S+Z$", second)


def test_list_as_json(command: Command) -> None:
    assert json.loads(command("keys", "list", "--format", "json").stdout) == []
    secret = command("keys", "create", "alice").stdout.strip()
    result = command("keys", "list", "--format", "json")
    [key] = json.loads(result.stdout)
    assert list(key) == ["id", "name", "prefix", "created_at", "revoked_at"]
    assert (key["name"], key["prefix"], key["revoked_at"]) == ("alice", secret[:7], None)
    assert secret not in result.output


def test_no_keys(command: Command) -> None:
    result = command("keys", "list")
    assert result.stdout == ""
    assert "glasshouse keys create" in result.stderr


@pytest.mark.parametrize("by", ["id", "name"])
def test_revoke(command: Command, by: str) -> None:
    command("keys", "create", "alice")
    [key] = json.loads(command("keys", "list", "--format", "json").stdout)
    result = command("keys", "revoke", key[by])
    assert result.stdout == ""
    assert f"'alice' ({key['id']}) was revoked" in result.stderr
    [key] = json.loads(command("keys", "list", "--format", "json").stdout)
    assert key["revoked_at"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["create", "taken"], "there is a key named 'taken' already"),
        (["create", " x"], "not usable as a name; allowed: 1 to 64 printable characters"),
        (["revoke", "nobody"], "there is no key with the id or name 'nobody'"),
        (["revoke", "\x1b[31m"], r"'\x1b[31m'"),
    ],
)
def test_no(command: Command, arguments: list[str], said: str) -> None:
    command("keys", "create", "taken")
    result = command("keys", *arguments, status=1)
    assert result.stdout == ""
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_a_broken_database(command: Command, here: Path) -> None:
    (here / ".glasshouse").mkdir()
    (here / ".glasshouse/glasshouse.db").write_text("this is no database" * 100)
    assert "file is not a database" in command("keys", "create", "alice", status=1).stderr


def test_version(command: Command) -> None:
    assert command("--version").stdout == f"glasshouse, version {__version__}\n"
