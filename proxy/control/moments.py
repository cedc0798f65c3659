"""Times in queries: with their zone, and within what a ledger can have rows of."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from fastapi import Query
from pydantic import AfterValidator, AwareDatetime

_FIRST, _LAST = datetime(1970, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC)


def _sane(moment: datetime) -> datetime:
    if not _FIRST <= moment <= _LAST:
        raise ValueError("allowed: times from 1970 to 2200")
    return moment


MaybeMoment = Annotated[
    Annotated[AwareDatetime, AfterValidator(_sane)] | None, Query(description="With its zone: 2026-11-20T00:00:00Z.")
]
"""A filter that needn't be there."""
