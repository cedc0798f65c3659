"""The control process as it is started, against scripted engines and a real database."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import pytest

from proxy.settings import Settings, address
from proxy.snapshot import Principal, Snapshot, SnapshotError, SnapshotFile, read_snapshot
from proxy.store import create_key, hash_key, open_database, revoke_key
from tests.support.scripted_vllm import ScriptedVLLM

PATIENCE = 30.0
T = TypeVar("T")


def until(look: Callable[[], T | None], what: str) -> T:
    """The first thing that `look` finds."""
    deadline = time.monotonic() + PATIENCE
    while (found := look()) is None or found is False:
        assert time.monotonic() < deadline, f"waited {PATIENCE:.0f} s in vain for {what}"
        time.sleep(0.01)
    return found


class Control:
    """`python -m proxy.control`, on a socket that it inherits."""

    def __init__(self, state_dir: Path, backends: Sequence[Mapping[str, Any]], **settings: Any) -> None:
        self.settings = Settings.of(
            {"state_dir": str(state_dir), "backends": list(backends), "control": {"discover_every": 0.1}, **settings}
        )
        self._file = state_dir / "settings.json"
        self._log = state_dir / "control.log"

    def __enter__(self) -> Self:
        self.settings.write(self._file)
        with socket.create_server(("127.0.0.1", 0)) as listener, self._log.open("ab") as log:
            self.host, self.port = listener.getsockname()
            fd = listener.fileno()
            command = [sys.executable, "-m", "proxy.control", "--settings", str(self._file), "--fd", str(fd)]
            self.process = subprocess.Popen(command, stderr=log, pass_fds=[fd])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        if error is not None:
            print(self._log.read_text())

    def get(self, path: str) -> Any:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)
        connection.request("GET", path)
        body = connection.getresponse().read()
        connection.close()
        return json.loads(body)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> list[dict[str, Any]]:
        """Its log, after it ended well."""
        self.process.send_signal(number)
        assert self.process.wait(PATIENCE) == 0, self._log.read_text()
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    def snapshot(self) -> SnapshotFile | None:
        try:
            return read_snapshot(self.settings.snapshot_path)
        except (FileNotFoundError, SnapshotError):
            return None

    def published(self, right: Callable[[SnapshotFile], bool], what: str) -> SnapshotFile:
        """The first snapshot that is `right`."""

        def look() -> SnapshotFile | None:
            file = self.snapshot()
            return file if file is not None and right(file) else None

        return until(look, what)


def names(file: SnapshotFile) -> dict[str, tuple[str, ...]]:
    return {name: model.backends for name, model in file.models.items()}


@pytest.fixture
def two() -> Iterator[tuple[ScriptedVLLM, ScriptedVLLM]]:
    with ScriptedVLLM(models=["shared", "only-a"]) as a, ScriptedVLLM(models=["shared"]) as b:
        yield a, b


def test_what_engines_serve_is_published_and_told(tmp_path: Path, two: tuple[ScriptedVLLM, ScriptedVLLM]) -> None:
    a, b = two
    models = {"shared": {"price": {"input": "0.05", "cached_input": "0.01", "output": "0.2"}}}
    backends = [{"url": a.url, "name": "a"}, {"url": f"{b.url}/v1", "name": "b"}]
    with Control(tmp_path, backends, models=models, currency="EUR") as control:
        file = control.published(lambda file: len(file.models) == 2, "both models")
        assert names(file) == {"shared": ("a", "b"), "only-a": ("a",)}
        assert file.currency == "EUR"
        shared = file.models["shared"]
        assert (shared.input_pico, shared.cached_input_pico, shared.output_pico) == (50_000, 10_000, 200_000)
        assert {name: (each.port, each.kind, each.base_path) for name, each in file.backends.items()} == {
            "a": (a.port, "vllm", ""),
            "b": (b.port, "vllm", ""),
        }
        listed = json.loads(Snapshot(file).models_json(Principal("key", "alice")))["data"]
        assert [(card["id"], card["max_model_len"], card["owned_by"]) for card in listed] == [
            ("shared", 1024, "vllm"),
            ("only-a", 1024, "vllm"),
        ]
        until(lambda: control.get("/health")["status"] == "ok", "health")
        assert [model["id"] for model in control.get("/models")["data"]] == ["shared", "only-a"]
        assert [backend["reachable"] for backend in control.get("/backends")["data"]] == [True, True]
        log = control.stop()
    assert {line["process"] for line in log} == {"control"}
    assert [line["message"] for line in log if line["level"] != "info"] == []


def test_a_key_comes_and_goes_without_a_restart(tmp_path: Path, vllm: ScriptedVLLM) -> None:
    with Control(tmp_path, [{"url": vllm.url}]) as control:
        control.published(lambda file: bool(file.models), "the model")
        database = open_database(control.settings.database_url)
        with database.begin() as connection:
            secret, row = create_key(connection, "alice")
        file = control.published(lambda file: hash_key(secret) in file.keys, "the new key")
        principal = Snapshot(file).principal(hash_key(secret))
        assert principal is not None
        assert (principal.key_id, principal.key_name) == (row.id, "alice")
        assert [key["name"] for key in control.get("/keys")["data"]] == ["alice"]
        with database.begin() as connection:
            revoke_key(connection, "alice")
        control.published(lambda file: not file.keys, "its end")
        log = json.dumps(control.stop())
        database.dispose()
    assert secret not in log  # failure 76
    assert hash_key(secret).hex() not in log


def test_an_engine_that_went_keeps_its_models_also_for_the_next_process(tmp_path: Path) -> None:
    with ScriptedVLLM(models=["m"]) as vllm:
        port = vllm.port
        backends = [{"url": vllm.url, "name": "a"}]
        with Control(tmp_path, backends) as control:
            control.published(lambda file: "m" in file.models, "the model")
            vllm.stop()
            until(lambda: control.get("/backends")["data"][0]["reachable"] is False, "its end to be noticed")
            [state] = control.get("/backends")["data"]
            assert state["models"] == ["m"]
            assert state["error"].startswith("/v1/models: ")
            log = control.stop()
        assert [line["message"] for line in log if line["level"] == "warning"] == [
            "backend doesn't answer; what was known of it stays"
        ]
    before = read_snapshot(tmp_path / "snapshot")
    with Control(tmp_path, backends) as control:
        until(lambda: control.get("/backends")["data"][0]["reachable"] is False, "the first question")
        file = control.snapshot()
        assert file is not None
        assert (file.models, file.backends) == (before.models, before.backends)
        with ScriptedVLLM(models=["other"], port=port):
            control.published(lambda file: list(file.models) == ["other"], "what it serves now")


def test_an_engine_that_hangs_holds_nothing_up(tmp_path: Path, vllm: ScriptedVLLM) -> None:  # failure 53
    with socket.create_server(("127.0.0.1", 0)) as mute:
        hanging = {"url": f"http://127.0.0.1:{mute.getsockname()[1]}", "name": "mute", "models": ["m"]}
        with Control(tmp_path, [hanging, {"url": vllm.url}]) as control:
            file = control.published(lambda file: "smollm2" in file.models, "the other's model")
            assert names(file)["m"] == ("mute",)
            assert file.backends["mute"].kind == "openai"
            control.stop()


def test_starting_without_a_database(tmp_path: Path, vllm: ScriptedVLLM) -> None:  # failure 46
    missing = tmp_path / "not yet"
    with Control(tmp_path, [{"url": vllm.url}], database=f"sqlite:///{missing}/glasshouse.db") as control:
        until(lambda: control.get("/backends")["data"][0]["reachable"], "the engine")
        health = until(
            lambda: ((told := control.get("/health"))["database"] != "ok" and told) or None, "the database to be missed"
        )
        assert health["status"] == "degraded"
        assert control.get("/keys")["error"]["code"] == "database_unavailable"
        assert control.snapshot() is None, "nobody is told that there are no keys"
        missing.mkdir()
        control.published(lambda file: bool(file.models), "the first snapshot")
        until(lambda: control.get("/health")["status"] == "ok", "health")
        log = control.stop()
    assert [line["message"] for line in log if line["level"] == "error"] == [
        "the database can't be read; the last good keys stay"
    ]


def test_killed_and_started_again(tmp_path: Path, vllm: ScriptedVLLM) -> None:  # failure 51
    for _ in range(3):
        with Control(tmp_path, [{"url": vllm.url}]) as control:
            until(lambda: control.get("/health")["status"] == "ok", "health")
            before = control.snapshot()
            control.process.kill()
            control.process.wait()
        assert before is not None
        assert control.snapshot() is not None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping(tmp_path: Path, vllm: ScriptedVLLM, number: signal.Signals) -> None:  # failure 50
    with Control(tmp_path, [{"url": vllm.url}]) as control:
        control.get("/health")
        with socket.create_connection((control.host, control.port)):  # an idle connection doesn't keep it
            log = control.stop(number)
    assert "control stops" in [line["message"] for line in log]  # the database may have something to say after it


def started(settings: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "proxy.control", "--settings", str(settings)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_without_a_socket_it_binds_one(tmp_path: Path, vllm: ScriptedVLLM) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        listen = f"127.0.0.1:{free.getsockname()[1]}"
        file = tmp_path / "settings.json"
        settings = Settings.of({"state_dir": str(tmp_path), "control": {"listen": listen}, "backends": [{"url": vllm.url}]})
        settings.write(file)
        taken = started(file)
    assert taken.returncode == 1
    [line] = [json.loads(line) for line in taken.stderr.splitlines()]
    assert line["level"] == "critical"
    assert f"control.listen {listen}: " in line["error"]

    process = subprocess.Popen([sys.executable, "-m", "proxy.control", "--settings", str(file)], stderr=subprocess.DEVNULL)
    try:
        until(lambda: _answers(listen), "an answer")
    finally:
        process.terminate()
        assert process.wait(PATIENCE) == 0


def _answers(listen: str) -> bool:
    connection = http.client.HTTPConnection(*address(listen), timeout=PATIENCE)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except ConnectionRefusedError:
        return False
    finally:
        connection.close()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"listn": 1}'])
def test_settings_that_can_not_be_used(tmp_path: Path, text: str) -> None:
    file = tmp_path / "settings.json"
    file.write_text(text)
    failed = started(file)
    assert failed.returncode == 1
    assert json.loads(failed.stderr)["message"] == "control can't start"
    assert started(tmp_path / "nothing").returncode == 1


def test_it_only_talks_to_those_who_know_its_name(tmp_path: Path, vllm: ScriptedVLLM) -> None:
    with Control(tmp_path, [{"url": vllm.url}]) as control:
        until(lambda: control.get("/health")["status"] == "ok", "health")
        connection = http.client.HTTPConnection(control.host, control.port, timeout=PATIENCE)
        connection.request("GET", "/keys", headers={"Host": "evil.example"})
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["error"]["code"]) == (400, "host_not_allowed")
        connection.close()


def test_the_snapshot_is_its_owners_alone(tmp_path: Path, vllm: ScriptedVLLM) -> None:  # failure 76
    with Control(tmp_path, [{"url": vllm.url}]) as control:
        control.published(lambda file: bool(file.models), "the model")
    assert control.settings.snapshot_path.stat().st_mode & 0o077 == 0
