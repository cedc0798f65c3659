"""The HTTP side: what it tells of what runs, how it says no, and what it says of itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from proxy import __version__
from proxy.control import openapi
from proxy.control.discovery import Answer
from tests.support.control import ControlApi

NOW = 1_795_176_000_000_000_000
NOW_TEXT = "2026-11-20T12:00:00Z"
CONFIG: dict[str, Any] = {
    "backends": [{"name": "a", "url": "http://127.0.0.1:8001/v1"}, {"name": "b", "url": "http://[::1]:8002"}],
    "models": {"m": {"price": {"input": "0.05", "output": "0.2"}, "aliases": ["alias"]}},
}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ControlApi]:
    """Its backends `a` and `b` were asked: `a` answered, `b` didn't."""
    with ControlApi(tmp_path, **CONFIG) as api:
        known = api.state.inventory.known
        known["a"].answered(Answer("vllm", {"m": b'{"id":"m","max_model_len":1024}', "free": b'{"id":"free"}'}), NOW)
        known["b"].failed("/v1/models: refused", NOW)
        yield api


def test_health(api: ControlApi) -> None:
    about: dict[str, str | None] = {"version": __version__, "currency": "EUR"}
    empty = about | {"status": "degraded", "database": "ok", "revision": None, "snapshot_as_of": None}
    assert api.get("/health").json() == empty
    api.state.feed.poll()
    api.state.feed.as_of_unix_ns = NOW
    file = api.state.publisher.due(0, NOW)
    assert file is not None
    api.state.publisher.write(file)
    told = api.get("/health").json()
    assert told == empty | {"status": "ok", "revision": file.revision, "snapshot_as_of": NOW_TEXT}
    api.state.feed.error = "FATAL: password authentication failed for user canary"
    told = api.get("/health")
    assert (told.json()["status"], told.json()["database"]) == ("degraded", "unavailable")
    assert "canary" not in told.text  # everybody may read it


def test_models(api: ControlApi) -> None:
    price = {"currency": "EUR", "input": "0.05", "cached_input": "0.05", "output": "0.2", "source": "configured", "row": None}
    free, m = api.get("/models", key=api.viewer).json()["data"]
    assert (m["id"], m["served"], m["backends"], m["max_model_len"], m["price"]) == ("m", True, ["a"], 1024, price)
    assert (m["source"], m["settings"]["aliases"]) == ("file", ["alias"])
    assert (free["id"], free["source"], free["price"]["source"], free["max_model_len"]) == ("free", None, "none", None)
    assert api.get("/models/free", key=api.viewer).json() == free
    assert api.get("/models/alias", key=api.viewer).status_code == 404
    assert [model["id"] for model in api.get("/models", key=api.viewer, containing="e").json()["data"]] == ["free"]
    page = api.get("/models", key=api.viewer, limit=1).json()
    assert [model["id"] for model in api.get("/models", key=api.viewer, after=page["next"]).json()["data"]] == ["m"]


def test_backends(api: ControlApi) -> None:
    first, second = api.get("/backends", key=api.viewer).json()["data"]
    wanted = {
        "name": "a",
        "url": "http://127.0.0.1:8001",
        "kind": "vllm",
        "models": ["m", "free"],
        "reachable": True,
        "error": None,
        "asked_at": NOW_TEXT,
        "answered_at": NOW_TEXT,
        "drained": False,
        "weight": 1.0,
        "source": "file",
    }
    assert {field: first[field] for field in wanted} == wanted
    assert (second["url"], second["reachable"], second["error"]) == ("http://[::1]:8002", False, "/v1/models: refused")
    assert second["answered_at"] is None
    new = api.put("/backends/c", {"url": "http://127.0.0.1:8003", "models": ["x"]}, key=api.admin).json()
    assert (new["reachable"], new["models"], new["asked_at"]) == (None, ["x"], None)


# -- no --


def problem_of(answer: Any) -> dict[str, Any]:
    """RFC 9457, and OpenAI's `error` in it."""
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert list(problem) == ["type", "title", "status", "detail", "instance", "error"]
    assert problem["status"] == answer.status_code
    assert set(problem["error"]) == {"message", "type", "param", "code"}
    return problem


@pytest.mark.parametrize("path", ["/", "/v1/models", "/docs", "/redoc", "/keys/1/2", "/allowances", "/metrics"])
def test_an_unknown_path(api: ControlApi, path: str) -> None:  # failure 83
    problem = problem_of(api.get(path, key=api.admin))
    assert (problem["status"], problem["title"], problem["instance"]) == (404, "Not Found", path)
    assert problem["error"]["code"] == "not_found"


