"""Which engines have begun anew, told as a sequence of looks."""

from __future__ import annotations

import pytest

from proxy.control.restarts import Restarts
from proxy.engines import EngineLoad


def loads(**started: float) -> dict[str, EngineLoad]:
    return {name: EngineLoad(started_unix_s=at) for name, at in started.items()}


@pytest.mark.parametrize(
    ("looks", "again"),
    [
        ([loads(a=1)], []),  # seen for the first time
        ([loads(a=1), loads(a=1)], []),
        ([loads(a=1, b=1), loads(a=2, b=1)], ["a"]),
        ([loads(a=2), loads(a=1)], ["a"]),  # clocks may be set back
        ([loads(a=1, b=1), loads(b=1), loads(a=1, b=1)], ["a"]),  # it was away
        ([loads(a=1), {}, {}, loads(a=2)], ["a"]),
        ([loads(a=1), {}], []),
        ([loads(a=1), loads(a=2), loads(a=2)], []),
        ([loads(a=1), {}, loads(a=1), loads(a=1)], []),
        ([loads(a=0), loads(a=0)], []),  # it doesn't say when it began
        ([loads(a=1), loads(a=1, b=5)], []),
    ],
)
def test_what_the_last_look_finds(looks: list[dict[str, EngineLoad]], again: list[str]) -> None:  # failure 54
    restarts = Restarts()
    for look in looks[:-1]:
        restarts.look(look)
    assert restarts.look(looks[-1]) == again
