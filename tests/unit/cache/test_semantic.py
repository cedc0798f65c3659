"""An answer to a question that means the same: who is near, who gets it, and what of all that may fail, as a transcript."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from proxy.cache.semantic import NEIGHBOURS, Index, Vector, nearest, similarity_of, vector_of
from proxy.errors import Outcome, ShuttingDown
from proxy.exchange import Record
from proxy.nouns import SYSTEM_KEY
from proxy.relay import embed
from proxy.snapshot import Model, ModelCache, Purge, SnapshotFile
from tests.support.plane import KEY, OTHER_KEY, Client, Plane
from tests.support.scripted_vllm import captured
from tests.support.wire_client import request
from tests.unit.cache.test_cache import says, verdict, with_cache_control
from tests.unit.cache.test_flight import by_cache, line, publish
from tests.unit.test_pipeline import DONE, HEAD, chunk, text, whole

CHAT = "/v1/chat/completions"
ANSWER = captured.load("chat").body
END = b"0\r\n\r\n"
WHY, ALIKE, OTHER = "Why is the sky blue?", "What makes the sky blue?", "Who wrote Faust?"
SIMILARITY = 0.96
VECTORS = {WHY: [1.0, 0.0], ALIKE: [SIMILARITY, math.sqrt(1 - SIMILARITY**2)], OTHER: [0.0, 3.0]}


# --- vectors ---


def direction(*numbers: float) -> Vector:
    vector = vector_of(numbers)
    assert vector is not None
    return vector


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param([3.0, 4.0], id="usual"),
        pytest.param([3e-320, 4e-320], id="small"),
        pytest.param([3e307, 4e307], id="large"),
        pytest.param([3e200, 4e200], id="square-too-large"),
    ],
)
def test_a_vector_has_length_1(numbers: list[float]) -> None:
    assert np.allclose(direction(*numbers), [0.6, 0.8], atol=1e-3)


@pytest.mark.parametrize(
    "numbers",
    [[], [0.0, 0.0], [math.nan, 1.0], [1.0, math.inf], [-math.inf, 1.0], [1.0] * 65_537],
    ids=lambda each: str(each[:2]),
)
def test_what_has_no_direction(numbers: list[float]) -> None:
    assert vector_of(numbers) is None


def test_what_is_the_same_is_as_similar_as_can_be() -> None:
    """Whatever float32 makes of it: a threshold of 1 can be met, and none is above it."""
    random = np.random.default_rng(1)
    for _ in range(100):
        vector = direction(*random.standard_normal(768))
        assert similarity_of(vector, vector) == 1.0
        index = Index()
        index.put(b"g", b"k", vector)
        assert neighbours(index, vector, 1.0) == [(b"k", 1.0)]


def neighbours(index: Index, vector: Vector, threshold: float = 0.9, group: bytes = b"g") -> list[tuple[bytes, float]]:
    vectors = index.vectors(group, vector)
    return (
        [] if vectors is None else [(*each,) for each in index.at(group, vector, nearest(vectors, vector, threshold), threshold)]
    )


def test_the_nearest_comes_first() -> None:
    index = Index()
    for name, angle in ((b"far", 1.0), (b"near", 0.1), (b"nearer", 0.05), (b"opposite", 3.0)):
        index.put(b"g", name, direction(math.cos(angle), math.sin(angle)))
    found = neighbours(index, direction(1, 0))
    assert [key for key, _ in found] == [b"nearer", b"near"]
    assert found[0][1] == pytest.approx(math.cos(0.05), abs=1e-6)


@pytest.mark.parametrize(("threshold", "there"), [(SIMILARITY, True), (SIMILARITY + 1e-5, False)])
def test_at_the_threshold_it_counts(threshold: float, there: bool) -> None:
    index = Index()
    index.put(b"g", b"k", direction(*VECTORS[ALIKE]))
    assert bool(neighbours(index, direction(1, 0), threshold)) is there


def test_an_index_says_what_a_scan_of_all_says() -> None:
    """However often one came, went and was overwritten."""
    random = np.random.default_rng(2)
    index, all_of_them = Index(), dict[bytes, Vector]()
    for step in range(2000):
        key = b"%d" % random.integers(200)
        if random.random() < 0.4:
            index.drop(b"g", key)
            all_of_them.pop(key, None)
        else:
            all_of_them[key] = direction(*random.standard_normal(8))
            index.put(b"g", key, all_of_them[key])
        assert len(index) == len(all_of_them)
        if step % 20 == 0:
            vector = direction(*random.standard_normal(8))
            expected = sorted(((similarity_of(each, vector), key) for key, each in all_of_them.items()), reverse=True)
            found = [(similarity, key) for key, similarity in neighbours(index, vector, -1)]
            assert [each for each, _ in found] == [each for each, _ in expected[:NEIGHBOURS]]
            assert {key for _, key in found} <= all_of_them.keys()
    for key in all_of_them:
        index.drop(b"g", key)
    assert (len(index), index.bytes) == (0, 0)


def test_groups_are_apart() -> None:
    index = Index()
    index.put(b"g", b"k", direction(1, 0))
    assert neighbours(index, direction(1, 0), group=b"another") == []
    index.drop(b"another", b"k")
    assert len(index) == 1
    index.drop(b"g", b"k")
    assert not index._groups, "one that is empty is none"


def test_of_another_length_is_no_neighbour() -> None:
    index = Index()
    index.put(b"g", b"k", direction(1, 0))
    assert neighbours(index, direction(1, 0, 0)) == []
    assert index.at(b"g", direction(1, 0, 0), [0], 0.5) == []


def test_another_length_begins_anew() -> None:
    """A model that embeds otherwise than before: what it said then is of no use any more."""
    index = Index()
    index.put(b"g", b"old", direction(1, 0))
    index.put(b"g", b"new", direction(1, 0, 0))
    assert len(index) == 1
    assert [key for key, _ in neighbours(index, direction(1, 0, 0))] == [b"new"]
    index.drop(b"g", b"new")
    assert index.bytes == 0


def test_an_index_is_bounded() -> None:
    """What was of use longest ago goes, of the group that was of use longest ago."""
    one = Index()
    one.put(b"g", b"k", direction(1, 0))
    index = Index(4 * one.bytes)
    for group, key in ((b"a", b"1"), (b"a", b"2"), (b"b", b"3"), (b"b", b"4")):
        index.put(group, key, direction(1, 0))
    index.vectors(b"a", direction(1, 0))
    index.used(b"b", b"3")
    index.put(b"c", b"5", direction(1, 0))
    assert index.bytes == 4 * one.bytes
    assert [key for key, _ in neighbours(index, direction(1, 0), group=b"b")] == [b"3"]
    assert len(neighbours(index, direction(1, 0), group=b"a")) == 2
    index.put(b"c", b"6", direction(*range(1, 500)))
    assert len(index) == 4, "it takes more than there may be"


def test_a_matrix_shrinks_with_what_is_in_it() -> None:
    index = Index()
    for number in range(1000):
        index.put(b"g", b"%d" % number, direction(1, number))
    for number in range(990):
        index.drop(b"g", b"%d" % number)
    assert len(index._groups[b"g"].matrix) < 50


def test_what_has_come_meanwhile_isn_t_mistaken() -> None:
    """While somebody looked in a thread, another one took the row."""
    index = Index()
    index.put(b"g", b"near", direction(1, 0))
    index.put(b"g", b"far", direction(0, 1))
    vectors = index.vectors(b"g", direction(1, 0))
    assert vectors is not None
    rows = nearest(vectors, direction(1, 0), 0.9)
    index.drop(b"g", b"near")
    assert index.at(b"g", direction(1, 0), rows, 0.9) == []
    assert index.at(b"g", direction(0, 1), [1], 0.9) == []
    index.drop(b"g", b"far")
    assert index.at(b"g", direction(1, 0), rows, 0.9) == []


def test_numpy_is_only_there_where_a_model_wants_it() -> None:
    look = "import sys, proxy.worker; print([name for name in ('numpy', 'proxy.cache.semantic') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


# --- requests ---


def semantic(file: SnapshotFile, threshold: float = 0.95, **more: Any) -> None:
    """`m` on the first backend has its questions embedded by `e` on the second."""
    model = file.models["m"]
    file.models["m"] = msgspec.structs.replace(model, backends=("b0",), cache=ModelCache("", "", 0.0, "e", threshold), **more)
    file.models["e"] = Model("e", ("b1",), 1000, 1000, 0, b'{"id":"e"}')


@pytest.fixture
def plane(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Plane]:
    with Plane(tmp_path, {"cache": {}, **getattr(request, "param", {})}, backends=2) as made:
        publish(made, semantic)
        yield made


def configured(**config: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("plane", [config], indirect=True)


def question(text: Any = WHY, key: str = KEY, system: str = "Be brief.", **more: Any) -> bytes:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    return request(CHAT, {"model": "m", "messages": messages, "temperature": 0, **more}, key=key)


def embedding(numbers: Any, **more: Any) -> bytes:
    data = [{"index": 0, "object": "embedding", "embedding": numbers}]
    return whole(json.dumps({"data": data, "usage": {"prompt_tokens": 6, "total_tokens": 6}, **more}).encode())


def ask(plane: Plane, data: bytes, vector: Any = None, answer: bytes | None = whole(ANSWER)) -> Client:
    """A question that is embedded, and answered if it has to be."""
    embedding_engine, engine, client = plane.engine("b1"), plane.engine(), plane.client()
    client.says(data)
    if embedding_engine.heard:
        asked = json.loads(embedding_engine.heard.partition(b"\r\n\r\n")[2])
        embedding_engine.says(embedding(vector or VECTORS[asked["input"]]))
    if engine.heard and answer is not None:
        engine.says(answer)
    for each in (embedding_engine, engine):
        each.connection.abort()
    return client


def rows(plane: Plane) -> tuple[list[Record], list[Record]]:
    """Those of requests, and those of what they had embedded."""
    records = plane.records()
    return [each for each in records if each.key_id != SYSTEM_KEY], [each for each in records if each.key_id == SYSTEM_KEY]


def test_a_question_that_means_the_same(plane: Plane) -> None:
    first, second = ask(plane, question()), ask(plane, question(ALIKE))
    assert (verdict(first), verdict(second)) == ("miss", "hit")
    assert second.heard.partition(b"\r\n\r\n")[2] == ANSWER
    (original, hit), _ = rows(plane)
    assert hit.similarity == pytest.approx(SIMILARITY, abs=1e-6)
    assert original.similarity is None
    assert (hit.cache, hit.outcome, hit.attempts) == ("hit", Outcome.CACHED, [])
    assert (hit.source_id, hit.source_trace_id, hit.source_span_id) == (original.id, original.trace_id, original.span_id)
    assert (hit.saved_input_tokens, hit.saved_output_tokens) == (original.input_tokens, original.output_tokens)
    assert (hit.input_tokens, hit.output_tokens, hit.cost_nano) == (0, 0, 0)


def test_one_that_means_something_else(plane: Plane) -> None:
    assert [verdict(ask(plane, question(each))) for each in (WHY, OTHER)] == ["miss", "miss"]
    assert [each.similarity for each in rows(plane)[0]] == [None, None]


@pytest.mark.parametrize(("threshold", "expected"), [(SIMILARITY - 0.001, "hit"), (SIMILARITY + 0.001, "miss")])
def test_the_threshold_is_the_model_s(plane: Plane, threshold: float, expected: str) -> None:
    publish(plane, lambda file: semantic(file, threshold))
    ask(plane, question())
    assert verdict(ask(plane, question(ALIKE))) == expected


def test_what_is_the_same_needs_no_embedding(plane: Plane) -> None:
    ask(plane, question())
    second = says(plane, question())
    assert verdict(second) == "hit"
    requests, embedded = rows(plane)
    assert len(embedded) == 1
    assert requests[1].similarity is None


def test_without_a_model_for_it_nothing_is_embedded(plane: Plane) -> None:
    publish(plane, lambda file: file.models.update(m=msgspec.structs.replace(file.models["m"], cache=ModelCache())))
    assert [verdict(ask(plane, question(each))) for each in (WHY, ALIKE)] == ["miss", "miss"]
    assert rows(plane)[1] == []


def test_a_model_that_nobody_has_embeds_nothing(plane: Plane) -> None:
    publish(plane, lambda file: file.models.__delitem__("e"))
    assert [verdict(ask(plane, question(each))) for each in (WHY, ALIKE)] == ["miss", "miss"]


def test_what_is_no_question_is_not_embedded(plane: Plane) -> None:
    assert verdict(ask(plane, question([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]))) == "miss"
    assert rows(plane)[1] == []


@pytest.mark.parametrize(("directive", "expected"), [("no-store", "bypass"), ("no-cache", "miss"), ("max-age=3600", "hit")])
def test_what_the_request_says_of_caches_holds(plane: Plane, directive: str, expected: str) -> None:
    ask(plane, question())
    assert verdict(ask(plane, with_cache_control(question(ALIKE), directive))) == expected
    assert len(rows(plane)[1]) == (2 if expected == "hit" else 1), "nor is it embedded for nothing"


def test_one_that_is_too_old_for_who_asks(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(plane, question())
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 100 * 10**9)
    assert verdict(ask(plane, with_cache_control(question(ALIKE), "max-age=10"))) == "miss"
    assert verdict(ask(plane, question(ALIKE + " "), VECTORS[ALIKE])) == "hit"


def test_what_is_drawn_by_chance_is_not_compared(plane: Plane) -> None:
    ask(plane, question(temperature=1))
    assert verdict(ask(plane, question(ALIKE, temperature=1))) == "bypass"
    assert rows(plane)[1] == []


# --- never where anything else is different ---


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"key": OTHER_KEY}, id="tenant"),
        pytest.param({"system": "Be long."}, id="system-prompt"),
        pytest.param({"max_tokens": 5}, id="parameter"),
        pytest.param({"tools": [{"type": "function", "function": {"name": "f"}}]}, id="tools"),
        pytest.param({"x-unknown": True}, id="unknown-parameter"),
    ],
)
def test_never_where_anything_else_is_different(plane: Plane, other: dict[str, Any]) -> None:
    ask(plane, question())
    assert verdict(ask(plane, question(ALIKE, **other))) == "miss"
    assert verdict(ask(plane, question(ALIKE))) == "hit"


def test_never_with_another_history(plane: Plane) -> None:
    def after(answer: str, text: str) -> bytes:
        messages = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": text},
        ]
        return request(CHAT, {"model": "m", "messages": messages, "temperature": 0}, key=KEY)

    ask(plane, after("Yes?", WHY))
    assert verdict(ask(plane, after("No!", ALIKE))) == "miss"
    assert verdict(ask(plane, after("Yes?", ALIKE + " "), VECTORS[ALIKE])) == "hit"


def test_never_of_another_model(plane: Plane) -> None:
    publish(plane, lambda file: file.models.update(n=msgspec.structs.replace(file.models["m"], name="n")))
    ask(plane, question())
    assert verdict(ask(plane, question(ALIKE, model="n"))) == "miss"


@pytest.mark.parametrize("name", ["m", "e"])
def test_never_of_another_revision(plane: Plane, name: str) -> None:
    """Of the model that answers, or of the one that embeds: its vectors mean nothing to the former one's."""
    ask(plane, question())
    publish(plane, lambda file: file.models.update({name: msgspec.structs.replace(file.models[name], revision="2")}))
    assert verdict(ask(plane, question(ALIKE))) == "miss"
    assert verdict(ask(plane, question(ALIKE + " "), VECTORS[ALIKE])) == "hit"


