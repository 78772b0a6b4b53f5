"""Book: the rows of stored responses. Every method waits for the database, so it must be called in a thread.

A row is compressed with zlib. Only the key that made a response can find it, and of a key that tells its users apart
only the user (`account`, see keys.known.Key). A response can be found only until it expires.
"""

import logging
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import orjson
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from gateway.errors import TooLarge
from gateway.responses.tables import MAX_ID, forget, remove, responses, totals
from gateway.store.store import Store
from gateway.values import Weight, weigh

DAY = 86_400_000  # milliseconds
LONGEST = 1000  # responses that one request continues and refers to
STEP = 100  # rows deleted in one transaction, at most
_LEVEL = 3  # zlib's level: text shrinks to a third at 100 MB/s
_deleted_keys = sa.table("deleted_keys", sa.column("id"))  # gateway.keys.tables owns this table

log = logging.getLogger("stack")


Part = Literal["input", "response"]  # of a row: the input items of its own request, and the response object


@dataclass(frozen=True, slots=True)
class Stored:
    """What a stored response adds to a conversation: the input items of its own request, and its output items."""

    items: list[dict[str, Any]]
    output: list[dict[str, Any]]
    weight: Weight

    @property
    def all_items(self) -> list[dict[str, Any]]:
        """The input items, then the output items."""
        return [*self.items, *self.output]


@dataclass(frozen=True, slots=True)
class Plan:
    """Which responses a request continues (`chain`, the oldest first) and refers to (`others`), by their ids. All of
    them are `size` bytes of JSON."""

    chain: list[str]
    others: list[str]
    size: int


@dataclass(frozen=True, slots=True)
class Rules:
    """The limits of stored responses. `days`: for how long, 0 for none at all. `per_key`: compressed bytes of one key's
    responses. `most`: bytes of JSON of one response with its input items, and of one conversation."""

    days: int
    per_key: int
    most: int


