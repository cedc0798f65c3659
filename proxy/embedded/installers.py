"""uv and pip: how they are called, how far they are, what their errors mean.

uv is several times faster (Phoenix: 9 s against 37 s from a near index) and does the work where it can be found. It does not
read pip's configuration, so where it fails over something that pip may be configured for, an index or a certificate store,
pip is tried. Lists are complete, so neither resolves anything: `--no-deps`. The caller's environment variables reach both.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

Command = tuple[str, ...]

_TICK_SECONDS: Final = 5.0
_POLL_SECONDS: Final = 0.25
_TAIL_LINES: Final = 12


@dataclass(frozen=True, slots=True)
class Installer:
    """Commands that make a virtual environment and fill it, to be run in order."""

    name: str
    commands: tuple[Command, ...]


class CommandFailed(Exception):
    """An installer ended with a status other than 0; `output` is its last lines."""

    def __init__(self, status: int, output: str) -> None:
        super().__init__(f"ended with status {status}")
        self.output = output


def python_of(location: Path) -> Path:
    return location / "bin" / "python"


def find_uv() -> str | None:
    """uv: the one beside this interpreter, which is pinned with the proxy, else the one on PATH."""
    beside = Path(sys.executable).with_name("uv")
    return str(beside) if os.access(beside, os.X_OK) else shutil.which("uv")


def installers(location: Path, requirements: Path) -> tuple[Installer, ...]:
    """Those that can be had here, the better one first."""
    python = str(python_of(location))
    what = ("--no-deps", "--only-binary=:all:", "--require-hashes", "-r", str(requirements))
    by_pip = Installer(
        "pip",
        (
            (sys.executable, "-m", "venv", str(location)),
            (python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=off", "--retries=2", *what),
        ),
    )
    if not (uv := find_uv()):
        return (by_pip,)
    by_uv = Installer(
        "uv",
        (
            (uv, "venv", "--quiet", "--no-project", "--python", sys.executable, str(location)),
            # Compiled now, on all cores; otherwise a companion's first start does it, on one.
            (uv, "pip", "install", "--compile-bytecode", "--python", python, *what),
        ),
    )
    return (by_uv, by_pip)


@dataclass(slots=True)
class Progress:
    """How far an installer is, from the lines that it prints."""

    stage: str = "preparing"
    _seen: int = 0
    _fetching: list[str] = field(default_factory=list)

    def feed(self, line: str) -> None:
        match line.split():
            case ["Collecting" | "Processing", *_]:  # pip
                self._seen += 1
                self.stage = f"fetching package {self._seen}"
            case ["Installing", "collected", *_]:
                self.stage = f"installing {self._seen} packages"
            case ["Resolved", count, *_]:  # uv; it names the large packages only
                self.stage = f"fetching {count} packages"
            case ["Downloading", package, _]:
                self._fetching.append(package)
                self.stage = self._under_way()
            case ["Downloaded", package] if package in self._fetching:
                self._fetching.remove(package)
                self.stage = self._under_way()
            case ["Prepared", count, *_]:
                self.stage = f"installing {count} packages"
            case ["Installed", count, *_]:
                self.stage = f"compiling {count} packages"

    def _under_way(self) -> str:
        if not self._fetching:
            return "fetching the last small packages"
        rest = len(self._fetching) - 3
        return f"fetching {', '.join(self._fetching[:3])}" + (f" and {rest} more" if rest > 0 else "")


@dataclass(frozen=True, slots=True)
class Reason:
    text: str
    another_may_do: bool
    """Whether another installer, with a configuration of its own, may fare better."""


_REASONS: Final = (
    (r"No space left on device|os error 28\b", Reason("the disk is full", another_may_do=False)),
    (
        r"Hash mismatch|DO NOT MATCH THE HASHES",
        Reason("a fetched file is not the one that was locked (its hash differs)", another_may_do=False),
    ),
    (
        r"certificate verify failed|CERTIFICATE_VERIFY_FAILED|UnknownIssuer|invalid peer certificate",
        Reason("the package index's certificate is not trusted (SSL_CERT_FILE can name one that is)", another_may_do=True),
    ),
    (
        r"error sending request|connection broken|Failed to establish a new connection|ConnectTimeout|ReadTimeout|"
        r"Temporary failure in name resolution|operation timed out",
        Reason("the package index cannot be reached", another_may_do=True),
    ),
    (
        r"No matching distribution found|was not found in the package registry|no matching|no wheels with",
        Reason("the package index lacks a package, or lacks it for this machine and Python", another_may_do=True),
    ),
)
_UNKNOWN: Final = Reason("the installer failed", another_may_do=True)


def explain(output: str) -> Reason:
    """What an installer's last lines mean."""
    return next((reason for pattern, reason in _REASONS if re.search(pattern, output)), _UNKNOWN)


def run(command: Command, tell: Callable[[str], None], go_on: Callable[[], None], held: int) -> None:
    """Run an installer's command to its end, or raise `CommandFailed`.

    `tell` hears how far it is every few seconds. `go_on` is called several times a second; when it raises, the command is
    stopped. The command inherits the descriptor `held`.
    """
    progress = Progress()
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    started = told = time.monotonic()
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(held,),
        start_new_session=True,
    ) as child:
        try:
            for line in _lines(child):
                go_on()
                if line:
                    tail.append(line)
                    progress.feed(line)
                if (now := time.monotonic()) - told >= _TICK_SECONDS:
                    told = now
                    tell(f"{progress.stage}, {now - started:.0f} s")
        except BaseException:
            _stop(child)
            raise
    if child.returncode:
        raise CommandFailed(child.returncode, "\n".join(tail))


def _lines(child: subprocess.Popen[bytes]) -> Iterator[str]:
    """The child's lines as they come, and an empty one whenever a while passes without any."""
    assert child.stdout is not None  # noqa: S101  (a pipe was asked for)
    descriptor = child.stdout.fileno()
    rest = b""
    while True:
        if not select.select([descriptor], [], [], _POLL_SECONDS)[0]:
            yield ""
            continue
        data = os.read(descriptor, 65536)
        *lines, rest = (rest + data).split(b"\n")
        yield from (line.decode(errors="replace").rstrip() for line in lines)
        if not data:
            yield rest.decode(errors="replace")
            return


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End the child and what it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=5)
