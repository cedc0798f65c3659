"""Each operation over a raw socket: the bytes that a client sees through the proxy are those that it would have seen straight.

Heads and bodies, after HTTP framing. The date, ids and times of creation may differ, and the proxy adds header lines of its own.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from tests.compat.cases import MODEL
from tests.support.endpoints import Endpoint
from tests.support.scripted_vllm import ScriptedVLLM
from tests.support.scripted_vllm.audio import tone
from tests.support.wire_client import Reply, WireClient, ask, request

HELLO: Any = [{"role": "user", "content": "Hi"}]
BOUNDARY = "----7d1f"
SOUND = tone(0.5)
SOME_ID = "0" * 32 + "-1"
MAY_DIFFER = ("date", "x-request-id", "x-glasshouse-backend")
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
    return (
        ask(endpoint.url, path, body, key=endpoint.key, headers=with_id),
        ask(straight.url, path, body, key=straight.key, headers=with_id),
    )


def head(reply: Reply) -> list[tuple[str, str]]:
    return sorted((name, value) for name, value in reply.headers if name not in MAY_DIFFER)


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
    for received in shared_vllm.requests[-2:]:
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
