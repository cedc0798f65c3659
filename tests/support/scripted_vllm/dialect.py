"""What vLLM 0.32 says: the JSON of its answers. Sans-io, no clock.

The shapes and the order of the fields are those of the captured answers in `tests/fixtures/vllm-0.32.0`;
`tests/unit/support/test_scripted_vllm.py` compares byte for byte. Where nothing was captured (reasoning, the arguments of
tool calls, embeddings) they follow vLLM's own protocol classes.

Worth knowing, because a proxy trips over it:
  - `system_fingerprint` is on each choice's last event, but on the usage event instead if usage was asked for;
  - `continuous_usage_stats` counts only beside `include_usage`, and then counts each choice for itself;
  - the usage of single events has `completion_tokens_details` in chat and doesn't in completions.
"""

from __future__ import annotations

import base64
import itertools
import json
import struct
import zlib
from collections.abc import Iterator
from typing import Final

from tests.support.scripted_vllm import generation, requests
from tests.support.scripted_vllm.events import DONE, ENGINE_DIED, Event, Prepared
from tests.support.scripted_vllm.generation import Call, Choice, Token
from tests.support.scripted_vllm.requests import Body, Context, Refused, quote
from tests.support.scripted_vllm.script import Script

FINGERPRINT: Final = b"vllm-0.32.0-4c52f88f"
_END_OF_SEQUENCE: Final = "<|im_end|>"
_FILL: Final = generation.TEXT.encode() * 70_000


def chat(body: Body, context: Context) -> Prepared:
    """Raises Refused."""
    return _prepare(generation.understand(body, context, chat=True))


def completions(body: Body, context: Context) -> Prepared:
    """Raises Refused."""
    return _prepare(generation.understand(body, context, chat=False))


def _prepare(call: Call) -> Prepared:
    if call.body.stream:
        return Prepared(events=stream(call), call=call)
    return Prepared(whole(call), call=call)


# --- usage -----------------------------------------------------------------------------------------------------------


def _usage(call: Call, prompt: int, completion: int, *, details: bytes = b"") -> bytes:
    return b'{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d%b}' % (
        prompt,
        prompt + completion,
        completion,
        details,
    )


def _event_usage(call: Call, choice: Choice, done: int) -> bytes:
    """What `continuous_usage_stats` puts on one event."""
    details = b""
    if call.chat:
        details = b',"completion_tokens_details":null'
        if call.script.reasoning:
            details = b',"completion_tokens_details":{"reasoning_tokens":%d}' % min(done, call.script.reasoning)
    return _usage(call, call.prompts[choice.prompt], done, details=details)


def _total_usage(call: Call, *, streamed: bool) -> bytes:
    prompt, completion = call.prompt_tokens, call.completion_tokens
    match call.script.usage:
        case "null":
            return b"null"
        case "zero":
            prompt = completion = 0
        case "float":
            return b'{"prompt_tokens":%.1f,"total_tokens":%.1f,"completion_tokens":%.1f}' % (
                prompt + 0.5,
                prompt + completion + 1.0,
                completion + 0.5,
            )
    cached, reasoned = _cached_details(call, streamed=streamed), b""
    if call.script.reasoning and call.chat:
        total = sum(token.kind == "reasoning" for choice in call.choices for token in choice.tokens)
        reasoned = b',"completion_tokens_details":{"reasoning_tokens":%d}' % total
    if not streamed:
        cached = cached or b',"prompt_tokens_details":null'
        reasoned = reasoned or b',"completion_tokens_details":null'
    return _usage(call, prompt, completion, details=cached + reasoned)


def _cached_details(call: Call, *, streamed: bool) -> bytes:
    if call.script.cached_tokens is None:
        return b""
    created = b',"created_cache_tokens":0' if call.chat else b""
    if not streamed:
        created = b',"created_cache_tokens":%b,"multimodal_tokens":null' % (b"0" if call.chat else b"null")
    return b',"prompt_tokens_details":{"cached_tokens":%d%b}' % (call.script.cached_tokens, created)


def _metrics(call: Call, *, streamed: bool) -> bytes:
    """vLLM leaves them out for several choices; so do we."""
    if not call.script.metrics or len(call.choices) > 1:
        return b"" if streamed else b"null"
    times = engine_times(call)
    if not streamed:
        return quote({**times, "speculative_decoding": None})
    return b',"metrics":' + quote(times)


