"""The file `engines`: whole, fresh and of a version that is known, or nothing."""

from __future__ import annotations

import stat
from pathlib import Path

import msgspec
import pytest

from proxy.engines import FRESH_NS, VERSION, EngineLoad, Engines, read_engines, write_engines

NOW = 1_800_000_000_000_000_000
LOAD = EngineLoad(3, 1, 0.25, 1000, 200, 1_799_999_000.5, 900, 450)
ENGINES = Engines(VERSION, NOW, {"gpu-0": LOAD, "gpu-1": EngineLoad()})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "engines"
    write_engines(path, ENGINES)
    assert read_engines(path, NOW) == ENGINES
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path], "and nothing else stays"


@pytest.mark.parametrize(("age_ns", "fresh"), [(0, True), (FRESH_NS, True), (FRESH_NS + 1, False), (-FRESH_NS - 1, False)])
def test_an_old_one_says_nothing_of_now(tmp_path: Path, age_ns: int, fresh: bool) -> None:
    path = tmp_path / "engines"
    write_engines(path, ENGINES)
    assert (read_engines(path, NOW + age_ns) is not None) == fresh


@pytest.mark.parametrize("keep", [0, 1, 10, -1])
def test_one_that_was_cut_off_is_none(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "engines"
    write_engines(path, ENGINES)
    path.write_bytes(path.read_bytes()[:keep])
    assert read_engines(path, NOW) is None


def test_none_at_all(tmp_path: Path) -> None:
    assert read_engines(tmp_path / "engines", NOW) is None


def test_one_of_the_first_version_lacks_what_came_later(tmp_path: Path) -> None:
    path = tmp_path / "engines"
    path.write_bytes(msgspec.msgpack.encode([VERSION, NOW, {"gpu-0": [3, 1, 0.25, 1000, 200, 1.5]}]))
    engines = read_engines(path, NOW)
    assert engines is not None
    assert engines.loads == {"gpu-0": EngineLoad(3, 1, 0.25, 1000, 200, 1.5)}


def test_what_a_later_version_appends_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "engines"
    path.write_bytes(msgspec.msgpack.encode([VERSION, NOW, {"gpu-0": [3, 1, 0.25, 1000, 200, 1.5, 0, 0, "more"]}, "more"]))
    engines = read_engines(path, NOW)
    assert engines is not None
    assert engines.loads["gpu-0"].running == 3


@pytest.mark.parametrize("version", [VERSION + 1, VERSION - 2])
def test_a_version_that_is_not_known_is_none(tmp_path: Path, version: int) -> None:
    path = tmp_path / "engines"
    write_engines(path, Engines(version, NOW))
    assert read_engines(path, NOW) is None


def test_what_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "engines"
    path.mkdir()
    (path / "full").touch()  # nothing can take its place
    with pytest.raises(OSError, match="engines"):
        write_engines(path, ENGINES)
    assert list(tmp_path.iterdir()) == [path]
