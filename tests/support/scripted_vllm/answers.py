"""Which request gets which answer: routing, validation, heads. Decides, and leaves the sockets to the connection."""

from __future__ import annotations

import functools
import http
import itertools
import os
import time
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from tests.support.scripted_vllm import audio, captured, dialect, messages, pooling, requests, responses, tokenizing
from tests.support.scripted_vllm.captured import Captured
from tests.support.scripted_vllm.events import Event, Prepared
from tests.support.scripted_vllm.framing import Step, stream_steps, whole_steps
from tests.support.scripted_vllm.generation import Call
from tests.support.scripted_vllm.requests import Asked, Context, Refused
from tests.support.scripted_vllm.script import Script

if TYPE_CHECKING:
    from tests.support.scripted_vllm.server import ScriptedVLLM

Headers = list[tuple[bytes, bytes]]

JSON: Final = b"application/json"
_NOT_FOUND: Final = b'{"detail":"Not Found"}'
_NOT_ALLOWED: Final = b'{"detail":"Method Not Allowed"}'
_UNAUTHORIZED: Final = b'{"error":"Unauthorized"}'
_BUSY: Final = "The engine is currently busy and cannot accept new requests. Please try again later or on a different instance."
_GUARDED: Final = ("/v1", "/v2")
_CAPTURED_GET: Final = {"/version": "version", "/load": "load"}
_GET: Final = frozenset({"/v1/models", "/health", "/ping", "/metrics", *_CAPTURED_GET})
_STATUS_LINES: Final = {status.value: b"HTTP/1.1 %d %b\r\n" % (status, status.phrase.encode()) for status in http.HTTPStatus}


class Api(NamedTuple):
    """One API: how it reads a body (as vLLM validates it, with refusals in OpenAI's shape), and how it answers."""

    id_prefix: bytes
    """What goes before the caller's request id."""
    read: Callable[[bytes, bytes | None], Any]
    """From the bytes and their content type."""
    answer: Callable[[Any, Context], Prepared]
    refusal: Callable[[Refused], bytes] = Refused.body
    """What is refused once the request is understood."""
    form: bool = False
    """The body is a form, not JSON."""
    own_ids: bool = False
    """The caller's request id isn't taken up."""


_SCORE: Final = Api(b"score-", pooling.read_score, pooling.score)
_RERANK: Final = Api(b"score-", pooling.read_rerank, pooling.rerank)
_POST: Final = {
    "/v1/chat/completions": Api(b"chatcmpl-", requests.read, dialect.chat),
    "/v1/completions": Api(b"cmpl-", requests.read, dialect.completions),
    "/v1/embeddings": Api(b"embd-", requests.read, dialect.embeddings),
    "/v1/responses": Api(b"resp_", responses.read, responses.answer, own_ids=True),
    "/v1/messages": Api(b"chatcmpl-", messages.read, messages.answer, messages.error_json),
    "/v1/messages/count_tokens": Api(b"", messages.read_count, messages.count, messages.error_json),
    "/v1/score": _SCORE,
    "/score": _SCORE,
    "/v1/rerank": _RERANK,
    "/v2/rerank": _RERANK,
    "/rerank": _RERANK,
    "/v1/audio/transcriptions": Api(b"transcribe-", audio.read, audio.transcribe, form=True),
    "/v1/audio/translations": Api(b"translate-", audio.read, audio.translate, form=True),
    "/tokenize": Api(b"", tokenizing.read_tokenize, tokenizing.tokenize),
    "/detokenize": Api(b"", tokenizing.read_detokenize, tokenizing.detokenize),
}


class Received(msgspec.Struct, eq=False):
    """One request as it came in, and what became of it."""

    method: str
    target: str
    headers: Headers
    """Names as they were sent."""
    body: bytes
    at: float
    """time.monotonic() when its last byte was there."""
    connection: int
    """Which accepted connection brought it, counted from 1."""
    generated: int = 0
    """Tokens generated for it so far."""
    sent: int = 0
    """Bytes written for it so far, HTTP framing included."""
    outcome: str = "running"
    """running, done, aborted (the client left before the end) or cut (the script broke it)."""

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    def header(self, name: str) -> str | None:
        """The first value of a header, whatever its case."""
        value = find(self.headers, name.encode())
        return None if value is None else value.decode("latin-1")

    def json(self) -> Any:
        return msgspec.json.decode(self.body)


