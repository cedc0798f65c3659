"""The table of metrics: what each row makes of a record, and that the table is what the README says."""

from __future__ import annotations

import random
import re
import string
from itertools import pairwise
from typing import Any

import pytest

from collectors.records.metrics import (
    COUNTERS,
    GAUGES,
    HISTOGRAMS,
    NANO,
    SYSTEM_KEY,
    WAIT_BOUNDS,
    WORKER_COUNTERS,
    Counter,
    Histogram,
    Labeller,
    SinkView,
    SpanCounts,
    View,
)
from collectors.records.series import MAX_VALUES, LabelBounds, Series
from collectors.reference import README, written_into
from proxy.errors import Outcome
from proxy.exchange import Attempt, Record
from proxy.journal import BackendBeat, Heartbeat
from proxy.last_reload import LastReload
from tests.unit.collectors.made import DAY, MS, make_coalesced, make_hit, make_queued, make_record, make_rejected, make_retried

ROWS: list[Counter | Histogram] = [*COUNTERS, *HISTOGRAMS]


def count(*records: Record, models: tuple[str, ...] = ()) -> dict[str, dict[tuple[str, ...], list[int]]]:
    """What all rows make of some records."""
    labeller = Labeller(LabelBounds(), models)
    series = {row.name: Series(row.labels) for row in COUNTERS}
    series |= {row.name: Series(row.labels, row.bounds) for row in HISTOGRAMS}
    for record in records:
        seen = labeller.see(record)
        for row in ROWS:
            row.write(seen, series[row.name])
    return {name.removeprefix("glasshouse_"): each.rows for name, each in series.items() if each.rows}


def observed(rows: dict[tuple[str, ...], list[int]]) -> dict[tuple[str, ...], tuple[int, int]]:
    """Histograms as (count, sum)."""
    return {labels: (sum(row[:-1]), row[-1]) for labels, row in rows.items()}


def test_a_stream_that_went_well() -> None:
    counted = count(make_record())
    assert counted.pop("requests_total") == {("chat", "qwen3-8b", "gpu-0", "search", "ok", "200"): [1]}
    assert counted.pop("tokens_total") == {
        ("qwen3-8b", "search", "input"): [600],
        ("qwen3-8b", "search", "cached_input"): [400],
        ("qwen3-8b", "search", "output"): [5],
        ("qwen3-8b", "search", "reasoning"): [2],
    }
    assert counted.pop("cost_total") == {("qwen3-8b", "search", "USD"): [30_000]}
    assert counted.pop("team_tokens_total") == {("none", "input"): [600], ("none", "output"): [5]}
    assert counted.pop("team_cost_total") == {("none", "USD"): [30_000]}
    assert counted.pop("requests_by_usage_source_total") == {("qwen3-8b", "engine"): [1]}
    assert counted.pop("attempts_total") == {("gpu-0", "ok"): [1]}
    where = ("chat", "qwen3-8b", "gpu-0")
    assert observed(counted.pop("request_duration_seconds")) == {(*where, "true", "ok"): (1, 80 * MS + 60_000)}
    assert observed(counted.pop("time_to_first_token_seconds")) == {where: (1, 40 * MS)}
    assert observed(counted.pop("time_to_first_content_seconds")) == {where: (1, 40 * MS)}
    assert observed(counted.pop("inter_token_latency_seconds")) == {("qwen3-8b", "gpu-0"): (4, 40 * MS)}
    assert observed(counted.pop("proxy_added_seconds")) == {("chat",): (1, make_record().proxy_added_ns())}
    assert observed(counted.pop("connect_seconds")) == {("gpu-0",): (1, 210_000)}
    assert counted.pop("routing_decisions_total") == {("qwen3-8b", "gpu-0", "auto.prefix"): [1]}
    assert observed(counted.pop("request_wait_seconds")) == {("qwen3-8b",): (1, 0)}
    assert counted.pop("backend_tokens_total") == {
        ("qwen3-8b", "gpu-0", "input"): [600],
        ("qwen3-8b", "gpu-0", "cached_input"): [400],
        ("qwen3-8b", "gpu-0", "output"): [5],
    }
    assert counted == {}


