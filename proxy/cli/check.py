"""`glasshouse check`: are the settings good, is behind each backend and at Redis' address what they say, for whom are the limits,
and what will the models cost?"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

import click

from proxy.cli.config import config_option, load_settings, usable
from proxy.cli.report import printable, table
from proxy.control.discovery import Answer, DiscoveryError, address_of, ask, ask_version, max_model_len, new_client, url_of
from proxy.control.issuers import fetch
from proxy.control.rates import per_million_tokens, pico_per_token
from proxy.nouns import (
    CACHE_POLICIES,
    AllowanceSettings,
    BackendSettings,
    CachePolicyName,
    ModelSettings,
    PriceSettings,
    covering,
    is_pattern,
)
from proxy.pricelist import CURRENCY, pricelist
from proxy.settings import IssuerSettings, RedisSettings, Settings
from proxy.wire.bounds import NUMBERS

if TYPE_CHECKING:
    from proxy.store import LiveKey

ANSWER_S = 5.0
_WILDCARD = re.compile(r"[*?[]")
_HOLDERS = (("teams", "team", "in this team"), ("users", "user", "this user's"), ("projects", "project", "for this project"))


@dataclass
class Finding:
    """What was seen of one backend. `problems` make the check fail, `remarks` don't."""

    name: str
    url: str
    answer: Answer | None = None
    version: str | None = None
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


@click.command()
@click.option(
    "--backend", "backends", multiple=True, metavar="URL", help="Look at this one instead of the configured; may be repeated."
)
@config_option
def check(backends: tuple[str, ...], config: Path | None) -> None:
    """Validate the settings and look at each backend: reachable, models and their prices, kind, context length, version; and at
    Redis, if there is one.

    The exit status is 1 if anything stands in the way of serving requests.
    """
    settings = usable(load_settings(config, {"backends": [{"url": url} for url in backends]} if backends else {}))
    if not settings.backends:
        raise click.ClickException("there are no backends; name one with --backend URL or in glasshouse.yaml")
    findings, issuers = asyncio.run(examine(settings))
    click.echo(table(["BACKEND", "URL", "REACHABLE", "KIND", "VERSION", "MODEL", "MAX LENGTH"], _lines(findings)))
    if models := _models(settings, findings):
        click.echo(f"\nPrices in {settings.currency} per million tokens:")
        now = datetime.now(UTC)
        lines = [line for model in models for line in _price_lines(_said_of(settings, model), model, now)]
        click.echo(table(["MODEL", "INPUT", "CACHED INPUT", "OUTPUT", "SAID BY"], lines))
    problems = [f"{each.name}: {text}" for each in findings for text in each.problems] + issuers
    remarks = [f"{each.name}: {text}" for each in findings for text in each.remarks]
    remarks += unserved(settings, findings) + not_covered(settings) + perhaps_sold(settings, findings)
    served = _models(settings, findings)
    in_use, trouble = _keys_in_use(settings)
    problems += trouble
    remarks += for_nobody(settings, in_use) + known_already(settings, in_use or ())
    remarks += for_nothing(settings, served) + not_counted(settings)
    remarks += shadowed(settings, served) + out_of_bounds(settings) + replaced(settings, datetime.now(UTC)) + inside(settings)
    remarks += no_way_out(settings, findings) + without_effect(settings) + kept(settings)
    if settings.redis is not None:
        version, wrong, forgetful = _look_at_redis(settings.redis)
        click.echo(f"\nRedis: {settings.redis.shown}{f', version {version}' if version else ''}")
        problems += [f"redis: {text}" for text in wrong]
        remarks += [f"redis: {text}" for text in forgetful]
    click.echo()
    for text in problems:
        click.echo(f"{click.style('problem', fg='red')}  {printable(text)}")
    for text in remarks:
        click.echo(f"{click.style('remark', fg='yellow')}   {printable(text)}")
    if not problems:
        answering = "every backend answers" if settings.redis is None else "every backend and Redis answer"
        click.echo(click.style(f"The settings are good, and {answering}.", fg="green"))
    sys.exit(1 if problems else 0)


