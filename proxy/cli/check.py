"""`glasshouse check`: are the settings good, and is behind each backend what they say?"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click

from proxy.cli.config import config_option, load_settings
from proxy.cli.report import printable, table
from proxy.control.discovery import Answer, DiscoveryError, address_of, ask, ask_version, max_model_len, new_client, url_of
from proxy.settings import BackendSettings, Settings

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
    """Validate the settings and look at each backend: reachable, models, kind, context length, version.

    The exit status is 1 if anything stands in the way of serving requests.
    """
    settings = load_settings(config, {"backends": [{"url": url} for url in backends]} if backends else {})
    if not settings.backends:
        raise click.ClickException("there are no backends; name one with --backend URL or in glasshouse.yaml")
    findings = asyncio.run(examine(settings))
    click.echo(table(["BACKEND", "URL", "REACHABLE", "KIND", "VERSION", "MODEL", "MAX LENGTH"], _lines(findings)))
    problems = [f"{each.name}: {text}" for each in findings for text in each.problems]
    remarks = [f"{each.name}: {text}" for each in findings for text in each.remarks] + unserved(settings, findings)
    click.echo()
    for text in problems:
        click.echo(f"{click.style('problem', fg='red')}  {printable(text)}")
    for text in remarks:
        click.echo(f"{click.style('remark', fg='yellow')}   {printable(text)}")
    if not problems:
        click.echo(click.style("The settings are good, and every backend answers.", fg="green"))
    sys.exit(1 if problems else 0)


async def examine(settings: Settings) -> list[Finding]:
    """All backends at once; in the order of the settings."""
    names = [settings.backend_name(index) for index in range(len(settings.backends))]
    return list(await asyncio.gather(*map(_examine, settings.backends, names)))


def unserved(settings: Settings, findings: Sequence[Finding]) -> list[str]:
    """Models that have a price and that nobody serves: most likely a name that is spelt differently."""
    if any(each.answer is None for each in findings):
        return []
    served = {model for each in findings if each.answer for model in each.answer.cards}
    served |= {model for each in settings.backends for model in each.models}
    return [f"models.{model}: no backend serves a model of this name" for model in settings.models if model not in served]


async def _examine(settings: BackendSettings, name: str) -> Finding:
    backend = address_of(settings, name)
    finding = Finding(name, url_of(backend))
    variable = settings.api_key_env
    if variable and not os.environ.get(variable):
        finding.problems.append(f"api_key_env: the environment variable {variable} is empty")
    async with new_client(ANSWER_S) as client:
        try:
            finding.answer = await ask(client, backend, ANSWER_S)
        except DiscoveryError as error:
            finding.problems.append(str(error))
        else:
            finding.version = await ask_version(client, backend, ANSWER_S)
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
