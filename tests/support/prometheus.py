"""A real Prometheus, scraping what it is told to, for as long as a test needs it.

    with Prometheus(tmp_path, config) as prometheus:
        prometheus.query("sum(up)")

It is Debian's `prometheus` (2.42), or whichever is in the PATH.
"""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, build_opener

import pytest

PATIENCE: Final = 60.0
_direct = build_opener(ProxyHandler({}))
T = TypeVar("T")


def tool(name: str) -> str:
    """The path of `prometheus` or `promtool`; skips the test where there is none."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} isn't installed; on Debian and Ubuntu: apt-get install prometheus")
    return found


class Found(NamedTuple):
    """One series of an answer: its labels, and its values by time (unix seconds)."""

    labels: dict[str, str]
    values: list[tuple[float, float]]

    @property
    def value(self) -> float:
        """The last one."""
        return self.values[-1][1]


class Prometheus:
    """`config`: its configuration file, as a mapping. Everything else is a default, but for exemplars, which are kept."""

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        (directory / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def __enter__(self) -> Self:
        binary = tool("prometheus")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [
            binary,
            f"--config.file={self._directory / 'prometheus.yml'}",
            f"--storage.tsdb.path={self._directory / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--enable-feature=exemplar-storage",
        ]
        with (self._directory / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self.wait(self._ready, "Prometheus")
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._kill()

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log()
        try:
            with _direct.open(f"{self.url}/-/ready", timeout=PATIENCE) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            return False

    def log(self) -> str:
        return (self._directory / "log").read_text(errors="replace")

    # -- queries --

    def query(self, expr: str, at: float | None = None) -> list[Found]:
        """Its value at a time, now if none is given. Raises AssertionError if Prometheus refuses the query."""
        answer = self._ask("query", {"query": expr, **({} if at is None else {"time": f"{at:.3f}"})})
        if answer["resultType"] == "scalar":
            return [Found({}, _points([answer["result"]]))]
        return [Found(each["metric"], _points(each.get("values") or [each["value"]])) for each in answer["result"]]

    def range(self, expr: str, start: float, end: float, step: float) -> list[Found]:
        """Its values over a time."""
        asked = {"query": expr, "start": f"{start:.3f}", "end": f"{end:.3f}", "step": f"{step:.3f}"}
        return [Found(each["metric"], _points(each["values"])) for each in self._ask("query_range", asked)["result"]]

    def exemplars(self, expr: str, start: float, end: float) -> list[dict[str, str]]:
        """The labels of the exemplars of these series."""
        found = self._ask("query_exemplars", {"query": expr, "start": f"{start:.3f}", "end": f"{end:.3f}"})
        return [exemplar["labels"] for series in found for exemplar in series["exemplars"]]

    def number(self, expr: str, at: float | None = None) -> float:
        """Of a query that has one value; NaN while it has none."""
        found = self.query(expr, at)
        assert len(found) <= 1, f"{expr} has {len(found)} values"
        return found[0].value if found else math.nan

    def wait(self, look: Callable[[], T | None], what: str) -> T:
        """The first true thing that `look` finds."""
        deadline = time.monotonic() + PATIENCE
        while not (found := look()):
            assert time.monotonic() < deadline, f"waited {PATIENCE:.0f} s in vain for {what}\n{self.log()[-2000:]}"
            time.sleep(0.1)
        return found

    def _ask(self, what: str, parameters: Mapping[str, str]) -> Any:
        try:
            with _direct.open(f"{self.url}/api/v1/{what}", urlencode(parameters).encode(), timeout=PATIENCE) as answer:
                return json.load(answer)["data"]
        except HTTPError as refused:
            raise AssertionError(f"{parameters['query']}: {refused.read().decode(errors='replace')}") from None


def _points(values: list[list[Any]]) -> list[tuple[float, float]]:
    return [(float(when), float(value)) for when, value in values]
