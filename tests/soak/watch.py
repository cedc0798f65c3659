"""What processes take, looked at again and again; and whether any of it grows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from statistics import fmean, median
from typing import Final, NamedTuple

MIB: Final = 1024 * 1024


class Sample(NamedTuple):
    """`value` of one quantity of one process (or place on the disk) at a time, seconds."""

    at: float
    role: str
    quantity: str
    process: int
    value: float


def look_at(pid: int) -> dict[str, float]:
    """Resident and anonymous (the heap's) MiB, open files, threads. Raises OSError if it has gone."""
    place = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines() if ":" in line)
    return {
        "RSS, MiB": int(status["VmRSS"].split()[0]) / 1024,
        "heap, MiB": int(status["RssAnon"].split()[0]) / 1024,
        "open files": sum(1 for _ in (place / "fd").iterdir()),
        "threads": int(status["Threads"]),
    }


def disk_mib(directory: Path, pattern: str) -> float:
    """What these files take on the disk."""
    total = 0
    for path in directory.glob(pattern):
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total / MIB


NOISE: Final = {"RSS, MiB": 3.0, "heap, MiB": 3.0, "journal, MiB": 3.0}
"""So much of a rise is none, whatever the spread; of whole things one and a half. Python takes memory by the MiB. In the
half of 20 minutes 3 MiB are some 200 bytes a request."""
NOISE_SHARE: Final = 0.02
YOUNG_S: Final = 5.0
"""A process this young is still starting."""
SETTLED_S: Final = 60.0
"""From this age on a process must not grow: who starts takes memory."""
JUDGED: Final = ("heap, MiB", "open files", "threads", "tasks", "journal, MiB")
"""The rest is there to be seen: a resident set holds what is mapped too, a ledger is made to grow."""


class Trend(NamedTuple):
    role: str
    quantity: str
    least: float
    median: float
    last: float
    rise: float
    """By the slope over the second half, from its beginning to its end."""
    noise: float
    """A rise up to this is none."""
    judged_s: float
    """How long processes old enough were looked at."""

    @property
    def verdict(self) -> str:
        if self.quantity not in JUDGED:
            return ""
        if self.judged_s < SETTLED_S:
            return "too short to tell"
        return "GROWS" if self.rise > self.noise else "flat"


def trends(samples: Iterable[Sample]) -> list[Trend]:
    """One for each role and quantity."""
    series: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    born: dict[int, float] = {}
    for sample in samples:
        series[sample.role, sample.quantity].append(sample)
        born[sample.process] = min(sample.at, born.get(sample.process, sample.at))
    return [_trend(role, quantity, of_it, born) for (role, quantity), of_it in sorted(series.items())]


def _trend(role: str, quantity: str, samples: list[Sample], born: dict[int, float]) -> Trend:
    begin, end = samples[0].at, samples[-1].at
    half = (begin + end) / 2
    settled = [each for each in samples if each.at >= half and each.at - born[each.process] >= SETTLED_S]
    slope, spread = within(settled)
    values = [each.value for each in samples if each.at - born[each.process] >= YOUNG_S] or [samples[-1].value]
    least = NOISE.get(quantity, 1.5)
    noise = max(least, NOISE_SHARE * median(values), 2 * spread)
    judged_s = settled[-1].at - settled[0].at if settled else 0.0
    return Trend(role, quantity, min(values), median(values), values[-1], slope * (end - half), noise, judged_s)


def within(samples: list[Sample]) -> tuple[float, float]:
    """(slope, standard deviation about it) within the processes' lives: a process that follows another doesn't go on from its
    last value, so each has a level of its own.

    The slope is the median of those between any two samples of a life (Theil and Sen): what is kept of each request rises all the
    time; a table that was made anew or a larger batch that had to be read are one step.
    """
    lives: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        lives[sample.process].append(sample)
    thinned = [life[:: max(1, len(life) // 200)] for life in lives.values()]
    slopes = [
        (two.value - one.value) / (two.at - one.at) for life in thinned for one, two in combinations(life, 2) if two.at > one.at
    ]
    if not slopes:
        return 0.0, 0.0
    slope = median(slopes)
    rests = [
        rest - fmean(rests)
        for life in lives.values()
        for rests in [[each.value - slope * each.at for each in life]]
        for rest in rests
    ]
    return slope, fmean(rest * rest for rest in rests) ** 0.5


def table(found: Iterable[Trend]) -> str:
    lines = [f"{'':14}{'':16}{'min':>10}{'median':>10}{'last':>10}{'rise':>10}{'noise':>10}"]
    for each in found:
        figures = "".join(f"{value:10.1f}" for value in (each.least, each.median, each.last, each.rise, each.noise))
        lines.append(f"{each.role:14}{each.quantity:16}{figures}  {each.verdict}")
    return "\n".join(lines)
