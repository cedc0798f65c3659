"""Anthropic's messages, as vLLM 0.31 to 0.33 write them: a message of blocks, or an event for each step of making one.

An answer in one piece has its blocks in one order: thinking, text, tools; a stream that has them in another is Odd. So is, as in
chat, an answer where a tool's input may have been cut off. An empty answer is an empty text block in one piece, and no block in a
stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec
from msgspec import UNSET, Raw, UnsetType

from proxy.cache.entry import Form
from proxy.cache.forms.strict import NULL, Made, Odd, Offer, Strict, check, event, events_of, pieces, raw

_TOOL_USE: Final = Raw(b'"tool_use"')
_END_TURN: Final = Raw(b'"end_turn"')
_ORDER: Final = {"thinking": 0, "text": 1, "tool_use": 2}


class Usage(Strict):
    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int | UnsetType = UNSET
    cache_read_input_tokens: int | UnsetType = UNSET

    @property
    def before(self) -> Usage:
        """As it is told at the beginning: nobody knows yet what the cache had."""
        return Usage(self.input_tokens + (self.cache_creation_input_tokens or 0) + (self.cache_read_input_tokens or 0), 0)


class Block(Strict):
    type: str
    text: str | UnsetType = UNSET
    id: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    input: Raw | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    signature: str | UnsetType = UNSET


class Message(Strict):
    """In one piece: what is null isn't there."""

    id: Raw
    type: str
    role: Raw
    content: list[Block]
    model: Raw
    stop_reason: Raw | UnsetType = UNSET
    stop_sequence: Raw | UnsetType = UNSET
    usage: Usage | UnsetType = UNSET


class Delta(Strict):
    type: str
    text: str | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    partial_json: str | UnsetType = UNSET
    signature: str | UnsetType = UNSET


class MessageStart(Strict):
    type: str
    message: Message


class BlockStart(Strict):
    type: str
    content_block: Block
    index: int


class BlockDelta(Strict):
    type: str
    delta: Delta
    index: int


class BlockStop(Strict):
    type: str
    index: int


class Stop(Strict):
    stop_reason: Raw
    stop_sequence: Raw


class MessageDelta(Strict):
    type: str
    delta: Stop
    usage: Usage


class MessageStop(Strict):
    type: str


_EVENTS: Final[dict[str, msgspec.json.Decoder[Any]]] = {
    "message_start": msgspec.json.Decoder(MessageStart),
    "content_block_start": msgspec.json.Decoder(BlockStart),
    "content_block_delta": msgspec.json.Decoder(BlockDelta),
    "content_block_stop": msgspec.json.Decoder(BlockStop),
    "message_delta": msgspec.json.Decoder(MessageDelta),
    "message_stop": msgspec.json.Decoder(MessageStop),
}
_message = msgspec.json.Decoder(Message)
_offer = msgspec.json.Decoder(Offer)
_object = msgspec.json.Decoder(dict[str, Raw])


def convert(body: bytes, usage: bytes, old: Form, new: Form, request: bytes) -> Made:
    """Raises Odd, MsgspecError."""
    offer = _offer.decode(request)
    if (old, new) == (Form.WHOLE, Form.STREAM):
        message = _message.decode(body)
        _check_end(message, offer)
        return Made(b"".join([event(msgspec.json.encode(each), each.type) for each in _scatter(message)]))
    check((old, new) == (Form.STREAM, Form.WHOLE), "no such form")
    message = _gather(list(_read(body)))
    _check_end(message, offer)
    return Made(msgspec.json.encode(message))


def _check_end(message: Message, offer: Offer) -> None:
    """Nothing has cut off a tool's input, so that it would be text in one of the forms."""
    if any(block.type == "tool_use" for block in message.content):
        check(message.stop_reason == _TOOL_USE, "a tool's input that was cut off")
    else:
        check(message.stop_reason != _TOOL_USE, "no tool")
        check(not offer.made or message.stop_reason == _END_TURN, "perhaps a tool's input that was cut off")


def _read(body: bytes) -> Iterator[Any]:
    for name, data in events_of(body):
        decoder = _EVENTS.get(name)
        if decoder is None:
            raise Odd("an unknown event")
        said = decoder.decode(data)
        check(said.type == name, "an event with two names")
        yield said


# -- a stream's events → a message --


