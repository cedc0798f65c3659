"""What is generated for a request: the tokens of each choice, and the order in which they come. Sans-io."""

from __future__ import annotations

import functools
import itertools
import re
import zlib
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import msgspec

from tests.support.scripted_vllm import requests
from tests.support.scripted_vllm.requests import Body, Context, quote
from tests.support.scripted_vllm.script import Script

TEXT: Final = (
    "The glass house on the hill keeps no secrets from anyone who walks past it at noon and every room can be seen from "
    "outside while light goes through it unchanged"
)
_VOCABULARY: Final = tuple(" " + word for word in TEXT.split())
_PIECE: Final = re.compile(r" ?\w+| ?[^\w\s]|\s")


class Token(NamedTuple):
    text: str
    kind: str = "content"  # content, reasoning, tool (text is the delta's JSON) or end


class Choice(msgspec.Struct, frozen=True):
    index: int
    prompt: int
    """Which prompt of a batch."""
    tokens: list[Token]
    finish: str


class Call(msgspec.Struct, frozen=True):
    """One request for generation, understood."""

    chat: bool
    answer_id: bytes
    created: int
    model: str
    body: Body
    script: Script
    prompts: list[int]
    """Tokens of each prompt."""
    choices: list[Choice]

    @property
    def prompt_tokens(self) -> int:
        return sum(self.prompts)

    @property
    def completion_tokens(self) -> int:
        return sum(len(choice.tokens) for choice in self.choices)


def understand(body: Body, context: Context, *, chat: bool) -> Call:
    """Raises Refused."""
    script, max_model_len = context.script, context.max_model_len
    requests.check(body, chat=chat, models=context.models, max_model_len=max_model_len)
    if chat:
        prompts = [script.prompt_tokens or requests.count_messages(bytes(body.messages))]
    else:
        prompts = [script.prompt_tokens or requests.count_prompt(prompt) for prompt in requests.prompts_of(body.prompt)]
    if max(prompts) > max_model_len:
        raise requests.bad(
            "input_tokens",
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt contains at least "
            f"{max_model_len + 1} input tokens, which exceeds this limit even without any output tokens. "
            "Please reduce the length of the input prompt.",
            max_model_len + 1,
        )
    each = 1 if body.n is None else body.n
    choices = [
        _generate(body, script, prompt * each + i, prompt, chat=chat) for prompt in range(len(prompts)) for i in range(each)
    ]
    return Call(chat, context.answer_id, context.created, body.model or context.models[0], body, script, prompts, choices)


def _generate(body: Body, script: Script, index: int, prompt: int, *, chat: bool) -> Choice:
    stops = script.finish == "stop"
    if script.tools and chat:
        tokens = _tool_tokens(body)
    elif script.pieces is not None:
        tokens = [Token(text) for text in script.pieces[min(index, len(script.pieces) - 1)]]
    elif script.content is not None:
        tokens = [*_words(script.reasoning, index), *map(Token, pieces_of(script.content))]
    else:
        tokens = [*_words(script.tokens - stops, index)]
    if script.reasoning and chat:
        tokens = [Token(t.text, "reasoning") if i < script.reasoning else t for i, t in enumerate(tokens)]
    if stops or not tokens:
        tokens.append(Token("", "end"))
    limit = requests.limit_of(body)
    if limit is not None and len(tokens) > limit:
        return Choice(index, prompt, tokens[:limit], "length")
    named = bytes(body.tool_choice).startswith(b"{")
    finish = "tool_calls" if script.tools and chat and stops and not named else script.finish
    return Choice(index, prompt, tokens, finish)


@functools.lru_cache(maxsize=256)
def _words(count: int, start: int) -> tuple[Token, ...]:
    words = [Token(word) for word in itertools.islice(itertools.cycle(_VOCABULARY), start, start + count)]
    if words:
        words[0] = Token(words[0].text[1:])
    return tuple(words)


