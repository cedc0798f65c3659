"""The tables. A change here needs a revision in `migrations/versions`; a test compares the two.

Times called `*_at` are integer ns since 1970, UTC; times called `*_ns` are ns after `requests.received_at`, 0 = not reached.
Money is integer nano-units of the row's own currency.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    false,
    text,
)

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)


def _name() -> Text:
    """Names are compared by code points everywhere: two databases, and Python that merges what they say with what a file says,
    must put them into the same order."""
    return Text().with_variant(Text(collation="C"), "postgresql")


# -- the catalogue --
#
# A noun's row has in columns what is looked up, and in `settings` the rest of its structure (`proxy.nouns`) as JSON. There are no
# foreign keys: what a row refers to by name may stand in the settings file instead, and a key's row is never deleted.

catalogue = Table(
    "catalogue",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("revision", BigInteger, nullable=False),
    Column("everyone", Text, nullable=False, server_default=text("'{}'")),
    Column("cache_secret", LargeBinary(32)),
    CheckConstraint("id = 1", name="one_row"),
)
"""One row. `revision` goes up in the transaction of every change to what workers must know; who changes something locks this row
first. `everyone`: the allowance of all together, as JSON. `cache_secret`: with which the cache makes its keys, on all hosts; made
once, by the migration."""


def _noun(name: str, *columns: Column[Any]) -> Table:
    return Table(
        name,
        metadata,
        Column("name", _name(), primary_key=True),
        *columns,
        Column("settings", Text, nullable=False),
        Column("created_at", BigInteger, nullable=False),
        Column("changed_at", BigInteger, nullable=False),
    )


def _team() -> Column[str]:
    return Column("team", _name(), index=True)


def _blocked() -> Column[bool]:
    return Column("blocked", Boolean, nullable=False)


teams = _noun("teams", _blocked())
users = _noun("users", _team(), _blocked())
projects = _noun("projects", _team(), _blocked())
models = _noun("models")
backends = _noun("backends")

backend_states = Table(
    "backend_states",
    metadata,
    Column("name", _name(), primary_key=True),
    Column("drained", Boolean, nullable=False),
    Column("weight", Double),
    Column("changed_at", BigInteger, nullable=False),
)
"""What was said of a backend at run time, wherever it is declared. A row for each of which something else holds than what is
declared: that it is `drained`, or another `weight` (None: the declared one)."""

keys = Table(
    "keys",
    metadata,
    Column("id", _name(), primary_key=True),
    Column("name", _name(), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("revoked_at", BigInteger),
    _team(),
    Column("user_name", _name(), index=True),
    Column("project", _name(), index=True),
    Column("blocked", Boolean, nullable=False, server_default=false()),
    Column("settings", Text, nullable=False, server_default=text("'{}'")),
    Column("changed_at", BigInteger, nullable=False, server_default=text("0")),
    Index(
        "uq_keys_name_unrevoked",
        "name",
        unique=True,
        sqlite_where=text("revoked_at IS NULL"),
        postgresql_where=text("revoked_at IS NULL"),
    ),
    Index("ix_keys_name", "name", "id"),
)
"""API keys, the revoked ones too. Their secrets are in `key_secrets`."""

key_secrets = Table(
    "key_secrets",
    metadata,
    Column("hash", LargeBinary(32), primary_key=True),
    Column("key_id", _name(), nullable=False, index=True),
    Column("prefix", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("ends_at", BigInteger),
)
"""What opens a key: `hash` is the sha256 of the whole secret; the secret itself is nowhere. `prefix` is for people to tell
secrets apart. Each key has one without `ends_at`, the newest; those that a rotation replaced end."""

key_tags = Table(
    "key_tags",
    metadata,
    Column("tag", _name(), primary_key=True),
    Column("key_id", _name(), primary_key=True, index=True),
)
"""The tags that `keys.settings` holds, to find keys by them."""

admin_keys = Table(
    "admin_keys",
    metadata,
    Column("id", _name(), primary_key=True),
    Column("name", _name(), nullable=False),
    Column("role", Text, nullable=False),
    _team(),
    Column("prefix", Text, nullable=False),
    Column("hash", LargeBinary(32), nullable=False, unique=True),
    Column("created_at", BigInteger, nullable=False),
    Column("revoked_at", BigInteger),
    Column("expires_at", BigInteger),
    Index(
        "uq_admin_keys_name_unrevoked",
        "name",
        unique=True,
        sqlite_where=text("revoked_at IS NULL"),
        postgresql_where=text("revoked_at IS NULL"),
    ),
)
"""Who may use the control API, by secrets of their own; `hash` as in `key_secrets`."""

audit = Table(
    "audit",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("at", BigInteger, nullable=False, index=True),
    Column("author", _name(), nullable=False, index=True),
    Column("role", Text, nullable=False),
    Column("address", Text, nullable=False),
    Column("idempotency_key", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("noun", Text, nullable=False),
    Column("name", _name(), nullable=False),
    Column("team", _name(), nullable=False, index=True),
    Column("before", Text),
    Column("after", Text),
    Index("ix_audit_noun", "noun", "name"),
    Index(
        "uq_audit_idempotency_key",
        "author",
        "idempotency_key",
        unique=True,
        sqlite_where=text("idempotency_key != ''"),
        postgresql_where=text("idempotency_key != ''"),
    ),
)
"""Every change to the catalogue, in its order: what was there `before` and `after`, as JSON without secrets and hashes. `team`:
whose manager may see it, or ""."""

purges = Table(
    "purges",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("before_at", BigInteger, nullable=False),
    Column("model", _name(), nullable=False),
    Column("key_id", _name(), nullable=False),
    Column("team", _name(), nullable=False),
    Column("user_name", _name(), nullable=False),
    Column("made_at", BigInteger, nullable=False),
    Column("author", _name(), nullable=False),
    Column("deleted", BigInteger),
)
"""Answers of the cache that aren't to be given again: those that were complete before `before_at`, of this `model`, to this key
and so on, as far as that is said ("": any). `deleted`: how many Redis has lost by it; None: nobody has looked yet."""

# -- the ledger --


def _integers(*names: str) -> list[Column[int]]:
    return [Column(name, BigInteger, nullable=False) for name in names]


def _texts(*names: str) -> list[Column[str]]:
    return [Column(name, Text, nullable=False) for name in names]


def _measures(*names: str) -> list[Column[float]]:
    return [Column(name, Double) for name in names]


def _saved() -> list[Column[Any]]:
    """What the cache did, and what that saved."""
    amounts = ("saved_input_tokens", "saved_output_tokens", "saved_cost_nano", "saved_ns")
    return [
        Column("cache", Text, nullable=False, server_default=text("''")),
        *(Column(name, BigInteger, nullable=False, server_default=text("0")) for name in amounts),
    ]


requests = Table(
    "requests",
    metadata,
    # identity
    Column("day", Date, nullable=False),
    *_texts("id", "trace_id", "span_id", "parent_span_id"),
    *_integers("trace_flags", "received_at"),
    *_texts("client_request_id", "key_id", "key_name"),
    # request
    *_texts("operation", "model", "backend"),
    Column("stream", Boolean, nullable=False),
    *_integers("choices"),
    Column("max_tokens", BigInteger),
    *_measures("temperature", "top_p"),
    *_texts("end_user"),
    *_integers("request_bytes"),
    # how it ended
    Column("status", Integer, nullable=False),
    *_texts("outcome", "error_code", "error"),
    Column("finish_reasons", JSON, nullable=False),
    # where the time went
    *_integers("read_ns", "authenticated_ns", "admitted_ns", "sent_ns", "first_byte_ns", "first_token_ns", "first_content_ns"),
    *_integers("last_token_ns", "upstream_ended_ns", "ended_ns", "proxy_added_ns"),
    # what came
    *_integers("chunks", "response_bytes", "unsent_bytes"),
    *_integers("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens"),
    *_texts("usage_source"),
    *_integers("cost_nano"),
    *_texts("currency"),
    Column("inter_token_counts", JSON, nullable=False),
    *_integers("inter_token_sum_ns", "inter_token_max_ns"),
    Column("attempts", JSON, nullable=False),
    # what the engine said of it
    *_measures("engine_queue_ms", "engine_time_to_first_token_ms", "engine_prefill_ms", "engine_decode_ms"),
    *_measures("engine_mean_inter_token_ms"),
    # what later versions know, with what an older one's row has instead
    Column("client_address", Text, nullable=False, server_default=text("''")),
    Column("audio_seconds", BigInteger, nullable=False, server_default=text("0")),
    Column("team", Text, nullable=False, server_default=text("''")),
    Column("worker", Text, nullable=False, server_default=text("''")),
    Column("gpu_ns", BigInteger, nullable=False, server_default=text("0")),
    Column("refused_by", Text, nullable=False, server_default=text("''")),
    Column("over_budget", Text, nullable=False, server_default=text("''")),
    Column("collector", Text, nullable=False, server_default=text("''")),
    Column("user_name", Text, nullable=False, server_default=text("''")),
    Column("project", Text, nullable=False, server_default=text("''")),
    Column("requested_model", Text, nullable=False, server_default=text("''")),
    Column("queued_ns", BigInteger, nullable=False, server_default=text("0")),
    Column("routed_by", Text, nullable=False, server_default=text("''")),
    Column("scores", JSON, nullable=False, server_default=text("'[]'")),
    Column("fallback_of", Text, nullable=False, server_default=text("''")),
    *_saved(),
    Column("looked_up_ns", BigInteger, nullable=False, server_default=text("0")),
    Column("age_ns", BigInteger, nullable=False, server_default=text("0")),
    Column("source_id", Text, nullable=False, server_default=text("''")),
    Column("source_trace_id", Text, nullable=False, server_default=text("''")),
    *_measures("similarity"),
    PrimaryKeyConstraint("day", "id"),
    sqlite_with_rowid=False,
    postgresql_partition_by="RANGE (day)",
)
"""The ledger: one row per accepted request. The key begins with the UTC day of `received_at`: a report over some days reads only
those, and PostgreSQL keeps each day in a partition of its own (partitions.py). `collector` stored the row, from the journal of
`worker`; both are empty in rows of before there were these columns. `user_name`: whose key it was; `end_user`: whom the caller
named. `source_id`: the request whose answer the cache gave; it may be older than the rows that are kept."""

request_sums = Table(
    "request_sums",
    metadata,
    Column("day", Date, nullable=False),
    Column("id", LargeBinary(16), nullable=False),
    *_texts("collector", "worker", "key_id", "key_name", "team", "user_name", "project", "model", "backend"),
    *_texts("operation", "outcome", "currency"),
    *_integers("requests", "input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "audio_seconds"),
    *_integers("cost_nano", "gpu_ns"),
    *_saved(),
    PrimaryKeyConstraint("day", "id"),
    sqlite_with_rowid=False,
)
"""What is left of rows of `requests` that are no longer kept: how many of a day had the same texts here, and their sums. `id` is
a hash of these texts. A request is either a row there or counted here."""

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("collector", Text, primary_key=True),
    Column("sink", Text, primary_key=True),
    Column("position", LargeBinary, nullable=False),
    Column("saved_at", BigInteger, nullable=False),
)
"""How far a collector's sink has come, saved in the transaction of what it stored."""
