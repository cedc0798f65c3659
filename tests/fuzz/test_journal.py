"""What a disk, a kill or a stranger may make of journals: the reader survives it, says so, and invents nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import accumulate, count, pairwise
from pathlib import Path
from typing import Final

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Outcome
from proxy.exchange import Phase, Record, decode_record
from proxy.journal import Checkpoint, Tail
from proxy.journal.segment import END_MARK, FRAME_BYTES, HEADER_BYTES, SegmentName, frame, header
from tests.fuzz.effort import effort
from tests.fuzz.mutation import edits
from tests.unit.collectors.made import make_record
from tests.unit.journal.made import SEGMENT_BYTES, closing, dead_segment, opening, progress

MOST_POLLS: Final = 400

RECORDS: Final = [
    make_record(number, error="x" * length, user=user)
    for number, (length, user) in enumerate([(0, ""), (40, "é"), (300, "\0"), (0, "\xff" * 50), (5000, "a"), (0, "u")])
]
PAYLOADS: Final = [write(record) for record in RECORDS for write in (opening, progress, closing)]


def written(payloads: Sequence[bytes], *, ended: bool = False) -> bytes:
    """What is in a segment of a writer that has gone, without the zeros behind it."""
    return header() + b"".join(map(frame, payloads)) + END_MARK * ended


def test_what_is_tried_is_what_a_killed_writer_leaves(tmp_path: Path) -> None:
    assert dead_segment(tmp_path, *PAYLOADS).read_bytes() == written(PAYLOADS).ljust(SEGMENT_BYTES, b"\0")


# --- segments ---------------------------------------------------------------------------------------------------------


def _overwrite(frame_number: int, offset: int, length: int, value: bytes) -> Callable[[bytes], bytes]:
    """In place, from so many bytes after a frame's beginning on."""

    def edit(data: bytes) -> bytes:
        starts = _frame_starts(data)
        at = starts[frame_number % len(starts)] + offset
        return data[:at] + value * len(data[at : at + length]) + data[at + length :]

    return edit


def _frame_starts(data: bytes) -> list[int]:
    """Where the first frame begins, and each that follows."""
    starts = [HEADER_BYTES]
    while (size := int.from_bytes(data[starts[-1] : starts[-1] + 4], "little")) and starts[-1] + size < len(data):
        starts.append(starts[-1] + FRAME_BYTES + size)
    return starts


_frame_numbers, _offsets = st.integers(0, 12), st.sampled_from([0, 0, 1, 4, 7, 8, -1, -8, -HEADER_BYTES]) | st.integers(0, 1000)
_lengths, _fillings = st.sampled_from([1, 4, 8, 64, 512, 4096]), st.sampled_from([b"\0", b"\xff", b"G"])
_pages = st.builds(_overwrite, _frame_numbers, _offsets, _lengths, _fillings)
_pieces = (
    END_MARK,
    header(),
    frame(PAYLOADS[2]),
    frame(b"x"),
    b"\0" * 100,
    b"\xff" * 100,
    b"\x91" * 5000,
    (5000).to_bytes(4, "little"),
)
_in_place = _pages | st.builds(_overwrite, _frame_numbers, _offsets, st.just(1), st.binary(min_size=1, max_size=1))
_anyhow = _pages | edits(_pieces)
_payloads = st.lists(st.sampled_from(PAYLOADS), max_size=12)
_limits = st.sampled_from([1, 3, 2000])
_size = st.sampled_from([0, 100, 16 * 1024])
"""How far a file goes on with zeros."""


def read(segments: dict[SegmentName, bytes], limit: int) -> tuple[list[Record], list[str], Checkpoint]:
    """What comes out, as it was appended, what is reported, and the last checkpoint."""
    incarnations = {name.incarnation for name in segments}
    with tempfile.TemporaryDirectory() as directory:
        for name, data in segments.items():
            (Path(directory) / str(name)).write_bytes(data)
        tail, checkpoint = Tail(Path(directory)), Checkpoint()
        records: list[Record] = []
        reports: list[str] = []
        for polls in count():
            assert polls < MOST_POLLS
            batch = tail.poll(checkpoint, limit)
            assert {record.worker for record in batch.records} <= incarnations
            records += [msgspec.structs.replace(record, worker="") for record in batch.records]
            reports += batch.corrupt
            checkpoint = Checkpoint.decode(batch.checkpoint.encode())
            if not batch.more:
                break
        again = tail.poll(checkpoint, limit)
        assert (again.records, again.corrupt, again.checkpoint) == ([], [], checkpoint)
        tail.remove([checkpoint])
        assert tail.segments() == []
        assert bool(tail.damaged()) == bool(checkpoint.damaged)
        return records, reports, checkpoint


