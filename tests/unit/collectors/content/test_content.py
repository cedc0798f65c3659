"""Whatever the bodies are: nothing raises, what comes out has the form, and a cut costs what follows it and nothing else."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectors.records.content import READERS, Conversation, read_content
from collectors.records.content.conversation import note
from collectors.records.content.loose_json import parse_json
from proxy.journal import Content
from proxy.wire.operation import EngineOperation
from proxy.wire.operations import OPERATIONS
from tests.support.scripted_vllm import ScriptedVLLM
from tests.support.wire_client import ask
from tests.unit.collectors.content.said import bodies, fixture, json_values, read

PARTS = {
    "text": {"type", "content"},
    "reasoning": {"type", "content"},
    "tool_call": {"type", "id", "name", "arguments"},
    "tool_call_response": {"type", "id", "response"},
}


def well_formed(said: Conversation) -> None:
    """Phoenix drops a whole list for one malformed message in it."""
    for message in (*said.input_messages, *said.output_messages):
        assert isinstance(message["role"], str)
        for part in message["parts"]:
            assert part.keys() == PARTS[part["type"]]
            assert all(isinstance(value, str) for value in part.values())
    assert all(isinstance(message["finish_reason"], str) for message in said.output_messages)
    for tool in said.tools:
        assert tool.keys() <= {"type", "name", "description", "parameters"}
        assert isinstance(tool["name"], str)
    for document in (*said.ranking.documents, *said.ranking.ranked) if said.ranking is not None else ():
        assert isinstance(document.text, str)
        assert document.score is None or isinstance(document.score, float)
    assert isinstance(said.input_text + said.output_text, str)
    json.dumps([said.input_messages, said.output_messages, said.tools])


def test_every_operation_of_an_engine_has_a_reader() -> None:
    assert {each.name for each in OPERATIONS if isinstance(each, EngineOperation)} == READERS.keys()


def test_an_operation_that_is_not_known_has_said_nothing() -> None:
    assert read("models", b"", {"data": [{"id": "smollm2"}]}) == Conversation()


# -- anything --


@settings(deadline=None)
@given(st.sampled_from(sorted(READERS)), bodies, bodies, st.integers(0, 400))
def test_whatever_the_bodies_are_what_was_said_has_the_form(operation: str, request: bytes, answer: bytes, cut: int) -> None:
    well_formed(read_content(operation, Content(request, answer)))
    well_formed(read_content(operation, Content(request[:cut], answer[:cut], truncated=True)))


@pytest.mark.parametrize("operation", sorted(READERS))
def test_a_deeply_nested_body_is_not_read(operation: str) -> None:
    for deep in (
        b'{"messages":' + b"[" * 100_000,
        b'{"input":' + b'{"a":' * 100_000,
        b'event: x\ndata: {"delta":' + b"[" * 100_000,
    ):
        said = read_content(operation, Content(deep, deep))
        assert list(said.input_messages) == list(said.output_messages) == list(said.tools) == []


def nested(depth: int) -> bytes:
    deep = '{"a":' + "[" * depth + "]" * depth + "}"
    return f'{{"input":{deep},"prompt":{deep},"query":{deep},"system":{deep}}}'.encode()


def test_a_body_that_can_just_be_read_is_no_bug_either() -> None:
    """Reading and writing have the same limit, and what is written is written with a higher stack."""
    deepest = next(depth for depth in range(sys.getrecursionlimit(), 0, -1) if parse_json(nested(depth)) is not None)
    for depth in range(deepest - 15, deepest + 2):
        for operation in READERS:
            read_content(operation, Content(nested(depth), nested(depth)))


# -- cut off --

ANSWERS = {
    "chat": ["chat", "chat_stream_usage"],
    "completions": ["completions", "completions_stream"],
    "responses": ["responses", "responses_stream"],
    "messages": ["messages", "messages_stream"],
}


@pytest.mark.parametrize(("operation", "name"), [(operation, name) for operation, names in ANSWERS.items() for name in names])
def test_of_a_cut_answer_comes_what_precedes_the_cut(operation: str, name: str) -> None:
    """At every byte: no text that wasn't there, none twice, and never less for more bytes."""
    content = fixture(name)
    whole = read_content(operation, content)
    said = [read_content(operation, Content(content.request, content.answer[:cut])) for cut in range(len(content.answer))]
    texts = [each.output_text for each in said]
    assert all(whole.output_text.startswith(text) for text in texts)
    assert [len(text) for text in texts] == sorted(len(text) for text in texts)
    assert texts[-1] == whole.output_text != ""
    assert {each.input_text for each in said} == {whole.input_text}


