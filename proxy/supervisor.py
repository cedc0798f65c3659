"""The parent of all that `glasshouse up` runs: N workers, a collector, a control process and their companions.

It binds the listening sockets and keeps them open, so a worker that restarts refuses nobody: connections wait in the kernel's
queue until the next incarnation takes them. It holds the state directory's lock, writes the effective settings there, starts
what is in its table of children, restarts what dies, and stops everything in the order in which nothing is lost: workers
finish their answers, the collector reads the journal to its end, then the rest.

It must not know what its children do. A child is data: a command line, a URL that answers 200 when it is ready, and when it
stops. Children run in sessions of their own (Ctrl-C reaches the supervisor alone) and the kernel kills them when the
supervisor dies, however it dies. Everything here runs on the main thread's event loop: that also keeps this promise, because
the kernel means the *thread* that started the child.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, TextIO, TypeVar
from urllib.parse import urlsplit

import msgspec

from proxy.settings import Settings, address

log = logging.getLogger(__name__)

BACKLOG = 4096
FIRST_DELAY, LONGEST_DELAY = 0.1, 5.0
PROBE_EVERY, PROBE_TIMEOUT = 0.05, 2.0
AFTER_DRAIN = 5.0
COLLECTOR_TIMEOUT, CONTROL_TIMEOUT = 60.0, 10.0
COME_UP_TIMEOUT = 10.0
HOPELESS_AFTER = 3
SAME_SIGNAL = 0.5
"""Seconds in which a second signal is the first one's echo: some tools signal a process and its group."""
LOG_BYTES = 10 * 1024 * 1024

T = TypeVar("T")


class SupervisorError(Exception):
    """What was asked for can't be run; the text says why and what to do."""


class Stage(IntEnum):
    """Children stop in this order, those of a stage together."""

    WORKER = 0
    COLLECTOR = 1
    CONTROL = 2
    COMPANION = 3


@dataclass(frozen=True)
class Child:
    """What to run. `ready_url` answers 200 when it is up."""

    name: str
    stage: Stage
    argv: Sequence[str]
    ready_url: str
    stop_timeout: float = 10.0
    env: Mapping[str, str] | None = None
    """The whole environment; None = ours."""
    fd: int | None = None
    """A listening socket that it inherits."""


@dataclass(frozen=True)
class Listeners:
    """The sockets' file descriptors, as the children inherit them."""

    workers: tuple[int, ...]
    control: int


def children_of(settings: Settings, file: Path, listeners: Listeners) -> list[Child]:
    """The table: what runs on one host. `file` holds `settings`."""
    python = (sys.executable, "-P", "-m")  # -P: a folder called `proxy` where the user happens to stand is not ours
    drain = settings.timeouts.drain + AFTER_DRAIN
    workers = [
        Child(
            f"worker-{index}",
            Stage.WORKER,
            (*python, "proxy.worker", "--settings", str(file), "--fd", str(fd)),
            _url(settings.listen, "/ready"),
            drain,
            fd=fd,
        )
        for index, fd in enumerate(listeners.workers)
    ]
    return [
        *workers,
        Child(
            "collector",
            Stage.COLLECTOR,
            (*python, "collectors", "--settings", str(file)),
            _url(settings.metrics.listen, "/metrics"),
            COLLECTOR_TIMEOUT,
        ),
        Child(
            "control",
            Stage.CONTROL,
            (*python, "proxy.control", "--settings", str(file), "--fd", str(listeners.control)),
            _url(settings.control.listen, "/health"),
            CONTROL_TIMEOUT,
            fd=listeners.control,
        ),
    ]


def migrate_database(settings: Settings) -> None:
    """Bring the database to this version's schema."""
    from proxy.store import open_database  # SQLAlchemy's import: only here, while the workers are starting already

    open_database(settings.database_url).dispose()


