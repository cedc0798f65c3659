"""A table that is made of another one is as good as one that was built."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.snapshot.table import Table

digests = st.integers(0, 12).map(lambda number: bytes([number * 16]) + bytes(31))
entries = st.dictionaries(digests, st.tuples(st.integers(0, 2**63 - 1), st.sampled_from([b"", b"a", b"bb", b"ccc"])), max_size=8)
Entries = Mapping[bytes, tuple[int, bytes]]


def rows(of: Entries) -> list[tuple[bytes, int, bytes]]:
    return [(digest, number, value) for digest, (number, value) in of.items()]


@given(entries, st.lists(st.tuples(st.sets(digests), entries), max_size=4))
def test_what_goes_and_comes(first: Entries, changes: list[tuple[set[bytes], Entries]]) -> None:
    """Also after some steps, and lying somewhere else."""
    table, held = Table.build(rows(first)), dict(first)
    for gone, come in changes:
        count, value_bytes = table.sizes
        lying = Table(b"before" + table.encoded() + b"after", 6, count, value_bytes)
        table = lying.changed(gone, rows(come))
        held = {digest: each for digest, each in held.items() if digest not in gone} | dict(come)
    assert list(table.entries()) == sorted(rows(held))
    for number in range(13):
        digest = bytes([number * 16]) + bytes(31)
        assert table.look_up(digest) == held.get(digest)


def test_values_that_are_the_same_are_there_once() -> None:
    table = Table.build([]).changed((), [(bytes(32), 0, b"value"), (b"x" * 32, 7, b"value")])
    assert table.sizes == (2, 5)


def test_what_is_no_sha256() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Table.build([]).changed((), [(b"short", 0, b"value")])
