"""The spend file and the journal together say what the ledger says, whatever happens to whom in between."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.exchange import Record, new_id
from proxy.journal import Batch, Checkpoint, Journal, Tail
from proxy.journal.segment import SegmentName
from proxy.spend import Amounts, Holder, Period, Spend, window
from proxy.spend.file import SPEND_VERSION, SpendFile, decode_spend, write_spend
from proxy.spend.reader import COLLECTOR_ID
from proxy.spend.windows import SECOND_NS
from tests.unit.collectors.made import DAY, identity, make_record
from tests.unit.journal.made import SEGMENT_BYTES, closing, dead_segment, kill, opening, progress
from tests.unit.journal.test_writer import append_patiently, wait
from tests.unit.spend.made import TOTAL, Host, Totals

DAY_NS = 86_400 * SECOND_NS
VIENNA = Period("day", "Europe/Vienna")
ONE = Amounts(30_000, 605, 0)
"""What `make_record` costs."""


def times(count: int) -> Amounts:
    return Amounts(30_000 * count, 605 * count, 0)


def write(journal: Journal, *numbers: int) -> None:
    for number in numbers:
        append_patiently(journal, opening(make_record(number)))
        append_patiently(journal, closing(make_record(number)))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def journal(host: Host) -> Iterator[Journal]:
    journal = Journal(host.journal, SEGMENT_BYTES)
    yield journal
    journal.close()


def whose(journal: Journal, amounts: Amounts) -> Totals:
    return {journal.incarnation: {Holder("key_1"): amounts}}


# -- what is known, and what isn't --


def test_without_a_look_nothing_is_known() -> None:
    assert Spend().totals(TOTAL, 0) is None
    assert Spend().open == []


def test_where_no_collector_has_ever_worked_the_journal_says_all(host: Host) -> None:
    assert host.truth() == {}
    journal = Journal(host.journal, SEGMENT_BYTES)
    write(journal, 1, 2)
    assert host.truth() == host.truth(VIENNA, DAY) == whose(journal, times(2))
    journal.close()


def test_the_file_and_what_the_journal_has_since(host: Host, journal: Journal) -> None:
    write(journal, 1, 2)
    host.collect()
    assert host.truth() == host.ledger() == whose(journal, times(2))
    write(journal, 3)
    assert host.truth() == host.new_reader().look().totals(TOTAL, 0) == whose(journal, times(3))
    host.collect()
    assert host.truth() == host.ledger() == whose(journal, times(3))


def test_what_is_lost_is_not_known_until_the_collector_has_written_it_again(host: Host, journal: Journal) -> None:
    write(journal, 1)
    host.collect()
    host.spend.unlink()
    assert host.truth() is host.new_reader().look().totals(TOTAL, 0) is None
    host.collect()
    assert host.truth() == whose(journal, ONE), "also if nothing has been stored since"


def test_a_collector_that_comes_to_a_state_of_before_there_was_a_file(host: Host, journal: Journal) -> None:
    write(journal, 1)
    host.collect()
    host.spend.unlink()
    host.kill()
    assert host.truth() is None
    host.start()
    host.collect()
    assert host.truth() == whose(journal, ONE)


def test_a_collector_that_has_stored_nothing_yet_has_deleted_nothing(host: Host, journal: Journal) -> None:
    write(journal, 1)
    assert host.truth(VIENNA, DAY) == whose(journal, ONE)
    write_spend(host.spend, SpendFile(currency="USD"))
    host.start()
    assert host.truth(VIENNA, DAY) == whose(journal, ONE)


def test_a_period_that_is_added_later(host: Host, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time_ns", lambda: DAY)
    write(journal, 1)
    host.collect()
    assert host.truth(VIENNA, DAY) is None
    assert host.truth() == whose(journal, ONE), "what is known stays so"
    host.kill()
    host.periods = [TOTAL, VIENNA]
    host.start()
    host.collect()
    assert host.truth(VIENNA, DAY) == host.truth() == whose(journal, ONE)


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 100, b"somebody else's", bytes([0x91, SPEND_VERSION + 1])], ids=["empty", "zeros", "foreign", "newer"]
)
def test_a_file_that_cannot_be_read_is_none_and_that_is_said_once(
    host: Host, journal: Journal, caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    write(journal, 1)
    host.collect()
    host.spend.write_bytes(data)
    assert [host.truth() for _ in range(3)] == [None] * 3
    assert [record.message for record in caplog.records] == ["what was spent is not readable"]
    write(journal, 2)
    host.collect()
    assert host.truth() == whose(journal, times(2))


def test_money_is_not_known_until_it_is_counted_in_the_new_currency(host: Host, journal: Journal) -> None:
    write(journal, 1)
    host.collect()
    host.kill()
    host.currency = "EUR"
    host.reader = host.new_reader()
    assert host.truth() is None
    host.start()
    write(journal, 2)
    append_patiently(journal, closing(make_record(3, currency="EUR", cost_nano=7)))
    host.collect()
    assert host.truth() == host.ledger() == whose(journal, Amounts(7, 3 * 605, 0))


# -- windows --


# failure 60
def test_a_request_counts_in_the_window_that_it_came_in(host: Host, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that came at the instant of rollover, and one that ended after it."""
    start, end = window(VIENNA, DAY)
    monkeypatch.setattr("time.time_ns", lambda: DAY)
    host.periods = [VIENNA]
    for number, received in enumerate([start, end - 1, end, end + 1, start - 1]):
        journal.append(closing(make_record(number, received_unix_ns=received, ended_ns=3600 * SECOND_NS)))

    def agree() -> None:
        assert [host.truth(VIENNA, at) for at in (start - 1, DAY, end)] == [whose(journal, times(n)) for n in (1, 2, 2)]

    agree()
    host.collect()
    agree()
    host.kill()
    host.start()
    host.collect()
    agree()


