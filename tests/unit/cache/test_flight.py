"""Several who want the same at the same time, as a transcript. Failure 56."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from proxy.errors import Outcome, ShuttingDown
from proxy.exchange import Record, UsageSource
from proxy.snapshot import SnapshotFile, read_snapshot, write_snapshot
from tests.support.plane import KEY, OTHER_KEY, Client, Plane
from tests.support.scripted_vllm import captured
from tests.support.wire_client import request
from tests.unit.test_pipeline import DONE, HEAD, chunk, text, whole

CHAT = "/v1/chat/completions"
END = b"0\r\n\r\n"


@pytest.fixture
def plane(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Plane]:
    with Plane(tmp_path, {"cache": {}, **getattr(request, "param", {})}) as made:
        yield made


def ask(key: str = KEY, **more: Any) -> bytes:
    return request(CHAT, {"model": "m", "messages": [], "temperature": 0, **more}, key=key)


def stream(key: str = KEY, **more: Any) -> bytes:
    return ask(key, stream=True, **more)


def shown(count: int = 1, content: str = "x", finish: str | None = None) -> bytes:
    """The event as a client gets it: it hasn't asked for usage."""
    return text(content, finish, count).replace(b',"usage":{"prompt_tokens":7,"completion_tokens":%d}' % count, b"")


def body(client: Client) -> bytes:
    """What it got of a chunked body, without frames."""
    rest, data = client.heard.partition(b"\r\n\r\n")[2], b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        data, rest = data + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return data


def line(client: Client, name: str) -> str | None:
    head = client.heard.partition(b"\r\n\r\n")[0].decode().lower()
    return next((each.partition(": ")[2] for each in head.split("\r\n") if each.startswith(name + ":")), None)


def by_cache(plane: Plane) -> dict[str, list[Record]]:
    rows: dict[str, list[Record]] = {}
    for record in plane.records():
        rows.setdefault(record.cache, []).append(record)
    return rows


def publish(plane: Plane, change: Callable[[SnapshotFile], None]) -> None:
    """Another snapshot."""
    file = read_snapshot(plane.settings.snapshot_path)
    change(file)
    file.revision += 1
    write_snapshot(plane.settings.snapshot_path, file)
    assert plane.feed.poll()
    plane.pipeline.follow()


ANSWER = shown() + shown(2) + shown(3, "", "stop") + DONE


def test_one_call_for_all_of_them(plane: Plane) -> None:
    engine, clients = plane.engine(), [plane.client() for _ in range(5)]
    for client in clients[:3]:
        client.says(stream())
    assert engine.heard.count(b"POST ") == 1
    engine.says(HEAD + chunk(text()))
    clients[3].says(stream())  # gets what has flowed, at once
    assert body(clients[3]) == shown()
    engine.says(chunk(text(count=2)))
    clients[4].says(stream())
    assert body(clients[4]) == shown() + shown(2)
    engine.says(chunk(text("", "stop", 3)) + chunk(DONE) + END)
    assert engine.heard.count(b"POST ") == 1
    assert [body(client) for client in clients] == [ANSWER] * 5
    assert all(client.heard.endswith(END) for client in clients)
    assert [line(client, "x-glasshouse-cache") for client in clients] == ["miss"] + ["coalesced"] * 4
    assert len({line(client, "x-request-id") for client in clients}) == 5
    assert {line(client, "x-glasshouse-backend") for client in clients} == {"b0"}
    rows = by_cache(plane)
    [made] = rows["miss"]
    assert (made.outcome, made.input_tokens, made.output_tokens, made.cost_nano > 0) == (Outcome.OK, 7, 3, True)
    assert len(rows["coalesced"]) == 4
    for record in rows["coalesced"]:
        assert (record.outcome, record.status, record.attempts) == (Outcome.COALESCED, 200, [])
        assert (record.input_tokens, record.output_tokens, record.cost_nano) == (0, 0, 0)
        assert (record.saved_input_tokens, record.saved_output_tokens, record.saved_cost_nano) == (7, 3, made.cost_nano)
        assert (record.source_id, record.source_trace_id, record.source_span_id) == (made.id, made.trace_id, made.span_id)
        assert record.finish_reasons == ["stop"]
        assert record.usage_source == UsageSource.NONE
        assert 0 <= record.saved_ns <= made.upstream_ended_ns - made.admitted_ns
        assert record.looked_up_ns <= record.first_token_ns <= record.upstream_ended_ns <= record.ended_ns


