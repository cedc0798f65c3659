"""Which requests are the same, and which are not."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.cache.entry import Form
from proxy.cache.key import MAX_BODY, MAX_VALUES, form_of, key_of, tenant_of
from proxy.exchange import Record
from proxy.snapshot import Principal
from proxy.wire.caching import Caching
from proxy.wire.operation import JSON, EngineOperation
from proxy.wire.operations import OPERATIONS

SECRET: Final = b"s" * 32
OPERATION: Final[dict[str, EngineOperation[Any]]] = {
    operation.name: operation
    for operation in OPERATIONS
    if isinstance(operation, EngineOperation) and operation.caching is not None
}
HI: Final = [{"role": "user", "content": "Hi"}]


def key(body: bytes | dict[str, Any], name: str = "chat", **other: Any) -> bytes | None:
    caching = OPERATION[name].caching
    assert caching is not None
    said: dict[str, Any] = {"secret": SECRET, "model": "m", "revision": "1", "tenant": "key:k", **other}
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return key_of(said["secret"], name, caching, said["model"], said["revision"], said["tenant"], body)


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": HI, "temperature": 0, **more}


# -- what is the same --


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages":[{"content":"Hi","role":"user"}],"temperature":0,"model":"m"}',
        b'{ "model" : "m",\r\n\t"temperature":0 , "messages" : [ { "role":"user" , "content":"Hi" } ] }\n',
        b'{"model":"m","messages":[{"role":"us\\u0065r","content":"\\u0048i"}],"t\\u0065mperature":-0}',
        b'{"model":"another alias","messages":[{"role":"user","content":"Hi"}],"temperature":0}',
        b'{"messages":[{"role":"user","content":"Hi"}],"temperature":0}',
    ],
)
def test_order_space_escapes_and_an_alias_make_no_difference(body: bytes) -> None:
    found = key(body)
    assert found is not None
    assert len(found) == 32
    assert found == key(chat())


@pytest.mark.parametrize("name", sorted(OPERATION))
def test_what_is_ignored_makes_no_difference(name: str) -> None:
    caching = OPERATION[name].caching
    assert caching is not None
    for ignored in caching.ignored - {"stream_options"}:
        assert key({"input": "Hi", ignored: "x"}, name) == key({"input": "Hi"}, name) != key({"input": "Hi", "top_k": 1}, name)


@pytest.mark.parametrize("name", ["user", "metadata", "prompt_cache_key", "safety_identifier", "service_tier"])
def test_what_an_answer_shows_makes_one(name: str) -> None:
    """`/v1/responses` repeats what it was asked for."""
    assert key({"input": "Hi", name: "x"}, "responses") != key({"input": "Hi"}, "responses")


# -- what is not --


def test_everything_around_the_body_makes_a_difference() -> None:
    """Whoever may not share an answer has another key: each of these, and each pair of them. Failure 57."""
    ways: dict[str, tuple[str, ...]] = {
        "model": ("m", "m2", ""),
        "revision": ("1", "2", ""),
        "tenant": ("key:k", "team:k", "everyone", "key:m"),
        "name": ("chat", "completions", "responses", "messages"),
        "secret": (SECRET.decode(), "t" * 32),
    }
    keys = set()
    for choice in itertools.product(*ways.values()):
        said: dict[str, Any] = dict(zip(ways, choice, strict=True))
        said["secret"] = said["secret"].encode()
        keys.add(key(chat(), **said))
    assert len(keys) == 3 * 3 * 4 * 4 * 2


def test_who_shares_with_whom() -> None:  # failure 57
    alone, one, other = Principal("k1", "n"), Principal("k2", "n", team="t"), Principal("k3", "n", team="t")
    named = Principal("k4", "n", team="k1")
    callers = (alone, one, other, named)
    assert len({tenant_of(each, "key") for each in callers}) == 4
    assert [tenant_of(each, "team") for each in callers] == ["key:k1", "team:t", "team:t", "team:k1"]
    assert {tenant_of(each, "everyone") for each in callers} == {"everyone"}


def test_parts_do_not_run_into_each_other() -> None:
    assert key(chat(), model="ab", revision="c") != key(chat(), model="a", revision="bc")
    assert key(chat(), model='m","', revision="") != key(chat(), model="m", revision='","')
    assert key({"tools": []}) != key({"x": {"tools": []}})
    assert key({"a": 1, "tools": {}}) != key({"tools": {"a": 1}})


ODD: Final = (
    *("null", "true", "false", "0", "1", "-1", "1.0", "0.0", "-0.0", "1e300", "5e-324", "0.1", "0.2"),
    *("18446744073709551615", "18446744073709551616", "9007199254740993", "9007199254740992", "9007199254740992.0"),
    *("123456789012345678901234567890", "123456789012345678901234567891"),
    *('"1"', '"1.0"', '"null"', '"true"', '""', '"a"', '"A"', '"a "', '" a"', '"\u00e9"', '"e\u0301"', '"\\ud83d\\ude00"'),
    *('"\\u0000"', '"\\\\u0000"', '"\\n"', '"\\\\n"', '"{\\"a\\":1}"'),
    *("[]", "{}", "[[]]", "[1]", '["1"]', "[1,2]", "[2,1]", '{"":1}', '{"1":1}', '{"a":"1"}'),
    *('{"a":1,"b":2}', '{"a":2,"b":1}', '[{"a":1},{"b":2}]', '[{"a":1,"b":2}]'),
)


def test_no_two_values_are_the_same() -> None:
    """Wherever they stand. Also null and absent are two; that costs a miss at worst."""
    for place in ('"x":%s', '"messages":[%s]', '"tools":%s', '"messages":[{"role":"user","content":%s}]', '"text":{"format":%s}'):
        bodies = [b"{%b}" % (place % value).encode() for value in ODD]
        keys = {key(body, "responses") for body in [*bodies, b"{}"]}
        assert None not in keys
        assert len(keys) == len(ODD) + 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":1e400}',
        b'{"a":"\\ud800"}',
        b'{"a":"\xff"}',
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
)
def test_what_can_be_read_in_two_ways_has_no_key(body: bytes) -> None:
    assert key(body) is None


@pytest.mark.parametrize(
    ("body", "meant"),
    [
        (b'{"x":[{"a":1,"a":2}]}', b'{"x":[{"a":2}]}'),
        (b'{"x":[{ "a" : 1 , "b":{}, "\\u0061":1e1}]}', b'{"x":[{"a":10.0,"b":{}}]}'),
        (b'{"tools":[{"a":1,"b":2,"a":3}]}', b'{"tools":[{"a":3,"b":2}]}'),
    ],
)
def test_of_a_name_that_stands_twice_the_last_counts(body: bytes, meant: bytes) -> None:
    """As it does for Python's reader, which engines have."""
    assert json.loads(body) == json.loads(meant)
    assert key(body) == key(meant)


