"""Whose request it was; on PostgreSQL a table for each day; what is left of requests that are no longer kept.

On PostgreSQL every row is moved, in the one transaction of the migration: nobody writes to `requests` meanwhile (collectors wait,
and go on afterwards), and until it is done it takes the disk twice.
"""

from __future__ import annotations

from datetime import date, timedelta

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_NEW = ("user_name", "project", "requested_model")


def upgrade() -> None:
    for name in _NEW:
        op.add_column("requests", sa.Column(name, sa.Text(), server_default=sa.text("''"), nullable=False))
    op.create_table(
        "request_sums",
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("id", sa.LargeBinary(length=16), nullable=False),
        sa.Column("collector", sa.Text(), nullable=False),
        sa.Column("worker", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("key_name", sa.Text(), nullable=False),
        sa.Column("team", sa.Text(), nullable=False),
        sa.Column("user_name", sa.Text(), nullable=False),
        sa.Column("project", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("backend", sa.Text(), nullable=False),
        sa.Column("operation", sa.Text(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("input_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cached_tokens", sa.BigInteger(), nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), nullable=False),
        sa.Column("reasoning_tokens", sa.BigInteger(), nullable=False),
        sa.Column("audio_seconds", sa.BigInteger(), nullable=False),
        sa.Column("cost_nano", sa.BigInteger(), nullable=False),
        sa.Column("gpu_ns", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("day", "id", name=op.f("pk_request_sums")),
        sqlite_with_rowid=False,
    )
    if _on_postgresql():
        _replace("PARTITION BY RANGE (day)", apart=True)


def downgrade() -> None:
    """The sums of requests that are no longer kept are lost."""
    if _on_postgresql():
        _replace("", apart=False)
    op.drop_table("request_sums")
    for name in reversed(_NEW):
        op.drop_column("requests", name)


def _on_postgresql() -> bool:
    return op.get_context().dialect.name == "postgresql"


def _replace(partitioned: str, *, apart: bool) -> None:
    """The same rows in a table made anew."""
    op.execute("ALTER TABLE requests RENAME TO requests_before")
    op.execute("ALTER TABLE requests_before RENAME CONSTRAINT pk_requests TO pk_requests_before")
    op.execute(f"CREATE TABLE requests (LIKE requests_before INCLUDING DEFAULTS) {partitioned}")
    if apart:
        op.execute("CREATE TABLE requests_default PARTITION OF requests DEFAULT")
        for day in op.get_bind().execute(sa.text("SELECT DISTINCT day FROM requests_before ORDER BY day")).scalars():
            _make_partition(day)
    op.execute("INSERT INTO requests SELECT * FROM requests_before")
    op.execute("ALTER TABLE requests ADD CONSTRAINT pk_requests PRIMARY KEY (day, id)")
    op.execute("DROP TABLE requests_before")


def _make_partition(day: date) -> None:
    name, after = f"requests_{day:%Y%m%d}", day + timedelta(1)
    op.execute(f"CREATE TABLE {name} PARTITION OF requests FOR VALUES FROM ('{day}') TO ('{after}')")
