"""Answers to questions that mean the same: of those that were kept, the nearest by the cosine of their embeddings.

Who may be near is settled before anything is compared. A *group* is a key like any answer's (`key.py`), of the request with its
question taken out: the same tenant, model and revision, system prompt, history and parameters, and the model, in its revision,
that embeds the question. Within it every vector is looked at (`Index`): 10,000 of 768 numbers take 2 ms, in a thread. What a
worker doesn't know, Redis may, where it searches vectors (`vectors.py`).

A question that can't be embedded, in time, is one that nobody has asked before. Import this only where a model wants it: numpy
takes 17 MB of memory and a tenth of a second.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import msgspec

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a worker has one core, and more threads than that are slower at this
import numpy as np
from numpy.typing import NDArray

from proxy.cache.key import key_of
from proxy.exchange import Exchange
from proxy.nouns import SYSTEM_KEY
from proxy.snapshot import Model, Principal, Snapshot
from proxy.wire.operation import EngineOperation
from proxy.wire.question import question_of

if TYPE_CHECKING:
    from proxy.cache.vectors import Vectors

Vector = NDArray[np.float32]

MOST_BYTES: Final = 64 * 1024 * 1024
"""Of vectors, in one worker: some 20,000 of 768 numbers."""
NEIGHBOURS: Final = 4
"""That are tried: the nearest may have ended, or be too old for who asks."""
_LONGEST: Final = 65_536
"""Numbers of a vector."""
_OVERHEAD: Final = 300
"""Bytes that one takes besides its numbers, about."""
_AT_ONCE: Final = 256 * 1024
"""Bytes of a group that are looked at in the event loop: 20 µs. A larger one is in a thread."""
_ROUNDING: Final = 6
"""Digits of a similarity: float32 has no more that mean anything."""
_SYSTEM: Final = Principal(SYSTEM_KEY, SYSTEM_KEY)


class Embed(Protocol):
    """Have a text embedded; `relay/embed.py` is what does. `done` is called once, maybe at once: with None if that failed. Not if
    what is returned was called before."""

    def __call__(
        self, text: str, model: Model, snapshot: Snapshot, wanted_by: Exchange, done: Callable[[list[float] | None], None]
    ) -> Callable[[], None]: ...


class Neighbour(NamedTuple):
    key: bytes
    similarity: float


class Meaning(NamedTuple):
    """What a request asks, of length 1, and among whom the like may be looked for. `space`: whose embeddings it is one of."""

    space: str
    group: bytes
    vector: Vector


# -- vectors --


def vector_of(numbers: Sequence[float]) -> Vector | None:
    """Of length 1. None: they have no direction."""
    if not 0 < len(numbers) <= _LONGEST:
        return None
    vector = np.asarray(numbers, np.float64)
    largest = np.max(np.abs(vector))  # of numbers as large as doubles can be the length would be none
    if not (np.isfinite(largest) and largest > 0):
        return None
    vector = vector / largest
    normal: Vector = (vector / np.linalg.norm(vector)).astype(np.float32)
    return normal


def similarity_of(one: Vector, other: Vector) -> float:
    return round(min(1.0, max(-1.0, float(one @ other))), _ROUNDING)


class _Group:
    """Vectors: the first rows of `matrix`, as many as there are `keys`. The first of `rows` was of use longest ago."""

    def __init__(self, size: int) -> None:
        self.matrix = np.empty((4, size), np.float32)
        self.keys: list[bytes] = []
        self.rows: dict[bytes, int] = {}

    @property
    def size(self) -> int:
        """Of a vector."""
        return int(self.matrix.shape[1])

    def put(self, key: bytes, vector: Vector) -> None:
        row = self.rows.pop(key, None)
        if row is None:
            row = len(self.keys)
            if row == len(self.matrix):
                self._resize(row + row // 4 + 4)
            self.keys.append(key)
        self.rows[key] = row
        self.matrix[row] = vector

    def drop(self, key: bytes) -> None:
        """The last one takes its place."""
        row, last = self.rows.pop(key), self.keys.pop()
        if last != key:
            self.keys[row] = last
            self.rows[last] = row
            self.matrix[row] = self.matrix[len(self.keys)]
        if len(self.matrix) > 2 * len(self.keys) + 8:
            self._resize(len(self.keys) + 4)

    def _resize(self, rows: int) -> None:
        """In another place: whoever looks at this one in a thread goes on."""
        used = min(len(self.keys), rows)
        matrix = np.empty((rows, self.size), np.float32)
        matrix[:used] = self.matrix[:used]
        self.matrix = matrix


class Index:
    """`bytes`: what its vectors take, about; their matrices may be up to a quarter larger, and twice as large for a moment."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.bytes = 0
        self._most = most_bytes
        self._groups: dict[bytes, _Group] = {}
        """The one that was of use longest ago comes first."""

    def __len__(self) -> int:
        return sum(len(group.keys) for group in self._groups.values())

    def put(self, name: bytes, key: bytes, vector: Vector) -> None:
        """In the group of this name. If the others there have another length, their model has changed: they mean nothing now."""
        if _taken(vector) > self._most:
            return
        group = self._groups.pop(name, None)
        if group is not None and group.size != len(vector):
            self.bytes -= len(group.keys) * _taken(group.matrix[0])
            group = None
        group = self._groups[name] = group or _Group(len(vector))
        if key not in group.rows:
            self.bytes += _taken(vector)
        group.put(key, vector)
        while self.bytes > self._most:
            oldest = next(iter(self._groups))
            self.drop(oldest, next(iter(self._groups[oldest].rows)))

    def drop(self, name: bytes, key: bytes) -> None:
        group = self._groups.get(name)
        if group is not None and key in group.rows:
            self.bytes -= _taken(group.matrix[0])
            group.drop(key)
            if not group.keys:
                del self._groups[name]

    def vectors(self, name: bytes, vector: Vector) -> Vector | None:
        """All of a group that can be compared with this one, a row each."""
        group = self._groups.pop(name, None)
        if group is None:
            return None
        self._groups[name] = group
        return group.matrix[: len(group.keys)] if group.size == len(vector) else None

    def at(self, name: bytes, vector: Vector, rows: Sequence[int], threshold: float) -> list[Neighbour]:
        """Who is in these rows now, and near enough: while somebody looked at them there may have come others."""
        group = self._groups.get(name)
        if group is None or group.size != len(vector):
            return []
        found = [Neighbour(group.keys[row], similarity_of(group.matrix[row], vector)) for row in rows if row < len(group.keys)]
        return [each for each in found if each.similarity >= threshold]

    def used(self, name: bytes, key: bytes) -> None:
        group = self._groups.get(name)
        if group is not None and key in group.rows:
            group.rows[key] = group.rows.pop(key)


