"""The scripted server against what a real vLLM 0.32.0 sent, byte for byte, and against its own promises."""

from __future__ import annotations

import base64
import json
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.scripted_vllm import Script, ScriptedVLLM, captured
from tests.support.wire_client import Reply, WireClient, anonymous, ask, request

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
FRANCE = "The capital of France is Paris."


@pytest.fixture(scope="module")
def vllm() -> Iterator[ScriptedVLLM]:
    with ScriptedVLLM() as server:
        yield server
        server.wait_idle()


def chat(vllm: ScriptedVLLM, *, stream: bool = True, **script: Any) -> Reply:
    return ask(vllm.url, CHAT, chat_body(stream=stream, **script))


def chat_body(*, stream: bool = True, more: dict[str, Any] | None = None, **script: Any) -> dict[str, Any]:
    body = {"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}], "stream": stream}
    return {**body, **(more or {}), "script": script}


# --- as the real one -------------------------------------------------------------------------------------------------

N2 = {"pieces": [["The", " capital", " of", " France", " is"], ["Un", "s", "mal", "on", ","]], "finish": "length"}
CACHED: dict[str, Any] = {"tokens": 6, "cached_tokens": 128, "prompt_tokens": 151, "finish": "length"}


@pytest.mark.parametrize(
    ("name", "path", "script"),
    [
        ("chat", CHAT, {"content": FRANCE}),
        ("chat_length", CHAT, {"content": "The capital of", "finish": "length"}),
        ("chat_stream", CHAT, {"content": FRANCE}),
        ("chat_stream_usage", CHAT, {"content": FRANCE}),
        ("chat_stream_usage_cont", CHAT, {"content": FRANCE}),
        ("chat_stream_n2", CHAT, {**N2, "order": [0, 0, 1, 0, 1, 0, 1, 0, 1, 1]}),
        ("completions", TEXT, {"content": " Paris.\n\nThe answer is:", "finish": "length"}),
        ("completions_stream", TEXT, {"content": " Paris.\n\nThe", "finish": "length"}),
        ("completions_batch", TEXT, {"pieces": [["-", "1", "0"], ["-", "1", "1"]], "finish": "length"}),
        ("content_parts", CHAT, {"pieces": [["Co", "ffee"]], "finish": "length"}),
        ("err_role", CHAT, {"pieces": [["Make", " j"]], "finish": "length"}),
        ("responses", RESPONSES, {"content": FRANCE}),
        ("responses_stream", RESPONSES, {"content": FRANCE}),
        ("messages", MESSAGES, {"content": FRANCE}),
        ("messages_stream", MESSAGES, {"content": FRANCE}),
        ("messages_count", f"{MESSAGES}/count_tokens", {}),
        ("tokenize", "/tokenize", {}),
        ("detokenize", "/detokenize", {}),
    ],
)
def test_an_answer_is_the_captured_one(vllm: ScriptedVLLM, name: str, path: str, script: dict[str, Any]) -> None:
    sample = captured.load(name)
    reply = ask(vllm.url, path, {**json.loads(sample.request), "script": script})
    assert reply.anonymous == anonymous(sample.body)
    assert [key for key, _ in reply.headers] == [key.decode() for key, _ in sample.headers]
    assert reply.header("content-type") == dict(sample.headers)[b"content-type"].decode()


@pytest.mark.parametrize(
    "name",
    [
        "err_404",
        "err_405",
        "err_empty_messages",
        "err_maxtokens_big",
        "err_maxtokens_neg",
        "err_maxtokens_zero",
        "err_model",
        "err_model_stream",
        "err_nojson",
        "err_nomessages",
        "err_streamopts_nostream",
        "err_temp",
        "err_toolong",
        "err_toolong_stream",
        "health",
        "ping",
        "version",
    ],
)
def test_errors_and_small_answers_are_the_captured_ones(vllm: ScriptedVLLM, name: str) -> None:
    sample = captured.load(name)
    path = {"err_404": "/v1/nope", "err_405": CHAT}.get(name, CHAT if name.startswith("err") else f"/{name}")
    reply = ask(vllm.url, path, sample.request or None)
    assert (reply.status, reply.body) == (sample.status, sample.body)
    assert [key for key, _ in reply.headers] == [key.decode() for key, _ in sample.headers]


def test_the_models_are_listed_as_captured(vllm: ScriptedVLLM) -> None:
    sample = captured.load("models").body.replace(b"/models/smollm2-135m", b"/models/smollm2")
    assert ask(vllm.url, "/v1/models").anonymous == anonymous(sample)


def test_a_key_is_asked_for_as_captured() -> None:
    sample = captured.load("flags/badauth")
    with ScriptedVLLM(api_key="right") as vllm:
        wrong = ask(vllm.url, "/v1/models", key="wrong")
        assert (wrong.status, wrong.body) == (sample.status, sample.body)
        assert ask(vllm.url, "/v1/models", key="right").status == 200


def test_a_stream_interval_packs_tokens_as_captured(vllm: ScriptedVLLM) -> None:
    sample = captured.load("two/b_trace_stream_interval4").body.replace(b"a5370228", b"4c52f88f")
    assert chat(vllm, content=FRANCE, tokens_per_event=4).anonymous == anonymous(sample)


def test_cached_tokens_are_told_as_captured(vllm: ScriptedVLLM) -> None:
    sample = captured.load("flags/chat_stream_cached").blocks()[-2].replace(b"5ee87ff9", b"4c52f88f")
    more = {"stream_options": {"include_usage": True}}
    assert anonymous(ask(vllm.url, CHAT, chat_body(more=more, **CACHED)).events[-2]) == anonymous(sample)


@pytest.mark.parametrize("name", ["two/per_request_metrics", "two/per_request_metrics_stream"])
def test_request_metrics_have_the_captured_shape(vllm: ScriptedVLLM, name: str) -> None:
    sample = captured.load(name)
    body = chat_body(stream=sample.streamed, metrics=True, cached_tokens=32)
    if sample.streamed:
        body["stream_options"] = {"include_usage": True}
    ours, theirs = (_last_json(answer) for answer in (ask(vllm.url, CHAT, body).body, sample.body))
    assert list(ours) == list(theirs)
    assert list(ours["metrics"]) == list(theirs["metrics"])
    assert list(ours["usage"]["prompt_tokens_details"]) == list(theirs["usage"]["prompt_tokens_details"])


def _last_json(body: bytes) -> dict[str, Any]:
    text = body.decode().removesuffix("data: [DONE]\n\n").rstrip().rpartition("data: ")[2]
    answer: dict[str, Any] = json.loads(text)
    return answer


def test_an_in_band_error_is_as_captured(vllm: ScriptedVLLM) -> None:
    sample = captured.load("two/killed_midstream").blocks()
    assert chat(vllm, error_event_after=3).events[3:] == sample[-2:]


def test_logprobs_have_the_captured_shape(vllm: ScriptedVLLM) -> None:
    sample = captured.load("chat_stream_logprobs")
    pieces = [["The", " capital", " of", " France"]]
    body = {**json.loads(sample.request), "script": {"pieces": pieces, "finish": "length"}}
    ours, theirs = ask(vllm.url, CHAT, body).events[1], sample.blocks()[1]
    assert _keys(json.loads(ours[6:])) == _keys(json.loads(theirs[6:]))


def _keys(value: object) -> object:
    """The shape of some JSON: its keys, in order; of a list, the shape of its first element."""
    if isinstance(value, dict):
        return [(key, _keys(inner)) for key, inner in value.items()]
    return [_keys(inner) for inner in value[:1]] if isinstance(value, list) else type(value)


def test_the_parameters_of_a_tool_call_come_in_parts(vllm: ScriptedVLLM) -> None:
    events = [json.loads(event[6:]) for event in chat(vllm, tools=True).events[:-1]]
    captured_delta = json.loads(captured.load("flags/tools_named_stream").blocks()[1][6:])["choices"][0]["delta"]
    assert _keys(events[1]["choices"][0]["delta"]) == _keys(captured_delta)
    parts = [call for event in events for call in event["choices"][0]["delta"].get("tool_calls", [])]
    for index, city in enumerate(("Paris", "Köln")):
        text = "".join(part["function"].get("arguments", "") for part in parts if part["index"] == index)
        assert json.loads(text) == {"city": city}
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_every_captured_answer_can_be_replayed(vllm: ScriptedVLLM) -> None:
    for name in [*captured.names(streamed=True), *captured.names(streamed=False)]:
        sample = captured.load(name)
        reply = chat(vllm, replay=name)
        assert (reply.status, reply.body) == (sample.status, sample.body), name


def test_a_head_comes_before_the_first_token_unless_the_script_keeps_it(vllm: ScriptedVLLM) -> None:
    with WireClient(vllm.url) as client:
        client.send(request(CHAT, chat_body(hang_after_events=0)))
        early = client.read_head()
        assert (early.status, early.body) == (200, b"")
    with WireClient(vllm.url, timeout=0.05) as client:
        client.send(request(CHAT, chat_body(hang_after_events=0, late_head=True)))
        assert client.read_head().status == 0


@pytest.mark.parametrize("name", ["flags/chat_notrace", "flags/chat_stream_cached"])
def test_request_ids_are_told_back_as_captured(name: str) -> None:
    sample = captured.load(name)
    with ScriptedVLLM(request_id_headers=True) as vllm:
        reply = ask(vllm.url, CHAT, chat_body(stream=sample.streamed), headers={"X-Request-Id": "stream-1"})
    assert [key for key, _ in reply.headers] == [key.decode() for key, _ in sample.headers]
    assert reply.header("x-request-id") == "stream-1"


# --- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("usage", "seen"),
    [
        ("none", []),
        ("last", [(33, 2)]),
        ("continuous", [(31, 0), (32, 1), (33, 2), (33, 2)]),
        ("twice", [(33, 2), (33, 2)]),
        ("middle", [(33, 2)]),
        ("zero", [(0, 0)]),
        ("float", [(34.0, 2.5)]),
        ("null", [None, None, None, None]),
    ],
)
def test_usage_can_be_told_otherwise(vllm: ScriptedVLLM, usage: str, seen: list[object]) -> None:
    events = [json.loads(event[6:]) for event in chat(vllm, tokens=2, usage=usage).events[:-1]]
    told = [event["usage"] for event in events if "usage" in event]
    assert [u and (u["total_tokens"], u["completion_tokens"]) for u in told] == seen
    if usage == "middle":
        assert "usage" not in events[-1]


