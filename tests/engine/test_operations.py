"""Every operation on a real vLLM: straight and through the proxy clients are told the same; errors are the engine's own bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import Start
from tests.engine.answers import told
from tests.engine.operations import POOLED, STREAMS, UNASKED, WHOLE, Case
from tests.engine.vllm import NAME, PATIENCE, POOLING, Engine, Engines
from tests.support.endpoints import Endpoint
from tests.support.wire_client import Reply, WireClient

CAPTURED: Final = Path(__file__).parents[1] / "fixtures" / "vllm-0.32.0"
PATHS: Final = {"err_messages": "/v1/messages", "err_responses": "/v1/responses"}
OURS: Final = ("err_model", "err_model_stream", "err_nojson")
"""Found before there is an engine to ask: an unknown model, and a body that can't be read."""
ERRORS: Final = sorted(
    name.name.removesuffix(".request.json")
    for name in CAPTURED.glob("err_*.request.json")
    if (CAPTURED / name.name.replace(".request.json", ".headers")).read_text().split()[1] != "200"
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def straight(tiny: Engine) -> Endpoint:
    return Endpoint(tiny.url, "unused")


def ask(endpoint: Endpoint, path: str, body: object, content_type: str = "application/json") -> Reply:
    with WireClient(endpoint.url, timeout=PATIENCE) as client:
        headers = {"Content-Type": content_type} if body is not None else None
        return client.ask(path, body, key=endpoint.key, headers=headers)


def asked(endpoint: Endpoint, case: Case) -> Reply:
    return ask(endpoint, case.path, case.body, case.content_type)


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_answer_is_the_engine_s(straight: Endpoint, through: Endpoint, name: str) -> None:
    case = WHOLE[name]
    asked(straight, case)  # from here on its prompt is in the prefix cache, and every answer says so
    theirs, ours = asked(straight, case), asked(through, case)
    assert theirs.status == case.status
    assert told(ours) == told(theirs)


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_the_engine_s(straight: Endpoint, through: Endpoint, name: str) -> None:
    case = STREAMS[name]
    asked(straight, case)
    theirs, ours = asked(straight, case), asked(through, case)
    assert theirs.status == 200
    assert len(theirs.events) > 2
    assert told(ours) == told(theirs)


@pytest.mark.parametrize("name", UNASKED)
def test_usage_that_nobody_asked_for_is_not_told(through: Endpoint, name: str) -> None:  # failure 17
    reply = asked(through, STREAMS[name])
    assert reply.status == 200
    assert b'"usage":{' not in reply.body
    assert b'"metrics"' not in reply.body


def captured_request(name: str) -> tuple[str, bytes]:
    return PATHS.get(name, "/v1/chat/completions"), (CAPTURED / f"{name}.request.json").read_bytes()


@pytest.mark.parametrize("name", [name for name in ERRORS if name not in OURS])
def test_an_error_is_the_engine_s_own(straight: Endpoint, through: Endpoint, name: str) -> None:  # failure 9
    path, body = captured_request(name)
    theirs, ours = ask(straight, path, body), ask(through, path, body)
    assert 400 <= theirs.status < 500
    assert (ours.status, ours.header("content-type")) == (theirs.status, theirs.header("content-type"))
    assert ours.body == theirs.body


@pytest.mark.parametrize("name", OURS)
def test_an_error_of_ours_is_like_the_engine_s(straight: Endpoint, through: Endpoint, name: str) -> None:
    path, body = captured_request(name)
    theirs, ours = ask(straight, path, body), ask(through, path, body)
    assert (ours.status, ours.header("content-type")) == (theirs.status, theirs.header("content-type"))
    assert ours.json()["error"].keys() == theirs.json()["error"].keys()


def test_the_captured_errors_are_what_this_version_says(straight: Endpoint) -> None:
    """What the other tests replay is what a vLLM of this version answers today."""
    differing = {
        name: (said, kept)
        for name in ERRORS
        if (said := ask(straight, *captured_request(name)).body) != (kept := (CAPTURED / f"{name}.body").read_bytes())
    }
    assert not differing


def test_what_is_not_generated_is_the_engine_s_too(glasshouse: Start, engines: Engines) -> None:
    engine = engines.get("pooling", POOLING)
    proxy = glasshouse([engine.url])
    try:
        theirs = {name: asked(Endpoint(engine.url, "unused"), case) for name, case in POOLED.items()}
        before = engine.counts()
        ours = {name: asked(Endpoint(proxy.url, proxy.key), case) for name, case in POOLED.items()}
        took = engine.counts() - before
    finally:
        engine.stop()  # nobody else needs it, and its memory is a gigabyte
    assert {name: reply.status for name, reply in theirs.items()} == dict.fromkeys(POOLED, 200)
    assert {name: told(reply) for name, reply in ours.items()} == {name: told(reply) for name, reply in theirs.items()}
    rows = proxy.rows(len(POOLED))
    assert [row["input_tokens"] for row in rows] == [reply.json()["usage"]["prompt_tokens"] for reply in ours.values()]
    assert {(row["outcome"], row["usage_source"], row["output_tokens"]) for row in rows} == {("ok", "engine", 0)}
    assert (took.prompt, took.generated) == (sum(row["input_tokens"] for row in rows), 0)


def test_the_models_are_the_engine_s_own_entries(straight: Endpoint, through: Endpoint) -> None:
    (theirs,) = ask(straight, "/v1/models", None).json()["data"]
    ours = ask(through, f"/v1/models/{NAME}", None).json()
    passing = {"created", "permission"}
    assert {**ours, **dict.fromkeys(passing)} == {**theirs, **dict.fromkeys(passing)}, json.dumps(ours)
