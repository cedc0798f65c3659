"""The overview, in the order in which somebody who was called out of bed looks: is it serving, is it fast, what does it do, which
backend, who has the work, what the cache does, who asks, is it the proxy or the engine. `make dashboards` writes `overview.json`
anew.

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
    States,
    counted,
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
RETRIES: Final = "glasshouse_retries_total"
DENIED: Final = "glasshouse_retries_denied_total"
DECISIONS: Final = "glasshouse_routing_decisions_total"
QUEUED: Final = "glasshouse_queued_requests_total"
FALLBACKS: Final = "glasshouse_fallbacks_total"
BACKEND_TOKENS: Final = "glasshouse_backend_tokens_total"
EJECTIONS: Final = "glasshouse_backend_ejections_total"
FAILED_PROBES: Final = "glasshouse_backend_failed_probes_total"
UNACCEPTED: Final = "glasshouse_unaccepted_requests_total"
UNRECORDED: Final = "glasshouse_unrecorded_total"
TEAM_COST: Final = "glasshouse_team_cost_total"
TEAM_TOKENS: Final = "glasshouse_team_tokens_total"
REFUSED: Final = "glasshouse_limit_rejections_total"
OVER_BUDGET: Final = "glasshouse_over_soft_budget_requests_total"
REDIS_FAILURES: Final = "glasshouse_redis_failures_total"
CACHE: Final = "glasshouse_cache_requests_total"
SEMANTIC_HITS: Final = "glasshouse_cache_semantic_hits_total"
SAVED_TOKENS: Final = "glasshouse_cache_saved_tokens_total"
SAVED_COST: Final = "glasshouse_cache_saved_cost_total"
SAVED_TIME: Final = "glasshouse_cache_saved_seconds_total"
STORED: Final = "glasshouse_cache_stored_total"
EVICTIONS: Final = "glasshouse_cache_evictions_total"
CACHE_DROPPED: Final = "glasshouse_cache_dropped_total"
CACHE_REDIS_FAILURES: Final = "glasshouse_cache_redis_failures_total"
WORKER_REQUESTS: Final = "glasshouse_worker_requests_total"
SPANS_DROPPED: Final = "glasshouse_spans_dropped_total"
DURATION: Final = "glasshouse_request_duration_seconds"
TTFT: Final = "glasshouse_time_to_first_token_seconds"
GAPS: Final = "glasshouse_inter_token_latency_seconds"
WAIT: Final = "glasshouse_request_wait_seconds"
ADDED: Final = "glasshouse_proxy_added_seconds"
QUEUE: Final = "glasshouse_engine_queue_seconds"
PREFILL: Final = "glasshouse_engine_prefill_seconds"
DECODE: Final = "glasshouse_engine_decode_seconds"

CACHE_TTFT: Final = "glasshouse_cache_time_to_first_token_seconds"
LOOKUP: Final = "glasshouse_cache_lookup_seconds"
AGE: Final = "glasshouse_cache_age_seconds"

ENGINE_TOKENS: Final = "glasshouse_engine_tokens_total"
PREFIX_QUERIES: Final = "glasshouse_engine_prefix_cache_queries_total"
PREFIX_HITS: Final = "glasshouse_engine_prefix_cache_hits_total"
SCRAPES: Final = "glasshouse_engine_scrapes_total"

STATE: Final = "glasshouse_backend_state"
OUT: Final = 'state="out"'
SUSPECT: Final = 'state="suspect"'
DRAINED: Final = 'state="drained"'
CACHED_INPUT: Final = per_second(BACKEND_TOKENS, 'kind="cached_input"', by="backend")
INPUT: Final = per_second(BACKEND_TOKENS, 'kind="input"', by="backend")

FROM_CACHE: Final = 'result=~"hit|coalesced"'
CACHEABLE: Final = 'result!="bypass"'

DAY: Final = 86_400

FAILURES: Final = (Outcome.REJECTED, Outcome.UPSTREAM_ERROR, Outcome.TIMEOUT, Outcome.INTERNAL_ERROR, Outcome.CRASHED)
"""What the proxy or an engine has to answer for: not callers' mistakes, and not callers that left."""

