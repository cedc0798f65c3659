"""Chat, as vLLM 0.31 to 0.33 write it.

What its two forms don't tell alike hangs on the request: beside tool calls that it demanded, `content` is "" in one piece, and
beside others null; a stream has none of either. A call that was cut off is text in one piece, and a call in a stream (or nothing:
the parser waits for more of it); so wherever one may have been, the answer is Odd. So is a call that was demanded and not made.

With `echo` an engine may tell the prompt's logprobs, in one piece only; `routed_experts` and `kv_transfer_params` it tells there
only, too. How a call's arguments are spaced is its parser's affair: they stay as they were first given.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import UNSET, Raw, UnsetType

from proxy.cache.entry import Form
from proxy.cache.forms.chunks import Chunk, Chunks, Metrics, Usage, by_choice, read, write
from proxy.cache.forms.strict import NULL, Made, Offer, Strict, check, given, pieces, pieces_by, shares

_OBJECT: Final = "chat.completion"
_CHUNK: Final = "chat.completion.chunk"


class TopToken(Strict):
    token: Raw
    logprob: Raw
    bytes: Raw


class Token(Strict):
    token: str
    logprob: Raw = Raw(b"-9999.0")
    bytes: Raw = NULL
    top_logprobs: list[TopToken] = msgspec.field(default_factory=list)


class Logprobs(Strict):
    content: list[Token]


class CallPart(Strict):
    name: str | UnsetType | None = UNSET
    arguments: str | UnsetType | None = UNSET


class ToolDelta(Strict, kw_only=True):
    id: str | UnsetType | None = UNSET
    type: str | UnsetType | None = UNSET
    index: int
    function: CallPart | UnsetType | None = UNSET


class Delta(Strict):
    role: Raw | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning: str | UnsetType | None = UNSET
    tool_calls: list[ToolDelta] | UnsetType = UNSET


class DeltaChoice(Strict):
    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: Raw | UnsetType = UNSET
    token_ids: list[int] | UnsetType | None = UNSET
    weight_versions: Raw | UnsetType = UNSET
    """From 0.33 on, where a choice ends."""


class ChatChunk(Chunk[DeltaChoice]):
    prompt_token_ids: Raw | UnsetType = UNSET
    prompt_text: Raw | UnsetType = UNSET
    """These two are on the first chunk of each choice."""
    kv_transfer_params: UnsetType | None = UNSET
    """From 0.33 on, on the others."""


class Function(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    id: str
    type: str
    function: Function


class Message(Strict):
    role: Raw
    content: str | None
    refusal: None
    annotations: None
    audio: None
    function_call: None
    tool_calls: list[ToolCall] | UnsetType = UNSET
    reasoning: str | None = None


class Choice(Strict):
    index: int
    message: Message
    logprobs: Logprobs | None
    finish_reason: str
    stop_reason: Raw
    token_ids: list[int] | None
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
    prompt_logprobs: None
    prompt_token_ids: Raw
    prompt_text: Raw
    kv_transfer_params: None
    ec_transfer_params: None
    metrics: Metrics | None


class Asked(Offer):
    echo: bool | None = None

    @property
    def named(self) -> bool:
        return bytes(self.tool_choice).startswith(b"{")

    @property
    def required(self) -> bool:
        return self.tool_choice == Raw(b'"required"')


_chunk = msgspec.json.Decoder(ChatChunk)
_answer = msgspec.json.Decoder(Answer)
_asked = msgspec.json.Decoder(Asked)


def convert(body: bytes, usage: bytes, old: Form, new: Form, request: bytes) -> Made:
    """Raises Odd, MsgspecError."""
    if old != Form.WHOLE != new:
        return write(read(body, old, usage, _CHUNK, _chunk), new)
    asked = _asked.decode(request)
    check(not asked.echo, "an echo")
    if old == Form.WHOLE:
        return write(_scatter(_answer.decode(body), asked), new)
    return Made(msgspec.json.encode(_gather(read(body, old, usage, _CHUNK, _chunk), asked)))


# -- a stream's chunks → an answer in one piece --


def _gather(stream: Chunks[ChatChunk], asked: Asked) -> Answer:
    first = stream.chunks[0]
    return Answer(
        id=first.id,
        object=_OBJECT,
        created=first.created,
        model=first.model,
        choices=[_gather_choice(chunks, first, asked) for chunks in by_choice(stream.chunks)],
        service_tier=None,
        system_fingerprint=stream.fingerprint or NULL,
        usage=given(stream.usage, "nobody has told the usage"),
        prompt_logprobs=None,
        prompt_token_ids=first.prompt_token_ids or NULL,
        prompt_text=first.prompt_text or NULL,
        kv_transfer_params=None,
        ec_transfer_params=None,
        metrics=stream.metrics,
    )


def _gather_choice(chunks: list[ChatChunk], first: ChatChunk, asked: Asked) -> Choice:
    opening, *rest = chunks
    role = _role_of(opening, first)
    choices = [chunk.choice for chunk in rest]
    for chunk in rest:
        check(chunk.prompt_token_ids is UNSET and chunk.prompt_text is UNSET, "the prompt a second time")
        check(chunk.choice.delta.role is UNSET, "a second role")
    *others, end = choices
    for choice in others:
        check(choice.stop_reason is UNSET and choice.weight_versions is UNSET, "an end before the end")
    reason = given(end.finish_reason, "no end")
    calls = _gather_calls([call for choice in choices for call in choice.delta.tool_calls or ()])
    _check_finish(reason, end.stop_reason or NULL, bool(calls), asked)
    content = _join([choice.delta.content for choice in choices])
    if asked.named or asked.required:
        content = content or ""
    if calls and content is not None and not content.strip():
        content = "" if asked.named or asked.required else None
    return Choice(
        index=end.index,
        message=Message(
            role=role,
            content=content,
            refusal=None,
            annotations=None,
            audio=None,
            function_call=None,
            tool_calls=calls or UNSET,
            reasoning=_join([choice.delta.reasoning for choice in choices]),
        ),
        logprobs=_gather_logprobs([choice.logprobs for choice in choices]),
        finish_reason=reason,
        stop_reason=end.stop_reason or NULL,
        token_ids=_gather_ids([choice.token_ids for choice in choices]),
        routed_experts=None,
        weight_versions=end.weight_versions,
    )


def _role_of(opening: ChatChunk, first: ChatChunk) -> Raw:
    """Of a choice's first chunk, which says nothing else of it."""
    choice = opening.choice
    role = given(choice.delta.role, "no role to begin with")
    check(choice == DeltaChoice(choice.index, Delta(role, "")), "more than a role to begin with")
    check(isinstance(opening.prompt_token_ids, Raw) and isinstance(opening.prompt_text, Raw), "another version's first chunk")
    check(opening.prompt_token_ids == first.prompt_token_ids and opening.prompt_text == first.prompt_text, "two prompts")
    return role