def test_of_a_window_that_has_passed_the_one_before_is_kept(
    host: Host, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.periods = [Period("day")]
    [period] = host.periods
    today = DAY
    monkeypatch.setattr("time.time_ns", lambda: today)
    for day in range(5):
        today = DAY + day * DAY_NS
        journal.append(closing(make_record(day, received_unix_ns=today)))
        host.collect()
        assert host.truth(period, today) == whose(journal, ONE)
        assert host.truth(period, today + DAY_NS) == {}, "it has not begun, and nothing was spent in it"
        if day:
            assert host.truth(period, today - DAY_NS) == whose(journal, ONE)
        assert host.truth(period, today - 2 * DAY_NS) is None
    [kept] = decode_spend(host.spend.read_bytes()).periods
    assert len(kept.windows) == 2


def test_a_clock_that_was_put_back_loses_nothing(host: Host, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was received tomorrow counts tomorrow, also if the collector begins today."""
    host.periods = [Period("day")]
    [period] = host.periods
    monkeypatch.setattr("time.time_ns", lambda: DAY)
    for number, day in enumerate([0, 1, 1, 30]):
        journal.append(closing(make_record(number, received_unix_ns=DAY + day * DAY_NS)))
    for _ in range(2):
        host.collect()
        assert [host.truth(period, DAY + day * DAY_NS) for day in (0, 1, 2, 30)] == [
            *(whose(journal, ONE), whose(journal, times(2)), {}, whose(journal, ONE)),
        ]
        host.kill()
        host.start()


def test_what_was_forgotten_is_not_known_again_when_a_clock_is_put_back(
    host: Host, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.periods = [Period("day")]
    [period] = host.periods
    today = DAY
    monkeypatch.setattr("time.time_ns", lambda: today)
    for number, day in enumerate([0, 5, 0]):
        today = DAY + day * DAY_NS
        journal.append(closing(make_record(number, received_unix_ns=today)))
        host.collect()
    assert host.truth(period, DAY) is None
    assert host.truth(period, DAY + 5 * DAY_NS) == whose(journal, ONE)
    host.kill()
    host.start()
    host.collect()
    assert host.truth(period, DAY) == whose(journal, times(2))


# -- workers --


# failure 49
def test_what_the_dead_left_open_has_ended_and_what_the_living_do_has_not(host: Host, journal: Journal) -> None:
    seen = make_record(1, input_tokens=600, output_tokens=3, cost_nano=10)
    dead = dead_segment(host.journal, opening(make_record(1, input_tokens=0, output_tokens=0, cost_nano=0)), progress(seen))
    journal.append(opening(make_record(2, team="red")))
    spend = host.reader.look()
    assert spend.totals(TOTAL, 0) == {dead.name[:24]: {Holder("key_1"): Amounts(10, 603, 0)}}
    assert spend.open == [make_record(2, team="red", worker=journal.incarnation)]
    journal.append(closing(make_record(2, team="red")))
    spend = host.reader.look()
    assert spend.open == []
    host.collect()
    assert host.truth() == host.ledger() == spend.totals(TOTAL, 0)
    assert len(host.ledger()) == 2


def test_a_worker_that_dies_between_two_looks(host: Host) -> None:
    journal = Journal(host.journal, SEGMENT_BYTES)
    journal.append(opening(make_record(1)))
    host.collect()
    assert [record.id for record in host.reader.look().open] == [identity(1)]
    assert host.truth() == {}
    kill(journal)
    assert host.truth() == whose(journal, ONE)
    assert host.reader.look().open == []
    assert host.truth() == whose(journal, ONE), "once"
    host.collect()
    assert host.truth() == host.ledger() == whose(journal, ONE)


def test_a_look_reads_only_what_is_new(host: Host, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    write(journal, *range(20))
    read = list[int]()
    poll = Tail.poll

    def counted(tail: Tail, checkpoint: Checkpoint, limit: int = 2000) -> Batch:
        batch = poll(tail, checkpoint, limit)
        read.append(len(batch.records))
        return batch

    monkeypatch.setattr(Tail, "poll", counted)
    host.reader.look()
    write(journal, 20)
    host.reader.look()
    host.reader.look()
    assert read == [20, 1, 0]


def test_what_a_look_told_does_not_change(host: Host, journal: Journal) -> None:
    write(journal, 1)
    before = host.reader.look()
    write(journal, 2)
    after = host.reader.look()
    assert [each.totals(TOTAL, 0) for each in (before, after)] == [whose(journal, ONE), whose(journal, times(2))]


@pytest.mark.parametrize("when", ["before the list", "after the list", "in the middle"])
def test_what_is_stored_and_deleted_while_it_is_looked_for_is_told(
    host: Host, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    for number in range(3):
        dead_segment(host.journal, closing(make_record(number)))
    host.start().tend()
    segments = Tail.segments
    looks = list[int]()

    def interrupted(tail: Tail) -> list[SegmentName]:
        looks.append(len(looks))
        if when == "before the list" and len(looks) == 1:
            host.collect()
        names = segments(tail)
        if len(looks) == {"after the list": 1, "in the middle": 2}.get(when):
            host.collect()
        return names

    monkeypatch.setattr(Tail, "segments", interrupted)
    spend = host.new_reader().look()
    assert segments(host.tail) == []
    assert spend.totals(TOTAL, 0) == host.ledger()
    assert len(host.ledger()) == 3


# -- everything at once --

WORKER = """
import random, sys, time
from pathlib import Path
from proxy.journal import Journal
from tests.unit.collectors.made import make_record
from tests.unit.journal.made import SEGMENT_BYTES, closing, opening, progress
chance = random.Random(int(sys.argv[2]))
journal = Journal(Path(sys.argv[1]), SEGMENT_BYTES)
print(journal.incarnation, flush=True)
waiting = []
def keep(payload):
    while not journal.offer(payload):
        time.sleep(0.001)
for number in range(int(sys.argv[2]) * 10**9, 10**15):
    record = make_record(number, key_id=f"key_{chance.randrange(5)}", team=chance.choice(["", "red"]))
    record.received_unix_ns, record.output_tokens, record.cost_nano = time.time_ns(), 0, 0
    keep(opening(record))
    waiting.append(record)
    record = chance.choice(waiting)
    record.output_tokens += chance.randrange(100)
    record.cost_nano += chance.randrange(10**6)
    if chance.random() < 0.7:
        waiting.remove(record)
        keep(closing(record))
    else:
        keep(progress(record))
    if number % 50 == 0:
        time.sleep(0.005)
"""


@contextmanager
def worker(host: Host, seed: int) -> Iterator[subprocess.Popen[str]]:
    """A process that writes to the journal until it is killed."""
    command = [sys.executable, "-c", WORKER, str(host.journal), str(seed)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert len(process.stdout.readline().strip()) == 24
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


# failure 44, failure 49, failure 60
def test_workers_and_the_collector_are_killed_in_the_middle_of_their_work(tmp_path: Path) -> None:
    host = Host(tmp_path, [TOTAL, Period("day"), Period("month", "Asia/Kathmandu")])
    chance = random.Random(20261120)

    def tokens() -> int:
        return sum(each.tokens for keys in (host.truth() or {}).values() for each in keys.values())

    for seed in range(1, 4):
        with worker(host, seed):
            enough = tokens() + 200_000
            wait(lambda enough=enough: tokens() > enough)  # type: ignore[misc]
            for _ in range(5):
                host.step(limit=chance.randrange(1, 200))
            if seed == 2:
                host.kill()
                host.start()
            wait(lambda enough=enough: tokens() > enough + 200_000)  # type: ignore[misc]
        told = host.truth()
        fresh = host.new_reader().look()
        assert fresh.totals(TOTAL, 0) == told
        assert fresh.open == []
        if seed != 2:
            host.collect(limit=50)
            assert host.ledger() == told == host.truth()
    host.collect()
    assert len(host.ledger()) == 3
    assert host.tail.segments() == [], "all of it is stored"
    for period in host.periods:
        assert host.truth(period, time.time_ns()) == host.ledger(period, time.time_ns())


class Busy(threading.Thread):
    """A worker in a thread: 605 tokens a request. `ended` and `begun` are what it has surely and at most written."""

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.journal = Journal(host.journal, SEGMENT_BYTES)
        self.ended = self.begun = 0
        self.stopping = False

    def run(self) -> None:
        for number in itertools.count():
            if self.stopping:
                break
            made = make_record(number, id=new_id(number))
            append_patiently(self.journal, opening(made))
            self.begun += 1
            append_patiently(self.journal, closing(made))
            self.ended += 1
            time.sleep(0.002)  # the collector keeps up


# failure 44, failure 60
def test_a_look_is_right_while_workers_write_and_the_collector_stores_and_deletes(tmp_path: Path) -> None:
    """Between what had surely been written before the look and what may have been after it, until segments have gone."""
    host = Host(tmp_path)
    workers = [Busy(host) for _ in range(3)]
    stop = threading.Event()
    failed = list[BaseException]()

    def collect() -> None:
        try:
            while not stop.is_set():
                host.step(limit=30)
        except BaseException as error:
            failed.append(error)

    collector = threading.Thread(target=collect)
    for thread in (*workers, collector):
        thread.start()
    try:
        while min((name.sequence for name in host.tail.segments()), default=0) < 4:
            least = [each.ended for each in workers]
            totals = host.truth()
            most = [each.begun for each in workers]
            assert totals is not None
            for each, low, high in zip(workers, least, most, strict=True):
                seen = totals.get(each.journal.incarnation, {}).get(Holder("key_1"), Amounts()).tokens
                assert seen % 605 == 0
                assert low <= seen // 605 <= high
    finally:
        for each in workers:
            each.stopping = True
        for thread in workers:
            thread.join()
        stop.set()
        collector.join()
    assert failed == []
    for each in workers:
        each.journal.close()
    told = host.truth()
    host.collect()
    assert (
        told
        == host.truth()
        == host.ledger()
        == {each.journal.incarnation: {Holder("key_1"): times(each.ended)} for each in workers}
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_the_truth_is_the_ledger_whatever_happens_in_what_order(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """Workers come, write, and end well or don't; the collector stores, dies, begins; its file is lost."""
    chance = random.Random(seed)
    periods = [TOTAL, Period("day", "Asia/Kathmandu"), Period("week", "America/New_York"), Period("month")]
    host = Host(tmp_path_factory.mktemp("host"), periods)
    (host.directory / COLLECTOR_ID).touch()
    journals: dict[Journal, list[Record]] = {}
    numbers = itertools.count()
    now = time.time_ns()

    def begin() -> None:
        journals[Journal(host.journal, SEGMENT_BYTES)] = []

    def request() -> None:
        for journal, running in journals.items():
            running.append(
                made := make_record(next(numbers), input_tokens=chance.randrange(9), key_id=f"key_{chance.randrange(3)}")
            )
            made.received_unix_ns = now - chance.randrange(40 * DAY_NS)
            made.team, made.currency = chance.choice(["", "red", "blue"]), chance.choice(["USD", "USD", "EUR"])
            append_patiently(journal, opening(made))

    def go_on() -> None:
        for journal, running in journals.items():
            for made in chance.sample(running, len(running) // 2):
                made.output_tokens, made.cost_nano, made.gpu_ns = (chance.randrange(10**6) for _ in range(3))
                if chance.random() < 0.5:
                    append_patiently(journal, progress(made))
                else:
                    append_patiently(journal, closing(made))
                    running.remove(made)

    def end() -> None:
        for journal in chance.sample(list(journals), min(1, len(journals))):
            running = journals.pop(journal)
            if chance.random() < 0.5:
                kill(journal)
            else:
                for made in running:
                    append_patiently(journal, closing(made))
                journal.close()

    def store() -> None:
        for _ in range(chance.randrange(1, 4)):
            host.step(limit=chance.randrange(1, 30))

    def look() -> None:
        host.reader.look()

    def lose() -> None:
        host.spend.unlink(missing_ok=True)

    steps = [begin, request, request, go_on, go_on, go_on, end, store, store, look, host.kill, lose]
    for _ in range(40):
        chance.choice(steps)()
    for journal in list(journals):
        kill(journal)
    told = {period: host.truth(period, now) for period in periods}
    fresh = host.new_reader().look()
    host.collect()
    for period in periods:
        stored = host.ledger(period, now)
        assert told[period] in (None, stored)
        assert fresh.totals(period, window(period, now)[0]) == told[period]
        assert host.truth(period, now) == host.new_reader().look().totals(period, window(period, now)[0]) == stored
