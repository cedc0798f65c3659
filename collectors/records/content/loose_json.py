"""JSON that may have been cut off, and values that may be anything."""

from __future__ import annotations

import re
from typing import Any

import msgspec

_TOKEN = re.compile(rb'"(?:[^"\\]|\\u[0-9a-fA-F]{4}|\\[^u])*+("?)|[\[\]{},:]|[^\s\[\]{},:"]+', re.DOTALL)
"""A string (whole escapes only, its closing quote if it is there), a mark, or a number or name."""

_HALF_A_PAIR = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}$")
_CLOSERS = {b"{": b"}", b"[": b"]"}


# -- small readers --


def dict_of(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def list_of(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def text_of(value: object) -> str:
    """A string as it is, nothing of null, anything else as JSON."""
    return value if isinstance(value, str) else "" if value is None else json_of(value)


def json_of(value: object) -> str:
    """What could just be decoded may be nested too deeply to be encoded here, where the stack is higher."""
    try:
        return msgspec.json.encode(value).decode()
    except RecursionError:
        return "[nested too deeply]"


def number_of(value: object) -> float | None:
    """None for what is no number, or one that no float can hold."""
    try:
        return float(value) if isinstance(value, (int, float)) else None
    except OverflowError:
        return None


# -- bodies --


def parse_json(body: bytes) -> object:
    """The value; of a text that was cut off, what precedes the cut; None if there is nothing to read."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        pass
    try:
        return msgspec.json.decode(close_json(body))
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None


def close_json(text: bytes) -> bytes:
    """Complete a JSON text that was cut off: an open string ends there, half a member goes, what is open is closed.

    `text` must be the beginning of valid JSON; of anything else something comes out that may or may not be JSON.
    """
    opened: list[bytes] = []
    good, before = 0, b""
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token in _CLOSERS:
            opened.append(token)
        elif token in (b"}", b"]"):
            if not opened:
                break
            opened.pop()
        elif token in (b",", b":") or (opened[-1:] == [b"{"] and before != b":"):
            before = token
            continue  # a key counts with its value
        elif match.group(1) == b"":
            return text[: match.start()] + _ended(token) + _closing(opened)
        elif not (token[:1] == b'"' or token in (b"true", b"false", b"null") or _is_number(token, match.end() == len(text))):
            break
        before = token
        good = match.end()
    return text[:good] + _closing(opened)


def _ended(string: bytes) -> bytes:
    """A string that was cut, ended before a character that was cut with it."""
    return _HALF_A_PAIR.sub(b"", string.decode("utf-8", "ignore").encode()) + b'"'


def _is_number(token: bytes, last: bool) -> bool:
    """The last thing in a text may be half a number."""
    return token[-1:].isdigit() and not last


def _closing(opened: list[bytes]) -> bytes:
    return b"".join(_CLOSERS[opener] for opener in reversed(opened))
