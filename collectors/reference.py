"""The metrics' part of `README.md`, generated from the table: `python -m collectors.reference` writes it anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from collectors.records.metrics import COUNTERS, GAUGES, HISTOGRAMS, NANO, WORKER_COUNTERS

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- metrics: begin -->\n", "<!-- metrics: end -->\n"


def table() -> str:
    """Markdown: one row a metric, and the histograms' buckets."""
    lines = ["| metric | type | labels | what |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {kind} | {labels} | {text} |" for name, kind, labels, text in _rows()]
    lines += ["", "Buckets, seconds:", ""]
    lines += [f"- `{row.name}`: {', '.join(f'{bound / NANO:g}' for bound in row.bounds)}" for row in HISTOGRAMS]
    return "\n".join(lines) + "\n"


def _rows() -> Iterator[tuple[str, str, str, str]]:
    for counter in COUNTERS:
        yield counter.name, "counter", _listed(counter.labels), counter.help
    for histogram in HISTOGRAMS:
        yield histogram.name, "histogram", _listed(histogram.labels), histogram.help
    for worker_counter in WORKER_COUNTERS:
        yield worker_counter.name, "counter", _listed(worker_counter.labels), worker_counter.help
    for gauge in GAUGES:
        yield gauge.name, "counter" if gauge.counter else "gauge", _listed(gauge.labels), gauge.help


def _listed(labels: tuple[str, ...]) -> str:
    return ", ".join(f"`{label}`" for label in labels) or "–"  # noqa: RUF001  (an empty cell, in type)


def written_into(text: str) -> str:
    """`text` with today's table between the marks. Raises ValueError if the marks aren't there."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("the marks are missing")
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    README.write_text(written_into(README.read_text()))
