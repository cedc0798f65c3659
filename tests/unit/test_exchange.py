"""The record and its encoding, ids, gaps, and what an exchange books."""

from __future__ import annotations

import random
import time
import uuid
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import ClientGone, InvalidRequest, Outcome, UpstreamDisconnected
from proxy.exchange import (
    INTER_TOKEN_BOUNDS_NS,
    RECORD_VERSION,
    Attempt,
    EngineTimings,
    Exchange,
    Phase,
    Record,
    Remembered,
    UsageSource,
    decode_record,
    encode_record,
    named_times,
    new_id,
    peek_record,
    set_wall_anchor,
)
from proxy.flow import Flow

GOLDEN = Path(__file__).parents[1] / "fixtures" / "records"


def blank() -> Record:
    return Record(b"i" * 16, b"t" * 16, 1, 0)


def full() -> Record:
    """Every field with a value of its own."""
    return Record(
        id=bytes(range(16)),
        trace_id=bytes(range(16, 32)),
        span_id=0x7FFF_FFFF_FFFF_FFFF,
        received_unix_ns=1_795_144_132_123_456_789,
        operation="chat",
        parent_span_id=0xFFFF_FFFF_FFFF_FFFF,
        trace_flags=0,
        client_request_id="mine",
        key_id="key_1",
        key_name="Ärger",
        model="Qwen/Qwen3-8B",
        stream=True,
        choices=2,
        max_tokens=100,
        temperature=0.5,
        top_p=0.25,
        user="u",
        request_bytes=300,
        status=200,
        outcome=Outcome.TIMEOUT,
        error_code="idle_timeout",
        error="The engine fell silent.",
        finish_reasons=["stop", "length"],
        read_ns=1,
        authenticated_ns=2,
        admitted_ns=3,
        sent_ns=4,
        first_byte_ns=5,
        first_token_ns=6,
        first_content_ns=7,
        last_token_ns=8,
        upstream_ended_ns=9,
        ended_ns=10,
        chunks=11,
        response_bytes=12,
        unsent_bytes=13,
        input_tokens=14,
        cached_tokens=15,
        output_tokens=16,
        reasoning_tokens=17,
        usage_source=UsageSource.ENGINE,
        cost_nano=18,
        currency="EUR",
        inter_token_counts=[1, 0, 2],
        inter_token_sum_ns=19,
        inter_token_max_ns=20,
        attempts=[Attempt("b0", 1, 2, 0, 3, 0, False, "upstream_unreachable"), Attempt("b1", 4, 0, 5, 6, 200, True)],
        engine=EngineTimings(1.5, 2.5, 3.5, None, 0.25),
        client_address="2001:db8::1",
        audio_seconds=7,
        team="search",
        gpu_ns=21,
        refused_by="team.budget",
        over_budget="key",
        worker="18b9a1c2d3e4f5061a2b3c4d",
        user_name="ann",
        project="search",
        requested_model="gpt-4o",
        routed_by="auto.prefix",
        scores=[("b0", 900), ("b1", -32)],
        queued_ns=22,
        fallback_of="Qwen/Qwen3-32B",
        cache="hit",
        looked_up_ns=23,
        saved_input_tokens=24,
        saved_output_tokens=25,
        saved_cost_nano=26,
        saved_ns=27,
        source_id=bytes(range(32, 48)),
        source_trace_id=bytes(range(48, 64)),
        source_span_id=0x7FFF_FFFF_FFFF_FFFE,
        age_ns=28,
        similarity=0.96875,
    )


# --- the encoding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("record", [blank(), full()], ids=["blank", "full"])
def test_what_was_written_is_read(phase: Phase, record: Record) -> None:
    payload = encode_record(phase, record)
    assert peek_record(payload) == (phase, record.id)
    assert decode_record(payload) == record


def test_records_of_this_version_are_read_for_ever() -> None:
    """The bytes as they were when the version was made; a later release reads them the same."""
    golden = (GOLDEN / "closing-1.msgpack").read_bytes()
    assert peek_record(golden) == (Phase.CLOSING, bytes(range(16)))
    later: dict[str, Any] = {
        "client_address": "",
        "audio_seconds": 0,
        "team": "",
        "gpu_ns": 0,
        "refused_by": "",
        "over_budget": "",
    }
    later |= {"worker": "", "user_name": "", "project": "", "requested_model": ""}
    later |= {"routed_by": "", "scores": [], "queued_ns": 0, "fallback_of": ""}
    later |= dict.fromkeys(["cache"], "") | dict.fromkeys(["source_id", "source_trace_id"], b"")
    later |= dict.fromkeys(["looked_up_ns", "saved_input_tokens", "saved_output_tokens", "saved_cost_nano", "saved_ns"], 0)
    later |= {"source_span_id": 0, "age_ns": 0, "similarity": None}
    assert decode_record(golden) == msgspec.structs.replace(full(), **later)  # fields that it hadn't yet


