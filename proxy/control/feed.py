"""Following the keys in the database: one cheap look at the revision, all keys when it moved. Each is published with what the
settings declare for its name.

A database that can't be reached changes nothing: the keys that were read last stay, and `as_of_unix_ns` stays behind, which is
how the age of the snapshot tells of it. The same goes for one that doesn't answer.
"""

from __future__ import annotations

import logging
import math
import threading
import time

import msgspec
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from proxy.control.declared import Declared
from proxy.snapshot import SnapshotFile
from proxy.snapshot.model import decode_principal, encode_principal
from proxy.store import StoreError, live_keys, open_database, reader, revision

log = logging.getLogger(__name__)

LATE_S = 5.0
"""A look that takes longer is no longer a matter of course."""


class CatalogueFeed:
    """`keys` and `revision` as they were at `as_of_unix_ns` (0: never known). `error` says why the last look failed, or "".
    `without_key`: names for which something is declared and that no key has; None until that is known."""

    def __init__(self, database_url: str, declared: Declared, previous: SnapshotFile | None) -> None:
        self._url = database_url
        self._declared = declared
        self._engine: Engine | None = None
        self._opening = threading.Lock()
        self._read = False
        self.keys: dict[bytes, msgspec.Raw] = {} if previous is None else _anew(declared, previous.keys)
        self.without_key: list[str] | None = None
        self.revision = 0 if previous is None else previous.revision
        self.as_of_unix_ns = 0 if previous is None else previous.published_unix_ns
        self.error = ""
        self._looking_since: float | None = None

    def engine(self) -> Engine:
        """The database, opened at the first use that succeeds. Raises StoreError."""
        with self._opening:
            if self._engine is None:
                self._engine = reader(open_database(self._url))
            return self._engine

    def trouble(self) -> str:
        """What is wrong with the database just now, for people; "" if nothing is."""
        waited = time.monotonic() - (self._looking_since or math.inf)
        return self.error or (f"no answer for {waited:.0f} s" if waited > LATE_S else "")

    def poll(self) -> bool:
        """Look at the database (this blocks); True if the keys changed."""
        self._looking_since = time.monotonic()
        try:
            return self._poll(time.time_ns())
        finally:
            self._looking_since = None

    def _poll(self, now_ns: int) -> bool:
        try:
            changed = self._look()
        except DBAPIError as error:
            self._failed(str(error.orig))
            return False
        except (SQLAlchemyError, StoreError, OSError) as error:
            self._failed(str(error))
            return False
        if self.error:
            log.info("the database is back")
        self.error, self.as_of_unix_ns = "", now_ns
        return changed

    def close(self) -> None:
        if self._engine is not None:
            self._engine.dispose()

    def _look(self) -> bool:
        with self.engine().connect() as connection:
            newest = revision(connection)
            if self._read and newest == self.revision:
                return False
            live = list(live_keys(connection))
        keys = {key.hash: encode_principal(self._declared.principal(key.id, key.name)) for key in live}
        changed = not self._read or keys != self.keys
        self.keys, self.revision, self._read = keys, newest, True
        self._compare(self._declared.without_key(key.name for key in live))
        return changed

    def _compare(self, without_key: list[str]) -> None:
        if without_key and without_key != self.without_key:
            log.warning("the settings limit keys that aren't there: is a name spelt differently?", extra={"keys": without_key})
        self.without_key = without_key

    def _failed(self, error: str) -> None:
        if error != self.error:
            log.error("the database can't be read; the last good keys stay", extra={"error": error})
        self.error = error


def _anew(declared: Declared, keys: dict[bytes, msgspec.Raw]) -> dict[bytes, msgspec.Raw]:
    """Keys of the process before, as this one's settings have them: they hold also while the database is down."""
    known = ((digest, decode_principal(raw)) for digest, raw in keys.items())
    return {digest: encode_principal(declared.principal(each.key_id, each.key_name)) for digest, each in known}
