"""The overview, in the order in which somebody who was called out of bed looks: is it serving, is it fast, what does it do, which
backend, who, is it the proxy or the engine. `make dashboards` writes `overview.json` anew.

A heading and a panel's title are questions; the panel's description says what to make of the answer.
"""

from __future__ import annotations

from typing import Final

from dashboards.grafana.board import (
    Bars,
    Json,
    Lines,
    Numbers,
    Query,
    Row,
    dashboard,
    in_range,
    now,
    or_none,
    override,
    per_second,
    quantile,
    steps,
    write,
)
from proxy.errors import Outcome

REQUESTS: Final = "glasshouse_requests_total"
ERRORS: Final = "glasshouse_request_errors_total"
TOKENS: Final = "glasshouse_tokens_total"
COST: Final = "glasshouse_cost_total"
ATTEMPTS: Final = "glasshouse_attempts_total"
UNACCEPTED: Final = "glasshouse_unaccepted_requests_total"
UNRECORDED: Final = "glasshouse_unrecorded_total"
TEAM_COST: Final = "glasshouse_team_cost_total"
TEAM_TOKENS: Final = "glasshouse_team_tokens_total"
REFUSED: Final = "glasshouse_limit_rejections_total"
OVER_BUDGET: Final = "glasshouse_over_soft_budget_requests_total"
REDIS_FAILURES: Final = "glasshouse_redis_failures_total"
WORKER_REQUESTS: Final = "glasshouse_worker_requests_total"
SPANS_DROPPED: Final = "glasshouse_spans_dropped_total"
DURATION: Final = "glasshouse_request_duration_seconds"
TTFT: Final = "glasshouse_time_to_first_token_seconds"
GAPS: Final = "glasshouse_inter_token_latency_seconds"
ADDED: Final = "glasshouse_proxy_added_seconds"
QUEUE: Final = "glasshouse_engine_queue_seconds"
PREFILL: Final = "glasshouse_engine_prefill_seconds"
DECODE: Final = "glasshouse_engine_decode_seconds"

DAY: Final = 86_400

FAILURES: Final = (Outcome.REJECTED, Outcome.UPSTREAM_ERROR, Outcome.TIMEOUT, Outcome.INTERNAL_ERROR, Outcome.CRASHED)
"""What the proxy or an engine has to answer for: not callers' mistakes, and not callers that left."""

FAILED: Final = 'outcome=~"' + "|".join(outcome.label for outcome in FAILURES) + '"'
WELL_ENDED: Final = 'outcome=~"ok|cached|coalesced"'
ADD_UP: Final = 'kind=~"input|output"'
FLOW: Final = 'kind=~"input|cached_input|output"'
NO_ANSWER: Final = 'result!~"ok|client_.*"'
LOST: Final = 'reason!="unsampled"'

OUTCOME_COLORS: Final = {
    **dict.fromkeys(("ok", "cached", "coalesced"), "green"),
    "client_error": "blue",
    "client_gone": "light-blue",
    "rejected": "yellow",
    "timeout": "orange",
    "upstream_error": "red",
    "internal_error": "dark-red",
    "crashed": "purple",
}

NOT_SHOWN: Final = {
    "glasshouse_audio_seconds_total": "a panel of it is empty wherever no model listens; what listening costs is in the costs",
    "glasshouse_time_to_first_content_seconds": "differs from the first token only while a model thinks; a trace shows both",
    "glasshouse_requests_by_usage_source_total": "how sure the counts are is a question of the month's bill, not of the night",
    "glasshouse_connect_seconds": "kept-alive connections make it empty when all is well; a trace shows it",
    "glasshouse_spans_exported_total": "Phoenix shows what it has; how far it is behind is the lag of its sink",
    "glasshouse_traces_waiting": "the same lag, counted otherwise",
    "glasshouse_retention_removed_rows_total": "housekeeping; whether it is done is the next one's to say",
    "glasshouse_retention_overdue_days": "old rows do no harm for a night; an alarm on it is worth more than a line",
    "glasshouse_worker_tasks": "a constant, unless there is a leak: what a soak looks at",
}
"""Metrics that no panel asks for, and why."""

