"""Reload and restart under load, as users do it: `glasshouse reload` and SIGHUP on a running `glasshouse up`."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, Final

import pytest
from click.testing import CliRunner, Result

from proxy.cli import main
from proxy.journal import read_heartbeats
from proxy.last_reload import LastReload
from proxy.settings import Settings
from proxy.snapshot import SnapshotFile, write_snapshot
from proxy.worker import Worker
from tests.conftest import Start
from tests.server.conftest import StartWorker
from tests.support.glasshouse import DEFAULTS, ROOT, Glasshouse
from tests.support.scripted_vllm import ScriptedVLLM
from tests.support.wire_client import WireClient, request

CHAT: Final = "/v1/chat/completions"
PATIENCE: Final = 60.0
_names = count(1)


def chat(name: str, *, stream: bool = True, **script: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"This is {name}."}]
    return {"model": "smollm2", "messages": messages, "stream": stream, "script": script}


def written(running: Glasshouse, config: dict[str, Any] | str) -> str:
    """The configuration file with `config` in it, laid over what there is; text as it is."""
    file = running.state_dir / "config.yaml"
    file.write_text(config if isinstance(config, str) else json.dumps({**running.config, **config}))
    return str(file)


def reload(running: Glasshouse, config: dict[str, Any] | str) -> Result:
    """`glasshouse reload`, without the time that a process takes to start."""
    return CliRunner().invoke(main, ["reload", "--config", written(running, config)], catch_exceptions=False)


def command(running: Glasshouse, config: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """The same as a process of its own."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "proxy.cli", "reload", "--config", written(running, config)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=4 * PATIENCE,
        check=False,
        text=True,
    )


def until(look: Any, what: str, timeout: float = PATIENCE) -> Any:
    deadline = time.monotonic() + timeout
    while not (found := look()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)
    return found


def last_reload(running: Glasshouse) -> LastReload:
    return LastReload.read(running.settings.last_reload_path)


class Load:
    """Clients that each keep a connection for as long as they are let, and ask, pause and ask again. They retry nothing."""

    def __init__(self, running: Glasshouse, clients: int) -> None:
        self.sent: dict[str, int] = {}
        """Name of a request → tokens that it is to cost."""
        self.failed: list[str] = []
        self.connections = 0
        self._running = running
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask_on, args=(random.Random(seed),)) for seed in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask_on(self, dice: random.Random) -> None:
        client: WireClient | None = None
        while not self._over.is_set():
            name = f"request-{next(_names)}"
            stream = dice.random() < 0.5
            tokens = dice.randint(1, 12)
            script = {"tokens": tokens, "interval": dice.choice([0.0, 0.0, 0.01, 0.1])}
            self.sent[name] = tokens
            try:
                if client is None:
                    client = WireClient(self._running.url, timeout=PATIENCE)
                    self.connections += 1
                reply = client.ask(
                    CHAT, chat(name, stream=stream, **script), key=self._running.key, headers={"X-Request-Id": name}
                )
                if (reply.status, reply.ending) != (200, "complete"):
                    self.failed.append(f"{name}: {reply.status} {reply.ending} {reply.body[-200:]!r}")
                closes = reply.header("connection") == "close"
            except OSError as error:
                self.failed.append(f"{name}: {error!r}")
                closes = True
            if closes and client is not None:
                client.close()
                client = None
            self._over.wait(dice.choice([0.0, 0.0, 0.01, 0.1, 0.5]))
        if client is not None:
            client.close()


@pytest.mark.parametrize("seconds", [5, pytest.param(120, marks=[pytest.mark.long, pytest.mark.timeout(600)])])
def test_restarts_under_load_fail_no_request(glasshouse: Start, vllm: ScriptedVLLM, seconds: int) -> None:
    # failure 51
    running = glasshouse([vllm.url])
    worker = running.pid("worker")
    with Load(running, 8) as load:
        until(lambda: len(load.sent) > 50, "some load")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            running.signal(signal.SIGHUP)
            time.sleep(2)
        until(lambda: running.logs()["up"].count("reloaded: ") >= 2, "two reloads")
        before = len(load.sent)
        until(lambda: len(load.sent) > before + 50, "some more load")
    assert load.failed == []
    assert worker not in running.pids()["worker"]
    rows = running.rows(len(load.sent))
    assert Counter(row["client_request_id"] for row in rows) == Counter(load.sent.keys())
    assert {row["outcome"] for row in rows} == {"ok"}
    assert {row["client_request_id"]: row["output_tokens"] for row in rows} == load.sent
    running.wait_metric("glasshouse_requests_total", len(rows))
    assert running.metrics().total("glasshouse_requests_total") == len(rows)


