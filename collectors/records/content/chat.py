"""Chat, completions and embeddings: OpenAI's older APIs, whole or in chunks."""

from __future__ import annotations

from typing import Any

from collectors.records.content.conversation import (
    Conversation,
    Message,
    Part,
    answer,
    call_part,
    conversation,
    is_tokens,
    message,
    parts_of,
    reasoning_parts,
    response_part,
    text_part,
    tools_of,
)
from collectors.records.content.loose_json import dict_of, list_of, parse_json, text_of
from collectors.records.content.pieces import pieces_of

_FINISH = {"tool_calls": "tool_call"}


def read_chat(request: bytes, body: bytes) -> Conversation:
    asked = dict_of(parse_json(request))
    return conversation(chat_messages(asked.get("messages")), choices(body), tools_of(asked.get("tools")))


def read_completions(request: bytes, body: bytes) -> Conversation:
    return conversation(_prompts(dict_of(parse_json(request)).get("prompt")), choices(body))


def read_embeddings(request: bytes, body: bytes) -> Conversation:
    """An answer of vectors says nothing to a reader."""
    asked = dict_of(parse_json(request))
    return conversation(_prompts(asked.get("input")) or chat_messages(asked.get("messages")))


def _prompts(asked: object) -> list[Message]:
    prompts = asked if isinstance(asked, list) and not is_tokens(asked) else [asked]
    return [message("user", parts_of(prompt)) for prompt in prompts if prompt is not None]


# -- requests --


def chat_messages(entries: object) -> list[Message]:
    return [_message(entry) for entry in list_of(entries) if isinstance(entry, dict)]


def _message(entry: dict[str, Any]) -> Message:
    role = text_of(entry.get("role")) or "user"
    name = text_of(entry.get("name"))
    return {**message(role, _said(role, entry)), **({"name": name} if name else {})}


def _said(role: str, entry: dict[str, Any]) -> list[Part]:
    content = entry.get("content")
    if role == "tool":
        return [response_part(entry.get("tool_call_id"), content)]
    calls = [_call(dict_of(call)) for call in list_of(entry.get("tool_calls"))]
    return reasoning_parts(_reasoning(entry)) + parts_of(content) + calls


def _call(entry: dict[str, Any]) -> Part:
    function = dict_of(entry.get("function"))
    return call_part(entry.get("id"), function.get("name"), function.get("arguments"))


def _reasoning(entry: dict[str, Any]) -> str:
    return text_of(entry.get("reasoning_content") or entry.get("reasoning"))


# -- answers --


class _Choice:
    """One choice of an answer, put together from its pieces."""

    def __init__(self) -> None:
        self.role = "assistant"
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.refusal: list[str] = []
        self.calls: dict[int, dict[str, str]] = {}
        self.finish_reason = ""

    def add(self, choice: dict[str, Any]) -> None:
        said = dict_of(choice.get("delta") or choice.get("message"))
        self.role = text_of(said.get("role")) or self.role
        self.content += [text_of(said.get("content")), text_of(choice.get("text"))]
        self.reasoning.append(_reasoning(said))
        self.refusal.append(text_of(said.get("refusal")))
        for position, entry in enumerate(list_of(said.get("tool_calls"))):
            self._add_call(position, dict_of(entry))
        self.finish_reason = text_of(choice.get("finish_reason")) or self.finish_reason

    def _add_call(self, position: int, entry: dict[str, Any]) -> None:
        index = entry.get("index")
        call = self.calls.setdefault(index if isinstance(index, int) else position, {"id": "", "name": "", "arguments": ""})
        function = dict_of(entry.get("function"))
        call["id"] = text_of(entry.get("id")) or call["id"]
        call["name"] = text_of(function.get("name")) or call["name"]
        call["arguments"] += text_of(function.get("arguments"))

    def message(self) -> Message:
        texts = [text for text in ("".join(self.content), "".join(self.refusal)) if text]
        calls = [call_part(call["id"], call["name"], call["arguments"]) for _, call in sorted(self.calls.items())]
        parts = reasoning_parts("".join(self.reasoning)) + [text_part(text) for text in texts] + calls
        return answer(parts, _FINISH.get(self.finish_reason, self.finish_reason), self.role)


def choices(body: bytes) -> list[Message]:
    found: dict[int, _Choice] = {}
    for piece in pieces_of(body):
        for position, entry in enumerate(list_of(piece.value.get("choices"))):
            choice = dict_of(entry)
            index = choice.get("index")
            found.setdefault(index if isinstance(index, int) else position, _Choice()).add(choice)
    return [choice.message() for _, choice in sorted(found.items())]
