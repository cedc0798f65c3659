"""What is given again, to whom, and what is said about it, as a transcript."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from proxy.cache.memory import Memory
from proxy.errors import Outcome
from proxy.exchange import UsageSource
from proxy.snapshot import Model, ModelCache, Principal, Purge, SnapshotFile
from tests.support.plane import KEY, OTHER_KEY, Client, Plane
from tests.support.scripted_vllm import captured
from tests.support.wire_client import request
from tests.unit.cache.test_flight import ANSWER, ask, body, line, publish, stream
from tests.unit.test_pipeline import DONE, HEAD, chunk, text, whole

SECOND = 1_000_000_000


@pytest.fixture
def plane(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Plane]:
    with Plane(tmp_path, {"cache": {}, **getattr(request, "param", {})}) as made:
        yield made


def configured(**config: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("plane", [config], indirect=True)


TOOLS = [{"type": "function", "function": {"name": "f"}}]
CHAT = captured.load("chat").body


def says(plane: Plane, data: bytes) -> Client:
    """A request for which an engine may have to be asked, which will say nothing."""
    plane.engine()
    client = plane.client()
    client.says(data)
    return client


def made(plane: Plane, data: bytes | None = None, answer: bytes = whole(CHAT)) -> Client:
    """A request for which an engine has to be asked, answered."""
    engine, client = plane.engine(), plane.client()
    client.says(data or ask())
    assert engine.heard, "no engine was asked"
    engine.says(answer)
    engine.connection.abort()
    return client


def verdict(client: Client) -> str:
    """`made`: an engine has to be asked, and hasn't answered."""
    said = line(client, "x-glasshouse-cache")
    return said if said is not None else "made"


def with_cache_control(data: bytes, value: str) -> bytes:
    return data.replace(b"\r\n\r\n", f"\r\nCache-Control: {value}\r\n\r\n".encode(), 1)


def memory(plane: Plane) -> Memory:
    assert plane.pipeline.cache is not None
    return plane.pipeline.cache.memory


# --- a hit ---------------------------------------------------------------------------------------------------------------


def test_the_same_answer_again(plane: Plane) -> None:
    first, second = made(plane), says(plane, ask())
    assert second.heard.partition(b"\r\n\r\n")[2] == CHAT
    ignored = ("x-request-id", "x-glasshouse-cache", "age")
    kept = [
        [each for each in client.heard.partition(b"\r\n\r\n")[0].decode().split("\r\n") if not each.startswith(ignored)]
        for client in (first, second)
    ]
    assert kept[0] == kept[1]
    assert (verdict(first), verdict(second)) == ("miss", "hit")
    assert line(second, "age") == "0"
    assert line(first, "age") is None
    original, hit = plane.records()
    assert (hit.outcome, hit.status, hit.attempts, hit.cache) == (Outcome.CACHED, 200, [], "hit")
    assert (hit.input_tokens, hit.output_tokens, hit.cost_nano, hit.usage_source) == (0, 0, 0, UsageSource.NONE)
    assert original.output_tokens > 0
    assert (hit.saved_input_tokens, hit.saved_output_tokens) == (original.input_tokens, original.output_tokens)
    assert hit.saved_cost_nano == original.cost_nano > 0
    assert (hit.source_id, hit.source_trace_id, hit.source_span_id) == (original.id, original.trace_id, original.span_id)
    assert hit.finish_reasons == original.finish_reasons
    assert 0 < hit.age_ns < 60 * SECOND
    assert hit.response_bytes == original.response_bytes == len(CHAT)
    assert 0 < hit.admitted_ns <= hit.looked_up_ns <= hit.ended_ns


def test_the_same_stream_again(plane: Plane) -> None:
    answer = HEAD + chunk(text()) + chunk(text(count=2)) + chunk(text("", "stop", 3)) + chunk(DONE) + b"0\r\n\r\n"
    first, second = made(plane, stream(), answer), says(plane, stream())
    assert body(first) == body(second) == ANSWER
    assert (verdict(first), verdict(second)) == ("miss", "hit")