def test_continuous_usage_counts_for_each_choice_and_only_beside_include_usage(vllm: ScriptedVLLM) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = chat_body(more={"n": 2, "stream_options": options}, tokens=3)
    events = [json.loads(event[6:]) for event in ask(vllm.url, CHAT, body).events[:-1]]
    counts = [event["usage"]["completion_tokens"] for event in events if event["choices"]]
    assert counts == [0, 0, 1, 1, 2, 2, 3, 3]
    assert events[-1]["usage"] == {"prompt_tokens": 31, "total_tokens": 37, "completion_tokens": 6}
    body["stream_options"] = {"continuous_usage_stats": True}
    assert b'"usage"' not in ask(vllm.url, CHAT, body).body


def test_reasoning_comes_first_and_is_counted(vllm: ScriptedVLLM) -> None:
    body = chat_body(more={"stream_options": {"include_usage": True}}, tokens=5, reasoning=2)
    events = [json.loads(event[6:]) for event in ask(vllm.url, CHAT, body).events[:-1]]
    deltas = [list(event["choices"][0]["delta"]) for event in events if event["choices"]]
    assert deltas == [["role", "content"], ["reasoning"], ["reasoning"], ["content"], ["content"], []]
    assert events[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}


# --- framing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_an_event_stream_in_every_dress_says_the_same(vllm: ScriptedVLLM, newline: str) -> None:
    plain = chat(vllm, content="Grüße, 👋🏽!")
    dressed = chat(
        vllm, content="Grüße, 👋🏽!", newline=newline, bom=True, comments=2, multiline=True, event_fields=True, coalesce=3
    )
    assert [json.loads(d) for d in _data(dressed)[:-1]] == [json.loads(d) for d in _data(plain)[:-1]]
    assert dressed.body.startswith(b"\xef\xbb\xbfevent: message")
    assert dressed.body.count(b": keep-alive") == 3


