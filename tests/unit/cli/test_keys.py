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
    assert head.split() == ["ID", "NAME", "KEY", "CREATED", "STATE"]
    assert "Zoë's laptop" in first
    assert f"{secret[:7]}…" in first
    assert re.search(r"bob +gh-....… +\S+Z +revoked \S+Z$", second)
    assert len(command("keys", "list", "--in-use").stdout.splitlines()) == 2


def test_list_as_json(command: Command) -> None:
    assert json.loads(command("keys", "list", "--format", "json").stdout) == []
    secret = command("keys", "create", "alice").stdout.strip()
    result = command("keys", "list", "--format", "json")
    [key] = json.loads(result.stdout)
    assert {"id", "name", "prefix", "created_at", "revoked_at", "settings", "secrets"} <= key.keys()
    assert command("keys", "list", "--json").stdout == result.stdout
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
        (["revoke", "nobody"], "there is no key 'nobody'"),
        (["revoke", "\x1b[31m"], r"\x1b[31m"),
        (["revoke", "no/body"], "there is no key 'no/body'"),
        (["show", "nobody"], "there is no key 'nobody'"),
        (["rotate", "nobody"], "there is no key 'nobody'"),
        (["create", "x", "--team", "nobody"], "team: there is no team 'nobody'"),
        (["create", "x", "--expires", "2026-01-01", "--operations", "sing"], "allowed: chat, "),
    ],
)
def test_no(command: Command, arguments: list[str], said: str) -> None:
    command("keys", "create", "taken")
    result = command("keys", *arguments, status=1)
    assert result.stdout == ""
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert "\x1b" not in result.stderr  # failure 78


def test_all_that_can_be_said_of_one(command: Command) -> None:
    command("teams", "create", "research")
    command("users", "create", "zoe", "--team", "research")
    command("projects", "create", "bot")
    command(
        *("keys", "create", "alice", "--team", "research", "--user", "zoe", "--project", "bot", "--tag", "a,b", "--tag", "c"),
        *("--requests-per-minute", "5", "--models", "qwen*,small", "--operations", "chat", "--expires", "2099-01-01"),
        *("--budget", "5M tokens/day", "--budget", "10 money/month Europe/Vienna soft", "--set", "max_input_tokens=9"),
    )
    settings = json.loads(command("keys", "show", "alice", "--json").stdout)["settings"]
    assert (settings["team"], settings["user"], settings["project"], settings["tags"]) == (
        "research",
        "zoe",
        "bot",
        ["a", "b", "c"],
    )
    assert (settings["requests_per_minute"], settings["max_input_tokens"]) == (5, 9)
    assert (settings["models"], settings["operations"]) == (["qwen*", "small"], ["chat"])
    assert settings["expires"] == "2099-01-01T00:00:00Z"
    assert [(each["tokens"], each["money"], each["soft"]) for each in settings["budgets"]] == [
        (5_000_000, None, False),
        (None, "10", True),
    ]
    shown = command("keys", "show", "alice").stdout
    assert re.search(r"budgets +5000000 tokens/day; 10 money/month Europe/Vienna soft\n", shown)
    assert re.search(r"secrets +gh-....… of \S+Z\n", shown)
    command("keys", "set", "alice", "--tag", "d", "--unset", "models", "--unset", "budgets")
    settings = json.loads(command("keys", "show", "alice", "--json").stdout)["settings"]
    assert (settings["tags"], settings["models"], settings["budgets"]) == (["d"], None, [])


def test_filters(command: Command) -> None:
    command("teams", "create", "research")
    command("keys", "create", "alice", "--team", "research", "--tag", "laptop")
    command("keys", "create", "bob", "--tag", "laptop")

    def found(*options: str) -> list[str]:
        return [key["name"] for key in json.loads(command("keys", "list", "--json", *options).stdout)]

    assert found() == ["alice", "bob"]
    assert found("--team", "research") == ["alice"]
    assert found("--tag", "laptop", "--containing", "o") == ["bob"]
    assert found("--user", "nobody") == []
    assert command("keys", "list", "--project", "nothing").stderr == "There are no such keys.\n"


def test_rotating(command: Command) -> None:
    first = command("keys", "create", "alice").stdout.strip()
    made = command("keys", "rotate", "alice", "--overlap", "90m")
    second = made.stdout.strip()
    assert re.fullmatch(r"gh-[A-Za-z0-9_-]{43}", second)
    assert second != first
    assert re.search(r"shown only now; the former one works until \S+Z:\n", made.stderr)
    key = json.loads(command("keys", "show", "alice", "--json").stdout)
    assert [(each["prefix"], each["ends_at"] is None) for each in key["secrets"]] == [(second[:7], True), (first[:7], False)]
    assert f"{first[:7]}… of " in command("keys", "show", "alice").stdout
    told = json.loads(command("keys", "rotate", "alice", "--overlap", "0", "--json").stdout)
    assert told["secret"].startswith("gh-")
    assert (
        "'soon' is no span of time; allowed: 0, 90s" in command("keys", "rotate", "alice", "--overlap", "soon", status=2).stderr
    )


def test_blocking(command: Command) -> None:
    command("keys", "create", "alice")
    assert "'alice'" in command("keys", "block", "alice").stderr
    assert command("keys", "list").stdout.splitlines()[1].endswith("  blocked")
    command("keys", "unblock", "alice")
    assert "blocked" not in command("keys", "list").stdout


def test_a_name_with_a_slash(command: Command) -> None:
    command("keys", "create", "a/b")
    command("keys", "create", "a/bc")
    assert "'a/b'" in command("keys", "revoke", "a/b").stderr
    states = [(key["name"], key["revoked_at"] is None) for key in json.loads(command("keys", "list", "--json").stdout)]
    assert states == [("a/b", False), ("a/bc", True)]


def test_a_broken_database(command: Command, here: Path) -> None:
    (here / ".glasshouse").mkdir()
    (here / ".glasshouse/glasshouse.db").write_text("this is no database" * 100)
    assert "file is not a database" in command("keys", "create", "alice", status=1).stderr


def test_version(command: Command) -> None:
    assert command("--version").stdout == f"glasshouse, version {__version__}\n"
