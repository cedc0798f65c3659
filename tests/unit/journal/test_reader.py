"""Following journals: every request that ended comes out once, whoever died when."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import Outcome
from proxy.exchange import Record
from proxy.journal import Checkpoint, Journal, Tail
from proxy.journal.reader import READ_BYTES
from proxy.journal.segment import END_MARK, FRAME_BYTES, HEADER_BYTES, SegmentName, frame, header
from tests.unit.collectors.made import MS, identity, make_record
from tests.unit.journal.made import SEGMENT_BYTES, closing, dead_segment, kill, opening, progress, read_all
from tests.unit.journal.test_writer import append_patiently, wait


def ids(records: list[Record]) -> list[bytes]:
    return [record.id for record in records]


def of(journal: Journal, *numbers: int) -> list[Record]:
    """As they are read from its segments."""
    return [make_record(number, worker=journal.incarnation) for number in numbers]


def test_nothing_there_is_nothing_to_read(tmp_path: Path) -> None:
    batch = Tail(tmp_path / "missing").poll(Checkpoint())
    assert batch == ([], Checkpoint(), False, [])


def test_only_what_has_ended_comes_out(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SEGMENT_BYTES)
    journal.append(opening(make_record(1)))
    journal.append(opening(make_record(2)))
    journal.append(progress(make_record(1)))
    records, batch = read_all(tmp_path)
    assert records == []
    assert set(batch.checkpoint.open[journal.incarnation]) == {identity(1), identity(2)}
    journal.append(closing(make_record(2)))
    records, batch = read_all(tmp_path, batch.checkpoint)
    assert records == of(journal, 2)
    assert set(batch.checkpoint.open[journal.incarnation]) == {identity(1)}
    journal.close()


def test_a_poll_changes_nothing(tmp_path: Path) -> None:
    """A sink that couldn't store a batch asks again with the checkpoint that it has."""
    journal = Journal(tmp_path, SEGMENT_BYTES)
    journal.append(opening(make_record(1)))
    before = read_all(tmp_path)[1].checkpoint
    kept = before.encode()
    journal.append(closing(make_record(1)))
    assert read_all(tmp_path, before)[0] == read_all(tmp_path, before)[0] == of(journal, 1)
    assert before.encode() == kept
    journal.close()


# failure 49
def test_what_a_dead_worker_left_open_ends_as_crashed_with_the_tokens_seen(tmp_path: Path) -> None:
    seen = make_record(1, output_tokens=3, ended_ns=0)
    dead_segment(
        tmp_path, opening(make_record(1, output_tokens=0)), progress(seen), opening(make_record(2)), closing(make_record(2))
    )
    records, batch = read_all(tmp_path)
    assert ids(records) == [identity(2), identity(1)]
    crashed = records[1]
    assert crashed.outcome == Outcome.CRASHED
    assert crashed.error_code == "worker_crashed"
    assert crashed.output_tokens == 3
    assert crashed.ended_ns == 80 * MS, "the last that was seen of it"
    assert batch.checkpoint.open == {}
    assert read_all(tmp_path, batch.checkpoint)[0] == [], "once"


def test_an_open_request_waits_for_its_worker_across_segments(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SEGMENT_BYTES)
    journal.append(opening(make_record(1)))
    position = Checkpoint()
    for number in range(2, 400):
        append_patiently(journal, closing(make_record(number)))
        if number % 50 == 0:
            records, batch = read_all(tmp_path, position)
            assert identity(1) not in ids(records)
            position = batch.checkpoint
    assert journal.position[0] > 1
    kill(journal)
    records, batch = read_all(tmp_path, position)
    assert ids(records)[-1] == identity(1)
    assert records[-1].outcome == Outcome.CRASHED


def test_a_clean_end_leaves_nothing_open(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SEGMENT_BYTES)
    journal.append(opening(make_record(1)))
    journal.append(closing(make_record(1)))
    journal.close()
    records, batch = read_all(tmp_path)
    assert records == of(journal, 1)
    assert batch.checkpoint.done == {f"{journal.incarnation}-000001.seg"}
    assert batch.checkpoint.positions == {}
    assert batch.checkpoint.open == {}


