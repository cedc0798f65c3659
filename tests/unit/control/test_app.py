"""The HTTP side: what it tells, whom, and how it says no."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from proxy import __version__
from proxy.control import app as application
from proxy.control.app import create_app
from proxy.control.declared import Declared
from proxy.control.discovery import Answer
from proxy.control.feed import CatalogueFeed
from proxy.control.inventory import Inventory
from proxy.control.publish import Publisher
from proxy.settings import Settings
from proxy.store import create_key, open_database, revoke_key

NOW = 1_795_176_000_000_000_000
NOW_TEXT = "2026-11-20T12:00:00Z"


class Parts:
    """A control process without its loops, whose backends `a` and `b` were asked: `a` answered, `b` didn't."""

    def __init__(self, settings: Settings) -> None:
        self.inventory = Inventory(settings, None, NOW)
        declared = Declared(settings)
        self.feed = CatalogueFeed(settings.database_url, declared, None)
        self.publisher = Publisher(settings, declared, self.inventory, self.feed, None)
        self.app: FastAPI = create_app(settings, self.inventory, self.feed, self.publisher)
        self.inventory.known["a"].answered(Answer("vllm", {"m": b'{"id":"m","max_model_len":1024}'}), NOW)
        self.inventory.known["b"].failed("/v1/models: refused", NOW)

    def client(self, **options: Any) -> TestClient:
        return TestClient(self.app, base_url="http://127.0.0.1:8401", **options)


def settings_in(state_dir: Path, **fields: object) -> Settings:
    backends = [{"name": "a", "url": "http://127.0.0.1:8001/v1"}, {"name": "b", "url": "http://[::1]:8002"}]
    models = {"m": {"price": {"input": "0.05", "output": "0.2"}}}
    return Settings.of({"state_dir": str(state_dir), "currency": "EUR", "backends": backends, "models": models, **fields})


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return Parts(settings_in(tmp_path))


@pytest.fixture
def client(parts: Parts) -> Iterator[TestClient]:
    with parts.client() as client:
        yield client
    parts.feed.close()


def test_health(parts: Parts, client: TestClient) -> None:
    empty = {"status": "degraded", "version": __version__, "database": "ok", "revision": None, "snapshot_as_of": None}
    assert client.get("/health").json() == empty
    parts.feed.poll()
    parts.feed.as_of_unix_ns = NOW
    file = parts.publisher.due(0)
    assert file is not None
    parts.publisher.write(file)
    assert client.get("/health").json() == empty | {"status": "ok", "revision": 0, "snapshot_as_of": NOW_TEXT}
    parts.feed.error = "it is gone"
    assert client.get("/health").json()["status"] == "degraded"


def test_models(client: TestClient) -> None:
    price = {"currency": "EUR", "input": "0.05", "cached_input": "0.05", "output": "0.2", "source": "configured", "row": None}
    assert client.get("/models").json() == {
        "object": "list",
        "data": [{"id": "m", "backends": ["a"], "max_model_len": 1024, "price": price}],
    }


def test_backends(client: TestClient) -> None:
    first, second = client.get("/backends").json()["data"]
    assert first == {
        "name": "a",
        "url": "http://127.0.0.1:8001",
        "kind": "vllm",
        "models": ["m"],
        "reachable": True,
        "error": None,
        "asked_at": NOW_TEXT,
        "answered_at": NOW_TEXT,
    }
    assert (second["url"], second["reachable"], second["error"]) == ("http://[::1]:8002", False, "/v1/models: refused")
    assert second["answered_at"] is None


def test_keys_without_secrets_and_hashes(parts: Parts, client: TestClient) -> None:  # failure 76
    with open_database(parts.feed._url).begin() as connection:
        secret, row = create_key(connection, "alice")
        create_key(connection, "bob")
        revoke_key(connection, "bob")
    answer = client.get("/keys")
    [key] = answer.json()["data"]
    assert key.pop("created_at")
    assert key == {"id": row.id, "name": "alice", "prefix": secret[:7], "revoked_at": None}
    assert [key["name"] for key in client.get("/keys?revoked=true").json()["data"]] == ["alice", "bob"]
    assert secret not in answer.text


