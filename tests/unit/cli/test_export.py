"""`glasshouse export`: a file that makes the same of an empty database."""

from __future__ import annotations

import json
import re
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from proxy.cli.config import load_settings
from proxy.cli.documents import read
from proxy.control.export import exported
from proxy.control.feed import CatalogueFeed
from proxy.control.publish import Publisher
from proxy.control.server import Control
from proxy.settings import Settings
from proxy.snapshot import SnapshotFile
from proxy.store import hash_key, open_database
from tests.unit.cli.conftest import Command

FILE: dict[str, Any] = {
    "currency": "EUR",
    "teams": {"declared": {"tokens_per_minute": 7}},
    "backends": [{"url": "http://127.0.0.1:1"}],
    "models": {"declared": {"price": {"input": 1}}},
    "keys": {"alice": {"max_input_tokens": 99}},
    "retention": {"requests_days": 90},
    "phoenix": {"url": None},
}


def exact(value: Any) -> Any:
    """Numbers as numbers: 0.10 is 0.1."""
    if isinstance(value, dict):
        return {name: exact(each) for name, each in value.items()}
    if isinstance(value, list):
        return [exact(each) for each in value]
    return Decimal(value) if isinstance(value, str) and re.fullmatch(r"[0-9.]+", value) else value


@pytest.fixture
def filled(command: Command, here: Path) -> list[str]:
    """A catalogue with something of everything, in the file and in the database; → the secrets of its keys."""
    (here / "glasshouse.yaml").write_text(json.dumps(FILE))
    command("teams", "create", "research", "--requests-per-minute", "600", "--budget", "500.25 EUR/month Europe/Vienna soft")
    command("users", "create", "zoe", "--team", "research", "--concurrent-requests", "3")
    command("projects", "create", "bot", "--operations", "chat,embeddings")
    command("models", "set", "org/small", "--alias", "s", "--default", "temperature=0.2", "--bound", "n=4")
    command("prices", "set", "org/small", "--input", "0.10", "--output", "0.123456789123456789123")
    command("prices", "set", "org/small", "--input", "0.2", "--from", "2099-01-01")
    command("backends", "add", "gpu1", "http://127.0.0.1:2", "--kind", "vllm")
    command("everyone", "set", "--concurrent-requests", "256")
    options = ("--team", "research", "--user", "zoe", "--project", "bot", "--tag", "x", "--expires", "2099-01-01")
    secrets = [command("keys", "create", "alice", *options).stdout, command("keys", "create", "Zoë's laptop: yes").stdout]
    command("keys", "create", "gone")
    command("keys", "revoke", "gone")
    command("keys", "block", "Zoë's laptop: yes")
    return [secret.strip() for secret in secrets]


def snapshot(settings: Settings) -> SnapshotFile:
    """What workers would get of these settings and their database."""
    state = Control.of(settings).state
    feed: CatalogueFeed = state.feed
    while feed.poll():
        pass
    state.inventory.follow(feed.known.declared.held)
    publisher: Publisher = state.publisher
    file = publisher.due(10**12, 2 * 10**18)
    feed.close()
    assert file is not None
    return file


def test_the_same_on_an_empty_database(command: Command, here: Path, filled: list[str]) -> None:
    before = snapshot(load_settings(None, {}))
    exported = command("export").stdout
    (here / "exported.yaml").write_text(exported)
    settings = load_settings(here / "exported.yaml", {"state_dir": str(here / "fresh")})
    (here / "fresh").mkdir()
    after = snapshot(settings)
    assert not {entry for entry in read(here / "exported.yaml") if entry not in FILE and entry not in Settings.__struct_fields__}
    assert settings.retention.requests_days == 90
    for section in ("teams", "users", "projects", "everyone", "models", "currency", "backends"):
        assert getattr(after, section) == getattr(before, section), section
    assert len(before.keys) == len(after.keys) == 2
    for secret in filled:
        old, new = (file.keys.get(hash_key(secret)) for file in (before, after))
        assert old is not None
        assert new is not None


def test_it_says_the_same_of_everything(command: Command, here: Path, filled: list[str]) -> None:
    (here / "exported.yaml").write_text(command("export").stdout)
    file = read(here / "exported.yaml")
    file["state_dir"] = str(here / "fresh")
    (here / "again.yaml").write_text(json.dumps(file))
    for noun in ("teams", "users", "projects", "models", "backends", "keys"):
        before, after = (
            json.loads(command(noun, "list", "--json", *more).stdout) for more in ([], ["--config", str(here / "again.yaml")])
        )
        in_use = [row for row in before if not row.get("revoked_at")]
        said = [[(row["name"], exact({**row["settings"], "hash": 0, "name": 0})) for row in rows] for rows in (in_use, after)]
        assert said[0] == said[1], noun
        assert said[0], noun
    prices = [
        json.loads(command("prices", "list", "--json", *more).stdout) for more in ([], ["--config", str(here / "again.yaml")])
    ]
    first, second = ([exact({**row, "source": ""}) for row in rows] for rows in prices)
    assert first == second
    assert "0.123456789123456789123" in {row["output"] for row in prices[1]}


def test_it_holds_hashes_and_no_secrets(command: Command, filled: list[str], here: Path) -> None:  # failure 76
    (here / "glasshouse.yaml").write_text(
        json.dumps({**FILE, "redis": {"url": "redis://me:canary@127.0.0.1:1/0"}, "phoenix": {"url": "http://me:canary@h:1"}})
    )
    result = command("export")
    assert "canary" not in result.output
    for secret in filled:
        assert secret[7:] not in result.output
        assert f"sha256:{hash_key(secret).hex()}" in result.stdout
    assert "redis://me@127.0.0.1:1/0" in result.stdout
    assert "left out: redis.url: its password\n" in result.stderr
    assert "left out: phoenix.url: its password\n" in result.stderr


def test_what_has_no_place_in_a_file_is_told(command: Command) -> None:
    first = command("keys", "create", "alice").stdout.strip()
    second = command("keys", "rotate", "alice", "--overlap", "1h").stdout.strip()
    result = command("export")
    assert hash_key(first).hex() not in result.stdout
    assert hash_key(second).hex() in result.stdout
    assert "left out: keys.alice: a former secret, which works for 3" in result.stderr
    engine = open_database(Settings().database_url)
    with engine.connect() as connection:
        later = exported(connection, Settings(), time.time_ns() + 2 * 3600 * 10**9)
    engine.dispose()
    assert later.left_out == [], "what has ended is no loss"
    assert [key.hash for key in Settings.of(later.file).keys.values()] == [f"sha256:{hash_key(second).hex()}"]


def test_for_programs(command: Command, filled: list[str]) -> None:
    exported = json.loads(command("export", "--json").stdout)
    assert Settings.of(exported).teams["research"].requests_per_minute == 600
    assert Settings.of(exported).keys["alice"].max_input_tokens == 99