FAILED: Final = 'outcome=~"' + "|".join(outcome.label for outcome in FAILURES) + '"'
WELL_ENDED: Final = 'outcome=~"ok|cached|coalesced"'
ADD_UP: Final = 'kind=~"input|output"'
FLOW: Final = 'kind=~"input|cached_input|output"'
NO_ANSWER: Final = 'result!~"ok|client_.*"'
CALLERS: Final = 'key!="system"'
"""Without the proxy's own probes."""
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
    "glasshouse_backend_probes_total": "those that failed are shown; the others brought their backends back",
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
            [Query(per_second(REQUESTS, CALLERS, by="outcome"), "{{outcome}}")],
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
            [Query(f"({per_second(REQUESTS, CALLERS, FAILED)} or vector(0)) / ({per_second(REQUESTS, CALLERS)} > 0)", "failed")],
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

ROUTING: Final = Row(
    900,
    "Is the work well divided?",
    [
        States(
            40,
            "Which backends are in service?",
            "As the worker sees it that is worst off with each. A suspect has requests only where nobody else can, one that is "
            "out has none; both are asked for a token now and then, and come back, slowly, when they answer.",
            "none",
            [
                Query(
                    f"max by (backend) (({now(STATE, DRAINED)} > bool 0) * 3 or ({now(STATE, OUT)} > bool 0) * 2 "
                    f"or ({now(STATE, SUSPECT)} > bool 0))",
                    "{{backend}}",
                )
            ],
            width=8,
            levels=((1, "yellow"), (2, "red"), (3, "blue")),
            names={"0": ("up", "green"), "1": ("suspect", "yellow"), "2": ("out", "red"), "3": ("drained", "blue")},
        ),
        Lines(
            41,
            "Where do requests go, and why?",
            "Requests a second by backend and by what spoke for it: the policy and its reason. only: there was no choice, which "
            "with several backends means that the others are out, full or drained.",
            "reqps",
            [Query(per_second(DECISIONS, by="backend, reason"), "{{backend}} {{reason}}")],
            width=8,
            stacked=True,
        ),
        Lines(
            42,
            "How much has each of them to do?",
            "Tokens in flight: prompts as far as they have to be computed, answers as long as they are expected to become; and "
            "of these, prompts without their first token yet. On the right, what part of its usual load a backend may have: "
            "nothing while it is out, then slowly all of it.",
            "none",
            [
                Query(f"sum by (backend) ({now('glasshouse_backend_tokens_in_flight')})", "{{backend}}"),
                Query(f"sum by (backend) ({now('glasshouse_backend_tokens_prefilling')})", "{{backend}} prefilling"),
                Query(f"avg by (backend) ({now('glasshouse_backend_load_ratio')})", "{{backend}} may have"),
            ],
            width=8,
            reach=1000,
            overrides=(
                override(
                    "/ may have$/",
                    {"unit": "percentunit", "max": 1, "custom.axisPlacement": "right", "custom.axisSoftMax": 1},
                ),
            ),
        ),
        Lines(
            43,
            "Do requests wait for a backend?",
            "Those that wait now because no backend has room, and those a second that had to. A line that only grows means too "
            "few engines, or `depth` too small for what they can do.",
            "none",
            [
                Query(f"sum({now('glasshouse_requests_waiting')})", "waiting"),
                Query(or_none(per_second(QUEUED)), "had to wait, a second"),
            ],
            width=8,
            reach=4,
        ),
        Lines(
            44,
            "For how long?",
            "Of all requests that were for a backend, those too that had not to wait: half of them, and 99 of 100, waited no "
            "longer. It is part of the time to the first token. Line: 1 s.",
            "s",
            [Query(quantile(0.5, WAIT), "p50"), Query(quantile(0.99, WAIT), "p99")],
            width=8,
            reach=1,
            levels=((1, "yellow"),),
        ),
        Lines(
            45,
            "Do prompts meet their cache?",
            "The part of the prompts' tokens that each backend had computed before: what is left to compute is the time to the "
            "first token. It depends on what is asked; compare it over days, and after a change of `routing`.",
            "percentunit",
            [Query(f"({CACHED_INPUT} or 0 * {INPUT}) / ({INPUT} > 0)", "{{backend}}")],
            width=8,
            reach=1,
        ),
        Lines(
            46,
            "What is tried again?",
            "Tries a second that another one followed, by the backend that could not answer, and why; answers with an engine's "
            "error that went out because enough others had been tried again; and requests that another model answered.",
            "reqps",
            [
                Query(
                    or_none(per_second(RETRIES, by="backend, result"), backend="none", result="failed"), "{{backend}} {{result}}"
                ),
                Query(or_none(per_second(DENIED)), "not tried again"),
                Query(
                    or_none(per_second(FALLBACKS, by="model, instead_of"), model="none", instead_of="another"),
                    "{{model}} instead of {{instead_of}}",
                ),
            ],
            width=12,
            reach=0.1,
        ),
        Bars(
            47,
            "Which of them had to leave?",
            "In the time chosen above: how often workers put a backend out of service, each for itself, and how often it failed "
            "a probe then. One that comes and goes is worth a look at its log.",
            "locale",
            [
                Query(or_none(in_range(EJECTIONS, by="backend"), backend="none"), "{{backend}}: left", instant=True),
                Query(
                    or_none(in_range(FAILED_PROBES, by="backend"), backend="none"), "{{backend}}: failed a probe", instant=True
                ),
            ],
            width=12,
            decimals=0,
        ),
    ],
)

