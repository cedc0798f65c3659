"""One request, its answer and all that is learned about it.

`Record` is the wide event: flat, versioned, written to the journal when the request is dispatched (OPENING), at most once a
second while it streams (PROGRESS) and exactly once at its end (CLOSING). Everything that anyone looks at, a metric, a span, a
ledger row, a report, is a projection of Records.

`Exchange` is what the steps of the pipeline pass along: it owns the Record while it is being filled in, and the few things that
only matter while the request runs. Steps write facts on it and do nothing else with it.
"""

from __future__ import annotations

import random
import time
from binascii import hexlify
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from enum import IntEnum
from time import monotonic_ns
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from proxy.errors import Outcome, ProxyError

if TYPE_CHECKING:
    from proxy.flow import Flow
    from proxy.snapshot import Model, Principal, Snapshot
    from proxy.wire.body import Change
    from proxy.wire.operation import Operation

RECORD_VERSION = 1
"""Version of the encoding below. Fields are only ever appended; a reader takes this version and the one before."""


class Phase(IntEnum):
    OPENING = 0
    PROGRESS = 1
    CLOSING = 2


OPENING: Final = Phase.OPENING
CLOSING: Final = Phase.CLOSING
"""Every request needs both, and to look up a member takes Python as long as twenty attributes."""


class UsageSource(IntEnum):
    """Where the token counts come from."""

    NONE = 0
    ENGINE = 1
    COUNTED = 2
    ESTIMATED = 3


INTER_TOKEN_BOUNDS_NS: tuple[int, ...] = tuple(
    round(seconds * 1e9)
    for seconds in (
        *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4),
        *(0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
    )
)
"""Upper bounds of the inter-token histogram, ns. A superset of vLLM's own for `vllm:inter_token_latency_seconds`, finer below
50 ms, where a healthy 3090 lives. One more bucket than bounds."""


class Attempt(msgspec.Struct, array_like=True, gc=False):
    """One try on one backend. Times are ns after `Record.received_unix_ns`; 0 = not reached."""

    backend: str
    started_ns: int = 0
    connected_ns: int = 0
    first_byte_ns: int = 0
    ended_ns: int = 0
    status: int = 0
    reused: bool = False
    error: str = ""


class EngineTimings(msgspec.Struct, array_like=True, gc=False):
    """What the engine itself said of this request, ms; None = not said.

    Source: vLLM's `metrics` block (`--enable-per-request-metrics`) or llama.cpp's `timings`.
    """

    queue_ms: float | None = None
    time_to_first_token_ms: float | None = None
    """As the engine says it: vLLM counts from when the request was scheduled, its queue apart."""
    prefill_ms: float | None = None
    decode_ms: float | None = None
    mean_inter_token_ms: float | None = None


