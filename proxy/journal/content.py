"""A captured prompt and answer: raw bytes, as they went by. In segments of their own, short-lived, only if capture is on.

Frame: 16 bytes of request id, then MessagePack `[request body, answer body, truncated]`.
"""

from __future__ import annotations

import msgspec


class Content(msgspec.Struct, array_like=True, frozen=True):
    request: bytes
    answer: bytes
    truncated: bool = False


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Content)


def encode_content(identity: bytes, request: bytes, answer: bytes, limit: int) -> bytes:
    """Each of the two is cut at `limit` bytes."""
    truncated = len(request) > limit or len(answer) > limit
    return identity + _encoder.encode(Content(request[:limit], answer[:limit], truncated))


def decode_content(payload: bytes) -> tuple[bytes, Content]:
    """(request id, content). Raises msgspec.MsgspecError."""
    try:
        return payload[:16], _decoder.decode(payload[16:])
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from None