def ask(client: WireClient, running: Glasshouse, name: str, **script: Any) -> Any:
    return client.ask(CHAT, chat(name, **script), key=running.key, headers={"X-Request-Id": name})


def begin(running: Glasshouse, name: str, **script: Any) -> WireClient:
    client = WireClient(running.url, timeout=PATIENCE)
    client.send(request(CHAT, chat(name, **script), key=running.key, headers={"X-Request-Id": name}))
    return client


def by_name(running: Glasshouse, number: int) -> dict[str, dict[str, Any]]:
    rows = running.rows(number)
    assert len(rows) == number
    return {row["client_request_id"]: row for row in rows}


class TestReloading:
    def test_what_the_file_says_now_is_in_force_and_what_was_restarted_is_said(
        self, glasshouse: Start, vllm: ScriptedVLLM
    ) -> None:
        running = glasshouse([vllm.url], {"models": {"smollm2": {"price": {"output": 1}}}})
        before, started = running.pids(), last_reload(running)
        assert running.metrics().total("glasshouse_config_last_reload_successful") == 1
        with WireClient(running.url) as client:
            ask(client, running, "before", tokens=10)
        done = command(running, {"models": {"smollm2": {"price": {"output": 3}}}, "currency": "EUR"})
        assert (done.returncode, done.stderr) == (0, "")
        said = r"worker-0 replaced after \d+\.\d s\ncollector restarted after \d+\.\d s\ncontrol restarted after \d+\.\d s\n"
        assert re.fullmatch(said, done.stdout)
        assert running.pids()["supervisor"] == before["supervisor"]
        for role in ("worker", "collector", "control"):
            running.wait_replaced(role, *before[role])
        until(lambda: running.snapshot().currency == "EUR", "the new prices")
        until(lambda: self.in_use(running), "the worker to know them")
        with WireClient(running.url) as client:
            ask(client, running, "after", tokens=10)
        rows = by_name(running, 2)
        assert [(rows[name]["cost_nano"], rows[name]["currency"]) for name in ("before", "after")] == [
            (10_000, "USD"),
            (30_000, "EUR"),
        ]
        metrics = running.metrics()
        assert metrics.total("glasshouse_config_last_reload_successful") == 1
        assert metrics.total("glasshouse_config_last_reload_success_timestamp_seconds") > started.success_unix_ns / 1e9

    def in_use(self, running: Glasshouse) -> bool:
        published = running.snapshot().published_unix_ns
        beats = [beat for beat in read_heartbeats(running.settings.journal_path) if beat.alive and not beat.draining]
        return bool(beats) and all(beat.snapshot_unix_ns >= published for beat in beats)

    def test_settings_that_cannot_be_used_change_nothing(self, glasshouse: Start, vllm: ScriptedVLLM) -> None:
        # failure 51
        running = glasshouse([vllm.url])
        before, effective, started = running.pids(), running.settings, last_reload(running)
        other = str(running.state_dir / "elsewhere.db")
        for config, complaint in (
            ({"timeouts": {"drain": -1}}, r"Error: \S+config.yaml: timeouts\.drain: -1 is not allowed: .* > 0"),
            (
                {"timeout": {"drain": 1}},
                r"Error: \S+config.yaml: the file: there is no setting 'timeout' here; allowed: .*timeouts",
            ),
            ("listen: [", r"Error: \S+config.yaml: not usable as YAML: "),
            ({"listen": "127.0.0.1:1"}, r"Error: listen: a reload can't change it from '127.0.0.1:0' to '127.0.0.1:1'; stop"),
            ({"database": f"sqlite:///{other}"}, r"Error: database: a reload can't change it; stop"),
            ({"backends": []}, r"Error: backends: those of the settings are running; stop"),
        ):
            refused = reload(running, config)
            assert refused.exit_code == 1
            assert re.match(complaint, refused.stderr), refused.stderr
            assert running.metrics().total("glasshouse_config_last_reload_successful") == 0
        stamp = running.metrics().total("glasshouse_config_last_reload_success_timestamp_seconds")
        assert stamp == pytest.approx(started.success_unix_ns / 1e9)
        assert running.pids() == before
        assert effective == type(effective).read(running.state_dir / "settings.json")
        assert "not reloaded: database: a reload can't change it" in running.logs()["up"]
        with WireClient(running.url) as client:
            assert ask(client, running, "served", tokens=2).status == 200
        assert reload(running, {}).exit_code == 0
        assert running.metrics().total("glasshouse_config_last_reload_successful") == 1

    def test_two_reloads_at_once_are_one_after_the_other(self, glasshouse: Start, vllm: ScriptedVLLM) -> None:
        running = glasshouse([vllm.url])
        with ThreadPoolExecutor(2) as commands:
            done = [each.result() for each in [commands.submit(command, running, {}) for _ in range(2)]]
        assert [each.returncode for each in done] == [0, 0]
        steps = [json.loads(line) for line in running.logs()["supervisor"].splitlines()]
        starts = [step["child"] for step in steps if step["message"] == "started"][3:]
        assert starts[:3] == ["the new worker-0", "collector", "control"]
        assert len(starts) <= 6
        assert all(starts[at : at + 3] == starts[:3] for at in range(0, len(starts), 3))

    def test_a_stop_in_the_middle_of_it_is_a_stop(self, glasshouse: Start, vllm: ScriptedVLLM) -> None:
        running = glasshouse([vllm.url])
        for number in (signal.SIGHUP, signal.SIGTERM):
            running.signal(number)
        assert running.wait_exit() == 0
        running.wait_nobody()


