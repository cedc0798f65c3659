"""Bodies, what is read out of them, and bodies that could be anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from collectors.records.content import Conversation, read_content
from proxy.journal import Content

FIXTURES = Path(__file__).parents[3] / "fixtures"


def read(operation: str, request: object, answer: object = b"") -> Conversation:
    """Bytes as they are, anything else as JSON."""
    return read_content(operation, Content(_body(request), _body(answer)))


def _body(value: object) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def fixture(name: str, request: str = "") -> Content:
    """What a real vLLM was asked and said; a request of another name where there is none of its own."""
    folder = FIXTURES / "vllm-0.32.0"
    return Content((folder / f"{request or name}.request.json").read_bytes(), (folder / f"{name}.body").read_bytes())


def text(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "parts": [{"type": "text", "content": content}]}


def call(identity: str, name: str, arguments: str) -> dict[str, str]:
    return {"type": "tool_call", "id": identity, "name": name, "arguments": arguments}


def result(identity: str, response: str) -> dict[str, Any]:
    return {"role": "tool", "parts": [{"type": "tool_call_response", "id": identity, "response": response}]}


def stream(*chunks: object) -> bytes:
    """Chunks as chat has them."""
    events = [json.dumps(chunk) for chunk in chunks]
    return "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]).encode()


def typed(*events: dict[str, Any]) -> bytes:
    """Events with a name, that of their type."""
    return "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events).encode()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)

FIELDS = (
    *("messages", "role", "content", "prompt", "input", "instructions", "system", "tools", "function", "name", "type", "text"),
    *("arguments", "tool_calls", "tool_call_id", "tool_use_id", "call_id", "output", "output_index", "item", "delta", "index"),
    *("choices", "message", "response", "status", "incomplete_details", "content_block", "thinking", "partial_json", "source"),
    *("query", "documents", "queries", "text_1", "text_2", "results", "data", "document", "score", "relevance_score", "url"),
    *("input_tokens", "tokens", "stop_reason", "refusal", "reasoning", "summary", "image_url", "input_schema", "parameters"),
)
TYPES = (
    *("function_call", "function_call_output", "reasoning", "message", "input_image", "image", "image_url", "tool_use"),
    *("tool_result", "thinking", "text", "content_block_start", "content_block_delta", "message_start", "message_delta"),
    *("response.output_item.added", "response.output_item.done", "response.output_text.delta", "response.completed"),
    *("response.function_call_arguments.delta", "response.reasoning_text.delta", "user", "assistant", "completed"),
)
known = st.recursive(
    json_values | st.sampled_from(TYPES) | st.integers(0, 2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=5),
    max_leaves=30,
)
objects = st.dictionaries(st.sampled_from(FIELDS), known, max_size=6)
events = st.builds(lambda kind, fields: {**fields, "type": kind}, st.sampled_from(TYPES), objects)
bodies = (
    st.binary(max_size=200)
    | st.builds(lambda value: json.dumps(value).encode(), known)
    | st.builds(lambda fields: json.dumps(fields).encode(), objects)
    | st.builds(lambda many: typed(*many), st.lists(events, max_size=6))
    | st.builds(lambda many: stream(*many), st.lists(objects, max_size=4))
    | st.builds(lambda parts: b"\r\n--X".join([b"--X", *parts]), st.lists(st.binary(max_size=60), max_size=4))
)