async def examine(settings: Settings) -> tuple[list[Finding], list[str]]:
    """All backends and issuers at once; in the order of the settings. Of issuers what is wrong with them."""
    names = [settings.backend_name(index) for index in range(len(settings.backends))]
    findings, issuers = await asyncio.gather(
        asyncio.gather(*map(_examine, settings.backends, names)),
        asyncio.gather(*(_keys_of(at, issuer) for at, issuer in enumerate(settings.issuers))),
    )
    return findings, [text for text in issuers if text]


async def _keys_of(at: int, issuer: IssuerSettings) -> str:
    """Why its public keys can't be had; "" if they can."""
    try:
        await fetch(issuer, ANSWER_S)
    except DiscoveryError as error:
        return f"issuers[{at}] {issuer.issuer}: {error}"
    return ""


def unserved(settings: Settings, findings: Sequence[Finding]) -> list[str]:
    """Models that have a price and that nobody serves: most likely a name that is spelt differently."""
    if any(each.answer is None for each in findings):
        return []
    is_served = _is_served(settings, findings)
    return [f"models.{model}: no backend serves a model of this name" for model in settings.models if not is_served(model)]


def no_way_out(settings: Settings, findings: Sequence[Finding]) -> list[str]:
    """Fallbacks, and who is to make embeddings, that nobody serves."""
    if any(each.answer is None for each in findings):
        return []
    is_served = _is_served(settings, findings)
    aliases = {alias for name, model in settings.models.items() if is_served(name) for alias in model.aliases}
    named = [(f"models.{name}.fallbacks", each) for name, model in settings.models.items() for each in model.fallbacks]
    semantic = [(f"models.{name}.cache.semantic.model", model.cache.semantic) for name, model in settings.models.items()]
    named += [(place, each.model) for place, each in semantic if each is not None]
    return [
        f"{place}: no backend serves a model called {name!r}"
        for place, name in named
        if name not in aliases and not is_served(name)
    ]


def without_effect(settings: Settings) -> list[str]:
    """What is said of waiting and choosing and changes nothing, or something else than it says."""
    said = [
        f"backends.{settings.backend_name(at)}.depth: each of the {settings.workers} workers may have one request there, "
        f"so {settings.workers} at a time instead of {each.depth}"
        for at, each in enumerate(settings.backends)
        if each.depth is not None and each.depth < settings.workers
    ]
    for name, model in settings.models.items():
        said += [
            f"models.{name}.aliases: {alias!r} can't stand for a pattern"
            for alias in model.aliases
            if name in _patterns(settings)
        ]
    for section in ("users", "projects", "keys"):
        for name, each in getattr(settings, section).items():
            above = [settings.everyone, *([settings.teams[each.team]] if each.team in settings.teams else [])]
            if each.priority == "high" and any(other.priority == "low" for other in above):
                said.append(f"{section}.{name}.priority: 'high' doesn't count beside the 'low' of its team or of everyone")
            stricter = [other.cache for other in above if other.cache is not None and _is_stricter(other.cache, each.cache)]
            if stricter:
                said.append(
                    f"{section}.{name}.cache: {each.cache!r} doesn't count beside the {stricter[0]!r} of its team or of everyone"
                )
    return said


def _is_stricter(policy: CachePolicyName, other: CachePolicyName | None) -> bool:
    return other is not None and CACHE_POLICIES.index(policy) < CACHE_POLICIES.index(other)


