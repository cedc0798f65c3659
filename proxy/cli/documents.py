"""YAML, read strictly and written plainly; here and in no other place."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import click
import yaml


def read(file: Path) -> dict[str, Any]:
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


def write(mapping: dict[str, Any]) -> str:
    """In the order in which it is given, without anchors; names and texts as they are."""
    return yaml.dump(mapping, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _number(dumper: _Dumper, number: Decimal) -> yaml.Node:
    """As a number where that reads back as the same, in quotes otherwise: YAML's numbers have 53 bits."""
    text = f"{number:f}"
    if Decimal(repr(float(number))) != number:
        return dumper.represent_str(text)
    return dumper.represent_scalar(f"tag:yaml.org,2002:{'float' if '.' in text else 'int'}", text)


_Dumper.add_representer(Decimal, _number)