@pytest.mark.parametrize(("operation", "name"), [(operation, names[0]) for operation, names in ANSWERS.items()])
def test_of_a_cut_request_too(operation: str, name: str) -> None:
    content = fixture(name)
    whole = read_content(operation, content).input_text
    texts = [read_content(operation, Content(content.request[:cut], b"")).input_text for cut in range(len(content.request))]
    assert all(whole.startswith(text) for text in texts)
    assert texts[-1] == whole != ""


# -- the same, streamed or not: as a whole server says it --


@pytest.fixture(scope="module")
def vllm() -> Iterator[ScriptedVLLM]:
    with ScriptedVLLM() as server:
        yield server


SCRIPTS: dict[str, dict[str, Any]] = {
    "text": {"content": "The capital of France is Paris."},
    "thinking": {"content": "Well, let me think. It is Paris.", "reasoning": 4},
    "tools": {"tools": True},
    "limit": {"content": "one two three", "finish": "length"},
}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "Hi"}],
            "tools": [{"type": "function", "function": {"name": "get_weather"}}],
        },
    ),
    "responses": ("/v1/responses", {"input": "Hi", "tools": [{"type": "function", "name": "get_weather"}]}),
    "messages": (
        "/v1/messages",
        {
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 100,
            "tools": [{"name": "get_weather", "input_schema": {}}],
        },
    ),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("operation", REQUESTS)
def test_a_stream_says_what_a_whole_answer_says(vllm: ScriptedVLLM, operation: str, script: str) -> None:
    path, fields = REQUESTS[operation]
    body = {"model": "smollm2", **fields, "script": SCRIPTS[script]}
    whole = read(operation, body, ask(vllm.url, path, body).body)
    streamed = read(operation, body, ask(vllm.url, path, {**body, "stream": True}).body)
    (one,), (other,) = without_ids(whole), without_ids(streamed)
    assert one == other
    kinds = [part["type"] for part in one["parts"]]
    thinks, calls = "reasoning" in SCRIPTS[script], "tools" in SCRIPTS[script]
    assert kinds == (["reasoning"] if thinks else []) + (["tool_call", "tool_call"] if calls else ["text"])
    assert one["finish_reason"] == ("tool_call" if calls else "length" if script == "limit" else "stop")
    for part in one["parts"]:
        if part["type"] == "tool_call":
            assert (part["name"], isinstance(json.loads(part["arguments"]), dict)) == ("get_weather", True), "whole"
    assert [tool["name"] for tool in whole.tools] == ["get_weather"]


def without_ids(said: Conversation) -> list[dict[str, Any]]:
    """Two answers have calls of two ids; JSON may be written with spaces or without."""
    for message in said.output_messages:
        for part in message["parts"]:
            if part["type"] == "tool_call":
                assert part.pop("id")
                part["arguments"] = json.dumps(json.loads(part["arguments"]))
    return list(said.output_messages)


# -- notes of what isn't text --


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"type": "input_image", "image_url": "data:image/png;base64," + "A" * 5000},
            "[input_image: image/png;base64, 5022 characters]",
        ),
        ({"type": "input_image", "image_url": "https://example.com/cat.png"}, "[input_image: https://example.com/cat.png]"),
        ({"type": "input_image", "file_id": "file-1"}, "[input_image]"),
        ({"type": "image_url", "image_url": "A" * 300}, "[image_url: 300 characters]"),
        ({"type": "image_url", "image_url": {"url": "DATA:image/png,AAAA"}}, "[image_url: image/png, 19 characters]"),
        (
            {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,AAAA"},
            "[input_file: a.pdf, application/pdf;base64, 32 characters]",
        ),
        (
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
            "[image: image/png, 4 characters]",
        ),
        ({"type": "image", "source": {"type": "url", "url": "https://example.com/cat"}}, "[image: https://example.com/cat]"),
        ({"type": "redacted_thinking", "data": "AAAA"}, "[redacted_thinking: 4 characters]"),
        ({"type": ["odd"], "source": 5}, '[["odd"]]'),
    ],
)
def test_pictures_sounds_and_files_are_notes(fields: dict[str, Any], expected: str) -> None:
    assert note(fields) == expected


@given(json_values, st.sampled_from(["data", "url", "image_url", "file_data"]), st.binary(min_size=300, max_size=400))
def test_a_note_never_has_the_bytes(value: Any, name: str, data: bytes) -> None:
    encoded = data.hex()
    shown = note({"type": "image", "source": value, name: encoded})
    assert encoded[:20] not in shown
