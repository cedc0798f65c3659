"""Files that are replaced as a whole."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from proxy.files import replace_file


def test_it_holds_what_was_written_last_and_is_nobody_elses(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"what was there")
    path.chmod(0o644)
    replace_file(path, b"one")
    replace_file(path, b"")
    replace_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_what_has_it_open_goes_on_with_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "state"
    replace_file(path, b"old")
    with path.open("rb") as stream:
        replace_file(path, b"new")
        assert stream.read() == b"old"


def test_where_there_is_no_room_the_old_one_stays_and_nothing_else(tmp_path: Path) -> None:  # failure 66
    path = tmp_path / "state"
    replace_file(path, b"old")
    script = (
        "import resource, signal, sys; from pathlib import Path; from proxy.files import replace_file;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        "replace_file(Path(sys.argv[1]), b'x' * 5000)"
    )
    ran = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=False)
    assert "OSError" in ran.stderr
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_is_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        replace_file(tmp_path / "nowhere" / "state", b"")
