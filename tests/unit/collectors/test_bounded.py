"""What was said, cut to what a trace may hold."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectors.records.bounded import MAX_TEXT, bounded_json, cut


def message(content: Any) -> dict[str, Any]:
    return {"role": "user", "parts": [{"type": "text", "content": content}]}


LONG: dict[str, list[dict[str, Any]]] = {
    "one text": [message("é" * 5_000_000)],
    "escapes": [message("\0" * 5_000_000)],
    "many parts": [{"role": "user", "parts": [{"type": "text", "content": "x" * 5000}] * 1000}],
    "many messages": [message(str(number)) for number in range(100_000)],
}


# failure 63
@pytest.mark.parametrize("entries", LONG)
def test_a_prompt_of_megabytes_is_cut_and_still_json(entries: str) -> None:
    text = bounded_json(LONG[entries])
    assert text is not None
    assert len(text) <= MAX_TEXT
    assert json.loads(text)


def test_of_many_messages_the_last_are_told() -> None:
    told = json.loads(bounded_json(LONG["many messages"]) or "")
    assert told == LONG["many messages"][-len(told) :]
    assert len(told) > 1000


def test_a_cut_is_said() -> None:
    assert cut("abcdef", 4) == "abcd… [6 characters]"
    assert cut("abcd", 4) == "abcd"


def test_what_is_short_stays_as_it_is() -> None:
    entries = [message("hi"), {"role": "assistant", "parts": [], "temperature": 0.5, "logprobs": None, "n": 1}]
    assert json.loads(bounded_json(entries) or "") == entries


@pytest.mark.parametrize("size", [1, 5_000_000])
def test_what_is_nested_too_deeply_is_left_out(size: int) -> None:
    nested: Any = "x" * size
    for _ in range(5000):
        nested = {"a": nested}
    assert bounded_json([nested]) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=200),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
    max_leaves=30,
)


@settings(deadline=None)
@given(st.lists(json_values, max_size=10), st.integers(2, 400))
def test_it_is_json_of_at_most_so_many_characters(entries: list[Any], limit: int) -> None:
    text = bounded_json(entries, limit)
    assert text is not None
    assert len(text) <= limit
    assert len(json.loads(text)) <= len(entries)
