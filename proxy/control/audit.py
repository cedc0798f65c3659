"""`/audit`: who changed what, the newest first. Of a team's manager: what was changed of his team."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec
from fastapi import APIRouter
from sqlalchemy import Connection
from starlette.responses import Response

from proxy.control.access import READERS, allow
from proxy.control.answers import MaybeText, Page, PartOf, answer, documented
from proxy.control.declared import unix_ns
from proxy.control.moments import MaybeMoment
from proxy.control.state import Asking, Given, when
from proxy.store import AuditRow, audit_rows

router = APIRouter(tags=["audit"])


class Change(msgspec.Struct, kw_only=True):
    """`address`: where it came from, "" if it was here. `noun` and `name`: what was changed; `before` and `after`: from what to
    what, null where there was or is nothing."""

    id: str
    at: datetime | None
    author: str
    role: str
    address: str
    action: str
    noun: str
    name: str
    team: str
    before: Any
    after: Any


@router.get("/audit", summary="Who changed what", **documented(Page[Change]))
@allow(*READERS)
async def several(
    given: Given,
    caller: Asking,
    part: PartOf,
    noun: MaybeText = None,
    name: MaybeText = None,
    author: MaybeText = None,
    team: MaybeText = None,
    since: MaybeMoment = None,
    until: MaybeMoment = None,
) -> Response:
    if caller.team is not None and team not in (None, caller.team):
        return answer(part.page([], _show, _place))

    def look(connection: Connection) -> list[AuditRow]:
        return audit_rows(
            connection,
            before_id=part.after,
            limit=part.most,
            noun=noun,
            name=name,
            author=author,
            team=caller.team or team,
            since=None if since is None else unix_ns(since),
            until=None if until is None else unix_ns(until),
        )

    return answer(part.page(await given.database.read(look), _show, _place))


def _show(row: AuditRow) -> Change:
    return Change(**{**row._asdict(), "at": when(row.at)})


def _place(row: AuditRow) -> str:
    return row.id
