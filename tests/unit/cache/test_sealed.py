"""What others keep is checked before it is read (failure 45): damaged, cut, foreign, moved to another key, of another version, a
bomb: it is no entry, and nothing else happens."""

from __future__ import annotations

import random
import zlib
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from proxy.cache import sealed as module
from proxy.cache.entry import ENTRY_VERSION, RECORDED, Entry, Form
from proxy.cache.sealed import seal, unseal

KEY: Final = bytes(range(33))
SECRET: Final = b"a secret of this installation"
MOST: Final = 1024 * 1024
HEAD: Final = 18


def entry(body: bytes = b'{"id":"chatcmpl-1"}', **more: Any) -> Entry:
    given = {
        "operation": "chat",
        "model": "a model",
        "form": Form.STREAM,
        "head": b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n",
        "sized": False,
        "body": body,
        "made_unix_ns": 1_700_000_000_000_000_001,
        "expires_unix_ns": 1_700_000_060_000_000_001,
        "key_id": "k",
        "team": "t",
        "user": "u",
        "user_name": "Ü",
        "id": b"i" * 16,
        "trace_id": b"t" * 16,
        "span_id": 2**63,
        "took_ns": 5,
        "finish_reasons": ("stop",),
    }
    return Entry(**{**given, **more})


EVENTS: Final = b'data: {"choices":[{"index":0,"delta":{"content":"word"}}]}\n\n' * 400
NOISE: Final = random.Random(1).randbytes(8192)


def forged(payload: bytes, flags: int = 0, version: int = ENTRY_VERSION) -> bytes:
    """Rightly signed, whatever it is."""
    kind = bytes((version, flags))
    return kind + module._mac(kind, KEY, payload, SECRET) + payload


def test_what_a_record_says_comes_last() -> None:
    """An entry takes it from there in one go, in this order."""
    assert Entry.__struct_fields__[-len(RECORDED) :] == RECORDED


@pytest.mark.parametrize("body", [b"", b"short", EVENTS, NOISE], ids=["empty", "short", "events", "noise"])
def test_what_is_sealed_comes_out_as_it_was(body: bytes) -> None:
    assert unseal(seal(entry(body), KEY, SECRET), KEY, SECRET, MOST) == entry(body)


def test_it_is_compressed_where_that_pays() -> None:
    assert len(seal(entry(EVENTS), KEY, SECRET)) < len(EVENTS) / 10
    for body in (b"x" * 500, NOISE, NOISE + b"x" * 400):
        plain = seal(entry(body), KEY, SECRET)
        assert plain[1] == 0
        assert body in plain


def test_every_other_byte_makes_it_none() -> None:
    """failure 45"""
    for body in (b"short", EVENTS):
        data = seal(entry(body), KEY, SECRET)
        for place in range(len(data)):
            for bit in range(8):
                flipped = bytearray(data)
                flipped[place] ^= 1 << bit
                assert unseal(bytes(flipped), KEY, SECRET, MOST) is None, (place, bit)


def test_every_piece_of_it_is_none_and_so_is_more_than_it() -> None:
    """failure 45"""
    for body in (b"short", EVENTS):
        data = seal(entry(body), KEY, SECRET)
        for length in range(len(data)):
            assert unseal(data[:length], KEY, SECRET, MOST) is None, length
        for more in (b"\0", b"x", data):
            assert unseal(data + more, KEY, SECRET, MOST) is None
            assert unseal(more + data, KEY, SECRET, MOST) is None


def test_any_bytes_are_none() -> None:
    """failure 45"""
    some = random.Random(2)
    for _ in range(20_000):
        data = some.randbytes(some.randrange(64))
        assert unseal(data, KEY, SECRET, MOST) is None
        assert unseal(bytes((ENTRY_VERSION, some.randrange(2))) + data, KEY, SECRET, MOST) is None


def test_another_key_or_secret_opens_nothing() -> None:
    """failure 45: a value that was moved to another key is as foreign as one of another installation."""
    data = seal(entry(), KEY, SECRET)
    for key in (KEY[:-1], KEY + b"\0", KEY[:-1] + b"\0", b""):
        assert unseal(data, key, SECRET, MOST) is None
    for secret in (SECRET + b"2", SECRET[:-1]):
        assert unseal(data, KEY, secret, MOST) is None