def test_fields_are_only_ever_appended() -> None:
    golden = msgspec.msgpack.decode((GOLDEN / "closing-1.msgpack").read_bytes()[17:])
    now = msgspec.msgpack.decode(encode_record(Phase.CLOSING, full())[17:])
    assert now[: len(golden)] == golden
    assert RECORD_VERSION == 1, "a new version needs a golden file of its own; this one must stay readable"


def test_every_field_of_the_full_record_has_a_value_of_its_own() -> None:
    default, given_ = msgspec.structs.asdict(blank()), msgspec.structs.asdict(full())
    assert [name for name, value in given_.items() if value == default[name]] == []


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(payload: bytes) -> None:
    for read in (peek_record, decode_record):
        try:
            read(payload)
        except (ValueError, msgspec.MsgspecError):
            continue


def test_a_record_without_its_later_fields_has_their_defaults() -> None:
    """As an older release wrote it."""
    early = msgspec.msgpack.encode(list(msgspec.msgpack.decode(encode_record(Phase.OPENING, blank())[17:]))[:12])
    assert decode_record(b"\0" * 17 + early) == blank()


def test_records_share_no_lists() -> None:
    one, two = blank(), blank()
    one.attempts.append(Attempt("b"))
    one.finish_reasons.append("stop")
    assert (two.attempts, two.finish_reasons, two.backend, one.backend) == ([], [], "", "b")


def test_phases_and_sources_keep_their_numbers() -> None:
    assert [phase.value for phase in (Phase.OPENING, Phase.PROGRESS, Phase.CLOSING)] == [0, 1, 2]
    sources = (UsageSource.NONE, UsageSource.ENGINE, UsageSource.COUNTED, UsageSource.ESTIMATED)
    assert [source.value for source in sources] == [0, 1, 2, 3]


# --- ids ---------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 2**48 - 1))
def test_an_id_is_a_uuid_of_version_7(unix_ms: int) -> None:  # RFC 9562 §5.7
    identity = uuid.UUID(bytes=new_id(unix_ms))
    assert (identity.version, identity.variant) == (7, uuid.RFC_4122)
    assert identity.int >> 80 == unix_ms


def test_the_rest_of_an_id_is_random() -> None:
    ones = zeros = (1 << 128) - 1
    random.seed(1)
    for _ in range(200):
        value = int.from_bytes(new_id(0), "big")
        ones &= value
        zeros &= ~value
    fixed = ones | zeros
    assert fixed == ((1 << 128) - 1) & ~((1 << 62) - 1) & ~(((1 << 12) - 1) << 64), "74 bits vary"
    assert len({new_id(0) for _ in range(1000)}) == 1000


def test_ids_sort_by_time() -> None:
    ids = [new_id(ms) for ms in range(1_795_000_000_000, 1_795_000_000_100)]
    assert ids == sorted(ids)


# --- gaps --------------------------------------------------------------------------------------------------------------


def test_bounds_rise_and_contain_vllms_own() -> None:
    assert list(INTER_TOKEN_BOUNDS_NS) == sorted(set(INTER_TOKEN_BOUNDS_NS))
    vllm = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
    assert {round(bound * 1e9) for bound in vllm} <= set(INTER_TOKEN_BOUNDS_NS)


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**11), max_size=50))
def test_gaps_add_up(gaps: list[int]) -> None:
    record = blank()
    record.first_token_ns = record.last_token_ns = now = 1000
    for gap in gaps:
        now += gap
        record.gap(now)
    assert sum(record.inter_token_counts) == len(gaps)
    assert record.inter_token_sum_ns == sum(gaps) == record.last_token_ns - record.first_token_ns
    assert record.inter_token_max_ns == max(gaps, default=0)


