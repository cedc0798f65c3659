"""The secret with which the cache makes its keys, and which answers aren't to be given again."""

from __future__ import annotations

import secrets
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """The secret is made here: a migration runs once, however many processes start."""
    op.add_column("catalogue", sa.Column("cache_secret", sa.LargeBinary(length=32), nullable=True))
    made = sa.text("UPDATE catalogue SET cache_secret = :secret").bindparams(sa.bindparam("secret", type_=sa.LargeBinary()))
    op.get_bind().execute(made, {"secret": secrets.token_bytes(32)})
    op.create_table(
        "purges",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("before_at", sa.BigInteger(), nullable=False),
        sa.Column("model", _name(), nullable=False),
        sa.Column("key_id", _name(), nullable=False),
        sa.Column("team", _name(), nullable=False),
        sa.Column("user_name", _name(), nullable=False),
        sa.Column("made_at", sa.BigInteger(), nullable=False),
        sa.Column("author", _name(), nullable=False),
        sa.Column("deleted", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_purges")),
    )


def downgrade() -> None:
    """What was withdrawn may be given again by whoever comes back here with what Redis still has: its keys are made with another
    secret then, so nothing of it is found."""
    op.drop_table("purges")
    with op.batch_alter_table("catalogue") as batch:
        batch.drop_column("cache_secret")


def _name() -> Any:
    return sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
