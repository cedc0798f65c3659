"""The parent of all that `glasshouse up` runs: N workers, a collector, a control process and their companions.

It binds the listening sockets and keeps them open, so a worker that restarts refuses nobody: connections wait in the kernel's
queue until the next incarnation takes them. Several workers have a socket each on one address, over which the kernel spreads
connections; one that can't come up again is taken off it. It holds the state directory's lock, writes the effective settings
there, starts what is in its table of children, restarts what dies, and stops everything in the order in which nothing is lost:
workers finish their answers, the collector reads the journal to its end, then the rest.

It must not know what its children do. A child is data: a command line, a URL that answers 200 when it is ready, and when it
stops. Children run in sessions of their own (Ctrl-C reaches the supervisor alone) and the kernel kills them when the
supervisor dies, however it dies. Everything here runs on the main thread's event loop: that also keeps this promise, because
the kernel means the *thread* that started the child.

A reload (SIGHUP) runs everything anew on the settings as they are now. Workers are replaced without a gap: the new ones are
started beside the old ones, on the same sockets, and only when each of them has said that it serves are the old ones told that
their place is taken. If one of the new ones doesn't come up, nothing has happened. Collector and control are stopped and
started; nobody waits for them.
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
import ssl
import sys
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from operator import attrgetter
from pathlib import Path
from typing import Any, TextIO, TypeVar
from urllib.parse import urlsplit

import msgspec

from proxy.last_reload import LastReload
from proxy.settings import Settings, address

log = logging.getLogger(__name__)

BACKLOG = 4096
FIRST_DELAY, LONGEST_DELAY = 0.1, 5.0
PROBE_EVERY, PROBE_TIMEOUT = 0.05, 2.0
AFTER_DRAIN = 5.0
COLLECTOR_TIMEOUT, CONTROL_TIMEOUT = 60.0, 10.0
COME_UP_TIMEOUT = 10.0
RELOAD_TIMEOUT = 60.0
"""For each step of a reload to come up."""
HOPELESS_AFTER = 3
SAME_SIGNAL = 0.5
"""Seconds in which a second signal is the first one's echo: some tools signal a process and its group."""
LOG_BYTES = 10 * 1024 * 1024
LOCK_FILE = "supervisor.lock"
FIXED = ("listen", "control.listen", "metrics.listen", "workers", "state_dir", "database", "phoenix.start")
"""Settings that a reload can't change: sockets are bound, directory and database in use, companions started."""

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
    """What to run. `ready_url` answers 200 when it is up.

    handover: the signal by which one learns that another has taken its place; None: two of it can't run at the same time.
    shared: others answer at its address too.
    With either it understands `--ready-fd N`: say that it is ready by writing to this descriptor; with `handover` also
    `--take-over`: don't accept before.
    """

    name: str
    stage: Stage
    argv: Sequence[str]
    ready_url: str
    stop_timeout: float = 10.0
    env: Mapping[str, str] | None = None
    """The whole environment; None = ours."""
    fd: int | None = None
    """A listening socket that it inherits."""
    handover: signal.Signals | None = None
    shared: bool = False


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
            (*python, "proxy.worker", "--place", str(index), "--settings", str(file), "--fd", str(fd)),
            _url(settings.listen, "/ready", tls=settings.tls is not None),
            drain,
            fd=fd,
            handover=signal.SIGUSR1,
            shared=len(listeners.workers) > 1,
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


def refuse_changes(running: Settings, wanted: Settings) -> None:
    """Raises SupervisorError, which names what of `wanted` can't be had without a restart."""
    refused = []
    for path in (*FIXED, "phoenix.url") if running.phoenix.start else FIXED:
        old, new = (attrgetter(path)(each) for each in (running, wanted))
        if old != new:
            values = "" if path == "database" else f" from {old!r} to {new!r}"  # a database's URL may hold a password
            refused.append(f"{path}: a reload can't change it{values}; stop `glasshouse up` and start it again for that")
    if refused:
        raise SupervisorError("\n".join(refused))


