"""When the snapshot is written, and with what date. The database is real; time is handed in where it decides."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from proxy.control.discovery import Answer
from proxy.control.feed import CatalogueFeed
from proxy.control.inventory import Inventory
from proxy.control.publish import PATIENCE_NS, REPEAT_NS, Publisher
from proxy.settings import Settings
from proxy.snapshot import Snapshot, SnapshotFile, read_snapshot
from proxy.store import create_key, hash_key, open_database, revoke_key

ANSWER = Answer("vllm", {"m": b'{"id":"m"}'})


class Parts:
    """A control process without its loops."""

    def __init__(self, settings: Settings, previous: SnapshotFile | None = None) -> None:
        self.inventory = Inventory(settings, previous, 1)
        self.feed = CatalogueFeed(settings.database_url, previous)
        self.publisher = Publisher(settings.snapshot_path, "USD", self.inventory, self.feed, previous)
        self.known = self.inventory.known["backend-0"]

    def publish(self, running_ns: int = 0) -> SnapshotFile | None:
        """What was written, read back; None if nothing was due."""
        if (file := self.publisher.due(running_ns)) is None:
            return None
        assert self.publisher.write(file)
        return read_snapshot(self.publisher._path)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.of({"state_dir": str(tmp_path), "backends": [{"url": "http://127.0.0.1:1"}]})


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    engine = open_database(settings.database_url)
    yield engine
    engine.dispose()


def test_the_first_snapshot_waits_for_keys_and_backends(settings: Settings) -> None:
    parts = Parts(settings)
    assert parts.publish() is None
    parts.known.failed("refused", 1)
    assert parts.publish() is None
    assert parts.feed.poll()
    assert parts.publish() is not None


def test_but_not_for_ever_for_a_backend_that_hangs(settings: Settings) -> None:  # failure 53
    parts = Parts(settings)
    assert parts.publish(PATIENCE_NS) is None, "for the keys it does"
    parts.feed.poll()
    assert parts.publish(PATIENCE_NS - 1) is None
    assert parts.publish(PATIENCE_NS) is not None


def test_a_key_gets_in_and_out_again(settings: Settings, engine: Engine) -> None:
    parts = Parts(settings)
    parts.known.answered(ANSWER, 1)
    parts.feed.poll()
    first = parts.publish()
    assert first is not None
    assert first.keys == {}

    with engine.begin() as connection:
        secret, row = create_key(connection, "alice")
    assert parts.feed.poll()
    second = parts.publish()
    assert second is not None
    principal = Snapshot(second).principal(hash_key(secret))
    assert principal is not None
    assert (principal.key_id, principal.key_name) == (row.id, "alice")
    assert (first.revision, second.revision) == (0, 1)

    with engine.begin() as connection:
        revoke_key(connection, "alice")
    assert parts.feed.poll()
    third = parts.publish()
    assert third is not None
    assert third.keys == {}
    assert first.published_unix_ns < second.published_unix_ns < third.published_unix_ns


def test_nothing_new_is_not_written(settings: Settings) -> None:
    parts = Parts(settings)
    parts.known.answered(ANSWER, 1)
    parts.feed.poll()
    assert parts.publish() is not None
    assert not parts.feed.poll()
    assert not parts.known.answered(ANSWER, 2)
    assert parts.publish() is None


def test_nothing_new_is_told_again_before_its_date_is_old(settings: Settings) -> None:
    parts = Parts(settings)
    parts.known.answered(ANSWER, 1)
    parts.feed.poll()
    first = parts.publish()
    assert first is not None
    parts.feed.as_of_unix_ns = first.published_unix_ns + REPEAT_NS - 1
    assert parts.publish() is None
    parts.feed.as_of_unix_ns += 1
    again = parts.publish()
    assert again is not None
    assert again.published_unix_ns == first.published_unix_ns + REPEAT_NS


def test_a_new_model_is_written_at_once_with_a_later_date(settings: Settings) -> None:
    parts = Parts(settings)
    parts.known.failed("refused", 1)
    parts.feed.poll()
    first = parts.publish()
    assert parts.known.answered(ANSWER, 2)
    second = parts.publish()
    assert first is not None
    assert second is not None
    assert (list(first.models), list(second.models)) == ([], ["m"])
    assert second.published_unix_ns > first.published_unix_ns


def test_a_database_that_is_down(settings: Settings, engine: Engine, caplog: pytest.LogCaptureFixture) -> None:  # failure 46
    """The keys stay, the date stays behind, backends go on; it is said once."""
    with engine.begin() as connection:
        create_key(connection, "alice")
    parts = Parts(settings)
    parts.known.failed("refused", 1)
    parts.feed.poll()
    first = parts.publish()
    assert first is not None

    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE keys RENAME TO hidden")
        connection.exec_driver_sql("UPDATE catalogue SET revision = revision + 1")
    assert not parts.feed.poll()
    assert not parts.feed.poll()
    assert "no such table" in parts.feed.error
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert parts.publish() is None

    parts.known.answered(ANSWER, 2)
    second = parts.publish()
    assert second is not None
    assert (list(second.models), second.keys) == (["m"], first.keys)
    assert second.published_unix_ns == first.published_unix_ns + 1

    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE hidden RENAME TO keys")
    parts.feed.poll()
    assert parts.feed.error == ""
    assert parts.feed.as_of_unix_ns > second.published_unix_ns


def test_starting_with_the_database_down(settings: Settings, engine: Engine, tmp_path: Path) -> None:  # failure 46
    with engine.begin() as connection:
        secret, _ = create_key(connection, "alice")
    before = Parts(settings)
    before.known.answered(ANSWER, 1)
    before.feed.poll()
    previous = before.publish()

    elsewhere = Settings.of(
        {"state_dir": str(tmp_path), "backends": [{"url": "http://127.0.0.1:1"}], "database": "sqlite:////nowhere/at/all"}
    )
    after = Parts(elsewhere, previous)
    assert not after.feed.poll()
    assert after.publish() is None, "all of it is in the file already"
    after.known.answered(Answer("vllm", {"n": b'{"id":"n"}'}), 2)
    file = after.publish()
    assert file is not None
    assert Snapshot(file).principal(hash_key(secret)) is not None


def test_a_database_that_was_replaced_is_read_in_full(settings: Settings, engine: Engine) -> None:
    """Its revision may by chance be the one of the snapshot."""
    with engine.begin() as connection:
        create_key(connection, "alice")
    before = Parts(settings)
    before.known.answered(ANSWER, 1)
    before.feed.poll()
    previous = before.publish()
    engine.dispose()
    before.feed.close()
    for file in settings.state_path.glob("glasshouse.db*"):
        file.unlink()
    with open_database(settings.database_url).begin() as connection:
        secret, _ = create_key(connection, "bob")
    after = Parts(settings, previous)
    assert after.feed.poll()
    file_again = after.publish()
    assert file_again is not None
    assert list(file_again.keys) == [hash_key(secret)]


def test_a_full_disk(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:  # failure 66
    """What couldn't be written stays due; it is said once."""
    parts = Parts(settings)
    parts.known.answered(ANSWER, 1)
    parts.feed.poll()
    parts.publisher._path = Path("/dev/full/snapshot")
    for _ in range(2):
        file = parts.publisher.due(0)
        assert file is not None
        assert not parts.publisher.write(file)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    parts.publisher._path = settings.snapshot_path
    assert parts.publish() is not None


def test_no_secret_and_no_hash_in_the_log(
    settings: Settings, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:  # failure 76
    caplog.set_level(logging.DEBUG)
    with engine.begin() as connection:
        secret, _ = create_key(connection, "alice")
    parts = Parts(settings)
    parts.known.answered(ANSWER, 1)
    parts.feed.poll()
    parts.publish()
    said = json.dumps([record.__dict__ for record in caplog.records], default=str)
    assert secret not in said
    assert hash_key(secret).hex() not in said
