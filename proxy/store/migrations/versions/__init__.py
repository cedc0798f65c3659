"""The revisions, oldest first. alembic finds them by their names."""
