"""What is known of the backends and their models. It decides; time and answers come in as arguments.

A backend that doesn't answer keeps what was known of it, also from the snapshot of the process before: an engine that restarts is
still a place for its models, and whether it takes requests just now is for the workers to find out. What it *answers* counts in
full: a model that it no longer lists is gone.

A card's `created` and `permission` are made up anew by vLLM for every answer; they are no change.

A model's *revision* is made of what is known of who answers for it: what the serving backends say of it on their cards, and which
version of an engine they are. It is the same for the same set, whatever the order, and whoever is out just now. Where one backend
of two is newer, that is a revision of its own, and the next one when both are.

Who serves a model? The backends that name it: that are declared to serve it or, where nothing is declared, list it. Only where
there are none those of the longest declared pattern that matches it (`gpt-*`). Names that a pattern covers are models like others
as far as they are known: by their settings, or because the backend lists them. The patterns themselves are published for the
rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import Any

import msgspec

from proxy.control.catalogue import Catalogue
from proxy.control.declared import unix_ns
from proxy.control.discovery import Answer, address_of, max_model_len
from proxy.control.rates import pico_per_token
from proxy.nouns import (
    BackendSettings,
    BoundsSettings,
    ModelCacheSettings,
    ModelSettings,
    PriceSettings,
    RunTimeSettings,
    covering,
    is_pattern,
)
from proxy.snapshot import OWNER, Backend, Bounds, LaterPrice, Model, ModelCache, SnapshotFile

_PASSING = ("created", "permission")
_NO_PRICE = PriceSettings()
_AS_DECLARED = RunTimeSettings()

VLLM_DEPTH = 256
"""vLLM's own `--max-num-seqs`, unless told otherwise: requests beyond that would wait there."""

KEPT_NS = 600_000_000_000
"""For how long a price that was replaced is still published: a request costs what was valid when its first byte came, however
long its body took."""


class KnownBackend:
    """One backend, as it was declared. `cards` is None until it is known what it serves; `essences`: model → a digest of what its
    card says. Times are ns since 1970, 0 = never. `again`: it is to be asked at once."""

    def __init__(self, settings: BackendSettings, name: str) -> None:
        self.settings = settings
        self.backend = address_of(settings, name)
        self.cards: dict[str, bytes] | None = None
        self.essences: dict[str, str] = {}
        self.error = ""
        self.asked_unix_ns = 0
        self.answered_unix_ns = 0
        self.again = asyncio.Event()

    @property
    def reachable(self) -> bool | None:
        """Whether it answered when it was last asked; None if it never was."""
        return not self.error if self.asked_unix_ns else None

    def answered(self, answer: Answer, now_ns: int) -> bool:
        """Take over what it serves; True if that changes anything for workers. One that didn't say its version now has the one
        that it said last."""
        self.error, self.asked_unix_ns, self.answered_unix_ns = "", now_ns, now_ns
        kind = answer.kind if self.settings.kind == "auto" else self.backend.kind
        version = answer.version or self.backend.version
        known = self.cards or {}
        cards = {name: _keep(known.get(name), card) for name, card in answer.cards.items()}
        before = self.cards, self.essences, self.backend
        self.cards, self.essences = cards, {name: _digest(_essence(card)) for name, card in cards.items()}
        self.backend = msgspec.structs.replace(self.backend, kind=kind, version=version)
        return before != (self.cards, self.essences, self.backend)

    def failed(self, error: str, now_ns: int) -> None:
        self.error, self.asked_unix_ns = error, now_ns

    def remember(self, backend: Backend, cards: dict[str, bytes] | None) -> None:
        """What was known before, if it is still about the same server."""
        if _address(backend) == _address(self.backend):
            self.cards = cards
            self.essences = backend.essences
            self.backend = msgspec.structs.replace(self.backend, version=backend.version)
            if self.settings.kind == "auto":
                self.backend = msgspec.structs.replace(self.backend, kind=backend.kind)

    def models(self) -> list[str]:
        """What may be asked of it: what is declared, else what it says. Patterns too."""
        return list(self.settings.models or self.cards or ())

    def names(self) -> list[str]:
        """The models that it serves by their names."""
        return [each for each in self.models() if not self._is_pattern(each)]

    def patterns(self) -> list[str]:
        return [each for each in self.models() if self._is_pattern(each)]

    def _is_pattern(self, name: str) -> bool:
        """An engine's own names may look like one."""
        return is_pattern(name) and name not in (self.cards or ())

    def published(self, said: RunTimeSettings) -> Backend:
        """As workers are to treat it, with what is `said` at run time."""
        settings = self.settings
        return msgspec.structs.replace(
            self.backend,
            weight=weight_of(settings, said),
            depth=settings.depth or (VLLM_DEPTH if self.backend.kind == "vllm" else 0),
            prefill_tokens=settings.prefill_tokens,
            drained=said.drained,
            essences=self.essences,
        )