@pytest.mark.parametrize("index", range(len(INTER_TOKEN_BOUNDS_NS)))
def test_a_bound_belongs_to_its_bucket(index: int) -> None:
    bound = INTER_TOKEN_BOUNDS_NS[index]
    for gap, bucket in ((bound, index), (bound + 1, index + 1)):
        record = blank()
        record.gap(gap)
        assert record.inter_token_counts[bucket] == 1


# --- what the proxy added ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attempts", "times", "added"),
    [
        ([], (10, 0, 0, 30), 20),  # never sent: all of it
        ([Attempt("b", 12, 0, reused=True)], (10, 15, 100, 104), 5 + 4),
        ([Attempt("b", 12, 60)], (10, 65, 100, 104), 55 - 48 + 4),
        ([Attempt("a", 12, ended_ns=50, error="unreachable"), Attempt("b", 51, 60)], (10, 65, 100, 104), 55 - 39 - 9 + 4),
        ([Attempt("a", 12, ended_ns=50, error="unreachable")], (10, 0, 0, 53), 43 - 38),
        ([Attempt("b", 12, 0, reused=True)], (10, 15, 0, 104), 5),  # the client left: nothing was released
    ],
)
def test_what_the_proxy_added(attempts: list[Attempt], times: tuple[int, int, int, int], added: int) -> None:
    record = blank()
    record.attempts = attempts
    record.read_ns, record.sent_ns, record.upstream_ended_ns, record.ended_ns = times
    assert record.proxy_added_ns() == added


WAITED: list[tuple[list[Attempt], int, int]] = [
    ([Attempt("b", 42, reused=True)], 30, 5 + 4),
    ([Attempt("b", 42, 60)], 30, 23 - 18 + 4),
    # A try that failed, and then no room on the other backend for a while.
    ([Attempt("a", 42, ended_ns=45, error="unreachable"), Attempt("b", 60, reused=True)], 30, 5 + 4),
    # There never was any.
    ([], 92, 2),
]


@pytest.mark.parametrize(("attempts", "waited", "added"), WAITED)
def test_waiting_for_room_is_nothing_that_the_proxy_added(attempts: list[Attempt], waited: int, added: int) -> None:
    record = blank()
    record.attempts, record.queued_ns = attempts, 12
    record.read_ns, record.ended_ns = 10, 104
    if attempts:
        record.sent_ns, record.upstream_ended_ns = max(attempts[-1].started_ns, attempts[-1].connected_ns) + 3, 100
    assert (record.wait_ns, record.proxy_added_ns()) == (waited, added)


HIT = {"cache": "hit", "looked_up_ns": 14}
SHARED = {"cache": "coalesced", "looked_up_ns": 14}


@pytest.mark.parametrize(
    ("facts", "added"),
    [
        (HIT, 104 - 10),  # nobody else had a part in it
        ({**HIT, "upstream_ended_ns": 100}, 4 + 4),  # in between it came at the pace that was wanted
        ({**SHARED, "upstream_ended_ns": 100}, 4 + 4),  # between the two it waited for another's answer
        ({**SHARED, "first_token_ns": 50}, 4),  # the client left in the middle of it
        (SHARED, 4),  # or before it began
    ],
)
def test_what_the_proxy_added_to_an_answer_that_was_not_made_for_this_request(facts: dict[str, Any], added: int) -> None:
    record = blank()
    record.read_ns, record.ended_ns = 10, 104
    for name, value in facts.items():
        setattr(record, name, value)
    assert record.proxy_added_ns() == added


# --- where the time went -----------------------------------------------------------------------------------------------


def spent(record: Record) -> list[tuple[str, int]]:
    """The names and how long each was; that they have no gaps is seen on the way."""
    found, at = [], 0
    for name, since, to in named_times(record, record.attempts):
        assert since == at
        at = to
        found.append((name, to - since))
    assert at == record.ended_ns
    return found


def test_waiting_for_room_has_a_name() -> None:
    record = blank()
    record.read_ns, record.authenticated_ns, record.admitted_ns, record.queued_ns = 10, 11, 12, 15
    record.attempts = [Attempt("a", 55, ended_ns=58, error="unreachable"), Attempt("b", 70, 75)]
    record.sent_ns, record.first_token_ns, record.upstream_ended_ns, record.ended_ns = 76, 90, 99, 100
    way = [("read", 10), ("authenticate", 1), ("admit", 1), ("route", 3), ("wait", 40), ("retries", 15), ("connect", 5)]
    assert spent(record) == [*way, ("send", 1), ("prefill", 14), ("decode", 9), ("release", 1)]


