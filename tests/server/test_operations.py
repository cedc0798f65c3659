"""Every operation over real sockets: the same bytes as straight from the engine, a row that says what it took, and errors and
broken streams in that API's own shape."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import pytest

from proxy.errors import Outcome
from proxy.exchange import UsageSource
from proxy.wire.operation import EngineOperation
from proxy.wire.operations import OPERATIONS
from tests.server.conftest import StartWorker
from tests.support.scripted_vllm import ScriptedVLLM
from tests.support.scripted_vllm.audio import tone
from tests.support.wire_client import Reply, anonymous, ask
from tests.support.worker import KEY, MODEL, Worker

BOUNDARY: Final = "a-boundary"
FORM: Final = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
SOUND: Final = tone(1.2)
HI: Final = [{"role": "user", "content": "Hi"}]


class Case(NamedTuple):
    path: str
    fields: dict[str, Any]
    source: UsageSource = UsageSource.ENGINE
    input_said: bool = True
    output: bool = True
    streams: bool = False


CASES: Final = [
    Case("/v1/chat/completions", {"messages": HI}, streams=True),
    Case("/v1/completions", {"prompt": "Hi"}, streams=True),
    Case("/v1/responses", {"input": "Hi"}, streams=True),
    Case("/v1/messages", {"messages": HI, "max_tokens": 50}, streams=True),
    Case("/v1/messages/count_tokens", {"messages": HI}, source=UsageSource.NONE),
    Case("/v1/embeddings", {"input": "Hi"}, output=False),
    Case("/rerank", {"query": "Hi", "documents": ["a", "b"]}, output=False),
    Case("/v1/rerank", {"query": "Hi", "documents": ["a", "b"]}, output=False),
    Case("/v2/rerank", {"query": "Hi", "documents": ["a", "b"]}, output=False),
    Case("/score", {"queries": "Hi", "documents": ["a", "b"]}, output=False),
    Case("/v1/score", {"queries": "Hi", "documents": ["a", "b"]}, output=False),
    Case("/v1/audio/transcriptions", {"file": SOUND}, source=UsageSource.ESTIMATED, streams=True),
    Case("/v1/audio/translations", {"file": SOUND}, source=UsageSource.ESTIMATED, streams=True),
    Case("/tokenize", {"prompt": "Hi"}, source=UsageSource.NONE),
    Case("/detokenize", {"tokens": [1, 2]}, source=UsageSource.NONE),
]
STREAMS: Final = [case for case in CASES if case.streams]


def by_path(case: Case) -> str:
    return case.path


def form(fields: dict[str, Any]) -> bytes:
    parts = []
    for name, value in fields.items():
        more = '; filename="a.wav"\r\nContent-Type: audio/wav' if isinstance(value, bytes) else ""
        data = (
            value if isinstance(value, bytes) else (json.dumps(value) if isinstance(value, dict | bool) else str(value)).encode()
        )
        parts.append(f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + data + b"\r\n")
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def message(case: Case, **more: Any) -> tuple[object, dict[str, str]]:
    """(body, headers) of a request."""
    fields = {"model": MODEL, **case.fields, **more}
    return (form(fields), FORM) if "file" in case.fields else (fields, {})


@pytest.fixture(scope="module")
def shared(shared_worker: StartWorker, shared_vllm: ScriptedVLLM) -> Worker:
    return shared_worker(shared_vllm.url)


def send(worker: Worker, case: Case, **more: Any) -> Reply:
    body, headers = message(case, **more)
    return worker.ask(body, case.path, headers=headers)


def send_straight(vllm: ScriptedVLLM, case: Case, **more: Any) -> Reply:
    body, headers = message(case, **more)
    return ask(vllm.url, case.path, body, headers=headers)


def test_every_operation_is_here() -> None:
    assert {case.path.encode() for case in CASES} == {each.path for each in OPERATIONS if isinstance(each, EngineOperation)}


@pytest.mark.parametrize("case", CASES, ids=by_path)
def test_a_whole_answer_is_the_engines(shared: Worker, shared_vllm: ScriptedVLLM, case: Case) -> None:
    straight, through = send_straight(shared_vllm, case), send(shared, case)
    assert (through.status, anonymous(through.body)) == (200, anonymous(straight.body))
    assert through.header("content-type") == straight.header("content-type")
    record = shared.record_of(through)
    assert (record.outcome, record.usage_source, record.model, record.stream) == (Outcome.OK, case.source, MODEL, False)
    if case.source == UsageSource.ENGINE:
        usage = through.json()["usage"]
        assert record.input_tokens == usage.get("prompt_tokens", usage.get("input_tokens")) > 0
        assert record.output_tokens == usage.get("completion_tokens", usage.get("output_tokens", 0))
        assert (record.output_tokens > 0) == case.output
    if case.source == UsageSource.NONE:
        assert (record.input_tokens, record.output_tokens, record.cost_nano) == (0, 0, 0)


@pytest.mark.parametrize("case", STREAMS, ids=by_path)
def test_a_stream_is_the_engines_and_its_tokens_are_counted(shared: Worker, shared_vllm: ScriptedVLLM, case: Case) -> None:
    script = {"tokens": 9}
    straight, through = (
        send_straight(shared_vllm, case, stream=True, script=script),
        send(shared, case, stream=True, script=script),
    )
    assert (through.status, anonymous(through.body)) == (200, anonymous(straight.body))
    assert (through.ending, through.header("content-type")) == ("complete", straight.header("content-type"))
    record = shared.record_of(through)
    assert (record.outcome, record.stream, record.usage_source) == (Outcome.OK, True, UsageSource.ENGINE)
    assert record.output_tokens == 9
    assert record.input_tokens > 0
    assert record.first_token_ns > 0
    assert len(record.finish_reasons) == 1


def read_error_openai(event: bytes) -> str:
    return str(json.loads(event.removeprefix(b"data: "))["error"]["code"])


def read_error_responses(event: bytes) -> str:
    name, data = event.split(b"\n")[:2]
    said = json.loads(data.removeprefix(b"data: "))
    assert (name, said["type"]) == (b"event: error", "error")
    assert said["sequence_number"] > 3
    return str(said["code"])


def read_error_messages(event: bytes) -> str:
    name, data = event.split(b"\n")[:2]
    said = json.loads(data.removeprefix(b"data: "))
    assert (name, said["type"], said["error"]["type"]) == (b"event: error", "error", "api_error")
    return "upstream_disconnected"


READERS: Final[dict[str, Callable[[bytes], str]]] = {"/v1/responses": read_error_responses, "/v1/messages": read_error_messages}


@pytest.mark.parametrize("cut", ["reset", "close", "clean"])
@pytest.mark.parametrize("case", STREAMS, ids=by_path)
def test_a_stream_that_breaks_says_so_in_its_own_words(shared: Worker, case: Case, cut: str) -> None:  # failures 4, 5
    through = send(shared, case, stream=True, script={"tokens": 20, "cut_after_events": 7, "cut": cut})
    assert (through.status, through.ending) == (200, "closed")
    assert READERS.get(case.path, read_error_openai)(through.events[-1]) == "upstream_disconnected"
    assert b"[DONE]" not in through.body
    record = shared.record_of(through)
    assert (record.outcome, record.error_code) == (Outcome.UPSTREAM_ERROR, "upstream_disconnected")
    assert record.output_tokens > 0
    assert record.input_tokens > 0 or record.usage_source == UsageSource.ESTIMATED


@pytest.mark.parametrize("case", STREAMS, ids=by_path)
def test_an_error_event_passes_and_is_a_failure(shared: Worker, shared_vllm: ScriptedVLLM, case: Case) -> None:  # failure 6
    script = {"tokens": 20, "error_event_after": 6}
    straight, through = (
        send_straight(shared_vllm, case, stream=True, script=script),
        send(shared, case, stream=True, script=script),
    )
    record = shared.record_of(through)
    assert record.outcome == Outcome.UPSTREAM_ERROR
    if straight.ending == "complete":
        assert anonymous(through.body) == anonymous(straight.body)
    else:  # vLLM has no event for it in this API, and closes the connection
        assert through.body.startswith(b"event: response.created")
        assert b"event: error" in through.body


@pytest.mark.parametrize("case", STREAMS, ids=by_path)
def test_a_client_that_leaves_stops_the_engine(worker: StartWorker, vllm: ScriptedVLLM, case: Case) -> None:  # failure 1
    running = worker(vllm.url)
    body, headers = message(case, stream=True, script={"tokens": 1000, "interval": 0.01})
    with running.begin(body, case.path, headers=headers) as client:
        client.read(events=9)
    record = running.record()
    assert record.outcome == Outcome.CLIENT_GONE
    assert 0 < record.output_tokens < 1000
    typed = case.path in READERS
    assert record.usage_source == (UsageSource.ESTIMATED if typed else UsageSource.ENGINE)
    running.until(lambda: vllm.in_flight == 0 or None, "the engine to stop")


@pytest.mark.parametrize("case", CASES, ids=by_path)
@pytest.mark.parametrize(("status", "error"), [(400, "No."), (404, "Gone."), (429, "Slow."), (500, "Broken."), (503, "Busy.")])
def test_an_engines_error_passes_as_it_is(
    shared: Worker, shared_vllm: ScriptedVLLM, case: Case, status: int, error: str
) -> None:  # failure 9
    script = {"status": status, "error": error}
    straight, through = send_straight(shared_vllm, case, script=script), send(shared, case, script=script)
    assert (through.status, through.body) == (status, straight.body)
    record = shared.record_of(through)
    assert record.outcome == (Outcome.CLIENT_ERROR if status in (400, 404) else Outcome.UPSTREAM_ERROR)
    assert record.error == f"The engine answered with status {status}."  # in its own words only where content is captured


def assert_shape(case: Case, reply: Reply, kind: str, code: str | None) -> None:
    said = reply.json()
    assert reply.header("content-type") == "application/json"
    if case.path.startswith("/v1/messages"):
        assert (said["type"], said["error"]["type"]) == ("error", kind)
        assert set(said["error"]) == {"type", "message"}
    else:
        assert set(said) == {"error"}
        assert set(said["error"]) == {"message", "type", "param", "code"}
        assert said["error"]["code"] == code


@pytest.mark.parametrize("case", CASES, ids=by_path)
def test_errors_of_ours_have_the_apis_shape(shared: Worker, case: Case) -> None:
    body, headers = message(case)
    unknown = shared.ask(body, case.path, headers=headers, key="nobody")
    assert unknown.status == 401
    assert_shape(case, unknown, "authentication_error", "invalid_api_key")
    missing = send(shared, case, model="nowhere")
    assert missing.status == 404
    assert_shape(case, missing, "not_found_error", "model_not_found")
    media = shared.ask(body, case.path, headers={"Content-Type": "text/plain"})
    assert media.status == 415
    assert_shape(case, media, "invalid_request_error", "unsupported_media_type")
    broken = shared.ask(b"{", case.path, headers=headers)
    assert broken.status == 400
    assert_shape(case, broken, "invalid_request_error", None)


@pytest.mark.parametrize("case", CASES, ids=by_path)
def test_an_engine_that_cannot_be_reached(worker: StartWorker, case: Case) -> None:
    running = worker("http://127.0.0.1:9")
    reply = send(running, case)
    assert reply.status == 503
    assert_shape(case, reply, "overloaded_error", "upstream_unreachable")


@pytest.mark.parametrize("case", CASES, ids=by_path)
def test_the_model_may_be_left_out_where_there_is_one(shared: Worker, shared_vllm: ScriptedVLLM, case: Case) -> None:
    body, headers = message(case)
    if isinstance(body, dict):
        body.pop("model")
    else:
        body, headers = form(case.fields), FORM
    straight = ask(shared_vllm.url, case.path, body, headers=headers)
    through = shared.ask(body, case.path, headers=headers)
    assert (through.status, anonymous(through.body)) == (straight.status, anonymous(straight.body))


def test_it_must_be_named_where_there_are_several(worker: StartWorker, vllm: ScriptedVLLM) -> None:
    running = worker(vllm.url, models=("a", "b"))
    for case in CASES:
        body, headers = message(case)
        if isinstance(body, dict):
            body.pop("model")
        else:
            body = form(case.fields)
        assert running.ask(body, case.path, headers=headers).status == 400
    assert not vllm.requests


def test_what_only_another_request_could_account_is_refused(shared: Worker) -> None:
    for field in ({"background": True}, {"request_id": "mine"}):
        reply = shared.ask({"model": MODEL, "input": "Hi", **field}, "/v1/responses")
        assert (reply.status, reply.json()["error"]["param"]) == (400, next(iter(field)))


def test_a_streamed_transcription_shows_no_usage_that_was_not_asked_for(
    shared: Worker, shared_vllm: ScriptedVLLM
) -> None:  # failure 17
    [case] = [case for case in CASES if case.path.endswith("transcriptions")]
    assert b'"usage"' not in send(shared, case, stream=True).body
    asked = {"stream": True, "stream_include_usage": True}
    assert anonymous(send(shared, case, **asked).body) == anonymous(send_straight(shared_vllm, case, **asked).body)
    received = shared_vllm.requests[-2]
    assert received.body.endswith(form({"model": MODEL, **case.fields, **asked}))


def test_what_was_heard_is_on_record(shared: Worker) -> None:
    [case] = [case for case in CASES if case.path.endswith("transcriptions")]
    reply = send(shared, case)
    assert shared.record_of(reply).audio_seconds == reply.json()["usage"]["seconds"] == 2


def test_a_key_that_is_nobodys_reaches_no_engine(shared: Worker, shared_vllm: ScriptedVLLM) -> None:
    before = len(shared_vllm.requests)
    for case in CASES:
        body, headers = message(case)
        assert shared.ask(body, case.path, headers=headers, key=KEY + "x").status == 401
    assert len(shared_vllm.requests) == before


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_the_engine_gave_up_is_none(shared: Worker, stream: bool) -> None:  # failure 50, of an engine
    case = CASES[0]
    reply = send(shared, case, stream=stream, script={"tokens": 3, "finish": "abort"})
    assert (reply.status, reply.ending) == (200, "complete")  # it passes as the engine wrote it
    record = shared.record_of(reply)
    assert (record.outcome, record.error_code, record.output_tokens) == (Outcome.UPSTREAM_ERROR, "engine_aborted", 3)
