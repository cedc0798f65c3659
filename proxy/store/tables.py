"""The tables. A change here needs a revision in `migrations/versions`; a test compares the two.

Times called `*_at` are integer ns since 1970, UTC; times called `*_ns` are ns after `requests.received_at`, 0 = not reached.
Money is integer nano-units of the row's own currency.
"""

from __future__ import annotations

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

catalogue = Table(
    "catalogue",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("revision", BigInteger, nullable=False),
    CheckConstraint("id = 1", name="one_row"),
)
"""One row. `revision` goes up in the transaction of every change to what workers must know."""

keys = Table(
    "keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("prefix", Text, nullable=False),
    Column("hash", LargeBinary(32), nullable=False, unique=True),
    Column("created_at", BigInteger, nullable=False),
    Column("revoked_at", BigInteger),
    Index(
        "uq_keys_name_unrevoked",
        "name",
        unique=True,
        sqlite_where=text("revoked_at IS NULL"),
        postgresql_where=text("revoked_at IS NULL"),
    ),
)
"""API keys. `hash` is the sha256 of the whole key; the key itself is nowhere. `prefix` is for people to tell keys apart."""


def _integers(*names: str) -> list[Column[int]]:
    return [Column(name, BigInteger, nullable=False) for name in names]


def _texts(*names: str) -> list[Column[str]]:
    return [Column(name, Text, nullable=False) for name in names]


def _measures(*names: str) -> list[Column[float]]:
    return [Column(name, Double) for name in names]


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
    PrimaryKeyConstraint("day", "id"),
    sqlite_with_rowid=False,
)
"""The ledger: one row per accepted request. The key begins with the UTC day of `received_at`, so that PostgreSQL can partition by
it and a report over some days reads only those. `collector` stored the row, from the journal of `worker`; both are empty in rows
of before there were these columns."""

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("collector", Text, primary_key=True),
    Column("sink", Text, primary_key=True),
    Column("position", LargeBinary, nullable=False),
    Column("saved_at", BigInteger, nullable=False),
)
"""How far a collector's sink has come, saved in the transaction of what it stored."""
