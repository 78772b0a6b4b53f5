"""What a key is charged for an answer that goes on after its worker's death, if the request came while that worker
still lived, and so entered as any other."""

from types import SimpleNamespace
from typing import Any

import pytest

from gateway.api.pipeline import Pipeline
from gateway.api.request import Request
from gateway.endpoints import BY_PATH
from gateway.keys.known import Key
from gateway.keys.limit_fields import Limits
from gateway.limits.estimates import Estimate
from gateway.limits.memory import Accounts, SharedBook, _digest
from gateway.limits.postgres import PostgresBook
from gateway.limits.rules import Book
from gateway.limits.users import enter
from gateway.relay.trail import Past, Trail
from tests.support.books import admit
from tests.support.relays import Books, exchange, route, rules

pytestmark = pytest.mark.anyio

LIMITS = Limits(tokens_per_day=10_000)
KEYS = [Key("k", limits=LIMITS), Key("k", limits=LIMITS, user="u", user_limits=LIMITS)]
RESERVED, TAKEN = 100, 30  # tokens: by the dead worker, and by the whole answer


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def accounts() -> Accounts:
    accounts = Accounts()
    accounts.occupy(0)
    return accounts


async def go_on(book: Book, key: Key) -> None:
    """Admit a request that goes on with an answer for which RESERVED tokens are charged, and settle it with TAKEN."""
    none: Any = None
    keys: Any = SimpleNamespace(still=lambda key: key)
    routes: Any = SimpleNamespace(check=lambda *_: None)
    settings: Any = SimpleNamespace(stack_max_body_bytes=1, stack_strict_params=False, stack_queue_timeout=1.0)
    pipeline = Pipeline(settings, keys, routes, none, book, none, rules(Books()), none, none, none)
    lease = await enter(book, key)
    request = Request(BY_PATH["/v1/chat/completions"], key, exchange(), route(), {}, b"", lease, replay=False)
    past = Past(request.exchange, request.route)
    past.book, past.charged = book.memory, RESERVED
    relay = await pipeline.admit(request, Trail(lambda _: None, past))
    relay._lease.settle(TAKEN)


@pytest.mark.parametrize("key", KEYS, ids=["key", "user"])
async def test_postgresql_is_told_what_the_answer_took_beyond_what_the_dead_had_reserved(
    accounts: Accounts, key: Key
) -> None:
    book = PostgresBook("", accounts, 0)
    await go_on(book, key)
    told = {key_id: tokens for (key_id, *_), (tokens, *_) in book._pending.items()}
    assert told == dict.fromkeys({key.id, key.account}, TAKEN - RESERVED)


async def test_the_memory_of_a_host_has_what_the_answer_took(accounts: Accounts) -> None:
    async def nothing(_key: str, _since: int, _until: int) -> int:
        return 0

    book, (key, _) = SharedBook(accounts, 0, nothing), KEYS
    await admit(book, key, Estimate(size=10, prompt=RESERVED))
    await go_on(book, key)
    cell = book._find(_digest(key.id))
    assert cell is not None
    assert book._state(cell).day_tokens == TAKEN