def test_a_request_that_reached_no_engine() -> None:
    counted = count(make_rejected())
    assert counted.pop("requests_total") == {("chat", "other", "none", "search", "client_error", "404"): [1]}
    assert counted.pop("request_errors_total") == {("chat", "client_error", "model_not_found"): [1]}
    duration = observed(counted.pop("request_duration_seconds"))
    assert duration == {("chat", "other", "none", "false", "client_error"): (1, 90_000)}
    assert counted == {}


def test_what_was_heard_is_counted_by_the_second() -> None:
    heard = [make_record(number, model="whisper", audio_seconds=seconds) for number, seconds in enumerate((3, 40, 0))]
    assert count(*heard)["audio_seconds_total"] == {("whisper", "search"): [43]}
    assert "audio_seconds_total" not in count(make_record()), "nothing is said of those who never spoke"


def test_a_team_uses_what_its_keys_use() -> None:
    said = [("alice", "research"), ("bob", "research"), ("carol", "")]
    counted = count(*(make_record(number, key_name=key, team=team) for number, (key, team) in enumerate(said)))
    assert counted["team_tokens_total"] == {
        ("research", "input"): [1200],
        ("research", "output"): [10],
        ("none", "input"): [600],
        ("none", "output"): [5],
    }
    assert counted["team_cost_total"] == {("research", "USD"): [60_000], ("none", "USD"): [30_000]}


def test_what_a_limit_refused_is_told_by_whose_it_is() -> None:
    refused = ["key.requests_per_minute", "team.budget", "team.budget", "everyone.concurrent_requests"]
    limited = {"outcome": Outcome.REJECTED, "status": 429, "error_code": "rate_limit_exceeded"}
    records = [make_rejected(number, refused_by=by, **limited) for number, by in enumerate(refused)]
    assert count(*records, make_record())["limit_rejections_total"] == {
        ("key", "requests_per_minute", "search"): [1],
        ("team", "budget", "search"): [2],
        ("everyone", "concurrent_requests", "search"): [1],
    }


def test_who_went_on_over_a_soft_budget_is_told() -> None:
    counted = count(*(make_record(number, over_budget=level) for number, level in enumerate(("team", "", "team", "key"))))
    assert counted["over_soft_budget_requests_total"] == {("team", "search"): [2], ("key", "search"): [1]}


def test_a_retry_is_two_attempts_of_one_request_and_the_engine_has_its_say() -> None:
    counted = count(make_retried())
    assert counted["requests_total"] == {("chat", "qwen3-8b", "gpu-1", "search", "ok", "200"): [1]}
    assert counted["attempts_total"] == {("gpu-0", "upstream_unreachable"): [1], ("gpu-1", "ok"): [1]}
    where = ("qwen3-8b", "gpu-1")
    assert counted["retries_total"] == {("gpu-0", "upstream_unreachable"): [1]}
    assert observed(counted["engine_queue_seconds"]) == {where: (1, 1_500_000)}
    assert observed(counted["engine_prefill_seconds"]) == {where: (1, 28_500_000)}
    assert observed(counted["engine_decode_seconds"]) == {where: (1, 40 * MS)}
    assert "inter_token_latency_seconds" not in counted


@pytest.mark.parametrize(
    ("failed", "why"),
    [
        (Attempt("gpu-0", status=503, ended_ns=5), "http_503"),
        (Attempt("gpu-0", status=200, ended_ns=5, error="engine_overloaded"), "engine_overloaded"),
        (Attempt("gpu-0"), "unfinished"),
    ],
)
def test_a_retry_says_what_it_was_for(failed: Attempt, why: str) -> None:
    answered = Attempt("gpu-1", status=200, ended_ns=9)
    assert count(make_record(attempts=[failed, failed, answered]))["retries_total"] == {("gpu-0", why): [2]}
    assert "retries_total" not in count(make_record(attempts=[failed])), "nobody tried again"


def test_where_requests_went_and_why() -> None:
    whys = ["auto.prefix", "auto.load", "only", "auto.prefix", ""]
    counted = count(*(make_record(number, routed_by=why) for number, why in enumerate(whys)))
    assert counted["routing_decisions_total"] == {
        ("qwen3-8b", "gpu-0", "auto.prefix"): [2],
        ("qwen3-8b", "gpu-0", "auto.load"): [1],
        ("qwen3-8b", "gpu-0", "only"): [1],
    }