def kept(settings: Settings) -> list[str]:
    """What is said of the cache and keeps nothing, or gives more to others than is usual."""
    scopes = [(f"models.{name}.cache.scope", model.cache.scope) for name, model in settings.models.items()]
    if settings.cache is None:
        said: list[tuple[str, object]] = [(f"{place}.cache", each.cache) for place, each in _allowances(settings)]
        said += [(f"models.{name}.cache", model.cache.policy) for name, model in settings.models.items()]
        said += [(f"models.{name}.cache.semantic", model.cache.semantic) for name, model in settings.models.items()]
        places = [place for place, value in [*said, *scopes] if value not in (None, "off")]
        return [f"{place}: nothing is kept where there is no section `cache`" for place in places]
    cache = settings.cache
    remarks = []
    if not cache.memory_bytes and settings.redis is None:
        remarks.append("cache.memory_bytes: 0, and there is no Redis: nothing is kept")
    elif 0 < cache.memory_bytes < cache.entry_bytes:
        remarks.append(f"cache.entry_bytes: {cache.entry_bytes}, and a worker has room for {cache.memory_bytes}")
    shared = [place for place, scope in [("cache.scope", cache.scope), *scopes] if scope == "everyone"]
    return remarks + [f"{place}: what was answered to one team is given to others" for place in shared]


def not_covered(settings: Settings) -> list[str]:
    """What providers charge besides, for the models that have their price from the price list."""
    rows = [(name, model.price.from_) for name, model in settings.models.items() if model.price and model.price.from_]
    besides = [(name, row, pricelist().rows[row].besides) for name, row in rows if row in pricelist().rows]
    return [
        f"models.{name}: {row!r} has further prices, which aren't in the costs here: {', '.join(more)}"
        for name, row, more in besides
        if more
    ]


def perhaps_sold(settings: Settings, findings: Sequence[Finding]) -> list[str]:
    """Models without a price whose name is in the price list, where the engine isn't evidently one's own."""
    if settings.currency != CURRENCY:
        return []
    served = [model for each in findings if each.answer and each.answer.kind == "openai" for model in each.answer.cards]
    unpriced = [model for model in dict.fromkeys(served) if _said_of(settings, model).price is None]
    return [
        f"models.{model}: costs nothing here; if a provider bills you for it, set price: {{from: {model}}}"
        for model in unpriced
        if model in pricelist().rows
    ]


def for_nobody(settings: Settings, in_use: Sequence[LiveKey] | None) -> list[str]:
    """What is said of keys that aren't among these, those in use, and of teams, users and projects that no key is of. None: keys
    aren't known. Whose tokens say whose they are, nobody knows before they come."""
    names = None if in_use is None else {key.name for key in in_use}
    missing = [name for name, key in settings.keys.items() if names is not None and key.hash is None and name not in names]
    said = [f"keys.{name}: no key in use has this name" for name in missing]
    keys = [*settings.keys.values(), *(key.value for key in in_use or ())]
    for section, of, text in _HOLDERS:
        if all(getattr(issuer.claims, of) is None for issuer in settings.issuers):
            taken = {getattr(key, of) for key in keys}
            said += [f"{section}.{name}: no key is {text}" for name in getattr(settings, section) if name not in taken]
    return said


def known_already(settings: Settings, in_use: Sequence[LiveKey]) -> list[str]:
    """Keys with their hash in the file, which the database has too, or has another of that name."""
    names = {key.hash: key.name for key in in_use}
    said = []
    for name, key in settings.keys.items():
        other = None if key.hash is None else names.get(bytes.fromhex(key.hash.removeprefix("sha256:")))
        if other is not None:
            said.append(f"keys.{name}.hash: the database has this key too, as {other!r}; what the file says holds")
        elif key.hash is not None and name in names.values():
            said.append(f"keys.{name}: the database has another key of this name, and both work")
    return said


def for_nothing(settings: Settings, served: Sequence[str]) -> list[str]:
    """Patterns that no model matches, while there are models."""
    return [
        f"{place}.models: no backend serves a model called {pattern!r}"
        for place, each in _allowances(settings)
        for pattern in each.models or ()
        if served and not any(_may_match(pattern, model) for model in served)
    ]