class Supervisor:
    """One `glasshouse up`: `open`, `start`, `ready`, wait for `asked_to_stop`, `stop`.

    `tell` gets a line for people whenever something happens to a child; the same goes to the log with its facts.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        tell: Callable[[str], None] = lambda line: None,
        children: Callable[[Settings, Path, Listeners], list[Child]] = children_of,
        prepare: Callable[[Settings], None] = migrate_database,
    ) -> None:
        self.settings = settings
        self.asked_to_stop = asyncio.Event()
        self._asked_at = 0.0
        self._table = children
        self._prepare = prepare
        self._tell = tell
        self._kept: list[_Kept] = []
        self._changed = asyncio.Event()
        self._sockets: list[socket.socket] = []
        self._lock: int | None = None

    @property
    def settings_file(self) -> Path:
        return self.settings.state_path / "settings.json"

    # -- before anything runs --

    def open(self) -> Settings:
        """Take the state directory and the addresses; → the settings with the real ports. Raises SupervisorError."""
        state = self.settings.state_path.absolute()
        os.umask(0o077)  # prompts, keys' hashes, prices: nobody else's business, whoever creates the file
        try:
            for directory in (state, state / "log", state / "journal"):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _lock(state / "supervisor.lock")
            if (mode := state.stat().st_mode) & 0o077:  # made by somebody else, and perhaps not for us alone
                self._tell(f"{state} is open to other users (mode {mode & 0o777:o}); close it with `chmod 700`")
        except OSError as error:
            raise SupervisorError(f"state_dir: {state} can't be used: {error.strerror}") from error
        settings = self.settings
        try:
            workers = self._bind("listen", settings.listen, settings.workers)
            control = self._bind("control.listen", settings.control.listen)
            # The collector opens its port itself; ours is bound and never listens: it finds out early and keeps the port ours.
            metrics = self._bind("metrics.listen", settings.metrics.listen, listen=False)
        except SupervisorError:
            self.close()
            raise
        self.settings = msgspec.structs.replace(settings, state_dir=str(state))
        self.amend(
            listen=_name(workers[0]),
            control=msgspec.structs.replace(settings.control, listen=_name(control[0])),
            metrics=msgspec.structs.replace(settings.metrics, listen=_name(metrics[0])),
        )
        self._listeners = Listeners(tuple(each.fileno() for each in workers), control[0].fileno())
        return self.settings

    def amend(self, **changes: Any) -> None:
        """Change settings after `open` and before `start`."""
        self.settings = msgspec.structs.replace(self.settings, **changes)
        self.settings.write(self.settings_file)

    def _bind(self, setting: str, text: str, count: int = 1, *, listen: bool = True) -> list[socket.socket]:
        made = [_bound(setting, text)]
        if count > 1:  # the first one found out that nobody else has the address: sharers would not be told
            text = _name(made[0])
            made.pop().close()
            made = [_bound(setting, text, share=True) for _ in range(count)]
        if listen:
            for each in made:
                each.listen(BACKLOG)
        self._sockets += made
        return made

    def close(self) -> None:
        """Let go of addresses and state directory."""
        self._close_sockets()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _close_sockets(self) -> None:
        while self._sockets:
            self._sockets.pop().close()

    # -- running --

    async def start(self, companions: Iterable[Child] = ()) -> None:
        """Start everything; the workers and companions first, what needs the database once it is prepared."""
        children = [*self._table(self.settings, self.settings_file, self._listeners), *companions]
        self._kept = [_Kept(child, self.settings.log_path, self._tell, self._changed) for child in children]
        needs_database = (Stage.COLLECTOR, Stage.CONTROL)
        for kept in self._kept:
            if kept.child.stage not in needs_database:
                kept.start()
        await asyncio.to_thread(self._prepare, self.settings)
        for kept in self._kept:
            if kept.child.stage in needs_database:
                kept.start()

    def waiting(self) -> list[str]:
        """The names of the children that aren't ready."""
        return [kept.child.name for kept in self._kept if not kept.ready]

    async def ready(
        self,
        within: float,
        names: Collection[str] | None = None,
        progress: Callable[[list[str], float], None] = lambda waiting, elapsed: None,
    ) -> None:
        """Wait until all children (or those in `names`) are ready. Raises SupervisorError after `within` seconds, or when one
        has died several times without ever becoming ready; the text holds the last lines of its log."""
        started = time.monotonic()
        while missing := [kept for kept in self._kept if not kept.ready and (names is None or kept.child.name in names)]:
            elapsed = time.monotonic() - started
            hopeless = [kept for kept in missing if kept.hopeless]
            if hopeless or elapsed >= within:
                raise SupervisorError("\n".join(kept.complaint(elapsed) for kept in hopeless or missing))
            progress([kept.child.name for kept in missing], elapsed)
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), min(0.5, within - elapsed))

    # -- signals --

    def handle_signals(self, *, terminal: bool = False) -> None:
        """SIGTERM, SIGINT: stop; a second one after a moment: at once. SIGHUP on a terminal says that it was closed: the same;
        elsewhere it is where reloading will go."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if terminal else [])):
            loop.add_signal_handler(number, self._on_stop_signal, number)
        if not terminal:
            loop.add_signal_handler(signal.SIGHUP, log.warning, "SIGHUP ignored: this version reloads nothing; restart it")

    def _on_stop_signal(self, number: signal.Signals) -> None:
        log.info("signal", extra={"signal": number.name, "again": self.asked_to_stop.is_set()})
        now = time.monotonic()
        if not self.asked_to_stop.is_set():
            self._asked_at = now
            self.asked_to_stop.set()
        elif now - self._asked_at > SAME_SIGNAL:
            self.kill()

    async def unless_stopped(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Do `work`, but drop it when asked to stop; → None then."""
        task = asyncio.create_task(work, name="work")
        stop = asyncio.create_task(self.asked_to_stop.wait(), name="asked to stop")
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
        return None if task.cancelled() else task.result()

    # -- the end --

    async def stop(self) -> bool:
        """End everything in the order of `Stage`; True if all of it ended well."""
        self.asked_to_stop.set()
        self._close_sockets()
        well = True
        for stage in Stage:
            kept = [each for each in self._kept if each.child.stage is stage]
            if stage is Stage.COLLECTOR:  # it owes the ledger what is in the journal: bring it up first if it is down
                await asyncio.gather(*(each.come_up(COME_UP_TIMEOUT) for each in kept))
            well &= all(await asyncio.gather(*(each.stop() for each in kept)))
        self.close()
        log.info("stopped", extra={"well": well})
        return well

    def kill(self) -> None:
        """End everything now. What the journal holds is kept."""
        for kept in self._kept:
            kept.kill()


