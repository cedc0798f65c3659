"""`/export`: the running catalogue as the configuration file that would declare it.

It has what the settings say and what the database has besides, so that on an empty database it leads to the same snapshot. Keys
are in it by their hashes, so only administrators get it. Of secrets it has none: passwords in URLs are left out. What
isn't in it is named in `left_out`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

import msgspec
from fastapi import APIRouter
from sqlalchemy import Connection
from starlette.responses import Response

from proxy.control import catalogue
from proxy.control.access import ADMIN, allow
from proxy.control.answers import answer, documented
from proxy.control.state import Given
from proxy.nouns import KeySettings
from proxy.settings import Settings
from proxy.store import live_keys

router = APIRouter(tags=["export"])


class Export(msgspec.Struct, kw_only=True):
    """`file`: for `glasshouse.yaml`. `left_out`: what isn't in it, for people."""

    object: Literal["export"] = "export"
    file: dict[str, Any]
    left_out: list[str]


@router.get("/export", summary="The catalogue as a configuration file", **documented(Export))
@allow(*ADMIN)
async def export(given: Given) -> Response:
    return answer(await given.database.read(exported, given.settings, time.time_ns()))


def exported(connection: Connection, settings: Settings, now_ns: int) -> Export:
    """What holds now."""
    held = catalogue.holding(settings, catalogue.stored(connection))
    keys, left_out = _keys(connection, settings, now_ns)
    whole = msgspec.structs.replace(
        settings,
        everyone=held.everyone,
        teams=held.teams,
        users=held.users,
        projects=held.projects,
        models=held.models,
        backends=[msgspec.structs.replace(each, name=name) for name, each in held.backends.items()],
        keys=keys,
    )
    left_out += _run_time(held)
    file = _said(whole)
    return Export(file={name: _without_passwords(value, name, left_out) for name, value in file.items()}, left_out=left_out)


def _run_time(held: catalogue.Catalogue) -> Iterator[str]:
    """A file declares; what is said at run time lies over it."""
    for name, said in held.run_time.items():
        if name not in held.backends:
            continue
        if said.drained:
            yield f"backends.{name}: it is drained"
        if said.weight is not None:
            yield f"backends.{name}.weight: {said.weight:g}, said at run time"


def _keys(connection: Connection, settings: Settings, now_ns: int) -> tuple[dict[str, KeySettings], list[str]]:
    """By name, with their hashes. A file has room for one secret of a key, the newest."""
    keys = dict(settings.keys)
    whole = {digest for value in keys.values() if (digest := catalogue.digest_of(value)) is not None}
    left_out = []
    for live in live_keys(connection):
        if live.hash in whole or 0 < live.ends_at <= now_ns:
            continue
        if live.ends_at:
            left_out.append(f"keys.{live.name}: a former secret, which works for {(live.ends_at - now_ns) // 10**9} s more")
            continue
        said = settings.keys.get(live.name)
        if said is not None and said.hash is not None:
            left_out.append(f"keys.{live.name}: the database's key of this name; the settings have another")
            continue
        value = live.value if said is None else catalogue.laid_over(said, live.value)
        keys[live.name] = msgspec.structs.replace(value, hash=f"sha256:{live.hash.hex()}")
    return keys, left_out


def _said(value: Any) -> Any:
    """As YAML and JSON have it, without what holds anyway."""
    if isinstance(value, msgspec.Struct):
        fields = msgspec.structs.fields(value)
        return {field.encode_name: _said(each) for field in fields if (each := getattr(value, field.name)) != _default(field)}
    if isinstance(value, Mapping):
        return {name: _said(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_said(each) for each in value]
    return f"{value:f}" if isinstance(value, Decimal) else msgspec.to_builtins(value)


def _default(field: msgspec.structs.FieldInfo) -> Any:
    return field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()


def _without_passwords(value: Any, place: str, left_out: list[str]) -> Any:
    if isinstance(value, dict):
        return {name: _without_passwords(each, f"{place}.{name}", left_out) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_passwords(each, f"{place}[{at}]", left_out) for at, each in enumerate(value)]
    if not isinstance(value, str) or "@" not in value:
        return value
    try:
        parts = urlsplit(value)
    except ValueError:
        return value
    if not parts.scheme or parts.password is None:
        return value
    left_out.append(f"{place}: its password")
    user, host = parts.username or "", parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{user}@{host}" if user else host))
