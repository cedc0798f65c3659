"""Which requests are the same: what they say, whatever the order of its names and however it is spaced and escaped.

A key is a keyed hash (BLAKE2b, RFC 7693) of who may share an answer, which model in which revision is asked for what, and all
that the body says about it. So nobody who hasn't the installation's secret can make one, or try out what others asked for.

Numbers are what engines' readers make of them: whole ones as they are, others as doubles; 1 and 1.0 are two. Where a name stands
twice further down (at the top that is refused) the last counts, as it does for engines. What two readers could read in two ways
has no key: a number that no double can hold, half a surrogate pair.
"""

from __future__ import annotations

import re
from hashlib import blake2b
from typing import Any, Final

import msgspec
from msgspec import Raw

from proxy.cache.entry import Form
from proxy.snapshot import Principal
from proxy.wire.body import Request, read_stream_options
from proxy.wire.caching import Caching

MAX_BODY: Final = 4 * 1024 * 1024
"""Bytes of a body that is read whole: it takes some 4 ms a MiB, and everybody else waits."""
MAX_VALUES: Final = 150_000
"""In such a body, about. Each takes as long as a hundred bytes of text."""
_LARGE: Final = 64 * 1024
_STRIDE: Final = 32
_DIGITS = re.compile(rb"[0-9]{7}")
_LONG_NUMBER = re.compile(rb"[0-9]{256}")
"""It takes quadratic time. Of every `_STRIDE`th byte such a one has at least seven in a row, and those are quicker to search."""
_PERSON: Final = b"glasshouse-cache"

_WRITTEN_OUT: Final = frozenset(
    (
        *("tools", "functions", "response_format", "structured_outputs", "guided_json", "json_schema", "text"),
        *("output_config", "output_format", "documents", "chat_template_kwargs"),
    )
)
"""Names at the top of a body whose objects an engine writes into its prompt, or generates, in the order that they have."""
_ARGUMENTS = re.compile(rb'"(?:input|arguments)":\{')
"""So it does with what a model has told a tool, where that isn't text. (Within text, a quote has a backslash before it.)"""
_STREAM_OPTIONS: Final = {"include_usage", "continuous_usage_stats"}

_decode = msgspec.json.Decoder(dict[str, Any]).decode
_as_said = msgspec.json.Encoder().encode
_sorted = msgspec.json.Encoder(order="deterministic").encode
_unreadable = (msgspec.MsgspecError, RecursionError, ValueError)


def tenant_of(principal: Principal, scope: str) -> str:
    """Who shares with this caller: `key`, `team` (a key of none is alone) or `everyone`."""
    if scope == "everyone":
        return "everyone"
    return f"team:{principal.team}" if scope == "team" and principal.team else f"key:{principal.key_id}"


def form_of(request: Request) -> Form:
    """How its answer is to be sent."""
    if not request.stream:
        return Form.WHOLE
    said = getattr(request, "stream_options", Raw(b""))
    options = read_stream_options(said) if len(said) else None
    if options is None or not options.include_usage:
        return Form.STREAM
    return Form.STREAM_WITH_USAGES if options.continuous_usage_stats else Form.STREAM_WITH_USAGE


def key_of(secret: bytes, operation: str, caching: Caching, model: str, revision: str, tenant: str, body: bytes) -> bytes | None:
    """32 bytes. `body`: JSON, with all that is changed in it for its model, which itself counts as `model` and `revision` say.
    None: its answer is for nobody else, or it can't be said which requests are the same."""
    if len(body) > _LARGE and not _readable(body):
        return None
    try:
        said = _decode(body)
    except _unreadable:
        return None
    if not caching.never.isdisjoint(said) and any(said.get(name) not in (None, False) for name in caching.never):
        return None
    said.pop("model", None)
    if ignored := caching.ignored.intersection(said):
        if not _usual(said):
            ignored -= {"stream_options"}
        for name in ignored:
            del said[name]
    whose = _as_said((operation, model, revision, tenant))
    return blake2b(b"%b\n%b" % (whose, _canonical(said)), digest_size=32, key=secret, person=_PERSON).digest()


def _readable(body: bytes) -> bool:
    """In a time that others can wait."""
    return (
        len(body) <= MAX_BODY
        and body.count(b",") + body.count(b"{") + body.count(b"[") <= MAX_VALUES
        and not (_DIGITS.search(body[::_STRIDE]) and _LONG_NUMBER.search(body))
    )


def _usual(said: dict[str, Any]) -> bool:
    """`stream_options` says nothing but what the Form says, where it may be said at all."""
    options = said.get("stream_options")
    if options is None:
        return True
    return (
        said.get("stream") is True
        and isinstance(options, dict)
        and options.keys() <= _STREAM_OPTIONS
        and all(value is None or isinstance(value, bool) for value in options.values())
    )


def _canonical(said: dict[str, Any]) -> bytes:
    """JSON in two lines: what may stand in any order, and what may not."""
    written_out = b"{}"
    if not _WRITTEN_OUT.isdisjoint(said):
        written_out = _as_said({name: said.pop(name) for name in sorted(_WRITTEN_OUT.intersection(said))})
    rest = _sorted(said)
    if _ARGUMENTS.search(rest):
        rest = _as_said(dict(sorted(said.items())))
    return b"%b\n%b" % (rest, written_out)