def test_an_answer_in_one_piece_is_shared_too(plane: Plane) -> None:
    engine, clients = plane.engine(), [plane.client() for _ in range(3)]
    for client in clients:
        client.says(ask())
    answer = captured.load("chat").body
    engine.says(whole(answer))
    assert engine.heard.count(b"POST ") == 1
    assert [client.heard.partition(b"\r\n\r\n")[2] for client in clients] == [answer] * 3


def test_the_rows_of_the_others_come_after_the_first(plane: Plane) -> None:
    """Whoever follows is told of its source's tokens: they must be on record by then."""
    engine, first, second = plane.engine(), plane.client(), plane.client()
    seen: list[list[str]] = []
    first.says(ask())
    second.says(ask())
    first.on_write = second.on_write = lambda data: seen.append([record.cache for record in plane.records()])
    engine.says(whole(captured.load("chat").body))
    assert seen == [["miss"], ["miss", "coalesced"]]


def test_whose_client_leaves_leaves_the_others_alone(plane: Plane) -> None:
    engine, clients = plane.engine(), [plane.client() for _ in range(4)]
    for client in clients:
        client.says(stream())
    engine.says(HEAD + chunk(text()))
    clients[0].leaves()  # the one whose request went to the engine
    clients[2].leaves()
    assert engine.closed == ""
    assert len(plane.pipeline.admission.in_flight) == 3, "the first goes on for the others"
    engine.says(chunk(text(count=2)) + chunk(text("", "stop", 3)) + chunk(DONE) + END)
    assert body(clients[1]) == body(clients[3]) == ANSWER
    assert not plane.pipeline.admission.in_flight
    rows = by_cache(plane)
    [made] = rows["miss"]
    assert (made.outcome, made.output_tokens) == (Outcome.CLIENT_GONE, 3)
    assert sorted(record.outcome for record in rows["coalesced"]) == [Outcome.COALESCED, Outcome.COALESCED, Outcome.CLIENT_GONE]
    later = plane.client()
    later.says(stream())
    assert line(later, "x-glasshouse-cache") == "hit", "it is an answer like any other"


def test_no_other_engine_is_asked_once_something_of_the_answer_has_gone_out(tmp_path: Path) -> None:
    """Also where the one that asked first has nothing of it: what others have is one answer, not two halves."""
    with Plane(tmp_path, {"cache": {}}, backends=2) as plane:
        engines, first, second = [plane.engine("b0"), plane.engine("b1")], plane.client(), plane.client()
        first.says(stream())
        second.says(stream())
        first.leaves()
        [asked, idle] = sorted(engines, key=lambda engine: b"POST" not in engine.heard)
        asked.says(HEAD + chunk(text()))
        asked.dies()
        assert idle.heard == b""
        assert body(second).startswith(shown() + b'data: {"error":')


@pytest.mark.parametrize("last", [0, 1, 2])
def test_the_engine_is_let_go_when_the_last_one_leaves(plane: Plane, last: int) -> None:
    """Failure 1: nobody is left who wants it."""
    engine, clients = plane.engine(), [plane.client() for _ in range(3)]
    for client in clients:
        client.says(stream())
    engine.says(HEAD + chunk(text()))
    for client in [*clients[:last], *clients[last + 1 :]]:
        client.leaves()
        assert engine.closed == ""
    clients[last].leaves()
    assert engine.closed == "aborted"
    plane.engine()
    assert [record.outcome for record in plane.records()] == [Outcome.CLIENT_GONE] * 3
    [made] = by_cache(plane)["miss"]
    assert made.output_tokens == 1
    again = plane.client()
    again.says(stream())
    assert line(again, "x-glasshouse-cache") is None, "it waits for an engine of its own"


def test_everybody_is_told_how_it_failed(plane: Plane) -> None:
    engine, clients = plane.engine(), [plane.client() for _ in range(3)]
    for client in clients:
        client.says(stream())
    engine.says(HEAD + chunk(text()))
    engine.dies()
    assert len({body(client) for client in clients}) == 1
    assert body(clients[1]).startswith(shown() + b'data: {"error":')
    assert not any(client.heard.endswith(END) for client in clients), "nobody may take it for complete"
    assert all(client.closed for client in clients)
    assert [record.outcome for record in plane.records()] == [Outcome.UPSTREAM_ERROR] * 3
    assert {record.error_code for record in plane.records()} == {"upstream_disconnected"}


