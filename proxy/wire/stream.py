"""Watching a chat or completions stream go by.

Theory of operation
-------------------
On the way of the bytes (observer.py) it writes on the record: first token, first content, every gap between tokens, finish
reasons, token counts, the engine's timings.

Per event the work is a few byte searches; JSON is read only for an event that ends a choice, for the usage at
the end, and where several choices share a stream (each has its own running count). The searches are safe because a quote
inside a JSON string is always escaped: `"usage":{` can't occur within one.

*What was asked for is taken out again.* To count tokens also when a client leaves, a vLLM is asked for usage on every chunk. What
the client hadn't asked for is cut out: the usage of each chunk, the usage chunk at the end. vLLM writes `system_fingerprint` on
the chunks that end a choice when usage is off, and on the usage chunk when it is on; so it is put back where it would have been.

*What is withheld.* From the event on that ends the last choice, nothing goes out until the stream has ended (`[DONE]`): these
bytes are `tail`, released when the record is written. Engines send them in one breath, so nothing is late.

*What is broken.* An error event first of all becomes an HTTP status (`first_error`); a later one passes, and the request has
failed (`error_event`). A stream that ends before its choices is broken (`whole` is False); with `[DONE]` one is enough.
"""

from __future__ import annotations

import re

import msgspec
from msgspec import Raw, Struct

from proxy.errors import ProxyError
from proxy.exchange import Record, UsageSource
from proxy.wire.observer import Observer
from proxy.wire.sse import data_of
from proxy.wire.usage import MAX_COUNT, Usage, read_engine_timings, read_usage, write_finish_reason, write_usage

_DONE = b"[DONE]"
_CHOICES = b'"choices":'
_USAGE = b',"usage":'
_SPACED_USAGE = re.compile(rb',\s*"usage":\s*(?=[{n])')
_FINISH = re.compile(rb'"finish_reason":\s*"')
_TOKEN = re.compile(rb'"(?:content|reasoning|reasoning_content|refusal|text|arguments|name)":\s*"(?!")')
_CONTENT = re.compile(rb'"(?:content|text)":\s*"(?!")')
_FINGERPRINT = re.compile(rb',"system_fingerprint":"[^"]*"')


class _Choice(Struct, gc=False):
    index: int = 0
    finish_reason: str | None = None