def _check_finish(reason: str, stop: Raw, calls: bool, asked: Asked) -> None:
    """Both forms tell it like this: nothing has cut off a call, so that it would be text in one of them."""
    if calls:
        check(reason == ("stop" if asked.named else "tool_calls"), "a tool call that was cut off")
    else:
        check(reason != "tool_calls" and not (asked.required and reason == "stop"), "no tool call")
        check(not asked.made or (reason == "stop" and not bytes(stop).startswith(b'"')), "perhaps a tool call that was cut off")


def _join(texts: list[str | UnsetType | None]) -> str | None:
    known = [text for text in texts if isinstance(text, str)]
    return "".join(known) if known else None


def _gather_calls(deltas: list[ToolDelta]) -> list[ToolCall]:
    calls: list[ToolCall] = []
    said: list[list[str]] = []
    for delta in deltas:
        function = given(delta.function, "a tool call without its function")
        if delta.index == len(calls):
            name, type_ = given(function.name, "a call without a name"), given(delta.type, "a call without a type")
            calls.append(ToolCall(given(delta.id, "a call without an id"), type_, Function(name, "")))
            said.append([])
        else:
            check(delta.index == len(calls) - 1, "tool calls out of order")
            check(not delta.id and not delta.type and not function.name, "a tool call with two names")
        said[-1].append(function.arguments or "")
    for call, texts in zip(calls, said, strict=True):
        call.function.arguments = "".join(texts)
        msgspec.json.decode(call.function.arguments)
    return calls


