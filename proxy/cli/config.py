"""From what people write to Settings: YAML is read here, and in no other place.

Which settings a command gets: the file of `--config`, else the one named by the environment variable GLASSHOUSE_CONFIG, else
`glasshouse.yaml` in the current directory. Commands that ask about a running Glasshouse take, when there is none of these,
what it runs on: `settings.json` in its state directory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec
import yaml
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from proxy.settings import Settings, SettingsError
from proxy.store import StoreError, open_database
from proxy.tls import check_files

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


@contextmanager
def database(settings: Settings) -> Iterator[Engine]:
    """The store, its errors said in a way for people. Makes the state directory, for its owner only."""
    try:
        if not settings.database:
            settings.state_path.mkdir(mode=0o700, parents=True, exist_ok=True)
        engine = open_database(settings.database_url)
        try:
            yield engine
        finally:
            engine.dispose()
    except (OSError, StoreError) as error:
        raise click.ClickException(str(error)) from None
    except DBAPIError as error:
        raise click.ClickException(f"the database can't be used: {error.orig}") from None


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a file. Raises click.ClickException: unreadable, not YAML, a key twice, not a mapping."""
    try:
        loader = _Loader(file.read_text(encoding="utf-8"))
        loader.name = str(file)
        try:
            content = loader.get_single_data()
        finally:
            loader.dispose()
    except OSError as error:
        raise click.ClickException(f"{file}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise click.ClickException(f"{file}: not usable as YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise click.ClickException(f"{file}: {type(content).__name__} at the top; allowed: a mapping of settings")
    return content


class _Loader(yaml.SafeLoader):
    """YAML's safe subset, in which a key that stands twice is an error: of the two, one would be dropped in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str):
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r}; allowed: names", key.start_mark)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} stands twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


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