def test_what_the_secret_signs_for_another_purpose_is_none() -> None:
    """failure 45"""
    payload = msgspec.msgpack.encode(entry())
    kind = bytes((ENTRY_VERSION, 0))
    said = b"%b%d:%b%b" % (kind, len(KEY), KEY, payload)
    for purpose in (b"", b"key"):
        mac = blake2b(said, digest_size=16, key=SECRET, person=purpose).digest()
        assert unseal(kind + mac + payload, KEY, SECRET, MOST) is None
    mac = blake2b(said, digest_size=16, key=SECRET, person=b"cache entry").digest()
    assert unseal(kind + mac + payload, KEY, SECRET, MOST) == entry()


def test_where_the_key_ends_is_signed_too() -> None:
    """failure 45: what was kept for a key isn't taken under one that takes bytes of the payload, or gives it some."""
    data = seal(entry(), KEY, SECRET)
    moved = data[:HEAD] + KEY[-1:] + data[HEAD:]
    assert unseal(moved, KEY[:-1], SECRET, MOST) is None
    assert unseal(data[:HEAD] + data[HEAD + 1 :], KEY + data[HEAD : HEAD + 1], SECRET, MOST) is None


def test_an_entry_of_another_version_is_none() -> None:
    """failure 45"""
    payload = msgspec.msgpack.encode(entry())
    assert unseal(forged(payload), KEY, SECRET, MOST) == entry()
    for version in (0, ENTRY_VERSION + 1, 255):
        assert unseal(forged(payload, version=version), KEY, SECRET, MOST) is None


@pytest.mark.parametrize(
    ("payload", "flags"),
    [
        (b"", 0),
        (b"\xc1", 0),
        (msgspec.msgpack.encode(["chat"]), 0),
        (msgspec.msgpack.encode({"operation": "chat"}), 0),
        (msgspec.msgpack.encode(entry())[:-1], 0),
        (msgspec.msgpack.encode(entry()).replace(b"a model", b"a \xff\xff\xff\xff\xff"), 0),
        (b"", 1),
        (b"no zlib", 1),
        (zlib.compress(msgspec.msgpack.encode(entry()))[:-40], 1),
        (zlib.compress(b""), 1),
    ],
    ids=["empty", "no-type", "too-few", "a-map", "cut", "no-text", "empty-zlib", "no-zlib", "cut-zlib", "nothing-compressed"],
)
def test_what_is_rightly_signed_and_yet_no_entry_is_none(payload: bytes, flags: int) -> None:
    """failure 45"""
    assert unseal(forged(payload, flags), KEY, SECRET, MOST) is None


def test_what_would_become_too_long_is_none_and_never_becomes_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """failure 45: a bomb."""
    unpacked: list[int] = []
    unpack = module._unpack

    def keep(compressed: bytes, most: int) -> bytes:
        unpacked.append(len(data := unpack(compressed, most)))
        return data

    monkeypatch.setattr(module, "_unpack", keep)
    bomb = forged(zlib.compress(msgspec.msgpack.encode(entry(bytes(64 * MOST))), 9), 1)
    assert len(bomb) < MOST
    assert unseal(bomb, KEY, SECRET, MOST) is None
    assert unpacked == [MOST + 1]


@pytest.mark.parametrize("body", [EVENTS, NOISE], ids=["compressed", "plain"])
def test_how_long_it_may_become_is_said_to_the_byte(body: bytes) -> None:
    data, length = seal(entry(body), KEY, SECRET), len(msgspec.msgpack.encode(entry(body)))
    assert unseal(data, KEY, SECRET, length) == entry(body)
    assert unseal(data, KEY, SECRET, length - 1) is None


def test_nothing_is_read_before_the_signature_was_found_to_be_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """failure 45"""

    def never(*_: object) -> Any:
        raise AssertionError("read")

    good, data = seal(entry(), KEY, SECRET), bytearray(seal(entry(EVENTS), KEY, SECRET))
    data[5] ^= 1
    monkeypatch.setattr(module, "_unpack", never)
    monkeypatch.setattr(module, "_decode", never)
    assert unseal(bytes(data), KEY, SECRET, MOST) is None
    assert unseal(good, KEY, b"another", MOST) is None
    with pytest.raises(AssertionError, match="read"):
        unseal(good, KEY, SECRET, MOST)


def test_what_others_keep_is_never_code() -> None:
    """failure 45: nothing here unpickles."""
    for path in Path(module.__file__).parent.glob("*.py"):
        text = path.read_text()
        assert not [word for word in ("pickle", "marshal", "shelve", "eval(") if word in text], path
