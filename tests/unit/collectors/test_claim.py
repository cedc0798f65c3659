"""One collector per state directory."""

from __future__ import annotations

import os
import threading
import uuid
from pathlib import Path

import pytest

from collectors.claim import InUse, claim, identity


def test_a_second_collector_is_told_who_the_first_is(tmp_path: Path) -> None:
    held = claim(tmp_path)
    with pytest.raises(InUse, match=rf"process {os.getpid()}\) works in {tmp_path}"):
        claim(tmp_path, patience=0.0)
    os.close(held)
    os.close(claim(tmp_path, patience=0.0))


def test_a_predecessor_that_is_ending_is_waited_for(tmp_path: Path) -> None:
    held = claim(tmp_path)
    ending = threading.Timer(0.1, os.close, [held])
    ending.start()
    os.close(claim(tmp_path, patience=20.0))
    ending.join()


def test_the_identity_outlives_the_process(tmp_path: Path) -> None:
    first = identity(tmp_path)
    assert str(uuid.UUID(first)) == first
    assert identity(tmp_path) == first


def test_an_identity_that_makes_no_sense_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "collector-id").write_text("not one")
    made = identity(tmp_path)
    assert identity(tmp_path) == made
    assert (tmp_path / "collector-id.damaged").read_text() == "not one"
