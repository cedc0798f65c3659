"""An entry as others keep it: bytes that nobody without the secret can make, for one key only.

version (1 byte)  of the entry's fields
flags (1)         1: the payload is compressed
MAC (16)          keyed BLAKE2b of all else, and of the key
payload           the entry in MessagePack, or that in zlib's format

Nothing of it is read before the MAC was found to be right. What is damaged, cut, of another version, somebody else's or was kept
for another key is no entry, which is no error.
"""

from __future__ import annotations

import zlib
from hashlib import blake2b
from hmac import compare_digest
from typing import Final

import msgspec

from proxy.cache.entry import ENTRY_VERSION, Entry

_COMPRESSED: Final = 1
_MAC: Final = 16
_HEAD: Final = 2 + _MAC
_PURPOSE: Final = b"cache entry"
"""The secret makes other things too."""
_COMPRESS_FROM: Final = 1024
_WORTHWHILE: Final = 0.9
"""Of its length; else it is left as it is."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Entry).decode


def seal(entry: Entry, key: bytes, secret: bytes) -> bytes:
    """`secret`: 1 to 64 bytes. Compressing takes about 5 ms per MiB."""
    payload = _encode(entry)
    flags = 0
    if len(payload) >= _COMPRESS_FROM:
        compressed = zlib.compress(payload, 1)
        if len(compressed) <= _WORTHWHILE * len(payload):
            payload, flags = compressed, _COMPRESSED
    kind = bytes((ENTRY_VERSION, flags))
    return b"".join((kind, _mac(kind, key, payload, secret), payload))


def unseal(data: bytes, key: bytes, secret: bytes, most: int) -> Entry | None:
    """`most`: bytes that it may have unpacked. None: it isn't one."""
    kind, payload = data[:2], data[_HEAD:]
    if not compare_digest(data[2:_HEAD], _mac(kind, key, payload, secret)) or kind[0] != ENTRY_VERSION:
        return None
    try:
        unpacked = _unpack(payload, most) if kind[1] & _COMPRESSED else payload
        return _decode(unpacked) if len(unpacked) <= most else None
    except (zlib.error, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _mac(kind: bytes, key: bytes, payload: bytes, secret: bytes) -> bytes:
    mac = blake2b(b"%b%d:" % (kind, len(key)), digest_size=_MAC, key=secret, person=_PURPOSE)
    mac.update(key)
    mac.update(payload)
    return mac.digest()


def _unpack(compressed: bytes, most: int) -> bytes:
    """Not more than a byte above `most`: it may be a bomb. Raises zlib.error."""
    return zlib.decompressobj().decompress(compressed, most + 1)