def engine_times(call: Call) -> dict[str, float]:
    """The engine's own times of a request."""
    script, steps = call.script, call.completion_tokens - 1
    generation = max(script.interval * 1000 * steps, 0.5)
    return {
        "time_to_first_token_ms": script.first * 1000 + 0.25,
        "generation_time_ms": generation,
        "queue_time_ms": 0.025,
        "mean_itl_ms": generation / max(steps, 1),
        "tokens_per_second": 1000 * call.completion_tokens / generation,
    }


# --- streams ---------------------------------------------------------------------------------------------------------


def _asked(call: Call) -> tuple[bool, bool]:
    """(a usage event at the end, usage on each event), by the request and by the script."""
    options = call.body.stream_options
    last = bool(options and options.include_usage)
    each = last and bool(options and options.continuous_usage_stats)
    match call.script.usage:
        case None:
            return last, each
        case "none":
            return False, False
        case "continuous":
            return True, True
        case _:
            return True, False


def stream(call: Call) -> Iterator[Event]:
    """The events of a streamed answer, `[DONE]` included."""
    script = call.script
    last, each = _asked(call)
    kind = b"chat.completion.chunk" if call.chat else b"text_completion"
    prefix = b'{"id":%b,"object":"%b","created":%d,"model":%b,"choices":[' % (
        quote(call.answer_id.decode()),
        kind,
        call.created,
        quote(call.model),
    )
    usage_event = b'%b],"usage":%b,"system_fingerprint":"%b"%b}' % (
        prefix,
        _total_usage(call, streamed=True),
        FINGERPRINT,
        _metrics(call, streamed=True),
    )
    events = _generation(call, prefix, each=each, fingerprint=not last)
    if script.usage == "middle":
        half = 1 + sum(len(choice.tokens) for choice in call.choices) // 2
        yield from itertools.islice(events, half)
        yield Event(usage_event)
    yield from events
    if last and script.usage != "middle":
        yield Event(usage_event)
        if script.usage == "twice":
            yield Event(usage_event)
    if not script.no_done:
        yield Event(DONE)


def _generation(call: Call, prefix: bytes, *, each: bool, fingerprint: bool) -> Iterator[Event]:
    script = call.script
    null = b',"usage":null' if script.usage == "null" else b""
    wait = script.first
    if call.chat:
        for choice in call.choices:
            usage = b',"usage":' + _event_usage(call, choice, 0) if each else null
            yield Event(
                b'%b{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]%b'
                b',"prompt_token_ids":null,"prompt_text":null}' % (prefix, choice.index, usage),
                0,
                wait,
            )
            wait = 0.0
        wait = script.after_role
    done = [0] * len(call.choices)
    offsets = [0] * len(call.choices)
    for step, (index, group, final) in enumerate(generation.schedule(call)):
        choice = call.choices[index]
        done[index] += len(group)
        inner = _chat_choice if call.chat else _completion_choice
        rendered, offsets[index] = inner(call, choice, group, final, offsets[index], first=done[index] == len(group))
        usage = b',"usage":' + _event_usage(call, choice, done[index]) if each else null
        stamp = b',"system_fingerprint":"%b"' % FINGERPRINT if final and fingerprint and not script.no_finish else b""
        starts_step = bool(script.order) or index == 0 or step == 0
        if step:
            wait = script.interval if starts_step else 0.0
        yield Event(b"%b%b]%b%b}" % (prefix, rendered, usage, stamp), len(group), wait)
        if step == 0 and script.huge_line:
            yield Event(_huge(prefix, script.huge_line))


def _huge(prefix: bytes, size: int) -> bytes:
    return prefix + b'],"huge":"' + b"x" * size + b'"}'