class _Chunk(Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: Raw = Raw(b"")
    metrics: Raw = Raw(b"")
    timings: Raw = Raw(b"")
    error: Raw = Raw(b"")


_chunk = msgspec.json.Decoder(_Chunk)


class Terms(Struct, frozen=True):
    """What was agreed about usage on this stream: what we asked the engine for beyond what the client had asked for."""

    cut_usage: bool = False
    """Take `usage` out of each chunk."""
    drop_usage_chunk: bool = False
    """Take the chunk with empty `choices` out."""
    move_fingerprint: bool = False
    """Put `system_fingerprint` back on the chunks that end a choice."""
    n: int = 1
    """Choices per prompt."""


class StreamObserver(Observer):
    """The chunks of one answer."""

    _ending = b""
    """The withheld event that ended the last choice, as long as it may get a fingerprint."""

    def __init__(self, record: Record, terms: Terms, *, limit: int, fingerprint: bytes = b"") -> None:
        super().__init__(record, limit)
        self.fingerprint = fingerprint
        self._terms = terms
        self._several = record.choices > 1
        self._counts: dict[int, Usage] = {}

    @property
    def answered(self) -> bool:
        """Every choice has ended: nothing that a client waits for is still to come."""
        return len(self._record.finish_reasons) >= self._record.choices

    @property
    def whole(self) -> bool:
        """Every choice has ended, or `[DONE]` has followed the end of one; a stream that stops before is broken."""
        return self.answered or (self.done and bool(self._record.finish_reasons))

    def broken(self, error: ProxyError) -> bytes:
        """OpenAI's API: an event with an `error` object, and no `[DONE]`."""
        return b"data: %b\n\n" % error.body()

    def settle(self) -> None:
        """Write the token counts known so far on the record: what was written there before is not mixed with them."""
        record = self._record
        record.input_tokens = record.cached_tokens = record.output_tokens = record.reasoning_tokens = 0
        record.usage_source = UsageSource.NONE
        if self._counts:
            self._settle_several()
        elif self.usage and (usage := read_usage(self.usage)) is not None:
            write_usage(usage, record)
        else:
            self._estimate()

    # -- one event --

    def _event(self, event: bytes, now: int) -> bytes:
        choices = event.find(_CHOICES)
        value = choices + len(_CHOICES)
        if self.done or choices < 0 or not event.startswith(b"[", value) or not event.startswith(b"data: {"):
            return self._unusual(event, now)
        if event.startswith(b"[]", value):
            return self._without_choices(event)
        start = event.rfind(_USAGE)
        usage = b""
        if start > 0:
            event, usage = self._take_usage(event, start, start + len(_USAGE))
        return self._chunk(event, choices, usage, now)

    def _chunk(self, event: bytes, choices: int, usage: bytes, now: int) -> bytes:
        """A chunk of the answer; `choices` is where they begin, `usage` what was said with it."""
        record = self._record
        record.chunks += 1
        self._started = True
        if self._several:
            self._count_several(event, usage)
            token = _TOKEN.search(event, choices) is not None
        elif usage:
            token = usage != self.usage and (record.first_token_ns > 0 or _TOKEN.search(event, choices) is not None)
            self.usage = usage
        else:
            token = _TOKEN.search(event, choices) is not None
        if token:
            self._token(not record.first_content_ns and _CONTENT.search(event, choices) is not None, now)
        if event.find(b'"finish_reason":null', choices) < 0 or self._several:
            return self._finishing(event, choices)
        return event

    def _take_usage(self, event: bytes, start: int, value: int) -> tuple[bytes, bytes]:
        """The field `,"usage":` at `start`, its value at `value` → (the event as the client may see it, the object or b"")."""
        stop = _end_of_value(event, value)
        if stop < 0:
            return event, b""
        usage = event[value:stop]
        if usage == b"null":
            # Nobody counted here; where the client asked for the totals, it may see that.
            cut = self._terms.drop_usage_chunk
            return (event[:start] + event[stop:] if cut else event), b""
        if self._terms.cut_usage:
            event = event[:start] + event[stop:]
        return event, usage

    def _finishing(self, event: bytes, choices: int) -> bytes:
        """An event that may end choices."""
        if _FINISH.search(event, choices) is None:
            return event
        if chunk := _read(event):
            for choice in chunk.choices or ():
                write_finish_reason(choice.finish_reason, self._record)
        wanted = self._terms.move_fingerprint and _FINGERPRINT.search(event) is None
        if self.answered:
            self._withholding = True
            self._ending = event if wanted else b""
        elif wanted and self.fingerprint:
            return _with_field(event, self.fingerprint)
        return event

    def _without_choices(self, event: bytes) -> bytes:
        """A chunk with no choices: the totals, and on vLLM the fingerprint and the timings; or something of another server's."""
        self._record.chunks += 1
        chunk = _read(event)
        usage = bytes(chunk.usage) if chunk is not None else b""
        if chunk is None or usage in (b"", b"null"):
            self._started = True
            return event
        self.usage, self._counts = usage, {}
        self._record.engine = read_engine_timings(bytes(chunk.metrics), bytes(chunk.timings)) or self._record.engine
        if match := _FINGERPRINT.search(event):
            self.fingerprint = match[0]
        if not self._terms.drop_usage_chunk:
            self._started = True
            return event
        if self._ending and self.fingerprint:
            self.tail = self.tail.replace(self._ending, _with_field(self._ending, self.fingerprint), 1)
            self._ending = b""
        return b""

    def _unusual(self, event: bytes, now: int) -> bytes:
        """Anything but a chunk as vLLM writes it: a comment, the end, an error, JSON with spaces in it."""
        if self.done:
            return b""
        data = data_of(event)
        if data is None:
            self._started = True
            return event
        if data.strip() == _DONE:
            self.done = True
            self.tail += event
            return b""
        chunk = _read_data(data)
        if chunk is None or chunk.choices is None:
            if chunk is not None and len(chunk.error):
                return self._error(event, bytes(chunk.error))
            self._started = True
            return event
        if not chunk.choices:
            return self._without_choices(event)
        usage = b""
        if match := _SPACED_USAGE.search(event):
            event, usage = self._take_usage(event, match.start(), match.end())
        return self._chunk(event, 0, usage, now)

    def _error(self, event: bytes, error: bytes) -> bytes:
        if not self._started:
            self.first_error = b'{"error":%b}' % error
            self.done = True
            return b""
        self.error_event = error
        return event

    # -- several choices in one stream: each carries its own running count --

    def _count_several(self, event: bytes, usage: bytes) -> None:
        if usage and (chunk := _read(event)) is not None and chunk.choices and (said := read_usage(usage)) is not None:
            index = chunk.choices[0].index
            if 0 <= index < self._record.choices:
                self._counts[index] = said

    def _settle_several(self) -> None:
        """Sum the choices; a prompt counts once, however many choices it has."""
        # Choices of one prompt follow one another: with `n` of them each, choice i belongs to prompt i // n.
        prompts = {index // self._terms.n: usage.prompt_tokens or 0 for index, usage in self._counts.items()}
        completion = sum(usage.completion_tokens or 0 for usage in self._counts.values())
        write_usage(Usage(min(sum(prompts.values()), MAX_COUNT), min(completion, MAX_COUNT)), self._record)


def _read(event: bytes) -> _Chunk | None:
    data = data_of(event)
    return None if data is None else _read_data(data)


def _read_data(data: bytes) -> _Chunk | None:
    try:
        return _chunk.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None


def _end_of_value(event: bytes, start: int) -> int:
    """Where the JSON value at `start` (null or an object of numbers) ends; -1 if it isn't one of the two."""
    if event.startswith(b"null", start):
        return start + 4
    if not event.startswith(b"{", start):
        return -1
    depth, at = 0, start
    while stop := event.find(b"}", at) + 1:
        depth += event.count(b"{", at, stop) - 1
        if not depth:
            return stop
        at = stop
    return -1


def _with_field(event: bytes, field: bytes) -> bytes:
    """`event` with `,"name":value` put before its last brace."""
    at = event.rfind(b"}")
    return event[:at] + field + event[at:]
