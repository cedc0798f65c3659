"""The snapshot's file: written whole, read whole, never half; its date alone is written in place."""

from __future__ import annotations

import os
import random
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.snapshot import (
    Allowance,
    Backend,
    Budget,
    KeyTable,
    Model,
    Principal,
    Snapshot,
    SnapshotError,
    SnapshotFeed,
    SnapshotFile,
    decode_snapshot,
    encode_principal,
    encode_snapshot,
    read_snapshot,
    write_snapshot,
)
from proxy.snapshot.file import assemble
from proxy.snapshot.model import SNAPSHOT_VERSION, AllowanceTable

DIGESTS = [bytes([number]) * 32 for number in (7, 3, 250, 0, 128)]
NAMES = ("alice", "Ärger", "bob@example.com")


def file(revision: int = 1, published_unix_ns: int = 5) -> SnapshotFile:
    principals = [encode_principal(Principal(f"key_{number}", f"name {number}")) for number in range(len(DIGESTS))]
    return SnapshotFile(
        revision=revision,
        published_unix_ns=published_unix_ns,
        currency="EUR",
        keys=KeyTable.build((digest, number, raw) for number, (digest, raw) in enumerate(zip(DIGESTS, principals, strict=True))),
        models={"m": Model("m", ("b",), 1, 2, 3, b'{"id":"m"}'), "n": Model("n", (), card=b'{"id":"n"}')},
        backends={"b": Backend("b", "gpu", 8000, "openai", "/x", "KEY")},
        users={name: Allowance(requests_per_minute=60, budgets=(Budget("money", 5, "day"),)) for name in NAMES},
    )


ENCODED = encode_snapshot(file())


def replace(path: Path, data: bytes) -> None:
    """As control does it: what somebody has mapped stays."""
    scratch = path.with_name("scratch")
    scratch.write_bytes(data)
    scratch.replace(path)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    write_snapshot(path, file())
    assert read_snapshot(path) == file()
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path], "no scratch file is left"


def test_what_was_read_is_written_again_as_it_was(tmp_path: Path) -> None:
    assert encode_snapshot(decode_snapshot(ENCODED)) == ENCODED


def test_plain_mappings_are_written_too() -> None:
    principal = encode_principal(Principal("key_1", "alice"))
    read = decode_snapshot(encode_snapshot(SnapshotFile(keys={b"h" * 32: principal}, users={"alice": Allowance(1)})))
    assert (dict(read.keys), dict(read.users)) == ({b"h" * 32: principal}, {"alice": Allowance(1)})


def test_a_file_may_hold_nothing() -> None:
    read = decode_snapshot(encode_snapshot(SnapshotFile()))
    assert read == SnapshotFile()
    assert Snapshot(read).principal(bytes(32)) is None


# --- tables ------------------------------------------------------------------------------------------------------------


def test_keys_are_in_the_order_of_their_hashes() -> None:
    keys = file().keys
    assert list(keys) == sorted(DIGESTS)
    assert len(keys) == len(DIGESTS)
    assert [keys[digest] for digest in DIGESTS] == [encode_principal(Principal(f"key_{n}", f"name {n}")) for n in range(5)]
    assert isinstance(keys, KeyTable)
    assert [(secret.digest, secret.ends_unix_ns) for secret in keys.secrets()] == sorted(zip(DIGESTS, range(5), strict=True))


@pytest.mark.parametrize("digest", [b"", bytes(31), bytes(33), b"\xff" * 32, b"\x07" * 31 + b"\x08", b"\x06" + b"\x07" * 31])
def test_what_is_no_key_is_none(digest: bytes) -> None:
    keys = file().keys
    assert digest not in keys
    with pytest.raises(KeyError):
        keys[digest]


def test_a_hash_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes, not 31"):
        KeyTable.build([(bytes(31), 0, encode_principal(Principal("key_1", "alice")))])


def test_keys_are_the_same_or_not() -> None:
    one, other = KeyTable.build([(bytes(32), 0, msgspec.Raw(b"\x90"))]), KeyTable.build([(bytes(32), 1, msgspec.Raw(b"\x90"))])
    assert one == KeyTable.of({bytes(32): msgspec.Raw(b"\x90")})
    assert one != other, "of the same keys one ends"
    assert one == {bytes(32): msgspec.Raw(b"\x90")}
    assert one != {}
    assert KeyTable() == {}


def test_the_secrets_of_a_key_share_what_is_said_of_it() -> None:
    raw = encode_principal(Principal("key_1", "a name that is long " * 50))
    one, two = (KeyTable.build((bytes([n]) * 32, 0, raw) for n in range(many)) for many in (1, 2))
    assert two.sizes == (2, one.sizes[1])