def pieces_of(text: str) -> list[str]:
    """A text as tokens: words with the blank before them, and single signs."""
    return _PIECE.findall(text)


class ToolCall(NamedTuple):
    """A tool call of the answer."""

    id: str
    name: str
    arguments: tuple[str, ...]


def tool_calls(body: Body) -> list[ToolCall]:
    names = ["get_weather", "get_time"]
    if raw := requests.present(body.tools):
        declared = [tool.get("function", {}).get("name") for tool in msgspec.json.decode(raw, type=list[dict[str, Any]])]
        names = list(itertools.islice(itertools.cycle([name for name in declared if name] or names), 2))
    cities = (("{", '"city": "', "Par", "is", '"}'), ("{", '"city": "', "Kö", "ln", '"}'))
    return [ToolCall(f"chatcmpl-tool-{zlib.crc32(f'{i}{name}'.encode()):016x}", name, cities[i]) for i, name in enumerate(names)]


def _tool_tokens(body: Body) -> list[Token]:
    tokens = []
    for i, call in enumerate(tool_calls(body)):
        head = b'{"content":null,"tool_calls":[{"id":%b,"type":"function","index":%d,"function":{"name":%b}}]}' % (
            quote(call.id),
            i,
            quote(call.name),
        )
        tokens.append(Token(head.decode(), "tool"))
        for part in call.arguments:
            delta = b'{"tool_calls":[{"index":%d,"function":{"arguments":%b}}]}' % (i, quote(part))
            tokens.append(Token(delta.decode(), "tool"))
    return tokens


def _groups(choice: Choice, size: int) -> list[list[Token]]:
    """The tokens of each event: one, then `size` at a time; deltas of different kinds don't share one."""
    if size == 1:
        return [[token] for token in choice.tokens]
    groups: list[list[Token]] = []
    room = 0
    for token in choice.tokens:
        mixes = bool(groups) and (groups[-1][0].kind == token.kind or token.kind == "end") and token.kind != "tool"
        if not room or not mixes:
            groups.append([])
            room = 1 if len(groups) == 1 else size
        groups[-1].append(token)
        room -= 1
    return groups


def schedule(call: Call) -> Iterator[tuple[int, list[Token], bool]]:
    """(choice, the tokens of its next event, whether it is the last), in the order of the stream."""
    queues = [_groups(choice, call.script.tokens_per_event) for choice in call.choices]
    at = [0] * len(queues)
    rest = (i for _ in range(max(map(len, queues), default=0)) for i in range(len(queues)))
    for i in itertools.chain(call.script.order, rest):
        if i < len(queues) and at[i] < len(queues[i]):
            at[i] += 1
            yield i, queues[i][at[i] - 1], at[i] == len(queues[i])


class Delta(NamedTuple):
    """What one event of a stream of one choice brings."""

    kind: str
    """content, reasoning, call (a tool call begins), arguments (of that call) or end (nothing to show)."""
    text: str
    """Of a call, its place among tool_calls()."""
    tokens: int
    wait: float


def deltas(call: Call) -> Iterator[Delta]:
    """The only choice's tokens as they come, for APIs that name what an event brings."""
    wait = call.script.after_role
    for _, group, _ in schedule(call):
        text, kind = "".join([token.text for token in group]), group[0].kind
        if kind == "tool":
            (part,) = msgspec.json.decode(text)["tool_calls"]
            kind, text = ("call", str(part["index"])) if "id" in part else ("arguments", part["function"]["arguments"])
        yield Delta(kind, text, len(group), wait)
        wait = call.script.interval


def text_of(choice: Choice, kind: str = "content") -> str:
    return "".join([token.text for token in choice.tokens if token.kind == kind])


def echoed(call: Call, choice: Choice) -> list[Token]:
    if not call.body.echo:
        return []
    prompt = requests.prompts_of(call.body.prompt)[choice.prompt]
    return [Token(text, "echo") for text in pieces_of(prompt)] if isinstance(prompt, str) else []
