"""`make soak ARGS='--minutes 20'`. Exit status 1 if anything grew, or any row is missing, double or wrong."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.soak.run import Result, Soak
from tests.soak.watch import table

SHOWN = 40
"""Problems of one run; who has more has one cause."""


def report(result: Result) -> str:
    def listed(counts: dict[str, int]) -> str:
        return ", ".join(f"{name} {number}" for name, number in counts.items())

    lines = [
        "",
        f"{result.requests} requests: {listed(result.kinds)}",
        f"rows by outcome: {listed(result.outcomes)}",
        f"disturbances: {listed(result.disturbances)}",
        "",
        table(result.trends),
        "",
        *(f"PROBLEM: {problem}" for problem in result.problems[:SHOWN]),
    ]
    more = len(result.problems) - SHOWN
    lines += [f"and {more} more"] if more > 0 else []
    lines.append(f"{len(result.problems)} problems" if result.problems else "nothing grew, and every row is right")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=20, help="connections that ask, each about twice a second")
    parser.add_argument("--seed", type=int, default=20261120)
    parser.add_argument("--state-dir", type=Path, help="keep everything there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        directory = options.state_dir or Path(scratch)
        soak = Soak(
            options.minutes, directory, clients=options.clients, seed=options.seed, tell=lambda line: print(line, flush=True)
        )
        result = soak.run()
    print(report(result))
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
