"""What two answers in the same form have in common: everything but ids, times, and how the text is cut."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from typing import Any, Final

import msgspec

from proxy.cache.entry import Entry, Form
from proxy.cache.forms import split

_ID: Final = re.compile(
    r'"(id|item_id|call_id|created|created_at|signature)": '
    r'("(?:chatcmpl|cmpl|resp|msg|rs|fc|call)[-_][^"]*"|"[0-9a-f]{32}"|[\d.]+)'
)
_METRIC: Final = re.compile(r'"(\w+_ms|tokens_per_second)": [\d.e-]+')
_METRICS: Final = re.compile(rb'(,"metrics":)\{(?:[^{}]|\{[^{}]*\})*\}')
_TEXTS: Final = ("content", "reasoning", "text", "thinking", "partial_json", "arguments", "delta")
_LISTS: Final = ("content", "token_ids", "text_offset", "token_logprobs", "tokens", "top_logprobs")


def entry_of(operation: str, form: Form, head: bytes, body: bytes, usage: bytes = b"") -> Entry:
    return Entry(
        operation=operation,
        model="smollm2",
        form=form,
        head=head,
        sized=form == Form.WHOLE,
        body=body,
        made_unix_ns=1,
        expires_unix_ns=2,
        key_id="key",
        team="",
        user="",
        user_name="",
        id=b"i" * 16,
        trace_id=b"t" * 16,
        span_id=3,
        took_ns=4,
        usage=usage,
    )


def head_of(form: Form, length: int = 0) -> bytes:
    """As a vLLM's."""
    start = b"HTTP/1.1 200 OK\r\ndate: Fri, 20 Nov 2026 03:08:50 GMT\r\nserver: uvicorn\r\n"
    if form == Form.WHOLE:
        return start + b"content-length: %d\r\ncontent-type: application/json\r\nvary: Origin" % length
    return start + b"content-type: text/event-stream; charset=utf-8\r\nvary: Origin"


def without_metrics(entry: Entry) -> Entry:
    body = _METRICS.sub(b"" if entry.streaming else rb"\1null", entry.body)
    return msgspec.structs.replace(entry, body=body)


def told(entry: Entry) -> Any:
    """All that an answer tells, the order of its members included; to be compared with another's."""
    return _stream(entry.body) if entry.streaming else anonymous(json.loads(entry.body))


def anonymous(data: Any) -> str:
    """JSON without ids and times."""
    return _METRIC.sub(r'"\1": *', _ID.sub(r'"\1": *', json.dumps(data, ensure_ascii=False)))


def _stream(body: bytes) -> Any:
    """(the text of each of its places, the tokens there, the kinds of events at each place in their order)."""
    texts: dict[str, str] = {}
    lists: dict[str, list[Any]] = {}
    kinds: dict[str, list[str]] = {}
    for event in split(body):
        name, _, data = event.decode().strip().rpartition("data: ")
        if data == "[DONE]":
            kinds.setdefault("", []).append(data)
            continue
        said = json.loads(data)
        said.pop("sequence_number", None)
        for part in _parts(said):
            place = _place(part)
            silent = _without_nothing(part)
            _take(part, place, texts, lists)
            known = kinds.setdefault(place, [])
            if not silent and (kind := name + anonymous(part)) not in known[-1:]:
                known.append(kind)
    return texts, lists, kinds


def _parts(said: dict[str, Any]) -> list[dict[str, Any]]:
    """A chunk that ends a choice may bring text too, or it comes apart: how much goes into one is the machine's affair."""
    choice = (said.get("choices") or [{}])[0]
    if not choice.get("finish_reason") or not (choice.get("text") or any(choice.get("delta", {}).values())):
        return [said]
    before, end = deepcopy(said), deepcopy(said)
    before.pop("system_fingerprint", None)
    before["choices"][0]["finish_reason"] = None
    if "delta" in choice:
        del before["choices"][0]["stop_reason"]
    else:
        before["choices"][0]["stop_reason"] = None
    if "delta" in choice:
        end["choices"][0]["delta"] = {}
    else:
        end["choices"][0]["text"] = ""
    for holder in (end["choices"][0], end["choices"][0]["logprobs"] or {}):
        holder |= {name: [] for name, value in holder.items() if isinstance(value, list)}
    return [before, end]


def _place(said: dict[str, Any]) -> str:
    if choices := said.get("choices"):
        return f"choice {choices[0]['index']}"
    if "output_index" in said or "index" in said:
        return f"item {said.get('output_index', said.get('index'))}"
    return ""


def _without_nothing(said: dict[str, Any]) -> bool:
    """Take out what a delta says is null, and whether nothing is said at the end: those are the parser's affairs. True: it is a
    chunk that is there for its tokens, and brought no text."""
    for choice in said.get("choices") or ():
        if "delta" in choice:
            choice["delta"] = {name: value for name, value in choice["delta"].items() if value is not None}
            if not choice["delta"] and choice["finish_reason"] is None:
                return True
            if choice["finish_reason"] is not None and not choice["delta"]:
                choice["delta"] = {"content": ""}
    return False


def _take(said: Any, place: str, texts: dict[str, str], lists: dict[str, list[Any]]) -> None:
    """Take out of an event what may be cut anywhere."""
    holders = [said, said.get("delta")]
    for choice in said.get("choices") or ():
        holders += [choice, choice.get("delta"), choice.get("logprobs")]
        holders += [call.get("function") for call in (choice.get("delta") or {}).get("tool_calls") or ()]
    ends = str(said.get("type", "")).endswith((".done", ".added"))
    for holder in holders:
        for name in [name for name in holder if not ends] if isinstance(holder, dict) else ():
            where = f"{place} {name}"
            if isinstance(holder[name], str) and name in _TEXTS:
                texts[where] = texts.get(where, "") + holder[name]
                holder[name] = "..."
            elif isinstance(holder[name], list) and name in _LISTS:
                lists.setdefault(where, []).extend(holder[name])
                holder[name] = ["..."]
