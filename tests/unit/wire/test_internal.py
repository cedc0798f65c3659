"""Parameters that steer an engine from inside: that they are seen, however they are said, and the one that the proxy says."""

from __future__ import annotations

import json
import re
from typing import Any, Final

import pytest

from proxy.errors import InvalidRequest, NotReady
from proxy.exchange import Record
from proxy.wire import audio, chat
from proxy.wire.adapt import adapt, salt, salted
from proxy.wire.body import INTERNAL, Reader, Request, apply
from proxy.wire.operation import FORM, JSON, EngineOperation, Upstream
from proxy.wire.operations import OPERATIONS

ENGINE: Final[list[EngineOperation[Any]]] = [each for each in OPERATIONS if isinstance(each, EngineOperation)]
BY_JSON: Final = [each for each in ENGINE if each.media == JSON]
SECRET: Final = b"s" * 32


def record() -> Record:
    return Record(b"", b"", 0, 0)


def read(operation: EngineOperation[Any], body: bytes) -> Any:
    return operation.read(body, record(), JSON)


@pytest.mark.parametrize("operation", BY_JSON, ids=lambda each: each.path.decode())
def test_each_endpoint_sees_them(operation: EngineOperation[Any]) -> None:  # failure 58
    for name in INTERNAL:
        if (operation.name, name) == ("responses", "request_id"):  # the id of an answer there
            with pytest.raises(InvalidRequest):
                read(operation, b'{"model":"m","request_id":"x"}')
        else:
            assert read(operation, b'{"model":"m","%b":1}' % name.encode()).internal == (name,)
        assert read(operation, b'{"model":"m","%b":null}' % name.encode()).internal == ()
        assert read(operation, b'{"model":"m","messages":[{"%b":1}]}' % name.encode()).internal == ()
    assert read(operation, b'{"model":"m"}').internal == ()


@pytest.mark.parametrize(
    "body",
    [
        b'{"cache_salt":"","priority":0}',
        b' { "cache_salt" : [] , "x":1, "priority" : false }\n',
        b'{"cach\\u0065_salt":"s","\\u0070riority":"x"}',
        b'{"n":"odd","cache_salt":"s","priority":1}',  # read field by field
        b'{"internal":["nothing"],"cache_salt":"s","priority":1}',
        b'{"internal":"nothing","cache_salt":"s","priority":1}',
        b'{"cache_salt":"s","priority":1,"internal":[]}',
    ],
)
def test_however_they_are_said(body: bytes) -> None:  # failure 58
    assert read(chat.OPERATION, body).internal == ("cache_salt", "priority")


@pytest.mark.parametrize("body", [b'{"internal":["priority"]}', b'{"internal":5,"n":"x"}', b'{"internal":["priority"],"n":"x"}'])
def test_a_body_cannot_say_what_the_reader_found(body: bytes) -> None:
    assert Reader(Request)(body).internal == ()
    assert read(chat.OPERATION, body).internal == ()


def test_a_form_says_them_too() -> None:  # failure 58
    part = '--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n{}\r\n'
    form = ("".join(part % name for name in ("model", "vllm_xargs", "language", "priority")) + "--b--\r\n").encode()
    for operation in audio.OPERATIONS:
        request = operation.read(form, record(), FORM + b"; boundary=b")
        assert request.internal == ("vllm_xargs", "priority")
        assert salted(operation, request, form, (), salt(SECRET, "key:k")) == ()


# -- the salt of a tenant --


def sent(operation: EngineOperation[Any], body: bytes, value: bytes = b'"s"', *more: Any) -> bytes:
    return Upstream(body).changed((*more, *salted(operation, read(operation, body), body, (), value))).whole


def test_a_salt_is_text_that_nobody_guesses() -> None:
    """Constant in length, never empty, and safe wherever an engine may put it: failure 58."""
    made = {salt(secret, tenant) for secret in (SECRET, b"t" * 32) for tenant in ("key:a", "team:a", "key:b", "", "é" * 300)}
    assert len(made) == 10
    assert all(re.fullmatch(rb'"[A-Za-z0-9_-]{43}"', each) for each in made)
    assert salt(SECRET, "key:a") == salt(SECRET, "key:a")


@pytest.mark.parametrize("operation", [each for each in BY_JSON if each.counted], ids=lambda each: each.path.decode())
def test_what_takes_tokens_is_salted(operation: EngineOperation[Any]) -> None:
    body = b' {"model": "m", "x": [1, 2]}'
    assert sent(operation, body) == b' {"cache_salt":"s","model": "m", "x": [1, 2]}'
    assert sent(operation, b'{"model":"m","cache_salt": null ,"x":1}') == b'{"model":"m","cache_salt": "s" ,"x":1}'


@pytest.mark.parametrize("operation", [each for each in BY_JSON if not each.counted], ids=lambda each: each.path.decode())
def test_what_takes_none_is_not(operation: EngineOperation[Any]) -> None:
    assert sent(operation, b'{"model":"m"}') == b'{"model":"m"}'


@pytest.mark.parametrize(
    "body", [b'{"cache_salt":"mine","x":1}', b'{"cache_salt":"mine","n":"odd"}', b'{"cach\\u0065_salt":"mine"}', b"{}"]
)
def test_who_may_say_another_one_keeps_it(body: bytes) -> None:
    assert sent(chat.OPERATION, body) == body


def test_what_the_settings_say_holds() -> None:
    body = b'{"model":"m"}'
    request = read(chat.OPERATION, body)
    assert salted(chat.OPERATION, request, body, (("cache_salt", b'"theirs"'),), b'"s"') == ()


def test_without_a_secret_nothing_is_salted() -> None:
    with pytest.raises(NotReady):
        salt(b"", "key:a")


def test_it_goes_together_with_other_changes() -> None:
    body = b'{"model":"alias","stream":true,"stream_options":{"include_usage":false},"messages":[]}'
    request = read(chat.OPERATION, body)
    changes = adapt(chat.OPERATION, body, JSON, request, record(), "m", (("temperature", b"0"),))
    changes += salted(chat.OPERATION, request, body, (), b'"s"')
    wanted = {"model": "m", "temperature": 0, "cache_salt": "s", "messages": [], "stream": True}
    assert json.loads(b"".join(apply(changes, body))) == {**wanted, "stream_options": {"include_usage": False}}
    for text in (body, body.replace(b'"stream_options":{"include_usage":false},', b"")):
        request = read(chat.OPERATION, text)
        changes = adapt(chat.OPERATION, text, JSON, request, record(), "m", (("temperature", b"0"),))
        changes += salted(chat.OPERATION, request, text, (), b'"s"')
        said = json.loads(chat.OPERATION.prepare(text, request, "vllm").changed(changes).whole)
        assert said == {**wanted, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