SERVING: Final = Row(
    100,
    "Is it serving?",
    [
        Lines(
            1,
            "Are requests answered?",
            "Accepted requests a second, counted when they end, by how they ended. Green is well; blue is the callers' own "
            "doing. The rest is an engine (upstream_error, timeout), a bug or a killed worker (internal_error, crashed), or a "
            "proxy that is not ready (rejected).",
            "reqps",
            [Query(per_second(REQUESTS, by="outcome"), "{{outcome}}")],
            width=10,
            colors=OUTCOME_COLORS,
            stacked=True,
        ),
        Lines(
            2,
            "What share of them fails?",
            "Of the requests that ended: those that failed through an engine or the proxy. Callers' mistakes and callers that "
            "left are not failures. Nothing is drawn while no request ends. Lines: one in a hundred, one in twenty.",
            "percentunit",
            [Query(f"({per_second(REQUESTS, FAILED)} or vector(0)) / ({per_second(REQUESTS)} > 0)", "failed")],
            width=7,
            reach=0.05,
            levels=((0.01, "yellow"), (0.05, "red")),
        ),
        Lines(
            3,
            "With which errors?",
            "Accepted requests a second that did not end well, by error code. The codes are the proxy's "
            "(proxy/errors.py), or the engine's own where it answered with an error.",
            "reqps",
            [Query(or_none(per_second(ERRORS, by="code"), code="none"), "{{code}}")],
            width=7,
            reach=0.1,
        ),
    ],
)

FAST: Final = Row(
    200,
    "Is it fast?",
    [
        Lines(
            4,
            "How long until the first token?",
            "From a request's first byte to the first token of its stream; thinking counts, the role frame doesn't. Lines: at 1 "
            "s a train of thought is interrupted, at 10 s attention is gone. A dot is one request and leads to its trace.",
            "s",
            [
                Query(quantile(0.5, TTFT), "p50"),
                Query(quantile(0.95, TTFT), "p95", exemplar=True),
                Query(quantile(0.99, TTFT), "p99"),
            ],
            width=8,
            levels=((1, "yellow"), (10, "red")),
        ),
        Lines(
            5,
            "Do streams stall?",
            "The gap that 99 of 100 gaps between two tokens don't exceed: of every gap of every stream, so that one stall "
            "shows. Line: at 0.2 s a token, text comes slower than it is read.",
            "s",
            [Query(quantile(0.99, GAPS, by="backend"), "p99 {{backend}}")],
            width=8,
            levels=((0.2, "yellow"),),
        ),
        Lines(
            6,
            "How long do whole answers take?",
            "Of those that ended well, from the request's first byte to the answer's last: 95 of 100 take no longer. It depends "
            "on how much is asked for, so look for changes.",
            "s",
            [Query(quantile(0.95, DURATION, WELL_ENDED, by="operation"), "p95 {{operation}}")],
            width=8,
        ),
    ],
)

WORK: Final = Row(
    300,
    "How much does it do, and what does that cost?",
    [
        Lines(
            7,
            "How many tokens flow?",
            "Tokens a second, counted when their request ends. cached_input is the part of input that the engine had kept from "
            "before (start vLLM with --enable-prompt-tokens-details): the more, the better.",
            "si:tok/s",
            [Query(per_second(TOKENS, FLOW, by="kind"), "{{kind}}")],
            width=10,
        ),
        Lines(
            8,
            "What does it cost an hour?",
            "At the pace of the moment. Empty as long as no model has a price (`models:` in glasshouse.yaml).",
            "none",
            [Query(f"{per_second(COST, by='currency')} * 3600", "{{currency}} an hour")],
            width=8,
        ),
        Numbers(
            9,
            "What did it cost in this time?",
            "In the whole time chosen above. Prometheus looks every 15 s, so its ends are as exact as that; `glasshouse usage "
            "--since` is exact.",
            "none",
            [Query(in_range(COST, by="currency"), "{{currency}}", instant=True)],
            width=6,
        ),
    ],
)

