"""What a request asks at its end: where each API says it, and what is no question."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.wire.question import LONGEST, question_of

HISTORY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
]


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"model": "m", "temperature": 0, "messages": list(messages), **more}


def text_part(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **more}


def ask(operation: str, body: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    question = question_of(operation, json.dumps(body).encode())
    return None if question is None else (question.text, json.loads(question.body))


ASKED = [
    pytest.param("chat", chat(*HISTORY, user("Why?")), chat(*HISTORY, user("?")), id="chat"),
    pytest.param("chat", chat(user([text_part("Why?")])), chat(user([text_part("?")])), id="chat-part"),
    pytest.param("chat", chat(user("Why?", name="Ann")), chat(user("?", name="Ann")), id="chat-name"),
    pytest.param("messages", chat(user("Why?"), system="Be brief."), chat(user("?"), system="Be brief."), id="messages"),
    pytest.param(
        "messages",
        chat(user([text_part("Why?", cache_control={"type": "ephemeral"})])),
        chat(user([text_part("?", cache_control={"type": "ephemeral"})])),
        id="messages-part",
    ),
    pytest.param(
        "responses", {"input": "Why?", "instructions": "Be brief."}, {"input": "?", "instructions": "Be brief."}, id="responses"
    ),
    pytest.param("responses", {"input": [*HISTORY, user("Why?")]}, {"input": [*HISTORY, user("?")]}, id="responses-message"),
    pytest.param(
        "responses",
        {"input": [{"type": "message", **user([{"type": "input_text", "text": "Why?"}])}]},
        {"input": [{"type": "message", **user([{"type": "input_text", "text": "?"}])}]},
        id="responses-part",
    ),
    pytest.param("completions", {"prompt": "Why?", "n": 2}, {"prompt": "?", "n": 2}, id="completions"),
    pytest.param("completions", {"prompt": ["Why?"]}, {"prompt": ["?"]}, id="completions-list"),
    pytest.param("completions", {"prompt": "Why?", "echo": False}, {"prompt": "?", "echo": False}, id="completions-no-echo"),
]


@pytest.mark.parametrize(("operation", "body", "rest"), ASKED)
def test_where_the_question_stands(operation: str, body: dict[str, Any], rest: dict[str, Any]) -> None:
    assert ask(operation, body) == ("Why?", rest)


def test_of_two_questions_the_rest_is_the_same() -> None:
    """Whatever they ask, be it what stands in their place."""
    rests = [
        question_of("chat", json.dumps(chat(*HISTORY, user(text))).encode()) for text in ("Why?", 'Who is "that\\"? Ünü', "?")
    ]
    assert len({question.body for question in rests if question is not None}) == 1
    assert all(rests)


@pytest.mark.parametrize(
    ("operation", "other"),
    [
        pytest.param("chat", chat(user("Why?")), id="no-history"),
        pytest.param("chat", chat({"role": "system", "content": "Be rude."}, *HISTORY[1:], user("Why?")), id="system"),
        pytest.param("chat", chat(*HISTORY[:1], user("Why?")), id="history"),
        pytest.param("chat", chat(*HISTORY, user("Why?", name="Ann")), id="name"),
        pytest.param("chat", chat(*HISTORY, user([text_part("Why?")])), id="as-a-part"),
        pytest.param("chat", chat(*HISTORY, user("Why?"), temperature=1), id="parameter"),
    ],
)
def test_all_else_is_left_as_it_is(operation: str, other: dict[str, Any]) -> None:
    one, two = ask("chat", chat(*HISTORY, user("Why?"))), ask(operation, other)
    assert one is not None
    assert two is not None
    assert one[1] != two[1]


NONE = [
    pytest.param("embeddings", {"input": "Why?"}, id="another-endpoint"),
    pytest.param("chat", {"model": "m"}, id="no-messages"),
    pytest.param("chat", chat(), id="empty"),
    pytest.param("chat", {"messages": "Why?"}, id="messages-as-text"),
    pytest.param("chat", chat("Why?"), id="a-message-as-text"),
    pytest.param("chat", chat({"role": "system", "content": "Why?"}), id="only-a-system-prompt"),
    pytest.param("chat", chat({"content": "Why?"}), id="nobody-s"),
    pytest.param("chat", chat(user("Why?"), {"role": "assistant", "content": "Be"}), id="begun-answer"),
    pytest.param("chat", chat(user("Why?"), {"role": "tool", "tool_call_id": "1", "content": "x"}), id="tool-result"),
    pytest.param("chat", chat({"role": "user"}), id="no-content"),
    pytest.param("chat", chat(user(None)), id="null"),
    pytest.param("chat", chat(user(5)), id="a-number"),
    pytest.param("chat", chat(user("")), id="nothing"),
    pytest.param("chat", chat(user(" \n")), id="white"),
    pytest.param("chat", chat(user([])), id="no-part"),
    pytest.param("chat", chat(user([text_part("Why?"), text_part("How?")])), id="two-parts"),
    pytest.param("chat", chat(user([text_part("Why?"), {"type": "image_url", "image_url": {"url": "data:,"}}])), id="a-picture"),
    pytest.param("chat", chat(user([{"type": "refusal", "text": "Why?"}])), id="another-part"),
    pytest.param("chat", chat(user([{"text": "Why?"}])), id="a-part-of-no-kind"),
    pytest.param("chat", chat(user(["Why?"])), id="a-part-as-text"),
    pytest.param("chat", chat(user([{"type": "input_text", "text": "Why?"}])), id="a-part-of-another-API"),
    pytest.param("responses", {"input": [user([text_part("Why?")])]}, id="a-part-of-chat"),
    pytest.param("responses", {"input": [{"type": "item_reference", "role": "user", "content": "Why?"}]}, id="another-item"),
    pytest.param("messages", chat(user([{"type": "tool_result", "tool_use_id": "1", "content": "Why?"}])), id="a-tool-s-result"),
    pytest.param("completions", {"prompt": [1, 2]}, id="tokens"),
    pytest.param("completions", {"prompt": [[1, 2]]}, id="a-list-of-tokens"),
    pytest.param("completions", {"prompt": ["Why?", "How?"]}, id="a-batch"),
    pytest.param("completions", {"prompt": []}, id="an-empty-batch"),
    pytest.param("completions", {"prompt": "Why?", "echo": True}, id="echo"),
    pytest.param("completions", {"prompt": "Why?", "prompt_logprobs": 0}, id="prompt_logprobs"),
    pytest.param("chat", chat(user("Why?"), return_token_ids=True), id="return_token_ids"),
]


@pytest.mark.parametrize(("operation", "body"), NONE)
def test_what_is_no_question(operation: str, body: dict[str, Any]) -> None:
    assert ask(operation, body) is None


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"[1]", id="a-list"),
        pytest.param(b'{"messages":[{"role":"user","content":"A","content":"Why?"}]}', id="content-twice"),
        pytest.param(b'{"messages":[{"role":"user","content":"Why?"}],"messages":[]}', id="messages-twice"),
        pytest.param(b'{"messages":[{"role":"user","content":[{"type":"text","text":"A","text":"Why?"}]}]}', id="text-twice"),
        pytest.param(b'{"messages":[{"role":"user","content":"\\ud800"}]}', id="half-a-pair"),
        pytest.param(b'{"messages":[{"role":"user","content":"\xff"}]}', id="not-UTF-8"),
        pytest.param(b'{"messages":[' + b"[" * 100_000 + b"]" * 100_000 + b"]}", id="nested"),
    ],
)
def test_what_can_t_be_read_is_no_question(body: bytes) -> None:
    assert question_of("chat", body) is None


def test_a_long_text_is_no_question() -> None:
    assert ask("chat", chat(user("a" * LONGEST))) is not None
    assert ask("chat", chat(user("a" * (LONGEST + 1)))) is None