def test_nothing_is_kept_of_a_hit_s_answer_by_its_record(plane: Plane) -> None:
    """What a hit saved is said of each, from the first one's tokens: not of what hits said of themselves."""
    made(plane)
    for _ in range(2):
        says(plane, ask())
    original, *hits = plane.records()
    assert {hit.saved_output_tokens for hit in hits} == {original.output_tokens}
    assert {hit.source_id for hit in hits} == {original.id}


def test_the_head_lines_that_were_meant_for_one(plane: Plane) -> None:
    head = (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\nset-cookie: a=b"
        b"\r\nX-RateLimit-Limit-Requests: 3\r\nretry-after-ms: 5\r\nx-kept: yes\r\nx-request-id: theirs\r\n\r\n" % len(CHAT)
    )
    first, second = made(plane, answer=head + CHAT), says(plane, ask())
    assert verdict(second) == "hit"
    assert b"set-cookie: a=b" in first.heard
    for name in ("set-cookie", "x-ratelimit-limit-requests", "retry-after-ms"):
        assert line(second, name) is None
    assert line(second, "x-kept") == "yes"


@configured(keys={"test": {"requests_per_minute": 100}, "other": {}}, cache={"scope": "everyone"})
def test_the_limits_that_are_told_are_one_s_own(plane: Plane) -> None:
    """Nobody learns of another's limits from an answer that was kept."""
    first = made(plane)
    assert line(first, "x-ratelimit-limit-requests") == "100"
    second = says(plane, ask(OTHER_KEY))
    assert verdict(second) == "hit"
    assert b"x-ratelimit" not in second.heard


@configured(keys={"test": {"tokens_per_minute": 100_000, "budgets": [{"tokens": 100_000, "per": "day"}]}})
def test_a_hit_is_no_expense(plane: Plane) -> None:
    made(plane)
    [standing] = plane.pipeline.admission.standings()
    spent = [account.window.spent for account in standing.accounts]
    says(plane, ask())
    assert [account.window.spent for account in standing.accounts] == spent
    assert [account.window.reserved for account in standing.accounts] == [0]
    assert plane.pipeline.admission.reservations == 0


# --- whether there is one at all --------------------------------------------------------------------------------------------


def test_without_the_section_there_is_none(tmp_path: Path) -> None:
    with Plane(tmp_path) as plane:
        assert verdict(made(plane)) == "made"
        assert verdict(says(plane, ask())) == "made"
        assert [record.cache for record in plane.records()] == [""]


def test_without_a_secret_there_is_none(plane: Plane) -> None:
    publish(plane, lambda file: setattr(file, "cache_secret", b""))
    assert verdict(made(plane)) == "bypass"
    assert verdict(says(plane, ask())) == "made"


def _said(level: str, policy: str) -> dict[str, Any]:
    said: dict[str, dict[str, Any]] = {
        "key": {"keys": {"test": {"cache": policy}}},
        "team": {"keys": {"test": {"team": "t"}}, "teams": {"t": {"cache": policy}}},
        "everyone": {"everyone": {"cache": policy}},
    }
    return said[level]


@pytest.mark.parametrize(
    ("plane", "chance"),
    [
        ({"cache": {"policy": "all"}}, True),
        ({"cache": {"policy": "deterministic"}}, False),
        ({"cache": {"policy": "deterministic"}, **_said("key", "all")}, True),
        ({"cache": {"policy": "all"}, **_said("team", "deterministic")}, False),
        ({"cache": {"policy": "all"}, **_said("everyone", "off")}, None),
        ({"cache": {"policy": "off"}}, None),
        ({"cache": {"policy": "off"}, **_said("everyone", "all")}, True),
    ],
    indirect=["plane"],
)
def test_the_strictest_that_is_said_counts(plane: Plane, chance: bool | None) -> None:
    """`chance`: also what was drawn by chance is given again; None: nothing is."""
    made(plane)
    made(plane, ask(temperature=1))
    assert verdict(says(plane, ask())) == ("hit" if chance is not None else "made")
    assert verdict(says(plane, ask(temperature=1))) == ("hit" if chance else "made")
    assert verdict(says(plane, ask(temperature=1, seed=1))) == "made"


