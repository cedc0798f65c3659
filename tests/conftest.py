"""Fixtures for everything, and two rules.

With GLASSHOUSE_REQUIRE_ALL=1 a skipped test is a failed one: where everything is there, nothing may be left out unnoticed.
When a test with a running `Glasshouse` fails, the ends of its logs are in the report.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support.glasshouse import Glasshouse
from tests.support.scripted_vllm import ScriptedVLLM

REQUIRE_ALL: Final = os.environ.get("GLASSHOUSE_REQUIRE_ALL") == "1"

Start = Callable[..., Glasshouse]
_running: list[Glasshouse] = []


@pytest.fixture
def vllm() -> Iterator[ScriptedVLLM]:
    """A scripted vLLM of the test's own."""
    with ScriptedVLLM() as server:
        yield server


@pytest.fixture(scope="module")
def shared_vllm() -> Iterator[ScriptedVLLM]:
    """A scripted vLLM for all tests of a module."""
    with ScriptedVLLM() as server:
        yield server


@pytest.fixture
def glasshouse(tmp_path: Path) -> Iterator[Start]:
    """`glasshouse(backends=[url], config={...})` runs one; all of them must end well when the test does."""
    yield from _factory(tmp_path)


@pytest.fixture(scope="module")
def shared_glasshouse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """The same for the fixtures of a module."""
    yield from _factory(tmp_path_factory.mktemp("glasshouse"))


def _factory(directory: Path) -> Iterator[Start]:
    started: list[Glasshouse] = []

    def start(
        backends: list[str | Mapping[str, Any]] | None = None, config: Mapping[str, Any] | None = None, **more: Any
    ) -> Glasshouse:
        more.setdefault("state_dir", directory / f"state-{len(started)}")
        made = Glasshouse(backends or [], config, **more)
        started.append(made)
        _running.append(made)
        return made.start()

    try:
        yield start
    finally:
        failures = []
        for each in started:
            _running.remove(each)
            try:
                each.stop()
            except AssertionError as failure:
                failures.append(failure)
        if failures:
            raise failures[0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if REQUIRE_ALL and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, and GLASSHOUSE_REQUIRE_ALL=1: {_reason(report.longrepr)}"
    if report.failed:
        for each in _running:
            report.sections += [(f"{name}.log", "\n".join(text.splitlines()[-30:])) for name, text in each.logs().items()]
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if REQUIRE_ALL and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped, and GLASSHOUSE_REQUIRE_ALL=1: {_reason(report.longrepr)}"
    return report


def _reason(longrepr: object) -> str:
    return str(longrepr[2] if isinstance(longrepr, tuple) else longrepr)
