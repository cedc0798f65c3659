"""Each operation over a raw socket: the bytes that a client sees through the proxy are those that it would have seen straight.

Heads and bodies, after HTTP framing. The date, ids and times of creation may differ, and the proxy adds header lines of its own.
So also where the answer is one that was given before: what may be kept is, and is given again as it was.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import pytest

from tests.compat.cases import CHAT_TOOLS, MESSAGE_TOOLS, MODEL, RESPONSE_TOOLS
from tests.support.endpoints import FRESH, Endpoint
from tests.support.scripted_vllm import ScriptedVLLM, captured
from tests.support.scripted_vllm.audio import tone
from tests.support.wire_client import Reply, WireClient, ask, request

HELLO: Any = [{"role": "user", "content": "Hi"}]
BOUNDARY = "----7d1f"
SOUND = tone(0.5)
SOME_ID = "0" * 32 + "-1"
OF_ONE = ("x-request-id", "x-glasshouse-cache", "age")
"""Header lines of one answer, be it given again."""
MAY_DIFFER = ("date", "x-glasshouse-backend", *OF_ONE)
JSON: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": HELLO, "max_tokens": 100},
    "/v1/messages/count_tokens": {"messages": HELLO},
    "/v1/embeddings": {"input": "Hi"},
    **{path: {"query": "Hi", "documents": ["one", "two words"]} for path in ("/v1/rerank", "/v2/rerank", "/rerank")},
    **{path: {"text_1": "Hi", "text_2": ["one", "two words"]} for path in ("/v1/score", "/score")},
    "/tokenize": {"prompt": "Hi you", "return_token_strs": True},
    "/detokenize": {"tokens": [504, 3575, 282]},
}
FORMS = ["/v1/audio/transcriptions", "/v1/audio/translations"]
STREAMS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", *FORMS]
ALL = [*JSON, *FORMS]
HIT = ("miss", "hit")
_SAYS_NO = re.compile(rb'"error": ?{|event: error')


def asked(path: str, script: dict[str, Any], **more: Any) -> tuple[bytes, dict[str, str]]:
    """(the body, its headers) of a request."""
    if path in JSON:
        return json.dumps({"model": MODEL, **JSON[path], "script": script, **more}).encode(), {}
    fields = {"model": MODEL, "script": json.dumps(script), **more}
    return form(fields), {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def form(fields: dict[str, Any], *, file_first: bool = False) -> bytes:
    texts = [f'name="{name}"\r\n\r\n{value}\r\n'.encode() for name, value in fields.items()]
    file = b'name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n' + SOUND + b"\r\n"
    parts = [file, *texts] if file_first else [*texts, file]
    start = f"--{BOUNDARY}\r\nContent-Disposition: form-data; ".encode()
    return b"".join(start + part for part in parts) + f"--{BOUNDARY}--\r\n".encode()


def both(straight: Endpoint, endpoint: Endpoint, path: str, body: bytes, headers: dict[str, str]) -> tuple[Reply, Reply]:
    """(the answer of `endpoint`, the one straight): their ids are of one length, so that their bodies are."""
    with_id = {**headers, "X-Request-Id": SOME_ID}
    ours = (again if endpoint.keeps is not None else ask)(endpoint.url, path, body, key=endpoint.key, headers=with_id)
    return ours, ask(straight.url, path, body, key=straight.key, headers=with_id)


def again(url: str, path: str, body: bytes, *, key: str, headers: dict[str, str]) -> Reply:
    """The answer to the second of two: the first one's, if that is one to keep."""
    first, second = (ask(url, path, body, key=key, headers={**headers, **more}) for more in (FRESH, {}))
    assert verdicts(first, second) == expected(path, second)
    if verdicts(first, second) == HIT:
        assert first.body == second.body
        assert head(first, besides=OF_ONE) == head(second, besides=OF_ONE)
    return second


def verdicts(*replies: Reply) -> tuple[str | None, ...]:
    return tuple(reply.header("x-glasshouse-cache") for reply in replies)


def expected(path: str, reply: Reply) -> tuple[str | None, ...]:
    if path.partition("?")[0] in FORMS:
        return "bypass", "bypass"
    well = reply.status == 200 and reply.ending == "complete" and not _SAYS_NO.search(reply.body)
    return HIT if well else ("miss", "miss")


def head(reply: Reply, besides: Sequence[str] = MAY_DIFFER) -> list[tuple[str, str]]:
    return [(name, value) for name, value in reply.headers if name not in besides]


def assert_same(ours: Reply, theirs: Reply) -> None:
    assert (ours.status, ours.ending) == (theirs.status, theirs.ending)
    assert head(ours) == head(theirs)
    assert ours.anonymous.split(b"\n") == theirs.anonymous.split(b"\n")