def not_counted(settings: Settings) -> list[str]:
    """Budgets that nothing counts against."""
    return [
        f"{place}.budgets[{at}].gpu_seconds: nothing is counted against it yet, so it limits nothing"
        for place, each in _allowances(settings)
        for at, budget in enumerate(each.budgets)
        if budget.gpu_seconds is not None
    ]


def shadowed(settings: Settings, served: Sequence[str]) -> list[str]:
    """Aliases that never stand for their model."""
    aliases = [(name, alias) for name, model in settings.models.items() for alias in model.aliases]
    return [
        f"models.{name}.aliases: {alias!r} is a model that a backend serves, and that comes first"
        for name, alias in aliases
        if alias in served
    ]


def out_of_bounds(settings: Settings) -> list[str]:
    """Defaults that a request may not have."""
    said = []
    for name, model in settings.models.items():
        for parameter, value in model.defaults.items():
            bound = NUMBERS.get(parameter, "")
            most = getattr(model.bounds, bound, None) or getattr(settings.bounds, bound, None)
            if most is not None and isinstance(value, int | float) and value > most:
                place = f"models.{name}.defaults.{parameter}"
                said.append(f"{place}: {value} is over its bound of {most}, so requests that don't say it are refused")
    return said


def replaced(settings: Settings, now: datetime) -> list[str]:
    """Prices that another one has taken the place of."""
    said = []
    for name, model in settings.models.items():
        begun = [price.valid_from for price in model.prices if price.valid_from <= now]
        said += [
            f"models.{name}.prices[{at}]: another has taken its place since {max(begun).isoformat()}"
            for at, price in enumerate(model.prices)
            if begun and price.valid_from < max(begun)
        ]
    return said


def inside(settings: Settings) -> list[str]:
    """Where engines may be sent to, and that are in somebody's own network."""
    return [
        f"media.hosts: engines may be sent to {host!r}, which is in your own network"
        for host in settings.media.hosts
        if _is_private(host)
    ]


def _is_private(host: str) -> bool:
    try:
        return not ip_address(host).is_global
    except ValueError:
        return "." not in host.removeprefix("*.") or host.endswith((".local", ".internal", ".localhost", ".lan"))


def _allowances(settings: Settings) -> Iterator[tuple[str, AllowanceSettings]]:
    """With their places in the settings."""
    yield "everyone", settings.everyone
    for section in ("teams", "users", "projects", "keys"):
        for name, each in getattr(settings, section).items():
            yield f"{section}.{name}", each


def _keys_in_use(settings: Settings) -> tuple[list[LiveKey] | None, list[str]]:
    """And why they can't be known. None where there is no database yet; it is left as it is."""
    asked = settings.keys or settings.teams or settings.users or settings.projects
    if not asked or not (settings.database or settings.database_path.exists()):
        return None, []
    from sqlalchemy.exc import DBAPIError

    from proxy.store import StoreError, live_keys, open_engine, reader

    try:
        engine = reader(open_engine(settings.database_url))
        try:
            with engine.connect() as connection:
                return list(live_keys(connection)), []
        finally:
            engine.dispose()
    except DBAPIError as error:
        return None, [f"database: its keys can't be read: {error.orig}"]
    except StoreError as error:
        return None, [str(error)]


def _look_at_redis(settings: RedisSettings) -> tuple[str, list[str], list[str]]:
    from proxy.cli.redis import look_at_redis  # 0.2 s that a command without Redis need not take

    return look_at_redis(settings)


async def _examine(settings: BackendSettings, name: str) -> Finding:
    backend = address_of(settings, name)
    finding = Finding(name, url_of(backend))
    variable = settings.api_key_env
    if variable and not os.environ.get(variable):
        finding.problems.append(f"api_key_env: the environment variable {variable} is empty")
    try:
        async with new_client(ANSWER_S, backend.ca_file) as client:
            finding.answer = await ask(client, backend, ANSWER_S)
            finding.version = await ask_version(client, backend, ANSWER_S)
    except DiscoveryError as error:
        finding.problems.append(str(error))
    else:
        _compare(settings, finding, finding.answer)
    return finding


