"""`glasshouse check`: are the settings good, is behind each backend and at Redis' address what they say, for whom are the limits,
and what will the models cost?"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import click
from sqlalchemy.exc import DBAPIError

from proxy.cli.config import config_option, load_settings, usable
from proxy.cli.report import printable, table
from proxy.control.discovery import Answer, DiscoveryError, address_of, ask, ask_version, max_model_len, new_client, url_of
from proxy.control.prices import per_million_tokens, pico_per_token
from proxy.nouns import AllowanceSettings, BackendSettings, ModelSettings, PriceSettings
from proxy.pricelist import CURRENCY, pricelist
from proxy.settings import RedisSettings, Settings
from proxy.store import StoreError, live_keys, open_engine, reader

ANSWER_S = 5.0


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
    findings = asyncio.run(examine(settings))
    click.echo(table(["BACKEND", "URL", "REACHABLE", "KIND", "VERSION", "MODEL", "MAX LENGTH"], _lines(findings)))
    if models := _models(settings, findings):
        click.echo(f"\nPrices in {settings.currency} per million tokens:")
        click.echo(
            table(["MODEL", "INPUT", "CACHED INPUT", "OUTPUT", "SAID BY"], [_price_line(settings, model) for model in models])
        )
    problems = [f"{each.name}: {text}" for each in findings for text in each.problems]
    remarks = [f"{each.name}: {text}" for each in findings for text in each.remarks]
    remarks += unserved(settings, findings) + not_covered(settings) + perhaps_sold(settings, findings)
    names, trouble = _key_names(settings)
    problems += trouble
    remarks += for_nobody(settings, names) + for_nothing(settings, _models(settings, findings)) + not_counted(settings)
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


async def examine(settings: Settings) -> list[Finding]:
    """All backends at once; in the order of the settings."""
    names = [settings.backend_name(index) for index in range(len(settings.backends))]
    return list(await asyncio.gather(*map(_examine, settings.backends, names)))


def unserved(settings: Settings, findings: Sequence[Finding]) -> list[str]:
    """Models that have a price and that nobody serves: most likely a name that is spelt differently."""
    if any(each.answer is None for each in findings):
        return []
    served = _models(settings, findings)
    return [f"models.{model}: no backend serves a model of this name" for model in settings.models if model not in served]


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
    unpriced = [model for model in dict.fromkeys(served) if settings.models.get(model, ModelSettings()).price is None]
    return [
        f"models.{model}: costs nothing here; if a provider bills you for it, set price: {{from: {model}}}"
        for model in unpriced
        if model in pricelist().rows
    ]


def for_nobody(settings: Settings, names: Collection[str] | None) -> list[str]:
    """Allowances of keys that aren't among these, those in use, and of teams that have no key. None: keys aren't known."""
    teams = {key.team for key in settings.keys.values()}
    missing = [] if names is None else [name for name in settings.keys if name not in names]
    return [f"keys.{name}: no key in use has this name" for name in missing] + [
        f"teams.{name}: no key is in this team" for name in settings.teams if name not in teams
    ]


def for_nothing(settings: Settings, served: Sequence[str]) -> list[str]:
    """Patterns that no model matches, while there are models."""
    return [
        f"{place}.models: no backend serves a model called {pattern!r}"
        for place, each in _allowances(settings)
        for pattern in each.models or ()
        if served and not any(fnmatchcase(model, pattern) for model in served)
    ]


def not_counted(settings: Settings) -> list[str]:
    """Budgets that nothing counts against."""
    return [
        f"{place}.budgets[{at}].gpu_seconds: nothing is counted against it yet, so it limits nothing"
        for place, each in _allowances(settings)
        for at, budget in enumerate(each.budgets)
        if budget.gpu_seconds is not None
    ]


def _allowances(settings: Settings) -> Iterator[tuple[str, AllowanceSettings]]:
    """With their places in the settings."""
    yield "everyone", settings.everyone
    for section, declared in (("teams", settings.teams), ("keys", settings.keys)):
        for name, each in declared.items():
            yield f"{section}.{name}", each


def _key_names(settings: Settings) -> tuple[set[str] | None, list[str]]:
    """Of the keys in use, and why they can't be known. None where there is no database yet; it is left as it is."""
    if not settings.keys or not (settings.database or settings.database_path.exists()):
        return None, []
    try:
        engine = reader(open_engine(settings.database_url))
        try:
            with engine.connect() as connection:
                return {key.name for key in live_keys(connection)}, []
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
        if model not in answer.cards:
            finding.problems.append(f"models: it doesn't serve {model!r}, only {', '.join(answer.cards) or 'nothing'}")
    if settings.kind not in ("auto", answer.kind):
        finding.remarks.append(f"kind: declared as {settings.kind!r}, and it looks like {answer.kind!r}")


def _models(settings: Settings, findings: Sequence[Finding]) -> list[str]:
    """What backends list or are declared to serve, each once."""
    listed = [model for each in findings if each.answer for model in each.answer.cards]
    return list(dict.fromkeys([*listed, *(model for each in settings.backends for model in each.models)]))


def _price_line(settings: Settings, model: str) -> list[object]:
    said = settings.models.get(model, ModelSettings()).price
    price = said or PriceSettings()
    figures = [per_million_tokens(pico_per_token(each)) for each in (price.input, price.cached, price.output)]
    source = "nobody" if said is None else "the settings" if said.from_ is None else f"price list: {said.from_}"
    return [model, *figures, source]


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
