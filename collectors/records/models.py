"""What models cost, now and later: as the file says, over what the database has, which may change at any time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from proxy.nouns import ModelSettings
from proxy.settings import Settings
from proxy.store import MODELS, StoreError, entries, open_database, reader, revision

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
FIRST_SECONDS = 5.0


class Models:
    """The last that was known stays while the database is away. It is asked in a thread of its own, because it may not answer,
    and traces don't wait for it."""

    def __init__(self, settings: Settings) -> None:
        self._url = settings.database_url
        self._declared = settings.models
        self._engine: Engine | None = None
        self._revision = -1
        self._error = ""
        self._current: Mapping[str, ModelSettings] = self._declared
        self._looked = threading.Event()
        self._thread: threading.Thread | None = None

    def __call__(self) -> Mapping[str, ModelSettings]:
        """The same object as long as nothing changes. Only the first call waits, for the first answer and not for long."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._follow, name="models", daemon=True)
            self._thread.start()
            self._looked.wait(FIRST_SECONDS)
        return self._current

    def _follow(self) -> None:
        while True:
            try:
                self._look()
                self._error = ""
            except (StoreError, SQLAlchemyError, OSError) as error:
                if (text := str(error)) != self._error:
                    log.warning("what models cost can't be read; the last that was known stays", extra={"error": text})
                self._error = text
            except Exception:
                log.exception("a bug in reading what models cost")
            self._looked.set()
            time.sleep(LOOK_SECONDS)

    def _look(self) -> None:
        if self._engine is None:
            self._engine = reader(open_database(self._url))
        with self._engine.connect() as connection:
            newest = revision(connection)
            if newest != self._revision:
                stored = {entry.name: entry.value for entry in entries(connection, MODELS)}
                self._current, self._revision = {**stored, **self._declared}, newest
