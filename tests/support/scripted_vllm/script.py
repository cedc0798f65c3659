"""The script of one request: what a scripted vLLM does with it.

A script travels in the request body, as the extra top-level field `script`: vLLM accepts unknown fields and a proxy passes
them through, so the same bytes drive the same behaviour straight and through a proxy. An unknown field in a script is an
error 400, never ignored: a test with a typing mistake must not pass.

Times are seconds, sizes bytes; "events" are SSE events of the answer (comments don't count, `[DONE]` does).
"""

from __future__ import annotations

import functools
from typing import Annotated, Literal

import msgspec

Count = Annotated[int, msgspec.Meta(ge=1)]
Many = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]


class Script(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Every field has vLLM's own behaviour as its default."""

    # What is generated. Each token is one event, as in vLLM with its default stream interval.
    tokens: Count = 8
    """Completion tokens of one choice; the last one is the end-of-sequence token if `finish` is "stop"."""
    content: str | None = None
    """This text, cut into words; replaces `tokens`."""
    pieces: tuple[tuple[str, ...], ...] | None = None
    """These very token texts, one tuple a choice (the last tuple serves further choices); replaces `content`."""
    order: tuple[int, ...] = ()
    """Which choice speaks in each event, for n > 1; default: every choice in each engine step."""
    finish: Literal["stop", "length", "abort"] = "stop"
    tokens_per_event: Count = 1
    """As `--stream-interval`: the first token comes alone, then so many in one event."""
    reasoning: Many = 0
    """So many of the tokens come first, as `reasoning` deltas."""
    tools: bool = False
    """Two parallel tool calls instead of content, named after the request's tools."""
    prompt_tokens: Count | None = None
    """Default: the words of the prompt, and the 30 tokens of SmolLM2's chat template."""
    cached_tokens: Many | None = None
    """As `--enable-prompt-tokens-details`: usage says that so many prompt tokens came from the prefix cache."""
    metrics: bool = False
    """As `--enable-per-request-metrics`."""
    usage: Literal["none", "last", "continuous", "twice", "middle", "null", "zero", "float"] | None = None
    """Usage against what the request asked for. "null": on every event and in a last one; "float": not whole numbers."""
    vectors: dict[str, tuple[float, ...]] = {}
    """The embeddings of these texts. Default: of each text another one of eighths."""
    body_bytes: Count | None = None
    """Size of the whole body of an answer that isn't streamed, to the byte."""

    # When it comes.
    first: Seconds = 0.0
    """Prefill: time before the first byte of the body. The head of a stream is sent at once, as uvicorn does."""
    late_head: bool = False
    """Keep the head of a stream back until the first event is there."""
    after_role: Seconds = 0.0
    """Time between the role event and the first token; vLLM has none, other servers do."""
    interval: Seconds = 0.0
    """Time between two engine steps. An answer that isn't streamed takes as long, and counts its tokens meanwhile."""
    prefill_comments: Many = 0
    """So many `: keep-alive` comments, spread over `first`."""

    # How the events are written.
    coalesce: Count = 1
    """So many events in one write."""
    chunk_bytes: Many = 0
    """Cut every write into pieces of this size."""
    split: Literal["tcp", "http"] = "tcp"
    """What such a piece is: a write of its own in unchanged HTTP framing, or an HTTP chunk of its own."""
    newline: Literal["\n", "\r\n", "\r"] = "\n"
    bom: bool = False
    comments: Many = 0
    """A comment after each so many events that bring tokens: usage, asked for or not, changes nothing about them."""
    multiline: bool = False
    """Each event's JSON on two `data:` lines."""
    event_fields: bool = False
    """`event:`, `id:` and `retry:` before each `data:`; the same each time, for the reason given at `comments`."""
    huge_line: Many = 0
    """One more event after the first token, whose only line holds this many bytes of padding."""
    gzip: bool = False
    headers: dict[str, str] = {}
    """Response headers to set or replace."""

    # How it goes wrong.
    status: int = 200
    """Another status than 200 is answered with vLLM's error body."""
    error: str = ""
    """The message of that body, and of the in-band error."""
    error_event_after: Many | None = None
    """After so many events an in-band error event, then `[DONE]`: a clean end, as when vLLM's engine dies."""
    error_done: bool = True
    """Whether `[DONE]` follows that error."""
    error_kind: Literal["", "error", "response.failed"] = ""
    """The event of /v1/responses in place of that error, as OpenAI's own sends one; vLLM closes the connection instead."""
    incomplete_event: bool = False
    """At the limit of tokens /v1/responses ends with `response.incomplete`, as OpenAI's own; vLLM's ends as ever."""
    cut_after_events: Many | None = None
    cut_after_bytes: Many | None = None
    """Cut the body there (bytes of the body, without HTTP framing)."""
    cut: Literal["reset", "close", "clean"] = "reset"
    """TCP reset, TCP close inside the body, or a proper end of the HTTP body."""
    hang: bool = False
    """Accept, and send nothing, not even a head."""
    hang_after_events: Many | None = None
    """Fall silent there; `ScriptedVLLM.release()` lets it go on."""
    no_done: bool = False
    no_finish: bool = False
    replay: str | None = None
    """Answer with these captured bytes, status and headers included: a name below `tests/fixtures/vllm-0.32.0`, or
    `llamacpp/<name>`."""
    body: str | None = None
    """This body, verbatim."""
    raw: str | None = None
    """These bytes (as Latin-1) instead of an HTTP response."""
    raw_closes: bool = True
    """Close after them."""

    @property
    def plain(self) -> bool:
        """Nothing in time or in writing keeps a whole answer from being one write."""
        return not (
            self.first
            or self.interval
            or self.hang
            or self.chunk_bytes
            or self.gzip
            or self.hang_after_events is not None
            or self.cut_after_bytes is not None
            or self.cut_after_events is not None
            or self.raw is not None
        )


_decoder = msgspec.json.Decoder(Script)


@functools.lru_cache(maxsize=4096)
def parse(raw: bytes) -> Script:
    """Raises msgspec.ValidationError; remembered, because a benchmark sends the same script each time."""
    return _decoder.decode(raw)
