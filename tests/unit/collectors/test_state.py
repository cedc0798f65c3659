"""A state in one file."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from collectors.records.state import read_state, write_state


class State(msgspec.Struct, array_like=True):
    number: int = 0


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "state"
    assert read_state(path, State) is None
    write_state(path, State(1))
    write_state(path, State(2))
    assert read_state(path, State) == State(2)
    assert [each.name for each in tmp_path.iterdir()] == ["state"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_write_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_state(path, State(1))
    (tmp_path / f"state.{os.getpid()}").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_state(path, State(2))
    assert read_state(path, State) == State(1)


def test_half_a_state_is_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_state(path, State(70_000))
    path.write_bytes(path.read_bytes()[:-1])
    assert read_state(path, State) is None
    assert not path.exists()
    assert (tmp_path / "state.damaged").exists()