def test_what_would_take_too_long_has_none() -> None:
    """Everybody else waits while a body is read. Failure 68."""
    text = b'{"messages":"%b"}'
    assert key(text % (b"x" * (MAX_BODY - len(text) + 2))) is not None
    assert key(text % (b"x" * (MAX_BODY - len(text) + 3))) is None
    for value in (b"[]", b"{}", b"1"):
        assert key(b'{"a":[%b]}' % b",".join([value] * (MAX_VALUES // 2 - 10))) is not None
        assert key(b'{"a":[%b]}' % b",".join([value] * (MAX_VALUES + 1))) is None
    for place in range(40):
        number = b"[%b%b]" % (b" " * place, b"9" * 300)
        assert key(b'{"a":%b,"b":"%b"}' % (number, b"x" * 70_000)) is None
        assert key(b'{"a":%b,"b":"%b"}' % (number, b"x" * 50_000)) is not None


# -- the order of names --


def schema(*names: str) -> dict[str, Any]:
    return {"type": "object", "properties": {name: {"type": "string"} for name in names}}


WRITTEN_OUT: Final[dict[str, Callable[..., Any]]] = {
    "tools": lambda *names: [{"type": "function", "function": {"name": "f", "parameters": schema(*names)}}],
    "functions": lambda *names: [{"name": "f", "parameters": schema(*names)}],
    "response_format": lambda *names: {"type": "json_schema", "json_schema": {"name": "n", "schema": schema(*names)}},
    "structured_outputs": lambda *names: {"json": schema(*names)},
    "guided_json": schema,
    "json_schema": schema,
    "text": lambda *names: {"format": {"type": "json_schema", "schema": schema(*names)}},
    "output_config": lambda *names: {"format": {"type": "json_schema", "schema": schema(*names)}},
    "output_format": lambda *names: {"type": "json_schema", "schema": schema(*names)},
    "documents": lambda *names: [dict.fromkeys(names, "x")],
    "chat_template_kwargs": lambda *names: dict.fromkeys(names, True),
}


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_order_counts_where_an_engine_writes_it_out(name: str) -> None:
    """A model is asked to write a schema's members in their order, and reads its tools in theirs."""
    write = WRITTEN_OUT[name]
    assert key({name: write("a", "b"), "temperature": 0, "x": 1}) == key({"x": 1, name: write("a", "b"), "temperature": 0})
    assert key({name: write("a", "b")}) != key({name: write("b", "a")})
    others = {"functions": [], "text": {}} | {name: write("a")}
    assert key(others) == key(dict(reversed(others.items())))


def test_order_counts_in_what_a_tool_was_told() -> None:
    def messages(**said: Any) -> dict[str, Any]:
        call = {"type": "tool_use", "id": "t", "name": "f", "input": said}
        return {"messages": [{"role": "assistant", "content": [call]}]}

    def calls(**said: Any) -> dict[str, Any]:
        call = {"id": "t", "type": "function", "function": {"name": "f", "arguments": said}}
        return {"messages": [{"role": "assistant", "tool_calls": [call]}]}

    for write in (messages, calls):
        assert key(write(a=1, b=2)) != key(write(b=2, a=1))
        assert key({"x": 1, **write(a=1, b=2)}) == key({**write(a=1, b=2), "x": 1})
    text = {"role": "user", "content": '{"input":{"a":1}}'}
    assert key({"messages": [text]}) == key({"messages": [dict(reversed(text.items()))]})


# -- what hangs on more than the request --


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("chat", "store", True),
        ("chat", "kv_transfer_params", {}),
        ("completions", "ec_transfer_params", {"a": 1}),
        ("chat", "web_search_options", {}),
        ("chat", "return_progress", True),
        ("responses", "previous_response_id", "resp_1"),
        ("responses", "conversation", "conv_1"),
        ("responses", "prompt", {"id": "pmpt_1"}),
        ("responses", "background", True),
        ("responses", "store", True),
        ("messages", "container", "c"),
        ("messages", "mcp_servers", [{"url": "https://a"}]),
    ],
)
def test_what_hangs_on_more_has_no_key(name: str, field: str, value: Any) -> None:
    assert key({"x": "Hi", field: value}, name) is None
    assert key({"x": "Hi", field: None}, name) is not None
    assert key({"x": "Hi", field: False}, name) is not None


def test_a_salt_of_its_own_keeps_an_answer_from_others() -> None:
    """Who has several customers behind one key tells them apart by it: the time that an answer takes tells nobody of another."""
    assert len({key(chat()), key(chat(cache_salt="a")), key(chat(cache_salt="b"))}) == 3


# -- how an answer is sent --


def asked(name: str = "chat", **said: Any) -> Any:
    return OPERATION[name].read(json.dumps(chat(**said)).encode(), Record(b"", b"", 0, 0), JSON)


USAGE: Final = {"include_usage": True}


@pytest.mark.parametrize(
    ("said", "form"),
    [
        ({}, Form.WHOLE),
        ({"stream": False}, Form.WHOLE),
        ({"stream": None}, Form.WHOLE),
        ({"stream": True}, Form.STREAM),
        ({"stream": True, "stream_options": None}, Form.STREAM),
        ({"stream": True, "stream_options": {}}, Form.STREAM),
        ({"stream": True, "stream_options": {"include_usage": False}}, Form.STREAM),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, Form.STREAM),
        ({"stream": True, "stream_options": USAGE}, Form.STREAM_WITH_USAGE),
        ({"stream": True, "stream_options": {**USAGE, "continuous_usage_stats": False}}, Form.STREAM_WITH_USAGE),
        ({"stream": True, "stream_options": {**USAGE, "continuous_usage_stats": True}}, Form.STREAM_WITH_USAGES),
    ],
)
def test_the_form_says_how_and_the_key_does_not(said: dict[str, Any], form: Form) -> None:
    assert form_of(asked(**said)) is form
    assert key(chat(**said)) == key(chat())


