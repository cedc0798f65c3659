"""What is set aside before a request has run."""

from __future__ import annotations

import base64
import json

import pytest

from proxy.admission.estimate import costs_of, input_tokens, output_tokens
from proxy.exchange import Record
from proxy.snapshot import Model


def record(**facts: object) -> Record:
    return Record(b"i" * 16, b"t" * 16, 1, 0, **facts)  # type: ignore[arg-type]


def test_a_prompt_is_a_quarter_of_its_bytes_and_at_most_what_the_model_can_read() -> None:
    assert input_tokens(b"x" * 4000, Model("m")) == 1001
    assert input_tokens(b"x" * 4000, Model("m", context_tokens=512)) == 512
    assert input_tokens(b"", Model("m")) == 1


@pytest.mark.parametrize("files", [1, 3])
def test_a_picture_is_not_a_book(files: int) -> None:
    data = base64.b64encode(bytes(300_000)).decode()
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    body = json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 4000}, *[picture] * files]}]})
    assert 1000 * (files + 1) < input_tokens(body.encode(), Model("m")) < 1000 * (files + 1) + 300


def test_a_picture_that_never_ends_is_counted_as_it_is() -> None:
    assert input_tokens(b'{"a":"data:image/png;base64,' + b"A" * 40_000, Model("m")) > 10_000


def test_an_answer_is_as_long_as_was_allowed_or_as_is_assumed() -> None:
    model = Model("m", assumed_output_tokens=300)
    assert output_tokens(record(max_tokens=50), model, 10) == 50
    assert output_tokens(record(max_tokens=0), model, 10) == 0
    assert output_tokens(record(), model, 10) == 300
    assert output_tokens(record(max_tokens=50, choices=4), model, 10) == 200


def test_an_answer_fits_into_the_model_beside_its_prompt() -> None:
    model = Model("m", context_tokens=1000)
    assert output_tokens(record(max_tokens=5000), model, 900) == 100
    assert output_tokens(record(max_tokens=5000), model, 1000) == 0


def test_costs_are_rounded_like_those_of_a_row() -> None:
    assert costs_of(3, 5, Model("m", input_pico=100_500, output_pico=400_000), 0) == (2302, 8, 0)