def test_never_by_another_model_s_embeddings(plane: Plane) -> None:
    ask(plane, question())

    def change(file: SnapshotFile) -> None:
        file.models["e2"] = msgspec.structs.replace(file.models["e"], name="e2")
        file.models["m"] = msgspec.structs.replace(file.models["m"], cache=ModelCache("", "", 0.0, "e2", 0.95))

    publish(plane, change)
    assert verdict(ask(plane, question(ALIKE))) == "miss"


@configured(keys={"test": {"team": "t"}, "other": {"team": "t"}}, teams={"t": {}}, cache={"scope": "team"})
def test_among_a_team_that_shares(plane: Plane) -> None:
    ask(plane, question())
    assert verdict(ask(plane, question(ALIKE, OTHER_KEY))) == "hit"


# --- what is left of it ---


def test_what_has_ended_is_not_near(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(plane, question())
    later = time.time_ns() + 3601 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: later)
    assert verdict(ask(plane, question(ALIKE), answer=None)) == "made"
    assert len(index(plane)) == 0, "and forgotten"


def test_what_was_withdrawn_is_not_near(plane: Plane) -> None:
    ask(plane, question())
    publish(plane, lambda file: setattr(file, "purges", (Purge(time.time_ns(), key_id="key_1"),)))
    assert verdict(ask(plane, question(ALIKE), answer=None)) == "made"
    assert len(index(plane)) == 0


