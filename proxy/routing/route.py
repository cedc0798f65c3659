"""One request's way to a backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proxy.exchange import Exchange
    from proxy.reply import Reply
    from proxy.routing.router import Lane
    from proxy.routing.standing import Share, Standing


class Route:
    """Attributes start as the class has them: most requests never set most of them. Tokens are guesses."""

    priority = 1
    session = b""
    """What it belongs to, for `session`."""
    home = ""
    """The backend that has what it goes on from."""
    marks: Sequence[int] = ()
    """Of its prompt, see `prefixes`."""
    reach: dict[int, int] | None = None
    """Bytes of its prompt that were sent to each backend, by bit; None: nobody has looked."""
    standing: Standing | None = None
    """The backend that it has, while it has one."""
    share: Share | None = None
    prefilling = 0
    """Prompt tokens that its backend has yet to compute."""
    uncached = 0
    """Prompt tokens that its backend had to compute."""
    sent_ns = 0
    ahead = 0
    """Prompt tokens that its backend had to compute up to its first token, others' included."""
    tried: tuple[str, ...] = ()
    """Backends that couldn't serve it."""
    book: dict[str, float] | None = None
    """In which its line charged it."""
    deadline_ns = 0
    """Until when it may wait, all its tries together; 0: it never has."""
    reply: Reply | None = None
    """Where a stream that waits is kept alive, if it is."""
    kept_ns = 0
    """When that was last done, or it began to wait."""

    def __init__(self, exchange: Exchange, lane: Lane, key: str, prompt: int, answer: int) -> None:
        self.exchange = exchange
        self.lane = lane
        self.key = key
        self.prompt = prompt
        self.answer = answer

    def first_token(self, now_ns: int) -> None:
        self.lane.router.first_token(self, now_ns)

    @property
    def cost(self) -> int:
        """What it is charged at first."""
        return self.prompt + self.answer