def test_whoever_waited_in_vain_waited_to_the_end() -> None:
    record = blank()
    record.read_ns, record.admitted_ns, record.queued_ns, record.ended_ns = 10, 12, 15, 100
    assert spent(record) == [("read", 10), ("admit", 2), ("route", 3), ("wait", 85), ("release", 0)]


def test_waiting_between_two_tries_is_none_before_the_first() -> None:
    record = blank()
    record.queued_ns, record.attempts = 50, [Attempt("a", 42, ended_ns=45, error="unreachable"), Attempt("b", 60)]
    assert record.wait_ns == 0


def test_without_a_queue_nobody_waited() -> None:
    record = blank()
    record.read_ns, record.attempts, record.sent_ns, record.ended_ns = 10, [Attempt("b", 12, reused=True)], 14, 20
    assert record.wait_ns == 0
    assert spent(record) == [("read", 10), ("route", 2), ("send", 2), ("release", 6)]


COMMON = [("read", 10), ("authenticate", 1), ("admit", 1), ("cache", 2)]


@pytest.mark.parametrize(
    ("facts", "way"),
    [
        (HIT, [("release", 90)]),
        (
            {**SHARED, "first_byte_ns": 30, "first_token_ns": 40, "upstream_ended_ns": 99},
            [("coalesce", 26), ("decode", 59), ("release", 5)],
        ),
        # In one piece.
        ({**SHARED, "first_byte_ns": 98, "upstream_ended_ns": 99}, [("coalesce", 84), ("receive", 1), ("release", 5)]),
        # Whoever leaves before it began waited to the end.
        (SHARED, [("coalesce", 90), ("release", 0)]),
        # It began before this request came.
        (
            {**SHARED, "first_byte_ns": 14, "first_token_ns": 14, "upstream_ended_ns": 99},
            [("coalesce", 0), ("decode", 85), ("release", 5)],
        ),
    ],
)
def test_an_answer_that_was_not_made_for_this_request_has_times_of_its_own(
    facts: dict[str, Any], way: list[tuple[str, int]]
) -> None:
    record = blank()
    record.read_ns, record.authenticated_ns, record.admitted_ns, record.ended_ns = 10, 11, 12, 104
    for name, value in facts.items():
        setattr(record, name, value)
    assert spent(record) == [*COMMON, *way]


def test_who_was_looked_up_in_vain_goes_on_like_others() -> None:
    record = blank()
    record.read_ns, record.authenticated_ns, record.admitted_ns, record.ended_ns = 10, 11, 12, 104
    record.cache, record.looked_up_ns = "miss", 14
    record.attempts, record.sent_ns = [Attempt("b", 20, reused=True)], 21
    record.first_byte_ns, record.first_token_ns, record.upstream_ended_ns = 30, 40, 99
    assert spent(record) == [*COMMON, ("route", 6), ("send", 1), ("prefill", 19), ("decode", 59), ("release", 5)]
    assert record.proxy_added_ns() == (21 - 10) + (104 - 99)


# --- the exchange ------------------------------------------------------------------------------------------------------


def exchange() -> Exchange:
    return Exchange(time.monotonic_ns(), b"POST", b"/", {}, b"body", Remembered(), Flow(lambda: None))


def test_an_exchange_has_an_id_of_now_and_a_trace_of_its_own() -> None:
    set_wall_anchor()
    before = time.time_ns()
    made = exchange()
    record = made.record
    assert abs(record.received_unix_ns - before) < 10**9
    assert int.from_bytes(record.id, "big") >> 80 == record.received_unix_ns // 1_000_000
    assert (record.trace_id, record.parent_span_id, record.request_bytes) == (record.id, 0, 4)
    assert 0 < record.span_id < 2**63
    assert made.elapsed_ns() >= 0
    assert not made.accepted


def test_the_first_error_is_the_cause() -> None:
    made = exchange()
    made.fail(UpstreamDisconnected("It closed."))
    made.fail(ClientGone("It left."))
    assert (made.record.outcome, made.record.error_code, made.record.error) == (
        Outcome.UPSTREAM_ERROR,
        "upstream_disconnected",
        "It closed.",
    )


def test_an_error_on_the_record_is_bounded_and_has_a_code() -> None:
    made = exchange()
    made.fail(InvalidRequest("x" * 1000))
    assert (len(made.record.error), made.record.error_code) == (300, "invalid_request_error")
