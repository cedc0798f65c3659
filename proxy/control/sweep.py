"""Deleting from Redis what was withdrawn from the cache.

Workers don't give it any more as soon as they have the snapshot that says so. Redis is looked through once that is written; what
they still add of it until they have read it is withdrawn as well, and expires there.
"""

from __future__ import annotations

import asyncio
import logging
import time

from proxy.control.database import Database
from proxy.control.publish import Publisher
from proxy.settings import RedisSettings
from proxy.snapshot import Purge
from proxy.store import Mark, marks, swept

log = logging.getLogger(__name__)

EVERY_S = 0.5
PAUSES_S = (1.0, 5.0, 30.0)
"""Before another try. After the last one it is left until something else is withdrawn, or control starts anew."""


class Sweeper:
    def __init__(self, redis: RedisSettings, database: Database, publisher: Publisher) -> None:
        self._redis = redis
        self._database = database
        self._publisher = publisher

    async def run(self) -> None:
        """Until cancelled."""
        seen: tuple[Purge, ...] = ()
        while True:
            published = self._purges()
            if published != seen:
                await self._sweep()
            seen = published
            await asyncio.sleep(EVERY_S)

    async def _sweep(self) -> None:
        for pause in (*PAUSES_S, None):
            try:
                await self._once()
            except Exception as error:  # whatever it is, workers go by the snapshot
                said = {"error": str(error) or type(error).__name__}
                if pause is None:
                    log.error("what was withdrawn can't be deleted from Redis; it expires there", extra=said)
                    return
                log.warning("what was withdrawn can't be deleted from Redis; trying again", extra=said | {"in_s": pause})
                await asyncio.sleep(pause)
            else:
                return

    async def _once(self) -> None:
        from proxy.cache.sweep import sweep  # Redis' client takes its time, and most don't need it here

        published = self._publisher.published
        assert published is not None  # noqa: S101  (it has purges)
        there = set(published.purges)
        wanted: list[Mark] = [each for each in await self._database.read(marks) if each.deleted is None and each.purge in there]
        if not wanted:
            return
        purges = tuple(each.purge for each in wanted)
        deleted = await sweep(self._redis, published.cache_secret, purges, time.time_ns())
        await self._database.write(swept, [each.id for each in wanted], deleted)
        log.info("what was withdrawn is deleted from Redis", extra={"purges": len(wanted), "deleted": deleted})

    def _purges(self) -> tuple[Purge, ...]:
        published = self._publisher.published
        return () if published is None else published.purges