ENGINES: Final = Row(
    1000,
    "What do the engines say themselves?",
    [
        Lines(
            50,
            "What are they computing, and what waits?",
            "Requests that each engine computes and those in its own queue, whoever sent them. More than the backend has in hand "
            "here: somebody else uses it too. Those that wait there have left the proxy, and it can't send them elsewhere.",
            "none",
            [
                Query(f"sum by (backend) ({now('glasshouse_engine_requests_running')})", "{{backend}}"),
                Query(f"sum by (backend) ({now('glasshouse_engine_requests_waiting')})", "{{backend}} waiting"),
            ],
            width=8,
            reach=4,
        ),
        Lines(
            51,
            "Is there room in their KV caches?",
            "How much is in use. Without room an engine gives up requests that it has begun, and computes them again later. "
            "Line: at 95 % that is near.",
            "percentunit",
            [Query(f"max by (backend) ({now('glasshouse_engine_kv_cache_usage_ratio')})", "{{backend}}")],
            width=8,
            reach=1,
            levels=((0.95, "yellow"),),
        ),
        Lines(
            52,
            "How much do they find in their prefix caches?",
            "Of the tokens that an engine looks for there, the part that it finds and needn't compute; of all that it is asked, "
            "by whomever. Nothing is drawn while it looks for none.",
            "percentunit",
            [
                Query(
                    f"{per_second(PREFIX_HITS, by='backend')} / ({per_second(PREFIX_QUERIES, by='backend')} > 0)",
                    "{{backend}}",
                )
            ],
            width=8,
            reach=1,
        ),
        Lines(
            53,
            "How fast are they?",
            "Tokens a second that each engine reads (input, also those from its cache) and writes (output), when it does.",
            "si:tok/s",
            [Query(per_second(ENGINE_TOKENS, by="backend, kind"), "{{backend}} {{kind}}")],
            width=10,
        ),
        Lines(
            54,
            "Do they answer when they are asked?",
            "Each is asked for its load once a second; this is how often that fails, and how: no answer (unreachable, timeout), "
            "another status than 200 (refused), an answer that doesn't say it (unreadable). Requests go on; who gets them is "
            "then decided by what the workers know themselves.",
            "reqps",
            [
                Query(
                    or_none(per_second(SCRAPES, 'outcome!="ok"', by="backend, outcome"), backend="none", outcome="failed"),
                    "{{backend}} {{outcome}}",
                )
            ],
            width=8,
            reach=1,
        ),
        Numbers(
            55,
            "Since when do they run?",
            "As they say themselves. One that has just been started has an empty cache, and has forgotten what it computed.",
            "dateTimeFromNow",
            [Query(f"max by (backend) ({now('glasshouse_engine_start_timestamp_seconds')}) * 1000", "{{backend}}", instant=True)],
            width=6,
        ),
    ],
)

