"""What is said of backends while everything runs: that one is drained, or weighs something else than is declared.

It is kept by name, because it is for backends of the settings file as well, of which the database knows nothing else; whether
there is one of that name is for the caller to know. It stays until it is taken back or the database's backend is removed.
"""

from __future__ import annotations

import time
from typing import Literal

from sqlalchemy import Connection, delete, insert, select

from proxy.nouns import RunTimeSettings
from proxy.store.audit import Author, lock, note
from proxy.store.tables import backend_states

Action = Literal["drain", "undrain", "weigh"]
"""As the audit log calls it."""

_AS_DECLARED = RunTimeSettings()


def run_time(connection: Connection) -> dict[str, RunTimeSettings]:
    """Backend → what is said of it; of those that aren't among them nothing is."""
    query = select(backend_states).order_by(backend_states.c.name)
    return {row.name: RunTimeSettings(drained=row.drained, weight=row.weight) for row in connection.execute(query)}


def put_run_time(connection: Connection, name: str, value: RunTimeSettings, action: Action, author: Author) -> None:
    """Say it. What holds already changes nothing. Raises Repeated."""
    lock(connection)
    before = run_time(connection).get(name, _AS_DECLARED)
    if before == value:
        return
    forget_run_time(connection, name)
    if value != _AS_DECLARED:
        row = {"name": name, "drained": value.drained, "weight": value.weight, "changed_at": time.time_ns()}
        connection.execute(insert(backend_states).values(row))
    note(connection, author, action, "backends", name, before=_told(before), after=_told(value))


def forget_run_time(connection: Connection, name: str) -> None:
    """Take it back."""
    connection.execute(delete(backend_states).where(backend_states.c.name == name))


def _told(value: RunTimeSettings) -> dict[str, object]:
    return {"drained": value.drained, "weight": "default" if value.weight is None else value.weight}