def _chat_choice(call: Call, choice: Choice, group: list[Token], final: bool, offset: int, *, first: bool) -> tuple[bytes, int]:
    token = group[0]
    text = "".join(t.text for t in group) if len(group) > 1 else token.text
    if token.kind == "tool":
        delta = text.encode()
    elif token.kind == "end" and (call.script.tools or call.script.reasoning):
        delta = b"{}"
    else:
        delta = b'{"%b":%b}' % (b"reasoning" if token.kind == "reasoning" else b"content", quote(text))
    logprobs = _chat_logprobs(call.body, group) if call.body.logprobs else b"null"
    finish = b"null"
    if final and not call.script.no_finish:
        finish = b'%b,"stop_reason":null' % quote(choice.finish)
    return (
        b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b,"token_ids":null}' % (choice.index, delta, logprobs, finish),
        offset,
    )


def _completion_choice(
    call: Call, choice: Choice, group: list[Token], final: bool, offset: int, *, first: bool
) -> tuple[bytes, int]:
    told = generation.echoed(call, choice) + group if first else group
    logprobs = b"null"
    if call.body.logprobs is not None:
        logprobs, offset = _completion_logprobs(call.body, told, offset)
    finish = quote(choice.finish) if final and not call.script.no_finish else b"null"
    return (
        b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}'
        % (choice.index, quote("".join(t.text for t in told)), logprobs, finish),
        offset,
    )


# --- logprobs --------------------------------------------------------------------------------------------------------


def _logprob(text: str) -> float:
    """Some number below zero, the same for the same text."""
    return -(zlib.crc32(text.encode()) % 4000) / 1000


def _alternatives(text: str, count: int) -> list[tuple[str, float]]:
    return [(text + "~" * i, _logprob(text) - i) for i in range(count)]


def _chat_logprobs(body: Body, group: list[Token]) -> bytes:
    content = []
    for token in group:
        text = token.text if token.kind != "end" else _END_OF_SEQUENCE
        (own, *_), others = _alternatives(text, 1), _alternatives(text, body.top_logprobs or 0)
        content.append({**_logprob_entry(*own), "top_logprobs": [_logprob_entry(*other) for other in others]})
    return quote({"content": content})


def _logprob_entry(text: str, logprob: float) -> dict[str, object]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _completion_logprobs(body: Body, group: list[Token], offset: int) -> tuple[bytes, int]:
    texts = [token.text if token.kind != "end" else _END_OF_SEQUENCE for token in group]
    starts = list(itertools.accumulate((len(text) for text in texts), initial=offset))
    unknown = offset == 0 and group[0].kind == "echo"  # nothing comes before the first token of a prompt
    own: list[float | None] = [_logprob(text) for text in texts]
    top: list[dict[str, float] | None] = [dict(_alternatives(text, max(int(body.logprobs or 0), 1))) for text in texts]
    if unknown:
        own[0] = top[0] = None
    shown = {"text_offset": starts[:-1], "token_logprobs": own, "tokens": texts, "top_logprobs": top}
    return quote(shown), starts[-1]


# --- whole answers ---------------------------------------------------------------------------------------------------


def whole(call: Call) -> bytes:
    """The body of an answer that isn't streamed."""
    if not call.script.body_bytes:
        return _whole(call, [generation.text_of(choice) for choice in call.choices])
    empty = _whole(call, [""] * len(call.choices))
    missing = call.script.body_bytes - len(empty)
    if not 0 <= missing <= len(_FILL):
        raise Refused(400, f"This is no script: body_bytes is below {len(empty)} or above 10 MB", "script", "ScriptError")
    place = b'"content":"' if call.chat else b'"text":"'
    return empty.replace(place, place + _FILL[:missing], 1)


def _whole(call: Call, texts: list[str]) -> bytes:
    one = _chat_message_choice if call.chat else _text_choice
    usage = b"" if call.script.usage == "none" else b'"usage":%b,' % _total_usage(call, streamed=False)
    return (
        b'{"id":%b,"object":"%b","created":%d,"model":%b,"choices":[%b],"service_tier":null,"system_fingerprint":"%b",%b%b'
        b'"kv_transfer_params":null,"ec_transfer_params":null,"metrics":%b}'
        % (
            quote(call.answer_id.decode()),
            b"chat.completion" if call.chat else b"text_completion",
            call.created,
            quote(call.model),
            b",".join([one(call, choice, text) for choice, text in zip(call.choices, texts, strict=True)]),
            FINGERPRINT,
            usage,
            b'"prompt_logprobs":null,"prompt_token_ids":null,"prompt_text":null,' if call.chat else b"",
            _metrics(call, streamed=False),
        )
    )


