"""The scripted server in a process of its own, which can be stopped, killed and started again at the same port."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Final, Self

_ROOT: Final = Path(__file__).parents[3]


class VLLMProcess:
    """`with VLLMProcess("--model", "m") as vllm:` is `python -m tests.support.scripted_vllm` at `vllm.url`."""

    def __init__(self, *arguments: str) -> None:
        self.url = ""
        self._arguments = arguments
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str) -> None:
        """Until it listens. `arguments`: instead of those that it was made with."""
        command = [sys.executable, "-m", "tests.support.scripted_vllm", "--port", str(self._port), "--exit-with-stdin"]
        self._process = process = subprocess.Popen(
            [*command, *(arguments or self._arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=_ROOT
        )
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        self._port, self.url = said["port"], said["url"]

    def hang(self) -> None:
        """SIGSTOP: the kernel goes on accepting connections for it."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._end()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process is not None:
            self.kill()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.communicate()
