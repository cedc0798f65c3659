"""Prompts and answers out of raw bodies, in OpenTelemetry's form of messages (role and parts).

Bodies are whatever a caller and an engine wrote, possibly cut off: nothing here raises, and what can be read is read. Pictures
and sound become a note of what was there: their bytes would drown the text, and a URL in a trace would be fetched by whoever
looks at it.

Source of the form: OpenTelemetry GenAI semantic conventions 1.41, gen-ai-input-messages.json and gen-ai-output-messages.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from proxy.journal import Content
from proxy.wire.sse import Framer, data_of

Message = dict[str, Any]
Part = dict[str, Any]


class Conversation(NamedTuple):
    """What was said. The texts are what a table shows: the last thing asked, the first answer."""

    input_text: str = ""
    output_text: str = ""
    input_messages: Sequence[Message] = ()
    output_messages: Sequence[Message] = ()
    tools: Sequence[dict[str, Any]] = ()


def read_content(operation: str, content: Content) -> Conversation:
    """Never raises."""
    request = _dict(parse_json(content.request))
    messages = _input_messages(operation, request)
    answers = [choice.message() for choice in _choices(content.answer)]
    return Conversation(
        _last_text(messages),
        next((_text_of(answer) for answer in answers), ""),
        messages,
        answers,
        [tool for entry in _list(request.get("tools")) if (tool := _tool(_dict(entry)))],
    )


# -- requests --


def _input_messages(operation: str, request: dict[str, Any]) -> list[Message]:
    if operation in ("chat", "messages"):
        return [_message(_dict(entry)) for entry in _list(request.get("messages")) if isinstance(entry, dict)]
    asked = request.get("prompt", request.get("input"))
    prompts = asked if isinstance(asked, list) and not _is_tokens(asked) else [asked]
    return [{"role": "user", "parts": _parts(prompt)} for prompt in prompts if prompt is not None]


def _message(entry: dict[str, Any]) -> Message:
    role = _str(entry.get("role")) or "user"
    if role == "tool":
        response = "".join(_str(part.get("content")) for part in _parts(entry.get("content")))
        parts: list[Part] = [{"type": "tool_call_response", "id": _str(entry.get("tool_call_id")), "response": response}]
    else:
        parts = _reasoning(entry) + _parts(entry.get("content")) + [_tool_call(_dict(call)) for call in _calls(entry)]
    name = _str(entry.get("name"))
    return {"role": role, "parts": parts, **({"name": name} if name else {})}


def _parts(value: object) -> list[Part]:
    """A message's content, in any of the shapes that the API allows."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return [_text_part(value)]
    if isinstance(value, list):
        if _is_tokens(value):
            return [_text_part(f"[{len(value)} tokens]")]
        return [_part(entry) for entry in value]
    return [_text_part(_json(value))]


def _part(entry: object) -> Part:
    if isinstance(entry, str):
        return _text_part(entry)
    fields = _dict(entry)
    if "text" in fields:
        return _text_part(_str(fields["text"]))
    kind = _str(fields.get("type")) or "part"
    return _text_part(f"[{kind}{_described(fields.get(kind))}]")


def _described(value: object) -> str:
    """What kind of picture or sound it was."""
    fields = _dict(value)
    if url := _str(fields.get("url")):
        head, comma, _ = url.partition(",")
        return (
            f": {head.removeprefix('data:')}, {len(url)} characters" if comma and head.startswith("data:") else f": {url[:200]}"
        )
    return f": {_str(fields['format'])}" if "format" in fields else ""


def _tool(entry: dict[str, Any]) -> dict[str, Any] | None:
    function = _dict(entry.get("function"))
    name = _str(function.get("name"))
    if not name:
        return None
    described = {"description": _str(function["description"])} if function.get("description") else {}
    parameters = function.get("parameters")
    return {
        "type": "function",
        "name": name,
        **described,
        **({"parameters": parameters} if isinstance(parameters, dict) else {}),
    }


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
        said = _dict(choice.get("delta") or choice.get("message"))
        self.role = _str(said.get("role")) or self.role
        self.content += [_str(said.get("content")), _str(choice.get("text"))]
        self.reasoning.append(_str(said.get("reasoning_content") or said.get("reasoning")))
        self.refusal.append(_str(said.get("refusal")))
        for position, entry in enumerate(_calls(said)):
            self._add_call(position, _dict(entry))
        self.finish_reason = _str(choice.get("finish_reason")) or self.finish_reason

    def _add_call(self, position: int, entry: dict[str, Any]) -> None:
        index = entry.get("index")
        call = self.calls.setdefault(index if isinstance(index, int) else position, {"id": "", "name": "", "arguments": ""})
        function = _dict(entry.get("function"))
        call["id"] = _str(entry.get("id")) or call["id"]
        call["name"] = _str(function.get("name")) or call["name"]
        call["arguments"] += _str(function.get("arguments"))

    def message(self) -> Message:
        reasoning = "".join(self.reasoning)
        texts = [text for text in ("".join(self.content), "".join(self.refusal)) if text]
        parts: list[Part] = [{"type": "reasoning", "content": reasoning}] if reasoning else []
        parts += [_text_part(text) for text in texts]
        parts += [{"type": "tool_call", **call} for _, call in sorted(self.calls.items())]
        finish = {"tool_calls": "tool_call", "": "error"}.get(self.finish_reason, self.finish_reason)
        return {"role": self.role, "parts": parts, "finish_reason": finish}


