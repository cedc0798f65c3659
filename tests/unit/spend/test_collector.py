"""The collector as a process: its spend file is there from the beginning, and right when it was killed."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.journal import Journal
from proxy.spend import Amounts, Holder, Period, SpendReader
from proxy.spend.file import decode_spend
from tests.server.test_collectors import Collecting, wait
from tests.unit.collectors.made import make_record
from tests.unit.journal.made import SEGMENT_BYTES, closing, kill, opening
from tests.unit.journal.test_writer import append_patiently

TOTAL = Period("total")
BUDGETS = {"teams": {"red": {"budgets": [{"money": 5, "per": "total"}]}}}


@pytest.fixture
def collecting(tmp_path: Path) -> Iterator[Collecting]:
    collecting = Collecting(tmp_path / "state", **BUDGETS)
    yield collecting
    collecting.clean_up()


def tokens(collecting: Collecting) -> int | None:
    """What a worker that begins now takes for spent."""
    reader = SpendReader(collecting.settings.spend_path, collecting.journal_path, "USD")
    totals = reader.look().totals(TOTAL, 0)
    return None if totals is None else sum(each.tokens for keys in totals.values() for each in keys.values())


def test_what_was_spent_is_known_before_the_database_is(tmp_path: Path) -> None:
    collecting = Collecting(tmp_path / "state", database="postgresql://nobody@127.0.0.1:1/nothing", **BUDGETS)
    journal = Journal(collecting.journal_path, SEGMENT_BYTES)
    journal.append(closing(make_record(1)))
    try:
        collecting.start()
        wait(lambda: collecting.said("sink down; records wait in the journal"))
        assert tokens(collecting) == 605
        assert stat.S_IMODE(collecting.settings.spend_path.stat().st_mode) == 0o600
    finally:
        collecting.clean_up()
        journal.close()


# failure 44
def test_a_collector_that_is_killed_again_and_again(collecting: Collecting) -> None:
    """At every moment file and journal say what was written; in the end the file does alone."""
    journal = Journal(collecting.journal_path, SEGMENT_BYTES)
    written = 0
    for start in range(3):
        collecting.start()
        for _ in range(300):
            record = make_record(written, team="red")
            append_patiently(journal, opening(record))
            append_patiently(journal, closing(record))
            written += 1
            if written % 50 == 0:
                assert tokens(collecting) == 605 * written
        wait(lambda start=start: len(collecting.rows("id")) > 300 * start)  # type: ignore[misc]
        collecting.kill()
        assert tokens(collecting) == 605 * written
    kill(journal)
    collecting.start()
    collecting.stop()
    [period] = decode_spend(collecting.settings.spend_path.read_bytes()).periods
    [rows] = [each.rows for each in period.windows]
    assert [(row.worker, row.key_id, row.team, row.tokens) for row in rows] == [
        (journal.incarnation, "key_1", "red", 605 * written)
    ]
    [stored] = collecting.rows("count(*) AS n, count(distinct collector) AS collectors, min(worker) AS worker")
    assert stored == {"n": written, "collectors": 1, "worker": journal.incarnation}
    assert list(collecting.journal_path.glob("*.seg")) == []
    assert tokens(collecting) == 605 * written


def test_the_first_start_on_a_state_of_before_there_was_a_file(collecting: Collecting) -> None:
    journal = Journal(collecting.journal_path, SEGMENT_BYTES)
    journal.append(closing(make_record(1)))
    collecting.start()
    wait(lambda: collecting.rows("id"))
    collecting.stop()
    collecting.settings.spend_path.unlink()
    assert tokens(collecting) is None
    collecting.start()
    wait(lambda: tokens(collecting) is not None)
    reader = SpendReader(collecting.settings.spend_path, collecting.journal_path, "USD")
    assert reader.look().totals(TOTAL, 0) == {journal.incarnation: {Holder("key_1"): Amounts(30_000, 605, 0)}}
    collecting.stop()
    journal.close()
