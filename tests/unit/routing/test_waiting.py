"""Whose turn it is."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.routing.route import Route
from proxy.routing.waiting import QUANTUM, Line

S = 1_000_000_000


def waiting(key: str, tokens: int, priority: int = 1) -> Route:
    route = Route(None, None, key, tokens, 0)  # type: ignore[arg-type]  # neither is looked at
    route.priority = priority
    return route


def enter(line: Line, route: Route) -> None:
    line.enter(route, 0)


def room_for(number: int):  # type: ignore[no-untyped-def]
    left = [number]

    def bind(route: Route, now_ns: int) -> bool:
        left[0] -= 1
        return left[0] >= 0

    return bind


def order(line: Line, number: int = 10**6) -> list[str]:
    return [route.key for route in line.admit(0, room_for(number))]


def test_of_one_key_the_first_is_first() -> None:
    line = Line(())
    routes = [waiting("a", 100) for _ in range(5)]
    for route in routes:
        enter(line, route)
    assert line.admit(0, room_for(3)) == routes[:3]
    assert (line.waiting, line.of("a")) == (2, 2)
    assert line.admit(0, room_for(10)) == routes[3:]
    assert line.waiting == 0


def test_keys_take_turns_however_many_of_one_wait() -> None:
    line = Line(())
    for _ in range(50):
        enter(line, waiting("batch", QUANTUM))
    for _ in range(3):
        enter(line, waiting("chat", QUANTUM))
    assert order(line, 6).count("chat") == 3


def test_turns_are_counted_in_tokens() -> None:
    line = Line(())
    for _ in range(200):
        enter(line, waiting("long", 8 * QUANTUM))
        enter(line, waiting("short", QUANTUM))
    served = Counter(order(line, 90))
    assert 8 * served["long"] - 9 <= served["short"] <= 8 * served["long"] + 9


def test_a_lone_key_has_everything() -> None:
    line = Line(())
    for _ in range(10):
        enter(line, waiting("a", 50 * QUANTUM))
    assert order(line) == ["a"] * 10


def test_a_class_comes_before_the_next() -> None:
    line = Line(())
    for priority in (2, 1, 0, 2, 1, 0):
        enter(line, waiting(str(priority), 100, priority))
    assert order(line) == ["0", "0", "1", "1", "2", "2"]


def test_one_for_whom_there_is_no_room_holds_up_nobody_else() -> None:
    line = Line(())
    enter(line, waiting("greedy", 10))
    enter(line, waiting("other", 10))
    enter(line, waiting("last", 10, 2))
    assert [route.key for route in line.admit(0, lambda route, now_ns: route.key != "greedy")] == ["other", "last"]
    assert [route.key for route in line] == ["greedy"]


def test_what_it_really_took_counts() -> None:
    line = Line(())
    for _ in range(60):
        enter(line, waiting("liar", 10))
        enter(line, waiting("honest", 1000))
    taken: Counter[str] = Counter()
    while taken.total() < 40_000:
        (route,) = line.admit(0, room_for(1))
        line.settle(route, 1000)
        taken[route.key] += 1000
    assert abs(taken["liar"] - taken["honest"]) <= 2000


def test_what_had_its_turn_before_the_line_formed_is_nobodys_business() -> None:
    line = Line(())
    former = [waiting("a", 50 * QUANTUM) for _ in range(3)]
    for route in former[:2]:
        enter(line, route)
    assert line.admit(0, room_for(2)) == former[:2]  # nobody waits any more
    for key in "abababab":
        enter(line, waiting(key, QUANTUM))
    for route in former:  # one of them never waited
        line.settle(route, 0)
    assert order(line, 4) == ["a", "b", "a", "b"]


def test_who_owes_and_leaves_still_owes_when_it_is_back() -> None:
    line = Line(())
    enter(line, waiting("a", 10))
    enter(line, waiting("b", 10))
    enter(line, waiting("b", 10))
    (first,) = line.admit(0, room_for(1))
    assert first.key == "a"
    line.settle(first, 50 * QUANTUM)
    enter(line, waiting("a", 10))
    assert order(line) == ["b", "b", "a"]


def test_how_soon_all_will_have_had_their_turn() -> None:
    line = Line(())
    assert line.drained_in(5 * S) == 0.0
    for number in range(200):
        line.enter(waiting("a", 10), number)
    assert line.drained_in(3 * S) == 3.0  # nobody had a turn: at least as long again
    for second in range(1, 100):
        line.admit(second * S, room_for(1))
    assert line.drained_in(99 * S) == 101.0
    for tenth in range(64):  # faster now
        line.admit(99 * S + (tenth + 1) * S // 10, room_for(1))
    assert 3.5 < line.drained_in(99 * S + 64 * S // 10) < 3.9
    line.admit(110 * S, room_for(100))
    assert line.drained_in(500 * S) == 0.0
    line.enter(waiting("a", 10), 1000 * S)
    assert line.drained_in(1001 * S) == 1.0  # what was long ago says nothing


def test_who_leaves_is_waited_for_by_nobody() -> None:
    line = Line(())
    gone, stays = waiting("a", 10), waiting("a", 10)
    enter(line, gone)
    enter(line, stays)
    line.leave(gone)
    line.leave(gone)
    assert line.waiting == 1
    assert line.admit(0, room_for(5)) == [stays]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 5 * QUANTUM), st.integers(0, 2)), min_size=1, max_size=60),
    st.lists(st.integers(0, 4), max_size=30),
)
def test_everybody_has_a_turn_once(arrivals: list[tuple[str, int, int]], rooms: list[int]) -> None:
    line = Line(())
    entered, admitted = [], []
    for number, (key, tokens, priority) in enumerate(arrivals):
        route = waiting(key, tokens, priority)
        entered.append(route)
        enter(line, route)
        if number < len(rooms):
            admitted += line.admit(0, room_for(rooms[number]))
        assert line.waiting == len(entered) - len(admitted) == len(list(line))
    admitted += line.admit(0, room_for(10**6))
    assert len(admitted) == len(entered)
    assert set(map(id, admitted)) == set(map(id, entered))
    for key in "abcd":
        for priority in range(3):
            mine = [route for route in entered if (route.key, route.priority) == (key, priority)]
            assert [route for route in admitted if (route.key, route.priority) == (key, priority)] == mine


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 4 * QUANTUM), min_size=2), st.integers(20, 200))
def test_those_who_wait_all_the_time_get_the_same(sizes: dict[str, int], turns: int) -> None:
    """To within one request of the largest size and a round."""
    line = Line(())
    for key, tokens in sizes.items():
        for _ in range(turns):
            enter(line, waiting(key, tokens))
    served: Counter[str] = Counter()
    for _ in range(turns):
        (route,) = line.admit(0, room_for(1))
        served[route.key] += route.cost
    most, least = max(served[key] for key in sizes), min(served[key] for key in sizes)
    assert most - least <= 2 * max(sizes.values()) + 2 * QUANTUM
