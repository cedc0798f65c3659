"""What the streams of chat and completions have in common: chunks of one choice each, totals at the end, `[DONE]`.

vLLM writes the totals (usage, its own timings) into a chunk without choices, with the fingerprint, where usage was asked for;
else the fingerprint stands on the chunks that end a choice. `Chunks` has them apart: it is the same for all forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Generic, Protocol, TypeVar

import msgspec
from msgspec import UNSET, Raw, UnsetType

from proxy.cache.entry import Form
from proxy.cache.forms.strict import Made, Odd, Strict, check, event, events_of, one, raw, without_nulls

_DONE: Final = b"[DONE]"


class PromptDetails(Strict):
    cached_tokens: int | None = None
    created_cache_tokens: int | None = None
    multimodal_tokens: dict[str, int] | None = None


class CompletionDetails(Strict):
    reasoning_tokens: int


class Usage(Strict):
    """In an answer in one piece all members are there; in a stream's totals only those that aren't null."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: CompletionDetails | None = None


class Drafts(Strict):
    mean_acceptance_length: float
    draft_acceptance_rate: float
    acceptance_histogram: list[int]
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_spec_tokens: int
    per_step_accepted: list[int] | None = None
    per_step_drafted: list[int] | None = None


class Metrics(Strict):
    """With `--enable-per-request-metrics`; as with usage, a stream has no nulls."""

    time_to_first_token_ms: float | None = None
    generation_time_ms: float | None = None
    queue_time_ms: float | None = None
    mean_itl_ms: float | None = None
    tokens_per_second: float | None = None
    speculative_decoding: Drafts | None = None


class StreamChoice(Protocol):
    index: int
    finish_reason: str | None


C = TypeVar("C", bound=StreamChoice)


class Chunk(Strict, Generic[C]):
    """What begins a chunk of either API."""

    id: Raw
    object: str
    created: Raw
    model: Raw
    choices: list[C]
    usage: Raw | UnsetType = UNSET
    system_fingerprint: Raw | UnsetType = UNSET

    @property
    def choice(self) -> C:
        """Of which it has one. Raises ValueError."""
        (choice,) = self.choices
        return choice


class Totals(Strict):
    """The chunk without choices."""

    id: Raw
    object: str
    created: Raw
    model: Raw
    choices: tuple[()]
    usage: Raw
    system_fingerprint: Raw | UnsetType = UNSET
    metrics: Raw | UnsetType = UNSET


K = TypeVar("K", bound=Chunk)  # type: ignore[type-arg]  # of whichever choices


class Chunks(msgspec.Struct, Generic[K]):
    """A stream, whatever its form. `fingerprint`: JSON."""

    chunks: Sequence[K]
    fingerprint: Raw | UnsetType
    usage: Usage | None
    """None: nobody has told it."""
    metrics: Metrics | None = None


_usage = msgspec.json.Decoder(Usage)
_metrics = msgspec.json.Decoder(Metrics)
_totals = msgspec.json.Decoder(Totals)


def read(body: bytes, form: Form, usage: bytes, object_: str, decoder: msgspec.json.Decoder[K]) -> Chunks[K]:
    """A stream of that form, whose usage was told apart from it if it was. Raises Odd, MsgspecError."""
    named = list(events_of(body))
    check(not any(name for name, _ in named), "a typed event")
    *texts, end = [data for _, data in named] or [b""]
    check(end == _DONE and len(texts) > 1, "a stream that isn't complete")
    totals = None if form == Form.STREAM else _totals.decode(texts.pop())
    chunks = [decoder.decode(text) for text in texts]
    _check_identity([*chunks, totals] if totals is not None else chunks, object_)
    _check_course(chunks)
    for chunk in chunks:
        check((chunk.usage is not UNSET) == (form == Form.STREAM_WITH_USAGES), "usage where it wasn't asked for")
        chunk.usage = UNSET
    prints = {bytes(chunk.system_fingerprint) for chunk in chunks if isinstance(chunk.system_fingerprint, Raw)}
    for chunk in chunks:
        check(chunk.system_fingerprint is UNSET or chunk.choice.finish_reason is not None, "an early fingerprint")
        chunk.system_fingerprint = UNSET
    if totals is None:
        found: Raw | UnsetType = Raw(one(prints)) if prints else UNSET
        return Chunks(chunks, found, _usage.decode(usage) if usage else None)
    check(not prints, "a fingerprint too many")
    metrics = _metrics.decode(totals.metrics) if isinstance(totals.metrics, Raw) else None
    return Chunks(chunks, totals.system_fingerprint, _usage.decode(totals.usage), metrics)


def _check_identity(chunks: Sequence[Chunk[C] | Totals], object_: str) -> None:
    one((bytes(each.id), bytes(each.created), bytes(each.model), each.object) for each in chunks)
    check(chunks[0].object == object_, "chunks of something else")


def _check_course(chunks: Sequence[Chunk[C]]) -> None:
    """Every choice from the first on has ended, and nothing was said after its end."""
    open_, ended = set(), set()
    for chunk in chunks:
        choice = chunk.choice
        check(choice.index not in ended, "more after the end")
        open_.add(choice.index)
        if choice.finish_reason is not None:
            ended.add(choice.index)
    check(open_ == ended == set(range(len(open_))), "a choice that hasn't ended")


def by_choice(chunks: Sequence[K]) -> list[list[K]]:
    """Those of each choice, in order."""
    found: dict[int, list[K]] = {}
    for chunk in chunks:
        found.setdefault(chunk.choice.index, []).append(chunk)
    return [found[index] for index in sorted(found)]


def write(chunks: Chunks[K], form: Form) -> Made:
    """The stream in a form. Raises Odd."""
    if form == Form.STREAM_WITH_USAGES:
        raise Odd("nobody counted at each chunk")
    encode = msgspec.json.Encoder().encode
    if form == Form.STREAM:
        for chunk in chunks.chunks:
            if chunk.choice.finish_reason is not None:
                chunk.system_fingerprint = chunks.fingerprint
    events = [event(encode(chunk)) for chunk in chunks.chunks]
    usage = b"" if chunks.usage is None else encode(without_nulls(chunks.usage))
    if form == Form.STREAM_WITH_USAGE:
        events.append(event(encode(_totals_of(chunks, usage))))
        usage = b""
    return Made(b"".join([*events, event(_DONE)]), usage)


def _totals_of(chunks: Chunks[K], usage: bytes) -> Totals:
    check(usage != b"", "nobody has told the usage")
    first = chunks.chunks[0]
    metrics = UNSET if chunks.metrics is None else raw(without_nulls(chunks.metrics))
    return Totals(first.id, first.object, first.created, first.model, (), Raw(usage), chunks.fingerprint, metrics)
