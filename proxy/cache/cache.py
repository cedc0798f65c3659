"""4 cache: whether a request gets an answer that is there already, or that is being made for another one.

In this order: one in the making, one in this worker's memory, one in Redis; and where a model says so, one to a question that
means the same. What has to be made is kept when it is complete and its client has it. Who may get it is part of its key.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from msgspec import Struct

from proxy.cache.entry import RECORDED, Entry, Form
from proxy.cache.flight import Flight, Given
from proxy.cache.forms import as_form, split
from proxy.cache.key import form_of, key_of, tenant_of
from proxy.cache.memory import Memory
from proxy.cache.sealed import seal, unseal
from proxy.errors import Outcome
from proxy.exchange import Exchange
from proxy.nouns import CACHE_POLICIES
from proxy.reply import Reply
from proxy.settings import CacheSettings
from proxy.snapshot import Model, Principal, Snapshot
from proxy.wire.body import Request, apply
from proxy.wire.operation import EngineOperation

if TYPE_CHECKING:
    from proxy.cache.redis import Remote
    from proxy.cache.semantic import Embed, Meaning, Neighbour, Semantic
    from proxy.cache.vectors import Vectors

T = TypeVar("T")

_LINE: Final = b"\r\nx-glasshouse-cache: "
_FOR_ONE = re.compile(
    rb"\r\n(?:set-cookie|x-ratelimit-[^:\r\n]*|retry-after[^:\r\n]*|x-glasshouse-[^:\r\n]*|age)[ \t]*:[^\r\n]*", re.IGNORECASE
)
"""Lines of an engine's head that were meant for one client, once."""
_MAX_AGE: Final = b"max-age="
_LONGEST_AGE: Final = 10
"""Digits."""
_LARGE: Final = 128 * 1024
"""Bytes that are packed and unpacked in a thread: it takes milliseconds."""
_DONE: Final = b"[DONE]"
_SAY_DONE: Final = ("chat", "completions")
"""Of the others, a stream without its last event is broken."""
_MANY_WORDS: Final = 16 * 1024
"""Bytes of an answer that gets another form in a thread: 5 to 10 µs for each of its tokens."""
_MOST_RULES: Final = 10_000
_ALIKE: Final[dict[int, tuple[Form, ...]]] = {
    Form.WHOLE: (Form.STREAM_WITH_USAGE, Form.STREAM),
    Form.STREAM: (Form.STREAM_WITH_USAGE, Form.WHOLE),
    Form.STREAM_WITH_USAGE: (Form.STREAM, Form.WHOLE),
    Form.STREAM_WITH_USAGES: (),
}
"""From what each form may be made, best first."""
_SUFFIXES: Final = {form: tuple(bytes((each,)) for each in alike) for form, alike in _ALIKE.items()}
"""The same, as keys end."""
_recorded: Final = attrgetter(*RECORDED)
_POLICIES: Final[dict[str, int]] = {name: rank for rank, name in enumerate(CACHE_POLICIES)}


class _Rules(NamedTuple):
    """What holds for one caller and one model."""

    principal: Principal
    model: Model
    policy: str
    tenant: str
    ttl_s: float


class _Wish(NamedTuple):
    """What a request says about it itself (RFC 9111 §5.2.1)."""

    look: bool = True
    keep: bool = True
    max_age_ns: int | None = None


class _Made(Struct):
    """For what an answer is being made."""

    key: bytes
    form: Form
    operation: EngineOperation[Any]
    request: Request
    body: bytes
    """As it goes to an engine."""
    rules: _Rules
    snapshot: Snapshot
    meaning: Meaning | None = None
    """What is asked, where that was to be known."""


_NO_WISH: Final = _Wish()


