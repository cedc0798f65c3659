"""An answer to a question that means the same, over sockets: what is configured, who is asked, what the rows say of it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from proxy.exchange import Record
from proxy.nouns import SYSTEM_KEY
from proxy.snapshot import Model, ModelCache
from tests.support.glasshouse import Glasshouse
from tests.support.redis import Redis, redis_server
from tests.support.redisearch import redisearch_server
from tests.support.scripted_vllm import Script, ScriptedVLLM
from tests.support.wire_client import Reply
from tests.support.wire_client import ask as send
from tests.support.worker import CHAT, MODEL, Worker

WHY, ALIKE, OTHER = "Why is the sky blue?", "What makes the sky blue?", "Who wrote Faust?"
SIMILARITY: Final = 0.96
NEAR: Final = (SIMILARITY, math.sqrt(1 - SIMILARITY**2))
VECTORS: Final[dict[str, tuple[float, ...]]] = {WHY: (1.0, 0.0), ALIKE: NEAR, OTHER: (0.0, 1.0)}
EMBEDDER: Final = "embedder"


@pytest.fixture
def embedder() -> Iterator[ScriptedVLLM]:
    with ScriptedVLLM(models=(EMBEDDER,), default=Script(vectors=VECTORS)) as server:
        yield server


@contextmanager
def serving(directory: Path, vllm: ScriptedVLLM, embedder: ScriptedVLLM, **config: Any) -> Iterator[Worker]:
    """A worker that has the questions to its model embedded. It finds that said when it starts, as after any restart."""
    directory.mkdir(parents=True, exist_ok=True)
    worker = Worker([vllm.url, embedder.url], {"cache": {}, **config}, directory=directory, snapshot=False)
    model = Model(MODEL, ("b0",), 100_000, 20_000, 400_000, b"{}", cache=ModelCache("", "", 0.0, EMBEDDER, 0.95))
    models = {MODEL: model, EMBEDDER: msgspec.structs.replace(model, name=EMBEDDER, backends=("b1",), cache=ModelCache())}
    worker.publish(models=models)
    with worker:
        yield worker


def ask(server: Glasshouse | Worker, text: str, *, stream: bool = False) -> Reply:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0, "stream": stream}
    return send(server.url, CHAT, body, key=server.key)


def verdict(reply: Reply) -> str | None:
    assert (reply.status, reply.ending) == (200, "complete")
    return reply.header("x-glasshouse-cache")


def of_requests(records: list[Record]) -> list[Record]:
    return [record for record in records if record.key_id != SYSTEM_KEY]


def test_what_is_configured_and_what_the_ledger_says(vllm: ScriptedVLLM, embedder: ScriptedVLLM) -> None:
    semantic = {"semantic": {"model": EMBEDDER, "threshold": 0.95}}
    with Glasshouse([vllm.url, embedder.url], {"cache": {}, "models": {MODEL: {"cache": semantic}}}) as glasshouse:
        first, alike, other = (ask(glasshouse, text, stream=True) for text in (WHY, ALIKE, OTHER))
        assert [verdict(each) for each in (first, alike, other)] == ["miss", "hit", "miss"]
        assert alike.body == first.body
        rows = glasshouse.rows(6)
    asked = [row for row in rows if row["key_name"] != SYSTEM_KEY]
    embedded = [row for row in rows if row["key_name"] == SYSTEM_KEY and row["operation"] == "embeddings"]
    assert sorted(row["cache"] for row in asked) == ["hit", "miss", "miss"]
    [hit] = [row for row in asked if row["cache"] == "hit"]
    assert hit["similarity"] == pytest.approx(SIMILARITY, abs=1e-6)
    assert (hit["output_tokens"], hit["cost_nano"]) == (0, 0)
    original = min((row for row in asked if row["cache"] == "miss"), key=lambda row: row["received_at"])
    assert str(hit["source_id"]) == str(original["id"])
    assert [(row["model"], row["outcome"]) for row in embedded] == [(EMBEDDER, "ok")] * 3


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(Script(hang=True), id="hangs"),
        pytest.param(Script(first=5.0), id="slow"),
        pytest.param(Script(body="{}"), id="bad"),
        pytest.param(Script(status=500), id="fails"),
        pytest.param(Script(vectors={WHY: (0.0, 0.0)}), id="no-direction"),
    ],
)
def test_an_embedder_that_does_badly_is_a_miss(tmp_path: Path, vllm: ScriptedVLLM, script: Script) -> None:
    """Failure 45."""
    with ScriptedVLLM(models=(EMBEDDER,), default=script) as embedder, serving(tmp_path, vllm, embedder) as worker:
        assert [verdict(ask(worker, text)) for text in (WHY, WHY)] == ["miss", "hit"]
        assert sum(each.path == CHAT for each in vllm.requests) == 1


def test_an_embedder_that_is_gone_is_a_miss(tmp_path: Path, vllm: ScriptedVLLM, embedder: ScriptedVLLM) -> None:
    with serving(tmp_path, vllm, embedder) as worker:
        assert [verdict(ask(worker, text)) for text in (WHY, ALIKE)] == ["miss", "hit"]
        embedder.stop()
        assert [verdict(ask(worker, text)) for text in (OTHER, WHY)] == ["miss", "hit"]


def test_a_group_that_is_looked_at_in_a_thread(tmp_path: Path, vllm: ScriptedVLLM) -> None:
    """Its vectors are too many for the event loop."""
    size = 4096
    texts = {f"Why {number}?": number for number in range(30)}
    vectors = {text: tuple(float(place == number) for place in range(size)) for text, number in texts.items()}
    vectors["Why on earth 7?"] = tuple(float(place == 7) + 0.01 * (place == 8) for place in range(size))
    default = Script(vectors=vectors)
    with ScriptedVLLM(models=(EMBEDDER,), default=default) as embedder, serving(tmp_path, vllm, embedder) as worker:
        asked = [ask(worker, text) for text in texts]
        assert {verdict(each) for each in asked} == {"miss"}
        near = ask(worker, "Why on earth 7?")
        assert verdict(near) == "hit"
        assert near.body == asked[7].body


@pytest.fixture
def redis() -> Iterator[Redis]:
    with redisearch_server() as server:
        yield server


def test_what_another_worker_was_asked(tmp_path: Path, vllm: ScriptedVLLM, redis: Redis) -> None:
    """Through a Redis that searches: each has a memory of its own."""
    tries = range(100)
    vectors = {f"Why {number}?": tuple(float(place == number) for place in tries) for number in tries}
    vectors |= {f"Why on earth {number}?": vectors[f"Why {number}?"] for number in tries}
    sharing = {"redis": {"url": redis.url, "timeout": 0.1}}
    with (
        ScriptedVLLM(models=(EMBEDDER,), default=Script(vectors=vectors)) as embedder,
        serving(tmp_path / "1", vllm, embedder, **sharing) as one,
        serving(tmp_path / "2", vllm, embedder, **sharing) as two,
    ):
        for number in tries:  # until all of it is connected, and what was kept is written
            first = ask(one, f"Why {number}?")
            time.sleep(0.05)
            near = ask(two, f"Why on earth {number}?")
            assert verdict(first) == "miss"
            if verdict(near) == "hit":
                break
        else:
            pytest.fail("nothing is shared")
        assert near.body == first.body
        [hit] = [record for record in of_requests(two.records(2 * number + 2)) if record.cache == "hit"]
        assert hit.similarity == 1.0


def test_with_a_redis_that_can_t_search(tmp_path: Path, vllm: ScriptedVLLM, embedder: ScriptedVLLM) -> None:
    """Each worker knows its own; what had to make room in its memory may still be in Redis."""
    with redis_server() as plain, serving(tmp_path, vllm, embedder, redis={"url": plain.url}) as worker:
        assert [verdict(ask(worker, text)) for text in (WHY, ALIKE, OTHER)] == ["miss", "hit", "miss"]
