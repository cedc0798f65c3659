"""The control process as it is started, against scripted engines and a real database."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import pytest
from sqlalchemy import Connection

from proxy.control.declared import unix_ns
from proxy.engines import EngineLoad, Engines, write_engines
from proxy.nouns import BackendSettings, DatedPriceSettings, ModelSettings, PriceSettings, RunTimeSettings, TeamSettings
from proxy.settings import Settings, address
from proxy.snapshot import LAST, Allowance, Principal, Snapshot, SnapshotError, SnapshotFile, read_snapshot
from proxy.store import (
    BACKENDS,
    GLASSHOUSE,
    MODELS,
    TEAMS,
    create_key,
    hash_key,
    open_database,
    put,
    put_run_time,
    remove,
    revoke_key,
)
from tests.support.issuer_host import IssuerHost
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
        """As somebody on this host asks."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)
        connection.sock = until(self._connected, "its Unix socket")
        connection.request("GET", path)
        body = connection.getresponse().read()
        connection.close()
        return json.loads(body)

    def _connected(self) -> socket.socket | None:
        directory = os.open(self.settings.state_path, os.O_PATH)  # its own name may be too long for an address
        try:
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(PATIENCE)
            connection.connect(f"/proc/self/fd/{directory}/{self.settings.control_socket_path.name}")
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            return None
        else:
            return connection
        finally:
            os.close(directory)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> list[dict[str, Any]]:
        """Its log, after it ended well."""
        self.process.send_signal(number)
        assert self.process.wait(PATIENCE) == 0, self._log.read_text()
        return self.log()

    def log(self) -> list[dict[str, Any]]:
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
        assert [model["id"] for model in control.get("/models")["data"]] == ["only-a", "shared"]
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
        control.published(lambda file: len(file.keys) == 0, "its end")
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


def test_an_engine_started_anew_is_asked_at_once(tmp_path: Path) -> None:  # failure 54
    """With another model, with another context length, or both: nobody is sent there for what it doesn't serve."""
    seconds = itertools.count(1.0)

    def scraped(*up: str) -> None:
        """As the collector does it; each time another process seems to run."""
        loads = {name: EngineLoad(started_unix_s=next(seconds)) for name in up}
        write_engines(control.settings.engines_path, Engines(1, time.time_ns(), loads))

    def seen(right: Callable[[SnapshotFile], bool]) -> Callable[[SnapshotFile], bool]:
        def look(file: SnapshotFile) -> bool:
            scraped("a", "b", "stranger")
            return right(file)

        return look

    def length(file: SnapshotFile) -> object:
        return json.loads(file.models["m"].card)["max_model_len"]

    with ScriptedVLLM(models=["m"]) as b, ScriptedVLLM(models=["m"], max_model_len=512) as a:
        port, backends = a.port, [{"url": a.url, "name": "a"}, {"url": b.url, "name": "b"}]
        control = Control(tmp_path, backends, control={"discover_every": 3600})
        with control:
            file = control.published(lambda file: names(file) == {"m": ("a", "b")}, "the engines")
            assert (file.models["m"].context_tokens, length(file)) == (512, 512)
            a.stop()
            with ScriptedVLLM(models=["m"], max_model_len=768, port=port):
                file = control.published(seen(lambda file: file.models["m"].context_tokens == 768), "its new length")
                assert names(file) == {"m": ("a", "b")}
            with ScriptedVLLM(models=["other"], port=port):
                file = control.published(seen(lambda file: "other" in file.models), "its new model")
                assert names(file) == {"other": ("a",), "m": ("b",)}
                assert file.models["m"].context_tokens == 1024


