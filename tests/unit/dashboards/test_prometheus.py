"""What Prometheus is given: its own tool takes it, and the rules count what the dashboard reads."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from collectors.records.metrics import COUNTERS, GAUGES, WORKER_COUNTERS
from proxy.settings import Settings
from tests.support.prometheus import tool

DASHBOARDS: Final = Path(__file__).parents[3] / "dashboards"
PROMETHEUS: Final = DASHBOARDS / "prometheus"
RULES: Final = PROMETHEUS / "glasshouse.rules.yml"


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


@pytest.mark.parametrize(
    "command",
    [
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "glasshouse.rules.yml"],
        ["test", "rules", "glasshouse.rules.test.yml"],
    ],
    ids=" ".join,
)
def test_promtool_is_content(command: list[str]) -> None:
    done = subprocess.run([tool("promtool"), *command], cwd=PROMETHEUS, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_recorded_is_what_the_dashboard_reads() -> None:
    read = set(re.findall(r"series:\w+:from_zero", (DASHBOARDS / "grafana" / "overview.json").read_text()))
    assert {rule["record"] for rule in rules()} == read


def test_each_rule_is_the_same_rule_of_a_counter() -> None:
    """So that the tests of one are the tests of all."""
    others = {row.name for row in WORKER_COUNTERS} | {row.name for row in GAUGES if row.counter}
    counters = {row.name for row in COUNTERS} | others
    shapes = set()
    for rule in rules():
        name = rule["record"].split(":")[1]
        assert name in counters
        shapes.add(rule["expr"].replace(name, "COUNTER"))
    assert len(shapes) == 1


def test_a_fresh_glasshouse_is_what_is_scraped() -> None:
    [job] = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": [Settings().metrics.listen]}]


def test_no_rule_is_evaluated_less_often_than_it_looks_back() -> None:
    """A series that is new must be seen while it is: at least once in the time for which it is zero."""
    [group] = yaml.safe_load(RULES.read_text())["groups"]
    offsets = {int(seconds) for seconds in re.findall(r"offset (\d+)s", json.dumps(group))}
    assert len(offsets) == 1
    assert int(group["interval"].removesuffix("s")) <= offsets.pop() / 2
