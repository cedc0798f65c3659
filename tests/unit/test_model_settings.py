"""What a model's settings do to a request for it: aliases, defaults, and prices that change with time. Bytes in, bytes out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from proxy.exchange import Record
from proxy.snapshot import Bounds, LaterPrice, Model, read_snapshot, write_snapshot
from tests.support.plane import KEY, Engine, Plane
from tests.support.wire_client import request

CHAT: Final = "/v1/chat/completions"
REAL: Final = Model("qwen3-8b", ("b0",), 100_000, 20_000, 400_000, b'{"id":"qwen3-8b"}')
ALIAS: Final = "gpt-4o"
ANSWER: Final = b'{"model":"qwen3-8b","choices":[{"finish_reason":"stop"}],"usage":{"prompt_tokens":7,"completion_tokens":2}}'


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Plane]:
    with Plane(tmp_path) as made:
        yield made


def publish(plane: Plane, model: Model = REAL, **more: Any) -> None:
    """`model` under its own name and an alias."""
    path = plane.settings.snapshot_path
    card = msgspec.structs.replace(model, card=b'{"id":"gpt-4o"}')
    models = {model.name: model, ALIAS: card, **more.pop("models", {})}
    write_snapshot(path, msgspec.structs.replace(read_snapshot(path), revision=2, models=models, **more))
    assert plane.feed.poll()


def sent(plane: Plane, body: bytes, path: str = CHAT, answer: bytes = ANSWER) -> tuple[bytes, Record]:
    """What the engine got, and the record."""
    client, engine = plane.client(), plane.engine()
    client.says(request(path, body, key=KEY))
    got = engine_got(engine)
    engine.says(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(answer), answer))
    assert client.heard.startswith(b"HTTP/1.1 200 OK\r\n"), client.heard
    assert client.heard.endswith(answer), "the engine's own words"
    return got, plane.records()[-1]


def engine_got(engine: Engine) -> bytes:
    head, _, body = engine.heard.partition(b"\r\n\r\n")
    assert b"content-length: %d\r\n" % len(body) in head + b"\r\n"
    return body


# --- aliases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"NAME","messages":[{"content":"gpt-4o"}]}',
        b'{"messages":[{"model":"gpt-4o","content":"\\u00fc \xc3\xbc"}], "x" : 1e400 , "model" :  "NAME" ,"model2":"gpt-4o"}',
        b'\r\n{ "mod\\u0065l"\t:"NAME"}\n',
        b'{"stop":"\\",\\"model\\":\\"gpt-4o","model":"NAME"}',
        b'{"tools":[{"model":"gpt-4o"}],"model":"NAME","n":1}',
    ],
)
def test_an_engine_is_asked_for_the_model_by_its_name_and_gets_all_else_as_it_came(plane: Plane, body: bytes) -> None:
    publish(plane)
    got, record = sent(plane, body.replace(b"NAME", b"gpt-4o"))
    assert got == body.replace(b"NAME", b"qwen3-8b")
    assert (record.model, record.requested_model) == ("qwen3-8b", "gpt-4o")
    got, record = sent(plane, body.replace(b"NAME", b"qwen3-8b"))
    assert got == body.replace(b"NAME", b"qwen3-8b")
    assert (record.model, record.requested_model) == ("qwen3-8b", "")


def test_an_alias_that_is_written_with_escapes(plane: Plane) -> None:
    publish(plane)
    got, record = sent(plane, b'{"model":"\\u0067pt\\u002d4o"}')
    assert got == b'{"model":"qwen3-8b"}'
    assert record.requested_model == "gpt-4o"


def test_a_name_that_has_to_be_written_with_escapes(plane: Plane) -> None:  # failure 33
    publish(plane, msgspec.structs.replace(REAL, name='a"b\\c\r\nüd'))
    got, _ = sent(plane, b'{"model":"gpt-4o","n":1}')
    assert json.loads(got) == {"model": 'a"b\\c\r\nüd', "n": 1}


def test_usage_is_asked_for_beside(plane: Plane) -> None:
    publish(plane)
    client, engine = plane.client(), plane.engine()
    client.says(request(CHAT, b'{"messages":[],"model":"gpt-4o","stream":true}', key=KEY))
    wanted = b'"stream_options":{"include_usage":true,"continuous_usage_stats":true}'
    assert engine_got(engine) == b'{%b,"messages":[],"model":"qwen3-8b","stream":true}' % wanted
    said = b'{"stream_options": {"x":1}, "model":"gpt-4o","stream":true}'
    client, engine = plane.client(), plane.engine()
    client.says(request(CHAT, said, key=KEY))
    merged = b'{"x":1,"include_usage":true,"continuous_usage_stats":true}'
    assert engine_got(engine) == b'{"stream_options": %b, "model":"qwen3-8b","stream":true}' % merged


@pytest.mark.parametrize("first", [True, False])
def test_a_large_body_goes_in_pieces_and_is_not_copied(plane: Plane, first: bool) -> None:
    publish(plane)
    pieces = list[Any]()
    client, engine = plane.client(), plane.engine()
    engine.writelines = pieces.extend  # type: ignore[method-assign, assignment]
    text = b'"messages":[{"content":"%b"}]' % (b"x" * 10_000_000)
    body = b'{"model":"gpt-4o",%b}' % text if first else b'{%b,"model":"gpt-4o"}' % text
    client.says(request(CHAT, body, key=KEY))
    assert b"".join(pieces).partition(b"\r\n\r\n")[2] == body.replace(b"gpt-4o", b"qwen3-8b")
    assert sum(len(each) for each in pieces if isinstance(each, bytes)) < 1000
    assert {bytes(each.obj) for each in pieces if isinstance(each, memoryview)} == {body}, "all of them are of the one body"


def test_a_form_names_the_model_too(plane: Plane) -> None:
    publish(plane)
    part = b'--XX\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
    sound = part % (b"file", b'; filename="a.wav"', b'RIFF name="model"\r\n\r\ngpt-4o')
    body = sound + part % (b"model", b"", b"gpt-4o") + part % (b"prompt", b"", b"gpt-4o") + b"--XX--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=XX"}
    client, engine = plane.client(), plane.engine()
    client.says(request("/v1/audio/transcriptions", body, key=KEY, headers=headers))
    assert engine_got(engine) == body.replace(part % (b"model", b"", b"gpt-4o"), part % (b"model", b"", b"qwen3-8b"))
    engine.says(b'HTTP/1.1 200 OK\r\ncontent-length: 13\r\n\r\n{"text": "x"}')
    assert [(each.model, each.requested_model) for each in plane.records()] == [("qwen3-8b", "gpt-4o")]


def test_a_model_under_two_names_is_the_only_one(plane: Plane) -> None:
    publish(plane)
    got, record = sent(plane, b'{"messages":[]}')
    assert got == b'{"messages":[]}'
    assert (record.model, record.requested_model) == ("qwen3-8b", ""), "it is known by which model it was answered"


def test_of_several_models_one_has_to_be_named(plane: Plane) -> None:
    publish(plane, models={"other": Model("other", ("b0",))})
    client = plane.client()
    client.says(request(CHAT, b'{"messages":[]}', key=KEY))
    assert client.heard.startswith(b"HTTP/1.1 400 ")


def test_a_card_is_asked_for_by_either_name(plane: Plane) -> None:
    publish(plane)
    for name in ("qwen3-8b", ALIAS):
        client = plane.client()
        client.says(request(f"/v1/models/{name}", key=KEY))
        assert client.heard.endswith(b'{"id":"%b"}' % name.encode())
    assert [(each.model, each.requested_model) for each in plane.records()] == [("qwen3-8b", ""), ("qwen3-8b", ALIAS)]


def test_a_url_for_a_model_is_a_model_that_is_not_there(plane: Plane) -> None:  # failure 72
    publish(plane)
    client, engine = plane.client(), plane.engine()
    client.says(request(CHAT, {"model": "http://169.254.169.254/v1", "messages": []}, key=KEY))
    assert client.heard.startswith(b"HTTP/1.1 404 ")
    assert engine.heard == b""


@pytest.mark.parametrize("field", ["api_base", "base_url", "user_config", "custom_llm_provider", "api_key", "litellm_params"])
def test_no_field_says_where_a_request_goes(plane: Plane, field: str) -> None:  # failure 72
    publish(plane)
    elsewhere = {"api_base": "http://169.254.169.254", "base_url": "http://169.254.169.254", "api_key": "sk-x"}
    body = json.dumps(
        {"model": "qwen3-8b", field: elsewhere if field in ("user_config", "litellm_params") else "http://a.b"}
    ).encode()
    got, record = sent(plane, body)
    assert got == body, "it is the engine's to ignore"
    assert [each.backend for each in record.attempts] == ["b0"]


# --- defaults ----------------------------------------------------------------------------------------------------------


def with_defaults(**defaults: Any) -> Model:
    return msgspec.structs.replace(REAL, defaults=tuple((name, msgspec.json.encode(value)) for name, value in defaults.items()))


@pytest.mark.parametrize(
    ("path", "said", "got"),
    [
        (CHAT, b'{"model":"qwen3-8b", "n":2}', b'{"temperature":0.5,"max_tokens":64,"model":"qwen3-8b", "n":2}'),
        (CHAT, b'{ "model":"gpt-4o"}', b'{"temperature":0.5,"max_tokens":64, "model":"qwen3-8b"}'),
        (CHAT, b"{}", b'{"temperature":0.5,"max_tokens":64}'),
        (CHAT, b'{"temperature":null,"max_tokens":null}', None),
        (CHAT, b'{"temperature":1,"max_tokens":9}', None),
        (CHAT, b'{"temperature":1,"max_completion_tokens":9}', None),
        (CHAT, b'{"temperature":1,"max_completion_tokens":null}', None),
        (CHAT, b'{"temperat\\u0075re":1,"max_tokens":1}', None),
        (CHAT, b'{"max_tokens":1,"x":{"temperature":1}}', b'{"temperature":0.5,"max_tokens":1,"x":{"temperature":1}}'),
        ("/v1/completions", b'{"prompt":"x"}', b'{"temperature":0.5,"max_tokens":64,"prompt":"x"}'),
        ("/v1/messages", b'{"max_tokens":7}', b'{"temperature":0.5,"max_tokens":7}'),
        ("/v1/responses", b'{"input":"x"}', b'{"temperature":0.5,"input":"x"}'),
        ("/v1/embeddings", b'{"input":"x"}', b'{"temperature":0.5,"input":"x"}'),
        ("/tokenize", b'{"prompt":"x"}', None),
        ("/v1/messages/count_tokens", b'{"messages":[]}', None),
    ],
)
def test_what_is_not_said_is_added(plane: Plane, path: str, said: bytes, got: bytes | None) -> None:
    publish(plane, with_defaults(temperature=0.5, max_tokens=64))
    assert sent(plane, said, path)[0] == (got or said)


def test_each_api_has_its_own_name_for_the_length_of_an_answer(plane: Plane) -> None:
    publish(plane, with_defaults(max_tokens=64, max_completion_tokens=65, max_output_tokens=66))
    assert sent(plane, b'{"n":1}')[0] == b'{"max_tokens":64,"n":1}'
    got, record = sent(plane, b'{"input":"x"}', "/v1/responses")
    assert got == b'{"max_output_tokens":66,"input":"x"}'
    assert record.max_tokens == 66


def test_the_record_says_what_the_engine_was_asked(plane: Plane) -> None:
    publish(plane, with_defaults(temperature=0.5, top_p=0.9, max_tokens=64, n=3, logprobs=True))
    _, record = sent(plane, b'{"model":"gpt-4o"}')
    assert (record.max_tokens, record.temperature, record.top_p, record.choices) == (64, 0.5, 0.9, 3)
    assert (record.model, record.requested_model) == ("qwen3-8b", "gpt-4o")
    _, record = sent(plane, b'{"max_tokens":5,"temperature":0,"top_p":null,"n":null}')
    assert (record.max_tokens, record.temperature, record.top_p, record.choices) == (5, 0.0, None, 1)
    _, record = sent(plane, b'{"prompt":["a","b"]}', "/v1/completions")
    assert (record.max_tokens, record.choices) == (64, 6)
    _, record = sent(plane, b'{"messages":[],"metadata":{"user_id":"u"}}', "/v1/messages")
    assert (record.max_tokens, record.temperature, record.user) == (64, 0.5, "u")


def test_choices_that_nobody_asked_for_are_waited_for(plane: Plane) -> None:
    """A stream is over when all of them are."""
    publish(plane, with_defaults(n=2))
    client, engine = plane.client(), plane.engine()
    client.says(request(CHAT, b'{"stream":true}', key=KEY))
    end = b'data: {"choices":[{"index":%d,"delta":{},"finish_reason":"stop"}]}\n\n'
    events = [end % 0, end % 1, b"data: [DONE]\n\n"]
    engine.says(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
    engine.says(b"%x\r\n%b\r\n" % (len(events[0]), events[0]))
    assert b'"index":0' in client.heard, "the first to end isn't the last"
    engine.says(b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in events[1:]) + b"0\r\n\r\n")
    assert [each.finish_reasons for each in plane.records()] == [["stop", "stop"]]


def test_bounds_are_for_callers(plane: Plane) -> None:
    publish(plane, msgspec.structs.replace(with_defaults(max_tokens=64), bounds=Bounds(max_tokens=32)))
    assert sent(plane, b'{"n":1}')[0] == b'{"max_tokens":64,"n":1}'
    client = plane.client()
    client.says(request(CHAT, b'{"max_tokens":33}', key=KEY))
    assert client.heard.startswith(b"HTTP/1.1 400 ")


def test_limits_set_aside_what_a_default_allows(tmp_path: Path) -> None:
    with Plane(tmp_path, {"keys": {"test": {"output_tokens_per_minute": 1000}}}) as plane:
        publish(plane, with_defaults(max_tokens=900))
        for status in (b"200", b"429"):
            client, engine = plane.client(), plane.engine()
            client.says(request(CHAT, b'{"n":1}', key=KEY))
            if status == b"429":
                assert client.heard.startswith(b"HTTP/1.1 429 ")
            else:
                assert b'"max_tokens":900' in engine.heard


# --- prices ------------------------------------------------------------------------------------------------------------


def test_a_row_costs_what_was_valid_when_it_was_received(plane: Plane) -> None:
    publish(plane, msgspec.structs.replace(REAL, later_prices=(LaterPrice(1, 200_000, 0, 0), LaterPrice(2**62, 0, 0, 0))))
    assert sent(plane, b"{}")[1].cost_nano == 7 * 200


def test_budgets_set_aside_at_the_price_of_the_moment(tmp_path: Path) -> None:
    budgets = [{"money": "0.001", "per": "total"}]
    with Plane(tmp_path, {"keys": {"test": {"budgets": budgets}}}) as plane:
        publish(plane, msgspec.structs.replace(REAL, later_prices=(LaterPrice(1, 0, 0, 10_000_000_000),)))
        client = plane.client()
        client.says(request(CHAT, b'{"max_tokens":100}', key=KEY))
        assert client.heard.startswith(b"HTTP/1.1 429 "), "100 tokens cost 1"
        assert b"insufficient_quota" in client.heard
