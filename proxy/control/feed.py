"""Following the catalogue: one cheap look at its revision, and what changed when it moved. What is published is what holds, the
file's over the database's.

The audit log has one row for each step of the revision, so it tells which keys changed; of 100,000 only those are read again.
Where it can't tell, everything is.

A database that can't be reached changes nothing: what was read last stays, and `as_of_unix_ns` stays behind, which is how the age
of the snapshot tells of it. The same goes for one that doesn't answer. What was read is kept on disk for that reason: the keys in
the snapshot, the rest in a file of our own, so that a control process that starts without its database knows what is the
database's, and the file's declarations of today hold over it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from proxy.control.catalogue import Catalogue, digest_of, file_key_id, stored
from proxy.control.declared import Declared, principal
from proxy.files import replace_file
from proxy.nouns import KeySettings
from proxy.settings import Settings
from proxy.snapshot import (
    Allowance,
    KeyTable,
    Principal,
    Purge,
    SnapshotError,
    SnapshotFile,
    decode_principal,
    encode_principal,
)
from proxy.spend.periods import Counted
from proxy.spend.windows import Period
from proxy.store import LiveKey, StoreError, audit_rows, cache_secret, live_keys, marks, open_database, reader, revision

log = logging.getLogger(__name__)

LATE_S = 5.0
"""A look that takes longer is no longer a matter of course."""

MOST_CHANGES = 500
"""After more, everything is read: it isn't slower."""

_TOLD = 20
"""So many names stand in a line of the log at most."""

_APART = ("keys", "admin_keys", "cache")
"""Nouns whose changes change nothing of the others. What is withdrawn from the cache is read with every change."""


class Known(NamedTuple):
    """What was read at one moment, with what the file says over it.

    without_key: names of keys for which the file declares something and that no key has; None until the keys are known.
    missing: teams, users and projects that something is of and that aren't there.
    cache_secret, purges: as in the snapshot.
    """

    declared: Declared
    keys: KeyTable
    revision: int
    counted: Counted
    without_key: list[str] | None
    missing: list[str]
    cache_secret: bytes
    purges: tuple[Purge, ...]


class _Entry(NamedTuple):
    """A secret, encoded as workers have it, and what must be known of its key besides."""

    digest: bytes
    ends_unix_ns: int
    principal: msgspec.Raw
    of: tuple[str, str, str]
    """Team, user, project."""
    periods: tuple[Period, ...]
    concurrency: bool


class _Last(msgspec.Struct):
    """What the database had when it was last read: all but the keys, and of those over which the file lies (by id) the name and
    what the database says of them."""

    catalogue: Catalogue = Catalogue()
    keys: dict[str, tuple[str, KeySettings]] = {}