def test_allowances_in_the_words_of_the_settings(tmp_path: Path) -> None:
    month = {"money": "20.5", "per": "month", "time_zone": "Europe/Vienna"}
    parts = Parts(
        settings_in(
            tmp_path,
            everyone={"concurrent_requests": 64},
            teams={"research": {"budgets": [month]}},
            keys={
                "alice": {"team": "research", "models": ["qwen*"], "expires": "2026-12-31T18:00:00+01:00"},
                "bob": {},
            },
            redis={"url": "redis://:canary@redis.internal/0"},
        )
    )
    with open_database(parts.feed._url).begin() as connection:
        create_key(connection, "alice")
    with parts.client() as client:
        assert client.get("/allowances").json()["keys"]["bob"] == {"team": None, "allowance": {}, "in_use": None}
        parts.feed.poll()
        answer = client.get("/allowances")
    parts.feed.close()
    alice = {"models": ["qwen*"], "expires": "2026-12-31T18:00:00+01:00"}
    assert answer.json() == {
        "object": "allowances",
        "everyone": {"concurrent_requests": 64},
        "teams": {"research": {"budgets": [month | {"soft": False}]}},
        "keys": {
            "alice": {"team": "research", "allowance": alice, "in_use": True},
            "bob": {"team": None, "allowance": {}, "in_use": False},
        },
    }
    assert "canary" not in answer.text


# -- no --


def error_of(answer: Any) -> dict[str, Any]:
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.json()) == ["error"]
    error: dict[str, Any] = answer.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    return error


@pytest.mark.parametrize("path", ["/", "/v1/models", "/docs", "/redoc", "/keys/1", "//keys", "/%2e%2e/keys"])
def test_an_unknown_path(client: TestClient, path: str) -> None:  # failure 83
    answer = client.get(path)
    assert answer.status_code == 404
    assert error_of(answer)["type"] == "invalid_request_error"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize("path", ["/health", "/models", "/backends", "/keys", "/allowances"])
def test_nothing_can_be_changed(client: TestClient, method: str, path: str) -> None:  # failure 75
    answer = client.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET"
    assert error_of(answer)["code"] == "method_not_allowed"


def test_every_route_only_reads() -> None:
    """Whoever adds one that doesn't has to bring authentication along."""
    methods = {method for router in application.ROUTERS for route in router.routes for method in getattr(route, "methods", ())}
    assert methods == {"GET"}


def test_a_parameter_that_makes_no_sense(client: TestClient) -> None:
    answer = client.get("/keys?revoked=perhaps")
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "revoked"


def test_a_database_that_is_down(tmp_path: Path) -> None:  # failure 46
    parts = Parts(settings_in(tmp_path, database="sqlite:////nowhere/at/all"))
    with parts.client() as client:
        answer = client.get("/keys")
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert error_of(answer)["code"] == "database_unavailable"


def test_a_bug_stays_in_the_log(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:  # failure 83
    def broken() -> None:
        raise RuntimeError("canary")

    monkeypatch.setattr(parts.inventory, "models", broken)
    with parts.client(raise_server_exceptions=False) as client:
        answer = client.get("/models")
    assert answer.status_code == 500
    assert error_of(answer)["code"] == "internal_error"
    assert "canary" not in answer.text
    assert "Traceback" not in answer.text


# -- whom --


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:8401", "localhost:8401", "LOCALHOST", "localhost.", "[::1]:8401", "[::1]"]
)
def test_loopback_names_are_ours(client: TestClient, host: str) -> None:
    assert client.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8401", "127.0.0.1.evil.example", "", "10.0.0.1", "localhost.evil.example", "[::1].evil"],
)
def test_other_names_are_not(client: TestClient, host: str) -> None:
    """A page that pointed its own name at 127.0.0.1 (DNS rebinding) reads nothing."""
    answer = client.get("/keys", headers={"host": host})
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "host_not_allowed"


def test_two_hosts_are_none(client: TestClient) -> None:  # failure 31
    assert client.get("/keys", headers=[("host", "localhost"), ("host", "evil.example")]).status_code == 400


@pytest.mark.parametrize(
    ("listen", "host", "status"),
    [
        ("0.0.0.0:8401", "10.0.0.1:8401", 200),
        ("[::]:8401", "[2001:db8::1]:8401", 200),
        ("0.0.0.0:8401", "evil.example", 400),
        ("10.0.0.1:8401", "10.0.0.1:8401", 200),
        ("10.0.0.1:8401", "10.0.0.2:8401", 400),
        ("control.internal:8401", "Control.Internal:8401", 200),
    ],
)
def test_the_host_that_is_listened_on(tmp_path: Path, listen: str, host: str, status: int) -> None:
    parts = Parts(settings_in(tmp_path, control={"listen": listen}))
    with parts.client() as client:
        assert client.get("/health", headers={"host": host}).status_code == status
