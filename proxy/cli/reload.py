"""`glasshouse reload`: have the running `glasshouse up` read its settings anew, and tell what came of it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import click
import msgspec

from proxy.cli.config import config_option, load_settings, state_directory
from proxy.last_reload import LastReload
from proxy.settings import Settings
from proxy.supervisor import running_process

PATIENCE = 300.0
LOOK_EVERY = 0.05


@click.command()
@config_option
def reload(config: Path | None) -> None:
    """Have the running `glasshouse up` read its settings anew and restart its processes, without a request lost.

    It reads the file that it was started with. Settings that can't be used change nothing. `--config` only says which state
    directory, and so which Glasshouse, is meant.
    """
    state = state_directory(config)
    asked_ns = time.monotonic_ns()
    if not _signalled(state):
        load_settings(config, {})  # it may be why we look in the wrong place
        raise click.ClickException(f"no `glasshouse up` runs on {state}")
    last = _wait(state, asked_ns)
    if not last.successful:
        raise click.ClickException("\n".join(last.lines))
    for line in last.lines:
        click.echo(line)


def _signalled(state: Path) -> bool:
    """False if nobody is there."""
    process = _running(state)
    if process is None:
        return False
    try:
        os.kill(process, signal.SIGHUP)
    except OSError as error:
        raise click.ClickException(f"the `glasshouse up` of {state} can't be signalled: {error.strerror}") from None
    return True


def _running(state: Path) -> int | None:
    try:
        return running_process(state)
    except OSError as error:
        raise click.ClickException(f"the `glasshouse up` of {state} can't be found: {error}") from None


def _wait(state: Path, asked_ns: int) -> LastReload:
    """The first reload that began after `asked_ns`, once it is over."""
    path = Settings(state_dir=str(state)).last_reload_path
    while time.monotonic_ns() - asked_ns < PATIENCE * 1e9:
        runs = _running(state) is not None  # before the last look: what it had to say is there by then
        last = _read(path)
        if last is not None and last.began_ns >= asked_ns:
            return last
        if not runs:
            raise click.ClickException(f"the `glasshouse up` of {state} has ended")
        time.sleep(LOOK_EVERY)
    raise click.ClickException(f"no result after {PATIENCE:.0f} s: see {state / 'log' / 'supervisor.log'}")


def _read(path: Path) -> LastReload | None:
    try:
        return LastReload.read(path)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise click.ClickException(f"{path}: {error}") from None
