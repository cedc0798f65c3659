"""What is Anthropic's own: its key's header, its errors' shape, its client's helpers."""

from __future__ import annotations

import asyncio
from typing import Any

import anthropic
import pytest

from tests.compat.cases import HELLO, MESSAGE_TOOLS, MODEL
from tests.support.endpoints import Endpoint, through
from tests.support.scripted_vllm import ScriptedVLLM
from tests.support.wire_client import anonymous

MESSAGE: Any = {"model": MODEL, "messages": HELLO, "max_tokens": 100}


@pytest.fixture(scope="module")
def proxy(request: pytest.FixtureRequest, straight: Endpoint) -> Endpoint:
    return through(request, straight.url)


def client_of(endpoint: Endpoint, **more: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(**{"base_url": endpoint.url, "api_key": endpoint.key, "max_retries": 0, "timeout": 30, **more})


def scripted(**script: Any) -> dict[str, Any]:
    return {**MESSAGE, "extra_body": {"script": script}}


def with_key(key: str) -> dict[str, dict[str, Any]]:
    """The ways to send a key. The client itself sends `Authorization` for both; older ones, and people, send `x-api-key`."""
    nothing = {"api_key": None, "auth_token": None}
    return {
        "api_key": {**nothing, "api_key": key},
        "auth_token": {**nothing, "auth_token": key},
        "x-api-key": {**nothing, "default_headers": {"x-api-key": key}},
    }


@pytest.mark.parametrize("way", with_key(""))
def test_a_key_may_come_in_either_header(proxy: Endpoint, shared_vllm: ScriptedVLLM, way: str) -> None:
    with client_of(proxy, **with_key(proxy.key)[way]) as client:
        assert client.messages.create(**MESSAGE).stop_reason == "end_turn"
    received = shared_vllm.requests[-1]
    assert (received.header("x-api-key"), received.header("authorization")) == (None, None)


@pytest.mark.parametrize("way", with_key(""))
def test_a_wrong_key_is_refused_in_anthropics_shape(proxy: Endpoint, way: str) -> None:
    with client_of(proxy, **with_key("gh-wrong")[way]) as client, pytest.raises(anthropic.AuthenticationError) as caught:
        client.messages.create(**MESSAGE)
    assert caught.value.type == "authentication_error"
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["type"] == "error"


def test_an_unknown_model_is_told_in_anthropics_shape(proxy: Endpoint) -> None:
    with client_of(proxy) as client, pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(**{**MESSAGE, "model": "nope"})
    assert caught.value.type == "not_found_error"


def test_a_stream_that_was_cut_ends_with_anthropics_error(proxy: Endpoint) -> None:  # failure 4
    with client_of(proxy) as client, pytest.raises(anthropic.APIStatusError) as caught:
        list(client.messages.create(**scripted(cut_after_events=4), stream=True))
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["error"]["type"] == "api_error"


@pytest.mark.parametrize("script", [{}, {"tools": True}, {"tokens": 9, "reasoning": 4}, {"cached_tokens": 16}], ids=str)
def test_the_helper_puts_a_stream_together(proxy: Endpoint, straight: Endpoint, script: dict[str, Any]) -> None:
    asked = scripted(**script) | {"tools": MESSAGE_TOOLS}

    def put_together(endpoint: Endpoint) -> tuple[list[str], bytes]:
        with client_of(endpoint) as client, client.messages.stream(**asked) as stream:
            return list(stream.text_stream), anonymous(stream.get_final_message().model_dump_json().encode())

    assert put_together(proxy) == put_together(straight)


def test_streams_side_by_side(proxy: Endpoint, straight: Endpoint) -> None:
    async def streams() -> list[list[str]]:
        async with anthropic.AsyncAnthropic(base_url=proxy.url, api_key=proxy.key, max_retries=0) as client:
            return list(await asyncio.gather(*(one(client) for _ in range(8))))

    async def one(client: anthropic.AsyncAnthropic) -> list[str]:
        return [event.type async for event in await client.messages.create(**scripted(interval=0.002), stream=True)]

    with client_of(straight) as reference:
        expected = [event.type for event in reference.messages.create(**MESSAGE, stream=True)]
    assert asyncio.run(streams()) == [expected] * 8


def test_leaving_a_stream_stops_the_engine(proxy: Endpoint, shared_vllm: ScriptedVLLM) -> None:  # failure 1
    before = len(shared_vllm.aborted)
    with client_of(proxy) as client:
        stream = client.messages.create(**scripted(tokens=90, hang_after_events=5), stream=True)
        received = [next(stream) for _ in range(5)]
        stream.close()
    shared_vllm.wait(lambda: len(shared_vllm.aborted) > before)
    assert len(received) == 5


def test_the_client_tries_again_when_told(proxy: Endpoint, shared_vllm: ScriptedVLLM) -> None:
    def asked() -> int:
        return sum(request.method == "POST" for request in shared_vllm.requests)

    before = asked()
    with client_of(proxy, max_retries=1) as client, pytest.raises(anthropic.RateLimitError):
        client.messages.create(**scripted(status=429, headers={"retry-after-ms": "1"}))
    assert asked() == before + 2
