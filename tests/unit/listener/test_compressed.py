"""Compressed bodies."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib

import pytest

from proxy.errors import BodyTooLarge, InvalidRequest, UnsupportedMedia
from proxy.listener.compressed import Decompressor

PLAIN = b'{"model":"m"}' * 100
GZIPPED = gzip.compress(PLAIN, mtime=0)  # part of tests' names, which are the same in every process
PACKED = {b"gzip": GZIPPED, b"GZIP": GZIPPED, b"deflate": zlib.compress(PLAIN)}


@pytest.mark.parametrize(("encoding", "packed"), PACKED.items())
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_what_went_in_comes_out(encoding: bytes, packed: bytes, size: int) -> None:
    body = Decompressor(encoding, len(PLAIN))
    assert b"".join(body.feed(packed[at : at + size]) for at in range(0, len(packed), size)) == PLAIN
    body.end()


@pytest.mark.parametrize("encoding", [b"br", b"zstd", b"gzip, gzip", b"", b"compress"])
def test_another_encoding_is_refused_with_what_is_allowed(encoding: bytes) -> None:
    # failure 39
    with pytest.raises(UnsupportedMedia) as raised:
        Decompressor(encoding, 1000)
    assert raised.value.error_code == "unsupported_content_encoding"
    assert "gzip, deflate" in raised.value.message
    assert raised.value.lines == b"\r\naccept-encoding: gzip, deflate"


def test_without_a_limit_none_is_taken() -> None:
    # failure 39
    with pytest.raises(UnsupportedMedia) as raised:
        Decompressor(b"gzip", None)
    assert raised.value.lines == b"\r\naccept-encoding: identity"


def test_a_bomb_never_grows_beyond_the_limit() -> None:
    # failure 39: 256 MiB in 256 KB
    bomb = gzip.compress(bytes(256 * 1024 * 1024), 9)
    body = Decompressor(b"gzip", 100_000)
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLarge):
            body.feed(bomb)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


def test_at_the_limit_is_not_beyond_it() -> None:
    assert Decompressor(b"deflate", 1000).feed(zlib.compress(bytes(1000))) == bytes(1000)
    with pytest.raises(BodyTooLarge):
        Decompressor(b"deflate", 999).feed(zlib.compress(bytes(1000)))


@pytest.mark.parametrize(
    "data",
    [
        b"not gzip",
        PACKED[b"gzip"][:20] + b"xx" + PACKED[b"gzip"][22:],
        PACKED[b"gzip"] + b"more",
        PACKED[b"gzip"] * 2,
        PACKED[b"gzip"][:-1],
        b"",
    ],
    ids=["another format", "damaged", "more after it", "twice", "cut off", "nothing"],
)
def test_what_is_not_what_it_says(data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        decompressed(data)


def decompressed(data: bytes) -> bytes:
    body = Decompressor(b"gzip", 1_000_000)
    plain = body.feed(data)
    body.end()
    return plain