class Backoff:
    """How long to wait before the next start: doubles while it can't come up. What was up starts again almost at once: its
    clients are waiting, and coming up takes long enough to keep this from being a tight loop."""

    def __init__(self) -> None:
        self._delay = 0.0

    def after(self, was_ready: bool) -> float:
        self._delay = FIRST_DELAY if was_ready or not self._delay else min(LONGEST_DELAY, self._delay * 2)
        return self._delay


class _Kept:
    """A child that is kept running, across its incarnations."""

    def __init__(self, child: Child, log_dir: Path, tell: Callable[[str], None], changed: asyncio.Event) -> None:
        self.child = child
        self.ready = False
        self.was_ready = False
        """In any incarnation."""
        self._deaths = 0
        """Since it was last ready, that one included."""
        self._log_file = log_dir / f"{child.name}.log"
        self._tell = tell
        self._changed = changed
        self._process: asyncio.subprocess.Process | None = None
        self._status: int | None = None
        self._stopping = False
        self._resting = False
        """It is dead and waits for its next start."""
        self._hurry = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def hopeless(self) -> bool:
        """It has died several times and never was ready: trying on will not help."""
        return self._deaths >= HOPELESS_AFTER and not self.was_ready

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep(), name=self.child.name)

    async def _keep(self) -> None:
        backoff = Backoff()
        while not self._stopping:
            was_ready = await self._live()
            if not self._stopping:
                delay = backoff.after(was_ready)
                self._report_death(delay)
                self._resting = True
                self._hurry.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._hurry.wait(), delay)
                self._resting = False

    async def _live(self) -> bool:
        """One incarnation, from its start to its death; True if it ever was ready."""
        started = time.monotonic()
        try:
            process = await self._spawn()
        except OSError as error:  # no process, no memory or no log to be had: perhaps later
            log.error("not started", extra={"child": self.child.name, "error": str(error)})
            self._status = None
            self._deaths += 1
            return False
        self._process = process
        if self._stopping:  # while it was being started
            self._signal(signal.SIGTERM)
        probe = asyncio.create_task(self._probe(started), name=f"{self.child.name} ready?")
        self._status = await process.wait()
        probe.cancel()
        self._process = None
        _kill_group(process.pid)  # nothing that it started outlives it
        was_ready, self.ready = self.ready, False
        self._deaths = 1 if was_ready else self._deaths + 1
        return was_ready

    async def _spawn(self) -> asyncio.subprocess.Process:
        child = self.child
        with open_log(self._log_file) as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", "-c", _TETHER, str(os.getpid()), *child.argv),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=child.env,
                pass_fds=() if child.fd is None else (child.fd,),
                start_new_session=True,
            )
        log.info("started", extra={"child": child.name, "child_pid": process.pid})
        return process

    async def _probe(self, started: float) -> None:
        while True:
            if await answers(self.child.ready_url):
                break
            await asyncio.sleep(PROBE_EVERY)
        self.ready = self.was_ready = True
        self._changed.set()
        log.info("ready", extra={"child": self.child.name, "seconds": round(time.monotonic() - started, 3)})
        if self._deaths:
            self._tell(f"{self.child.name} is back")

    def _report_death(self, delay: float) -> None:
        ended = _ended(self._status)
        log.error("died", extra={"child": self.child.name, "ended": ended, "restart_in": delay})
        self._tell(f"{self.child.name} {ended}; starting it again in {delay:.1f} s (log: {self._log_file})")
        self._changed.set()

    def complaint(self, elapsed: float) -> str:
        state = f"{_ended(self._status)} {self._deaths} times" if self.hopeless else f"not ready after {elapsed:.0f} s"
        return f"{self.child.name}: {state}. The end of {self._log_file}:\n{tail(self._log_file)}"

    async def come_up(self, within: float) -> None:
        """If it is down or just starting, give it this one start."""
        if self._task is None:
            return
        self._hurry.set()
        deaths, deadline = self._deaths, time.monotonic() + within
        while not (self.ready or self._stopping or self._deaths > deaths) and time.monotonic() < deadline:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), 0.5)

    async def stop(self) -> bool:
        """SIGTERM; SIGKILL to its group after `stop_timeout`. True if it ended by itself and well."""
        if self._task is None:
            return True
        began, was_up, was_resting = time.monotonic(), self.ready, self._resting
        self._stopping = True
        self._hurry.set()
        self._signal(signal.SIGTERM)
        await asyncio.wait({self._task}, timeout=self.child.stop_timeout)
        late = not self._task.done()
        if late:
            self.kill()
            await asyncio.wait({self._task})
        # Before it is ready it may not have its handler yet; a companion may well have none. Nothing is lost then.
        may_die = not was_up or self.child.stage is Stage.COMPANION
        well = not was_resting and (self._status == 0 or (may_die and self._status == -signal.SIGTERM))
        seconds = time.monotonic() - began
        ended = f"did not end within {self.child.stop_timeout:.0f} s and was killed" if late else _ended(self._status)
        if was_resting:
            ended = f"was down: it {ended}"
        log.log(
            logging.INFO if well else logging.ERROR,
            "ended",
            extra={"child": self.child.name, "ended": ended, "seconds": round(seconds, 3)},
        )
        self._tell(f"{self.child.name} " + (f"ended after {seconds:.1f} s" if well else ended))
        return well

    def kill(self) -> None:
        self._stopping = True
        self._hurry.set()
        self._changed.set()
        if self._process is not None:
            _kill_group(self._process.pid)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._process is not None:
                self._process.send_signal(number)


