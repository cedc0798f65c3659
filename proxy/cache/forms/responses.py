"""Responses, as vLLM 0.31 to 0.33 write them: a stream's last event has the whole answer, and the others how it came to be.

Reasoning has a status in a stream and none in one piece. An answer in one piece has at most one piece of reasoning and one
message, in this order, then calls; a stream that has it otherwise is Odd. So is one with logprobs (a stream leaves out those of
tokens without text), a call in an answer that was cut off, what tools of the engine's own did (their events say more than the
answer), and in one piece what a model with channels said (it counts tokens by turn, and streams in events of its own).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from proxy.cache.entry import Form
from proxy.cache.forms.strict import NULL, Made, Odd, Strict, check, event, events_of, given, pieces

_EMPTY: Final = Raw(b"[]")
_BEGUN: Final = Raw(b'"in_progress"')
_COMPLETED: Final = "completed"
_STEPS: Final = frozenset(
    (
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.content_part.done",
        "response.output_item.done",
    )
)
_ENDS: Final = ("response.completed", "response.incomplete")


class InputDetails(Strict):
    cached_tokens: int
    cache_write_tokens: int
    input_tokens_per_turn: list[int]
    cached_tokens_per_turn: list[int]


class OutputDetails(Strict):
    reasoning_tokens: int
    tool_output_tokens: int
    output_tokens_per_turn: list[int]
    tool_output_tokens_per_turn: list[int]


class Usage(Strict):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int

    @property
    def by_turn(self) -> bool:
        return bool(self.input_tokens_details.input_tokens_per_turn or self.output_tokens_details.output_tokens_per_turn)


class Text(Strict):
    annotations: Raw
    text: str
    type: str
    logprobs: Raw


class Thought(Strict):
    text: str
    type: str


class MessageItem(Strict):
    id: Raw
    content: list[Text]
    role: Raw
    status: Raw
    type: str
    phase: Raw | UnsetType = UNSET


class ReasoningItem(Strict):
    id: Raw
    summary: Raw
    type: str
    content: list[Thought] | None
    encrypted_content: None
    status: Raw


class CallItem(Strict):
    arguments: str
    call_id: Raw
    name: Raw
    type: str
    id: Raw
    async_: Raw | UnsetType = msgspec.field(default=UNSET, name="async")
    caller: Raw | UnsetType = UNSET
    namespace: Raw | UnsetType = UNSET
    status: Raw = NULL


class Response(Strict, kw_only=True):
    id: Raw
    created_at: Raw
    incomplete_details: Raw
    instructions: Raw
    metadata: Raw
    model: Raw
    object: str
    output: list[Raw]
    parallel_tool_calls: Raw
    temperature: Raw
    tool_choice: Raw
    tools: Raw
    top_p: Raw
    background: Raw
    max_output_tokens: Raw
    max_tool_calls: Raw
    previous_response_id: Raw
    prompt: Raw
    prompt_cache_options: Raw | UnsetType = UNSET
    prompt_cache_key: Raw | UnsetType = UNSET
    prompt_cache_retention: Raw | UnsetType = UNSET
    reasoning: Raw
    safety_identifier: Raw | UnsetType = UNSET
    service_tier: Raw
    status: str
    text: Raw
    top_logprobs: Raw
    truncation: Raw
    usage: Usage | None
    user: Raw
    metrics: Raw | UnsetType = UNSET
    presence_penalty: Raw
    frequency_penalty: Raw
    kv_transfer_params: None
    ec_transfer_params: None
    input_messages: None
    output_messages: None

    @property
    def begun(self) -> Response:
        """As it is told at the beginning."""
        return msgspec.structs.replace(self, output=[], status="in_progress", incomplete_details=NULL, usage=None, metrics=UNSET)

    @property
    def end(self) -> str:
        """The event that tells it: what is incomplete has one of its own where there are this version's members."""
        later = self.prompt_cache_key is not UNSET
        return "response.incomplete" if later and self.status == "incomplete" else "response.completed"


class End(Strict):
    response: Response
    sequence_number: int
    type: str


class _Type(Struct):
    type: str


Item = MessageItem | ReasoningItem | CallItem
_ITEMS: Final[dict[str, msgspec.json.Decoder[Any]]] = {
    "message": msgspec.json.Decoder(MessageItem),
    "reasoning": msgspec.json.Decoder(ReasoningItem),
    "function_call": msgspec.json.Decoder(CallItem),
}
_ORDER: Final = {ReasoningItem: 0, MessageItem: 1, CallItem: 2}
_response = msgspec.json.Decoder(Response)
_end = msgspec.json.Decoder(End)
_type = msgspec.json.Decoder(_Type)


def convert(body: bytes, usage: bytes, old: Form, new: Form, request: bytes) -> Made:
    """Raises Odd, MsgspecError."""
    if (old, new) == (Form.WHOLE, Form.STREAM):
        return Made(_numbered(_scatter(_response.decode(body))))
    check((old, new) == (Form.STREAM, Form.WHOLE), "no such form")
    return Made(msgspec.json.encode(_gather(body)))