WHERE: Final = Row(
    400,
    "Is it one of the backends?",
    [
        Lines(
            10,
            "What is each of them working on?",
            "Requests that each backend has in hand. Even is good; one that only grows is a backend that hangs.",
            "none",
            [Query(f"sum by (backend) ({now('glasshouse_backend_requests_in_flight')})", "{{backend}}")],
            width=8,
            reach=4,
            stacked=True,
        ),
        Lines(
            11,
            "Is one of them slower?",
            "Time to the first token: 95 of 100 come sooner. With equal cards and models the lines should lie on each other.",
            "s",
            [Query(quantile(0.95, TTFT, by="backend"), "p95 {{backend}}")],
            width=8,
        ),
        Lines(
            12,
            "Does one of them fail?",
            "Tries a second that brought no answer, by error code or by the status that came instead. What can't be connected "
            "to is tried elsewhere, so this may rise while no request fails.",
            "reqps",
            [
                Query(
                    or_none(per_second(ATTEMPTS, NO_ANSWER, by="backend, result"), backend="none", result="failed"),
                    "{{backend}} {{result}}",
                )
            ],
            width=8,
            reach=0.1,
        ),
    ],
)

WHO: Final = Row(
    500,
    "Who is it?",
    [
        Bars(
            13,
            "Which keys cost most?",
            "The ten with the highest costs in the time chosen above.",
            "none",
            [Query(f"topk(10, {in_range(COST, by='key, currency')})", "{{key}} {{currency}}", instant=True)],
            width=8,
        ),
        Bars(
            14,
            "Which keys use most tokens?",
            "Input and output together, the ten largest in the time chosen above.",
            "short",
            [Query(f"topk(10, {in_range(TOKENS, ADD_UP, by='key')})", "{{key}}", instant=True)],
            width=8,
        ),
        Bars(
            15,
            "Which keys send most requests?",
            "Accepted requests that ended, however they ended, the ten largest in the time chosen above.",
            "locale",
            [Query(f"topk(10, {in_range(REQUESTS, by='key')})", "{{key}}", instant=True)],
            width=8,
            decimals=0,
        ),
        Bars(
            28,
            "Which teams cost most?",
            "The ten with the highest costs in the time chosen above; none: keys in no team.",
            "none",
            [Query(f"topk(10, {in_range(TEAM_COST, by='team, currency')})", "{{team}} {{currency}}", instant=True)],
            width=12,
        ),
        Bars(
            29,
            "Which teams use most tokens?",
            "Input and output together, the ten largest in the time chosen above; none: keys in no team.",
            "short",
            [Query(f"topk(10, {in_range(TEAM_TOKENS, by='team')})", "{{team}}", instant=True)],
            width=12,
        ),
    ],
)

LIMITED: Final = Row(
    800,
    "Are limits in the way?",
    [
        Lines(
            30,
            "Which limits refuse requests?",
            "Accepted requests a second that a limit refused (429): whose it is (key, user, project, team, everyone), and which. "
            "A budget that is used up refuses until its day, week or month is over.",
            "reqps",
            [Query(or_none(per_second(REFUSED, by="level, limit"), level="no", limit="limit"), "{{level}} {{limit}}")],
            width=8,
            reach=0.1,
        ),
        Bars(
            31,
            "Whose requests are they?",
            "The ten keys that were refused most often in the time chosen above, and the ten that went on most often when a soft "
            "budget was used up, which refuses nothing.",
            "locale",
            [
                Query(or_none(f"topk(10, {in_range(REFUSED, by='key')})", key="nobody"), "{{key}}: refused", instant=True),
                Query(
                    or_none(f"topk(10, {in_range(OVER_BUDGET, by='key')})", key="nobody"), "{{key}}: over budget", instant=True
                ),
            ],
            width=8,
            decimals=0,
        ),
        Numbers(
            32,
            "Do the workers share the limits?",
            "Workers that can't reach Redis and keep to their own part of each limit meanwhile; whether all reach it; round "
            "trips to it that failed in this time; and requests that hold something of a limit now: none when nothing runs.",
            "none",
            [
                Query(f"sum({now('glasshouse_limits_degraded')})", "on their own", instant=True),
                Query(f"min({now('glasshouse_redis_up')})", "Redis", instant=True),
                Query(f"{in_range(REDIS_FAILURES)} or vector(0)", "failures", instant=True),
                Query(f"sum({now('glasshouse_reservations')})", "holding", instant=True),
            ],
            width=8,
            overrides=(
                override("on their own", {"thresholds": steps((1, "red"))}),
                override("Redis", {"thresholds": steps((1, "green"), lowest="red")}),
                override("failures", {"thresholds": steps((1, "yellow")), "decimals": 0}),
            ),
        ),
    ],
)

