"""JSON that was cut off gives what precedes the cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collectors.records.content.loose_json import close_json, number_of, parse_json, text_of
from tests.unit.collectors.content.said import json_values


@given(st.dictionaries(st.text(), json_values), st.booleans(), st.data())
def test_json_that_was_cut_off_gives_what_precedes_the_cut(value: dict[str, Any], ascii_only: bool, data: st.DataObject) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "ignore")
    cut = data.draw(st.integers(1, len(body)))
    closed = parse_json(body[:cut])
    assert isinstance(closed, dict), close_json(body[:cut])
    assert list(closed) == list(value)[: len(closed)], "members in order, none invented"
    for name in list(closed)[:-1]:
        assert closed[name] == value[name], "all but the last are whole"


@pytest.mark.parametrize(
    ("cut", "closed"),
    [
        (b'{"a": "x', {"a": "x"}),
        (b'{"a": "x\\', {"a": "x"}),
        (b'{"a": "x\\"', {"a": 'x"'}),
        (b'{"a": "x\\u00e', {"a": "x"}),
        (b'{"a": "x\\ud83d', {"a": "x"}),
        (b'{"a": "x\\ud83d\\ude00', {"a": "x\U0001f600"}),
        (b'{"a": "x\xf0\x9f', {"a": "x"}),
        (b'{"a": [1, 2', {"a": [1]}),
        (b'{"a": [1, 2]', {"a": [1, 2]}),
        (b'{"a": tru', {}),
        (b'{"a": 1, "b', {"a": 1}),
        (b'{"a": 1, "b"', {"a": 1}),
        (b'{"a": {"b":', {"a": {}}),
        (b"", None),
        (b"hello", None),
        (b"[1]]", [1]),
    ],
)
def test_cuts(cut: bytes, closed: object) -> None:
    assert parse_json(cut) == closed


@pytest.mark.parametrize(
    ("value", "number"), [(0.5, 0.5), (2, 2.0), (10**400, None), ("1", None), (None, None), ([1], None)], ids=str
)
def test_numbers(value: object, number: float | None) -> None:
    assert number_of(value) == number


def test_a_value_nested_too_deeply_to_be_written_is_a_note() -> None:
    """Whatever a reader's stack still took."""
    deep: list[Any] = []
    for _ in range(2000):
        deep = [deep]
    assert text_of(deep) == "[nested too deeply]"
