"""The usage as it stands in a store."""

from typing import Any

import sqlalchemy as sa

from gateway.settings import Settings
from gateway.store import open_store
from gateway.usage import UsageBook, usage
from tests.processes import wait_for


class Rows:
    """Of the store of a gateway with these settings."""

    def __init__(self, settings: dict[str, str]) -> None:
        values: dict[str, Any] = {name.lower(): value for name, value in settings.items()}
        self._store = open_store(Settings(**values))
        self.book = UsageBook(self._store)

    def all(self) -> list[dict[str, Any]]:
        """In the order in which they came."""
        with self._store.read() as connection:
            found = connection.execute(sa.select(usage).order_by(usage.c.at, usage.c.id))
            return [dict(row) for row in found.mappings()]

    def of(self, request_id: str) -> dict[str, Any]:
        """The one row of a request, once it is there."""
        found = wait_for(lambda: [row for row in self.all() if row["request_id"] == request_id])
        assert len(found) == 1
        return found[0]

    def close(self) -> None:
        self._store.close()
