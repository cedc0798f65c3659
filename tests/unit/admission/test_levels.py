"""Key, user, project, team, everyone: whose limits count for a request, and who is named when one says no."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pytest

from proxy.admission.elsewhere import Elsewhere, subjects_of
from proxy.admission.standing import Plan
from proxy.errors import Forbidden, PromptTooLong, ProxyError, QuotaExceeded, RateLimited
from proxy.exchange import Record
from proxy.snapshot import Allowance, Budget, Model, Principal, Snapshot, SnapshotFile
from proxy.spend import Amounts, Holder, Period, Spend
from proxy.spend.tally import QUARTER_NS
from tests.support.plane import KEY, Plane
from tests.support.redis import Redis
from tests.support.wire_client import request
from tests.unit.admission.conftest import Worker
from tests.unit.admission.test_admission import Requests

LEVELS: Final = ("key", "user", "project", "team", "everyone")
HOLDER: Final = Holder("key_1", "t", "u", "p")


def allowed(**by_level: Allowance) -> Requests:
    """Requests of a key that has all of them; what isn't said isn't limited."""
    requests = Requests()
    requests.principal = Principal("key_1", "one", "t", by_level.pop("key", Allowance()), "u", "p")
    requests.snapshot = Snapshot(
        SnapshotFile(
            models={"m": requests.model},
            users={"u": by_level.pop("user", Allowance())},
            projects={"p": by_level.pop("project", Allowance())},
            teams={"t": by_level.pop("team", Allowance())},
            everyone=by_level.pop("everyone", Allowance()),
        )
    )
    assert not by_level
    return requests


def refusal(requests: Requests, **request: Any) -> ProxyError:
    requests.begin(**request)
    return requests.errors[-1]


NAMES: Final = {"key": "key 'one'", "user": "user 'u'", "project": "project 'p'", "team": "team 't'", "everyone": "everyone"}


@pytest.mark.parametrize("level", LEVELS)
def test_each_level_refuses_and_says_whose_limit_it_was(level: str) -> None:
    requests = allowed(**{level: Allowance(concurrent_requests=1)})
    first = requests.begin()
    error = refusal(requests)
    assert isinstance(error, RateLimited)
    assert error.refused_by == f"{level}.concurrent_requests"
    assert f"for {NAMES[level]} on" in error.message
    requests.end(first, 1)
    assert requests.begin() in requests.running
    error = refusal(allowed(**{level: Allowance(budgets=(Budget("tokens", 5, "day"),))}))
    assert isinstance(error, QuotaExceeded)
    assert error.refused_by == f"{level}.budget"
    error = refusal(allowed(**{level: Allowance(operations=("embeddings",))}))
    assert isinstance(error, Forbidden)
    error = refusal(allowed(**{level: Allowance(max_input_tokens=9)}))
    assert isinstance(error, PromptTooLong)
    assert error.refused_by == f"{level}.max_input_tokens"


@pytest.mark.parametrize(("narrower", "wider"), list(pairwise(LEVELS)))
def test_of_two_that_say_no_the_narrower_is_named(narrower: str, wider: str) -> None:
    one = Allowance(requests_per_minute=1, max_input_tokens=9)
    assert refusal(allowed(**{narrower: one, wider: one})).refused_by == f"{narrower}.max_input_tokens"
    rate = Allowance(requests_per_minute=1)
    requests = allowed(**{narrower: rate, wider: rate})
    requests.begin()
    assert refusal(requests).refused_by == f"{narrower}.requests_per_minute"


@pytest.mark.parametrize("tightest", LEVELS)
def test_the_tightest_counts(tightest: str) -> None:
    most = {level: Allowance(concurrent_requests=5, max_input_tokens=100) for level in LEVELS}
    requests = allowed(**{**most, tightest: Allowance(concurrent_requests=2, max_input_tokens=100)})
    for _ in range(2):
        requests.begin()
    assert not requests.errors
    assert refusal(requests).refused_by == f"{tightest}.concurrent_requests"


def test_keys_of_one_user_share_what_is_the_users() -> None:
    requests = allowed(user=Allowance(concurrent_requests=1))
    requests.begin()
    requests.principal = Principal("key_2", "two", "", Allowance(), "u", "")
    assert refusal(requests).refused_by == "user.concurrent_requests"
    requests.principal = Principal("key_3", "three", "t", Allowance(), "somebody else", "p")
    assert requests.begin() in requests.running


def test_a_soft_budget_of_the_narrowest_level_is_told() -> None:
    soft = Allowance(budgets=(Budget("tokens", 1, "day", soft=True),))
    requests = allowed(user=soft, team=soft)
    requests.end(requests.begin(), 5)
    exchange = requests.begin()
    assert exchange.record.over_budget == "user"


def test_a_key_with_a_user_and_a_project_that_have_no_limits_costs_what_it_did() -> None:
    requests = allowed()
    assert requests.begin().permit is None
    assert requests.admission.standings() == []
    requests = allowed(key=Allowance(requests_per_minute=5))
    requests.begin()
    assert [each.subject for each in requests.admission.standings()] == ["key:key_1"]


def test_what_holds_is_learned_anew_with_each_snapshot() -> None:
    requests = allowed()
    first = requests.begin()
    limited = allowed(user=Allowance(concurrent_requests=1))
    requests.snapshot = limited.snapshot
    requests.principal = Principal("key_1", "one", "t", Allowance(), "u", "p")
    requests.begin()
    assert refusal(requests).refused_by == "user.concurrent_requests"
    requests.end(first, 1)


def test_equal_principals_are_one() -> None:
    """Tokens of one user on two connections."""
    requests = allowed(key=Allowance(requests_per_minute=600))
    plans = []
    for _ in range(2):
        exchange = requests.begin()
        assert exchange.permit is not None
        plans.append(exchange.permit.plan)  # type: ignore[attr-defined]
        requests.principal = Principal("key_1", "one", "t", Allowance(requests_per_minute=600), "u", "p")
    assert plans[0] is plans[1]


def test_callers_without_number_are_forgotten_and_their_limits_are_not(monkeypatch: pytest.MonkeyPatch) -> None:  # failure 82
    monkeypatch.setattr("proxy.admission.admission._MOST_KNOWN", 3)
    requests = allowed(team=Allowance(concurrent_requests=1))
    requests.begin()
    for number in range(20):
        requests.principal = Principal(f"key_{number}", "other", "t")
        assert refusal(requests).refused_by == "team.concurrent_requests"
        assert len(requests.admission._known) <= 3


# --- what others have spent --------------------------------------------------------------------------------------------


def test_whose_limits_a_request_counts_against() -> None:
    assert list(subjects_of(HOLDER)) == ["key:key_1", "user:u", "project:p", "team:t", "everyone"]
    assert list(subjects_of(Holder("key_1"))) == ["key:key_1", "everyone"]


def test_what_others_spent_counts_on_every_level() -> None:
    spend = Spend(since={0: {("other", *HOLDER): Amounts(1, 2, 3), ("own", *HOLDER): Amounts(10, 20, 30)}})
    assert spend.totals(Period("total"), 0) is None
    record = Record(
        b"", b"", 0, QUARTER_NS, key_id="key_2", user_name="u", project="p", worker="other", max_tokens=5, request_bytes=7
    )
    elsewhere = Elsewhere(Spend(open_requests=[record]), "own", {"": Model("")})
    for subject in ("key:key_2", "user:u", "project:p", "everyone"):
        assert elsewhere.concurrent(subject) == 1
        assert elsewhere.taken(subject, Period("total"), 0, 2**62)[1] == 2 + 5
    assert elsewhere.concurrent("team:t") == elsewhere.concurrent("user:v") == 0


def test_redis_knows_as_many_levels(redis: Redis) -> None:
    async def scenario() -> None:
        worker = await Worker(redis.url).start()
        by_level = [
            (level, f"{level}:x", Allowance(concurrent_requests=20 - place, budgets=(Budget("money", 1000 - place, "total"),)))
            for place, level in enumerate(LEVELS)
        ]
        plan = Plan([worker.standing(*each) for each in by_level])
        assert await worker.ask(plan, 996).verdict() == "granted"
        for money, level in zip((5, 4, 3, 2, 1), LEVELS, strict=True):  # so much is left but for one
            asked = worker.ask(plan, money)
            assert await asked.verdict() == "budget"
            assert asked.refusal is not None
            assert asked.refusal.standing.level == level
        for _ in range(15):
            assert await worker.ask(plan, 0).verdict() == "granted"
        asked = worker.ask(plan, 0)
        assert await asked.verdict() == "concurrent_requests"
        assert asked.refusal is not None
        assert asked.refusal.standing.level == "everyone", "which has the fewest"
        await worker.shared.close()

    asyncio.run(scenario())


# --- in a worker -------------------------------------------------------------------------------------------------------


def test_settings_say_so_and_the_row_tells(tmp_path: Path) -> None:
    config = {
        "users": {"ann": {"requests_per_minute": 1}},
        "projects": {"search": {}},
        "keys": {"test": {"user": "ann", "project": "search"}},
    }
    with Plane(tmp_path, config) as plane:
        for _ in range(2):
            client, engine = plane.client(), plane.engine()
            client.says(request("/v1/chat/completions", {"model": "m", "messages": []}, key=KEY))
            if engine.heard:
                engine.says(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        records = plane.records()
    assert [(each.user_name, each.project, each.refused_by) for each in records] == [
        ("ann", "search", ""),
        ("ann", "search", "user.requests_per_minute"),
    ]