class Inventory:
    """All backends that there are, the file's first. `bounds`: those of all models."""

    def __init__(self, bounds: BoundsSettings, held: Catalogue, previous: SnapshotFile | None, now_ns: int) -> None:
        self._bounds = bounds
        self._made_unix_s = now_ns // 1_000_000_000
        self._own_cards: dict[str, bytes] = {}
        self._settings: Mapping[str, ModelSettings] = {}
        self._run_time: Mapping[str, RunTimeSettings] = {}
        self.known: dict[str, KnownBackend] = {}
        self.follow(held)
        if previous is not None:
            self._remember(previous)

    def follow(self, held: Catalogue) -> None:
        """Have these backends and models from now on. One that is declared otherwise than before is a new KnownBackend; what was
        known of it stays if it is still the same server."""
        self._settings = held.models
        self._run_time = held.run_time
        self.known = {name: self._follow(name, settings) for name, settings in held.backends.items()}

    def _follow(self, name: str, settings: BackendSettings) -> KnownBackend:
        before = self.known.get(name)
        if before is not None and before.settings == settings:
            return before
        made = KnownBackend(settings, name)
        if before is not None:
            made.remember(msgspec.structs.replace(before.backend, essences=before.essences), before.cards)
        return made

    @property
    def complete(self) -> bool:
        """Every backend was asked at least once."""
        return all(each.asked_unix_ns for each in self.known.values())

    def backends(self) -> dict[str, Backend]:
        return {name: each.published(self._run_time.get(name, _AS_DECLARED)) for name, each in self.known.items()}

    def models(self, now_ns: int) -> dict[str, Model]:
        """Model → all its backends, and the card of the first of them that has one; then the aliases, each with its model."""
        return self.serving(now_ns)[0]

    def serving(self, now_ns: int) -> tuple[dict[str, Model], dict[str, Model]]:
        """The same, and the patterns that backends are declared to serve, each with its backends."""
        named, patterns = _by_model(self.known.values(), KnownBackend.names), self._patterns()
        for name in self._covered():
            if name not in named and (pattern := covering(patterns, name)) is not None:
                named[name] = patterns[pattern]
        made = {name: self._model(name, backends, patterns, now_ns) for name, backends in named.items()}
        for alias, name in self._aliases():
            if alias not in made and name in named:
                made[alias] = msgspec.structs.replace(made[name], card=_alias_card(alias, made[name]))
        return made, {pattern: self._model(pattern, backends, patterns, now_ns) for pattern, backends in patterns.items()}

    def said_of(self, name: str) -> ModelSettings:
        """What is said of a model: under its name or, if nothing is, of the longest pattern that covers it."""
        return self._said_of(name, self._patterns())

    def _said_of(self, name: str, patterns: Iterable[str]) -> ModelSettings:
        said = self._settings.get(name)
        if said is None and (pattern := covering(patterns, name)) is not None:
            said = self._settings.get(pattern)
        return said or ModelSettings()

    def _patterns(self) -> dict[str, list[KnownBackend]]:
        return _by_model(self.known.values(), KnownBackend.patterns)

    def _covered(self) -> Iterator[str]:
        """Names that a pattern may cover: of models that have settings, and what a backend lists beside its own patterns."""
        yield from (name for name in self._settings if not is_pattern(name))
        for each in self.known.values():
            if patterns := each.patterns():
                yield from (name for name in each.cards or () if covering(patterns, name) is not None)

    def _aliases(self) -> Iterator[tuple[str, str]]:
        for name, settings in self._settings.items():
            for alias in settings.aliases:
                yield alias, name

    def _model(self, name: str, serving: list[KnownBackend], patterns: Iterable[str], now_ns: int) -> Model:
        settings = self._said_of(name, patterns)
        price, later = _prices(settings, now_ns)
        cards = [each.cards[name] for each in serving if each.cards and name in each.cards]
        lengths = [length for card in cards if (length := max_model_len(card))]
        return Model(
            name=name,
            backends=tuple(each.backend.name for each in serving),
            input_pico=pico_per_token(price.input),
            cached_input_pico=pico_per_token(price.cached),
            output_pico=pico_per_token(price.output),
            card=cards[0] if cards else self._own_card(name),
            bounds=Bounds(**(_said(self._bounds) | _said(settings.bounds))),
            context_tokens=min(lengths, default=0),
            assumed_output_tokens=settings.assumed_output_tokens,
            later_prices=later,
            defaults=tuple((parameter, msgspec.json.encode(value)) for parameter, value in settings.defaults.items()),
            policy=settings.policy or "",
            fallbacks=settings.fallbacks,
            revision=_revision(name, serving, settings.cache.revision),
            cache=_cache(settings.cache),
            prefix_isolation=settings.prefix_isolation or "",
        )

    def _own_card(self, name: str) -> bytes:
        """For a model that is declared and that no backend has told about yet."""
        if name not in self._own_cards:
            card = {"id": name, "object": "model", "created": self._made_unix_s, "owned_by": OWNER}
            self._own_cards[name] = msgspec.json.encode(card)
        return self._own_cards[name]

    def _remember(self, previous: SnapshotFile) -> None:
        models = [model for name, model in previous.models.items() if name == model.name]
        cards = {model.name: bytes(model.card) for model in models}
        self._own_cards = {name: card for name, card in cards.items() if _is_own(card)}
        for name, backend in previous.backends.items():
            if (known := self.known.get(name)) is not None:
                mine = [model.name for model in models if name in model.backends]
                known.remember(backend, {model: cards[model] for model in mine if model not in self._own_cards})