@configured(cache={"policy": "all"})
def test_a_model_has_its_own_word(plane: Plane) -> None:
    def restrict(file: SnapshotFile) -> None:
        file.models["m"] = msgspec.structs.replace(file.models["m"], cache=ModelCache(policy="deterministic", ttl_s=5.0))

    publish(plane, restrict)
    assert verdict(made(plane, ask(temperature=1))) == "bypass"
    made(plane)
    [entry] = memory(plane)._entries.values()
    assert entry.expires_unix_ns - entry.made_unix_ns == 5 * SECOND


# --- whose it is ----------------------------------------------------------------------------------------------------------


def _teams(*of: str) -> dict[str, Any]:
    return {
        "keys": {name: {"team": team} for name, team in zip(("test", "other"), of, strict=True)},
        "teams": {each: {} for each in of},
    }


@pytest.mark.parametrize(
    ("plane", "shared"),
    [
        ({}, False),
        (_teams("t", "t"), False),
        ({"cache": {"scope": "team"}}, False),
        ({"cache": {"scope": "team"}, "keys": {"test": {"team": "t"}, "other": {"team": "t"}}, "teams": {"t": {}}}, True),
        (
            {"cache": {"scope": "team"}, "keys": {"test": {"team": "t"}, "other": {"team": "u"}}, "teams": {"t": {}, "u": {}}},
            False,
        ),
        ({"cache": {"scope": "everyone"}}, True),
    ],
    indirect=["plane"],
)
def test_who_shares_an_answer(plane: Plane, shared: bool) -> None:
    """Failure 57: nobody by default."""
    made(plane)
    assert verdict(says(plane, ask(OTHER_KEY))) == ("hit" if shared else "made")
    assert verdict(says(plane, ask())) == "hit"


def test_another_revision_is_another_model(plane: Plane) -> None:
    made(plane)

    def renew(file: SnapshotFile) -> None:
        file.models["m"] = msgspec.structs.replace(file.models["m"], revision="2")

    publish(plane, renew)
    assert verdict(says(plane, ask())) == "made"


def test_an_alias_is_the_model(plane: Plane) -> None:
    publish(plane, lambda file: file.models.update(a=msgspec.structs.replace(file.models["m"], card=b'{"id":"a"}')))
    made(plane)
    assert verdict(says(plane, ask(model="a"))) == "hit"


def test_a_default_is_part_of_what_is_asked(plane: Plane) -> None:
    def default(file: SnapshotFile, value: bytes = b"0") -> None:
        file.models["m"] = msgspec.structs.replace(file.models["m"], defaults=(("top_k", value),))

    publish(plane, default)
    made(plane)
    assert verdict(says(plane, ask(top_k=0))) == "hit", "the same said by the caller"
    publish(plane, lambda file: default(file, b"5"))
    assert verdict(says(plane, ask())) == "made"


def test_two_tokens_of_one_person_may_be_of_two_teams(tmp_path: Path) -> None:
    with Plane(tmp_path, {"cache": {"scope": "team"}}) as plane:
        cache, snapshot = plane.pipeline.cache, plane.feed.current
        assert cache is not None
        assert snapshot is not None
        model = snapshot.models["m"]
        tenants = [cache._rules_of(Principal("u1", "u1", team), model, snapshot).tenant for team in ("t", "u", "t")]
        assert tenants == ["team:t", "team:u", "team:t"]


def test_a_request_that_began_before_a_change_leaves_nothing_behind(plane: Plane) -> None:
    cache, before = plane.pipeline.cache, plane.feed.current
    assert cache is not None
    assert before is not None
    principal = Principal("key_1", "test")

    def shorten(file: SnapshotFile) -> None:
        file.models["m"] = msgspec.structs.replace(file.models["m"], cache=ModelCache(ttl_s=5.0))

    publish(plane, shorten)
    after = plane.feed.current
    assert after is not None
    for snapshot, ttl_s in ((before, 3600), (after, 5), (before, 3600)):
        assert cache._rules_of(principal, snapshot.models["m"], snapshot).ttl_s == ttl_s


