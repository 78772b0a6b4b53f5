"""Responses: read and write stored responses for the API, without blocking the event loop.

One thread does all work with the database, so only the items of one conversation are in memory at a time.
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

from gateway import logs
from gateway.errors import NotFound, StoreUnavailable
from gateway.responses.book import STEP, ResponseBook, Rules, Stored
from gateway.settings import Settings
from gateway.store.store import Store
from gateway.translation import responses as translation

SWEEP_EVERY = 60.0  # seconds between two looks for responses that are too old
# An item id of the gateway; it contains the unique part of its response's id
_ITEM_ID = re.compile(r"[a-z]+_(.+)_[0-9]+")
_Result = TypeVar("_Result")
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
    All of them were `size` bytes of JSON."""

    items: Sequence[dict[str, Any]] = ()
    kept: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    size: int = 0


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

    async def history(self, account: str, previous_id: str | None, referred: Sequence[str]) -> Past:
        """Return what a request continues and refers to. An item that is not found is left out of `kept`.

        Raises OpenAI's BadRequest if the previous response, or one before it, is not stored, and TooLarge if the
        conversation is larger than a request's body may be.
        """
        if not self.on or (previous_id is None and not referred):
            return Past()
        return await self._in_thread(lambda: self._past(account, previous_id, referred))

    async def keep(self, account: str, writer: Written, asked: Wish) -> bool:
        """Store a finished response, if its request wants that. Call it before the answer's last event is sent, because
        the next request may refer to the response within milliseconds.

        Returns whether the response can be found from now on. Never raises, because the answer is complete without it.
        """
        if not self.on or not asked.store:
            return False
        response, items, previous = writer.response(), writer.input_items(), asked.previous_response_id
        try:
            trouble = await self._in_thread(lambda: self._book.add(account, response, items, previous))
        except StoreUnavailable as exc:
            trouble = str(exc.code)
        if trouble:
            logs.event("response_not_stored", {"key_id": account, "reason": trouble}, "warning")
        return not trouble

    async def show(self, account: str, response_id: str) -> Stored:
        """Return a stored response. Raises NotFound, also for one of another account."""
        found = await self._in_thread(lambda: self._book.find(account, [response_id])) if self.on else {}
        if response_id not in found:
            raise self._unknown(response_id)
        return found[response_id]

    async def delete(self, account: str, response_id: str) -> None:
        """Delete a stored response. Raises NotFound, also for one of another account."""
        if not self.on or not await self._in_thread(lambda: self._book.delete(account, response_id)):
            raise self._unknown(response_id)

    def _past(self, account: str, previous_id: str | None, referred: Sequence[str]) -> Past:
        chain: list[Stored] = []
        if previous_id is not None:
            chain, missing = self._book.chain(account, previous_id)
            if missing is not None:
                raise translation.unknown_previous(missing)
        items = [item for it in chain for item in it.all_items]
        makers = {f"resp_{match[1]}" for it in referred if (match := _ITEM_ID.fullmatch(it))}
        others = self._book.find(account, makers) if makers else {}
        known = {it["id"]: it for it in items if type(it.get("id")) is str}
        known |= {it["id"]: it for stored in others.values() for it in stored.all_items if type(it.get("id")) is str}
        size = sum(it.size for it in (*chain, *others.values()))
        return Past(items, {it: known[it] for it in referred if it in known}, size)

    def _unknown(self, response_id: str) -> NotFound:
        why = "" if self.on else " This gateway stores no responses (STACK_RESPONSES_DAYS is 0)."
        return NotFound(f"Response with id '{response_id[:80]}' not found.{why}")

    async def _sweep(self) -> None:
        while True:
            try:
                while await self._in_thread(self._book.sweep) == STEP:
                    pass
            except StoreUnavailable:
                pass  # the regular look at the keys logs the failure
            except Exception:
                log.exception("a bug: old responses cannot be deleted")
            await asyncio.sleep(SWEEP_EVERY)

    async def _in_thread(self, call: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)
