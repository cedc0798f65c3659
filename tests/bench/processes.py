"""What the kernel says about processes: their CPU time, their memory, their children. And starting some."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

_TICK_NS: Final = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_PROC: Final = Path("/proc")


class Cpu(NamedTuple):
    """CPU time of some processes since their start, in ns, told in two ways."""

    living: int
    """Exact, but without the threads that have ended."""
    ticks: int
    """With them, but in steps of 10 ms."""

    def since(self, before: Cpu) -> int:
        return max(self.living - before.living, self.ticks - before.ticks - 2 * _TICK_NS)


def cpu(pids: Iterable[int]) -> Cpu:
    living = ticks = 0
    for pid in pids:
        for task in (_PROC / str(pid) / "task").iterdir():
            try:
                living += int((task / "schedstat").read_text().split()[0])
            except OSError:  # the thread has ended meanwhile
                continue
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        ticks += (int(fields[11]) + int(fields[12])) * _TICK_NS
    return Cpu(living, ticks)


class Memory(NamedTuple):
    """Bytes: resident, and resident with what is shared divided among those who share it."""

    rss: int
    pss: int


def memory(pids: Iterable[int]) -> Memory:
    sizes = {"Rss": 0, "Pss": 0}
    for pid in pids:
        for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()[1:]:
            name, _, size = line.partition(":")
            if name in sizes:
                sizes[name] += int(size.split()[0]) * 1024
    return Memory(sizes["Rss"], sizes["Pss"])


def children(pid: int) -> list[int]:
    return [int(child) for child in (_PROC / str(pid) / "task" / str(pid) / "children").read_text().split()]


def pin(pids: Iterable[int], cpus: set[int]) -> None:
    """Every thread of these processes on these CPUs only."""
    for pid in pids:
        for task in (_PROC / str(pid) / "task").iterdir():
            os.sched_setaffinity(int(task.name), cpus)


def raise_file_limit() -> None:
    """Thousands of connections need as many descriptors, here and in the processes started from here."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_for_port(port: int, process: subprocess.Popen[bytes], seconds: float = 20.0) -> None:
    """Until something listens there. Raises RuntimeError when the process ends first or time is up."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise RuntimeError(f"{process.args!r} doesn't listen on port {port}")


class JsonProcess:
    """A Python module in a process of its own that speaks JSON lines, and ends with its standard input."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.communicate()

    def ask(self, **command: object) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()
        return self.hear()

    def hear(self) -> Any:
        """The next thing that it says."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args!r} ended with status {self._process.wait()}")
        return json.loads(line)
