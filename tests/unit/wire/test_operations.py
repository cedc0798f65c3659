"""The table of endpoints, and what each makes of a request and of a whole answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.errors import MethodNotAllowed, NotFound, UpstreamMalformed
from proxy.exchange import EngineTimings, Record, UsageSource
from proxy.wire import chat, completions, embeddings, models
from proxy.wire.operation import (
    JSON,
    EngineOperation,
    Operation,
    Upstream,
    estimate_input,
    estimate_output,
    observe_answer,
    observe_end_of_answer,
)
from proxy.wire.operations import OPERATIONS, find_operation
from proxy.wire.stream import Terms
from proxy.wire.usage import read_usage
from tests.support.scripted_vllm import captured


def blank() -> Record:
    return Record(b"i" * 16, b"t" * 16, 1, 0)


def read(operation: EngineOperation[Any], **body: Any) -> tuple[Any, Record]:
    record = blank()
    return operation.read(json.dumps({"model": "m", **body}).encode(), record, JSON), record


# --- the table ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_every_row_is_found(operation: Operation) -> None:
    assert find_operation(operation.method, operation.path) is operation
    assert find_operation(operation.method, operation.path + b"?api-version=1") is operation


def test_paths_are_unique() -> None:
    assert len({operation.path for operation in OPERATIONS}) == len(OPERATIONS)


@pytest.mark.parametrize("target", [b"/v1/models/m", b"/v1/models/Qwen/Qwen3-8B", b"/v1/models/a%20b?x=1"])
def test_a_model_has_a_path_of_its_own(target: bytes) -> None:
    assert find_operation(b"GET", target) is models.RETRIEVE


@pytest.mark.parametrize(
    "target",
    [
        *(
            b"/",
            b"",
            b"*",
            b"/v1",
            b"/v1/",
            b"/v1/models/",
            b"/v1/models/?x",
            b"/v1/chat/completions/",
            b"/V1/models",
            b"//v1/models",
        ),
        *(
            b"/v1/%6dodels",
            b"/v1/./models",
            b"/v1/models;x",
            b"/metrics",
            b"/sleep",
            b"/v1/load_lora_adapter",
            b"/collective_rpc",
        ),
        *(b"/inference/v1/generate", b"/tokenizer_info", b"/docs", b"http://host/v1/models"),
    ],
)
@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_nothing_else_is_there(method: bytes, target: bytes) -> None:  # failures 35, 73
    with pytest.raises(NotFound) as raised:
        find_operation(method, target)
    assert "Invalid URL" in raised.value.message


def test_a_path_in_an_error_is_harmless() -> None:  # failure 33
    with pytest.raises(NotFound) as raised:
        find_operation(b"GET", b"/\xff\x00<script>" + b"x" * 1000)
    assert "\\xff" in raised.value.message
    assert len(raised.value.message) < 400


@pytest.mark.parametrize(
    ("method", "target"), [(b"GET", b"/v1/embeddings"), (b"POST", b"/v1/models"), (b"POST", b"/v1/models/m")]
)
def test_another_method_is_not_allowed(method: bytes, target: bytes) -> None:
    with pytest.raises(MethodNotAllowed, match=r"allowed: (GET|POST)"):
        find_operation(method, target)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (b"/v1/models/m", "m"),
        (b"/v1/models/Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        (b"/v1/models/Qwen%2FQwen3-8B?x", "Qwen/Qwen3-8B"),
        (b"/v1/models/%C3%A9", "é"),
        (b"/v1/models/%ff", "\ufffd"),
    ],
)
def test_the_name_of_a_model_in_a_path(target: bytes, name: str) -> None:
    assert models.model_name(target) == name


# --- what goes on the record -------------------------------------------------------------------------------------------


def test_a_chat_requests_facts() -> None:
    _, record = read(chat.OPERATION, stream=True, n=2, max_tokens=3, max_completion_tokens=4, temperature=0, top_p=0.9, user="u")
    assert (record.model, record.stream, record.choices, record.max_tokens, record.user) == ("m", True, 2, 4, "u")
    assert (record.temperature, record.top_p) == (0.0, 0.9)


def test_texts_on_the_record_are_bounded() -> None:
    record = blank()
    body = json.dumps({"model": "m" * 1000, "user": "u" * 1000}).encode()
    for operation in (chat.OPERATION, embeddings.OPERATION):
        operation.read(body, record, JSON)
        assert (len(record.model), len(record.user)) == (256, 256)


@pytest.mark.parametrize(("n", "choices"), [(None, 1), (0, 1), (-5, 1), (3, 3), (10**9, 1_000_000)])
def test_choices_are_bounded(n: int | None, choices: int) -> None:  # failure 37
    assert read(chat.OPERATION, n=n)[1].choices == choices


@pytest.mark.parametrize(
    ("prompt", "choices"),
    [
        ("one", 2),
        (["one"], 2),
        (["one", "two"], 4),
        ([[1, 2], [3]], 4),
        ([1, 2, 3], 2),
        ([], 2),
        ([{"a": 1}], 2),
        (None, 2),
        (7, 2),
    ],
    ids=str,
)
def test_a_batch_has_n_choices_for_each_prompt(prompt: object, choices: int) -> None:
    assert read(completions.OPERATION, prompt=prompt, n=2)[1].choices == choices


def test_embeddings_never_stream() -> None:
    request, record = read(embeddings.OPERATION, stream=True, input="x")
    assert (request.stream, record.stream) == (False, False)
    assert embeddings.OPERATION.prepare(b"body", request, "vllm") == Upstream(b"body")


# --- what is asked of the engine ---------------------------------------------------------------------------------------

EVERY = b'"stream_options":{"include_usage":true,"continuous_usage_stats":true}'
LAST = b'"stream_options":{"include_usage":true}'


def prepare(said: bytes, kind: str) -> tuple[bytes, Terms]:
    body = b'{"model":"m"%b}' % (b"," + said if said else b"")
    upstream = chat.OPERATION.prepare(body, chat.OPERATION.read(body, blank(), JSON), kind)
    assert upstream == Upstream(upstream.body, upstream.terms, before=upstream.before, changes=upstream.changes)
    return upstream.whole, upstream.terms


@pytest.mark.parametrize("kind", ["vllm", "openai"])
@pytest.mark.parametrize("said", [b"", b'"stream":false', b'"stream":null', b'"stream":false,' + LAST])
def test_without_a_stream_nothing_is_asked(kind: str, said: bytes) -> None:  # failure 17
    body = b'{"model":"m"%b}' % (b"," + said if said else b"")
    assert prepare(said, kind) == (body, Terms())


def test_vllm_is_asked_for_usage_on_every_chunk() -> None:
    assert prepare(b'"stream":true', "vllm") == (
        b"{" + EVERY + b',"model":"m","stream":true}',
        Terms(cut_usage=True, drop_usage_chunk=True, move_fingerprint=True),
    )


def test_others_are_asked_for_usage_at_the_end() -> None:  # a strict server refuses what it doesn't know
    assert prepare(b'"stream":true', "openai") == (
        b"{" + LAST + b',"model":"m","stream":true}',
        Terms(cut_usage=True, drop_usage_chunk=True),
    )


def test_what_the_client_asked_for_itself_passes() -> None:
    assert prepare(b'"stream":true,' + LAST, "vllm") == (b'{"model":"m","stream":true,' + EVERY + b"}", Terms(cut_usage=True))
    assert prepare(b'"stream":true,' + LAST, "openai") == (b'{"model":"m","stream":true,' + LAST + b"}", Terms())
    for kind in ("vllm", "openai"):
        assert prepare(b'"stream":true,' + EVERY, kind) == (b'{"model":"m","stream":true,' + EVERY + b"}", Terms())


def test_options_that_cannot_be_read_go_as_they_came() -> None:
    said = b'"stream":true,"n":2,"stream_options":"odd"'
    assert prepare(said, "vllm") == (b'{"model":"m",' + said + b"}", Terms(n=2))


def test_how_many_choices_a_prompt_has_is_remembered() -> None:
    assert prepare(b'"stream":true,"n":3', "vllm")[1].n == 3
    assert prepare(b'"stream":true,"n":0', "vllm")[1].n == 1


# --- whole answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cached"),
    [
        ("chat", 0),
        ("chat_n2_logprobs", 0),
        ("completions_batch", 0),
        ("two/per_request_metrics", 32),
        ("llamacpp/completions", 0),
    ],
)
def test_captured_answers_are_understood(name: str, cached: int) -> None:
    record = blank()
    record.choices = 2
    body = captured.load(name).body
    observe_answer(body, record)
    usage = json.loads(body)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (record.input_tokens, record.output_tokens)
    assert record.cached_tokens == cached
    assert record.usage_source == UsageSource.ENGINE
    assert record.finish_reasons == [choice["finish_reason"] for choice in json.loads(body)["choices"]]
    end = blank()
    observe_end_of_answer(body[-1000:], end, read_usage)
    assert (end.input_tokens, end.cached_tokens, end.output_tokens) == (
        record.input_tokens,
        record.cached_tokens,
        record.output_tokens,
    )


def test_an_answers_timings() -> None:
    record = blank()
    observe_answer(captured.load("two/per_request_metrics").body, record)
    assert isinstance(record.engine, EngineTimings)
    record = blank()
    observe_answer(captured.load("llamacpp/chat").body, record)
    assert isinstance(record.engine, EngineTimings)


@pytest.mark.parametrize(
    ("body", "counts"),
    [
        (b"[]", None),
        (b'{"usage":null}', None),
        (b'{"choices":7,"usage":{"prompt_tokens":5,"completion_tokens":2}}', (5, 2)),
        (b'{"usage":{"prompt_tokens":5.5,"completion_tokens":2}}', (0, 2)),
        (b'{"choices":[{"finish_reason":7}],"usage":{"prompt_tokens":0,"completion_tokens":0}}', (0, 0)),
        (b"[" * 100_000, None),
    ],
)
def test_odd_answers(body: bytes, counts: tuple[int, int] | None) -> None:  # failure 16
    record = blank()
    observe_answer(body, record)
    if counts is None:
        assert record.usage_source == UsageSource.NONE
    else:
        assert (record.input_tokens, record.output_tokens, record.usage_source) == (*counts, UsageSource.ENGINE)


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"usage":', b"\xff{}", b"{} {}"])
def test_what_is_no_json_is_no_answer(body: bytes) -> None:  # failure 24
    for operation in OPERATIONS:
        if isinstance(operation, EngineOperation):
            with pytest.raises(UpstreamMalformed):
                operation.observe(body, blank())


@pytest.mark.parametrize(
    ("end", "counts"),
    [
        (b'...}],"usage":{"prompt_tokens":5,"completion_tokens":2},"x":{}}', (5, 2)),
        (b'..."usage":{"prompt_tokens":5,"prompt_tokens_details":{"cached_tokens":1},"completion_tokens":2}}', (5, 2)),
        (b'{"usage":{"prompt_tokens":1}},"usage":{"prompt_tokens":5,"completion_tokens":2}}', (5, 2)),
        (b'..."text":"\\"usage\\":{\\"prompt_tokens\\":9}"}', None),
        (b'..."usage":null}', None),
        (b'..."usage":{"prompt_tokens":5', None),
        (b"...", None),
    ],
)
def test_usage_at_the_end_of_what_was_too_large(end: bytes, counts: tuple[int, int] | None) -> None:
    record = blank()
    observe_end_of_answer(end, record, read_usage)
    assert record.usage_source == (UsageSource.NONE if counts is None else UsageSource.ENGINE)
    assert (record.input_tokens, record.output_tokens) == (counts or (0, 0))


def test_an_estimate_says_that_it_is_one() -> None:
    record = blank()
    record.request_bytes = 401
    estimate_output(record, 83)
    assert (record.input_tokens, record.output_tokens, record.usage_source) == (100, 20, UsageSource.ESTIMATED)
    record = blank()
    record.request_bytes = 401
    estimate_input(record, 83)
    assert (record.input_tokens, record.output_tokens, record.usage_source) == (100, 0, UsageSource.ESTIMATED)
