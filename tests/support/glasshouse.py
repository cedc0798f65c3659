"""The whole product in a test: `glasshouse up` as users run it, on free ports, with everything that a test wants to know of it.

    with Glasshouse([vllm.url]) as glasshouse:
        ask(glasshouse.url, "/v1/chat/completions", {...}, key=glasshouse.key)
        [row] = glasshouse.rows(1)

It is the real command with a real configuration file; nothing is replaced. What goes wrong is raised with the ends of all logs.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from urllib.error import URLError
from urllib.request import HTTPSHandler, ProxyHandler, build_opener

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from proxy.journal import Heartbeat, read_heartbeats
from proxy.settings import Settings
from proxy.snapshot import SnapshotError, SnapshotFile, read_snapshot
from tests.support.tls import client_context

ROOT: Final = Path(__file__).parents[2]
PATIENCE: Final = 60.0
DEFAULTS: Final[Mapping[str, Any]] = {
    "listen": "127.0.0.1:0",
    "control": {"listen": "127.0.0.1:0", "discover_every": 0.5},
    "metrics": {"listen": "127.0.0.1:0"},
    "phoenix": {"url": None},
    "journal": {"segment_bytes": 1024 * 1024},
}
LAST_WORDS: Final = "Ctrl-C stops everything."
"""Of the banner."""
MODULES: Final = {"proxy.worker": "worker", "collectors": "collector", "proxy.control": "control", "proxy.cli": "supervisor"}

_KEY: Final = re.compile(r"\bgh-[A-Za-z0-9_-]{43}(?![A-Za-z0-9_-])")
_ADMIN_KEY: Final = re.compile(r"\bgha-[A-Za-z0-9_-]{43}(?![A-Za-z0-9_-])")
_direct = build_opener(ProxyHandler({}), HTTPSHandler(context=client_context()))
T = TypeVar("T")


class Samples(list[Sample]):
    """What `/metrics` said."""

    def total(self, name: str, **labels: str) -> float:
        """The sum of the series of this name that carry these labels; 0 if there are none."""
        return sum(s.value for s in self if s.name == name and labels.items() <= s.labels.items())


class Glasshouse:
    """One `glasshouse up` in a process of its own.

    backends: URLs, or mappings as in the configuration file.
    config: laid over `DEFAULTS`, section by section.
    state_dir: kept when given; otherwise temporary, and gone after `stop`.
    key, admin_key: of an existing state directory; a fresh one makes its own.
    models: wait until a model of every backend is known (turn it off where a backend is meant to be dead).
    patience: seconds for each thing that is waited for.
    within: a command that runs another one, somewhere else: `ip netns exec NAME`.
    """

    def __init__(
        self,
        backends: Iterable[str | Mapping[str, Any]] = (),
        config: Mapping[str, Any] | None = None,
        state_dir: Path | None = None,
        *,
        key: str = "",
        admin_key: str = "",
        models: bool = True,
        env: Mapping[str, str] | None = None,
        patience: float = PATIENCE,
        within: Sequence[str] = (),
    ) -> None:
        self._within = within
        self._own_dir = tempfile.TemporaryDirectory(prefix="glasshouse-") if state_dir is None else None
        self.state_dir = Path(self._own_dir.name) if self._own_dir is not None else state_dir or Path()
        self.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.config = _merged(DEFAULTS, config or {})
        self.config["state_dir"] = str(self.state_dir)
        if listed := [{"url": each} if isinstance(each, str) else dict(each) for each in backends]:
            self.config["backends"] = listed
        self.key = key
        self.admin_key = admin_key
        self._models = models
        self._patience = patience
        clean = {name: value for name, value in os.environ.items() if not name.startswith("GLASSHOUSE_")}
        self._env = {**clean, **(env or {}), "PYTHONPATH": str(ROOT)}
        self._process: subprocess.Popen[bytes] | None = None
        self.settings = Settings.of(self.config)

    # -- life --

    def start(self) -> Self:
        """Run it until it is ready, the key works and the models are known."""
        self._settings_file.unlink(missing_ok=True)
        file = self.state_dir / "config.yaml"
        file.write_text(json.dumps(self.config))  # JSON is YAML
        with self._output_file.open("ab") as output:
            self._process = subprocess.Popen(
                [*self._within, sys.executable, "-P", "-m", "proxy.cli", "up", "--config", str(file)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._env,
                start_new_session=True,
            )
        try:
            self._until(self._settings_file.exists, "the effective settings")
            self.settings = Settings.read(self._settings_file)
            self.wait_ready()
            self._until(self._serving, "the key and the models in the workers' snapshot")
            if self._models:
                self.until_said(LAST_WORDS)
        except BaseException:
            self._kill_all()
            raise
        return self

    def wait_ready(self) -> None:
        """Until worker, control and collector answer: also after a `kill`."""
        for url in (f"{self.url}/ready", f"{self.control_url}/health", f"{self.metrics_url}"):
            self._until(lambda url=url: _answers(url), url)  # type: ignore[misc]

    def stop(self) -> None:
        """SIGTERM; it must end well and leave no process. What it wrote stays readable if the state directory was given."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                status = process.wait(self.settings.timeouts.drain + PATIENCE)
            except subprocess.TimeoutExpired:
                self._kill_all(process)
                raise self.failure("it did not end") from None
            left = self._processes()
            self._kill_all()
            if status != 0 or left:
                raise self.failure(f"it ended with status {status}, leaving {left or 'nobody'}")
        if self._own_dir is not None:
            self._own_dir.cleanup()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.stop()
        except AssertionError:
            if error is None:
                raise

    # -- addresses --

    @property
    def url(self) -> str:
        return f"http{'' if self.settings.tls is None else 's'}://{self.settings.listen}"

    @property
    def control_url(self) -> str:
        return f"http://{self.settings.control.listen}"

    @property
    def metrics_url(self) -> str:
        return f"http://{self.settings.metrics.listen}/metrics"

    # -- the command line --

    def command(
        self, *arguments: str, status: int = 0, env: Mapping[str, str] | None = None, within: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`glasshouse ARGUMENTS` as it is typed beside it, or in the directory `within` where nothing is known of it."""
        config = [] if within is not None else ["--config", str(self.state_dir / "config.yaml")]
        done = subprocess.run(
            [sys.executable, "-P", "-m", "proxy.cli", *arguments, *config],
            env={**self._env, **(env or {})},
            cwd=within,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        if done.returncode != status:
            raise self.failure(f"glasshouse {' '.join(arguments)}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    # -- processes --

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def pids(self) -> dict[str, list[int]]:
        """Role (worker, collector, control, supervisor) → process ids."""
        found: dict[str, list[int]] = {role: [] for role in MODULES.values()}
        for pid, role in self._processes().items():
            found.setdefault(role, []).append(pid)
        return found

    def pid(self, role: str) -> int:
        """The one process of a role; waits for it while it is being started."""
        return self._until(lambda: self.pids()[role], f"a {role}")[0]

    def kill(self, role: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Signal the process of a role at once; → its id."""
        pid = self.pid(role)
        os.kill(pid, number)
        return pid

    def wait_replaced(self, role: str, pid: int) -> int:
        """Until another process has taken the place of `pid`; → its id."""
        return self._until(lambda: [other for other in self.pids()[role] if other != pid], f"another {role}")[0]

    def wait_nobody(self) -> None:
        """Until no process of it is left."""
        self._until(lambda: not self._processes(), "its processes to end", alive=False)

    def wait_exit(self) -> int:
        """Until the command itself has ended, for whatever reason; → its status. `stop` has nothing to do then."""
        if self._process is None:
            raise AssertionError("it was never started, or was stopped")
        status = self._process.wait(self.settings.timeouts.drain + PATIENCE)
        self._process = None
        return status

    def signal(self, number: signal.Signals) -> None:
        """To the command itself."""
        if self._process is not None:
            self._process.send_signal(number)

    def insist(self, number: int) -> int:
        """Signal the command again and again until it has ended; → its status."""
        if self._process is None:
            raise AssertionError("it was never started, or was stopped")
        while self._process.poll() is None:
            self._process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.1)
        return self.wait_exit()

    # -- what it has seen --

    def rows(self, minimum: int = 0, timeout: float | None = None) -> list[dict[str, Any]]:
        """The ledger, oldest first, once it holds at least so many rows."""
        return self._until(lambda: _Enough(self._rows(), minimum), f"{minimum} rows", timeout).rows

    def until_said(self, text: str) -> None:
        """Until people could read this."""
        self._until(lambda: text in self.logs()["up"], f"{text!r} to be said", alive=False)

    def until_beats(self, enough: Callable[[list[Heartbeat]], bool], what: str) -> None:
        """Until the heartbeats of the living workers say so."""
        self._until(lambda: enough(self._beats()), what)

    def until_in_flight(self, requests: int) -> None:
        """Until the workers' heartbeats say that so many requests are in flight."""
        self.until_beats(lambda beats: sum(beat.in_flight for beat in beats) == requests, f"{requests} requests in flight")

    def metrics(self) -> Samples:
        with _direct.open(self.metrics_url, timeout=PATIENCE) as answer:
            text = answer.read().decode()
        return Samples(sample for family in text_string_to_metric_families(text) for sample in family.samples)

    def wait_metric(self, name: str, value: float, timeout: float | None = None, **labels: str) -> None:
        """Until the sum of these series is at least `value`."""
        self._until(lambda: self.metrics().total(name, **labels) >= value, f"{name}{labels} to be {value}", timeout)

    def snapshot(self) -> SnapshotFile:
        """What was published last; empty before."""
        try:
            return read_snapshot(self.settings.snapshot_path)
        except (OSError, SnapshotError):
            return SnapshotFile()

    def logs(self) -> dict[str, str]:
        """Name of a process ("up" is what people see) → all that it said."""
        files = [self._output_file, *sorted(self.settings.log_path.glob("*.log"))]
        return {file.stem: file.read_text(errors="replace") for file in files if file.exists()}

    def failure(self, what: str) -> AssertionError:
        ends = [f"--- {name}\n" + "\n".join(text.splitlines()[-15:]) for name, text in self.logs().items()]
        return AssertionError("\n".join([what, *ends]))

    # -- inside --

    @property
    def _settings_file(self) -> Path:
        return self.state_dir / "settings.json"

    @property
    def _output_file(self) -> Path:
        return self.state_dir / "up.out"

    def _until(self, look: Callable[[], T], what: str, timeout: float | None = None, *, alive: bool = True) -> T:
        """The first true thing that `look` finds. Raises AssertionError with the logs, also when it has ended meanwhile."""
        timeout = self._patience if timeout is None else timeout
        deadline = time.monotonic() + timeout
        while not (found := look()):
            if alive and self._process is not None and self._process.poll() is not None:
                raise self.failure(f"it ended with status {self._process.returncode} while waiting for {what}")
            if time.monotonic() > deadline:
                raise self.failure(f"waited {timeout:.0f} s in vain for {what}")
            time.sleep(0.02)
        return found

    def _serving(self) -> bool:
        said = self.logs().get("up", "")
        self.key = self.key or _first(_KEY, said)
        self.admin_key = self.admin_key or _first(_ADMIN_KEY, said)
        snapshot = self.snapshot()
        if not (self.key and snapshot.keys):
            return False
        if self._models:
            serving = {name for model in snapshot.models.values() for name in model.backends}
            if not all(self.settings.backend_name(index) in serving for index in range(len(self.settings.backends))):
                return False
        beats = self._beats()
        return bool(beats) and all(beat.snapshot_unix_ns >= snapshot.published_unix_ns for beat in beats)

    def _beats(self) -> list[Heartbeat]:
        return [beat for beat in read_heartbeats(self.settings.journal_path) if beat.alive]

    def _rows(self) -> list[dict[str, Any]]:
        path = self.settings.database_url.removeprefix("sqlite:///")
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=PATIENCE)) as database:
            database.row_factory = sqlite3.Row
            rows = [dict(row) for row in database.execute("SELECT * FROM requests ORDER BY received_at, id")]
        for row in rows:
            for name in ("finish_reasons", "inter_token_counts", "attempts"):
                row[name] = json.loads(row[name])
        return rows

    def _processes(self) -> dict[int, str]:
        """Everything that runs on this state directory: process id → role."""
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdecimal() and (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                    argv = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                    if argv[1:3] == ["-P", "-m"] and any(each.startswith(f"{self.state_dir}/") for each in argv):
                        found[int(entry.name)] = MODULES.get(argv[3], argv[3])
        return found

    def _kill_all(self, process: subprocess.Popen[bytes] | None = None) -> None:
        """The last resort: nothing of a failed test may run on."""
        process = process or self._process
        if process is not None:
            process.kill()
            process.wait()
        self._process = None
        for pid in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _first(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return found[0] if found else ""


class _Enough:
    """True if there are enough rows."""

    def __init__(self, rows: list[dict[str, Any]], minimum: int) -> None:
        self.rows = rows
        self._minimum = minimum

    def __bool__(self) -> bool:
        return len(self.rows) >= self._minimum


def _answers(url: str) -> bool:
    try:
        with _direct.open(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Sections are merged, values replaced."""
    result = {name: dict(value) if isinstance(value, Mapping) else value for name, value in base.items()}
    for name, value in over.items():
        old = result.get(name)
        result[name] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result
