"""One sink after the journal."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from collectors.records.follow import FIRST_DELAY, IDLE_SECONDS, LONGEST_DELAY, Follower
from proxy.journal import Batch, Checkpoint, Journal, Tail
from tests.unit.collectors.made import identity, make_record
from tests.unit.journal.made import SEGMENT_BYTES, closing, dead_segment, kill, opening

FOREVER = float("inf")


class Kept:
    """A sink that keeps all in memory and fails when it is told to."""

    name = "kept"
    failures: tuple[type[Exception], ...] = (OSError,)

    def __init__(self) -> None:
        self.up = True
        self.ids: list[bytes] = []
        self.writes = 0
        self.tended = 0
        self.closed: list[float] = []
        self.fails: Exception | None = None
        self.tending_fails: Exception | None = None
        self.kept = Checkpoint()
        self.wrote = threading.Event()
        self.asked = threading.Event()
        self.answers = threading.Event()
        """Cleared: it hangs."""
        self.answers.set()

    @property
    def stored(self) -> Checkpoint | None:
        return self.kept

    def load(self) -> Checkpoint:
        if self.fails is not None:
            raise self.fails
        return self.kept

    def write(self, batch: Batch) -> None:
        self.asked.set()
        self.answers.wait()
        if self.fails is not None:
            raise self.fails
        self.writes += 1
        self.ids += [record.id for record in batch.records]
        self.kept = batch.checkpoint
        self.wrote.set()

    def tend(self) -> None:
        self.tended += 1
        if self.tending_fails is not None:
            raise self.tending_fails

    def close(self, seconds: float) -> None:
        self.closed.append(seconds)


@pytest.fixture
def sink() -> Kept:
    return Kept()


@pytest.fixture
def follower(tmp_path: Path, sink: Kept) -> Follower:
    return Follower(Tail(tmp_path), sink)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    made = Journal(tmp_path, SEGMENT_BYTES)
    yield made
    made.close()


def test_what_ends_is_handed_on_once(follower: Follower, sink: Kept, journal: Journal) -> None:
    journal.append(closing(make_record(1)))
    assert follower.turn() == IDLE_SECONDS
    journal.append(closing(make_record(2)))
    assert follower.turn() == IDLE_SECONDS
    assert follower.turn() == IDLE_SECONDS
    assert sink.ids == [identity(1), identity(2)]
    assert sink.writes == 2
    assert sink.tended == 3


def test_what_only_begins_is_no_work_for_a_sink(follower: Follower, sink: Kept, journal: Journal) -> None:
    for number in range(5):
        journal.append(opening(make_record(number)))
        follower.turn()
    assert sink.writes == 0


def test_the_end_of_a_segment_is(tmp_path: Path, follower: Follower, sink: Kept) -> None:
    path = dead_segment(tmp_path)
    follower.turn()
    assert sink.kept.done == {path.name}
    follower.turn()
    assert sink.writes == 1


def test_a_sink_that_fails_is_offered_the_same_again(
    follower: Follower, sink: Kept, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    follower.turn()
    journal.append(closing(make_record(1)))
    sink.fails = OSError("disk full")
    delays = [follower.turn() for _ in range(8)]
    assert delays[0] == FIRST_DELAY
    assert delays == sorted(delays)
    assert delays[-1] == LONGEST_DELAY
    assert not follower.view({}, 0.0).up
    journal.append(closing(make_record(2)))
    sink.fails = None
    assert follower.turn() == IDLE_SECONDS
    assert sink.ids == [identity(1), identity(2)]
    assert follower.view({}, 0.0).up
    assert [record.message for record in caplog.records] == ["sink down; records wait in the journal", "sink up again"]
    sink.fails = OSError("again")
    journal.append(closing(make_record(3)))
    assert follower.turn() == FIRST_DELAY, "a good turn makes patience short again"


def test_a_sink_that_cannot_say_where_it_is_gets_nothing(follower: Follower, sink: Kept, journal: Journal) -> None:
    journal.append(closing(make_record(1)))
    sink.fails = OSError("not yet")
    assert follower.turn() == FIRST_DELAY
    sink.fails = None
    follower.turn()
    assert sink.ids == [identity(1)]


def test_a_bug_is_logged_with_its_trace_and_ends_nothing(
    follower: Follower, sink: Kept, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    journal.append(closing(make_record(1)))
    sink.fails = KeyError("bug")
    follower.turn()
    assert caplog.records[0].exc_info is not None
    sink.fails = None
    follower.turn()
    assert sink.ids == [identity(1)]


def test_what_was_taken_is_not_offered_again_because_keeping_it_failed(follower: Follower, sink: Kept, journal: Journal) -> None:
    journal.append(closing(make_record(1)))
    sink.tending_fails = OSError("disk full")
    assert follower.turn() == FIRST_DELAY
    assert follower.turn() > FIRST_DELAY
    assert sink.ids == [identity(1)]
    assert not follower.view({}, 0.0).up


def test_unreadable_bytes_are_logged_once(
    tmp_path: Path, follower: Follower, sink: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    dead_segment(tmp_path, b"\x02" + b"x" * 30, closing(make_record(1)))
    for _ in range(3):
        follower.turn()
    assert sink.ids == [identity(1)]
    assert [record.message for record in caplog.records] == ["unreadable bytes in the journal"]


def test_how_far_behind_it_is(follower: Follower, sink: Kept, journal: Journal) -> None:
    follower.turn()
    journal.append(closing(make_record(1)))
    written = {journal.incarnation: journal.position}
    behind = follower.view(written, time.monotonic()).lag_bytes
    assert behind == journal.position[1] - 24
    sink.fails = OSError("down")
    follower.turn()
    assert follower.view(written, time.monotonic() + 100).lag_seconds > 99
    sink.fails = None
    follower.turn()
    view = follower.view(written, time.monotonic() + 100)
    assert (view.lag_bytes, view.lag_seconds) == (0, 0.0)


def test_a_sink_that_hangs_is_behind_all_the_while(follower: Follower, sink: Kept, journal: Journal) -> None:  # failure 47
    follower.turn()
    sink.answers.clear()
    follower.start()
    journal.append(closing(make_record(1)))
    written = {journal.incarnation: journal.position}
    assert sink.asked.wait(20.0)
    view = follower.view(written, time.monotonic() + 100)
    assert view.lag_seconds > 99
    assert view.lag_bytes > 0
    sink.answers.set()
    follower.stop(FOREVER)
    assert follower.join(20.0)
    assert follower.view(written, time.monotonic() + 100).lag_seconds == 0.0


def test_a_sink_that_takes_and_cannot_pass_on_is_not_up(follower: Follower, sink: Kept) -> None:
    follower.turn()
    sink.up = False
    assert not follower.view({}, 0.0).up


# -- the thread --


def test_a_stop_reads_to_the_end_and_closes(tmp_path: Path, follower: Follower, sink: Kept) -> None:
    journal = Journal(tmp_path, SEGMENT_BYTES)
    follower.start()
    journal.append(opening(make_record(0)))
    for number in range(1, 50):
        journal.append(closing(make_record(number)))
    kill(journal)
    follower.stop(FOREVER)
    assert follower.join(20.0)
    assert sorted(sink.ids) == [identity(number) for number in range(50)]
    assert len(sink.closed) == 1


def test_a_stop_waits_for_a_sink_that_comes_back(tmp_path: Path, follower: Follower, sink: Kept) -> None:
    dead_segment(tmp_path, closing(make_record(1)))
    sink.fails = OSError("down")
    follower.start()
    follower.stop(FOREVER)
    assert not follower.join(0.05)
    sink.fails = None
    assert follower.join(20.0)
    assert sink.ids == [identity(1)]


def test_a_stop_gives_up_at_its_deadline_and_says_so(
    tmp_path: Path, follower: Follower, sink: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    dead_segment(tmp_path, closing(make_record(1)))
    sink.fails = OSError("down")
    follower.start()
    follower.stop(FOREVER)
    follower.stop(time.monotonic())
    assert follower.join(20.0)
    assert "the rest waits there" in caplog.text
    assert len(sink.closed) == 1


def test_a_stop_with_a_living_worker_ends_at_what_is_written(follower: Follower, sink: Kept, journal: Journal) -> None:
    journal.append(opening(make_record(0)))
    journal.append(closing(make_record(1)))
    follower.start()
    follower.stop(FOREVER)
    assert follower.join(20.0)
    assert sink.ids == [identity(1)]


def test_new_records_are_noticed(follower: Follower, sink: Kept, journal: Journal) -> None:
    follower.start()
    for number in range(3):
        sink.wrote.clear()
        journal.append(closing(make_record(number)))
        assert sink.wrote.wait(20.0)
    follower.stop(FOREVER)
    assert follower.join(20.0)
    assert len(sink.ids) == 3
