"""/v1/responses: items in, items out, whole or as typed events.

A streamed answer tells everything twice: in deltas as it grows, and once more when an item is done and at the end. What is
done replaces its deltas; the end is only looked at for how it ended, unless nothing came before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from collectors.records.content.conversation import (
    Conversation,
    Message,
    Part,
    answer,
    call_part,
    conversation,
    message,
    note,
    parts_of,
    plain_text,
    reasoning_parts,
    response_part,
    text_part,
    tools_of,
)
from collectors.records.content.loose_json import dict_of, list_of, parse_json, text_of
from collectors.records.content.pieces import Piece, pieces_of

_ENDS = ("response.completed", "response.incomplete", "response.failed", "response.cancelled")
_TEXT = ("response.output_text.delta", "response.refusal.delta")
_REASONING = ("response.reasoning_text.delta", "response.reasoning_summary_text.delta")
_ARGUMENTS = ("response.function_call_arguments.delta", "response.custom_tool_call_input.delta")
_FINISH = {"max_output_tokens": "length", "content_filter": "content_filter"}


def read_responses(request: bytes, body: bytes) -> Conversation:
    asked = dict_of(parse_json(request))
    messages = [message("system", instructions)] if (instructions := parts_of(asked.get("instructions"))) else []
    return conversation(messages + _input(asked.get("input")), _answers(body), tools_of(asked.get("tools")))


# -- requests --


def _input(value: object) -> list[Message]:
    if isinstance(value, list):
        return [message(_role(entry), parts) for entry in map(dict_of, value) if (parts := _item_parts(entry))]
    return [message("user", parts)] if (parts := parts_of(value)) else []


def _role(item: dict[str, Any]) -> str:
    if text_of(item.get("type")).endswith("_output"):
        return "tool"
    return text_of(item.get("role")) or "assistant"


# -- items, of either --


def _item_parts(item: dict[str, Any]) -> list[Part]:
    match item.get("type"):
        case "reasoning":
            return reasoning_parts(plain_text(item.get("content")) or plain_text(item.get("summary")))
        case "function_call" | "custom_tool_call":
            return [call_part(item.get("call_id"), item.get("name"), item.get("arguments", item.get("input")))]
        case "function_call_output" | "custom_tool_call_output":
            return [response_part(item.get("call_id"), item.get("output"))]
        case kind if "content" in item or not kind:  # a message, whose type may have been cut off
            return parts_of(item.get("content"))
        case _:
            return [text_part(note(item))]


# -- answers --


class _Item:
    """An item of a streamed answer: what it was announced as, its deltas, and what it was in the end."""

    def __init__(self) -> None:
        self.announced: dict[str, Any] = {}
        self.done: dict[str, Any] | None = None
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.arguments: list[str] = []

    def parts(self) -> list[Part]:
        if self.done is not None:
            return _item_parts(self.done)
        parts = reasoning_parts("".join(self.reasoning))
        if text := "".join(self.text):
            parts.append(text_part(text))
        if "name" in self.announced or self.arguments:
            parts.append(call_part(self.announced.get("call_id"), self.announced.get("name"), "".join(self.arguments)))
        return parts


class _Stream:
    def __init__(self) -> None:
        self.items: dict[int, _Item] = {}
        self.response: dict[str, Any] = {}
        """As the last event has it."""

    def add(self, event: Piece) -> None:
        name, value = event.name, event.value
        if name in _ENDS:
            self.response = dict_of(value.get("response"))
        elif name == "response.output_item.added":
            self._item(value).announced = dict_of(value.get("item"))
        elif name == "response.output_item.done" and event.whole:
            self._item(value).done = dict_of(value.get("item"))
        elif name in _TEXT:
            self._item(value).text.append(text_of(value.get("delta")))
        elif name in _REASONING:
            self._item(value).reasoning.append(text_of(value.get("delta")))
        elif name in _ARGUMENTS:
            self._item(value).arguments.append(text_of(value.get("delta")))

    def _item(self, value: dict[str, Any]) -> _Item:
        """The one that an event is about; an event that was cut off before it says so is about the newest."""
        index = value.get("output_index")
        return self.items.setdefault(index if isinstance(index, int) else max(self.items, default=0), _Item())

    def answers(self) -> list[Message]:
        if not self.items:
            return list(_whole(self.response))
        parts = [part for _, item in sorted(self.items.items()) for part in item.parts()]
        return [answer(parts, _finish(self.response, parts))]


def _answers(body: bytes) -> list[Message]:
    stream = _Stream()
    for piece in pieces_of(body):
        if "output" in piece.value:
            return list(_whole(piece.value))
        stream.add(piece)
    return stream.answers()


def _whole(response: dict[str, Any]) -> Iterator[Message]:
    """An answer is one message, however many items it has."""
    if isinstance(response.get("output"), list):
        parts = [part for item in list_of(response["output"]) for part in _item_parts(dict_of(item))]
        yield answer(parts, _finish(response, parts))


def _finish(response: dict[str, Any], parts: list[Part]) -> str:
    """Nothing for an answer whose end was not seen, or that failed."""
    match response.get("status"):
        case "completed":
            return "tool_call" if any(part["type"] == "tool_call" for part in parts) else "stop"
        case "incomplete":
            reason = text_of(dict_of(response.get("incomplete_details")).get("reason"))
            return _FINISH.get(reason, reason)
        case _:
            return ""
