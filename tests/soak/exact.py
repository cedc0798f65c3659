"""Is every accepted request one row of the ledger, and does the row say what the client saw? Do limits and budgets know what the
ledger knows? Pure: requests and rows in, complaints out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from proxy.nouns import SYSTEM_KEY
from proxy.spend import Amounts, Holder

NANO: Final = 1_000_000_000
REFUSED: Final = frozenset({"client_error", "upstream_error", "rejected", "timeout"})
LEFT: Final = frozenset({"client_gone", "ok"})
TURNED_AWAY: Final = frozenset({401, 429})
"""Statuses for wrong keys: the second for those that are too many."""
GUESSES: Final = 60
"""Wrong keys a minute that an address may try."""


@dataclass
class Asked:
    """One request, as its client saw it. Times are `time.monotonic()`."""

    name: str
    """Its X-Request-Id, and with that its row's `client_request_id`."""
    kind: str
    connected: float
    """When its connection was opened."""
    began: float
    ended: float = 0.0
    status: int = 0
    """0: no head came."""
    ending: str = ""
    """complete, closed, reset, timeout, left (the client went away) or failed (nothing could be sent or read)."""
    detail: str = ""
    accepted: bool = True
    """It is the kind of request that is accepted, if it arrives."""
    sound: bool = True
    """Nothing is wrong with it: with nothing in its way it is answered with 200, to the end."""
    outcomes: frozenset[str] = frozenset({"ok"})
    """What may become of it with nothing in its way."""
    tokens: tuple[int, int] | None = None
    """(input, output) that its row must have if it is `ok`; None: as the engine or an estimate says."""
    seen_tokens: int = 0
    """Of output, that its client has seen."""
    most_tokens: int | None = None
    """Of output, that there could be."""
    key_revoked: bool = False
    """Its key was revoked before it ended."""
    wrong_key: bool = False
    """Its key was none when it was sent."""

    @property
    def turned_away(self) -> bool:
        """For its key."""
        return self.status in TURNED_AWAY and (self.wrong_key or self.key_revoked)


@dataclass
class Disturbances:
    """What was done meanwhile: (from, until) each."""

    worker_kills: list[tuple[float, float]] = field(default_factory=list)
    engine_restarts: list[tuple[float, float]] = field(default_factory=list)
    reloads: list[tuple[float, float]] = field(default_factory=list)

    def worker_died(self, asked: Asked) -> bool:
        """While the request ran, or while its connection waited for it."""
        return _met(self.worker_kills, asked.connected, asked.ended)

    def engine_died(self, asked: Asked) -> bool:
        return _met(self.engine_restarts, asked.began, asked.ended)

    def lives(self) -> Iterable[tuple[float, float]]:
        """From when until when one worker, and no other, took connections."""
        began = float("-inf")
        for start, end in sorted([*self.worker_kills, *self.reloads]):
            yield began, start
            began = end
        yield began, float("inf")


def _met(spans: list[tuple[float, float]], since: float, until: float) -> bool:
    return any(begin <= until and since <= end for begin, end in spans)


def complaints(asked: Iterable[Asked], rows: Iterable[Mapping[str, Any]], disturbances: Disturbances) -> list[str]:
    """What isn't as it must be, in words. Probes of backends are rows too, and nobody asked for them."""
    by_name: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["key_id"] != SYSTEM_KEY:
            by_name[row["client_request_id"]].append(row)
    found = []
    for each in asked:
        own = by_name.pop(each.name, [])
        found += [
            f"{each.name} ({each.kind}, {each.status} {each.ending}): {what}" for what in _complaints(each, own, disturbances)
        ]
    found += [f"{name}: {len(strangers)} rows that nobody asked for" for name, strangers in by_name.items()]
    return found


def door_complaints(asked: Iterable[Asked], disturbances: Disturbances) -> list[str]:
    """Is a wrong key refused, and one too many as too many: not before GUESSES of them came within a minute, and not later
    either? All of `asked` are of one address; each worker counts for itself."""
    wrong = [each for each in asked if each.wrong_key or each.turned_away or (each.key_revoked and not each.status)]
    found = [f"{each.name}: a wrong key is answered with {each.status}" for each in wrong if each.status not in (0, *TURNED_AWAY)]
    counted = [each for each in wrong if each.status != 429]
    for each in wrong:
        if each.status == 429:
            before = sum(other.ended >= each.began - 60 and other.began <= each.ended for other in counted)
            if before < GUESSES:
                found.append(f"{each.name}: too many wrong keys, and in the minute before it were {before}")
    for began, ended in disturbances.lives():
        let = [each for each in counted if each.status and each.connected >= began and each.ended <= ended]
        seconds = max((each.ended for each in let), default=0) - min((each.began for each in let), default=0)
        if len(let) > GUESSES + seconds * GUESSES / 60:
            found.append(f"{len(let)} wrong keys were let try in {seconds:.0f} s")
    return found