def test_waiting_for_a_backend_is_measured_and_counted() -> None:
    counted = count(make_record(0), make_queued(1, 3), make_queued(2, 700))
    assert observed(counted["request_wait_seconds"]) == {("qwen3-8b",): (3, 703 * MS)}
    assert dict(zip(WAIT_BOUNDS, counted["request_wait_seconds"]["qwen3-8b",], strict=False))[0] == 1, (
        "those that had not to wait"
    )
    assert counted["queued_requests_total"] == {("qwen3-8b",): [2]}


def test_who_waited_in_vain_waited_for_a_model_that_there_is() -> None:
    counted = count(make_rejected(model="small", outcome=Outcome.REJECTED, queued_ns=60_000, ended_ns=60_000 * MS))
    assert observed(counted["request_wait_seconds"]) == {("small",): (1, 60_000 * MS - 60_000)}
    assert counted["queued_requests_total"] == {("small",): [1]}


def test_how_long_a_crashed_request_waited_is_not_known() -> None:
    crashed = make_rejected(queued_ns=60_000, outcome=Outcome.CRASHED, ended_ns=0)
    assert "request_wait_seconds" not in count(crashed)


def test_what_never_needed_a_backend_waited_for_none() -> None:
    assert "request_wait_seconds" not in count(make_rejected(), make_record(1, operation="usage", routed_by=""))


def test_another_model_that_answered_is_told_with_the_one_that_was_asked_for() -> None:
    counted = count(make_record(1, fallback_of="qwen3-32b"), make_record(2))
    assert counted["fallbacks_total"] == {("qwen3-8b", "qwen3-32b"): [1]}


def test_a_probe_is_the_system_s_and_no_caller_s_error() -> None:
    failed = {"outcome": Outcome.UPSTREAM_ERROR, "status": 502, "error_code": "upstream_unreachable"}
    asked = {"input_tokens": 2, "cached_tokens": 0, "output_tokens": 1, "reasoning_tokens": 0}
    counted = count(make_record(1, key_id=SYSTEM_KEY, key_name=SYSTEM_KEY, **failed, **asked), make_record(2, **failed))
    assert counted["request_errors_total"] == {("chat", "upstream_error", "upstream_unreachable"): [1]}
    assert {labels[3]: row for labels, row in counted["requests_total"].items()} == {"system": [1], "search": [1]}
    tokens = {labels[2]: row for labels, row in counted["tokens_total"].items() if labels[1] == "system"}
    assert tokens == {"input": [2], "output": [1]}


def test_a_crashed_request_has_tokens_and_no_duration() -> None:
    crashed = make_record(outcome=Outcome.CRASHED, error_code="worker_crashed", status=0)
    crashed.attempts[0].ended_ns = crashed.attempts[0].status = 0
    counted = count(crashed)
    assert counted["requests_total"] == {("chat", "qwen3-8b", "gpu-0", "search", "crashed", "none"): [1]}
    assert counted["attempts_total"] == {("gpu-0", "unfinished"): [1]}
    assert counted["tokens_total"][("qwen3-8b", "search", "output")] == [5]
    assert "request_duration_seconds" not in counted
    assert "proxy_added_seconds" not in counted


@pytest.mark.parametrize(
    ("attempt", "result"),
    [
        (Attempt("b", status=200, ended_ns=5), "ok"),
        (Attempt("b", status=503, ended_ns=5), "http_503"),
        (Attempt("b", status=200, ended_ns=5, error="client_disconnected"), "client_disconnected"),
    ],
)
def test_how_an_attempt_ended(attempt: Attempt, result: str) -> None:
    assert count(make_record(attempts=[attempt]))["attempts_total"] == {("b", result): [1]}


def test_a_request_without_a_key_name_goes_by_its_id_and_one_without_a_model_by_none() -> None:
    record = make_rejected(key_name="", model="", operation="models", outcome=Outcome.OK, status=200)
    assert count(record)["requests_total"] == {("models", "none", "none", "key_1", "ok", "200"): [1]}


def test_a_model_is_a_label_once_it_was_routed_or_if_the_settings_name_it() -> None:
    rejected = make_rejected(model="qwen3-8b")
    models = [labels[1] for labels in count(rejected, make_record(), rejected)["requests_total"]]
    assert models == ["other", "qwen3-8b", "qwen3-8b"]
    assert [labels[1] for labels in count(rejected, models=("qwen3-8b",))["requests_total"]] == ["qwen3-8b"]