class Supervisor:
    """One `glasshouse up`: `open`, `start`, `ready`, `serve` until asked to stop, `stop`.

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
        """As the children have them. Addresses are real ones from `open` on."""
        self._given = settings
        self.asked_to_stop = asyncio.Event()
        self.asked_to_reload = asyncio.Event()
        self._asked_at = 0.0
        self._table = children
        self._prepare = prepare
        self._tell = tell
        self._kept: list[_Kept] = []
        self._leaving: dict[_Kept, asyncio.Task[bool]] = {}
        """Those that another has replaced, until they have ended."""
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
            self._lock = _lock(state / LOCK_FILE)
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
        self._places = {
            "state_dir": str(state),
            "listen": _name(workers[0]),
            "control.listen": _name(control[0]),
            "metrics.listen": _name(metrics[0]),
        }
        self._listeners = Listeners(tuple(each.fileno() for each in workers), control[0].fileno())
        self._last_reload = LastReload(time.monotonic_ns(), True, time.time_ns())
        try:
            self.amend(settings)
            self._write_last_reload()
        except SupervisorError:
            self.close()
            raise
        return self.settings

    def amend(self, settings: Settings) -> None:
        """Hand these to the children that are started from now on; directory and addresses stay. Raises SupervisorError."""
        places = self._places
        settings = msgspec.structs.replace(
            settings,
            state_dir=places["state_dir"],
            listen=places["listen"],
            control=msgspec.structs.replace(settings.control, listen=places["control.listen"]),
            metrics=msgspec.structs.replace(settings.metrics, listen=places["metrics.listen"]),
        )
        try:
            settings.write(self.settings_file)
        except OSError as error:
            raise SupervisorError(f"{self.settings_file} can't be written: {error.strerror}") from error
        self.settings = settings

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
        self._kept = [self._made(child) for child in (*self._children(), *companions)]
        needs_database = (Stage.COLLECTOR, Stage.CONTROL)
        for kept in self._kept:
            if kept.child.stage not in needs_database:
                kept.start()
        await asyncio.to_thread(self._prepare, self.settings)
        for kept in self._kept:
            if kept.child.stage in needs_database:
                kept.start()

    def _children(self) -> list[Child]:
        return self._table(self.settings, self.settings_file, self._listeners)

    def _made(self, child: Child, *, takes_over: bool = False) -> _Kept:
        return _Kept(child, self.settings.log_path, self._tell, self._changed, takes_over=takes_over)

    def waiting(self) -> list[str]:
        """The names of the children that aren't ready."""
        return [kept.name for kept in self._kept if not kept.ready]

    async def ready(
        self,
        within: float,
        names: Collection[str] | None = None,
        progress: Callable[[list[str], float], None] = lambda waiting, elapsed: None,
    ) -> None:
        """Wait until all children (or those in `names`) are ready. Raises SupervisorError after `within` seconds, or when one
        has died several times without ever becoming ready; the text holds the last lines of its log."""
        await self._until_ready([kept for kept in self._kept if names is None or kept.name in names], within, progress)

    async def _until_ready(
        self,
        awaited: Sequence[_Kept],
        within: float,
        progress: Callable[[list[str], float], None] = lambda waiting, elapsed: None,
    ) -> bool:
        started = time.monotonic()
        while missing := [kept for kept in awaited if not kept.ready]:
            elapsed = time.monotonic() - started
            hopeless = [kept for kept in missing if kept.hopeless]
            if hopeless or elapsed >= within:
                raise SupervisorError("\n".join(kept.complaint(elapsed) for kept in hopeless or missing))
            progress([kept.name for kept in missing], elapsed)
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), min(0.5, within - elapsed))
        return True

    # -- reloading --

    async def serve(self, load: Callable[[], Settings]) -> None:
        """Until asked to stop. Whenever asked to reload, run on what `load` says then; wishes that come meanwhile are one."""
        while not self.asked_to_stop.is_set():
            if await self.unless_stopped(self.asked_to_reload.wait()):
                self.asked_to_reload.clear()
                await self._reload(load)

    async def _reload(self, load: Callable[[], Settings]) -> None:
        began_ns = time.monotonic_ns()
        try:
            done = await self.reload(load())
        except Exception as error:  # whatever it is, what runs goes on
            said = str(error) if isinstance(error, SupervisorError) else f"a bug: {error!r}; the supervisor's log has more"
            log.error("not reloaded", extra={"error": said}, exc_info=not isinstance(error, SupervisorError))
            self._tell(f"not reloaded: {said}")
            self._last_reload = LastReload(began_ns, False, self._last_reload.success_unix_ns, said.splitlines())
        else:
            log.info("reloaded", extra={"done": done})
            self._tell(f"reloaded: {', '.join(done)}")
            self._last_reload = LastReload(began_ns, True, time.time_ns(), done)
        self._write_last_reload()

    def _write_last_reload(self) -> None:
        try:
            self._last_reload.write(self.settings.last_reload_path)
        except OSError as error:  # nobody learns of it in that way, and it is no reason to stop
            log.error("how the reload went could not be written down", extra={"error": str(error)})

    async def reload(self, settings: Settings) -> list[str]:
        """Run everything but the companions anew, on `settings` → what was done, for people. Raises SupervisorError; unless
        its text says otherwise all is as it was before."""
        before = self.settings
        refuse_changes(self._given, settings)
        self.amend(settings)
        children = self._children()
        try:
            done = await self._replace([child for child in children if child.handover is not None])
        except SupervisorError:
            self.settings = before  # also if that can't be written
            self.amend(before)
            raise
        self._given = settings
        for child in children:
            if child.handover is None:
                done.append(await self._restart(child))
        return done

    async def _replace(self, children: Sequence[Child]) -> list[str]:
        """All of them or none: the new ones beside the old ones, and when they serve the old ones go."""
        began = time.monotonic()
        old = [kept for kept in self._kept if kept.child.handover is not None]
        new = [self._made(child, takes_over=True) for child in children]
        self._kept += new
        for kept in new:
            kept.start()
        try:
            await self._come_up(new)
        except SupervisorError:
            for kept in new:
                self._leave(kept)
            raise
        for kept in old:
            kept.name = f"the previous {kept.name}"
            self._leave(kept)
        for kept in new:
            kept.name = kept.child.name
        return [f"{kept.name} replaced after {time.monotonic() - began:.1f} s" for kept in new]

    async def _restart(self, child: Child) -> str:
        began = time.monotonic()
        [old] = [kept for kept in self._kept if kept.name == child.name]
        new = self._made(child)
        self._kept.append(new)
        await self._leave(old)
        new.start()
        try:
            await self._come_up([new])
        except SupervisorError as error:
            raise SupervisorError(f"the workers are new; {error}") from None
        return f"{child.name} restarted after {time.monotonic() - began:.1f} s"

    async def _come_up(self, new: Sequence[_Kept]) -> None:
        if not await self.unless_stopped(self._until_ready(new, RELOAD_TIMEOUT)):
            raise SupervisorError("it was asked to stop meanwhile")

    def _leave(self, kept: _Kept) -> asyncio.Task[bool]:
        """It ends on its own time; `stop` waits for it."""
        self._kept.remove(kept)
        handover = kept.child.handover if kept.ready else None
        task = asyncio.create_task(kept.stop(handover or signal.SIGTERM), name=f"{kept.name} leaves")
        self._leaving[kept] = task
        task.add_done_callback(lambda _: self._leaving.pop(kept))
        return task

    # -- signals --

    def handle_signals(self, hung_up: Callable[[], bool] = lambda: False) -> None:
        """SIGTERM, SIGINT: stop; a second one after a moment: at once. SIGHUP: reload, or stop if `hung_up` says that it means
        what it meant first: the terminal is gone."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop_signal, number)
        loop.add_signal_handler(signal.SIGHUP, self._on_hang_up, hung_up)

    def _on_hang_up(self, hung_up: Callable[[], bool]) -> None:
        if hung_up():
            self._on_stop_signal(signal.SIGHUP)
        else:
            log.info("signal", extra={"signal": "SIGHUP", "again": self.asked_to_reload.is_set()})
            self.asked_to_reload.set()

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
            leaving = {each: task for each, task in self._leaving.items() if each.child.stage is stage}
            if stage is Stage.COLLECTOR:  # it owes the ledger what is in the journal: bring it up first if it is down
                await asyncio.gather(*(each.come_up(COME_UP_TIMEOUT) for each in kept))
            for each in leaving:
                each.hurry()
            well &= all(await asyncio.gather(*(each.stop() for each in kept), *leaving.values()))
        self.close()
        log.info("stopped", extra={"well": well})
        return well

    def kill(self) -> None:
        """End everything now. What the journal holds is kept."""
        for kept in (*self._kept, *self._leaving):
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
    """A child that is kept running, across its incarnations. The first of them `takes_over` from another keeper's, or not."""

    def __init__(
        self, child: Child, log_dir: Path, tell: Callable[[str], None], changed: asyncio.Event, *, takes_over: bool
    ) -> None:
        self.child = child
        self.name = f"the new {child.name}" if takes_over else child.name
        self._takes_over = takes_over
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
                if self.child.shared and self._deaths > 1 and not self._replaces:
                    self._withdraw()
                self._resting = True
                self._hurry.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._hurry.wait(), delay)
                self._resting = False

    async def _live(self) -> bool:
        """One incarnation, from its start to its death; True if it ever was ready."""
        started = time.monotonic()
        hears, says = socket.socketpair()
        with hears:
            try:
                with says:
                    process = await self._spawn(says.fileno())
            except OSError as error:  # no process, no memory or no log to be had: perhaps later
                log.error("not started", extra={"child": self.name, "error": str(error)})
                self._status = None
                self._deaths += 1
                return False
            self._process = process
            if self._stopping:  # while it was being started
                self._signal(signal.SIGTERM)
            watching = asyncio.create_task(self._watch(hears, started), name=f"{self.name} ready?")
            self._status = await process.wait()
            watching.cancel()
            await asyncio.wait({watching})
        self._process = None
        _kill_group(process.pid)  # nothing that it started outlives it
        was_ready, self.ready = self.ready, False
        self._deaths = 1 if was_ready else self._deaths + 1
        return was_ready

    def _withdraw(self) -> None:
        """Leave the address to the others until an incarnation listens again: what the kernel would go on putting into this one's
        queue would wait for nobody. What waits there already is reset, so that it can try again."""
        if self.child.fd is not None:
            with socket.socket(fileno=os.dup(self.child.fd)) as listener, contextlib.suppress(OSError):  # it doesn't listen
                listener.shutdown(socket.SHUT_RDWR)

    @property
    def _replaces(self) -> bool:
        """There is one whose place this incarnation is to take."""
        return self._takes_over and not self.was_ready

    @property
    def _says_itself(self) -> bool:
        """A probe of the address might be answered by another."""
        return self._replaces or self.child.shared

    async def _spawn(self, says: int) -> asyncio.subprocess.Process:
        child, argv = self.child, list(self.child.argv)
        inherited = [] if child.fd is None else [child.fd]
        if self._says_itself:
            argv += ["--ready-fd", str(says)]
            inherited.append(says)
        if self._replaces:
            argv.append("--take-over")
        with open_log(self._log_file) as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", "-c", _TETHER, str(os.getpid()), *argv),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=child.env,
                pass_fds=inherited,
                start_new_session=True,
            )
        log.info("started", extra={"child": self.name, "child_pid": process.pid})
        return process

    async def _watch(self, hears: socket.socket, started: float) -> None:
        """Until it is ready."""
        if not await (_is_told(hears) if self._says_itself else _is_answered(self.child.ready_url)):
            return
        self.ready = self.was_ready = True
        self._changed.set()
        log.info("ready", extra={"child": self.name, "seconds": round(time.monotonic() - started, 3)})
        if self._deaths:
            self._tell(f"{self.name} is back")

    def _report_death(self, delay: float) -> None:
        ended = _ended(self._status)
        log.error("died", extra={"child": self.name, "ended": ended, "restart_in": delay})
        self._tell(f"{self.name} {ended}; starting it again in {delay:.1f} s (log: {self._log_file})")
        self._changed.set()

    def complaint(self, elapsed: float) -> str:
        state = f"{_ended(self._status)} {self._deaths} times" if self.hopeless else f"not ready after {elapsed:.0f} s"
        return f"{self.name}: {state}. The end of {self._log_file}:\n{tail(self._log_file)}"

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

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> bool:
        """Signal it; SIGKILL to its group after `stop_timeout`. True if it ended by itself and well."""
        if self._task is None:
            return True
        began, was_up, was_resting = time.monotonic(), self.ready, self._resting
        self._stopping = True
        self._hurry.set()
        self._signal(number)
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
            extra={"child": self.name, "ended": ended, "seconds": round(seconds, 3)},
        )
        self._tell(f"{self.name} " + (f"ended after {seconds:.1f} s" if well else ended))
        return well

    def hurry(self) -> None:
        """It is stopping already: nothing more is to be hoped for from taking time."""
        self._signal(signal.SIGTERM)

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


