"""Appending: what returned is kept, what can't be kept is said and counted."""

from __future__ import annotations

import fcntl
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proxy.journal import Journal, JournalFull, Tail
from proxy.journal.segment import HEADER_BYTES, MAX_FRAME_BYTES, parse
from proxy.journal.writer import RESERVE_SHARE, SPARE_SEGMENTS
from tests.support.disk import Disk, small_disk
from tests.unit.journal.made import SEGMENT_BYTES, kill

PATIENCE = 10.0


def wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.002)


def append_patiently(journal: Journal, payload: bytes) -> None:
    """As a worker would, were it in no hurry: wait for the segment that is being prepared."""
    while True:
        try:
            return journal.append(payload)
        except JournalFull:
            wait(lambda: journal._next is not None)


def contents(path: Path) -> tuple[list[bytes], bool]:
    payloads, _, ended = parse(path.read_bytes()[HEADER_BYTES:])
    return payloads, ended


def segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.seg"))


def test_what_was_appended_is_in_the_file_at_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SEGMENT_BYTES)
    journal.append(b"one")
    journal.append(b"two")
    (path,) = segments(tmp_path)
    assert contents(path) == ([b"one", b"two"], False)
    assert journal.position == (1, HEADER_BYTES + 2 * (8 + 3))
    journal.close()


def test_a_killed_writer_loses_nothing(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from proxy.journal import Journal\n"
        f"journal = Journal(Path(sys.argv[1]), {SEGMENT_BYTES})\n"
        "[journal.append(b'%d' % number) for number in range(500)]\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert ended.returncode == -9
    (path,) = segments(tmp_path)
    assert contents(path) == ([b"%d" % number for number in range(500)], False)


def test_a_clean_end_is_marked_and_the_file_is_cut(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SEGMENT_BYTES)
    journal.append(b"one")
    wait(lambda: journal._next is not None)
    journal.close()
    (path,) = segments(tmp_path)
    assert contents(path) == ([b"one"], True)
    assert path.stat().st_size == HEADER_BYTES + 8 + 3 + 8
    assert not list(tmp_path.glob("*.next"))


def test_a_full_segment_gives_way_to_the_next(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SEGMENT_BYTES)
    written = [b"%06d" % number * 100 for number in range(400)]
    for payload in written:
        append_patiently(journal, payload)
    journal.close()
    read = [contents(path) for path in segments(tmp_path)]
    assert [payload for payloads, _ in read for payload in payloads] == written
    assert len(read) == 5
    assert all(ended for _, ended in read)
    assert all(path.stat().st_size <= SEGMENT_BYTES for path in segments(tmp_path))


def test_a_finished_segment_is_cut_and_let_go(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SEGMENT_BYTES)
    append_patiently(journal, b"x" * 40_000)
    append_patiently(journal, b"y" * 40_000)
    first, _ = Tail(tmp_path).segments()
    wait(lambda: Tail(tmp_path).is_dead(first))
    assert Tail(tmp_path).path(first).stat().st_size == HEADER_BYTES + 8 + 40_000 + 8
    journal.close()


def test_the_current_segment_is_locked_while_its_writer_lives(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SEGMENT_BYTES)
    (path,) = segments(tmp_path)
    with path.open("rb") as stream:
        with pytest.raises(BlockingIOError):
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        kill(journal)
        fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", SEGMENT_BYTES)
    assert (tmp_path / "journal").stat().st_mode & 0o777 == 0o700
    assert segments(tmp_path / "journal")[0].stat().st_mode & 0o777 == 0o600
    journal.close()


@pytest.mark.parametrize("payload", [b"", b"x" * SEGMENT_BYTES, b"x" * (SEGMENT_BYTES - HEADER_BYTES - 15)])
def test_what_no_segment_can_hold_is_refused_and_counted_and_harms_nothing(tmp_path: Path, payload: bytes) -> None:
    journal = Journal(tmp_path, SEGMENT_BYTES)
    journal.append(b"before")
    with pytest.raises(JournalFull):
        journal.append(payload)
    assert journal.unrecorded == 1
    journal.append(b"after")
    journal.close()
    assert contents(segments(tmp_path)[0]) == ([b"before", b"after"], True)


def test_the_largest_record_fits(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SEGMENT_BYTES)
    largest = b"x" * (SEGMENT_BYTES - HEADER_BYTES - 16)
    journal.append(largest)
    journal.close()
    assert contents(segments(tmp_path)[0]) == ([largest], True)


def test_a_frame_that_readers_would_not_read_is_not_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 2 * MAX_FRAME_BYTES)
    with pytest.raises(JournalFull):
        journal.append(bytes(MAX_FRAME_BYTES + 1))
    journal.append(b"after")
    journal.close()
    assert contents(segments(tmp_path)[0])[0] == [b"after"]


def test_a_lost_directory_is_a_full_journal(tmp_path: Path) -> None:
    directory = tmp_path / "journal"
    journal = Journal(directory, SEGMENT_BYTES)
    wait(lambda: journal._next is not None)
    for path in directory.iterdir():
        path.unlink()
    journal.append(b"x" * 40_000)
    with pytest.raises(JournalFull):
        journal.append(b"x" * 40_000)
    assert journal.unrecorded == 1
    kill(journal)


