"""How hard the fuzzers try.

In an ordinary test run each tries a bounded number of examples, the same ones every time: a test that others wait for must not
fail for something that was there before their change. CI tries more of them, and for the same reason with a seed (`--seed`).
`make fuzz` is for finding things: it draws new examples until its time is over, keeps those that failed in `.hypothesis` and
tries them again first. A failure prints its smallest example, and a line that makes a test of it (`@reproduce_failure`).
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

ROUND = 10
"""Examples of a long run's round, as a multiple of an ordinary one's."""

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


class Effort:
    """`seconds` for each fuzzer; 0: an ordinary test run. Known before the tests are imported."""

    seconds = 0.0


def effort(examples: int) -> settings:
    """For a test that tries `examples` in an ordinary run, and so many times ROUND in each round of a long one."""
    if Effort.seconds:
        return settings(max_examples=examples * ROUND, deadline=None, print_blob=True, suppress_health_check=_SLOW)
    return settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, print_blob=True, suppress_health_check=_SLOW
    )
