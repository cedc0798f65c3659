"""A request's top level: what is read of it, and that a rewrite changes nothing else."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import InvalidRequest
from proxy.exchange import Record
from proxy.wire import chat
from proxy.wire.body import (
    Reader,
    StreamOptions,
    apply,
    more_stream_options,
    read_object,
    read_stream_options,
    with_stream_options,
    write_object,
)
from proxy.wire.completions import CompletionRequest
from proxy.wire.operation import JSON

read_request = Reader(CompletionRequest)


def test_what_is_read() -> None:
    request = read_request(
        b'{"model":"m","stream":true,"stream_options":{"include_usage":true,"x":1},"n":2,"max_tokens":3,"max_completion_tokens":4,'
        b'"temperature":0.5,"top_p":1,"user":"u","messages":[{"role":"user"}],"prompt":["a" , "b"]}'
    )
    assert (request.model, request.stream, request.n, request.max_tokens, request.max_completion_tokens) == ("m", True, 2, 3, 4)
    assert (request.temperature, request.top_p, request.user) == (0.5, 1.0, "u")
    assert read_stream_options(request.stream_options) == StreamOptions(include_usage=True)
    assert bytes(request.prompt) == b'["a" , "b"]'


def test_what_is_absent() -> None:
    request = read_request(b'{"model":"m"}')
    assert (request.stream, request.n, request.max_tokens) == (False, None, None)
    assert (request.temperature, request.top_p, request.user) == (None, None, None)
    assert (bytes(request.stream_options), bytes(request.prompt)) == (b"", b"")


@pytest.mark.parametrize("name", ["n", "max_tokens", "max_completion_tokens", "temperature", "top_p", "user", "stream_options"])
@pytest.mark.parametrize("value", ["null", '{"a":[1]}', '["x"]', "1.5", '"x"'])
def test_what_is_odd_is_the_engines_to_judge(name: str, value: str) -> None:  # failure 37
    request = read_request(b'{"model":"m","stream":true,"%b":%b,"prompt":"p"}' % (name.encode(), value.encode()))
    said = getattr(request, name)
    assert said is None or (name, value) == ("user", '"x"') or name in ("temperature", "top_p", "stream_options")
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
        (b'{"model":7}', "model", "`model` must be a string"),
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


@pytest.mark.parametrize("body", [b"{}", b'{"model":null}', b'{"model":null,"n":"odd"}'])
def test_a_model_may_be_left_out(body: bytes) -> None:
    assert read_request(body).model is None


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"a","model":"b"}',
        b'{"model":"a","model":"a"}',
        b'{"model":"a","mod\\u0065l":"b"}',
        b'{ "model" : "a" , "x" : {"model":"c"} , "model" : "a" }',
        b'{"model":"m","n":12,"n":1}',
        b'{"model":"m","n":1,"n":12}',
        b'{"model":"m","\xc3\xa9":1,"\xc3\xa9":1}',
        b'{"model":"m","stream":true,"stream_options":{"include_usage":true,"include_usage":true}}',
    ],
)
def test_a_name_that_stands_twice_is_refused(body: bytes) -> None:  # failure 36
    with pytest.raises(InvalidRequest, match="twice"):
        generate(body)


def generate(body: bytes) -> None:
    record = Record(b"i" * 16, b"t" * 16, 1, 0)
    chat.OPERATION.prepare(body, chat.OPERATION.read(body, record, JSON), "vllm")


@pytest.mark.parametrize("body", [b'{"model":"m","x":"\xff"}', b'{"model":"m","x":"\xed\xa0\x80"}', b'{"x":"\xc3","n":"odd"}'])
def test_text_must_be_utf_8_also_where_it_is_not_read(body: bytes) -> None:  # failure 36
    with pytest.raises(InvalidRequest, match="UTF-8"):
        read_request(body)


@pytest.mark.parametrize("lone", [b"\\ud800", b"\\udc00", b"\\ud800x", b"\\ud800\\u0041"])
def test_half_a_character_is_refused(lone: bytes) -> None:  # failure 36
    with pytest.raises(InvalidRequest, match="isn't valid JSON"):
        read_request(b'{"model":"m","x":"%b"}' % lone)


@pytest.mark.parametrize(
    ("written", "meant"),
    [(b"1e9", 10**9), (b"10.0", 10), (b'"1000000000"', 10**9), (b'" 12 "', 12), (b'"1_0"', 10), (b"true", None), (b'"x"', None)],
)
def test_a_count_is_read_for_what_engines_make_of_it(written: bytes, meant: int | None) -> None:  # failure 37
    assert read_request(b'{"model":"m","n":%b}' % written).n == meant


@pytest.mark.parametrize(
    "written", [str(2**63).encode(), str(-(2**70)).encode(), b"1e999", b'"1e300"', b"9" * 1_000_000, b'"' + b"9" * 5000 + b'"']
)
def test_a_count_that_no_one_means_is_refused(written: bytes) -> None:  # failures 36, 37
    for name in ("n", "max_tokens", "best_of"):
        with pytest.raises(InvalidRequest) as raised:
            read_request(b'{"model":"m","%b":%b}' % (name.encode(), written))
        assert raised.value.param == name


_members = st.lists(
    st.tuples(st.sampled_from(["a", "b", "model", "é"]), st.sampled_from(["1", "12", '"x"', '{"a":1}', "[1, 2]", "null", '"}"'])),
    max_size=5,
)
_spaces = st.sampled_from(["", " ", "\n", "\t \r\n"])


@settings(deadline=None)
@given(_members, st.lists(_spaces, min_size=1, max_size=9))
def test_twice_is_found_exactly_where_it_is(members: list[tuple[str, str]], spaces: list[str]) -> None:  # failure 36
    space = itertools.cycle(spaces)
    body = "{" + ",".join(f"{next(space)}{json.dumps(n)}{next(space)}:{next(space)}{v}{next(space)}" for n, v in members) + "}"
    names = [name for name, _ in members]
    if len(set(names)) < len(names):
        with pytest.raises(InvalidRequest, match="twice"):
            read_object(body.encode())
    else:
        assert list(read_object(body.encode())) == names


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
    assert b"".join(with_stream_options(body, WANTED)) == body[:at] + b'"stream_options":' + WANTED + b"," + body[at:]


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
    change = more_stream_options(body, WANTED, read_stream_options(read_request(body).stream_options))
    assert change is not None
    assert b"".join(apply([change], body)) == b'{ "model": "m", "stream_options": %b, "x": [1,  2] }' % sent


@pytest.mark.parametrize(
    ("body", "sent"),
    [
        (
            b'{"model":"m","stream":true,"tools":[{"stream_options":1}]}',
            b'{"stream_options":%b,"model":"m","stream":true,"tools":[{"stream_options":1}]}',
        ),
        (b'{"model":"m","stream":true,"stream\\u005foptions":null}', b'{"model":"m","stream":true,"stream\\u005foptions":%b}'),
    ],
)
def test_options_are_there_if_they_are_read_not_if_they_look_so(body: bytes, sent: bytes) -> None:  # failure 36
    record = Record(b"i" * 16, b"t" * 16, 1, 0)
    assert chat.OPERATION.prepare(body, chat.OPERATION.read(body, record, JSON), "vllm").whole == sent % WANTED


@pytest.mark.parametrize("said", [b'"text"', b"[]", b"7", b'{"include_usage":"yes"}', b'{"include_usage":1}'])
def test_options_that_cannot_be_read_are_left_alone(said: bytes) -> None:
    body = b'{"model":"m","stream_options":%b}' % said
    assert more_stream_options(body, WANTED, read_stream_options(read_request(body).stream_options)) is None
