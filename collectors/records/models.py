"""What models cost, now and later: as the file says, over what the database has, which may change at any time."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from proxy.nouns import ModelSettings
from proxy.settings import Settings
from proxy.store import MODELS, StoreError, entries, open_database, reader, revision

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0


class Models:
    """For one thread. The last that was known stays while the database is away."""

    def __init__(self, settings: Settings) -> None:
        self._url = settings.database_url
        self._declared = settings.models
        self._engine: Engine | None = None
        self._revision = -1
        self._look_at = 0.0
        self._error = ""
        self._current: Mapping[str, ModelSettings] = self._declared

    def __call__(self) -> Mapping[str, ModelSettings]:
        """The same object as long as nothing changes."""
        if time.monotonic() >= self._look_at:
            try:
                self._look()
                self._error = ""
            except (StoreError, SQLAlchemyError) as error:
                if (text := str(error)) != self._error:
                    log.warning("what models cost can't be read; the last that was known stays", extra={"error": text})
                self._error = str(error)
            self._look_at = time.monotonic() + LOOK_SECONDS
        return self._current

    def _look(self) -> None:
        if self._engine is None:
            self._engine = reader(open_database(self._url))
        with self._engine.connect() as connection:
            newest = revision(connection)
            if newest != self._revision:
                stored = {entry.name: entry.value for entry in entries(connection, MODELS)}
                self._current, self._revision = {**stored, **self._declared}, newest