def test_several_incarnations_keep_to_themselves(tmp_path: Path) -> None:
    dead_segment(tmp_path, opening(make_record(1)))
    living = Journal(tmp_path, SEGMENT_BYTES)
    living.append(opening(make_record(2)))
    records, batch = read_all(tmp_path)
    assert ids(records) == [identity(1)]
    assert batch.checkpoint.open == {living.incarnation: {identity(2): opening(make_record(2))}}
    living.append(closing(make_record(2)))
    assert ids(read_all(tmp_path, batch.checkpoint)[0]) == [identity(2)]
    living.close()


def test_a_record_says_whose_journal_it_is_from_and_the_journal_does_not(tmp_path: Path) -> None:
    dead = dead_segment(tmp_path, opening(make_record(1)), closing(make_record(2)))
    living = Journal(tmp_path, SEGMENT_BYTES)
    living.append(opening(make_record(3)))
    living.append(closing(make_record(4)))
    records, batch = read_all(tmp_path)
    name = dead.name[: len(living.incarnation)]
    assert {record.id: record.worker for record in records} == {
        identity(1): name,
        identity(2): name,
        identity(4): living.incarnation,
    }
    assert list(batch.checkpoint.requests()) == of(living, 3)
    assert name.encode() not in dead.read_bytes()
    living.close()


def test_open_requests_are_told_but_for_what_is_none(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SEGMENT_BYTES)
    journal.append(opening(make_record(1))[:17] + b"\xc1")
    journal.append(opening(make_record(2)))
    assert list(read_all(tmp_path)[1].checkpoint.requests()) == of(journal, 2)
    journal.close()


@pytest.mark.parametrize("limit", [1, 7, 100])
def test_a_limit_makes_batches_and_loses_nothing(tmp_path: Path, limit: int) -> None:
    written = []
    for incarnation in range(3):
        journal = Journal(tmp_path, SEGMENT_BYTES)
        for number in range(250):
            written.append(identity(incarnation * 1000 + number))
            append_patiently(journal, closing(make_record(incarnation * 1000 + number)))
        journal.close()
    records, batch = read_all(tmp_path, limit=limit)
    assert ids(records) == written
    assert not batch.more


def test_a_backlog_of_many_segments_comes_in_batches(tmp_path: Path) -> None:
    for number in range(5):
        journal = Journal(tmp_path, SEGMENT_BYTES)
        journal.append(closing(make_record(number)))
        journal.close()
    position = Checkpoint()
    for number in range(5):
        batch = Tail(tmp_path).poll(position, limit=1)
        assert ids(batch.records) == [identity(number)]
        assert batch.more or number == 4
        position = batch.checkpoint


def test_a_worker_that_rotates_under_the_reader_is_not_taken_for_dead(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SEGMENT_BYTES)
    append_patiently(journal, opening(make_record(0)))
    before = Tail(tmp_path).segments()
    append_patiently(journal, closing(make_record(1, error="x" * 40_000)))
    append_patiently(journal, closing(make_record(2, error="x" * 40_000)))
    wait(lambda: Tail(tmp_path).is_dead(before[0]))

    class Late(Tail):
        """Its first look was a moment ago."""

        looks = 0

        def segments(self) -> list[SegmentName]:
            self.looks += 1
            return before if self.looks == 1 else super().segments()

    batch = Late(tmp_path).poll(Checkpoint())
    assert ids(batch.records) == [identity(1)]
    assert set(batch.checkpoint.open[journal.incarnation]) == {identity(0)}
    journal.close()


def test_a_record_longer_than_a_read_is_read(tmp_path: Path) -> None:
    long = make_record(1, error="x" * (2 * READ_BYTES))
    journal = Journal(tmp_path, 8 * READ_BYTES)
    for record in (make_record(0), long, make_record(2)):
        journal.append(closing(record))
    records, _ = read_all(tmp_path)
    assert ids(records) == [identity(0), identity(1), identity(2)]
    assert records[1] == msgspec.structs.replace(long, worker=journal.incarnation)
    journal.close()


def test_a_checkpoint_survives_its_encoding(tmp_path: Path) -> None:
    dead_segment(tmp_path, closing(make_record(0)))
    journal = Journal(tmp_path, SEGMENT_BYTES)
    journal.append(opening(make_record(1)))
    checkpoint = read_all(tmp_path)[1].checkpoint
    checkpoint.damaged.add("x")
    assert Checkpoint.decode(checkpoint.encode()) == checkpoint
    journal.close()