# --- for how long -----------------------------------------------------------------------------------------------------------


def _later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    now = time.time_ns
    monkeypatch.setattr("proxy.cache.cache.time.time_ns", lambda: now() + int(seconds * SECOND))


@configured(cache={"ttl": 60})
def test_for_as_long_as_is_said(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    made(plane)
    _later(monkeypatch, 50)
    assert verdict(says(plane, ask())) == "hit"
    _later(monkeypatch, 20)
    assert verdict(says(plane, ask())) == "made"
    assert (len(memory(plane)), memory(plane).bytes) == (0, 0)


@pytest.mark.parametrize(
    ("purge", "goes"),
    [
        (Purge(2**62), True),
        (Purge(1), False),
        (Purge(2**62, model="m"), True),
        (Purge(2**62, model="n"), False),
        (Purge(2**62, key_id="key_1"), True),
        (Purge(2**62, key_id="key_2"), False),
        (Purge(2**62, team="t"), False),
        (Purge(2**62, user="somebody"), True),
        (Purge(2**62, user="nobody"), False),
        (Purge(2**62, model="m", key_id="key_2"), False),
    ],
)
def test_what_is_withdrawn_isn_t_given_again(plane: Plane, purge: Purge, goes: bool) -> None:
    made(plane, ask(user="somebody"))
    publish(plane, lambda file: setattr(file, "purges", (purge,)))
    memory(plane).tidy(time.time_ns(), (purge,))
    assert len(memory(plane)) == (0 if goes else 1)
    assert verdict(says(plane, ask(user="somebody"))) == ("made" if goes else "hit")


def test_what_is_withdrawn_isn_t_given_again_before_it_is_dropped(plane: Plane) -> None:
    made(plane)
    publish(plane, lambda file: setattr(file, "purges", (Purge(2**62),)))
    assert verdict(says(plane, ask())) == "made"


# --- what a request says ----------------------------------------------------------------------------------------------------


def test_no_store(plane: Plane) -> None:
    """It gets none, and leaves none."""
    assert verdict(made(plane, with_cache_control(ask(), "no-store"))) == "bypass"
    assert len(memory(plane)) == 0
    made(plane)
    assert verdict(made(plane, with_cache_control(ask(), "private, No-Store"))) == "bypass"
    assert [record.cache for record in plane.records()] == ["bypass", "miss", "bypass"]


def test_no_cache(plane: Plane) -> None:
    """It gets a new one, and leaves that."""
    made(plane)
    other = CHAT.replace(b'"index":0', b'"index": 0')
    assert verdict(made(plane, with_cache_control(ask(), "no-cache"), whole(other))) == "miss"
    assert says(plane, ask()).heard.endswith(other)
    [entry] = memory(plane)._entries.values()
    assert memory(plane).bytes == entry.size


def test_no_cache_shares_nothing_that_is_being_made(plane: Plane) -> None:
    engines = [plane.engine(), plane.engine()]
    plane.client().says(ask())
    plane.client().says(with_cache_control(ask(), "no-cache"))
    assert [engine.heard.count(b"POST ") for engine in engines] == [1, 1]


@pytest.mark.parametrize(
    ("said", "after_s", "expected"),
    [
        ("max-age=10", 5, "hit"),
        ("max-age=10", 15, "made"),
        ('max-age="10"', 15, "made"),
        ("max-age=0", 1, "made"),
        ("no-transform, max-age=10", 15, "made"),
        ("max-age=-1", 15, "hit"),
        ("max-age=x", 15, "hit"),
        ("max-age=99999999999999999999", 15, "hit"),
        ("", 15, "hit"),
        ("only-if-cached", 15, "hit"),
    ],
)
def test_max_age(plane: Plane, monkeypatch: pytest.MonkeyPatch, said: str, after_s: int, expected: str) -> None:
    made(plane)
    _later(monkeypatch, after_s)
    assert verdict(says(plane, with_cache_control(ask(), said))) == expected


# --- what isn't kept --------------------------------------------------------------------------------------------------------


def _chat(**choice: Any) -> bytes:
    answer = json.loads(CHAT)
    answer["choices"][0] |= choice
    return json.dumps(answer).encode()


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        pytest.param({}, whole(b'{"error":{"message":"no","code":400}}', b"400 Bad Request"), id="an error"),
        pytest.param({}, whole(_chat(finish_reason="abort")), id="aborted"),
        pytest.param({}, whole(_chat(finish_reason=None)), id="without an end"),
        pytest.param({}, whole(_chat(finish_reason="error")), id="failed"),
        pytest.param(
            {"tools": [{"type": "function", "function": {"name": "f"}}]}, whole(_chat(finish_reason="length")), id="cut"
        ),
        pytest.param({}, whole(b'{"choices":[]}'), id="no answer at all"),
    ],
)
def test_what_is_no_proper_answer_isn_t_kept(plane: Plane, asked: dict[str, Any], answer: bytes) -> None:
    """Failure 57."""
    made(plane, ask(**asked), answer)
    assert len(memory(plane)) == 0


