"""Where a request came from, and how long the audio was that it brought."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("requests", sa.Column("client_address", sa.Text(), server_default=sa.text("''"), nullable=False))
    op.add_column("requests", sa.Column("audio_seconds", sa.BigInteger(), server_default=sa.text("0"), nullable=False))


def downgrade() -> None:
    """The columns are lost."""
    for name in ("audio_seconds", "client_address"):
        op.drop_column("requests", name)
