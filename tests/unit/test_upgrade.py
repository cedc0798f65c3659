"""What one version wrote and the next one reads, and the other way round: records, snapshots, checkpoints.

Fields are appended and have defaults. So an older writer's bytes are read with the defaults of what it didn't know, and a newer
writer's further fields are passed over: during an upgrade both are on one host.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from proxy.exchange import Record, decode_record, peek_record
from proxy.journal import Checkpoint
from proxy.snapshot import (
    NEVER_NS,
    Allowance,
    Backend,
    Bounds,
    Budget,
    Issuer,
    KeyTable,
    LaterPrice,
    Model,
    Principal,
    Snapshot,
    SnapshotFile,
    decode_snapshot,
    encode_principal,
    encode_snapshot,
)
from tests.unit.journal.made import read_all

FIXTURES = Path(__file__).parents[1] / "fixtures"
CLOSING = (FIXTURES / "records" / "closing-1.msgpack").read_bytes()
SNAPSHOT_1 = (FIXTURES / "snapshots" / "snapshot-1.msgpack").read_bytes()
SNAPSHOT_2 = (FIXTURES / "snapshots" / "snapshot-2").read_bytes()
LEFT_BEHIND = FIXTURES / "state-1"


def extended(value: Any) -> Any:
    """The same from a writer that has more fields, wherever there are fields."""
    if isinstance(value, list):
        more = [extended(each) for each in value]
        return [*more, {"new": [1]}, "more"] if is_struct(value) else more
    if isinstance(value, dict):
        return {key: extended(each) for key, each in value.items()}
    return value


def is_struct(value: list[Any]) -> bool:
    """Of the lists in our formats only structs hold values of several types."""
    return len({type(each) for each in value}) > 1


def is_extension(new: Any, old: Any) -> bool:
    """`new` holds all that `old` does, in the same places."""
    if isinstance(old, list):
        return isinstance(new, list) and len(new) >= len(old) and all(map(is_extension, new, old))
    if isinstance(old, dict):
        return isinstance(new, dict) and new.keys() == old.keys() and all(is_extension(new[key], old[key]) for key in old)
    return bool(new == old)


def record() -> Record:
    return decode_record(CLOSING)


def snapshot() -> SnapshotFile:
    """As version 1 has it, from a release that knew neither teams nor limits; principals are decoded one by one, when they are
    needed."""
    return SnapshotFile(
        version=1,
        revision=7,
        published_unix_ns=1_791_000_000_000_000_000,
        currency="EUR",
        keys={
            bytes(range(32)): msgspec.Raw(msgspec.msgpack.encode(["key_1", "alice"])),
            bytes(range(32, 64)): msgspec.Raw(msgspec.msgpack.encode(["key_2", "bob"])),
        },
        models={
            "m": Model("m", ("gpu-0", "gpu-1"), 100_000, 20_000, 400_000, b'{"id":"m","object":"model","max_model_len":4096}')
        },
        backends={
            "gpu-0": Backend("gpu-0", "10.0.0.1", 8001, "vllm", "/base", "ENGINE_KEY"),
            "gpu-1": Backend("gpu-1", "10.0.0.2", 8002, "openai"),
        },
    )


ALICE = Principal("key_1", "alice", "research", Allowance(1, 2, 3, 4, 5, 6, ("m*",), ("chat",), 7), "alice@example.com", "atlas")
BOB = Principal("key_2", "bob")


def snapshot_2() -> SnapshotFile:
    """Every field of everything."""
    budget = Budget("money", 5_000_000_000, "month", "Europe/Vienna", True)
    limited = Allowance(1, 2, 3, 4, 5, 6, ("m*",), ("chat",), 1_900_000_000_000_000_000, (budget,), True)
    backend = Backend("gpu-0", "10.0.0.1", 8001, "vllm", "/base", "ENGINE_KEY", True, "/etc/ca.pem")
    later = LaterPrice(1_800_000_000_000_000_000, 1, 2, 3)
    bounds = Bounds(1, 2, 3, 4, 5, 6)
    model = Model("m", ("gpu-0",), 100_000, 20_000, 400_000, b'{"id":"m"}', bounds, 4096, 512, (later,), (("top_p", b"0.9"),))
    claims = (("a", "b"), ("t",), ("p",), ("m",), ("r",))
    issuer = Issuer("https://id", ("us",), ("ES256",), b'{"keys":[]}', *claims, {"x": "admin"}, 9.0)
    secrets = [
        (bytes(range(32)), 1_850_000_000_000_000_000, encode_principal(ALICE)),
        (bytes(range(32, 64)), 0, encode_principal(ALICE)),
        (bytes(range(64, 96)), 0, encode_principal(BOB)),
    ]
    return SnapshotFile(
        revision=7,
        published_unix_ns=1_791_000_000_000_000_000,
        currency="EUR",
        keys=KeyTable.build(secrets),
        models={"m": model, "alias": model},
        backends={"gpu-0": backend},
        everyone=limited,
        teams={"research": limited},
        users={"alice@example.com": limited, "bob@example.com": Allowance()},
        projects={"atlas": limited},
        issuers=(issuer,),
    )


def checkpoint() -> Checkpoint:
    return Checkpoint({"a-1.seg": 5}, {"b-1.seg"}, {"a": {b"id": CLOSING}}, {"c-1.seg"})


def test_a_snapshot_of_the_version_before_is_read() -> None:
    read = decode_snapshot(SNAPSHOT_1)
    assert read == snapshot()
    principals = [Snapshot(read).principal(digest) for digest in (bytes(range(32)), bytes(range(32, 64)), bytes(32))]
    assert principals == [Principal("key_1", "alice"), Principal("key_2", "bob"), None]


def test_a_snapshot_of_this_version_is_read_by_all_later_releases_of_it() -> None:
    read, ours = decode_snapshot(SNAPSHOT_2), snapshot_2()
    assert msgspec.structs.replace(read, keys=ours.keys) == ours  # principals lie there encoded, with the fields of their time
    known = Snapshot(read)
    found = [known.find(bytes(range(at, at + 32))) for at in (0, 32, 64)]
    assert found == [(ALICE, 1_850_000_000_000_000_000), (ALICE, NEVER_NS), (BOB, NEVER_NS)]
    assert known.levels(ALICE)[1] == ("user", "alice@example.com", known.everyone)


def test_a_snapshot_s_fields_are_only_ever_appended() -> None:
    ours = msgspec.msgpack.decode(msgspec.msgpack.encode(snapshot()))
    assert is_extension(ours, msgspec.msgpack.decode(SNAPSHOT_1))


def test_a_record_s_fields_are_only_ever_appended() -> None:
    assert is_extension(msgspec.msgpack.decode(msgspec.msgpack.encode(record())), msgspec.msgpack.decode(CLOSING[17:]))


@pytest.mark.parametrize("value", [record(), snapshot(), checkpoint()], ids=lambda value: type(value).__name__)
def test_what_a_newer_writer_adds_is_passed_over(value: msgspec.Struct) -> None:
    ours = msgspec.msgpack.encode(value)
    theirs = msgspec.msgpack.encode(extended(msgspec.msgpack.decode(ours)))
    assert len(theirs) > len(ours)
    assert msgspec.msgpack.decode(theirs, type=type(value)) == value


def test_a_newer_writer_s_principal_is_read() -> None:
    theirs = extended(msgspec.msgpack.decode(encode_principal(ALICE)))
    file = SnapshotFile(keys={bytes(32): msgspec.Raw(msgspec.msgpack.encode(theirs))})
    assert Snapshot(decode_snapshot(encode_snapshot(file))).principal(bytes(32)) == ALICE


def test_a_newer_writer_s_record_is_read_from_the_journal() -> None:
    payload = CLOSING[:17] + msgspec.msgpack.encode(extended(msgspec.msgpack.decode(msgspec.msgpack.encode(record()))))
    assert peek_record(payload) == peek_record(CLOSING)
    assert decode_record(payload) == record()


def test_a_journal_of_the_version_before_is_read() -> None:
    records, batch = read_all(LEFT_BEHIND / "journal")
    assert batch.corrupt == []
    assert [each.client_request_id for each in records] == [
        *("stored-plain", "stored-stream", "stored-rejected", "untraced-plain", "untraced-stream"),
        *("unread-plain", "unread-stream", "unread-failed", "open-stream", "open-plain"),
    ]