def test_an_answer_from_the_cache_is_no_engine_s() -> None:
    """Nothing of it is among what engines took: neither tokens and money nor times."""
    counted = count(make_hit(team="research"))
    assert counted.pop("requests_total") == {("chat", "qwen3-8b", "none", "search", "cached", "200"): [1]}
    assert observed(counted.pop("request_duration_seconds")) == {("chat", "qwen3-8b", "none", "true", "cached"): (1, 150_000)}
    assert counted.pop("cache_requests_total") == {("qwen3-8b", "hit"): [1]}
    assert counted.pop("cache_saved_tokens_total") == {("qwen3-8b", "input"): [600], ("qwen3-8b", "output"): [5]}
    assert counted.pop("cache_saved_cost_total") == {("qwen3-8b", "USD"): [30_000]}
    assert counted.pop("cache_saved_seconds_total") == {("qwen3-8b",): [80 * MS]}
    assert observed(counted.pop("cache_time_to_first_token_seconds")) == {("qwen3-8b", "hit"): (1, 95_000)}
    assert observed(counted.pop("cache_lookup_seconds")) == {("hit",): (1, 25_000)}
    assert observed(counted.pop("cache_age_seconds")) == {("qwen3-8b",): (1, 90_000 * MS)}
    assert counted == {}


def test_a_shared_answer_is_no_engine_s() -> None:
    counted = count(make_coalesced())
    assert counted.pop("cache_requests_total") == {("qwen3-8b", "coalesced"): [1]}
    assert observed(counted.pop("cache_time_to_first_token_seconds")) == {("qwen3-8b", "coalesced"): (1, 21 * MS)}
    assert observed(counted.pop("cache_lookup_seconds")) == {("coalesced",): (1, 25_000)}
    outcome = ("chat", "qwen3-8b", "none", "true", "coalesced")
    assert observed(counted.pop("request_duration_seconds")) == {outcome: (1, 61 * MS + 40_000)}
    assert counted.keys() == {"requests_total", "cache_saved_tokens_total", "cache_saved_cost_total"}


def test_a_hit_that_is_paced_has_a_first_token_of_its_own() -> None:
    counted = count(make_hit(first_token_ns=7 * MS, first_content_ns=7 * MS))
    assert observed(counted["cache_time_to_first_token_seconds"]) == {("qwen3-8b", "hit"): (1, 7 * MS)}
    assert "time_to_first_token_seconds" not in counted
    assert "time_to_first_content_seconds" not in counted


def test_an_answer_in_one_piece_has_no_first_token_from_the_cache_either() -> None:
    assert "cache_time_to_first_token_seconds" not in count(
        make_hit(stream=False), make_coalesced(stream=False, first_token_ns=0)
    )


def test_a_miss_is_a_request_like_others_and_counted_as_one() -> None:
    plain, missed = count(make_record()), count(make_record(cache="miss", looked_up_ns=75_000))
    assert missed.pop("cache_requests_total") == {("qwen3-8b", "miss"): [1]}
    assert observed(missed.pop("cache_lookup_seconds")) == {("miss",): (1, 5_000)}
    assert missed == plain
    assert count(make_record(cache="bypass"))["cache_requests_total"] == {("qwen3-8b", "bypass"): [1]}


def test_hits_of_similar_prompts_are_told_from_those_of_the_same() -> None:
    assert count(make_hit(1), make_hit(2, similarity=0.97))["cache_semantic_hits_total"] == {("qwen3-8b",): [1]}
    assert "cache_semantic_hits_total" not in count(make_hit())


def test_a_model_that_only_the_cache_was_asked_for_is_a_label() -> None:
    assert [labels[1] for labels in count(make_hit())["requests_total"]] == ["qwen3-8b"]


def test_what_a_crashed_request_shared_is_in_no_time() -> None:
    crashed: dict[str, Any] = {"outcome": Outcome.CRASHED, "error_code": "worker_crashed"}
    crashed |= {"first_token_ns": 0, "upstream_ended_ns": 0}
    counted = count(make_coalesced(**crashed, saved_input_tokens=0, saved_output_tokens=0, saved_cost_nano=0))
    assert counted.keys() == {"requests_total", "request_errors_total", "cache_requests_total", "cache_lookup_seconds"}