# -- torn tails and damage --


@pytest.fixture(scope="module")
def torn(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[int]]:
    """The written part of a killed worker's segment, and where its frames end."""
    payloads = [closing(make_record(number)) for number in range(3)]
    path = dead_segment(tmp_path_factory.mktemp("torn"), *payloads)
    ends = [HEADER_BYTES]
    for payload in payloads:
        ends.append(ends[-1] + FRAME_BYTES + len(payload))
    return path.read_bytes()[: ends[-1]], ends


def put_segment(directory: Path, data: bytes) -> Path:
    path = directory / str(SegmentName("0" * 24, 1))
    path.write_bytes(data)
    return path


def test_a_write_torn_at_any_byte_leaves_what_was_whole(tmp_path: Path, torn: tuple[bytes, list[int]]) -> None:
    """Whatever part of the last frame was copied when its worker was killed: from its beginning on, or all but its beginning."""
    data, ends = torn
    for start, end in pairwise(ends):
        last = data[start:end]
        for copied in range(0, len(last), 3):
            for half in (last[:copied].ljust(len(last), b"\0"), last[-copied:].rjust(len(last), b"\0") if copied else b""):
                put_segment(tmp_path, (data[:start] + half).ljust(SEGMENT_BYTES, b"\0"))
                records, batch = read_all(tmp_path)
                assert len(records) == ends.index(start)
                assert batch.corrupt == []
                assert batch.checkpoint.done


def test_a_file_cut_at_any_byte_gives_what_is_whole_and_says_so(tmp_path: Path, torn: tuple[bytes, list[int]]) -> None:
    data, ends = torn
    for cut in range(len(data) + 1):
        put_segment(tmp_path, data[:cut])
        records, batch = read_all(tmp_path)
        assert len(records) == sum(end <= cut for end in ends[1:])
        assert bool(batch.corrupt) == (cut not in ends)
        assert batch.checkpoint.done


@given(st.data(), st.booleans())
@settings(max_examples=200)
def test_a_flipped_bit_is_damage_and_never_a_wrong_record(
    tmp_path_factory: pytest.TempPathFactory, torn: tuple[bytes, list[int]], data: st.DataObject, marked: bool
) -> None:
    directory = tmp_path_factory.mktemp("flipped")
    written, ends = torn
    place = data.draw(st.integers(HEADER_BYTES, ends[-1] - 1))
    flipped = bytearray(written + END_MARK * marked).ljust(SEGMENT_BYTES, b"\0")
    flipped[place] ^= 1 << data.draw(st.integers(0, 7))
    put_segment(directory, bytes(flipped))
    hit = sum(end <= place for end in ends[1:])
    records, batch = read_all(directory)
    assert records == [make_record(number, worker="0" * 24) for number in range(3) if number != hit], "all the others"
    assert batch.checkpoint.done
    assert batch.corrupt or (hit == 2 and not marked), "the last may as well have been torn by a kill"
    assert bool(batch.corrupt) == bool(batch.checkpoint.damaged)


def test_a_page_that_never_reached_the_disk_takes_only_its_own_records(tmp_path: Path) -> None:
    path = dead_segment(tmp_path, *(closing(make_record(number)) for number in range(60)))
    data = bytearray(path.read_bytes())
    data[4096:8192] = bytes(4096)
    path.write_bytes(data)
    records, batch = read_all(tmp_path)
    lost = {identity(number) for number in range(60)} - set(ids(records))
    assert 0 < len(lost) < 20
    assert ids(records) == sorted(ids(records))
    assert len(batch.corrupt) == 1


def test_a_page_of_ones_is_no_end(tmp_path: Path) -> None:
    """As an erased block of flash memory reads."""
    path = dead_segment(tmp_path, *(closing(make_record(number)) for number in range(60)))
    data = bytearray(path.read_bytes())
    start = HEADER_BYTES + 20 * (FRAME_BYTES + len(closing(make_record(0))))
    data[start : start + 4096] = b"\xff" * 4096
    path.write_bytes(data)
    records, batch = read_all(tmp_path)
    assert ids(records)[:20] == [identity(number) for number in range(20)]
    assert ids(records)[-1] == identity(59)
    assert len(batch.corrupt) == 1


