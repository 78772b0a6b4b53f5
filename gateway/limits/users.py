"""Users: charge a request to its user's account as well as to its key's, if the key tells its users apart.

A user's account is one of the accounts of a book, like a key's. Its name is `Key.account`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from gateway.errors import QuotaSpent, RateLimited
from gateway.keys.known import Key
from gateway.keys.limit_fields import Limits
from gateway.limits.estimates import Estimate
from gateway.limits.rules import TURN, Book, Headers, Lease

_NONE = Limits()


async def enter(book: Book, key: Key, seconds: float = TURN, *, replay: bool = False, goes_on: bool = False) -> Lease:
    """Charge a request to its key, and to the user that it is for. See Book.enter. A request that either account
    refuses costs neither of them anything."""
    if not key.user or key.user_limits == _NONE:
        return await book.enter(key, seconds, replay=replay, goes_on=goes_on)
    user = replace(key, id=key.account, limits=key.user_limits)
    with _speaking_of_the_user():
        of_user = await book.enter(user, seconds, replay=replay, goes_on=goes_on)
    try:
        return _Both(await book.enter(key, seconds, replay=replay, goes_on=goes_on), of_user)
    except BaseException:
        of_user.cancel()
        raise


class _Both(Lease):
    """What a request of a user holds: a lease of its key, and one of its user."""

    __slots__ = ("_of_key", "_of_user")

    def __init__(self, of_key: Lease, of_user: Lease) -> None:
        super().__init__()
        self._of_key = of_key
        self._of_user = of_user

    async def set_aside(self, estimate: Estimate) -> None:
        """See Lease.set_aside. If the key's account refuses, the holder's `settle` gives back what the user's has."""
        self.estimate = estimate
        with _speaking_of_the_user():
            await self._of_user.set_aside(estimate)
        await self._of_key.set_aside(estimate)

    def go_on(self) -> None:
        """See Lease.go_on."""
        self._of_user.go_on()
        self._of_key.go_on()

    def settle(self, tokens: int) -> None:
        """See Lease.settle."""
        self.open = False
        self._of_user.settle(tokens)
        self._of_key.settle(tokens)

    async def known(self) -> None:
        """See Lease.known."""
        await self._of_user.known()
        await self._of_key.known()

    def headers(self) -> Headers:
        """Return what is left for the user, and of limits that only the key has, what is left for the key."""
        return list({**dict(self._of_key.headers()), **dict(self._of_user.headers())}.items())

    @property
    def charged(self) -> int:
        """See Lease.charged. An account without limits is charged nothing, and otherwise both are charged the same."""
        return max(self._of_key.charged, self._of_user.charged)


@contextmanager
def _speaking_of_the_user() -> Iterator[None]:
    try:
        yield
    except (RateLimited, QuotaSpent) as exc:
        exc.message = exc.message.replace("This key", "This user of the key", 1)
        raise