def _chat_message_choice(call: Call, choice: Choice, text: str) -> bytes:
    calls = reasoning = b""
    content = quote(text)
    if call.script.tools:
        if not bytes(call.body.tool_choice).startswith((b"{", b'"required"')):
            content = b"null"
        shown = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": "".join(c.arguments)}}
            for c in generation.tool_calls(call.body)
        ]
        calls = b'"tool_calls":%b,' % quote(shown)
    if call.script.reasoning:
        reasoning = quote("".join(token.text for token in choice.tokens if token.kind == "reasoning"))
    logprobs = _chat_logprobs(call.body, choice.tokens) if call.body.logprobs else b"null"
    return (
        b'{"index":%d,"message":{"role":"assistant","content":%b,"refusal":null,"annotations":null,"audio":null,'
        b'"function_call":null,%b"reasoning":%b},"logprobs":%b,"finish_reason":%b,"stop_reason":null,"token_ids":null,'
        b'"routed_experts":null}'
        % (
            choice.index,
            content,
            calls,
            reasoning or b"null",
            logprobs,
            b"null" if call.script.no_finish else quote(choice.finish),
        )
    )


def _text_choice(call: Call, choice: Choice, text: str) -> bytes:
    echoed = generation.echoed(call, choice)
    logprobs = b"null"
    if call.body.logprobs is not None:
        logprobs, _ = _completion_logprobs(call.body, echoed + choice.tokens, 0)
    return (
        b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b,"stop_reason":null,"token_ids":null,"prompt_logprobs":null,'
        b'"prompt_token_ids":null,"routed_experts":null}'
        % (
            choice.index,
            quote("".join(token.text for token in echoed) + text),
            logprobs,
            b"null" if call.script.no_finish else quote(choice.finish),
        )
    )


# --- the rest --------------------------------------------------------------------------------------------------------


def embeddings(body: Body, context: Context) -> Prepared:
    """Raises Refused."""
    if body.input is None:
        raise requests.invalid("missing", "body.input", "Field required")
    requests.check_pooling_model(body, context.models)
    inputs = requests.prompts_of(body.input)
    size = 8 if body.dimensions is None else body.dimensions
    tokens = context.script.prompt_tokens or sum(map(requests.count_prompt, inputs))
    data = [
        {
            "index": i,
            "object": "embedding",
            "embedding": context.script.vectors.get(str(text)) or _vector(text, size, body.encoding_format),
        }
        for i, text in enumerate(inputs)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
    answer = {
        "id": context.answer_id.decode(),
        "object": "list",
        "created": context.created,
        "model": body.model or context.models[0],
        "data": data,
        "usage": {**usage, "prompt_tokens_details": None, "completion_tokens_details": None},
    }
    return Prepared(quote(answer), prompt_tokens=tokens)


def _vector(text: object, size: int, encoding: str | None) -> list[float] | str:
    # Eighths are exact in 32 bits, so that base64 and decimal say the same.
    vector = [((zlib.crc32(f"{text}{i}".encode()) % 17) - 8) / 8 for i in range(size)]
    if encoding == "base64":
        return base64.b64encode(struct.pack(f"<{size}f", *vector)).decode()
    return vector


def failure(script: Script, sent: int) -> list[Event]:
    """The in-band error has Python's blanks between its fields, unlike everything else: so vLLM writes it."""
    error = {"message": script.error or ENGINE_DIED, "type": "InternalServerError", "param": None, "code": 500}
    event = Event(json.dumps({"error": error}).encode())
    return [event, Event(DONE)] if script.error_done else [event]


def models_json(models: tuple[str, ...], created: int, max_model_len: int) -> bytes:
    return quote({"object": "list", "data": [_model(name, created, max_model_len) for name in models]})


def _model(name: str, created: int, max_model_len: int) -> dict[str, object]:
    allowed = {
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
    }
    permission = {
        "id": f"modelperm-{zlib.crc32(name.encode()):016x}",
        "object": "model_permission",
        "created": created,
        **allowed,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "vllm",
        "root": f"/models/{name}",
        "parent": None,
        "max_model_len": max_model_len,
        "permission": [permission],
    }
