"""A soak: a whole Glasshouse over two engines, used, misused and disturbed for a while; then its books are checked, and whether
anything of it has grown.

What it stands for: requests, streams and connections leave nothing behind (FAILURES.md 19, 20, 21), not in the worker, not in
the collector, not in who supervises them; connections to engines outlive reloads and restarts (67); and whatever happens, every
accepted request is one row of the ledger that says what its client saw (49, 50, 51), and limits and budgets, which are on all the
time, have counted the same and hold nothing when nothing runs (60, 61).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from proxy.journal import read_heartbeats
from proxy.spend import Amounts, Holder, Period, SpendReader
from tests.soak.clients import Clients, Key, Keys
from tests.soak.disturb import MOST_KEYS, Disturber, Engine
from tests.soak.exact import complaints, disagreements, door_complaints, misspent
from tests.soak.watch import Sample, Trend, disk_mib, look_at, trends
from tests.support.glasshouse import Glasshouse
from tests.support.worker import MODEL

TEAM: Final = "soakers"
GENEROUS: Final[dict[str, Any]] = {
    "requests_per_minute": 1_000_000,
    "input_tokens_per_minute": 1_000_000_000,
    "output_tokens_per_minute": 1_000_000_000,
    "tokens_per_minute": 1_000_000_000,
    "concurrent_requests": 1_000,
    "budgets": [{"money": 1_000_000, "per": "month"}, {"tokens": 1_000_000_000_000, "per": "total"}],
}
"""More of everything than is used, and all of it has to be counted."""
IN_A_TEAM: Final = ("default", *(f"key {number}" for number in range(1, MOST_KEYS // 2)))
CONFIG: Final[dict[str, Any]] = {
    "everyone": GENEROUS,
    "teams": {TEAM: GENEROUS},
    "keys": {name: {"team": TEAM, **GENEROUS} for name in IN_A_TEAM},
    "models": {MODEL: {"price": {"input": 0.1, "cached_input": 0.02, "output": 0.4}}},
    "timeouts": {"drain": 15, "first_byte": 4, "client_write": 4, "client_idle": 30},
    "journal": {"segment_bytes": 1024 * 1024},
}
PATIENCE: Final = 120.0


class Result(NamedTuple):
    requests: int
    kinds: dict[str, int]
    outcomes: dict[str, int]
    disturbances: dict[str, int]
    trends: list[Trend]
    problems: list[str]
    """What wasn't as it must be."""


