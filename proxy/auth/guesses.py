"""How many keys an address may guess. Pure: time is passed in.

Per address one number: when it will have its whole allowance back (the generic cell rate algorithm, ITU-T I.371). What is known
of addresses is bounded: whose last guess is the longest ago is forgotten first, and guesses as anybody else does.
"""

from __future__ import annotations

from collections import OrderedDict

GUESSES = 60
EVERY_NS = 1_000_000_000
"""So many wrong keys at once, and one more so often."""
ADDRESSES = 10_000


class Guesses:
    def __init__(self) -> None:
        self._whole_again: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._whole_again)

    def wait_ns(self, address: str, now_ns: int) -> int:
        """A wrong key came from `address`: 0, or for how long there are to be no more of them from there. `now_ns`: monotonic."""
        known = self._whole_again
        whole_again = max(known.get(address, 0), now_ns) + EVERY_NS
        wait = max(0, whole_again - now_ns - GUESSES * EVERY_NS)
        known[address] = whole_again if not wait else whole_again - EVERY_NS
        known.move_to_end(address)
        if len(known) > ADDRESSES:
            known.popitem(last=False)
        return wait