def _data(reply: Reply) -> list[str]:
    """The data of each event, read as the SSE standard says; ids and time made the same."""
    text = reply.anonymous.decode().removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    blocks = [[line[6:] for line in block.split("\n") if line.startswith("data: ")] for block in text.split("\n\n")]
    return ["\n".join(lines).replace(":*", ":0") for lines in blocks if lines]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("split", "size"), [("tcp", 1), ("tcp", 7), ("http", 1), ("http", 5)])
def test_writes_can_be_cut_small(vllm: ScriptedVLLM, split: str, size: int, stream: bool) -> None:
    plain = chat(vllm, stream=stream, content="é👋", tokens=3)
    cut = chat(vllm, stream=stream, content="é👋", chunk_bytes=size, split=split)
    assert cut.anonymous == plain.anonymous
    if split == "http" and stream:
        assert max(len(data) for _, data in cut.parts) <= size


def test_comments_while_waiting(vllm: ScriptedVLLM) -> None:
    body = chat(vllm, first=0.01, prefill_comments=3, bom=True).body
    assert body.startswith(b"\xef\xbb\xbf" + b": keep-alive\n\n" * 3 + b"data: {")


def test_a_line_can_be_huge(vllm: ScriptedVLLM) -> None:
    longest = max(chat(vllm, huge_line=3_000_000).body.split(b"\n"), key=len)
    assert json.loads(longest[6:])["huge"] == "x" * 3_000_000


