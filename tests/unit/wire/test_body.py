"""A request's top level: what is read of it, and that a rewrite changes nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import InvalidRequest
from proxy.wire.body import StreamOptions, read_object, read_request, with_more_stream_options, with_stream_options, write_object


def test_what_is_read() -> None:
    request = read_request(
        b'{"model":"m","stream":true,"stream_options":{"include_usage":true,"x":1},"n":2,"max_tokens":3,"max_completion_tokens":4,'
        b'"temperature":0.5,"top_p":1,"user":"u","messages":[{"role":"user"}],"prompt":["a" , "b"]}'
    )
    assert (request.model, request.stream, request.n, request.max_tokens, request.max_completion_tokens) == ("m", True, 2, 3, 4)
    assert (request.temperature, request.top_p, request.user) == (0.5, 1.0, "u")
    assert request.stream_options == StreamOptions(include_usage=True)
    assert bytes(request.prompt) == b'["a" , "b"]'


def test_what_is_absent() -> None:
    request = read_request(b'{"model":"m"}')
    assert (request.stream, request.stream_options, request.n, request.max_tokens) == (False, None, None, None)
    assert (request.temperature, request.top_p, request.user, bytes(request.prompt)) == (None, None, None, b"")


@pytest.mark.parametrize("name", ["n", "max_tokens", "max_completion_tokens", "temperature", "top_p", "user", "stream_options"])
@pytest.mark.parametrize("value", ["null", '{"a":[1]}', '["x"]', str(2**70), str(-(2**70)), "1e999"])
def test_what_is_odd_is_the_engines_to_judge(name: str, value: str) -> None:  # failure 37
    request = read_request(b'{"model":"m","stream":true,"%b":%b,"prompt":"p"}' % (name.encode(), value.encode()))
    said = getattr(request, name)
    assert said is None or (name in ("temperature", "top_p") and isinstance(said, float)) or name == "stream_options"
    assert (request.model, request.stream, bytes(request.prompt)) == ("m", True, b'"p"')


@pytest.mark.parametrize("stream", ["false", "null"])
def test_a_stream_that_is_none(stream: str) -> None:
    assert not read_request(b'{"model":"m","n":"odd","stream":%b}' % stream.encode()).stream
    assert not read_request(b'{"model":"m","stream":%b}' % stream.encode()).stream


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b"", None, "isn't valid JSON"),
        (b"{", None, "isn't valid JSON"),
        (b"\xff", None, "isn't valid JSON"),
        (b"[]", None, "must be a JSON object"),
        (b"null", None, "must be a JSON object"),
        (b'"text"', None, "must be a JSON object"),
        (b'{"model":"m"}}', None, "isn't valid JSON"),
        (b'{"model":"m","a":NaN}', None, "isn't valid JSON"),
        (b'{"model":"m","a":Infinity}', None, "isn't valid JSON"),
        (b'{"model":"m",}', None, "isn't valid JSON"),
        (b"{'model':'m'}", None, "isn't valid JSON"),
        (b'\xef\xbb\xbf{"model":"m"}', None, "isn't valid JSON"),
        (b"{}", "model", "`model` must be a string"),
        (b'{"model":null}', "model", "`model` must be a string"),
        (b'{"model":["m"]}', "model", "`model` must be a string"),
        (b'{"model":"m","stream":"true"}', "stream", "`stream` must be true or false"),
        (b'{"model":"m","stream":1}', "stream", "`stream` must be true or false"),
    ],
)
def test_what_the_proxy_cannot_act_on_is_refused(body: bytes, param: str | None, words: str) -> None:  # failure 36
    with pytest.raises(InvalidRequest) as raised:
        read_request(body)
    assert raised.value.param == param
    assert words in raised.value.message


@pytest.mark.parametrize("where", [b'"messages":%b', b'"stream_options":%b', b'"model":%b'])
def test_depth_breaks_nothing(where: bytes) -> None:  # failure 36
    body = b'{"n":"odd",' + where % (b"[" * 100_000 + b"]" * 100_000) + b"}"
    with pytest.raises(InvalidRequest):
        read_request(body)
    with pytest.raises(InvalidRequest):
        read_object(body)


def test_the_last_of_two_models_counts_here_as_it_does_everywhere() -> None:  # failure 36
    body = b'{"model":"a","model":"b"}'
    assert read_request(body).model == json.loads(body)["model"] == "b"


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), _json, max_size=8), st.booleans())
def test_values_keep_their_bytes(said: dict[str, Any], spaced: bool) -> None:
    parts = {
        name: json.dumps(value, indent=1 if spaced else None).encode("utf-8", "surrogatepass") for name, value in said.items()
    }
    body = b"{" + b" , ".join(json.dumps(name).encode() + b" : " + value for name, value in parts.items()) + b"}"
    fields = read_object(body)
    assert {name: bytes(raw) for name, raw in fields.items()} == parts
    assert list(fields) == list(parts)
    again = read_object(write_object(fields))
    assert {name: bytes(raw) for name, raw in again.items()} == parts


WANTED = b'{"include_usage":true,"continuous_usage_stats":true}'


@pytest.mark.parametrize("body", [b'{"model":"m"}', b' \n{ "model" : "m" , "x":1.0E0}'])
def test_options_are_put_first_where_there_were_none(body: bytes) -> None:
    at = body.index(b"{") + 1
    assert with_stream_options(body, WANTED) == body[:at] + b'"stream_options":' + WANTED + b"," + body[at:]


@pytest.mark.parametrize(
    ("said", "sent"),
    [
        (b"{}", WANTED),
        (b"null", WANTED),
        (b'{"include_usage":false}', WANTED),
        (b'{"continuous_usage_stats": true}', b'{"continuous_usage_stats":true,"include_usage":true}'),
        (b'{"x": 1.0E0,"include_usage":null}', b'{"x":1.0E0,"include_usage":true,"continuous_usage_stats":true}'),
        (b'{"include_obfuscation": false}', b'{"include_obfuscation":false,"include_usage":true,"continuous_usage_stats":true}'),
    ],
)
def test_options_join_those_that_were_there_in_their_place(said: bytes, sent: bytes) -> None:
    body = b'{ "model": "m", "stream_options": %b, "x": [1,  2] }' % said
    rewritten = with_more_stream_options(body, WANTED, read_request(body).stream_options)
    assert rewritten == b'{"model":"m","stream_options":%b,"x":[1,  2]}' % sent


def test_options_that_only_looked_to_be_there_are_added() -> None:
    body = b'{"model":"m","tools":[{"stream_options":1}]}'
    rewritten = with_more_stream_options(body, WANTED, None)
    assert rewritten == b'{"model":"m","tools":[{"stream_options":1}],"stream_options":%b}' % WANTED


@pytest.mark.parametrize("said", [b'"text"', b"[]", b"7", b'{"include_usage":"yes"}', b'{"include_usage":1}'])
def test_options_that_cannot_be_read_are_left_alone(said: bytes) -> None:
    body = b'{"model":"m","stream_options":%b}' % said
    assert with_more_stream_options(body, WANTED, read_request(body).stream_options) is None
