"""Migrating: run the store's migrations with alembic. Imported only when there is one to run, because the import takes
0.25 s."""

from pathlib import Path

import alembic.command
import alembic.config
import alembic.util
import sqlalchemy as sa

from gateway.settings import SettingsError


def upgrade(connection: sa.Connection, scripts: Path) -> None:
    """Bring the tables to the newest version, within the connection's transaction.

    Raises SettingsError if a newer version of the gateway has migrated the database, because there is no way back.
    """
    config = alembic.config.Config()
    config.set_main_option("script_location", str(scripts))
    config.attributes["connection"] = connection
    try:
        alembic.command.upgrade(config, "head")
    except alembic.util.CommandError as exc:
        raise SettingsError(
            f"STACK_STORE_URL: this database was last used by a newer version of stack ({exc}). "
            "Run that version, or restore a backup that was made before that version was started."
        ) from exc
