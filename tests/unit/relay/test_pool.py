"""Kept connections: which one is taken, which one is given up."""

from __future__ import annotations

from time import monotonic_ns

import pytest

from proxy.exchange import Exchange, Remembered
from proxy.flow import Flow
from proxy.relay.connection import UpstreamConnection
from proxy.relay.pool import DRAIN_NS, LARGE_BODY_BYTES, Pool
from proxy.settings import TimeoutSettings
from proxy.snapshot import Backend
from proxy.wire.chat import OPERATION
from proxy.wire.operation import Upstream
from tests.support.plane import Engine

SECOND = 1_000_000_000
IDLE = 4 * SECOND


def pool(backend: Backend | None = None) -> Pool:
    return Pool(backend or Backend("b0", "gpu", 8000), TimeoutSettings(upstream_idle=4.0))


def kept(pool: Pool, now: int) -> Engine:
    """A connection that has been idle since `now`."""
    engine = Engine(UpstreamConnection(pool))
    pool.put(engine.connection, now)
    return engine


def test_an_empty_pool_has_none() -> None:
    assert pool().take(0) is None


def test_the_one_that_was_used_last_is_taken_first() -> None:
    made = pool()
    older, newer = kept(made, 1), kept(made, 2)
    assert made.take(3) is newer.connection
    assert made.take(3) is older.connection
    assert made.take(3) is None


def test_one_that_is_too_old_is_closed_instead() -> None:  # failure 10
    made = pool()
    old, older = kept(made, 2), kept(made, 1)
    assert made.take(IDLE + 3) is None
    assert (old.closed, older.closed) == ("aborted", "aborted")


def test_one_that_is_just_young_enough_is_taken() -> None:
    made = pool()
    engine = kept(made, 1)
    assert made.take(IDLE + 1) is engine.connection


def test_one_that_its_engine_closed_is_not_taken() -> None:
    made = pool()
    kept(made, 1).dies()
    assert made.take(2) is None


def test_one_that_was_closed_and_not_yet_lost_is_not_taken() -> None:
    made = pool()
    kept(made, 1).connection.abort()
    assert made.take(2) is None


def test_a_sweep_closes_what_has_been_idle_too_long() -> None:  # failure 10
    made = pool()
    old, young = kept(made, 1), kept(made, 10)
    made.sweep(IDLE + 5)
    assert (old.closed, young.closed) == ("aborted", "")
    assert made.take(IDLE + 5) is young.connection


def test_an_answer_that_does_not_end_is_waited_for_a_while() -> None:
    made = pool()
    engine = Engine(UpstreamConnection(made))
    engine.connection.leave()
    since = engine.connection.idle_since_ns
    assert made.take(since) is None, "it isn't free yet"
    made.sweep(since + DRAIN_NS)
    assert engine.closed == ""
    made.sweep(since + DRAIN_NS + 1)
    assert engine.closed == "aborted"


def test_closing_closes_everything() -> None:
    made = pool()
    idle, draining = kept(made, 1), Engine(UpstreamConnection(made))
    draining.connection.leave()
    made.close()
    assert (idle.closed, draining.closed) == ("aborted", "aborted")


# --- requests as they go out -------------------------------------------------------------------------------------------


def test_what_was_in_use_when_its_pool_closed_is_closed_after_it() -> None:  # failure 67
    made = pool()
    used, left = Engine(UpstreamConnection(made)), Engine(UpstreamConnection(made))
    made.close()
    made.put(used.connection, 1)
    left.connection.leave()
    assert (used.closed, left.closed) == ("aborted", "aborted")
    assert not made.draining


def exchange() -> Exchange:
    return Exchange(monotonic_ns(), b"POST", b"/", {}, b"", Remembered(), Flow(lambda: None))


def head_of(pool: Pool) -> bytes:
    """Of a request without a body."""
    payload = pool.payload(OPERATION, exchange(), Upstream(b""), 1)
    assert isinstance(payload, bytes)
    return payload


def test_a_request_as_it_goes_out() -> None:
    made = exchange()
    made.record.span_id = 0x10
    assert pool().payload(OPERATION, made, Upstream(b"{}"), 2) == (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: gpu:8000\r\naccept-encoding: identity\r\ncontent-type: application/json\r\n"
        b"content-length: 2\r\nx-request-id: %b-2\r\ntraceparent: 00-%b-0000000000000012-01\r\n\r\n{}"
        % (made.hex_id, made.hex_id)
    )


def test_a_span_never_overflows() -> None:
    made = exchange()
    made.record.span_id = 0xFFFF_FFFF_FFFF_FFFF
    payload = pool().payload(OPERATION, made, Upstream(b""), 1)
    assert isinstance(payload, bytes)
    assert b"-0000000000000000-" in payload


def test_a_large_body_goes_out_beside_its_head_and_is_not_copied() -> None:
    body = b"x" * (LARGE_BODY_BYTES + 1)
    upstream = Upstream(body, content_type=b"text/x", before=b"before")
    head, last = pool().payload(OPERATION, exchange(), upstream, 1)
    assert last is body
    assert isinstance(head, bytes)
    assert b"\r\ncontent-length: %d\r\n" % (len(body) + 6) in head
    assert head.endswith(b"\r\n\r\nbefore")
    small = pool().payload(OPERATION, exchange(), Upstream(body[1:], before=b"before"), 1)
    assert isinstance(small, bytes)
    assert small.endswith(b"\r\n\r\nbefore" + body[1:])


def test_an_address_of_ipv6_is_a_host_in_brackets() -> None:
    assert b"\r\nhost: [::1]:8000\r\n" in head_of(pool(Backend("b", "::1", 8000)))


def test_a_backend_may_have_a_key_and_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_KEY", "secret")
    head = head_of(pool(Backend("b", "gpu", 80, "vllm", "/deep", "ENGINE_KEY")))
    assert head.startswith(b"POST /deep/v1/chat/completions HTTP/1.1\r\nhost: gpu:80\r\n")
    assert b"\r\nauthorization: Bearer secret\r\n" in head


def test_a_key_that_is_not_set_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENGINE_KEY", raising=False)
    assert b"authorization" not in head_of(pool(Backend("b", "gpu", 80, "vllm", "", "ENGINE_KEY")))