@pytest.mark.parametrize(
    "said",
    [
        {"stream_options": USAGE},
        {"stream": False, "stream_options": {}},
        {"stream": True, "stream_options": {"include_usage": 1}},
        {"stream": True, "stream_options": {"include_usage": "true"}},
        {"stream": True, "stream_options": {**USAGE, "include_obfuscation": False}},
        {"stream": True, "stream_options": [USAGE]},
        {"stream": True, "stream_options": "x"},
    ],
)
def test_odd_ways_are_part_of_the_key(said: dict[str, Any]) -> None:
    """What an engine refuses mustn't be answered because somebody else said it well."""
    assert key(chat(**said)) not in (None, key(chat()))
    assert form_of(asked(**said)) in (Form.WHOLE, Form.STREAM, Form.STREAM_WITH_USAGE)


@pytest.mark.parametrize("name", ["responses", "messages"])
def test_typed_events_have_one_form(name: str) -> None:
    assert form_of(asked(name, stream=True, stream_options=USAGE)) is Form.STREAM
    assert form_of(asked(name)) is Form.WHOLE
    assert key(chat(stream=True), name) == key(chat(), name) != key(chat(stream=True, stream_options=USAGE), name)


# -- whatever it is --

_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=8,
)
_names = st.sampled_from(["messages", "input", "temperature", "x", "y", "stop", "logit_bias"]) | _texts.map("_".__add__)
_bodies = st.dictionaries(_names, _values, max_size=5)
PLAIN: Final = Caching()