def test_an_answer_to_which_the_length_put_an_end_is_kept(plane: Plane) -> None:
    """It is what would be answered again."""
    made(plane, ask(max_tokens=3), whole(_chat(finish_reason="length")))
    assert verdict(says(plane, ask(max_tokens=3))) == "hit"


@configured(cache={"entry_bytes": 100})
def test_what_is_too_long_isn_t_kept(plane: Plane) -> None:
    made(plane)
    assert len(memory(plane)) == 0


def test_another_model_s_answer_isn_t_kept(plane: Plane) -> None:
    def second(file: SnapshotFile) -> None:
        file.models["m"] = msgspec.structs.replace(file.models["m"], backends=(), fallbacks=("n",))
        file.models["n"] = Model("n", ("b0",), card=b'{"id":"n"}')

    publish(plane, second)
    made(plane)
    [record] = plane.records()
    assert (record.fallback_of, record.model) == ("m", "n")
    assert len(memory(plane)) == 0


def test_a_question_for_which_a_text_is_fetched_isn_t_an_eternal_one(plane: Plane) -> None:
    """Nothing that isn't JSON, or isn't an endpoint with answers to keep."""
    client = says(plane, request("/v1/models", method="GET", key=KEY))
    assert b"x-glasshouse-cache" not in client.heard


# --- its memory ---------------------------------------------------------------------------------------------------------------


@configured(cache={"memory_bytes": 8_000})
def test_those_that_were_asked_for_last_are_kept(plane: Plane) -> None:
    for seed in range(3):
        made(plane, ask(seed=seed))
    says(plane, ask(seed=0))
    kept_here = memory(plane)
    kept = len(kept_here)
    assert kept_here.bytes <= 8_000
    assert 0 < kept <= 3
    while kept_here.evictions == 0:
        kept += 1
        made(plane, ask(seed=100 + kept))
        says(plane, ask(seed=0))
    assert verdict(says(plane, ask(seed=0))) == "hit"
    assert verdict(says(plane, ask(seed=1))) == "made"
    assert kept_here.bytes == sum(entry.size for entry in kept_here._entries.values()) <= 8_000


@configured(cache={"memory_bytes": 8_000})
def test_what_is_larger_than_all_of_it_drives_nobody_out(plane: Plane) -> None:
    made(plane)
    large = json.loads(CHAT)
    large["choices"][0]["message"]["content"] = "x" * 10_000
    made(plane, ask(seed=1), whole(json.dumps(large).encode()))
    assert verdict(says(plane, ask())) == "hit"


@configured(cache={"memory_bytes": 0})
def test_it_may_have_no_memory(plane: Plane) -> None:
    assert verdict(made(plane)) == "miss"
    assert verdict(says(plane, ask())) == "made"
