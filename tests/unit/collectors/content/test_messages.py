"""/v1/messages and its count_tokens: blocks of both sides, plain and as events."""

from __future__ import annotations

from typing import Any

import pytest

from collectors.records.content import read_content
from proxy.journal import Content
from tests.unit.collectors.content.said import FIXTURES, call, fixture, read, result, text, typed

QUESTION = "What is the capital of France?"


# -- what real engines said --


@pytest.mark.parametrize("name", ["messages", "messages_stream"])
def test_an_answer_of_a_real_vllm(name: str) -> None:
    said = read_content("messages", fixture(name))
    assert said.input_messages == [text("user", QUESTION)]
    assert (said.input_text, said.output_text) == (QUESTION, "The capital of France is Paris.")
    assert said.output_messages == [{**text("assistant", "The capital of France is Paris."), "finish_reason": "stop"}]


def test_an_answer_of_a_real_llama_cpp() -> None:
    said = read_content("messages", Content(b"", (FIXTURES / "llamacpp" / "messages.body").read_bytes()))
    assert said.output_messages == [{**text("assistant", "The capital of France"), "finish_reason": "length"}]


def test_an_engines_error_is_no_answer() -> None:
    assert read_content("messages", fixture("err_messages")).output_messages == []
    assert read("messages", {}, {"type": "error", "error": {"type": "NotFoundError", "message": "No."}}).output_messages == []


def test_a_count() -> None:
    said = read_content("count_tokens", fixture("messages_count"))
    assert (said.input_text, said.output_text) == (QUESTION, "37 tokens")
    assert list(said.input_messages) == [], "no model was asked"
    assert read("count_tokens", {}, {"error": {}}).output_text == ""


# -- what is asked --


def test_a_conversation_with_all_kinds_of_blocks() -> None:
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "A" * 5000}}
    request: dict[str, Any] = {
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Look."}, picture]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": "AAAA"},
                    {"type": "redacted_thinking", "data": "AAAA"},
                    {"type": "text", "text": "Let me."},
                    {"type": "tool_use", "id": "toolu-1", "name": "look", "input": {"a": [1]}},
                    {"type": "tool_use", "id": "toolu-2", "name": "listen", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "toolu-1", "content": "seen"},
                    {"type": "tool_result", "tool_use_id": "toolu-2", "content": [{"type": "text", "text": "heard "}, picture]},
                    {"type": "text", "text": "And?"},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu-3", "is_error": True}]},
            {"role": "assistant", "content": "Nothing."},
            {"role": "user", "content": ""},
        ],
    }
    said = read("messages", request)
    assert said.input_messages == [
        text("system", "Be brief."),
        {
            "role": "user",
            "parts": [{"type": "text", "content": "Look."}, {"type": "text", "content": "[image: image/png, 5000 characters]"}],
        },
        {
            "role": "assistant",
            "parts": [
                {"type": "reasoning", "content": "Hm."},
                {"type": "text", "content": "[redacted_thinking: 4 characters]"},
                {"type": "text", "content": "Let me."},
                call("toolu-1", "look", '{"a":[1]}'),
                call("toolu-2", "listen", "{}"),
            ],
        },
        result("toolu-1", "seen"),
        result("toolu-2", "heard [image: image/png, 5000 characters]"),
        text("user", "And?"),
        result("toolu-3", ""),
        text("assistant", "Nothing."),
        {"role": "user", "parts": []},
    ]
    assert read("messages", {**request, "messages": request["messages"][:3]}).input_text == "And?"


def test_a_system_prompt_as_plain_text() -> None:
    assert read("messages", {"system": "Be brief."}).input_messages == [text("system", "Be brief.")]


def test_tools_have_an_input_schema() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    tools = [{"name": "look", "description": "Looks.", "input_schema": schema}, {"type": "web_search_20250305", "name": "search"}]
    assert read("messages", {"tools": tools}).tools == [
        {"type": "function", "name": "look", "description": "Looks.", "parameters": schema},
        {"type": "web_search_20250305", "name": "search"},
    ]


# -- what is answered --


def start(index: int, **block: Any) -> dict[str, Any]:
    return {"type": "content_block_start", "content_block": block, "index": index}


def delta(index: int, **fields: str) -> dict[str, Any]:
    return {"type": "content_block_delta", "delta": {"type": "some_delta", **fields}, "index": index}


def stop(reason: str | None) -> dict[str, Any]:
    return {"type": "message_delta", "delta": {"stop_reason": reason}, "usage": {"output_tokens": 8}}


STREAM = [
    {"type": "message_start", "message": {"type": "message", "role": "assistant", "content": [], "usage": {"input_tokens": 3}}},
    start(0, type="thinking", thinking=""),
    delta(0, thinking="Let me "),
    delta(0, thinking="think."),
    delta(0, signature="AAAA"),
    {"type": "content_block_stop", "index": 0},
    {"type": "ping"},
    start(1, type="text", text=""),
    delta(1, text="Well"),
    delta(1, text="."),
    start(2, type="tool_use", id="toolu-1", name="look", input={}),
    delta(2, partial_json=""),
    delta(2, partial_json='{"a"'),
    start(3, type="tool_use", id="toolu-2", name="listen", input={}),
    delta(2, partial_json=": 1}"),
]


def test_blocks_are_put_together_from_their_pieces() -> None:
    said = read("messages", {}, typed(*STREAM, stop("tool_use"), {"type": "message_stop"}))
    assert said.output_messages == [
        {
            "role": "assistant",
            "parts": [
                {"type": "reasoning", "content": "Let me think."},
                {"type": "text", "content": "Well."},
                call("toolu-1", "look", '{"a": 1}'),
                call("toolu-2", "listen", "{}"),
            ],
            "finish_reason": "tool_call",
        }
    ]
    assert said.output_text == 'Well.\nlook({"a": 1})\nlisten({})'


@pytest.mark.parametrize(
    ("reason", "finish"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("refusal", "content_filter"),
        ("pause_turn", "pause_turn"),
        (None, "error"),
    ],
)
def test_how_an_answer_ended(reason: str | None, finish: str) -> None:
    whole = {"type": "message", "role": "assistant", "content": [{"type": "text", "text": "Well."}], "stop_reason": reason}
    expected = [{**text("assistant", "Well."), "finish_reason": finish}]
    assert read("messages", {}, whole).output_messages == expected
    assert read("messages", {}, typed(STREAM[0], *STREAM[7:10], stop(reason))).output_messages == expected


def test_a_stream_that_broke_gives_what_came() -> None:
    error = {"type": "error", "error": {"type": "internal_error", "message": "died"}}
    (answer,) = read("messages", {}, typed(*STREAM[:9], error)).output_messages
    assert [part["content"] for part in answer["parts"]] == ["Let me think.", "Well"]
    assert answer["finish_reason"] == "error"


def test_a_delta_that_was_cut_before_its_index_goes_to_the_newest_block() -> None:
    """vLLM writes the index last."""
    first = [start(0, type="text", text=""), delta(0, text="Hm.")]
    whole = typed(STREAM[0], *first, start(1, type="text", text=""), delta(1, text="Well."))
    (answer,) = read("messages", {}, whole[: whole.rindex(b"ll.")]).output_messages
    assert [part["content"] for part in answer["parts"]] == ["Hm.", "We"]


def test_a_stream_that_began_with_an_error_is_no_answer() -> None:
    assert read("messages", {}, typed({"type": "error", "error": {"message": "died"}})).output_messages == []