def test_what_is_withdrawn_while_it_is_embedded(plane: Plane) -> None:
    ask(plane, question())
    embedding_engine, engine, client = plane.engine("b1"), plane.engine(), plane.client()
    client.says(question(ALIKE))
    publish(plane, lambda file: setattr(file, "purges", (Purge(time.time_ns()),)))
    embedding_engine.says(embedding(VECTORS[ALIKE]))
    engine.says(whole(ANSWER))
    assert verdict(client) == "miss"


def test_what_had_to_make_room_is_not_near(plane: Plane) -> None:
    ask(plane, question())
    assert plane.pipeline.cache is not None
    for key in list(plane.pipeline.cache.memory._entries):
        plane.pipeline.cache.memory.drop(key)
    assert verdict(ask(plane, question(ALIKE), answer=None)) == "made"
    assert len(index(plane)) == 0


def test_the_next_one_counts_where_the_nearest_is_gone(plane: Plane) -> None:
    def at(degrees: float) -> list[float]:
        return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]

    ask(plane, question("A?"), at(0))
    ask(plane, question("B?"), at(20))
    memory = plane.pipeline.cache.memory if plane.pipeline.cache is not None else None
    assert memory is not None
    *_, nearest_one = memory._entries
    memory.drop(nearest_one)
    assert verdict(ask(plane, question("C?"), at(11))) == "hit"
    assert rows(plane)[0][-1].similarity == pytest.approx(math.cos(math.radians(11)), abs=1e-6)
    assert len(index(plane)) == 1


