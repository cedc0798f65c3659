"""One person's requests, forgotten: the traces in Phoenix are deleted, then what the ledger says of the person is blanked.

In that order, some requests at a time: a trace that can't be deleted leaves its request as it is, so that whoever asks again
finds it again. Every run is in the audit log when it begins, and once more when it has come to its end.

A trace is all that was told of it: of one that a caller began, also what others sent to the same Phoenix.

A trace that isn't there may still be on its way: captured prompts wait on disk for ten minutes at most, traces for as long as
Phoenix is away. So a request of the last hour whose trace isn't there stays as it is, and is counted: asked again later, it goes
too. A trace that comes after more than that hour has no prompt and no answer any more, and is found in Phoenix by its user.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from typing import Final

import httpx2
import msgspec

from proxy.control.database import Database
from proxy.control.discovery import new_client
from proxy.errors import NotReady
from proxy.settings import PhoenixSettings
from proxy.store import Author
from proxy.store.forget import BEGINNING, Place, Whose, blank, note_forgetting, said_of

SETTLED_SECONDS: Final = 3600
AT_ONCE: Final = 4
"""Traces that Phoenix deletes at the same time; on SQLite it does them one after the other anyway."""
TIMEOUT_SECONDS: Final = 30.0
_STEP: Final = 200


class Forgotten(msgspec.Struct, kw_only=True):
    """`requests`: blanked. `traces`: deleted. `pending`: left as they are, because their traces may be on their way: ask again in
    an hour."""

    requests: int = 0
    traces: int = 0
    pending: int = 0


async def forget(database: Database, phoenix: PhoenixSettings, whose: Whose, name: str, author: Author) -> Forgotten:
    """All requests of this user's keys, or those for which callers named this end user. Raises NotReady when Phoenix
    doesn't delete traces; what was done until then stays done."""
    done = Forgotten()
    await database.write(note_forgetting, whose, name, author._replace(idempotency_key=""), {})
    async with Traces(phoenix) as traces:
        place: Place | None = BEGINNING
        while place is not None:
            found, place = await database.read(said_of, whose, name, place, _STEP)
            gone = await traces.delete([said.trace_id for said in found])
            settled = time.time_ns() - SETTLED_SECONDS * 10**9
            ready = [said for said in found if not phoenix.url or said.trace_id in gone or said.received_at < settled]
            done.traces += len(gone)
            done.pending += len(found) - len(ready)
            if ready:
                done.requests += await database.write(blank, ready)
    await database.write(note_forgetting, whose, name, author, msgspec.structs.asdict(done))
    return done


class Traces:
    """Those of one Phoenix; none if there is none. Use it as a context.

    Source: Phoenix 20's REST API, `DELETE /v1/traces/{trace_id}`: 204, or 404 if there is no such trace.
    """

    def __init__(self, settings: PhoenixSettings) -> None:
        self._url = (settings.url or "").rstrip("/")
        self._key_env = settings.api_key_env
        self._client: httpx2.AsyncClient | None = None
        self._room = asyncio.Semaphore(AT_ONCE)

    async def __aenter__(self) -> Traces:
        if self._url:
            self._client = new_client(TIMEOUT_SECONDS)
            if self._key_env is not None:
                self._client.headers["authorization"] = f"Bearer {os.environ.get(self._key_env, '')}"
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def delete(self, trace_ids: Sequence[str]) -> set[str]:
        """Those that were there. Raises NotReady."""
        if self._client is None:
            return set()
        wanted = sorted(set(trace_ids))
        answers = await asyncio.gather(*(self._delete(self._client, each) for each in wanted), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return {each for each, there in zip(wanted, answers, strict=True) if there}

    async def _delete(self, client: httpx2.AsyncClient, trace_id: str) -> bool:
        async with self._room:
            try:
                answer = await client.delete(f"{self._url}/v1/traces/{trace_id}")
            except httpx2.HTTPError as error:
                raise _refused(f"it can't be reached ({type(error).__name__})") from None
        if answer.status_code not in (204, 404):
            raise _refused(f"it answers with status {answer.status_code}")
        return answer.status_code == 204


def _refused(why: str) -> NotReady:
    return NotReady(f"Phoenix deletes no traces, {why}; what they belong to stays as it is", code="traces_not_deleted")