def nearest(vectors: Vector, vector: Vector, threshold: float) -> list[int]:
    """Rows, the nearest first."""
    similarities = vectors @ vector
    rows = np.flatnonzero(similarities >= threshold - 10**-_ROUNDING)
    if len(rows) > NEIGHBOURS:
        rows = rows[np.argpartition(similarities[rows], -NEIGHBOURS)[-NEIGHBOURS:]]
    return [int(row) for row in rows[np.argsort(-similarities[rows], kind="stable")]]


def _taken(vector: Vector) -> int:
    return vector.nbytes + _OVERHEAD


# -- requests --


class Semantic:
    """`opening` is called before a request waits for anything."""

    def __init__(self, embed: Embed, opening: Callable[[Exchange], None]) -> None:
        self.index = Index()
        self.vectors: Vectors | None = None
        """Where workers share theirs."""
        self._embed = embed
        self._opening = opening

    async def meaning(
        self,
        exchange: Exchange,
        operation: EngineOperation[Any],
        body: bytes,
        model: Model,
        tenant: str,
        snapshot: Snapshot,
    ) -> Meaning | None:
        """None: there is no telling."""
        question, embedder = question_of(operation.name, body), embedder_of(model, snapshot)
        if question is None or embedder is None or operation.caching is None:
            return None
        space = hashlib.blake2b(msgspec.json.encode((embedder.name, embedder.revision)), digest_size=8).hexdigest()
        revision = msgspec.json.encode((model.revision, embedder.name, embedder.revision)).decode()
        group = key_of(snapshot.cache_secret, operation.name, operation.caching, model.name, revision, tenant, question.body)
        if group is None:
            return None
        numbers = await self._embedded(question.text, embedder, snapshot, exchange)
        vector = None if numbers is None else vector_of(numbers)
        return None if vector is None else Meaning(space, group, vector)

    async def _embedded(self, text: str, model: Model, snapshot: Snapshot, exchange: Exchange) -> list[float] | None:
        if not exchange.opened:
            self._opening(exchange)
        answer: list[float] | None = None

        def done(numbers: list[float] | None) -> None:
            nonlocal answer
            answer = numbers
            exchange.flow.wake()

        withdraw = self._embed(text, model, snapshot, exchange, done)
        try:
            await exchange.flow.wait()
        except BaseException:
            withdraw()
            raise
        return answer

    async def known(self, meaning: Meaning, threshold: float, exchange: Exchange) -> list[Neighbour]:
        """Those that this worker knows, the nearest first."""
        _, group, vector = meaning
        vectors = self.index.vectors(group, vector)
        if vectors is None:
            return []
        if vectors.nbytes <= _AT_ONCE:
            rows = nearest(vectors, vector, threshold)
        else:
            looking = asyncio.get_running_loop().run_in_executor(None, nearest, vectors, vector, threshold)
            rows = await exchange.flow.until(looking)
        return self.index.at(group, vector, rows, threshold)

    async def shared(self, meaning: Meaning, threshold: float, secret: bytes, exchange: Exchange) -> list[Neighbour]:
        """Those that Redis knows, the nearest first."""
        vectors = self.vectors
        if vectors is None or not vectors.up:
            return []
        answer: list[Neighbour] = []

        def done(neighbours: list[Neighbour]) -> None:
            answer.extend(each for each in neighbours if each.similarity >= threshold)
            exchange.flow.wake()

        withdraw = vectors.look(meaning, secret, done)
        try:
            await exchange.flow.wait()
        except BaseException:
            withdraw()
            raise
        return answer

    def keep(self, meaning: Meaning, key: bytes, secret: bytes, ttl_s: float) -> None:
        """Under `key` there is an answer now."""
        self.index.put(meaning.group, key, meaning.vector)
        if self.vectors is not None:
            self.vectors.keep(meaning, key, secret, ttl_s)

    def used(self, meaning: Meaning, key: bytes) -> None:
        self.index.used(meaning.group, key)

    def drop(self, meaning: Meaning, key: bytes, ttl_s: float) -> None:
        """There is none any more, or of one that others have kept, none yet."""
        self.index.drop(meaning.group, key)
        if self.vectors is not None:
            self.vectors.drop(meaning, key, ttl_s)


def embedder_of(model: Model, snapshot: Snapshot) -> Model | None:
    """Who embeds the questions to a model; None: nobody, or nobody that there is."""
    name = model.cache.semantic_model
    return (snapshot.models.get(name) or snapshot.model(_SYSTEM, name)) if name else None
