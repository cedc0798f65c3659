"""Why a request went where it went, and how long it waited for that; what was said of backends at run time."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("requests", sa.Column("queued_ns", sa.BigInteger(), server_default=sa.text("0"), nullable=False))
    op.add_column("requests", sa.Column("routed_by", sa.Text(), server_default=sa.text("''"), nullable=False))
    op.add_column("requests", sa.Column("scores", sa.JSON(), server_default=sa.text("'[]'"), nullable=False))
    op.add_column("requests", sa.Column("fallback_of", sa.Text(), server_default=sa.text("''"), nullable=False))
    op.create_table(
        "backend_states",
        sa.Column("name", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("drained", sa.Boolean(), nullable=False),
        sa.Column("weight", sa.Double(), nullable=True),
        sa.Column("changed_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_backend_states")),
    )


def downgrade() -> None:
    """The columns are lost, and drained backends get requests again: the version before knows of none."""
    op.drop_table("backend_states")
    for name in ("fallback_of", "scores", "routed_by", "queued_ns"):
        op.drop_column("requests", name)