def test_text_that_is_none_is_no_record(tmp_path: Path) -> None:
    bad = closing(make_record(7, error="ab")).replace(b"ab", b"\xff\xfe")
    path = dead_segment(tmp_path, bad, opening(make_record(8, error="ab")).replace(b"ab", b"\xff\xfe"), closing(make_record(9)))
    records, batch = read_all(tmp_path)
    assert ids(records) == [identity(9)]
    assert len(batch.corrupt) == 2
    assert batch.checkpoint.damaged == {path.name}
    with pytest.raises(msgspec.MsgspecError):
        Checkpoint.decode(Checkpoint({"ab": 1}).encode().replace(b"ab", b"\xff\xfe"))


@pytest.mark.parametrize("rubbish", [b"\1\2\3\xff", b"\0\0\0\1", b"\0\0\xff\0"])
def test_where_there_is_a_lot_of_rubbish_the_search_is_given_up_and_that_is_reported(tmp_path: Path, rubbish: bytes) -> None:
    """The last two would be taken for lengths of frames that are millions of bytes long, at every place."""
    good = header() + frame(closing(make_record(0)))
    path = put_segment(tmp_path, good + rubbish * (READ_BYTES // 2))
    with path.open("r+b") as file:
        file.seek(32 * READ_BYTES)
        file.write(frame(closing(make_record(1))))
    records, batch = read_all(tmp_path)
    assert ids(records) == [identity(0)]
    assert batch.checkpoint.damaged == {path.name}
    assert "nor soon after it" in batch.corrupt[0]


def test_of_a_living_worker_a_half_written_frame_is_one_that_is_not_there_yet(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SEGMENT_BYTES)
    journal.append(closing(make_record(0)))
    whole = frame(closing(make_record(1)))
    start = journal.position[1]
    position = Checkpoint()
    assert journal._current is not None
    for written in range(len(whole.rstrip(b"\0"))):  # a zero at the end is there already
        journal._current.map[start : start + written] = whole[:written]
        records, batch = read_all(tmp_path, position)
        assert ids(records) == ([identity(0)] if written == 0 else [])
        assert batch.corrupt == []
        position = batch.checkpoint
    journal.append(closing(make_record(1)))
    assert ids(read_all(tmp_path, position)[0]) == [identity(1)]
    journal.close()


def test_a_frame_that_is_no_record_is_reported_and_passed_over(tmp_path: Path) -> None:
    good = [closing(make_record(0)), closing(make_record(1))]
    path = dead_segment(tmp_path, good[0], b"\x02short", closing(make_record(7))[:17] + b"\xc1", good[1])
    records, batch = read_all(tmp_path)
    assert ids(records) == [identity(0), identity(1)]
    assert len(batch.corrupt) == 2
    assert all(path.name in reason for reason in batch.corrupt)
    assert batch.checkpoint.damaged == {path.name}


def test_an_open_request_that_cannot_be_read_is_reported(tmp_path: Path) -> None:
    dead_segment(tmp_path, opening(make_record(0))[:17] + b"\xc1", opening(make_record(1)))
    records, batch = read_all(tmp_path)
    assert ids(records) == [identity(1)]
    assert len(batch.corrupt) == 1
    assert batch.checkpoint.open == {}


def test_a_foreign_file_is_reported_and_put_aside(tmp_path: Path) -> None:
    path = put_segment(tmp_path, b"somebody else's")
    other = dead_segment(tmp_path, closing(make_record(0)))
    records, batch = read_all(tmp_path)
    assert ids(records) == [identity(0)]
    assert len(batch.corrupt) == 1
    Tail(tmp_path).remove([batch.checkpoint])
    assert not path.exists()
    assert not other.exists()
    assert Tail(tmp_path).damaged() == [f"{path.name}.damaged"]
    assert (tmp_path / f"{path.name}.damaged").read_bytes() == b"somebody else's"


# -- removing --


def test_a_segment_goes_when_every_sink_has_it(tmp_path: Path) -> None:
    path = dead_segment(tmp_path, closing(make_record(0)))
    done = read_all(tmp_path)[1].checkpoint
    tail = Tail(tmp_path)
    tail.remove([done, Checkpoint()])
    assert path.exists()
    tail.remove([])
    assert path.exists(), "no sink, nobody has it"
    tail.remove([done, done])
    assert not path.exists()
    assert tail.poll(done).checkpoint == Checkpoint(), "what is gone is forgotten"


def test_a_busy_worker_does_not_keep_its_old_segments(tmp_path: Path) -> None:
    """There is always some request open; segments before the newest go all the same."""
    journal = Journal(tmp_path, SEGMENT_BYTES)
    for number in range(600):
        append_patiently(journal, opening(make_record(number + 1)))
        append_patiently(journal, closing(make_record(number)))
    checkpoint = read_all(tmp_path)[1].checkpoint
    assert checkpoint.open
    wait(lambda: len(Tail(tmp_path).segments()) > 2)
    Tail(tmp_path).remove([checkpoint])
    assert [name.sequence for name in Tail(tmp_path).segments()] == [journal.position[0]]
    kill(journal)
    assert ids(read_all(tmp_path, checkpoint)[0]) == [identity(600)]


def test_the_newest_segment_stays_while_somebody_has_a_request_of_it_open(tmp_path: Path) -> None:
    path = dead_segment(tmp_path, opening(make_record(0)))
    done = read_all(tmp_path)[1].checkpoint
    behind = Checkpoint(done=set(done.done), open={path.name[:24]: {identity(0): opening(make_record(0))}})
    Tail(tmp_path).remove([done, behind])
    assert path.exists()


def test_the_newest_segment_of_a_living_worker_stays(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SEGMENT_BYTES)
    (name,) = Tail(tmp_path).segments()
    Tail(tmp_path).remove([Checkpoint(done={str(name)})])
    assert Tail(tmp_path).segments() == [name]
    journal.close()


def test_requests_whose_segments_somebody_deleted_are_closed(tmp_path: Path) -> None:
    path = dead_segment(tmp_path, opening(make_record(0)))
    checkpoint = Checkpoint({path.name: 100}, set(), {path.name[:24]: {identity(0): opening(make_record(0))}})
    path.unlink()
    records, batch = read_all(tmp_path, checkpoint)
    assert [record.outcome for record in records] == [Outcome.CRASHED]
    assert batch.checkpoint == Checkpoint()


def test_what_the_dead_had_prepared_goes_and_what_the_living_prepare_stays(tmp_path: Path) -> None:
    dead = Journal(tmp_path, SEGMENT_BYTES)
    wait(lambda: dead._next is not None)
    kill(dead)
    living = Journal(tmp_path, SEGMENT_BYTES)
    wait(lambda: living._next is not None)
    fresh, old = (tmp_path / f"{letter * 24}-000001.next" for letter in "fe")
    fresh.touch()
    old.touch()
    os.utime(old, (0, 0))
    Tail(tmp_path).remove([Checkpoint()])
    assert {path.name[:24] for path in tmp_path.glob("*.next")} == {living.incarnation, "f" * 24}
    living.close()


# -- how far behind --


def test_unread_bytes_are_those_that_were_written_and_not_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SEGMENT_BYTES)
    tail = Tail(tmp_path)
    payload = closing(make_record(0))
    for _ in range(3):
        journal.append(payload)
    written = {journal.incarnation: journal.position}
    assert tail.unread_bytes(Checkpoint(), written) == 3 * (FRAME_BYTES + len(payload))
    read = read_all(tmp_path)[1].checkpoint
    assert tail.unread_bytes(read, written) == 0
    kill(journal)
    assert tail.unread_bytes(Checkpoint(), written) == 3 * (FRAME_BYTES + len(payload)), "by its last word"
    assert tail.unread_bytes(read_all(tmp_path, read)[1].checkpoint, written) == 0


def test_a_segment_newer_than_the_heartbeat_does_not_count_as_full(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SEGMENT_BYTES)
    heard = {journal.incarnation: journal.position}
    while journal.position[0] == 1:
        append_patiently(journal, closing(make_record(0)))
    assert Tail(tmp_path).unread_bytes(Checkpoint(), heard) == 0
    said = {journal.incarnation: journal.position}
    assert SEGMENT_BYTES * 0.8 < Tail(tmp_path).unread_bytes(Checkpoint(), said) < SEGMENT_BYTES + 2000
    journal.close()