def is_one_of(record: Record, payloads: Sequence[bytes]) -> bool:
    """It is what was appended, to the byte; of a request that was left open what was said of it last."""
    if record.outcome != Outcome.CRASHED:
        return closing(record) in payloads
    left = [decode_record(payload) for payload in payloads if payload[0] != Phase.CLOSING]
    own = msgspec.structs.asdict(record)
    changed = {"outcome", "error_code", "error", "ended_ns"}
    return any(
        all(value == own[name] for name, value in msgspec.structs.asdict(each).items() if name not in changed) for each in left
    )


# --- what must hold ---------------------------------------------------------------------------------------------------


@effort(200)
@given(
    st.lists(st.tuples(_payloads, st.booleans(), _size, st.lists(_anyhow, max_size=4)), min_size=1, max_size=3),
    _limits,
    st.booleans(),
)
def test_nothing_is_invented_and_nothing_breaks(
    writers: list[tuple[list[bytes], bool, int, list[Callable[[bytes], bytes]]]], limit: int, apart: bool
) -> None:
    segments = {}
    for number, (payloads, ended, size, changes) in enumerate(writers, 1):
        data = written(payloads, ended=ended).ljust(size, b"\0")
        for change in changes:
            data = change(data)
        segments[SegmentName(f"{number if apart else 0:024x}", number)] = data
    records, reports, checkpoint = read(segments, limit)
    assert all(is_one_of(record, PAYLOADS) for record in records)
    assert {report[: len(str(next(iter(segments))))] for report in reports} == checkpoint.damaged


@effort(200)
@given(_payloads, st.booleans(), _size, st.lists(_in_place, max_size=3), _limits)
def test_damage_takes_only_what_it_hit_and_is_reported(
    payloads: list[bytes], ended: bool, size: int, changes: list[Callable[[bytes], bytes]], limit: int
) -> None:
    numbered = [closing(make_record(number, error=payload.hex())) for number, payload in enumerate(payloads)]
    good = data = written(numbered, ended=ended).ljust(size, b"\0")
    for change in changes:
        data = change(data)
    records, reports, _ = read({SegmentName("0" * 24, 1): data}, limit)
    came = [numbered.index(closing(record)) for record in records]
    if data[:HEADER_BYTES] != good[:HEADER_BYTES]:
        assert reports or data[HEADER_BYTES - 8 : HEADER_BYTES] != good[HEADER_BYTES - 8 : HEADER_BYTES], (
            "eight bytes are reserved"
        )
        return
    spans = list(pairwise(accumulate(numbered, lambda end, payload: end + FRAME_BYTES + len(payload), initial=HEADER_BYTES)))
    intact = [number for number, (start, end) in enumerate(spans) if data[start:end] == good[start:end]]
    if END_MARK in data[: spans[-1][1] if spans else 0]:
        assert came == intact[: len(came)], "it was made to say that it ends here"
        return
    assert came == intact
    end = spans[-1][1] if spans else HEADER_BYTES
    something_after = len(spans) if data[end : end + FRAME_BYTES] == END_MARK else max(intact, default=0)
    if len(intact) < something_after:
        assert reports
    if data == good:
        assert reports == []


@effort(200)
@given(st.lists(st.tuples(st.sampled_from(PAYLOADS), st.lists(edits(_pieces), max_size=3)), max_size=6), _limits)
def test_frames_that_are_whole_and_no_records_break_nothing(
    said: list[tuple[bytes, list[Callable[[bytes], bytes]]]], limit: int
) -> None:
    """As another version may write them, or somebody else."""
    payloads = []
    for payload, changes in said:
        for change in changes:
            payload = change(payload)
        payloads.append(payload)
    read({SegmentName("0" * 24, 1): written([payload for payload in payloads if payload])}, limit)


@effort(100)
@given(st.lists(st.sampled_from(PAYLOADS), max_size=4), st.lists(edits(_pieces), max_size=3))
def test_what_is_no_checkpoint_is_said_to_be_none(payloads: list[bytes], changes: list[Callable[[bytes], bytes]]) -> None:
    checkpoint = Checkpoint({"a": 7}, {"b"}, {"c": {payload[1:17]: payload for payload in payloads}}, {"d"})
    data = checkpoint.encode()
    for change in changes:
        data = change(data)
    with suppress(msgspec.MsgspecError):
        assert Checkpoint.decode(Checkpoint.decode(data).encode()) == Checkpoint.decode(data)
