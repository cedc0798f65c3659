"""The cost of Glasshouse beside nginx: ratios of CPU time taken in one run, never wall-clock times."""

from __future__ import annotations

import pytest

from tests.bench.measure import QUICK, measure, ratio
from tests.bench.report import as_table
from tests.bench.targets import Glasshouse, Nginx

# What the design promises; see ARCHITECTURE.md, "Why the relay is two protocols".
PER_REQUEST = 2.2
PER_STREAM = 1.75

pytestmark = [
    pytest.mark.bench,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not Nginx.installed(), reason="nginx isn't installed"),
]


def test_the_worker_costs_little_more_than_nginx_and_the_ledger_has_every_request() -> None:
    nginx, glasshouse = Nginx(), Glasshouse()
    try:
        base, ours = measure([nginx, glasshouse], QUICK)
        recorded = glasshouse.recorded(ours.sent)
    finally:
        nginx.stop()
        glasshouse.stop()
    print(as_table([base, ours], QUICK))
    assert not any(sample.failed for sample in [*base.requests, *base.streams, *ours.requests, *ours.streams])
    assert recorded == ours.sent
    assert ratio(ours.requests, base.requests) <= PER_REQUEST
    assert ratio(ours.streams, base.streams) <= PER_STREAM
