"""The embedded companions, for real: an engine that generates, and Phoenix that keeps what it is sent to itself.

Their environments are built once, in the folder named by GLASSHOUSE_TEST_ENV_DIR or in `.glasshouse/env`, which `make up` shares.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from proxy.embedded import Companion, environments
from proxy.embedded.engine import CONTEXT_TOKENS, MODEL_NAME, SLOTS, engine
from proxy.embedded.environments import Recipe
from proxy.embedded.phoenix import phoenix

ROOT = Path(__file__).parents[2]
READY_SECONDS = 120.0

pytestmark = pytest.mark.timeout(900)  # the first run fetches what it needs


def environment_directory() -> Path:
    if named := os.environ.get("GLASSHOUSE_TEST_ENV_DIR"):
        return Path(named)
    state = ROOT / ".glasshouse"
    state.mkdir(mode=0o700, exist_ok=True)  # as `make up` would make it
    return state / "env"


def prepared(recipe: Recipe) -> Path:
    return environments.prepare(recipe, environment_directory(), print)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def get(url: str) -> tuple[int, bytes]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=10)
    try:
        connection.request("GET", parts.path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def is_ready(companion: Companion) -> bool:
    try:
        return get(companion.ready_url)[0] == 200
    except OSError:
        return False


@contextmanager
def running(companion: Companion, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start it as a supervisor does, wait until it is ready, and see that it stops as it promises."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            companion.argv, env=dict(companion.env), start_new_session=True, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not is_ready(companion):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield process
        process.terminate()
        assert process.wait(companion.stop_timeout) in (0, -15), log.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def engine_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    port = free_port()
    with running(engine("engine-0", prepared(environments.ENGINE), port), tmp_path_factory.mktemp("engine") / "log"):
        yield port


@contextmanager
def asking(port: int, path: str, **body: object) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        yield response
        response.close()
    finally:
        connection.close()


def events(port: int, path: str, **body: object) -> list[Any]:
    with asking(port, path, stream=True, **body) as response:
        lines = [line.removeprefix(b"data: ") for line in response.read().splitlines() if line.startswith(b"data: ")]
    assert lines.pop() == b"[DONE]"
    return [json.loads(line) for line in lines]


FRANCE = [{"role": "user", "content": "What is the capital of France? Answer in a sentence."}]


def test_the_engine_answers(engine_port: int) -> None:
    with asking(engine_port, "/v1/chat/completions", model=MODEL_NAME, messages=FRANCE, max_tokens=30) as response:
        answer = json.load(response)
    assert answer["model"] == MODEL_NAME
    assert answer["choices"][0]["message"]["content"].strip()
    assert 0 < answer["usage"]["completion_tokens"] <= 30


def test_the_engine_streams_with_usage_when_asked(engine_port: int) -> None:
    body: dict[str, object] = {"model": MODEL_NAME, "messages": FRANCE, "max_tokens": 8, "ignore_eos": True}
    usage = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(engine_port, "/v1/chat/completions", stream_options=usage, **body)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    assert not any("usage" in chunk for chunk in chunks[:-1])
    assert not any("usage" in chunk for chunk in events(engine_port, "/v1/chat/completions", **body))


def test_the_engine_lists_its_model_and_its_share_of_context(engine_port: int) -> None:
    status, body = get(f"http://127.0.0.1:{engine_port}/v1/models")
    (model,) = json.loads(body)["data"]
    assert (status, model["id"], model["meta"]["n_ctx"]) == (200, MODEL_NAME, CONTEXT_TOKENS // SLOTS)
    assert b"llamacpp:tokens_predicted_total" in get(f"http://127.0.0.1:{engine_port}/metrics")[1]


def test_the_engine_has_no_page_and_admits_no_foreign_one(engine_port: int) -> None:
    assert get(f"http://127.0.0.1:{engine_port}/")[0] == 404
    with asking(engine_port, "/v1/completions", prompt="Hi", max_tokens=1) as response:
        assert not response.headers["Access-Control-Allow-Origin"]


def test_the_engine_stops_at_once_with_a_stream_in_flight(tmp_path: Path) -> None:
    port = free_port()
    with (
        running(engine("engine-1", prepared(environments.ENGINE), port), tmp_path / "log") as process,
        asking(port, "/v1/chat/completions", messages=FRANCE, stream=True, ignore_eos=True) as stream,
    ):
        assert stream.readline().startswith(b"data: ")
        process.terminate()
        assert process.wait(5) == 0


def test_an_engine_whose_port_is_taken_says_so(engine_port: int) -> None:
    taken = engine("engine-1", prepared(environments.ENGINE), engine_port)
    ended = subprocess.run(taken.argv, env=dict(taken.env), capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert f"cannot serve on 127.0.0.1:{engine_port}" in ended.stderr


@pytest.fixture(scope="module")
def phoenix_ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int]]:
    if not environments.find(environments.PHOENIX, environment_directory()) and not os.environ.get("GLASSHOUSE_REQUIRE_ALL"):
        pytest.skip("Phoenix (830 MB) is not installed; GLASSHOUSE_REQUIRE_ALL=1 or one `make up` installs it")
    state = tmp_path_factory.mktemp("phoenix")
    port, grpc_port = free_port(), free_port()
    with running(phoenix(prepared(environments.PHOENIX), state, port, grpc_port), state / "log"):
        yield port, grpc_port
    assert (state / "phoenix" / "phoenix.db").stat().st_mode & 0o077 == 0


def test_phoenix_takes_a_span(phoenix_ports: tuple[int, int]) -> None:
    base = f"http://127.0.0.1:{phoenix_ports[0]}"
    provider = TracerProvider(resource=Resource({"openinference.project.name": "embedded"}))
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(f"{base}/v1/traces")))
    with provider.get_tracer("test").start_as_current_span("chat", attributes={"openinference.span.kind": "LLM"}) as span:
        trace_id = f"{span.get_span_context().trace_id:032x}"
    provider.shutdown()
    deadline = time.monotonic() + 30
    while (answer := get(f"{base}/v1/projects/embedded/spans"))[0] != 200 or not json.loads(answer[1])["data"]:
        assert time.monotonic() < deadline, answer
        time.sleep(0.05)
    (kept,) = json.loads(answer[1])["data"]
    assert (kept["name"], kept["span_kind"], kept["context"]["trace_id"]) == ("chat", "LLM", trace_id)


def other_address() -> str | None:
    """An address of this machine that is not loopback: where a packet to the outside would leave from (none is sent)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        address: str = probe.getsockname()[0]
        return address


def test_phoenix_listens_on_loopback_only(phoenix_ports: tuple[int, int]) -> None:
    for port in phoenix_ports:
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
        for address in ("127.0.0.2", "::1", other_address()):
            if address is not None:
                with pytest.raises(OSError, match=r"refused|unreachable|Cannot assign"):
                    socket.create_connection((address, port), timeout=10)