# failure 79
def test_whoever_invents_names_makes_no_series() -> None:
    dice = random.Random(79)
    names = ["".join(dice.choices(string.printable, k=12)) for _ in range(100_000)]
    unrouted = count(*(make_rejected(model=name) for name in names[:2000]))
    assert len(unrouted["requests_total"]) == 1
    invented = [make_rejected(number, error_code=name, key_name=name) for number, name in enumerate(names)]
    rows = count(*invented)
    assert len(rows["requests_total"]) == MAX_VALUES + 1
    assert len(rows["request_errors_total"]) == MAX_VALUES + 1
    assert sum(value for (value,) in rows["requests_total"].values()) == 100_000, "and none goes uncounted"


def test_odd_numbers_are_odd_labels_and_nothing_worse() -> None:
    record = make_record(status=99, outcome=77, usage_source=9, currency="")
    counted = count(record)
    assert counted["requests_total"] == {("chat", "qwen3-8b", "gpu-0", "search", "other", "none"): [1]}
    assert counted["cost_total"] == {("qwen3-8b", "search", "none"): [30_000]}


# -- the table --


def test_names_follow_the_conventions() -> None:
    counters = [*(row.name for row in COUNTERS), *(row.name for row in WORKER_COUNTERS)]
    counters += [row.name for row in GAUGES if row.counter]
    gauges = [row.name for row in GAUGES if not row.counter]
    histograms = [row.name for row in HISTOGRAMS]
    assert all(name.endswith("_total") for name in counters)
    assert not any(name.endswith(("_total", "_count", "_sum", "_bucket")) for name in gauges + histograms)
    assert all(name.endswith("_seconds") for name in histograms)
    everything = counters + gauges + histograms
    assert len(set(everything)) == len(everything)
    assert all(re.fullmatch(r"glasshouse(_[a-z]+)+", name) for name in everything)


def test_labels_hold_no_request_no_session_and_no_person() -> None:
    of_rows = [*(row.labels for row in ROWS), *(row.labels for row in WORKER_COUNTERS), *(row.labels for row in GAUGES)]
    labels = {label for names in of_rows for label in names}
    bounded = {"operation", "model", "backend", "key", "outcome", "status", "kind", "currency", "source", "code", "result"}
    bounded |= {"stream", "sink", "reason", "version", "team", "level", "limit", "worker", "state", "instead_of"}
    assert labels <= bounded


@pytest.mark.parametrize("row", HISTOGRAMS, ids=lambda row: row.name)
def test_bounds_rise(row: Histogram) -> None:
    assert list(row.bounds) == sorted(set(row.bounds))


def test_percentiles_between_10_ms_and_1_s_are_told_apart() -> None:
    for row in HISTOGRAMS[:3]:
        bounds = [bound for bound in row.bounds if NANO // 100 <= bound <= NANO]
        assert max(after / before for before, after in pairwise(bounds)) <= 1.5


def test_the_readme_has_todays_table() -> None:
    assert README.read_text() == written_into(README.read_text()), "run `python -m collectors.reference`"


def test_a_readme_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="marks"):
        written_into("nothing here")


# -- gauges --


def gauges(view: View) -> dict[str, dict[tuple[str, ...], float]]:
    return {row.name.removeprefix("glasshouse_"): dict(row.read(view)) for row in GAUGES}


def test_before_anything_runs() -> None:
    now = gauges(View(DAY, "0.1.0", backends=["gpu-0"]))
    assert now["workers"] == {(): 0}
    assert now["requests_in_flight"] == {}
    assert now["backend_requests_in_flight"] == {("gpu-0",): 0}
    assert now["snapshot_age_seconds"] == {}
    assert now["heartbeat_age_seconds"] == {}
    assert now["certificate_expiry_timestamp_seconds"] == {}
    assert now["spans_exported_total"] == {}
    assert now["config_last_reload_successful"] == {}
    assert now["build_info"] == {("0.1.0",): 1}


