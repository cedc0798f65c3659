"""Grafana's classic dashboard JSON from a few plain values: what all panels have in common is said here, once.

Queries are made from the table of metrics (`collectors/records/metrics.py`), so a metric that isn't there can't be asked for, and
a query follows every variable that its metric has a label for. Nothing here knows what a dashboard is about.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from collectors.records.metrics import COUNTERS, GAUGES, HISTOGRAMS, WORKER_COUNTERS

Json = dict[str, Any]

COLUMNS: Final = 24
SCHEMA_VERSION: Final = 39
"""Grafana 10.4 and later read it; newer ones bring it up to date by themselves."""
DATASOURCE: Final[Json] = {"type": "prometheus", "uid": "${datasource}"}
VARIABLES: Final = ("model", "backend", "key")
LABELS: Final[Mapping[str, tuple[str, ...]]] = {
    **{row.name: row.labels for row in COUNTERS},
    **{row.name: row.labels for row in HISTOGRAMS},
    **{row.name: row.labels for row in WORKER_COUNTERS},
    **{row.name: row.labels for row in GAUGES},
}


# -- queries --


def now(metric: str, *matchers: str) -> str:
    """A gauge's series, for the chosen models, backends and keys as far as it has those labels."""
    return metric + _matching(metric, matchers)


def counted(metric: str, *matchers: str) -> str:
    """A counter's series as the recording rules keep them: from zero, so that what a new series began with isn't missed."""
    return f"series:{metric}:from_zero" + _matching(metric, matchers)


def per_second(metric: str, *matchers: str, by: str = "") -> str:
    return f"sum{_by(by)}(rate({counted(metric, *matchers)}[$__rate_interval]))"


def in_range(metric: str, *matchers: str, by: str = "") -> str:
    return f"sum{_by(by)}(increase({counted(metric, *matchers)}[$__range]))"


def quantile(share: float, metric: str, *matchers: str, by: str = "") -> str:
    """Of a histogram: the value that this share of the observations doesn't exceed."""
    buckets = f"{metric}_bucket{_matching(metric, matchers)}"
    return f"histogram_quantile({share:g}, sum{_by('le', by)}(rate({buckets}[$__rate_interval])))"


def or_none(query: str, **labels: str) -> str:
    """The query, or while it finds nothing a series of zeros with these labels: nothing to see is not a broken panel."""
    none = "vector(0)"
    for label, value in labels.items():
        none = f'label_replace({none}, "{label}", "{value}", "", "")'
    return f"{query} or on () {none}"


def _matching(metric: str, matchers: Iterable[str]) -> str:
    labels = LABELS[metric]
    every = [*(f'{name}=~"${name}"' for name in VARIABLES if name in labels), *matchers]
    return f"{{{', '.join(every)}}}" if every else ""


def _by(*labels: str) -> str:
    named = ", ".join(label for label in labels if label)
    return f" by ({named}) " if named else ""


# -- panels --


@dataclass(frozen=True)
class Query:
    """`legend`: a series' name, with `{{label}}` for a label's value. `instant`: of now, instead of a line."""

    expr: str
    legend: str
    instant: bool = False
    exemplar: bool = False


@dataclass(frozen=True)
class Panel:
    """`id` never changes: links and alerts name it. `unit`: one of Grafana's. `levels`: (from, colour), rising, above green.
    `colors`: a series' name, or a regular expression between slashes, and its colour."""

    id: int
    title: str
    description: str
    unit: str
    queries: Sequence[Query]
    width: int
    height: int = 8
    decimals: int | None = None
    levels: Sequence[tuple[float, str]] = ()
    colors: Mapping[str, str] = field(default_factory=dict)
    overrides: Sequence[Json] = ()

    kind = ""

    def json(self, x: int, y: int) -> Json:
        return {
            "id": self.id,
            "type": self.kind,
            "title": self.title,
            "description": f"{self.description}\n\n{self._followed()}",
            "datasource": DATASOURCE,
            "gridPos": {"h": self.height, "w": self.width, "x": x, "y": y},
            "targets": [_target(query, chr(ord("A") + number)) for number, query in enumerate(self.queries)],
            "fieldConfig": {"defaults": self._defaults(), "overrides": [*self._colored(), *self.overrides]},
            "options": self._options(),
        }

    def _followed(self) -> str:
        text = " ".join(query.expr for query in self.queries)
        followed = [name for name in VARIABLES if f"${name}" in text]
        return f"Follows: {', '.join(followed)}." if followed else "Of everything, whatever is chosen above."

    def _defaults(self) -> Json:
        return {
            "unit": self.unit,
            "min": 0,
            "color": {"mode": "palette-classic"},
            "thresholds": steps(*self.levels),
            **({} if self.decimals is None else {"decimals": self.decimals}),
        }

    def _colored(self) -> list[Json]:
        return [override(name, {"color": {"mode": "fixed", "fixedColor": color}}) for name, color in self.colors.items()]

    def _options(self) -> Json:
        raise NotImplementedError