def _gather(events: list[Any]) -> Message:
    start, *steps, end, stop = events
    kinds = type(start), type(end), type(stop)
    check(kinds == (MessageStart, MessageDelta, MessageStop), "a stream that isn't complete")
    message: Message = start.message
    check((message.content, message.stop_reason, message.stop_sequence) == ([], NULL, NULL), "a message that has begun")
    blocks = _gather_blocks(steps)
    order = [_ORDER[block.type] for block in blocks]
    check(order == sorted(order) and order.count(0) < 2 and order.count(1) < 2, "blocks in another order")
    if 2 in order:
        blocks = [block for block in blocks if block.type != "text" or (block.text or "").strip()]
    message.content = blocks or [Block("text", text="")]
    message.stop_reason = UNSET if end.delta.stop_reason == NULL else end.delta.stop_reason
    message.stop_sequence = UNSET if end.delta.stop_sequence == NULL else end.delta.stop_sequence
    message.usage = end.usage
    return message


def _gather_blocks(steps: list[Any]) -> list[Block]:
    blocks: list[Block] = []
    open_: Block | None = None
    said = ""
    for step in steps:
        if isinstance(step, BlockStart) and open_ is None:
            check(step.index == len(blocks), "blocks out of order")
            open_, said = step.content_block, ""
            _check_empty(open_)
        elif isinstance(step, BlockDelta) and open_ is not None and step.index == len(blocks):
            said += _piece(open_, step.delta)
        elif isinstance(step, BlockStop) and open_ is not None and step.index == len(blocks):
            blocks.append(_filled(open_, said))
            open_ = None
        else:
            raise Odd("an event out of order")
    check(open_ is None, "a block without an end")
    return blocks


def _check_empty(block: Block) -> None:
    tool = Block("tool_use", id=block.id, name=block.name, input=Raw(b"{}"))
    check(block in (Block("text", text=""), Block("thinking", thinking=""), tool), "an unknown block")
    check(block.type != "tool_use" or (isinstance(block.id, str) and isinstance(block.name, str)), "a tool without a name")


def _piece(block: Block, delta: Delta) -> str:
    """What it adds to its block, in the block's own kind of text; a signature is put there."""
    if delta.type == "signature_delta" and block.type == "thinking" and isinstance(delta.signature, str):
        check(block.signature is UNSET and delta == Delta(delta.type, signature=delta.signature), "an unknown delta")
        block.signature = delta.signature
        return ""
    known = {
        "text": Delta("text_delta", text=delta.text),
        "thinking": Delta("thinking_delta", thinking=delta.thinking),
        "tool_use": Delta("input_json_delta", partial_json=delta.partial_json),
    }
    text = delta.text or delta.thinking or delta.partial_json or ""
    check(delta == known[block.type], "an unknown delta")
    return text


def _filled(block: Block, said: str) -> Block:
    if block.type == "tool_use":
        _object.decode(said)
        block.input = Raw(said.encode())
    elif block.type == "text":
        block.text = said
    else:
        check(isinstance(block.signature, str), "thoughts without a signature")
        block.thinking = said
    return block


# -- a message → a stream's events --


def _scatter(message: Message) -> Iterator[Any]:
    usage = message.usage
    if message.type != "message" or not isinstance(usage, Usage):
        raise Odd("something else")
    blocks = [] if message.content == [Block("text", text="")] else message.content
    begun = Message(message.id, message.type, message.role, [], message.model, NULL, NULL, usage.before)
    yield MessageStart("message_start", begun)
    for index, block in enumerate(blocks):
        empty, deltas = _scatter_block(block)
        yield BlockStart("content_block_start", empty, index)
        for delta in deltas:
            yield BlockDelta("content_block_delta", delta, index)
        yield BlockStop("content_block_stop", index)
    yield MessageDelta("message_delta", Stop(message.stop_reason or NULL, message.stop_sequence or NULL), usage)
    yield MessageStop("message_stop")


def _scatter_block(block: Block) -> tuple[Block, list[Delta]]:
    """(as it begins, what is added). Raises Odd."""
    if block == Block("text", text=block.text) and isinstance(block.text, str):
        return Block("text", text=""), [Delta("text_delta", text=text) for text in pieces(block.text)]
    if block == Block("thinking", thinking=block.thinking, signature=block.signature) and isinstance(block.thinking, str):
        check(isinstance(block.signature, str), "thoughts without a signature")
        signed = Delta("signature_delta", signature=block.signature)
        thoughts = [Delta("thinking_delta", thinking=text) for text in pieces(block.thinking)]
        return Block("thinking", thinking=""), [*thoughts, signed]
    if block == Block("tool_use", id=block.id, name=block.name, input=block.input) and isinstance(block.input, Raw):
        check(isinstance(block.id, str) and isinstance(block.name, str), "a tool without a name")
        said = bytes(block.input).decode()
        parts = [Delta("input_json_delta", partial_json=text) for text in pieces(said)]
        return Block("tool_use", id=block.id, name=block.name, input=raw({})), parts
    raise Odd("an unknown block")
