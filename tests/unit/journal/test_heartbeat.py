"""The small live file of a worker."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import msgspec
import pytest

from proxy.journal import BackendBeat, Heartbeat, HeartbeatFile, read_heartbeats, remove_heartbeat
from tests.support.disk import small_disk


def beat(incarnation: str = "a", **facts: object) -> Heartbeat:
    made = Heartbeat(incarnation, in_flight=3, in_flight_by_backend={"gpu-0": 3}, connections=5, unrecorded=2)
    for name, value in facts.items():
        setattr(made, name, value)
    return made


def test_the_latest_word_is_read(tmp_path: Path) -> None:
    file = HeartbeatFile(tmp_path, "a")
    assert read_heartbeats(tmp_path) == [], "it has said nothing yet"
    file.write(beat(unix_ns=1, unaccepted={"invalid_api_key": 1}))
    file.write(beat(unix_ns=2))
    assert read_heartbeats(tmp_path) == [beat(unix_ns=2)]
    file.close()


def test_the_last_word_of_a_worker_that_has_gone_stays_until_it_is_removed(tmp_path: Path) -> None:
    file = HeartbeatFile(tmp_path, "a")
    file.write(beat())
    file.close()
    gone = beat(alive=False, in_flight=0, in_flight_by_backend={}, connections=0)
    assert read_heartbeats(tmp_path) == [gone]
    assert read_heartbeats(tmp_path) == [gone], "looking changes nothing"
    remove_heartbeat(tmp_path, "a")
    assert read_heartbeats(tmp_path) == []
    remove_heartbeat(tmp_path, "a")


def test_of_a_worker_that_has_gone_backends_have_nothing_in_flight_and_its_totals_stay(tmp_path: Path) -> None:
    file = HeartbeatFile(tmp_path, "a")
    backend = BackendBeat("out", "upstream_unreachable", 3, 900, 400, 0.5, ejections=2, probes=7, failed_probes=6)
    file.write(beat(waiting=4, backends={"gpu-0": backend}, retries_denied=1))
    assert read_heartbeats(tmp_path) == [beat(waiting=4, backends={"gpu-0": backend}, retries_denied=1)]
    file.close()
    [gone] = read_heartbeats(tmp_path)
    assert (gone.waiting, gone.retries_denied) == (0, 1)
    told = BackendBeat("out", "upstream_unreachable", part=0.5, ejections=2, probes=7, failed_probes=6)
    assert gone.backends == {"gpu-0": told}


def test_looking_does_not_make_a_worker_seem_dead_to_another_who_looks(tmp_path: Path) -> None:
    living, dead = HeartbeatFile(tmp_path, "a"), HeartbeatFile(tmp_path, "b")
    living.write(beat("a"))
    dead.write(beat("b"))
    dead.close()
    assert [(each.incarnation, each.alive) for each in read_heartbeats(tmp_path)] == [("a", True), ("b", False)]
    living.close()


@pytest.mark.parametrize("data", [b"", b"\x05", b"\xff" * 64, bytes(64), b"\x01\0\0\0\0\0\0\0\xc1"])
def test_what_is_not_a_heartbeat_is_passed_over(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "b.heartbeat").write_bytes(data)
    file = HeartbeatFile(tmp_path, "a")
    file.write(beat("a"))
    assert [each.incarnation for each in read_heartbeats(tmp_path)] == ["a"]
    file.close()


@pytest.mark.parametrize("written", [1, 2, 3])
def test_of_a_write_that_is_under_way_nothing_is_believed(tmp_path: Path, written: int) -> None:
    """Not even when its writer has no CPU for as long as one cares to look: what it said before still holds."""
    file = HeartbeatFile(tmp_path, "a")
    for unix_ns in range(1, written + 1):
        file.write(beat(unix_ns=unix_ns))
    assert file._map is not None
    at = bytes(file._map).index(msgspec.msgpack.encode(beat(unix_ns=written)))
    file._map[at + 3] ^= 1
    assert [each.unix_ns for each in read_heartbeats(tmp_path)] == ([written - 1] if written > 1 else [])
    file.write(beat(unix_ns=9))
    assert [each.unix_ns for each in read_heartbeats(tmp_path)] == [9]
    file.close()


def test_what_the_first_format_said_is_read(tmp_path: Path) -> None:
    payload = msgspec.msgpack.encode(beat(unix_ns=7, alive=True))
    data = struct.pack("<II", len(payload), zlib.crc32(payload)) + payload
    (tmp_path / "a.heartbeat").write_bytes(data.ljust(16 * 1024, b"\0"))
    assert [each.unix_ns for each in read_heartbeats(tmp_path)] == [7]


def test_backends_give_way_when_there_are_too_many_to_tell(tmp_path: Path) -> None:
    file = HeartbeatFile(tmp_path, "a")
    names = [f"backend-{number}" for number in range(5000)]
    file.write(beat(in_flight_by_backend=dict.fromkeys(names, 1)))
    assert read_heartbeats(tmp_path) == [beat(in_flight_by_backend={})]
    file.write(beat(backends={name: BackendBeat() for name in names}, waiting=3))
    assert read_heartbeats(tmp_path) == [beat(in_flight_by_backend={}, waiting=3)]
    file.close()


def test_nothing_there_is_nobody(tmp_path: Path) -> None:
    assert read_heartbeats(tmp_path / "missing") == []


# failure 66
def test_on_a_full_disk_nobody_is_killed_and_it_speaks_as_soon_as_it_can(tmp_path: Path) -> None:
    """In a process of its own: what is to be shown is that it survives."""
    script = """
import sys
from pathlib import Path
from proxy.journal import Heartbeat, HeartbeatFile
file = HeartbeatFile(Path(sys.argv[1]), "a")
for line in sys.stdin:
    file.write(Heartbeat("a", unix_ns=int(line)))
    print(flush=True)
"""
    command = [sys.executable, "-c", script]
    with small_disk(tmp_path / "disk", 1024 * 1024) as disk:
        disk.fill()
        with subprocess.Popen([*command, disk.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None

            def write(unix_ns: int) -> None:
                print(unix_ns, file=process.stdin, flush=True)
                assert process.stdout is not None
                assert process.stdout.readline() == "\n", "it was killed"

            write(1)
            assert [path.name for path in disk.path.iterdir()] == ["ballast"]
            disk.make_room()
            write(2)
            disk.fill()
            write(3)
            [said] = read_heartbeats(disk.path)
            assert (said.unix_ns, said.alive) == (3, True)
            process.stdin.close()
            assert process.wait() == 0
        assert not read_heartbeats(disk.path)[0].alive


def test_a_heartbeat_that_can_not_be_made_for_another_reason_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        HeartbeatFile(tmp_path / "missing", "a")
