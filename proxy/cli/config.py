"""From what people write to Settings.

Which settings a command gets: the file of `--config`, else the one named by the environment variable GLASSHOUSE_CONFIG, else
`glasshouse.yaml` in the current directory. Commands that ask about a running Glasshouse take, when there is none of these,
what it runs on: `settings.json` in its state directory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from proxy.settings import Settings, SettingsError

DEFAULT_FILE = Path("glasshouse.yaml")
FILE_VARIABLE = "GLASSHOUSE_CONFIG"
EFFECTIVE_FILE = "settings.json"

Command = TypeVar("Command", bound=Callable[..., Any])


def config_option(command: Command) -> Command:
    """`--config PATH`, handed on as `config: Path | None`."""
    option = click.option(
        "--config",
        type=click.Path(path_type=Path, dir_okay=False),
        help=f"The settings file; default: ${FILE_VARIABLE}, or {DEFAULT_FILE} if it is there.",
    )
    return option(command)


def load_settings(config: Path | None, overrides: Mapping[str, Any]) -> Settings:
    """What the file says, with `overrides` laid over it section by section. Raises click.ClickException."""
    file = _file(config)
    written = {} if file is None else read_yaml(file)
    return _checked(_merged(written, overrides), file)


def usable(settings: Settings) -> Settings:
    """The same, if the files that they name can be used. Raises click.ClickException."""
    from proxy.tls import check_files

    try:
        check_files(settings)
    except SettingsError as error:
        raise click.ClickException(str(error)) from None
    return settings


def running_settings(config: Path | None) -> Settings:
    """The settings of what runs here: the file's or, where no file is given, what `glasshouse up` wrote down."""
    effective = Settings().state_path / EFFECTIVE_FILE
    if _file(config) is not None or not effective.exists():
        return load_settings(config, {})
    try:
        return Settings.read(effective)
    except (OSError, msgspec.MsgspecError, SettingsError) as error:
        raise click.ClickException(f"{effective}: {error}") from None


def state_directory(config: Path | None) -> Path:
    """Where what runs here keeps its state. Also of a file that can't be used: what is wrong with it is for others to say."""
    try:
        file = _file(config)
        named = None if file is None else read_yaml(file).get("state_dir")
    except click.ClickException:
        named = None
    return Path(named) if isinstance(named, str) else Settings().state_path


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a file. Raises click.ClickException: unreadable, not YAML, a key twice, not a mapping."""
    from proxy.cli.documents import read  # YAML takes its time, and most commands have no file to read

    return read(file)


def _file(config: Path | None) -> Path | None:
    if config is not None:
        return config
    if named := os.environ.get(FILE_VARIABLE):
        return Path(named)
    return DEFAULT_FILE if DEFAULT_FILE.exists() else None


def _checked(mapping: Mapping[str, Any], file: Path | None) -> Settings:
    try:
        return Settings.of(mapping)
    except SettingsError as error:
        raise click.ClickException(f"{file}: {error}" if file is not None else str(error)) from None


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Sections are merged, values and lists replaced."""
    merged = dict(base)
    for name, value in over.items():
        section = merged.get(name)
        merged[name] = _merged(section, value) if isinstance(section, Mapping) and isinstance(value, Mapping) else value
    return merged
