"""The table of what is asked of a real engine: every operation of the proxy has a row.

A new operation is a new `Case`; one that generates, with streams and tokens to count, is also a new `Generating`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from tests.engine.answers import events_of
from tests.engine.vllm import NAME
from tests.support.wire_client import Reply

STORY: Final = (
    "Tell a story of a lighthouse, a heron and a very long winter, in which every one of them says something true. " * 3
)
"""Longer than a block of the prefix cache, so that answers have cached tokens to speak of."""
TALK: Final = ({"role": "system", "content": STORY}, {"role": "user", "content": "Grüß Gott! 👋🏽"})
USAGE: Final = {"include_usage": True}
CONTINUOUS: Final = {"include_usage": True, "continuous_usage_stats": True}


class Case(NamedTuple):
    """One request. `body` is sent as JSON unless it is bytes, which have a `content_type`."""

    path: str
    body: Mapping[str, Any] | bytes | None
    status: int = 200
    content_type: str = "application/json"


def _asking(path: str, base: Mapping[str, Any], status: int = 200) -> Callable[..., Case]:
    return lambda **more: Case(path, {"model": NAME, **base, **more}, status)


_chat = _asking("/v1/chat/completions", {"messages": TALK, "max_tokens": 12, "temperature": 0})
_completion = _asking("/v1/completions", {"prompt": STORY, "max_tokens": 12, "temperature": 0})
_response = _asking("/v1/responses", {"input": STORY, "max_output_tokens": 12, "temperature": 0})
_message = _asking("/v1/messages", {"messages": TALK[1:], "system": STORY, "max_tokens": 12, "temperature": 0})
_absent = {"status": 404}

_FORM: Final = "\r\n".join(
    (
        '--border\r\nContent-Disposition: form-data; name="model"\r\n',
        NAME,
        '--border\r\nContent-Disposition: form-data; name="file"; filename="speech.wav"\r\nContent-Type: audio/wav\r\n',
        "RIFF....WAVE",
        "--border--\r\n",
    )
).encode()

WHOLE: Final[dict[str, Case]] = {
    "chat": _chat(),
    "chat, several choices": _chat(n=3, temperature=0.9, seed=7),
    "chat, cut by max_completion_tokens": _chat(max_tokens=None, max_completion_tokens=3),
    "chat, content parts": _chat(messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]),
    "chat, unknown fields": _chat(never_heard_of={"a": [1, 2.50, None]}),
    "chat, token ids": _chat(return_token_ids=True),
    "completion": _completion(),
    "completion, echo": _completion(echo=True),
    "completion, a batch": _completion(prompt=["Once upon", STORY, "A heron"], n=2, temperature=0.9, seed=7),
    "completion, token ids": _completion(prompt=[5, 6, 7, 8]),
    "completion, batch of token ids": _completion(prompt=[[5, 6, 7], [8, 9]]),
    "response": _response(),
    "response, instructions": _response(instructions="Be brief."),
    "message": _message(),
    "count_tokens": Case("/v1/messages/count_tokens", {"model": NAME, "messages": TALK[1:], "system": STORY}),
    "tokenize": Case("/tokenize", {"model": NAME, "prompt": STORY}),
    "tokenize, a talk": Case("/tokenize", {"model": NAME, "messages": TALK}),
    "detokenize": Case("/detokenize", {"model": NAME, "tokens": [5, 6, 7, 8]}),
    # This model generates and does nothing else (POOLED is for one that does): what the engine doesn't have, it says itself.
    "embeddings": Case("/v1/embeddings", {"model": NAME, "input": ["one", "two"]}, 404),
    "rerank": Case("/rerank", {"model": NAME, "query": "heron", "documents": ["a bird", "a ship"]}, 404),
    "rerank, v1": Case("/v1/rerank", {"model": NAME, "query": "heron", "documents": ["a bird", "a ship"]}, 404),
    "rerank, v2": Case("/v2/rerank", {"model": NAME, "query": "heron", "documents": ["a bird", "a ship"]}, 404),
    "score": Case("/score", {"model": NAME, "text_1": "a bird", "text_2": "a ship"}, 404),
    "score, v1": Case("/v1/score", {"model": NAME, "text_1": "a bird", "text_2": "a ship"}, 404),
    "transcription": Case("/v1/audio/transcriptions", _FORM, 404, "multipart/form-data; boundary=border"),
    "translation": Case("/v1/audio/translations", _FORM, 404, "multipart/form-data; boundary=border"),
    "models": Case("/v1/models", None),
}

_embeddings = _asking("/v1/embeddings", {"input": STORY})
_BIRDS: Final = {"query": "Which of them is a bird?", "documents": ["a heron", "a lighthouse", STORY]}
_PAIRS: Final = {"text_1": "Which of them is a bird?", "text_2": ["a heron", STORY]}

POOLED: Final[dict[str, Case]] = {
    "embeddings": _embeddings(),
    "embeddings, a batch": _embeddings(input=["one", "two", STORY]),
    "embeddings, base64": _embeddings(encoding_format="base64"),
    "embeddings, token ids": _embeddings(input=[[5, 6, 7], [8, 9]]),
    "rerank": _asking("/rerank", _BIRDS)(),
    "rerank, v1, the best": _asking("/v1/rerank", _BIRDS)(top_n=1),
    "rerank, v2": _asking("/v2/rerank", _BIRDS)(),
    "score": _asking("/score", _PAIRS)(),
    "score, v1, one by one": _asking("/v1/score", {"text_1": ["a ship", "a bird"], "text_2": ["a boat", "a heron"]})(),
}
"""What an engine answers that generates nothing."""

STREAMS: Final[dict[str, Case]] = {
    "chat": _chat(stream=True),
    "chat, usage": _chat(stream=True, stream_options=USAGE),
    "chat, continuous usage": _chat(stream=True, stream_options=CONTINUOUS),
    "chat, continuous usage alone": _chat(stream=True, stream_options={"continuous_usage_stats": True}),
    "chat, no usage, said aloud": _chat(stream=True, stream_options={"include_usage": False}),
    "chat, several choices": _chat(stream=True, n=3, temperature=0.9, seed=7),
    "chat, several choices, usage": _chat(stream=True, n=3, temperature=0.9, seed=7, stream_options=USAGE),
    "chat, one token": _chat(stream=True, max_tokens=1),
    "completion": _completion(stream=True),
    "completion, usage": _completion(stream=True, stream_options=USAGE),
    "completion, a batch": _completion(stream=True, prompt=["Once upon", STORY], n=2, temperature=0.9, seed=7),
    "response": _response(stream=True),
    "message": _message(stream=True),
}


def _asks_for_usage(case: Case) -> bool:
    """On the other APIs everyone is told."""
    options = case.body.get("stream_options") if isinstance(case.body, Mapping) else None
    return not case.path.endswith("completions") or bool(options and options.get("include_usage"))


UNASKED: Final = [name for name, case in STREAMS.items() if not _asks_for_usage(case)]
"""Streams whose clients did not ask for usage."""


class Counted(NamedTuple):
    """Tokens as a client is told them: the prompts once each, all choices together, cached tokens among the input's."""

    input: int
    output: int
    cached: int | None = None
    """None: not said."""


