"""Records added up: by whom, when, and only what counts."""

from __future__ import annotations

from proxy.spend.tally import QUARTER_NS, Amounts, Tally
from tests.unit.collectors.made import DAY, make_coalesced, make_hit, make_record, make_rejected

MOST = 2**63 - 1


def test_by_quarter_of_an_hour_worker_key_and_team() -> None:
    tally = Tally("USD")
    tally.add(
        [
            make_record(worker="w", team="red", received_unix_ns=DAY),
            make_record(worker="w", team="red", received_unix_ns=DAY + QUARTER_NS - 1, gpu_ns=9),
            make_record(worker="w", team="", received_unix_ns=DAY + QUARTER_NS),
            make_record(worker="x", team="red", key_id="key_2", received_unix_ns=DAY),
        ]
    )
    one = Amounts(30_000, 605, 0)
    assert tally.quarters() == {
        DAY: {("w", "key_1", "red", "", ""): Amounts(60_000, 1210, 9), ("x", "key_2", "red", "", ""): one},
        DAY + QUARTER_NS: {("w", "key_1", "", "", ""): one},
    }


def test_money_of_another_currency_is_none_and_its_tokens_count() -> None:
    tally = Tally("EUR")
    tally.add([make_record(worker="w")])
    assert list(tally.quarters().values()) == [{("w", "key_1", "", "", ""): Amounts(0, 605, 0)}]


def test_what_a_key_spends_for_another_user_or_project_counts_there() -> None:
    tally = Tally("USD")
    tally.add(
        [make_record(worker="w", user_name=user, project=project) for user, project in (("ann", "p"), ("bob", "p"), ("ann", ""))]
    )
    [rows] = tally.quarters().values()
    assert rows.keys() == {("w", "key_1", "", user, project) for user, project in (("ann", "p"), ("bob", "p"), ("ann", ""))}


def test_what_cost_nothing_takes_no_room() -> None:
    tally = Tally("USD")
    tally.add([make_rejected(), make_hit(), make_coalesced()])
    assert not tally
    tally.add([make_rejected(gpu_ns=1)])
    assert tally


def test_a_total_is_no_more_than_a_ledger_holds() -> None:
    tally = Tally("USD")
    tally.add([make_record(input_tokens=2**64 - 1, cost_nano=MOST, gpu_ns=MOST, received_unix_ns=DAY) for _ in range(2)])
    assert tally.quarters() == {DAY: {("", "key_1", "", "", ""): Amounts(MOST, MOST, MOST)}}


def test_what_was_told_does_not_change() -> None:
    tally = Tally("USD")
    tally.add([make_record(received_unix_ns=DAY)])
    told = tally.quarters()
    tally.add([make_record(received_unix_ns=DAY)])
    assert told == {DAY: {("", "key_1", "", "", ""): Amounts(30_000, 605, 0)}}
