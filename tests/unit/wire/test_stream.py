"""Watching streams: bytes of an engine in, bytes for the client out, facts on the record.

Three sources: streams captured from real servers, streams that the scripted vLLM would write (its sans-io part), streams by hand.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.exchange import INTER_TOKEN_BOUNDS_NS, EngineTimings, Record, UsageSource
from proxy.wire.chat import OPERATION as CHAT
from proxy.wire.completions import OPERATION as COMPLETIONS
from proxy.wire.observer import MAX_WITHHELD_BYTES
from proxy.wire.operation import JSON, EngineOperation
from proxy.wire.sse import OversizedEvent
from proxy.wire.stream import StreamObserver, Terms
from tests.support.scripted_vllm import Script, captured, dialect, framing, generation, requests
from tests.support.wire_client import anonymous

LIMIT = 1 << 20
INJECTED = Terms(cut_usage=True, drop_usage_chunk=True, move_fingerprint=True)
"""The client asked for nothing."""
TOTALS = Terms(cut_usage=True)
"""The client asked for usage at the end."""
AT_THE_END = Terms(cut_usage=True, drop_usage_chunk=True)
"""The client asked for nothing, and the engine isn't a vLLM."""
DONE = b"data: [DONE]\n\n"


def blank(choices: int = 1) -> Record:
    record = Record(b"i" * 16, b"t" * 16, 1, 0)
    record.choices, record.request_bytes = choices, 400
    return record


class Watched(NamedTuple):
    reads: list[bytes]
    """What could go out after each read."""
    tail: bytes
    """What was withheld to the end."""
    record: Record
    observer: StreamObserver

    @property
    def client(self) -> bytes:
        return b"".join(self.reads) + self.tail

    @property
    def tokens(self) -> tuple[int, int, int]:
        return self.record.input_tokens, self.record.output_tokens, self.record.usage_source


def watch(
    reads: Iterable[bytes], terms: Terms = INJECTED, *, choices: int = 1, limit: int = LIMIT, known: bytes = b""
) -> Watched:
    """Feed a stream in these reads, one every 10 ns."""
    record = blank(choices)
    observer = StreamObserver(record, terms, limit=limit, fingerprint=known)
    out = [observer.feed(data, 10 * number) for number, data in enumerate(reads, 1)]
    observer.end(10 * len(out) + 10)
    observer.settle()
    return Watched(out, observer.tail, record, observer)


def facts(watched: Watched) -> tuple[object, ...]:
    """What doesn't depend on how the bytes were cut."""
    record = watched.record
    return (record.finish_reasons, record.chunks, *watched.tokens, record.cached_tokens, record.reasoning_tokens, record.engine)


def cut(text: bytes, places: Iterable[int]) -> list[bytes]:
    places = [0, *sorted({place % (len(text) + 1) for place in places}), len(text)]
    return [text[start:stop] for start, stop in pairwise(places)]


def event(**chunk: Any) -> bytes:
    return b"data: %b\n\n" % json.dumps(chunk, separators=(",", ":")).encode()


def said(text: str = "x", finish: str | None = None, index: int = 0, **more: Any) -> bytes:
    """A chunk with one choice."""
    return event(id="i", choices=[{"index": index, "delta": {"content": text}, "finish_reason": finish}], **more)


def totals(*counts: object, **more: Any) -> bytes:
    """The usage chunk."""
    return event(id="i", choices=[], usage=dict(zip(("prompt_tokens", "completion_tokens"), counts, strict=True)), **more)


# --- captured streams --------------------------------------------------------------------------------------------------


def sample(name: str) -> bytes:
    return captured.load(name).body