def test_an_answer_can_have_a_given_size(vllm: ScriptedVLLM) -> None:
    reply = chat(vllm, stream=False, body_bytes=5000)
    assert len(reply.body) == 5000
    assert reply.json()["usage"]["completion_tokens"] == 8
    assert chat(vllm, stream=False, body_bytes=10).status == 400


@pytest.mark.parametrize("stream", [True, False])
def test_gzip(vllm: ScriptedVLLM, stream: bool) -> None:
    packed, plain = chat(vllm, stream=stream, gzip=True), chat(vllm, stream=stream)
    assert packed.header("content-encoding") == "gzip"
    assert anonymous(zlib.decompress(packed.body, wbits=31)) == plain.anonymous


def test_a_head_can_be_anything(vllm: ScriptedVLLM) -> None:
    reply = chat(vllm, stream=False, status=429, headers={"Retry-After": "7", "content-type": "text/html"}, error="Slow!")
    assert (reply.status, reply.header("retry-after"), reply.header("content-type")) == (429, "7", "text/html")
    assert reply.json()["error"] == {"message": "Slow!", "type": "BadRequestError", "param": None, "code": 429}
    assert chat(vllm, body="<html>").body == b"<html>"
    with WireClient(vllm.url) as client:
        client.send(request(CHAT, chat_body(raw="HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nx")))
        assert client.socket.recv(1000).endswith(b"Content-Length: -1\r\n\r\nx")
        assert client.socket.recv(1) == b""
    with WireClient(vllm.url) as client:
        client.send(request(CHAT, chat_body(raw="HTTP/1.1 204 No Content\r\n\r\n", raw_closes=False)))
        assert [client.read().status, client.ask("/health").status] == [204, 200]


# --- breaking --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cut", "ending"), [("reset", "reset"), ("close", "closed"), ("clean", "complete")])
def test_a_stream_can_be_cut(vllm: ScriptedVLLM, cut: str, ending: str) -> None:
    by_event, by_byte = chat(vllm, cut_after_events=3, cut=cut), chat(vllm, cut_after_bytes=700, cut=cut)
    assert (len(by_event.events), by_event.ending) == (3, ending)
    assert (len(by_byte.body), by_byte.ending) == (700, ending)


