"""The metrics' sink: exactly once across restarts, and what Prometheus reads is what the records say."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from collectors.records.metrics import HISTOGRAMS, Histogram, SpanCounts, View
from collectors.records.prometheus import Exposed, MetricsSink, SavedMetrics
from collectors.records.state import read_state, write_state
from proxy.exchange import INTER_TOKEN_BOUNDS_NS, Record
from proxy.journal import Batch, Checkpoint, Heartbeat
from tests.unit.collectors.made import DAY, make_hit, make_record, make_rejected, make_retried

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def batch(position: int, *records: Record) -> Batch:
    return Batch(list(records), Checkpoint({"segment": position}), False, [])


def registry(sink: MetricsSink, view: View | None = None) -> CollectorRegistry:
    made = CollectorRegistry()
    made.register(Exposed(sink, lambda: view or View(DAY, "0.1.0", ["gpu-0"], spans=SpanCounts(4, {"full": 8}))))
    return made


def scrape(sink: MetricsSink) -> Samples:
    text = generate_latest(registry(sink)).decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = {(sample.name.removeprefix("glasshouse_"), frozenset(sample.labels.items())): sample.value for sample in samples}
    assert len(found) == len(samples), "a series appears once"
    return found


def total(samples: Samples, name: str, **labels: str) -> float:
    return sum(value for (each, have), value in samples.items() if each == name and labels.items() <= dict(have).items())


def loaded(path: Path) -> MetricsSink:
    sink = MetricsSink(path / "collector-metrics")
    sink.load()
    return sink


def test_what_prometheus_reads_is_what_the_records_say(tmp_path: Path) -> None:
    records = [*(make_record(number) for number in range(20)), make_retried(20), make_rejected(21), make_rejected(22)]
    sink = loaded(tmp_path)
    sink.write(batch(1, *records))
    samples = scrape(sink)
    assert total(samples, "requests_total") == len(records)
    assert total(samples, "requests_total", outcome="client_error", status="404") == 2
    assert total(samples, "tokens_total", kind="input") == sum(record.input_tokens for record in records)
    assert total(samples, "tokens_total", kind="cached_input") == sum(record.cached_tokens for record in records)
    assert total(samples, "tokens_total", kind="output") == sum(record.output_tokens for record in records)
    assert math.isclose(total(samples, "cost_total", currency="USD"), sum(record.cost_nano for record in records) / 1e9)
    gaps = sum(sum(record.inter_token_counts) for record in records)
    assert total(samples, "inter_token_latency_seconds_count") == gaps == 80
    seconds = sum(record.inter_token_sum_ns for record in records) / 1e9
    assert math.isclose(total(samples, "inter_token_latency_seconds_sum"), seconds)
    assert total(samples, "request_duration_seconds_count") == len(records)
    assert math.isclose(total(samples, "request_duration_seconds_sum"), sum(record.ended_ns for record in records) / 1e9)
    assert total(samples, "attempts_total") == sum(len(record.attempts) for record in records)


@pytest.mark.parametrize("row", HISTOGRAMS, ids=lambda row: row.name)
def test_buckets_are_cumulative_and_end_in_the_count(tmp_path: Path, row: Histogram) -> None:
    sink = loaded(tmp_path)
    sink.write(batch(1, *(make_retried(number, ended_ns=10**number) for number in range(14)), make_record(20), make_hit(21)))
    text = generate_latest(registry(sink)).decode()
    (family,) = [family for family in text_string_to_metric_families(text) if family.name == row.name]
    series: dict[tuple[tuple[str, str], ...], list[Sample]] = {}
    for sample in family.samples:
        if sample.name.endswith("_bucket"):
            labels = tuple(item for item in sorted(sample.labels.items()) if item[0] != "le")
            series.setdefault(labels, []).append(sample)
    assert series
    for samples in series.values():
        values = [sample.value for sample in samples]
        assert values == sorted(values)
        bounds = [float(sample.labels["le"]) for sample in samples]
        assert bounds == [*(bound / 1e9 for bound in row.bounds), math.inf]
        assert values[-1] > 0


def test_each_gap_is_in_its_bucket(tmp_path: Path) -> None:
    sink = loaded(tmp_path)
    sink.write(batch(1, make_record()))
    samples = scrape(sink)
    below, at = (str(bound / 1e9) for bound in INTER_TOKEN_BOUNDS_NS if bound in (7_500_000, 10_000_000))
    assert total(samples, "inter_token_latency_seconds_bucket", le=below) == 0
    assert total(samples, "inter_token_latency_seconds_bucket", le=at) == 4


def test_openmetrics_has_the_traces_behind_the_buckets(tmp_path: Path) -> None:
    sink = loaded(tmp_path)
    sink.write(batch(1, make_record(7)))
    text = generate_openmetrics(registry(sink)).decode()  # type: ignore[no-untyped-call]
    families = {family.name: family for family in parse_openmetrics(text)}  # type: ignore[no-untyped-call]
    samples = families["glasshouse_time_to_first_token_seconds"].samples
    exemplars = [sample.exemplar for sample in samples if sample.exemplar is not None]
    assert [exemplar.labels for exemplar in exemplars] == [{"trace_id": make_record(7).trace_id.hex()}]
    assert exemplars[0].value == 0.04
    assert families["glasshouse_spans_dropped"].samples[0].value == 8


def test_labels_that_others_chose_are_escaped(tmp_path: Path) -> None:
    sink = loaded(tmp_path)
    nasty = 'a"b\\c\nd{}'
    sink.write(batch(1, make_record(model=nasty)))
    assert total(scrape(sink), "requests_total", model=nasty) == 1


# -- restarts --


def test_a_restart_neither_forgets_nor_counts_twice(tmp_path: Path) -> None:
    sink = loaded(tmp_path)
    sink.write(batch(1, make_record(1)))
    sink.save()
    sink.write(batch(2, make_record(2)))
    del sink  # killed: the second was taken and not saved
    again = MetricsSink(tmp_path / "collector-metrics")
    assert again.load() == Checkpoint({"segment": 1})
    again.write(batch(2, make_record(2)))
    assert total(scrape(again), "requests_total") == 2


def test_what_a_scrape_has_seen_is_on_disk(tmp_path: Path) -> None:
    sink = loaded(tmp_path)
    sink.write(batch(1, make_record(1)))
    seen = scrape(sink)
    del sink
    again = loaded(tmp_path)
    assert scrape(again) == seen
    assert again.load() == again.stored == Checkpoint({"segment": 1})


def test_a_scrape_before_anything_else_shows_what_was_kept(tmp_path: Path) -> None:
    sink = loaded(tmp_path)
    sink.write(batch(1, make_record(1)))
    seen = scrape(sink)
    assert scrape(MetricsSink(tmp_path / "collector-metrics")) == seen


def test_a_scrape_goes_on_when_the_disk_is_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sink = MetricsSink(tmp_path / "state" / "collector-metrics")
    sink.load()
    sink.write(batch(1, make_record(1)))
    assert total(scrape(sink), "requests_total") == 1
    assert "metrics not saved" in caplog.text
    assert sink.stored == Checkpoint(), "what isn't on disk may not be deleted from the journal"
    (tmp_path / "state").mkdir()
    sink.save()
    assert sink.stored == Checkpoint({"segment": 1})


def test_nothing_new_is_not_written(tmp_path: Path) -> None:
    sink = loaded(tmp_path)
    sink.save()
    sink.tend()
    assert not (tmp_path / "collector-metrics").exists()
    sink.write(batch(1, make_record(1)))
    sink.save()
    (tmp_path / "collector-metrics").unlink()
    sink.save()
    assert not (tmp_path / "collector-metrics").exists()


def test_tending_saves_at_once_and_then_not_for_a_while(tmp_path: Path) -> None:
    sink = loaded(tmp_path)
    sink.write(batch(1, make_record(1)))
    sink.tend()
    assert sink.stored == Checkpoint({"segment": 1})
    sink.write(batch(2, make_record(2)))
    sink.tend()
    assert sink.stored == Checkpoint({"segment": 1})
    sink.close(1.0)
    assert sink.stored == Checkpoint({"segment": 2})


@pytest.mark.parametrize("data", [b"", b"\xc1", b"half of", msgspec.msgpack.encode([1, 2, 3])])
def test_a_damaged_state_is_put_aside_and_counting_begins_anew(
    tmp_path: Path, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "collector-metrics").write_bytes(data)
    sink = MetricsSink(tmp_path / "collector-metrics")
    assert sink.load() == Checkpoint()
    assert (tmp_path / "collector-metrics.damaged").read_bytes() == data
    assert "put aside" in caplog.text


def test_a_metric_that_changed_its_shape_begins_at_zero_and_the_others_go_on(tmp_path: Path) -> None:
    sink = loaded(tmp_path)
    sink.write(batch(1, make_record(1)))
    sink.save()
    path = tmp_path / "collector-metrics"
    saved = read_state(path, SavedMetrics)
    assert saved is not None
    saved.series["glasshouse_time_to_first_token_seconds"].bounds[0] += 1
    saved.series["glasshouse_tokens_total"].labels[0] = "was_called_otherwise"
    saved.series["glasshouse_gone_total"] = saved.series["glasshouse_cost_total"]
    write_state(path, saved)
    samples = scrape(loaded(tmp_path))
    assert total(samples, "requests_total") == 1
    assert total(samples, "time_to_first_token_seconds_count") == 0
    assert total(samples, "tokens_total") == 0
    assert total(samples, "gone_total") == 0


def test_known_labels_survive_a_restart(tmp_path: Path) -> None:
    sink = loaded(tmp_path)
    sink.write(batch(1, make_record(1)))
    sink.save()
    again = loaded(tmp_path)
    again.write(batch(2, make_rejected(2, model="qwen3-8b")))
    assert total(scrape(again), "requests_total", model="qwen3-8b") == 2


# -- what workers say --


def beats(*words: tuple[str, int, int]) -> list[Heartbeat]:
    return [Heartbeat(name, unrecorded=lost, unaccepted={"invalid_api_key": refused}) for name, refused, lost in words]


def unaccepted(samples: Samples) -> tuple[float, float]:
    return total(samples, "unaccepted_requests_total", code="invalid_api_key"), total(samples, "unrecorded_total")


def test_workers_totals_are_counted_once_across_restarts_of_both(tmp_path: Path) -> None:
    sink = loaded(tmp_path)
    sink.observe_workers(beats(("a", 3, 0)))
    sink.observe_workers(beats(("a", 5, 1)))
    sink.observe_workers(beats(("a", 5, 1), ("b", 2, 0)))
    assert unaccepted(scrape(sink)) == (7, 1)
    again = loaded(tmp_path)
    again.observe_workers(beats(("a", 5, 1), ("b", 4, 0)))
    assert unaccepted(scrape(again)) == (9, 1)
    again.observe_workers(beats(("b", 4, 0)))
    again.observe_workers(beats(("b", 4, 0), ("c", 1, 0)))
    assert unaccepted(scrape(again)) == (10, 1)


def test_a_look_that_comes_late_counts_nothing_twice(tmp_path: Path) -> None:
    sink = loaded(tmp_path)
    for refused in (5, 6, 5, 6, 7):
        sink.observe_workers(beats(("a", refused, 0)))
    assert unaccepted(scrape(sink)) == (7, 0)


def test_before_the_state_is_loaded_nothing_is_counted(tmp_path: Path) -> None:
    sink = loaded(tmp_path)
    sink.observe_workers(beats(("a", 3, 0)))
    sink.save()
    early = MetricsSink(tmp_path / "collector-metrics")
    early.observe_workers(beats(("a", 3, 0)))
    early.load()
    early.observe_workers(beats(("a", 4, 0)))
    assert unaccepted(scrape(early)) == (4, 0)


def test_codes_are_bounded_too(tmp_path: Path) -> None:
    sink = loaded(tmp_path)
    sink.observe_workers([Heartbeat("a", unaccepted={f"code-{number}": 1 for number in range(3000)})])
    samples = scrape(sink)
    assert total(samples, "unaccepted_requests_total") == 3000
    assert total(samples, "unaccepted_requests_total", code="other") == 2000


def test_counters_without_labels_begin_at_zero(tmp_path: Path) -> None:
    assert ("unrecorded_total", frozenset[tuple[str, str]]()) in scrape(loaded(tmp_path))
