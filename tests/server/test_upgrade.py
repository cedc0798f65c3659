"""A state directory that the version before left behind, killed in the middle of its work, starts and loses nothing.

`tests/fixtures/state-1` has its files; what is expected of them is told there.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import Start
from tests.support.scripted_vllm import ScriptedVLLM
from tests.support.wire_client import ask
from tests.unit.collectors.receiver import receiving

LEFT_BEHIND: Final = Path(__file__).parents[1] / "fixtures" / "state-1"
REQUESTS: Final = {
    "stored-plain": ("ok", 12),
    "stored-stream": ("ok", 16),
    "stored-rejected": ("client_error", 0),
    "untraced-plain": ("ok", 3),
    "untraced-stream": ("ok", 5),
    "unread-plain": ("ok", 7),
    "unread-stream": ("ok", 9),
    "unread-failed": ("upstream_error", 0),
    "open-stream": ("crashed", 5),
    "open-plain": ("crashed", 0),
}
"""Name → how it is booked in the end, and its output tokens."""
SPANS_EXPORTED: Final = 7


@pytest.fixture
def left_behind(tmp_path: Path) -> Path:
    """The directory as a killed host has it: the database is in place, the journal's last segment has no end."""
    state = tmp_path / "state"
    shutil.copytree(LEFT_BEHIND, state, ignore=shutil.ignore_patterns("glasshouse.sql", "key", "README.md"))
    with contextlib.closing(sqlite3.connect(state / "glasshouse.db")) as database:
        database.executescript((LEFT_BEHIND / "glasshouse.sql").read_text())
    return state


def test_nothing_of_the_version_before_is_lost(glasshouse: Start, vllm: ScriptedVLLM, left_behind: Path) -> None:
    key = (LEFT_BEHIND / "key").read_text().strip()
    with receiving() as phoenix:
        running = glasshouse(
            [{"url": vllm.url, "name": "gpu-0"}],
            {
                "phoenix": {"url": phoenix.url, "project": "upgrade"},
                "currency": "EUR",
                "models": {"smollm2": {"price": {"input": 0.1, "cached_input": 0.02, "output": 0.4}}},
            },
            state_dir=left_behind,
            key=key,
        )
        rows = running.rows(len(REQUESTS))
        assert len(rows) == len(REQUESTS)
        assert {row["client_request_id"]: (row["outcome"], row["output_tokens"]) for row in rows} == REQUESTS
        assert {row["currency"] for row in rows if row["outcome"] == "ok"} == {"EUR"}

        running.wait_metric("glasshouse_requests_total", len(rows))
        running.wait_metric("glasshouse_unaccepted_requests_total", 3)  # two were counted, the third was the worker's last word
        untold = {row["trace_id"] for row in rows if not row["client_request_id"].startswith("stored-")}
        phoenix.wait(spans=len(untold))
        running.wait_metric("glasshouse_spans_exported_total", SPANS_EXPORTED + len(phoenix.spans))
        assert sorted(phoenix.traces()) == sorted(untold)
        metrics = running.metrics()
        assert metrics.total("glasshouse_requests_total") == len(rows)
        assert metrics.total("glasshouse_tokens_total", kind="output") == sum(tokens for _, tokens in REQUESTS.values())
        assert metrics.total("glasshouse_unaccepted_requests_total") == 3
        assert metrics.total("glasshouse_journal_damaged_segments") == 0

        # the old key, and what the old snapshot knew
        body = {"model": "smollm2", "messages": [{"role": "user", "content": "Hello."}]}
        assert ask(running.url, "/v1/chat/completions", body, key=key).status == 200
        assert len(running.rows(len(REQUESTS) + 1)) == len(REQUESTS) + 1
    complaints = [
        line
        for name in ("collector", "control", "worker-0")
        for line in running.logs()[name].splitlines()
        if '"level": "error"' in line or "changed its shape" in line or "aside" in line or "can't be read" in line
    ]
    assert complaints == []