def weight_of(settings: BackendSettings, said: RunTimeSettings) -> float:
    """What is said at run time comes before what is declared."""
    return settings.weight if said.weight is None else said.weight


def _by_model(backends: Iterable[KnownBackend], models: Callable[[KnownBackend], list[str]]) -> dict[str, list[KnownBackend]]:
    """Model → the backends among whose `models` it is."""
    found: dict[str, list[KnownBackend]] = {}
    for each in backends:
        for model in models(each):
            found.setdefault(model, []).append(each)
    return found


def _prices(settings: ModelSettings, now_ns: int) -> tuple[PriceSettings, tuple[LaterPrice, ...]]:
    """The price of `KEPT_NS` ago, and those since then and to come, the next one first."""
    valid, later = settings.price or _NO_PRICE, []
    for since_ns, price in sorted(((unix_ns(each.valid_from), each) for each in settings.prices), key=lambda each: each[0]):
        if since_ns <= now_ns - KEPT_NS:
            valid = price
        else:
            pico = (pico_per_token(each) for each in (price.input, price.cached, price.output))
            later.append(LaterPrice(since_ns, *pico))
    return valid, tuple(later)


def _cache(said: ModelCacheSettings) -> ModelCache:
    semantic = said.semantic
    model, threshold = ("", 0.0) if semantic is None else (semantic.model, semantic.threshold)
    return ModelCache(said.policy or "", said.scope or "", said.ttl or 0.0, model, threshold)


def _revision(name: str, serving: list[KnownBackend], declared: str) -> str:
    """What isn't known of a backend says nothing: that it is there, and will tell, is no other revision."""
    essences = {essence for each in serving if (essence := each.essences.get(name))}
    versions = {version for each in serving if (version := each.backend.version)}
    return _digest([sorted(essences), sorted(versions), declared])


def _digest(value: Any) -> str:
    return blake2b(msgspec.json.encode(value, order="deterministic"), digest_size=8).hexdigest()


def _alias_card(alias: str, model: Model) -> bytes:
    """The model's own, under the other name; `parent` says which one it is."""
    fields = msgspec.json.decode(model.card)
    return msgspec.json.encode({"root": model.name, **fields, "id": alias, "parent": model.name})


def _said(bounds: BoundsSettings) -> dict[str, int]:
    return {name: bound for name, bound in msgspec.structs.asdict(bounds).items() if bound is not None}


def _keep(known: bytes | None, card: bytes) -> bytes:
    """The card that is known already, if the new one says nothing new."""
    return known if known is not None and _essence(known) == _essence(card) else card


def _is_own(card: bytes) -> bool:
    fields = msgspec.json.decode(card)
    return isinstance(fields, dict) and fields.get("owned_by") == OWNER


def _essence(card: bytes) -> Any:
    fields = msgspec.json.decode(card)
    return {name: value for name, value in fields.items() if name not in _PASSING} if isinstance(fields, dict) else fields


def _address(backend: Backend) -> tuple[str, int, str, bool]:
    return backend.host, backend.port, backend.base_path, backend.tls
