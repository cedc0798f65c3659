"""A Redis of a test's own: real, on a Unix socket and on a free port of loopback, in a temporary directory. It saves nothing:
what is started again is empty."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from redis import Redis as Client
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

_STARTS_WITHIN = 30.0


class Redis:
    """A server. `client` is one for the test itself."""

    def __init__(self, home: Path, program: str, options: tuple[str, ...], password: str | None) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self._home = home
        self._program = program
        self._options = options if password is None else (*options, "--requirepass", password)
        self._password = password
        self._process: subprocess.Popen[bytes] | None = None
        self.socket = home / "redis.sock"
        self.url = f"redis://127.0.0.1:{self.port}"
        self.unix_url = f"unix://{self.socket}"
        self.client = self._client(30)

    def _client(self, timeout: float) -> Client:
        once = Retry(NoBackoff(), 0)
        path, password = str(self.socket), self._password
        return Client(unix_socket_path=path, password=password, decode_responses=True, socket_timeout=timeout, retry=once)

    def start(self) -> None:
        assert self._process is None
        self.socket.unlink(missing_ok=True)
        where = ("--bind", "127.0.0.1", "--port", str(self.port), "--unixsocket", str(self.socket), "--dir", str(self._home))
        saving = ("--save", "", "--appendonly", "no", "--enable-debug-command", "local")
        with (self._home / "log").open("ab") as log:
            self._process = subprocess.Popen([self._program, *where, *saving, *self._options], stdout=log, stderr=log)
        deadline = time.monotonic() + _STARTS_WITHIN
        while not self._answers():
            assert self._process.poll() is None, (self._home / "log").read_text()
            assert time.monotonic() < deadline, "Redis doesn't answer"
            time.sleep(0.01)

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except (RedisError, OSError):
            return False

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        """Nothing if it doesn't run."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            process.send_signal(signal.SIGCONT)
            process.wait()
        self.client.close()

    def restart(self) -> None:
        self.kill()
        self.start()

    def flush(self) -> None:
        self.client.flushall()

    def pause(self) -> None:
        """It hangs: connections are made (by the kernel) and stay, nobody answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def slow_down(self, seconds: float) -> None:
        """The next command is answered only after that time; `resume` doesn't shorten it."""
        with suppress(RedisError, OSError), self._client(0.001) as client:
            client.execute_command("DEBUG", "SLEEP", str(seconds))


@contextmanager
def redis_server(*options: str, password: str | None = None, program: str | None = None) -> Iterator[Redis]:
    """It runs until the end of the block. Where it isn't installed the test is skipped."""
    program = program or shutil.which("redis-server")
    if program is None:
        pytest.skip("the server of Redis isn't installed (Debian: redis-server)")
    home = Path(tempfile.mkdtemp(prefix="glasshouse-redis-"))
    try:
        server = Redis(home, program, options, password)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(home)
