"""/v1/audio/transcriptions and /v1/audio/translations as vLLM 0.32 speaks them, and a sound to send there. Sans-io, no clock.

Nothing was captured; the shapes are those of vLLM's protocol classes. Worth knowing:
  - the request is a form: its options are fields as flat as `stream_include_usage`, and so is the `script`, as JSON;
  - response_format "text" is answered with JSON, as "json" is;
  - a transcription tells its seconds, a translation nothing; tokens are told in streams only, and only when asked for.
"""

from __future__ import annotations

import io
import math
import re
import wave
import zlib
from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from tests.support.scripted_vllm import generation, requests
from tests.support.scripted_vllm.events import DONE, Event, Prepared
from tests.support.scripted_vllm.generation import Call
from tests.support.scripted_vllm.requests import Asked, Body, Context, Refused, quote

_RATE: Final = 16_000
_BOUNDARY: Final = re.compile(rb'multipart/form-data;.*\bboundary="?([^";]+)"?', re.IGNORECASE)
_FIELD: Final = re.compile(rb'content-disposition: *form-data;.*\bname="([^"]*)"', re.IGNORECASE)
_FILENAME: Final = re.compile(rb"\bfilename\*?=", re.IGNORECASE)
_FORMATS: Final = ("text", "json", "verbose_json")
_OTHER_FORMATS: Final = ("srt", "vtt", "diarized_json")
_DECODER_PROMPT: Final = 4
_TOKENS_A_SECOND: Final = 50
_TRUE: Final = ("1", "on", "t", "true", "y", "yes")


def tone(seconds: float = 2.5, *, pitch: int = 440) -> bytes:
    """A WAV file, 16 kHz mono."""
    samples = (round(9000 * math.sin(2 * math.pi * pitch * i / _RATE)) for i in range(round(seconds * _RATE)))
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(_RATE)
        out.writeframes(b"".join([sample.to_bytes(2, "little", signed=True) for sample in samples]))
    return file.getvalue()


class Request(Asked, kw_only=True):
    file: bytes
    language: str | None = None
    response_format: str = "json"
    temperature: float = 0.0
    max_completion_tokens: int | None = None
    include_usage: bool = False
    continuous_usage: bool = False


def read(raw: bytes, content_type: bytes | None) -> Request:
    """Raises Refused."""
    form = _form(raw, content_type)
    if "file" not in form:
        raise requests.invalid("missing", "body.file", "Field required", size=len(form))
    sent_as_file, file = form.pop("file")
    if not sent_as_file:
        raise Refused(422, "Expected 'file' to be a file-like object, not 'str'.", None, "Unprocessable Entity")
    fields = {name: value.decode() for name, (_, value) in form.items()}
    stream, include, continuous = (
        fields.get(name, "").lower() in _TRUE for name in ("stream", "stream_include_usage", "stream_continuous_usage_stats")
    )
    if (include or continuous) and not stream:
        raise requests.invalid("value_error", "body", "Value error, Stream options can only be defined when `stream=True`.")
    shape = fields.get("response_format", "json")
    if shape not in (*_FORMATS, *_OTHER_FORMATS):
        raise requests.invalid("literal_error", "body.response_format", f"Input should be {', '.join(map(repr, _FORMATS))}")
    limit = fields.get("max_completion_tokens")
    return Request(
        model=fields.get("model"),
        stream=stream,
        script=msgspec.Raw(fields.get("script", "").encode()),
        file=file,
        language=fields.get("language"),
        response_format=shape,
        temperature=float(fields.get("temperature", 0)),
        max_completion_tokens=None if limit is None else int(limit),
        include_usage=include,
        continuous_usage=continuous,
    )