class Record(msgspec.Struct, array_like=True):
    """The wide event. Times are integer ns after `received_unix_ns` (monotonic differences); 0 = not reached."""

    # identity
    id: bytes
    trace_id: bytes
    span_id: int
    received_unix_ns: int
    operation: str = ""
    parent_span_id: int = 0
    trace_flags: int = 1
    client_request_id: str = ""
    key_id: str = ""
    key_name: str = ""
    # request
    model: str = ""
    stream: bool = False
    choices: int = 1
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    user: str = ""
    request_bytes: int = 0
    # how it ended
    status: int = 0
    outcome: int = Outcome.OK
    error_code: str = ""
    error: str = ""
    finish_reasons: list[str] = []
    # where the time went
    read_ns: int = 0
    authenticated_ns: int = 0
    admitted_ns: int = 0
    sent_ns: int = 0
    first_byte_ns: int = 0
    first_token_ns: int = 0
    first_content_ns: int = 0
    last_token_ns: int = 0
    upstream_ended_ns: int = 0
    ended_ns: int = 0
    # what came
    chunks: int = 0
    response_bytes: int = 0
    unsent_bytes: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    usage_source: int = UsageSource.NONE
    cost_nano: int = 0
    currency: str = ""
    inter_token_counts: list[int] = []
    inter_token_sum_ns: int = 0
    inter_token_max_ns: int = 0
    attempts: list[Attempt] = []
    engine: EngineTimings | None = None
    # who asked
    client_address: str = ""

    audio_seconds: int = 0
    """Of what was heard, as the engine says."""
    team: str = ""
    gpu_ns: int = 0
    """What it took of a GPU's time. Nothing fills it in yet."""
    refused_by: str = ""
    """`level.name` of the limit that refused it: `key.requests_per_minute`, `team.budget`."""
    over_budget: str = ""
    """The level of a soft budget that was used up when it came."""
    worker: str = ""
    """The incarnation whose journal it is from: filled in by the journal's reader."""
    user_name: str = ""
    """Whose key it is; `user` is whom the caller named."""
    project: str = ""
    requested_model: str = ""
    """The alias under which `model` was asked for; nothing if it was by its name."""
    routed_by: str = ""
    """The policy that chose the last backend, and what spoke for that one: `auto.prefix`; `only`: there was no choice."""
    scores: list[tuple[str, int]] = []
    """The backends among which it chose, each with its score; the lowest has it. Nothing where there was no choice."""
    queued_ns: int = 0
    """When it began to wait for a backend with room. It waited until its first try, or to its end if it had none."""
    fallback_of: str = ""
    """The model that was asked for and that nobody could answer for: `model` did instead."""
    cache: str = ""
    """`hit`, `miss`, `coalesced` or `bypass`; nothing where there is no cache."""
    looked_up_ns: int = 0
    """When the cache had said what it has."""
    saved_input_tokens: int = 0
    saved_output_tokens: int = 0
    saved_cost_nano: int = 0
    """What the answer would have taken, had an engine given it. The counts above are what engines did for this request."""
    saved_ns: int = 0
    """How much longer the original took, from its admission to its engine's last byte."""
    source_id: bytes = b""
    """Of the request whose answer it is; nothing if it has its own."""
    source_trace_id: bytes = b""
    source_span_id: int = 0
    age_ns: int = 0
    """How long ago that answer was complete; 0 for one that was still under way."""
    similarity: float | None = None
    """Cosine of the two prompts' embeddings; None where they were the same."""

    @property
    def backend(self) -> str:
        """The backend that answered, or the last one tried; "" if none was."""
        return self.attempts[-1].backend if self.attempts else ""

    @property
    def hex_id(self) -> str:
        return self.id.hex()

    @property
    def wait_ns(self) -> int:
        """How long it waited for a backend with room, before its first try."""
        if not self.queued_ns:
            return 0
        return max(0, (self.attempts[0].started_ns if self.attempts else self.ended_ns) - self.queued_ns)

    def gap(self, now_ns: int) -> None:
        """Count the time since the previous token; `now_ns` is an offset like every other time here."""
        counts = self.inter_token_counts
        if not counts:
            counts = self.inter_token_counts = [0] * (len(INTER_TOKEN_BOUNDS_NS) + 1)
        gap = now_ns - self.last_token_ns
        counts[bisect_left(INTER_TOKEN_BOUNDS_NS, gap)] += 1
        self.inter_token_sum_ns += gap
        if gap > self.inter_token_max_ns:
            self.inter_token_max_ns = gap
        self.last_token_ns = now_ns

    def proxy_added_ns(self) -> int:
        """What the proxy itself added: from the whole request read to its dispatch, less waiting for room, for attempts that
        failed (and for room after them) and for connections, and from the engine's last byte to the release of ours.

        What the cache had is the proxy's own, but for its pace. Who shares an answer waits for its engine from the look-up on.
        """
        if self.cache in ("hit", "coalesced"):
            since = self.upstream_ended_ns or (self.looked_up_ns if self.cache == "hit" else self.ended_ns)
            return max(0, self.looked_up_ns - self.read_ns) + max(0, self.ended_ns - since)
        waited = self.wait_ns
        if self.attempts:
            first, last_try = self.attempts[0], self.attempts[-1]
            waited += last_try.started_ns - first.started_ns + max(0, last_try.connected_ns - last_try.started_ns)
        if not self.sent_ns:
            last = self.attempts[-1].ended_ns - self.attempts[-1].started_ns if self.attempts else 0
            return max(0, self.ended_ns - self.read_ns - waited - last)
        before = self.sent_ns - self.read_ns - waited
        after = self.ended_ns - self.upstream_ended_ns if self.upstream_ended_ns else 0
        return max(0, before) + max(0, after)


