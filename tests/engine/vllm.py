"""A real vLLM on CPUs: one server in a process group of its own, which ends with whoever started it."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Self
from urllib.request import ProxyHandler, build_opener

from prometheus_client.parser import text_string_to_metric_families

from proxy.embedded import HOST, sealed_environment
from tests.engine.environment import Prepared, Say
from tests.support.glasshouse import Samples
from tests.support.wire_client import ask

START_SECONDS: Final = 300.0
PATIENCE: Final = 60.0
NAME: Final = "smollm2"
"""Of either model, as its clients call it: that of the captured requests."""
CONTEXT: Final = 1024
CACHE_BLOCK: Final = 32
"""Tokens of a prompt that are cached together; what is left over never is. The smallest that vLLM takes on CPUs."""

_GUARD: Final = Path(__file__).with_name("guard.py")
_direct = build_opener(ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class Kind:
    """What is served, and how many requests at once; the others wait in the engine."""

    model: str
    threads: int
    arguments: tuple[str, ...]
    requests: int = 8
    names: tuple[str, ...] = (NAME,)
    """As its clients call it."""
    context: int = CONTEXT


TINY: Final = Kind("tiny", 1, ("--load-format=dummy", "--dtype=float32"))
POOLING: Final = Kind("tiny", 1, (*TINY.arguments, "--runner=pooling", "--convert=embed"))
"""Generates nothing: embeddings, and scores made of them."""
SMOLLM2: Final = Kind("smollm2", 2, ("--dtype=bfloat16",))


class Counts(NamedTuple):
    """What an engine has counted since its start. Prompts count once for each of their choices."""

    prompt: int
    cached: int
    generated: int
    finished: int
    """Choices that came to their end."""

    def __sub__(self, other: Counts) -> Counts:  # a difference, where a tuple has none
        return Counts(*(mine - theirs for mine, theirs in zip(self, other, strict=True)))


class Engine:
    """`name` is for people. `traces`: where its spans go (OTLP over HTTP). `directory` keeps its log and vLLM's own caches."""

    def __init__(self, name: str, kind: Kind, prepared: Prepared, directory: Path, traces: str, say: Say) -> None:
        self.name = name
        self.kind = kind
        self.port = _free_port()
        self.log = directory / f"{name}-{self.port}.log"
        self._prepared = prepared
        self._say = say
        self._environment = sealed_environment(
            VLLM_NO_USAGE_STATS="1",
            VLLM_HOST_IP=HOST,
            VLLM_CPU_KVCACHE_SPACE="1",  # GiB; it takes whole ones only
            VLLM_CPU_OMP_THREADS_BIND="nobind",
            VLLM_CACHE_ROOT=str(directory / "vllm"),
            VLLM_CONFIG_ROOT=str(directory / "vllm"),
            OMP_NUM_THREADS=str(kind.threads),
            HF_HUB_OFFLINE="1",
            TRANSFORMERS_OFFLINE="1",
            OTEL_EXPORTER_OTLP_TRACES_PROTOCOL="http/protobuf",
            OTEL_BSP_SCHEDULE_DELAY="200",
            OTEL_SERVICE_NAME=name,
        )
        self._traces = traces
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self.ending = False
        """Somebody has ended it; it may take its time."""

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    # -- life --

    def start(self) -> Self:
        self.ending = False
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.log.parent,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        guard = (sys.executable, "-I", str(_GUARD), str(self._process.pid))
        self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True)
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def _command(self) -> tuple[str, ...]:
        """Politely: whoever shares the cores comes first."""
        model = self._prepared.models / self.kind.model
        return (
            *("nice", "-n", "10", str(self._prepared.python), "-P", "-m", "vllm.entrypoints.openai.api_server"),
            *(f"--model={model}", "--served-model-name", *self.kind.names),
            *(f"--host={HOST}", f"--port={self.port}", *self.kind.arguments),
            *(f"--max-model-len={self.kind.context}", f"--block-size={CACHE_BLOCK}", f"--max-num-seqs={self.kind.requests}"),
            *("--enforce-eager", "--enable-per-request-metrics", "--enable-prompt-tokens-details"),
            f"--otlp-traces-endpoint={self._traces}",
        )

    def _wait_ready(self) -> None:
        started = told = time.monotonic()
        while not self._healthy():
            now = time.monotonic()
            if not self.running:
                raise AssertionError(f"{self.name} ended while it started\n{self.last_words()}")
            if now - started > START_SECONDS:
                raise AssertionError(f"{self.name} wasn't ready after {START_SECONDS:.0f} s\n{self.last_words()}")
            if now - told >= 10:
                told = now
                self._say(f"{self.name}: starting, {now - started:.0f} s")
            time.sleep(0.1)
        self._say(f"{self.name}: {self.kind.model} ready after {time.monotonic() - started:.0f} s")

    def _healthy(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException), _direct.open(f"{self.url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
        return False

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def terminate(self) -> None:
        """SIGTERM, as whoever runs it would send it."""
        assert self._process is not None
        self.ending = True
        self._process.terminate()

    def kill_core(self) -> None:
        """SIGKILL to the process that generates, as the kernel does when memory runs out. The server stays for a moment."""
        self.ending = True
        os.kill(self._core(), signal.SIGKILL)

    def kill(self) -> None:
        """SIGKILL to all of it."""
        assert self._process is not None
        self.ending = True
        os.killpg(self._process.pid, signal.SIGKILL)

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        """It answers, as far as its server can, and generates nothing."""
        core = self._core()
        os.kill(core, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(core, signal.SIGCONT)

    def _core(self) -> int:
        (core,) = (pid for pid, title in self._group().items() if title.startswith("VLLM::EngineCore"))
        return core

    def stop(self) -> None:
        """Nothing of it is left afterwards."""
        if self._process is None or self._guard is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._guard.communicate()  # which kills what is left
        self._process.wait()
        wait_until(lambda: not self._group(), f"{self.name} to be gone")
        self._process = self._guard = None

    @property
    def pids(self) -> list[int]:
        """All of its processes."""
        return list(self._group())

    @property
    def generating(self) -> list[int]:
        """Those of its processes that compute, and ask each other without a pause whether there is something to do."""
        return [pid for pid, title in self._group().items() if title.startswith("VLLM::")]

    def _group(self) -> dict[int, str]:
        """Its processes: id → title."""
        assert self._process is not None
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdecimal():
                    state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                    if int(group) == self._process.pid and state not in "ZX":
                        found[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace")
        return found

    def last_words(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])

    # -- what it says --

    def metrics(self) -> Samples:
        with _direct.open(f"{self.url}/metrics", timeout=PATIENCE) as answer:
            text = answer.read().decode()
        return Samples(sample for family in text_string_to_metric_families(text) for sample in family.samples)

    def wait_quiet(self) -> None:
        """Until it works on nothing."""
        wait_until(lambda: self.running_and_waiting() == (0, 0), f"{self.name} to be idle")

    def running_and_waiting(self) -> tuple[int, int]:
        """Choices that it generates, and those that wait for their turn."""
        samples = self.metrics()
        return int(samples.total("vllm:num_requests_running")), int(samples.total("vllm:num_requests_waiting"))

    def counts(self) -> Counts:
        """Of an engine that works on nothing, and counts no more: what it has just been told may not be seen yet."""
        before = self._read_counts()
        while True:
            self.wait_quiet()
            time.sleep(0.1)
            if (now := self._read_counts()) == before:
                return now
            before = now

    def _read_counts(self) -> Counts:
        samples = self.metrics()
        return Counts(
            int(samples.total("vllm:prompt_tokens_total")),
            int(samples.total("vllm:prompt_tokens_cached_total")),
            int(samples.total("vllm:generation_tokens_total")),
            int(samples.total("vllm:request_success_total")),
        )

    def tokenize(self, what: Mapping[str, Any]) -> int:
        """How long a prompt is (`{"prompt": ...}` or `{"messages": ...}`), as the engine counts it."""
        reply = ask(self.url, "/tokenize", {"model": NAME, **what})
        count: int = reply.json()["count"]
        return count


def wait_until(look: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain for {what}"
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


class Engines:
    """The engines of a test run: started when first asked for, used by all tests, started again after a test that ended one."""

    def __init__(self, prepared: Prepared, directory: Path, traces: str, say: Say) -> None:
        self._prepared = prepared
        self._directory = directory
        self._traces = traces
        self._say = say
        self._started: dict[str, Engine] = {}

    def get(self, name: str, kind: Kind) -> Engine:
        engine = self._started.get(name)
        if engine is not None and engine.running and not engine.ending:
            return engine
        if engine is not None:
            engine.stop()
        made = self._started[name] = Engine(name, kind, self._prepared, self._directory, self._traces, self._say)
        return made.start()

    def stop(self) -> None:
        for engine in self._started.values():
            engine.stop()
