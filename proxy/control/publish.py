"""Writing the snapshot when it has something to say.

`published_unix_ns` is the time at which the catalogue in the file was known to be the database's. It therefore ages when control
is gone *and* when control can't read the database. An unchanged snapshot is dated anew once its date is `REPEAT_NS` old, which
keeps the age small while all is well. A change is written at once, with the date of the catalogue that is in it, or the next
nanosecond if that is taken: of two snapshots the later has the later date.

A price that becomes valid, and keys of an issuer that changed, are changes as any others.
"""

from __future__ import annotations

import logging

import msgspec

from proxy.control.feed import CatalogueFeed
from proxy.control.inventory import Inventory
from proxy.control.issuers import Issuers
from proxy.settings import Settings
from proxy.snapshot import SnapshotFile, write_snapshot
from proxy.spend.periods import Counted, read_counted, write_counted
from proxy.store.purges import LONGEST_NS

log = logging.getLogger(__name__)

REPEAT_NS = 15_000_000_000
"""How old an unchanged snapshot's date may become. Alarms on the age of the snapshot belong well above."""

PATIENCE_NS = 2_000_000_000
"""How long the first snapshot waits for backends and issuers that neither answer nor fail."""


class Publisher:
    """`published` is the snapshot in the file, as far as we know; None if there is none."""

    def __init__(
        self, settings: Settings, inventory: Inventory, feed: CatalogueFeed, issuers: Issuers, previous: SnapshotFile | None
    ) -> None:
        self._path = settings.snapshot_path
        self._periods_path = settings.periods_path
        self._currency = settings.currency
        self._inventory = inventory
        self._feed = feed
        self._issuers = issuers
        self._counted: Counted | None = None
        """What the file has; None: not known."""
        self._error = ""
        self.published = previous

    def due(self, running_ns: int, now_ns: int) -> SnapshotFile | None:
        """What to write at `now_ns` (since 1970), if anything, `running_ns` after control's start.

        The first snapshot ever waits for the keys and, for a while, for an answer or failure of each backend and issuer: a worker
        that is ready then knows what there is.
        """
        last = self.published
        if last is None and not self._may_begin(running_ns):
            return None
        candidate = self._assemble(now_ns)
        if last is not None:
            if not _says_more(candidate, last):
                return None
            candidate.published_unix_ns = max(candidate.published_unix_ns, last.published_unix_ns + 1)
        return candidate

    def write(self, file: SnapshotFile) -> bool:
        """Put it in place (this blocks); False if that failed: it is due again then."""
        try:
            self._write_counted(self._feed.known.counted)
            write_snapshot(self._path, file, self.published)
        except OSError as error:
            if str(error) != self._error:
                log.error("the snapshot can't be written", extra={"error": str(error)})
            self._error = str(error)
            return False
        self._error, self.published = "", file
        return True

    def _write_counted(self, counted: Counted) -> None:
        """Before the limits that it is about: who has them looks for what it says."""
        if self._counted is None:
            self._counted = read_counted(self._periods_path)
        if counted != self._counted:
            write_counted(self._periods_path, counted)
            self._counted = counted

    def _may_begin(self, running_ns: int) -> bool:
        asked = self._inventory.complete and self._issuers.complete
        return self._feed.as_of_unix_ns > 0 and (asked or running_ns >= PATIENCE_NS)

    def _assemble(self, now_ns: int) -> SnapshotFile:
        as_of_ns, known = (
            self._feed.as_of_unix_ns,
            self._feed.known,
        )  # in this order: what is published is not older than its date
        declared = known.declared
        models, patterns = self._inventory.serving(now_ns)
        return SnapshotFile(
            revision=known.revision,
            published_unix_ns=as_of_ns,
            currency=self._currency,
            keys=known.keys,
            models=models,
            backends=self._inventory.backends(),
            everyone=declared.everyone,
            teams=declared.teams,
            users=declared.users,
            projects=declared.projects,
            issuers=self._issuers.published(),
            patterns=patterns,
            cache_secret=known.cache_secret,
            purges=tuple(each for each in known.purges if each.before_unix_ns > now_ns - LONGEST_NS),
        )


def _says_more(new: SnapshotFile, old: SnapshotFile) -> bool:
    """Something else than before, or the same at a date that is worth telling."""
    if new.published_unix_ns - old.published_unix_ns >= REPEAT_NS:
        return True
    return new != msgspec.structs.replace(old, published_unix_ns=new.published_unix_ns)
