"""What the nouns of the catalogue have in common: list, show, create, set, block, unblock, remove.

A noun is a group of commands; what only one has is added to its group in a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import click

from proxy.cli.client import Api, ApiError, Json, api_command, path_of
from proxy.cli.complete import names
from proxy.cli.fields import Changes, field_options
from proxy.cli.report import Columns, Form, Row, facts, form_option, json_option, json_text, listed, printable
from proxy.cli.report import moment as in_utc
from proxy.cli.values import CURRENCY, nested

_OBJECT = ("name", "object", "source", "settings", "id")
"""What is shown apart from the rest."""


class NounCommands(NamedTuple):
    """How the commands of a noun differ. `fields`: those that have an option; `columns`: of its list. `is_there`: it may be there
    before anything was said of it, so that `set` is also for the first time."""

    noun: str
    one: str
    fields: tuple[str, ...]
    columns: Columns
    is_there: bool = False

    def path(self, name: str) -> str:
        return path_of(self.noun, name)

    @property
    def argument(self) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        return click.argument("name", shell_complete=names(self.noun))

    def group(self, text: str, *, creates: bool = True) -> click.Group:
        """The noun's commands; `text` is its help. `creates`: `create` is among them."""
        group = click.Group(self.noun, help=text)
        commands = (self._list(), self._show(), *([self._create()] if creates else []), self._set(), self._remove())
        for command in commands:
            group.add_command(command)
        return group

    def with_blocking(self, group: click.Group) -> click.Group:
        """And those for what can be blocked."""
        for verb, blocked, what in (
            ("block", True, f"Refuse what is asked for with the keys of this {self.one}, until it is unblocked."),
            ("unblock", False, f"Let the keys of this {self.one} work again."),
        ):
            group.add_command(self._switch(verb, what, blocked=blocked))
        return group

    def _list(self) -> click.Command:
        @click.option("--containing", metavar="TEXT", help="Only those whose name has this in it.")
        @form_option
        @api_command
        def several(api: Api, containing: str | None, form: Form) -> None:
            listed(api.pages(f"/{self.noun}", {"containing": containing}), self.columns, form, f"There are no {self.noun}.")

        return click.command("list", help=f"All {self.noun}, by name.")(several)

    def _show(self) -> click.Command:
        @self.argument
        @json_option
        @api_command
        def one(api: Api, name: str, as_json: bool) -> None:
            show(api.get(self.path(name)), as_json)

        return click.command("show", help=f"All that is known of a {self.one}.")(one)

    def _create(self) -> click.Command:
        @click.argument("name")
        @field_options(*self.fields)
        @json_option
        @api_command
        def create(api: Api, name: str, changes: Changes, as_json: bool) -> None:
            refuse_existing(api, self.noun, self.one, name)
            made = api.put(self.path(name), without_nothing(checked(api, changes)))
            told(f"The {self.one} {name!r} was created.", made, as_json)

        return click.command("create", help=f"Make a {self.one}.")(create)

    def _set(self) -> click.Command:
        @self.argument
        @field_options(*self.fields)
        @json_option
        @api_command
        def change(api: Api, name: str, changes: Changes, as_json: bool) -> None:
            patch = patched(api, changes)
            try:
                made = api.patch(self.path(name), patch)
            except ApiError as error:
                if error.status != 404 or not self.is_there:
                    raise
                made = api.put(self.path(name), without_nothing(patch))
            told(f"The {self.one} {name!r} was changed.", made, as_json)

        text = f"Change what is said of a {self.one}; what isn't said stays. Lists, budgets among them, are said as a whole."
        return click.command("set", help=text)(change)

    def _remove(self) -> click.Command:
        @self.argument
        @json_option
        @api_command
        def remove(api: Api, name: str, as_json: bool) -> None:
            told(f"The {self.one} {name!r} was removed.", api.delete(self.path(name)), as_json)

        return click.command("remove", help=f"Remove a {self.one} that nothing refers to.")(remove)

    def _switch(self, verb: str, text: str, *, blocked: bool) -> click.Command:
        @self.argument
        @json_option
        @api_command
        def switch(api: Api, name: str, as_json: bool) -> None:
            made = api.patch(self.path(name), {"blocked": blocked})
            told(f"The {self.one} {name!r} was {verb}ed.", made, as_json)

        return click.command(verb, help=text)(switch)


def refuse_existing(api: Api, noun: str, one: str, name: str) -> None:
    """PUT would replace it. Raises click.ClickException."""
    try:
        api.get(path_of(noun, name))
    except ApiError as error:
        if error.status == 404:
            return
        raise
    raise click.ClickException(
        f"there is a {one} named {printable(repr(name))} already; change it with: glasshouse {noun} set {printable(name)}"
    )


