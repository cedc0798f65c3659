"""What the cache did for a request, what that saved, and whose answer it was."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_AMOUNTS = ("saved_input_tokens", "saved_output_tokens", "saved_cost_nano", "saved_ns")


def upgrade() -> None:
    for table in ("requests", "request_sums"):
        op.add_column(table, sa.Column("cache", sa.Text(), server_default=sa.text("''"), nullable=False))
        for name in _AMOUNTS:
            op.add_column(table, sa.Column(name, sa.BigInteger(), server_default=sa.text("0"), nullable=False))
    for name in ("looked_up_ns", "age_ns"):
        op.add_column("requests", sa.Column(name, sa.BigInteger(), server_default=sa.text("0"), nullable=False))
    for name in ("source_id", "source_trace_id"):
        op.add_column("requests", sa.Column(name, sa.Text(), server_default=sa.text("''"), nullable=False))
    op.add_column("requests", sa.Column("similarity", sa.Double(), nullable=True))


def downgrade() -> None:
    """What was saved is lost. Sums that differ by nothing else stay apart."""
    for name in ("similarity", "source_trace_id", "source_id", "age_ns", "looked_up_ns"):
        op.drop_column("requests", name)
    for table in ("request_sums", "requests"):
        for name in (*reversed(_AMOUNTS), "cache"):
            op.drop_column(table, name)
