"""Which requests would get the same answer again, and which answers are all that was asked for."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest

from proxy.exchange import Record
from proxy.wire.caching import Caching
from proxy.wire.operation import FORM, JSON, EngineOperation
from proxy.wire.operations import OPERATIONS
from proxy.wire.stream import Terms
from tests.support.scripted_vllm import captured

ENGINE: Final[dict[str, EngineOperation[Any]]] = {
    operation.name: operation for operation in OPERATIONS if isinstance(operation, EngineOperation)
}
HI: Final = [{"role": "user", "content": "Hi"}]
FUNCTION: Final = [{"type": "function", "function": {"name": "f"}}]


def caching_of(name: str) -> Caching:
    caching = ENGINE[name].caching
    assert caching is not None
    return caching


def read(name: str, **said: Any) -> tuple[Any, Record, bytes]:
    record, body = Record(b"", b"", 0, 0), json.dumps({"model": "m", **said}).encode()
    return ENGINE[name].read(body, record, JSON), record, body


def test_every_endpoint_has_its_rules() -> None:
    for operation in ENGINE.values():
        assert (operation.caching is None) == (operation.media == FORM)
        assert operation.caching is None or operation.caching.drawn == (not operation.caching.holds) == operation.generates


# -- deterministic --


def deterministic(name: str, **said: Any) -> bool:
    request, _, body = read(name, **said)
    return caching_of(name).deterministic(request, body)


DRAWN: Final = ("chat", "completions", "responses", "messages")


@pytest.mark.parametrize("name", DRAWN)
def test_temperature_zero_settles_it(name: str) -> None:
    assert deterministic(name, temperature=0)
    assert deterministic(name, temperature=0.0, tools=[], top_p=0.5)
    assert not deterministic(name)
    assert not deterministic(name, temperature=None)
    assert not deterministic(name, temperature=0.1)
    assert not deterministic(name, temperature="0")  # an engine's own default may be meant


@pytest.mark.parametrize("name", ["chat", "completions", "responses"])
def test_a_seed_settles_it(name: str) -> None:
    assert deterministic(name, temperature=1, seed=7)
    assert deterministic(name, seed=0)
    for seed in (None, True, "x", 1.5, -1, 2**32 - 1):  # -1 is vLLM's word for none, and llama.cpp's is the largest
        assert not deterministic(name, temperature=1, seed=seed)
    assert not deterministic("messages", seed=7)  # there is no such thing


@pytest.mark.parametrize("name", ["chat", "completions"])
def test_several_choices_are_drawn(name: str) -> None:
    assert deterministic(name, temperature=0, n=1)
    assert not deterministic(name, temperature=0, n=2)
    assert not deterministic(name, seed=1, n=2)
    assert not deterministic("completions", temperature=0, best_of=2)


@pytest.mark.parametrize("name", DRAWN)
def test_what_an_engine_looks_up_may_change(name: str) -> None:
    assert deterministic(name, temperature=0, tools=FUNCTION)
    assert deterministic(name, temperature=0, tools=[{"name": "f", "input_schema": {}}, {"type": "custom", "name": "g"}])
    for tools in ([{"type": "web_search"}], [*FUNCTION, {"type": "mcp"}], [{"type": "web_search_20250305"}], "x", [1]):
        assert not deterministic(name, temperature=0, tools=tools)


@pytest.mark.parametrize("name", ["embeddings", "rerank", "score", "tokenize", "detokenize", "count_tokens"])
def test_what_is_computed_is_never_drawn(name: str) -> None:
    assert deterministic(name, input="Hi")


@pytest.mark.parametrize("name", ["chat", "messages", "embeddings", "score"])
def test_a_file_that_lies_elsewhere_may_change(name: str) -> None:
    def naming(url: str) -> bool:
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "See https://a.example/"}]
        return deterministic(name, temperature=0, messages=[{"role": "user", "content": content}])

    assert not naming("https://a.example/x.png")
    assert not naming("HTTPS://a.example/x.png")
    assert naming("data:image/png;base64,AAAA")


def test_however_the_file_is_named() -> None:
    caching = caching_of("chat")
    request, _, _ = read("chat", temperature=0)
    body = b'{"messages":[{"content":[{"type":"image_url","im\\u0061ge_url":{"u\\u0072l":"https://a.example"}}]}]}'
    assert not caching.deterministic(request, body)
    body = b'{"messages":[{"image_url":"data:,","x":%b}]}' % (b"[" * 5000 + b"]" * 5000)
    assert not caching.deterministic(request, body)


# -- whole --


def whole(name: str, reasons: list[str], **said: Any) -> bool:
    request, record, _ = read(name, **said)
    record.finish_reasons = reasons
    return caching_of(name).whole(request, record)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *(("chat", each) for each in ("stop", "tool_calls", "function_call")),
        ("completions", "stop"),
        ("responses", "completed"),
        *(("messages", each) for each in ("end_turn", "tool_use", "stop_sequence")),
    ],
)
def test_a_proper_finish(name: str, reason: str) -> None:  # failure 57
    assert whole(name, [reason])
    assert whole(name, [reason], tools=FUNCTION)
    assert not whole(name, [])
    assert not whole(name, [reason, reason])


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize(
    "reason",
    [
        "abort",
        "error",
        "unknown",
        "content_filter",
        "refusal",
        "repetition",
        "pause_turn",
        "failed",
        "cancelled",
        "incomplete",
        "",
    ],
)
def test_no_proper_finish(name: str, reason: str) -> None:  # failure 57
    assert not whole(name, [reason])


@pytest.mark.parametrize(
    ("name", "reason"),
    [("chat", "length"), ("completions", "length"), ("responses", "max_output_tokens"), ("messages", "max_tokens")],
)
def test_one_that_was_cut_is_whole_where_no_tool_could_be_called(name: str, reason: str) -> None:  # failure 57
    assert whole(name, [reason])
    assert whole(name, [reason], tools=[])
    assert whole(name, [reason], tools=None)
    assert not whole(name, [reason], tools=FUNCTION)


def test_so_is_one_of_the_older_kind() -> None:  # failure 57
    assert not whole("chat", ["length"], functions=[{"name": "f"}])


def test_every_choice_counts() -> None:  # failure 57
    assert whole("chat", ["stop", "stop"], n=2)
    assert not whole("chat", ["stop"], n=2)
    assert not whole("chat", ["stop", "abort"], n=2)
    assert not whole("chat", ["stop", "length"], n=2, tools=FUNCTION)
    assert whole("completions", ["stop"] * 4, n=2, prompt=["a", "b"])


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", DRAWN)
def test_real_answers(name: str, streamed: bool) -> None:
    """What a real vLLM writes is understood for what it is."""
    operation, seen = ENGINE[name], 0
    for each in captured.names(streamed=streamed):
        answer = captured.load(each)
        if answer.status != 200 or not each.startswith(name) or each == "messages_count":
            continue
        record = Record(b"", b"", 0, 0)
        request = operation.read(answer.request, record, JSON)
        if streamed:
            observer = operation.watch(record, Terms(), limit=1 << 20)
            observer.feed(answer.body, 1)
            observer.end(2)
        else:
            operation.observe(answer.body, record)
        assert caching_of(name).whole(request, record, answer.body), each
        seen += 1
    assert seen


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("embeddings", b'{"object":"list","data":[]}'),
        ("rerank", b'{"results":[]}'),
        ("score", b'{"data":[]}'),
        ("tokenize", b'{"count":2,"tokens":[1,2]}'),
        ("detokenize", b'{"prompt":""}'),
        ("count_tokens", b'{"input_tokens":0}'),
    ],
)
def test_what_is_computed_is_there(name: str, answer: bytes) -> None:
    request, record, _ = read(name)
    rules = caching_of(name)
    assert rules.whole(request, record, answer)
    for other in (
        b'{"error":{"message":"no"}}',
        b"[]",
        b"",
        b"null",
        b"{",
        b'{"data":null,"results":null,"tokens":null}',
        b"\xff",
    ):
        assert not rules.whole(request, record, other)
