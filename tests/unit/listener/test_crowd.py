"""Who may still come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import TooManyConnections
from proxy.listener.crowd import _LOOKS, Crowd


class Guest:
    def __init__(self, idle_since_ns: int | None = None) -> None:
        self.idle_since_ns = idle_since_ns
        self.gone = False

    def make_room(self) -> None:
        self.gone = True


def test_a_client_has_only_so_many() -> None:
    crowd = Crowd(100, 2)
    first, second = Guest(), Guest()
    crowd.enter(first, "a")
    crowd.enter(second, "a")
    with pytest.raises(TooManyConnections) as raised:
        crowd.enter(Guest(), "a")
    assert raised.value.error_code == "too_many_connections_per_client"
    crowd.enter(Guest(), "b")
    crowd.leave(first)
    crowd.enter(Guest(), "a")
    assert len(crowd) == 3


def test_who_comes_for_many_has_no_limit_of_his_own() -> None:
    crowd = Crowd(5, 1)
    for _ in range(5):
        crowd.enter(Guest(), "")
    assert len(crowd) == 5


def test_the_longest_idle_makes_room() -> None:
    crowd = Crowd(4, 4)
    busy, late, early, middle = guests = [Guest(None), Guest(30), Guest(10), Guest(20)]
    for guest in guests:
        crowd.enter(guest, "a")
    crowd.enter(Guest(None), "b")
    crowd.enter(Guest(None), "b")
    assert [guest.gone for guest in (busy, late, early, middle)] == [False, False, True, True]
    assert len(crowd) == 4


def test_when_nobody_is_idle_nobody_may_come() -> None:
    crowd = Crowd(2, 2)
    crowd.enter(Guest(None), "a")
    crowd.enter(Guest(None), "b")
    with pytest.raises(TooManyConnections) as raised:
        crowd.enter(Guest(None), "c")
    assert (raised.value.error_code, raised.value.status) == ("too_many_connections", 503)
    assert len(crowd) == 2


def test_the_search_for_room_is_bounded_and_goes_on_where_it_ended() -> None:
    crowd = Crowd(3 * _LOOKS, 3 * _LOOKS)
    guests = [Guest(None) for _ in range(3 * _LOOKS)]
    idle = guests[-1]
    idle.idle_since_ns = 1
    for guest in guests:
        crowd.enter(guest, "a")
    for _ in range(2):
        with pytest.raises(TooManyConnections):
            crowd.enter(Guest(), "b")
    crowd.enter(Guest(), "b")
    assert idle.gone


def test_who_has_left_has_left() -> None:
    crowd = Crowd(1, 1)
    guest = Guest()
    crowd.enter(guest, "a")
    assert guest in crowd
    crowd.leave(guest)
    crowd.leave(guest)
    assert guest not in crowd
    crowd.enter(Guest(), "a")


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 5)), max_size=60))
def test_it_never_loses_count(moves: list[tuple[bool, int, int]]) -> None:
    crowd = Crowd(6, 3)
    inside: list[tuple[Guest, str]] = []
    for enters, client, at in moves:
        if enters:
            guest = Guest(at or None)
            try:
                crowd.enter(guest, str(client))
            except TooManyConnections:
                continue
            inside.append((guest, str(client)))
        elif at < len(inside):
            crowd.leave(inside.pop(at)[0])
        inside = [(guest, name) for guest, name in inside if not guest.gone]
        assert len(crowd) == len(inside) <= 6
        assert all(sum(name == each for _, each in inside) <= 3 for _, name in inside)
    for guest, _ in inside:
        crowd.leave(guest)
    assert not crowd._counts, "what is left is left for ever"
