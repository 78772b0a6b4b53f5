"""Client: what a relay needs of the connection to its client. gateway/server/cycle.py implements it."""

from collections.abc import Callable
from typing import Protocol


class Client(Protocol):
    """A client that waits for a response."""

    def watch(self, hung_up: Callable[[], None] | None) -> None:
        """Call `hung_up` when the client disconnects before it has the whole response, or at once if it already has.
        None ends this."""

    @property
    def takes(self) -> bool:
        """Whether the client can take more of a body that has begun, without waiting."""

    def push(self, data: bytes) -> None:
        """Send a piece of the body that is not the last one. Only while the client `takes` more."""

    async def cut(self) -> None:
        """End a response in the middle of its body, so that no client takes it for complete."""
