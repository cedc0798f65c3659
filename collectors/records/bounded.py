"""What was said, in as many characters as a trace may hold. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

MAX_TEXT = 128 * 1024
"""Characters of an attribute that holds what was said. A trace repeats it a few times and stays below 4 MiB all the same, which
is what OTLP receivers take by default."""

_SHORTEST = 64
"""Texts within a list are cut to no less."""


def cut(text: str, limit: int = MAX_TEXT) -> str:
    """`text`, or its first `limit` characters and a note of how many there were."""
    return text if len(text) <= limit else f"{text[:limit]}… [{len(text)} characters]"


def bounded_json(entries: Sequence[object], limit: int = MAX_TEXT) -> str | None:
    """A JSON list of at most `limit` characters: long texts in it are cut, and if that isn't enough the first entries go. None if
    something in it is nested too deeply to be written."""
    try:
        text, part = _dumped(entries), limit
        while len(text) > limit and part > _SHORTEST:
            part //= 4
            entries = [_cut_within(entry, part) for entry in entries]
            text = _dumped(entries)
        return text if len(text) <= limit else _last_of(entries, limit)
    except RecursionError:
        return None


def _cut_within(value: Any, limit: int) -> Any:
    if isinstance(value, str):
        return cut(value, limit)
    if isinstance(value, list):
        return [_cut_within(each, limit) for each in value]
    if isinstance(value, dict):
        return {key: _cut_within(each, limit) for key, each in value.items()}
    return value


def _last_of(entries: Sequence[object], limit: int) -> str:
    kept: list[str] = []
    for entry in reversed(entries):
        limit -= len(text := _dumped(entry)) + 2  # what stands between them or around them
        if limit < 0:
            break
        kept.append(text)
    return f"[{', '.join(reversed(kept))}]"


def _dumped(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