CACHED: Final = Row(
    1100,
    "What does the response cache do?",
    [
        Lines(
            60,
            "How often does it have the answer?",
            "Of the requests that it was asked for: the part that got an answer which was kept, or shared one under way. It "
            "depends on what is asked; look for changes. Nothing is drawn while it is asked nothing, and 0 where there is none.",
            "percentunit",
            [
                Query(
                    f"({per_second(CACHE, FROM_CACHE)} or vector(0)) / ({per_second(CACHE, CACHEABLE)} > 0) "
                    f"or on () 0 * absent({counted(CACHE)})",
                    "answered",
                )
            ],
            width=8,
            reach=1,
        ),
        Lines(
            61,
            "What becomes of the requests?",
            "Requests a second. hit: it had the answer; coalesced: they shared one under way; miss: an engine was asked; "
            "bypass: by the policy, or by what the caller said, it was not to be asked. similar: of the hits, those whose prompt "
            "was another one (`semantic`).",
            "reqps",
            [
                Query(or_none(per_second(CACHE, by="result"), result="none"), "{{result}}"),
                Query(or_none(per_second(SEMANTIC_HITS)), "similar"),
            ],
            width=8,
            reach=0.1,
            colors={"hit": "green", "coalesced": "light-green", "miss": "blue", "bypass": "yellow", "similar": "purple"},
        ),
        Lines(
            62,
            "How long until their first token?",
            "Of streams: 95 of 100 of those that it had, and of those that shared an answer, had their first token sooner. The "
            "panels on speed above are of what engines were asked.",
            "s",
            [Query(or_none(quantile(0.95, CACHE_TTFT, by="result"), result="none"), "p95 {{result}}")],
            width=8,
            reach=0.01,
        ),
        Lines(
            63,
            "How many tokens does it save?",
            "Tokens a second that engines would have had to read (input) and write (output). They are in no other panel.",
            "si:tok/s",
            [Query(or_none(per_second(SAVED_TOKENS, by="kind"), kind="none"), "{{kind}}")],
            width=8,
            reach=10,
        ),
        Numbers(
            64,
            "What did it save in this time?",
            "In the whole time chosen above: what the answers would have cost, if their models have prices, and how much longer "
            "engines had taken for them, all together. `glasshouse usage --since` is exact.",
            "none",
            [
                Query(or_none(in_range(SAVED_COST, by="currency"), currency="money"), "{{currency}}", instant=True),
                Query(f"{in_range(SAVED_TIME)} or vector(0)", "time", instant=True),
            ],
            width=8,
            overrides=(override("time", {"unit": "s"}),),
        ),
        Lines(
            65,
            "How old are the answers?",
            "Of hits: half of them, and 99 of 100, were given an answer that was no older. `ttl` bounds it.",
            "s",
            [Query(or_none(quantile(0.5, AGE)), "p50"), Query(or_none(quantile(0.99, AGE)), "p99")],
            width=8,
            reach=60,
        ),
        Lines(
            66,
            "How much does it keep?",
            "Answers in the workers' memory, and on the right what they take of it, about; each worker has its own. What is in "
            "Redis isn't in here.",
            "none",
            [
                Query(f"sum({now('glasshouse_cache_entries')})", "answers"),
                Query(f"sum({now('glasshouse_cache_bytes')})", "bytes"),
            ],
            width=8,
            reach=10,
            overrides=(override("bytes", {"unit": "bytes", "custom.axisPlacement": "right", "custom.axisSoftMax": 1_048_576}),),
        ),
        Lines(
            67,
            "What comes, and what has to go?",
            "Answers a second that were kept; that made room for others in a worker's memory, which means that it is full; and "
            "that did not get to Redis because too many were on their way there.",
            "cps",
            [
                Query(or_none(per_second(STORED)), "kept"),
                Query(or_none(per_second(EVICTIONS)), "made room"),
                Query(or_none(per_second(CACHE_DROPPED)), "not kept in Redis"),
            ],
            width=8,
            reach=0.1,
        ),
        Lines(
            68,
            "Does looking take long?",
            "From a request's admission to what the cache had to say: 99 of 100 take no longer. Line: at 0.1 s Redis is given "
            "up, and the request is a miss. Beside it what was asked of Redis and failed, a second, and whether all workers "
            "reach it (1), if there is one.",
            "s",
            [
                Query(or_none(quantile(0.99, LOOKUP)), "p99"),
                Query(or_none(per_second(CACHE_REDIS_FAILURES)), "Redis failed"),
                Query(f"min({now('glasshouse_cache_redis_up')})", "Redis"),
            ],
            width=8,
            reach=0.1,
            levels=((0.1, "yellow"),),
            overrides=(
                override(
                    "/^Redis/",
                    {
                        "unit": "none",
                        "custom.axisPlacement": "right",
                        "custom.axisSoftMax": 1,
                        "custom.thresholdsStyle": {"mode": "off"},
                    },
                ),
            ),
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
        [SERVING, FAST, WORK, WHERE, ROUTING, ENGINES, CACHED, WHO, LIMITED, BETWEEN, WELL],
    )


if __name__ == "__main__":
    write(made(), __file__)
