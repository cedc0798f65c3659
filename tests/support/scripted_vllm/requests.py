"""Requests as vLLM reads and refuses them. Sans-io.

The texts of the refusals are those of the captured errors; `tests/unit/support/test_scripted_vllm.py` compares.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from tests.support.scripted_vllm import script as scripts
from tests.support.scripted_vllm.script import Script

_TEMPLATE_TOKENS: Final = 30
_WORD: Final = re.compile(r"\w+|[^\w\s]")
_ERROR_TYPES: Final = {
    400: "BadRequestError",
    404: "NotFoundError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "Service Unavailable",
}
_ABSENT: Final = msgspec.Raw(b"")

quote = msgspec.json.Encoder().encode


class Context(NamedTuple):
    """What an answer depends on besides the request's body."""

    script: Script
    answer_id: bytes
    created: int
    models: tuple[str, ...]
    max_model_len: int


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Asked(msgspec.Struct, kw_only=True):
    """What the requests of all APIs share. A subclass has the fields that change its answer; the rest is accepted and ignored,
    as vLLM does."""

    model: str | None = None
    stream: bool | None = None
    script: msgspec.Raw = _ABSENT


class Body(Asked, kw_only=True):
    """A request for chat, completions or embeddings."""

    messages: msgspec.Raw = _ABSENT
    prompt: str | list[Any] | None = None
    input: str | list[Any] | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    logprobs: bool | int | None = None
    top_logprobs: int | None = None
    echo: bool | None = None
    tools: msgspec.Raw = _ABSENT
    tool_choice: msgspec.Raw = _ABSENT
    dimensions: int | None = None
    encoding_format: str | None = None


AskedT = TypeVar("AskedT", bound=Asked)


class Refused(Exception):
    """The request's own fault, or the script's: an error answer of vLLM's."""

    def __init__(self, status: int, message: str, param: str | None = None, kind: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.kind = kind or _ERROR_TYPES.get(status, "BadRequestError")

    def body(self) -> bytes:
        return error_json(self.status, self.message, self.kind, self.param)


def error_json(status: int, message: str, kind: str | None = None, param: str | None = None) -> bytes:
    kind = kind or _ERROR_TYPES.get(status, "InternalServerError" if status >= 500 else "BadRequestError")
    return quote({"error": {"message": message, "type": kind, "param": param, "code": status}})


_body_decoder = msgspec.json.Decoder(Body)


def read(raw: bytes, content_type: bytes | None) -> Body:
    """Raises Refused in vLLM's words, as far as they are captured."""
    return read_as(_body_decoder, raw)


def read_as(decoder: msgspec.json.Decoder[AskedT], raw: bytes) -> AskedT:
    """Raises Refused."""
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        where = f"body.{path.rstrip('`')}" if path else "body"
        raise invalid("value_error", where, message) from error
    except msgspec.DecodeError as error:
        try:
            json.loads(raw)
            position, message = 0, str(error)
        except json.JSONDecodeError as better:
            position, message = better.pos, better.msg
        except UnicodeDecodeError as better:
            position, message = better.start, "invalid start byte"
        raise invalid("json_invalid", f"body.{position}", "JSON decode error", message) from error


def invalid(kind: str, where: str, message: str, reason: str | None = None, *, size: int = 1) -> Refused:
    """`size`: how many fields vLLM counts in the body."""
    more = f", 'ctx': {{'error': {reason!r}}}" if reason is not None else ""
    size = 0 if kind == "json_invalid" else size
    text = f"{{'type': {kind!r}, 'loc': {where!r}, 'msg': {message!r}, 'input': '<dict of {size} items>'{more}}}"
    return Refused(400, f"1 validation error:\n  {text}", where, "Bad Request")


def present(raw: msgspec.Raw) -> bytes:
    """The JSON of a field; null is as good as absent."""
    data = bytes(raw)
    return b"" if data == b"null" else data


def script_of(body: Asked, default: Script) -> Script:
    raw = present(body.script)
    if not raw:
        return default
    try:
        return scripts.parse(raw)
    except msgspec.ValidationError as error:
        raise Refused(400, f"This is no script: {error}", "script", "ScriptError") from error


def check(body: Body, *, chat: bool, models: tuple[str, ...], max_model_len: int) -> None:
    """What vLLM checks before it generates, in its order."""
    given = present(body.messages) if chat else body.prompt
    if not given and given != "":
        raise invalid("missing", "body.messages" if chat else "body.prompt", "Field required")
    check_model(body, models)
    limit = limit_of(body)
    if body.stream_options is not None and not body.stream:
        raise bad("stream_options", "Stream options can only be defined when `stream=True`.")
    if limit is not None and limit < 1:
        raise bad("max_tokens", f"max_tokens must be at least 1, got {limit}.", limit)
    if limit is not None and limit > max_model_len:
        raise bad(
            "max_tokens",
            f"max_tokens={limit} cannot be greater than max_model_len={max_model_len}. Please request fewer output tokens.",
            limit,
        )
    if body.temperature is not None and body.temperature < 0:
        raise bad("temperature", f"temperature must be non-negative, got {body.temperature}.", body.temperature)
    if chat and bytes(body.messages) == b"[]":
        raise Refused(400, "Cannot apply chat template to an empty conversation. Provide at least one message.")


def check_model(body: Asked, models: tuple[str, ...]) -> None:
    if body.model and body.model not in models:
        aliases = ", ".join(models)
        raise Refused(404, f"The model `{body.model}` does not exist. Valid aliases: {aliases}.", "model")


def check_pooling_model(body: Asked, models: tuple[str, ...]) -> None:
    """Embeddings, scores and ranks have a check of their own, with fewer words."""
    if body.model and body.model not in models:
        raise Refused(404, f"The model `{body.model}` does not exist.")


def check_media_type(content_type: bytes | None) -> None:
    if content_type != b"application/json" and (content_type or b"").lower().split(b";", 1)[0] != b"application/json":
        message = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
        raise Refused(400, message, None, "Bad Request")


def bad(param: str, message: str, value: object = None) -> Refused:
    shown = f", value={value}" if value is not None else ""
    return Refused(400, f"{message} (parameter={param}{shown})", param)


def limit_of(body: Body) -> int | None:
    return body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens


def prompts_of(prompt: object) -> list[object]:
    """A prompt is a text, token ids, or a list of either."""
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return list(prompt)
    return [prompt]


def count_prompt(prompt: object) -> int:
    return len(prompt) if isinstance(prompt, list) else len(_WORD.findall(str(prompt)))


@functools.lru_cache(maxsize=1024)
def count_messages(raw: bytes) -> int:
    try:
        messages = msgspec.json.decode(raw, type=list[dict[str, Any]])
    except msgspec.ValidationError as error:
        raise invalid("value_error", "body.messages", str(error)) from error
    total = _TEMPLATE_TOKENS
    for message in messages:
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"text": content or ""}]
        total += sum(len(_WORD.findall(str(part.get("text", "")))) for part in parts)
    return total
