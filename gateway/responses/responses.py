"""Responses: read and write stored responses for the API, without blocking the event loop.

One thread does all work with the database and with the rows, so only one conversation is unpacked at a time. A key has
at most one call in the thread's queue, so another key waits for at most one call of it.
"""

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar
from weakref import WeakValueDictionary

from gateway import logs
from gateway.errors import BadRequest, NotFound, StoreUnavailable
from gateway.responses.book import STEP, Part, Plan, ResponseBook, Rules
from gateway.settings import Settings
from gateway.store.store import Store
from gateway.translation import responses as translation
from gateway.values import MAX_CONTAINERS, MAX_VALUES, Weight

SWEEP_EVERY = 60.0  # seconds between two looks for responses that are too old
# An item id of the gateway; it contains the unique part of its response's id
_ITEM_ID = re.compile(r"[a-z]+_(.+)_[0-9]+")
_Result = TypeVar("_Result")
# Is called with the size in bytes of JSON of what will be read, before it is read; raises if there is no memory for it
Hold = Callable[[int], None]
log = logging.getLogger("stack")


class Written(Protocol):
    """A finished answer, such as gateway.translation.responses.ResponseWriter."""

    def response(self) -> dict[str, Any]:
        """Return the response object."""

    def input_items(self) -> list[dict[str, Any]]:
        """Return the request's own input items."""


class Wish(Protocol):
    """What a request says about storing, such as gateway.translation.responses.Asked."""

    @property
    def store(self) -> bool:
        """Whether the response is to be stored."""

    @property
    def previous_response_id(self) -> str | None:
        """The response whose conversation it continues."""


@dataclass(frozen=True, slots=True)
class Past:
    """The earlier part of a conversation. `items` are those of the conversation that a request continues, the oldest
    first. `kept` are the items that it refers to, by id. They are `history` and `kept` of translation.responses.read.
    All of them were `size` bytes of JSON, and take `weight` bytes of memory."""

    items: Sequence[dict[str, Any]] = ()
    kept: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    size: int = 0
    weight: int = 0


class Responses:
    """Store responses, and find them again. Use it with `async with`. Methods raise StoreUnavailable, unless they say
    otherwise."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self.on = settings.stack_responses_days > 0  # `stores` of translation.responses.read
        rules = Rules(
            settings.stack_responses_days, settings.stack_responses_bytes_per_key, settings.stack_max_body_bytes
        )
        self._book = ResponseBook(store, rules)
        self._thread = ThreadPoolExecutor(1, "responses")
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # of each key that has a call

    async def __aenter__(self) -> Self:
        self._sweeping = asyncio.create_task(self._sweep())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sweeping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._sweeping
        # The running call is finished, which takes at most the store's timeout.
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)

    async def history(self, account: str, previous_id: str | None, referred: Sequence[str], hold: Hold) -> Past:
        """Return what a request continues and refers to. An item that is not found is left out of `kept`.

        Raises OpenAI's BadRequest if the previous response, or one before it, is not stored, BadRequest for more values
        than a request may have, TooLarge if all of it is larger than a request's body may be, and what `hold` raises.
        """
        if not self.on or (previous_id is None and not referred):
            return Past()
        makers = {f"resp_{match[1]}" for it in referred if (match := _ITEM_ID.fullmatch(it))}
        plan, missing = await self._in_thread(account, lambda: self._book.plan(account, previous_id, makers))
        if missing is not None:
            raise translation.unknown_previous(missing)
        hold(plan.size)
        return await self._in_thread(account, lambda: self._past(account, plan, referred))

    async def keep(self, account: str, writer: Written, asked: Wish) -> bool:
        """Store a finished response, if its request wants that. Call it before the answer's last event is sent, because
        the next request may refer to the response within milliseconds.

        Returns whether the response can be found from now on. Never raises, because the answer is complete without it.
        """
        if not self.on or not asked.store:
            return False
        response, items, previous = writer.response(), writer.input_items(), asked.previous_response_id
        try:
            trouble = await self._in_thread(account, lambda: self._book.add(account, response, items, previous))
        except StoreUnavailable as exc:
            trouble = str(exc.code)
        if trouble:
            logs.event("response_not_stored", {"key_id": account, "reason": trouble}, "warning")
        return not trouble

    async def show(
        self, account: str, response_id: str, part: Part, hold: Hold, write: Callable[[bytes], bytes] = bytes
    ) -> bytes:
        """Return what `write` makes of the JSON of a part of a stored response. `write` runs in the thread.

        Raises NotFound, also for a response of another account, and what `hold` and `write` raise."""
        if self.on:
            sizes = await self._in_thread(account, lambda: self._book.sizes(account, [response_id]))
            if response_id in sizes:
                hold(sizes[response_id])
                if shown := await self._in_thread(account, lambda: self._shown(account, response_id, part, write)):
                    return shown
        raise self._unknown(response_id)

    async def delete(self, account: str, response_id: str) -> None:
        """Delete a stored response. Raises NotFound, also for one of another account."""
        if not self.on or not await self._in_thread(account, lambda: self._book.delete(account, response_id)):
            raise self._unknown(response_id)

    def _past(self, account: str, plan: Plan, referred: Sequence[str]) -> Past:
        found, weight = {}, Weight()
        for response_id, stored in self._book.find(account, [*plan.chain, *plan.others]):
            found[response_id] = stored
            weight = weight.plus(stored.weight)
            if weight.is_too_much:
                raise BadRequest(
                    f"The stored responses that this request continues and refers to have more than {MAX_CONTAINERS} "
                    f"lists and objects, or more than {MAX_VALUES} values. Begin a new conversation.",
                    param="previous_response_id" if plan.chain else "input",
                    code="too_many_values",
                )
        for it in plan.chain:
            if it not in found:
                raise translation.unknown_previous(it)
        items = [item for it in plan.chain for item in found[it].all_items]
        known = {it["id"]: it for stored in found.values() for it in stored.all_items if type(it.get("id")) is str}
        return Past(items, {it: known[it] for it in referred if it in known}, plan.size, weight.size)

    def _shown(self, account: str, response_id: str, part: Part, write: Callable[[bytes], bytes]) -> bytes | None:
        text = self._book.part(account, response_id, part)
        return None if text is None else write(text)

    def _unknown(self, response_id: str) -> NotFound:
        why = "" if self.on else " This gateway stores no responses (STACK_RESPONSES_DAYS is 0)."
        return NotFound(f"Response with id '{response_id[:80]}' not found.{why}")

    async def _sweep(self) -> None:
        while True:
            try:
                while await self._in_thread("", self._book.sweep) == STEP:
                    pass
            except StoreUnavailable:
                pass  # the regular look at the keys logs the failure
            except Exception:
                log.exception("a bug: old responses cannot be deleted")
            await asyncio.sleep(SWEEP_EVERY)

    async def _in_thread(self, account: str, call: Callable[[], _Result]) -> _Result:
        async with self._turns.setdefault(account.partition("/")[0], asyncio.Lock()):
            return await asyncio.get_running_loop().run_in_executor(self._thread, call)
