"""/v1/responses: items of both sides, plain and as events."""

from __future__ import annotations

from typing import Any

import pytest

from collectors.records.content import read_content
from proxy.journal import Content
from tests.unit.collectors.content.said import FIXTURES, call, fixture, read, result, text, typed

QUESTION = "What is the capital of France?"
CALL = {
    "type": "function_call",
    "id": "fc_1",
    "call_id": "call-1",
    "name": "look",
    "arguments": '{"a": 1}',
    "status": "completed",
}


def added(index: int, **item: Any) -> dict[str, Any]:
    return {"item": item, "output_index": index, "type": "response.output_item.added"}


def done(index: int, **item: Any) -> dict[str, Any]:
    return {"item": item, "output_index": index, "type": "response.output_item.done"}


def delta(index: int, kind: str, piece: str) -> dict[str, Any]:
    return {"delta": piece, "output_index": index, "type": f"response.{kind}.delta"}


def end(status: str, reason: str | None = None, kind: str = "completed", **more: Any) -> dict[str, Any]:
    details = {"reason": reason} if reason else None
    return {"response": {"status": status, "incomplete_details": details, **more}, "type": f"response.{kind}"}


# -- what real engines said --


@pytest.mark.parametrize("name", ["responses", "responses_stream"])
def test_an_answer_of_a_real_vllm(name: str) -> None:
    said = read_content("responses", fixture(name))
    assert said.input_messages == [text("user", QUESTION)]
    assert (said.input_text, said.output_text) == (QUESTION, "The capital of France is Paris.")
    assert said.output_messages == [{**text("assistant", "The capital of France is Paris."), "finish_reason": "stop"}]


def test_an_answer_cut_at_its_limit() -> None:
    (answer,) = read_content("responses", fixture("flags/responses_trace", "responses")).output_messages
    assert answer["finish_reason"] == "length"


def test_an_answer_of_a_real_llama_cpp() -> None:
    said = read_content("responses", Content(b"", (FIXTURES / "llamacpp" / "responses.body").read_bytes()))
    assert said.output_messages == [{**text("assistant", "Hello there, hello"), "finish_reason": "stop"}]


def test_an_engines_error_is_no_answer() -> None:
    assert read_content("responses", fixture("err_responses")).output_messages == []


# -- what is asked --


def test_a_conversation_with_all_kinds_of_items() -> None:
    request = {
        "instructions": "Be brief.",
        "input": [
            {"role": "developer", "content": "Be polite."},
            {
                "type": "message",
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "Look."},
                    {"type": "input_image", "detail": "auto", "image_url": "data:image/png;base64,AAAA"},
                ],
            },
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
            {"type": "reasoning", "id": "rs_2", "summary": [{"type": "summary_text", "text": "In short."}]},
            {"type": "reasoning", "id": "rs_3", "summary": [], "encrypted_content": "AAAA"},
            CALL,
            {"type": "function_call_output", "call_id": "call-1", "output": "seen"},
            {"type": "custom_tool_call", "call_id": "call-2", "name": "run", "input": "ls"},
            {"type": "custom_tool_call_output", "call_id": "call-2", "output": [{"type": "input_text", "text": "a b"}]},
            {"type": "web_search_call", "id": "ws_1", "status": "completed"},
            {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            "odd",
        ],
    }
    said = read("responses", request)
    assert said.input_messages == [
        text("system", "Be brief."),
        text("developer", "Be polite."),
        {
            "role": "user",
            "parts": [
                {"type": "text", "content": "Look."},
                {"type": "text", "content": "[input_image: image/png;base64, 26 characters]"},
            ],
        },
        {"role": "assistant", "parts": [{"type": "reasoning", "content": "Hm."}]},
        {"role": "assistant", "parts": [{"type": "reasoning", "content": "In short."}]},
        {"role": "assistant", "parts": [call("call-1", "look", '{"a": 1}')]},
        result("call-1", "seen"),
        {"role": "assistant", "parts": [call("call-2", "run", "ls")]},
        result("call-2", "a b"),
        text("assistant", "[web_search_call]"),
        text("assistant", "No."),
    ]
    assert said.input_text == "Look.\n[input_image: image/png;base64, 26 characters]"