def test_users_are_found_by_their_names() -> None:
    users = decode_snapshot(ENCODED).users
    assert isinstance(users, AllowanceTable)
    assert sorted(users) == sorted(NAMES)
    assert (len(users), users["Ärger"]) == (3, file().users["Ärger"])
    assert users == file().users
    assert users.get("eve") is None


@settings(deadline=None)
@given(st.sets(st.binary(min_size=32, max_size=32)), st.binary(min_size=32, max_size=32))
def test_a_look_up_finds_what_is_there_and_nothing_else(there: set[bytes], other: bytes) -> None:
    table = KeyTable.build((digest, 0, msgspec.Raw(msgspec.msgpack.encode(digest))) for digest in there)
    assert all(bytes(table[digest]) == msgspec.msgpack.encode(digest) for digest in there)
    assert (other in table) == (other in there)


def test_a_table_in_a_file_can_be_changed_too(tmp_path: Path) -> None:
    write_snapshot(tmp_path / "snapshot", file())
    keys = read_snapshot(tmp_path / "snapshot").keys
    assert isinstance(keys, KeyTable)
    changed = keys.changed([DIGESTS[0]], [(bytes([9]) * 32, 7, b"new")])
    assert changed.look_up(bytes([9]) * 32) == (7, b"new")
    assert DIGESTS[0] not in changed
    assert [changed[digest] for digest in DIGESTS[1:]] == [keys[digest] for digest in DIGESTS[1:]]


# --- versions, damage --------------------------------------------------------------------------------------------------


def version_1(**changes: object) -> bytes:
    plain = msgspec.structs.replace(file(), version=1, keys=dict(file().keys), users=dict(file().users))
    return msgspec.msgpack.encode(msgspec.structs.replace(plain, **changes))


def test_the_version_before_is_read() -> None:
    read = decode_snapshot(version_1())
    assert (read.version, read.keys, read.users) == (1, dict(file().keys), file().users)
    assert Snapshot(read).principal(DIGESTS[0]) == Principal("key_0", "name 0")


@pytest.mark.parametrize("version", [0, SNAPSHOT_VERSION, SNAPSHOT_VERSION + 1, 99])
def test_other_versions_of_the_old_form_are_refused(version: int) -> None:
    with pytest.raises(SnapshotError, match=f"snapshot version {version}"):
        decode_snapshot(version_1(version=version))


@pytest.mark.parametrize("version", [0, 1, SNAPSHOT_VERSION + 1, 2**32 - 1])
def test_other_versions_of_the_new_form_are_refused(version: int) -> None:
    with pytest.raises(SnapshotError, match=f"snapshot version {version}"):
        decode_snapshot(ENCODED[:8] + version.to_bytes(4, "little") + ENCODED[12:])


def test_fields_of_a_later_release_are_passed_over() -> None:
    catalogue = msgspec.structs.replace(file(), published_unix_ns=0, keys={}, users={})
    later = [*msgspec.msgpack.decode(msgspec.msgpack.encode(catalogue)), "more", {"and": "more"}]
    written = assemble(msgspec.msgpack.encode(later), 5, KeyTable.of(file().keys), AllowanceTable.of(file().users))
    assert decode_snapshot(written) == file()


@settings(deadline=None)
@given(st.binary(max_size=100))
def test_anything_else_is_refused(data: bytes) -> None:
    try:
        decode_snapshot(data)
    except SnapshotError:
        return
    assert msgspec.msgpack.decode(data)[0] == 1


def test_a_file_that_was_cut_off_is_refused() -> None:
    for size in range(len(ENCODED)):
        with pytest.raises(SnapshotError):
            decode_snapshot(ENCODED[:size])


def test_a_file_that_goes_on_is_refused() -> None:
    with pytest.raises(SnapshotError, match="another length"):
        decode_snapshot(ENCODED + b"\x00")


def read_everything(data: bytes) -> list[object]:
    """All that a worker may find in a snapshot."""
    snapshot = Snapshot(decode_snapshot(data))
    found: list[object] = [snapshot.find(digest) for digest in DIGESTS]
    found += [snapshot.users.get(name) for name in NAMES]
    return [*found, snapshot.models, snapshot.backends, snapshot.currency, snapshot.revision]


DATE = range(16, 24)


def test_damage_is_found_or_hides_something_but_makes_nothing_up() -> None:
    """Of each byte but the date's one bit. What isn't found any more is refused, as what was never known is."""
    right = read_everything(ENCODED)
    refused = 0
    for at in set(range(len(ENCODED))) - set(DATE):
        damaged = bytearray(ENCODED)
        damaged[at] ^= 1 << at % 8
        try:
            found = read_everything(bytes(damaged))
        except SnapshotError:
            refused += 1
        else:
            assert all(each == it or each is None for each, it in zip(found, right, strict=True)), at
    assert refused > len(ENCODED) // 2