class Answer(NamedTuple):
    """Either all of it at once, or steps in time. `call` is what the counters count."""

    data: bytes = b""
    steps: Iterator[Step] = iter(())
    call: Call | None = None
    prompt_tokens: int = 0
    """What is counted where there is no call: embeddings, scores, ranks."""


def find(headers: Headers, name: bytes) -> bytes | None:
    for key, value in headers:
        if len(key) == len(name) and key.lower() == name.lower():
            return value
    return None


# --- routing ---------------------------------------------------------------------------------------------------------


def answer(server: ScriptedVLLM, received: Received) -> Answer:
    try:
        return _route(server, received, received.path)
    except Refused as refused:
        return Answer(_json(server, refused.status, refused.body()))


def _route(server: ScriptedVLLM, received: Received, path: str) -> Answer:
    guarded = server.authorization is not None and path.startswith(_GUARDED)
    if guarded and find(received.headers, b"authorization") != server.authorization:
        return Answer(_json(server, 401, _UNAUTHORIZED))
    if api := _POST.get(path):
        if received.method != "POST":
            return Answer(_json(server, 405, _NOT_ALLOWED, allow=b"POST"))
        return _generate(server, received, api)
    if path not in _GET:
        return Answer(_json(server, 404, _NOT_FOUND))
    if received.method != "GET":
        return Answer(_json(server, 405, _NOT_ALLOWED, allow=b"GET"))
    return Answer(_look_up(server, path))


def _look_up(server: ScriptedVLLM, path: str) -> bytes:
    match path:
        case "/v1/models":
            return _json(server, 200, dialect.models_json(server.models, int(time.time()), server.max_model_len))
        case "/metrics":
            body, kind = server.metrics(), b"text/plain; version=1.0.0; charset=utf-8"
            return _head(server, 200, _whole_headers(body, kind)) + body
        case "/health" | "/ping":
            return _head(server, 200 if server.well else 503, [(b"content-length", b"0"), (b"vary", b"Origin")])
        case _:
            return _json(server, 200, captured.load(_CAPTURED_GET[path]).body)


def _generate(server: ScriptedVLLM, received: Received, api: Api) -> Answer:
    content_type = find(received.headers, b"content-type")
    if not api.form:
        requests.check_media_type(content_type)
    body = api.read(received.body, content_type)
    script = server.scripted(body)
    if server.capacity is not None and server.in_flight >= server.capacity:
        return Answer(_json(server, 503, api.refusal(Refused(503, _BUSY))))
    try:
        found = _scripted(server, received, api, body, script)
    except Refused as refused:
        return Answer(_json(server, refused.status, api.refusal(refused)))
    if not script.hang:
        return found
    steps = found.steps if not found.data else iter((Step(data=found.data), Step(then="end")))
    return found._replace(data=b"", steps=itertools.chain((Step(then="hang"),), steps))


def _scripted(server: ScriptedVLLM, received: Received, api: Api, body: Asked, script: Script) -> Answer:
    if script.raw is not None:
        end = Step(then="close" if script.raw_closes else "end")
        return Answer(steps=iter((Step(script.first, script.raw.encode("latin-1")), end)))
    if script.replay is not None:
        return _replayed(script.replay, script)
    if script.status != 200:
        return _whole(server, received, script, api.refusal(Refused(script.status, script.error or "The script says so.")))
    if script.body is not None:
        return _whole(server, received, script, script.body.encode())
    caller = None if api.own_ids else find(received.headers, b"x-request-id")
    answer_id = api.id_prefix + (caller or b"%016x" % int.from_bytes(os.urandom(8)))
    prepared = api.answer(body, Context(script, answer_id, int(time.time()), server.models, server.max_model_len))
    if prepared.events is None:
        return _whole(server, received, script, prepared.body, prepared.call, prepared.prompt_tokens)
    head = _head(server, 200, _stream_headers(server, received, script))
    fail = prepared.fail or functools.partial(dialect.failure, script)
    return Answer(steps=stream_steps(prepared.events, script, head, fail), call=prepared.call)


