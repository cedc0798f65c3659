"""Completion in a shell: the script that a shell needs, and the names of what there is.

Whoever presses the tab key waits, and must never see an error: the names come from a control that runs, soon or not at all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

from proxy.cli.client import URL_VARIABLE, running

ANSWER_S = 1.0
PROGRAM, VARIABLE = "glasshouse", "_GLASSHOUSE_COMPLETE"
"""click looks for what to complete in this environment variable."""
_MOST = 200
_PLAIN = re.compile(r"[A-Za-z0-9._:/@%+=,-]+")
"""What a shell takes as it is. It doesn't quote what it completes to, and a name may hold anything, commands too."""

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem[str]]]


def names(noun: str) -> Completer:
    """Completes to the names of what `/{noun}` lists; behind a comma too."""

    def complete(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        before, comma, last = incomplete.rpartition(",")
        return [CompletionItem(f"{before}{comma}{name}") for name in _listed(context, noun, last) if name.startswith(last)]

    return complete


def _listed(context: click.Context, noun: str, containing: str) -> list[str]:
    config = context.params.get("config")
    url = context.params.get("url") or os.environ.get(URL_VARIABLE)
    try:
        with running(url, Path(config) if config else None, ANSWER_S) as api:
            if api is None:
                return []
            rows = api.pages(f"/{noun}", {"containing": containing}, _MOST)
    except click.ClickException:
        return []
    found = [str(row.get("name") or row.get("id")) for row in rows]
    return [name for name in found if _PLAIN.fullmatch(name)]


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what a shell needs to complete commands, options and names.

    \b
    bash: glasshouse completion bash > ~/.local/share/bash-completion/completions/glasshouse
    zsh:  glasshouse completion zsh > ~/.zfunc/_glasshouse      (a directory of fpath)
    fish: glasshouse completion fish > ~/.config/fish/completions/glasshouse.fish
    """
    known = get_completion_class(shell)
    assert known is not None  # noqa: S101  click has these three
    click.echo(known(click.get_current_context().find_root().command, {}, PROGRAM, VARIABLE).source(), nl=False)
