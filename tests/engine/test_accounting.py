"""The ledger's tokens are the engine's own: equal where every answer came to its end, within a bound where clients left."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

import pytest

from tests.conftest import Start
from tests.engine.environment import Say
from tests.engine.vllm import TINY, Counts, Engine, Engines
from tests.engine.workload import Answered, Asked, Lengths, run, total, workload
from tests.support.endpoints import Endpoint
from tests.support.glasshouse import Glasshouse

SEED: Final = 20261120
REQUESTS: Final = 200
LEAVING: Final = 0.2
LATE_TOKENS: Final = 32
"""What an engine may generate for a choice between the last chunk that was seen and the client's leaving coming through: a tenth
of a second's worth."""

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

Row = dict[str, Any]


def rows_of(glasshouse: Glasshouse, asked: list[Asked]) -> dict[str, Row]:
    """The ledger, by the clients' names: one row each, and no other."""
    rows = glasshouse.rows(len(asked))
    assert Counter(row["client_request_id"] for row in rows) == Counter(each.name for each in asked)
    return {row["client_request_id"]: row for row in rows}


def check_rows(rows: dict[str, Row], answered: list[Answered], lengths: Lengths) -> None:
    """Of answers that came to their end: each row says what its client was told."""
    for each in answered:
        row, expected = rows[each.asked.name], lengths.expected(each)
        assert (each.reply.status, each.reply.ending) == (200, "complete"), (each.asked, each.reply.body)
        assert (row["outcome"], row["status"], row["usage_source"]) == ("ok", 200, "engine"), each.asked
        assert (row["input_tokens"], row["output_tokens"]) == (expected.input, expected.output), each.asked
        assert row["cached_tokens"] == expected.cached or expected.cached is None, each.asked
        assert row["choices"] == each.asked.choices, each.asked
        assert len(row["finish_reasons"]) == row["choices"], each.asked


def check_prometheus(glasshouse: Glasshouse, rows: dict[str, Row]) -> None:
    """Prometheus says what the ledger says."""
    glasshouse.wait_metric("glasshouse_requests_total", len(rows))
    metrics = glasshouse.metrics()
    assert metrics.total("glasshouse_requests_total") == len(rows)
    for kind, column in (("input", "input_tokens"), ("cached_input", "cached_tokens"), ("output", "output_tokens")):
        assert metrics.total("glasshouse_tokens_total", kind=kind) == sum(row[column] for row in rows.values())


def booked(rows: dict[str, Row], asked: list[Asked]) -> Counts:
    """What these rows say an engine must have counted. (It counts a prompt once for each choice.)"""
    mine = [(rows[each.name], each) for each in asked]
    return Counts(
        prompt=sum(row["input_tokens"] * each.n for row, each in mine),
        cached=sum(row["cached_tokens"] for row, _ in mine),
        generated=sum(row["output_tokens"] for row, _ in mine),
        finished=sum(row["choices"] for row, _ in mine),
    )


def test_the_ledger_s_tokens_are_the_engine_s(glasshouse: Start, tiny: Engine, say: Say) -> None:
    proxy, lengths, asked = glasshouse([tiny.url]), Lengths(tiny), workload(SEED, REQUESTS)
    through = Endpoint(proxy.url, proxy.key)
    plain, others = [each for each in asked if each.plain], [each for each in asked if not each.plain]
    start = tiny.counts()
    answered = run(through, plain)
    middle = tiny.counts()
    answered += run(through, others)
    end = tiny.counts()

    rows = rows_of(proxy, asked)
    check_rows(rows, answered, lengths)
    seen = total([lengths.expected(each) for each in answered])
    ours = booked(rows, asked)
    say(f"{len(asked)} requests; the engine {end - start}, the ledger {ours}, the clients {seen}")
    assert middle - start == booked(rows, plain)
    # How much of a batch, or of several choices, was cached, an answer doesn't say in full.
    assert (end - start)._replace(cached=0) == ours._replace(cached=0)
    assert (sum(row["input_tokens"] for row in rows.values()), ours.generated) == (seen.input, seen.output)
    assert booked(rows, plain).cached > 0
    check_prometheus(proxy, rows)


