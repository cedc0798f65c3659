"""The scripted server itself: its options, its counters, its life, and what a test can do to it while it runs.

It runs in a thread with an event loop of its own. The counters may be read from any thread; `wait` blocks a test until
they say what it expects, so that no test needs a sleep.
"""

from __future__ import annotations

import asyncio
import email.utils
import ssl
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

import uvloop

from tests.support.scripted_vllm import requests
from tests.support.scripted_vllm.answers import Received
from tests.support.scripted_vllm.connection import Connection
from tests.support.scripted_vllm.requests import Asked
from tests.support.scripted_vllm.script import Script


class ScriptedVLLM:
    """`with ScriptedVLLM() as vllm:` is a vLLM at `vllm.url`.

    models: the names that it serves; another one is a 404.
    default: the script of requests that bring none.
    keep_alive: seconds after which an idle connection is closed, as uvicorn does.
    api_key: what `Authorization: Bearer` must say below /v1.
    capacity: more generations than this at once are refused with vLLM's 503.
    request_id_headers: as `--enable-request-id-headers`.
    tls: speak it.
    remember: keep every request in `requests`; off where millions come.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        models: Iterable[str] = ("smollm2",),
        default: Script | None = None,
        keep_alive: float = 5.0,
        api_key: str | None = None,
        capacity: int | None = None,
        request_id_headers: bool = False,
        max_model_len: int = 1024,
        tls: ssl.SSLContext | None = None,
        remember: bool = True,
    ) -> None:
        self.host = host
        self.port = port
        self.models = tuple(models)
        self.default = default or Script()
        self.keep_alive = keep_alive
        self.capacity = capacity
        self.request_id_headers = request_id_headers
        self.max_model_len = max_model_len
        self.tls = tls
        self.authorization = None if api_key is None else f"Bearer {api_key}".encode()

        self.remember = remember
        self.well = True
        """As /health says; with a dead engine vLLM's says 503."""

        self.requests: list[Received] = []
        self.aborted: list[Received] = []
        """Those whose client left before the end."""
        self.in_flight = 0
        """Requests whose answer has begun or is to come, and isn't complete."""
        self.connections = 0
        """Connections accepted since the start."""
        self.generated_tokens = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.started_unix_s = round(time.time(), 2)
        self.finished: Counter[str] = Counter()
        """Finished sequences by finish reason; aborted ones are in none, as in vLLM."""

        self.open: set[Connection] = set()
        self._next: deque[Script] = deque()
        self._hung: set[Connection] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: asyncio.Server | None = None
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        self._waiters = 0
        self._date = (0, b"")

    # --- from the test's thread ---

    @property
    def url(self) -> str:
        return f"http{'' if self.tls is None else 's'}://{self.host}:{self.port}"

    @property
    def open_connections(self) -> int:
        return len(self.open)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Serve from a thread of its own. Raises RuntimeError when the port is taken."""
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="scripted-vllm", daemon=True)
        self._thread.start()
        ready.wait()
        if self._server is None:
            raise RuntimeError(f"could not listen on {self.host}:{self.port}")

    def stop(self) -> None:
        """Reset every connection and end the thread. Harmless when it has ended already."""
        if self._thread is None or self._loop is None:
            return
        self._call(self._close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._thread = self._loop = None

    def wait(self, condition: Callable[[], object], timeout: float = 10.0) -> None:
        """Until the condition over this server's attributes holds. Raises TimeoutError."""
        with self._changed:
            self._waiters += 1
            try:
                if not self._changed.wait_for(lambda: bool(condition()), timeout):
                    raise TimeoutError(f"waited {timeout:g} s in vain; {self.in_flight} requests in flight")
            finally:
                self._waiters -= 1

    def wait_idle(self, timeout: float = 10.0) -> None:
        """Until nothing is in flight."""
        self.wait(lambda: not self.in_flight, timeout)

    def fail_next(self, times: int = 1, script: Script | None = None) -> None:
        """The next requests for generation follow this script, whatever theirs says; default: status 500."""
        self._next.extend([script or Script(status=500)] * times)

    def release(self) -> None:
        """Everything that hangs goes on."""
        self._call(self._release)

    def refuse(self) -> None:
        """Stop listening: new connections are refused, open ones stay."""
        self._call(self._stop_listening)

    def accept(self) -> None:
        """Listen again, on the same port."""
        assert self._loop is not None
        asyncio.run_coroutine_threadsafe(self.listen(), self._loop).result()

    def drop(self) -> None:
        """Reset every open connection at once, as the death of the process does."""
        self._call(self._drop)

    def _call(self, function: Callable[[], None]) -> None:
        """Run it in the server's loop, and wait until it has run."""

        async def call() -> None:
            function()

        assert self._loop is not None
        asyncio.run_coroutine_threadsafe(call(), self._loop).result()

    # --- in the server's loop ---

    def _run(self, ready: threading.Event) -> None:
        self._loop = loop = uvloop.new_event_loop()
        try:
            try:
                loop.run_until_complete(self.listen())
            except OSError:
                return
            finally:
                ready.set()
            loop.run_forever()
            loop.run_until_complete(asyncio.sleep(0))  # connections that were just reset say goodbye
        finally:
            loop.close()

    async def listen(self) -> None:
        """Serve in the running loop; for a process of its own."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Connection(self), self.host, self.port, reuse_address=True, backlog=2048, ssl=self.tls
        )
        self.port = self._server.sockets[0].getsockname()[1]

    def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()

    def _close(self) -> None:
        self._stop_listening()
        self._drop()

    def _drop(self) -> None:
        for connection in list(self.open):
            connection.reset()

    def _release(self) -> None:
        hung, self._hung = self._hung, set()
        for connection in hung:
            connection.advance()

    def hold(self, connection: Connection) -> None:
        self._hung.add(connection)
        self.notify()

    def forget(self, connection: Connection) -> None:
        self.open.discard(connection)
        self._hung.discard(connection)
        self.notify()

    def notify(self) -> None:
        """Something changed that a test may be waiting for."""
        if self._waiters:
            with self._changed:
                self._changed.notify_all()

    def scripted(self, body: Asked) -> Script:
        return self._next.popleft() if self._next else requests.script_of(body, self.default)

    def date(self, now: int) -> bytes:
        if self._date[0] != now:
            self._date = (now, email.utils.formatdate(now, usegmt=True).encode())
        return self._date[1]

    def metrics(self) -> bytes:
        """The counters that a proxy's accounting can be checked against, in vLLM's exposition format."""
        rows = [
            ("num_requests_running", "gauge", "Number of requests in model execution batches.", "", self.in_flight),
            ("num_requests_waiting", "gauge", "Number of requests waiting to be processed.", "", 0),
            ("kv_cache_usage_perc", "gauge", "KV-cache usage. 1 means 100 percent usage.", "", 0),
            ("prefix_cache_queries_total", "counter", "Prefix cache queries, in tokens.", "", self.prompt_tokens),
            ("prefix_cache_hits_total", "counter", "Prefix cache hits, in tokens.", "", self.cached_tokens),
            ("prompt_tokens_total", "counter", "Number of prefill tokens processed.", "", self.prompt_tokens),
            ("generation_tokens_total", "counter", "Number of generation tokens processed.", "", self.generated_tokens),
        ]
        for reason in ("stop", "length", "abort", "error", "repetition"):
            more = f',finished_reason="{reason}"'
            about = "Count of successfully processed requests."
            rows.append(("request_success_total", "counter", about, more, self.finished[reason]))
        lines: list[str] = []
        for name, kind, about, more, value in rows:
            header = [f"# HELP vllm:{name} {about}", f"# TYPE vllm:{name} {kind}"]
            lines += header if header[0] not in lines else []
            lines.append(f'vllm:{name}{{engine="0"{more},model_name="{self.models[0]}"}} {float(value)}')
        started = "process_start_time_seconds"
        lines += [f"# HELP {started} Start time of the process since unix epoch in seconds.", f"# TYPE {started} gauge"]
        lines.append(f"{started} {self.started_unix_s}")
        return "\n".join([*lines, ""]).encode()
