"""Token counts and engine timings, as engines write them and as they shouldn't."""

from __future__ import annotations

import json

import pytest

from proxy.exchange import EngineTimings, Record, UsageSource
from proxy.wire.usage import (
    Usage,
    read_engine_timings,
    read_message_usage,
    read_response_usage,
    read_usage,
    write_finish_reason,
    write_usage,
)


def blank() -> Record:
    return Record(b"i" * 16, b"t" * 16, 1, 0)


def read(said: object) -> tuple[int | None, int | None] | None:
    usage = read_usage(json.dumps(said).encode())
    return None if usage is None else (usage.prompt_tokens, usage.completion_tokens)


@pytest.mark.parametrize(
    ("said", "counts"),
    [
        ({"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}, (5, 2)),
        ({"prompt_tokens": 0, "completion_tokens": 0}, (0, 0)),
        ({"prompt_tokens": 5}, (5, None)),
        ({"completion_tokens": 2}, (None, 2)),
        ({"prompt_tokens": None, "completion_tokens": 2}, (None, 2)),
        ({"prompt_tokens": 5.0, "completion_tokens": 2.5}, (5, None)),
        ({"prompt_tokens": "5", "completion_tokens": 2}, (None, 2)),
        ({"prompt_tokens": True, "completion_tokens": 2}, (None, 2)),
        ({"prompt_tokens": [5], "completion_tokens": {}}, None),
        ({"prompt_tokens": -1, "completion_tokens": 2}, None),
        ({"prompt_tokens": -1.0, "completion_tokens": 2.0}, (None, 2)),
        ({"prompt_tokens": 2**63 - 1, "completion_tokens": 0}, (2**63 - 1, 0)),
        ({"prompt_tokens": 2**63, "completion_tokens": 2}, (None, 2)),
        ({"prompt_tokens": 1e300, "completion_tokens": 2}, (None, 2)),
        ({}, None),
        (None, None),
        ([], None),
        (7, None),
    ],
    ids=str,
)
def test_what_counts_and_what_is_unknown(said: object, counts: tuple[int | None, int | None] | None) -> None:  # failure 16
    assert read(said) == counts


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"nope",
        b'{"prompt_tokens":1e999}',
        b"\xff",
        b'{"\x80":1,"completion_tokens":true}',
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
    ],
)
def test_what_is_no_json_says_nothing(raw: bytes) -> None:
    assert read_usage(raw) is None
    assert read_response_usage(raw) is None
    assert read_message_usage(raw) is None
    assert read_engine_timings(raw, None) in (None, EngineTimings())


def test_a_zero_is_written() -> None:  # failure 16
    record = blank()
    write_usage(Usage(0, 0), record)
    assert (record.input_tokens, record.output_tokens, record.usage_source) == (0, 0, UsageSource.ENGINE)


def test_what_is_unknown_stays_as_it_was() -> None:
    record = blank()
    write_usage(Usage(5, 2), record)
    write_usage(Usage(None, 3), record)
    assert (record.input_tokens, record.output_tokens) == (5, 3)


@pytest.mark.parametrize(("cached", "kept"), [(3, 3), (0, 0), (None, 0), (-1, 0), (99, 5)])
def test_cached_input_is_part_of_input(cached: int | None, kept: int) -> None:
    record = blank()
    usage = read_usage(json.dumps({"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": cached}}).encode())
    assert usage is not None
    write_usage(usage, record)
    assert record.cached_tokens == kept


@pytest.mark.parametrize(("reasoning", "kept"), [(3, 3), (None, 0), (99, 5)])
def test_reasoning_is_part_of_output(reasoning: int | None, kept: int) -> None:
    record = blank()
    said = {"completion_tokens": 5, "completion_tokens_details": {"reasoning_tokens": reasoning}}
    usage = read_usage(json.dumps(said).encode())
    assert usage is not None
    write_usage(usage, record)
    assert record.reasoning_tokens == kept


def test_parts_are_never_more_than_the_whole_that_was_said_last() -> None:
    record = blank()
    said = {"prompt_tokens_details": {"cached_tokens": 4}, "completion_tokens_details": {"reasoning_tokens": 3}}
    usage = read_usage(json.dumps({"prompt_tokens": 5, "completion_tokens": 4, **said}).encode())
    assert usage is not None
    write_usage(usage, record)
    write_usage(Usage(2, 1), record)
    assert (record.input_tokens, record.cached_tokens, record.output_tokens, record.reasoning_tokens) == (2, 2, 1, 1)


def test_of_each_choice_one_finish_reason_is_kept_and_not_all_of_a_long_one() -> None:
    record = blank()
    record.choices = 2
    for reason in ("", None, "s" * 5000, "stop", "length"):
        write_finish_reason(reason, record)
    assert record.finish_reasons == ["s" * 64, "stop"]


def test_details_of_another_shape_are_unknown() -> None:
    said = {
        "prompt_tokens": 5,
        "completion_tokens": 2,
        "prompt_tokens_details": 7,
        "completion_tokens_details": {"reasoning_tokens": 1.0},
    }
    usage = read_usage(json.dumps(said).encode())
    assert usage is not None
    record = blank()
    write_usage(usage, record)
    assert (record.input_tokens, record.cached_tokens, record.reasoning_tokens) == (5, 0, 1)


def test_vllms_timings() -> None:
    metrics = (
        b'{"time_to_first_token_ms":30.5,"generation_time_ms":31.0,"queue_time_ms":0.5,"mean_itl_ms":4.0,"tokens_per_second":32}'
    )
    assert read_engine_timings(metrics, b"") == EngineTimings(0.5, 30.5, 30.5, 31.0, 4.0)


def test_llama_cpps_timings() -> None:
    timings = b'{"cache_n":36,"prompt_n":1,"prompt_ms":9.086,"predicted_ms":18.0,"predicted_per_token_ms":9.0}'
    assert read_engine_timings(b"", timings) == EngineTimings(prefill_ms=9.086, decode_ms=18.0, mean_inter_token_ms=9.0)


@pytest.mark.parametrize("raw", [b"", b"null", b"[]", b"7", b'{"queue_time_ms":"x"}', b"{", None])
def test_timings_that_are_none(raw: bytes | None) -> None:
    assert read_engine_timings(raw, None) is None
    assert read_engine_timings(None, raw if raw != b'{"queue_time_ms":"x"}' else b'{"prompt_ms":"x"}') is None


def test_prefill_begins_when_the_request_is_scheduled() -> None:
    timings = read_engine_timings(b'{"time_to_first_token_ms":1.0,"queue_time_ms":2.0}', None)
    assert timings is not None
    assert (timings.queue_ms, timings.prefill_ms) == (2.0, 1.0)
