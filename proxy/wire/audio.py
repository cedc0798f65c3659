"""`POST /v1/audio/transcriptions` and `/v1/audio/translations`: a form with a file, the answer as JSON or as chunks.

A whole answer says how many seconds it heard, never how many tokens it took: those are estimated. A stream can be asked for them
with form fields of vLLM's own, which then go before the client's; what the client itself says in one of these holds.
"""

from __future__ import annotations

import math

import msgspec
from msgspec import Struct

from proxy.errors import InvalidRequest
from proxy.exchange import Record, UsageSource
from proxy.wire.body import INTERNAL, Request
from proxy.wire.form import form_type, read_form
from proxy.wire.operation import FORM, MAX_TEXT, EngineOperation, Upstream, read_any_answer
from proxy.wire.stream import Terms
from proxy.wire.usage import MAX_COUNT

_TRUE = (b"true", b"1", b"yes", b"on", b"t", b"y")
_FALSE = (b"false", b"0", b"no", b"off", b"f", b"n", b"")
"""As pydantic reads them, in any case."""
_PART = b'--%b\r\nContent-Disposition: form-data; name="%b"\r\n\r\ntrue\r\n'


class _Usage(Struct, gc=False):
    seconds: float | None = None


class _Answer(Struct, gc=False):
    """Of a transcription; a verbose one has its `duration` instead of a usage, a translation neither."""

    usage: _Usage | None = None
    duration: float | None = None


_answer = msgspec.json.Decoder(_Answer)


class AudioRequest(Request, kw_only=True):
    """`None` for what wasn't said."""

    boundary: bytes = b""
    include_usage: bool | None = None
    continuous_usage: bool | None = None


def _read(body: bytes, record: Record, content_type: bytes = b"") -> AudioRequest:
    form = read_form(body, content_type)
    fields = form.fields
    try:
        model = fields.get("model", b"").decode()
    except UnicodeDecodeError:
        raise InvalidRequest("`model` isn't valid UTF-8.", param="model") from None
    record.model = model[:MAX_TEXT]
    record.stream = bool(_flag(fields, "stream"))
    return AudioRequest(
        model=model,
        stream=record.stream,
        boundary=form.boundary,
        include_usage=_flag(fields, "stream_include_usage"),
        continuous_usage=_flag(fields, "stream_continuous_usage_stats"),
        internal=tuple(name for name in fields if name in INTERNAL),
    )


def _flag(fields: dict[str, bytes], name: str) -> bool | None:
    if name not in fields:
        return None
    value = fields[name].strip().lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise InvalidRequest(f"`{name}` must be true or false.", param=name)


def _prepare(body: bytes, request: AudioRequest, kind: str) -> Upstream:
    content_type = form_type(request.boundary)
    wanted = b""
    if request.stream and kind == "vllm" and request.include_usage is not False:
        if request.continuous_usage is None:
            wanted = _PART % (request.boundary, b"stream_continuous_usage_stats")
        if request.include_usage is None:
            wanted += _PART % (request.boundary, b"stream_include_usage")
    if not wanted:
        return Upstream(body, content_type=content_type)
    return Upstream(body, Terms(cut_usage=True, drop_usage_chunk=request.include_usage is None), content_type, wanted)


def _observe(body: bytes, record: Record) -> None:
    try:
        answer = _answer.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        read_any_answer(body)
        return
    seconds = answer.usage.seconds if answer.usage is not None else answer.duration
    record.audio_seconds = min(max(0, math.ceil(seconds or 0)), MAX_COUNT)


def _estimate(record: Record, answer_bytes: int) -> None:
    """Of the text; a file's bytes say nothing of its tokens."""
    record.output_tokens = answer_bytes // 4
    record.usage_source = UsageSource.ESTIMATED


OPERATIONS = tuple(
    EngineOperation(
        name=name,
        method=b"POST",
        path=b"/v1/audio/" + name.encode(),
        read=_read,
        prepare=_prepare,
        observe=_observe,
        estimate=_estimate,
        generates=True,
        media=FORM,
        lists=0,
        text=True,
    )
    for name in ("transcriptions", "translations")
)