def test_every_kind_of_no_has_the_same_shape(api: ControlApi) -> None:  # failure 83
    answers = {
        400: api.get("/keys?revoked=perhaps", key=api.admin),
        401: api.get("/keys"),
        403: api.get("/admins", key=api.viewer),
        404: api.get("/keys/absent", key=api.admin),
        405: api.ask("TRACE", "/keys", key=api.admin),
        409: api.delete("/models/m", key=api.admin),
        413: api.put("/teams/x", b" " * 2**20 + b"{}", key=api.admin, headers={"content-type": "application/json"}),
        415: api.put("/teams/x", b"{}", key=api.admin),
    }
    document = api.get("/openapi.json", key=api.admin).json()
    for status, answer in answers.items():
        assert answer.status_code == status
        problem = problem_of(answer)
        jsonschema_rs.validate({**document, "$ref": "#/components/schemas/Problem"}, problem)
    assert answers[400].json()["error"]["param"] == "revoked"
    assert answers[401].headers["www-authenticate"] == "Bearer"


def test_a_database_that_is_down(tmp_path: Path) -> None:  # failure 46
    with ControlApi(tmp_path) as api:
        api.engine.dispose()
        for file in tmp_path.glob("glasshouse.db*"):
            file.unlink()
        (tmp_path / "glasshouse.db").mkdir()
        for answer in (api.get("/keys", local=True), api.get("/keys", key=api.admin), api.put("/teams/x", {}, local=True)):
            problem = problem_of(answer)
            assert (problem["status"], problem["error"]["code"]) == (503, "database_unavailable")
            assert answer.headers["retry-after"] == "1"
            assert str(tmp_path) not in answer.text
        assert api.get("/health").status_code == 200


@pytest.mark.parametrize("key", ["admin", "holder"])
def test_a_bug_stays_in_the_log(api: ControlApi, monkeypatch: pytest.MonkeyPatch, key: str) -> None:  # failure 83
    def broken(*_: object) -> None:
        raise RuntimeError("canary")

    monkeypatch.setattr(api.state.inventory, "serving", broken)
    monkeypatch.setattr("proxy.control.usage.Spending", broken)
    answer = api.get("/models" if key == "admin" else "/v1/usage", key=getattr(api, key))
    problem = problem_of(answer)
    assert (problem["status"], problem["error"]["code"]) == (500, "internal_error")
    assert "canary" not in answer.text
    assert "Traceback" not in answer.text


# -- what it says of itself --


def test_the_document(api: ControlApi) -> None:
    document = api.get("/openapi.json", key=api.holder).json()
    assert document["openapi"].startswith("3.1")
    assert document["security"] == [{"bearer": []}, {"header": []}]
    schemas = document["components"]["schemas"]
    assert {"TeamSettings", "KeySettings", "Problem", "Team", "Page_Team_", "NewKey", "OwnUsage"} <= schemas.keys()
    operations = {
        f"{method.upper()} {path}": operation for path, each in document["paths"].items() for method, operation in each.items()
    }
    assert operations["GET /health"]["security"] == []
    assert all("security" not in operation for name, operation in operations.items() if name != "GET /health")
    for name, operation in operations.items():
        problem = {"$ref": "#/components/responses/Problem"}
        assert (operation["responses"]["4XX"], operation["responses"]["5XX"]) == (problem, problem)
        assert "422" not in operation["responses"]
        if name.startswith(("PUT", "PATCH")):
            assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].startswith("#/components/schemas/")
        good = [status for status in operation["responses"] if status.startswith("2")]
        assert good, name
    assert "Who may: admin, manager." in operations["POST /keys"]["description"]
    assert not {schema for schema in schemas if schema.startswith(("HTTPValidation", "ValidationError"))}


def test_the_documents_references_lead_somewhere(api: ControlApi) -> None:
    document = openapi.document(api.app.routes)

    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                yield value["$ref"]
            for each in value.values():
                yield from references(each)
        elif isinstance(value, list):
            for each in value:
                yield from references(each)

    for reference in set(references(document)):
        place: Any = document
        for step in reference.removeprefix("#/").split("/"):
            place = place[step]
        assert place


def test_answers_are_as_the_document_says(api: ControlApi) -> None:
    document = api.get("/openapi.json", key=api.admin).json()
    api.put("/teams/t", {"budgets": [{"money": 5, "per": "day"}]}, key=api.admin)
    api.put("/models/x", {"price": {"input": 1}}, key=api.admin)
    for path, operations in document["paths"].items():
        if "{" in path or "get" not in operations or path == "/openapi.json":
            continue
        answer = api.get(path, key=api.holder if path == "/v1/usage" else api.admin)
        schema = operations["get"]["responses"]["200"]["content"]["application/json"]["schema"]
        jsonschema_rs.validate({**document, **schema}, answer.json())
