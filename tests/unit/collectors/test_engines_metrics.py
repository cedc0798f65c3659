"""The engines' rows of the table of metrics."""

from __future__ import annotations

from typing import Final

from collectors.engines.totals import COUNTED
from collectors.records.metrics import GAUGES, EngineView, View
from proxy.engines import EngineLoad

COMPUTED: Final = dict(zip(COUNTED, (100, 20, 90, 45), strict=True))
TELLS: Final = EngineView("gpu-0", EngineLoad(3, 1, 0.5, 7, 7, 1_800_000_000.5, 7, 7), COMPUTED, {"ok": 9, "refused": 1})
SILENT: Final = EngineView("gpu-1", None, COMPUTED, {"timeout": 2})


def samples(*engines: EngineView) -> dict[str, dict[tuple[str, ...], float]]:
    view = View(0, "", engines=engines)
    return {row.name.removeprefix("glasshouse_engine_"): dict(row.read(view)) for row in GAUGES if "_engine_" in row.name}


def test_an_engine_says() -> None:
    told = samples(TELLS)
    assert told["requests_running"] == {("gpu-0",): 3}
    assert told["requests_waiting"] == {("gpu-0",): 1}
    assert told["kv_cache_usage_ratio"] == {("gpu-0",): 0.5}
    assert told["start_timestamp_seconds"] == {("gpu-0",): 1_800_000_000.5}
    assert told["tokens_total"] == {("gpu-0", "input"): 100, ("gpu-0", "output"): 20}
    assert told["prefix_cache_queries_total"] == {("gpu-0",): 90}
    assert told["prefix_cache_hits_total"] == {("gpu-0",): 45}
    assert told["scrapes_total"] == {("gpu-0", "ok"): 9, ("gpu-0", "refused"): 1}


def test_of_a_silent_one_there_is_nothing_now_and_what_was_counted() -> None:
    told = samples(SILENT)
    for gauge in ("requests_running", "requests_waiting", "kv_cache_usage_ratio", "start_timestamp_seconds"):
        assert not told[gauge]
    assert told["tokens_total"] == {("gpu-1", "input"): 100, ("gpu-1", "output"): 20}
    assert told["scrapes_total"] == {("gpu-1", "timeout"): 2}


def test_one_that_does_not_say_when_it_was_started() -> None:
    assert not samples(EngineView("gpu-0", EngineLoad(3), COMPUTED, {}))["start_timestamp_seconds"]


def test_no_engines() -> None:
    assert not any(samples().values())
