"""`GET /health`: whether control does its work. 200 as long as it answers; what is wrong is in the answer. It is open to
everybody, so it tells no names."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from proxy import __version__
from proxy.control.access import allow_everybody
from proxy.control.answers import answer, documented
from proxy.control.state import Given, when

router = APIRouter(tags=["about"])


class Health(msgspec.Struct, kw_only=True):
    """`currency`: in which money is counted. `database`: "ok", or that it isn't (the log says why). `snapshot_as_of`: when the
    published keys were last known to be the database's."""

    status: Literal["ok", "degraded"]
    version: str
    currency: str
    database: str
    revision: int | None
    snapshot_as_of: datetime | None


@router.get("/health", summary="Whether control does its work", **documented(Health))
@allow_everybody
async def health(given: Given) -> Response:
    published, trouble = given.publisher.published, given.feed.trouble()
    return answer(
        Health(
            status="degraded" if trouble or published is None else "ok",
            version=__version__,
            currency=given.settings.currency,
            database="unavailable" if given.feed.error else trouble or "ok",
            revision=None if published is None else published.revision,
            snapshot_as_of=None if published is None else when(published.published_unix_ns),
        )
    )
