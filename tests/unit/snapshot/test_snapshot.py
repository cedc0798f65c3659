"""The catalogue as workers see it: written whole, read whole, never half."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.snapshot import (
    Allowance,
    Backend,
    Model,
    Principal,
    Snapshot,
    SnapshotError,
    SnapshotFeed,
    SnapshotFile,
    read_snapshot,
    write_snapshot,
)
from proxy.snapshot.model import SNAPSHOT_VERSION, decode_snapshot, encode_principal


def file(revision: int = 1) -> SnapshotFile:
    return SnapshotFile(
        revision=revision,
        published_unix_ns=5,
        currency="EUR",
        keys={b"h" * 32: encode_principal(Principal("key_1", "Ärger"))},
        models={"m": Model("m", ("b",), 1, 2, 3, b'{"id":"m"}'), "n": Model("n", (), card=b'{"id":"n"}')},
        backends={"b": Backend("b", "gpu", 8000, "openai", "/x", "KEY")},
    )


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    write_snapshot(path, file())
    assert read_snapshot(path) == file()
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path], "no scratch file is left"


def test_a_snapshot_is_ready_for_look_ups() -> None:
    snapshot = Snapshot(file())
    assert (snapshot.revision, snapshot.published_unix_ns, snapshot.currency) == (1, 5, "EUR")
    assert snapshot.principal(b"h" * 32) == Principal("key_1", "Ärger")
    assert snapshot.principal(b"h" * 32) is snapshot.principal(b"h" * 32)
    assert snapshot.principal(b"x" * 32) is None
    assert snapshot.principal(b"") is None
    anybody = Principal("key_1", "Ärger")
    assert json.loads(snapshot.models_json(anybody)) == {"object": "list", "data": [{"id": "m"}, {"id": "n"}]}
    assert json.loads(Snapshot(SnapshotFile()).models_json(anybody)) == {"object": "list", "data": []}


# --- who may use which models ------------------------------------------------------------------------------------------

NAMES = ("qwen3-8b", "qwen3-32b", "Qwen/Qwen3-8B", "bge-m3", "a[1]")
Patterns = tuple[str, ...] | None


def models_of(key: Patterns, team: Patterns = None, everyone: Patterns = None) -> tuple[Snapshot, Principal]:
    models = {name: Model(name, card=b'{"id":"%b"}' % name.encode()) for name in NAMES}
    teams, all_of_us = {"research": Allowance(models=team)}, Allowance(models=everyone)
    return Snapshot(SnapshotFile(models=models, teams=teams, everyone=all_of_us)), Principal(
        "key_1", "alice", "research", Allowance(models=key)
    )


@pytest.mark.parametrize(
    ("key", "team", "everyone", "allowed"),
    [
        (None, None, None, NAMES),
        (("*",), None, None, NAMES),
        (("qwen3-8b",), None, None, ("qwen3-8b",)),
        (("qwen*",), None, None, ("qwen3-8b", "qwen3-32b")),
        (("Qwen*",), None, None, ("Qwen/Qwen3-8B",)),
        (("*8[bB]",), None, None, ("qwen3-8b", "Qwen/Qwen3-8B")),
        (("qwen3-?b", "bge*"), None, None, ("qwen3-8b", "bge-m3")),
        (("a[[]1]",), None, None, ("a[1]",)),
        (("qwen",), None, None, ()),
        ((), None, None, ()),
        (None, ("qwen*",), None, ("qwen3-8b", "qwen3-32b")),
        (None, None, ("bge*",), ("bge-m3",)),
        (("qwen*",), ("*8b",), None, ("qwen3-8b",)),
        (("qwen*",), ("*8b",), ("*32b",), ()),
    ],
)
def test_a_key_may_use_what_all_its_levels_allow(
    key: Patterns, team: Patterns, everyone: Patterns, allowed: tuple[str, ...]
) -> None:
    snapshot, alice = models_of(key, team, everyone)
    assert tuple(snapshot.allowed_models(alice)) == allowed
    assert [each["id"] for each in json.loads(snapshot.models_json(alice))["data"]] == list(allowed)


def test_who_may_use_everything_costs_nothing() -> None:
    snapshot, alice = models_of(None)
    assert snapshot.allowed_models(alice) is snapshot.models
    assert snapshot.models_json(alice) is snapshot.models_json(Principal("key_2", "bob"))


def test_it_is_found_out_once_for_all_keys_of_the_same_patterns() -> None:
    snapshot, alice = models_of(("qwen*",))
    allowed = snapshot.allowed_models(alice)
    assert snapshot.allowed_models(alice) is allowed
    bob = Principal("key_2", "bob", "", Allowance(models=("qwen*",)))
    assert snapshot.allowed_models(bob) is allowed


def test_what_is_known_of_a_key_may_be_of_a_release_that_knew_no_limits() -> None:
    earlier = msgspec.Raw(msgspec.msgpack.encode(["key_1", "alice"]))
    assert Snapshot(SnapshotFile(keys={b"h" * 32: earlier})).principal(b"h" * 32) == Principal("key_1", "alice")


@pytest.mark.parametrize("version", [SNAPSHOT_VERSION, SNAPSHOT_VERSION - 1])
def test_this_version_and_the_one_before_are_read(version: int) -> None:
    assert decode_snapshot(msgspec.msgpack.encode(msgspec.structs.replace(file(), version=version))).revision == 1


@pytest.mark.parametrize("version", [SNAPSHOT_VERSION + 1, SNAPSHOT_VERSION - 2, 99])
def test_other_versions_are_refused(version: int) -> None:
    with pytest.raises(SnapshotError, match=f"snapshot version {version}"):
        decode_snapshot(msgspec.msgpack.encode(msgspec.structs.replace(file(), version=version)))


def test_fields_of_a_later_release_are_passed_over() -> None:
    later = [*msgspec.msgpack.decode(msgspec.msgpack.encode(file())), "more", {"and": "more"}]
    assert decode_snapshot(msgspec.msgpack.encode(later)) == file()


@settings(deadline=None)
@given(st.binary(max_size=100))
def test_anything_else_is_refused(data: bytes) -> None:
    try:
        decode_snapshot(data)
    except SnapshotError:
        return
    assert msgspec.msgpack.decode(data) is not None


# --- the feed ----------------------------------------------------------------------------------------------------------


def test_a_feed_without_a_file_has_nothing(tmp_path: Path) -> None:
    feed = SnapshotFeed(tmp_path / "snapshot")
    assert (feed.poll(), feed.current) == (False, None)


def test_a_feed_follows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    feed = SnapshotFeed(path)
    for revision in (1, 2, 3):
        write_snapshot(path, file(revision))
        assert feed.poll()
        assert feed.current is not None
        assert feed.current.revision == revision
        current = feed.current
        assert not feed.poll()
        assert feed.current is current


@pytest.mark.parametrize("damage", [b"", b"garbage", b"\x90"])
def test_the_last_good_snapshot_stays(tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "snapshot"
    write_snapshot(path, file())
    feed = SnapshotFeed(path)
    assert feed.poll()
    path.write_bytes(damage)
    os.utime(path, ns=(1, 1))
    if damage == b"\x90":  # an empty list is a snapshot with nothing in it
        assert feed.poll()
        return
    assert not feed.poll()
    assert feed.current is not None
    assert feed.current.revision == 1
    assert "the last good one stays" in caplog.text
    path.unlink()
    assert not feed.poll()
    assert feed.current.revision == 1
    write_snapshot(path, file(2))
    assert feed.poll()
    assert feed.current.revision == 2