class TestHandover:
    """What becomes of the old worker's connections."""

    def test_streams_run_on_in_the_old_one_until_their_time_is_over(self, glasshouse: Start, vllm: ScriptedVLLM) -> None:
        # failure 50, 51
        running = glasshouse([vllm.url], {"timeouts": {"drain": 600}})
        worker = running.pid("worker")
        with begin(running, "finishes", tokens=8, hang_after_events=4) as finishing:
            finishing.read(events=4)
            assert reload(running, {"timeouts": {"drain": 0.5}}).exit_code == 0
            assert worker in running.pids()["worker"]
            with begin(running, "breaks", tokens=8, hang_after_events=4) as breaking:
                breaking.read(events=4)
                assert len(running.pids()["worker"]) == 2
                until(lambda: running.metrics().total("glasshouse_workers_draining") == 1, "the metric")
                assert reload(running, {}).exit_code == 0
                broken = breaking.read()
            assert broken.ending == "closed"
            assert json.loads(broken.events[-1].removeprefix(b"data: "))["error"]["code"] == "shutting_down"
            vllm.release()
            finished = finishing.read()
            assert finished.ending == "complete"
            assert finished.body.endswith(b"data: [DONE]\n\n")
        rows = by_name(running, 2)
        assert (rows["finishes"]["outcome"], rows["finishes"]["output_tokens"]) == ("ok", 8)
        assert (rows["breaks"]["outcome"], rows["breaks"]["error_code"]) == ("rejected", "shutting_down")
        until(lambda: len(running.pids()["worker"]) == 1, "the old ones to end")

    def test_kept_connections_are_answered_told_and_only_then_closed(self, glasshouse: Start, vllm: ScriptedVLLM) -> None:
        # failure 50, 51
        running = glasshouse([vllm.url])
        worker = running.pid("worker")
        with (
            WireClient(running.url, timeout=PATIENCE) as asking,
            WireClient(running.url, timeout=PATIENCE) as probing,
            WireClient(running.url, timeout=PATIENCE) as sending,
            WireClient(running.url, timeout=PATIENCE) as idle,
        ):
            for client in (asking, probing, sending, idle):
                assert client.ask("/ready").status == 200
            body = request(CHAT, chat("sent", tokens=2), key=running.key)
            sending.send(body[:-9])
            running.signal(signal.SIGHUP)
            until(lambda: any(beat.draining for beat in read_heartbeats(running.settings.journal_path)), "the drain")
            answered, probed = ask(asking, running, "asked", tokens=2), probing.ask("/ready")
            sending.send(body[-9:])
            sent = sending.read()
            assert [(reply.status, reply.header("connection")) for reply in (answered, probed, sent)] == [
                (200, "close"),
                (503, "close"),
                (200, "close"),
            ]
            assert probed.json() == {"status": "draining"}
            assert [client.socket.recv(1) for client in (asking, probing, sending)] == [b"", b"", b""]
            assert idle.socket.recv(1) == b"", "idle for long enough"
        until(lambda: worker not in running.pids()["worker"], "the old one to end")
        running.until_said("the previous worker-0 ended after")

    def test_the_new_one_accepts_nobody_before_it_could_serve_them(self, tmp_path: Path) -> None:
        settings = Settings.of({**DEFAULTS, "state_dir": str(tmp_path)})

        async def scenario() -> None:
            loop = asyncio.get_running_loop()
            hears, says = socket.socketpair()
            with (
                hears,
                socket.create_server(("127.0.0.1", 0)) as listening,
                socket.create_connection(listening.getsockname()) as client,
            ):
                for each in (hears, listening, client):
                    each.setblocking(False)
                running = asyncio.create_task(Worker(settings, says.detach(), takes_over=True).run(listening))
                await loop.sock_sendall(client, request("/health"))
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(loop.sock_recv(client, 100), 1)
                write_snapshot(settings.snapshot_path, SnapshotFile())
                assert await asyncio.wait_for(loop.sock_recv(hears, 100), PATIENCE) == b"ready"
                assert (await asyncio.wait_for(loop.sock_recv(client, 100), PATIENCE)).startswith(b"HTTP/1.1 200 ")
                os.kill(os.getpid(), signal.SIGTERM)
                await asyncio.wait_for(running, PATIENCE)

        asyncio.run(scenario())

    def test_a_stop_ends_the_waiting_for_them(self, worker: StartWorker) -> None:
        day = 86_400
        running = worker(config={"timeouts": {"drain": day, "client_request": day}})
        with WireClient(running.url) as sending:
            sending.send(b"POST /v1/chat/completions HTTP/1.1\r\n")
            running.until(lambda: running.heartbeat().connections == 1 or None, "the connection")
            os.kill(running.pid, signal.SIGUSR1)
            running.until(lambda: running.heartbeat().draining or None, "the drain")
            running.terminate()
            assert sending.socket.recv(1) == b""
            running.wait_exit()