def test_the_ledger_is_within_its_bound_when_clients_leave(glasshouse: Start, tiny: Engine, say: Say) -> None:
    """Streams and whole answers apart: of a stream it is known how far it came, of a whole answer nothing."""
    proxy, lengths, asked = glasshouse([tiny.url]), Lengths(tiny), workload(SEED + 1, REQUESTS, leaving=LEAVING)
    through = Endpoint(proxy.url, proxy.key)
    kinds = {
        "streams": [each for each in asked if each.body["stream"]],
        "whole answers": [each for each in asked if not each.body["stream"]],
    }
    answered: list[Answered] = []
    engine: dict[str, Counts] = {}
    for kind, some in kinds.items():
        start = tiny.counts()
        answered += run(through, some)
        proxy.rows(len(answered))  # also of those who left: the engine has been told of each of them
        engine[kind] = tiny.counts() - start

    rows = rows_of(proxy, asked)
    gone = [each for each in asked if rows[each.name]["outcome"] == "client_gone"]
    check_rows(rows, [each for each in answered if each.asked.leaving is None], lengths)
    assert all(rows[each.name]["outcome"] == "ok" for each in asked if each not in gone)
    assert all(each.leaving for each in gone)
    check_counts_in_mid_stream(rows, gone, lengths)
    for kind, some in kinds.items():
        left = [each for each in some if each in gone]
        assert left, f"nobody left {kind} in time: the dice are wrong"
        ours, theirs = booked(rows, some), engine[kind]
        gap, bound = theirs.generated - ours.generated, sum(_unseen(rows[each.name], each) for each in left)
        say(
            f"{len(some)} {kind}, {len(left)} clients left; generated: the engine {theirs.generated}, the ledger "
            f"{ours.generated}, a gap of {gap} ({gap / theirs.generated:.2%}), bound {bound}"
        )
        assert 0 <= gap <= bound
        certain = booked(rows, [each for each in some if each not in gone])
        assert certain.prompt <= theirs.prompt <= certain.prompt + sum(lengths.of(each) * each.n for each in left)
        assert certain.finished <= theirs.finished <= ours.finished
    check_prometheus(proxy, rows)


def check_counts_in_mid_stream(rows: dict[str, Row], gone: list[Asked], lengths: Lengths) -> None:
    """The engine's own counts, as far as they came: a prompt counts once, however many choices it has."""
    counted = [(rows[each.name], each) for each in gone if rows[each.name]["usage_source"] == "engine"]
    assert any(each.n > 1 for _, each in counted), "nobody left a stream of several choices: the dice are wrong"
    for row, each in counted:
        assert 0 < row["input_tokens"] <= lengths.of(each), each
        if len(each.prompts) == 1:
            assert row["input_tokens"] == lengths.of(each), each
    for each in gone:
        row = rows[each.name]
        if each.operation.counts_on_request and row["chunks"]:
            assert row["usage_source"] == "engine", each


def _unseen(row: Row, asked: Asked) -> int:
    """Tokens that may have been generated beyond those on the row: of a stream those on their way, of a whole answer all."""
    return asked.choices * (LATE_TOKENS if row["stream"] else asked.tokens)


def test_two_engines_share_the_work_and_each_is_accounted(glasshouse: Start, engines: Engines, tiny: Engine, say: Say) -> None:
    second = engines.get("second", TINY)
    fleet = {"backend-0": tiny, "backend-1": second}
    proxy, lengths, asked = glasshouse([tiny.url, second.url]), Lengths(tiny), workload(SEED + 2, REQUESTS)
    run(Endpoint(second.url, "unused"), workload(SEED + 3, 12))  # a vLLM's first requests take it seconds
    start = {name: engine.counts() for name, engine in fleet.items()}
    answered = run(Endpoint(proxy.url, proxy.key), asked)

    rows = rows_of(proxy, asked)
    check_rows(rows, answered, lengths)
    for name, engine in fleet.items():
        mine = [each for each in asked if rows[each.name]["backend"] == name]
        counts, ours = engine.counts() - start[name], booked(rows, mine)
        say(f"{name}: {len(mine)} of {len(asked)} requests; the engine {counts}, the ledger {ours}")
        assert counts._replace(cached=0) == ours._replace(cached=0)
        assert len(mine) > REQUESTS / 10
    check_prometheus(proxy, rows)