def _complaints(asked: Asked, rows: list[Mapping[str, Any]], disturbances: Disturbances) -> Iterable[str]:
    excused = disturbances.worker_died(asked)
    shaken = excused or disturbances.engine_died(asked)
    answered = (asked.status, asked.ending) == (200, "complete")
    if asked.sound and not (shaken or answered or asked.turned_away or asked.ending == "left"):
        yield f"failed with nothing in its way: {asked.detail}"
    may = asked.accepted and not asked.turned_away
    must = may and not (excused and asked.status == 0)
    if len(rows) > 1 or (must and not rows) or (rows and not may):
        yield f"{len(rows)} rows"
    for row in rows[:1]:
        yield from _differences(asked, row, excused, shaken)


def _differences(asked: Asked, row: Mapping[str, Any], excused: bool, shaken: bool) -> Iterable[str]:
    outcome, output = row["outcome"], row["output_tokens"]
    allowed = set(asked.outcomes)
    if asked.ending == "left":
        allowed |= LEFT
    if shaken:
        allowed.add("upstream_error")
    if excused:
        allowed |= {"crashed", "ok"}
    if outcome not in allowed:
        yield f"its outcome is {outcome} ({row['error_code']}), not one of {sorted(allowed)}"
    whole = asked.ending == "complete" and asked.status == 200
    if whole and asked.sound and outcome != "ok":
        yield f"it was answered, and its outcome is {outcome}"
    if asked.status and outcome != "crashed" and row["status"] != asked.status:
        yield f"its status is {row['status']}"
    if asked.status >= 400 and outcome not in REFUSED | {"crashed"}:
        yield f"it was refused, and its outcome is {outcome}"
    if outcome == "ok" and asked.tokens is not None and (row["input_tokens"], output) != asked.tokens:
        yield f"its tokens are {row['input_tokens']} and {output}, not {asked.tokens}"
    if asked.most_tokens is not None and output > asked.most_tokens:
        yield f"{output} tokens of at most {asked.most_tokens}"
    if outcome in ("ok", "client_gone", "upstream_error") and output < asked.seen_tokens:
        yield f"{output} tokens, and its client saw {asked.seen_tokens}"


class Metrics(Protocol):
    def total(self, name: str, **labels: str) -> float: ...


def disagreements(rows: list[dict[str, Any]], metrics: Metrics) -> list[str]:
    """Where /metrics says something else than the ledger."""
    expected: list[tuple[str, dict[str, str], float]] = [("glasshouse_requests_total", {}, len(rows))]
    for label in ("outcome", "operation", "backend", "key_name"):
        counts = Counter(row[label] or "none" for row in rows)
        name = label.removesuffix("_name")
        expected += [("glasshouse_requests_total", {name: value}, number) for value, number in counts.items()]
    for kind, column in (("input", "input_tokens"), ("cached_input", "cached_tokens"), ("output", "output_tokens")):
        expected.append(("glasshouse_tokens_total", {"kind": kind}, sum(row[column] for row in rows)))
    found = [
        f"{name}{labels or ''} is {told:g}, and by the ledger {value:g}"
        for name, labels, value in expected
        if (told := metrics.total(name, **labels)) != value
    ]
    money: list[tuple[str, dict[str, str], list[int]]] = [("glasshouse_cost_total", {}, [row["cost_nano"] for row in rows])]
    for team in {row["team"] for row in rows}:
        of_it = [row["cost_nano"] for row in rows if row["team"] == team]
        money.append(("glasshouse_team_cost_total", {"team": team or "none"}, of_it))
    for name, labels, costs in money:
        told, cost = metrics.total(name, **labels), sum(costs) / NANO
        if abs(told - cost) > 0.5 / NANO * len(costs):
            found.append(f"{name}{labels or ''} is {told!r}, and by the ledger {cost!r}")
    nothing = (
        "glasshouse_unrecorded_total",
        "glasshouse_limit_rejections_total",
        "glasshouse_journal_damaged_segments",
        "glasshouse_ledger_set_aside_records",
    )
    found += [f"{name} is {told:g}" for name in nothing if (told := metrics.total(name))]
    return found


def misspent(rows: Iterable[Mapping[str, Any]], spent: Mapping[str, Mapping[Holder, Amounts]]) -> list[str]:
    """Where what budgets are measured by (worker → holder → amounts) is something else than the ledger's sums."""
    sums: dict[tuple[str, Holder], list[int]] = defaultdict(lambda: [0, 0, 0])
    for row in rows:
        own = sums[row["worker"], Holder(row["key_id"], row["team"], row["user_name"], row["project"])]
        for at, amount in enumerate((row["cost_nano"], row["input_tokens"] + row["output_tokens"], row["gpu_ns"])):
            own[at] += amount
    by_ledger = {who: Amounts(*amounts) for who, amounts in sums.items() if any(amounts)}
    known = {(worker, whose): amounts for worker, own in spent.items() for whose, amounts in own.items() if amounts != Amounts()}
    return [
        f"{who} spent {known.get(who, Amounts())}, and by the ledger {by_ledger.get(who, Amounts())}"
        for who in sorted(known.keys() | by_ledger.keys())
        if known.get(who) != by_ledger.get(who)
    ]
