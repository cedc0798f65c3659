"""What vLLM's metrics tell of its load: real bytes, the names of older versions, and whatever else may stand there."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from collectors.engines.vllm import read
from proxy.engines import EngineLoad

FIXTURES: Final = Path(__file__).parents[2] / "fixtures"
IDLE: Final = (FIXTURES / "vllm-0.32.0" / "metrics.body").read_bytes()
BUSY: Final = (FIXTURES / "vllm-0.32.0" / "two" / "metrics_busy.body").read_bytes()

V0_8: Final = b"""\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="m"} 5.0
vllm:num_requests_waiting{model_name="m"} 2.0
vllm:gpu_cache_usage_perc{model_name="m"} 0.75
vllm:gpu_prefix_cache_queries_total{model_name="m"} 400.0
vllm:gpu_prefix_cache_hits_total{model_name="m"} 300.0
vllm:prompt_tokens_total{model_name="m"} 410.0
vllm:generation_tokens_total{model_name="m"} 77.0
"""
"""The names of 0.8, as its `v1/metrics/loggers.py` has them; not captured."""

V0_10: Final = b"""\
process_start_time_seconds 1.75e+09
vllm:num_requests_running{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting{engine="0",model_name="m"} 0.0
vllm:gpu_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:gpu_prefix_cache_queries_total{engine="0",model_name="m"} 32.0
vllm:gpu_prefix_cache_hits_total{engine="0",model_name="m"} 16.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 32.0
vllm:prefix_cache_queries_created{engine="0",model_name="m"} 1.7537953e+09
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 16.0
vllm:prompt_tokens_total{engine="0",model_name="m"} 32.0
vllm:generation_tokens_total{engine="0",model_name="m"} 8.0
"""
"""0.9.2 to 0.11 have both names; not captured."""


def load(text: bytes) -> EngineLoad:
    found = read(text)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (IDLE, EngineLoad(0, 0, 0.0, 816, 1125, 1795144015.44, 814, 0)),
        (BUSY, EngineLoad(2, 1, 0.0020618556701030855, 185, 289, 1795144559.0, 185, 64)),
        (V0_8, EngineLoad(5, 2, 0.75, 410, 77, 0.0, 400, 300)),
        (V0_10, EngineLoad(1, 0, 0.5, 32, 8, 1.75e9, 32, 16)),
    ],
    ids=["0.32 idle", "0.32 busy", "0.8", "0.10"],
)
def test_what_each_version_tells(text: bytes, expected: EngineLoad) -> None:
    assert read(text) == expected


@pytest.mark.parametrize("text", [IDLE, BUSY], ids=["idle", "busy"])
def test_a_whole_parser_finds_the_same(text: bytes) -> None:
    samples: Mapping[str, float] = {
        sample.name: sample.value for family in text_string_to_metric_families(text.decode()) for sample in family.samples
    }
    assert read(text) == EngineLoad(
        int(samples["vllm:num_requests_running"]),
        int(samples["vllm:num_requests_waiting"]),
        samples["vllm:kv_cache_usage_perc"],
        int(samples["vllm:prompt_tokens_total"]),
        int(samples["vllm:generation_tokens_total"]),
        samples["process_start_time_seconds"],
        int(samples["vllm:prefix_cache_queries_total"]),
        int(samples["vllm:prefix_cache_hits_total"]),
    )


def test_engines_behind_one_address_are_added_up() -> None:
    second = b"\n".join(
        line.replace(b'engine="0"', b'engine="1"') for line in BUSY.splitlines() if not line.startswith(b"process")
    )
    both = b"\n".join(sorted((BUSY + second + b"\n").splitlines())) + b"\n"  # as families: all series of a name together
    one, two = load(BUSY), load(both)
    assert two == EngineLoad(4, 2, one.kv_usage, 370, 2 * one.generation_tokens, one.started_unix_s, 370, 128)


def test_their_caches_are_one_cache() -> None:
    text = BUSY.replace(
        b'vllm:kv_cache_usage_perc{engine="0",model_name="smollm2"} 0.0020618556701030855',
        b'vllm:kv_cache_usage_perc{engine="0",model_name="smollm2"} 1.0\n'
        b'vllm:kv_cache_usage_perc{engine="1",model_name="smollm2"} 0.5',
    )
    assert load(text).kv_usage == 0.75


@pytest.mark.parametrize("said", [b"NaN", b"+Inf", b"-Inf", b"-1", b"1e300", b"x", b"", b"}", b"\xff"])
def test_a_value_that_counts_nothing_is_passed_over(said: bytes) -> None:
    text = V0_8.replace(b"} 410.0", b"} " + said)
    assert load(text) == msgspec.structs.replace(load(V0_8), prompt_tokens=0)
    both = text.replace(b"vllm:generation", b'vllm:prompt_tokens_total{model_name="other"} 6\nvllm:generation')
    assert load(both).prompt_tokens == 6


def test_a_cache_is_never_more_than_full() -> None:
    assert load(V0_8.replace(b"0.75", b"75.0")).kv_usage == 1.0


@pytest.mark.parametrize(
    "name", [b"a} 7 {b", b"a b", b"vllm:num_requests_running 9", b'a\\"b', b"a\\nvllm:num_requests_running 9"]
)
def test_a_models_name_is_not_read(name: bytes) -> None:
    text = V0_8.replace(b'model_name="m"', b'model_name="' + name + b'"')
    assert load(text) == load(V0_8)


def test_a_moment_behind_a_value_is_not_read() -> None:
    assert load(V0_8.replace(b"} 5.0", b"} 5.0 1750000000000")) == load(V0_8)


def test_series_need_no_labels() -> None:
    assert load(V0_8.replace(b'{model_name="m"}', b"")) == load(V0_8)


def test_half_a_line_is_none() -> None:
    assert load(V0_8.removesuffix(b"7.0\n")) == msgspec.structs.replace(load(V0_8), generation_tokens=0)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\n",
        b"<html>vllm:num_requests_running</html>",
        b"\n".join(line for line in IDLE.splitlines() if b"vllm:" not in line) + b"\n",  # --disable-log-stats
        (FIXTURES / "vllm-0.32.0" / "models.body").read_bytes(),
        b"llamacpp:requests_processing 0\nllamacpp:requests_deferred 0\n",
    ],
    ids=["empty", "a line", "a page", "no statistics", "models", "llama.cpp"],
)
def test_what_tells_no_load(text: bytes) -> None:
    assert read(text) is None


def test_nothing_that_may_stand_there_is_too_much() -> None:
    """Bytes of real metrics, mangled: whatever is read of it is a load, and can be written."""
    dice = random.Random(6)
    lines = BUSY.splitlines(keepends=True)
    for _ in range(300):
        mangled = bytearray(b"".join(dice.sample(lines[:130], 60)))
        for _ in range(dice.randrange(60)):
            mangled[dice.randrange(len(mangled))] = dice.choice(b'0123456789eE+-{}" \n\x00\xff')
        found = read(bytes(mangled))
        if found is not None:
            msgspec.msgpack.encode(found)
            assert 0 <= found.kv_usage <= 1
            assert math.isfinite(found.started_unix_s)
            assert min(found.running, found.waiting, found.prompt_tokens, found.generation_tokens) >= 0