def test_of_several_workers_counts_are_summed_and_the_worst_delay_shows() -> None:
    one = Heartbeat(
        "a", DAY - NANO, 3, {"gpu-0": 2, "gpu-1": 1}, 10, 5 * MS, DAY - 30 * NANO, certificate_expiry_unix_s=1_800_000_000
    )
    two = Heartbeat("b", DAY, 4, {"gpu-0": 4}, 20, 7 * MS, DAY - 10 * NANO, draining=True, journal_full=True)
    two.certificate_expiry_unix_s = 1_700_000_000
    one.tasks, two.tasks = 4, 3
    two.worker = 1
    gone = Heartbeat("c", DAY - 99 * NANO, 9, {"gpu-0": 9}, 9, 99 * MS, 1, draining=True, alive=False, worker=2)
    now = gauges(View(DAY, "", ["gpu-0", "gpu-1", "gpu-2"], [one, two, gone]))
    assert now["workers"] == {(): 2}
    assert now["workers_draining"] == {(): 1}
    assert now["worker_tasks"] == {(): 7}
    assert now["requests_in_flight"] == {("0",): 3, ("1",): 4}
    assert now["backend_requests_in_flight"] == {("gpu-0",): 6, ("gpu-1",): 1, ("gpu-2",): 0}
    assert now["connections"] == {("0",): 10, ("1",): 20}
    assert now["loop_delay_seconds"] == {(): 0.007}
    assert now["heartbeat_age_seconds"] == {(): 1.0}
    assert now["snapshot_age_seconds"] == {(): 30.0}
    assert now["journal_full"] == {(): 1}
    assert now["certificate_expiry_timestamp_seconds"] == {(): 1_700_000_000}


def test_a_worker_and_the_one_that_takes_over_from_it_are_one() -> None:
    old = Heartbeat("a", DAY, 3, {}, 10, worker=1, reservations=3, redis="down", draining=True)
    new = Heartbeat("b", DAY, 1, {}, 4, worker=1, reservations=1, redis="up")
    other = Heartbeat("c", DAY, 2, {}, 5, worker=0, reservations=2, redis="up")
    now = gauges(View(DAY, "", workers=[old, new, other]))
    assert now["requests_in_flight"] == {("0",): 2, ("1",): 4}
    assert now["connections"] == {("0",): 5, ("1",): 14}
    assert now["reservations"] == {("0",): 2, ("1",): 4}
    assert now["limits_degraded"] == {("0",): 0, ("1",): 1}
    assert now["redis_up"] == {("0",): 1, ("1",): 0}


def test_backends_are_as_the_living_workers_see_them() -> None:
    gone = BackendBeat("out", "upstream_unreachable", 9, 9000, 900, 1.0)
    up, returned = BackendBeat("up", "", 2, 900, 400), BackendBeat("up", "", 1, 50, 0, 0.5)
    one = Heartbeat("a", DAY, waiting=2, worker=0, backends={"gpu-0": up, "gpu-1": BackendBeat("out", "upstream_timeout")})
    two = Heartbeat("b", DAY, waiting=3, worker=1, backends={"gpu-0": returned, "gpu-1": BackendBeat("suspect")})
    dead = Heartbeat("c", DAY, waiting=9, worker=2, backends={"gpu-0": gone}, alive=False)
    one.backends["gpu-2"] = BackendBeat("drained")
    now = gauges(View(DAY, "", ["gpu-0", "gpu-1"], [one, two, dead]))
    assert now["requests_waiting"] == {("0",): 2, ("1",): 3}
    assert now["backend_state"] == {
        ("gpu-0", "up"): 2,
        ("gpu-0", "suspect"): 0,
        ("gpu-0", "out"): 0,
        ("gpu-0", "drained"): 0,
        ("gpu-1", "up"): 0,
        ("gpu-1", "suspect"): 1,
        ("gpu-1", "out"): 1,
        ("gpu-1", "drained"): 0,
        ("gpu-2", "up"): 0,
        ("gpu-2", "suspect"): 0,
        ("gpu-2", "out"): 0,
        ("gpu-2", "drained"): 1,
    }
    assert now["backend_load_ratio"] == {("gpu-0",): 0.75, ("gpu-1",): 0.5, ("gpu-2",): 0}
    assert now["backend_tokens_in_flight"] == {("gpu-0",): 950, ("gpu-1",): 0, ("gpu-2",): 0}
    assert now["backend_tokens_prefilling"] == {("gpu-0",): 400, ("gpu-1",): 0, ("gpu-2",): 0}