@pytest.mark.parametrize("path", ALL)
def test_whole_answers(straight: Endpoint, endpoint: Endpoint, path: str) -> None:
    ours, theirs = both(straight, endpoint, path, *asked(path, {"content": "né 👋🏽"}))
    assert_same(ours, theirs)
    assert theirs.status == 200


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize(
    "script",
    [
        {},
        {"chunk_bytes": 1, "content": "né 👋🏽"},
        {"newline": "\r\n", "bom": True, "comments": 2, "multiline": True, "event_fields": True, "coalesce": 2},
        {"newline": "\r"},
        {"error_event_after": 4, "error_kind": "error"},
        {"huge_line": 300_000},
        {"first": 0.02, "prefill_comments": 2, "late_head": True},
    ],
    ids=str,
)
def test_streams(straight: Endpoint, endpoint: Endpoint, path: str, script: dict[str, Any]) -> None:  # failures 13, 15, 17, 18
    ours, theirs = both(straight, endpoint, path, *asked(path, script, stream="true" if path in FORMS else True))
    assert_same(ours, theirs)
    assert theirs.events


@pytest.mark.parametrize(
    ("include", "continuous"), [pair for pair in itertools.product(("", "false", "true"), repeat=2) if "true" in pair or pair[0]]
)
def test_a_transcription_tells_the_usage_that_was_asked_for(
    straight: Endpoint, endpoint: Endpoint, include: str, continuous: str
) -> None:
    more = {"stream_include_usage": include, "stream_continuous_usage_stats": continuous}
    for path in FORMS:
        body, headers = asked(path, {}, stream="True", **{name: value for name, value in more.items() if value})
        assert_same(*both(straight, endpoint, path, body, headers))


@pytest.mark.parametrize("path", FORMS)
@pytest.mark.parametrize("stream", ["true", "false"])
def test_a_form_reaches_the_engine_whole(
    straight: Endpoint, endpoint: Endpoint, shared_vllm: ScriptedVLLM, path: str, stream: str
) -> None:
    body = form({"model": MODEL, "stream": stream, "prompt": "Grüß Gott!"}, file_first=True)
    headers = {"Content-Type": f'multipart/form-data; boundary="{BOUNDARY}"'}
    assert_same(*both(straight, endpoint, path, body, headers))
    for received in [each for each in shared_vllm.requests if each.method == "POST"][-2:]:
        assert received.path == path
        assert body in received.body  # what the proxy adds for itself goes before it


@pytest.mark.parametrize("path", ALL)
@pytest.mark.parametrize("status", [400, 422, 429, 500, 503])
def test_errors_of_the_engine(straight: Endpoint, endpoint: Endpoint, path: str, status: int) -> None:
    script = {"status": status, "error": "Not today.", "headers": {"Retry-After": "7", "x-should-retry": "false"}}
    ours, theirs = both(straight, endpoint, path, *asked(path, script))
    assert_same(ours, theirs)
    assert (ours.status, ours.header("retry-after"), ours.header("x-should-retry")) == (status, "7", "false")


@pytest.mark.parametrize("path", ALL)
def test_a_query_changes_nothing(straight: Endpoint, endpoint: Endpoint, path: str) -> None:
    body, headers = asked(path, {})
    ours, theirs = both(straight, endpoint, f"{path}?beta=true", body, headers)  # as clients of Anthropic's have it
    assert_same(ours, theirs)
    assert theirs.status == 200


@pytest.mark.parametrize("path", ALL)
def test_a_connection_serves_one_operation_after_the_other(endpoint: Endpoint, path: str) -> None:
    with WireClient(endpoint.url) as client:
        for each in (path, "/v1/chat/completions", path):
            body, headers = asked(each, {})
            client.send(request(each, body, key=endpoint.key, headers=headers))
            reply = client.read()
            assert (reply.status, reply.ending) == (200, "complete")


# --- what is given again, and what isn't ------------------------------------------------------------------------------