@pytest.mark.parametrize(
    ("engine", "terms", "client"),
    [
        ("chat_stream_usage_cont", INJECTED, "chat_stream"),
        ("chat_stream_usage_cont", TOTALS, "chat_stream_usage"),
        ("chat_stream_usage_cont", Terms(), "chat_stream_usage_cont"),
        ("chat_stream_usage", INJECTED, "chat_stream"),
        ("chat_stream_usage", Terms(), "chat_stream_usage"),
        ("chat_stream", INJECTED, "chat_stream"),
        ("chat_stream", Terms(), "chat_stream"),
    ],
)
@pytest.mark.parametrize("reads", ["whole", "events", "bytes"])
def test_what_the_client_sees_is_what_it_would_have_seen(
    engine: str, terms: Terms, client: str, reads: str
) -> None:  # failure 17
    body = sample(engine)
    pieces = {"whole": [body], "events": captured.load(engine).blocks(), "bytes": cut(body, range(len(body)))}[reads]
    watched = watch(pieces, terms)
    assert anonymous(watched.client) == anonymous(sample(client))
    assert watched.record.finish_reasons == ["stop"]
    if engine != "chat_stream":
        assert watched.tokens == (37, 8, UsageSource.ENGINE)


STREAMS = [name for name in captured.names(streamed=True) if "messages" not in name and "responses" not in name]


@pytest.mark.parametrize("name", STREAMS)
def test_what_was_not_asked_for_is_all_that_is_taken_out(name: str) -> None:
    assert watch(captured.load(name).blocks(), Terms(), choices=2).client == sample(name)


@pytest.mark.parametrize(
    ("name", "choices", "expected"),
    [
        ("chat_stream_usage_cont", 1, (["stop"], 37, 8, 0)),
        ("chat_stream_n2", 2, (["length", "length"], 37, 10, 0)),
        ("completions_stream", 1, (["length"], 5, 5, 0)),
        ("flags/tools_named_stream", 1, (["length"], 37, 30, 32)),
        ("flags/chat_stream_cached", 1, (["length"], 151, 6, 128)),
        ("two/per_request_metrics_stream", 1, (["length"], 37, 2, 32)),
        ("llamacpp/chat_stream", 1, (["length"], 37, 3, 36)),
    ],
)
@pytest.mark.parametrize("terms", [INJECTED, TOTALS, Terms()], ids=["injected", "totals", "as it came"])
def test_captured_streams_are_understood(
    name: str, choices: int, expected: tuple[list[str], int, int, int], terms: Terms
) -> None:
    record = watch(captured.load(name).blocks(), terms, choices=choices).record
    assert (record.finish_reasons, record.input_tokens, record.output_tokens, record.cached_tokens) == expected
    assert record.usage_source == UsageSource.ENGINE
    assert 0 < record.first_token_ns <= record.last_token_ns


def test_an_engines_timings_are_kept() -> None:
    vllm = watch([sample("two/per_request_metrics_stream")], Terms()).record.engine
    assert vllm is not None
    assert vllm.prefill_ms == vllm.time_to_first_token_ms
    assert vllm == EngineTimings(0.03489100004117063, 30.331022000154917, vllm.prefill_ms, 30.80787999988388, 30.80787999988388)
    llama = watch([sample("llamacpp/chat_stream")], AT_THE_END).record.engine
    assert llama == EngineTimings(prefill_ms=9.086, decode_ms=18.032, mean_inter_token_ms=9.016)


@pytest.mark.parametrize(
    "name", ["chat_stream_usage_cont", "completions_stream", "flags/tools_named_stream", "llamacpp/chat_stream"]
)
def test_a_cut_anywhere_changes_nothing(name: str) -> None:  # failure 13
    body = sample(name)
    whole = watch([body])
    for at in range(len(body)):
        parted = watch([body[:at], body[at:]])
        assert parted.client == whole.client
        assert facts(parted) == facts(whole)


# --- streams that vLLM would write -------------------------------------------------------------------------------------


