"""When the snapshot is written, and with what date. The database is real; time is handed in where it decides."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import Engine

from proxy.control.declared import Declared
from proxy.control.discovery import Answer
from proxy.control.feed import CatalogueFeed
from proxy.control.inventory import KEPT_NS, Inventory
from proxy.control.issuers import Fetched, Issuers
from proxy.control.publish import PATIENCE_NS, REPEAT_NS, Publisher
from proxy.nouns import KeySettings
from proxy.settings import Settings
from proxy.snapshot import UNLIMITED, Allowance, Budget, Principal, Purge, Snapshot, SnapshotFile, read_snapshot
from proxy.spend import Period
from proxy.spend.periods import Counted, read_counted
from proxy.store import GLASSHOUSE, cache_secret, create_key, hash_key, open_database, purge, revoke_key
from proxy.store.purges import LONGEST_NS

NOW = 1_795_000_000_000_000_000
ANSWER = Answer("vllm", {"m": b'{"id":"m"}'})


class Parts:
    """A control process without its loops."""

    def __init__(self, settings: Settings, previous: SnapshotFile | None = None) -> None:
        self.feed = CatalogueFeed(settings, previous)
        self.inventory = Inventory(settings.bounds, self.feed.known.declared.held, previous, NOW)
        self.issuers = Issuers(settings.issuers, previous)
        self.publisher = Publisher(settings, self.inventory, self.feed, self.issuers, previous)
        self.known = self.inventory.known["backend-0"]

    def poll(self) -> bool:
        """As the process's loop does."""
        if changed := self.feed.poll():
            self.inventory.follow(self.feed.known.declared.held)
        return changed

    def publish(self, running_ns: int = 0, now_ns: int = NOW) -> SnapshotFile | None:
        """What was written, read back; None if nothing was due."""
        if (file := self.publisher.due(running_ns, now_ns)) is None:
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
    assert parts.poll()
    assert parts.publish() is not None


def test_but_not_for_ever_for_a_backend_that_hangs(settings: Settings) -> None:  # failure 53
    parts = Parts(settings)
    assert parts.publish(PATIENCE_NS) is None, "for the keys it does"
    parts.poll()
    assert parts.publish(PATIENCE_NS - 1) is None
    assert parts.publish(PATIENCE_NS) is not None


def test_a_key_gets_in_and_out_again(settings: Settings, engine: Engine) -> None:
    parts = Parts(settings)
    parts.known.answered(ANSWER, 1)
    parts.poll()
    first = parts.publish()
    assert first is not None
    assert len(first.keys) == 0

    with engine.begin() as connection:
        secret, row = create_key(connection, "alice")
    assert parts.poll()
    second = parts.publish()
    assert second is not None
    principal = Snapshot(second).principal(hash_key(secret))
    assert principal is not None
    assert (principal.key_id, principal.key_name) == (row.id, "alice")
    assert (first.revision, second.revision) == (0, 1)

    with engine.begin() as connection:
        revoke_key(connection, "alice")
    assert parts.poll()
    third = parts.publish()
    assert third is not None
    assert len(third.keys) == 0
    assert first.published_unix_ns < second.published_unix_ns < third.published_unix_ns


def test_nothing_new_is_not_written(settings: Settings) -> None:
    parts = Parts(settings)
    parts.known.answered(ANSWER, 1)
    parts.poll()
    assert parts.publish() is not None
    assert not parts.poll()
    assert not parts.known.answered(ANSWER, 2)
    assert parts.publish() is None


def test_nothing_new_is_told_again_before_its_date_is_old(settings: Settings) -> None:
    parts = Parts(settings)
    parts.known.answered(ANSWER, 1)
    parts.poll()
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
    parts.poll()
    first = parts.publish()
    assert parts.known.answered(ANSWER, 2)
    second = parts.publish()
    assert first is not None
    assert second is not None
    assert (list(first.models), list(second.models)) == ([], ["m"])
    assert second.published_unix_ns > first.published_unix_ns


# -- allowances --


def with_limits(settings: Settings, **declared: object) -> Settings:
    return Settings.of({"state_dir": settings.state_dir, "backends": [{"url": "http://127.0.0.1:1"}], **declared})