def test_an_error_event_is_part_of_the_answer(plane: Plane) -> None:
    """It failed for all, and saved nobody anything."""
    engine, clients = plane.engine(), [plane.client() for _ in range(2)]
    for client in clients:
        client.says(stream())
    error = b'data: {"error":{"message":"no","code":500}}\n\n'
    engine.says(HEAD + chunk(text()) + chunk(error) + chunk(DONE) + END)
    assert body(clients[0]) == body(clients[1]) == shown() + error + DONE
    assert [record.outcome for record in plane.records()] == [Outcome.UPSTREAM_ERROR] * 2
    assert [record.saved_output_tokens for record in plane.records()] == [0, 0]


def test_an_answer_whose_end_is_missing_isn_t_kept(plane: Plane) -> None:
    engine = plane.engine()
    plane.client().says(stream())
    engine.says(HEAD + chunk(text()) + chunk(text("", "stop", 2)))
    engine.dies()
    [record] = plane.records()
    assert (record.outcome, record.finish_reasons) == (Outcome.UPSTREAM_ERROR, ["stop"])
    assert plane.pipeline.cache is not None
    assert len(plane.pipeline.cache.memory) == 0


@pytest.mark.parametrize("status", [b"400 Bad Request", b"500 Internal Server Error"])
def test_the_engine_s_own_words_are_everybody_s(plane: Plane, status: bytes) -> None:
    engine, clients = plane.engine(), [plane.client() for _ in range(3)]
    for client in clients:
        client.says(ask())
    said = b'{"error":{"message":"no","type":"BadRequestError","code":%b}}' % status[:3]
    engine.says(whole(said, status))
    assert [client.heard.partition(b"\r\n\r\n")[2] for client in clients] == [said] * 3
    outcome = Outcome.CLIENT_ERROR if status.startswith(b"4") else Outcome.UPSTREAM_ERROR
    assert [record.outcome for record in plane.records()] == [outcome] * 3
    assert [record.saved_output_tokens for record in plane.records()] == [0] * 3
    plane.engine()
    again = plane.client()
    again.says(ask())
    assert again.heard == b""


def test_an_error_of_ours_is_everybody_s(plane: Plane) -> None:
    plane.engine()
    clients = [plane.client() for _ in range(3)]
    for client in clients:
        client.says(ask())
    plane.sweep(later_s=601)
    assert [client.heard.startswith(b"HTTP/1.1 504 ") for client in clients] == [True] * 3
    assert [json.loads(client.heard.partition(b"\r\n\r\n")[2])["error"]["code"] for client in clients] == [
        "first_byte_timeout"
    ] * 3
    assert [record.outcome for record in plane.records()] == [Outcome.TIMEOUT] * 3


def test_when_the_proxy_ends_everybody_is_told(plane: Plane) -> None:
    engine, clients = plane.engine(), [plane.client() for _ in range(3)]
    for client in clients:
        client.says(stream())
    engine.says(HEAD + chunk(text()))
    plane.pipeline.interrupt_all(ShuttingDown("The proxy is shutting down."))
    assert {record.error_code for record in plane.records()} == {"shutting_down"}
    assert len(plane.records()) == 3
    assert not plane.pipeline.admission.in_flight


# --- who reads slowly ---------------------------------------------------------------------------------------------------


def test_who_is_behind_keeps_nobody_waiting(plane: Plane) -> None:
    engine, slow, quick = plane.engine(), plane.client(), plane.client()
    slow.says(stream())
    quick.says(stream())
    engine.says(HEAD + chunk(text()))
    slow.connection.pause_writing()
    engine.says(chunk(text(count=2)))
    assert (body(slow), body(quick)) == (shown(), shown() + shown(2))
    assert engine.reading
    quick.connection.pause_writing()
    assert not engine.reading, "everybody is behind"
    slow.connection.resume_writing()
    assert engine.reading
    assert body(slow) == shown() + shown(2)
    engine.says(chunk(text("", "stop", 3)) + chunk(DONE) + END)
    assert body(slow) == body(quick) == ANSWER, "the end goes to all, however far behind they are"


def test_who_comes_sets_going_what_was_held_up(plane: Plane) -> None:
    engine, slow, quick = plane.engine(), plane.client(), plane.client()
    slow.says(stream())
    engine.says(HEAD + chunk(text()))
    slow.connection.pause_writing()
    assert not engine.reading
    quick.says(stream())
    assert engine.reading


