"""What one request may ask for."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.errors import InvalidRequest
from proxy.exchange import Record
from proxy.snapshot import Bounds
from proxy.wire import chat, completions, embeddings, messages, responses
from proxy.wire.bounds import check_bounds
from proxy.wire.operation import JSON, EngineOperation

BOUNDS = Bounds(n=4, max_tokens=100, logprobs=5, stop=3, tools=2, schema_bytes=200)
TOOL = {"type": "function", "function": {"name": "f"}}


def ask(operation: EngineOperation[Any], bounds: Bounds = BOUNDS, **fields: Any) -> None:
    record = Record(b"i" * 16, b"t" * 16, 1, 0)
    check_bounds(operation.read(json.dumps({"model": "m", **fields}).encode(), record, JSON), bounds)


ALLOWED: list[tuple[EngineOperation[Any], dict[str, Any]]] = [
    (chat.OPERATION, {}),
    (chat.OPERATION, {"n": 4, "max_tokens": 100, "max_completion_tokens": 100, "logprobs": True, "top_logprobs": 5}),
    (chat.OPERATION, {"stop": ["a", "b", "c"], "tools": [TOOL, TOOL], "response_format": {"type": "json_object"}}),
    (chat.OPERATION, {"stop": "one", "n": None, "tools": None, "stop_sequences": ["x"] * 9}),
    (chat.OPERATION, {"messages": [{"content": "x" * 1000}]}),
    (completions.OPERATION, {"n": 4, "best_of": 4, "logprobs": 5, "prompt_logprobs": 5, "prompt": "x" * 1000}),
    (responses.OPERATION, {"max_output_tokens": 100, "top_logprobs": 5, "tools": [TOOL]}),
    (messages.OPERATION, {"max_tokens": 100, "stop_sequences": ["a"], "tools": [TOOL]}),
    (embeddings.OPERATION, {"input": "x" * 1000, "n": 99}),
]
REFUSED: list[tuple[EngineOperation[Any], dict[str, Any], str, str]] = [
    (chat.OPERATION, {"n": 5}, "n", "integer_above_max_value"),
    (chat.OPERATION, {"n": 10**9}, "n", "integer_above_max_value"),
    (chat.OPERATION, {"n": "1000000000"}, "n", "integer_above_max_value"),
    (chat.OPERATION, {"n": 1e9}, "n", "integer_above_max_value"),
    (chat.OPERATION, {"max_tokens": 2**63}, "max_tokens", "integer_above_max_value"),
    (chat.OPERATION, {"max_tokens": 101}, "max_tokens", "integer_above_max_value"),
    (chat.OPERATION, {"max_completion_tokens": 101}, "max_completion_tokens", "integer_above_max_value"),
    (chat.OPERATION, {"top_logprobs": 10**6}, "top_logprobs", "integer_above_max_value"),
    (chat.OPERATION, {"prompt_logprobs": 6}, "prompt_logprobs", "integer_above_max_value"),
    (chat.OPERATION, {"stop": ["a"] * 4}, "stop", "array_above_max_length"),
    (chat.OPERATION, {"tools": [TOOL] * 3}, "tools", "array_above_max_length"),
    (chat.OPERATION, {"response_format": {"schema": "x" * 200}}, "response_format", "string_above_max_length"),
    (chat.OPERATION, {"structured_outputs": {"regex": "(a*)*" * 50}}, "structured_outputs", "string_above_max_length"),
    (
        chat.OPERATION,
        {"tools": ["x" * 120], "response_format": {"s": "x" * 90}},
        "response_format",
        "string_above_max_length",
    ),
    (completions.OPERATION, {"best_of": 5}, "best_of", "integer_above_max_value"),
    (completions.OPERATION, {"logprobs": 6}, "logprobs", "integer_above_max_value"),
    (responses.OPERATION, {"max_output_tokens": 101}, "max_output_tokens", "integer_above_max_value"),
    (responses.OPERATION, {"text": {"format": {"schema": "x" * 200}}}, "text", "string_above_max_length"),
    (messages.OPERATION, {"max_tokens": 101}, "max_tokens", "integer_above_max_value"),
    (messages.OPERATION, {"stop_sequences": ["a"] * 4}, "stop_sequences", "array_above_max_length"),
    (messages.OPERATION, {"output_config": {"format": "x" * 200}}, "output_config", "string_above_max_length"),
]


@pytest.mark.parametrize(("operation", "fields"), ALLOWED)
def test_what_is_allowed(operation: EngineOperation[Any], fields: dict[str, Any]) -> None:
    ask(operation, **fields)


@pytest.mark.parametrize(("operation", "fields", "param", "code"), REFUSED)
def test_what_is_refused(operation: EngineOperation[Any], fields: dict[str, Any], param: str, code: str) -> None:  # failure 37
    with pytest.raises(InvalidRequest) as raised:
        ask(operation, **fields)
    assert (raised.value.param, raised.value.error_code) == (param, code)


def test_without_a_bound_the_engine_decides() -> None:
    ask(chat.OPERATION, Bounds(), max_tokens=2**62)


def test_a_bound_of_zero_is_a_bound() -> None:
    with pytest.raises(InvalidRequest):
        ask(chat.OPERATION, Bounds(logprobs=0), top_logprobs=1)
    with pytest.raises(InvalidRequest):
        ask(chat.OPERATION, Bounds(tools=0), tools=[TOOL])