def _form(raw: bytes, content_type: bytes | None) -> dict[str, tuple[bool, bytes]]:
    """(whether it came as a file, its content) of each field; RFC 7578. Raises Refused."""
    found = _BOUNDARY.match(content_type or b"")
    if found is None:
        return {}
    _, *parts = (b"\r\n" + raw).split(b"\r\n--" + found[1])
    if not parts or not parts[-1].startswith(b"--"):
        raise Refused(400, "There was an error parsing the body", None, "Bad Request")
    form = {}
    for part in parts[:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        field = next(filter(None, map(_FIELD.match, head.split(b"\r\n"))), None)
        if field is None:
            raise Refused(400, 'The Content-Disposition header field "name" must be provided.', None, "Bad Request")
        form[field[1].decode()] = (_FILENAME.search(head) is not None, content)
    return form


# --- answers ---------------------------------------------------------------------------------------------------------


class _Task(msgspec.Struct, frozen=True):
    """One of the two APIs, with one request."""

    name: str
    chunk: str
    request: Request
    call: Call
    seconds: float


def transcribe(request: Request, context: Context) -> Prepared:
    """Raises Refused."""
    return _answer(_understand(request, context, "transcribe", "transcription.chunk"), _transcription)


def translate(request: Request, context: Context) -> Prepared:
    """Raises Refused."""
    return _answer(_understand(request, context, "translate", "translation.chunk"), _translation)


def _understand(request: Request, context: Context, name: str, chunk: str) -> _Task:
    requests.check_model(request, context.models)
    shape = request.response_format
    if shape not in _FORMATS and shape != "diarized_json":
        raise Refused(400, "Currently only support response_format: `text`, `json`, `verbose_json` or `diarized_json`")
    if shape == "diarized_json":
        raise Refused(400, f"Currently do not support diarized_json for {request.model or context.models[0]}")
    if shape == "verbose_json" and request.stream:
        raise Refused(400, "verbose_json format doesn't support streaming case")
    try:
        with wave.open(io.BytesIO(request.file)) as sound:
            seconds = sound.getnframes() / sound.getframerate()
    except (wave.Error, EOFError) as error:
        raise Refused(400, "Invalid or unsupported audio file.") from error
    prompt = [0] * (_DECODER_PROMPT + math.ceil(seconds * _TOKENS_A_SECOND))
    body = Body(model=request.model, stream=request.stream, prompt=prompt, max_tokens=request.max_completion_tokens)
    roomy = context._replace(max_model_len=context.max_model_len + len(prompt))  # a sound has room of its own
    return _Task(name, chunk, request, generation.understand(body, roomy, chat=False), seconds)


def _answer(task: _Task, whole: Callable[[_Task, str], dict[str, object]]) -> Prepared:
    if task.request.stream:
        return Prepared(events=_stream(task), call=task.call)
    (choice,) = task.call.choices
    text = generation.text_of(choice)
    shape = _verbose if task.request.response_format == "verbose_json" else whole
    return Prepared(quote(shape(task, text)), call=task.call)


def _transcription(task: _Task, text: str) -> dict[str, object]:
    return {"text": text, "usage": {"type": "duration", "seconds": math.ceil(task.seconds)}}


def _translation(task: _Task, text: str) -> dict[str, object]:
    return {"text": text}


def _verbose(task: _Task, text: str) -> dict[str, object]:
    segment = {
        "id": 0,
        "avg_logprob": -0.25,
        "compression_ratio": len(text.encode()) / len(zlib.compress(text.encode())),
        "end": task.seconds,
        "no_speech_prob": None,
        "seek": 0,
        "start": 0.0,
        "temperature": task.request.temperature,
        "text": text,
        "tokens": [zlib.crc32(word.encode()) % 50_000 for word in text.split()],
    }
    language = task.request.language or "en"
    return {"duration": task.seconds, "language": language, "text": text, "segments": [segment], "words": None}


def _stream(task: _Task) -> Iterator[Event]:
    call, script = task.call, task.call.script
    prefix = b'{"id":%b,"object":"%b","created":%d,"model":%b,"choices":' % (
        quote(call.answer_id.decode()),
        task.chunk.encode(),
        call.created,
        quote(call.model),
    )
    done, wait = 0, script.first
    for _, group, final in generation.schedule(call):
        done += len(group)
        text = "".join([token.text for token in group])
        choice: dict[str, object] = {"delta": {"content": text}}
        if final and not script.no_finish:
            choice |= {"finish_reason": call.choices[0].finish, "stop_reason": None}
        usage = b',"usage":' + _usage(call, done) if task.request.include_usage and task.request.continuous_usage else b""
        yield Event(b"%b[%b]%b}" % (prefix, quote(choice), usage), len(group), wait)
        if script.huge_line and done == len(group):
            yield Event(prefix + b'[],"huge":"' + b"x" * script.huge_line + b'"}')
        wait = script.interval
    if task.request.include_usage and script.usage != "none":
        yield Event(b'%b[],"usage":%b}' % (prefix, _usage(call, done)))
    if not script.no_done:
        yield Event(DONE)


def _usage(call: Call, done: int) -> bytes:
    told = {"prompt_tokens": call.prompt_tokens, "total_tokens": call.prompt_tokens + done, "completion_tokens": done}
    return quote(told)
