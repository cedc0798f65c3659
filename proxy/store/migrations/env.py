"""What alembic runs for every command. `upgrade` hands it a connection; on the command line `-x url=` names the database."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from proxy.store.engine import open_engine, without_deadline
from proxy.store.partitions import is_partition
from proxy.store.tables import metadata


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=metadata,
        transactional_ddl=True,  # of SQLite alembic would think otherwise; here each transaction really begins (engine.py)
        include_name=lambda name, kind, _: kind != "table" or not is_partition(name or ""),
        render_as_batch=connection.dialect.name == "sqlite",
    )
    with context.begin_transaction():
        context.run_migrations()


if (given := context.config.attributes.get("connection")) is not None:
    run(given)
else:
    with open_engine(context.get_x_argument(as_dictionary=True)["url"]).begin() as opened:
        without_deadline(opened)
        run(opened)
