"""What callers write stays where it belongs: in no other line of a log, on no other path of an engine, at no other address."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any, Final

import pytest

from proxy.logs import JsonFormatter
from tests.server.conftest import StartWorker
from tests.support.plane import KEY as PLANE_KEY
from tests.support.plane import Plane
from tests.support.scripted_vllm import ScriptedVLLM
from tests.support.wire_client import Reply, WireClient, ask, request
from tests.support.worker import CHAT, KEY, MODEL, Worker, chat

METADATA: Final = "http://169.254.169.254/latest/meta-data/"
FORGED: Final = '\r\n{"level":"error","message":"forged"}\n\x1b[31mred\x9b\u2028\x00'


@pytest.fixture(scope="module")
def running(shared_worker: StartWorker, shared_vllm: ScriptedVLLM) -> Worker:
    return shared_worker(shared_vllm.url, config={"media": {"hosts": ["images.example.com"]}})


def image(url: str) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url}}
    return chat(stream=False, messages=[{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}])


def refused(reply: Reply, field: str) -> None:
    error = json.loads(reply.body)["error"]
    assert (reply.status, error["code"], error["param"]) == (400, "url_not_allowed", field)


def test_an_engine_is_told_to_fetch_nothing_but_what_is_allowed(running: Worker, shared_vllm: ScriptedVLLM) -> None:  # failure 72
    before = len(shared_vllm.requests)
    for url in (METADATA, "file:///etc/passwd", "https://images.example.com\\@169.254.169.254/", "https://169.254.169.254/"):
        reply = running.ask(image(url))
        refused(reply, "messages[0].content[0].image_url.url")
        record = running.record_of(reply)
        assert (record.error_code, record.attempts, "169.254" in record.error) == ("url_not_allowed", [], False)
    assert len(shared_vllm.requests) == before
    for url in ("data:image/png;base64,iVBORw0KGgo=", "https://images.example.com/a.png"):
        assert running.ask(image(url)).status == 200
        assert json.loads(shared_vllm.requests[-1].body)["messages"][0]["content"][0]["image_url"]["url"] == url


def test_anthropics_and_the_newer_api_name_them_in_other_words(running: Worker, shared_vllm: ScriptedVLLM) -> None:  # failure 72
    before = len(shared_vllm.requests)
    source = {"type": "image", "source": {"type": "url", "url": METADATA}}
    reply = running.ask({"model": MODEL, "max_tokens": 5, "messages": [{"role": "user", "content": [source]}]}, "/v1/messages")
    assert (reply.status, json.loads(reply.body)["error"]["type"]) == (400, "invalid_request_error")
    assert "`messages[0].content[0].source.url`" in json.loads(reply.body)["error"]["message"]
    part = {"type": "input_image", "image_url": METADATA}
    reply = running.ask({"model": MODEL, "input": [{"role": "user", "content": [part]}]}, "/v1/responses")
    refused(reply, "input[0].content[0].image_url")
    document = {"content": [{"type": "image_url", "image_url": {"url": METADATA}}]}
    reply = running.ask({"model": MODEL, "query": "x", "documents": [document]}, "/v1/rerank")
    refused(reply, "documents[0].content[0].image_url.url")
    assert len(shared_vllm.requests) == before


INTERNAL: Final = [
    *("/metrics", "/inference/v1/generate", "/sleep", "/wake_up", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
    *(
        "/collective_rpc",
        "/reset_prefix_cache",
        "/server_info",
        "/docs",
        "/openapi.json",
        "/redoc",
        "/version",
        "/load",
        "/pooling",
    ),
    *("/invocations", "/is_sleeping", "/scale_elastic_ep", "/start_profile", "/tokenizer_info", "/update_weights", "/classify"),
]


@pytest.mark.parametrize("path", INTERNAL)
def test_an_engines_own_paths_are_not_there(running: Worker, shared_vllm: ScriptedVLLM, path: str) -> None:  # failure 73
    before = len(shared_vllm.requests)
    for method in ("GET", "POST"):
        with WireClient(running.url) as client:
            client.send(request(path, {} if method == "POST" else None, method=method, key=KEY))
            assert client.read().status == 404
    assert len(shared_vllm.requests) == before


@pytest.mark.parametrize("host", ["x/../metrics", "x?/metrics", "x#/metrics"])
def test_a_host_changes_no_path(running: Worker, shared_vllm: ScriptedVLLM, host: str) -> None:  # failure 34
    before = len(shared_vllm.requests)
    with WireClient(running.url) as client:
        client.send(request(CHAT, chat(stream=False), key=KEY, host=host))
        assert client.read().status == 400
    assert len(shared_vllm.requests) == before


@pytest.mark.parametrize(
    "path", ["//v1/chat/completions", "/v1/x/../chat/completions", "/v1/chat%2fcompletions", "/V1/chat/completions"]
)
def test_a_path_is_the_one_that_was_sent(running: Worker, shared_vllm: ScriptedVLLM, path: str) -> None:  # failure 35
    before = len(shared_vllm.requests)
    assert ask(running.url, path, chat(stream=False), key=KEY).status == 404
    assert len(shared_vllm.requests) == before


def test_nothing_that_callers_write_begins_a_line_of_the_log(worker: StartWorker, tmp_path: Path) -> None:  # failure 78
    """Also where something has to be logged: a snapshot that can't be read."""
    running = worker(config={"users": {"a": {}}})
    for body in ({"model": FORGED, "messages": []}, {FORGED: 1}, {"model": MODEL, "user": FORGED, "n": FORGED}):
        assert running.ask(body).status in (400, 404, 503)
    for headers in ({"X-Request-Id": "x\x1b[31m"}, {"User-Agent": "x\x85"}, {"Traceparent": "\x9b"}):
        assert running.ask(chat(), headers=headers).status in (400, 404, 503)
    assert ask(running.url, "/\x85\x9b[31m", key=KEY).status in (400, 404)
    running.settings.snapshot_path.with_name("new").write_bytes(FORGED.encode())
    running.settings.snapshot_path.with_name("new").replace(running.settings.snapshot_path)
    running.until(
        lambda: [line for line in running.log() if "snapshot" in line["message"]] or None, "the bad snapshot to be told of"
    )
    running.kill()
    log = (tmp_path / "worker-0" / "worker.log").read_text()
    for line in log.splitlines():
        assert line.isprintable()
        assert json.loads(line)["message"] != "forged"
    assert log.count("\n") == len(log.splitlines())


def test_a_bug_that_quotes_a_caller_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # failure 78
    def bug(name: str | None, *more: object) -> None:
        raise ValueError(name)

    output = io.StringIO()
    root = logging.getLogger()
    handler = logging.StreamHandler(output)
    handler.setFormatter(JsonFormatter("worker"))
    root.addHandler(handler)
    try:
        with Plane(tmp_path) as plane:
            monkeypatch.setattr(plane.pipeline, "_route", bug)
            client = plane.client()
            client.says(request(CHAT, {"model": FORGED, "messages": []}, key=PLANE_KEY))
            assert client.heard.startswith(b"HTTP/1.1 500 ")
    finally:
        root.removeHandler(handler)
    [line] = output.getvalue().splitlines()
    assert line.isprintable()
    assert line.isascii()
    assert FORGED in json.loads(line)["exception"]
