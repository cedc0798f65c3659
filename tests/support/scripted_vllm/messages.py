"""Anthropic's API as vLLM 0.32 speaks it: /v1/messages and /v1/messages/count_tokens. Sans-io, no clock.

vLLM translates a request into one for chat, and the answer back; so do we. Worth knowing:
  - `input_tokens` leaves out what came from the prefix cache, but `message_start` doesn't know of the cache yet;
  - the end-of-sequence token makes no event;
  - what is refused before it is understood (a missing field, a wrong key) is refused in OpenAI's shape;
  - an engine that fails makes an `error` event whose text is about vLLM's own classes, and nothing after it.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from tests.support.scripted_vllm import generation, requests
from tests.support.scripted_vllm.events import ENGINE_DIED, Event, Prepared, typed, typed_stream
from tests.support.scripted_vllm.generation import Call, Delta
from tests.support.scripted_vllm.requests import Asked, Body, Context, Refused, quote
from tests.support.scripted_vllm.script import Script

_STOP_REASONS: Final = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_TOOL_CHOICES: Final = {"auto": "auto", "any": "required", "none": "none"}
_MISSING: Final = (
    "  Field required [type=missing, input_value={'error': {'message': '%s...am': None, 'code': 500}}, input_type=dict]"
)
_MORE: Final = "    For further information visit https://errors.pydantic.dev/2.12/v/missing"


class Request(Asked, kw_only=True):
    messages: list[dict[str, Any]] | None = None
    max_tokens: int | None = None
    system: str | list[dict[str, Any]] | None = None
    temperature: float | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None


_decoder = msgspec.json.Decoder(Request)


def read(raw: bytes, content_type: bytes | None) -> Body:
    """As a request for chat. Raises Refused."""
    return _read(raw, "model", "messages", "max_tokens")


def read_count(raw: bytes, content_type: bytes | None) -> Body:
    """As `read`, where nothing is to be generated."""
    return _read(raw, "model", "messages")


def _read(raw: bytes, *required: str) -> Body:
    request = requests.read_as(_decoder, raw)
    for name in required:
        if getattr(request, name) is None:
            raise requests.invalid("missing", f"body.{name}", "Field required", size=len(msgspec.json.decode(raw)))
    if "max_tokens" in required and (request.max_tokens or 0) <= 0:
        raise requests.invalid("value_error", "body.max_tokens", "Value error, max_tokens must be positive")
    messages = request.messages or []
    if request.system is not None:
        messages = [{"role": "system", "content": request.system}, *messages]
    tools = [{"type": "function", "function": {"name": tool["name"]}} for tool in request.tools or []]
    choice = request.tool_choice or {}
    named = {"type": "function", "function": {"name": choice.get("name")}}
    return Body(
        model=request.model,
        stream=request.stream,
        script=request.script,
        messages=msgspec.Raw(quote(messages)),
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        tools=msgspec.Raw(quote(tools or None)),
        tool_choice=msgspec.Raw(quote(_TOOL_CHOICES.get(choice.get("type", "auto"), named))),
    )


def answer(body: Body, context: Context) -> Prepared:
    """Raises Refused."""
    call = generation.understand(body, context, chat=True)
    if body.stream:
        return Prepared(events=stream(call), call=call, fail=functools.partial(failure, call.script))
    return Prepared(whole(call), call=call)


def error_json(refused: Refused) -> bytes:
    return quote({"type": "error", "error": {"type": refused.kind, "message": refused.message}})


def count(body: Body, context: Context) -> Prepared:
    """Raises Refused."""
    requests.check_model(body, context.models)
    tokens = context.script.prompt_tokens or requests.count_messages(bytes(body.messages))
    return Prepared(quote({"input_tokens": tokens, "context_management": {"original_input_tokens": tokens}}))


# --- answers ---------------------------------------------------------------------------------------------------------


def _usage(call: Call) -> dict[str, int] | None:
    match call.script.usage:
        case "none" | "null":
            return None
        case "zero":
            return {"input_tokens": 0, "output_tokens": 0}
    cached = call.script.cached_tokens
    usage = {"input_tokens": call.prompt_tokens - (cached or 0), "output_tokens": call.completion_tokens}
    if cached is not None:
        usage |= {"cache_creation_input_tokens": 0, "cache_read_input_tokens": cached}
    return usage


def _stop_reason(call: Call) -> str | None:
    if call.script.no_finish:
        return None
    (choice,) = call.choices
    if call.script.tools and choice.finish == "stop":
        return "tool_use"
    return _STOP_REASONS.get(choice.finish)


def _signature(call: Call) -> str:
    return f"{zlib.crc32(call.answer_id):032x}"


def whole(call: Call) -> bytes:
    """The body of an answer that isn't streamed."""
    if call.script.body_bytes:
        raise Refused(400, "This is no script: body_bytes is for chat and completions", "script", "ScriptError")
    blocks: list[dict[str, object]] = []
    (choice,) = call.choices
    if thought := generation.text_of(choice, "reasoning"):
        blocks.append({"type": "thinking", "thinking": thought, "signature": _signature(call)})
    if text := generation.text_of(choice):
        blocks.append({"type": "text", "text": text})
    if call.script.tools:
        for tool in generation.tool_calls(call.body):
            block = {"type": "tool_use", "id": tool.id, "name": tool.name, "input": json.loads("".join(tool.arguments))}
            blocks.append(block)
    answer = {
        "id": call.answer_id.decode(),
        "type": "message",
        "role": "assistant",
        "content": blocks or [{"type": "text", "text": ""}],
        "model": call.model,
        "stop_reason": _stop_reason(call),
        "usage": _usage(call),
    }
    return quote({name: value for name, value in answer.items() if value is not None})


