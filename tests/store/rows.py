"""The usage as it stands in a store."""

from typing import Any

import sqlalchemy as sa

from gateway.settings import Settings
from gateway.store import Store, open_store
from gateway.usage import usage
from tests.processes import wait_for


class Rows:
    """Of the store of a gateway with these settings."""

    def __init__(self, settings: dict[str, str]) -> None:
        values: dict[str, Any] = {name.lower(): value for name, value in settings.items()}
        self.store: Store = open_store(Settings(**values))

    def all(self) -> list[dict[str, Any]]:
        """In the order in which they came."""
        with self.store.read() as connection:
            return [
                dict(row) for row in connection.execute(sa.select(usage).order_by(usage.c.at, usage.c.id)).mappings()
            ]

    def of(self, request_id: str) -> dict[str, Any]:
        """The one row of a request, once it is there."""
        found = wait_for(lambda: [row for row in self.all() if row["request_id"] == request_id])
        assert len(found) == 1
        return found[0]
