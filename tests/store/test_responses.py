"""Stored responses, in both databases: what is kept, for whom, for how long, and the routes that read it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from gateway.errors import BadRequest, NotFound, TooLarge
from gateway.keys.book import Keybook
from gateway.keys.configured import listed_ids
from gateway.keys.entries import NewKeyFields
from gateway.responses.book import DAY, LONGEST, STEP, ResponseBook, Rules, Stored
from gateway.responses.responses import Responses
from gateway.responses.tables import responses as table
from gateway.responses.tables import totals
from gateway.settings import Settings
from gateway.store.store import Store, open_store, prepare
from tests.support.processes import KEY, NO_TLS, FakeEngine, GatewayProcess, running_gateway, wait_for

RULES = Rules(days=2, per_key=1 << 20, most=1 << 20)


@dataclass
class Clock:
    seconds: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.seconds


@dataclass
class Answer:
    """A finished answer, as the writer of the Responses API gives it, and what its request asked for."""

    name: str
    asks: str = "Hello"
    says: str = "Hi"
    previous: str | None = None
    store: bool = True
    items: list[dict[str, Any]] = field(default_factory=list)

    @property
    def previous_response_id(self) -> str | None:
        return self.previous and f"resp_{self.previous}"

    def response(self) -> dict[str, Any]:
        text = {"type": "output_text", "text": self.says, "annotations": []}
        said = {"type": "message", "id": f"msg_{self.name}_0", "role": "assistant", "content": [text]}
        return {"id": f"resp_{self.name}", "object": "response", "status": "completed", "output": [said]}

    def input_items(self) -> list[dict[str, Any]]:
        return self.items or [message(f"in_{self.name}_0", self.asks)]


def message(item_id: str, text: str) -> dict[str, Any]:
    return {"type": "message", "id": item_id, "role": "user", "content": [{"type": "input_text", "text": text}]}


def texts(items: Any) -> list[str]:
    return [it["content"][0]["text"] for it in items]


@pytest.fixture
def settings(store_settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name, value in {**store_settings, "STACK_RESPONSES_DAYS": "2"}.items():
        monkeypatch.setenv(name, value)
    found = Settings()
    prepare(found)
    return found


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    store = open_store(settings)
    yield store
    store.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def book(store: Store, clock: Clock) -> ResponseBook:
    return ResponseBook(store, RULES, clock)


def add(book: ResponseBook, answer: Answer, key: str = "k1") -> str:
    return book.add(key, answer.response(), answer.input_items(), answer.previous_response_id)


def chain(book: ResponseBook, response_id: str, key: str = "k1") -> tuple[list[Stored], str | None]:
    """The responses that a request with this previous_response_id continues, and the id of one that is missing."""
    plan, missing = book.plan(key, response_id, ())
    found = dict(book.find(key, plan.chain))
    lost = [it for it in plan.chain if it not in found]
    return ([], lost[0]) if lost else ([found[it] for it in plan.chain], missing)


def held(_: int) -> None:
    """There is memory for everything."""


def stored_ids(store: Store) -> list[str]:
    with store.read() as connection:
        return list(connection.execute(sa.select(table.c.id).order_by(table.c.kept_at, table.c.id)).scalars())


def check_totals(store: Store) -> dict[str, int]:
    """The total of each key that has one; each is the sum of what its responses take."""
    with store.read() as connection:
        sums = sa.select(table.c.key_id, sa.func.sum(table.c.bytes)).group_by(table.c.key_id)
        real = {key: int(size) for key, size in connection.execute(sums)}
        told = {key: int(size) for key, size in connection.execute(sa.select(totals)) if size}
    assert real == told
    return told


def test_a_chain_is_found_from_its_oldest_response_on_by_its_own_key_alone(book: ResponseBook) -> None:
    for name, previous in [("a", None), ("b", "a"), ("c", "b"), ("other", "a")]:
        assert add(book, Answer(name, asks=f"asks {name}", previous=previous)) == ""
    found, missing = chain(book, "resp_c")
    assert missing is None
    assert [it.output[0]["id"] for it in found] == ["msg_a_0", "msg_b_0", "msg_c_0"]
    assert [texts(it.items) for it in found] == [["asks a"], ["asks b"], ["asks c"]]
    assert chain(book, "resp_c", "k2") == ([], "resp_c")
    assert dict(book.find("k2", ["resp_a"])) == {}


def test_two_keys_may_have_responses_with_the_same_id(book: ResponseBook) -> None:
    assert add(book, Answer("a", says="one"), "k1") == add(book, Answer("a", says="two"), "k2") == ""
    assert add(book, Answer("a", says="again"), "k1") == "exists"
    assert texts(dict(book.find("k1", ["resp_a"]))["resp_a"].output) == ["one"]
    assert book.delete("k1", "resp_a")
    assert not book.delete("k1", "resp_a")
    assert texts(dict(book.find("k2", ["resp_a"]))["resp_a"].output) == ["two"]


def test_a_conversation_without_one_of_its_responses_is_not_continued(book: ResponseBook) -> None:
    for name, previous in [("a", None), ("b", "a"), ("c", "b")]:
        add(book, Answer(name, previous=previous))
    assert book.delete("k1", "resp_a")
    assert chain(book, "resp_c") == ([], "resp_a")
    for impossible in ("", "resp_\0", "x" * 10_000):
        assert chain(book, impossible) == ([], impossible)
        assert not book.delete("k1", impossible)


def test_a_conversation_larger_than_a_body_is_refused_before_it_is_read(store: Store) -> None:
    book = ResponseBook(store, Rules(days=1, per_key=1 << 20, most=2000))
    assert add(book, Answer("huge", asks="x" * 2000)) == "too_large"
    for number in range(4):
        assert add(book, Answer(f"n{number}", asks="x" * 600, previous=f"n{number - 1}" if number else None)) == ""
    assert len(chain(book, "resp_n1")[0]) == 2
    with pytest.raises(TooLarge, match="2000 bytes") as caught:
        chain(book, "resp_n3")
    assert caught.value.param == "previous_response_id"


def test_a_conversation_of_too_many_responses_is_refused(store: Store, book: ResponseBook) -> None:
    add(book, Answer("n0"))
    with store.write() as connection:
        first = dict(connection.execute(sa.select(table)).mappings().one())
        rows = [first | {"id": f"resp_n{it}", "previous_id": f"resp_n{it - 1}"} for it in range(1, LONGEST + 1)]
        connection.execute(table.insert(), rows)
    assert len(chain(book, f"resp_n{LONGEST - 1}")[0]) == LONGEST
    with pytest.raises(TooLarge):
        chain(book, f"resp_n{LONGEST}")


def test_old_responses_cannot_be_found_and_are_deleted_in_steps(store: Store, book: ResponseBook, clock: Clock) -> None:
    for number in range(STEP + 5):
        add(book, Answer(f"old{number}"))
    clock.seconds += 2 * DAY / 1000 - 1
    add(book, Answer("new", previous="old0"))
    assert book.sweep() == 0
    clock.seconds += 2
    assert dict(book.find("k1", ["resp_old1", "resp_new"])).keys() == {"resp_new"}
    assert chain(book, "resp_new") == ([], "resp_old0")
    assert not book.delete("k1", "resp_old1")  # it counts no more, although it is there
    assert [book.sweep(), book.sweep(), book.sweep()] == [STEP, 4, 0]
    assert stored_ids(store) == ["resp_new"]
    check_totals(store)


def test_the_oldest_responses_of_a_key_make_room_for_its_newest(store: Store, clock: Clock) -> None:
    noise = "".join(f"{number * 7919 % 100_003:x}" for number in range(2000))  # does not compress well
    book = ResponseBook(store, Rules(days=1, per_key=20_000, most=1 << 20), clock)
    add(book, Answer("neighbour"), "k2")
    for number in range(12):
        clock.seconds += 1
        assert add(book, Answer(f"n{number:02}", asks=noise)) == ""
        assert check_totals(store)["k1"] <= 20_000
    left = stored_ids(store)
    assert left[0] == "resp_neighbour"
    assert left[1:] == [f"resp_n{number:02}" for number in range(12)][-len(left[1:]) :]
    assert 2 <= len(left[1:]) < 12
    assert add(book, Answer("huge", asks=noise * 1 + "".join(map(str, range(40_000))))) == "too_large"
    assert stored_ids(store) == left


def test_a_deleted_key_takes_its_responses_along(store: Store, book: ResponseBook) -> None:
    keys = Keybook(store)
    entry, _ = keys.create(NewKeyFields(name="gone"))
    add(book, Answer("a"), entry.id)
    add(book, Answer("b"), "k1")
    keys.delete(entry.id)
    assert stored_ids(store) == ["resp_b"]
    assert add(book, Answer("late"), entry.id) == "key_deleted"  # its answer was under way
    assert check_totals(store).keys() == {"k1"}
    with store.write() as connection:  # one that another worker added at the same moment
        row = dict(connection.execute(sa.select(table)).mappings().one())
        connection.execute(table.insert().values(row | {"key_id": entry.id}))
        connection.execute(totals.insert().values(key_id=entry.id, bytes=row["bytes"]))
    book.sweep()
    assert stored_ids(store) == ["resp_b"]
    check_totals(store)


def test_a_damaged_response_counts_as_missing(store: Store, book: ResponseBook) -> None:
    add(book, Answer("a"))
    add(book, Answer("b", previous="a"))
    with store.write() as connection:
        connection.execute(table.update().where(table.c.id == "resp_a").values(input=b"damaged"))
    assert dict(book.find("k1", ["resp_a", "resp_b"])).keys() == {"resp_b"}
    assert chain(book, "resp_b") == ([], "resp_a")


@asynccontextmanager
async def opened(settings: Settings, store: Store) -> AsyncIterator[Responses]:
    async with Responses(settings, store) as responses:
        yield responses


def test_a_kept_response_is_the_past_of_the_next_request(settings: Settings, store: Store) -> None:
    async def talk() -> None:
        async with opened(settings, store) as responses:
            first, second = Answer("a_1", asks="one?", says="one"), Answer("b", "two?", "two", previous="a_1")
            assert await responses.keep("k1", first, first)
            assert await responses.keep("k1", second, second)
            past = await responses.history("k1", "resp_b", ["msg_a_1_0", "in_b_0", "msg_other_0", "weird"], held)
            assert texts(past.items) == ["one?", "one", "two?", "two"]
            assert {name: it["content"][0]["text"] for name, it in past.kept.items()} == {
                "msg_a_1_0": "one",
                "in_b_0": "two?",
            }
            assert (await responses.history("k1", None, ["msg_b_0"], held)).kept.keys() == {"msg_b_0"}
            assert (await responses.history("k2", None, ["msg_b_0"], held)).kept == {}
            with pytest.raises(BadRequest) as caught:
                await responses.history("k2", "resp_b", [], held)
            assert (caught.value.param, caught.value.code) == ("previous_response_id", "previous_response_not_found")

    asyncio.run(talk())


def test_a_key_waits_for_one_call_of_another_key_at_most(settings: Settings, store: Store) -> None:
    ended: list[str] = []

    async def note(name: str, call: Awaitable[object]) -> None:
        await call
        ended.append(name)

    async def talk() -> None:
        async with opened(settings, store) as responses:
            first, small = Answer("a"), Answer("b")
            assert await responses.keep("k1", first, first)
            loads = [note("k1", responses.history("k1", "resp_a", [], held)) for _ in range(5)]
            await asyncio.gather(*loads, note("k2", responses.keep("k2", small, small)))

    asyncio.run(talk())
    assert ended == ["k2", *["k1"] * 5]


def test_a_response_with_store_false_is_not_stored(settings: Settings, store: Store) -> None:
    async def talk() -> None:
        async with opened(settings, store) as responses:
            refused = Answer("a", store=False)
            assert not await responses.keep("k1", refused, refused)
            with pytest.raises(NotFound):
                await responses.show("k1", "resp_a", "response", held)
        off = settings.model_copy(update={"stack_responses_days": 0})
        kept = Answer("b")
        async with opened(settings, store) as responses:
            assert await responses.keep("k1", kept, kept)
        async with opened(off, store) as responses:
            assert not responses.on
            assert not await responses.keep("k1", Answer("c"), Answer("c"))
            with pytest.raises(NotFound, match="STACK_RESPONSES_DAYS"):
                await responses.show("k1", "resp_b", "response", held)
            await asyncio.to_thread(wait_for, lambda: not stored_ids(store))  # switched off, what was stored goes

    asyncio.run(talk())


def test_an_answer_is_complete_even_if_it_cannot_be_stored(settings: Settings, store: Store) -> None:
    async def talk() -> None:
        async with opened(settings, store) as responses:
            with store.write() as connection:
                connection.execute(sa.text("DROP TABLE responses"))
            assert not await responses.keep("k1", Answer("a"), Answer("a"))

    asyncio.run(talk())


@pytest.fixture
def gateway(engine: FakeEngine, tmp_path: Path, store_settings: dict[str, str]) -> Iterator[GatewayProcess]:
    with running_gateway(tmp_path / "log", engine.url, STACK_RESPONSES_DAYS="2", **store_settings) as gateway:
        yield gateway


def test_the_routes_show_page_and_delete_what_a_key_has_stored(
    gateway: GatewayProcess, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STACK_API_KEYS", KEY)
    (mine,) = listed_ids(Settings())
    items = [message(f"in_a_{number}", f"item {number}") for number in range(5)]
    book = ResponseBook(store, RULES)
    add(book, Answer("a", items=items), mine)
    add(book, Answer("b"), "k2")
    with gateway.client() as client:
        assert client.get("/v1/responses/resp_a").json() == Answer("a").response()
        pages = []
        after: dict[str, str] = {}
        while True:
            answer = client.get("/v1/responses/resp_a/input_items", params={"limit": 2, "order": "asc", **after}).json()
            assert (answer["object"], answer["first_id"]) == ("list", answer["data"][0]["id"])
            pages.append(answer["data"])
            after = {"after": answer["last_id"]}
            if not answer["has_more"]:
                break
        assert [len(it) for it in pages] == [2, 2, 1]
        assert [it for page in pages for it in page] == items
        assert client.get("/v1/responses/resp_a/input_items").json()["data"] == items[::-1]

        for path in ("resp_b", "resp_nobody", "resp_b/input_items", "x" * 500, "a%00b"):
            answer = client.get(f"/v1/responses/{path}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), path
        for query, param in [("limit=0", "limit"), ("limit=101", "limit"), ("limit=x", "limit"), ("order=up", "order")]:
            answer = client.get(f"/v1/responses/resp_a/input_items?{query}")
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        answer = client.get("/v1/responses/resp_a/input_items?after=nobody")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "after")
        answer = client.get("/v1/responses/resp_a?stream=true")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "stream")

        assert client.delete("/v1/responses/resp_b").status_code == 404
        told = client.delete("/v1/responses/resp_a").json()
        assert told == {"id": "resp_a", "object": "response", "deleted": True}
        assert client.get("/v1/responses/resp_a").status_code == 404
    assert httpx.get(gateway.url + "/v1/responses/resp_b", verify=NO_TLS).status_code == 401
    assert stored_ids(store) == ["resp_b"]
    assert "item 3" not in gateway.log_path.read_text()
