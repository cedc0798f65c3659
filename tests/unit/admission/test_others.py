"""What a worker has spent itself before somebody gave it a budget: counted exactly once, whatever ends while it is looked for.

The data plane is real, and so are the journal and the snapshot; time passes where a test says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from proxy.admission import admission
from proxy.admission.others import Others
from proxy.admission.standing import Account
from proxy.snapshot import Allowance, Budget, read_snapshot, write_snapshot
from tests.support.plane import KEY, Client, Engine, Plane
from tests.support.wire_client import request

PLENTY = Allowance(budgets=(Budget("tokens", 10**9, "total"),))
BODY = b'{"choices":[{"message":{"content":"x"},"finish_reason":"stop"}],"usage":{"prompt_tokens":7,"completion_tokens":3}}'
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(BODY), BODY)
EACH = 10
"""Tokens that an answer takes."""


class Counting(Plane):
    """A worker's data plane, and who tells it what was spent."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, {"teams": {"t": {}}, "keys": {"test": {"team": "t"}}})
        assert self.pipeline.admission.incarnation == self.journal.incarnation
        self.others = Others(self.settings, self.pipeline.admission, dict)

    def begin(self) -> tuple[Client, Engine]:
        client, engine = self.client(), self.engine()
        client.says(request("/v1/chat/completions", {"model": "m", "messages": []}, key=KEY))
        return client, engine

    def spend(self, times: int = 1) -> None:
        for _ in range(times):
            client, engine = self.begin()
            engine.says(ANSWER)
            assert client.heard.startswith(b"HTTP/1.1 200")

    def allow(self, allowance: Allowance) -> None:
        """For everyone, from the next request on."""
        path = self.settings.snapshot_path
        write_snapshot(path, msgspec.structs.replace(read_snapshot(path), everyone=allowance))
        assert self.feed.poll()

    @property
    def account(self) -> Account:
        [standing] = self.pipeline.admission.standings()
        [account] = standing.accounts
        return account

    @property
    def spent(self) -> int:
        return self.account.window.spent

    @property
    def late(self) -> bool:
        return self.pipeline.admission.late


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Counting]:
    with Counting(tmp_path) as made:
        yield made


def test_what_was_spent_before_is_counted(plane: Counting) -> None:  # failure 60
    plane.spend(3)
    assert not plane.late
    plane.allow(PLENTY)
    plane.spend()
    assert (plane.spent, plane.late) == (EACH, True)
    plane.others._catch_up(plane.others._ask())
    assert (plane.spent, plane.late) == (4 * EACH, False)
    plane.spend()
    assert (plane.spent, plane.late) == (5 * EACH, False)


def test_what_ends_while_it_is_looked_for_counts_once(plane: Counting) -> None:
    """With the budget, or without it because it was under way before."""
    _, before = plane.begin()
    plane.spend()
    plane.allow(PLENTY)
    _, after = plane.begin()
    found = plane.others._ask()
    before.says(ANSWER)
    after.says(ANSWER)
    plane.spend()
    plane.others._catch_up(found)
    assert (plane.spent, plane.late) == (4 * EACH, False)


def test_what_was_under_way_counts_when_it_has_ended(plane: Counting) -> None:
    """Until then nobody looks again."""
    _, before = plane.begin()
    plane.allow(PLENTY)
    plane.spend()
    plane.others._catch_up(plane.others._ask())
    assert (plane.spent, plane.late) == (EACH, False)
    before.says(ANSWER)
    assert (plane.spent, plane.late) == (EACH, True)
    plane.others._catch_up(plane.others._ask())
    assert (plane.spent, plane.late) == (2 * EACH, False)


def test_a_look_that_another_one_has_followed_says_nothing(plane: Counting) -> None:
    """What has ended since can't be told from it."""
    plane.spend(2)
    plane.allow(PLENTY)
    plane.spend()
    found = plane.others._ask()
    plane.spend()
    plane.others.spend()
    plane.others._catch_up(found)
    assert (plane.spent, plane.late) == (2 * EACH, True)
    plane.others._catch_up(plane.others._ask())
    assert (plane.spent, plane.late) == (4 * EACH, False)


def test_a_segment_that_went_meanwhile_says_nothing(plane: Counting) -> None:
    plane.spend(2)
    plane.allow(PLENTY)
    plane.spend()
    found = plane.others._ask()
    [segment] = plane.settings.journal_path.glob("*.seg")
    aside = segment.rename(segment.with_suffix(".aside"))
    plane.others._catch_up(found)
    assert (plane.spent, plane.late) == (EACH, True)
    aside.rename(segment)
    plane.others._catch_up(plane.others._ask())
    assert (plane.spent, plane.late) == (3 * EACH, False)


def test_a_period_that_is_not_known_yet_stays_to_be_asked_for(plane: Counting) -> None:
    """As long as the collector, who has stored it, doesn't sum it."""
    plane.spend()
    (plane.settings.state_path / "collector-id").touch()
    plane.allow(PLENTY)
    plane.spend()
    plane.others._catch_up(plane.others._ask())
    assert (plane.spent, plane.late) == (EACH, True)


def test_a_budget_that_goes_again_is_asked_for_no_more(plane: Counting) -> None:
    plane.spend()
    plane.allow(PLENTY)
    plane.spend()
    assert plane.late
    plane.allow(Allowance(requests_per_minute=10**6))
    plane.spend()
    plane.others._catch_up(plane.others._ask())
    assert not plane.late
    plane.allow(PLENTY)
    plane.spend()
    plane.others._catch_up(plane.others._ask())
    assert plane.spent == 4 * EACH


def test_another_amount_goes_on_with_what_was_counted(plane: Counting) -> None:
    plane.spend()
    plane.allow(PLENTY)
    plane.spend()
    plane.allow(Allowance(budgets=(Budget("tokens", 10**8, "total"),)))
    plane.spend()
    plane.others._catch_up(plane.others._ask())
    assert (plane.spent, plane.late) == (3 * EACH, False)
    plane.allow(PLENTY)
    plane.spend()
    assert (plane.spent, plane.late) == (4 * EACH, False), "all of it is counted already"


def test_who_comes_for_the_first_time_has_spent_nothing(plane: Counting) -> None:
    plane.allow(PLENTY)
    plane.spend()
    assert (plane.spent, plane.late) == (EACH, False)


def test_who_was_here_is_forgotten_if_they_were_too_many(plane: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then everybody may have been."""
    monkeypatch.setattr(admission, "_MOST_SEEN", 1)
    plane.spend()
    assert plane.pipeline.admission._seen is None
    plane.allow(PLENTY)
    plane.spend()
    assert plane.late