def plain_key(body: bytes) -> bytes | None:
    return key_of(SECRET, "any", PLAIN, "m", "", "t", body)


def written(value: Any, how: random.Random) -> str:
    """JSON that says the same, in some other way."""

    def space() -> str:
        return how.choice(["", "", " ", "\n", "\t "])

    match value:
        case dict():
            members = list(value.items())
            how.shuffle(members)
            said = [f"{space()}{written(name, how)}{space()}:{space()}{written(inner, how)}{space()}" for name, inner in members]
            return "{" + ",".join(said) + "}"
        case list():
            return "[" + ",".join(f"{space()}{written(each, how)}{space()}" for each in value) + "]"
        case str():
            if how.random() < 0.5:
                return json.dumps(value, ensure_ascii=how.random() < 0.5)
            return '"' + "".join(f"\\u{ord(each):04x}" if each < "\x7f" else each for each in value) + '"'
        case _:
            return json.dumps(value)


def told_apart(value: Any) -> Any:
    """Equal for what is the same: Python's own equality takes 1, 1.0 and True for one."""
    match value:
        case dict():
            return frozenset((name, told_apart(inner)) for name, inner in value.items())
        case list():
            return tuple(told_apart(each) for each in value)
        case _:
            return type(value), repr(value)


def has_arguments(value: Any) -> bool:
    match value:
        case dict():
            return any((n in ("input", "arguments") and isinstance(v, dict)) or has_arguments(v) for n, v in value.items())
        case list():
            return any(has_arguments(each) for each in value)
    return False


@settings(max_examples=300, deadline=None)
@given(_bodies, st.randoms(use_true_random=False))
def test_however_it_is_written(body: dict[str, Any], how: random.Random) -> None:
    first, second = written(body, how), written(body, how)
    one, other = plain_key(first.encode()), plain_key(second.encode())
    assert one is not None
    assert other is not None
    assert one == other or has_arguments(body)


@settings(max_examples=300, deadline=None)
@given(_bodies, _bodies)
@example({"x": 1}, {"x": 1.0})
@example({"x": 1}, {"x": True})
@example({"x": 0.0}, {"x": -0.0})
def test_whatever_it_says(one: dict[str, Any], other: dict[str, Any]) -> None:
    same = plain_key(json.dumps(one).encode()) == plain_key(json.dumps(other).encode())
    assert same == (told_apart(one) == told_apart(other)) or has_arguments(one)


@settings(max_examples=300, deadline=None)
@given(_bodies, _values, st.data())
def test_another_value_anywhere_is_another_request(body: dict[str, Any], value: Any, data: st.DataObject) -> None:
    places = list(_places(body))
    if not places:
        return
    holder, at = data.draw(st.sampled_from(places))
    before, former = plain_key(json.dumps(body).encode()), holder[at]
    if told_apart(former) == told_apart(value):
        return
    holder[at] = value
    assert plain_key(json.dumps(body).encode()) != before


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for at, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, at
        yield from _places(inner)