def _whole(
    server: ScriptedVLLM,
    received: Received,
    script: Script,
    body: bytes,
    call: Call | None = None,
    prompt_tokens: int = 0,
) -> Answer:
    if script.gzip:
        packer = zlib.compressobj(wbits=31)
        body = packer.compress(body) + packer.flush()
    if script.plain and not script.headers and not server.request_id_headers:
        return Answer(_json(server, script.status, body), call=call, prompt_tokens=prompt_tokens)
    headers = _whole_headers(body, JSON)
    if script.gzip:
        headers.append((b"content-encoding", b"gzip"))
    if server.request_id_headers:
        headers.append((b"x-request-id", find(received.headers, b"x-request-id") or os.urandom(16).hex().encode()))
    head = _head(server, script.status, _with(headers, script))
    tokens = call.completion_tokens if call is not None else 0
    return Answer(steps=whole_steps(head, body, tokens, script), call=call, prompt_tokens=prompt_tokens)


def _replayed(name: str, script: Script) -> Answer:
    try:
        answer = captured.load(name)
    except KeyError:
        raise Refused(400, f"This is no script: nothing was captured as {name}", "script", "ScriptError") from None
    head = render_head(answer.status, _with(answer.headers, script))
    if not answer.streamed:
        return Answer(steps=whole_steps(head, answer.body, 0, script))
    fail = functools.partial(dialect.failure, script)
    return Answer(steps=stream_steps(_captured_events(answer, script), script, head, fail, chunked=answer.chunked))


def _captured_events(answer: Captured, script: Script) -> Iterator[Event]:
    for i, block in enumerate(answer.blocks()):
        yield Event(block, 0, script.interval if i else script.first)


# --- heads -----------------------------------------------------------------------------------------------------------


def render_head(status: int, headers: Headers) -> bytes:
    line = _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
    return b"%b%b\r\n" % (line, b"".join([b"%b: %b\r\n" % header for header in headers]))


def _head(server: ScriptedVLLM, status: int, headers: Headers) -> bytes:
    return render_head(status, [(b"date", server.date(int(time.time()))), (b"server", b"uvicorn"), *headers])


def _json(server: ScriptedVLLM, status: int, body: bytes, allow: bytes = b"") -> bytes:
    """A whole response in one piece; the way of nearly every answer, so it is one format."""
    return b"%bdate: %b\r\nserver: uvicorn\r\n%bcontent-length: %d\r\ncontent-type: application/json\r\n%b\r\n%b" % (
        _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status,
        server.date(int(time.time())),
        b"allow: %b\r\n" % allow if allow else b"",
        len(body),
        b"" if status == 401 else b"vary: Origin\r\n",
        body,
    )


def _whole_headers(body: bytes, kind: bytes) -> Headers:
    return [(b"content-length", b"%d" % len(body)), (b"content-type", kind), (b"vary", b"Origin")]


def _stream_headers(server: ScriptedVLLM, received: Received, script: Script) -> Headers:
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"vary", b"Origin")]
    if server.request_id_headers:
        headers.append((b"x-request-id", find(received.headers, b"x-request-id") or os.urandom(16).hex().encode()))
    if script.gzip:
        headers.append((b"content-encoding", b"gzip"))
    headers.append((b"transfer-encoding", b"chunked"))
    return _with(headers, script)


def _with(headers: Headers, script: Script) -> Headers:
    """The script's headers in place of those of the same name, else at the end."""
    wanted = {name.lower().encode("latin-1"): value.encode("latin-1") for name, value in script.headers.items()}
    kept = [(name, wanted.pop(name, value)) for name, value in headers]
    return kept + list(wanted.items())