class TestTerminal:
    """SIGHUP has two senders: the one who wants a reload, and a terminal that is closed."""

    @pytest.fixture
    def terminal(self, vllm: ScriptedVLLM, tmp_path: Path) -> Iterator[tuple[int, subprocess.Popen[bytes], Glasshouse]]:
        """The master's side, `glasshouse up` on the other, and a view on its state directory."""
        running = Glasshouse([vllm.url], state_dir=tmp_path / "state")
        file = running.state_dir / "config.yaml"
        file.write_text(json.dumps(running.config))
        ours, theirs = pty.openpty()
        with subprocess.Popen(
            [sys.executable, "-P", "-m", "proxy.cli", "up", "--config", str(file)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        ) as up:
            os.close(theirs)
            try:
                yield ours, up, running
            finally:
                up.kill()
                running.wait_nobody()

    def test_it_reloads_while_the_terminal_is_there_and_stops_when_it_has_gone(
        self, terminal: tuple[int, subprocess.Popen[bytes], Glasshouse]
    ) -> None:
        ours, up, running = terminal
        with reading(ours) as said:
            until(lambda: b"Ctrl-C stops everything." in said, "the banner")
            assert reload(running, {}).exit_code == 0
            until(lambda: b"reloaded: worker-0 replaced" in said, "the reload")
            assert up.poll() is None
        os.close(ours)
        os.kill(up.pid, signal.SIGHUP)  # as the shell does, or the kernel where the terminal is a controlling one
        assert up.wait(PATIENCE) == 0


@contextmanager
def reading(fd: int) -> Iterator[bytearray]:
    """What comes from `fd`, as it comes."""
    said = bytearray()
    over = threading.Event()

    def read() -> None:
        os.set_blocking(fd, False)
        while not over.wait(0.02):
            with suppress(BlockingIOError):
                said.extend(os.read(fd, 65536))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield said
    finally:
        over.set()
        thread.join()