def test_what_isn_t_kept_isn_t_indexed(plane: Plane) -> None:
    ask(plane, question(), answer=whole(b'{"choices":[{"index":0,"finish_reason":"abort"}]}'))
    assert index(plane) is None or len(index(plane)) == 0


def test_in_the_other_form(plane: Plane) -> None:
    ask(plane, question())
    client = ask(plane, question(ALIKE, stream=True, stream_options={"include_usage": True}), answer=None)
    assert verdict(client) == "hit"
    assert line(client, "content-type") == "text/event-stream; charset=utf-8"
    assert client.heard.endswith(END)


def index(plane: Plane) -> Index:
    assert plane.pipeline.cache is not None
    assert plane.pipeline.cache.semantic is not None
    return plane.pipeline.cache.semantic.index


# --- what is embedded ---


def test_a_row_of_its_own(plane: Plane) -> None:
    """Booked to nobody's key, and in the trace of whom it was for."""
    ask(plane, question())
    (asked,), (embedded,) = rows(plane)
    assert (embedded.operation, embedded.model, embedded.key_name) == ("embeddings", "e", SYSTEM_KEY)
    assert (embedded.outcome, embedded.status, embedded.cache, embedded.input_tokens) == (Outcome.OK, 200, "", 6)
    assert embedded.cost_nano > 0
    assert [each.backend for each in embedded.attempts] == ["b1"]
    assert (embedded.trace_id, embedded.parent_span_id) == (asked.trace_id, asked.span_id)
    assert embedded.span_id != asked.span_id
    assert embedded.id != asked.id
    assert asked.admitted_ns < asked.looked_up_ns <= asked.attempts[0].started_ns
    assert (asked.attempts[0].backend, len(asked.attempts)) == ("b0", 1)


