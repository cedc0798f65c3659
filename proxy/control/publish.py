"""Writing the snapshot when it has something to say.

`published_unix_ns` is the time at which the keys in the file were known to be the database's. It therefore ages when control is
gone *and* when control can't read the database. An unchanged snapshot is written again once its date is `REPEAT_NS` old, which
keeps the age small while all is well; more often would only make workers load what they have. A change is written at once, with
the date of the keys that are in it, or the next nanosecond if that is taken: of two snapshots the later has the later date.
"""

from __future__ import annotations

import logging

from proxy.control.declared import Declared
from proxy.control.feed import CatalogueFeed
from proxy.control.inventory import Inventory
from proxy.settings import Settings
from proxy.snapshot import SnapshotFile, write_snapshot

log = logging.getLogger(__name__)

REPEAT_NS = 15_000_000_000
"""How old an unchanged snapshot's date may become. Alarms on the age of the snapshot belong well above."""

PATIENCE_NS = 2_000_000_000
"""How long the first snapshot waits for backends that neither answer nor fail."""


class Publisher:
    """`published` is the snapshot in the file, as far as we know; None if there is none."""

    def __init__(
        self, settings: Settings, declared: Declared, inventory: Inventory, feed: CatalogueFeed, previous: SnapshotFile | None
    ) -> None:
        self._path = settings.snapshot_path
        self._currency = settings.currency
        self._declared = declared
        self._inventory = inventory
        self._feed = feed
        self._error = ""
        self.published = previous

    def due(self, running_ns: int) -> SnapshotFile | None:
        """What to write now, if anything, `running_ns` after control's start.

        The first snapshot ever waits for the keys and, for a while, for an answer or failure of each backend: a worker that is
        ready then knows what there is.
        """
        last = self.published
        if last is None and not self._may_begin(running_ns):
            return None
        candidate = self._assemble()
        if last is not None:
            if not _says_more(candidate, last):
                return None
            candidate.published_unix_ns = max(candidate.published_unix_ns, last.published_unix_ns + 1)
        return candidate

    def write(self, file: SnapshotFile) -> bool:
        """Put it in place (this blocks); False if that failed: it is due again then."""
        try:
            write_snapshot(self._path, file)
        except OSError as error:
            if str(error) != self._error:
                log.error("the snapshot can't be written", extra={"error": str(error)})
            self._error = str(error)
            return False
        self._error, self.published = "", file
        return True

    def _may_begin(self, running_ns: int) -> bool:
        return self._feed.as_of_unix_ns > 0 and (self._inventory.complete or running_ns >= PATIENCE_NS)

    def _assemble(self) -> SnapshotFile:
        return SnapshotFile(
            revision=self._feed.revision,
            published_unix_ns=self._feed.as_of_unix_ns,
            currency=self._currency,
            keys=self._feed.keys,
            models=self._inventory.models(),
            backends=self._inventory.backends(),
            everyone=self._declared.everyone,
            teams=self._declared.teams,
        )


def _says_more(new: SnapshotFile, old: SnapshotFile) -> bool:
    """Something else than before, or the same at a date that is worth telling."""
    if new.published_unix_ns - old.published_unix_ns >= REPEAT_NS:
        return True
    if (new.version, new.revision, new.currency) != (old.version, old.revision, old.currency):
        return True
    if new.keys is not old.keys and new.keys != old.keys:
        return True
    return (new.models, new.backends, new.everyone, new.teams) != (old.models, old.backends, old.everyone, old.teams)