def test_tools_are_flat_or_the_engines_own() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    tools = [{"type": "function", "name": "look", "description": "Looks.", "parameters": schema}, {"type": "web_search"}, {}, 5]
    assert read("responses", {"tools": tools}).tools == [
        {"type": "function", "name": "look", "description": "Looks.", "parameters": schema},
        {"type": "web_search", "name": "web_search"},
    ]


# -- what is answered --

WHOLE = [
    {"type": "reasoning", "content": "Let me think."},
    {"type": "text", "content": "Well."},
    call("call-1", "look", '{"a": 1}'),
    call("call-2", "listen", ""),
]
GROWING = [
    {"response": {"status": "in_progress", "output": []}, "type": "response.created"},
    added(0, type="reasoning", id="rs_1", summary=[], content=None),
    delta(0, "reasoning_text", "Let me "),
    delta(0, "reasoning_text", "think."),
    added(1, type="message", role="assistant", content=[]),
    delta(1, "output_text", "Well"),
    delta(1, "output_text", "."),
    {"content_index": 0, "output_index": 1, "text": "Well.", "type": "response.output_text.done"},
    added(2, type="function_call", call_id="call-1", name="look", arguments=""),
    delta(2, "function_call_arguments", '{"a"'),
    added(3, type="function_call", call_id="call-2", name="listen", arguments=""),
    delta(2, "function_call_arguments", ": 1}"),
]
ITEMS: list[dict[str, Any]] = [
    {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Let me think."}]},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Well."}]},
    CALL,
    {"type": "function_call", "call_id": "call-2", "name": "listen", "arguments": ""},
]
DONE = [done(index, **item) for index, item in enumerate(ITEMS)]


@pytest.mark.parametrize(
    "answer",
    [
        {"object": "response", "status": "completed", "output": ITEMS},
        typed(*GROWING, *DONE, end("completed", output=ITEMS)),
        typed(*GROWING, end("completed", output=ITEMS)),
        typed(*DONE, end("completed")),
        typed(end("completed", output=ITEMS)),
    ],
    ids=["plain", "stream", "without done", "without deltas", "the end alone"],
)
def test_an_answer_is_one_message_and_said_once(answer: object) -> None:
    said = read("responses", {"input": "Look."}, answer)
    assert said.output_messages == [{"role": "assistant", "parts": WHOLE, "finish_reason": "tool_call"}]
    assert said.output_text == 'Well.\nlook({"a": 1})\nlisten()'


@pytest.mark.parametrize(
    ("last", "finish"),
    [
        ([end("completed")], "stop"),
        ([end("incomplete", "max_output_tokens")], "length"),
        ([end("incomplete", "max_output_tokens", kind="incomplete")], "length"),
        ([end("incomplete", "content_filter", kind="incomplete")], "content_filter"),
        ([end("failed", kind="failed")], "error"),
        ([{"type": "error", "code": "server_error", "message": "died", "param": None}], "error"),
        ([], "error"),
    ],
)
def test_how_a_stream_ended(last: list[dict[str, Any]], finish: str) -> None:
    (answer,) = read("responses", {}, typed(*GROWING[4:7], *last)).output_messages
    assert answer == {**text("assistant", "Well."), "finish_reason": finish}


def test_what_is_told_of_an_item_that_was_cut_does_not_replace_its_deltas() -> None:
    whole = typed(*GROWING[4:7], DONE[1])
    cut = whole[: whole.rindex(b"ell.")]
    assert read("responses", {}, cut).output_text == "Well."


def test_a_delta_that_was_cut_before_its_index_goes_to_the_newest_item() -> None:
    """vLLM writes the index after the delta."""
    first = [added(0, type="message"), delta(0, "output_text", "Hm.")]
    whole = typed(*first, added(1, type="message"), delta(1, "output_text", "Well."))
    (answer,) = read("responses", {}, whole[: whole.rindex(b"ll.")]).output_messages
    assert [part["content"] for part in answer["parts"]] == ["Hm.", "We"]


def test_a_refusal_is_text() -> None:
    item = {"type": "message", "content": [{"type": "refusal", "refusal": "No."}]}
    assert read("responses", {}, {"status": "completed", "output": [item]}).output_text == "No."
    assert read("responses", {}, typed(added(0, type="message"), delta(0, "refusal", "No."))).output_text == "No."


def test_a_stream_that_failed_at_once_is_no_answer() -> None:
    assert read("responses", {}, typed(GROWING[0], end("failed", kind="failed"))).output_messages == []
