"""The usage rows in a store."""

from typing import Any

import sqlalchemy as sa

from gateway.settings import Settings
from gateway.store.store import open_store
from gateway.usage.rows import UsageBook, usage
from tests.support.processes import wait_for


class Rows:
    """The usage rows of a gateway with these settings."""

    def __init__(self, settings: dict[str, str]) -> None:
        values: dict[str, Any] = {name.lower(): value for name, value in settings.items()}
        self._store = open_store(Settings(**values))
        self.book = UsageBook(self._store)

    def all(self) -> list[dict[str, Any]]:
        """Return all rows in the order in which their requests came."""
        with self._store.read() as connection:
            found = connection.execute(sa.select(usage).order_by(usage.c.at, usage.c.id))
            return [dict(row) for row in found.mappings()]

    def of(self, request_id: str) -> dict[str, Any]:
        """Wait for the one row of a request, and return it."""
        found = wait_for(lambda: [row for row in self.all() if row["request_id"] == request_id])
        assert len(found) == 1
        return found[0]

    def close(self) -> None:
        self._store.close()
