"""/v1/messages and its count_tokens: Anthropic's blocks, whole or as events. A streamed answer's blocks are put together from
their pieces and then read as those of a whole one."""

from __future__ import annotations

from typing import Any

from collectors.records.content.conversation import (
    Conversation,
    Message,
    Part,
    answer,
    call_part,
    conversation,
    message,
    parts_of,
    reasoning_parts,
    response_part,
    tools_of,
)
from collectors.records.content.loose_json import dict_of, list_of, parse_json, text_of
from collectors.records.content.pieces import Piece, pieces_of

_FINISH = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_call",
    "refusal": "content_filter",
}
_DELTAS = {"text": "text", "thinking": "thinking", "partial_json": "input"}
"""A delta's field → the block's field that it is a piece of."""


def read_messages(request: bytes, body: bytes) -> Conversation:
    asked = dict_of(parse_json(request))
    return conversation(_asked(asked), _answers(body), tools_of(asked.get("tools")))


def read_count_tokens(request: bytes, body: bytes) -> Conversation:
    """What was asked, and how long it is."""
    count = dict_of(parse_json(body)).get("input_tokens")
    asked = conversation(_asked(dict_of(parse_json(request)))).input_text
    return Conversation(asked, f"{count} tokens" if isinstance(count, int) else "")


# -- requests --


def _asked(request: dict[str, Any]) -> list[Message]:
    system = parts_of(request.get("system"))
    messages = [message("system", system)] if system else []
    for entry in map(dict_of, list_of(request.get("messages"))):
        messages += _messages(text_of(entry.get("role")) or "user", entry.get("content"))
    return messages


def _messages(role: str, content: object) -> list[Message]:
    """Results of tools, which stand among what a user says, are messages of their own."""
    results: list[Message] = []
    parts: list[Part] = []
    for block in content if isinstance(content, list) else [content]:
        fields = dict_of(block)
        if fields.get("type") == "tool_result":
            results.append(message("tool", [response_part(fields.get("tool_use_id"), fields.get("content"))]))
        else:
            parts += _block_parts(block)
    return results + ([message(role, parts)] if parts or not results else [])


# -- blocks, of either --


def _block_parts(block: object) -> list[Part]:
    fields = dict_of(block)
    match fields.get("type"):
        case "thinking":
            return reasoning_parts(text_of(fields.get("thinking")))
        case "tool_use" | "server_tool_use":
            return [call_part(fields.get("id"), fields.get("name"), fields.get("input"))]
        case _:
            return parts_of([block])


# -- answers --


class _Block:
    """A block of a streamed answer: what it began as, and its deltas."""

    def __init__(self) -> None:
        self.begun: dict[str, Any] = {}
        self.deltas: dict[str, list[str]] = {}

    def add(self, delta: dict[str, Any]) -> None:
        for name, field in _DELTAS.items():
            if name in delta:
                self.deltas.setdefault(field, []).append(text_of(delta[name]))

    def whole(self) -> dict[str, Any]:
        return {**self.begun, **{field: "".join(deltas) for field, deltas in self.deltas.items()}}


class _Stream:
    def __init__(self) -> None:
        self.message: dict[str, Any] = {}
        self.blocks: dict[int, _Block] = {}
        self.stop_reason: object = None

    def add(self, event: Piece) -> None:
        value = event.value
        match event.name:
            case "message_start":
                self.message = dict_of(value.get("message"))
            case "content_block_start":
                self._block(value).begun = dict_of(value.get("content_block"))
            case "content_block_delta":
                self._block(value).add(dict_of(value.get("delta")))
            case "message_delta":
                self.stop_reason = dict_of(value.get("delta")).get("stop_reason")

    def _block(self, value: dict[str, Any]) -> _Block:
        """The one that an event is about; an event that was cut off before it says so is about the newest."""
        index = value.get("index")
        return self.blocks.setdefault(index if isinstance(index, int) else max(self.blocks, default=0), _Block())

    def answers(self) -> list[Message]:
        if not (self.message or self.blocks):
            return []
        blocks = [block.whole() for _, block in sorted(self.blocks.items())]
        return [_answer({**self.message, "content": blocks, "stop_reason": self.stop_reason})]


def _answers(body: bytes) -> list[Message]:
    stream = _Stream()
    for piece in pieces_of(body):
        if piece.name == "message":
            return [_answer(piece.value)]
        stream.add(piece)
    return stream.answers()


def _answer(said: dict[str, Any]) -> Message:
    reason = text_of(said.get("stop_reason"))
    parts = [part for block in list_of(said.get("content")) for part in _block_parts(block)]
    return answer(parts, _FINISH.get(reason, reason), text_of(said.get("role")) or "assistant")