# -- failure 66 --


def test_a_full_disk_is_known_before_it_matters_and_counted_when_it_does(tmp_path: Path) -> None:
    """RLIMIT_FSIZE refuses the next segment as a full disk would; lifting it is somebody making room."""
    script = """
import resource, sys, threading
from pathlib import Path
from proxy.journal import Journal, JournalFull

size = 64 * 1024
journal = Journal(Path(sys.argv[1]), size)
while journal._next is None:
    threading.Event().wait(0.002)
resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))
kept = refused = 0
warned_at = None
for number in range(300):
    if journal.full and warned_at is None:
        warned_at = refused
    try:
        journal.append(b"%06d" % number * 100)
        kept += 1
    except JournalFull:
        refused += 1
assert warned_at == 0, "full before the first record was refused"
assert kept == 188 and refused == journal.unrecorded == 112, (kept, refused)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
while journal._next is None:
    threading.Event().wait(0.002)
journal.append(b"again")
assert not journal.full
journal.close()
"""
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    payloads = [payload for path in segments(tmp_path) for payload in contents(path)[0]]
    assert payloads == [*(b"%06d" % number * 100 for number in range(188)), b"again"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with small_disk(tmp_path / "disk", 8 * 1024 * 1024) as made:
        yield made


def until_full(journal: Journal, payload: bytes) -> int:
    """Offer it until it is refused; → how often it was kept."""
    return next(kept for kept in itertools.count() if not journal.offer(payload))


def test_on_a_full_disk_what_has_begun_may_still_end(disk: Disk) -> None:
    journal = Journal(disk.path / "journal", SEGMENT_BYTES)
    wait(lambda: journal._next is not None)
    disk.fill()
    opened = until_full(journal, b"o" * 300)
    assert opened > 150, "two segments of them"
    assert journal.unrecorded == 0, "an opening that isn't kept is no loss yet"
    for _ in range(3):
        with pytest.raises(JournalFull):
            journal.append(b"of a request that has no opening" * 10)
    assert journal.unrecorded == 3
    room = SEGMENT_BYTES // RESERVE_SHARE // (8 + 600)
    for _ in range(room):
        journal.append(b"c" * 600, owed=True)
    with pytest.raises(JournalFull):
        journal.append(b"c" * 600, owed=True)
    assert journal.unrecorded == 4
    journal.close()
    written = [payload[:1] for path in segments(disk.path / "journal") for payload in contents(path)[0]]
    assert written.count(b"o") == opened
    assert written.count(b"c") == room


def test_the_reserve_is_there_again_in_the_next_segment(disk: Disk) -> None:
    journal = Journal(disk.path / "journal", SEGMENT_BYTES)
    wait(lambda: journal._next is not None)
    disk.fill()
    until_full(journal, b"o" * 300)
    journal.append(b"c" * 600, owed=True)
    disk.make_room()
    wait(lambda: not journal.full)
    sequence, _ = journal.position
    journal.append(b"c" * 600, owed=True)
    assert journal.position[0] == sequence + 1, "the reserve is for want of anything better"
    assert journal.offer(b"o" * 300)
    journal.close()


def test_the_last_of_a_disk_is_left_to_others(disk: Disk) -> None:
    disk.fill(leave=(1 + SPARE_SEGMENTS) * SEGMENT_BYTES + 16 * 1024)
    journal = Journal(disk.path / "journal", SEGMENT_BYTES)
    before = disk.free
    until_full(journal, b"o" * 300)
    threading.Event().wait(1.5)  # it has tried again meanwhile
    assert disk.free == before
    assert before > SPARE_SEGMENTS * SEGMENT_BYTES, "room for what makes the journal shorter"
    journal.close()


def test_a_journal_can_begin_on_a_full_disk(disk: Disk) -> None:
    disk.fill()
    journal = Journal(disk.path / "journal", SEGMENT_BYTES)
    assert journal.full
    assert journal.position == (0, 0)
    assert not journal.offer(b"opening")
    with pytest.raises(JournalFull):
        journal.append(b"closing", owed=True)
    assert journal.unrecorded == 1
    disk.make_room()
    wait(lambda: not journal.full)
    journal.append(b"again")
    journal.close()
    assert contents(segments(disk.path / "journal")[0]) == ([b"again"], True)


def test_a_journal_that_never_got_room_ends_well(disk: Disk) -> None:
    disk.fill()
    Journal(disk.path / "journal", SEGMENT_BYTES).close()
    assert list((disk.path / "journal").iterdir()) == []


def test_a_directory_that_can_not_be_written_to_is_no_full_disk(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text("a file")
    with pytest.raises(FileExistsError):
        Journal(tmp_path / "journal", SEGMENT_BYTES)


def test_appending_makes_no_system_call_that_waits(tmp_path: Path) -> None:
    """The mapping is written; the file descriptor isn't: closing it under the writer changes nothing."""
    journal = Journal(tmp_path, SEGMENT_BYTES)
    wait(lambda: journal._next is not None)
    assert journal._current is not None
    held = os.dup(journal._current.fd)
    os.close(journal._current.fd)
    journal.append(b"still")
    os.dup2(held, journal._current.fd)
    os.close(held)
    journal.close()
    assert contents(segments(tmp_path)[0])[0] == [b"still"]
