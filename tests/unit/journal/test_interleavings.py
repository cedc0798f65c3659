"""Writers that live and die, sinks that fail, a janitor: in any order, every request comes out of every sink exactly once."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from proxy.errors import Outcome
from proxy.journal import Checkpoint, Journal, Tail
from proxy.journal.segment import frame
from tests.unit.collectors.made import identity, make_record
from tests.unit.journal.made import SEGMENT_BYTES, closing, kill, opening, progress
from tests.unit.journal.test_writer import append_patiently

PADDING = "x" * 9000
"""So that a segment holds seven records and is full soon."""


class Sink:
    """What a sink is to the journal: a position that moves with what it stored."""

    def __init__(self) -> None:
        self.stored = Checkpoint()
        self.records: list[tuple[bytes, int, int]] = []


class Journals(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.tail = Tail(self.directory)
        self.sinks = [Sink(), Sink()]
        self.writers: list[tuple[Journal, dict[int, int]]] = []
        """Each with its open requests: number → tokens in its last word."""
        self.expected: Counter[tuple[bytes, int, int]] = Counter()
        self.numbers = 0

    @precondition(lambda self: len(self.writers) < 3)
    @rule()
    def start_writer(self) -> None:
        self.writers.append((Journal(self.directory, SEGMENT_BYTES), {}))

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def open_request(self, data: st.DataObject) -> None:
        journal, open_requests = data.draw(st.sampled_from(self.writers))
        self.numbers += 1
        append_patiently(journal, opening(make_record(self.numbers, output_tokens=0, error=PADDING)))
        open_requests[self.numbers] = 0

    @precondition(lambda self: any(open_requests for _, open_requests in self.writers))
    @rule(data=st.data(), ends=st.booleans())
    def go_on(self, data: st.DataObject, ends: bool) -> None:
        journal, open_requests = data.draw(st.sampled_from([writer for writer in self.writers if writer[1]]))
        number = data.draw(st.sampled_from(sorted(open_requests)))
        open_requests[number] += 1
        record = make_record(number, output_tokens=open_requests[number], error=PADDING)
        append_patiently(journal, closing(record) if ends else progress(record))
        if ends:
            self.expected[record.id, Outcome.OK, open_requests.pop(number)] += 1

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def tear_and_kill(self, data: st.DataObject) -> None:
        """SIGKILL in the middle of an append: a piece of the frame is there."""
        writer = data.draw(st.sampled_from(self.writers))
        journal, _ = writer
        start = journal.position[1]
        torn = frame(closing(make_record(999_999)))[: data.draw(st.integers(0, 200))]
        torn = torn[: max(0, SEGMENT_BYTES - start)]
        assert journal._current is not None
        journal._current.map[start : start + len(torn)] = torn
        self._end(writer)

    @precondition(lambda self: any(not open_requests for _, open_requests in self.writers))
    @rule(data=st.data())
    def stop_cleanly(self, data: st.DataObject) -> None:
        writer = data.draw(st.sampled_from([writer for writer in self.writers if not writer[1]]))
        self.writers.remove(writer)
        writer[0].close()

    @rule(which=st.integers(0, 1), limit=st.sampled_from([1, 3, 2000]), fails=st.booleans())
    def poll(self, which: int, limit: int, fails: bool) -> None:
        sink = self.sinks[which]
        batch = self.tail.poll(sink.stored, limit)
        assert batch.corrupt == []
        if not fails:
            sink.records += [(record.id, record.outcome, record.output_tokens) for record in batch.records]
            sink.stored = Checkpoint.decode(batch.checkpoint.encode())

    @rule()
    def remove(self) -> None:
        self.tail.remove([sink.stored for sink in self.sinks])

    def _end(self, writer: tuple[Journal, dict[int, int]]) -> None:
        self.writers.remove(writer)
        journal, open_requests = writer
        kill(journal)
        for number, tokens in open_requests.items():
            self.expected[identity(number), Outcome.CRASHED, tokens] += 1

    def teardown(self) -> None:
        for writer in list(self.writers):
            self._end(writer)
        for which in (0, 1):
            while True:
                before = self.sinks[which].stored
                self.poll(which, 2000, False)
                if self.sinks[which].stored == before:
                    break
            assert Counter(self.sinks[which].records) == self.expected
            assert self.sinks[which].stored.open == {}
        self.remove()
        self.remove()
        assert self.tail.segments() == []
        shutil.rmtree(self.directory)


TestJournals = Journals.TestCase
TestJournals.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