def patched(api: Api, changes: Changes) -> dict[str, Json]:
    """The same as `checked`, for what is there. Raises click.UsageError: nothing is said."""
    if not changes:
        raise click.UsageError("nothing is said of it; allowed: one of the options in --help")
    return checked(api, changes)


def checked(api: Api, changes: Changes) -> dict[str, Json]:
    """The changes as the API takes them. Raises click.ClickException: money in another currency than is counted in."""
    patch = nested(changes)
    budgets = patch.get("budgets")
    for budget in budgets if isinstance(budgets, list) else ():
        if isinstance(budget, dict) and (currency := budget.pop(CURRENCY, None)) is not None:
            expect_currency(api, currency)
    return patch


def expect_currency(api: Api, currency: str) -> None:
    """Raises click.ClickException: money is counted in another one."""
    ours = api.get("/health")["currency"]
    if currency != ours:
        raise click.ClickException(f"money is counted in {ours} here, and not in {currency}")


def without_nothing(patch: Mapping[str, Json]) -> dict[str, Json]:
    """For what is new, null means the same as not being said."""
    return {
        field: without_nothing(value) if isinstance(value, dict) else value for field, value in patch.items() if value is not None
    }


def show(shown: Row, as_json: bool) -> None:
    """One object, its settings flat; or as it came."""
    if as_json:
        click.echo(json_text(shown))
        return
    settings = shown["settings"]
    head = [("name", shown["name"]), ("id", shown.get("id") if shown.get("id") != shown["name"] else None)]
    said = [(field, in_words(field, value)) for field, value in settings.items() if value is not False]
    rest = [
        (f"{field} now" if field in settings else field, in_words(field, value))
        for field, value in shown.items()
        if field not in _OBJECT
    ]
    click.echo(facts([*head, *said, *rest, ("declared in", source(shown))]))


def told(text: str, made: Json, as_json: bool) -> None:
    """What was done: for people beside standard output, for programs on it."""
    click.echo(printable(text), err=True)
    if as_json:
        click.echo(json_text(made))


# -- for people --


def limits(row: Row) -> str:
    """What is allowed, short."""
    said = row["settings"]
    short = {
        "requests_per_minute": "requests/min",
        "tokens_per_minute": "tokens/min",
        "input_tokens_per_minute": "input/min",
        "output_tokens_per_minute": "output/min",
        "concurrent_requests": "at once",
        "max_input_tokens": "input each",
    }
    parts = [f"{said[field]} {unit}" for field, unit in short.items() if said.get(field) is not None]
    parts += [f"only {', '.join(said[field])}" for field in ("models", "operations") if said.get(field) is not None]
    parts += [f"{said['priority']} priority"] if said.get("priority", "normal") != "normal" else []
    parts += [f"cache {said['cache']}"] if said.get("cache") is not None else []
    parts += [f"may set {', '.join(said['engine_parameters'])}"] if said.get("engine_parameters") else []
    return "; ".join(parts)


def budgets(row: Row) -> str:
    return "; ".join(map(budget, row["settings"].get("budgets") or ()))


def budget(said: Mapping[str, Json]) -> str:
    """As it is typed."""
    unit = next((unit for unit in ("money", "tokens", "gpu_seconds") if said.get(unit) is not None), "")
    zone = said.get("time_zone") or "UTC"
    rest = ["" if zone == "UTC" else zone, "soft" if said.get("soft") else ""]
    return " ".join([f"{said.get(unit)} {unit}/{said.get('per')}", *filter(None, rest)])


def state(row: Row) -> str:
    """Whether it can be used."""
    if row.get("revoked_at"):
        return f"revoked {day(row['revoked_at'])}"
    said = row["settings"]
    if said.get("blocked"):
        return "blocked"
    return f"until {day(said['expires'])}" if said.get("expires") else ""


def day(moment: str | int | None) -> str:
    """An ISO 8601 moment, or ns since 1970, to the second."""
    if not isinstance(moment, str):
        return in_utc(moment)
    return f"{moment[:19]}{'Z' if moment.endswith(('Z', '+00:00')) else moment[-6:]}"


def source(row: Row) -> str:
    return "file" if row.get("source") == "file" else ""


def setting(field: str) -> Callable[[Row], object]:
    """A column: this field of the settings."""
    return lambda row: row["settings"].get(field)


def field(name: str) -> Callable[[Row], object]:
    """A column: this field beside the settings."""
    return lambda row: row.get(name)


def in_words(field: str, value: Json) -> object:
    """A value for people; nothing for what says nothing."""
    if value is None or value in ("", [], {}):
        return None
    if field == "budgets":
        return "; ".join(map(budget, value))
    if field in ("expires", "valid_from") or field.endswith("_at"):
        return day(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name}={text}" for name, each in value.items() if (text := in_words(name, each)) is not None) or None
    if isinstance(value, list):
        return ("; " if isinstance(value[0], dict) else ", ").join(str(in_words(field, each)) for each in value)
    return value