@pytest.mark.parametrize("leading", [True, False])
def test_who_leaves_leaves_those_who_are_behind(plane: Plane, leading: bool) -> None:
    """Nobody takes anything any more: the engine has to wait."""
    engine, clients = plane.engine(), [plane.client(), plane.client()]
    for client in clients:
        client.says(stream())
    engine.says(HEAD + chunk(text()))
    quick, slow = clients if leading else clients[::-1]
    slow.connection.pause_writing()
    quick.leaves()
    assert not engine.reading
    slow.connection.resume_writing()
    assert engine.reading
    slow.connection.pause_writing()
    assert not engine.reading


def test_who_has_left_holds_up_nobody(plane: Plane) -> None:
    engine, slow, quick = plane.engine(), plane.client(), plane.client()
    slow.says(stream())
    quick.says(stream())
    engine.says(HEAD + chunk(text()))
    slow.connection.pause_writing()
    slow.leaves()
    engine.says(chunk(text(count=2)))
    assert body(quick) == shown() + shown(2)
    quick.connection.pause_writing()
    assert not engine.reading


def test_what_came_whole_goes_to_all_also_when_it_breaks(plane: Plane) -> None:
    engine, quick, slow = plane.engine(), plane.client(), plane.client()
    quick.says(stream())
    slow.says(stream())
    engine.says(HEAD + chunk(text()))
    slow.connection.pause_writing()
    engine.says(chunk(text(count=2)))
    engine.dies()
    assert body(slow) == body(quick)
    assert body(slow).startswith(shown() + shown(2) + b'data: {"error":')


def test_the_first_may_be_behind_at_the_end(plane: Plane) -> None:
    engine, slow, quick = plane.engine(), plane.client(), plane.client()
    slow.says(stream())
    quick.says(stream())
    engine.says(HEAD + chunk(text()))
    slow.connection.pause_writing()
    engine.says(chunk(text(count=2)))
    engine.says(chunk(text("", "stop", 3)) + chunk(DONE) + END)
    assert body(slow) == body(quick) == ANSWER


@pytest.mark.parametrize("plane", [{"timeouts": {"client_write": 20}}], indirect=True)
@pytest.mark.parametrize("leading", [True, False])
def test_a_client_that_takes_nothing_is_dropped_alone(plane: Plane, leading: bool) -> None:
    engine, clients = plane.engine(), [plane.client(), plane.client()]
    for client in clients:
        client.says(stream())
    stuck, quick = clients if leading else clients[::-1]
    engine.says(HEAD + chunk(text()))
    stuck.unsent = 70_000
    stuck.connection.pause_writing()
    plane.sweep()
    plane.sweep(later_s=10)
    engine.says(chunk(text(count=2)))
    plane.sweep(later_s=19)
    assert len(plane.records()) == 0
    plane.sweep(later_s=21)
    assert [stuck.closed, engine.closed] == ["aborted", ""]
    stuck.leaves()
    engine.says(chunk(text("", "stop", 3)) + chunk(DONE) + END)
    assert body(quick) == ANSWER
    assert {record.error_code for record in plane.records()} == {"client_stopped_reading", ""}


@pytest.mark.parametrize("plane", [{"timeouts": {"client_write": 20}}], indirect=True)
def test_time_stands_still_for_an_engine_only_when_everybody_is_behind(plane: Plane) -> None:
    engine, slow, quick = plane.engine(), plane.client(), plane.client()
    slow.says(stream())
    quick.says(stream())
    engine.says(HEAD + chunk(text()))
    slow.connection.pause_writing()
    plane.sweep()
    plane.sweep(later_s=59)
    assert slow.closed == "aborted", "it has taken nothing for too long; the other goes on"
    assert len(plane.records()) == 0
    plane.sweep(later_s=61)  # the engine has been silent for a minute, and nobody kept it from speaking
    assert "idle_timeout" in {record.error_code for record in plane.records()}


@pytest.mark.parametrize("plane", [{"cache": {"entry_bytes": 200}}], indirect=True)
def test_what_is_too_long_to_be_kept_is_nobody_else_s(plane: Plane) -> None:
    engine, first, second = plane.engine(), plane.client(), plane.client()
    first.says(stream())
    first.connection.pause_writing()
    engine.says(HEAD + chunk(text()) + chunk(text(count=2)) + chunk(text(count=3)))
    engine.says(chunk(text(count=4)))
    assert not engine.reading, "now it is a stream like any other"
    other = plane.engine()
    second.says(stream())
    assert other.heard.count(b"POST ") == 1, "it has a call of its own"
    first.connection.resume_writing()
    engine.says(chunk(text("", "stop", 5)) + chunk(DONE) + END)
    assert body(first) == shown() + shown(2) + shown(3) + shown(4) + shown(5, "", "stop") + DONE
    third = plane.client()
    third.says(stream())
    assert third.heard == b""


