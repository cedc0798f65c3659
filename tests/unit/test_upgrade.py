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
from proxy.snapshot import Backend, Model, Principal, Snapshot, SnapshotFile
from proxy.snapshot.model import decode_snapshot, encode_principal
from tests.unit.journal.made import read_all

FIXTURES = Path(__file__).parents[1] / "fixtures"
CLOSING = (FIXTURES / "records" / "closing-1.msgpack").read_bytes()
SNAPSHOT = (FIXTURES / "snapshots" / "snapshot-1.msgpack").read_bytes()
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
    """Its principals as the first writer encoded them: they are decoded one by one, when they are needed."""
    return SnapshotFile(
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


def checkpoint() -> Checkpoint:
    return Checkpoint({"a-1.seg": 5}, {"b-1.seg"}, {"a": {b"id": CLOSING}}, {"c-1.seg"})


def test_a_snapshot_of_the_version_before_is_read() -> None:
    read = decode_snapshot(SNAPSHOT)
    assert read == snapshot()
    principals = [Snapshot(read).principal(digest) for digest in (bytes(range(32)), bytes(range(32, 64)), bytes(32))]
    assert principals == [Principal("key_1", "alice"), Principal("key_2", "bob"), None]


def test_a_snapshot_s_fields_are_only_ever_appended() -> None:
    assert is_extension(msgspec.msgpack.decode(msgspec.msgpack.encode(snapshot())), msgspec.msgpack.decode(SNAPSHOT))


def test_a_record_s_fields_are_only_ever_appended() -> None:
    assert is_extension(msgspec.msgpack.decode(msgspec.msgpack.encode(record())), msgspec.msgpack.decode(CLOSING[17:]))


@pytest.mark.parametrize("value", [record(), snapshot(), checkpoint()], ids=lambda value: type(value).__name__)
def test_what_a_newer_writer_adds_is_passed_over(value: msgspec.Struct) -> None:
    ours = msgspec.msgpack.encode(value)
    theirs = msgspec.msgpack.encode(extended(msgspec.msgpack.decode(ours)))
    assert len(theirs) > len(ours)
    assert msgspec.msgpack.decode(theirs, type=type(value)) == value


def test_a_newer_writer_s_principal_is_read() -> None:
    file = snapshot()
    theirs = extended(msgspec.msgpack.decode(encode_principal(Principal("key_1", "alice"))))
    file.keys = {bytes(32): msgspec.Raw(msgspec.msgpack.encode(theirs))}
    assert Snapshot(decode_snapshot(msgspec.msgpack.encode(file))).principal(bytes(32)) == Principal("key_1", "alice")


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
