"""What the official clients are asked to do, as data: the same for all of them, in Python and in Node."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

MODEL: Final = "smollm2"
TEXT: Final = "Grüß Gott! 👋🏽"
HELLO: Final = [{"role": "user", "content": TEXT}]
UNICODE: Final = 'né\u2028 "\\" \t\x00 日本語 👩‍👩‍👧‍👦'
WEATHER: Final = {"type": "object", "properties": {"city": {"type": "string"}}}
CHAT_TOOLS: Final = [{"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}}]
RESPONSE_TOOLS: Final = [{"type": "function", "name": "get_weather", "parameters": WEATHER, "strict": False}]
MESSAGE_TOOLS: Final = [{"name": "get_weather", "input_schema": WEATHER}]


class Case(NamedTuple):
    """One call of one client. `params` are the call's arguments; the script goes with them as an extra field."""

    client: str
    """openai or anthropic."""
    call: str
    """The method, as both languages name it."""
    params: dict[str, Any]
    script: dict[str, Any]
    sound: bool = False
    """A sound goes along, as `file`."""
    headers: Mapping[str, str] = MappingProxyType({})

    def scripted(self, **script: Any) -> Case:
        return self._replace(script=self.script | script)

    def asking(self, **params: Any) -> Case:
        return self._replace(params=self.params | params)


def _openai(call: str, *, sound: bool = False, **params: Any) -> Case:
    return Case("openai", call, {"model": MODEL, **params}, {}, sound)


def _anthropic(call: str, **params: Any) -> Case:
    return Case("anthropic", call, {"model": MODEL, "messages": HELLO, **params}, {})


CHAT: Final = _openai("chat.completions.create", messages=HELLO)
COMPLETION: Final = _openai("completions.create", prompt="Once upon")
EMBEDDINGS: Final = _openai("embeddings.create", input=["one", "two words"])
RESPONSE: Final = _openai("responses.create", input=TEXT)
TRANSCRIPTION: Final = _openai("audio.transcriptions.create", sound=True)
TRANSLATION: Final = _openai("audio.translations.create", sound=True)
MESSAGE: Final = _anthropic("messages.create", max_tokens=100)
COUNT: Final = _anthropic("messages.countTokens")

GENERATING: Final = {
    "chat": CHAT,
    "completion": COMPLETION,
    "response": RESPONSE,
    "transcription": TRANSCRIPTION,
    "message": MESSAGE,
}
"""One of each API that streams."""
ALL: Final = {**GENERATING, "embeddings": EMBEDDINGS, "translation": TRANSLATION, "count_tokens": COUNT}

WHOLE: Final = {
    **ALL,
    "chat, tools": CHAT.asking(tools=CHAT_TOOLS).scripted(tools=True),
    "embeddings, as numbers": EMBEDDINGS.asking(encoding_format="float"),
    "response, from items": RESPONSE.asking(input=HELLO, instructions="Be brief.", metadata={"a": "b"}, temperature=0.5),
    "response, at its limit": RESPONSE.asking(max_output_tokens=3),
    "response, tools": RESPONSE.asking(tools=RESPONSE_TOOLS).scripted(tools=True),
    "response, reasoning": RESPONSE.scripted(tokens=9, reasoning=4),
    "response, all of unicode": RESPONSE.scripted(content=UNICODE),
    "response, cached prompt": RESPONSE.scripted(cached_tokens=16, metrics=True),
    "response, no usage": RESPONSE.scripted(usage="none"),
    "response, slow": RESPONSE.scripted(first=0.02, interval=0.002),
    "message, system prompt and blocks": MESSAGE.asking(
        system="Be brief.", messages=[{"role": "user", "content": [{"type": "text", "text": TEXT}]}], metadata={"user_id": "u"}
    ),
    "message, at its limit": MESSAGE.asking(max_tokens=3),
    "message, tools": MESSAGE.asking(tools=MESSAGE_TOOLS).scripted(tools=True),
    "message, one tool by name": MESSAGE.asking(
        tools=MESSAGE_TOOLS, tool_choice={"type": "tool", "name": "get_weather"}
    ).scripted(tools=True),
    "message, thinking": MESSAGE.asking(thinking={"type": "adaptive"}).scripted(tokens=9, reasoning=4),
    "message, all of unicode": MESSAGE.scripted(content=UNICODE),
    "message, cached prompt": MESSAGE.scripted(cached_tokens=16),
    "message, no usage": MESSAGE.scripted(usage="none"),
    "message, beta": MESSAGE._replace(call="beta.messages.create"),
    "transcription, as text": TRANSCRIPTION.asking(response_format="text", language="de"),
    "transcription, verbose": TRANSCRIPTION.asking(response_format="verbose_json", timestamp_granularities=["segment"]),
    "translation, verbose": TRANSLATION.asking(response_format="verbose_json"),
    "translation, all of unicode": TRANSLATION.scripted(content=UNICODE),
}
"""What is answered at once."""