class Timed(Protocol):
    """Whatever has a record's times: a Record, or its row of the ledger."""

    read_ns: int
    authenticated_ns: int
    admitted_ns: int
    cache: str
    looked_up_ns: int
    queued_ns: int
    sent_ns: int
    first_byte_ns: int
    first_token_ns: int
    upstream_ended_ns: int
    ended_ns: int


def named_times(of: Timed, attempts: Sequence[Attempt]) -> Iterator[tuple[str, int, int]]:
    """Where the time went, in the order in which it went, without gaps: (name, from, to), ns after it was received.

    read: the request's bytes; cache: looking whether it has the answer; route: choosing a backend; wait: until one had room;
    retries: tries before the last; prefill: until the first token (of an answer in one piece: engine; of one that is another
    request's too: coalesce); decode: until the engine's last byte (receive; of a hit: as fast as is wanted); release: until ours.
    """
    first, last = (attempts[0], attempts[-1]) if attempts else (None, None)
    streamed, began = bool(of.first_token_ns), of.first_token_ns or of.first_byte_ns
    waited = "prefill" if streamed else "engine"
    if of.cache == "coalesced":
        waited, began = "coalesce", began or of.ended_ns
    marks = (
        ("read", of.read_ns),
        ("authenticate", of.authenticated_ns),
        ("admit", of.admitted_ns),
        ("cache", of.looked_up_ns),
        ("route", of.queued_ns or (first.started_ns if first else 0)),
        ("wait", (first.started_ns if first else of.ended_ns) if of.queued_ns else 0),
        ("retries", last.started_ns if last is not first and last else 0),
        ("connect", last.connected_ns if last else 0),
        ("send", of.sent_ns),
        (waited, began),
        ("decode" if streamed else "receive", of.upstream_ended_ns),
        ("release", of.ended_ns),
    )
    at = 0
    for name, mark in marks:
        if mark and mark >= at:
            yield name, at, mark
            at = mark


_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(Record)


def encode_record(phase: Phase, record: Record) -> bytes:
    """One byte of phase, sixteen of id, then the record in MessagePack: a reader learns what it is without decoding it."""
    return _PHASES[phase] + record.id + _encode(record)


def decode_record(payload: bytes) -> Record:
    """Raises msgspec.MsgspecError if the payload isn't a record."""
    try:
        return _decoder.decode(payload[17:])
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from None


def peek_record(payload: bytes) -> tuple[int, bytes]:
    """(phase, id) of an encoded record. Raises ValueError if it is too short to be one."""
    if len(payload) < 18:
        raise ValueError("a record has at least 18 bytes")
    return payload[0], payload[1:17]


_PHASES = tuple(bytes([phase]) for phase in Phase)

_WALL_ANCHOR_NS = time.time_ns() - monotonic_ns()
"""Wall clock minus monotonic clock, taken anew by `set_wall_anchor` so that a stepped clock is followed between requests."""


def set_wall_anchor() -> None:
    global _WALL_ANCHOR_NS
    _WALL_ANCHOR_NS = time.time_ns() - monotonic_ns()


def new_id(unix_ms: int) -> bytes:
    """A UUID version 7 (RFC 9562 §5.7): sortable by time, 74 random bits. Not a secret."""
    bits = random.getrandbits(74)
    return (unix_ms << 80 | 0x7000 << 64 | bits >> 62 << 64 | 0x2 << 62 | bits & 0x3FFFFFFFFFFFFFFF).to_bytes(16, "big")


class Remembered:
    """What a connection remembers of its last successful authentication."""

    __slots__ = ("api_key", "authorization", "expires_unix_ns", "principal", "snapshot")

    def __init__(self) -> None:
        self.authorization: bytes | None = None
        self.api_key: bytes | None = None
        self.principal: Principal | None = None
        self.snapshot: Snapshot | None = None
        self.expires_unix_ns = 0
        """When the principal ceases to be one."""