def test_what_goes_to_the_engine(plane: Plane) -> None:
    engine, client = plane.engine("b1"), plane.client()
    data = question().replace(b"\r\n\r\n", b"\r\ntraceparent: 00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01\r\n\r\n", 1)
    client.says(data)
    head, _, body = engine.heard.partition(b"\r\n\r\n")
    assert json.loads(body) == {"model": "e", "input": WHY, "encoding_format": "float"}
    assert b"traceparent: 00-" + b"a" * 32 in head
    assert KEY.encode() not in head


def test_with_what_the_model_s_settings_add(plane: Plane) -> None:
    publish(
        plane,
        lambda file: file.models.update(e=msgspec.structs.replace(file.models["e"], defaults=(("dimensions", b"256"),))),
    )
    engine, client = plane.engine("b1"), plane.client()
    client.says(question())
    assert json.loads(engine.heard.partition(b"\r\n\r\n")[2])["dimensions"] == 256


@configured(keys={"test": {"requests_per_minute": 1, "concurrent_requests": 1}, "other": {}}, everyone={"models": ["m"]})
def test_no_limit_counts_it(plane: Plane) -> None:
    """Nor who may use which model."""
    client = ask(plane, question())
    assert (verdict(client), line(client, "x-ratelimit-remaining-requests")) == ("miss", "0")
    assert len(rows(plane)[1]) == 1


