"""The bytes of a segment."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.exchange import RECORD_VERSION
from proxy.journal.segment import (
    END_MARK,
    FRAME,
    HEADER,
    MAGIC,
    MAX_FRAME_BYTES,
    SEGMENT_VERSION,
    Corrupt,
    SegmentName,
    check_header,
    frame,
    header,
    parse,
)

payloads = st.lists(st.binary(min_size=1, max_size=60), max_size=8)


@given(payloads)
def test_what_was_framed_is_parsed(written: list[bytes]) -> None:
    data = b"".join(map(frame, written))
    assert parse(data) == (written, len(data), False)
    assert parse(data + END_MARK + b"rest") == (written, len(data), True)
    assert parse(data + bytes(64)) == (written, len(data), False)


@given(payloads, st.data())
def test_a_cut_at_any_byte_leaves_the_whole_frames_before_it(written: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(map(frame, written))
    cut = data.draw(st.integers(0, len(stream)))
    parsed, consumed, ended = parse(stream[:cut])
    assert parsed == written[: len(parsed)]
    assert consumed == sum(map(len, map(frame, parsed))) <= cut
    assert not ended
    assert len(parsed) == len(written) or consumed + len(frame(written[len(parsed)])) > cut


@given(st.binary(min_size=1, max_size=40), st.data())
def test_any_wrong_bit_is_noticed(payload: bytes, data: st.DataObject) -> None:
    good = bytearray(frame(payload))
    bit = data.draw(st.integers(0, len(good) * 8 - 1))
    good[bit // 8] ^= 1 << bit % 8
    parsed, consumed, ended = parse(bytes(good) + bytes(256))
    assert (parsed, consumed) == ([], 0) or ended


def test_the_length_is_part_of_the_checksum() -> None:
    zeros = FRAME.pack(3, zlib.crc32(bytes(3))) + bytes(3)  # three zeros written, their length taken for another's
    assert parse(zeros) == ([], 0, False)


def test_a_length_that_no_frame_has_ends_the_reading() -> None:
    assert parse(FRAME.pack(MAX_FRAME_BYTES + 1, 0) + bytes(100)) == ([], 0, False)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "shorter"),
        (header()[:-1], "shorter"),
        (HEADER.pack(b"NOTASEGM", SEGMENT_VERSION, RECORD_VERSION), "no segment"),
        (HEADER.pack(MAGIC, SEGMENT_VERSION + 1, RECORD_VERSION), "segment version"),
        (HEADER.pack(MAGIC, SEGMENT_VERSION, RECORD_VERSION + 1), "record version"),
    ],
)
def test_headers_of_others_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(Corrupt, match=reason):
        check_header(data)


def test_this_version_and_the_one_before_are_read() -> None:
    check_header(header())
    check_header(HEADER.pack(MAGIC, SEGMENT_VERSION, RECORD_VERSION - 1))


@pytest.mark.parametrize("name", ["x.seg", "0123456789abcdef01234567-000001.next", "0123456789ABCDEF01234567-000001.seg", ""])
def test_other_files_are_no_segments(name: str) -> None:
    assert SegmentName.parse(name) is None


def test_names_sort_by_incarnation_then_sequence() -> None:
    names = [SegmentName("0" * 24, 2), SegmentName("0" * 23 + "1", 1), SegmentName("0" * 24, 1)]
    assert [SegmentName.parse(str(name)) for name in sorted(names)] == [names[2], names[0], names[1]]
