"""What can be set, as options: those that are needed often by name, everything by `--set field=value` and `--unset field`.

A command that takes them gets `changes`: (field, value) in the words of the API, which says what is wrong with a value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import click

from proxy.cli.complete import names
from proxy.cli.values import Assignment, Budget, Number, Several, Until, Value
from proxy.nouns import CACHE_POLICIES, ISOLATIONS, POLICIES, PRIORITIES

Command = TypeVar("Command", bound=Callable[..., Any])
Changes = list[tuple[str, Value]]

_LIST, _VALUE = Several(), Assignment()
_COUNT = click.IntRange(min=1)


class Field(NamedTuple):
    """An option, and the field that it is for. `many`: it may be repeated, and makes a list. `path`: where the field is, if not
    under its own name."""

    option: str
    type: click.ParamType[Any]
    help: str
    many: bool = False
    metavar: str | None = None
    completes: str | None = None
    """The noun whose names it takes."""
    path: str | None = None


FIELDS = {
    "team": Field("--team", click.STRING, "Whose limits and budgets hold too.", metavar="TEAM", completes="teams"),
    "user": Field("--user", click.STRING, "Whose it is.", metavar="USER", completes="users"),
    "project": Field("--project", click.STRING, "What it is for.", metavar="PROJECT", completes="projects"),
    "tags": Field("--tag", _LIST, "To find it by; may be repeated.", many=True, metavar="TAG"),
    "requests_per_minute": Field("--requests-per-minute", _COUNT, "A minute's worth may come at once."),
    "tokens_per_minute": Field("--tokens-per-minute", _COUNT, "Input and output together."),
    "input_tokens_per_minute": Field("--input-tokens-per-minute", _COUNT, "What is sent."),
    "output_tokens_per_minute": Field("--output-tokens-per-minute", _COUNT, "What is answered."),
    "concurrent_requests": Field("--concurrent-requests", _COUNT, "At the same time."),
    "max_input_tokens": Field("--max-input-tokens", _COUNT, "Of one request."),
    "models": Field("--models", _LIST, "Names or patterns; no others.", many=True, metavar="A,B", completes="models"),
    "operations": Field("--operations", _LIST, "chat, embeddings, ...; others are refused.", many=True, metavar="A,B"),
    "expires": Field("--expires", Until(), "30d (from now), 2026-12-31 or 2026-12-31T18:00+01:00.", metavar="WHEN"),
    "priority": Field("--priority", click.Choice(PRIORITIES), "Who is next where requests wait for an engine."),
    "cache": Field("--cache", click.Choice(CACHE_POLICIES), "Which answers may be given again; the strictest counts."),
    "engine_parameters": Field(
        "--engine-parameters", _LIST, "cache_salt, priority, ...; others are refused.", many=True, metavar="A,B"
    ),
    "budgets": Field("--budget", Budget(), "'500 EUR/month', '5M tokens/day'; behind it a time zone, soft.", many=True),
    "aliases": Field("--alias", _LIST, "Another name for it; may be repeated.", many=True, metavar="NAME"),
    "policy": Field("--policy", click.Choice(POLICIES), "Who of several backends is to answer."),
    "fallbacks": Field(
        "--fallback",
        _LIST,
        "Asked instead, if nobody can answer; may be repeated.",
        many=True,
        metavar="MODEL",
        completes="models",
    ),
    "cache_policy": Field(
        "--cache", click.Choice(CACHE_POLICIES), "Which answers may be given again; the strictest counts.", path="cache.policy"
    ),
    "prefix_isolation": Field(
        "--prefix-isolation", click.Choice(ISOLATIONS), "Engines reuse computed prompts for one key, or one team, only."
    ),
    "assumed_output_tokens": Field("--assumed-output-tokens", _COUNT, "Set aside for an answer of unknown length."),
    "defaults": Field(
        "--default", _VALUE, "For requests that don't say it; may be repeated.", many=True, metavar="PARAMETER=VALUE"
    ),
    "bounds": Field("--bound", _VALUE, "The most that one request may ask for: n, max_tokens, ...", many=True, metavar="FIELD=N"),
    "kind": Field("--kind", click.Choice(["auto", "vllm", "openai"]), "What it is; auto: find out."),
    "api_key_env": Field("--api-key-env", click.STRING, "The environment variable that holds its key.", metavar="NAME"),
    "ca_file": Field("--ca-file", click.STRING, "Whose word on its certificate counts (PEM).", metavar="PATH"),
    "weight": Field("--weight", Number(), "How much it may do, against others.", metavar="N"),
    "depth": Field("--depth", _COUNT, "Requests that it gets at a time; more wait."),
    "prefill_tokens": Field("--prefill-tokens", _COUNT, "Of prompts of one key, at a time, while others are at work too."),
}
ALLOWANCE = (
    "requests_per_minute",
    "tokens_per_minute",
    "input_tokens_per_minute",
    "output_tokens_per_minute",
    "concurrent_requests",
    "max_input_tokens",
    "models",
    "operations",
    "expires",
    "priority",
    "cache",
    "engine_parameters",
    "budgets",
)


def field_options(*fields: str) -> Callable[[Command], Command]:
    """The options of these fields, and those for all others, handed on as `changes`."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(*arguments: Any, assigned: Sequence[tuple[str, Value]], unset: Sequence[str], **options: Any) -> Any:
            said = [(FIELDS[field].path or field, _said(field, options.pop(field))) for field in fields]
            changes = [(field, value) for field, value in said if value is not None]
            changes += [*assigned, *((field, None) for field in unset)]
            return command(*arguments, changes=changes, **options)

        text = "Any field, such as bounds.n=8; may be repeated."
        options = [
            *(_option(name, FIELDS[name]) for name in fields),
            click.option("--set", "assigned", multiple=True, type=_VALUE, metavar="FIELD=VALUE", help=text),
            click.option("--unset", multiple=True, metavar="FIELD", help="Back to what holds without it; may be repeated."),
        ]
        return functools.reduce(lambda made, option: option(made), reversed(options), run)  # type: ignore[return-value]  # each returns a function

    return decorate


def _option(name: str, field: Field) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(
        field.option,
        name,
        type=field.type,
        multiple=field.many,
        metavar=field.metavar or ("N" if field.type is _COUNT else None),
        help=field.help,
        shell_complete=None if field.completes is None else names(field.completes),
    )


def _said(field: str, value: Any) -> Value:
    """As JSON has it; None if nothing was said."""
    if not FIELDS[field].many:
        return value.isoformat() if isinstance(value, datetime) else value
    if not value:
        return None
    kind = FIELDS[field].type
    return dict(value) if kind is _VALUE else list(chain.from_iterable(value)) if kind is _LIST else list(value)