def test_a_state_of_which_nobody_here_has_heard_is_not_made_a_label() -> None:
    beat = Heartbeat("a", DAY, backends={"gpu-0": BackendBeat("resting")})
    assert gauges(View(DAY, "", workers=[beat]))["backend_state"] == dict.fromkeys(
        [("gpu-0", state) for state in ("up", "suspect", "out", "drained")], 0
    )


def test_without_redis_nothing_is_degraded_and_nothing_is_up() -> None:
    now = gauges(View(DAY, "", workers=[Heartbeat("a", DAY)]))
    assert (now["limits_degraded"], now["redis_up"]) == ({("0",): 0}, {})


def test_what_workers_count_is_theirs() -> None:
    beat = Heartbeat("a", DAY, worker=3, requests=7, redis_failures=2)
    read = {row.name.removeprefix("glasshouse_"): row.read(beat) for row in WORKER_COUNTERS}
    assert (read["worker_requests_total"], read["redis_failures_total"]) == ({("3",): 7}, {("3",): 2})


def test_the_cache_is_told_of_by_each_worker() -> None:
    one = Heartbeat("a", DAY, cache_entries=3, cache_bytes=900, cache_evictions=5, cache_stored=8, cache_dropped=2)
    one.cache_redis, one.cache_redis_failures = "up", 4
    two = Heartbeat("b", DAY, worker=1, cache_entries=1, cache_bytes=70, cache_redis="down")
    without = Heartbeat("c", DAY, worker=2)
    now = gauges(View(DAY, "", workers=[one, two, without]))
    assert now["cache_entries"] == {("0",): 3, ("1",): 1, ("2",): 0}
    assert now["cache_bytes"] == {("0",): 900, ("1",): 70, ("2",): 0}
    assert now["cache_redis_up"] == {("0",): 1, ("1",): 0}
    read = {row.name.removeprefix("glasshouse_cache_"): row.read(one) for row in WORKER_COUNTERS}
    assert (read["evictions_total"], read["stored_total"], read["dropped_total"]) == ({("0",): 5}, {("0",): 8}, {("0",): 2})
    assert read["redis_failures_total"] == {("0",): 4}


def test_what_happened_to_backends_is_told_by_each_worker() -> None:
    beat = Heartbeat("a", DAY, retries_denied=4)
    beat.backends = {"gpu-0": BackendBeat(ejections=1, probes=5, failed_probes=3), "gpu-1": BackendBeat()}
    read = {row.name.removeprefix("glasshouse_"): row.read(beat) for row in WORKER_COUNTERS}
    assert read["backend_ejections_total"] == {("gpu-0",): 1, ("gpu-1",): 0}
    assert read["backend_probes_total"] == {("gpu-0",): 5, ("gpu-1",): 0}
    assert read["backend_failed_probes_total"] == {("gpu-0",): 3, ("gpu-1",): 0}
    assert read["retries_denied_total"] == {(): 4}


@pytest.mark.parametrize("successful", [True, False])
def test_how_the_last_reload_went_shows(successful: bool) -> None:
    now = gauges(View(DAY, "", last_reload=LastReload(1, successful, DAY - NANO, ["worker-0 replaced"])))
    assert now["config_last_reload_successful"] == {(): float(successful)}
    assert now["config_last_reload_success_timestamp_seconds"] == {(): (DAY - NANO) / NANO}


def test_sinks_and_spans_show() -> None:
    sinks = [SinkView("ledger", True, 0, 0.0), SinkView("spans", False, 4096, 2.5)]
    now = gauges(View(DAY, "", sinks=sinks, spans=SpanCounts(7, {"full": 3}, 2), damaged_segments=1, set_aside_records=4))
    assert now["sink_up"] == {("ledger",): 1, ("spans",): 0}
    assert now["journal_lag_bytes"] == {("ledger",): 0, ("spans",): 4096}
    assert now["journal_lag_seconds"] == {("ledger",): 0, ("spans",): 2.5}
    assert now["spans_exported_total"] == {(): 7}
    assert now["spans_dropped_total"] == {("full",): 3}
    assert now["traces_waiting"] == {(): 2}
    assert now["journal_damaged_segments"] == {(): 1}
    assert now["ledger_set_aside_records"] == {(): 4}
