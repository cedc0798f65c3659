"""`glasshouse up`: everything of one host in the foreground, said in a way that a person can use.

With no backend configured it brings a demo along: a small real model on two engines, and Phoenix. The demo and its key exist
for trying things out; that prompts and answers are kept in its traces is said in the banner, and is so nowhere else.

No secret is known before the first start: it makes a key and an admin key, and shows them then. An admin key may also be given,
in the environment variable GLASSHOUSE_ADMIN_KEY; our children don't get to see it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO
from urllib.parse import urlsplit

import click
import msgspec

from proxy import __version__, logs
from proxy.cli.client import KEY_VARIABLE, URL_VARIABLE
from proxy.cli.config import config_option, load_settings, usable
from proxy.embedded import HOST, Companion, CompanionError, environments
from proxy.embedded.engine import MODEL_NAME, engine, threads_each
from proxy.embedded.phoenix import phoenix, project_url
from proxy.journal import read_heartbeats
from proxy.nouns import BackendSettings, ModelSettings, PriceSettings
from proxy.settings import PhoenixSettings, Settings, address
from proxy.snapshot import SnapshotError, SnapshotFile, read_snapshot
from proxy.supervisor import Child, Stage, Supervisor, SupervisorError, answers, open_log

if TYPE_CHECKING:
    from sqlalchemy import Connection

CORE_TIMEOUT = 60.0
ENGINE_TIMEOUT = 120.0
PHOENIX_TIMEOUT = 180.0
MODELS_TIMEOUT = 5.0
FIRST_ENGINE_PORT, PHOENIX_PORT, PHOENIX_GRPC_PORT = 8411, 6006, 4317
PORTS_TRIED = 100
FIRST_ADMIN, GIVEN_ADMIN = "first", "environment"
"""The names of the admin keys that are made and given here."""
DEMO_PRICE = PriceSettings(input=Decimal("0.05"), cached_input=Decimal("0.01"), output=Decimal("0.20"))
"""An example, so that costs show up; running the model costs what the machine costs."""


@click.command()
@click.option("--backend", "backends", multiple=True, metavar="URL", help="An inference server's root; may be repeated.")
@click.option("--listen", metavar="HOST:PORT", help="Where clients connect; default 127.0.0.1:8400.")
@config_option
def up(backends: tuple[str, ...], listen: str | None, config: Path | None) -> None:
    """Run the proxy and all that belongs to it, until Ctrl-C.

    With no backend configured, a demo comes along: two engines with a small model, and Phoenix.

    What GLASSHOUSE_ADMIN_KEY holds becomes an admin key, if it isn't one; without it the first start makes one and shows it.
    """
    overrides: dict[str, object] = {}
    if backends:
        overrides["backends"] = [{"url": url} for url in backends]
    if listen:
        overrides["listen"] = listen
    admin_key = os.environ.pop(KEY_VARIABLE, "").strip()
    try:
        well = asyncio.run(_run(lambda: usable(load_settings(config, overrides)), Console(), admin_key))
    except (SupervisorError, CompanionError) as error:
        raise click.ClickException(str(error)) from None
    sys.exit(0 if well else 1)


# -- what to run --


@dataclass(frozen=True)
class Plan:
    """What `up` runs beside the proxy, and the settings that go with it."""

    settings: Settings
    demo: bool
    engines: Mapping[str, int]
    """name → port"""
    phoenix_ports: tuple[int, int] | None
    """(HTTP, gRPC) of the Phoenix that we start."""
    stored: bool = False
    """There are backends in the database."""

    @classmethod
    def of(cls, settings: Settings, *, stored: bool = False) -> Plan:
        """With backends, in the settings or in the database: these, and a Phoenix if the settings say so. Without: the demo.
        Raises SupervisorError."""
        ports = _free_ports()
        if settings.backends or stored:
            return cls(settings, False, {}, _own_phoenix(settings.phoenix, ports), stored)
        engines = {f"engine-{index}": ports(FIRST_ENGINE_PORT) for index in range(2)}
        pair = ports(PHOENIX_PORT), ports(PHOENIX_GRPC_PORT)
        return cls(settings, True, engines, pair).with_settings(settings)

    def with_settings(self, settings: Settings) -> Plan:
        """The same engines and Phoenix, with what a file says now. Raises SupervisorError."""
        if self.demo == bool(settings.backends or self.stored):
            running = "the engines of the demo" if self.demo else "those of the settings"
            raise SupervisorError(f"backends: {running} are running; stop `glasshouse up` and start it again to change that")
        if self.demo:
            settings = self._of_demo(settings)
        return replace(self, settings=settings)

    def without_phoenix(self) -> Plan:
        """Its Phoenix can't be had."""
        phoenix = msgspec.structs.replace(self.settings.phoenix, url=None)
        return replace(self, phoenix_ports=None, settings=msgspec.structs.replace(self.settings, phoenix=phoenix))

    def _of_demo(self, settings: Settings) -> Settings:
        url = f"http://{HOST}:{self.phoenix_ports[0]}" if self.phoenix_ports is not None else None
        return msgspec.structs.replace(
            settings,
            backends=[BackendSettings(url=f"http://{HOST}:{port}", name=name) for name, port in self.engines.items()],
            models={MODEL_NAME: ModelSettings(price=DEMO_PRICE), **settings.models},
            capture=msgspec.structs.replace(settings.capture, content=True),
            phoenix=msgspec.structs.replace(settings.phoenix, url=url, start=True),
            control=msgspec.structs.replace(settings.control, discover_every=min(1.0, settings.control.discover_every)),
        )


