"""Talks of several turns, as assistants and agents hold them, and requests that have nothing in common. All of it is fixed by a
seed before anything runs, answers included: what is asked doesn't depend on who answers.

A round's texts are that round's own, so that no cache can know them from an earlier one.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

from tests.engine.vllm import PATIENCE
from tests.support.endpoints import Endpoint
from tests.support.wire_client import WireClient, request

ANSWER_TOKENS: Final = 4

_TEXT: Final = (
    "the a one no any this heron ship keeper winter light tower north sea wind stone letter captain child river night morning "
    "stood waited wrote forgot carried counted turned sang under over beside between after before without with and but so then "
    "slowly twice never again alone cold bright old small far empty"
)
_WORDS: Final = _TEXT.split()


class Turn(NamedTuple):
    pause: float
    """Seconds after the answer before it; of the first one: after the round's beginning."""
    messages: tuple[dict[str, str], ...]


class Talk(NamedTuple):
    name: str
    turns: tuple[Turn, ...]


class Heard(NamedTuple):
    """One answer."""

    to_first: float
    """Seconds until the first of its stream."""
    prompt: int
    cached: int
    backend: str


def shared(
    mark: str, seed: int, *, openings: int, users: int, turns: int, opening_words: int, turn_words: int, within: float
) -> list[Talk]:
    """`openings` system prompts with `users` talks each. They begin at random in `within` seconds; `mark` makes texts different
    that are alike otherwise."""
    dice = random.Random(seed)
    systems = [f"{mark} {each}: {text(dice, opening_words)}" for each in range(openings)]
    talks = []
    for opening, system in enumerate(systems):
        for user in range(users):
            said: list[dict[str, str]] = [{"role": "system", "content": system}]
            held = []
            for turn in range(turns):
                said = [*said, {"role": "user", "content": text(dice, turn_words)}]
                held.append(Turn(dice.uniform(0, within) if turn == 0 else dice.uniform(0.1, 0.5), tuple(said)))
                said = [*said, {"role": "assistant", "content": text(dice, turn_words // 2)}]
            talks.append(Talk(f"{mark} {opening} {user}", tuple(held)))
    return talks


def unlike(mark: str, seed: int, *, requests: int, words: tuple[int, int], within: float) -> list[Talk]:
    """Requests that begin differently and are of all lengths, at random in `within` seconds."""
    dice = random.Random(seed)
    talks = []
    for each in range(requests):
        said = {"role": "user", "content": f"{mark} {each}: {text(dice, dice.randint(*words))}"}
        talks.append(Talk(f"{mark} {each}", (Turn(dice.uniform(0, within), (said,)),)))
    return talks


def hold(endpoint: Endpoint, model: str, talks: Sequence[Talk]) -> list[Heard]:
    """All of them, each with a client of its own. Every request must be answered in full."""
    begun = time.monotonic() + 0.2  # when all of the clients are there
    with ThreadPoolExecutor(len(talks)) as clients:
        held = clients.map(lambda talk: _hold(endpoint, model, talk, begun), talks)
        return [heard for each in held for heard in each]


def _hold(endpoint: Endpoint, model: str, talk: Talk, begun: float) -> list[Heard]:
    heard: list[Heard] = []
    with WireClient(endpoint.url, timeout=PATIENCE) as client:
        at = begun
        for turn in talk.turns:
            time.sleep(max(0.0, at + turn.pause - time.monotonic()))
            heard.append(ask(client, endpoint.key, model, turn.messages, session=talk.name))
            at = time.monotonic()
    return heard


def ask(
    client: WireClient, key: str, model: str, messages: Sequence[dict[str, str]], *, session: str, tokens: int = ANSWER_TOKENS
) -> Heard:
    """One streamed answer of so many tokens, with what it says it took."""
    body: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    data = request(
        "/v1/chat/completions",
        {**body, "stream_options": {"include_usage": True}},
        key=key,
        headers={"X-Session-Id": session},
    )
    asked = time.monotonic()
    client.send(data)
    reply = client.read()
    assert (reply.status, reply.ending) == (200, "complete"), (reply.status, reply.ending, reply.body[:500])
    usage = json.loads(reply.events[-2].removeprefix(b"data: "))["usage"]  # what comes after it is [DONE]
    return Heard(
        reply.parts[0][0] - asked,
        usage["prompt_tokens"],
        usage["prompt_tokens_details"]["cached_tokens"],
        reply.header("x-glasshouse-backend") or "",
    )


def percentile(heard: Sequence[Heard], part: float) -> float:
    """Seconds until the first token, of which this part of the requests needed no more."""
    times = sorted(each.to_first for each in heard)
    return times[math.ceil(part * len(times)) - 1]


def text(dice: random.Random, words: int) -> str:
    return " ".join(dice.choices(_WORDS, k=words))