def test_a_whole_answer_can_be_cut(vllm: ScriptedVLLM) -> None:
    reply = chat(vllm, stream=False, cut_after_bytes=100, cut="close")
    assert (len(reply.body), reply.ending) == (100, "closed")


def test_a_stream_can_end_early(vllm: ScriptedVLLM) -> None:
    assert b"[DONE]" not in chat(vllm, no_done=True).body
    unfinished = chat(vllm, no_finish=True).body
    assert b'"finish_reason":"' not in unfinished
    assert unfinished.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [True, False])
def test_what_hangs_goes_on_when_released(vllm: ScriptedVLLM, stream: bool) -> None:
    with WireClient(vllm.url) as client:
        client.send(request(CHAT, chat_body(stream=stream, hang=True)))
        vllm.wait(lambda: vllm.in_flight == 1)
        client.socket.settimeout(0.05)
        assert client.read().ending == "timeout"
        client.socket.settimeout(10)
        vllm.release()
        assert client.read().ending == "complete"


def test_silence_after_some_events(vllm: ScriptedVLLM) -> None:
    with WireClient(vllm.url) as client:
        client.send(request(CHAT, chat_body(tokens=5, hang_after_events=3)))
        assert len(client.read(events=3).events) == 3
        vllm.wait(lambda: vllm.requests[-1].generated == 2)
        vllm.release()
        assert len(client.read().events) == 7


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_noticed(stream: bool) -> None:
    with ScriptedVLLM() as vllm:
        with WireClient(vllm.url) as client:
            client.send(request(CHAT, chat_body(stream=stream, tokens=10, hang_after_events=3)))
            vllm.wait(lambda: vllm.requests and vllm.requests[0].generated >= 2)
        vllm.wait_idle()
        assert [(r.outcome, r.generated) for r in vllm.aborted] == [("aborted", 2 if stream else 3)]
        assert vllm.generated_tokens == vllm.aborted[0].generated
        assert not vllm.finished


def test_a_reader_who_stops_is_felt(vllm: ScriptedVLLM) -> None:
    with WireClient(vllm.url, receive_buffer=4096) as client:
        client.send(request(CHAT, chat_body(tokens=100_000)))
        client.read(events=1, size=512)
        vllm.wait(lambda: vllm.in_flight == 1)
    vllm.wait_idle()
    assert vllm.requests[-1].outcome == "aborted"
    assert vllm.requests[-1].generated < 50_000


# --- the server ------------------------------------------------------------------------------------------------------


def test_an_unknown_script_field_is_an_error(vllm: ScriptedVLLM) -> None:
    reply = chat(vllm, tokns=5)
    assert (reply.status, reply.json()["error"]["type"]) == (400, "ScriptError")


def test_the_id_is_the_request_id(vllm: ScriptedVLLM) -> None:
    for path, body, prefix in (
        (CHAT, chat_body(stream=False), "chatcmpl"),
        (TEXT, {"model": "smollm2", "prompt": "Hi"}, "cmpl"),
        ("/v1/embeddings", {"model": "smollm2", "input": "Hi"}, "embd"),
    ):
        assert ask(vllm.url, path, body, headers={"X-Request-Id": "abc"}).json()["id"] == f"{prefix}-abc"


def test_embeddings_say_the_same_as_text_and_as_base64(vllm: ScriptedVLLM) -> None:
    body = {"model": "smollm2", "input": ["a", "b c"], "dimensions": 4}
    plain = ask(vllm.url, "/v1/embeddings", body).json()
    packed = ask(vllm.url, "/v1/embeddings", {**body, "encoding_format": "base64"}).json()
    for one, other in zip(plain["data"], packed["data"], strict=True):
        assert list(struct.unpack("<4f", base64.b64decode(other["embedding"]))) == one["embedding"]
    assert plain["usage"]["prompt_tokens"] == 3