@dataclass(frozen=True)
class Lines(Panel):
    """Over time. `stacked`: the lines are parts of a whole. `reach`: how far the axis goes at least, so that next to nothing
    looks like it."""

    stacked: bool = False
    reach: float | None = None

    kind = "timeseries"

    def _defaults(self) -> Json:
        custom = {
            "drawStyle": "line",
            "lineInterpolation": "linear",
            "lineWidth": 0 if self.stacked else 1,
            "fillOpacity": 60 if self.stacked else 0,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"mode": "normal" if self.stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "dashed" if self.levels else "off"},
            **({} if self.reach is None else {"axisSoftMax": self.reach}),
        }
        return {**super()._defaults(), "custom": custom}

    def _options(self) -> Json:
        return {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": ["lastNotNull"]},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }


@dataclass(frozen=True)
class States(Panel):
    """A band for each series, of one state after the other. `names`: of a state's number, and its colour."""

    names: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    kind = "state-timeline"

    def _defaults(self) -> Json:
        custom = {"lineWidth": 0, "fillOpacity": 70, "spanNulls": False}
        return {**super()._defaults(), "color": {"mode": "thresholds"}, "mappings": _named(self.names), "custom": custom}

    def _options(self) -> Json:
        return {
            "mergeValues": True,
            "showValue": "auto",
            "alignValue": "left",
            "rowHeight": 0.9,
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "single", "sort": "none"},
        }


@dataclass(frozen=True)
class Numbers(Panel):
    """The latest values, large. `names`: what is shown instead of a number, and its colour."""

    names: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    kind = "stat"

    def _defaults(self) -> Json:
        defaults = {**super()._defaults(), "color": {"mode": "thresholds"}}
        if self.names:
            defaults["mappings"] = _named(self.names)
        return defaults

    def _options(self) -> Json:
        return {
            "reduceOptions": _LATEST,
            "orientation": "auto",
            "textMode": "value_and_name",
            "colorMode": "value",
            "graphMode": "none",
            "justifyMode": "auto",
            "wideLayout": True,
        }


@dataclass(frozen=True)
class Bars(Panel):
    """The largest first."""

    kind = "bargauge"

    def _defaults(self) -> Json:
        return {**super()._defaults(), "color": {"mode": "fixed", "fixedColor": "blue"}}

    def _options(self) -> Json:
        return {
            "reduceOptions": _LATEST,
            "orientation": "horizontal",
            "displayMode": "basic",
            "valueMode": "text",
            "namePlacement": "left",
            "showUnfilled": False,
            "sizing": "auto",
            "minVizWidth": 8,
            "minVizHeight": 16,
        }


_LATEST: Final[Json] = {"calcs": ["lastNotNull"], "fields": "", "values": False}


def _named(names: Mapping[str, tuple[str, str]]) -> list[Json]:
    """Values that have a name and a colour."""
    options = {value: {"text": text, "color": color, "index": at} for at, (value, (text, color)) in enumerate(names.items())}
    return [{"type": "value", "options": options}]


def steps(*levels: tuple[float, str], lowest: str = "green") -> Json:
    """Thresholds: `lowest`, and from each level on its colour."""
    return {
        "mode": "absolute",
        "steps": [{"color": lowest, "value": None}, *({"color": color, "value": value} for value, color in levels)],
    }


def override(name: str, properties: Mapping[str, Any]) -> Json:
    """Other properties for the series of this name (between slashes: a regular expression)."""
    by = "byRegexp" if re.fullmatch(r"/.*/", name) else "byName"
    listed = [{"id": key, "value": value} for key, value in properties.items()]
    return {"matcher": {"id": by, "options": name}, "properties": listed}


def _target(query: Query, ref: str) -> Json:
    return {
        "refId": ref,
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": query.expr,
        "legendFormat": query.legend,
        "instant": query.instant,
        "range": not query.instant,
        "exemplar": query.exemplar,
    }


# -- a dashboard --


@dataclass(frozen=True)
class Row:
    """Panels under a heading, from left to right, then the next line."""

    id: int
    title: str
    panels: Sequence[Panel]


def dashboard(uid: str, title: str, description: str, rows: Sequence[Row]) -> Json:
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": ["glasshouse"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "refresh": "30s",
        "templating": {"list": [_DATASOURCE_VARIABLE, *map(_variable, VARIABLES)]},
        "annotations": {"list": []},
        "links": [],
        "panels": _placed(rows),
    }


_DATASOURCE_VARIABLE: Final[Json] = {
    "name": "datasource",
    "label": "Prometheus",
    "type": "datasource",
    "query": "prometheus",
    "refresh": 1,
    "includeAll": False,
    "multi": False,
}


def _variable(name: str) -> Json:
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": f"label_values(glasshouse_requests_total, {name})", "refId": name},
        "refresh": 2,
        "sort": 1,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "options": [],
    }


def _placed(rows: Sequence[Row]) -> list[Json]:
    made: list[Json] = []
    y = 0
    for row in rows:
        heading = {"h": 1, "w": COLUMNS, "x": 0, "y": y}
        made.append({"id": row.id, "type": "row", "title": row.title, "collapsed": False, "gridPos": heading, "panels": []})
        x, y, height = 0, y + 1, 0
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                x, y, height = 0, y + height, 0
            made.append(panel.json(x, y))
            x, height = x + panel.width, max(height, panel.height)
        y += height
    return made


def text(made: Json) -> str:
    """As it is checked in."""
    return json.dumps(made, indent=2, ensure_ascii=False) + "\n"


def write(made: Json, source: str) -> None:
    """Beside its source."""
    Path(source).with_suffix(".json").write_text(text(made))
