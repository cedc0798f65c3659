"""Teams, users, projects, models and backends; keys with several secrets and with what they may; admin keys; the audit log.

A key's hash and prefix move into `key_secrets`. A version before this one that still runs on another host therefore can't read
the keys any more: it says so and goes on with those that it has, instead of letting in who was blocked since.
"""

from __future__ import annotations

import json
import time
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_UNREVOKED = sa.text("revoked_at IS NULL")
_KEYED = sa.text("idempotency_key != ''")


def _name() -> Any:
    return sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    op.add_column("catalogue", sa.Column("everyone", sa.Text(), server_default=sa.text("'{}'"), nullable=False))
    _noun("teams", _blocked())
    _noun("users", _team(), _blocked())
    _noun("projects", _team(), _blocked())
    _noun("models")
    _noun("backends")
    op.create_index("ix_users_team", "users", ["team"])
    op.create_index("ix_projects_team", "projects", ["team"])
    op.create_table(
        "key_secrets",
        sa.Column("hash", sa.LargeBinary(length=32), nullable=False),
        sa.Column("key_id", _name(), nullable=False),
        sa.Column("prefix", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("ends_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("hash", name=op.f("pk_key_secrets")),
    )
    op.create_index("ix_key_secrets_key_id", "key_secrets", ["key_id"])
    op.execute("INSERT INTO key_secrets (hash, key_id, prefix, created_at) SELECT hash, id, prefix, created_at FROM keys")
    op.create_table(
        "key_tags",
        sa.Column("tag", _name(), nullable=False),
        sa.Column("key_id", _name(), nullable=False),
        sa.PrimaryKeyConstraint("tag", "key_id", name=op.f("pk_key_tags")),
    )
    op.create_index("ix_key_tags_key_id", "key_tags", ["key_id"])
    with op.batch_alter_table("keys") as batch:
        batch.drop_constraint(op.f("uq_keys_hash"), type_="unique")
        batch.drop_column("hash")
        batch.drop_column("prefix")
        batch.add_column(_team())
        batch.add_column(sa.Column("user_name", _name(), nullable=True))
        batch.add_column(sa.Column("project", _name(), nullable=True))
        batch.add_column(sa.Column("blocked", sa.Boolean(), server_default=sa.false(), nullable=False))
        batch.add_column(sa.Column("settings", sa.Text(), server_default=sa.text("'{}'"), nullable=False))
        batch.add_column(sa.Column("changed_at", sa.BigInteger(), server_default=sa.text("0"), nullable=False))
    if _on_postgresql():
        op.alter_column("keys", "id", type_=sa.Text(collation="C"))
        op.alter_column("keys", "name", type_=sa.Text(collation="C"))
    op.execute("UPDATE keys SET changed_at = coalesce(revoked_at, created_at)")
    op.create_index("ix_keys_name", "keys", ["name", "id"])
    for indexed in ("team", "user_name", "project"):
        op.create_index(f"ix_keys_{indexed}", "keys", [indexed])
    _admins_and_audit()


def _admins_and_audit() -> None:
    op.create_table(
        "admin_keys",
        sa.Column("id", _name(), nullable=False),
        sa.Column("name", _name(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        _team(),
        sa.Column("prefix", sa.Text(), nullable=False),
        sa.Column("hash", sa.LargeBinary(length=32), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("revoked_at", sa.BigInteger(), nullable=True),
        sa.Column("expires_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_admin_keys")),
        sa.UniqueConstraint("hash", name=op.f("uq_admin_keys_hash")),
    )
    _unique_index("uq_admin_keys_name_unrevoked", "admin_keys", ["name"], _UNREVOKED)
    op.create_index("ix_admin_keys_team", "admin_keys", ["team"])
    op.create_table(
        "audit",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("author", _name(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("address", sa.Text(), nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("noun", sa.Text(), nullable=False),
        sa.Column("name", _name(), nullable=False),
        sa.Column("team", _name(), nullable=False),
        sa.Column("before", sa.Text(), nullable=True),
        sa.Column("after", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit")),
    )
    op.create_index("ix_audit_noun", "audit", ["noun", "name"])
    for column in ("at", "author", "team"):
        op.create_index(f"ix_audit_{column}", "audit", [column])
    _unique_index("uq_audit_idempotency_key", "audit", ["author", "idempotency_key"], _KEYED)


def downgrade() -> None:
    """Lost are the nouns, what keys may, secrets that a rotation replaced, admin keys and the audit log. A key that doesn't work,
    because it or its team, user or project is blocked or has expired, is revoked: the version before would let it in."""
    _revoke_what_does_not_work()
    with op.batch_alter_table("keys") as batch:
        batch.add_column(sa.Column("prefix", sa.Text(), nullable=True))
        batch.add_column(sa.Column("hash", sa.LargeBinary(length=32), nullable=True))
    newest = "FROM key_secrets WHERE key_secrets.key_id = keys.id AND key_secrets.ends_at IS NULL"
    op.execute(f"UPDATE keys SET prefix = (SELECT prefix {newest}), hash = (SELECT hash {newest})")  # noqa: S608 (ours)
    for index in ("ix_keys_name", "ix_keys_team", "ix_keys_user_name", "ix_keys_project"):
        op.drop_index(index, "keys")
    with op.batch_alter_table("keys") as batch:
        batch.alter_column("prefix", existing_type=sa.Text(), nullable=False)
        batch.alter_column("hash", existing_type=sa.LargeBinary(length=32), nullable=False)
        batch.create_unique_constraint(op.f("uq_keys_hash"), ["hash"])
        for column in ("team", "user_name", "project", "blocked", "settings", "changed_at"):
            batch.drop_column(column)
    if _on_postgresql():
        op.alter_column("keys", "id", type_=sa.Text(collation="default"))
        op.alter_column("keys", "name", type_=sa.Text(collation="default"))
    for table in ("audit", "admin_keys", "key_tags", "key_secrets", "backends", "models", "projects", "users", "teams"):
        op.drop_table(table)
    with op.batch_alter_table("catalogue") as batch:
        batch.drop_column("everyone")
    op.execute("UPDATE catalogue SET revision = revision + 1")


def _revoke_what_does_not_work() -> None:
    connection, now = op.get_bind(), time.time()

    def ended(table: str) -> set[str]:
        rows = connection.execute(sa.text(f"SELECT name, blocked, settings FROM {table}"))  # noqa: S608 (ours)
        return {name for name, blocked, settings in rows if blocked or _expired(settings, now)}

    teams, users, projects = ended("teams"), ended("users"), ended("projects")
    columns = "id, team, user_name, project, blocked, settings"
    keys = connection.execute(sa.text(f"SELECT {columns} FROM keys WHERE revoked_at IS NULL")).all()  # noqa: S608 (ours)
    for key_id, team, user, project, blocked, settings in keys:
        if blocked or team in teams or user in users or project in projects or _expired(settings, now):
            revoke = sa.text("UPDATE keys SET revoked_at = :now WHERE id = :id")
            connection.execute(revoke, {"now": int(now * 1e9), "id": key_id})


def _expired(settings: str, now: float) -> bool:
    expires = json.loads(settings).get("expires")
    return expires is not None and datetime.fromisoformat(expires).timestamp() <= now


def _noun(name: str, *columns: sa.Column[Any]) -> None:
    op.create_table(
        name,
        sa.Column("name", _name(), nullable=False),
        *columns,
        sa.Column("settings", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("changed_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f(f"pk_{name}")),
    )


def _team() -> sa.Column[Any]:
    return sa.Column("team", _name(), nullable=True)


def _blocked() -> sa.Column[Any]:
    return sa.Column("blocked", sa.Boolean(), nullable=False)


def _unique_index(name: str, table: str, columns: list[str], where: Any) -> None:
    op.create_index(name, table, columns, unique=True, sqlite_where=where, postgresql_where=where)


def _on_postgresql() -> bool:
    return op.get_bind().dialect.name == "postgresql"