class Generating(NamedTuple):
    """An operation that generates, for the workloads.

    `body`: (prompt, output tokens) → a request that generates exactly so many, where the API has a way to say so. `usage`: an
    answer → what it tells. `choices`: it takes `n`. `counts_on_request`: its streams say usage only to clients that ask.
    `named`: vLLM takes X-Request-Id for the request's name; on the others it makes one up.
    """

    name: str
    path: str
    body: Callable[[str, int], dict[str, Any]]
    usage: Callable[[Any], Counted]
    choices: bool
    counts_on_request: bool
    named: bool = True

    def prompt(self, text: str) -> dict[str, Any]:
        """What `/tokenize` is to be asked for the length of a prompt."""
        return {"prompt": text} if self.name == "completions" else {"messages": [{"role": "user", "content": text}]}


def _openai(usage: Any) -> Counted:
    return Counted(
        usage["prompt_tokens"], usage["completion_tokens"], (usage["prompt_tokens_details"] or {}).get("cached_tokens")
    )


def _responses(answer: Any) -> Counted:
    usage = answer.get("response", answer)["usage"]
    return Counted(usage["input_tokens"], usage["output_tokens"], usage["input_tokens_details"]["cached_tokens"])


def _messages(answer: Any) -> Counted:
    usage = answer["usage"]
    cached = usage.get("cache_read_input_tokens")
    written = usage.get("cache_creation_input_tokens")
    return Counted(usage["input_tokens"] + (cached or 0) + (written or 0), usage["output_tokens"], cached)


GENERATING: Final[Sequence[Generating]] = (
    Generating(
        "chat",
        "/v1/chat/completions",
        lambda prompt, tokens: {"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "ignore_eos": True},
        lambda answer: _openai(answer["usage"]),
        choices=True,
        counts_on_request=True,
    ),
    Generating(
        "completions",
        "/v1/completions",
        lambda prompt, tokens: {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True},
        lambda answer: _openai(answer["usage"]),
        choices=True,
        counts_on_request=True,
    ),
    Generating(
        "responses",
        "/v1/responses",
        lambda prompt, tokens: {"input": prompt, "max_output_tokens": tokens, "ignore_eos": True},
        _responses,
        choices=False,
        counts_on_request=False,
        named=False,
    ),
    Generating(
        "messages",
        "/v1/messages",
        lambda prompt, tokens: {"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens},
        _messages,
        choices=False,
        counts_on_request=False,
    ),
)


def counted(operation: Generating, reply: Reply) -> Counted | None:
    """The usage that an answer tells; None if it tells none."""
    if "text/event-stream" not in (reply.header("content-type") or ""):
        return operation.usage(reply.json())
    for _, data in reversed(events_of(reply)):
        holder = data.get("response", data) if isinstance(data, dict) else {}
        if holder.get("usage"):
            return operation.usage(data)
    return None