def _has_backends(settings: Settings) -> bool:
    """In the database, as it is: one that isn't there yet, or is older than they are, has none."""
    if not (settings.database or settings.database_path.exists()):
        return False
    from sqlalchemy.exc import DBAPIError

    from proxy.store import BACKENDS, StoreError, entries, open_engine, reader

    try:
        engine = reader(open_engine(settings.database_url))
        try:
            with engine.connect() as connection:
                return bool(entries(connection, BACKENDS, limit=1))
        finally:
            engine.dispose()
    except (StoreError, DBAPIError):  # what can't be used is told of when it is prepared
        return False


def _own_phoenix(settings: PhoenixSettings, ports: Callable[[int], int]) -> tuple[int, int] | None:
    if not settings.start:
        return None
    parts = urlsplit(settings.url or "")
    if parts.scheme != "http" or parts.hostname not in (HOST, "localhost"):
        raise SupervisorError(f"phoenix.url: {settings.url} is nowhere to start a Phoenix; allowed: http://{HOST}:PORT")
    port = parts.port or 80
    if ports(port) != port:
        raise SupervisorError(
            f"phoenix.url: port {port} is in use. If that is a Phoenix, take `phoenix.start` out: it will be used. "
            "If it isn't, set `phoenix.url` to another port."
        )
    return port, ports(PHOENIX_GRPC_PORT)


def _free_ports() -> Callable[[int], int]:
    """A function that gives the first free loopback port from the one wanted, and none twice."""
    given: set[int] = set()

    def free(wanted: int) -> int:
        for port in range(wanted, min(wanted + PORTS_TRIED, 65536)):
            if port not in given and _is_free(port):
                given.add(port)
                return port
        raise SupervisorError(f"no port from {wanted} to {wanted + PORTS_TRIED - 1} is free on {HOST}")

    return free


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


# -- running it --


async def _run(load: Callable[[], Settings], console: Console, admin_key: str) -> bool:
    """Until a signal; True if all went well. `load` reads the settings, now and at each reload; it raises ClickException."""
    settings = load()
    plan = Plan.of(settings, stored=not settings.backends and await asyncio.to_thread(_has_backends, settings))
    keyring = Keyring(plan.demo, console, admin_key)
    supervisor = Supervisor(plan.settings, tell=console.event, prepare=keyring.prepare)
    settings = supervisor.open()
    logs.setup("supervisor", stream=open_log(settings.log_path / "supervisor.log"))
    logging.getLogger("alembic").setLevel(logging.WARNING)
    sys.excepthook = sys.__excepthook__  # who runs `up` sees its errors
    supervisor.handle_signals(console.hung_up)
    try:
        if started := await supervisor.unless_stopped(_start(plan, supervisor, keyring, console)):
            await supervisor.serve(lambda: _reloaded(started, load))
    finally:
        well = await _stop(supervisor, console)
        # There is nothing left to stop: who signals once more must not spoil the status that this ends with.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    return well


def _reloaded(plan: Plan, load: Callable[[], Settings]) -> Settings:
    """What to run from now on. Raises SupervisorError."""
    try:
        return plan.with_settings(load()).settings
    except click.ClickException as error:
        raise SupervisorError(error.message) from None


