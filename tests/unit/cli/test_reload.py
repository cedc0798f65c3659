"""`glasshouse reload`: whom it signals, and what it makes of the result. The one who is signalled is the test."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proxy.last_reload import LastReload
from proxy.supervisor import running_process
from tests.unit.cli.conftest import Command

pytestmark = pytest.mark.usefixtures("here")


class Running:
    """It has the state directory, as a supervisor has."""

    def __init__(self, state: Path) -> None:
        state.mkdir()
        self.state = state
        self.asked = 0
        self.then: Callable[[], None] = self.reloaded
        self._fd = os.open(state / "supervisor.lock", os.O_RDWR | os.O_CREAT)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        self.says_it_is(os.getpid())
        self.result(True)

    def says_it_is(self, pid: int) -> None:
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{pid}\n".encode(), 0)

    def signalled(self, *_: object) -> None:
        self.asked += 1
        self.then()

    def result(self, successful: bool, *lines: str) -> None:
        LastReload(time.monotonic_ns(), successful, time.time_ns(), list(lines)).write(self.state / "last-reload")

    def reloaded(self) -> None:
        self.result(True, "worker-0 replaced after 0.5 s", "control restarted after 1.5 s")

    def ends(self) -> None:
        os.close(self._fd)
        self._fd = -1

    def close(self) -> None:
        if self._fd >= 0:
            self.ends()


@pytest.fixture
def running(here: Path) -> Iterator[Running]:
    made = Running(here / ".glasshouse")
    before = signal.signal(signal.SIGHUP, made.signalled)
    yield made
    signal.signal(signal.SIGHUP, before)
    made.close()


def test_what_was_restarted_is_printed(running: Running, command: Command) -> None:
    assert command("reload").stdout == "worker-0 replaced after 0.5 s\ncontrol restarted after 1.5 s\n"
    assert running.asked == 1


def test_why_nothing_was_is_an_error(running: Running, command: Command) -> None:
    running.then = lambda: running.result(False, "glasshouse.yaml: listen: what", "is this")
    assert command("reload", status=1).stderr == "Error: glasshouse.yaml: listen: what\nis this\n"


def test_it_is_found_by_a_file_that_cannot_be_used(running: Running, command: Command) -> None:
    running.state.rename("elsewhere")
    running.state = Path("elsewhere")
    Path("glasshouse.yaml").write_text("state_dir: elsewhere\nno_such: setting\n")
    command("reload")
    assert running.asked == 1


def test_where_nobody_runs(command: Command) -> None:
    assert command("reload", status=1).stderr == "Error: no `glasshouse up` runs on .glasshouse\n"


def test_where_nobody_runs_and_the_file_may_be_why(command: Command) -> None:
    Path("glasshouse.yaml").write_text("state_dir: [")
    assert "glasshouse.yaml: not usable as YAML" in command("reload", status=1).stderr


def test_it_may_end_meanwhile(running: Running, command: Command) -> None:
    running.then = running.ends
    assert command("reload", status=1).stderr == "Error: the `glasshouse up` of .glasshouse has ended\n"


def test_nobody_else_is_signalled(running: Running, command: Command) -> None:
    """Seen from another container the number in the file is somebody else's."""
    running.says_it_is(os.getppid())
    assert "is held by a process that can't be told from here" in command("reload", status=1).stderr
    running.says_it_is(2**22 + 1)
    assert "can't be found" in command("reload", status=1).stderr
    assert running.asked == 0


def test_who_has_the_directory_is_known_only_while_it_runs(running: Running, tmp_path: Path) -> None:
    assert running_process(running.state) == os.getpid()
    running.ends()
    assert running_process(running.state) is None
    assert running_process(tmp_path) is None
