"""Chat, completions and embeddings."""

from __future__ import annotations

from typing import Any

import pytest

from collectors.records.content import read_content
from tests.unit.collectors.content.said import call, fixture, read, result, stream, text


def delta(index: int = 0, finish: str | None = None, **said: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": said, "finish_reason": finish}]}


# -- what a real vLLM said --


@pytest.mark.parametrize("name", ["chat_stream_usage", "chat_stream", "chat_stream_usage_cont"])
def test_a_streamed_chat(name: str) -> None:
    said = read_content("chat", fixture(name))
    assert said.input_text == "What is the capital of France?"
    assert said.input_messages == [text("user", "What is the capital of France?")]
    (answer,) = said.output_messages
    assert answer["role"] == "assistant"
    assert "Paris" in said.output_text


def test_a_chat_in_one_piece() -> None:
    said = read_content("chat", fixture("chat"))
    assert said.output_text == "The capital of France is Paris."
    assert said.output_messages == [{**text("assistant", "The capital of France is Paris."), "finish_reason": "stop"}]


def test_several_choices_stay_apart() -> None:
    said = read_content("chat", fixture("chat_stream_n2"))
    assert len(said.output_messages) == 2
    assert all(message["parts"] for message in said.output_messages)


def test_tool_calls_of_a_real_answer() -> None:
    said = read_content("chat", fixture("flags/tools_required", "tools_required"))
    assert [tool["name"] for tool in said.tools] == ["get_weather"]
    assert said.output_messages[0]["finish_reason"] == "tool_call"
    assert said.output_messages[0]["parts"][-1]["name"] == "get_weather"
    assert said.output_text.startswith("get_weather(")


def test_completions() -> None:
    said = read_content("completions", fixture("completions_stream"))
    assert said.input_text == "The capital of France is"
    assert said.output_text.startswith(" Paris.")
    assert read_content("completions", fixture("completions")).output_text.startswith(" Paris")


def test_an_engines_error_is_no_answer() -> None:
    said = read_content("chat", fixture("err_toolong"))
    assert said.output_messages == []
    assert said.output_text == ""


# -- shapes --


def test_reasoning_content_and_tool_calls_are_put_together_from_their_pieces() -> None:
    answer = stream(
        delta(role="assistant", content=""),
        delta(reasoning_content="Let me "),
        delta(reasoning="think."),
        delta(content="Well"),
        delta(content="."),
        delta(tool_calls=[{"index": 0, "id": "call-1", "function": {"name": "look", "arguments": '{"a"'}}]),
        delta(tool_calls=[{"index": 1, "id": "call-2", "function": {"name": "listen", "arguments": ""}}]),
        delta(tool_calls=[{"index": 0, "function": {"arguments": ": 1}"}}]),
        delta(finish="tool_calls"),
        {"choices": [], "usage": {"prompt_tokens": 3}},
    )
    said = read("chat", {"messages": []}, answer)
    assert said.output_messages == [
        {
            "role": "assistant",
            "parts": [
                {"type": "reasoning", "content": "Let me think."},
                {"type": "text", "content": "Well."},
                call("call-1", "look", '{"a": 1}'),
                call("call-2", "listen", ""),
            ],
            "finish_reason": "tool_call",
        }
    ]
    assert said.output_text == 'Well.\nlook({"a": 1})\nlisten()'


def test_a_conversation_with_all_roles() -> None:
    looking = {"id": "call-1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    request = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "name": "ann", "content": "Look."},
            {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [looking]},
            {"role": "tool", "tool_call_id": "call-1", "content": [{"type": "text", "text": "seen"}]},
        ]
    }
    said = read("chat", request, b"")
    assert said.input_messages == [
        text("system", "Be brief."),
        {**text("user", "Look."), "name": "ann"},
        {
            "role": "assistant",
            "parts": [
                {"type": "reasoning", "content": "Hm."},
                call("call-1", "look", "{}"),
            ],
        },
        result("call-1", "seen"),
    ]
    assert said.input_text == "Look."


def test_pictures_and_sound_become_notes() -> None:
    parts = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 5000}},
        {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "new_thing", "of": "somebody"},
    ]
    said = read("chat", {"messages": [{"role": "user", "content": parts}]}, b"")
    assert [part["content"] for part in said.input_messages[0]["parts"]] == [
        "What is this?",
        "[image_url: image/png;base64, 5022 characters]",
        "[image_url: https://example.com/cat.png]",
        "[input_audio: wav, 4 characters]",
        "[new_thing]",
    ]


@pytest.mark.parametrize(
    ("asked", "texts"),
    [
        ("one", [["one"]]),
        (["one", "two"], [["one"], ["two"]]),
        ([1, 2, 3], [["[3 tokens]"]]),
        ([[1, 2], [3]], [["[2 tokens]"], ["[1 tokens]"]]),
        (None, []),
        ({"odd": True}, [['{"odd":true}']]),
    ],
)
@pytest.mark.parametrize(("operation", "field"), [("completions", "prompt"), ("embeddings", "input")])
def test_prompts_and_inputs(operation: str, field: str, asked: object, texts: list[list[str]]) -> None:
    said = read(operation, {field: asked}, b"")
    assert [[part["content"] for part in message["parts"]] for message in said.input_messages] == texts


def test_a_refusal_is_text() -> None:
    said = read("chat", {}, {"choices": [{"message": {"role": "assistant", "content": None, "refusal": "No."}}]})
    assert said.output_text == "No."


def test_a_broken_stream_gives_what_came() -> None:
    whole = stream(delta(content="one "), delta(content="two"))
    cut = whole[: whole.index(b"two") + 1]
    (answer,) = read("chat", {}, cut).output_messages
    assert answer["parts"] == [{"type": "text", "content": "one t"}]
    assert answer["finish_reason"] == "error"