_DRESSES: Final[dict[str, dict[str, Any]]] = {
    "byte by byte": {"content": "日本語 👩‍👩‍👧‍👦", "chunk_bytes": 1},
    "comments and CRLF": {"comments": 1, "newline": "\r\n"},
    "in one write": {"coalesce": 1000},
    "in its own time": {"first": 0.02, "interval": 0.002},
    "one token": {"tokens": 1},
    "several tokens an event": {"tokens": 20, "tokens_per_event": 4},
}
STREAMS: Final = {
    name: case.asking(stream=True)
    for name, case in {
        **GENERATING,
        **{
            f"{name}, {dress}": case.scripted(**script) for name, case in GENERATING.items() for dress, script in _DRESSES.items()
        },
        **{name: case for name, case in WHOLE.items() if name.startswith(("response, ", "message, "))},
        "chat, usage": CHAT.asking(stream_options={"include_usage": True}),
        "response, ended as OpenAI does": RESPONSE.asking(max_output_tokens=3).scripted(incomplete_event=True),
        "response, failed as OpenAI's do": RESPONSE.scripted(error_event_after=5, error_kind="response.failed"),
    }.items()
}
"""What is answered with events, to a proper end."""

ERRORS: Final = {
    **{
        f"{name}, status {status}": case.scripted(status=status, error=f"Not today: {status}")
        for name, case in ALL.items()
        for status in (400, 401, 422, 500)
    },
    **{
        f"{name}, status {status}, to be tried again": case.scripted(status=status, headers={"Retry-After": "7"})
        for name, case in ALL.items()
        for status in (429, 503)
    },
    **{f"{name}, a stream, status 400": case.asking(stream=True).scripted(status=400) for name, case in GENERATING.items()},
    "chat, temperature": CHAT.asking(temperature=-2),
    "response, temperature": RESPONSE.asking(temperature=-2),
    "message, more tokens than there are": MESSAGE.asking(max_tokens=5000),
    "response, too long": RESPONSE.asking(input="word " * 2000),
    "message, too long": MESSAGE.asking(messages=[{"role": "user", "content": "word " * 2000}]),
    "response, after one that isn't kept": RESPONSE.asking(previous_response_id="resp_1"),
    "message, no messages": MESSAGE.asking(messages=[]),
    "transcription, no such format": TRANSCRIPTION.asking(response_format="srt"),
    "transcription, engine fails at once": TRANSCRIPTION.asking(stream=True).scripted(status=500),
    "captured: no max_tokens": MESSAGE.scripted(replay="err_messages"),
    "captured: no input": RESPONSE.scripted(replay="err_responses"),
}
"""What the engine refuses."""

BROKEN: Final = {
    f"{name}, after {events} events": case.asking(stream=True).scripted(error_event_after=events)
    for name, case in GENERATING.items()
    if name != "response"  # vLLM says nothing there, it closes the connection: see CUT
    for events in (1, 3)
} | {"response, as OpenAI's own": RESPONSE.asking(stream=True).scripted(error_event_after=5, error_kind="error")}
"""What the engine breaks off with an error event."""

CUT: Final = {
    f"{name}, {how}": case.asking(stream=True).scripted(cut_after_events=5, cut=how)
    for name, case in GENERATING.items()
    for how in ("reset", "close", "clean")
}
"""What ends without an end."""

UNKNOWN_MODEL: Final = {name: case.asking(model="nope") for name, case in ALL.items()}