BAD = [
    pytest.param(whole(b"{}"), id="no-data"),
    pytest.param(whole(b"no JSON"), id="no-JSON"),
    pytest.param(whole(b'{"data":[]}'), id="none"),
    pytest.param(embedding("AAAA"), id="base64"),
    pytest.param(embedding([0.0, 0.0]), id="no-direction"),
    pytest.param(whole(b'{"data":[{"embedding":[1e999,1]}]}'), id="infinite"),
    pytest.param(whole(b'{"data":[{"embedding":[1,0]},{"embedding":[1,0]}]}'), id="two"),
    pytest.param(whole(b'{"error":{"message":"no","code":500}}', b"500 Internal Server Error"), id="an-error"),
    pytest.param(whole(b'{"data":[{"embedding":[1,0]}]}', b"500 Internal Server Error"), id="an-error-with-data"),
    pytest.param(whole(b'{"data":[{"embedding":[1,0]}]}', b"201 Created"), id="another-status"),
    pytest.param(whole(b'{"error":{"message":"too long","code":400}}', b"400 Bad Request"), id="a-refusal"),
]


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_answer_is_a_miss(plane: Plane, bad: bytes) -> None:
    """Failure 45."""
    embedding_engine, engine, client = plane.engine("b1"), plane.engine(), plane.client()
    client.says(question())
    embedding_engine.says(bad)
    engine.says(whole(ANSWER))
    assert verdict(client) == "miss"
    assert client.heard.partition(b"\r\n\r\n")[2] == ANSWER
    assert [each.outcome for each in rows(plane)[0]] == [Outcome.OK]
    assert len(rows(plane)[1]) == 1
    assert len(index(plane)) == 0


