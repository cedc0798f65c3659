"""What answers have in common: JSON as msgspec writes it, and lists that go on.

A list is `{"object": "list", "data": [...], "has_more": true, "next": "..."}`; `?after=` takes `next`, `?limit=` how many there
may be. `next` stands for the last one that was shown, so what is added or removed meanwhile makes nothing come twice.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

import msgspec
from fastapi import Depends, Query
from starlette.responses import Response

from proxy.control.errors import ALWAYS
from proxy.errors import InvalidRequest

T = TypeVar("T")
R = TypeVar("R")

MOST = 1000
USUAL = 100

_json = msgspec.json.Encoder().encode


class Page(msgspec.Struct, Generic[T], kw_only=True):
    """A part of a list. `next`: for `after`, where there is more."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool
    next: str | None = None


class Wanted(NamedTuple):
    """Which part of a list. `after`: as `next_of` had it, "" from the beginning."""

    after: str
    limit: int

    @property
    def most(self) -> int:
        """So many are looked for: one more than are shown tells whether there are more."""
        return self.limit + 1

    def page(self, found: Sequence[R], show: Callable[[R], T], after: Callable[[R], str]) -> Page[T]:
        """Of at most `most` that were found. `after`: by which text the next part is asked for, of the last one shown."""
        shown = found[: self.limit]
        more = len(found) > len(shown)
        return Page(data=[show(each) for each in shown], has_more=more, next=_cursor(after(shown[-1])) if more else None)


def _wanted(
    limit: Annotated[int, Query(ge=1, le=MOST, description="How many at most.")] = USUAL,
    after: Annotated[str, Query(max_length=2048, description="`next` of the part before.")] = "",
) -> Wanted:
    return Wanted(_read(after), limit)


PartOf = Annotated[Wanted, Depends(_wanted)]
"""A route's parameter of this type says which part of a list is asked for."""

Text = Annotated[str, Query(max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""A filter. What stands in it is meant literally."""

MaybeText = Annotated[str | None, Query(max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""One that needn't be there."""


def _cursor(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _read(cursor: str) -> str:
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        text = ""
    if _cursor(text) != cursor:
        raise InvalidRequest("after: it isn't the `next` of a list", param="after")
    return text


def answer(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(_json(value), status, {**ALWAYS, **(headers or {})}, media_type="application/json")


def documented(of: Any, *statuses: int, body: Any = None, description: str = "Done") -> dict[str, Any]:
    """For a route's decorator: what it answers with these statuses (200 if none is said) and, as `body`, what it takes. The
    types become schemas in `openapi.py`."""
    responses = {
        status: {"description": description, "content": {"application/json": {"schema": schema_of(of)}}}
        for status in statuses or (200,)
    }
    extra = {}
    if body is not None:
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema_of(body)}}}
    return {
        "response_model": None,
        "response_class": Response,
        "status_code": (statuses or (200,))[0],
        "responses": responses,
        "openapi_extra": extra,
    }


_shown: list[Any] = []


def schema_of(kind: Any) -> dict[str, Any]:
    """A reference to a type's schema. All types that were asked for are in `shown_types`."""
    if kind not in _shown:
        _shown.append(kind)
    [reference], _ = msgspec.json.schema_components([kind], ref_template="#/components/schemas/{name}")
    return reference


def shown_types() -> Sequence[Any]:
    return _shown