def test_a_backend_is_drained_and_weighed_while_everything_runs(tmp_path: Path, vllm: ScriptedVLLM) -> None:
    drained = RunTimeSettings(drained=True, weight=0.5)
    with Control(tmp_path, [{"url": vllm.url, "name": "a", "weight": 2, "depth": 7}]) as control:
        file = control.published(lambda file: "smollm2" in file.models, "the model")
        assert (file.backends["a"].drained, file.backends["a"].weight, file.backends["a"].depth) == (False, 2.0, 7)
        written(control, lambda connection: put_run_time(connection, "a", drained, "drain", GLASSHOUSE))
        file = control.published(lambda file: file.backends["a"].drained, "it to be drained")
        assert file.backends["a"].weight == 0.5
        written(control, lambda connection: put(connection, TEAMS, "t", TeamSettings(priority="low"), GLASSHOUSE))
        file = control.published(lambda file: "t" in file.teams, "the team")
        assert file.teams["t"].priority == LAST
    with Control(tmp_path, [{"url": vllm.url, "name": "a"}], database=f"sqlite:///{tmp_path}/nowhere/x.db") as control:
        file = control.published(lambda file: file.backends["a"].depth == 256, "what the file says now")
        assert (file.backends["a"].drained, file.backends["a"].weight) == (True, 0.5), "also while the database is down"


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
        health = until(
            lambda: ((told := control.get("/health"))["database"] != "ok" and told) or None, "the database to be missed"
        )
        assert health["status"] == "degraded"
        for path in ("/keys", "/backends"):
            assert control.get(path)["error"]["code"] == "database_unavailable"
        assert control.snapshot() is None, "nobody is told that there are no keys"
        missing.mkdir()
        control.published(lambda file: bool(file.models), "the first snapshot")
        until(lambda: control.get("/health")["status"] == "ok", "health")
        log = control.stop()
    assert [line["message"] for line in log if line["level"] == "error"] == [
        "the database can't be read; what it held last stays"
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


# -- what comes and goes while it runs --


def written(control: Control, *changes: Callable[[Connection], object]) -> None:
    """In its database, as somebody beside it does."""
    database = open_database(control.settings.database_url)
    with database.begin() as connection:
        for change in changes:
            change(connection)
    database.dispose()


def has_backend(name: str, url: str, **more: Any) -> Callable[[Connection], object]:
    return lambda connection: put(connection, BACKENDS, name, BackendSettings(url=url, **more), GLASSHOUSE)


def test_backends_come_and_go_without_a_restart(tmp_path: Path, two: tuple[ScriptedVLLM, ScriptedVLLM]) -> None:
    a, b = two
    with Control(tmp_path, [{"url": a.url, "name": "file"}]) as control:
        control.published(lambda file: names(file).keys() == {"shared", "only-a"}, "the file's backend")
        written(control, has_backend("db", b.url), has_backend("file", "http://127.0.0.1:1"))
        file = control.published(lambda file: names(file).get("shared") == ("file", "db"), "the database's")
        assert file.backends["file"].port == a.port, "of two of one name the file's holds"

        with ScriptedVLLM(models=["moved"]) as elsewhere:
            written(control, has_backend("db", elsewhere.url))
            file = control.published(lambda file: names(file).get("moved") == ("db",), "its new address")
            assert names(file)["shared"] == ("file",)
            asked = len(b.requests)
            until(lambda: len(elsewhere.requests) > 3, "it to be asked now and then")
            assert len(b.requests) == asked, "and the former no more"
            written(control, lambda connection: remove(connection, BACKENDS, "db", GLASSHOUSE))
            control.published(lambda file: list(file.backends) == ["file"] and "moved" not in file.models, "its end")
            asked, others = len(elsewhere.requests), len(a.requests)
            until(lambda: len(a.requests) > others + 3, "the other to be asked now and then")
            assert len(elsewhere.requests) <= asked + 1, "one question may have been under way"
        log = control.stop()
    assert [line["message"] for line in log if line["level"] != "info"] == []


def test_a_price_to_come(tmp_path: Path, vllm: ScriptedVLLM) -> None:
    soon = datetime.now(UTC) + timedelta(hours=3)
    prices = (DatedPriceSettings(input=Decimal(2), valid_from=soon),)
    model = ModelSettings(price=PriceSettings(input=Decimal(1)), prices=prices, aliases=("gpt",))
    with Control(tmp_path, [{"url": vllm.url}]) as control:
        written(control, lambda connection: put(connection, MODELS, "smollm2", model, GLASSHOUSE))
        file = control.published(lambda file: "gpt" in file.models, "the alias")
        published = file.models["gpt"]
        at = unix_ns(soon)
        assert (published.price_at(at - 1).input_pico, published.price_at(at).input_pico) == (1_000_000, 2_000_000)


def test_what_the_database_had_is_there_while_it_is_down(tmp_path: Path, vllm: ScriptedVLLM) -> None:  # failure 46
    """Also for a process that starts meanwhile; and what the file declares holds over it."""
    with Control(tmp_path, []) as control:
        model = ModelSettings(price=PriceSettings(input=Decimal(1)))
        written(
            control,
            has_backend("gpu", vllm.url),
            lambda connection: put(connection, MODELS, "smollm2", model, GLASSHOUSE),
            lambda connection: put(connection, TEAMS, "t", TeamSettings(requests_per_minute=1), GLASSHOUSE),
        )
        control.published(lambda file: "smollm2" in file.models and "t" in file.teams, "all of it")
    with Control(tmp_path, [], database="sqlite:////nowhere/at/all", teams={"f": {"blocked": True}}) as control:
        file = control.published(lambda file: "f" in file.teams, "the file's team")
        assert names(file) == {"smollm2": ("gpu",)}
        assert file.models["smollm2"].input_pico == 1_000_000
        assert file.teams == {"f": Allowance(blocked=True), "t": Allowance(requests_per_minute=1)}


# -- issuers --


def test_an_issuers_keys_are_published_and_followed(tmp_path: Path) -> None:
    with IssuerHost() as host:
        host.discoverable(jwks("k1"), **{"cache-control": "max-age=0"})
        issuers = [{"issuer": host.url, "audience": ["glasshouse"]}]
        with Control(tmp_path, [], issuers=issuers) as control:
            file = control.published(lambda file: b"k1" in file.issuers[0].keys, "its keys")
            assert (file.issuers[0].issuer, file.issuers[0].audience) == (host.url, ("glasshouse",))
            host.discoverable(jwks("k1", "k2"))
            control.published(lambda file: b"k2" in file.issuers[0].keys, "a new one")
            log = control.stop()
    assert [line["message"] for line in log].count("an issuer's keys are known") == 2
    with Control(tmp_path, [], issuers=[{**issuers[0], "leeway": 5}]) as control:
        file = control.published(lambda file: file.issuers[0].leeway_s == 5, "the new settings")
        assert b"k2" in file.issuers[0].keys, "what was known of it, though it is down"
        log = until(lambda: [line for line in control.log() if line["level"] == "warning"] or None, "it to be told of")
    assert log[0]["message"] == "an issuer's keys can't be fetched; those that were known of it stay"


def test_the_first_snapshot_waits_for_issuers_for_a_while(tmp_path: Path) -> None:
    with IssuerHost() as host:
        host.discoverable(jwks("k1"))
        with Control(tmp_path, [], issuers=[{"issuer": host.url, "audience": ["glasshouse"]}]) as control:
            file = control.published(lambda file: True, "the first one")
            assert b"k1" in file.issuers[0].keys


def jwks(*names: str) -> bytes:
    return json.dumps({"keys": [{"kty": "OKP", "crv": "Ed25519", "x": "x", "kid": name} for name in names]}).encode()
