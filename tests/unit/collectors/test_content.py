"""Prompts and answers out of raw bodies, whole or cut off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collectors.records.content import Conversation, close_json, parse_json, read_content
from proxy.journal import Content

FIXTURES = Path(__file__).parents[2] / "fixtures" / "vllm-0.32.0"


def read(operation: str, request: object, answer: object) -> Conversation:
    def body(value: object) -> bytes:
        return value if isinstance(value, bytes) else json.dumps(value).encode()

    return read_content(operation, Content(body(request), body(answer)))


def text(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "parts": [{"type": "text", "content": content}]}


def stream(*chunks: object) -> bytes:
    events = [json.dumps(chunk) for chunk in chunks]
    return "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]).encode()


def delta(index: int = 0, finish: str | None = None, **said: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": said, "finish_reason": finish}]}


# -- what a real vLLM said --


def fixture(name: str) -> Content:
    return Content((FIXTURES / f"{name}.request.json").read_bytes(), (FIXTURES / f"{name}.body").read_bytes())


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
    content = Content(
        (FIXTURES / "tools_required.request.json").read_bytes(), (FIXTURES / "flags" / "tools_required.body").read_bytes()
    )
    said = read_content("chat", content)
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
                {"type": "tool_call", "id": "call-1", "name": "look", "arguments": '{"a": 1}'},
                {"type": "tool_call", "id": "call-2", "name": "listen", "arguments": ""},
            ],
            "finish_reason": "tool_call",
        }
    ]
    assert said.output_text == 'Well.\nlook({"a": 1})\nlisten()'


def test_a_conversation_with_all_roles() -> None:
    call = {"id": "call-1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    request = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "name": "ann", "content": "Look."},
            {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [call]},
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
                {"type": "tool_call", "id": "call-1", "name": "look", "arguments": "{}"},
            ],
        },
        {"role": "tool", "parts": [{"type": "tool_call_response", "id": "call-1", "response": "seen"}]},
    ]
    assert said.input_text == "Look."


def test_pictures_and_sound_become_notes() -> None:
    parts = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 5000}},
        {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "new_thing"},
    ]
    said = read("chat", {"messages": [{"role": "user", "content": parts}]}, b"")
    assert [part["content"] for part in said.input_messages[0]["parts"]] == [
        "What is this?",
        "[image_url: image/png;base64, 5022 characters]",
        "[image_url: https://example.com/cat.png]",
        "[input_audio: wav]",
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


# -- anything --

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)
odd_bodies = st.binary(max_size=200) | st.builds(
    lambda value: json.dumps(value).encode(),
    st.fixed_dictionaries({}, optional=dict.fromkeys(("messages", "prompt", "input", "tools", "choices", "x"), json_values)),
)


@given(st.sampled_from(["chat", "completions", "embeddings", "models"]), odd_bodies, odd_bodies)
def test_whatever_the_bodies_are_messages_have_the_form(operation: str, request: bytes, answer: bytes) -> None:
    said = read_content(operation, Content(request, answer))
    for message in (*said.input_messages, *said.output_messages):
        assert isinstance(message["role"], str)
        for part in message["parts"]:
            assert part["type"] in ("text", "reasoning", "tool_call", "tool_call_response")
            assert all(isinstance(value, str) for value in part.values())
    json.dumps([said.input_messages, said.output_messages, said.tools])


def test_a_deeply_nested_body_is_not_read() -> None:
    deep = b'{"messages":' + b"[" * 100_000
    assert read_content("chat", Content(deep, deep)) == Conversation("", "", [], [], [])


@given(st.dictionaries(st.text(), json_values), st.booleans(), st.data())
def test_json_that_was_cut_off_gives_what_precedes_the_cut(value: dict[str, Any], ascii_only: bool, data: st.DataObject) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "ignore")
    cut = data.draw(st.integers(1, len(body)))
    closed = parse_json(body[:cut])
    assert isinstance(closed, dict), close_json(body[:cut])
    assert list(closed) == list(value)[: len(closed)], "members in order, none invented"
    for name in list(closed)[:-1]:
        assert closed[name] == value[name], "all but the last are whole"


@pytest.mark.parametrize(
    ("cut", "closed"),
    [
        (b'{"a": "x', {"a": "x"}),
        (b'{"a": "x\\', {"a": "x"}),
        (b'{"a": "x\\"', {"a": 'x"'}),
        (b'{"a": "x\\u00e', {"a": "x"}),
        (b'{"a": "x\\ud83d', {"a": "x"}),
        (b'{"a": "x\\ud83d\\ude00', {"a": "x\U0001f600"}),
        (b'{"a": "x\xf0\x9f', {"a": "x"}),
        (b'{"a": [1, 2', {"a": [1]}),
        (b'{"a": [1, 2]', {"a": [1, 2]}),
        (b'{"a": tru', {}),
        (b'{"a": 1, "b', {"a": 1}),
        (b'{"a": 1, "b"', {"a": 1}),
        (b'{"a": {"b":', {"a": {}}),
        (b"", None),
        (b"hello", None),
        (b"[1]]", [1]),
    ],
)
def test_cuts(cut: bytes, closed: object) -> None:
    assert parse_json(cut) == closed
