"""What two answers to the same request have in common: everything but ids, times and how tokens were packed into events.

vLLM puts into one event whatever it has generated since the last one, so a busy machine gets fewer of them. Hence the events of a
choice that differ in nothing but their text are taken together here, and running counts are only looked at where they end.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from tests.support.wire_client import Reply

_PASSING: Final = re.compile(
    rb'"(?:(?:id|item_id)":\s?"(?:chatcmpl|cmpl|resp|msg|modelperm|embd|score|rerank)[-_][^"]*"|(?:created|created_at)":\s?[\d.]+|metrics":\s?\{[^{}]*\})'
)
_TEXTS: Final = (("choices", 0, "delta", "content"), ("choices", 0, "text"), ("delta", "text"), ("delta",))
"""Where an event has its piece of the text: chat, completions, messages, responses."""


def lasting(body: bytes) -> bytes:
    """The body without what is different in each answer: ids, times of creation, the engine's own timings."""
    return _PASSING.sub(b'"*":0', body)


def events_of(reply: Reply) -> list[tuple[str, Any]]:
    """(name or "", data): JSON, or the text `[DONE]`."""
    found = []
    for event in reply.events:
        fields = dict(line.split(": ", 1) for line in event.decode().splitlines() if ": " in line)
        data = fields.get("data", "")
        found.append((fields.get("event", ""), data if data == "[DONE]" else json.loads(data)))
    return found


def told(reply: Reply) -> Any:
    """What an answer says, to be compared with another's."""
    if "text/event-stream" not in (reply.header("content-type") or ""):
        return reply.status, reply.header("content-type"), lasting(reply.body)
    texts: dict[int, str] = {}
    shapes: dict[int, list[Any]] = {}
    counts: Any = None
    for name, data in events_of(Reply(parts=[(0.0, lasting(reply.body))])):
        index, text, usage = _take_out(data)
        counts = usage or counts
        texts[index] = texts.get(index, "") + text
        known = shapes.setdefault(index, [])
        if (shape := (name, data, usage is not None)) not in known[-1:]:
            known.append(shape)
    return reply.status, reply.header("content-type"), reply.ending, texts, shapes, counts


def _take_out(data: Any) -> tuple[int, str, Any]:
    """(choice, its piece of text, usage), taken out of an event's data."""
    if not isinstance(data, dict):
        return 0, "", None
    data.pop("sequence_number", None)
    usage = data.pop("usage", None)
    choices = data.get("choices")
    index = choices[0]["index"] if choices else 0
    holder, name, text = _find_text(data)
    holder.pop(name, None)
    return index, text, usage


def piece_of(data: Any) -> str:
    """An event's piece of the text."""
    return _find_text(data)[2] if isinstance(data, dict) else ""


def _find_text(data: dict[str, Any]) -> tuple[dict[str, Any], str, str]:
    """(the object that has it, its name there, the piece)."""
    for path in _TEXTS:
        holder: Any = data
        try:
            for step in path[:-1]:
                holder = holder[step]
            text = holder[path[-1]]
        except (KeyError, IndexError, TypeError):
            continue
        if isinstance(text, str):
            return holder, str(path[-1]), text
    return {}, "", ""
