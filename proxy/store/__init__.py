"""What outlives a process: the catalogue of keys and the ledger of requests, in SQLite or PostgreSQL.

    engine.py       opening a database: SQLite's pragmas and transactions, nothing else knows the dialect
    tables.py       the tables, once
    migrations/     how an older database becomes that (alembic); `open_database` runs them
    catalogue.py    teams, users, projects, models, backends, and what everyone may use
    run_time.py     which backends are drained, or weigh something else than is declared
    keys.py         API keys and their secrets
    purges.py       which answers of the cache aren't to be given again
    admins.py       admin keys
    audit.py        who changed what; each change is noted, and counts the catalogue's revision up, in its own transaction
    ledger.py       one row per request, written once whatever is repeated; a sink's checkpoint beside them; sums over them, for
                    reports and for budgets
    partitions.py   PostgreSQL: a table for each day of the ledger
    retention.py    old rows become sums, in small steps
    search.py       finding requests
    forget.py       what a request says of a person, blanked

Functions take a `Connection` and never commit: the caller's `with open_database(url).begin() as connection:` is the transaction.
Nothing here is imported by a worker, and no function here waits for anything but the database.
"""

from proxy.store.admins import (
    AdminRow,
    Role,
    WeakSecret,
    check_secret,
    create_admin_key,
    find_admin,
    find_admin_key,
    list_admin_keys,
    revoke_admin_key,
)
from proxy.store.audit import GLASSHOUSE, AuditRow, Author, Repeated, audit_rows, lock, note, prune_audit, repeated
from proxy.store.catalogue import (
    BACKENDS,
    MODELS,
    PROJECTS,
    TEAMS,
    USERS,
    Entry,
    InUse,
    Known,
    NameTaken,
    NoSuch,
    NotAllowed,
    Noun,
    UnknownName,
    UnusableName,
    entries,
    everyone,
    find,
    put,
    put_everyone,
    remove,
    revision,
    said,
)
from proxy.store.engine import StoreError, open_async_engine, open_database, open_engine, reader
from proxy.store.keys import (
    KeyRow,
    LiveKey,
    SecretRow,
    change_key,
    create_key,
    find_key,
    hash_key,
    holder,
    list_keys,
    live_keys,
    revoke_key,
    rotate_key,
)
from proxy.store.ledger import (
    SpentRow,
    UsageRow,
    day_of,
    first_since,
    insert_records,
    load_checkpoint,
    save_checkpoint,
    spent,
    steady,
    usage,
)
from proxy.store.purges import Mark, cache_secret, marks, purge, swept
from proxy.store.retention import Step, oldest_day, remove_expired, summed_days
from proxy.store.run_time import put_run_time, run_time
from proxy.store.search import BadCursor, Order, RequestRow, cursor_of, request_of, requests_found

__all__ = [
    "BACKENDS",
    "GLASSHOUSE",
    "MODELS",
    "PROJECTS",
    "TEAMS",
    "USERS",
    "AdminRow",
    "AuditRow",
    "Author",
    "BadCursor",
    "Entry",
    "InUse",
    "KeyRow",
    "Known",
    "LiveKey",
    "Mark",
    "NameTaken",
    "NoSuch",
    "NotAllowed",
    "Noun",
    "Order",
    "Repeated",
    "RequestRow",
    "Role",
    "SecretRow",
    "SpentRow",
    "Step",
    "StoreError",
    "UnknownName",
    "UnusableName",
    "UsageRow",
    "WeakSecret",
    "audit_rows",
    "cache_secret",
    "change_key",
    "check_secret",
    "create_admin_key",
    "create_key",
    "cursor_of",
    "day_of",
    "entries",
    "everyone",
    "find",
    "find_admin",
    "find_admin_key",
    "find_key",
    "first_since",
    "hash_key",
    "holder",
    "insert_records",
    "list_admin_keys",
    "list_keys",
    "live_keys",
    "load_checkpoint",
    "lock",
    "marks",
    "note",
    "oldest_day",
    "open_async_engine",
    "open_database",
    "open_engine",
    "prune_audit",
    "purge",
    "put",
    "put_everyone",
    "put_run_time",
    "reader",
    "remove",
    "remove_expired",
    "repeated",
    "request_of",
    "requests_found",
    "revision",
    "revoke_admin_key",
    "revoke_key",
    "rotate_key",
    "run_time",
    "said",
    "save_checkpoint",
    "spent",
    "steady",
    "summed_days",
    "swept",
    "usage",
]