def engine(body: bytes, script: Script, *, chat: bool = True, known: bytes = b"chatcmpl-1") -> bytes:
    """The bytes with which the scripted vLLM answers."""
    asked = requests.read(body, JSON)
    context = requests.Context(script=script, answer_id=known, created=1, models=("m",), max_model_len=4096)
    call = generation.understand(asked, context, chat=chat)
    pieces = framing.faulty(dialect.stream(call), script, functools.partial(dialect.failure, script))
    end = script.newline.encode()
    return b"".join(framing.sse_event(piece, script, end) for piece in pieces if not isinstance(piece, str))


FINGERPRINT = b',"system_fingerprint":"%b"' % dialect.FINGERPRINT


def straight_and_through(body: dict[str, Any], script: Script, chat: bool, places: Iterable[int] = ()) -> tuple[bytes, Watched]:
    """(what the engine answers to the client's own request, what comes of its answer to the proxy's)."""
    operation: EngineOperation[Any] = CHAT if chat else COMPLETIONS
    data = json.dumps(body).encode()
    record = blank()
    upstream = operation.prepare(data, operation.read(data, record, JSON), "vllm")
    reads = cut(engine(upstream.whole, script, chat=chat), places)
    return engine(data, script, chat=chat), watch(reads, upstream.terms, choices=record.choices, known=FINGERPRINT)


def generated(body: dict[str, Any], script: Script, chat: bool) -> int:
    asked = requests.read(json.dumps(body).encode(), JSON)
    context = requests.Context(script=script, answer_id=b"i", created=1, models=("m",), max_model_len=4096)
    call = generation.understand(asked, context, chat=chat)
    return call.completion_tokens


_options = st.sampled_from(
    [
        {},
        {"stream_options": None},
        {"stream_options": {}},
        {"stream_options": {"include_usage": False, "more": 1}},
        {"stream_options": {"continuous_usage_stats": True}},
        {"stream_options": {"include_usage": True}},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ]
)
_scripts = st.fixed_dictionaries(
    {},
    optional={
        "tokens": st.integers(1, 20),
        "content": st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
        "finish": st.sampled_from(["stop", "length", "abort"]),
        "tokens_per_event": st.integers(1, 4),
        "reasoning": st.integers(0, 4),
        "tools": st.booleans(),
        "cached_tokens": st.integers(0, 5),
        "metrics": st.booleans(),
        "newline": st.sampled_from(["\n", "\r\n", "\r"]),
        "multiline": st.booleans(),
        "event_fields": st.booleans(),
    },
)