only_again = pytest.mark.parametrize("endpoint", ["again"], indirect=True)
TOOLS = {
    "/v1/chat/completions": CHAT_TOOLS,
    "/v1/responses": RESPONSE_TOOLS,
    "/v1/messages": MESSAGE_TOOLS,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing asked": {},
    "refused": {"stream_options": {"include_usage": False}},
    "at the end": {"stream_options": {"include_usage": True}},
    "on each event": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
}
CAPTURED: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {}),
    "chat_n2_logprobs": ("/v1/chat/completions", {"n": 2}),
    "chat_length": ("/v1/chat/completions", {}),
    "chat_return_token_ids": ("/v1/chat/completions", {}),
    "flags/tools_required": ("/v1/chat/completions", {"tools": CHAT_TOOLS}),
    "two/per_request_metrics": ("/v1/chat/completions", {}),
    "llamacpp/chat": ("/v1/chat/completions", {}),
    "completions": ("/v1/completions", {}),
    "completions_batch": ("/v1/completions", {"prompt": ["Hi", "Ho"]}),
    "completions_echo_logprobs": ("/v1/completions", {}),
    "llamacpp/completions": ("/v1/completions", {}),
    "responses": ("/v1/responses", {}),
    "llamacpp/responses": ("/v1/responses", {}),
    "messages": ("/v1/messages", {}),
    "flags/messages_cached": ("/v1/messages", {}),
    "llamacpp/messages": ("/v1/messages", {}),
    "messages_count": ("/v1/messages/count_tokens", {}),
    "tokenize": ("/tokenize", {}),
    "detokenize": ("/detokenize", {}),
    "chat_stream": ("/v1/chat/completions", {"stream": True}),
    "chat_stream_logprobs": ("/v1/chat/completions", {"stream": True}),
    "chat_stream_n2": ("/v1/chat/completions", {"stream": True, "n": 2, **OPTIONS["at the end"]}),
    "chat_stream_usage": ("/v1/chat/completions", {"stream": True, **OPTIONS["at the end"]}),
    "chat_stream_usage_cont": ("/v1/chat/completions", {"stream": True, **OPTIONS["on each event"]}),
    "flags/chat_stream_cached": ("/v1/chat/completions", {"stream": True, **OPTIONS["at the end"]}),
    "two/b_trace_stream_interval4": ("/v1/chat/completions", {"stream": True}),
    "two/per_request_metrics_stream": ("/v1/chat/completions", {"stream": True, **OPTIONS["at the end"]}),
    "llamacpp/chat_stream": ("/v1/chat/completions", {"stream": True, **OPTIONS["at the end"]}),
    "completions_stream": ("/v1/completions", {"stream": True, **OPTIONS["at the end"]}),
    "responses_stream": ("/v1/responses", {"stream": True}),
    "messages_stream": ("/v1/messages", {"stream": True}),
}
GENERATING = [path for path in STREAMS if path in JSON]


@only_again
@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize(
    ("script", "more"),
    [
        ({"tools": True}, {"tools": True}),
        ({"tools": True}, {"tools": True, "stream": True}),
        ({"tokens": 9, "reasoning": 4}, {}),
        ({"tokens": 9, "reasoning": 4}, {"stream": True}),
        ({"tokens": 5, "finish": "length"}, {}),
        ({"tokens": 5, "finish": "length"}, {"stream": True}),
        ({"cached_tokens": 12, "metrics": True}, {}),
        ({"cached_tokens": 12, "metrics": True}, {"stream": True}),
        ({"usage": "none"}, {}),
        ({"usage": "none"}, {"stream": True}),
        ({"pieces": [["word " * 60_000]]}, {}),
        ({"headers": {"X-Kept": "Yes"}}, {}),
    ],
    ids=str,
)
def test_whatever_is_whole_is_given_again(
    straight: Endpoint, endpoint: Endpoint, path: str, script: dict[str, Any], more: dict[str, Any]
) -> None:
    if "tools" in more:
        more = more | {"tools": TOOLS.get(path, [])}
    ours, theirs = both(straight, endpoint, path, *asked(path, script, **more))
    assert_same(ours, theirs)
    assert theirs.status == 200


@only_again
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("script", [{}, {"metrics": True, "cached_tokens": 7}], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("more", [{}, {"n": 2}], ids=str)
def test_the_usage_that_was_asked_for_is_given_again(
    straight: Endpoint, endpoint: Endpoint, path: str, script: dict[str, Any], options: str, more: dict[str, Any]
) -> None:
    logprobs: dict[str, Any] = {"logprobs": 2} if path == "/v1/completions" else {"logprobs": True, "top_logprobs": 2}
    assert_same(*both(straight, endpoint, path, *asked(path, script, stream=True, **logprobs, **OPTIONS[options], **more)))


HALF: list[dict[str, Any]] = [
    {"cut_after_bytes": 150, "cut": "reset"},
    {"cut_after_bytes": 150, "cut": "close"},
    {"cut_after_bytes": 150, "cut": "clean"},
    {"body": "{}"},
    {"body": ""},
    {"status": 201},
    {"status": 404},
]
UNFINISHED: list[dict[str, Any]] = [{"finish": "abort"}, {"no_finish": True}]
"""Of these /v1/responses says that they were completed."""


@only_again
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "script"),
    [
        *itertools.product(GENERATING, HALF),
        *itertools.product([path for path in GENERATING if path != "/v1/responses"], UNFINISHED),
    ],
    ids=str,
)
def test_half_an_answer_is_not_given_again(endpoint: Endpoint, path: str, stream: bool, script: dict[str, Any]) -> None:
    """Failure 57."""
    assert verdicts(*twice(endpoint, path, asked(path, script, stream=stream)[0])) == ("miss", "miss")


