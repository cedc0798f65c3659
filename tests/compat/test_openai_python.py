"""The official Python client, straight and through the proxy: the same objects, the same exceptions.

Ids, times of creation and X-Request-Id may differ, nothing else. Each test does the same thing to both and compares; straight
against straight shows that the comparison itself holds. Where answers are given again, it is the second one that is compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import openai
import pydantic
import pytest

from tests.support.endpoints import FRESH, Endpoint
from tests.support.scripted_vllm import ScriptedVLLM
from tests.support.scripted_vllm.answers import Received
from tests.support.wire_client import anonymous

MODEL = "smollm2"
HELLO: Any = [{"role": "user", "content": "Grüß Gott! 👋🏽"}]
WEATHER: Any = [
    {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}},
    {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}},
]
USAGE: Any = {"include_usage": True}
CONTINUOUS: Any = {"include_usage": True, "continuous_usage_stats": True}

Call = Callable[[openai.OpenAI], Any]
T = TypeVar("T")


class Answered(Protocol):
    """What is told in the end; on the way there, whether it had been kept."""

    def __call__(self, tell: Callable[[openai.OpenAI], T], *, kept: bool = True) -> T: ...


@pytest.fixture(scope="module")
def client(endpoint: Endpoint) -> Iterator[openai.OpenAI]:
    with _client(endpoint) as client:
        yield client


@pytest.fixture(scope="module")
def answered(endpoint: Endpoint, client: openai.OpenAI) -> Iterator[Answered]:
    verdicts: list[str | None] = []

    def hear(answer: Any) -> None:
        verdicts.append(answer.headers.get("x-glasshouse-cache"))

    def answered(tell: Callable[[openai.OpenAI], T], *, kept: bool = True) -> T:
        if endpoint.keeps is None:
            return tell(client)
        verdicts.clear()
        tell(listening.with_options(default_headers=FRESH))
        result = tell(listening)
        assert verdicts == ["miss", "hit"] if kept else "hit" not in verdicts
        return result

    with _client(endpoint, http_client=openai.DefaultHttpxClient(event_hooks={"response": [hear]})) as listening:
        yield answered


@pytest.fixture(scope="module")
def reference(straight: Endpoint) -> Iterator[openai.OpenAI]:
    with _client(straight) as client:
        yield client


def _client(endpoint: Endpoint, **more: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key=endpoint.key, max_retries=0, timeout=20, **more)


def chat(client: openai.OpenAI, script: dict[str, Any] | None = None, **more: Any) -> Any:
    arguments = {"model": MODEL, "messages": HELLO, "extra_body": {"script": script or {}}} | more
    return client.chat.completions.create(**arguments)


def completions(client: openai.OpenAI, script: dict[str, Any] | None = None, **more: Any) -> Any:
    arguments = {"model": MODEL, "prompt": "Once upon", "extra_body": {"script": script or {}}} | more
    return client.completions.create(**arguments)


def told(result: Any) -> list[bytes]:
    """Everything that a result says, as JSON, without ids and times; a stream is all its chunks."""
    parts: list[pydantic.BaseModel] = [result] if isinstance(result, pydantic.BaseModel) else list(result)
    return [anonymous(part.model_dump_json().encode()) for part in parts]


# --- what works ------------------------------------------------------------------------------------------------------

WHOLE: dict[str, Call] = {
    "chat": lambda c: chat(c),
    "chat, several choices": lambda c: chat(c, n=3),
    "chat, logprobs": lambda c: chat(c, logprobs=True, top_logprobs=2),
    "chat, cut by max_tokens": lambda c: chat(c, max_completion_tokens=3),
    "chat, tools": lambda c: chat(c, {"tools": True}, tools=WEATHER),
    "chat, one tool by name": lambda c: chat(c, {"tools": True}, tools=WEATHER, tool_choice=_named("get_time")),
    "chat, reasoning": lambda c: chat(c, {"tokens": 9, "reasoning": 4}),
    "chat, cached prompt": lambda c: chat(c, {"cached_tokens": 16}),
    "chat, engine's own times": lambda c: chat(c, {"metrics": True}),
    "chat, slow": lambda c: chat(c, {"first": 0.02, "interval": 0.002}),
    "chat, content parts": lambda c: chat(c, messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]),
    "chat, all of unicode": lambda c: chat(c, {"content": 'né\u2028 "\\" \t\x00 日本語 👩‍👩‍👧‍👦'}),
    "chat, 300 kB": lambda c: chat(c, {"pieces": [["word " * 60_000]]}),
    "chat, no usage": lambda c: chat(c, {"usage": "none"}),
    "completion": lambda c: completions(c),
    "completion, echo and logprobs": lambda c: completions(c, echo=True, logprobs=2),
    "completion, a batch": lambda c: completions(c, prompt=["A", "B b"], n=2),
    "completion, token ids": lambda c: completions(c, prompt=[1, 2, 3]),
    "embeddings": lambda c: c.embeddings.create(model=MODEL, input=["one", "two words"], dimensions=32),
    "embeddings, as numbers": lambda c: c.embeddings.create(model=MODEL, input="one", encoding_format="float"),
}

STREAMS: dict[str, Call] = {
    "chat": lambda c: chat(c, stream=True),
    "chat, usage": lambda c: chat(c, stream=True, stream_options=USAGE),
    "chat, continuous usage": lambda c: chat(c, stream=True, stream_options=CONTINUOUS),
    "chat, continuous usage alone": lambda c: chat(c, stream=True, stream_options={"continuous_usage_stats": True}),
    "chat, no usage, said aloud": lambda c: chat(c, stream=True, stream_options={"include_usage": False}),
    "chat, several choices": lambda c: chat(c, stream=True, n=3),
    "chat, several choices, usage": lambda c: chat(c, stream=True, n=3, stream_options=CONTINUOUS),
    "chat, logprobs": lambda c: chat(c, stream=True, logprobs=True, top_logprobs=1),
    "chat, tools": lambda c: chat(c, {"tools": True}, stream=True, tools=WEATHER),
    "chat, tools, usage": lambda c: chat(c, {"tools": True}, stream=True, tools=WEATHER, stream_options=USAGE),
    "chat, reasoning": lambda c: chat(c, {"tokens": 9, "reasoning": 4}, stream=True),
    "chat, reasoning, usage": lambda c: chat(c, {"tokens": 9, "reasoning": 4}, stream=True, stream_options=USAGE),
    "chat, engine's own times": lambda c: chat(c, {"metrics": True}, stream=True, stream_options=USAGE),
    "chat, cached prompt": lambda c: chat(c, {"cached_tokens": 16}, stream=True, stream_options=USAGE),
    "chat, several tokens an event": lambda c: chat(c, {"tokens": 20, "tokens_per_event": 4}, stream=True),
    "chat, one token": lambda c: chat(c, {"tokens": 1}, stream=True),
    "chat, byte by byte": lambda c: chat(c, {"content": "日本語 👩‍👩‍👧‍👦", "chunk_bytes": 1}, stream=True),
    "chat, comments and CRLF": lambda c: chat(c, {"comments": 1, "newline": "\r\n"}, stream=True),
    "chat, in its own time": lambda c: chat(c, {"first": 0.02, "interval": 0.002}, stream=True),
    "completion": lambda c: completions(c, stream=True),
    "completion, usage": lambda c: completions(c, stream=True, stream_options=USAGE),
    "completion, continuous usage": lambda c: completions(c, stream=True, stream_options=CONTINUOUS),
    "completion, a batch": lambda c: completions(c, stream=True, prompt=["A", "B b"], n=2, logprobs=1),
}


def _named(function: str) -> Any:
    return {"type": "function", "function": {"name": function}}


@pytest.mark.parametrize("call", WHOLE.values(), ids=WHOLE)
def test_whole_answers(answered: Answered, reference: openai.OpenAI, call: Call) -> None:
    assert answered(lambda client: told(call(client))) == told(call(reference))


@pytest.mark.parametrize("call", STREAMS.values(), ids=STREAMS)
def test_streams(answered: Answered, reference: openai.OpenAI, call: Call) -> None:
    ours, theirs = answered(lambda client: told(call(client))), told(call(reference))
    assert ours == theirs
    assert len(theirs) > 1


def test_the_client_puts_a_stream_of_tool_calls_together(client: openai.OpenAI) -> None:
    more: Any = {"extra_body": {"script": {"tools": True}}, "tools": WEATHER}
    with client.chat.completions.stream(model=MODEL, messages=HELLO, **more) as stream:
        for _ in stream:
            pass
        choice = stream.get_final_completion().choices[0]
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
    assert calls == [("get_weather", '{"city": "Paris"}'), ("get_time", '{"city": "Köln"}')]
    assert choice.finish_reason == "tool_calls"


def test_the_asynchronous_client(endpoint: Endpoint, reference: openai.OpenAI) -> None:
    async def streams() -> list[list[bytes]]:
        async with openai.AsyncOpenAI(base_url=f"{endpoint.url}/v1", api_key=endpoint.key, max_retries=0) as client:
            return await asyncio.gather(*(one(client) for _ in range(8)))

    async def one(client: openai.AsyncOpenAI) -> list[bytes]:
        stream = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        return told([chunk async for chunk in stream])

    assert asyncio.run(streams()) == [told(chat(reference, {}, stream=True))] * 8


def test_models_are_listed(client: openai.OpenAI, reference: openai.OpenAI) -> None:
    def listed(client: openai.OpenAI) -> list[tuple[str, str, object]]:
        return [(model.id, model.object, getattr(model, "max_model_len", None)) for model in client.models.list()]

    assert listed(client) == listed(reference) == [(MODEL, "model", 1024)]


def test_the_answer_to_a_request_without_extras_is_the_same(client: openai.OpenAI, reference: openai.OpenAI) -> None:
    plain: Any = {"model": MODEL, "messages": HELLO}
    assert told(client.chat.completions.create(**plain)) == told(reference.chat.completions.create(**plain))


def test_the_headers_that_matter(client: openai.OpenAI, reference: openai.OpenAI) -> None:
    def headers(client: openai.OpenAI, **more: Any) -> list[str | None]:
        raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO, **more)
        raw.http_response.close()
        return [raw.headers.get(name) for name in ("content-type", "content-encoding", "transfer-encoding")]

    assert headers(client) == headers(reference) == ["application/json", None, None]
    stream: Any = {"stream": True}
    assert headers(client, **stream) == headers(reference, **stream)
    assert headers(client, **stream) == ["text/event-stream; charset=utf-8", None, "chunked"]


# --- what doesn't ----------------------------------------------------------------------------------------------------

ERRORS: dict[str, Call] = {
    "a stream, status 400": lambda c: chat(c, {"status": 400}, stream=True),
    "a stream, status 500": lambda c: chat(c, {"status": 500}, stream=True),
    "temperature": lambda c: chat(c, temperature=-2),
    "max_tokens": lambda c: chat(c, max_tokens=99_999),
    "type of n": lambda c: chat(c, n="two"),
    "no messages": lambda c: chat(c, messages=[]),
    "stream options without a stream": lambda c: chat(c, stream_options=USAGE),
    "prompt too long": lambda c: chat(c, messages=[{"role": "user", "content": "word " * 2000}]),
    "captured: engine died": lambda c: chat(c, {"replay": "two/killed_nonstream"}),
    "captured: queue full": lambda c: chat(c, {"replay": "two/queue_full_503"}),
    "captured: tools not enabled": lambda c: chat(c, {"replay": "tools_auto"}),
    "completion": lambda c: completions(c, temperature=-2),
    "embeddings": lambda c: c.embeddings.create(model=MODEL, input=["x"], extra_body={"script": {"status": 400}}),
}


@pytest.mark.parametrize("call", ERRORS.values(), ids=ERRORS)
def test_errors(answered: Answered, reference: openai.OpenAI, call: Call) -> None:
    ours, theirs = answered(lambda client: _raised(client, call), kept=False), _raised(reference, call)
    assert ours == theirs
    assert ours["status_code"] is not None


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 418, 422, 429, 500, 502, 503, 504])
def test_errors_by_status(answered: Answered, reference: openai.OpenAI, status: int) -> None:
    def raised(client: openai.OpenAI) -> dict[str, Any]:
        return _raised(client, lambda c: chat(c, {"status": status, "error": f"Not today: {status}"}))

    assert answered(raised, kept=False) == raised(reference)


def _raised(client: openai.OpenAI, call: Call) -> dict[str, Any]:
    with pytest.raises(openai.APIError) as caught:
        call(client)
    error = caught.value
    named = ("status_code", "body", "code", "param", "type", "message")
    return {"class": type(error).__name__} | {name: getattr(error, name, None) for name in named}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError),
        (409, openai.ConflictError),
        (422, openai.UnprocessableEntityError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (503, openai.InternalServerError),
    ],
)
def test_each_status_is_its_exception(client: openai.OpenAI, status: int, kind: type[openai.APIStatusError]) -> None:
    with pytest.raises(kind, match="Not today") as caught:
        chat(client, {"status": status, "error": "Not today"})
    assert caught.value.status_code == status


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, model="nope")
    assert caught.value.param == "model"


def test_how_long_to_wait_is_told(client: openai.OpenAI) -> None:
    with pytest.raises(openai.RateLimitError) as caught:
        chat(client, {"status": 429, "headers": {"retry-after": "7"}})
    assert caught.value.response.headers["retry-after"] == "7"


@pytest.mark.parametrize("events", [1, 3])
def test_an_error_inside_a_stream(answered: Answered, reference: openai.OpenAI, events: int) -> None:
    def seen(client: openai.OpenAI) -> tuple[list[bytes], object]:
        chunks = []
        with pytest.raises(openai.APIError) as caught:  # noqa: PT012  # the chunks before the error are the point
            for chunk in chat(client, {"error_event_after": events}, stream=True):
                chunks.append(chunk)
        return told(chunks), caught.value.body

    ours = answered(seen, kept=False)
    assert ours == seen(reference)
    assert len(ours[0]) == events


def test_leaving_a_stream_stops_the_engine(client: openai.OpenAI, shared_vllm: ScriptedVLLM) -> None:  # failure 1
    before = len(shared_vllm.aborted)
    stream = chat(client, {"tokens": 1000, "hang_after_events": 5}, stream=True)
    received = [next(stream) for _ in range(5)]
    stream.close()
    shared_vllm.wait(lambda: len(shared_vllm.aborted) > before)
    assert len(received) == 5
    assert shared_vllm.aborted[-1].generated == 4


def test_giving_up_before_the_first_token_stops_the_engine(  # failure 2
    client: openai.OpenAI, shared_vllm: ScriptedVLLM
) -> None:
    before = len(shared_vllm.aborted)
    with pytest.raises(openai.APITimeoutError):
        chat(client, {"hang": True}, timeout=0.3)
    shared_vllm.wait(lambda: len(shared_vllm.aborted) > before)
    assert shared_vllm.aborted[-1].generated == 0


def asked(vllm: ScriptedVLLM) -> list[Received]:
    """What clients asked for; the proxy also looks at `/v1/models` of its own accord."""
    return [request for request in vllm.requests if request.method == "POST"]


def test_the_client_retries_what_it_may(endpoint: Endpoint, shared_vllm: ScriptedVLLM) -> None:
    before = len(asked(shared_vllm))
    with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key=endpoint.key, max_retries=1) as client:
        with pytest.raises(openai.BadRequestError):
            chat(client, {"status": 400})
        assert len(asked(shared_vllm)) == before + 1
        with pytest.raises(openai.RateLimitError):
            chat(client, {"status": 429, "headers": {"retry-after-ms": "1"}})
        assert len(asked(shared_vllm)) == before + 3