class CatalogueFeed:
    """`known` is replaced as a whole, and was the database's at `as_of_unix_ns` (0: never known). `error` says why the last look
    failed, or ""."""

    def __init__(self, settings: Settings, previous: SnapshotFile | None) -> None:
        self._settings = settings
        self._engine: Engine | None = None
        self._opening = threading.Lock()
        self._whole = {digest: (name, key) for name, key in settings.keys.items() if (digest := digest_of(key)) is not None}
        self._kept = _Kept(settings.catalogue_path)
        self._last = self._kept.load()
        self._declared = Declared(settings, self._last.catalogue)
        self._keys: dict[str, list[_Entry]] = {}
        """Of the database, by name."""
        self._table = KeyTable()
        self._changed = 0
        """Secrets that have changed since the table was built."""
        self._audited = -1
        """The last row of the audit log that `known` includes; -1: nothing was read yet."""
        file = SnapshotFile() if previous is None else previous
        self._cache_secret, self._purges = file.cache_secret, file.purges
        self._begin_with(file)
        self.known = self._assemble(0 if previous is None else previous.revision)
        self.as_of_unix_ns = 0 if previous is None else previous.published_unix_ns
        self.error = ""
        self._looking_since: float | None = None

    def engine(self) -> Engine:
        """The database, opened at the first use that succeeds. Raises StoreError."""
        with self._opening:
            if self._engine is None:
                self._engine = reader(open_database(self._settings.database_url))
            return self._engine

    def trouble(self) -> str:
        """What is wrong with the database just now, for people; "" if nothing is."""
        waited = time.monotonic() - (self._looking_since or math.inf)
        return self.error or (f"no answer for {waited:.0f} s" if waited > LATE_S else "")

    def poll(self) -> bool:
        """Look at the database (this blocks); True if it was read."""
        self._looking_since = time.monotonic()
        try:
            return self._poll(time.time_ns())
        finally:
            self._looking_since = None

    def close(self) -> None:
        if self._engine is not None:
            self._engine.dispose()

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

    def _failed(self, error: str) -> None:
        if error != self.error:
            log.error("the database can't be read; what it held last stays", extra={"error": error})
        self.error = error

    # -- reading --

    def _look(self) -> bool:
        with self.engine().connect() as connection:
            newest = revision(connection)
            if self._audited >= 0 and newest == self.known.revision:
                return False
            changes = self._changes(connection, newest - self.known.revision)
            self._audited = -1  # until all of it was taken over
            if changes is None:
                self._read(connection)
            else:
                self._read_again(connection, changes)
            self._cache_secret = cache_secret(connection)
            self._purges = tuple(mark.purge for mark in marks(connection))
            audited = max((int(row.id) for row in audit_rows(connection, limit=1)), default=0)
        before, self.known = self.known, self._assemble(newest)._replace(without_key=self._without_key())
        self._audited = audited
        self._kept.save(self._last)
        self._tell(before)
        return True

    def _changes(self, connection: Connection, steps: int) -> set[tuple[str, str]] | None:
        """(noun, name) of what was changed in so many steps of the revision; None if that can't be told."""
        if self._audited < 0 or not 0 < steps <= MOST_CHANGES:
            return None
        rows = [row for row in audit_rows(connection, limit=steps + 1) if int(row.id) > self._audited]
        return {(row.noun, row.name) for row in rows} if len(rows) == steps else None

    def _read(self, connection: Connection) -> None:
        """Everything."""
        self._last = _Last(stored(connection))
        self._declared = Declared(self._settings, self._last.catalogue)
        self._keys = {}
        self._take(live_keys(connection))
        self._build()

    def _read_again(self, connection: Connection, changes: set[tuple[str, str]]) -> None:
        if any(noun not in _APART for noun, _ in changes):
            self._last = _Last(stored(connection), self._last.keys)
            self._declared = Declared(self._settings, self._last.catalogue)
        names = {name for noun, name in changes if noun == "keys"}
        gone = [entry.digest for name in names for entry in self._keys.pop(name, ())]
        self._take(live_keys(connection, names))
        self._change(gone, [entry for name in names for entry in self._keys.get(name, ())])

    def _take(self, live: Iterable[LiveKey]) -> None:
        by_name: dict[str, list[LiveKey]] = {}
        for each in live:
            by_name.setdefault(each.name, []).append(each)
        for name, secrets in by_name.items():
            self._keys[name] = self._entries(secrets)

    def _entries(self, secrets: list[LiveKey]) -> list[_Entry]:
        """All secrets of one key."""
        first = secrets[0]
        whole = next((self._whole[each.hash] for each in secrets if each.hash in self._whole), None)
        name, value = whole or (first.name, self._declared.of_key(first.name, first.value))
        if value is not first.value:
            self._last.keys[first.id] = first.name, first.value
        made = _made(principal(first.id, name, value))
        return [made._replace(digest=each.hash, ends_unix_ns=self._end(each.hash, each.ends_at)) for each in secrets]

    def _end(self, digest: bytes, ends_unix_ns: int) -> int:
        """A secret that the file declares doesn't end."""
        return 0 if digest in self._whole else ends_unix_ns

    def _begin_with(self, previous: SnapshotFile) -> None:
        """The keys that the process before us has read."""
        table = KeyTable.of(previous.keys)
        try:
            of_file = {decode_principal(table[digest]).key_id: each for digest, each in self._whole.items() if digest in table}
            for secret in table.secrets():
                known = decode_principal(secret.principal)
                if known.key_id != file_key_id(secret.digest):
                    made = _made(self._as_declared(known, of_file))
                    end = self._end(secret.digest, secret.ends_unix_ns)
                    self._keys.setdefault(known.key_id, []).append(made._replace(digest=secret.digest, ends_unix_ns=end))
        except SnapshotError as error:
            log.warning("the previous snapshot's keys can't be read; starting without", extra={"error": str(error)})
            self._keys = {}
        self._build()

    def _as_declared(self, known: Principal, of_file: dict[str, tuple[str, KeySettings]]) -> Principal:
        if known.key_id in of_file:
            return principal(known.key_id, *of_file[known.key_id])
        if known.key_id in self._last.keys:
            return self._declared.principal(known.key_id, *self._last.keys[known.key_id])
        return self._declared.again(known)

    # -- the table of secrets --

    def _build(self) -> None:
        self._changed = 0
        entries = [entry for secrets in self._keys.values() for entry in secrets]
        there = {entry.digest for entry in entries if entry.digest in self._whole}
        entries += [self._of_file(digest) for digest in self._whole.keys() - there]
        self._table = KeyTable.build((entry.digest, entry.ends_unix_ns, entry.principal) for entry in entries)

    def _change(self, gone: list[bytes], come: list[_Entry]) -> None:
        """Only what changed is written anew, as long as that doesn't leave too much behind."""
        if not (gone or come):
            return
        self._changed += len(gone) + len(come)
        if self._changed > MOST_CHANGES + len(self._table) // 10:
            self._build()
            return
        back = [self._of_file(digest) for digest in self._whole.keys() & set(gone)]
        again = [(entry.digest, entry.ends_unix_ns, entry.principal) for entry in (*back, *come)]
        self._table = self._table.changed(gone, again)

    def _of_file(self, digest: bytes) -> _Entry:
        """A key that only the file knows."""
        name, value = self._whole[digest]
        return _made(principal(file_key_id(digest), name, value))._replace(digest=digest)

    # -- what holds --

    def _without_key(self) -> list[str]:
        return sorted(name for name, key in self._settings.keys.items() if key.hash is None and name not in self._keys)

    def _assemble(self, at_revision: int) -> Known:
        entries = [entry for secrets in self._keys.values() for entry in secrets]
        entries += map(self._of_file, self._whole)
        return Known(
            declared=self._declared,
            keys=self._table,
            revision=at_revision,
            counted=self._counted(entries),
            without_key=None,
            missing=self._missing({entry.of for entry in entries}),
            cache_secret=self._cache_secret,
            purges=self._purges,
        )

    def _counted(self, entries: list[_Entry]) -> Counted:
        levels = self._declared.allowances()
        periods = {period for entry in entries for period in entry.periods}
        periods.update(period for each in levels for period in _periods(each))
        concurrency = any(entry.concurrency for entry in entries) or any(each.concurrent_requests for each in levels)
        return Counted(tuple(sorted(periods)), concurrency)

    def _missing(self, of: set[tuple[str, str, str]]) -> list[str]:
        held = self._declared.held
        members = (*held.users.values(), *held.projects.values())
        teams = {team for team, _, _ in of} | {each.team or "" for each in members}
        return sorted(
            [f"team {name}" for name in teams - held.teams.keys() if name]
            + [f"user {name}" for name in {user for _, user, _ in of} - held.users.keys() if name]
            + [f"project {name}" for name in {project for _, _, project in of} - held.projects.keys() if name]
        )

    def _tell(self, before: Known) -> None:
        """Of what is most likely a mistake, once."""
        known = self.known
        if known.without_key and known.without_key != before.without_key:
            log.warning(
                "the settings limit keys that aren't there: is a name spelt differently?",
                extra={"keys": known.without_key[:_TOLD]},
            )
        if known.missing and known.missing != before.missing:
            log.warning(
                "what keys, users or projects are of isn't there, and limits nothing", extra={"missing": known.missing[:_TOLD]}
            )


def _made(whose: Principal) -> _Entry:
    said = whose.allowance
    of = whose.team, whose.user, whose.project
    return _Entry(b"", 0, encode_principal(whose), of, tuple(_periods(said)), bool(said.concurrent_requests))


def _periods(said: Allowance) -> list[Period]:
    return [Period(budget.per, budget.time_zone) for budget in said.budgets]


class _Kept:
    """The file that has what was read last."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._saved = b""
        self._error = ""

    def load(self) -> _Last:
        try:
            self._saved = self._path.read_bytes()
            return msgspec.json.decode(self._saved, type=_Last)
        except FileNotFoundError:
            pass
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            log.warning("what the database had is not readable; starting without", extra={"error": str(error)})
        return _Last()

    def save(self, last: _Last) -> None:
        """Replace the file, if there is something new in it."""
        if (data := msgspec.json.encode(last)) == self._saved:
            return
        try:
            replace_file(self._path, data)
        except OSError as error:
            if str(error) != self._error:
                log.error("what the database has can't be kept", extra={"error": str(error)})
            self._error = str(error)
            return
        self._saved, self._error = data, ""