@pytest.mark.parametrize("plane", [{"cache": {"entry_bytes": 200}}], indirect=True)
def test_what_is_too_long_to_be_kept_is_shared_by_those_who_have_it(plane: Plane) -> None:
    engine, clients = plane.engine(), [plane.client(), plane.client()]
    for client in clients:
        client.says(stream())
    engine.says(HEAD + b"".join([chunk(text(count=count)) for count in range(1, 6)]))
    clients[0].leaves()
    engine.says(chunk(text("", "stop", 6)) + chunk(DONE) + END)
    assert body(clients[1]) == b"".join([shown(count) for count in range(1, 6)]) + shown(6, "", "stop") + DONE
    later = plane.client()
    later.says(stream())
    assert b"hit" not in later.heard


# --- who is not one of them ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda: stream(OTHER_KEY), id="another key"),
        pytest.param(lambda: stream(seed=1), id="another request"),
        pytest.param(lambda: ask(), id="another form"),
        pytest.param(lambda: stream(temperature=1), id="an answer drawn by chance"),
        pytest.param(lambda: stream(n=2), id="several answers"),
    ],
)
def test_who_asks_for_something_else_has_a_call_of_its_own(plane: Plane, other: Any) -> None:
    engines = [plane.engine(), plane.engine()]
    plane.client().says(stream())
    plane.client().says(other())
    assert [engine.heard.count(b"POST ") for engine in engines] == [1, 1]


def test_the_newest_that_is_being_made_is_shared(plane: Plane) -> None:
    """One that didn't want an old answer is as good as any for those who come after it."""
    engines = [plane.engine(), plane.engine()]
    newest, first = plane.client(), plane.client()
    first.says(stream())
    newest.says(stream().replace(b"\r\n\r\n", b"\r\nCache-Control: no-cache\r\n\r\n", 1))
    used = next(engine for engine in engines if b"POST" in engine.heard)
    used.says(HEAD + chunk(text("", "stop")) + chunk(DONE) + END)
    assert first.heard or newest.heard
    third = plane.client()
    third.says(stream())
    assert [engine.heard.count(b"POST ") for engine in engines] == [1, 1]


def test_the_order_of_names_and_white_space_are_nothing(plane: Plane) -> None:
    engine, first, second = plane.engine(), plane.client(), plane.client()
    first.says(stream())
    said = b'{ "stream" : true,\n"temperature":0, "messages":[],"model":"m" }'
    second.says(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b" % (KEY.encode(), len(said), said)
    )
    assert engine.heard.count(b"POST ") == 1
    assert len(plane.pipeline.admission.in_flight) == 2


def test_what_is_left_when_all_is_over(plane: Plane) -> None:
    engine = plane.engine()
    clients = [plane.client() for _ in range(3)]
    for client in clients:
        client.says(stream())
    engine.says(HEAD + chunk(text()))
    clients[0].leaves()
    engine.says(chunk(text("", "stop", 2)) + chunk(DONE) + END)
    assert plane.pipeline.cache is not None
    assert not plane.pipeline.cache._flights
    assert not plane.pipeline.admission.in_flight


@pytest.mark.parametrize("plane", [{"cache": {"scope": "everyone"}}], indirect=True)
def test_what_another_model_may_answer_is_shared_only_with_oneself(plane: Plane) -> None:
    """Which models there are to fall back on is for each key to say."""

    def fall_back(file: SnapshotFile) -> None:
        file.models["m"] = msgspec.structs.replace(file.models["m"], fallbacks=("n",))

    publish(plane, fall_back)
    engines = [plane.engine(), plane.engine()]
    for key in (KEY, KEY, OTHER_KEY):
        plane.client().says(stream(key))
    assert [engine.heard.count(b"POST ") for engine in engines] == [1, 1]


@pytest.mark.parametrize("plane", [{"waiting": {"keep_alive": 5}}], indirect=True)
def test_a_sign_of_life_is_for_all(plane: Plane) -> None:
    def narrow(file: SnapshotFile) -> None:
        file.backends["b0"] = msgspec.structs.replace(file.backends["b0"], depth=1)

    publish(plane, narrow)
    plane.engine()
    plane.client().says(stream(seed=1))
    waiting = [plane.client(), plane.client()]
    for client in waiting:
        client.says(stream())
    assert [client.heard for client in waiting] == [b"", b""]
    plane.sweep(later_s=6)
    assert [body(client) for client in waiting] == [b": waiting\n\n"] * 2
