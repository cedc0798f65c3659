"""Buckets, budgets and counts with time in the test's hands: nothing leaks, and nothing is refused while there is room."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from typing import Final

import pytest

from proxy.admission.standing import MINUTE, Amounts, Costs, Plan, Refusal, Standing, Window
from proxy.snapshot import Allowance, Budget

NOW: Final = 1_000_000.0
NOON: Final = int(datetime(2026, 11, 20, 12, tzinfo=UTC).timestamp()) * 10**9
DAY_NS: Final = 86_400 * 10**9


def standing(level: str = "key", **allowance: object) -> Standing:
    made = Standing(level, f"{level}:1", f"{level} 'one'")
    made.follow(Allowance(**allowance), lambda window: None)  # type: ignore[arg-type]
    return made


def tokens(prompt: int = 0, answer: int = 0) -> Amounts:
    return (1, prompt, answer, prompt + answer)


class Trial:
    """Requests against one plan, as permits make them."""

    def __init__(self, *standings: Standing, parts: int = 1) -> None:
        self.plan = Plan(standings)
        self.parts = parts

    def admit(
        self, now: float = NOW, amounts: Amounts = (1, 0, 0, 0), costs: Costs = (0, 0, 0), unix_ns: int = NOON
    ) -> tuple[Window, ...] | Refusal:
        windows = tuple(account.at(unix_ns) for account in self.plan.accounts)
        refusal = self.plan.refuse(amounts, costs, windows, now, unix_ns, self.parts)
        if refusal is not None:
            return refusal
        for gauge in self.plan.gauges:
            gauge.concurrent += 1
        for window in windows:
            window.reserved += costs[window.account.unit]
        return windows

    def end(self, windows: tuple[Window, ...], reserved: Costs, used: Costs) -> None:
        for gauge in self.plan.gauges:
            gauge.concurrent -= 1
        for window in windows:
            window.reserved -= reserved[window.account.unit]
            window.spent += used[window.account.unit]

    def count(self, tries: int, now: float = NOW, **more: object) -> int:
        return sum(not isinstance(self.admit(now, **more), Refusal) for _ in range(tries))  # type: ignore[arg-type]


# -- rates --


@pytest.mark.parametrize("limit", [1, 3, 7, 60, 61, 997, 100_000])
def test_a_minutes_worth_passes_at_once_and_not_one_more(limit: int) -> None:  # failure 61
    trial = Trial(standing(requests_per_minute=limit))
    assert trial.count(limit) == limit
    refusal = trial.admit()
    assert isinstance(refusal, Refusal)
    assert (refusal.limit, refusal.allowed, refusal.used, refusal.requested) == ("requests_per_minute", limit, limit, 1)
    assert refusal.wait == pytest.approx(MINUTE / limit, abs=2e-4)


def test_who_waits_as_long_as_was_said_gets_in() -> None:
    trial = Trial(standing(requests_per_minute=7))
    trial.count(7)
    refusal = trial.admit()
    assert isinstance(refusal, Refusal)
    assert refusal.wait is not None
    assert isinstance(trial.admit(NOW + refusal.wait * 0.99), Refusal)
    assert not isinstance(trial.admit(NOW + refusal.wait), Refusal)
    assert isinstance(trial.admit(NOW + refusal.wait), Refusal)


def test_over_a_long_time_it_is_the_limit_that_passes() -> None:
    trial, chance = Trial(standing(requests_per_minute=30)), random.Random(1)
    now = NOW
    passed = 0
    while now < NOW + 3600:
        passed += trial.count(1, now)
        now += chance.expovariate(2.0)
    assert 60 * 30 <= passed <= 60 * 30 + 30


def test_tokens_set_aside_are_given_back() -> None:
    one = standing(tokens_per_minute=1000)
    trial = Trial(one)
    amounts = tokens(100, 600)
    trial.admit(amounts=amounts)
    assert one.buckets[0].remaining(NOW) == 300
    assert isinstance(trial.admit(amounts=amounts), Refusal)
    trial.plan.settle(amounts, tokens(90, 10), 1)
    assert one.buckets[0].remaining(NOW) == 900
    assert not isinstance(trial.admit(amounts=amounts), Refusal)


def test_what_was_taken_beyond_the_estimate_is_owed() -> None:
    one = standing(output_tokens_per_minute=600)
    trial = Trial(one)
    trial.admit(amounts=tokens(0, 100))
    trial.plan.settle(tokens(0, 100), tokens(0, 1200), 1)
    assert one.buckets[0].remaining(NOW) == 0
    refusal = trial.admit(amounts=tokens(0, 10))
    assert isinstance(refusal, Refusal)
    assert refusal.wait == pytest.approx(61.0, abs=1e-3)


def test_a_request_larger_than_a_minutes_worth_waits_for_a_full_bucket_and_is_not_refused_for_ever() -> None:
    one = standing(input_tokens_per_minute=1000)
    trial = Trial(one)
    assert not isinstance(trial.admit(amounts=tokens(5000)), Refusal)
    trial.plan.settle(tokens(5000), tokens(5000), 1)
    assert isinstance(trial.admit(NOW + 239, tokens(1000)), Refusal)
    assert not isinstance(trial.admit(NOW + 300, tokens(1000)), Refusal)


def test_giving_back_late_makes_no_room_that_never_was() -> None:
    trial = Trial(standing(tokens_per_minute=600))
    trial.admit(amounts=tokens(0, 600))
    trial.plan.settle(tokens(0, 600), tokens(0, 0), 1)
    assert trial.count(10, NOW + 120, amounts=tokens(0, 100)) == 6


def test_who_is_refused_by_one_level_has_taken_nothing_from_the_others() -> None:
    key, team, everyone = (
        standing("key", requests_per_minute=100, tokens_per_minute=10_000, concurrent_requests=50),
        standing("team", requests_per_minute=50, output_tokens_per_minute=90),
        standing("everyone", requests_per_minute=70),
    )
    trial = Trial(key, team, everyone)
    assert trial.count(20, amounts=tokens(5, 10)) == 9
    refusal = trial.admit(amounts=tokens(5, 10))
    assert isinstance(refusal, Refusal)
    assert (refusal.standing.level, refusal.limit) == ("team", "output_tokens_per_minute")
    left = {(each.level, b.limit_name): b.remaining(NOW) for each in (key, team, everyone) for b in each.buckets}
    assert left == {
        ("key", "requests_per_minute"): 91,
        ("key", "tokens_per_minute"): 10_000 - 9 * 15,
        ("team", "requests_per_minute"): 41,
        ("team", "output_tokens_per_minute"): 0,
        ("everyone", "requests_per_minute"): 61,
    }
    assert key.concurrent == 9


def test_another_limit_keeps_what_was_used_of_the_former() -> None:
    one = standing(requests_per_minute=60)
    Trial(one).count(60)
    one.follow(Allowance(requests_per_minute=120), lambda window: None)
    assert isinstance(Trial(one).admit(), Refusal)
    assert Trial(one).count(5, NOW + 1) == 2


# -- at the same time --


def test_so_many_at_the_same_time() -> None:  # failure 61
    one = standing(concurrent_requests=3)
    trial = Trial(one)
    assert trial.count(5) == 3
    refusal = trial.admit()
    assert isinstance(refusal, Refusal)
    assert (refusal.limit, refusal.wait) == ("concurrent_requests", None)
    one.concurrent -= 1
    one.elsewhere = 1
    assert isinstance(trial.admit(), Refusal)
    one.elsewhere = 0
    assert not isinstance(trial.admit(), Refusal)


# -- budgets --


def test_a_hard_budget_is_full_when_spent_and_set_aside_reach_it() -> None:  # failure 60
    one = standing(budgets=(Budget("tokens", 100, "day"),))
    trial = Trial(one)
    held = trial.admit(costs=(0, 60, 0))
    assert isinstance(held, tuple)
    assert isinstance(trial.admit(costs=(0, 41, 0)), Refusal)
    also = trial.admit(costs=(0, 40, 0))
    assert isinstance(also, tuple)
    trial.end(held, (0, 60, 0), (0, 10, 0))
    trial.end(also, (0, 40, 0), (0, 55, 0))
    assert isinstance(trial.admit(costs=(0, 36, 0)), Refusal)
    assert isinstance(trial.admit(costs=(0, 35, 0)), tuple)


def test_a_refusal_says_when_the_budget_begins_anew() -> None:
    trial = Trial(standing(budgets=(Budget("money", 5, "day", "America/New_York"),)))
    refusal = trial.admit(costs=(6, 0, 0))
    assert isinstance(refusal, Refusal)
    assert refusal.account is not None
    assert (refusal.limit, refusal.account.unit_name, refusal.allowed) == ("budget", "money", 5)
    assert refusal.wait == 17 * 3600  # noon UTC is seven in the morning there
    forever = Trial(standing(budgets=(Budget("money", 5, "total"),))).admit(costs=(6, 0, 0))
    assert isinstance(forever, Refusal)
    assert forever.wait is None


def test_what_ends_after_midnight_is_booked_in_the_day_in_which_it_began() -> None:  # failure 60
    one = standing(budgets=(Budget("tokens", 100, "day"),))
    trial = Trial(one)
    midnight = NOON + DAY_NS // 2
    yesterday = trial.admit(costs=(0, 80, 0), unix_ns=midnight - 1)
    today = trial.admit(costs=(0, 80, 0), unix_ns=midnight)
    assert isinstance(yesterday, tuple)
    assert isinstance(today, tuple)
    trial.end(yesterday, (0, 80, 0), (0, 70, 0))
    trial.end(today, (0, 80, 0), (0, 10, 0))
    assert (yesterday[0].spent, yesterday[0].reserved) == (70, 0)
    assert (today[0].spent, today[0].reserved) == (10, 0)
    assert isinstance(trial.admit(costs=(0, 90, 0), unix_ns=midnight + 1), tuple)


def test_a_clock_that_is_set_back_finds_what_was_spent() -> None:  # failure 60
    one = standing(budgets=(Budget("tokens", 100, "day"),))
    trial = Trial(one)
    midnight = NOON + DAY_NS // 2
    held = trial.admit(costs=(0, 80, 0), unix_ns=midnight - 1)
    assert isinstance(held, tuple)
    trial.end(held, (0, 80, 0), (0, 80, 0))
    assert trial.count(2, costs=(0, 80, 0), unix_ns=midnight + 1) == 1
    assert isinstance(trial.admit(costs=(0, 80, 0), unix_ns=midnight - 1), Refusal)
    assert isinstance(trial.admit(costs=(0, 80, 0), unix_ns=midnight + 1), Refusal)


def test_other_budgets_keep_what_was_spent_of_the_former() -> None:
    one = standing(budgets=(Budget("tokens", 100, "day"), Budget("money", 5, "day")))
    held = Trial(one).admit(costs=(1, 80, 0))
    one.follow(Allowance(budgets=(Budget("tokens", 90, "day"),)), lambda window: None)
    assert isinstance(held, tuple)
    Trial(one).end(held, (1, 80, 0), (1, 60, 0))
    assert isinstance(Trial(one).admit(costs=(9, 31, 0)), Refusal)
    assert isinstance(Trial(one).admit(costs=(9, 30, 0)), tuple)


def test_a_soft_budget_refuses_nothing_and_is_told_of_once_it_is_used_up() -> None:
    one = standing(budgets=(Budget("tokens", 100, "week", soft=True), Budget("tokens", 200, "week")))
    trial = Trial(one)
    [account] = one.accounts
    assert (account.soft, account.hard) == (100, 200)
    held = trial.admit(costs=(0, 100, 0))
    assert isinstance(held, tuple)
    [window] = held
    assert not window.used_up_before(100)
    trial.end(held, (0, 100, 0), (0, 99, 0))
    assert not window.used_up_before(0)
    window.spent += 1
    assert window.used_up_before(0)
    assert isinstance(trial.admit(costs=(0, 101, 0)), Refusal)


def test_others_count_too() -> None:
    one = standing(budgets=(Budget("tokens", 100, "day"),))
    trial = Trial(one)
    one.accounts[0].at(NOON).elsewhere = 70
    assert isinstance(trial.admit(costs=(0, 31, 0)), Refusal)
    assert isinstance(trial.admit(costs=(0, 30, 0)), tuple)


@pytest.mark.parametrize("seed", range(20))
def test_the_guarantee_over_random_lives(seed: int) -> None:  # failure 60
    """spent ≤ budget + Σ (true - set aside, where positive) at any time; and nobody is refused while there is room."""
    chance = random.Random(seed)
    budget = chance.randint(50, 5000)
    one = standing(budgets=(Budget("tokens", budget, "total"),))
    trial = Trial(one)
    running: list[tuple[tuple[Window, ...], Costs]] = []
    excess = 0
    for _ in range(2000):
        window = one.accounts[0].at(NOON)
        if running and chance.random() < 0.5:
            held, reserved = running.pop(chance.randrange(len(running)))
            true = int(reserved[1] * chance.choice([0, 0.1, 0.5, 1, 1, 1.5]))
            excess += max(0, true - reserved[1])
            trial.end(held, reserved, (0, true, 0))
            assert window.spent <= budget + excess
        else:
            costs = (0, chance.randint(1, budget // 5), 0)
            room = budget - window.spent - window.reserved
            answer = trial.admit(costs=costs)
            assert isinstance(answer, Refusal) == (costs[1] > room)
            if isinstance(answer, tuple):
                running.append((answer, costs))
    for held, reserved in running:
        trial.end(held, reserved, (0, 0, 0))
    assert one.accounts[0].window.reserved == 0


# -- a part of the limits, while nobody knows of the others --


def test_a_part_of_each_limit() -> None:  # failure 42
    one = standing(requests_per_minute=60, concurrent_requests=20, budgets=(Budget("tokens", 1000, "day"),))
    trial = Trial(one, parts=4)
    assert trial.count(100) == 5
    one.concurrent = 0
    assert trial.count(100) == 5
    one.concurrent = 0
    assert trial.count(100) == 5
    one.concurrent = 0
    assert isinstance(trial.admit(), Refusal)
    assert trial.count(10, NOW + 4.01) == 1  # 15 a minute, and no more


def test_of_a_limit_smaller_than_the_number_of_parts_one_at_a_time_is_left() -> None:
    assert Trial(standing(concurrent_requests=2), parts=8).count(5) == 1


def test_a_part_of_what_was_left_of_a_budget_when_the_others_were_last_heard_of() -> None:
    one = standing(budgets=(Budget("tokens", 1000, "day"),))
    window = one.accounts[0].at(NOON)
    window.elsewhere, window.spent, window.reserved, window.known = 300, 80, 20, 100
    trial = Trial(one, parts=3)  # 600 were left: 200 for each
    assert trial.count(20, costs=(0, 25, 0)) == 8
    window.reserved -= 50
    assert trial.count(20, costs=(0, 25, 0)) == 2
