"""A real Phoenix, as `glasshouse up` runs it: it takes our traces, shows what we said, and its costs are the ledger's.

Its environment is built once (see test_embedded.py). Where it can't be had these tests are skipped, unless
GLASSHOUSE_REQUIRE_ALL=1.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from playwright.sync_api import Request, sync_playwright

from collectors.records.spans import count_spans
from proxy import accounting
from proxy.control.catalogue import Catalogue, holding
from proxy.control.database import Database
from proxy.control.discovery import Answer
from proxy.control.forget import Forgotten, forget
from proxy.control.inventory import Inventory
from proxy.embedded import CompanionError
from proxy.embedded.environments import PHOENIX
from proxy.embedded.phoenix import phoenix, trace_url
from proxy.errors import Outcome
from proxy.exchange import Attempt, Record, UsageSource
from proxy.journal import Content, Journal, encode_content
from proxy.pricelist import pricelist
from proxy.store import GLASSHOUSE
from tests.server.test_collectors import Collecting
from tests.server.test_embedded import free_port, prepared, running
from tests.unit.collectors.made import MS, make_coalesced, make_hit, make_record, make_rejected, make_retried
from tests.unit.collectors.test_spans import RANKED, TOOLS, captured
from tests.unit.journal.made import closing, dead_segment, kill

pytestmark = pytest.mark.timeout(900)  # the first run fetches what it needs

PATIENCE = 60.0
PRICES = {"qwen3-8b": {"price": {"input": "0.1", "cached_input": "0.02", "output": "0.4"}}}


@dataclass
class Phoenix:
    url: str

    def _ask(self, method: str, path: str, body: bytes | None = None) -> Any:
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=PATIENCE)
        connection.request(method, path, body, {"content-type": "application/json"} if body else {})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        assert answer.status == 200, content
        return json.loads(content)

    def query(self, text: str) -> Any:
        answer = self._ask("POST", "/graphql", json.dumps({"query": text}).encode())
        assert not answer.get("errors"), answer
        return answer["data"]

    def totals(self, project: str) -> dict[str, Any]:
        """Traces, tokens and costs that Phoenix counts of a project."""
        sums = "costSummary { total { cost tokens } prompt { cost tokens } completion { cost tokens } }"
        found = self.query(f"{{ projects {{ edges {{ node {{ name traceCount recordCount {sums} }} }} }} }}")
        nodes: dict[str, dict[str, Any]] = {edge["node"]["name"]: edge["node"] for edge in found["projects"]["edges"]}
        return nodes.get(project, {"traceCount": 0, "recordCount": 0})

    def spans(self, project: str, trace_id: str) -> list[dict[str, Any]]:
        spans: list[dict[str, Any]] = self._ask("GET", f"/v1/projects/{quote(project)}/spans?limit=100&trace_id={trace_id}")[
            "data"
        ]
        return sorted(spans, key=lambda span: (span["start_time"], span["name"] != "POST /v1/chat/completions"))

    def rates(self) -> dict[str, list[float]]:
        prices = "tokenPrices { tokenType costPerMillionTokens }"
        found = self.query(f"{{ generativeModels(first: 20) {{ edges {{ node {{ name kind {prices} }} }} }} }}")
        nodes = [edge["node"] for edge in found["generativeModels"]["edges"] if edge["node"]["kind"] == "CUSTOM"]
        return {node["name"]: sorted(price["costPerMillionTokens"] for price in node["tokenPrices"]) for node in nodes}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Phoenix]:
    directory = tmp_path_factory.mktemp("phoenix")
    try:
        python = prepared(PHOENIX)
    except CompanionError as error:
        pytest.skip(f"Phoenix can't be had here: {error}")
    port = free_port()
    with running(phoenix(python, directory, port, free_port()), directory / "log"):
        yield Phoenix(f"http://127.0.0.1:{port}")


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.2)


def broken(number: int) -> Record:
    """The engine went in the middle of its answer: an error, and tokens that were spent."""
    attempt = Attempt("gpu-0", 90_000, 0, 39 * MS, 80 * MS, 200, True, "upstream_disconnected")
    said = "The engine's stream ended before the answer was complete."
    outcome = Outcome.UPSTREAM_ERROR
    return make_record(number, attempts=[attempt], outcome=outcome, error_code="upstream_disconnected", error=said)


def gone(number: int) -> Record:
    return make_record(number, outcome=Outcome.CLIENT_GONE, error_code="client_disconnected", finish_reasons=[])


def crashed(number: int) -> Record:
    return make_record(number, outcome=Outcome.CRASHED, error_code="worker_crashed")


def unpriced(number: int) -> Record:
    """A model whose name Phoenix has a price for, and we have none."""
    return make_record(number, model="gpt-4o", cost_nano=0)


def responded(number: int) -> Record:
    return make_record(number, operation="responses", finish_reasons=["completed"])


def heard(number: int) -> Record:
    return make_record(number, operation="transcriptions", usage_source=UsageSource.ESTIMATED, audio_seconds=3)


def measured(number: int) -> Record:
    took = {"input_tokens": 0, "cached_tokens": 0, "output_tokens": 0, "reasoning_tokens": 0, "cost_nano": 0}
    return make_record(number, operation="tokenize", first_token_ns=0, usage_source=UsageSource.NONE, **took)


def ranked(number: int) -> Record:
    """Phoenix counts what is generated, and nothing is here."""
    return make_record(number, operation="rerank", first_token_ns=0, output_tokens=0, reasoning_tokens=0, cost_nano=28_000)


# Phoenix knows a span by its id alone, whatever its project: numbers here are used once.
KINDS = (
    *(make_record, make_retried, make_rejected, broken, gone, crashed, unpriced, responded, heard, measured, ranked),
    *(make_hit, make_coalesced),
)


def capture(collector: Collecting, record: Record, content: Content) -> None:
    journal = Journal(collector.settings.content_path, 1024 * 1024)
    journal.append(encode_content(record.id, content.request, content.answer, 10**6))
    kill(journal)


def test_costs_and_tokens_are_the_ledgers(real: Phoenix, collecting: Callable[..., Collecting]) -> None:
    collector = collecting(phoenix={"url": real.url, "project": "sums"}, models=PRICES).start()
    records = [KINDS[number % len(KINDS)](number) for number in range(10 * len(KINDS))]
    dead_segment(collector.journal_path, *map(closing, records))
    until(lambda: real.totals("sums")["traceCount"] == len(records))
    until(lambda: real.totals("sums")["recordCount"] == collector.metrics().total("spans_exported_total"))
    totals, rows = real.totals("sums"), collector.rows()
    collector.stop()
    assert len(rows) == len(records)
    summary = totals["costSummary"]
    counted = [row for row in rows if row["operation"] != "rerank"]
    assert round(summary["total"]["cost"] * 1e9) == sum(row["cost_nano"] for row in counted) > 0
    assert summary["prompt"]["tokens"] == sum(row["input_tokens"] for row in counted)
    assert summary["completion"]["tokens"] == sum(row["output_tokens"] for row in counted)
    assert real.rates()["qwen3-8b (glasshouse)"] == [0.02, 0.1, 0.4]
    assert real.rates()["gpt-4o (glasshouse)"] == [0, 0, 0]

    # Sent again, as after a kill -9: Phoenix has them already and counts nothing twice.
    (collector.state / "collector-spans").unlink()
    dead_segment(collector.journal_path, *map(closing, records[: 2 * len(KINDS)]))
    collector.start()
    until(lambda: collector.metrics().total("spans_exported_total") > 0 and collector.metrics().total("traces_waiting") == 0)
    dead_segment(collector.journal_path, closing(make_record(1000)))
    until(lambda: real.totals("sums")["traceCount"] == len(records) + 1)
    again = real.totals("sums")["costSummary"]
    assert round((again["total"]["cost"] - summary["total"]["cost"]) * 1e9) == make_record().cost_nano
    collector.stop()


def test_a_price_from_the_price_list_is_the_ledgers_too(real: Phoenix, collecting: Callable[..., Collecting]) -> None:
    """Also under a name that Phoenix has another price for; cached tokens at their own."""
    row = pricelist().rows["gpt-4o-mini"]
    models = {"gpt-4o": {"price": {"from": "gpt-4o-mini"}}, "gpt-4o-mini": {"price": {"from": "gpt-4o-mini"}}}
    collector = collecting("listed", phoenix={"url": real.url, "project": "listed"}, models=models)
    held = holding(collector.settings, Catalogue())
    published = Inventory(collector.settings.bounds, held, None, 0)
    published.known["gpu-0"].answered(Answer("openai", dict.fromkeys(models, b"{}")), 0)
    records = []
    for number in range(20):
        name = list(models)[number % 2]
        tokens = {"input_tokens": 600 + number, "cached_tokens": 31 * number, "output_tokens": 5 + number}
        records.append(make_record(4000 + number, model=name, **tokens))
        accounting.price(records[-1], published.models(0)[name], "USD")
    dead_segment(collector.journal_path, *map(closing, records))
    collector.start()
    until(lambda: real.totals("listed")["traceCount"] == len(records))
    until(lambda: real.totals("listed")["recordCount"] == collector.metrics().total("spans_exported_total"))
    summary, rows = real.totals("listed")["costSummary"], collector.rows()
    collector.stop()

    assert row.cached_input is not None
    paid = sum(
        (each["input_tokens"] - each["cached_tokens"]) * row.input
        + each["cached_tokens"] * row.cached_input
        + each["output_tokens"] * row.output
        for each in rows
    )
    assert sum(row["cost_nano"] for row in rows) == paid * 1000 > 0
    assert round(summary["total"]["cost"] * 1e9) == paid * 1000
    theirs = real.query("{ generativeModels(first: 1000) { edges { node { name kind tokenPrices { costPerMillionTokens } } } } }")
    built_in = [node for edge in theirs["generativeModels"]["edges"] if (node := edge["node"])["name"] == "gpt-4o"]
    assert built_in, "its name was chosen because Phoenix has a price for it"
    assert all(float(row.input) not in [rate["costPerMillionTokens"] for rate in node["tokenPrices"]] for node in built_in)


def test_a_changed_price_reaches_phoenix_before_what_it_is_for(real: Phoenix, collecting: Callable[..., Collecting]) -> None:
    for price, project in (("1", "before"), ("3", "after")):
        models = {"changing": {"price": {"input": price, "output": price}}}
        collector = collecting(project, phoenix={"url": real.url, "project": project}, models=models).start()
        record = make_record(2000 + int(price), model="changing", cached_tokens=0, reasoning_tokens=0)
        dead_segment(collector.journal_path, closing(record))
        until(lambda project=project: real.totals(project)["recordCount"] == 4)  # type: ignore[misc]
        assert round(real.totals(project)["costSummary"]["total"]["cost"] * 1e6) == 605 * int(price)
        collector.stop()
    assert real.rates()["changing (glasshouse)"] == [3, 3, 3]


def test_each_request_has_the_price_of_its_time(real: Phoenix, collecting: Callable[..., Collecting]) -> None:
    records = [make_record(7000 + number, model="dated", cached_tokens=0, reasoning_tokens=0) for number in range(4)]
    moments = [datetime.fromtimestamp(record.received_unix_ns / 1e9, UTC) for record in records]
    prices = [{"valid_from": moments[at].isoformat(), "input": price, "output": price} for at, price in ((1, "10"), (3, "100"))]
    models = {"dated": {"price": {"input": "1", "output": "1"}, "prices": prices}}
    collector = collecting("dated", phoenix={"url": real.url, "project": "dated"}, models=models).start()
    dead_segment(collector.journal_path, *map(closing, records))
    until(lambda: real.totals("dated")["recordCount"] == 16)
    collector.stop()
    assert round(real.totals("dated")["costSummary"]["total"]["cost"] * 1e6) == 605 * (1 + 10 + 10 + 100)


def test_a_person_is_forgotten(real: Phoenix, collecting: Callable[..., Collecting]) -> None:
    """The traces go with all their spans, others' stay, and the ledger's sums are what they were."""
    collector = collecting("forgetful", phoenix={"url": real.url, "project": "forgetful"}, models=PRICES).start()
    hers = [make_record(6000 + number, user_name="ada", user="end") for number in range(5)]
    others = [make_record(6100 + number, user_name="bob") for number in range(2)]
    capture(collector, hers[0], captured("chat_stream_usage"))
    dead_segment(collector.journal_path, *map(closing, [*hers, *others]))
    until(lambda: real.totals("forgetful")["traceCount"] == 7)
    until(lambda: len(collector.rows()) == 7)
    cost = sum(row["cost_nano"] for row in collector.rows())

    async def ask() -> Forgotten:
        database = Database(collector.settings.database_url)
        try:
            return await forget(database, collector.settings.phoenix, "user", "ada", GLASSHOUSE)
        finally:
            await database.close()

    assert asyncio.run(ask()) == Forgotten(requests=5, traces=5)
    until(lambda: real.totals("forgetful")["traceCount"] == 2)
    assert [real.spans("forgetful", record.trace_id.hex()) for record in hers] == [[]] * 5
    assert all(real.spans("forgetful", record.trace_id.hex()) for record in others)
    rows = collector.rows()
    assert sum(row["cost_nano"] for row in rows) == cost
    assert [row["client_address"] for row in rows if row["user_name"] == "ada"] == [""] * 5
    assert asyncio.run(ask()) == Forgotten(), "there is nothing more"
    collector.stop()


def test_a_trace_shows_what_happened(real: Phoenix, collecting: Callable[..., Collecting]) -> None:
    collector = collecting(phoenix={"url": real.url, "project": "shown"}, models=PRICES)
    good, bad = make_record(3001, user="ann"), make_retried(3002, outcome=Outcome.UPSTREAM_ERROR, error_code="bad_gateway")
    bad.attempts[1].error = bad.error_code
    bad.usage_source, bad.error = 0, "The engine's answer makes no sense."
    capture(collector, good, captured("chat_stream_usage"))
    dead_segment(collector.journal_path, closing(good), closing(bad))
    collector.start()
    until(lambda: real.totals("shown")["recordCount"] == 4 + 3)
    collector.stop()

    root, model, prefill, decode = real.spans("shown", good.trace_id.hex())
    assert [span["span_kind"] for span in (root, model, prefill, decode)] == ["CHAIN", "LLM", "CHAIN", "CHAIN"]
    assert [span["name"] for span in (root, model, prefill, decode)] == [
        "POST /v1/chat/completions",
        "chat qwen3-8b",
        "prefill",
        "decode",
    ]
    assert {span["status_code"] for span in (root, model, prefill, decode)} == {"OK"}
    assert root["parent_id"] is None
    assert model["parent_id"] == root["context"]["span_id"]
    assert prefill["parent_id"] == decode["parent_id"] == model["context"]["span_id"]
    assert "first token" in [event["name"] for event in root["events"]]
    for span in (root, model):
        assert span["attributes"]["input.value"] == "What is the capital of France?"
        assert span["attributes"]["output.value"] == "The capital of France is Paris."
        assert span["attributes"]["user.id"] == "ann"
    assert root["attributes"]["metadata.key"] == "search"
    assert root["attributes"]["metadata.timings_ms.prefill"] == 39.68
    said = model["attributes"]
    assert said["llm.input_messages.0.message.content"] == "What is the capital of France?", "Phoenix made it of gen_ai's"
    assert said["llm.output_messages.0.message.content"] == "The capital of France is Paris."
    assert said["llm.token_count.prompt_details.cache_read"] == 400

    root, first, second = real.spans("shown", bad.trace_id.hex())
    assert [span["status_code"] for span in (root, first, second)] == ["ERROR"] * 3
    assert [span["span_kind"] for span in (root, first, second)] == ["CHAIN"] * 3, "no tokens to count"
    assert first["name"] == "attempt gpu-0"
    assert root["events"][-1]["name"] == "exception"
    assert root["status_message"] == "The engine's answer makes no sense."


def test_an_answer_from_the_cache_is_shown_with_its_source_and_costs_nothing(
    real: Phoenix, collecting: Callable[..., Collecting]
) -> None:
    """Phoenix drops links (20.26), so what leads to the original is in attributes."""
    collector = collecting(phoenix={"url": real.url, "project": "cached"}, models=PRICES)
    hit, shared = make_hit(8001, similarity=0.96875), make_coalesced(8002)
    capture(collector, hit, captured("chat_stream_usage"))
    dead_segment(collector.journal_path, closing(hit), closing(shared))
    collector.start()
    until(lambda: real.totals("cached")["recordCount"] == 4)
    collector.stop()
    summary = real.totals("cached")["costSummary"]
    assert (summary["total"]["cost"] or 0, summary["total"]["tokens"] or 0) == (0, 0)
    for record, name in ((hit, "cache"), (shared, "coalesce")):
        root, child = real.spans("cached", record.trace_id.hex())
        assert (root["name"], child["name"]) == ("POST /v1/chat/completions", name)
        assert child["parent_id"] == root["context"]["span_id"]
        assert {span["span_kind"] for span in (root, child)} == {"CHAIN"}
        for span in (root, child):
            assert span["attributes"]["glasshouse.cache"] == record.cache
        said = child["attributes"]
        assert (
            said["glasshouse.source.trace_id"] == record.source_trace_id.hex() == root["attributes"]["metadata.source.trace_id"]
        )
        assert (said["glasshouse.saved.input_tokens"], said["glasshouse.saved.cost"]) == (600, 30_000 / 1e9)
        if record is hit:
            assert (said["glasshouse.source.similarity"], said["glasshouse.source.age_ms"]) == (0.96875, 90_000)
            assert said["output.value"] == root["attributes"]["output.value"] == "The capital of France is Paris."


def test_other_apis_are_shown_as_chats_are(real: Phoenix, collecting: Callable[..., Collecting]) -> None:
    collector = collecting(phoenix={"url": real.url, "project": "apis"}, models=PRICES)
    said = {5000: (responded, TOOLS), 5001: (ranked, RANKED), 5002: (measured, captured("tokenize"))}
    records = {number: make(number) for number, (make, _) in said.items()}
    for number, (_, content) in said.items():
        capture(collector, records[number], content)
    dead_segment(collector.journal_path, *map(closing, records.values()))
    collector.start()
    until(lambda: real.totals("apis")["recordCount"] == sum(count_spans(record) for record in records.values()))
    collector.stop()
    traces = [real.spans("apis", record.trace_id.hex()) for record in records.values()]
    (chat,), (ranking,), (measuring,) = ([span for span in trace if span["name"].endswith(" qwen3-8b")] for trace in traces)
    assert [span["span_kind"] for span in (chat, ranking, measuring)] == ["LLM", "RERANKER", "CHAIN"]
    shown = chat["attributes"]
    assert shown["llm.input_messages.0.message.content"] == "How is the weather?"
    answer = "llm.output_messages.0.message"
    assert shown[f"{answer}.contents.0.message_content.text"] == "Where?"
    assert shown[f"{answer}.tool_calls.0.tool_call.function.name"] == "get_weather"
    assert shown[f"{answer}.tool_calls.0.tool_call.function.arguments"] == '{"city": "Paris"}'
    assert "get_weather" in shown["llm.tools.0.tool.json_schema"]
    shown = ranking["attributes"]
    assert shown["reranker.query"] == "What is the capital of France?"
    assert shown["reranker.input_documents.1.document.content"] == "Paris is."
    assert shown["reranker.output_documents.0.document.content"] == "Paris is."
    assert shown["reranker.output_documents.0.document.score"] == 0.9
    assert (measuring["attributes"]["input.value"], measuring["attributes"]["output.value"]) == ("Hello world", "[2 tokens]")
    assert real.totals("apis")["costSummary"]["total"]["tokens"] == 605, "the chat's alone"


def test_a_person_sees_where_the_time_went(real: Phoenix, collecting: Callable[..., Collecting]) -> None:
    """In a browser, at the address that the request's id leads to: its parts, its tokens, and nothing asked of the outside."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium isn't installed")
    collector = collecting("seen", phoenix={"url": real.url, "project": "seen"}, models=PRICES).start()
    record = make_record(3000)
    dead_segment(collector.journal_path, closing(record))
    until(lambda: real.totals("seen")["recordCount"] == 4)
    collector.stop()
    outside: list[str] = []

    def note(request: Request) -> None:
        if urlsplit(request.url).hostname not in (None, "127.0.0.1"):
            outside.append(request.url)

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-background-networking"])
        page = browser.new_page(viewport={"width": 1400, "height": 860})
        page.on("request", note)
        page.goto(trace_url(real.url, record.trace_id.hex()))
        for part in ("POST /v1/chat/completions", f"chat {record.model}", "prefill", "decode"):
            page.get_by_text(part, exact=True).first.wait_for()
        page.get_by_text(str(record.input_tokens + record.output_tokens), exact=True).first.wait_for()
        browser.close()
    assert outside == []