async def _start(plan: Plan, supervisor: Supervisor, keyring: Keyring, console: Console) -> Plan:
    """→ the plan as far as it could be had."""
    started = time.monotonic()
    companions = await _companions(plan, console)
    if plan.phoenix_ports is not None and "phoenix" not in companions:
        plan = plan.without_phoenix()
        supervisor.amend(plan.settings)
    await supervisor.start([_child(each) for each in companions.values()])

    def progress(waiting: list[str], elapsed: float) -> None:
        console.passing(f"waiting for {', '.join(waiting)} ({elapsed:.0f} s)")

    soon = [name for name in supervisor.waiting() if name != "phoenix"]  # it takes longest, and no request needs it
    await supervisor.ready(ENGINE_TIMEOUT if plan.engines else CORE_TIMEOUT, soon, progress)
    snapshot = await _catalogue(supervisor.settings, keyring.digest, console)
    traces = await _traces(supervisor, companions.get("phoenix"), progress)
    seconds = time.monotonic() - started
    banner = Banner(supervisor.settings, plan.demo, keyring.secret, keyring.admin_secret, snapshot, traces, seconds)
    console.line("\n".join(banner.lines()))
    return plan


async def _companions(plan: Plan, console: Console) -> dict[str, Companion]:
    """Build what they need. A demo without Phoenix is still one; without a model it isn't."""
    directory = plan.settings.state_path / "env"
    companions: dict[str, Companion] = {}
    if plan.engines:
        python = await _environment(environments.ENGINE, directory, console)
        threads = threads_each(len(plan.engines), len(os.sched_getaffinity(0)))
        companions |= {name: engine(name, python, port, threads) for name, port in plan.engines.items()}
    if plan.phoenix_ports is not None:
        try:
            python = await _environment(environments.PHOENIX, directory, console)
        except environments.InstallFailed as error:
            if not plan.demo:
                raise
            console.line(f"{error}\nGoing on without Phoenix: requests are recorded, their traces go nowhere.")
        else:
            companions["phoenix"] = phoenix(python, plan.settings.state_path, *plan.phoenix_ports)
    return companions


async def _environment(recipe: environments.Recipe, directory: Path, console: Console) -> Path:
    cancelled = threading.Event()
    try:
        return await asyncio.to_thread(environments.prepare, recipe, directory, console.line, cancelled)
    finally:
        cancelled.set()


def _child(companion: Companion) -> Child:
    return Child(companion.name, Stage.COMPANION, companion.argv, companion.ready_url, companion.stop_timeout, env=companion.env)


async def _catalogue(settings: Settings, digest: bytes | None, console: Console) -> SnapshotFile:
    """What the workers know, once they know our key and a model of each backend; after a while, what they know by then."""
    started = time.monotonic()
    while True:
        snapshot = _published(settings)
        missing = without_model(snapshot, settings)
        known = digest is None or digest in snapshot.keys
        elapsed = time.monotonic() - started
        if (known and not missing and _in_use(settings, snapshot)) or elapsed > MODELS_TIMEOUT:
            return snapshot
        console.passing(f"waiting for the models of {', '.join(missing) or 'all backends'} ({elapsed:.0f} s)")
        await asyncio.sleep(0.05)


def _published(settings: Settings) -> SnapshotFile:
    try:
        return read_snapshot(settings.snapshot_path)
    except (OSError, SnapshotError):
        return SnapshotFile()


def _in_use(settings: Settings, snapshot: SnapshotFile) -> bool:
    living = [beat for beat in read_heartbeats(settings.journal_path) if beat.alive]
    return bool(living) and all(beat.snapshot_unix_ns >= snapshot.published_unix_ns for beat in living)


def without_model(snapshot: SnapshotFile, settings: Settings) -> list[str]:
    """The backends of which no model is known."""
    serving = {name for model in snapshot.models.values() for name in model.backends}
    return [name for name in map(settings.backend_name, range(len(settings.backends))) if name not in serving]


class Traces(NamedTuple):
    """Where the traces go, in words, and whether they can be looked at."""

    text: str
    seen: bool


async def _traces(supervisor: Supervisor, ours: Companion | None, progress: Callable[[list[str], float], None]) -> Traces:
    settings = supervisor.settings.phoenix
    if settings.url is None:
        return Traces("sent nowhere (phoenix.url is not set)", False)
    page = f"{project_url(settings.url, settings.project)}  (Phoenix, project {settings.project!r})"
    if ours is None:
        if await answers(f"{settings.url.rstrip('/')}/healthz"):
            return Traces(page, True)
        return Traces(f"{settings.url} doesn't answer; traces wait, and the oldest are dropped", False)
    try:
        await supervisor.ready(PHOENIX_TIMEOUT, [ours.name], progress)
    except SupervisorError as error:
        return Traces(f"Phoenix isn't up; it will be tried on\n{error}", False)
    return Traces(f"{page}\n{ours.notice}", True)