BETWEEN: Final = Row(
    600,
    "Is it the proxy, or the engine?",
    [
        Lines(
            16,
            "What does the proxy add?",
            "Its own time in a request: before the engine's first byte and after its last, without waiting for connections. "
            "Ordinary is well below a millisecond. Line: 10 ms, a tenth of what people notice.",
            "s",
            [Query(quantile(0.5, ADDED), "p50"), Query(quantile(0.99, ADDED), "p99")],
            width=8,
            levels=((0.01, "yellow"),),
        ),
        Lines(
            17,
            "Is the record behind?",
            "How long ago each sink had everything that was written, and what waits for it in the journal. No request waits; "
            "reports, metrics and traces do. Ordinary is below a second. Line: after 10 s a sink has failed several times in a "
            "row.",
            "s",
            [
                Query(f"max by (sink) ({now('glasshouse_journal_lag_seconds')})", "{{sink}}"),
                Query(f"sum by (sink) ({now('glasshouse_journal_lag_bytes')})", "{{sink}} waiting"),
            ],
            width=8,
            reach=12,
            levels=((10, "red"),),
            overrides=(
                override(
                    "/ waiting$/",
                    {
                        "unit": "bytes",
                        "custom.axisPlacement": "right",
                        "custom.axisSoftMax": 65_536,
                        "custom.thresholdsStyle": {"mode": "off"},
                    },
                ),
            ),
        ),
        Lines(
            18,
            "What is turned away at the door?",
            "Requests a second that never were accepted, by error code: no valid key, no such path, too large. They are in no "
            "report. A sudden rise is somebody with an old key, or somebody who tries keys.",
            "reqps",
            [Query(or_none(per_second(UNACCEPTED, by="code"), code="none"), "{{code}}")],
            width=8,
            reach=0.1,
        ),
        Lines(
            19,
            "Where do the engines spend the time?",
            "As they say themselves: 95 of 100 requests take no longer in the queue, for reading the prompt (prefill), for "
            "writing the answer (decode). A queue that grows means too few engines. Empty if no engine says (start vLLM with "
            "--enable-per-request-metrics).",
            "s",
            [
                Query(quantile(0.95, QUEUE), "queue p95"),
                Query(quantile(0.95, PREFILL), "prefill p95"),
                Query(quantile(0.95, DECODE), "decode p95"),
            ],
            width=8,
        ),
        Lines(
            20,
            "How many clients are there?",
            "Open client connections, and the accepted requests on them that have not ended.",
            "none",
            [
                Query(f"sum({now('glasshouse_connections')})", "connections"),
                Query(f"sum({now('glasshouse_requests_in_flight')})", "requests in flight"),
            ],
            width=8,
            reach=4,
        ),
        Lines(
            21,
            "Do the workers keep up?",
            "How late the worst worker's event loop woke up last: everything in that worker waited as long. Line: 0.1 s, which "
            "people notice.",
            "s",
            [Query(f"max({now('glasshouse_loop_delay_seconds')})", "late by")],
            width=8,
            reach=0.1,
            levels=((0.1, "yellow"),),
        ),
        Lines(
            33,
            "Do the workers share the work?",
            "Requests a second that each worker accepted. The kernel gives each new connection to one of them by chance, so "
            "they are alike with many clients, and not with a few.",
            "reqps",
            [Query(per_second(WORKER_REQUESTS, by="worker"), "worker {{worker}}")],
            width=12,
            stacked=True,
        ),
        Lines(
            34,
            "Do they share the clients?",
            "Open connections of each worker. One that has none while others have many has just been started, or its event loop "
            "hangs.",
            "none",
            [Query(f"sum by (worker) ({now('glasshouse_connections')})", "worker {{worker}}")],
            width=12,
            reach=4,
            stacked=True,
        ),
    ],
)

