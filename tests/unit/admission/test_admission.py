"""A permit's life: who decides, what it holds meanwhile, and what is booked where when it ends."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final, cast

import pytest

from proxy.admission import Admission, Permit
from proxy.admission.shared import Shared
from proxy.admission.standing import Refusal, Standing, Window
from proxy.errors import ClientGone, ProxyError, QuotaExceeded, RateLimited
from proxy.exchange import Exchange, Remembered
from proxy.flow import Flow
from proxy.reply import Reply
from proxy.snapshot import Allowance, Budget, Model, Principal, Snapshot, SnapshotFile
from proxy.wire.operation import EngineOperation
from proxy.wire.operations import find_operation

MIDNIGHT: Final = int(datetime(2026, 11, 21, tzinfo=UTC).timestamp()) * 10**9
CHAT: Final = cast("EngineOperation[Any]", find_operation(b"POST", b"/v1/chat/completions"))
BODY: Final = b"x" * 36
PROMPT: Final = 10


class Elsewhere:
    """Stands where Redis would decide: the test does, by calling the permits."""

    clock_offset_ns = 0
    parts = 4

    def __init__(self) -> None:
        self.up = True
        self.asked: list[Permit] = []
        self.told: list[tuple[Standing, Window | None]] = []

    def ask(self, permit: Permit) -> None:
        self.asked.append(permit)

    def changed(self, standing: Standing, window: Window | None = None) -> None:
        self.told.append((standing, window))


class Requests:
    """Of one key that has `allowance`."""

    def __init__(self, shared: Elsewhere | None = None, **allowance: Any) -> None:
        self.model = Model("m", ("b0",))
        self.snapshot = Snapshot(SnapshotFile(models={"m": self.model}))
        self.principal = Principal("key_1", "one", "", Allowance(**allowance))
        self.admission = Admission("own", cast("Shared", shared))
        self.errors: list[ProxyError] = []
        self.running: list[Exchange] = []

    def begin(self, max_tokens: int = 20, unix_ns: int = MIDNIGHT - 1) -> Exchange:
        """As the pipeline does, up to where it would ask an engine."""
        flow = Flow(lambda: None)
        exchange = Exchange(0, b"POST", b"/v1/chat/completions", {}, BODY, Remembered(), flow)
        exchange.record.received_unix_ns = unix_ns
        exchange.record.max_tokens = max_tokens
        flow.start(self._admit(exchange))
        return exchange

    async def _admit(self, exchange: Exchange) -> None:
        reply = cast("Reply", type("Lines", (), {"lines": b""})())
        try:
            permit = self.admission.admit(exchange, self.principal, CHAT, self.model, self.snapshot, reply)
            if permit is not None and permit.waits:
                await permit.decided()
            self.running.append(exchange)
            await exchange.flow.wait()
        except ProxyError as error:
            self.errors.append(error)
        finally:
            self.admission.release(exchange)

    def end(self, exchange: Exchange, answer: int) -> None:
        exchange.record.input_tokens, exchange.record.output_tokens = PROMPT, answer
        exchange.flow.wake()

    @property
    def standing(self) -> Standing:
        [standing] = self.admission.standings()
        return standing


@pytest.fixture
def redis() -> Elsewhere:
    return Elsewhere()


def test_what_ends_after_midnight_is_booked_where_it_was_set_aside() -> None:  # failure 60
    requests = Requests(budgets=(Budget("tokens", 100, "day"),))
    late = requests.begin(max_tokens=20)
    [yesterday] = (requests.standing.accounts[0].window,)
    early = requests.begin(max_tokens=30, unix_ns=MIDNIGHT)
    today = requests.standing.accounts[0].window
    assert (yesterday.reserved, today.reserved) == (PROMPT + 20, PROMPT + 30)
    requests.end(late, 5)
    requests.end(early, 7)
    assert [(each.spent, each.reserved) for each in (yesterday, today)] == [(PROMPT + 5, 0), (PROMPT + 7, 0)]
    assert not requests.errors


def test_a_refusal_holds_nothing() -> None:
    requests = Requests(budgets=(Budget("tokens", 50, "day"),), concurrent_requests=5)
    requests.begin(max_tokens=41)
    [error] = requests.errors
    assert isinstance(error, QuotaExceeded)
    assert (requests.standing.concurrent, requests.standing.accounts[0].window.reserved) == (0, 0)
    assert (requests.admission.reservations, requests.admission.in_flight) == (0, set())


def test_nothing_is_made_of_a_key_that_nobody_limits() -> None:
    requests = Requests()
    exchange = requests.begin()
    assert requests.running == [exchange]
    assert exchange.permit is None
    assert requests.admission.in_flight == {exchange}
    requests.end(exchange, 5)
    assert requests.admission.in_flight == set()


# -- decided elsewhere --


def test_who_is_granted_holds_until_the_end_and_it_is_told(redis: Elsewhere) -> None:
    requests = Requests(redis, tokens_per_minute=1000, concurrent_requests=3, budgets=(Budget("tokens", 100, "day"),))
    exchange = requests.begin(max_tokens=20)
    assert requests.running == []
    standing, window = requests.standing, requests.standing.accounts[0].window
    assert (standing.concurrent, window.reserved) == (0, 0)
    redis.asked[0].granted()
    assert requests.running == [exchange]
    assert (standing.concurrent, window.reserved) == (1, PROMPT + 20)
    requests.end(exchange, 5)
    assert (standing.concurrent, window.reserved, window.spent) == (0, 0, PROMPT + 5)
    assert standing.buckets[0].owed == 5 - 20
    assert redis.told == [(standing, None), (standing, window)]


def test_who_is_refused_hears_why(redis: Elsewhere) -> None:
    requests = Requests(redis, concurrent_requests=3)
    requests.begin()
    redis.asked[0].refused(Refusal(requests.standing, "concurrent_requests", 3, 3, 1, None))
    [error] = requests.errors
    assert isinstance(error, RateLimited)
    assert error.refused_by == "key.concurrent_requests"
    assert requests.standing.concurrent == 0


def test_who_leaves_before_the_verdict_never_holds_anything(redis: Elsewhere) -> None:
    requests = Requests(redis, concurrent_requests=3, budgets=(Budget("tokens", 100, "day"),))
    for verdict in ("granted", "refused", "undecided"):
        exchange = requests.begin()
        permit = redis.asked[-1]
        exchange.flow.interrupt(ClientGone("The client has left."))
        assert permit.abandoned
        refusal = Refusal(requests.standing, "concurrent_requests", 3, 3, 1, None)
        getattr(permit, verdict)(*{"granted": (), "refused": (refusal,), "undecided": (4,)}[verdict])
        assert (requests.standing.concurrent, requests.standing.accounts[0].window.reserved) == (0, 0)
    assert [type(error) for error in requests.errors] == [ClientGone] * 3
    assert requests.running == []


def test_where_redis_says_nothing_a_part_of_the_limits_counts(redis: Elsewhere) -> None:  # failure 42
    requests = Requests(redis, concurrent_requests=8)
    for _ in range(4):
        requests.begin()
    for permit in redis.asked:
        permit.undecided(4)
    assert (len(requests.running), len(requests.errors)) == (2, 2)
    redis.up = False
    requests.begin()
    assert (len(requests.running), len(requests.errors)) == (2, 3)
    requests.end(requests.running[0], 5)
    requests.begin()
    assert (len(requests.running), len(requests.errors)) == (3, 3)


def test_what_was_decided_without_redis_is_owed_to_it_in_full(redis: Elsewhere) -> None:
    requests = Requests(redis, requests_per_minute=100, output_tokens_per_minute=1000)
    redis.up = False
    exchange = requests.begin(max_tokens=20)
    redis.up = True
    requests.end(exchange, 5)
    assert [bucket.owed for bucket in requests.standing.buckets] == [1, 5]
