"""The spend file: what was written is read, by this version and the next; anything else is refused."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.journal import Checkpoint
from proxy.spend.file import PeriodWindows, Row, SpendError, SpendFile, WindowRows, decode_spend, write_spend

FIXTURES = Path(__file__).parents[2] / "fixtures" / "spend"
FIRST = FIXTURES / "spend-1.msgpack"
"""Of before users and projects."""
GOLDEN = FIXTURES / "spend-1-users.msgpack"


def full(user: str = "ann", project: str = "search") -> SpendFile:
    rows = [Row("incarnation-1", "key_1", "red", 1, 2, 3, user, project), Row("incarnation-2", "key_2", "", 4, 5, 6)]
    return SpendFile(
        currency="EUR",
        checkpoint=Checkpoint({"a-1.seg": 5}, {"b-1.seg"}, {"a": {b"id": b"record"}}, {"c-1.seg"}),
        periods=[
            PeriodWindows("day", "Europe/Vienna", 86_400, [WindowRows(86_400, rows[:1]), WindowRows(172_800, rows)]),
            PeriodWindows("total", "UTC", 0, []),
        ],
    )


def extended(value: Any, fields: bool = True) -> Any:
    """From a writer that has more fields in each struct."""
    if isinstance(value, list):
        structs = bool(value) and all(isinstance(each, list) for each in value)
        return [extended(each) for each in value] if structs or not value else [*map(extended, value), ["more"]]
    return value


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "spend"
    write_spend(path, SpendFile())
    write_spend(path, full())
    assert decode_spend(path.read_bytes()) == full()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["spend"]


def test_files_of_this_version_are_read_for_ever() -> None:
    assert decode_spend(GOLDEN.read_bytes()) == full()
    assert decode_spend(FIRST.read_bytes()) == full("", "")
    assert msgspec.msgpack.encode(full()) == GOLDEN.read_bytes(), "fields that are appended need defaults, and another file"


def test_what_a_newer_writer_adds_is_passed_over() -> None:
    version, currency, checkpoint, periods = msgspec.msgpack.decode(GOLDEN.read_bytes())
    newer = [version, currency, [*checkpoint, "more"], extended(periods), "more"]
    assert msgspec.msgpack.encode(newer) != GOLDEN.read_bytes()
    assert decode_spend(msgspec.msgpack.encode(newer)) == full()


@pytest.mark.parametrize(("version", "read"), [(0, True), (1, True), (2, False), (-1, False)])
def test_a_version_and_the_one_before(version: int, read: bool) -> None:
    data = msgspec.msgpack.encode(SpendFile(version=version))
    if read:
        assert decode_spend(data).version == version
    else:
        with pytest.raises(SpendError, match="this version reads 1"):
            decode_spend(data)


@pytest.mark.parametrize("data", [b"", b"\0" * 300, b"somebody else's", b"\x91\xa3one", b"\x92\x01\xa1\xff"])
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(SpendError):
        decode_spend(data)


@given(st.integers(0, 300), st.binary(max_size=20))
def test_no_bytes_break_it(cut: int, more: bytes) -> None:
    try:
        decode_spend(GOLDEN.read_bytes()[:cut] + more)
    except SpendError:
        return


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "spend"
    write_spend(path, full())
    (tmp_path / f"spend.{os.getpid()}").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_spend(path, SpendFile())
    assert decode_spend(path.read_bytes()) == full()