WELL: Final = Row(
    700,
    "Is Glasshouse itself well?",
    [
        Numbers(
            22,
            "Is every sink up?",
            "Whether what each sink did last worked: the ledger (its database), the metrics (the disk), the spans (Phoenix). "
            "While one is down its records wait in the journal.",
            "none",
            [Query(f"min by (sink) ({now('glasshouse_sink_up')})", "{{sink}}", instant=True)],
            width=8,
            height=5,
            names={"0": ("down", "red"), "1": ("up", "green")},
        ),
        Numbers(
            23,
            "Are the workers there?",
            "Workers alive; those of them that finish what they have and take no more; and how long ago the quietest living one "
            "said something: after three seconds its event loop hangs.",
            "none",
            [
                Query(f"sum({now('glasshouse_workers')})", "alive", instant=True),
                Query(f"sum({now('glasshouse_workers_draining')})", "draining", instant=True),
                Query(f"max({now('glasshouse_heartbeat_age_seconds')})", "silent for", instant=True),
            ],
            width=8,
            height=5,
            overrides=(
                override("alive", {"thresholds": steps((1, "green"), lowest="red")}),
                override("silent for", {"thresholds": steps((3, "red")), "unit": "s"}),
            ),
        ),
        Numbers(
            24,
            "Has anything been lost?",
            "In this time: requests that were not recorded because the journal was full, and spans that Phoenix refused or that "
            "a full queue pushed out. Now: records that the database refuses, journal segments with unreadable bytes, and "
            "whether the disk is full (1), so that more will be lost.",
            "none",
            [
                Query(in_range(UNRECORDED), "not recorded", instant=True),
                Query(f"{in_range(SPANS_DROPPED, LOST)} or vector(0)", "spans", instant=True),
                Query(f"sum({now('glasshouse_ledger_set_aside_records')})", "set aside", instant=True),
                Query(f"sum({now('glasshouse_journal_damaged_segments')})", "damaged", instant=True),
                Query(f"max({now('glasshouse_journal_full')})", "disk full", instant=True),
            ],
            width=8,
            height=5,
            levels=((0.001, "red"),),
        ),
        Numbers(
            25,
            "Do the workers know today's keys?",
            "How old the keys and models are that they go by. Ordinary is below 20 s; from a minute on control or the database "
            "is away, and new or revoked keys wait.",
            "s",
            [Query(f"max({now('glasshouse_snapshot_age_seconds')})", "known as of", instant=True)],
            width=8,
            height=5,
            levels=((60, "red"),),
        ),
        Numbers(
            26,
            "Are configuration and certificate in force?",
            "Whether the configuration was taken up when it was last read, at the start or by a reload, and since when the one "
            "in force is: one with a mistake is refused, and what was in force stays. And how long the listener's certificate "
            "is still valid, if it has one: renewal is due a month before, so three weeks mean that it doesn't happen.",
            "none",
            [
                Query(f"min({now('glasshouse_config_last_reload_successful')})", "last reading", instant=True),
                Query(f"min({now('glasshouse_config_last_reload_success_timestamp_seconds')}) * 1000", "since", instant=True),
                Query(f"min({now('glasshouse_certificate_expiry_timestamp_seconds')}) - time()", "certificate", instant=True),
            ],
            width=8,
            height=5,
            names={"0": ("refused", "red"), "1": ("taken up", "green")},
            overrides=(
                override("since", {"unit": "dateTimeFromNow"}),
                override(
                    "certificate",
                    {"unit": "s", "thresholds": steps((7 * DAY, "yellow"), (21 * DAY, "green"), lowest="red")},
                ),
            ),
        ),
        Numbers(
            27,
            "Which version runs?",
            "And on how many hosts.",
            "none",
            [Query(f"count by (version) ({now('glasshouse_build_info')})", "{{version}}", instant=True)],
            width=8,
            height=5,
        ),
    ],
)


def made() -> Json:
    return dashboard(
        "glasshouse-overview",
        "Glasshouse: overview",
        "Requests, speed, tokens, cost and health of a Glasshouse. Read it from the top.",
        [SERVING, FAST, WORK, WHERE, WHO, LIMITED, BETWEEN, WELL],
    )


if __name__ == "__main__":
    write(made(), __file__)