def allowances_of(file: SnapshotFile, secret: str) -> Principal:
    found = Snapshot(file).principal(hash_key(secret))
    assert found is not None
    return found


def test_what_is_declared_is_published_with_the_key_of_that_name(settings: Settings, engine: Engine) -> None:
    with engine.begin() as connection:
        (alices, alice), (bobs, bob) = create_key(connection, "alice"), create_key(connection, "bob")
    said = {
        "everyone": {"tokens_per_minute": 9},
        "teams": {"research": {"concurrent_requests": 4, "expires": "2026-12-31T18:00:00.000001+01:00"}},
        "keys": {
            "alice": {
                "team": "research",
                "requests_per_minute": 1,
                "input_tokens_per_minute": 2,
                "output_tokens_per_minute": 3,
                "max_input_tokens": 5,
                "models": ["qwen*"],
                "operations": ["chat"],
                "budgets": [
                    {"money": "0.000000001", "per": "day"},
                    {"tokens": 7, "per": "week", "time_zone": "Europe/Vienna"},
                    {"gpu_seconds": 8, "per": "total", "soft": True},
                ],
            }
        },
    }
    parts = Parts(with_limits(settings, **said))
    parts.known.answered(ANSWER, 1)
    parts.poll()
    file = parts.publish()
    assert file is not None
    budgets = (
        Budget("money", 1, "day"),
        Budget("tokens", 7, "week", "Europe/Vienna"),
        Budget("gpu_seconds", 8_000_000_000, "total", soft=True),
    )
    allowance = Allowance(1, 2, 3, None, None, 5, ("qwen*",), ("chat",), 0, budgets)
    assert allowances_of(file, alices) == Principal(alice.id, "alice", "research", allowance)
    assert allowances_of(file, bobs) == Principal(bob.id, "bob", "", UNLIMITED)
    assert file.everyone == Allowance(tokens_per_minute=9)
    assert file.teams == {"research": Allowance(concurrent_requests=4, expires_unix_ns=1_798_736_400_000_001_000)}


def test_money_is_nano_units_and_never_nothing(settings: Settings) -> None:
    def nano(money: str) -> int:
        declared = Declared(with_limits(settings, everyone={"budgets": [{"money": money, "per": "day"}]}))
        return declared.everyone.budgets[0].amount

    assert [nano(each) for each in ("20.5", "0.0000000004", "1000000000")] == [20_500_000_000, 1, 10**18]


@pytest.mark.parametrize(
    "declared",
    [
        {"everyone": {"concurrent_requests": 2}},
        {"teams": {"research": {}}},
        {"teams": {"research": {"max_input_tokens": 1}}, "everyone": {}},
        {"keys": {"alice": {"requests_per_minute": 1}}},
    ],
)
def test_another_allowance_is_written_at_once(settings: Settings, engine: Engine, declared: dict[str, object]) -> None:
    """Also while the database is down: the keys that were known get theirs."""
    with engine.begin() as connection:
        secret, _ = create_key(connection, "alice")
    before = Parts(settings)
    before.known.answered(ANSWER, 1)
    before.poll()
    previous = before.publish()
    assert previous is not None

    after = Parts(with_limits(settings, database="sqlite:////nowhere/at/all", **declared), previous)
    assert not after.poll()
    file = after.publish()
    assert file is not None
    expected = Declared(with_limits(settings, **declared))
    assert (file.everyone, file.teams) == (expected.everyone, expected.teams)
    assert allowances_of(file, secret) == expected.principal(allowances_of(previous, secret).key_id, "alice")
    assert after.publish() is None


def test_what_is_counted_is_told_before_anybody_has_the_limits(settings: Settings, engine: Engine) -> None:
    parts = Parts(with_limits(settings, everyone={"budgets": [{"tokens": 1, "per": "week"}]}))
    parts.known.answered(ANSWER, 1)
    parts.poll()
    settings.periods_path.mkdir()
    file = parts.publisher.due(0, NOW)
    assert file is not None
    assert not parts.publisher.write(file)
    assert not settings.snapshot_path.exists()
    settings.periods_path.rmdir()
    assert parts.publish() is not None
    assert read_counted(settings.periods_path) == Counted((Period("week"),))
    with engine.begin() as connection:
        create_key(connection, "alice", KeySettings(concurrent_requests=1))
    parts.poll()
    assert parts.publish() is not None
    assert read_counted(settings.periods_path) == Counted((Period("week"),), concurrency=True)


