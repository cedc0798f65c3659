"""The results as a table for people and as JSON for comparing runs."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from tests.bench.measure import BASELINE, Plan, Result, Sample, ratio


def as_json(results: Sequence[Result], plan: Plan) -> dict[str, Any]:
    """For msgspec or json to write."""
    machine = {"cpus": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}
    summary = {
        result.name: {
            "requests": _summary(result.requests, _baseline(results, "requests")),
            "streams": _summary(result.streams, _baseline(results, "streams")),
        }
        for result in results
    }
    return {"machine": machine, "plan": plan, "summary": summary, "results": list(results)}


def _summary(samples: Sequence[Sample], baseline: Sequence[Sample]) -> dict[str, float | None]:
    return {
        "per_second": _median(samples, lambda s: s.completed / s.seconds),
        "worker_us": _median(samples, lambda s: s.worker_us),
        "others_us": _median(samples, lambda s: s.others_us),
        "failed": sum(sample.failed for sample in samples),
        "ratio": ratio(samples, baseline) if baseline and samples[0].cpu_us else None,
    }


def _baseline(results: Sequence[Result], kind: str) -> list[Sample]:
    return next((getattr(result, kind) for result in results if result.name == BASELINE), [])


def _median(samples: Sequence[Sample], value: Callable[[Sample], float]) -> float:
    return statistics.median(map(value, samples))


def as_table(results: Sequence[Result], plan: Plan) -> str:
    lines = [
        f"{plan.connections} connections, medians of {plan.rounds} interleaved rounds; CPU time of the target's processes, "
        + ("each target on a CPU of its own" if plan.pinned else "all on the same CPUs"),
        "",
        *_work("whole answers", results, "requests"),
        "",
        *_work(f"streams of {plan.chunks} chunks, {plan.interval * 1000:g} ms apart", results, "streams"),
        "",
        *_footprints(results),
    ]
    return "\n".join(lines)


def requests_table(results: Sequence[Result], plan: Plan) -> str:
    """The part for whole answers."""
    return "\n".join(_work(f"whole answers, {plan.connections} connections", results, "requests"))


def _work(title: str, results: Sequence[Result], kind: str) -> list[str]:
    lines = [f"{title:<44}{'per s':>9}{'worker us':>11}{'x ' + BASELINE:>9}{'others us':>11}{'failed':>8}"]
    baseline = _baseline(results, kind)
    for result in results:
        summary = _summary(getattr(result, kind), baseline)
        times = summary["ratio"]
        lines.append(
            f"  {result.name:<42}{summary['per_second']:>9,.0f}{summary['worker_us']:>11,.1f}"
            f"{'' if times is None else f'{times:.2f}':>9}{summary['others_us']:>11,.1f}{summary['failed']:>8,}"
        )
    return lines


def _footprints(results: Sequence[Result]) -> list[str]:
    lines = [f"{'memory of the worker':<44}{'RSS MB':>9}{'PSS MB':>11}{'KB/idle':>9}{'KB/stream':>11}"]
    for result in results:
        if (found := result.footprint) is not None:
            lines.append(
                f"  {result.name:<42}{found.rest.rss / 2**20:>9.1f}{found.rest.pss / 2**20:>11.1f}"
                f"{found.per_connection / 1024:>9.1f}{found.per_stream / 1024:>11.1f}"
            )
    return lines
