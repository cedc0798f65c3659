"""What outlives a process: the catalogue of keys and the ledger of requests, in SQLite or PostgreSQL.

    engine.py       opening a database: SQLite's pragmas and transactions, nothing else knows the dialect
    tables.py       the tables, once
    migrations/     how an older database becomes that (alembic); `open_database` runs them
    catalogue.py    keys: create, list, revoke; each change counts the catalogue's revision up in the same transaction
    ledger.py       one row per request, written once whatever is repeated; a sink's checkpoint beside them; sums over them, for
                    reports and for budgets

Functions take a `Connection` and never commit: the caller's `with open_database(url).begin() as connection:` is the transaction.
Nothing here is imported by a worker, and no function here waits for anything but the database.
"""

from proxy.store.catalogue import (
    KeyRow,
    LiveKey,
    NameTaken,
    NoSuchKey,
    UnusableName,
    create_key,
    hash_key,
    list_keys,
    live_keys,
    revision,
    revoke_key,
)
from proxy.store.engine import StoreError, open_database, open_engine, reader
from proxy.store.ledger import (
    SpentRow,
    UsageRow,
    first_since,
    insert_records,
    load_checkpoint,
    save_checkpoint,
    spent,
    usage,
)

__all__ = [
    "KeyRow",
    "LiveKey",
    "NameTaken",
    "NoSuchKey",
    "SpentRow",
    "StoreError",
    "UnusableName",
    "UsageRow",
    "create_key",
    "first_since",
    "hash_key",
    "insert_records",
    "list_keys",
    "live_keys",
    "load_checkpoint",
    "open_database",
    "open_engine",
    "reader",
    "revision",
    "revoke_key",
    "save_checkpoint",
    "spent",
    "usage",
]
