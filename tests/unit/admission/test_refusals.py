"""What callers read of their limits, in OpenAI's words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.admission.refusals import duration, error_of, rate_lines
from proxy.admission.standing import Plan, Refusal, Standing
from proxy.snapshot import Allowance, Budget


def standing(level: str = "key", **allowance: Any) -> Standing:
    made = Standing(level, level, f"{level} 'one'")
    made.follow(Allowance(**allowance), lambda window: None)
    return made


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((-1, "0ms"), (0, "0ms"), (0.0001, "1ms"), (0.12, "120ms"), (0.9991, "1s"), (1, "1s"), (1.5, "1.500s")),
        *((59.9991, "1m0s"), (60, "1m0s"), (61.2, "1m2s"), (360, "6m0s"), (7261, "121m1s")),
    ],
)
def test_a_time_as_openai_writes_it_and_never_too_short(seconds: float, text: str) -> None:
    assert duration(seconds).decode() == text


@pytest.mark.parametrize(
    ("limit", "kind"),
    [("requests_per_minute", "requests"), ("concurrent_requests", "requests"), ("tokens_per_minute", "tokens")],
)
def test_a_rate_limit(limit: str, kind: str) -> None:
    error = error_of(Refusal(standing("team"), limit, 60, 58, 3, 1.2))
    body = json.loads(error.body())["error"]
    assert (error.status, body["code"], body["type"], body["param"]) == (429, "rate_limit_exceeded", kind, None)
    assert "team 'one'" in body["message"]
    assert "Limit 60, Used 58, Requested 3. Please try again in 1.200s." in body["message"]
    assert (error.retry_after_s, error.lines, error.refused_by) == (2, b"\r\nretry-after-ms: 1200", f"team.{limit}")


def test_a_budget_is_a_matter_of_quota_and_not_to_be_tried_again_at_once() -> None:
    one = standing(budgets=(Budget("money", 5, "month", "Europe/Vienna"),))
    [account] = one.accounts
    account.at(1_795_000_000 * 10**9)
    error = error_of(Refusal(one, "budget", 5, 4, 3, 90_000.5, account))
    body = json.loads(error.body())["error"]
    assert (error.status, body["code"], body["type"]) == (429, "insufficient_quota", "insufficient_quota")
    assert "money budget per month" in body["message"]
    assert "begins anew at 2026-11-30T23:00:00Z" in body["message"]
    assert error.retry_after_s == 90_001
    assert error.lines == b"\r\nretry-after-ms: 90000500\r\nx-should-retry: false"
    assert error.refused_by == "key.budget"


def test_a_budget_that_never_begins_anew_names_no_time() -> None:
    one = standing(budgets=(Budget("tokens", 5, "total"),))
    error = error_of(Refusal(one, "budget", 5, 4, 3, None, one.accounts[0]))
    assert error.retry_after_s is None
    assert error.lines == b"\r\nx-should-retry: false"


def test_lines_tell_of_the_bucket_that_will_be_empty_first() -> None:
    key = standing("key", requests_per_minute=100, tokens_per_minute=1000)
    team = standing("team", requests_per_minute=60, input_tokens_per_minute=400)
    plan = Plan([key, team])
    assert plan.refuse((1, 100, 50, 150), (0, 0, 0), (), 1000.0, 0, 1) is None
    assert rate_lines(plan, 1000.0).decode().split("\r\n")[1:] == [
        "x-ratelimit-limit-requests: 60",
        "x-ratelimit-remaining-requests: 59",
        "x-ratelimit-reset-requests: 1s",
        "x-ratelimit-limit-tokens: 400",
        "x-ratelimit-remaining-tokens: 300",
        "x-ratelimit-reset-tokens: 15s",
    ]


def test_no_lines_where_no_rate_is_limited() -> None:
    assert rate_lines(Plan([standing(concurrent_requests=3)]), 1000.0) == b""
