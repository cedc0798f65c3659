"""The catalogue of keys, the ledger of requests, the checkpoints."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "catalogue",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_catalogue_one_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_catalogue")),
    )
    op.execute("INSERT INTO catalogue (id, revision) VALUES (1, 0)")
    op.create_table(
        "checkpoints",
        sa.Column("collector", sa.Text(), nullable=False),
        sa.Column("sink", sa.Text(), nullable=False),
        sa.Column("position", sa.LargeBinary(), nullable=False),
        sa.Column("saved_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("collector", "sink", name=op.f("pk_checkpoints")),
    )
    op.create_table(
        "keys",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("prefix", sa.Text(), nullable=False),
        sa.Column("hash", sa.LargeBinary(length=32), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("revoked_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_keys")),
        sa.UniqueConstraint("hash", name=op.f("uq_keys_hash")),
    )
    op.create_index(
        "uq_keys_name_unrevoked",
        "keys",
        ["name"],
        unique=True,
        sqlite_where=sa.text("revoked_at IS NULL"),
        postgresql_where=sa.text("revoked_at IS NULL"),
    )
    op.create_table(
        "requests",
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("trace_id", sa.Text(), nullable=False),
        sa.Column("span_id", sa.Text(), nullable=False),
        sa.Column("parent_span_id", sa.Text(), nullable=False),
        sa.Column("trace_flags", sa.BigInteger(), nullable=False),
        sa.Column("received_at", sa.BigInteger(), nullable=False),
        sa.Column("client_request_id", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("key_name", sa.Text(), nullable=False),
        sa.Column("operation", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("backend", sa.Text(), nullable=False),
        sa.Column("stream", sa.Boolean(), nullable=False),
        sa.Column("choices", sa.BigInteger(), nullable=False),
        sa.Column("max_tokens", sa.BigInteger(), nullable=True),
        sa.Column("temperature", sa.Double(), nullable=True),
        sa.Column("top_p", sa.Double(), nullable=True),
        sa.Column("end_user", sa.Text(), nullable=False),
        sa.Column("request_bytes", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("error_code", sa.Text(), nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.Column("finish_reasons", sa.JSON(), nullable=False),
        sa.Column("read_ns", sa.BigInteger(), nullable=False),
        sa.Column("authenticated_ns", sa.BigInteger(), nullable=False),
        sa.Column("admitted_ns", sa.BigInteger(), nullable=False),
        sa.Column("sent_ns", sa.BigInteger(), nullable=False),
        sa.Column("first_byte_ns", sa.BigInteger(), nullable=False),
        sa.Column("first_token_ns", sa.BigInteger(), nullable=False),
        sa.Column("first_content_ns", sa.BigInteger(), nullable=False),
        sa.Column("last_token_ns", sa.BigInteger(), nullable=False),
        sa.Column("upstream_ended_ns", sa.BigInteger(), nullable=False),
        sa.Column("ended_ns", sa.BigInteger(), nullable=False),
        sa.Column("proxy_added_ns", sa.BigInteger(), nullable=False),
        sa.Column("chunks", sa.BigInteger(), nullable=False),
        sa.Column("response_bytes", sa.BigInteger(), nullable=False),
        sa.Column("unsent_bytes", sa.BigInteger(), nullable=False),
        sa.Column("input_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cached_tokens", sa.BigInteger(), nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), nullable=False),
        sa.Column("reasoning_tokens", sa.BigInteger(), nullable=False),
        sa.Column("usage_source", sa.Text(), nullable=False),
        sa.Column("cost_nano", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.Column("inter_token_counts", sa.JSON(), nullable=False),
        sa.Column("inter_token_sum_ns", sa.BigInteger(), nullable=False),
        sa.Column("inter_token_max_ns", sa.BigInteger(), nullable=False),
        sa.Column("attempts", sa.JSON(), nullable=False),
        sa.Column("engine_queue_ms", sa.Double(), nullable=True),
        sa.Column("engine_time_to_first_token_ms", sa.Double(), nullable=True),
        sa.Column("engine_prefill_ms", sa.Double(), nullable=True),
        sa.Column("engine_decode_ms", sa.Double(), nullable=True),
        sa.Column("engine_mean_inter_token_ms", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("day", "id", name=op.f("pk_requests")),
        sqlite_with_rowid=False,
    )


def downgrade() -> None:
    """Everything is lost."""
    for table in ("requests", "keys", "checkpoints", "catalogue"):
        op.drop_table(table)
