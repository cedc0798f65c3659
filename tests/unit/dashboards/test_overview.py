"""The dashboard as it is checked in: today's, whole, and of metrics that there are. tests/server asks what it answers."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from dashboards.grafana import board, overview

DASHBOARDS: Final = Path(__file__).parents[3] / "dashboards"
FILE: Final = DASHBOARDS / "grafana" / "overview.json"
BOARD: Final[dict[str, Any]] = json.loads(FILE.read_text())
PANELS: Final[list[dict[str, Any]]] = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
TARGETS: Final[list[dict[str, Any]]] = [target for panel in PANELS for target in panel["targets"]]
METRIC: Final = re.compile(r"\bglasshouse_\w+")


def metric(name: str) -> str:
    """What a series' name is of: a histogram's parts are the histogram's."""
    part = re.fullmatch(r"(\w+)_(bucket|sum|count)", name)
    return part[1] if part and part[1] in board.LABELS else name


def shown() -> set[str]:
    return {metric(name) for target in TARGETS for name in METRIC.findall(target["expr"])}


def test_it_is_what_its_source_makes() -> None:
    assert FILE.read_text() == board.text(overview.made()), "run `make dashboards`"


def test_every_metric_that_is_asked_for_exists() -> None:
    variables = {metric(name) for name in METRIC.findall(json.dumps(BOARD["templating"]))}
    assert shown() | variables <= board.LABELS.keys()


def test_every_metric_is_shown_or_it_is_said_why_not() -> None:
    assert board.LABELS.keys() - shown() == overview.NOT_SHOWN.keys()


def test_a_metric_that_is_not_there_cannot_be_asked_for() -> None:
    with pytest.raises(KeyError):
        board.now("glasshouse_no_such_thing")


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target["expr"])
def test_a_query_follows_every_variable_that_its_metrics_have_a_label_for(target: dict[str, Any]) -> None:
    for name, selector in re.findall(r"(glasshouse_\w+)(?::from_zero)?(\{[^}]*\})?", target["expr"]):
        for variable in board.VARIABLES:
            assert (f'{variable}=~"${variable}"' in selector) == (variable in board.LABELS[metric(name)])


def test_counters_are_read_from_zero() -> None:
    assert not re.search(r"(rate|increase)\(glasshouse_\w+_total\b", json.dumps(BOARD))


def test_ids_are_unique() -> None:
    ids = Counter(panel["id"] for panel in BOARD["panels"])
    assert set(ids.values()) == {1}
    for panel in PANELS:
        assert set(Counter(target["refId"] for target in panel["targets"]).values()) == {1}


def test_nothing_overlaps_and_nothing_sticks_out() -> None:
    places = [(panel["title"], panel["gridPos"]) for panel in BOARD["panels"]]
    for title, place in places:
        assert place["x"] + place["w"] <= board.COLUMNS, title
    for (first, a), (second, b) in combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        above = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or above, (first, second)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_asks_and_explains(panel: dict[str, Any]) -> None:
    assert panel["title"].endswith("?")
    assert len(panel["description"]) > 60
    defaults = panel["fieldConfig"]["defaults"]
    assert defaults["unit"]
    assert all(target["legendFormat"] for target in panel["targets"])
    steps = [step["value"] for step in defaults["thresholds"]["steps"]]
    assert steps[0] is None
    assert steps[1:] == sorted(steps[1:])
    assert ("Line:" in panel["description"] or "Lines:" in panel["description"]) == (
        panel["type"] == "timeseries" and len(steps) > 1
    ), "a line is explained"


def test_titles_are_asked_once() -> None:
    assert set(Counter(panel["title"] for panel in BOARD["panels"]).values()) == {1}


def test_it_reads_whichever_prometheus_is_chosen() -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    assert all(each["datasource"] == chosen for each in (*PANELS, *TARGETS))
    variables = {each["name"]: each for each in BOARD["templating"]["list"]}
    assert variables.keys() == {"datasource", *board.VARIABLES}
    assert variables["datasource"]["query"] == "prometheus"
    assert all(variables[name]["includeAll"] and variables[name]["allValue"] == ".*" for name in board.VARIABLES)


def test_grafana_knows_the_scrape_interval() -> None:
    provisioning = DASHBOARDS / "grafana" / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources" / "glasshouse.yml").read_text())["datasources"]
    scraping = yaml.safe_load((DASHBOARDS / "prometheus" / "prometheus.yml").read_text())
    assert source["type"] == "prometheus"
    assert source["jsonData"]["timeInterval"] == scraping["global"]["scrape_interval"]
    [provider] = yaml.safe_load((provisioning / "dashboards" / "glasshouse.yml").read_text())["providers"]
    assert provider["type"] == "file"
