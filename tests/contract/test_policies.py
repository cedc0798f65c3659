"""What holds for every policy of the table, and what each one promises."""

from __future__ import annotations

import ast
import asyncio
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import proxy.routing.policies
from proxy.exchange import Phase, encode_record
from proxy.routing import Standing
from proxy.routing.policies import POLICIES
from tests.support.routing import Asked, World, backend, catalogue, world_of

WORDS = {"load", "prefix", "spilled", "session", "turn"}
"""All that may stand behind a policy's name in `routed_by`, but for `previous_response`."""
BY_WEIGHT = [name for name in POLICIES if name != "round_robin"]
BY_NAME = ("auto", "prefix_affinity", "session")
"""Those that agree, without knowing of one another, on who has what is new."""

every_policy = pytest.mark.parametrize("policy", POLICIES)


def system(number: int, length: int = 2000) -> str:
    """The beginning of a prompt that no other number has."""
    return (f"You are assistant {number}. " * (length // 20))[:length]


def state(each: Standing) -> tuple[object, ...]:
    return each.in_flight, each.tokens, each.prefilling, each.others, each.weight, each.part, each.depth, each.drained


@every_policy
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_finite_score_for_each_and_asking_changes_nothing(policy: str, data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.floats(0.001, 1000), min_size=2, max_size=12))
    with world_of(catalogue([backend(f"b{at}", weight=weight) for at, weight in enumerate(weights)], policy=policy)) as world:
        for each in world.router.standings.values():
            each.load = data.draw(st.integers(0, 10**7))
            each.prefilling = data.draw(st.integers(0, each.tokens))
            each.others = data.draw(st.integers(0, 10**6))
        asked = world.request(
            text=data.draw(st.sampled_from(["", "short", system(1), system(2, 200_000)])),
            session=data.draw(st.sampled_from(["", "s"])),
            max_tokens=data.draw(st.sampled_from([None, 1, 10**6])),
        )
        asked.route.reach = data.draw(st.sampled_from([None, {}, {world["b0"].bit: 2048, world["b1"].bit: 256}]))
        row, candidates = POLICIES[policy](), list(world.router.standings.values())
        before = [state(each) for each in candidates]
        for _ in range(3):
            scores = row.scores(asked.route, candidates)
            assert len(scores) == len(candidates)
            assert all(math.isfinite(score) and abs(score) < 2**62 for score in scores)
            assert row.scores(asked.route, candidates) == scores
            assert [state(each) for each in candidates] == before
            best = candidates[scores.index(min(scores))]
            assert row.why(asked.route, best, min(scores)) in WORDS
            row.chosen(best)
            assert [state(each) for each in candidates] == before


def test_policies_have_no_clock_and_ask_nobody() -> None:
    allowed = {"__future__", "collections.abc", "math", "typing", "zlib", "proxy.wire.prompt"}
    for path in Path(proxy.routing.policies.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [each.name for each in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name in allowed or str(name).startswith("proxy.routing."), (path.name, name)


@every_policy
def test_equals_take_turns_also_when_models_do(policy: str) -> None:
    backends = [backend(name) for name in ("a", "b", "c")]
    with world_of(catalogue(backends, {"m": "abc", "n": "abc"}, policy=policy)) as world:
        served: Counter[tuple[str, str]] = Counter()
        for turn in range(60):
            asked = world.ask(model="mn"[turn % 2])
            served["mn"[turn % 2], asked.backend] += 1
            asked.done()
        assert set(served.values()) == {10}


@every_policy
def test_two_of_three_that_are_equal_take_turns(policy: str) -> None:
    with world_of(catalogue([backend(name) for name in ("a", "b", "c")], policy=policy)) as world:
        world["c"].others = 10**6
        served: Counter[str] = Counter()
        for _ in range(60):
            asked = world.ask()
            served[asked.backend] += 1
            asked.done()
        assert served["a"] == served["b"]


def different(world: World, number: int) -> Asked:
    return world.ask(text=system(number), session=f"session-{number}", max_tokens=100)


@pytest.mark.parametrize("policy", BY_WEIGHT)
@pytest.mark.parametrize("held", [True, False], ids=["busy", "idle"])
def test_who_weighs_more_has_more(policy: str, held: bool) -> None:
    with world_of(catalogue([backend("light"), backend("heavy", weight=3.0)], policy=policy)) as world:
        served: Counter[str] = Counter()
        for number in range(400):
            asked = different(world, number)
            served[asked.backend] += 1
            if not held:
                asked.done()
        if held or policy in ("session", "weighted", "prefix_affinity"):
            assert 2.4 < served["heavy"] / served["light"] < 3.8
        else:
            assert served["light"] == 0  # where nobody has anything to do, the strongest is the quickest


def test_turns_go_round_whatever_weighs() -> None:
    with world_of(catalogue([backend("light"), backend("heavy", weight=3.0)], policy="round_robin")) as world:
        assert Counter(different(world, number).backend for number in range(100)) == {"light": 50, "heavy": 50}


@every_policy
def test_who_returns_has_a_part_of_what_others_have(policy: str) -> None:  # failure 55
    with world_of(catalogue([backend(name, depth=10_000) for name in ("a", "back")], policy=policy)) as world:
        world.eject("back")
        world.bring_back("back")
        served: Counter[str] = Counter(different(world, number).backend for number in range(200))
        assert 200 * 0.1 / 1.1 / 2 < served["back"] < 200 * 0.1 / 1.1 * 1.6


@every_policy
@settings(deadline=None, max_examples=30)
@given(
    drained=st.sets(st.sampled_from("abcdef")), out=st.sets(st.sampled_from("abcdef")), full=st.sets(st.sampled_from("abcdef"))
)
def test_nobody_who_may_not_is_chosen(policy: str, drained: set[str], out: set[str], full: set[str]) -> None:
    async def scenario() -> None:
        backends = [backend(name, drained=name in drained, depth=4) for name in "abcdef"]
        with world_of(catalogue(backends, policy=policy), waiting={"requests": 0}) as world:
            world.eject(*out)
            for name in full:
                world[name].in_flight = 4
            usable = set("abcdef") - drained
            free = usable - out - full
            asked = world.request(text=system(1), session="s")
            while free:
                assert asked.enter().backend in free
                free.discard(asked.backend)
                asked.route.tried += (asked.backend,)
                asked.done()
            asked.enter()
            if (usable - out) & full:
                assert asked.error is not None
            else:  # all that are well were tried: then it may be one that is out
                assert asked.error is not None or asked.backend in (usable & out) - full

    asyncio.run(scenario())


def homes(policy: str, names: str, numbers: range) -> dict[int, str]:
    with world_of(catalogue([backend(name) for name in names], policy=policy)) as world:
        found = {}
        for number in numbers:
            asked = different(world, number)
            found[number] = asked.backend
            asked.done()
        return found


@pytest.mark.parametrize("policy", BY_NAME)
def test_one_that_comes_or_goes_moves_only_its_own_share(policy: str) -> None:
    """(Two that are equally loaded differ by where they stand. These don't: a new prompt has one home.)"""
    numbers = range(600)
    three, four = homes(policy, "abc", numbers), homes(policy, "abcd", numbers)
    moved = {number for number in numbers if three[number] != four[number]}
    assert {four[number] for number in moved} == {"d"}
    shares = Counter(four.values())
    assert all(110 < shares[name] < 190 for name in "abcd"), shares
    left = Counter(three[number] for number in moved)
    assert all(left[name] > 25 for name in "abc"), left  # what comes takes from everybody, and what goes leaves to everybody


CHOICES = """
from tests.contract.test_policies import homes
print(list(homes({policy!r}, "abcdef", range(50)).values()))
"""


@every_policy
def test_every_process_chooses_the_same(policy: str) -> None:
    said = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        program = [sys.executable, "-c", CHOICES.format(policy=policy)]
        said.add(subprocess.run(program, env=environment, check=True, capture_output=True, text=True, timeout=60).stdout)
    assert said == {f"{list(homes(policy, 'abcdef', range(50)).values())}\n"}


@every_policy
def test_what_was_decided_is_on_the_record(policy: str) -> None:
    with world_of(catalogue([backend(f"b{at}") for at in range(12)], policy=policy)) as world:
        for number in range(40):
            asked = different(world, number % 5)
            record = asked.exchange.record
            name, _, word = record.routed_by.partition(".")
            assert name == policy
            assert word in WORDS
            assert len(record.scores) == 8
            assert min(record.scores, key=lambda each: each[1])[1] == dict(record.scores)[asked.backend]
            encode_record(Phase.CLOSING, record)  # a journal can hold it


def test_a_hot_prefix_spills_over_instead_of_queueing() -> None:
    with world_of(catalogue([backend(name) for name in "abcd"], policy="prefix_affinity")) as world:
        asked = [world.ask(text=system(1), max_tokens=100) for _ in range(200)]
        cost = max(each.route.cost for each in asked)
        loads = [world[name].tokens for name in "abcd"]
        assert max(loads) <= 1.25 * sum(loads) / 4 + cost
        home = asked[0].backend
        assert loads["abcd".index(home)] == max(loads)
        for each in asked:
            assert (each.routed_by == "prefix_affinity.prefix") is (each.backend == home)
            assert each.routed_by == "prefix_affinity.prefix" or each.routed_by == "prefix_affinity.spilled"


def test_a_second_request_of_a_prefix_is_no_reason_to_spill() -> None:
    with world_of(catalogue([backend("a"), backend("b")], policy="prefix_affinity")) as world:
        first, second = world.ask(text=system(1)), world.ask(text=system(1))
        assert first.backend == second.backend
        assert second.routed_by == "prefix_affinity.prefix"


def test_one_prefix_among_others_stays_where_it_is() -> None:
    with world_of(catalogue([backend(name) for name in "abcd"], policy="prefix_affinity")) as world:
        found: dict[int, set[str]] = {}
        for turn in range(5):
            for number in range(40):
                asked = world.ask(text=system(number) + f" turn {turn}")
                found.setdefault(number, set()).add(asked.backend)
                asked.done()
        assert all(len(each) == 1 for each in found.values())


def test_what_is_too_short_for_a_prefix_goes_by_load() -> None:
    with world_of(catalogue([backend("a"), backend("b")], policy="prefix_affinity")) as world:
        world["a"].others = 1000
        asked = world.ask(text="hi")
        assert (asked.backend, asked.routed_by) == ("b", "prefix_affinity.load")


@pytest.mark.parametrize("by", ["header", "user"])
def test_a_session_stays_whatever_the_load(by: str) -> None:
    with world_of(catalogue([backend(name) for name in "abc"], policy="session")) as world:
        for number in range(20):
            name = f"session-{number}"
            asked = [world.ask(session=name) if by == "header" else world.ask(user=name) for _ in range(10)]
            assert len({each.backend for each in asked}) == 1
            assert {each.routed_by for each in asked} == {"session.session"}


def test_the_header_counts_more_than_the_user() -> None:
    with world_of(catalogue([backend(name) for name in "abcd"], policy="session")) as world:
        assert len({world.ask(session=f"s{at}", user="u").backend for at in range(30)}) == 4


def test_without_a_session_the_load_decides() -> None:
    with world_of(catalogue([backend("a"), backend("b")], policy="session")) as world:
        world["a"].others = 1000
        asked = world.ask()
        assert (asked.backend, asked.routed_by) == ("b", "session.load")


def test_what_others_have_there_counts() -> None:
    with world_of(catalogue([backend("a"), backend("b")], policy="least_loaded")) as world:
        world["a"].others = 5000
        assert {world.ask(max_tokens=10).backend for _ in range(20)} == {"b"}


def test_load_is_counted_in_tokens() -> None:
    with world_of(catalogue([backend("a"), backend("b")], policy="least_loaded")) as world:
        long = world.ask(text=system(1, 40_000), max_tokens=1)
        assert {world.ask(max_tokens=10).backend for _ in range(50)} == {"ab".replace(long.backend, "")}


def test_who_was_away_is_owed_nothing_and_who_was_ahead_stays_so() -> None:
    with world_of(catalogue([backend("a"), backend("b"), backend("slow", weight=0.1)], policy="weighted")) as world:
        served: Counter[str] = Counter()
        for turn in range(210):
            world["b"].in_flight = 0 if turn % 2 else 1 << 30  # full every other time
            served[world.ask().backend] += 1
        assert served["slow"] == pytest.approx(10, abs=2)
        world["b"].in_flight = 1 << 30
        for _ in range(100):
            world.ask()
        world["b"].in_flight = 0
        assert Counter(world.ask().backend for _ in range(21))["b"] == pytest.approx(10, abs=2)


def test_a_prefix_draws_as_long_as_it_pays() -> None:
    with world_of(catalogue([backend("a"), backend("b")], policy="auto")) as world:
        first = world.ask(text=system(1, 8000), max_tokens=16)
        home = first.backend
        first.first_token()
        assert first.routed_by == "auto.load"
        again = world.ask(text=system(1, 8000), max_tokens=16)
        assert (again.backend, again.routed_by) == (home, "auto.prefix")
        again.first_token()
        queue = world.ask(text=system(2, 1000), max_tokens=16)
        while world[home].prefilling < 4000:
            queue = world.request(text=system(3, 6000), max_tokens=16)
            queue.route.tried = ("ab".replace(home, ""),)
            queue.enter()
        other = world.ask(text=system(1, 8000), max_tokens=16)
        assert (other.backend, other.routed_by) == ("ab".replace(home, ""), "auto.spilled")


def test_a_conversation_stays_where_its_cache_is() -> None:
    with world_of(catalogue([backend(name) for name in "abc"], policy="auto")) as world:
        talks = {number: system(number % 3) + f"I am {number}. " * 30 for number in range(30)}
        found: dict[int, set[str]] = {number: set() for number in talks}
        for _ in range(6):
            asked = [(number, world.ask(text=text, max_tokens=16)) for number, text in talks.items()]
            for number, each in asked:
                found[number].add(each.backend)
                each.first_token()
            for number, each in asked:
                each.done()
                talks[number] += "and so on " * 30
        assert sum(len(each) == 1 for each in found.values()) >= 27


def test_decoding_counts_less_than_computing_a_prompt() -> None:
    with world_of(catalogue([backend("decoding"), backend("prefilling")], policy="auto")) as world:
        world["decoding"].load = 10_000
        world["prefilling"].load = world["prefilling"].prefilling = 1000
        assert world.ask().backend == "decoding"