def test_what_was_received_is_kept(vllm: ScriptedVLLM) -> None:
    body = chat_body(stream=False)
    ask(vllm.url, f"{CHAT}?a=b", body, headers={"X-Some": "Thing"})
    last = vllm.requests[-1]
    assert (last.method, last.target, last.path, last.header("x-some")) == ("POST", f"{CHAT}?a=b", CHAT, "Thing")
    assert last.json() == body
    assert last.at <= time.monotonic()


def test_the_counters_count_as_the_engine_does() -> None:
    with ScriptedVLLM() as vllm:
        ask(vllm.url, CHAT, chat_body(more={"n": 2}, tokens=4))
        ask(vllm.url, CHAT, chat_body(stream=False, tokens=4, cached_tokens=16, more={"max_tokens": 3}))
        ask(vllm.url, "/v1/embeddings", {"model": "smollm2", "input": ["a b", "c"]})
        vllm.wait_idle()
        text = ask(vllm.url, "/metrics").body.decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    told = {name.partition("{")[0].removeprefix("vllm:"): value for name, value in values.items() if "finished" not in name}
    assert told["generation_tokens_total"] == "11.0"
    assert told["prompt_tokens_total"] == f"{31 * 2 + 31 + 3}.0"
    assert told["prefix_cache_queries_total"] == told["prompt_tokens_total"]
    assert told["prefix_cache_hits_total"] == "16.0"
    assert told["process_start_time_seconds"] == f"{vllm.started_unix_s}"
    assert told["num_requests_running"] == "0.0"
    finished = [value for name, value in values.items() if 'reason="stop"' in name or 'reason="length"' in name]
    assert finished == ["2.0", "1.0"]


def test_pipelined_requests_are_answered_in_order(vllm: ScriptedVLLM) -> None:
    with WireClient(vllm.url) as client:
        first = request(CHAT, chat_body(stream=False, interval=0.001), headers={"X-Request-Id": "1"})
        client.send(first + request(CHAT, chat_body(stream=False), headers={"X-Request-Id": "2"}))
        assert [client.read().json()["id"] for _ in range(2)] == ["chatcmpl-1", "chatcmpl-2"]


def test_idle_connections_are_closed() -> None:
    with ScriptedVLLM(keep_alive=0.02) as vllm, WireClient(vllm.url) as client:
        client.ask("/health")
        client.ask(CHAT, chat_body(stream=False, interval=0.01))
        vllm.wait(lambda: not vllm.open)
        assert client.socket.recv(1) == b""


def test_connections_are_counted_and_kept(vllm: ScriptedVLLM) -> None:
    before = vllm.connections
    with WireClient(vllm.url) as client:
        for _ in range(3):
            client.ask(CHAT, chat_body())
    assert vllm.connections == before + 1


def test_faults_of_the_whole_server() -> None:
    with ScriptedVLLM(capacity=1) as vllm:
        vllm.fail_next(2, Script(status=503))
        assert [chat(vllm, stream=False).status for _ in range(3)] == [503, 503, 200]
        with WireClient(vllm.url) as client:
            client.send(request(CHAT, chat_body(hang=True)))
            vllm.wait(lambda: vllm.in_flight == 1)
            assert chat(vllm).body == captured.load("two/queue_full_503").body
            vllm.drop()
            assert client.read().ending == "reset"
        vllm.refuse()
        with pytest.raises(ConnectionRefusedError):
            WireClient(vllm.url)
        vllm.accept()
        assert chat(vllm, stream=False).status == 200


def test_what_is_no_http_is_refused(vllm: ScriptedVLLM) -> None:
    with WireClient(vllm.url) as client:
        client.send(b"what\r\n\r\n")
        assert client.read().status == 400


def test_it_runs_as_a_process() -> None:
    command = [sys.executable, "-m", "tests.support.scripted_vllm", "--script", '{"tokens": 3}', "--exit-with-stdin"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        body = {"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}]}
        assert ask(told["url"], CHAT, body).json()["usage"]["completion_tokens"] == 3
        process.communicate()
    assert process.returncode == 0
