"""OpenAI's /v1/responses as vLLM 0.32 speaks it. Sans-io, no clock.

Worth knowing:
  - the stream begins before the prefill, with two events that bring nothing;
  - usage comes once, in the last event, and counts cached tokens without being asked;
  - the last event is `response.completed`, also of an answer that is `incomplete` (OpenAI's own says `response.incomplete`);
  - there is no `[DONE]`, and the end-of-sequence token makes no event;
  - an engine that fails makes no event: the connection is closed (OpenAI's own sends `error` or `response.failed`).
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from tests.support.scripted_vllm import dialect, generation, requests
from tests.support.scripted_vllm.events import ENGINE_DIED, Event, Prepared, typed, typed_stream
from tests.support.scripted_vllm.generation import Call, Delta
from tests.support.scripted_vllm.requests import Asked, Body, Context, Refused, quote

_BACKGROUND: Final = (
    "This vLLM engine does not support `store=True` and therefore does not support the background mode. To enable these "
    "features, set the environment variable `VLLM_ENABLE_RESPONSES_API_STORE=1` when launching the vLLM server."
)


class Request(Asked, kw_only=True):
    input: str | list[Any] | None = None
    instructions: str | None = None
    metadata: dict[str, str] | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    reasoning: dict[str, Any] | None = None
    request_id: str | None = None
    service_tier: str = "auto"
    background: bool | None = None
    temperature: float | None = None
    text: dict[str, Any] | None = None
    tool_choice: Any = None
    tools: list[dict[str, Any]] = msgspec.field(default_factory=list)
    top_p: float | None = None
    truncation: str = "disabled"
    user: str | None = None


class Responding(msgspec.Struct):
    """A request, and what is generated for it."""

    request: Request
    call: Call
    answer_id: str
    max_output_tokens: int


_decoder = msgspec.json.Decoder(Request)


def read(raw: bytes, content_type: bytes | None) -> Request:
    """Raises Refused."""
    request = requests.read_as(_decoder, raw)
    if request.input is None:
        fields = len(msgspec.json.decode(raw)) + (not request.tools and request.tool_choice is None)  # vLLM adds a choice: none
        raise requests.invalid("missing", "body.input", "Field required", size=fields)
    return request


def answer(request: Request, context: Context) -> Prepared:
    """Raises Refused."""
    responding = _understand(request, context)
    if request.stream:
        return Prepared(events=stream(responding), call=responding.call, fail=functools.partial(failure, responding))
    return Prepared(whole(responding), call=responding.call)


def _understand(request: Request, context: Context) -> Responding:
    requests.check_model(request, context.models)
    if request.background:
        raise Refused(400, _BACKGROUND, "background", "invalid_request_error")
    if request.previous_response_id is not None:
        message = f"Response with id '{request.previous_response_id}' not found."
        raise Refused(404, message, "response_id", "invalid_request_error")
    call = generation.understand(_as_chat(request), context, chat=True)
    room = context.max_model_len - call.prompt_tokens
    answer_id = request.request_id or context.answer_id.decode()
    return Responding(request, call, answer_id, min(room, request.max_output_tokens or room))


def _as_chat(request: Request) -> Body:
    items = [{"role": "user", "content": request.input}] if isinstance(request.input, str) else request.input or []
    messages = [item for item in items if "content" in item]
    if request.instructions is not None:
        messages = [{"role": "system", "content": request.instructions}, *messages]
    tools = [{"type": "function", "function": {"name": tool.get("name")}} for tool in request.tools]
    return Body(
        model=request.model,
        messages=msgspec.Raw(quote(messages)),
        max_tokens=request.max_output_tokens,
        temperature=request.temperature,
        tools=msgspec.Raw(quote(tools or None)),
        tool_choice=msgspec.Raw(quote(request.tool_choice)),
    )


# --- the response object ---------------------------------------------------------------------------------------------


def _status(responding: Responding) -> str:
    (choice,) = responding.call.choices
    return "incomplete" if choice.finish == "length" else "completed"


def _usage(call: Call) -> dict[str, object] | None:
    prompt, completion = call.prompt_tokens, call.completion_tokens
    match call.script.usage:
        case "none" | "null":
            return None
        case "zero":
            prompt = completion = 0
    (choice,) = call.choices
    thought = sum(token.kind == "reasoning" for token in choice.tokens)
    per_turn: list[int] = []  # filled by models that call tools by themselves
    cached = {"cached_tokens": call.script.cached_tokens or 0, "cache_write_tokens": 0}
    return {
        "input_tokens": prompt,
        "input_tokens_details": {**cached, "input_tokens_per_turn": per_turn, "cached_tokens_per_turn": per_turn},
        "output_tokens": completion,
        "output_tokens_details": {
            "reasoning_tokens": thought,
            "tool_output_tokens": 0,
            "output_tokens_per_turn": per_turn,
            "tool_output_tokens_per_turn": per_turn,
        },
        "total_tokens": prompt + completion,
    }


def _response(
    responding: Responding,
    status: str,
    output: list[dict[str, object]],
    *,
    usage: dict[str, object] | None = None,
    error: dict[str, object] | None = None,
    metrics: bool = False,
) -> dict[str, object]:
    request, call = responding.request, responding.call
    choice = "none" if not request.tools else "auto" if request.tool_choice is None else request.tool_choice
    times = {**dialect.engine_times(call), "speculative_decoding": None} if metrics and call.script.metrics else None
    return {
        "id": responding.answer_id,
        "created_at": call.created,
        **({} if error is None else {"error": error}),
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": request.instructions,
        "metadata": request.metadata,
        "model": call.model,
        "object": "response",
        "output": output,
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "tool_choice": choice,
        "tools": request.tools,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "background": False,
        "max_output_tokens": responding.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "previous_response_id": None,
        "prompt": None,
        "reasoning": request.reasoning,
        "service_tier": request.service_tier,
        "status": status,
        "text": request.text,
        "top_logprobs": None,
        "truncation": request.truncation,
        "usage": usage,
        "user": request.user,
        **({} if times is None else {"metrics": times}),
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "input_messages": None,
        "output_messages": None,
    }


def _item_id(responding: Responding, prefix: str, place: int) -> str:
    return f"{prefix}_{zlib.crc32(f'{responding.answer_id}{place}'.encode()):016x}"


def _text_part(text: str, logprobs: list[object] | None = None) -> dict[str, object]:
    return {"annotations": [], "text": text, "type": "output_text", "logprobs": logprobs}


def _message_item(item_id: str, content: list[dict[str, object]], status: str) -> dict[str, object]:
    return {"id": item_id, "content": content, "role": "assistant", "status": status, "type": "message", "phase": None}


def _reasoning_item(item_id: str, text: str | None, status: str | None) -> dict[str, object]:
    content = None if text is None else [{"text": text, "type": "reasoning_text"}]
    item: dict[str, object] = {"id": item_id, "summary": [], "type": "reasoning", "content": content}
    return {**item, "encrypted_content": None, "status": status}


def _call_item(item_id: str, tool: generation.ToolCall, arguments: str, status: str) -> dict[str, object]:
    item = {"arguments": arguments, "call_id": tool.id, "name": tool.name, "type": "function_call", "id": item_id}
    return {**item, "namespace": None, "status": status}


def whole(responding: Responding) -> bytes:
    """The body of an answer that isn't streamed."""
    call = responding.call
    if call.script.body_bytes:
        raise Refused(400, "This is no script: body_bytes is for chat and completions", "script", "ScriptError")
    (choice,) = call.choices
    output: list[dict[str, object]] = []
    if thought := generation.text_of(choice, "reasoning"):
        output.append(_reasoning_item(_item_id(responding, "rs", 0), thought, None))
    text = generation.text_of(choice)
    if text or not (output or call.script.tools):
        output.append(_message_item(_item_id(responding, "msg", 1), [_text_part(text)] if text else [], "completed"))
    if call.script.tools:
        for place, tool in enumerate(generation.tool_calls(call.body), 2):
            output.append(_call_item(_item_id(responding, "fc", place), tool, "".join(tool.arguments), "completed"))
    return quote(_response(responding, _status(responding), output, usage=_usage(call), metrics=True))


