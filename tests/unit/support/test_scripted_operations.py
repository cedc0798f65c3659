"""The scripted server's APIs beside chat and completions: what was captured, and what vLLM's source says where nothing was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.scripted_vllm import ScriptedVLLM, captured
from tests.support.scripted_vllm.audio import tone
from tests.support.wire_client import Reply, WireClient, anonymous, ask, request

RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
TRANSCRIPTIONS = "/v1/audio/transcriptions"
TRANSLATIONS = "/v1/audio/translations"
STREAMS = [RESPONSES, MESSAGES, TRANSCRIPTIONS]
"""One of each kind of stream."""
ALL = [RESPONSES, MESSAGES, COUNT, TRANSCRIPTIONS, TRANSLATIONS, "/v1/rerank", "/v1/score", "/tokenize", "/detokenize"]
HELLO = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, dict[str, Any]] = {
    RESPONSES: {"input": "Hi"},
    MESSAGES: {"messages": HELLO, "max_tokens": 100},
    COUNT: {"messages": HELLO},
    TRANSCRIPTIONS: {},
    TRANSLATIONS: {},
    "/v1/rerank": {"query": "Hi", "documents": ["one", "two words"]},
    "/v1/score": {"queries": "Hi", "documents": ["one", "two words"]},
    "/tokenize": {"prompt": "Hi you"},
    "/detokenize": {"tokens": [504]},
}
TOOLS: dict[str, Any] = {
    RESPONSES: {"tools": [{"type": "function", "name": "get_weather"}]},
    MESSAGES: {"tools": [{"name": "get_weather", "input_schema": {}}]},
}


@pytest.fixture(scope="module")
def vllm() -> Iterator[ScriptedVLLM]:
    with ScriptedVLLM() as server:
        yield server
        server.wait_idle()


def call(vllm: ScriptedVLLM, path: str, *, more: dict[str, Any] | None = None, **script: Any) -> Reply:
    """`more` are further fields of the request."""
    with WireClient(vllm.url) as client:
        client.send(sent(path, more=more, **script))
        return client.read()


def sent(path: str, *, more: dict[str, Any] | None = None, **script: Any) -> bytes:
    fields = {"model": "smollm2", **BODIES[path], "script": script, **(more or {})}
    if "audio" not in path:
        return request(path, fields)
    return request(path, form(fields), headers={"Content-Type": "multipart/form-data; boundary=xyz"})


def form(fields: dict[str, Any], sound: bytes = tone(1.2)) -> bytes:
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    parts = [f'--xyz\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'.encode() for name, text in texts.items()]
    head = b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n'
    return b"".join([*parts, head, sound, b"\r\n--xyz--\r\n"])


def stream(vllm: ScriptedVLLM, path: str, *, more: dict[str, Any] | None = None, **script: Any) -> Reply:
    return call(vllm, path, more={"stream": True, **(more or {})}, **script)


def told(reply: Reply) -> list[dict[str, Any]]:
    """The JSON of each event; the name beside it is the type within it, wherever there is one."""
    events = []
    for block in reply.events:
        *names, data = block.decode().strip().split("\n")
        if data == "data: [DONE]":
            continue
        events.append(json.loads(data.removeprefix("data: ")))
        assert names == [f"event: {events[-1]['type']}" for _ in names]
    return events


# --- as the real one: tests/unit/support/test_scripted_vllm.py has whole answers; here is what only a part was captured of ---


@pytest.mark.parametrize(("name", "path"), [("err_messages", MESSAGES), ("err_responses", RESPONSES)])
def test_what_is_invalid_is_refused_as_captured(vllm: ScriptedVLLM, name: str, path: str) -> None:
    sample = captured.load(name)
    reply = ask(vllm.url, path, sample.request)
    assert (reply.status, reply.body) == (sample.status, sample.body)


def test_a_cached_prompt_is_told_in_messages_as_captured(vllm: ScriptedVLLM) -> None:
    theirs = captured.load("flags/messages_cached").body
    content = "The quick brown fox jumps over"
    ours = call(vllm, MESSAGES, content=content, finish="length", prompt_tokens=151, cached_tokens=128).anonymous
    assert ours == anonymous(theirs)
    last = told(stream(vllm, MESSAGES, content=content, prompt_tokens=151, cached_tokens=128))[-2]
    assert last["usage"]["input_tokens"] == 23


def test_a_response_cut_at_the_limit_is_incomplete_as_captured(vllm: ScriptedVLLM) -> None:
    theirs = anonymous(captured.load("flags/responses_trace").body)
    more = {"max_output_tokens": 3}
    assert call(vllm, RESPONSES, more=more, content="so how are you", prompt_tokens=31).anonymous == theirs
    last = told(stream(vllm, RESPONSES, more=more, tokens=9))[-1]
    assert (last["type"], last["response"]["status"]) == ("response.completed", "incomplete")
    last = told(stream(vllm, RESPONSES, more=more, tokens=9, incomplete_event=True))[-1]
    assert last["type"] == "response.incomplete"


def test_anthropics_key_is_refused_as_captured() -> None:
    sample = captured.load("flags/messages_xapikey")
    with ScriptedVLLM(api_key="right") as vllm:
        reply = ask(vllm.url, MESSAGES, {}, headers={"x-api-key": "right"})
        assert (reply.status, reply.body) == (sample.status, sample.body)
        assert call(vllm, "/tokenize").status == 200  # unguarded, as /rerank and /score
        assert ask(vllm.url, "/v2/rerank", {}).status == 401


# --- whole answers ---------------------------------------------------------------------------------------------------


def test_ids_take_up_the_request_id_but_that_of_a_response(vllm: ScriptedVLLM) -> None:
    paths = {MESSAGES: "chatcmpl-abc", "/v1/rerank": "score-abc", "/v1/score": "score-abc"}
    for path, expected in paths.items():
        body = {"model": "smollm2", **BODIES[path]}
        assert ask(vllm.url, path, body, headers={"X-Request-Id": "abc"}).json()["id"] == expected
    assert ask(vllm.url, RESPONSES, BODIES[RESPONSES], headers={"X-Request-Id": "abc"}).json()["id"].startswith("resp_")
    assert call(vllm, RESPONSES, more={"request_id": "mine"}).json()["id"] == "mine"


def test_rerank_sorts_and_counts_pairs(vllm: ScriptedVLLM) -> None:
    answer = call(vllm, "/v1/rerank", more={"documents": ["a", "b", {"content": []}]}).json()
    scores = [result["relevance_score"] for result in answer["results"]]
    assert scores == sorted(scores, reverse=True)
    assert sorted(result["index"] for result in answer["results"]) == [0, 1, 2]
    best = call(vllm, "/v1/rerank", more={"top_n": 1, "documents": ["a", "b", {"content": []}]}).json()
    assert best["results"] == answer["results"][:1]
    assert call(vllm, "/v1/rerank").json()["usage"] == {"prompt_tokens": 11, "total_tokens": 11}


@pytest.mark.parametrize("path", ["/rerank", "/v2/rerank", "/score"])
def test_scores_and_ranks_have_other_paths(vllm: ScriptedVLLM, path: str) -> None:
    usual = "/v1/" + path.rpartition("/")[2]
    assert ask(vllm.url, path, BODIES[usual]).anonymous == ask(vllm.url, usual, BODIES[usual]).anonymous


def test_scores_take_pairs_and_one_against_many(vllm: ScriptedVLLM) -> None:
    one = call(vllm, "/v1/score").json()
    assert [entry["index"] for entry in one["data"]] == [0, 1]
    assert (one["object"], one["usage"]["prompt_tokens"], one["usage"]["completion_tokens"]) == ("list", 11, 0)
    pairs = call(vllm, "/v1/score", more={"queries": None, "text_1": ["Hi", "Hi"], "text_2": ["one", "two words"]}).json()
    assert pairs["data"] == one["data"]
    refused = call(vllm, "/v1/score", more={"queries": ["a", "b"], "documents": ["c", "d", "e"]})
    assert (refused.status, refused.json()["error"]["message"]) == (400, "Input lengths must be either 1:1, 1:N or N:N")


@pytest.mark.parametrize("shape", ["json", "text"])
def test_a_transcription_tells_its_seconds(vllm: ScriptedVLLM, shape: str) -> None:
    more = {"response_format": shape}
    assert call(vllm, TRANSCRIPTIONS, more=more, content="All is glass.").json() == {
        "text": "All is glass.",
        "usage": {"type": "duration", "seconds": 2},
    }
    assert call(vllm, TRANSLATIONS, more=more, content="All is glass.").json() == {"text": "All is glass."}


def test_a_verbose_transcription_has_segments(vllm: ScriptedVLLM) -> None:
    answer = call(vllm, TRANSCRIPTIONS, more={"response_format": "verbose_json", "language": "de"}).json()
    assert list(answer) == ["duration", "language", "text", "segments", "words"]
    assert (answer["duration"], answer["language"], answer["segments"][0]["text"]) == (1.2, "de", answer["text"])


def test_the_file_of_a_form_may_hold_anything(vllm: ScriptedVLLM) -> None:
    headers = {"Content-Type": 'Multipart/Form-Data; charset=utf-8; boundary="xyz"'}
    for sound, status in ((tone(1.0), 200), (b"", 400), (b"\r\n--xy\r\n\0\xff", 400)):
        assert ask(vllm.url, TRANSCRIPTIONS, form({}, sound), headers=headers).status == status
        assert sound in vllm.requests[-1].body
    assert ask(vllm.url, TRANSCRIPTIONS, form({})[:-30], headers=headers).json()["error"]["type"] == "Bad Request"
    text = b'--xyz\r\nContent-Disposition: form-data; name="file"\r\n\r\nx\r\n--xyz--\r\n'
    assert ask(vllm.url, TRANSCRIPTIONS, text, headers=headers).status == 422
    assert ask(vllm.url, TRANSCRIPTIONS, b"{}", headers={"Content-Type": "application/json"}).status == 400


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"response_format": "srt"}, "Currently only support response_format: `text`, `json`, `verbose_json` or `diarized_json`"),
        ({"response_format": "diarized_json"}, "Currently do not support diarized_json for smollm2"),
        ({"response_format": "verbose_json", "stream": True}, "verbose_json format doesn't support streaming case"),
        ({"response_format": "nope"}, "1 validation error:"),
        ({"stream_include_usage": True}, "1 validation error:"),
    ],
)
def test_what_audio_refuses(vllm: ScriptedVLLM, more: dict[str, Any], message: str) -> None:
    reply = call(vllm, TRANSCRIPTIONS, more=more)
    assert (reply.status, reply.json()["error"]["message"].partition("\n")[0]) == (400, message)


def test_a_prompt_has_as_many_tokens_as_usage_says(vllm: ScriptedVLLM) -> None:
    prompt = call(vllm, "/tokenize", more={"return_token_strs": True}).json()
    assert (prompt["count"], prompt["token_strs"]) == (2, ["Hi", "Ġyou"])
    messages = call(vllm, "/tokenize", more={"prompt": None, "messages": HELLO}).json()
    counted = call(vllm, COUNT).json()["input_tokens"]
    assert messages["count"] == len(messages["tokens"]) == counted
    assert call(vllm, MESSAGES).json()["usage"]["input_tokens"] == counted
    assert call(vllm, RESPONSES).json()["usage"]["input_tokens"] == counted


def test_a_system_prompt_counts(vllm: ScriptedVLLM) -> None:
    system = [{"type": "text", "text": "Be brief."}]
    assert call(vllm, COUNT, more={"system": system}).json()["input_tokens"] == call(vllm, COUNT).json()["input_tokens"] + 3
    plain = call(vllm, RESPONSES).json()["usage"]["input_tokens"]
    assert call(vllm, RESPONSES, more={"instructions": "Be brief."}).json()["usage"]["input_tokens"] == plain + 3


def test_a_response_tells_back_what_was_asked(vllm: ScriptedVLLM) -> None:
    asked = {
        "instructions": "Be brief.",
        "metadata": {"a": "b"},
        "temperature": 0.5,
        "top_p": 0.9,
        "user": "u",
        "tool_choice": "auto",
    }
    answer = call(vllm, RESPONSES, more={**asked, **TOOLS[RESPONSES]}).json()
    assert {name: answer[name] for name in asked} == asked
    assert answer["tools"] == TOOLS[RESPONSES]["tools"]


def test_the_engines_own_times_stand_in_a_response(vllm: ScriptedVLLM) -> None:
    theirs = json.loads(captured.load("two/per_request_metrics").body)["metrics"]
    assert list(call(vllm, RESPONSES, metrics=True).json()["metrics"]) == list(theirs)
    assert list(told(stream(vllm, RESPONSES, metrics=True))[-1]["response"]["metrics"]) == list(theirs)
    assert "metrics" not in call(vllm, RESPONSES).json()


# --- streams ---------------------------------------------------------------------------------------------------------


def test_a_response_streams_its_items_one_after_the_other(vllm: ScriptedVLLM) -> None:
    for script in ({"tools": True}, {"tokens": 6, "reasoning": 3}, {}):
        more = TOOLS[RESPONSES] if "tools" in script else {}
        events = told(stream(vllm, RESPONSES, more=more, **script))
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        added = [event["item"]["id"] for event in events if event["type"] == "response.output_item.added"]
        assert [item["id"] for item in done] == added
        assert events[-1]["response"]["output"] == done
        whole = call(vllm, RESPONSES, more=more, **script).json()["output"]
        assert [said(item) for item in whole] == [said(item) for item in done]
        texts = [
            "".join(e["delta"] for e in events if e["type"].endswith(".delta") and e["output_index"] == i)
            for i in range(len(done))
        ]
        assert texts == [said(item) for item in done]


def said(item: dict[str, Any]) -> str:
    return item["arguments"] if item["type"] == "function_call" else "".join(part["text"] for part in item["content"])


def test_a_message_streams_its_blocks_one_after_the_other(vllm: ScriptedVLLM) -> None:
    for script, stop in (
        ({"tools": True}, "tool_use"),
        ({"tokens": 6, "reasoning": 3, "finish": "length"}, "max_tokens"),
        ({}, "end_turn"),
    ):
        more = TOOLS[MESSAGES] if "tools" in script else {}
        events, whole = told(stream(vllm, MESSAGES, more=more, **script)), call(vllm, MESSAGES, more=more, **script).json()
        blocks: list[dict[str, Any]] = []
        for event in events:
            match event["type"]:
                case "content_block_start":
                    assert event["index"] == len(blocks)
                    blocks.append(dict(event["content_block"]))
                case "content_block_delta":
                    ((name, text),) = ((key, value) for key, value in event["delta"].items() if key != "type")
                    blocks[event["index"]][name] = blocks[event["index"]].get(name, "") + text
        for block in blocks:
            if block["type"] == "tool_use":
                block["input"] = json.loads(block.pop("partial_json"))
        strip = [{key: value for key, value in block.items() if key != "signature"} for block in blocks]
        assert strip == [{key: value for key, value in block.items() if key != "signature"} for block in whole["content"]]
        assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
        assert events[-2]["usage"] == whole["usage"]
        assert events[-2]["delta"]["stop_reason"] == whole["stop_reason"] == stop


def test_one_tool_by_name_is_a_tool_use_too(vllm: ScriptedVLLM) -> None:
    more = {**TOOLS[MESSAGES], "tool_choice": {"type": "tool", "name": "get_weather"}}
    assert call(vllm, MESSAGES, more=more, tools=True).json()["stop_reason"] == "tool_use"


def test_a_transcription_streams_chunks(vllm: ScriptedVLLM) -> None:
    reply = stream(vllm, TRANSCRIPTIONS, tokens=3)
    assert reply.events[-1] == b"data: [DONE]\n\n"
    events = told(reply)
    assert {event["object"] for event in events} == {"transcription.chunk"}
    assert [event["choices"] for event in events] == [
        [{"delta": {"content": "The"}}],
        [{"delta": {"content": " glass"}}],
        [{"delta": {"content": ""}, "finish_reason": "stop", "stop_reason": None}],
    ]
    assert {event["object"] for event in told(stream(vllm, TRANSLATIONS))} == {"translation.chunk"}


def test_a_transcription_counts_tokens_when_asked(vllm: ScriptedVLLM) -> None:
    total = {"prompt_tokens": 64, "total_tokens": 66, "completion_tokens": 2}
    events = told(stream(vllm, TRANSCRIPTIONS, more={"stream_include_usage": True}, tokens=2))
    assert (events[-1]["choices"], events[-1]["usage"]) == ([], total)
    assert not any("usage" in event for event in events[:-1])
    both = {"stream_include_usage": "true", "stream_continuous_usage_stats": "true"}
    counts = [event["usage"]["completion_tokens"] for event in told(stream(vllm, TRANSCRIPTIONS, more=both, tokens=2))]
    assert counts == [1, 2, 2]


def test_prefill_comes_after_the_first_events_of_a_response_and_before_a_message(vllm: ScriptedVLLM) -> None:
    for path, seen in ((RESPONSES, 2), (MESSAGES, 0)):
        with WireClient(vllm.url, timeout=0.1) as client:
            client.send(sent(path, more={"stream": True}, first=30))
            assert len(client.read().events) == seen


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ALL)
def test_an_unknown_model_is_refused_in_the_apis_own_shape(vllm: ScriptedVLLM, path: str) -> None:
    reply = call(vllm, path, more={"model": "x"})
    assert reply.status == 404
    if path in ("/v1/rerank", "/v1/score"):
        error: dict[str, Any] = {"message": "The model `x` does not exist.", "type": "NotFoundError", "param": None, "code": 404}
        assert reply.json() == {"error": error}
    elif path in (MESSAGES, COUNT):
        error = {"type": "NotFoundError", "message": "The model `x` does not exist. Valid aliases: smollm2."}
        assert reply.json() == {"type": "error", "error": error}
    else:
        assert reply.body == captured.load("err_model").body.replace(b"`nope`", b"`x`")


@pytest.mark.parametrize("path", [path for path in ALL if path not in (MESSAGES, COUNT)])
def test_a_model_may_be_left_out(vllm: ScriptedVLLM, path: str) -> None:
    body = sent(path, more={"model": ""}) if "audio" in path else request(path, BODIES[path])
    with WireClient(vllm.url) as client:
        client.send(body)
        assert client.read().status == 200


@pytest.mark.parametrize(
    ("path", "field"), [(MESSAGES, "model"), (MESSAGES, "messages"), (COUNT, "messages"), ("/v1/rerank", "query")]
)
def test_a_missing_field_is_refused_in_openais_shape(vllm: ScriptedVLLM, path: str, field: str) -> None:
    error = call(vllm, path, more={field: None}).json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("Bad Request", f"body.{field}", 400)


@pytest.mark.parametrize("path", [path for path in ALL if "audio" not in path])
def test_only_json_is_read(vllm: ScriptedVLLM, path: str) -> None:
    reply = ask(vllm.url, path, BODIES[path], headers={"Content-Type": "text/plain"})
    assert (reply.status, "Unsupported Media Type" in reply.json()["error"]["message"]) == (400, True)


def test_the_prompt_too_long_and_the_engine_too_busy_in_anthropics_shape(vllm: ScriptedVLLM) -> None:
    reply = call(vllm, MESSAGES, prompt_tokens=5000)
    assert (reply.status, reply.json()["type"], reply.json()["error"]["type"]) == (400, "error", "BadRequestError")
    with ScriptedVLLM(capacity=0) as busy:
        expected = json.loads(captured.load("two/queue_full_503").body)["error"]
        reply = call(busy, MESSAGES)
        assert (reply.status, reply.json()["error"]) == (503, {"type": expected["type"], "message": expected["message"]})
        assert call(busy, RESPONSES).body == captured.load("two/queue_full_503").body


def test_state_that_no_engine_keeps(vllm: ScriptedVLLM) -> None:
    reply = call(vllm, RESPONSES, more={"previous_response_id": "resp_1"})
    assert (reply.status, reply.json()["error"]["message"]) == (404, "Response with id 'resp_1' not found.")
    assert call(vllm, RESPONSES, more={"background": True}).json()["error"]["param"] == "background"


@pytest.mark.parametrize("path", STREAMS)
def test_any_status_and_any_bytes(vllm: ScriptedVLLM, path: str) -> None:
    reply = call(vllm, path, status=503, error="Slow!", headers={"Retry-After": "7"})
    assert (reply.status, reply.header("retry-after"), reply.json()["error"]["message"]) == (503, "7", "Slow!")
    assert call(vllm, path, raw="HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx").body == b"x"


# --- broken streams --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize(("cut", "ending"), [("reset", "reset"), ("close", "closed"), ("clean", "complete")])
def test_a_stream_can_be_cut(vllm: ScriptedVLLM, path: str, cut: str, ending: str) -> None:
    reply = stream(vllm, path, cut_after_events=3, cut=cut)
    assert (len(reply.events), reply.ending) == (3, ending)


@pytest.mark.parametrize("path", STREAMS)
def test_a_stream_in_every_dress_says_the_same(vllm: ScriptedVLLM, path: str) -> None:
    plain, small = stream(vllm, path), stream(vllm, path, chunk_bytes=1)
    assert small.anonymous == plain.anonymous
    dressed = stream(vllm, path, multiline=True, event_fields=True, comments=2, newline="\r\n", bom=True).anonymous.decode()
    blocks = dressed.removeprefix("\ufeff").replace("\r\n", "\n").replace(": keep-alive\n\n", "").split("\n\n")
    data = ["\n".join(line[6:] for line in block.split("\n") if line.startswith("data: ")) for block in blocks if block]
    bare = [block.decode().strip().split("data: ")[1] for block in plain.events]
    assert [text.replace(",\n", ",") for text in data] == [anonymous(text.encode()).decode() for text in bare]


@pytest.mark.parametrize("path", STREAMS)
def test_a_stream_can_end_without_its_last_event(vllm: ScriptedVLLM, path: str) -> None:
    whole, short = stream(vllm, path).events, stream(vllm, path, no_done=True)
    assert (len(short.events), short.ending) == (len(whole) - 1, "complete")


@pytest.mark.parametrize("path", STREAMS)
def test_a_line_can_be_huge(vllm: ScriptedVLLM, path: str) -> None:
    assert max(map(len, stream(vllm, path, huge_line=100_000).body.split(b"\n"))) > 100_000


def test_an_engine_that_fails_in_a_message(vllm: ScriptedVLLM) -> None:
    reply = stream(vllm, MESSAGES, error_event_after=4)
    error = told(reply)[-1]
    assert (len(reply.events), reply.ending) == (5, "complete")
    assert (error["type"], error["error"]["type"]) == ("error", "internal_error")
    assert error["error"]["message"].startswith("2 validation errors for ChatCompletionStreamResponse\nmodel\n")


def test_an_engine_that_fails_in_a_response(vllm: ScriptedVLLM) -> None:
    reply = stream(vllm, RESPONSES, error_event_after=4)
    assert (len(reply.events), reply.ending) == (4, "closed")
    error = told(stream(vllm, RESPONSES, error_event_after=4, error_kind="error", error="Ouch"))[-1]
    assert error == {"code": "server_error", "message": "Ouch", "param": None, "sequence_number": 4, "type": "error"}
    failed = told(stream(vllm, RESPONSES, error_event_after=4, error_kind="response.failed", error="Ouch"))[-1]
    assert (failed["type"], failed["response"]["status"], failed["sequence_number"]) == ("response.failed", "failed", 4)


def test_an_engine_that_fails_in_a_transcription(vllm: ScriptedVLLM) -> None:
    assert stream(vllm, TRANSCRIPTIONS, error_event_after=2).events[2:] == captured.load("two/killed_midstream").blocks()[-2:]


@pytest.mark.parametrize(("usage", "expected"), [("none", "absent"), ("null", None), ("zero", 0), ("twice", 31)])
def test_usage_can_be_told_otherwise(vllm: ScriptedVLLM, usage: str, expected: object) -> None:
    events = [event for event in told(stream(vllm, MESSAGES, usage=usage)) if event["type"] == "message_delta"]
    assert len(events) == (2 if usage == "twice" else 1)
    seen = events[-1].get("usage", "absent")
    assert (seen["input_tokens"] if isinstance(seen, dict) else seen) == expected
    seen = told(stream(vllm, RESPONSES, usage=usage))[-1]["response"]["usage"]
    assert (seen["input_tokens"] if isinstance(seen, dict) else "absent") == ("absent" if expected is None else expected)


@pytest.mark.parametrize("path", STREAMS)
def test_the_counters_count_all_tokens(path: str) -> None:
    with ScriptedVLLM() as vllm:
        stream(vllm, path, tokens=5)
        call(vllm, path, tokens=3, finish="length")
        vllm.wait_idle()
        assert (vllm.generated_tokens, dict(vllm.finished)) == (8, {"stop": 1, "length": 1})
        assert [received.generated for received in vllm.requests] == [5, 3]
        with WireClient(vllm.url) as client:
            client.send(sent(path, more={"stream": True}, tokens=9, hang_after_events=6))
            vllm.wait(lambda: vllm.in_flight and len(client.read(events=6).events) == 6)
        vllm.wait_idle()
        assert [received.outcome for received in vllm.aborted] == ["aborted"]
        assert 1 <= vllm.aborted[0].generated < 9


def test_prompts_that_generate_nothing_are_counted_where_the_engine_is_called() -> None:
    with ScriptedVLLM() as vllm:
        for path in (COUNT, "/tokenize", "/detokenize", "/v1/rerank", "/v1/score"):
            call(vllm, path)
        vllm.wait_idle()
        assert (vllm.prompt_tokens, vllm.generated_tokens) == (22, 0)