async def _stop(supervisor: Supervisor, console: Console) -> bool:
    settings = supervisor.settings
    running = sum(beat.in_flight for beat in read_heartbeats(settings.journal_path))
    console.line(
        f"stopping: {running or 'no'} request{'' if running == 1 else 's'} in flight"
        + (f", up to {settings.timeouts.drain:.0f} s to finish (Ctrl-C again: at once)" if running else "")
    )
    well = await supervisor.stop()
    console.line("stopped; every request is in the ledger" if well else f"stopped, but not well: see {settings.log_path}")
    return well


# -- the keys --


class Keyring:
    """Makes the first key and the first admin key. Keys are kept as hashes: only the demo keeps its own in a file, so that its
    command can be pasted.

    secret: the key that was made now, or the demo's. admin_secret: the admin key that was made now; one that was `given` is not
    ours to show.
    """

    def __init__(self, demo: bool, console: Console, given: str = "") -> None:
        self._demo = demo
        self._console = console
        self._given = given
        self.secret: str | None = None
        self.admin_secret: str | None = None

    @property
    def digest(self) -> bytes | None:
        return None if self.secret is None else hashlib.sha256(self.secret.encode()).digest()

    def prepare(self, settings: Settings) -> None:
        """Migrate the database; create a key if there is none (in the demo: if its own isn't there any more), and an admin key
        if there never was one. Raises SupervisorError."""
        from proxy.store import StoreError, open_database

        try:
            database = open_database(settings.database_url)
        except StoreError as error:
            raise SupervisorError(str(error)) from None
        try:
            with database.begin() as connection:
                self._find_or_create_admin(connection)
                self._find_or_create(connection, settings)
        except StoreError as error:
            raise SupervisorError(str(error)) from None
        finally:
            database.dispose()
        if self.secret is not None and not self._demo:
            self._console.line(f"created the key 'default', shown only now: {self.secret}")
        if self.admin_secret is not None:
            self._console.line(f"created the admin key {FIRST_ADMIN!r}, shown only now: {self.admin_secret}")

    def _find_or_create_admin(self, connection: Connection) -> None:
        """A given one takes the place of the one that was given before."""
        from proxy.store import (
            GLASSHOUSE,
            StoreError,
            create_admin_key,
            find_admin,
            hash_key,
            list_admin_keys,
            revoke_admin_key,
        )

        known = list_admin_keys(connection)
        if not self._given:
            if not known:
                self.admin_secret = create_admin_key(connection, FIRST_ADMIN, "admin")[0]
            return
        if find_admin(connection, hash_key(self._given), time.time_ns()) is not None:
            return
        try:
            if any(row.name == GIVEN_ADMIN and row.revoked_at is None for row in known):
                revoke_admin_key(connection, GIVEN_ADMIN, GLASSHOUSE)
            create_admin_key(connection, GIVEN_ADMIN, "admin", secret=self._given)
        except StoreError as error:
            raise SupervisorError(f"{KEY_VARIABLE}: {error}") from None

    def _find_or_create(self, connection: Connection, settings: Settings) -> None:
        from proxy.store import create_key, find_key, holder, list_keys, revoke_key

        if not self._demo:
            if not any(key.hash for key in settings.keys.values()) and not list_keys(connection, limit=1):
                self.secret = create_key(connection, "default")[0]
            return
        file = settings.state_path / "demo-key"
        with contextlib.suppress(FileNotFoundError):
            self.secret = file.read_text().strip()
        if self.digest is not None and holder(connection, self.digest, time.time_ns()) is not None:
            return
        name = "default" if find_key(connection, "default") is None else "demo"
        if find_key(connection, name) is not None:
            revoke_key(connection, name)
        self.secret = create_key(connection, name)[0]
        file.unlink(missing_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(f"{self.secret}\n")


# -- what people see --


@dataclass(frozen=True)
class Banner:
    """All of it as text; `click` takes the styles out where there is no terminal."""

    settings: Settings
    demo: bool
    secret: str | None
    admin_secret: str | None
    snapshot: SnapshotFile
    traces: Traces
    seconds: float

    def lines(self) -> Iterator[str]:
        settings = self.settings
        yield ""
        yield click.style(f"Glasshouse {__version__} is up", bold=True) + f" after {self.seconds:.1f} s."
        yield ""
        yield _fact("proxy", self._proxy())
        yield _fact("models", ", ".join(self.snapshot.models) or "none known yet")
        for index, backend in enumerate(settings.backends):
            yield _fact("" if index else "backends", self._backend(settings.backend_name(index), backend.url))
        if settings.redis is not None:
            workers = f"{settings.workers} workers" if settings.workers > 1 else "one worker"
            yield _fact("limits", f"of {workers}, shared through {settings.redis.shown}")
        yield _fact("traces", self.traces.text)
        yield _fact("metrics", f"http://{settings.metrics.listen}/metrics")
        yield _fact("control", self.control_url)
        yield _fact("state", f"{settings.state_path}  (logs in log/)")
        yield ""
        if self.demo:
            yield "  This is the demo: the prices are examples, and prompts and answers are kept in the traces."
            yield ""
        yield from self._commands()

    def _proxy(self) -> str:
        host, port = address(self.settings.listen)
        everywhere = host in ("0.0.0.0", "::")  # noqa: S104  compared, not bound
        return self.base_url + (f"  (port {port} of every interface)" if everywhere else "")

    @property
    def base_url(self) -> str:
        return f"{_url('http' if self.settings.tls is None else 'https', self.settings.listen)}/v1"

    @property
    def control_url(self) -> str:
        return _url("http", self.settings.control.listen)

    def _backend(self, name: str, url: str) -> str:
        if name in without_model(self.snapshot, self.settings):
            return f"{name}  {url}  no model known: it doesn't answer, or wants a key (api_key_env)"
        known = self.snapshot.backends.get(name)
        return f"{name}  {url}" + (f"  ({known.kind})" if known else "")

    def _commands(self) -> Iterator[str]:
        key = self.secret or "$OPENAI_API_KEY"
        if self.secret is None:
            yield f"  Use a key that you have, or make one: {own_command()} keys create NAME"
            yield ""
            yield f"  export OPENAI_BASE_URL={self.base_url}"
        else:
            yield f"  export OPENAI_BASE_URL={self.base_url} OPENAI_API_KEY={self.secret}"
        yield ""
        model = next(iter(self.snapshot.models), "MODEL")
        question = [{"role": "user", "content": "Name three things that float."}]
        body = msgspec.json.encode({"model": model, "stream": True, "messages": question}).decode()
        yield "  Ask something; the answer streams:"
        yield ""
        yield f"  curl -N {self.base_url}/chat/completions \\"
        yield f'    -H "Authorization: Bearer {key}" -H "Content-Type: application/json" \\'
        yield f"    -d {shlex.quote(body)}"
        yield ""
        yield f"  Then look: {'at the trace (the link above) and ' if self.traces.seen else ''}`{own_command()} usage`."
        if self.admin_secret is not None:
            yield ""
            yield f"  `{own_command()}` manages keys, teams, models, budgets, and needs no key for it here. From elsewhere:"
            yield ""
            yield f"  export {URL_VARIABLE}={self.control_url} {KEY_VARIABLE}={self.admin_secret}"
            yield f'  curl "${URL_VARIABLE}/keys" -H "Authorization: Bearer ${KEY_VARIABLE}"'
            yield ""
        yield "  Ctrl-C stops everything."


def own_command() -> str:
    """This program as it can be typed here: by its name if that is on the PATH, by its path otherwise."""
    program = Path(sys.argv[0])
    found = shutil.which(program.name)
    if program.name == "__main__.py" or (found is not None and Path(found).samefile(program)):
        return "glasshouse"
    return str(program)


def _url(scheme: str, listen: str) -> str:
    """Of what listens there, for who is on this machine."""
    host, port = address(listen)
    host = {"0.0.0.0": HOST, "::": "::1"}.get(host, host)  # noqa: S104  compared, not bound
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _fact(name: str, text: str) -> str:
    first, *more = text.split("\n")
    return "\n".join([f"  {click.style(f'{name:<9}', bold=True)} {first}", *(f"            {line}" for line in more)])


class Console:
    """Lines for people. On a terminal a passing line is overwritten by the next one; elsewhere few of them are shown.

    Nobody has to read on: a closed terminal or pipe stops nothing.
    """

    QUIET_SECONDS = 5.0
    FRESH = "\r\x1b[K"

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self.terminal = self._stream.isatty()
        self._last = time.monotonic()

    def hung_up(self) -> bool:
        """It was a terminal, and the terminal is gone."""
        return self.terminal and not self._stream.isatty()

    def line(self, text: str) -> None:
        self._write(f"{self.FRESH if self.terminal else ''}{text}\n")

    def event(self, text: str) -> None:
        self.line(f"{time.strftime('%H:%M:%S')}  {text}")

    def passing(self, text: str) -> None:
        if self.terminal:
            self._write(f"{self.FRESH}{text}")
        elif time.monotonic() - self._last >= self.QUIET_SECONDS:
            self._last = time.monotonic()
            self._write(f"{text}\n")

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            click.echo(text, file=self._stream, nl=False)