class Cache:
    """`opening` is called before a request waits for anything. `cost`: what so many input, cached input and output tokens of a
    model cost, received at a time, in nano-units. `embed`: has a text embedded; without it only what is the same is found."""

    def __init__(
        self,
        settings: CacheSettings,
        client_write: float,
        opening: Callable[[Exchange], None],
        cost: Callable[[Model, int, int, int, int], int],
        embed: Embed | None = None,
    ) -> None:
        self._settings = settings
        self._client_write = client_write
        self._opening = opening
        self._cost = cost
        self._embed = embed
        self.memory = Memory(settings.memory_bytes)
        self.stored = 0
        """Answers that were worth keeping."""
        self.remote: Remote | None = None
        """Where workers share theirs."""
        self.semantic: Semantic | None = None
        """What the questions mean whose answers are kept, once a model wants to know."""
        self.share_meanings: Callable[[], Vectors | None] = lambda: None
        """Called then: where workers share theirs."""
        self._known_from: Snapshot | None = None
        self._rules: dict[tuple[str, str], _Rules] = {}
        self._flights: dict[bytes, Flight] = {}

    async def answer(
        self,
        exchange: Exchange,
        operation: EngineOperation[Any],
        request: Request,
        model: Model,
        principal: Principal,
        snapshot: Snapshot,
        reply: Reply,
    ) -> bool:
        """True: the answer is at hand. False: it has to be made. Raises what an answer that it shares has failed with."""
        wish = _wish(exchange.headers.get(b"cache-control"))
        rules = self._rules_of(principal, model, snapshot)
        body = exchange.body if not exchange.changes else b"".join(apply(exchange.changes, exchange.body))
        key = _key(operation, request, body, rules, snapshot) if wish.keep else None
        if key is None:
            exchange.record.cache = "bypass"
            reply.lines += _LINE + b"bypass"
            return False
        form = form_of(request)
        flown = key + bytes((form,))
        if wish.look:
            flight = self._flights.get(flown)
            # Another model's answer may come instead, which this caller may not be allowed.
            if flight is not None and flight.open and (not model.fallbacks or flight.leader.principal is principal):
                await self._share(flight, exchange, reply)
                return True
            if (entry := self._find(flown, wish, snapshot)) is not None:
                await self._give(entry, exchange, model, snapshot, reply)
                return True
        made = _Made(key, form, operation, request, body, rules, snapshot)
        flight = Flight(exchange, reply, self._client_write, self._settings.entry_bytes, partial(self._landed, made))
        self._flights[flown] = flight
        if wish.look and self._may_be_elsewhere(made) and (entry := await self._look_further(made, exchange, wish)) is not None:
            await self._give(entry, exchange, model, snapshot, reply)
            flight.arrived()
            return True
        record = exchange.record
        record.cache = "miss"
        record.looked_up_ns = exchange.elapsed_ns()
        reply.lines += _LINE + b"miss"
        return False

    # -- what it may get --

    def follow(self, snapshot: Snapshot) -> None:
        """There is a new one."""
        self._known_from = snapshot
        self._rules.clear()
        if self.semantic is None and any(model.cache.semantic_model for model in snapshot.models.values()):
            self._begin_to_compare()

    def _rules_of(self, principal: Principal, model: Model, snapshot: Snapshot) -> _Rules:
        which = principal.key_id, model.name
        rules = self._rules.get(which)
        if rules is None or rules.principal is not principal or rules.model is not model:
            if len(self._rules) >= _MOST_RULES:
                self._rules.clear()
            rules = self._rules[which] = self._learn(principal, model, snapshot)
        return rules

    def _learn(self, principal: Principal, model: Model, snapshot: Snapshot) -> _Rules:
        said = model.cache
        policies = [each for each in (said.policy, *(level.cache for _, _, level in snapshot.levels(principal))) if each]
        policy = min(policies, key=_POLICIES.__getitem__, default=self._settings.policy)
        tenant = tenant_of(principal, said.scope or self._settings.scope)
        return _Rules(principal, model, policy, tenant, said.ttl_s or self._settings.ttl)

    # -- one that is being made --

    async def _share(self, flight: Flight, exchange: Exchange, reply: Reply) -> None:
        record = exchange.record
        record.cache, record.looked_up_ns = "coalesced", exchange.elapsed_ns()
        reply.lines += _LINE + b"coalesced"
        if not exchange.opened:
            self._opening(exchange)
        await flight.follow(exchange, reply)

    # -- one that was kept --

    def _find(self, flown: bytes, wish: _Wish, snapshot: Snapshot) -> Entry | None:
        """In memory, as it is wanted."""
        now = time.time_ns()
        entry = self.memory.get(flown, now, snapshot.purges)
        return entry if entry is not None and _young(entry, wish, now) else None

    def _may_be_elsewhere(self, made: _Made) -> bool:
        """In another form, in Redis, or under another question. Most misses are nowhere, and find out sooner this way."""
        if self.remote is not None or made.rules.model.cache.semantic_model:
            return True
        if made.operation.generates:
            for suffix in _SUFFIXES[made.form]:
                if made.key + suffix in self.memory:
                    return True
        return False

    async def _look_further(self, made: _Made, exchange: Exchange, wish: _Wish) -> Entry | None:
        """There, in this order."""
        for suffix in _SUFFIXES[made.form] if made.operation.generates else ():
            entry = self._find(made.key + suffix, wish, made.snapshot)
            if entry is not None and (wanted := await self._take_over(entry, made, exchange)) is not None:
                return wanted
        return await self._fetch(made, exchange, wish) or await self._similar(made, exchange, wish)

    async def _take_over(self, entry: Entry, made: _Made, exchange: Exchange) -> Entry | None:
        """The same answer as it is asked for, kept for those to come; None if there is no way to be faithful."""
        wanted = await self._as_wanted(entry, made, exchange)
        if wanted is not None and len(wanted.body) <= self._settings.entry_bytes:
            self.memory.put(made.key + bytes((made.form,)), wanted)
        return wanted

    async def _as_wanted(self, entry: Entry, made: _Made, exchange: Exchange) -> Entry | None:
        if entry.form == made.form:
            return entry
        convert = partial(as_form, entry, made.form, made.body)
        return await self._run(convert, exchange, large=len(entry.body) > _MANY_WORDS)

    async def _run(self, work: Callable[[], T], exchange: Exchange, *, large: bool) -> T:
        """In a thread, if it would keep others waiting."""
        if not large:
            return work()
        if not exchange.opened:
            self._opening(exchange)
        return await exchange.flow.until(asyncio.get_running_loop().run_in_executor(None, work))

    async def _fetch(self, made: _Made, exchange: Exchange, wish: _Wish) -> Entry | None:
        """From where workers share theirs, in whatever form; kept in memory then."""
        remote = self.remote
        if remote is None or not remote.up:
            return None
        if not exchange.opened:
            self._opening(exchange)
        forms = (made.form, *(_ALIKE[made.form] if made.operation.generates else ()))
        keys = [made.key + bytes((form,)) for form in forms]
        values = await _ask(remote, keys, exchange)
        now, purges = time.time_ns(), made.snapshot.purges
        for key, value in zip(keys, values, strict=True):
            entry = None if value is None else await self._unpack(value, key, made, exchange)
            if entry is None or entry.over(now, purges) or not _young(entry, wish, now):
                continue
            if (wanted := await self._take_over(entry, made, exchange)) is not None:
                return wanted
        return None

    async def _similar(self, made: _Made, exchange: Exchange, wish: _Wish) -> Entry | None:
        """One to a question that means the same, in whatever form."""
        model = made.rules.model
        semantic = (self.semantic or self._begin_to_compare()) if model.cache.semantic_model else None
        if semantic is None:
            return None
        snapshot, threshold = made.snapshot, model.cache.semantic_threshold
        meaning = await semantic.meaning(exchange, made.operation, made.body, model, made.rules.tenant, snapshot)
        if meaning is None:
            return None
        made.meaning = meaning
        known = await semantic.known(meaning, threshold, exchange)
        if (entry := await self._one_of(known, meaning, semantic, made, exchange, wish)) is not None:
            return entry
        shared = await semantic.shared(meaning, threshold, snapshot.cache_secret, exchange)
        return await self._one_of([each for each in shared if each not in known], meaning, semantic, made, exchange, wish)

    async def _one_of(
        self, neighbours: list[Neighbour], meaning: Meaning, semantic: Semantic, made: _Made, exchange: Exchange, wish: _Wish
    ) -> Entry | None:
        """The nearest that may be given again. Those of which nothing is left are forgotten, if that is certain."""
        remote = self.remote
        failures = 0 if remote is None else remote.failures
        entries = await self._at([each.key for each in neighbours], made, exchange)
        certain = remote is None or (remote.up and remote.failures == failures)
        now = time.time_ns()
        for (key, similarity), entry in zip(neighbours, entries, strict=True):
            if entry is None and certain:
                semantic.drop(meaning, key, made.rules.ttl_s)
            elif (
                entry is not None
                and _young(entry, wish, now)
                and (wanted := await self._as_wanted(entry, made, exchange)) is not None
            ):
                semantic.used(meaning, key)
                exchange.record.similarity = similarity
                return wanted
        return None

    async def _at(self, keys: list[bytes], made: _Made, exchange: Exchange) -> list[Entry | None]:
        """What is kept under these keys, here or where workers share theirs."""
        purges, remote = (self._known_from or made.snapshot).purges, self.remote
        now = time.time_ns()
        entries = {key: self.memory.get(key, now, purges) for key in keys}
        missing = [key for key, entry in entries.items() if entry is None]
        if missing and remote is not None and remote.up:
            for key, value in zip(missing, await _ask(remote, missing, exchange), strict=True):
                entry = None if value is None else await self._unpack(value, key, made, exchange)
                if entry is not None and not entry.over(time.time_ns(), purges):
                    self.memory.put(key, entry)
                    entries[key] = entry
        return [entries[key] for key in keys]

    def _begin_to_compare(self) -> Semantic | None:
        if self._embed is not None:
            from proxy.cache.semantic import Semantic

            self.semantic = Semantic(self._embed, self._opening)
            self.semantic.vectors = self.share_meanings()
        return self.semantic

    async def _unpack(self, value: bytes, key: bytes, made: _Made, exchange: Exchange) -> Entry | None:
        unpack = partial(unseal, value, key, made.snapshot.cache_secret, 2 * self._settings.entry_bytes + _LARGE)
        return await self._run(unpack, exchange, large=len(value) > _LARGE)

    async def _give(self, entry: Entry, exchange: Exchange, model: Model, snapshot: Snapshot, reply: Reply) -> None:
        """As it was given before."""
        record = exchange.record
        now = exchange.elapsed_ns()
        age_ns = max(0, record.received_unix_ns + now - entry.made_unix_ns)
        record.cache, record.outcome, record.looked_up_ns, record.age_ns = "hit", Outcome.CACHED, now, age_ns
        record.source_id, record.source_trace_id, record.source_span_id = entry.id, entry.trace_id, entry.span_id
        record.saved_input_tokens, record.saved_output_tokens = entry.input_tokens, entry.output_tokens
        if entry.usage_source:
            record.saved_cost_nano = self._cost(
                model, record.received_unix_ns, entry.input_tokens, entry.cached_tokens, entry.output_tokens
            )
            record.currency = snapshot.currency
        record.saved_ns = max(0, entry.took_ns - (now - record.admitted_ns))
        record.finish_reasons, record.chunks = list(entry.finish_reasons), entry.chunks
        reply.lines += b"%bhit\r\nage: %d" % (_LINE, age_ns // 1_000_000_000)
        reply.served_by = entry.served_by
        reply.head(200, entry.head, entry.sized, entry.streaming)
        if entry.streaming and self._settings.pace is not None:
            await self._play(split(entry.body), 1 / self._settings.pace, exchange, reply)
        else:
            reply.tail = entry.body

    async def _play(self, events: list[bytes], gap_s: float, exchange: Exchange, reply: Reply) -> None:
        """One event after the other; the last is for the pipeline to release."""
        if not exchange.opened:
            self._opening(exchange)
        exchange.call = Given(reply, self._client_write)
        loop = asyncio.get_running_loop()
        reply.tail = events.pop()
        for event in events:
            reply.write(event)
            timer = loop.call_later(gap_s, exchange.flow.wake)
            try:
                await exchange.flow.wait()
            finally:
                timer.cancel()
        exchange.record.upstream_ended_ns = exchange.elapsed_ns()

    # -- one that was made --

    def _landed(self, made: _Made, flight: Flight) -> None:
        """The client that asked for it has it: keep it, if it is worth that."""
        flown = made.key + bytes((made.form,))
        if self._flights.get(flown) is flight:
            del self._flights[flown]
        record, caching = flight.leader.record, made.operation.caching
        if (
            not flight.well
            or flight.length > self._settings.entry_bytes
            or record.cache != "miss"
            or record.fallback_of
            or caching is None
            or not caching.whole(made.request, record, flight.body if caching.holds else None)
            or not _ended(made, flight)
        ):
            return
        entry = self._entry(made, flight)
        self.stored += 1
        self.memory.put(flown, entry)
        if made.meaning is not None and self.semantic is not None:
            self.semantic.keep(made.meaning, flown, made.snapshot.cache_secret, made.rules.ttl_s)
        remote, secret = self.remote, made.snapshot.cache_secret
        if remote is not None and remote.up:
            remote.keep(flown, entry.size, partial(seal, entry, flown, secret), made.rules.ttl_s)

    def _entry(self, made: _Made, flight: Flight) -> Entry:
        leader, (_, lines, sized, _), rules = flight.leader, flight.head, made.rules
        record = leader.record
        unix_ns = record.received_unix_ns + record.ended_ns
        return Entry(
            made.operation.name,
            rules.model.name,
            made.form,
            _FOR_ONE.sub(b"", lines),
            sized,
            flight.body,
            flight.served_by,
            unix_ns,
            unix_ns + int(rules.ttl_s * 1e9),
            max(0, record.upstream_ended_ns - record.admitted_ns),
            tuple(record.finish_reasons),
            flight.usage,
            *_recorded(record),
        )

    # -- from the worker's sweep --

    def sweep(self) -> None:
        if self._known_from is not None:
            self.memory.tidy(time.time_ns(), self._known_from.purges)


def _key(operation: EngineOperation[Any], request: Request, body: bytes, rules: _Rules, snapshot: Snapshot) -> bytes | None:
    """None: its answer is nobody else's, nor is another's its own."""
    caching, policy, model = operation.caching, rules.policy, rules.model
    if caching is None or policy == "off" or not snapshot.cache_secret:
        return None
    if policy == "deterministic" and not caching.deterministic(request, body):
        return None
    return key_of(snapshot.cache_secret, operation.name, caching, model.name, model.revision, rules.tenant, body)


async def _ask(remote: Remote, keys: list[bytes], exchange: Exchange) -> list[bytes | None]:
    answer: list[bytes | None] = []

    def answered(values: list[bytes | None]) -> None:
        answer.extend(values)
        exchange.flow.wake()

    withdraw = remote.look(keys, answered)
    try:
        await exchange.flow.wait()
    except BaseException:
        withdraw()
        raise
    return answer


def _ended(made: _Made, flight: Flight) -> bool:
    """A stream that says when it is over has said so. (One without it passes: its client has what it wanted.)"""
    return made.form == Form.WHOLE or made.operation.name not in _SAY_DONE or flight.body.rstrip().endswith(_DONE)


def _young(entry: Entry, wish: _Wish, unix_ns: int) -> bool:
    return wish.max_age_ns is None or unix_ns - entry.made_unix_ns <= wish.max_age_ns


def _wish(field: bytes | None) -> _Wish:
    """What of a `Cache-Control` is understood here; the rest is passed over."""
    if field is None:
        return _NO_WISH
    look = keep = True
    max_age_ns = None
    for directive in field.lower().split(b","):
        directive = directive.strip()
        if directive == b"no-store":
            keep = False
        elif directive == b"no-cache":
            look = False
        elif directive.startswith(_MAX_AGE):
            seconds = directive[len(_MAX_AGE) :].strip(b'"')
            if seconds.isdigit() and len(seconds) <= _LONGEST_AGE:
                max_age_ns = int(seconds) * 1_000_000_000
    return _Wish(look, keep, max_age_ns)
