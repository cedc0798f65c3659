"""Completions, as vLLM 0.31 to 0.33 write them.

With `echo` a stream tells the prompt's tokens unasked, and an answer in one piece its logprobs: such answers stay as they are.
`prompt_logprobs`, `routed_experts` and `kv_transfer_params` an engine tells in one piece only.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import UNSET, Raw, UnsetType

from proxy.cache.entry import Form
from proxy.cache.forms.chunks import Chunk, Chunks, Metrics, Usage, by_choice, read, write
from proxy.cache.forms.strict import NULL, Made, Strict, check, given, pieces, pieces_by, shares

_OBJECT: Final = "text_completion"


class Logprobs(Strict):
    """Columns, a row for each token."""

    text_offset: list[int]
    token_logprobs: list[Raw]
    tokens: list[str]
    top_logprobs: list[Raw]


class TextChoice(Strict):
    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: str | None
    stop_reason: Raw
    prompt_token_ids: Raw
    """On the first chunk of a choice; null on the others."""
    token_ids: list[int] | None
    weight_versions: Raw | UnsetType = UNSET
    """From 0.33 on; null where a choice doesn't end."""


class TextChunk(Chunk[TextChoice]):
    kv_transfer_params: UnsetType | None = UNSET
    """From 0.33 on."""


class Choice(Strict):
    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: str
    stop_reason: Raw
    token_ids: list[int] | None
    prompt_logprobs: None
    prompt_token_ids: Raw
    routed_experts: None
    weight_versions: Raw | UnsetType = UNSET


class Answer(Strict):
    id: Raw
    object: str
    created: Raw
    model: Raw
    choices: list[Choice]
    service_tier: None
    system_fingerprint: Raw
    usage: Usage
    kv_transfer_params: None
    ec_transfer_params: None
    metrics: Metrics | None


class Asked(msgspec.Struct):
    echo: bool | None = None


_chunk = msgspec.json.Decoder(TextChunk)
_answer = msgspec.json.Decoder(Answer)
_asked = msgspec.json.Decoder(Asked)


def convert(body: bytes, usage: bytes, old: Form, new: Form, request: bytes) -> Made:
    """Raises Odd, MsgspecError."""
    if old != Form.WHOLE != new:
        return write(read(body, old, usage, _OBJECT, _chunk), new)
    check(not _asked.decode(request).echo, "an echo")
    if old == Form.WHOLE:
        return write(_scatter(_answer.decode(body)), new)
    return Made(msgspec.json.encode(_gather(read(body, old, usage, _OBJECT, _chunk))))


# -- a stream's chunks → an answer in one piece --


def _gather(stream: Chunks[TextChunk]) -> Answer:
    first = stream.chunks[0]
    return Answer(
        id=first.id,
        object=_OBJECT,
        created=first.created,
        model=first.model,
        choices=[_gather_choice([chunk.choice for chunk in chunks]) for chunks in by_choice(stream.chunks)],
        service_tier=None,
        system_fingerprint=stream.fingerprint or NULL,
        usage=given(stream.usage, "nobody has told the usage"),
        kv_transfer_params=None,
        ec_transfer_params=None,
        metrics=stream.metrics,
    )


def _gather_choice(parts: list[TextChoice]) -> Choice:
    first, *rest = parts
    check(all(part.prompt_token_ids == NULL for part in rest), "the prompt a second time")
    *others, end = parts
    check(all(part.stop_reason == NULL and part.weight_versions in (UNSET, NULL) for part in others), "an end before the end")
    ids = [part.token_ids for part in parts if part.token_ids is not None]
    return Choice(
        index=first.index,
        text="".join([part.text for part in parts]),
        logprobs=_gather_logprobs([part.logprobs for part in parts if part.logprobs is not None]),
        finish_reason=given(end.finish_reason, "no end"),
        stop_reason=end.stop_reason,
        token_ids=[id_ for each in ids for id_ in each] if ids else None,
        prompt_logprobs=None,
        prompt_token_ids=first.prompt_token_ids,
        routed_experts=None,
        weight_versions=end.weight_versions,
    )


def _gather_logprobs(each: list[Logprobs]) -> Logprobs | None:
    if not each:
        return None
    whole = Logprobs([], [], [], [])
    for part in each:
        whole.text_offset += part.text_offset
        whole.token_logprobs += part.token_logprobs
        whole.tokens += part.tokens
        whole.top_logprobs += part.top_logprobs
    offset = 0
    for said, token in zip(whole.text_offset, whole.tokens, strict=True):
        check(said == offset, "offsets that don't go on where a chunk ends")
        offset += len(token)
    return whole


# -- an answer in one piece → a stream's chunks --


def _scatter(answer: Answer) -> Chunks[TextChunk]:
    check(answer.object == _OBJECT and bool(answer.choices), "something else")
    check([choice.index for choice in answer.choices] == list(range(len(answer.choices))), "choices out of order")
    fingerprint: Raw | UnsetType = UNSET if answer.system_fingerprint == NULL else answer.system_fingerprint
    chunks = []
    for choice in answer.choices:
        for part in _scatter_choice(choice):
            chunk = TextChunk(answer.id, _OBJECT, answer.created, answer.model, [part])
            if choice.weight_versions is not UNSET:
                chunk.kv_transfer_params = None
            chunks.append(chunk)
    return Chunks(chunks, fingerprint, answer.usage, answer.metrics)


def _scatter_choice(choice: Choice) -> list[TextChoice]:
    by_token = pieces_by(choice.logprobs.tokens, choice.text) if choice.logprobs is not None else []
    texts = by_token or pieces(choice.text)
    if choice.finish_reason != "length" or not texts:
        texts.append("")
    later = UNSET if choice.weight_versions is UNSET else NULL
    logprobs = _scatter_logprobs(choice.logprobs, len(texts), bool(by_token))
    ids = shares(choice.token_ids, len(texts), each=bool(by_token))
    parts = [
        TextChoice(choice.index, text, said, None, NULL, NULL, token_ids, later)
        for text, said, token_ids in zip(texts, logprobs, ids, strict=True)
    ]
    parts[0].prompt_token_ids = choice.prompt_token_ids
    end = parts[-1]
    end.finish_reason, end.stop_reason, end.weight_versions = choice.finish_reason, choice.stop_reason, choice.weight_versions
    return parts


def _scatter_logprobs(whole: Logprobs | None, parts: int, each: bool) -> list[Logprobs | None]:
    if whole is None:
        return [None] * parts
    rows = list(zip(whole.text_offset, whole.token_logprobs, whole.tokens, whole.top_logprobs, strict=True))
    dealt = shares(rows, parts, each=each)
    return [Logprobs(*map(list, zip(*some, strict=True))) if some else Logprobs([], [], [], []) for some in dealt]
