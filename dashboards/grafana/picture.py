"""A picture of a dashboard with the data of a Prometheus, drawn by Grafana's own components, without a Grafana.

    npm install --prefix DIR @grafana/ui@13.2.2 @grafana/data@13.2.3 react@19 react-dom@19 uplot esbuild
    python -m dashboards.grafana.picture --modules DIR/node_modules --prometheus http://127.0.0.1:9090

What a Grafana server brings besides (its panel plugins, the frame around the panels) is left out or stood in for: the picture
shows what the panels say, not every pixel of Grafana. Needs Chromium, and the environment that `make test` builds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode
from urllib.request import urlopen

from playwright.sync_api import sync_playwright

HERE: Final = Path(__file__).parent
STEP_S: Final = 15
WIDTH: Final = 1600
HEADING: Final = 40
MARGIN, CELL, GAP, COLUMNS = 16, 30, 8, 24
PAGE: Final = """<!doctype html><meta charset="utf-8"><link rel="stylesheet" href="page.css">
<body style="margin:0"><div id="root"></div><script>window.BOARD = DATA</script><script src="page.js"></script>"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", type=Path, required=True, help="where npm installed")
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--until", type=float, default=time.time(), help="unix seconds; default: now")
    parser.add_argument("--board", type=Path, default=HERE / "overview.json")
    options = parser.parse_args()
    board = json.loads(options.board.read_text())
    source = Source(options.prometheus, options.until // STEP_S * STEP_S, round(options.minutes * 60))
    answers = {panel["id"]: source.answers(panel) for panel in board["panels"] if panel["type"] != "row"}
    size = {"margin": MARGIN, "heading": HEADING, "cell": CELL, "gap": GAP, "columns": COLUMNS}
    shown = {"board": board, "answers": answers, "from": source.since * 1000, "to": source.until * 1000, **size}
    lines = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / "page.html"
        page.write_text(PAGE.replace("DATA", json.dumps(shown)))
        bundle(options.modules, page.with_name("page.js"))
        shoot(page, HEADING + lines * (CELL + GAP) + 2 * MARGIN, options.board.with_suffix(".png"))


class Source:
    """A Prometheus, and the time that is shown (unix seconds)."""

    def __init__(self, url: str, until: float, seconds: int) -> None:
        self._url = url
        self.until = until
        self.since = until - seconds
        self._values = {"__rate_interval": f"{4 * STEP_S}s", "__range": f"{seconds}s", "__interval": f"{STEP_S}s"}

    def answers(self, panel: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Each series of a panel: its name, its times (ms) and values, null where it has none."""
        return [
            self._named(series, target["legendFormat"], target["instant"])
            for target in panel["targets"]
            for series in self._ask(
                re.sub(r"\$(\w+)", lambda name: self._values.get(name[1], ".*"), target["expr"]), target["instant"]
            )
        ]

    def _ask(self, expr: str, instant: bool) -> list[dict[str, Any]]:
        over = {"time": self.until} if instant else {"start": self.since, "end": self.until, "step": STEP_S}
        query = urlencode({"query": expr, **over})
        with urlopen(f"{self._url}/api/v1/{'query' if instant else 'query_range'}?{query}") as answer:  # noqa: S310 (the user's URL)
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return found

    def _named(self, series: Mapping[str, Any], legend: str, instant: bool) -> dict[str, Any]:
        points = {when: float(value) for when, value in series.get("values") or [series["value"]]}
        steps = 0 if instant else int((self.until - self.since) / STEP_S)
        times = [self.until - STEP_S * number for number in range(steps, -1, -1)]
        values = [points.get(when, math.nan) for when in times]
        return {
            "name": re.sub(r"{{(\w+)}}", lambda label: series["metric"].get(label[1], ""), legend),
            "times": [when * 1000 for when in times],
            "values": [value if math.isfinite(value) else None for value in values],
        }


def bundle(modules: Path, out: Path) -> None:
    command = [f"{modules}/.bin/esbuild", f"{HERE}/picture.jsx", "--bundle", "--jsx=automatic", f"--outfile={out}"]
    options = [
        "--loader:.svg=dataurl",
        "--loader:.ttf=dataurl",
        "--define:process.env.NODE_ENV='production'",
        "--log-level=warning",
    ]
    subprocess.run([*command, *options], env={**os.environ, "NODE_PATH": str(modules.absolute())}, check=True)


def shoot(page: Path, height: int, out: Path) -> None:
    failures: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": WIDTH, "height": height})
        tab.on("pageerror", lambda error: failures.append(str(error)))
        tab.goto(page.as_uri())
        try:
            tab.wait_for_selector("canvas")
            tab.wait_for_timeout(1500)  # the animations of its parts
            tab.screenshot(path=out)
        finally:
            browser.close()
            if failures:  # they say more than that something hasn't come
                raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
