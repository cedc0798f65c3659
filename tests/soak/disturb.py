"""What is done to a Glasshouse while it works: reloads, deaths, engines that come and go, keys that are made and revoked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Self

from tests.bench.processes import free_port, wait_for_port
from tests.soak.clients import Key, Keys
from tests.soak.exact import Disturbances
from tests.support.glasshouse import ROOT, Glasshouse
from tests.support.worker import MODEL

KNOWN_AFTER_S: Final = 3.0
"""A key that was made or revoked is one or none for every worker after this time; two seconds are promised."""
MOST_KEYS: Final = 6


class Engine:
    """A scripted vLLM in a process of its own, on a port that it keeps."""

    def __init__(self) -> None:
        self._port = free_port()
        self._restarts = 0
        self._start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.support.scripted_vllm",
                "--port",
                str(self._port),
                "--model",
                MODEL,
                "--exit-with-stdin",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            cwd=ROOT,
        )
        wait_for_port(self._port, self._process)

    def restart(self) -> None:
        """By SIGTERM and SIGKILL in turn."""
        self._restarts += 1
        self._process.send_signal(signal.SIGTERM if self._restarts % 2 else signal.SIGKILL)
        self._process.communicate()
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


class Disturber:
    """`run` does what is due, one thing after another, until it is `over`. `done` counts what was done."""

    def __init__(self, glasshouse: Glasshouse, engines: list[Engine], keys: Keys, seconds: float) -> None:
        self.disturbances = Disturbances()
        self.done: dict[str, int] = {}
        self.broken: list[BaseException] = []
        self.over = threading.Event()
        self._glasshouse = glasshouse
        self._engines = engines
        self._keys = keys
        self._number = 0
        self._thread = threading.Thread(target=self._run, args=(_plan(self, seconds),))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._thread.join()

    def _run(self, plan: list[tuple[float, str, Callable[[], None]]]) -> None:
        began = time.monotonic()
        try:
            for due, name, act in plan:
                if self.over.wait(max(0.0, began + due - time.monotonic())):
                    return
                act()
                self.done[name] = self.done.get(name, 0) + 1
        except BaseException as error:
            self.broken.append(error)
            self.over.set()

    # -- what there is to do --

    def reload(self) -> None:
        with self._during(self.disturbances.reloads):
            self._command("reload")
            self._glasshouse.wait_ready()

    def kill_worker(self) -> None:
        with self._during(self.disturbances.worker_kills):
            pid = max(self._glasshouse.pids()["worker"])
            os.kill(pid, signal.SIGKILL)
            self._glasshouse.wait_replaced("worker", pid)
            self._glasshouse.wait_ready()

    def kill_collector(self) -> None:
        pid = self._glasshouse.kill("collector")
        self._glasshouse.wait_replaced("collector", pid)
        self._glasshouse.wait_ready()

    def restart_engine(self) -> None:
        self._number += 1
        with self._during(self.disturbances.engine_restarts):
            self._engines[self._number % len(self._engines)].restart()

    def change_keys(self) -> None:
        """Make one, or revoke the oldest but the first. Names come again, as those of services do."""
        working = self._keys.working
        if len(working) < MOST_KEYS:
            self._number += 1
            secret = self._command("keys", "create", f"key {len(working)}").strip()
            self.over.wait(KNOWN_AFTER_S)
            working.append(Key(secret))
            return
        key = working.pop()
        key.revoked = True
        self._command("keys", "revoke", f"key {len(working)}")
        self.over.wait(KNOWN_AFTER_S)
        self._keys.revoked.append(key)

    @contextmanager
    def _during(self, spans: list[tuple[float, float]]) -> Iterator[None]:
        """It lasts until the plane is as it was, and a moment longer: others have yet to find out."""
        began = time.monotonic()
        spans.append((began, float("inf")))
        try:
            yield
        finally:
            spans[-1] = (began, time.monotonic() + 1.0)

    def _command(self, *words: str) -> str:
        """`glasshouse ...`, as people call it; what it said."""
        config = str(self._glasshouse.state_dir / "config.yaml")
        done = subprocess.run(
            [sys.executable, "-P", "-m", "proxy.cli", *words, "--config", config],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            check=False,
            text=True,
            timeout=300,
        )
        if done.returncode:
            raise RuntimeError(f"glasshouse {' '.join(words)}: {done.stderr}")
        return done.stdout


def _plan(disturber: Disturber, seconds: float) -> list[tuple[float, str, Callable[[], None]]]:
    """(when, what, how). The last third is without deaths and reloads: whoever lives then has time to show that it grows."""
    lively = seconds * 0.65
    every: list[tuple[str, Callable[[], None], float, float]] = [
        ("reload", disturber.reload, max(25.0, seconds / 12), lively),
        ("worker killed", disturber.kill_worker, max(31.0, seconds / 7), lively),
        ("collector killed", disturber.kill_collector, max(37.0, seconds / 9), lively),
        ("engine restarted", disturber.restart_engine, max(19.0, seconds / 14), seconds * 0.9),
        ("keys changed", disturber.change_keys, 13.0, seconds * 0.95),
    ]
    plan = [(period * (turn + 0.5), name, act) for name, act, period, until in every for turn in range(int(until / period + 0.5))]
    return sorted(plan, key=lambda due: due[0])