def _compare(settings: BackendSettings, finding: Finding, answer: Answer) -> None:
    """What is declared with what is there."""
    if not answer.cards:
        finding.problems.append("it serves no model")
    for model in settings.models:
        if is_pattern(model) and model not in answer.cards:
            if not any(fnmatchcase(each, model) for each in answer.cards):
                finding.remarks.append(f"models: nothing that it lists is called {model!r}; what is asked for so is sent to it")
        elif model not in answer.cards:
            finding.problems.append(f"models: it doesn't serve {model!r}, only {', '.join(answer.cards) or 'nothing'}")
    if settings.kind not in ("auto", answer.kind):
        finding.remarks.append(f"kind: declared as {settings.kind!r}, and it looks like {answer.kind!r}")


def _is_served(settings: Settings, findings: Sequence[Finding]) -> Callable[[str], bool]:
    """By name, or covered by a pattern."""
    served, patterns = _models(settings, findings), _patterns(settings)
    return lambda name: name in served or covering(patterns, name) is not None


def _may_match(pattern: str, model: str) -> bool:
    """`model` may be a pattern itself: then what comes before the first wildcards tells."""
    if not is_pattern(model):
        return fnmatchcase(model, pattern)
    ours, theirs = (_WILDCARD.split(each)[0] for each in (pattern, model))
    return ours.startswith(theirs) or theirs.startswith(ours) if is_pattern(pattern) else fnmatchcase(pattern, model)


def _patterns(settings: Settings) -> list[str]:
    """That backends are declared to serve."""
    return [model for each in settings.backends for model in each.models if is_pattern(model)]


def _said_of(settings: Settings, model: str) -> ModelSettings:
    """Under its name, else of the pattern that covers it."""
    said = settings.models.get(model) or settings.models.get(covering(_patterns(settings), model) or "")
    return said or ModelSettings()


def _models(settings: Settings, findings: Sequence[Finding]) -> list[str]:
    """What backends list or are declared to serve, each once."""
    listed = [model for each in findings if each.answer for model in each.answer.cards]
    return list(dict.fromkeys([*listed, *(model for each in settings.backends for model in each.models)]))


def _price_lines(settings: ModelSettings, model: str, now: datetime) -> list[list[object]]:
    """What it costs now, and from when on it will cost something else."""
    dated = sorted(settings.prices, key=lambda price: price.valid_from)
    begun = [price for price in dated if price.valid_from <= now]
    current = begun[-1] if begun else settings.price
    later = [
        [*_price_line(model, price), f"{_said_by(price)}, from {price.valid_from.isoformat()}"] for price in dated[len(begun) :]
    ]
    return [[*_price_line(model, current or PriceSettings()), _said_by(current)], *later]


def _price_line(model: str, price: PriceSettings) -> list[object]:
    return [model, *(per_million_tokens(pico_per_token(each)) for each in (price.input, price.cached, price.output))]


def _said_by(price: PriceSettings | None) -> str:
    return "nobody" if price is None else "the settings" if price.from_ is None else f"price list: {price.from_}"


def _lines(findings: Sequence[Finding]) -> list[list[object]]:
    """A line per model; a backend's own facts on its first."""
    lines: list[list[object]] = []
    for each in findings:
        if each.answer is None:
            lines.append([each.name, each.url, "no", "", "", "", ""])
            continue
        models = [(model, max_model_len(card)) for model, card in each.answer.cards.items()] or [("", None)]
        head: list[object] = [each.name, each.url, "yes", each.answer.kind, each.version or ""]
        lines += [[*(head if at == 0 else [""] * len(head)), *model] for at, model in enumerate(models)]
    return lines