@only_again
@pytest.mark.parametrize("path", GENERATING)
def test_an_answer_that_fails_after_its_end_is_not_given_again(endpoint: Endpoint, path: str) -> None:
    """Failure 57."""
    body, _ = asked(path, {"tokens": 3, "error_event_after": 4}, stream=True)
    assert verdicts(*twice(endpoint, path, body)) == ("miss", "miss")


@only_again
@pytest.mark.parametrize("name", ["chat", "completions", "responses", "messages", "messages_count", "tokenize"])
@pytest.mark.parametrize("status", [200, 203])
def test_another_status_is_not_given_again(endpoint: Endpoint, name: str, status: int) -> None:
    """Failure 57. Nobody knows what it may mean."""
    path, more = CAPTURED[name]
    answer = captured.load(name).body
    head = f"HTTP/1.1 {status} Fine\r\ncontent-type: application/json\r\ncontent-length: {len(answer)}\r\n\r\n"
    body, _ = asked(path, {"raw": head + answer.decode("latin-1")}, **more)
    assert verdicts(*twice(endpoint, path, body)) == (HIT if status == 200 else ("miss", "miss"))


@only_again
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("done", [False, True])
def test_a_stream_that_ends_unsaid_is_not_given_again(
    straight: Endpoint, endpoint: Endpoint, path: str, newline: str, done: bool
) -> None:
    """Failure 57. Its client has it all and sees no error; the usage that it asked for may be missing, though."""
    body, _ = asked(path, {"no_done": not done, "newline": newline}, stream=True)
    first, second = twice(endpoint, path, body)
    assert verdicts(first, second) == (HIT if done else ("miss", "miss"))
    assert first.ending == second.ending == "complete"


@only_again
@pytest.mark.parametrize("path", GENERATING)
def test_an_answer_whose_client_has_left_is_not_given_again(endpoint: Endpoint, shared_vllm: ScriptedVLLM, path: str) -> None:
    """Failures 1 and 57."""
    body, _ = asked(path, {"tokens": 90, "interval": 0.05}, stream=True)
    for _ in range(2):
        before = len(shared_vllm.aborted)
        with WireClient(endpoint.url) as client:
            client.send(request(path, body, key=endpoint.key))
            assert verdicts(client.read(events=4)) == ("miss",)
        shared_vllm.wait(lambda before=before: len(shared_vllm.aborted) > before)  # type: ignore[misc]


@only_again
@pytest.mark.parametrize("name", CAPTURED)
def test_what_real_engines_say_is_given_again(endpoint: Endpoint, name: str) -> None:
    path, more = CAPTURED[name]
    first, second = twice(endpoint, path, asked(path, {"replay": name}, **more)[0])
    assert verdicts(first, second) == HIT
    assert first.body == second.body == captured.load(name).body


@only_again
@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("stream", [False, True])
def test_a_head_is_written_as_it_was(endpoint: Endpoint, path: str, stream: bool) -> None:
    """To the letter: a client's parser sees only what lines mean."""
    body, _ = asked(path, {"headers": {"X-Kept": "Yes"}}, stream=stream)
    first, second = (raw_head(endpoint, path, body, more) for more in (FRESH, {}))
    assert [line for line in second if line.startswith(b"age: ")]
    assert without(second) == without(first)
    assert len(without(first)) == len(first) - 2


def raw_head(endpoint: Endpoint, path: str, body: bytes, headers: dict[str, str]) -> list[bytes]:
    with WireClient(endpoint.url) as client:
        client.send(request(path, body, key=endpoint.key, headers=headers))
        data = b""
        while b"\r\n\r\n" not in data:
            data += client.socket.recv(65536)
    return data.partition(b"\r\n\r\n")[0].split(b"\r\n")


def without(head: list[bytes]) -> list[bytes]:
    return [line for line in head if not line.startswith(tuple(f"{name}:".encode() for name in OF_ONE))]


def twice(endpoint: Endpoint, path: str, body: bytes) -> tuple[Reply, Reply]:
    first, second = (ask(endpoint.url, path, body, key=endpoint.key, headers=more) for more in (FRESH, {}))
    return first, second
