"""Images, audio, video and files that a request only names, for the engine to fetch from where it stands. So URLs are looked at
wherever content names them: `data:` is taken, `https:` for hosts that the settings list, and nothing else. What isn't plain is
refused: the next reader may see another host in it (CVE-2026-24779). What a listed host redirects to, only the engine sees.

Most requests name nothing, and a search for a few bytes tells: first for the list of parts that a plain prompt hasn't got, then
for names. It misses none: what is written with escapes has escapes, and of those for letters no writer makes a habit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from proxy.errors import InvalidRequest

_NAMES = frozenset(("image_url", "video_url", "audio_url", "file_url"))
"""Whose value is a URL, or an object that has one as its `url`."""
_HOLDERS = frozenset(("source", "file", "image", "video", "audio", "document", "input_audio", "input_image", "input_file"))
"""What they are called, or are of type, in whose `url` it may stand too."""
_NOT_CONTENT = frozenset(("tools", "functions", "response_format", "metadata"))
"""At the top: words about words, which no engine takes for content."""
_CALLS = frozenset(("tool_use", "server_tool_use", "mcp_tool_use"))
"""Whose `input` is what a model once wanted to tell a tool."""

_URL = b'url"'
_VALUE = re.compile(rb'url"[ \t\r\n]*:[ \t\r\n]*["{\[]')
_ESCAPE = b"\\u00"
_ESCAPED = re.compile(rb"\\u00[567]")
"""A small letter or the underscore, among others."""
_HTTPS = re.compile(r"https://([A-Za-z0-9][A-Za-z0-9.-]*)(?:[/?#][^\s\\\x00-\x1f\x7f]*)?")
_PLAIN = re.compile(r"[A-Za-z0-9_]{1,32}")
_SHOWN = 200
"""Characters of where it stands."""

_Place = tuple[str, ...]


class Media:
    """`hosts`: exact ones, and `*.suffix` for those below one, as in `MediaSettings`."""

    def __init__(self, hosts: tuple[str, ...] = ()) -> None:
        self._hosts = frozenset(host for host in hosts if not host.startswith("*"))
        self._suffixes = tuple(host[1:] for host in hosts if host.startswith("*"))
        self._allowed = "`data:` URLs" + "".join(f", https://{host}/..." for host in hosts)

    def check(self, body: bytes, lists: int) -> None:
        """A JSON body, in which content parts lie in so many lists, one or two. Raises InvalidRequest with the place of a URL
        that isn't taken."""
        at = body.find(b"[")
        if lists > 1 and at >= 0:
            at = body.find(b"[", at + 1)
        if at >= 0 and _may_name(body, at):
            self._look(body)

    def _look(self, body: bytes) -> None:
        for place, url in _urls(_read(body)):
            if not self._takes(url):
                where = "".join(place).removeprefix(".")[:_SHOWN]
                raise InvalidRequest(
                    f"`{where}` is a URL that nothing is fetched from; allowed: {self._allowed}.",
                    param=where,
                    code="url_not_allowed",
                )

    def _takes(self, url: str) -> bool:
        if _inline(url):
            return True
        match = _HTTPS.fullmatch(url)
        if match is None:
            return False
        host = match[1].lower()
        return host in self._hosts or host.endswith(self._suffixes)


def names_remote(body: bytes) -> bool:
    """Something that a JSON body names is fetched from elsewhere, where it may be another thing tomorrow; or it can't be told."""
    at = body.find(b"[")
    if at < 0 or not _may_name(body, at):
        return False
    try:
        return any(not _inline(url) for _, url in _urls(_read(body)))
    except InvalidRequest:
        return True


def _inline(url: str) -> bool:
    return url[:5].lower() == "data:"


def _may_name(body: bytes, at: int) -> bool:
    return _names_some(body, at) or (body.find(_ESCAPE, at) >= 0 and _ESCAPED.search(body, at) is not None)


def _names_some(body: bytes, at: int) -> bool:
    """There is a member `..._url`, or a `url` that is text: the name of an argument in the schema of a tool is neither."""
    at = body.find(_URL, at)
    if at < 0:
        return False
    for match in _VALUE.finditer(body, at):
        before = body[match.start() - 1 : match.start()]
        if before == b"_" or (before == b'"' and match[0].endswith(b'"')):
            return True
    return False


class _Object(list[tuple[str, Any]]):
    """All members, also those whose name stands twice."""


def _read(body: bytes) -> Any:
    """Numbers are nothing here. Raises InvalidRequest."""
    try:
        text = _without_data(body).decode()
        return json.loads(text, strict=False, object_pairs_hook=_Object, parse_int=str, parse_float=str, parse_constant=str)
    except RecursionError:
        raise InvalidRequest("The request body is nested too deeply.") from None
    except ValueError as error:
        raise InvalidRequest(f"The request body isn't valid JSON: {error}.") from None


_DATA = b'"data:'


def _without_data(body: bytes) -> bytes:
    """What files are written into it is left out: it can be most of it. From a quote up to the next one, with no backslash
    between them, is all of a string or its end."""
    pieces, at = [], 0
    while (start := body.find(_DATA, at)) >= 0:
        pieces.append(body[at : start + len(_DATA)])
        at = start + len(_DATA)
        end = body.find(b'"', at)
        if end >= 0 and body.find(b"\\", at, end) < 0:
            at = end
    pieces.append(body[at:])
    return b"".join(pieces)


def _urls(document: Any) -> Iterator[tuple[_Place, str]]:
    """Each with its place."""
    waiting: list[tuple[_Place, Any]] = [((), document)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, _Object):
            kinds = {said for name, said in value if name == "type" and isinstance(said, str)}
            for name, said in value:
                if name in _NOT_CONTENT if not place else name == "input" and kinds and kinds <= _CALLS:
                    continue
                at = (*place, f".{name if _PLAIN.fullmatch(name) else '?'}")
                waiting.append((at, said))
                if name in _NAMES or (name == "url" and kinds & _HOLDERS) or (name in _HOLDERS and isinstance(said, _Object)):
                    yield from _texts(at, said)
        elif isinstance(value, list):
            waiting += [((*place, f"[{index}]"), each) for index, each in enumerate(value)]


def _texts(place: _Place, value: Any) -> Iterator[tuple[_Place, str]]:
    """What is said as a URL: the value itself, or the `url` of an object."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, _Object):
        for name, said in value:
            if name == "url" and isinstance(said, str):
                yield (*place, ".url"), said
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from _texts((*place, f"[{index}]"), each)
