"""What a model's settings change in a request that goes to it: its own name instead of an alias, and what the caller left to be
said. Everything else stays as the caller wrote it, byte for byte."""

from __future__ import annotations

import hashlib
from base64 import urlsafe_b64encode
from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import Raw

from proxy.errors import NotReady
from proxy.exchange import Record
from proxy.wire.body import Change, Request, new_values, place, read_object
from proxy.wire.bounds import LIMITS
from proxy.wire.form import read_form
from proxy.wire.operation import FORM, MAX_TEXT, EngineOperation

Defaults = tuple[tuple[str, bytes], ...]
"""Parameters (name, JSON)."""
_SALT = "cache_salt"


def adapt(
    operation: EngineOperation[Any],
    body: bytes,
    content_type: bytes,
    request: Request,
    record: Record,
    name: str,
    defaults: Defaults,
) -> tuple[Change, ...]:
    """The changes for the model that is called `name`. `request` and `record` are as if the caller had said all of it, but for
    `record.requested_model`. Raises InvalidRequest if a default makes no sense."""
    asked = request.model
    renamed = asked is not None and asked != "" and asked != name
    changes: Iterable[Change] = ()
    if operation.media is FORM:
        if renamed:
            changes = _renamed_form(body, content_type, name)
    elif renamed or defaults:
        fields = read_object(body)
        values = _missing(request, fields, defaults) if operation.counted else {}
        if values:
            _say(operation, request, record, values)
        if renamed:
            values["model"] = msgspec.json.encode(name)
        changes = new_values(body, fields, values)
    if asked != name:
        record.requested_model = (asked or "")[:MAX_TEXT]
        record.model = name[:MAX_TEXT]
    return tuple(changes)


def salt(secret: bytes, tenant: str) -> bytes:
    """What keeps the prompts that an engine has computed for one tenant from being of use to another (vLLM's `cache_salt`): 43
    characters that only this installation can make. JSON. Raises NotReady without the installation's secret."""
    if not secret:
        raise NotReady("The proxy can't keep prompts apart yet; try again in a moment.")
    digest = hashlib.blake2b(tenant.encode(), digest_size=32, key=secret, person=b"glasshouse-salt").digest()
    return b'"%b"' % urlsafe_b64encode(digest).rstrip(b"=")


def salted(
    operation: EngineOperation[Any], request: Request, body: bytes, defaults: Defaults, value: bytes
) -> tuple[Change, ...]:
    """The changes with which a vLLM computes the prompt with this salt. One that a caller may say, or the model's settings do,
    holds instead."""
    if (
        not operation.counted
        or operation.media is FORM
        or _SALT in request.internal
        or any(name == _SALT for name, _ in defaults)
    ):
        return ()
    fields = read_object(body)
    return tuple(new_values(body, fields, {_SALT: value})) if fields else ()


def _renamed_form(body: bytes, content_type: bytes, name: str) -> list[Change]:
    return [place(body, *read_form(body, content_type).places["model"]).becomes(name.encode())]


def _missing(request: Request, fields: dict[str, Raw], defaults: Defaults) -> dict[str, bytes]:
    """Those that the caller doesn't say; `null` is said. How long an answer may become has a name in each API, and is one thing:
    it is added where it is known, unless it was said under another name."""
    missing: dict[str, bytes] = {}
    for name, value in defaults:
        if name in LIMITS:
            wanted = name in request.__struct_fields__ and not any(each in fields or each in missing for each in LIMITS)
        else:
            wanted = name not in fields
        if wanted:
            missing[name] = value
    return missing


def _say(operation: EngineOperation[Any], request: Request, record: Record, values: dict[str, bytes]) -> None:
    """As if these had been in the body."""
    said = operation.read(msgspec.json.encode({name: Raw(value) for name, value in values.items()}), _unsaid(), operation.media)
    for name in values:
        if name in request.__struct_fields__:
            setattr(request, name, getattr(said, name))
    operation.facts(request, record)


def _unsaid() -> Record:
    """For facts that nobody wants."""
    return Record(b"", b"", 0, 0)
