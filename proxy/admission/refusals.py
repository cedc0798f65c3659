"""What a caller is told of its limits: errors in OpenAI's words, and the `x-ratelimit-*` lines of OpenAI's answers.

Source: OpenAI's guide to rate limits. `requests` and `tokens` are the limits closest to being reached; a reset is when the
bucket would be full again.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from proxy.admission.standing import MINUTE, Account, Bucket, Plan, Refusal, Window
from proxy.errors import ProxyError, QuotaExceeded, RateLimited

_WORDS = {
    "requests_per_minute": "requests per min (RPM)",
    "input_tokens_per_minute": "input tokens per min",
    "output_tokens_per_minute": "output tokens per min",
    "tokens_per_minute": "tokens per min (TPM)",
    "concurrent_requests": "concurrent requests",
}
_ROUNDING = 1e-6
_UNKNOWN_WAIT = 1.0
"""Seconds: a place is free again when somebody else's answer has ended, and nobody knows when that will be."""


def error_of(refusal: Refusal) -> ProxyError:
    """The error that a caller gets, and that the record keeps."""
    account = refusal.account
    error = _rate_error(refusal) if account is None else _quota_error(refusal, account)
    error.refused_by = f"{refusal.standing.level}.{refusal.limit}"
    return error


def _rate_error(refusal: Refusal) -> ProxyError:
    wait = _UNKNOWN_WAIT if refusal.wait is None else refusal.wait
    return RateLimited(
        f"Rate limit reached for {refusal.standing.label} on {_WORDS[refusal.limit]}: Limit {refusal.allowed}, "
        f"Used {refusal.used}, Requested {refusal.requested}. Please try again in {duration(wait).decode()}.",
        type="tokens" if "tokens" in refusal.limit else "requests",
        wait_s=wait,
    )


def _quota_error(refusal: Refusal, account: Account) -> ProxyError:
    per = "" if account.period.per == "total" else f" per {account.period.per}"
    ends = ""
    if refusal.wait is not None:
        when = datetime.fromtimestamp(account.window.end_ns / 1e9, UTC)
        ends = f" The budget begins anew at {when:%Y-%m-%dT%H:%M:%SZ}."
    return QuotaExceeded(
        f"You exceeded the current quota of {refusal.standing.label}: what is left of its {account.unit_name} budget{per} "
        f"is less than what this request may cost.{ends}",
        wait_s=refusal.wait,
    )


def rate_lines(plan: Plan, now: float) -> bytes:
    """The header lines of an answer; nothing for a key whose rates nobody limits."""
    if plan.requests:
        if plan.tokens:
            return _BOTH % (*_closest(plan.requests, now), *_closest(plan.tokens, now))
        return _REQUESTS % _closest(plan.requests, now)
    return _TOKENS % _closest(plan.tokens, now) if plan.tokens else b""


def _closest(buckets: Iterable[tuple[Bucket, float]], now: float) -> tuple[int, int, bytes]:
    """Limit, remaining and reset of the bucket that will be empty first."""
    least = float("inf")
    full = now + MINUTE
    for bucket, each_second in buckets:
        left = (full - bucket.full_at) * each_second
        if left < least:
            least, closest = left, bucket
    limit, wait = closest.limit, closest.full_at - now
    left = 0 if least < 0 else limit if least > limit else int(least + _ROUNDING)
    return limit, left, b"%dms" % (wait * 1000 + 0.999) if 0 < wait < 0.999 else duration(wait)


_LINES = b"\r\nx-ratelimit-limit-%b: %%d\r\nx-ratelimit-remaining-%b: %%d\r\nx-ratelimit-reset-%b: %%b"
_REQUESTS = _LINES % ((b"requests",) * 3)
_TOKENS = _LINES % ((b"tokens",) * 3)
_BOTH = _REQUESTS + _TOKENS


def duration(seconds: float) -> bytes:
    """As OpenAI writes it: `120ms`, `1.5s`, `6m0s`. Never less than it is."""
    ms = max(0, -int(-seconds * 1000 // 1))
    if ms < 1000:
        return b"%dms" % ms
    if ms < 60_000:
        return b"%d.%03d" % divmod(ms, 1000) + b"s" if ms % 1000 else b"%ds" % (ms // 1000)
    return b"%dm%ds" % divmod(-(-ms // 1000), 60)


def over_budget_line(window: Window) -> bytes:
    """Tells of a soft budget that is used up."""
    account = window.account
    per = "" if account.period.per == "total" else f" per {account.period.per}"
    return f"\r\nx-glasshouse-over-budget: {account.standing.level} {account.unit_name}{per}".encode()
