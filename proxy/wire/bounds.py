"""What one request may ask for. An engine believes its callers: a billion choices, or a grammar of megabytes, are one request to
it, and the end of everybody else's (CVE-2026-34756). Which bounds hold is for each model to say."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from msgspec import Raw

from proxy.errors import InvalidRequest
from proxy.wire.body import TOO_LARGE, Request

if TYPE_CHECKING:
    from proxy.snapshot import Bounds

NUMBERS = {
    "n": "n",
    "best_of": "n",
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "logprobs": "logprobs",
    "top_logprobs": "logprobs",
    "prompt_logprobs": "logprobs",
}
"""A request's field → the bound that holds for it."""
LISTS = {"stop": "stop", "stop_sequences": "stop", "tools": "tools"}
SCHEMAS = ("tools", "response_format", "structured_outputs", "text", "output_config")
"""What an engine compiles before it generates: together they may have `schema_bytes`."""

_list = msgspec.json.Decoder(list[Raw])


class _Bounded(NamedTuple):
    """The fields of one kind of request that have bounds."""

    names: tuple[str, ...]
    values: Callable[[Request], Any]
    absent: Any
    """What `values` gives for a request that has none of them."""


LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
"""How long an answer may become. Apart from the others: most requests have one of these and nothing else that has a bound."""
_kinds: dict[type[Request], tuple[_Bounded, _Bounded]] = {}


def check_bounds(request: Request, bounds: Bounds) -> None:
    """Raises InvalidRequest with the field, what it holds and what is allowed, in OpenAI's words."""
    limits, others = _kinds.get(type(request)) or _learn(type(request))
    if others.values(request) != others.absent:
        _check(request, others.names, bounds)
    if bounds.max_tokens is not None:
        _check(request, limits.names, bounds)


def _learn(kind: type[Request]) -> tuple[_Bounded, _Bounded]:
    fields = {field.name: field.default for field in msgspec.structs.fields(kind)}
    known = [name for name in dict.fromkeys((*NUMBERS, *LISTS, *SCHEMAS)) if name in fields]
    learnt = (
        _bounded(fields, tuple(name for name in known if name in LIMITS)),
        _bounded(fields, tuple(name for name in known if name not in LIMITS)),
    )
    _kinds[kind] = learnt
    return learnt


def _bounded(fields: dict[str, Any], names: tuple[str, ...]) -> _Bounded:
    if not names:
        return _Bounded(names, lambda request: None, None)
    values = attrgetter(*names)
    return _Bounded(names, values, values(SimpleNamespace(**fields)))


def _check(request: Request, names: tuple[str, ...], bounds: Bounds) -> None:
    schema_bytes = 0
    for name in names:
        said = getattr(request, name)
        if name in NUMBERS:
            if said is not None:
                _check_number(name, said, getattr(bounds, NUMBERS[name]))
            continue
        if len(said) == 0:
            continue
        if name in LISTS:
            _check_list(name, said, getattr(bounds, LISTS[name]))
        if name in SCHEMAS:
            schema_bytes += len(said)
            if schema_bytes > bounds.schema_bytes:
                raise InvalidRequest(
                    f"Invalid '{name}': too long. Tools and schemas may have {bounds.schema_bytes} bytes together.",
                    param=name,
                    code="string_above_max_length",
                )


def _check_number(name: str, said: int, limit: int | None) -> None:
    if limit is not None and said > limit:
        raise InvalidRequest(
            f"Invalid '{name}': integer above maximum value. Expected a value <= {limit}, but got {said} instead.",
            param=name,
            code=TOO_LARGE,
        )


def _check_list(name: str, said: Raw, limit: int) -> None:
    try:
        length = len(_list.decode(said))
    except (msgspec.MsgspecError, RecursionError):
        return  # one stop sequence as plain text, or something that is the engine's to judge
    if length > limit:
        raise InvalidRequest(
            f"Invalid '{name}': array too long. Expected an array with maximum length {limit}, "
            f"but got an array with length {length} instead.",
            param=name,
            code="array_above_max_length",
        )
