"""`pytest tests/fuzz --minutes 3`: every fuzzer again and again, with new examples each time, for so long in all.

With `--seed N` the examples of round *k* are the same in every run: what others wait for doesn't fail by chance.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator

import hypothesis
import pytest

from tests.fuzz.effort import Effort

_rounds: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, default=0.0, help="how long the fuzzers search, all together")
    parser.addoption("--seed", type=int, help="search the same examples as any other run with this seed")


def pytest_configure(config: pytest.Config) -> None:
    Effort.seconds = config.getoption("--minutes", 0.0) * 60


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if Effort.seconds and items:
        Effort.seconds /= sum(_searches(item) for item in items) or 1
        for item in items:
            item.add_marker(pytest.mark.timeout(Effort.seconds + 300))


def _searches(item: pytest.Item) -> bool:
    """It is one of hypothesis' and has something new to try each time."""
    return isinstance(item, pytest.Function) and hasattr(item.obj, "hypothesis")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    ends = time.monotonic() + Effort.seconds
    searches = _searches(pyfuncitem)
    if searches:
        _sow(pyfuncitem)
    result = yield
    while searches and time.monotonic() < ends:
        _rounds[pyfuncitem.name] += 1
        _sow(pyfuncitem)
        pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames})
    return result


def _sow(item: pytest.Function) -> None:
    """This round's seed, where seeds are wanted."""
    if (seed := item.config.getoption("--seed", None)) is not None:
        hypothesis.seed(f"{seed} {_rounds[item.name]}")(item.obj)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if Effort.seconds:
        for name, rounds in sorted(_rounds.items()):
            terminalreporter.write_line(f"{rounds:6} rounds  {name}")
