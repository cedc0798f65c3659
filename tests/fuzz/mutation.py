"""What is done to good bytes: strategies for hypothesis. An example is a few edits, so that a failure shrinks to the one that
matters."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Final

from hypothesis import strategies as st

ODD_VALUES: Final = (
    *(b"null", b"true", b"false", b"0", b"-1", b"-0", b"1", b"7", b"1e3", b"1.5", b"2.0", b"1e400", b"-1e400", b"01", b"NaN"),
    *(b"%d" % number for number in (2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1)),
    *(b"9" * 63, b"9" * 64, b"9" * 65, b"9" * 5000, b"0." + b"9" * 500),
    *(
        b'""',
        b'"x"',
        b'"7"',
        b'"1e3"',
        b'"null"',
        b'"\\u0000"',
        b'"\\ud800"',
        b'"\xff"',
        b'"\x01"',
        b'"\xf0\x9f\x98\x80"',
        b'"\\"',
    ),
    *(b"[]", b"{}", b"[{}]", b"[1]", b'["x"]', b'{"a":1}', b"[[],[]]", b"[" * 2000 + b"]" * 2000, b'{"a":' * 2000, b""),
    *(b'{"prompt_tokens":1,"completion_tokens":2}', b'{"input_tokens":9,"output_tokens":%d}' % (2**63 - 1)),
)
"""JSON values where others are expected, and some that are none."""

_VALUE: Final = re.compile(rb'(?<=:)[ ]?("(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|true|false|null|\[\]|\{[^{}]*\})')


def edits(pieces: Sequence[bytes]) -> st.SearchStrategy[Callable[[bytes], bytes]]:
    """One edit of bytes; `pieces` may be put in."""
    place = st.integers(0, 2**20)
    return st.one_of(
        st.builds(_flip, place, st.integers(0, 7)),
        st.builds(_set, place, st.integers(0, 255)),
        st.builds(_cut, place, st.integers(1, 64)),
        st.builds(_double, place, st.integers(1, 64)),
        st.builds(_insert, place, st.sampled_from(pieces)),
        st.builds(_truncate, place),
    )


def odd_value(data: bytes, which: int, value: bytes) -> bytes:
    """`data` with one of its JSON values replaced."""
    found = list(_VALUE.finditer(data))
    if not found:
        return data
    match = found[which % len(found)]
    return data[: match.start()] + value + data[match.end() :]


def odd_values() -> st.SearchStrategy[Callable[[bytes], bytes]]:
    return st.builds(
        lambda which, value: lambda data: odd_value(data, which, value), st.integers(0, 200), st.sampled_from(ODD_VALUES)
    )


@st.composite
def edited(draw: st.DrawFn, data: bytes, how: st.SearchStrategy[Callable[[bytes], bytes]], most: int = 5) -> bytes:
    """`data` after up to `most` edits."""
    for edit in draw(st.lists(how, max_size=most)):
        data = edit(data)
    return data


def cuts() -> st.SearchStrategy[Callable[[bytes], list[bytes]]]:
    """Ways to cut bytes into reads: anywhere, or into equal ones."""
    anywhere = st.lists(st.integers(0, 2**20), max_size=12).map(lambda places: lambda data: _cut_at(data, places))
    equal = st.integers(1, 40).map(lambda size: lambda data: [data[at : at + size] for at in range(0, len(data), size)])
    return anywhere | equal


def _cut_at(data: bytes, places: list[int]) -> list[bytes]:
    borders = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[start:stop] for start, stop in pairwise(borders)]


def _flip(place: int, bit: int) -> Callable[[bytes], bytes]:
    return lambda data: _with(data, place, lambda byte: byte ^ 1 << bit)


def _set(place: int, value: int) -> Callable[[bytes], bytes]:
    return lambda data: _with(data, place, lambda _: value)


def _with(data: bytes, place: int, change: Callable[[int], int]) -> bytes:
    if not data:
        return data
    at = place % len(data)
    return data[:at] + bytes([change(data[at])]) + data[at + 1 :]


def _cut(place: int, length: int) -> Callable[[bytes], bytes]:
    return lambda data: data[: place % (len(data) + 1)] + data[place % (len(data) + 1) + length :]


def _double(place: int, length: int) -> Callable[[bytes], bytes]:
    return lambda data: data[: place % (len(data) + 1) + length] + data[place % (len(data) + 1) :]


def _insert(place: int, piece: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[: place % (len(data) + 1)] + piece + data[place % (len(data) + 1) :]


def _truncate(place: int) -> Callable[[bytes], bytes]:
    return lambda data: data[: place % (len(data) + 1)]