def test_an_embedder_that_dies_is_a_miss(plane: Plane) -> None:
    embedding_engine, engine, client = plane.engine("b1"), plane.engine(), plane.client()
    client.says(question())
    embedding_engine.says(b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\n{")
    embedding_engine.dies()
    engine.says(whole(ANSWER))
    assert verdict(client) == "miss"
    assert [each.outcome for each in rows(plane)[1]] == [Outcome.UPSTREAM_ERROR]


def test_one_that_takes_too_long_is_a_miss(plane: Plane) -> None:
    embedding_engine, engine, client = plane.engine("b1"), plane.engine(), plane.client()
    client.says(question())
    plane.sweep(0.5)
    assert not engine.heard
    plane.sweep(1.1)
    assert embedding_engine.closed == "aborted"
    engine.says(whole(ANSWER))
    assert verdict(client) == "miss"
    [embedded] = rows(plane)[1]
    assert (embedded.error_code, embedded.outcome) == ("embedding_late", Outcome.CLIENT_GONE)
    states = {name: standing.health.state.label for name, standing in plane.pipeline.router.standings.items()}
    assert states["b1"] == "up", "that it was late for us says nothing of it"


def test_one_that_failed_is_left_alone(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or all would wait for one that hangs."""
    ask(plane, question(), vector="rubbish")
    assert verdict(ask(plane, question(ALIKE))) == "miss"
    assert len(rows(plane)[1]) == 1, "it wasn't asked"
    monkeypatch.setattr(embed, "REST_NS", 0)
    plane.pipeline.embedder._rests_until.clear()
    ask(plane, question(WHY + " "), VECTORS[WHY])
    assert verdict(ask(plane, question(ALIKE + " "), VECTORS[ALIKE])) == "hit"


def test_a_text_that_is_refused_is_no_reason_to_leave_it_alone(plane: Plane) -> None:
    embedding_engine, engine, client = plane.engine("b1"), plane.engine(), plane.client()
    client.says(question())
    embedding_engine.says(whole(b'{"error":{"message":"too long","code":400}}', b"400 Bad Request"))
    engine.says(whole(ANSWER))
    assert verdict(client) == "miss"
    ask(plane, question(ALIKE))
    assert len(rows(plane)[1]) == 2


# --- who waits meanwhile ---


def test_a_client_that_leaves_while_its_question_is_embedded(plane: Plane) -> None:
    """Failure 1."""
    embedding_engine, engine, client = plane.engine("b1"), plane.engine(), plane.client()
    client.says(question())
    client.leaves()
    assert embedding_engine.closed == "aborted"
    assert not engine.heard
    assert not plane.pipeline.admission.in_flight
    (asked,), (embedded,) = rows(plane)
    assert (asked.outcome, embedded.outcome) == (Outcome.CLIENT_GONE, Outcome.CLIENT_GONE)
    assert verdict(ask(plane, question())) == "miss", "it was no failure of the model's"
    assert len(rows(plane)[1]) == 2


def test_others_who_ask_the_same_wait_with_it(plane: Plane) -> None:
    ask(plane, question())
    embedding_engine, clients = plane.engine("b1"), [plane.client() for _ in range(3)]
    for client in clients:
        client.says(question(ALIKE))
    assert embedding_engine.heard.count(b"POST ") == 1
    embedding_engine.says(embedding(VECTORS[ALIKE]))
    assert [verdict(client) for client in clients] == ["hit", "coalesced", "coalesced"]
    assert [client.heard.partition(b"\r\n\r\n")[2] for client in clients] == [ANSWER] * 3
    for record in by_cache(plane)["coalesced"]:
        assert record.similarity == pytest.approx(SIMILARITY, abs=1e-6)


@pytest.mark.parametrize("near", [True, False])
def test_when_the_first_one_leaves_the_others_get_it(plane: Plane, near: bool) -> None:
    if near:
        ask(plane, question())
    embedding_engine, engine, clients = plane.engine("b1"), plane.engine(), [plane.client() for _ in range(3)]
    for client in clients:
        client.says(question(ALIKE))
    clients[0].leaves()
    assert embedding_engine.closed == ""
    embedding_engine.says(embedding(VECTORS[ALIKE]))
    if not near:
        engine.says(whole(ANSWER))
    assert [client.heard.partition(b"\r\n\r\n")[2] for client in clients[1:]] == [ANSWER] * 2
    assert not plane.pipeline.admission.in_flight


def test_when_all_of_them_leave_it_is_given_up(plane: Plane) -> None:
    embedding_engine, clients = plane.engine("b1"), [plane.client() for _ in range(3)]
    for client in clients:
        client.says(question())
    for client in clients:
        assert embedding_engine.closed == ""
        client.leaves()
    assert embedding_engine.closed == "aborted"
    assert not plane.pipeline.admission.in_flight


def test_who_wants_it_no_more_is_told_nothing(plane: Plane) -> None:
    engine, _, client, snapshot = plane.engine("b1"), plane.engine(), plane.client(), plane.feed.current
    assert snapshot is not None
    client.says(with_cache_control(question(), "no-cache"))
    [asking] = plane.pipeline.admission.in_flight
    said: list[list[float] | None] = []
    plane.pipeline.embedder.embed(WHY, snapshot.models["e"], snapshot, asking, said.append)()
    assert engine.closed == "aborted"
    assert said == []


def test_the_end_of_the_worker_ends_it(plane: Plane) -> None:
    embedding_engine, client = plane.engine("b1"), plane.client()
    client.says(question())
    plane.pipeline.interrupt_all(ShuttingDown("The proxy is shutting down."))
    assert embedding_engine.closed == "aborted"
    assert line(client, "x-glasshouse-cache") is None
    assert client.heard.startswith(b"HTTP/1.1 503 ")


def test_a_stream_of_the_same_meaning(plane: Plane) -> None:
    answer = HEAD + chunk(text()) + chunk(text(count=2)) + chunk(text("", "stop", 3)) + chunk(DONE) + END
    first = ask(plane, question(stream=True), answer=answer)
    second = ask(plane, question(ALIKE, stream=True), answer=None)
    assert (verdict(first), verdict(second)) == ("miss", "hit")
    assert first.heard.partition(b"\r\n\r\n")[2].endswith(END)
    assert second.heard.endswith(END)
