"""The command `glasshouse`. One file a command, or a noun that has several; each is imported when it is asked for, so that none
pays for the others.

    up, reload, check          run it, look at what is to run
    client.py                  the control API, which all others speak
    catalogue.py               what teams, users, projects, models, backends and keys have in common
    fields.py, values.py       from what is typed to what the API takes
    report.py                  from what it says to tables, CSV and JSON
    config.py                  from glasshouse.yaml to settings, and back

YAML and click are used here and nowhere else.
"""

from __future__ import annotations

from importlib import import_module

import click

from proxy import __version__

COMMANDS = {
    "up": "up",
    "reload": "reload",
    "check": "check",
    "keys": "keys",
    "teams": "teams",
    "users": "users",
    "projects": "projects",
    "models": "models",
    "backends": "backends",
    "prices": "prices",
    "budgets": "budgets",
    "everyone": "everyone",
    "cache": "cache",
    "admins": "admins",
    "usage": "usage",
    "requests": "requests",
    "audit": "audit",
    "export": "export",
    "completion": "complete",
}
"""Command → the module that has it."""


class Commands(click.Group):
    """In this order, which is the one in which they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = getattr(import_module(f"proxy.cli.{COMMANDS[cmd_name]}"), cmd_name)
        assert isinstance(command, click.Command)  # noqa: S101  (COMMANDS says so)
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="glasshouse")
def main() -> None:
    """Glasshouse: the observability-first LLM proxy for people who run their own vLLM."""