# --- streams ---------------------------------------------------------------------------------------------------------


def stream(call: Call) -> Iterator[Event]:
    script = call.script
    told = {"input_tokens": 0 if script.usage in ("none", "null", "zero") else call.prompt_tokens, "output_tokens": 0}
    message: dict[str, object] = {
        "id": call.answer_id.decode(),
        "type": "message",
        "role": "assistant",
        "content": [],
        "model": call.model,
        "stop_reason": None,
        "stop_sequence": None,
        "usage": told,
    }
    yield typed("message_start", {"type": "message_start", "message": message})._replace(wait=script.first)
    yield from typed_stream(call, _Blocks(call))


class _Blocks:
    """The content blocks of a streamed message, one after the other."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.open = ""
        """The kind of the open block."""
        self.index = -1

    def delta(self, delta: Delta) -> list[Event]:
        match delta.kind:
            case "content":
                return [*self._block("text", {"type": "text", "text": ""}), self._delta("text_delta", "text", delta.text)]
            case "reasoning":
                start = self._block("thinking", {"type": "thinking", "thinking": ""})
                return [*start, self._delta("thinking_delta", "thinking", delta.text)]
            case "call":
                tool = generation.tool_calls(self.call.body)[int(delta.text)]
                return self._block("tool_use", {"type": "tool_use", "id": tool.id, "name": tool.name, "input": {}})
            case "arguments":
                return [self._delta("input_json_delta", "partial_json", delta.text)]
            case _:
                return []

    def close(self) -> list[Event]:
        events, usage = self._stop(), _usage(self.call)
        fields: dict[str, object] = {
            "type": "message_delta",
            "delta": {"stop_reason": _stop_reason(self.call), "stop_sequence": None},
        }
        if usage is not None or self.call.script.usage == "null":
            fields["usage"] = usage
        events += [typed("message_delta", fields)] * (2 if self.call.script.usage == "twice" else 1)
        if not self.call.script.no_done:
            events.append(typed("message_stop", {"type": "message_stop"}))
        return events

    def _block(self, kind: str, block: dict[str, object]) -> list[Event]:
        """Begin a block, unless one of this kind is open; each tool call is one of its own."""
        if kind == self.open != "tool_use":
            return []
        events = self._stop()
        self.open = kind
        self.index += 1
        kind = "content_block_start"
        return [*events, typed(kind, {"type": kind, "content_block": block, "index": self.index})]

    def _delta(self, kind: str, field: str, text: str) -> Event:
        delta = {"type": kind, field: text}
        return typed("content_block_delta", {"type": "content_block_delta", "delta": delta, "index": self.index})

    def _stop(self) -> list[Event]:
        if not self.open:
            return []
        signed = [self._delta("signature_delta", "signature", _signature(self.call))] if self.open == "thinking" else []
        self.open = ""
        return [*signed, typed("content_block_stop", {"type": "content_block_stop", "index": self.index})]


def failure(script: Script, sent: int) -> list[Event]:
    """vLLM reads its own stream of chat events back, and stumbles over the error in it."""
    missing = _MISSING % (script.error or ENGINE_DIED)[:2]
    lines = ["2 validation errors for ChatCompletionStreamResponse", "model", missing, _MORE, "choices", missing, _MORE]
    error = {"type": "internal_error", "message": "\n".join(lines)}
    return [typed("error", {"type": "error", "error": error})]