class Soak:
    """`tell` gets a line now and then."""

    def __init__(self, minutes: float, directory: Path, *, clients: int, seed: int, tell: Callable[[str], None]) -> None:
        self._seconds = minutes * 60
        self._directory = directory
        self._number = clients
        self._seed = seed
        self._tell = tell
        self._samples: list[Sample] = []
        self._began = 0.0
        self._supervisor = 0

    def run(self) -> Result:
        with Engine() as one, Engine() as two, Glasshouse([one.url, two.url], CONFIG, self._directory) as glasshouse:
            return self._run(glasshouse, [one, two])

    def _run(self, glasshouse: Glasshouse, engines: list[Engine]) -> Result:
        self._began = time.monotonic()
        keys = Keys([Key(glasshouse.key)])
        self._supervisor = glasshouse.pid("supervisor")
        self._change_the_catalogue(glasshouse)
        at_rest = self._at_rest(glasshouse)
        with (
            Clients(glasshouse.url, keys, self._number, self._seed, pause_s=0.2) as clients,
            Disturber(glasshouse, engines, keys, self._seconds) as disturber,
        ):
            self._watch(glasshouse, clients, disturber)
        for broken in (*clients.broken, *disturber.broken):
            raise broken
        problems = [f"at rest again: {what}" for what in self._grown_at_rest(glasshouse, at_rest)]
        accepted = sum(each.accepted for each in clients.asked)
        self._tell(f"{len(clients.asked)} requests sent, about {accepted} of them accepted; waiting for the books")
        rows = self._settled_rows(glasshouse)
        problems += complaints(clients.asked, rows, disturber.disturbances)
        problems += door_complaints(clients.asked, disturber.disturbances)
        problems += disagreements(rows, glasshouse.metrics())
        problems += misspent(rows, self._spent(glasshouse))
        problems += [f"a bug is in the log: {line[:300]}" for text in glasshouse.logs().values() for line in _bugs(text)]
        found = trends(self._samples)
        problems += [
            f"{each.role}: {each.quantity} grew by {each.rise:.1f} in the second half"
            for each in found
            if each.verdict == "GROWS"
        ]
        return Result(
            len(clients.asked),
            _counted(each.kind for each in clients.asked),
            _counted(row["outcome"] for row in rows),
            disturber.done,
            found,
            problems,
        )

    # -- meanwhile --

    def _watch(self, glasshouse: Glasshouse, clients: Clients, disturber: Disturber) -> None:
        every = min(5.0, max(1.0, self._seconds / 240))
        said = self._began
        while (now := time.monotonic()) < self._began + self._seconds and not (clients.over.is_set() or disturber.over.is_set()):
            self._sample(glasshouse)
            if now - said >= 10:
                said = now
                self._tell(self._progress(clients, disturber))
            time.sleep(max(0.0, every - (time.monotonic() - now)))

    def _sample(self, glasshouse: Glasshouse) -> None:
        at = time.monotonic() - self._began
        for role, pids in self._pids(glasshouse).items():
            for pid in pids:
                try:
                    taken = look_at(pid)
                except OSError:
                    continue  # it has just ended
                self._samples += [Sample(at, role, quantity, pid, value) for quantity, value in taken.items()]
        for beat in read_heartbeats(glasshouse.settings.journal_path):
            if beat.alive:
                process = int(beat.incarnation, 16)
                said = {
                    "tasks": beat.tasks,
                    "in flight": beat.in_flight,
                    "connections": beat.connections,
                    "holding": beat.reservations,
                }
                self._samples += [Sample(at, "worker", quantity, process, value) for quantity, value in said.items()]
        on_disk = {
            "journal, MiB": disk_mib(glasshouse.settings.journal_path, "*"),
            "ledger, MiB": disk_mib(glasshouse.state_dir, "glasshouse.db*"),
            "logs, MiB": disk_mib(glasshouse.settings.log_path, "*"),
        }
        self._samples += [Sample(at, "disk", quantity, 0, value) for quantity, value in on_disk.items()]

    def _pids(self, glasshouse: Glasshouse) -> dict[str, list[int]]:
        """Without the commands that are called meanwhile."""
        return {**glasshouse.pids(), "supervisor": [self._supervisor]}

    def _progress(self, clients: Clients, disturber: Disturber) -> str:
        last = {(each.role, each.quantity): each.value for each in self._samples[-60:]}
        figures = ", ".join(
            f"{role} {last.get((role, 'heap, MiB'), 0):.1f} MiB {last.get((role, 'open files'), 0):.0f} files"
            for role in ("worker", "collector", "control", "supervisor")
        )
        done = ", ".join(f"{number} {name}" for name, number in disturber.done.items()) or "nothing yet"
        elapsed = time.monotonic() - self._began
        asked = f"{len(clients.asked)} requests ({len(clients.asked) / elapsed:.0f}/s)"
        return f"{elapsed:5.0f} s  {asked}, {last.get(('worker', 'in flight'), 0):.0f} in flight; {figures}; {done}"

    # -- before and after --

    def _at_rest(self, glasshouse: Glasshouse) -> dict[tuple[str, str], float]:
        """What each role has open when nothing is asked of it: the least of some looks, as discovery comes and goes."""
        self._quiet(glasshouse)
        least: dict[tuple[str, str], float] = {}
        for _ in range(20):
            for role, pids in self._pids(glasshouse).items():
                taken = look_at(pids[0])
                pooled = role in ("control", "worker")  # their pools' threads are made when first needed, and stay
                for quantity in ("open files",) if pooled else ("open files", "threads"):
                    least[role, quantity] = min(taken[quantity], least.get((role, quantity), taken[quantity]))
            [beat] = [beat for beat in read_heartbeats(glasshouse.settings.journal_path) if beat.alive]
            for quantity, value in (("tasks", beat.tasks), ("requests that hold something", beat.reservations)):
                least["worker", quantity] = min(value, least.get(("worker", quantity), value))
            time.sleep(0.2)
        return least

    def _change_the_catalogue(self, glasshouse: Glasshouse) -> None:
        """Twice, and until workers have followed: what is made at its first use (threads, connections to the database) stays."""
        for command in ("create", "revoke"):
            glasshouse.command("keys", command, "first-of-all")
            time.sleep(2.0)

    def _grown_at_rest(self, glasshouse: Glasshouse, before: dict[tuple[str, str], float]) -> list[str]:
        """Until it is as it was before, and no longer than it may take: kept connections close after seconds."""
        deadline = time.monotonic() + PATIENCE
        while True:
            after = self._at_rest(glasshouse)
            grown = [
                f"{role} has {after[role, what]:g} {what}, and had {before[role, what]:g}"
                for role, what in before
                if after[role, what] > before[role, what]
            ]
            if not grown or time.monotonic() > deadline:
                return grown

    def _quiet(self, glasshouse: Glasshouse) -> None:
        """Until one process of each role runs, and nobody is connected."""
        deadline = time.monotonic() + PATIENCE
        while True:
            alone = all(len(pids) == 1 for pids in glasshouse.pids().values())
            beats = [beat for beat in read_heartbeats(glasshouse.settings.journal_path) if beat.alive]
            if alone and len(beats) == 1 and not beats[0].connections and not beats[0].in_flight:
                return
            if time.monotonic() > deadline:
                raise glasshouse.failure(f"no rest after {PATIENCE:.0f} s: {glasshouse.pids()}, {beats}")
            time.sleep(0.2)

    def _spent(self, glasshouse: Glasshouse) -> dict[str, dict[Holder, Amounts]]:
        """What a worker would begin with."""
        settings = glasshouse.settings
        spent = SpendReader(settings.spend_path, settings.journal_path, settings.currency).look().totals(Period("total"), 0)
        if spent is None:
            raise glasshouse.failure("what was spent isn't known")
        return spent

    def _settled_rows(self, glasshouse: Glasshouse) -> list[dict[str, Any]]:
        """The ledger when all of the journal is in it, and the metrics say the same."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            metrics = glasshouse.metrics()
            rows = glasshouse.rows()
            lag = metrics.total("glasshouse_journal_lag_bytes")
            if lag == 0 and metrics.total("glasshouse_requests_total") == len(rows):
                return rows
            time.sleep(1.0)
        return rows


def _bugs(text: str) -> list[str]:
    return [line for line in text.splitlines() if "Traceback" in line or '"exception"' in line]


def _counted(names: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))