def test_a_price_is_published_before_it_is_valid_and_goes_on_alone_in_the_end(settings: Settings) -> None:
    soon = datetime.fromtimestamp(NOW // 10**9 + 5, UTC).isoformat()
    parts = Parts(with_limits(settings, models={"m": {"prices": [{"input": 2, "valid_from": soon}]}}))
    parts.known.answered(ANSWER, 1)
    parts.poll()
    first = parts.publish()
    assert first is not None
    assert (first.models["m"].input_pico, len(first.models["m"].later_prices)) == (0, 1)
    assert parts.publish(now_ns=NOW + 6 * 10**9) is None, "workers know when it begins"
    second = parts.publish(now_ns=NOW + 5 * 10**9 + KEPT_NS)
    assert second is not None
    assert (second.models["m"].input_pico, second.models["m"].later_prices) == (2_000_000, ())


def test_keys_of_an_issuer_are_published(settings: Settings) -> None:
    issuers = [{"issuer": "https://id.example", "audience": ["glasshouse"]}]
    parts = Parts(with_limits(settings, issuers=issuers))
    parts.known.answered(ANSWER, 1)
    parts.poll()
    assert parts.publish() is None, "for the first answer or failure"
    parts.issuers.known[0].failed("down", 1)
    first = parts.publish()
    assert first is not None
    assert first.issuers[0].keys == b'{"keys":[]}'
    assert parts.issuers.known[0].answered(Fetched(b'{"keys":[{}]}', 60), 2)
    second = parts.publish()
    assert second is not None
    assert second.issuers[0].keys == b'{"keys":[{}]}'


def test_what_holds_for_users_and_projects_is_published(settings: Settings) -> None:
    parts = Parts(with_limits(settings, users={"u": {"blocked": True}}, projects={"p": {"tokens_per_minute": 7}}))
    parts.known.answered(ANSWER, 1)
    parts.poll()
    file = parts.publish()
    assert file is not None
    assert dict(file.users) == {"u": Allowance(blocked=True)}
    assert file.projects == {"p": Allowance(tokens_per_minute=7)}


def test_a_declaration_for_nobody_is_told_of_once(settings: Settings, engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    with engine.begin() as connection:
        create_key(connection, "alice")
    parts = Parts(with_limits(settings, keys={"alice": {}, "alcie": {}}))
    assert parts.feed.known.without_key is None
    for _ in range(2):
        parts.poll()
        with engine.begin() as connection:
            create_key(connection, f"other-{time.monotonic_ns()}")
    assert parts.feed.known.without_key == ["alcie"]
    assert [getattr(record, "keys", None) for record in caplog.records] == [["alcie"]]
    with engine.begin() as connection:
        create_key(connection, "alcie")
    parts.poll()
    assert parts.feed.known.without_key == []


def test_a_database_that_is_down(settings: Settings, engine: Engine, caplog: pytest.LogCaptureFixture) -> None:  # failure 46
    """The keys stay, the date stays behind, backends go on; it is said once."""
    with engine.begin() as connection:
        create_key(connection, "alice")
    parts = Parts(settings)
    parts.known.failed("refused", 1)
    parts.poll()
    first = parts.publish()
    assert first is not None

    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE keys RENAME TO hidden")
        connection.exec_driver_sql("UPDATE catalogue SET revision = revision + 1")
    assert not parts.poll()
    assert not parts.poll()
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
    parts.poll()
    assert parts.feed.error == ""
    assert parts.feed.as_of_unix_ns > second.published_unix_ns


def test_starting_with_the_database_down(settings: Settings, engine: Engine, tmp_path: Path) -> None:  # failure 46
    with engine.begin() as connection:
        secret, _ = create_key(connection, "alice")
    before = Parts(settings)
    before.known.answered(ANSWER, 1)
    before.poll()
    previous = before.publish()

    elsewhere = Settings.of(
        {"state_dir": str(tmp_path), "backends": [{"url": "http://127.0.0.1:1"}], "database": "sqlite:////nowhere/at/all"}
    )
    after = Parts(elsewhere, previous)
    assert not after.poll()
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
    before.poll()
    previous = before.publish()
    engine.dispose()
    before.feed.close()
    for file in settings.state_path.glob("glasshouse.db*"):
        file.unlink()
    with open_database(settings.database_url).begin() as connection:
        secret, _ = create_key(connection, "bob")
    after = Parts(settings, previous)
    assert after.poll()
    file_again = after.publish()
    assert file_again is not None
    assert list(file_again.keys) == [hash_key(secret)]


def test_a_full_disk(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:  # failure 66
    """What couldn't be written stays due; it is said once."""
    parts = Parts(settings)
    parts.known.answered(ANSWER, 1)
    parts.poll()
    parts.publisher._path = Path("/dev/full/snapshot")
    for _ in range(2):
        file = parts.publisher.due(0, NOW)
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
    parts.poll()
    parts.publish()
    said = json.dumps([record.__dict__ for record in caplog.records], default=str)
    assert secret not in said
    assert hash_key(secret).hex() not in said


# -- the cache --


def test_what_is_said_of_answers_and_of_engines_is_published(settings: Settings) -> None:
    said = {"cache": "off", "engine_parameters": ["priority", "cache_salt"]}
    parts = Parts(with_limits(settings, everyone=said, teams={"a": {"cache": "all"}, "b": {}}))
    parts.known.answered(ANSWER, 1)
    parts.poll()
    file = parts.publish()
    assert file is not None
    assert file.everyone == Allowance(cache="off", engine_parameters=("priority", "cache_salt"))
    assert file.teams == {"a": Allowance(cache="all"), "b": Allowance()}


def test_what_is_withdrawn_is_published_at_once_and_for_as_long_as_it_matters(settings: Settings, engine: Engine) -> None:
    parts = Parts(settings)
    parts.known.answered(ANSWER, 1)
    parts.poll()
    first = parts.publish()
    assert first is not None
    with engine.begin() as connection:
        assert (len(first.cache_secret), first.purges) == (32, ())
        assert first.cache_secret == cache_secret(connection)
        made = purge(connection, GLASSHOUSE, model="m", key_id="k", team="t", user="u").purge
    assert parts.poll()
    second = parts.publish(now_ns=made.before_unix_ns)
    assert second is not None
    assert (second.purges, second.cache_secret) == ((Purge(made.before_unix_ns, "m", "k", "t", "u"),), first.cache_secret)
    assert Snapshot(second).purges == second.purges
    assert parts.publish(now_ns=made.before_unix_ns + LONGEST_NS - 1) is None
    third = parts.publish(now_ns=made.before_unix_ns + LONGEST_NS)
    assert third is not None
    assert third.purges == ()


def test_starting_with_the_database_down_leaves_the_cache_as_it_was(settings: Settings, engine: Engine) -> None:  # failure 46
    with engine.begin() as connection:
        purge(connection, GLASSHOUSE, model="m")
    before = Parts(settings)
    before.known.answered(ANSWER, 1)
    before.poll()
    previous = before.publish(now_ns=time.time_ns())
    assert previous is not None
    assert len(previous.purges) == 1
    after = Parts(with_limits(settings, database="sqlite:////nowhere/at/all"), previous)
    assert not after.poll()
    after.known.answered(Answer("vllm", {"n": b'{"id":"n"}'}), 2)
    file = after.publish(now_ns=time.time_ns())
    assert file is not None
    assert (file.cache_secret, file.purges) == (previous.cache_secret, previous.purges)


def test_a_purge_reads_no_key_and_no_noun_again(settings: Settings, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(settings)
    parts.poll()
    monkeypatch.setattr("proxy.control.feed.stored", None)
    with engine.begin() as connection:
        purge(connection, GLASSHOUSE)
    assert parts.poll()
    assert (parts.feed.error, len(parts.feed.known.purges)) == ("", 1)