# --- streams ---------------------------------------------------------------------------------------------------------


def stream(responding: Responding) -> Iterator[Event]:
    items = _Items(responding)
    begun = _response(responding, "in_progress", [])
    yield items.event("response.created", response=begun)
    yield items.event("response.in_progress", response=begun)
    wait = responding.call.script.first
    for event in typed_stream(responding.call, items):
        yield event._replace(wait=event.wait + wait)
        wait = 0.0


class _Items:
    """The output items of a streamed response, one after the other."""

    def __init__(self, responding: Responding) -> None:
        self.responding = responding
        self.sequence = 0
        self.output: list[dict[str, object]] = []
        self.open = ""
        """The kind of the item that is open."""
        self.item_id = ""
        self.text = ""
        self.tool: generation.ToolCall

    def event(self, kind: str, **fields: object) -> Event:
        """vLLM's fields stand in the order of their names, but that the type comes last."""
        self.sequence += 1
        return typed(kind, {**dict(sorted((fields | {"sequence_number": self.sequence - 1}).items())), "type": kind})

    def delta(self, delta: Delta) -> list[Event]:
        match delta.kind:
            case "content":
                return [*self._message(), self._text("output_text", delta.text, logprobs=[])]
            case "reasoning":
                return [*self._reasoning(), self._text("reasoning_text", delta.text)]
            case "call":
                return self._call(generation.tool_calls(self.responding.call.body)[int(delta.text)])
            case "arguments":
                self.text += delta.text
                return [self._about("response.function_call_arguments.delta", delta=delta.text)]
            case _:
                return []

    def close(self) -> list[Event]:
        events, call, status = self._done(), self.responding.call, _status(self.responding)
        response = _response(self.responding, status, self.output, usage=_usage(call), metrics=True)
        if not call.script.no_done:
            kind = "response.incomplete" if status == "incomplete" and call.script.incomplete_event else "response.completed"
            events.append(self.event(kind, response=response))
        return events

    def _begin(self, kind: str, prefix: str) -> list[Event]:
        events = self._done()
        self.open, self.text = kind, ""
        self.item_id = _item_id(self.responding, prefix, len(self.output))
        return events

    def _added(self, item: dict[str, object]) -> Event:
        return self.event("response.output_item.added", item=item, output_index=len(self.output))

    def _about(self, kind: str, **fields: object) -> Event:
        return self.event(kind, item_id=self.item_id, output_index=len(self.output), **fields)

    def _text(self, kind: str, text: str, **fields: object) -> Event:
        self.text += text
        return self._about(f"response.{kind}.delta", content_index=0, delta=text, **fields)

    def _message(self) -> list[Event]:
        if self.open == "message":
            return []
        events = self._begin("message", "msg")
        added = self._added(_message_item(self.item_id, [], "in_progress"))
        return [*events, added, self._about("response.content_part.added", content_index=0, part=_text_part("", []))]

    def _reasoning(self) -> list[Event]:
        if self.open == "reasoning":
            return []
        events = self._begin("reasoning", "rs")
        added = self._added(_reasoning_item(self.item_id, None, "in_progress"))
        part = {"text": "", "type": "reasoning_text"}
        return [*events, added, self._about("response.content_part.added", content_index=0, part=part)]

    def _call(self, tool: generation.ToolCall) -> list[Event]:
        events = self._begin("call", "fc")
        self.tool = tool
        return [*events, self._added(_call_item(self.item_id, tool, "", "in_progress"))]

    def _done(self) -> list[Event]:
        """The end of the open item."""
        match self.open:
            case "message":
                part = _text_part(self.text)
                item = _message_item(self.item_id, [part], "completed")
                events = [self._about("response.output_text.done", content_index=0, logprobs=[], text=self.text)]
                events.append(self._about("response.content_part.done", content_index=0, part=part))
            case "reasoning":
                item = _reasoning_item(self.item_id, self.text, "completed")
                part = {"text": self.text, "type": "reasoning_text"}
                events = [self._about("response.reasoning_text.done", content_index=0, text=self.text)]
                events.append(self._about("response.content_part.done", content_index=0, part=part))
            case "call":
                item = _call_item(self.item_id, self.tool, self.text, "completed")
                kind = "response.function_call_arguments.done"
                events = [self._about(kind, arguments=self.text, name=self.tool.name)]
            case _:
                return []
        events.append(self.event("response.output_item.done", item=item, output_index=len(self.output)))
        self.output.append(item)
        self.open = ""
        return events


def failure(responding: Responding, sent: int) -> list[Event | str]:
    script = responding.call.script
    message = script.error or ENGINE_DIED
    match script.error_kind:
        case "error":
            fields: dict[str, object] = {"code": "server_error", "message": message, "param": None}
            return [typed("error", {**fields, "sequence_number": sent, "type": "error"})]
        case "response.failed":
            response = _response(responding, "failed", [], error={"code": "server_error", "message": message})
            return [typed("response.failed", {"response": response, "sequence_number": sent, "type": "response.failed"})]
        case _:
            return ["close"]
