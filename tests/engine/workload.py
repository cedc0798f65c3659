"""A random day at an engine, the same one for the same dice: many clients, all operations that generate, streams and not, several
choices, batches, stop strings, prompts that begin alike; and some clients who leave.

What each client saw is kept, to be compared with what the ledger and the engine say.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from tests.engine.operations import CONTINUOUS, GENERATING, USAGE, Counted, Generating, counted
from tests.engine.vllm import NAME, PATIENCE, Engine
from tests.support.endpoints import Endpoint
from tests.support.wire_client import Reply, WireClient, request

CLIENTS: Final = 12
"""More than an engine serves at once, so that some wait."""

_OPENINGS: Final = tuple(f"This is the tale of the {who}, as it is told " * 8 for who in ("heron", "ship", "keeper", "winter"))
_SUBJECTS: Final = ("in the north.", "to children.", "at sea, where nobody listens.", "wrongly.", "by the fire, once a year.")


class Leaving(NamedTuple):
    """A client that goes away: when it has had so many events of a stream, and after so many seconds more."""

    events: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Asked:
    name: str
    operation: Generating
    prompts: tuple[str, ...]
    n: int
    tokens: int
    """At most so many for each choice."""
    exact: bool
    """It is not at most: exactly so many."""
    body: Mapping[str, Any]
    leaving: Leaving | None = None

    @property
    def choices(self) -> int:
        return self.n * len(self.prompts)

    @property
    def plain(self) -> bool:
        """One prompt, one choice: then what was cached of it is said without ambiguity."""
        return self.choices == 1


@dataclass(slots=True)
class Answered:
    asked: Asked
    reply: Reply
    told: Counted | None = field(init=False)
    """The usage that the answer told its client."""

    def __post_init__(self) -> None:
        self.told = counted(self.asked.operation, self.reply) if self.reply.ending == "complete" else None


def workload(seed: int, requests: int, *, leaving: float = 0.0) -> list[Asked]:
    """So many requests; `leaving` is the share of clients that go away before they have their answer."""
    dice = random.Random(seed)
    return [_request(dice, f"{seed}-{number}", dice.random() < leaving) for number in range(requests)]


def _request(dice: random.Random, name: str, leaves: bool) -> Asked:
    operation = dice.choices(GENERATING, [4, 4, 2, 2])[0]
    n = dice.choices((1, 2, 4), (6, 2, 1))[0] if operation.choices else 1
    batch = dice.choice((2, 3)) if operation.name == "completions" and dice.random() < 0.25 else 1
    prompts = tuple(dice.choice(_OPENINGS) + dice.choice(_SUBJECTS) for _ in range(batch))
    tokens = dice.randint(100, 200) if leaves else dice.randint(1, 60)
    body: dict[str, Any] = {"model": NAME, "temperature": 0.8, **operation.body(prompts[0], tokens)}
    if n > 1:
        body["n"] = n
    if batch > 1:
        body["prompt"] = prompts
    told = body["stream"] = dice.random() < 0.7
    if operation.counts_on_request and body["stream"]:
        options = dice.choice((None, USAGE, CONTINUOUS))
        told = options is not None
        if options is not None:
            body["stream_options"] = options
    exact = "ignore_eos" in body
    if operation.choices and (told or not body["stream"]) and not leaves and dice.random() < 0.2:
        body["stop"] = ["e", "st"]
        exact = False
    gone = Leaving(dice.choice((0, 1, 2, 10, 30)) if body["stream"] else 0, dice.uniform(0, 0.1)) if leaves else None
    return Asked(name, operation, prompts, n, tokens, exact, body, gone)


def run(endpoint: Endpoint, asked: Iterable[Asked]) -> list[Answered]:
    """All of them, `CLIENTS` at a time; in the order of `asked`."""
    with ThreadPoolExecutor(CLIENTS) as clients:
        return list(clients.map(lambda each: _one(endpoint, each), asked))


def _one(endpoint: Endpoint, asked: Asked) -> Answered:
    with WireClient(endpoint.url, timeout=2 * PATIENCE) as client:
        client.send(request(asked.operation.path, asked.body, key=endpoint.key, headers={"X-Request-Id": asked.name}))
        if asked.leaving is None:
            return Answered(asked, client.read())
        reply = client.read(events=asked.leaving.events)
        time.sleep(asked.leaving.seconds)
        return Answered(asked, reply)


class Lengths:
    """How long prompts are, as the engine counts them; asked of it once each."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: dict[tuple[str, str], int] = {}

    def of(self, asked: Asked) -> int:
        """Input tokens of a request, its prompts once each."""
        return sum(self._length(asked.operation, prompt) for prompt in asked.prompts)

    def _length(self, operation: Generating, prompt: str) -> int:
        length = self._known.get((operation.name, prompt))
        if length is None:
            length = self._known[operation.name, prompt] = self._engine.tokenize(operation.prompt(prompt))
        return length

    def expected(self, answered: Answered) -> Counted:
        """What a whole answer took: as its client was told, or else by what was asked for."""
        if answered.told is not None:
            return answered.told
        asked = answered.asked
        assert asked.exact, "a client that isn't told must know"
        return Counted(self.of(asked), asked.choices * asked.tokens)


def total(counts: Sequence[Counted]) -> Counted:
    return Counted(sum(each.input for each in counts), sum(each.output for each in counts))
