"""Captured bodies, looked up by request."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from collectors.records.captured import Captured
from proxy.journal import Content, Journal, encode_content
from tests.unit.collectors.made import identity
from tests.unit.journal.made import SEGMENT_BYTES, kill
from tests.unit.journal.test_writer import append_patiently


def capture(journal: Journal, number: int, size: int = 10) -> Content:
    content = Content(b"%d" % number * size, b"answer")
    append_patiently(journal, encode_content(identity(number), content.request, content.answer, 10**6))
    return content


def test_what_was_captured_is_found_also_while_its_worker_writes_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SEGMENT_BYTES)
    captured = Captured(tmp_path)
    assert captured.find(identity(1)) is None
    one, two = capture(journal, 1), capture(journal, 2)
    assert captured.find(identity(2)) == two
    assert captured.find(identity(1)) == one
    three = capture(journal, 3)
    assert captured.find(identity(3)) == three
    kill(journal)
    assert captured.find(identity(1)) == one
    assert captured.find(identity(4)) is None


def test_it_is_found_across_segments_and_workers(tmp_path: Path) -> None:
    journals = [Journal(tmp_path, SEGMENT_BYTES) for _ in range(2)]
    contents = {number: capture(journals[number % 2], number, 9000) for number in range(10, 40)}
    captured = Captured(tmp_path)
    assert {number: captured.find(identity(number)) for number in contents} == contents
    for journal in journals:
        journal.close()


def test_nothing_was_ever_captured(tmp_path: Path) -> None:
    captured = Captured(tmp_path / "missing")
    assert captured.find(identity(1)) is None
    captured.tidy(1e12)


def finished(directory: Path, number: int, age: float = 0.0) -> Path:
    """A segment whose writer has ended, last written `age` seconds before 1,000,000."""
    journal = Journal(directory, SEGMENT_BYTES)
    capture(journal, number, 1000)
    journal.close()
    path = directory / f"{journal.incarnation}-000001.seg"
    os.utime(path, (1e6 - age, 1e6 - age))
    return path


def test_old_segments_go_and_with_them_what_is_known_of_them(tmp_path: Path) -> None:
    captured = Captured(tmp_path, keep_seconds=60)
    old, young = finished(tmp_path, 1, age=61), finished(tmp_path, 2, age=59)
    assert captured.find(identity(1)) is not None
    captured.tidy(1e6)
    assert not old.exists()
    assert young.exists()
    assert captured.find(identity(1)) is None
    assert captured.find(identity(2)) is not None
    assert set(captured._places) == {identity(2)}


def test_the_oldest_go_when_they_are_too_many(tmp_path: Path) -> None:
    paths = [finished(tmp_path, number) for number in range(5)]
    size = paths[0].stat().st_size
    Captured(tmp_path, keep_bytes=2 * size).tidy(1e6)
    assert [path.exists() for path in paths] == [False, False, False, True, True]


def test_what_a_living_worker_writes_to_stays(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SEGMENT_BYTES)
    content = capture(journal, 1)
    captured = Captured(tmp_path, keep_bytes=0, keep_seconds=0)
    captured.tidy(1e12)
    assert captured.find(identity(1)) == content
    journal.close()
    captured.tidy(1e12)
    assert list(tmp_path.iterdir()) == []


def test_content_that_went_between_the_look_and_the_reading_is_gone(tmp_path: Path) -> None:
    path = finished(tmp_path, 1)
    captured = Captured(tmp_path)
    assert captured.find(identity(1)) is not None
    path.unlink()
    assert captured.find(identity(1)) is None


def test_content_that_cannot_be_read_is_gone_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path, SEGMENT_BYTES)
    journal.append(identity(1) + b"\xc1")
    assert Captured(tmp_path).find(identity(1)) is None
    assert "not readable" in caplog.text
    journal.close()


def test_looking_and_tidying_at_once(tmp_path: Path) -> None:
    captured = Captured(tmp_path, keep_seconds=0)
    stop = threading.Event()

    def tidy() -> None:
        while not stop.is_set():
            captured.tidy(1e12)

    tidying = threading.Thread(target=tidy)
    tidying.start()
    for number in range(30):
        journal = Journal(tmp_path, SEGMENT_BYTES)
        content = capture(journal, number)
        assert captured.find(identity(number)) == content, "a living worker's"
        journal.close()
    stop.set()
    tidying.join()
    captured.tidy(1e12)
    assert captured._places == {}
