"""One data-plane worker in a process of its own: no control process, no collector, no database.

    with Worker([vllm.url], directory=tmp_path) as worker:
        ask(worker.url, "/v1/chat/completions", {...}, key=worker.key)
        [record] = worker.records(1)

It is the worker that `glasshouse up` runs, with a catalogue that the test wrote and a journal that the test reads. A bug that it
logged, or an end that wasn't clean, fails the test.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from urllib.parse import urlsplit

import msgspec

from proxy.control.declared import Declared
from proxy.exchange import Record, decode_record
from proxy.journal import Checkpoint, Content, Heartbeat, Tail, decode_content, read_heartbeats
from proxy.journal.reader import read_frames
from proxy.journal.segment import HEADER_BYTES
from proxy.settings import Settings
from proxy.snapshot import Backend, Model, SnapshotFile, write_snapshot
from proxy.snapshot.model import encode_principal
from tests.support.wire_client import Reply, WireClient, ask, request

ROOT: Final = Path(__file__).parents[2]
PATIENCE: Final = 30.0
KEY: Final = "gh-test"
MODEL: Final = "smollm2"
CHAT: Final = "/v1/chat/completions"
DEFAULTS: Final[Mapping[str, Any]] = {"phoenix": {"url": None}, "journal": {"segment_bytes": 1024 * 1024}}
PICO_INPUT, PICO_CACHED, PICO_OUTPUT = 100_000, 20_000, 400_000
"""What a token of every model here costs."""

T = TypeVar("T")


def chat(script: Mapping[str, Any] | None = None, *, stream: bool = True, **more: Any) -> dict[str, Any]:
    """A chat request's body. `script`: what the scripted engine does with it; `more`: further fields."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "stream": stream}
    return {**body, **({"script": script} if script else {}), **more}


def backend(url: str, name: str = "b0", kind: str = "vllm", **more: Any) -> Backend:
    """The catalogue's entry for a server at `url`."""
    parts = urlsplit(url)
    more.setdefault("tls", parts.scheme == "https")
    return Backend(name, parts.hostname or "", parts.port or 80, kind, parts.path.rstrip("/"), **more)


