"""Whose budget a request was on, what limited it, and from whose journal it is."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("requests", sa.Column("team", sa.Text(), server_default=sa.text("''"), nullable=False))
    op.add_column("requests", sa.Column("worker", sa.Text(), server_default=sa.text("''"), nullable=False))
    op.add_column("requests", sa.Column("gpu_ns", sa.BigInteger(), server_default=sa.text("0"), nullable=False))
    op.add_column("requests", sa.Column("refused_by", sa.Text(), server_default=sa.text("''"), nullable=False))
    op.add_column("requests", sa.Column("over_budget", sa.Text(), server_default=sa.text("''"), nullable=False))
    op.add_column("requests", sa.Column("collector", sa.Text(), server_default=sa.text("''"), nullable=False))


def downgrade() -> None:
    """The columns are lost."""
    for name in ("collector", "over_budget", "refused_by", "gpu_ns", "worker", "team"):
        op.drop_column("requests", name)
