"""Which requests of an endpoint want the same answer, and which of their answers are worth giving again.

A name is ignored only where no engine's answer can show what it says: `metadata` changes nothing in a chat, but `/v1/responses`
writes it into its answer. What isn't known here is part of a request's key, so the worst that a new parameter does is a miss.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import Raw, Struct

from proxy.exchange import Record
from proxy.wire.body import Request
from proxy.wire.media import names_remote

_FINISHED: Final = frozenset(("stop", "tool_calls", "function_call", "completed", "end_turn", "stop_sequence", "tool_use"))
"""Why a choice ended that is all there. What a filter, an error, an abort or an unknown word ended is not."""
_ENDED: Final = _FINISHED | {"length", "max_tokens", "max_output_tokens"}
"""Or where its caller said, which may be in the middle of a tool's arguments."""
_NONE: Final = (b"", b"null", b"[]")
_FUNCTIONS: Final = frozenset(("", "function", "custom"))
"""Tools that callers run themselves. What an engine runs looks elsewhere: in the web, in files, on other servers."""
_NO_SEEDS: Final = (-1, 2**32 - 1)
"""Seeds that mean none: vLLM's, llama.cpp's."""


class _Tool(Struct, gc=False):
    type: str = ""


_object = msgspec.json.Decoder(dict[str, Raw])
_tools = msgspec.json.Decoder(list[_Tool])
_unreadable = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)


class Caching(Struct, frozen=True, kw_only=True):
    """`ignored`: names at the top of a body that don't change the answer. `never`: with one of these (and a value that isn't null
    or false) it hangs on more than the request, or leaves something behind. `drawn`: by chance, unless the request says
    otherwise. `holds`: what an answer of an endpoint that doesn't generate must have.
    """

    ignored: frozenset[str] = frozenset()
    never: frozenset[str] = frozenset()
    drawn: bool = False
    holds: str = ""

    def deterministic(self, request: Request, body: bytes) -> bool:
        """It would get the same answer again."""
        return (not self.drawn or _one_way(request)) and not names_remote(body)

    def whole(self, request: Request, record: Record, answer: bytes | None = None) -> bool:
        """An answer (200) is all that was asked for. `answer`: its body, where it is at hand."""
        if not self.holds:
            return _finished(request, record)
        return answer is None or _has(answer, self.holds)


def _one_way(request: Any) -> bool:
    """One choice, at temperature 0 or from a seed, made by nothing but the model."""
    if request.temperature != 0:
        seed = getattr(request, "seed", None)
        if seed is None or seed in _NO_SEEDS:
            return False
    return getattr(request, "n", None) in (None, 1) and getattr(request, "best_of", None) in (None, 1) and _own_tools(request)


def _own_tools(request: Any) -> bool:
    """The engine runs none of them."""
    said = bytes(request.tools)
    if said in _NONE:
        return True
    try:
        return all(tool.type in _FUNCTIONS for tool in _tools.decode(said))
    except _unreadable:
        return False


def _finished(request: Any, record: Record) -> bool:
    """Every choice has ended well. One that was cut counts only where no tool could be called: half a call is none."""
    reasons = record.finish_reasons
    if len(reasons) != record.choices:
        return False
    if _FINISHED.issuperset(reasons):
        return True
    return _ENDED.issuperset(reasons) and all(bytes(getattr(request, name, b"")) in _NONE for name in ("tools", "functions"))


def _has(answer: bytes, name: str) -> bool:
    try:
        return bytes(_object.decode(answer).get(name, b"null")) != b"null"
    except _unreadable:
        return False
