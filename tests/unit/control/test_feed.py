"""Following the catalogue: what is read when something changed, and what holds while nothing can be read. A real database."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from proxy.control import feed as feeding
from proxy.control.feed import CatalogueFeed
from proxy.nouns import (
    AllowanceSettings,
    BackendSettings,
    BudgetSettings,
    KeySettings,
    ModelSettings,
    ProjectSettings,
    TeamSettings,
    UserSettings,
)
from proxy.settings import Settings
from proxy.snapshot import Allowance, Principal, Snapshot, SnapshotFile, read_snapshot, write_snapshot
from proxy.spend import Period
from proxy.spend.periods import Counted
from proxy.store import (
    BACKENDS,
    GLASSHOUSE,
    MODELS,
    PROJECTS,
    TEAMS,
    USERS,
    change_key,
    create_admin_key,
    create_key,
    hash_key,
    open_database,
    prune_audit,
    put,
    put_everyone,
    remove,
    revoke_key,
    rotate_key,
)
from tests.support.postgresql import postgresql_server

NOWHERE = "sqlite:////nowhere/at/all"
SECRET = "gh-" + "x" * 43
HASH = f"sha256:{hash_key(SECRET).hex()}"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = open_database(f"sqlite:///{tmp_path / 'glasshouse.db'}")
    yield engine
    engine.dispose()


class Followed:
    """A feed, and the snapshot that comes of it."""

    def __init__(self, state_dir: Path, previous: SnapshotFile | None = None, **declared: Any) -> None:
        self.settings = Settings.of({"state_dir": str(state_dir), **declared})
        self.feed = CatalogueFeed(self.settings, previous)
        self.reads: list[str] = []
        for name in ("_read", "_read_again"):
            setattr(self.feed, name, self._counting(name, getattr(self.feed, name)))

    def _counting(self, name: str, read: Any) -> Any:
        def counted(*arguments: Any) -> None:
            self.reads.append(name)
            read(*arguments)

        return counted

    def poll(self) -> bool:
        changed = self.feed.poll()
        assert self.feed.error == ""
        return changed

    def file(self) -> SnapshotFile:
        """As it comes back from the disk."""
        known, path = self.feed.known, self.settings.snapshot_path
        declared = known.declared
        file = SnapshotFile(
            revision=known.revision,
            keys=known.keys,
            everyone=declared.everyone,
            teams=declared.teams,
            users=declared.users,
            projects=declared.projects,
        )
        write_snapshot(path, file)
        return read_snapshot(path)

    def find(self, secret: str) -> tuple[Principal, int] | None:
        return Snapshot(self.file()).find(hash_key(secret))

    def principal(self, secret: str) -> Principal | None:
        return Snapshot(self.file()).principal(hash_key(secret))


@pytest.fixture
def followed(tmp_path: Path, engine: Engine) -> Followed:
    made = Followed(tmp_path)
    assert made.poll()
    made.reads.clear()
    return made


# -- what is read --


def test_a_change_of_keys_reads_those_keys(followed: Followed, engine: Engine) -> None:
    with engine.begin() as connection:
        alices, alice = create_key(connection, "alice")
        bobs, bob = create_key(connection, "bob", KeySettings(requests_per_minute=5))
    assert followed.poll()
    assert not followed.poll()
    assert followed.principal(alices) == Principal(alice.id, "alice")
    assert followed.principal(bobs) == Principal(bob.id, "bob", "", Allowance(requests_per_minute=5))

    with engine.begin() as connection:
        change_key(connection, "alice", KeySettings(blocked=True))
        revoke_key(connection, "bob")
    assert followed.poll()
    assert followed.principal(alices) == Principal(alice.id, "alice", "", Allowance(blocked=True))
    assert followed.principal(bobs) is None
    assert followed.reads == ["_read_again"] * 2


def test_a_name_that_was_given_again(followed: Followed, engine: Engine) -> None:
    with engine.begin() as connection:
        first, _ = create_key(connection, "alice")
    followed.poll()
    with engine.begin() as connection:
        revoke_key(connection, "alice")
        second, row = create_key(connection, "alice")
    followed.poll()
    assert followed.principal(first) is None
    assert followed.principal(second) == Principal(row.id, "alice")


def test_secrets_of_a_key_that_was_rotated(followed: Followed, engine: Engine) -> None:
    with engine.begin() as connection:
        first, row = create_key(connection, "alice")
    followed.poll()
    with engine.begin() as connection:
        second, rotated = rotate_key(connection, "alice", 3600)
    followed.poll()
    ends = {secret.prefix: secret.ends_at for secret in rotated.secrets}
    assert followed.find(first) == (Principal(row.id, "alice"), ends[first[:7]])
    found = followed.find(second)
    assert found is not None
    assert found[0].key_id == row.id
    assert found[1] > 10**18 * 9, "never"


def test_other_nouns_are_read_without_the_keys(followed: Followed, engine: Engine) -> None:
    with engine.begin() as connection:
        secret, _ = create_key(connection, "alice")
    followed.poll()
    with engine.begin() as connection:
        put(connection, TEAMS, "t", TeamSettings(blocked=True), GLASSHOUSE)
        put(connection, USERS, "u", UserSettings(team="t", concurrent_requests=2), GLASSHOUSE)
        put(connection, PROJECTS, "p", ProjectSettings(tokens_per_minute=3), GLASSHOUSE)
        put(connection, MODELS, "m", ModelSettings(aliases=("n",)), GLASSHOUSE)
        put(connection, BACKENDS, "gpu", BackendSettings(url="http://gpu"), GLASSHOUSE)
        put_everyone(connection, AllowanceSettings(max_input_tokens=4), GLASSHOUSE)
        change_key(connection, "alice", KeySettings(team="t", user="u", project="p"))
    assert followed.poll()
    file = followed.file()
    assert file.teams == {"t": Allowance(blocked=True)}
    assert file.users == {"u": Allowance(concurrent_requests=2)}
    assert file.projects == {"p": Allowance(tokens_per_minute=3)}
    assert file.everyone == Allowance(max_input_tokens=4)
    held = followed.feed.known.declared.held
    assert (list(held.models), list(held.backends)) == (["m"], ["gpu"])
    principal = followed.principal(secret)
    assert principal is not None
    assert (principal.team, principal.user, principal.project) == ("t", "u", "p")
    assert Snapshot(file).blocked(principal)
    assert followed.reads == ["_read_again"] * 2


def test_what_is_no_business_of_workers_changes_nothing(followed: Followed, engine: Engine) -> None:
    before = followed.file()
    with engine.begin() as connection:
        create_admin_key(connection, "root", "admin")
    followed.poll()
    after = followed.file()
    assert after.revision > before.revision
    assert (after.keys, after.teams) == (before.keys, before.teams)


def test_where_the_audit_log_does_not_tell_everything_is_read(followed: Followed, engine: Engine) -> None:
    with engine.begin() as connection:
        alices, _ = create_key(connection, "alice")
    followed.poll()
    with engine.begin() as connection:
        revoke_key(connection, "alice")
        bobs, _ = create_key(connection, "bob")
        assert prune_audit(connection, 2**62, 3) == 3
    followed.reads.clear()
    followed.poll()
    assert followed.reads == ["_read"]
    assert followed.principal(alices) is None
    assert followed.principal(bobs) is not None


def test_many_changes_are_read_at_once(followed: Followed, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "MOST_CHANGES", 3)
    with engine.begin() as connection:
        made = [create_key(connection, f"key {number}") for number in range(4)]
    followed.poll()
    assert followed.reads == ["_read"]
    assert all(followed.principal(secret) for secret, _ in made)


def test_a_look_that_fails_in_the_middle_leaves_nothing_half(followed: Followed, engine: Engine) -> None:  # failure 46
    with engine.begin() as connection:
        alices, _ = create_key(connection, "alice")
    followed.poll()
    before = followed.file()
    with engine.begin() as connection:
        bobs, _ = create_key(connection, "bob")
        revoke_key(connection, "alice")
        connection.exec_driver_sql("ALTER TABLE key_secrets RENAME TO hidden")
    assert not followed.feed.poll()
    assert "no such table" in followed.feed.error
    assert followed.file() == before
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE hidden RENAME TO key_secrets")
    followed.poll()
    assert followed.principal(alices) is None
    assert followed.principal(bobs) is not None


def test_postgresql_tells_the_same(tmp_path: Path) -> None:
    with postgresql_server() as server:
        engine = open_database(server.url)
        followed = Followed(tmp_path, database=server.url)
        followed.poll()
        with engine.begin() as connection:
            put(connection, TEAMS, "t", TeamSettings(requests_per_minute=1), GLASSHOUSE)
            alices, alice = create_key(connection, "alice", KeySettings(team="t"))
            bobs, _ = create_key(connection, "bob")
        followed.poll()
        with engine.begin() as connection:
            revoke_key(connection, "bob")
            newest, _ = rotate_key(connection, "alice", 60)
        followed.poll()
        assert followed.reads == ["_read", "_read_again", "_read_again"]
        assert followed.principal(alices) == followed.principal(newest) == Principal(alice.id, "alice", "t")
        assert followed.principal(bobs) is None
        assert followed.file().teams == {"t": Allowance(requests_per_minute=1)}
        followed.feed.close()
        engine.dispose()


# -- the file over the database --


def test_the_file_lies_over_the_keys(tmp_path: Path, engine: Engine) -> None:
    with engine.begin() as connection:
        put(connection, TEAMS, "db", TeamSettings(), GLASSHOUSE)
        alices, alice = create_key(connection, "alice", KeySettings(team="db", tokens_per_minute=2, requests_per_minute=1))
    followed = Followed(tmp_path, teams={"file": {}}, keys={"alice": {"team": "file", "requests_per_minute": 9}})
    followed.poll()
    expected = Principal(alice.id, "alice", "file", Allowance(requests_per_minute=9, tokens_per_minute=2))
    assert followed.principal(alices) == expected
    with engine.begin() as connection:
        change_key(connection, "alice", KeySettings(team="db", tokens_per_minute=3, requests_per_minute=1))
    followed.poll()
    assert followed.principal(alices) == Principal(
        alice.id, "alice", "file", Allowance(requests_per_minute=9, tokens_per_minute=3)
    )


def test_a_key_that_is_the_files_alone(tmp_path: Path, engine: Engine) -> None:
    followed = Followed(tmp_path, keys={"ci": {"hash": HASH, "requests_per_minute": 3}})
    expected = Principal(f"key_{HASH[7:23]}", "ci", "", Allowance(requests_per_minute=3))
    assert followed.principal(SECRET) == expected, "before the database was read"
    followed.poll()
    assert followed.principal(SECRET) == expected
    assert followed.feed.known.without_key == []


def test_a_secret_that_both_have(tmp_path: Path, engine: Engine) -> None:
    """The key keeps its id, for all of its secrets; what holds for it is what the file says."""
    with engine.begin() as connection:
        first, row = create_key(connection, "alice", KeySettings(requests_per_minute=1))
        second, _ = rotate_key(connection, "alice", 3600)
    followed = Followed(tmp_path, keys={"ann": {"hash": f"sha256:{hash_key(first).hex()}", "tokens_per_minute": 5}})
    followed.poll()
    expected = Principal(row.id, "ann", "", Allowance(tokens_per_minute=5))
    assert followed.principal(first) == followed.principal(second) == expected
    found = followed.find(first)
    assert found is not None
    assert found[1] > 9 * 10**18, "the file doesn't let it end"


def test_a_secret_that_the_database_gives_up_stays_the_files(tmp_path: Path, engine: Engine) -> None:
    with engine.begin() as connection:
        secret, row = create_key(connection, "alice")
    followed = Followed(tmp_path, keys={"ann": {"hash": f"sha256:{hash_key(secret).hex()}"}})
    followed.poll()
    assert followed.principal(secret) == Principal(row.id, "ann")
    with engine.begin() as connection:
        revoke_key(connection, "alice")
    followed.poll()
    assert followed.principal(secret) == Principal(f"key_{hash_key(secret).hex()[:16]}", "ann")
    assert followed.reads == ["_read", "_read_again"]


def test_what_many_changes_leave_behind_is_taken_away(
    followed: Followed, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeding, "MOST_CHANGES", 10)
    with engine.begin() as connection:
        secret, _ = create_key(connection, "alice")
    followed.poll()
    smallest = len(followed.feed.known.keys.encoded())
    sizes = []
    for number in range(20):
        with engine.begin() as connection:
            change_key(connection, "alice", KeySettings(requests_per_minute=100 + number))
        followed.poll()
        sizes.append(len(followed.feed.known.keys.encoded()))
        principal = followed.principal(secret)
        assert principal is not None
        assert principal.allowance.requests_per_minute == 100 + number
    assert max(sizes) < 10 * smallest
    assert any(later < sooner for sooner, later in itertools.pairwise(sizes))


def test_what_is_referred_to_and_not_there_is_told_of_once(
    tmp_path: Path, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    known = {"teams": ["elsewhere"], "users": ["nobody"], "projects": ["nothing"]}
    with engine.begin() as connection:
        create_key(connection, "alice", KeySettings(team="elsewhere", user="nobody", project="nothing"), known=known)
    followed = Followed(tmp_path)
    followed.poll()
    missing = ["project nothing", "team elsewhere", "user nobody"]
    assert followed.feed.known.missing == missing
    with engine.begin() as connection:
        create_key(connection, "bob")
    followed.poll()
    assert [getattr(record, "missing", None) for record in caplog.records] == [missing]
    with engine.begin() as connection:
        put(connection, TEAMS, "elsewhere", TeamSettings(), GLASSHOUSE)
    followed.poll()
    assert followed.feed.known.missing == ["project nothing", "user nobody"]


# -- what is counted --


def test_the_periods_of_all_budgets(tmp_path: Path, engine: Engine) -> None:
    followed = Followed(tmp_path, everyone={"budgets": [{"tokens": 1, "per": "total"}]})
    assert followed.feed.known.counted == Counted((Period("total"),))
    day = BudgetSettings(tokens=5, per="day", time_zone="Europe/Vienna")
    with engine.begin() as connection:
        put(connection, USERS, "u", UserSettings(budgets=(BudgetSettings(tokens=5, per="week"),)), GLASSHOUSE)
        create_key(connection, "alice", KeySettings(budgets=(day,)))
    followed.poll()
    assert followed.feed.known.counted == Counted((Period("day", "Europe/Vienna"), Period("total"), Period("week")))
    with engine.begin() as connection:
        change_key(connection, "alice", KeySettings(concurrent_requests=1))
        remove(connection, USERS, "u", GLASSHOUSE)
    followed.poll()
    assert followed.feed.known.counted == Counted((Period("total"),), concurrency=True)


# -- without the database --


def before(tmp_path: Path, **declared: Any) -> SnapshotFile:
    """What the process before has published."""
    followed = Followed(tmp_path, **declared)
    followed.poll()
    followed.feed.close()
    return followed.file()


def test_what_the_database_had_holds_while_it_is_down(tmp_path: Path, engine: Engine) -> None:  # failure 46
    with engine.begin() as connection:
        put(connection, TEAMS, "t", TeamSettings(requests_per_minute=1), GLASSHOUSE)
        put(connection, MODELS, "m", ModelSettings(aliases=("n",)), GLASSHOUSE)
        put(connection, BACKENDS, "gpu", BackendSettings(url="http://gpu"), GLASSHOUSE)
        expires = datetime(2030, 1, 1, tzinfo=UTC)
        value = KeySettings(team="t", expires=expires, budgets=(BudgetSettings(tokens=1, per="day"),))
        create_key(connection, "alice", value)
        rotate_key(connection, "alice", 3600)
    previous = before(tmp_path)
    after = Followed(tmp_path, previous, database=NOWHERE)
    assert not after.feed.poll()
    assert after.feed.error
    assert after.file() == previous
    assert (after.feed.known.revision, after.feed.known.counted) == (previous.revision, Counted((Period("day"),)))
    held = after.feed.known.declared.held
    assert (list(held.models), list(held.backends)) == (["m"], ["gpu"])
    assert after.feed.known.without_key is None


def test_what_the_file_says_today_holds_over_that(tmp_path: Path, engine: Engine) -> None:
    """Also where it says less than it did."""
    with engine.begin() as connection:
        alices, alice = create_key(connection, "alice", KeySettings(tokens_per_minute=2))
        bobs, bob = create_key(connection, "bob", KeySettings(tokens_per_minute=2))
        put(connection, TEAMS, "db", TeamSettings(requests_per_minute=1), GLASSHOUSE)
    previous = before(
        tmp_path,
        teams={"file": {}, "gone": {}},
        keys={"alice": {"team": "file", "requests_per_minute": 9}},
        backends=[{"url": "http://gone", "name": "gone"}],
    )
    after = Followed(
        tmp_path,
        previous,
        database=NOWHERE,
        teams={"file": {"blocked": True}},
        keys={"alice": {"input_tokens_per_minute": 7}, "bob": {"team": "file"}},
    )
    assert after.principal(alices) == Principal(alice.id, "alice", "", Allowance(input_tokens_per_minute=7, tokens_per_minute=2))
    assert after.principal(bobs) == Principal(bob.id, "bob", "file", Allowance(tokens_per_minute=2))
    assert after.file().teams == {"file": Allowance(blocked=True), "db": Allowance(requests_per_minute=1)}
    assert after.feed.known.declared.held.backends == {}


def test_a_key_of_the_file_goes_with_it(tmp_path: Path, engine: Engine) -> None:
    previous = before(tmp_path, keys={"ci": {"hash": HASH}})
    assert Snapshot(previous).principal(hash_key(SECRET)) is not None
    after = Followed(tmp_path, previous, database=NOWHERE)
    assert after.principal(SECRET) is None


def test_a_secret_that_both_had_is_the_databases_again(tmp_path: Path, engine: Engine) -> None:
    with engine.begin() as connection:
        secret, row = create_key(connection, "alice", KeySettings(requests_per_minute=1))
    whole: dict[str, Any] = {"keys": {"ann": {"hash": f"sha256:{hash_key(secret).hex()}"}}}
    previous = before(tmp_path, **whole)
    assert Followed(tmp_path, previous, database=NOWHERE, **whole).principal(secret) == Principal(row.id, "ann")
    again = Followed(tmp_path, previous, database=NOWHERE).principal(secret)
    assert again == Principal(row.id, "alice", "", Allowance(requests_per_minute=1))


@pytest.mark.parametrize("kept", [b"", b"{", b'{"catalogue":{"teams":{"t":{"colour":"red"}}}}', b"\xff"])
def test_what_was_kept_and_is_not_readable_is_passed_over(
    tmp_path: Path, engine: Engine, caplog: pytest.LogCaptureFixture, kept: bytes
) -> None:
    (tmp_path / "catalogue").write_bytes(kept)
    followed = Followed(tmp_path, database=NOWHERE)
    assert followed.file().teams == {}
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_what_cannot_be_kept_keeps_nobody_waiting(
    tmp_path: Path, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:  # failure 66
    followed = Followed(tmp_path)
    followed.feed._kept._path = Path("/dev/full/catalogue")
    for name in ("a", "b"):
        with engine.begin() as connection:
            put(connection, TEAMS, name, TeamSettings(), GLASSHOUSE)
        followed.poll()
    assert list(followed.file().teams) == ["a", "b"]
    assert [record.levelno for record in caplog.records] == [logging.ERROR], "it is said once"


def test_what_is_kept_is_nobody_elses_to_read(tmp_path: Path, engine: Engine) -> None:  # failure 76
    with engine.begin() as connection:
        secret, _ = create_key(connection, "alice")
    Followed(tmp_path, keys={"alice": {"requests_per_minute": 1}}).poll()
    kept = tmp_path / "catalogue"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert secret not in kept.read_text()
    assert hash_key(secret).hex() not in kept.read_text()
