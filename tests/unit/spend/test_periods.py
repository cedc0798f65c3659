"""What is counted: the file that says it, and a collector that follows it. The database and the journal are real."""

from __future__ import annotations

import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from collectors.process import periods
from proxy.exchange import Record
from proxy.journal import Journal
from proxy.settings import Settings
from proxy.spend import Period
from proxy.spend.periods import Counted, read_counted, write_counted
from tests.unit.collectors.made import make_record
from tests.unit.journal.made import SEGMENT_BYTES, closing
from tests.unit.spend.made import TOTAL, Host

DAY = Period("day", "Asia/Kathmandu")
NOW = time.time_ns()


def made(number: int) -> Record:
    """Of the period that is under way there, or, just after its beginning, the one before."""
    return make_record(number, received_unix_ns=NOW + number)


def test_the_file_says_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "periods"
    for counted in (Counted((DAY, TOTAL)), Counted(concurrency=True), Counted()):
        write_counted(path, counted)
        assert read_counted(path) == counted
        assert bool(counted) == (counted != Counted())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["periods"]


@pytest.mark.parametrize("text", [None, b"", b"{", b"[]", b'{"periods":[[7]]}', b'{"periods":7}', b"\xff"])
def test_what_cannot_be_read_is_not_known(tmp_path: Path, text: bytes | None) -> None:
    path = tmp_path / "periods"
    if text is not None:
        path.write_bytes(text)
    assert read_counted(path) is None


def test_a_collector_sums_what_the_file_and_control_say(tmp_path: Path) -> None:
    settings = Settings.of({"state_dir": str(tmp_path), "everyone": {"budgets": [{"tokens": 1, "per": "total"}]}})
    assert periods(settings) == [TOTAL]
    write_counted(settings.periods_path, Counted((DAY, TOTAL)))
    assert periods(settings) == [DAY, TOTAL]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    host = Host(tmp_path, periods=[])
    host.journal.mkdir()
    return host


@pytest.fixture
def journal(host: Host) -> Iterator[Journal]:
    journal = Journal(host.journal, SEGMENT_BYTES)
    yield journal
    journal.close()


def test_a_period_that_comes_later_counts_what_was_before(host: Host, journal: Journal) -> None:  # failure 60
    """What is stored already, what was just added, and what comes then."""
    for number in range(3):
        journal.append(closing(made(number)))
    host.collect()
    assert host.truth(DAY, NOW) is None, "nobody knows"
    for number in range(3, 5):
        journal.append(closing(made(number)))
    host.periods = [DAY, TOTAL]
    host.collect()
    for period in (DAY, TOTAL):
        assert host.truth(period, NOW) == host.ledger(period, NOW)
    journal.append(closing(made(6)))
    assert host.truth(TOTAL) != host.ledger(TOTAL), "the journal knows more"
    host.collect()
    for period in (DAY, TOTAL):
        assert host.truth(period, NOW) == host.ledger(period, NOW)
    assert sum(each.tokens for rows in (host.truth(TOTAL) or {}).values() for each in rows.values()) > 0


def test_a_period_that_nobody_has_any_more_is_forgotten(host: Host, journal: Journal) -> None:
    host.periods = [DAY, TOTAL]
    journal.append(closing(made(0)))
    host.collect()
    host.periods = [TOTAL]
    host.collect()
    assert host.truth(DAY, NOW) is None
    host.periods = [DAY]
    journal.append(closing(made(1)))
    host.collect()
    assert host.truth(DAY, NOW) == host.ledger(DAY, NOW)


def test_a_database_that_fails_meanwhile(host: Host, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:  # failure 46
    journal.append(closing(make_record(0)))
    host.collect()
    host.periods = [TOTAL]
    sink = host._sink
    assert sink is not None

    def fails(*_: object) -> None:
        raise OSError("no")

    with monkeypatch.context() as context:
        context.setattr("collectors.records.ledger.spent", fails)
        journal.append(closing(make_record(1)))
        with pytest.raises(OSError, match="no"):
            host.collect()
    assert host.truth(TOTAL) is None
    host.collect()
    assert host.truth(TOTAL) == host.ledger(TOTAL)