def test_places_out_of_bounds_are_no_way_out() -> None:
    """Random bytes where the tables were."""
    dice = random.Random(5)
    tables = len(KeyTable.of(file().keys).encoded()) + len(AllowanceTable.of(file().users).encoded())
    for _ in range(300):
        damaged = decode_snapshot(ENCODED[:-tables] + dice.randbytes(tables))
        assert isinstance(damaged.keys, KeyTable)
        with pytest.raises(SnapshotError):
            list(damaged.keys.secrets())
        with pytest.raises(SnapshotError):
            list(damaged.users)


# --- the date ----------------------------------------------------------------------------------------------------------


def test_where_only_the_date_changed_only_the_date_is_written(tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    first, later = file(published_unix_ns=5), file(published_unix_ns=6)
    write_snapshot(path, first)
    inode = path.stat().st_ino
    write_snapshot(path, later, before=first)
    assert (read_snapshot(path), path.stat().st_ino) == (later, inode)


def test_anything_else_that_changed_is_written(tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    write_snapshot(path, file(1))
    write_snapshot(path, file(2), before=file(1))
    assert read_snapshot(path) == file(2)


@pytest.mark.parametrize("there", [None, version_1(), b"", b"damaged"])
def test_a_file_that_is_gone_or_no_longer_what_it_was_is_written_whole(tmp_path: Path, there: bytes | None) -> None:
    path = tmp_path / "snapshot"
    if there is not None:
        path.write_bytes(there)
    write_snapshot(path, file(published_unix_ns=6), before=file(published_unix_ns=5))
    assert read_snapshot(path) == file(published_unix_ns=6)


# --- the feed ----------------------------------------------------------------------------------------------------------


def test_a_feed_without_a_file_has_nothing(tmp_path: Path) -> None:
    feed = SnapshotFeed(tmp_path / "snapshot")
    assert (feed.poll(), feed.current) == (False, None)


def test_a_feed_follows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    feed = SnapshotFeed(path)
    for revision in range(1, 20):
        before = feed.current
        write_snapshot(path, file(revision))
        assert feed.poll()
        current = feed.current
        assert current is not None
        assert current.revision == revision
        assert current.principal(DIGESTS[0]) == Principal("key_0", "name 0")
        assert not feed.poll()
        assert feed.current is current
        assert before is None or before.principal(DIGESTS[0]) is None, "the one before has let go of its file"


def test_what_was_learned_from_a_snapshot_stays_when_only_its_date_changes(tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    write_snapshot(path, file(published_unix_ns=5))
    feed = SnapshotFeed(path)
    assert feed.poll()
    current = feed.current
    assert current is not None
    learned = current.principal(DIGESTS[0])
    for date in (6, 7, 2**62):
        write_snapshot(path, file(published_unix_ns=date), before=file(published_unix_ns=date - 1))
        assert not feed.poll()
        assert feed.current is current
        assert current.published_unix_ns == date
    assert current.principal(DIGESTS[0]) is learned


def test_a_snapshot_of_the_version_before_is_followed_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    replace(path, version_1())
    feed = SnapshotFeed(path)
    assert feed.poll()
    assert not feed.poll()
    assert feed.current is not None
    assert feed.current.published_unix_ns == 5
    assert feed.current.principal(DIGESTS[0]) is not None
    write_snapshot(path, file(2))
    assert feed.poll()
    assert feed.current.revision == 2


@pytest.mark.parametrize("damage", [b"", b"garbage", ENCODED[:-1], ENCODED[:40]])
def test_the_last_good_snapshot_stays(tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "snapshot"
    write_snapshot(path, file())
    feed = SnapshotFeed(path)
    assert feed.poll()
    replace(path, damage)
    assert not feed.poll()
    assert not feed.poll()
    assert feed.current is not None
    assert (feed.current.revision, feed.current.principal(DIGESTS[0])) == (1, Principal("key_0", "name 0"))
    assert len(caplog.records) == 1, "it is said once"
    assert "the last good one stays" in caplog.text
    path.unlink()
    assert not feed.poll()
    assert feed.current.revision == 1
    write_snapshot(path, file(2))
    assert feed.poll()
    assert feed.current.revision == 2


def test_a_file_that_was_replaced_is_given_back(tmp_path: Path) -> None:
    """Whoever still holds an old snapshot, a stream or an idle connection, doesn't hold its file."""
    path = tmp_path / "snapshot"
    write_snapshot(path, file())
    feed = SnapshotFeed(path)
    assert feed.poll()
    held = [feed.current]
    for revision in range(2, 30):
        write_snapshot(path, file(revision))
        assert feed.poll()
        held.append(feed.current)
    deleted = 30
    while deleted:  # threads close them
        deleted = sum(f"{path} (deleted)" in line for line in Path("/proc/self/maps").read_text().splitlines())
        os.sched_yield()
    assert len(held) == 29