async def _is_told(hears: socket.socket) -> bool:
    """Until the other end says something (True) or is closed (False)."""
    hears.setblocking(False)
    return bool(await asyncio.get_running_loop().sock_recv(hears, 16))


async def _is_answered(url: str) -> bool:
    """Until `url`, which is a child's of ours, answers."""
    while not await answers(url, verify=False):  # noqa: ASYNC110 - another process
        await asyncio.sleep(PROBE_EVERY)
    return True


async def answers(url: str, *, verify: bool = True) -> bool:
    """Does `url` answer 200 now? `verify` False: whatever certificate it shows; ours is for the name that clients know."""
    parts = urlsplit(url)
    tls = _client_context(verify) if parts.scheme == "https" else None
    target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
    try:
        async with asyncio.timeout(PROBE_TIMEOUT):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port or (443 if tls else 80), ssl=tls)
            try:
                writer.write(f"GET {target} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n".encode())
                status = await reader.readline()
                await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError):  # ValueError: a line without an end
        return False
    return status.split(b" ")[1:2] == [b"200"]


def _client_context(verify: bool) -> ssl.SSLContext:
    if verify:
        return ssl.create_default_context()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def running_process(state: Path) -> int | None:
    """The process id of the supervisor that has this state directory; None if none has. Raises OSError."""
    path = state / LOCK_FILE
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.read(fd, 20).decode(errors="replace").strip()
    else:
        return None
    finally:
        os.close(fd)
    # The number may be that of another container: only who really has the file open is the one.
    if not text.isdecimal() or not any(each.samefile(path) for each in _open_files(int(text))):
        raise OSError(f"{path} is held by a process that can't be told from here")
    return int(text)


def _open_files(pid: int) -> Iterator[Path]:
    for each in Path(f"/proc/{pid}/fd").iterdir():
        if each.exists():
            yield each


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


def _url(listen: str, path: str, *, tls: bool = False) -> str:
    """Where a process of this host asks: an address that means *all interfaces* is asked on loopback."""
    host, port = address(listen)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  nothing is bound here
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}{path}" if ":" in host else f"{scheme}://{host}:{port}{path}"


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