class Call(Protocol):
    """What a request's own steps may ask of its answer while an engine is at it; `relay/call.py` is what it is."""

    heard: bool
    """A byte of it has come: from here on there is no other try."""
    complete: bool

    @property
    def answered(self) -> bool:
        """A stream, every choice of which has ended: nothing that a client waits for is still to come."""

    @property
    def usage(self) -> bytes:
        """What a stream's engine has said of all of it (JSON), as far as it has."""

    def settle(self) -> None:
        """Write the token counts known so far on the record."""

    def broken(self, error: ProxyError) -> bytes:
        """How a stream of this kind says that it has failed; nothing for an answer that is none."""

    def overdue(self, now_ns: int) -> ProxyError | None:
        """The timeout that has passed, if one has."""


class Flight(Protocol):
    """An answer that this request has made, for itself and for others that want the same; `cache/flight.py` is what it is."""

    def goes_on_without(self, error: ProxyError) -> bool:
        """The client that asked first has left, as `error` says. True if others still want the answer."""

    def arrived(self) -> None:
        """The answer is complete, and at hand in the reply."""

    def let_go(self) -> None:
        """The reply is this client's alone from here on: its record is to be written."""

    def land(self) -> None:
        """The record is written, and the client has what it gets."""


class Permit(Protocol):
    """What the end of a request lets go of; `admission/permit.py` is what it is."""

    def close(self) -> None:
        """Let go of it, and book what the request took."""


class Exchange:
    """One request while it runs. `record` is what will be kept of it.

    `hex_id` is the request's id as the client and the engine see it: the UUID's 32 hex digits, also the trace id where the
    caller brought none. Attributes start as the class has them: most requests never set most of them.
    """

    tracestate = b""
    """The caller's, as a header line."""
    operation: Operation | None = None
    principal: Principal | None = None
    model: Model | None = None
    changes: tuple[Change, ...] = ()
    """What is different in the body for its model."""
    salted: tuple[Change, ...] = ()
    """What else is, where a vLLM gets it: so that the prompt, once computed, is of use to its tenant only."""
    call: Call | None = None
    """The try that is under way."""
    permit: Permit | None = None
    """What it holds of its limits, if it has any."""
    flight: Flight | None = None
    """The answer that it makes for others too, if it does."""
    error: ProxyError | None = None
    opened = False
    """Its opening record is in the journal, where room is kept for the closing one."""
    progress_chunks = 0
    """Chunks at the last progress record."""

    def __init__(
        self,
        origin_ns: int,
        method: bytes,
        target: bytes,
        headers: dict[bytes, bytes],
        body: bytes,
        remembered: Remembered,
        flow: Flow,
    ) -> None:
        received = origin_ns + _WALL_ANCHOR_NS
        identity = new_id(received // 1_000_000)
        self.origin_ns = origin_ns
        self.method = method
        self.target = target
        self.headers = headers
        self.body = body
        self.remembered = remembered
        self.flow = flow
        self.hex_id = self.trace = hexlify(identity)
        self.record = Record(identity, identity, random.getrandbits(63) | 1, received, request_bytes=len(body))

    def elapsed_ns(self) -> int:
        """Now, as an offset from the request's first byte."""
        return monotonic_ns() - self.origin_ns

    @property
    def content_type(self) -> bytes:
        """The body's, as the caller named it; nothing if it didn't."""
        return self.headers.get(b"content-type", b"")

    @property
    def accepted(self) -> bool:
        """Authenticated: from there on the request is one row of the ledger, however it ends."""
        return self.principal is not None

    def leave(self, error: ProxyError) -> None:
        """The client has left, as `error` says: this is the request's end, unless others want its answer too."""
        if self.flight is None or not self.flight.goes_on_without(error):
            self.flow.interrupt(error)

    def fail(self, error: ProxyError) -> None:
        """Book the request as failed. The first error stays: what follows from it is not its cause."""
        if self.error is not None:
            return
        self.error = error
        record = self.record
        record.outcome = error.outcome
        record.error_code = error.error_code or error.type
        record.error = error.message[:300]
        if error.refused_by:
            record.refused_by = error.refused_by
