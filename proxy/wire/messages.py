"""`POST /v1/messages`: Anthropic's API, as vLLM and llama.cpp serve it.

Source: Anthropic's API reference. Its `input_tokens` leaves out what was read from or written to a cache; the record's has all.
"""

from __future__ import annotations

import json
import re

import msgspec
from msgspec import Raw, Struct

from proxy.errors import ProxyError
from proxy.exchange import Record, UsageSource
from proxy.wire.body import Integer, Reader, Request
from proxy.wire.caching import Caching
from proxy.wire.events import EventObserver
from proxy.wire.operation import MAX_TEXT, EngineOperation, as_it_came, estimate_output, read_any_answer
from proxy.wire.sse import data_of
from proxy.wire.usage import ABORTED, read_message_usage, write_finish_reason, write_usage

_TOKEN = re.compile(rb'"(?:text|thinking|partial_json)":\s*"(?!")')
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


class _Metadata(Struct, gc=False):
    user_id: str | None = None


class MessagesRequest(Request, kw_only=True):
    max_tokens: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    metadata: _Metadata | None = None
    stop_sequences: Raw = Raw(b"")
    tools: Raw = Raw(b"")
    output_config: Raw = Raw(b"")
    system: Raw = Raw(b"")
    messages: Raw = Raw(b"")


class _Delta(Struct, gc=False):
    stop_reason: str | None = None


class _Message(Struct, gc=False):
    usage: Raw = Raw(b"")
    stop_reason: str | None = None


class _Event(Struct, gc=False):
    message: _Message | None = None
    delta: _Delta | None = None
    usage: Raw = Raw(b"")
    error: Raw = Raw(b"")


_read_request = Reader(MessagesRequest)
_message = msgspec.json.Decoder(_Message)
_event = msgspec.json.Decoder(_Event)
_unreadable = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)


def error_body(error: ProxyError) -> bytes:
    """`{"type": "error", "error": {"type", "message"}}`."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return json.dumps(
        {"type": "error", "error": {"type": kind, "message": error.message}}, ensure_ascii=False, separators=(",", ":")
    ).encode("utf-8", "backslashreplace")


class MessagesObserver(EventObserver):
    """The events of one answer: message_start, blocks of deltas, message_delta, message_stop."""

    _input: int | None = None
    """Input tokens as message_start said."""

    def broken(self, error: ProxyError) -> bytes:
        body = {"type": "error", "error": {"type": "api_error", "message": error.message}}
        return b"event: error\ndata: %b\n\n" % msgspec.json.encode(body)

    def settle(self) -> None:
        if self._record.usage_source != UsageSource.ENGINE:
            self._estimate()
            if self._input is not None:
                self._record.input_tokens = self._input

    def _named(self, name: str, event: bytes, now: int) -> bytes:
        if name == "content_block_delta":
            if _TOKEN.search(event) is not None:
                self._token(b'"text_delta"' in event, now)
        elif name == "content_block_start":
            if b'"tool_use"' in event:
                self._token(False, now)
        elif name == "message_delta":
            self._finishing(event)
        elif name == "message_stop":
            self.done = True
            self.tail += event
            if not self._record.finish_reasons:
                write_finish_reason(ABORTED, self._record)
            return b""
        elif name == "message_start":
            said = _read(event).message
            usage = read_message_usage(bytes(said.usage)) if said is not None else None
            self._input = usage.prompt_tokens if usage is not None else self._input
        elif name == "error":
            error = bytes(_read(event).error) or b"{}"
            return self._failed(event, error, b'{"type":"error","error":%b}' % error)
        return event

    def _finishing(self, event: bytes) -> None:
        """Why it stopped, and the totals; from here on nothing goes out before the end."""
        said = _read(event)
        usage = read_message_usage(bytes(said.usage))
        if usage is not None and usage.completion_tokens is not None:
            if usage.prompt_tokens is None:
                usage.prompt_tokens = self._input or 0  # Anthropic itself says it at the beginning only
            write_usage(usage, self._record)
        if said.delta is not None and said.delta.stop_reason:
            write_finish_reason(said.delta.stop_reason, self._record)
            self._withholding = True


def _read(event: bytes) -> _Event:
    try:
        return _event.decode(data_of(event) or b"{}")
    except _unreadable:
        return _Event()


def _read_messages(body: bytes, record: Record, content_type: bytes = b"") -> MessagesRequest:
    request = _read_request(body)
    _write_facts(request, record)
    return request


def _write_facts(request: MessagesRequest, record: Record) -> None:
    record.model = (request.model or "")[:MAX_TEXT]
    record.stream = bool(request.stream)
    record.max_tokens = request.max_tokens
    record.temperature = request.temperature
    record.top_p = request.top_p
    if request.metadata is not None:
        record.user = (request.metadata.user_id or "")[:MAX_TEXT]


def _observe(body: bytes, record: Record) -> None:
    try:
        message = _message.decode(body)
    except _unreadable:
        read_any_answer(body)
        return
    write_finish_reason(message.stop_reason or ABORTED, record)
    if (usage := read_message_usage(bytes(message.usage))) is not None:
        write_usage(usage, record)


OPERATION = EngineOperation(
    name="messages",
    method=b"POST",
    path=b"/v1/messages",
    prompt=lambda request: (request.tools, request.system, request.messages),
    read=_read_messages,
    facts=_write_facts,
    prepare=as_it_came,
    observe=_observe,
    watch=MessagesObserver,
    estimate=estimate_output,
    generates=True,
    usage=read_message_usage,
    error=error_body,
    caching=Caching(
        ignored=frozenset(("stream", "metadata", "request_id", "priority")),
        never=frozenset(("container", "mcp_servers", "kv_transfer_params", "ec_transfer_params")),
        drawn=True,
    ),
)