def _gather_logprobs(each: list[Logprobs | None]) -> Logprobs | None:
    known = [logprobs.content for logprobs in each if logprobs is not None]
    return Logprobs([token for content in known for token in content]) if known else None


def _gather_ids(each: list[list[int] | UnsetType | None]) -> list[int] | None:
    known = [ids for ids in each if isinstance(ids, list)]
    return [id_ for ids in known for id_ in ids] if known else None


# -- an answer in one piece → a stream's chunks --


def _scatter(answer: Answer, asked: Asked) -> Chunks[ChatChunk]:
    check(answer.object == _OBJECT and bool(answer.choices), "something else")
    check([choice.index for choice in answer.choices] == list(range(len(answer.choices))), "choices out of order")
    prompt = answer.prompt_token_ids, answer.prompt_text
    openings = [_chunk_of(answer, DeltaChoice(each.index, Delta(each.message.role, "")), *prompt) for each in answer.choices]
    rest = [chunk for choice in answer.choices for chunk in _scatter_choice(answer, choice, asked)]
    fingerprint: Raw | UnsetType = UNSET if answer.system_fingerprint == NULL else answer.system_fingerprint
    return Chunks([*openings, *rest], fingerprint, answer.usage, answer.metrics)


def _chunk_of(answer: Answer, choice: DeltaChoice, token_ids: Raw | UnsetType, text: Raw | UnsetType) -> ChatChunk:
    return ChatChunk(answer.id, _CHUNK, answer.created, answer.model, [choice], prompt_token_ids=token_ids, prompt_text=text)


def _scatter_choice(answer: Answer, choice: Choice, asked: Asked) -> list[ChatChunk]:
    message = choice.message
    _check_finish(choice.finish_reason, choice.stop_reason, bool(message.tool_calls), asked)
    tokens = choice.logprobs.content if choice.logprobs is not None else None
    text = "" if message.reasoning or message.tool_calls else message.content or ""
    by_token = pieces_by([each.token for each in tokens or ()], text)
    deltas = _scatter_message(message, by_token, choice.finish_reason)
    logprobs = shares(tokens, len(deltas), each=bool(by_token))
    ids = shares(choice.token_ids, len(deltas), each=bool(by_token))
    found = []
    for delta, said, token_ids in zip(deltas, logprobs, ids, strict=True):
        part = DeltaChoice(choice.index, delta, None if said is None else Logprobs(said), token_ids=token_ids)
        chunk = _chunk_of(answer, part, UNSET, UNSET)
        if choice.weight_versions is not UNSET:
            chunk.kv_transfer_params = None
        found.append(chunk)
    end = found[-1].choice
    end.finish_reason, end.stop_reason, end.weight_versions = choice.finish_reason, choice.stop_reason, choice.weight_versions
    return found


def _scatter_message(message: Message, by_token: list[str], reason: str) -> list[Delta]:
    """Raises Odd."""
    calls = message.tool_calls or []
    check(message.reasoning != "", "nothing to say it with")
    deltas = [Delta(reasoning=text) for text in pieces(message.reasoning or "")]
    deltas += [Delta(content=text) for text in by_token or pieces(message.content or "")]
    deltas += [delta for index, call in enumerate(calls) for delta in _scatter_call(index, call)]
    if reason != "length" or not deltas:
        deltas.append(Delta() if calls or message.content is None else Delta(content=""))
    return deltas


def _scatter_call(index: int, call: ToolCall) -> list[Delta]:
    named = ToolDelta(id=call.id, type=call.type, index=index, function=CallPart(call.function.name))
    parts = [ToolDelta(index=index, function=CallPart(arguments=text)) for text in pieces(call.function.arguments)]
    return [Delta(content=None, tool_calls=[each]) for each in (named, *parts)]
