"""Whatever a kept answer's bytes are: to ask for another form of it never fails, and what comes of it can be read.

Streams and answers of real servers, with other values, bytes and events.
"""

from __future__ import annotations

import json
from typing import Any, Final

from hypothesis import given
from hypothesis import strategies as st

from proxy.cache.entry import Form
from proxy.cache.forms import as_form, split
from tests.fuzz.effort import effort
from tests.fuzz.mutation import edited, edits, odd_values
from tests.unit.cache.comparing import entry_of, head_of
from tests.unit.cache.test_forms import PAIRS

ANSWERS: Final = [(name, Form(int(form))) for name, pair in PAIRS.items() for form in pair["forms"]]
PIECES: Final = (b"data: [DONE]\n\n", b": waiting\n\n", b'data: {"error":{}}\n\n', b"null", b'"', b"}", b"\n\n")
HOW: Final = st.one_of(odd_values(), odd_values(), edits(PIECES))


@st.composite
def answers(draw: st.DrawFn) -> tuple[str, Form, bytes]:
    name, form = draw(st.sampled_from(ANSWERS))
    body: bytes = draw(edited(PAIRS[name]["forms"][str(int(form))].encode(), HOW, most=3))
    return name, form, draw(moved(body)) if body and draw(st.booleans()) else body


def moved(body: bytes) -> st.SearchStrategy[bytes]:
    """One of its events somewhere else, or twice."""
    events = split(body)
    place = st.integers(0, len(events) - 1)
    return st.builds(_move, st.just(events), place, place, st.booleans())


def _move(events: list[bytes], old: int, new: int, twice: bool) -> bytes:
    rest = events if twice else [*events[:old], *events[old + 1 :]]
    return b"".join([*rest[:new], events[old], *rest[new:]])


def readable(body: bytes, form: Form) -> Any:
    if form == Form.WHOLE:
        return json.loads(body)
    return [json.loads(data) for event in split(body) if (data := event.rpartition(b"data: ")[2].strip()) != b"[DONE]"]


@given(answers(), st.sampled_from(Form), st.sampled_from([b"", b"{}", b'{"tools":[{}]}', b'{"tool_choice":"required"}']))
@effort(300)
def test_another_form_of_anything(answer: tuple[str, Form, bytes], form: Form, request: bytes) -> None:
    name, old, body = answer
    usage = b'{"prompt_tokens":1,"total_tokens":3,"completion_tokens":2}' if old == Form.STREAM else b""
    made = as_form(entry_of(PAIRS[name]["operation"], old, head_of(old, len(body)), body, usage), form, request)
    if made is None or form == old:
        return
    assert readable(made.body, form)
    again = as_form(made, form, request)
    assert again is made
