"""What was said, in OpenTelemetry's form of messages: a role and parts.

Source: OpenTelemetry GenAI semantic conventions 1.41, gen-ai-input-messages.json, gen-ai-output-messages.json and
gen-ai-tool-definitions.json.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from collectors.records.content.loose_json import dict_of, list_of, text_of

Message = dict[str, Any]
Part = dict[str, Any]
Tool = dict[str, Any]


class Document(NamedTuple):
    """One that was ranked; `score` as the engine gave it, None for what was asked."""

    text: str
    score: float | None = None


class Ranking(NamedTuple):
    """Documents by how well they answer a query. `ranked`: best first, or in the order of the answer."""

    query: str
    documents: Sequence[Document]
    ranked: Sequence[Document]


class Conversation(NamedTuple):
    """What was said. The texts are what a table shows: the last thing asked, the first answer."""

    input_text: str = ""
    output_text: str = ""
    input_messages: Sequence[Message] = ()
    output_messages: Sequence[Message] = ()
    tools: Sequence[Tool] = ()
    ranking: Ranking | None = None


def conversation(messages: Sequence[Message], answers: Sequence[Message] = (), tools: Sequence[Tool] = ()) -> Conversation:
    return Conversation(_last_text(messages), next(map(_text, answers), ""), messages, answers, tools)


def _last_text(messages: Sequence[Message]) -> str:
    asked = [message for message in messages if message["role"] == "user"] or messages
    return _text(asked[-1]) if asked else ""


def _text(message: Message) -> str:
    parts = message["parts"]
    texts = [part["content"] for part in parts if part["type"] == "text"]
    calls = [f"{part['name']}({part['arguments']})" for part in parts if part["type"] == "tool_call"]
    return "\n".join(texts + calls)


# -- messages --


def message(role: str, parts: Sequence[Part]) -> Message:
    return {"role": role, "parts": list(parts)}


def answer(parts: Sequence[Part], finish_reason: str, role: str = "assistant") -> Message:
    """`finish_reason`: one of the conventions'; "" for an answer that has no end."""
    return {**message(role, parts), "finish_reason": finish_reason or "error"}


# -- parts --


def text_part(text: str) -> Part:
    return {"type": "text", "content": text}


def reasoning_parts(text: str) -> list[Part]:
    return [{"type": "reasoning", "content": text}] if text else []


def call_part(identity: object, name: object, arguments: object) -> Part:
    return {"type": "tool_call", "id": text_of(identity), "name": text_of(name), "arguments": text_of(arguments)}


def response_part(identity: object, response: object) -> Part:
    return {"type": "tool_call_response", "id": text_of(identity), "response": plain_text(response)}


def parts_of(value: object) -> list[Part]:
    """A message's content, in any of the shapes that an API allows."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return [text_part(value)]
    if isinstance(value, list):
        return [text_part(token_note(value))] if is_tokens(value) else [part for entry in value for part in _parts(entry)]
    return [text_part(text_of(value))]


def plain_text(value: object) -> str:
    return "".join(part["content"] for part in parts_of(value))


def _parts(entry: object) -> list[Part]:
    fields = {"text": entry} if isinstance(entry, str) else dict_of(entry)
    for name in ("text", "refusal"):
        if name in fields:
            return [text_part(text)] if (text := text_of(fields[name])) else []
    kind = text_of(fields.get("type"))
    if len(fields) < 2 or not kind or kind.endswith("text"):
        return []  # cut off before it says anything
    return [text_part(note(fields))]


def is_tokens(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(entry, int) for entry in value)


def token_note(tokens: Sequence[object]) -> str:
    return f"[{len(tokens)} tokens]"


# -- what isn't text --

_LINK = re.compile(r"(?!data:)[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_DATA = ("data", "file_data", "url", "image_url", "file_url")


def note(fields: dict[str, Any]) -> str:
    """What kind of picture, sound or file it was; where it is, or how large."""
    kind = text_of(fields.get("type"))
    inner = fields.get(kind, fields.get("source"))
    source = inner if isinstance(inner, dict) else fields
    media = [text_of(source[name]) for name in ("media_type", "format", "filename") if source.get(name)]
    data = next((value for name in _DATA if isinstance(value := source.get(name), str) and value), "")
    if _LINK.match(data):
        media.append(data[:200])
    elif data:
        head, comma, _ = data.partition(",")
        media += [head[len("data:") :][:200]] if comma else []
        media.append(f"{len(data)} characters")
    return f"[{kind}{': ' if media else ''}{', '.join(media)}]"


# -- tools --


def tools_of(entries: object) -> list[Tool]:
    return [tool for entry in list_of(entries) if (tool := _tool(dict_of(entry)))]


def _tool(entry: dict[str, Any]) -> Tool | None:
    """As chat describes it (`function`), or responses (flat), or messages (`input_schema`)."""
    function = dict_of(entry.get("function")) or entry
    kind = text_of(entry.get("type")) or "function"
    name = text_of(function.get("name")) or ("" if kind == "function" else kind)
    if not name:
        return None
    described = {"description": text_of(function["description"])} if function.get("description") else {}
    parameters = function.get("parameters", function.get("input_schema"))
    return {"type": kind, "name": name, **described, **({"parameters": parameters} if isinstance(parameters, dict) else {})}
