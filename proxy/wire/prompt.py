"""How long a prompt is, guessed from a request's bytes: nothing is tokenised here."""

from __future__ import annotations

from typing import Final

BYTES_A_TOKEN: Final = 4
"""Of JSON in most languages, its punctuation and names included; the usual guess."""
FILE_TOKENS: Final = 1000
"""What engines make of a picture is by its size in pixels, and of a recording by its length; by its bytes each would look like a
book."""
_INLINE = b";base64,"
_SMALL = 4096


def prompt_tokens(body: bytes) -> int:
    """Of a prompt in JSON, files written into it included."""
    length, files = len(body), 0
    if length > _SMALL and _INLINE in body:
        length, files = _without_files(body)
    return length // BYTES_A_TOKEN + 1 + files * FILE_TOKENS


def _without_files(body: bytes) -> tuple[int, int]:
    """How long the body is but for files written into it, and how many of those there are."""
    length, files, at = len(body), 0, 0
    while (start := body.find(_INLINE, at)) >= 0:
        at = body.find(b'"', start)
        if at < 0:
            break
        length -= at - start
        files += 1
    return length, files
