"""`GET /health`: whether control does its work. 200 as long as it answers; what is wrong is in the answer."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from fastapi import APIRouter

from proxy import __version__
from proxy.control.state import Given, when

router = APIRouter()


@dataclass(frozen=True)
class Health:
    """`snapshot_as_of`: when the published keys were last known to be the database's."""

    status: Literal["ok", "degraded"]
    version: str
    database: str
    revision: int | None
    snapshot_as_of: datetime | None


@router.get("/health")
async def health(given: Given) -> Health:
    published, trouble = given.publisher.published, given.feed.trouble()
    return Health(
        status="degraded" if trouble or published is None else "ok",
        version=__version__,
        database=trouble or "ok",
        revision=None if published is None else published.revision,
        snapshot_as_of=None if published is None else when(published.published_unix_ns),
    )