@contextmanager
def deaf_host() -> Iterator[str]:
    """A URL at which connecting takes for ever: a listener whose queue is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listening, ExitStack() as queue:
        for _ in range(4):
            waiting = queue.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listening.getsockname())
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


class Worker:
    """`python -m proxy.worker` on a free port, until the end of the `with` block.

    backends: URLs (named b0, b1, ...), or entries of the catalogue. Every model is on all of them.
    config: settings, as in the configuration file; what they declare is for keys named `name 0` (`KEY`), `name 1`, ...
    keys: keys that it knows, besides `KEY`.
    snapshot: False: start without a catalogue; `publish` makes one.
    files: soft and hard limit of its file descriptors.
    """

    def __init__(
        self,
        backends: Iterable[str | Backend] = (),
        config: Mapping[str, Any] | None = None,
        *,
        directory: Path,
        models: Iterable[str] = (MODEL,),
        keys: Iterable[str] = (),
        env: Mapping[str, str] | None = None,
        snapshot: bool = True,
        files: tuple[int, int] | None = None,
    ) -> None:
        self.key = KEY
        self._directory = directory
        self.backends = [each if isinstance(each, Backend) else backend(each, f"b{i}") for i, each in enumerate(backends)]
        self.models = list(models)
        self.keys = [KEY, *keys]
        self.settings = Settings.of({**DEFAULTS, **(config or {}), "state_dir": str(directory)})
        self._publish = snapshot
        self._files = files
        self._env = {**os.environ, **(env or {}), "PYTHONPATH": str(ROOT)}
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        self._revision = 0
        self._checkpoint = Checkpoint()
        self._records: list[Record] = []

    # -- life --

    def start(self) -> Self:
        self._directory.mkdir(parents=True, exist_ok=True)
        file = self._directory / "settings.json"
        self.settings.write(file)
        if self._publish:
            self.publish()
        with socket.create_server(("127.0.0.1", 0), backlog=1024) as listening, self._log_path.open("ab") as output:
            self._port = listening.getsockname()[1]
            command = [sys.executable, "-P", "-W", "error", "-m", "proxy.worker", "--settings", str(file)]
            self._process = subprocess.Popen(
                [*command, "--fd", str(listening.fileno())],
                pass_fds=[listening.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._env,
                preexec_fn=None if self._files is None else partial(resource.setrlimit, resource.RLIMIT_NOFILE, self._files),
            )
        try:
            self.until(lambda: self._beats() or None, "its first heartbeat")
        except BaseException:
            self.kill()
            raise
        return self

    def stop(self) -> None:
        """SIGTERM; it must end well."""
        process = self._process
        if process is None:
            return
        process.terminate()
        self.wait_exit()

    def terminate(self) -> None:
        """SIGTERM, without waiting."""
        if self._process is not None:
            self._process.terminate()

    def wait_exit(self) -> None:
        """Until it has ended, of which it must have been told; its log must tell of no bug."""
        process, self._process = self._process, None
        if process is None:
            raise AssertionError("it isn't running")
        try:
            status = process.wait(self.settings.timeouts.drain + PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise self.failure("it did not end") from None
        if status != 0:
            raise self.failure(f"it ended with status {status}")
        if bugs := [line for line in self.log() if line.get("level") in ("error", "critical") or "exception" in line]:
            raise self.failure(f"it logged {bugs[0].get('message')}")

    def kill(self) -> None:
        """SIGKILL."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.kill()
            error.add_note("\n".join(self._last_lines()))
        else:
            self.stop()

    # -- what it is told --

    def publish(self, **more: Any) -> None:
        """Write the catalogue as `backends`, `models` and `keys` have it now. `more`: other fields of the snapshot."""
        self._revision += 1
        names = tuple(each.name for each in self.backends)
        declared = Declared(self.settings)
        cards = {name: b'{"id":%b,"object":"model"}' % json.dumps(name).encode() for name in self.models}
        models = {name: Model(name, names, PICO_INPUT, PICO_CACHED, PICO_OUTPUT, card) for name, card in cards.items()}
        principals = {
            hashlib.sha256(key.encode()).digest(): encode_principal(declared.principal(f"key_{i}", f"name {i}"))
            for i, key in enumerate(self.keys)
        }
        file = SnapshotFile(
            revision=self._revision,
            published_unix_ns=time.time_ns(),
            keys=principals,
            models=models,
            backends={each.name: each for each in self.backends},
            everyone=declared.everyone,
            teams=declared.teams,
            users=declared.users,
            projects=declared.projects,
            cache_secret=bytes(range(32)),
        )
        write_snapshot(self.settings.snapshot_path, msgspec.structs.replace(file, **more))
        if self._process is not None:
            published = file.published_unix_ns
            self.until(lambda: self.heartbeat().snapshot_unix_ns >= published or None, "the new catalogue")

    # -- what it is asked --

    def ask(self, body: object = None, path: str = CHAT, *, headers: dict[str, str] | None = None, key: str = KEY) -> Reply:
        """One request on a connection of its own, and its whole answer."""
        return ask(self.url, path, body, key=key, headers=headers)

    def begin(self, body: object = None, path: str = CHAT, *, headers: dict[str, str] | None = None, **client: Any) -> WireClient:
        """A client that has sent a request and read nothing yet."""
        begun = WireClient(self.url, **client)
        begun.send(request(path, body, key=KEY, headers=headers))
        return begun

    # -- what it says --

    @property
    def url(self) -> str:
        return f"http{'' if self.settings.tls is None else 's'}://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        if self._process is None:
            raise AssertionError("it isn't running")
        return self._process.pid

    @property
    def rss_bytes(self) -> int:
        """Resident memory now."""
        return self._status("VmRSS")

    @property
    def peak_rss_bytes(self) -> int:
        """Resident memory at its highest so far."""
        return self._status("VmHWM")

    @property
    def open_files(self) -> int:
        """Its file descriptors now."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    @property
    def open_sockets(self) -> int:
        """Of its file descriptors those that aren't files: its journal opens and closes some of those by itself."""
        count = 0
        for link in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                count += str(link.readlink()).startswith("socket:")
        return count

    def records(self, minimum: int = 0) -> list[Record]:
        """The closing records, in the order of the journal, once there are so many; never more than were asked for."""
        found = self.until(lambda: self._enough(minimum), f"{minimum} records")
        if minimum and len(found) > minimum:
            raise self.failure(f"{len(found)} records where {minimum} were expected")
        return found

    def record(self) -> Record:
        """The one closing record."""
        [record] = self.records(1)
        return record

    def record_of(self, reply: Reply) -> Record:
        """The closing record of this answer."""
        identity = bytes.fromhex(reply.header("x-request-id") or "")
        return self.until(lambda: self._find(identity), f"the record of {identity.hex()}")

    def open_records(self) -> list[Record]:
        """The last words, opening or progress records, of requests that haven't ended."""
        self._poll()
        return [decode_record(payload) for ids in self._checkpoint.open.values() for payload in ids.values()]

    def contents(self) -> dict[bytes, Content]:
        """Captured prompts and answers by request id."""
        return dict(map(decode_content, _frames(self.settings.content_path)))

    def journaled(self) -> list[bytes]:
        """All that stands in its journal, record by record, as it was written."""
        return _frames(self.settings.journal_path)

    def heartbeat(self) -> Heartbeat:
        """What it said last."""
        return self._beats()[-1]

    def until_in_flight(self, requests: int) -> None:
        """Until the heartbeat says that so many requests are in flight."""
        self.until(lambda: self.heartbeat().in_flight == requests or None, f"{requests} requests in flight")

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._log_path.read_text().splitlines() if line.startswith("{")]

    def failure(self, what: str) -> AssertionError:
        return AssertionError("\n".join([what, *self._last_lines()]))

    def until(self, look: Callable[[], T | None], what: str, timeout: float = PATIENCE) -> T:
        """The first thing that `look` finds that isn't None. Raises AssertionError with the log."""
        deadline = time.monotonic() + timeout
        while (found := look()) is None:
            if self._process is not None and self._process.poll() is not None:
                raise self.failure(f"it ended with status {self._process.returncode} while waiting for {what}")
            if time.monotonic() > deadline:
                raise self.failure(f"waited {timeout:.0f} s in vain for {what}")
            time.sleep(0.005)
        return found

    # -- inside --

    @property
    def _log_path(self) -> Path:
        return self._directory / "worker.log"

    def _status(self, name: str) -> int:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))

    def _last_lines(self) -> list[str]:
        return ["--- worker", *self._log_path.read_text(errors="replace").splitlines()[-15:]]

    def _beats(self) -> list[Heartbeat]:
        return read_heartbeats(self.settings.journal_path)

    def _enough(self, minimum: int) -> list[Record] | None:
        self._poll()
        return self._records if len(self._records) >= minimum else None

    def _find(self, identity: bytes) -> Record | None:
        self._poll()
        return next((record for record in self._records if record.id == identity), None)

    def _poll(self) -> None:
        more = True
        while more:
            batch = Tail(self.settings.journal_path).poll(self._checkpoint)
            if batch.corrupt:
                raise self.failure(f"a damaged journal: {batch.corrupt[0]}")
            self._records += batch.records
            self._checkpoint, more = batch.checkpoint, batch.more


def _frames(journal: Path) -> list[bytes]:
    found: list[bytes] = []
    for path in sorted(journal.glob("*.seg")):
        fd = os.open(path, os.O_RDONLY)
        try:
            payloads, _, _ = read_frames(fd, HEADER_BYTES)
        finally:
            os.close(fd)
        found += payloads
    return found