_TETHER = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{sys.argv[2]}: {error.strerror}")
"""
"""Becomes the child after PR_SET_PDEATHSIG, which outlives exec(2): about 10 ms, and no Python runs between fork and exec."""


async def answers(url: str) -> bool:
    """Does `url` answer 200 now?"""
    parts = urlsplit(url)
    tls = parts.scheme == "https"
    target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
    try:
        async with asyncio.timeout(PROBE_TIMEOUT):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port or (443 if tls else 80), ssl=tls or None)
            try:
                writer.write(f"GET {target} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n".encode())
                status = await reader.readline()
                await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError):  # ValueError: a line without an end
        return False
    return status.split(b" ")[1:2] == [b"200"]


def tail(path: Path, lines: int = 12) -> str:
    """The last lines of a log, indented; a note if there are none."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - 8192))
            text = stream.read().decode(errors="replace")
    except FileNotFoundError:
        text = ""
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:]) or "    (nothing)"


def open_log(path: Path) -> TextIO:
    """Append to a log; one that has grown large is set aside first."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > LOG_BYTES:
            path.replace(path.with_name(f"{path.name}.1"))
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "a", encoding="utf-8")


def _lock(path: Path) -> int:
    """Hold `path` for as long as this process lives; → its descriptor."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(fd, 20).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise SupervisorError(
            f"state_dir: {path.parent} is in use by another `glasshouse up` (process {holder}). "
            "Stop that one, or give this one a `state_dir` of its own."
        ) from None
    os.ftruncate(fd, 0)
    os.write(fd, f"{os.getpid()}\n".encode())
    return fd


def _bound(setting: str, text: str, *, share: bool = False) -> socket.socket:
    """A bound socket, not listening yet. Raises SupervisorError."""
    host, port = address(text)
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(family, kind)
    except OSError as error:
        raise SupervisorError(f"{setting}: {text} can't be used: {error.strerror}") from error
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind(where)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise SupervisorError(
                f"{setting}: {text} is in use by another process. Stop that one, or set `{setting}` to another address."
            ) from error
        raise SupervisorError(f"{setting}: {text} can't be used: {error.strerror}") from error
    return made


def _name(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _url(listen: str, path: str) -> str:
    """Where a process of this host asks: an address that means *all interfaces* is asked on loopback."""
    host, port = address(listen)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  nothing is bound here
    return f"http://[{host}]:{port}{path}" if ":" in host else f"http://{host}:{port}{path}"


def _ended(status: int | None) -> str:
    if status is None:
        return "could not be started"
    if status < 0:
        names = {int(each): each.name for each in signal.Signals}
        return f"was ended by {names.get(-status, f'signal {-status}')}"
    return f"ended with status {status}"


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