class ResponseBook:
    """Read and write the responses in a store. Every method raises StoreUnavailable. `clock` returns seconds since
    1970."""

    def __init__(self, store: Store, rules: Rules, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._rules = rules
        self._clock = clock

    def add(self, account: str, response: dict[str, Any], items: list[dict[str, Any]], previous_id: str | None) -> str:
        """Store a response, and delete the key's oldest ones if they take too much together.

        Return why the response cannot be stored, and an empty string if it is stored.
        """
        written = orjson.dumps(items), orjson.dumps(response)
        size = sum(map(len, written))
        if size > self._rules.most:
            return "too_large"
        packed = [zlib.compress(it, _LEVEL) for it in written]
        stored = sum(map(len, packed))
        if stored > self._rules.per_key:
            return "too_large"
        key_id, _, user_id = account.partition("/")
        row = {
            "key_id": key_id,
            "user_id": user_id,
            "id": response["id"],
            "previous_id": previous_id,
            "kept_at": int(self._clock() * 1000),
            "size": size,
            "bytes": stored,
            "input": packed[0],
            "response": packed[1],
        }
        try:
            with self._store.write() as connection:
                total = _count(connection, key_id, stored)
                if connection.execute(sa.select(_deleted_keys.c.id).where(_deleted_keys.c.id == key_id)).first():
                    forget(connection, key_id)
                    return "key_deleted"
                self._make_room(connection, key_id, total)
                connection.execute(responses.insert().values(row))
        except IntegrityError:
            return "exists"
        return ""

    def sizes(self, account: str, response_ids: Iterable[str]) -> dict[str, int]:
        """Return those of these responses that the account has stored, with their sizes in bytes of JSON."""
        query = sa.select(responses.c.id, responses.c.size).where(*self._among(account, response_ids))
        with self._store.read() as connection:
            return {it.id: it.size for it in connection.execute(query)}

    def find(self, account: str, response_ids: Iterable[str]) -> Iterator[tuple[str, Stored]]:
        """Return those of these responses that the account has stored, with their ids. Each is unpacked when it is
        asked for."""
        query = sa.select(responses.c.id, responses.c.input, responses.c.response)
        with self._store.read() as connection:
            rows = connection.execute(query.where(*self._among(account, response_ids))).all()
        for response_id, packed, response in rows:
            try:
                items, output = orjson.loads(zlib.decompress(packed)), orjson.loads(zlib.decompress(response))["output"]
            except (zlib.error, ValueError):
                self._note_damage(account)
                continue
            yield response_id, Stored(items, output, weigh([items, output]))

    def part(self, account: str, response_id: str, part: Part) -> bytes | None:
        """Return a part of a response as JSON. None: the account has not stored it."""
        query = sa.select(responses.c[part]).where(*self._among(account, [response_id]))
        with self._store.read() as connection:
            packed = connection.execute(query).scalar()
        try:
            return None if packed is None else zlib.decompress(packed)
        except zlib.error:
            self._note_damage(account)
            return None

    def plan(self, account: str, previous_id: str | None, referred: Collection[str]) -> tuple[Plan, str | None]:
        """Return which responses a request continues and refers to, and the id of one that it would continue and that
        is missing, if any. Responses to which it refers may be missing. No response is read.

        Raises TooLarge if they are too many or too large for one request.
        """
        links = [] if previous_id is None else self._links(account, previous_id)
        missing = links[-1][1] if links else previous_id
        if missing is not None and len(links) < LONGEST:
            return Plan([], [], 0), missing
        size = sum(it[2] for it in links)
        if missing is not None or size > self._rules.most:
            raise TooLarge(
                f"The earlier conversation has more than {LONGEST} responses or {self._rules.most} bytes. "
                "Begin a new conversation, or send the important part of this one in 'input'.",
                param="previous_response_id",
            )
        chain = [it[0] for it in reversed(links)]
        others = set(referred) - set(chain)
        sizes = self.sizes(account, others) if others and len(chain) + len(others) <= LONGEST else {}
        size += sum(sizes.values())
        if len(chain) + len(others) > LONGEST or size > self._rules.most:
            raise TooLarge(
                f"The responses to whose items 'input' refers, and the earlier conversation, are more than {LONGEST} "
                f"responses or {self._rules.most} bytes. Send the items themselves, or refer to fewer.",
                param="input",
            )
        return Plan(chain, list(sizes), size), None

    def delete(self, account: str, response_id: str) -> bool:
        """Delete a response; return whether the account had one with that id."""
        if len(response_id) > MAX_ID or "\0" in response_id:
            return False
        mine = *_of(account), responses.c.id == response_id
        with self._store.write() as connection:
            kept_at = connection.execute(sa.select(responses.c.kept_at).where(*mine)).scalar()
            if kept_at is None or not remove(connection, [(account.partition("/")[0], response_id)]):
                return False
        return int(kept_at) >= self._oldest()

    def sweep(self) -> int:
        """Delete responses that are too old, or that a deleted key has left; return how many, STEP at most."""
        old = sa.select(responses.c.key_id, responses.c.id).where(responses.c.kept_at < self._oldest()).limit(STEP)
        left = sa.select(totals.c.key_id).where(totals.c.key_id.in_(sa.select(_deleted_keys.c.id)))
        with self._store.read() as connection:  # mostly there is nothing to do, and this transaction blocks no writer
            rows = [(it.key_id, it.id) for it in connection.execute(old)]
            orphans = connection.execute(left).scalars().all()
        if rows or orphans:
            with self._store.write() as connection:
                for key_id in orphans:
                    forget(connection, key_id)
                return remove(connection, rows) if rows else 0
        return 0

    def _oldest(self) -> int:
        """The time before which a response no longer counts, in milliseconds since 1970."""
        now = int(self._clock() * 1000)
        return now - self._rules.days * DAY if self._rules.days else now + 1

    def _among(self, account: str, response_ids: Iterable[str]) -> list[sa.ColumnElement[bool]]:
        """The conditions of a query for those of these responses that count."""
        wanted = {it for it in response_ids if len(it) <= MAX_ID and "\0" not in it}
        return [*_of(account), responses.c.id.in_(wanted), responses.c.kept_at >= self._oldest()]

    def _note_damage(self, account: str) -> None:
        log.error("a stored response of the key %s is damaged and left out", account)

    def _links(self, account: str, response_id: str) -> list[tuple[str, str | None, int]]:
        """Return the id, the predecessor's id and the size of a response and of its predecessors, LONGEST at most."""
        if len(response_id) > MAX_ID or "\0" in response_id:
            return []
        own = *_of(account), responses.c.kept_at >= self._oldest()
        columns = responses.c.id, responses.c.previous_id, responses.c.size
        first = sa.select(*columns, sa.literal(1).label("number")).where(*own, responses.c.id == response_id)
        links = first.cte("links", recursive=True)
        before = sa.select(*columns, links.c.number + 1).where(
            *own, responses.c.id == links.c.previous_id, links.c.number < LONGEST
        )
        links = links.union_all(before)
        with self._store.read() as connection:
            query = sa.select(links.c.id, links.c.previous_id, links.c.size).order_by(links.c.number)
            return [(it.id, it.previous_id, it.size) for it in connection.execute(query)]

    def _make_room(self, connection: sa.Connection, key_id: str, total: int) -> None:
        """Delete the key's oldest responses until the rest fit."""
        while total > self._rules.per_key:
            query = (
                sa.select(responses.c.id, responses.c.bytes)
                .where(responses.c.key_id == key_id)
                .order_by(responses.c.kept_at, responses.c.id)
                .limit(STEP)
            )
            doomed = []
            for response_id, size in connection.execute(query):
                if total <= self._rules.per_key:
                    break
                doomed.append((key_id, response_id))
                total -= size
            if not doomed:  # the total was wrong and is corrected now
                return
            remove(connection, doomed)


def _of(account: str) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    key_id, _, user_id = account.partition("/")
    return responses.c.key_id == key_id, responses.c.user_id == user_id


def _count(connection: sa.Connection, key_id: str, more: int) -> int:
    """Add to the key's total, and return it."""
    mine = totals.c.key_id == key_id
    grown = totals.update().where(mine).values(bytes=totals.c.bytes + more)
    if not connection.execute(grown).rowcount:
        try:
            with connection.begin_nested():
                connection.execute(totals.insert().values(key_id=key_id, bytes=more))
        except IntegrityError:  # another worker has just inserted the total of this key
            connection.execute(grown)
    return int(connection.execute(sa.select(totals.c.bytes).where(mine)).scalar_one())