def _choices(answer: bytes) -> list[_Choice]:
    choices: dict[int, _Choice] = {}
    for body in _bodies(answer):
        for position, entry in enumerate(_list(_dict(parse_json(body)).get("choices"))):
            choice = _dict(entry)
            index = choice.get("index")
            choices.setdefault(index if isinstance(index, int) else position, _Choice()).add(choice)
    return [choice for _, choice in sorted(choices.items())]


def _bodies(answer: bytes) -> Iterator[bytes]:
    """A JSON answer as it is; a stream's events one by one."""
    if answer.lstrip()[:1] == b"{":
        yield answer
        return
    framer = Framer(len(answer) + 1)
    for event in (*framer.feed(answer), framer.rest()):
        data = data_of(event)
        if data is not None and data != b"[DONE]":
            yield data


# -- JSON that may have been cut off --

_TOKEN = re.compile(rb'"(?:[^"\\]|\\u[0-9a-fA-F]{4}|\\[^u])*+("?)|[\[\]{},:]|[^\s\[\]{},:"]+', re.DOTALL)
"""A string (whole escapes only, its closing quote if it is there), a mark, or a number or name."""

_HALF_A_PAIR = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}$")
_CLOSERS = {b"{": b"}", b"[": b"]"}


def parse_json(body: bytes) -> object:
    """The value; of a text that was cut off, what precedes the cut; None if there is nothing to read."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        pass
    try:
        return msgspec.json.decode(close_json(body))
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None


def close_json(text: bytes) -> bytes:
    """Complete a JSON text that was cut off: an open string ends there, half a member goes, what is open is closed.

    `text` must be the beginning of valid JSON; of anything else something comes out that may or may not be JSON.
    """
    opened: list[bytes] = []
    good, before = 0, b""
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token in _CLOSERS:
            opened.append(token)
        elif token in (b"}", b"]"):
            if not opened:
                break
            opened.pop()
        elif token in (b",", b":") or (opened[-1:] == [b"{"] and before != b":"):
            before = token
            continue  # a key counts with its value
        elif match.group(1) == b"":
            return text[: match.start()] + _ended(token) + _closing(opened)
        elif not (token[:1] == b'"' or token in (b"true", b"false", b"null") or _is_number(token, match.end() == len(text))):
            break
        before = token
        good = match.end()
    return text[:good] + _closing(opened)


def _ended(string: bytes) -> bytes:
    """A string that was cut, ended before a character that was cut with it."""
    return _HALF_A_PAIR.sub(b"", string.decode("utf-8", "ignore").encode()) + b'"'


def _is_number(token: bytes, last: bool) -> bool:
    """The last thing in a text may be half a number."""
    return token[-1:].isdigit() and not last


def _closing(opened: list[bytes]) -> bytes:
    return b"".join(_CLOSERS[opener] for opener in reversed(opened))


# -- small readers: anything may be anything --


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _str(value: object) -> str:
    return value if isinstance(value, str) else "" if value is None else _json(value)


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _is_tokens(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(entry, int) for entry in value)


def _text_part(text: str) -> Part:
    return {"type": "text", "content": text}


def _reasoning(entry: dict[str, Any]) -> list[Part]:
    text = _str(entry.get("reasoning_content") or entry.get("reasoning"))
    return [{"type": "reasoning", "content": text}] if text else []


def _calls(entry: dict[str, Any]) -> list[Any]:
    return _list(entry.get("tool_calls"))


def _tool_call(entry: dict[str, Any]) -> Part:
    function = _dict(entry.get("function"))
    return {
        "type": "tool_call",
        "id": _str(entry.get("id")),
        "name": _str(function.get("name")),
        "arguments": _str(function.get("arguments")),
    }


def _text_of(message: Message) -> str:
    parts = message["parts"]
    texts = [part["content"] for part in parts if part["type"] == "text"]
    calls = [f"{part['name']}({part['arguments']})" for part in parts if part["type"] == "tool_call"]
    return "\n".join(texts + calls)


def _last_text(messages: list[Message]) -> str:
    asked = [message for message in messages if message["role"] == "user"] or messages
    return _text_of(asked[-1]) if asked else ""