@settings(max_examples=200, deadline=None)
@given(_scripts, _options, st.booleans(), st.integers(1, 3), st.booleans(), st.lists(st.integers(0, 10_000), max_size=30))
def test_any_stream_of_a_vllm(
    script: dict[str, Any], options: dict[str, Any], chat: bool, n: int, logprobs: bool, places: list[int]
) -> None:  # failures 13, 16, 17, 18
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]} if chat else {"prompt": ["one", "two three"]}
    more: dict[str, Any] = {"n": n} if n > 1 else {}
    if logprobs:
        more |= {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
    body = {"model": "m", "stream": True, **prompt, **options, **more}
    if "metrics" in script:  # where the metrics would stand without a usage chunk nobody knows; they go with it
        script["metrics"] = bool(options.get("stream_options") and options["stream_options"].get("include_usage"))
    made = Script(**script)
    straight, watched = straight_and_through(body, made, chat, places)
    assert watched.client == straight
    assert watched.tokens[1:] == (generated(body, made, chat), UsageSource.ENGINE)
    assert len(watched.record.finish_reasons) == (n if chat else 2 * n)
    assert watched.observer.answered
    assert watched.observer.whole


@pytest.mark.parametrize("stop", range(1, 11))
def test_choices_that_broke_off_have_each_its_own_count(stop: int) -> None:  # failure 18
    script = Script(pieces=(("a", "b", "c"), ("d", "e"), ("f",)), order=(0, 1, 2, 0, 1, 0), finish="length")
    upstream = CHAT.prepare(b'{"model":"m","stream":true,"n":3,"messages":[{"role":"user","content":"x"}]}', _request(3), "vllm")
    blocks = [block + b"\n\n" for block in engine(upstream.whole, script).split(b"\n\n") if block][:stop]
    watched = watch(blocks, upstream.terms, choices=3, known=FINGERPRINT)
    assert watched.tokens == (31, min(max(0, stop - 3), 6), UsageSource.ENGINE)


def test_prompts_of_a_batch_that_broke_off_count_each_once() -> None:
    record = blank()
    data = b'{"model":"m","stream":true,"n":2,"prompt":["one","two three"]}'
    upstream = COMPLETIONS.prepare(data, COMPLETIONS.read(data, record, JSON), "vllm")
    blocks = [block + b"\n\n" for block in engine(upstream.whole, Script(tokens=5), chat=False).split(b"\n\n") if block][:8]
    assert watch(blocks, upstream.terms, choices=record.choices).tokens == (3, 8, UsageSource.ENGINE)


def _request(n: int) -> Any:
    return CHAT.read(b'{"model":"m","stream":true,"n":%d}' % n, blank(), JSON)


def test_a_fingerprint_is_learnt_for_streams_of_several_choices() -> None:
    learnt = watch([said(finish="stop"), totals(1, 1, system_fingerprint="fp_7"), DONE]).observer.fingerprint
    assert learnt == b',"system_fingerprint":"fp_7"'
    reads = [said(finish="stop"), said(finish="stop", index=1), totals(1, 2, system_fingerprint="fp_7"), DONE]
    client = watch(reads, choices=2, known=learnt).client
    assert client.count(b'"system_fingerprint":"fp_7"') == 2
    assert b'"usage"' not in client


def test_a_fingerprint_is_put_on_the_event_that_ended_the_choice_and_once() -> None:
    first, last = totals(1, 1, system_fingerprint="fp_7"), totals(2, 2, system_fingerprint="fp_8")
    watched = watch([said(finish="stop"), b": {a comment}\n\n", first, last, DONE])
    assert watched.client == said(finish="stop", system_fingerprint="fp_7") + b": {a comment}\n\n" + DONE
    assert watched.tokens == (2, 2, UsageSource.ENGINE)


@pytest.mark.parametrize("choices", [1, 2])
def test_where_the_engine_has_written_its_fingerprint_it_is(choices: int) -> None:
    ends = [said(finish="stop", index=index, system_fingerprint="fp_7") for index in range(choices)]
    client = watch([*ends, totals(1, 1, system_fingerprint="fp_7"), DONE], choices=choices, known=FINGERPRINT).client
    assert client == b"".join(ends) + DONE


# --- what is withheld --------------------------------------------------------------------------------------------------


def test_nothing_of_the_end_goes_out_before_the_end() -> None:
    role, text, end, usage = said(""), said("x"), said("", "stop"), totals(1, 1)
    watched = watch([role, text, end, b": comment\n\n", usage, DONE], TOTALS)
    assert watched.reads == [role, text, b"", b"", b"", b""]
    assert watched.tail == end + b": comment\n\n" + usage + DONE
    assert watched.observer.done


def test_of_several_choices_only_the_last_end_is_withheld() -> None:
    first, other, last = said("a", "stop"), said("b", index=1), said("", "length", index=1)
    watched = watch([first, other, last, DONE], Terms(), choices=2)
    assert watched.reads == [first, other, b"", b""]
    assert watched.tail == last + DONE
    assert watched.record.finish_reasons == ["stop", "length"]


def test_two_choices_may_end_in_one_event() -> None:
    choices = [{"index": i, "delta": {"content": "x"}, "finish_reason": "stop"} for i in range(2)]
    watched = watch([event(choices=choices), DONE], Terms(), choices=2)
    assert watched.record.finish_reasons == ["stop", "stop"]
    assert watched.reads == [b"", b""]


def test_what_follows_done_is_nobodys() -> None:
    watched = watch([said(finish="stop"), DONE + b"data: more\n\n", b"data: and more\n\n"], Terms())
    assert watched.client == said(finish="stop") + DONE


def test_what_is_withheld_is_bounded() -> None:
    large = [b": %b\n\n" % (b"x" * 1000)] * 400
    watched = watch([said(finish="stop"), *large, DONE], Terms())
    assert watched.client == said(finish="stop") + b"".join(large) + DONE
    assert len(watched.tail) <= MAX_WITHHELD_BYTES


def test_an_end_without_a_blank_line_is_still_an_end() -> None:
    watched = watch([said(finish="stop"), b"data: [DONE]"], Terms())
    assert watched.client == said(finish="stop") + b"data: [DONE]"
    assert watched.observer.done


@pytest.mark.parametrize(
    "end", [b'eata: {"choices":[{"index":0}]}\r\ndata: [DONE]\r\r', b'data: [DONE]\n\x0bdata: {"choices":[{"index":0}]}\n\n']
)
def test_an_end_beside_a_line_that_looks_like_a_chunk_is_an_end(end: bytes) -> None:
    """Lines whose field is unknown are nothing to an event."""
    watched = watch([said(finish="stop"), end], Terms())
    assert watched.observer.done
    assert watched.client == said(finish="stop") + end


@pytest.mark.parametrize(
    ("reads", "choices", "whole"),
    [
        ([said(finish="stop"), DONE], 1, True),
        ([said(finish="stop")], 1, True),
        ([said(), DONE], 1, False),
        ([said()], 1, False),
        ([DONE], 1, False),
        ([], 1, False),
        ([said(finish="stop"), DONE], 2, True),  # an engine that ignored `n`
        ([said(finish="stop"), said(index=1)], 2, False),
        ([said(finish="stop"), said(finish="stop", index=1)], 2, True),
    ],
)
def test_what_is_a_whole_stream(reads: list[bytes], choices: int, whole: bool) -> None:  # failure 5
    assert watch(reads, Terms(), choices=choices).observer.whole is whole


# --- times -------------------------------------------------------------------------------------------------------------


def test_first_token_first_content_and_gaps() -> None:
    record = blank()
    observer = StreamObserver(record, Terms(), limit=LIMIT)
    thinking = event(choices=[{"index": 0, "delta": {"reasoning": "hm"}, "finish_reason": None}])
    for now, data in [
        (1_000_000, said("")),  # the role
        (2_000_000, b": keep-alive\n\n"),
        (5_000_000, thinking),
        (7_000_000, thinking),
        (8_000_000, said("a")),
        (508_000_000, said("b")),
        (509_000_000, said("", "stop")),
    ]:
        observer.feed(data, now)
    assert (record.first_token_ns, record.first_content_ns, record.last_token_ns) == (5_000_000, 8_000_000, 508_000_000)
    assert (record.inter_token_sum_ns, record.inter_token_max_ns) == (503_000_000, 500_000_000)
    counts = dict(zip(INTER_TOKEN_BOUNDS_NS, record.inter_token_counts, strict=False))
    assert {bound: count for bound, count in counts.items() if count} == {1_000_000: 1, 2_500_000: 1, 500_000_000: 1}
    assert record.chunks == 6


@pytest.mark.parametrize(
    "delta",
    [
        {"content": "x"},
        {"reasoning": "x"},
        {"reasoning_content": "x"},
        {"refusal": "x"},
        {"tool_calls": [{"index": 0, "function": {"name": "f"}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]},
        {"content": "\\"},
        {"content": '"'},
    ],
    ids=str,
)
@pytest.mark.parametrize("spaced", [False, True])
def test_what_is_a_token(delta: dict[str, Any], spaced: bool) -> None:
    chunk = {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    data = b"data: %b\n\n" % json.dumps(chunk, separators=(", ", ": ") if spaced else (",", ":")).encode()
    assert watch([data], Terms()).record.first_token_ns == 10


@pytest.mark.parametrize(
    "delta",
    [{"role": "assistant", "content": ""}, {"content": None}, {}, {"tool_calls": [{"index": 0, "function": {"arguments": ""}}]}],
    ids=str,
)
def test_what_is_none(delta: dict[str, Any]) -> None:
    record = watch([event(choices=[{"index": 0, "delta": delta, "finish_reason": None}])], Terms()).record
    assert (record.first_token_ns, record.chunks) == (0, 1)


def test_a_comment_is_no_token_and_no_chunk() -> None:  # failure 15
    record = watch([b": keep-alive\n\n"] * 3, Terms()).record
    assert (record.first_token_ns, record.chunks) == (0, 0)


def test_a_count_that_moved_is_a_token_even_without_text() -> None:
    """An end of sequence, a token that a parser keeps to itself: the engine has worked for it."""
    reads = [
        said("a", usage={"prompt_tokens": 1, "completion_tokens": 1}),
        said("", usage={"prompt_tokens": 1, "completion_tokens": 2}),
    ]
    assert watch(reads).record.last_token_ns == 20
    same = [
        said("a", usage={"prompt_tokens": 1, "completion_tokens": 1}),
        said("b", usage={"prompt_tokens": 1, "completion_tokens": 1}),
    ]
    assert watch(same).record.last_token_ns == 10


# --- usage -------------------------------------------------------------------------------------------------------------

ENDED = [said("a"), said("b"), said("", "stop")]


@pytest.mark.parametrize(
    ("reads", "tokens"),
    [
        ([*ENDED, DONE], (100, 2, UsageSource.ESTIMATED)),
        ([*ENDED, totals(5, 3), DONE], (5, 3, UsageSource.ENGINE)),
        ([*ENDED, totals(5, 3), totals(5, 3), DONE], (5, 3, UsageSource.ENGINE)),
        ([*ENDED, totals(5, 3), totals(6, 4), DONE], (6, 4, UsageSource.ENGINE)),
        ([ENDED[0], totals(5, 3), *ENDED[1:], DONE], (5, 3, UsageSource.ENGINE)),
        ([*ENDED, event(id="i", choices=[], usage=None), DONE], (100, 2, UsageSource.ESTIMATED)),
        ([*ENDED, event(id="i", choices=[]), DONE], (100, 2, UsageSource.ESTIMATED)),
        ([*ENDED, totals(0, 0), DONE], (0, 0, UsageSource.ENGINE)),
        ([*ENDED, totals(5.0, 3.0), DONE], (5, 3, UsageSource.ENGINE)),
        ([*ENDED, totals(5.5, 3.5), DONE], (100, 2, UsageSource.ESTIMATED)),
        ([*ENDED, totals("5", 3), DONE], (0, 3, UsageSource.ENGINE)),
        ([said("a", usage=None), said("", "stop", usage=None), totals(5, 3), DONE], (5, 3, UsageSource.ENGINE)),
        ([said("a", usage={"prompt_tokens": 5, "completion_tokens": 1})], (5, 1, UsageSource.ENGINE)),
        ([said("", usage={"prompt_tokens": 5, "completion_tokens": 0})], (5, 0, UsageSource.ENGINE)),
        ([said("")], (0, 0, UsageSource.NONE)),
        ([], (0, 0, UsageSource.NONE)),
    ],
    ids=[
        *(
            "absent",
            "last",
            "twice",
            "twice, and more",
            "middle",
            "null",
            "no choices and no usage",
            "zero",
            "whole floats",
            "floats",
        ),
        *("a text", "null on each", "broken off", "broken off before a token", "nothing said", "nothing"),
    ],
)
def test_usage_wherever_it_stands(reads: list[bytes], tokens: tuple[int, int, UsageSource]) -> None:  # failure 16
    assert watch(reads).tokens == tokens


def test_a_count_so_far_may_be_asked_for_at_any_time() -> None:
    record = blank()
    observer = StreamObserver(record, INJECTED, limit=LIMIT)
    for count in range(1, 4):
        observer.feed(said("a", usage={"prompt_tokens": 5, "completion_tokens": count}), count)
        observer.settle()
        assert record.output_tokens == count


def test_an_estimate_gives_way_to_a_count() -> None:
    record = blank()
    observer = StreamObserver(record, INJECTED, limit=LIMIT)
    observer.feed(said("a"), 1)
    observer.settle()
    assert record.usage_source == UsageSource.ESTIMATED
    observer.feed(totals(5, 3), 2)
    observer.settle()
    assert (record.output_tokens, record.usage_source) == (3, UsageSource.ENGINE)


def test_what_was_known_before_is_not_mixed_with_what_is_known_now() -> None:
    """A progress record in between changes nothing of the closing one."""
    details = {"prompt_tokens_details": {"cached_tokens": 4}, "completion_tokens_details": {"reasoning_tokens": 3}}
    reads = [
        said("a", usage={"prompt_tokens": 5, "completion_tokens": 4, **details}),
        said("b", usage={"completion_tokens": 1}),
    ]
    record = blank()
    observer = StreamObserver(record, INJECTED, limit=LIMIT)
    for number, data in enumerate(reads, 1):
        observer.feed(data, 10 * number)
        observer.settle()
    assert record == watch(reads).record
    assert (record.input_tokens, record.cached_tokens, record.output_tokens, record.reasoning_tokens) == (0, 0, 1, 0)


def test_counts_of_several_choices_are_what_a_record_can_hold() -> None:
    usage = {"prompt_tokens": 2**63 - 1, "completion_tokens": 2**63 - 1}
    reads = [said("a", index=index, usage=usage) for index in (0, 1, 2, 7, -1)]
    assert watch(reads, choices=3).tokens == (2**63 - 1, 2**63 - 1, UsageSource.ENGINE)
    odd = said("a", index=7, usage={"prompt_tokens": 1, "completion_tokens": 1})
    assert watch([odd], choices=3).tokens == (100, 1, UsageSource.ESTIMATED)


def test_an_engine_that_goes_on_ending_fills_no_record() -> None:
    record = watch([said(finish="s" * 3000), *[said(finish="stop")] * 500, DONE], choices=2).record
    assert record.finish_reasons == ["s" * 64, "stop"]


def test_a_usage_of_many_objects_takes_linear_time() -> None:
    """In quadratic time it would take many minutes, and the test would be ended."""
    reads = [b'data: {"choices":[{}],"usage":{%b}}\n\n' % b",".join([b'"a":{}'] * 600_000)]
    assert watch(reads, limit=1 << 24).client == b'data: {"choices":[{}]}\n\n'


def test_reasoning_counts_of_single_chunks_are_kept() -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "completion_tokens_details": {"reasoning_tokens": 2}}
    watched = watch([said("a", usage=usage)])
    assert watched.record.reasoning_tokens == 2
    assert b"usage" not in watched.client


@pytest.mark.parametrize(
    "text",
    ['","usage":{"prompt_tokens":9}', '"finish_reason":"stop"', "data: [DONE]\n\n", '{"error":{}}', '"choices":[]', "}}}{"],
)
def test_a_text_that_looks_like_the_protocol_is_a_text(text: str) -> None:
    reads = [said(text, usage={"prompt_tokens": 5, "completion_tokens": 1}), said("", "stop"), DONE]
    watched = watch(reads)
    assert watched.client == said(text) + said("", "stop") + DONE
    assert watched.tokens == (5, 1, UsageSource.ENGINE)
    assert watched.record.finish_reasons == ["stop"]
    assert watched.observer.error_event is None


def test_a_token_that_is_named_usage_is_a_token() -> None:
    """Completions have their top logprobs by token text."""
    logprobs = {"top_logprobs": [{"a": -1.0, "usage": -2.0, "finish_reason": -3.0}]}
    chunk = {"choices": [{"index": 0, "text": "a", "logprobs": logprobs, "finish_reason": None}]}
    assert watch([event(**chunk)]).client == event(**chunk)
    counted = event(**chunk, usage={"prompt_tokens": 5, "completion_tokens": 1})
    watched = watch([counted])
    assert (watched.client, watched.tokens) == (event(**chunk), (5, 1, UsageSource.ENGINE))


def test_json_with_spaces_is_watched_the_same_way() -> None:
    body = b"".join(
        b"data: %b\n\n" % json.dumps(json.loads(block[6:])).encode() if b"[DONE]" not in block else block
        for block in captured.load("chat_stream_usage_cont").blocks()
    )
    watched = watch([body])
    assert watched.tokens == (37, 8, UsageSource.ENGINE)
    assert b"usage" not in watched.client
    assert watched.record.finish_reasons == ["stop"]
    assert watched.record.first_token_ns == 10


# --- errors and oddities -----------------------------------------------------------------------------------------------

ERROR = b'data: {"error": {"message": "out of memory", "code": 500}}\n\n'


def test_an_error_first_of_all_is_no_event() -> None:  # failure 6
    watched = watch([ERROR, DONE])
    assert watched.client == b""
    assert watched.observer.first_error == b'{"error":{"message": "out of memory", "code": 500}}'
    assert watched.observer.done


@pytest.mark.parametrize("before", [said(), b": comment\n\n", b"data: odd\n\n", event(choices=[]), totals(1, 0)])
def test_an_error_later_passes(before: bytes) -> None:  # failure 6
    watched = watch([before, ERROR, DONE], Terms())
    assert watched.client == before + ERROR + DONE
    assert watched.observer.first_error is None
    assert watched.observer.error_event == b'{"message": "out of memory", "code": 500}'
    assert not watched.observer.whole


def test_an_error_that_is_null_is_none() -> None:
    reads = [event(choices=[{"index": 0, "delta": {"content": "x"}, "finish_reason": "stop"}], error=None), DONE]
    watched = watch(reads, Terms())
    assert (watched.observer.first_error, watched.observer.error_event) == (None, None)
    assert watched.client == b"".join(reads)


@pytest.mark.parametrize(
    "odd",
    [
        b"data: no json\n\n",
        b"data: {\n\n",
        b"data: []\n\n",
        b"data: 7\n\n",
        b"data: {}\n\n",
        b'data: {"choices":7}\n\n',
        b'data: {"choices":[7]}\n\n',
        b'data: {"choices":null}\n\n',
        b'data: {"choices":[{"index":"x","finish_reason":"stop"}]}\n\n',
        b'data: {"choices":[{"finish_reason":"stop"\n\n',
        b"data: {" + b"[" * 5000 + b"\n\n",
        b"data:\n\n",
        b"\n\n",
        b"id: 7\n\n",
        b"retry: 3000\n\n",
        b"event: ping\ndata: {}\n\n",
        b'data: {"choices":[],"prompt_filter_results":[]}\n\n',
        b'data: "\xff\xfe"\n\n',
    ],
)
def test_what_is_not_understood_passes(odd: bytes) -> None:  # failure 18
    watched = watch([said("a"), odd, said("", "stop"), DONE])
    assert watched.client == said("a") + odd + said("", "stop") + DONE
    assert watched.observer.whole


def test_a_line_without_an_end_is_refused() -> None:  # failure 14
    observer = StreamObserver(blank(), Terms(), limit=1000)
    for _ in range(10):
        assert observer.feed(b"x" * 100, 1) == b""
    with pytest.raises(OversizedEvent):
        observer.feed(b"x", 1)
