"""`POST /v1/responses`: OpenAI's newer API, as vLLM and llama.cpp serve it.

Only what is answered in this very request can be accounted, so `background` is refused. What an engine keeps under a response's
id (`previous_response_id`) is its own affair: an engine that doesn't have it says so. Who gave which is remembered (routing).
"""

from __future__ import annotations

import re

import msgspec
from msgspec import Raw, Struct

from proxy.errors import InvalidRequest, ProxyError
from proxy.exchange import Record
from proxy.wire.body import Integer, Reader, Request
from proxy.wire.caching import Caching
from proxy.wire.events import EventObserver
from proxy.wire.operation import MAX_TEXT, EngineOperation, as_it_came, estimate_output, read_any_answer
from proxy.wire.sse import data_of
from proxy.wire.usage import read_engine_timings, read_response_usage, write_finish_reason, write_usage

_TOKEN = re.compile(rb'"delta":\s*"(?!")')
_SEQUENCE = re.compile(rb'"sequence_number":\s*([0-9]{1,18})')
_ID = re.compile(rb'"id":\s*"(resp_[A-Za-z0-9_-]{1,128})"')
_ENDS = ("response.completed", "response.incomplete", "response.failed", "response.cancelled")


class ResponsesRequest(Request, kw_only=True):
    max_output_tokens: Integer | None = None
    top_logprobs: Integer | None = None
    temperature: float | None = None
    seed: Integer | None = None
    top_p: float | None = None
    user: str | None = None
    background: bool | None = None
    tools: Raw = Raw(b"")
    text: Raw = Raw(b"")
    instructions: Raw = Raw(b"")
    input: Raw = Raw(b"")
    previous_response_id: str | None = None


class _Incomplete(Struct, gc=False):
    reason: str | None = None


class _Response(Struct, gc=False):
    status: str | None = None
    incomplete_details: _Incomplete | None = None
    error: Raw = Raw(b"")
    usage: Raw = Raw(b"")
    metrics: Raw = Raw(b"")
    timings: Raw = Raw(b"")


class _Event(Struct, gc=False):
    response: _Response | None = None
    code: str | int | None = None
    message: str | None = None
    param: str | None = None


_read_request = Reader(ResponsesRequest)
_response = msgspec.json.Decoder(_Response)
_event = msgspec.json.Decoder(_Event)
_unreadable = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)


class ResponsesObserver(EventObserver):
    """The events of one answer: response.created, items, parts and deltas of it, and its end, which repeats all of it."""

    _last = b""

    def broken(self, error: ProxyError) -> bytes:
        match = _SEQUENCE.search(self._last)
        body = {
            "type": "error",
            "code": error.error_code or error.type,
            "message": error.message,
            "param": None,
            "sequence_number": int(match[1]) + 1 if match else 0,
        }
        return b"event: error\ndata: %b\n\n" % msgspec.json.encode(body)

    def settle(self) -> None:
        self._estimate()

    def _named(self, name: str, event: bytes, now: int) -> bytes:
        if name.endswith(".delta"):
            if _TOKEN.search(event) is not None:
                self._token(name == "response.output_text.delta", now)
        elif name in _ENDS:
            return self._ended(event)
        elif name == "error":
            return self._error(event)
        self._last = event
        return event

    def _ended(self, event: bytes) -> bytes:
        self.done = True
        said = _read(event)
        if said is not None and said.response is not None:
            _write(said.response, self._record)
            if len(error := bytes(said.response.error)) > len(b"null"):
                self.error_event = error
        if not self._record.finish_reasons:
            write_finish_reason("unknown", self._record)
        self.tail += event
        return b""

    def _error(self, event: bytes) -> bytes:
        said = _read(event) or _Event()
        error = msgspec.json.encode(
            {"message": said.message or "", "type": "server_error", "param": said.param, "code": said.code}
        )
        return self._failed(event, error, b'{"error":%b}' % error)


def _read(event: bytes) -> _Event | None:
    try:
        return _event.decode(data_of(event) or b"")
    except _unreadable:
        return None


def _write(response: _Response, record: Record) -> None:
    """What a finished response says of itself. Its finish reason is why it is incomplete, or else its status."""
    reason = response.incomplete_details.reason if response.incomplete_details is not None else None
    write_finish_reason(reason or response.status, record)
    if (usage := read_response_usage(bytes(response.usage))) is not None:
        write_usage(usage, record)
    if len(response.metrics) > len(b"null") or len(response.timings):
        record.engine = read_engine_timings(bytes(response.metrics), bytes(response.timings))


def _read_responses(body: bytes, record: Record, content_type: bytes = b"") -> ResponsesRequest:
    request = _read_request(body)
    _write_facts(request, record)
    if request.background:
        raise InvalidRequest(
            "`background` isn't supported here: a response must be answered in its own request.", param="background"
        )
    if "request_id" in request.internal:
        raise InvalidRequest("`request_id` is the proxy's to set: two equal ones would mix up answers.", param="request_id")
    return request


def _write_facts(request: ResponsesRequest, record: Record) -> None:
    record.model = (request.model or "")[:MAX_TEXT]
    record.stream = bool(request.stream)
    record.max_tokens = request.max_output_tokens
    record.temperature = request.temperature
    record.top_p = request.top_p
    record.user = (request.user or "")[:MAX_TEXT]


def _continues(request: ResponsesRequest) -> str:
    return request.previous_response_id or ""


def _answer_id(end: bytes) -> str:
    match = _ID.search(end)
    return "" if match is None else match[1].decode()


def _observe(body: bytes, record: Record) -> None:
    try:
        response = _response.decode(body)
    except _unreadable:
        read_any_answer(body)
        return
    _write(response, record)


OPERATION = EngineOperation(
    name="responses",
    method=b"POST",
    path=b"/v1/responses",
    prompt=lambda request: (request.tools, request.instructions, request.input),
    continues=_continues,
    answer_id=_answer_id,
    read=_read_responses,
    facts=_write_facts,
    prepare=as_it_came,
    observe=_observe,
    watch=ResponsesObserver,
    estimate=estimate_output,
    lists=1,
    generates=True,
    usage=read_response_usage,
    caching=Caching(
        # Nothing else: an answer repeats what was asked for, `user` and `metadata` included.
        ignored=frozenset(("stream", "priority")),
        # What it goes on from, or is made of, lies with the engine, and so does what it is to keep.
        never=frozenset(
            (
                *("previous_response_id", "conversation", "prompt", "background", "store"),
                *("kv_transfer_params", "ec_transfer_params"),
            )
        ),
        drawn=True,
    ),
)