def _items_of(response: Response) -> list[Item]:
    """Its output. Raises Odd for what isn't alike in both forms."""
    items: list[Item] = []
    for said in response.output:
        decoder = _ITEMS.get(_type.decode(said).type)
        if decoder is None:
            raise Odd("an unknown item")
        items.append(decoder.decode(said))
    check(response.object == "response" and bool(items), "nothing that both forms have")
    order = [_ORDER[type(item)] for item in items]
    check(order == sorted(order) and order.count(0) < 2 and order.count(1) < 2, "items in another order")
    calls = 2 in order
    check(response.status == _COMPLETED or response.status == "incomplete", "no end")
    check(response.status == _COMPLETED or response.tools == _EMPTY, "perhaps a call that was cut off")
    for item in items:
        _check_item(item, calls)
    return items


def _check_item(item: Item, calls: bool) -> None:
    match item:
        case MessageItem():
            (part,) = item.content
            check(part == Text(_EMPTY, part.text, "output_text", NULL) and bool(part.text), "more than text")
            check(not calls or bool(part.text.strip()), "space that only a stream has")
        case ReasoningItem():
            thoughts = given(item.content, "reasoning without thoughts")
            check(item.summary == _EMPTY and len(thoughts) == 1, "reasoning of several parts")
            (thought,) = thoughts
            check(thought == Thought(thought.text, "reasoning_text") and bool(thought.text), "more than thoughts")
        case CallItem():
            msgspec.json.decode(item.arguments)


# -- a stream's events → a response --


def _gather(body: bytes) -> Response:
    names, texts = zip(*events_of(body), strict=True)
    *steps, end = names
    check(_STEPS.issuperset(steps) and end in _ENDS, "an unknown event, or no end")
    check([_type.decode(text).type for text in texts] == list(names), "an event with two names")
    said = _end.decode(texts[-1])
    response = said.response
    check(said.sequence_number == len(steps) and response.end == end and response.usage is not None, "another end")
    for at, item in enumerate(_items_of(response)):
        if isinstance(item, ReasoningItem):
            response.output[at] = Raw(msgspec.json.encode(msgspec.structs.replace(item, status=NULL)))
    return response


# -- a response → a stream's events --


def _numbered(events: Iterator[tuple[str, dict[str, Any]]]) -> bytes:
    """Each event's members by name, as OpenAI's types have them, `type` last; a call's name is an afterthought."""
    written = []
    for number, (name, members) in enumerate(events):
        members |= {"sequence_number": number}
        late = members.pop("name", None)
        members = {key: members[key] for key in sorted(members)} | {"type": name}
        if late is not None:
            members["name"] = late
        written.append(event(msgspec.json.encode(members), name))
    return b"".join(written)


def _scatter(response: Response) -> Iterator[tuple[str, dict[str, Any]]]:
    check(response.usage is not None and not response.usage.by_turn, "a model with channels")
    items = _items_of(response)
    yield "response.created", {"response": response.begun}
    yield "response.in_progress", {"response": response.begun}
    done: list[Raw] = []
    for index, item in enumerate(items):
        if isinstance(item, ReasoningItem):
            last = index == len(items) - 1 and response.end == "response.incomplete"
            item.status = Raw(b'"incomplete"' if last else b'"completed"')
        for name, members in _scatter_item(item):
            yield name, {"output_index": index, **members}
        done.append(Raw(msgspec.json.encode(item)))
    yield response.end, {"response": msgspec.structs.replace(response, output=done)}


def _scatter_item(item: Item) -> Iterator[tuple[str, dict[str, Any]]]:
    match item:
        case CallItem():
            yield from _scatter_call(item)
            return
        case MessageItem(content=[part]):
            begun: Item = msgspec.structs.replace(item, content=[], status=_BEGUN)
            empty: Struct = Text(_EMPTY, "", part.type, _EMPTY)
            name, more = "response.output_text", {"logprobs": _EMPTY}
        case ReasoningItem(content=[part]):
            begun = msgspec.structs.replace(item, content=None, status=_BEGUN)
            empty = Thought("", part.type)
            name, more = "response.reasoning_text", {}
        case _:
            raise Odd("an item of several parts")
    where: dict[str, Any] = {"item_id": item.id, "content_index": 0}
    yield "response.output_item.added", {"item": begun}
    yield "response.content_part.added", {**where, "part": empty}
    for text in pieces(part.text):
        yield f"{name}.delta", {**where, **more, "delta": text}
    yield f"{name}.done", {**where, **more, "text": part.text}
    yield "response.content_part.done", {**where, "part": part}
    yield "response.output_item.done", {"item": item}


def _scatter_call(item: CallItem) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "response.output_item.added", {"item": msgspec.structs.replace(item, arguments="", status=_BEGUN)}
    for text in pieces(item.arguments):
        yield "response.function_call_arguments.delta", {"item_id": item.id, "delta": text}
    told = {"item_id": item.id, "arguments": item.arguments, "name": item.name}
    yield "response.function_call_arguments.done", told
    yield "response.output_item.done", {"item": item}
