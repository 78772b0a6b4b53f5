"""Recorder: move a worker's exchanges into rows in the store. A journal holds them until then.

Nothing here waits on the event loop. The beginning and the end of a request are one line each in the journal, and a
thread moves finished ones into the store once a second. While the store is unreachable, they stay in the journal.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self

from gateway import logs
from gateway.errors import ClientLeft, StoreUnavailable
from gateway.exchange import Ending, Exchange, Running
from gateway.metrics import Metrics
from gateway.settings import Settings
from gateway.store.store import open_store
from gateway.usage import running
from gateway.usage.journal import Journal, Record, adopt
from gateway.usage.rows import DAY, UsageBook

EVERY = 1.0  # seconds between two looks at the journal
LOST = "worker_lost"  # the outcome of a request whose worker was killed
PRUNE_EVERY = 3600.0  # seconds; every worker deletes old rows, and mostly finds none
PRUNE_STEPS = 10  # steps before the thread looks at the journal again
FAREWELL = 3.0  # seconds for the last rows when the worker ends; the next worker saves what is left

log = logging.getLogger("stack")


class Recorder:
    """Record the usage of one worker. Use it with `async with`."""

    def __init__(
        self, settings: Settings, book: UsageBook, metrics: Metrics, running: Callable[[], list[Running]]
    ) -> None:
        self._home = settings.journals
        self._book = book
        self._retention = settings.stack_usage_retention_days
        self._metrics = metrics
        self._running = running
        self._journal = Journal(self._home)
        self._stopping = threading.Event()
        self._dropped = 0  # the journal's dropped records that were already reported
        self._trouble = ""
        self._prune_at = 0.0

    async def __aenter__(self) -> Self:
        with suppress(OSError):  # the thread tries again
            self._journal.open()
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)
        self._thread.start()
        self._telling = asyncio.create_task(self._tell_running())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._telling.cancel()
        self._stopping.set()
        await asyncio.to_thread(self._thread.join, FAREWELL)

    def started(
        self,
        exchange: Exchange,
        route: str,
        arm: str | None,
        estimated: int,
        first: Callable[[Record], object] = lambda _: None,
    ) -> Record:
        """Record that an exchange with an engine begins. `estimated` is the estimate of its prompt, in tokens. `first`:
        see Journal.begin. Returns the record for `finished`, which the caller must call."""
        record: Record = {
            "at": time.time_ns() // 1_000_000,
            "request_id": exchange.request_id,
            "key_id": exchange.key_id,
            "owner": exchange.owner,
            "user_id": exchange.user or None,
            "kind": exchange.kind,
            "api": exchange.api,
            # PostgreSQL refuses a NUL in a text, and an engine's model name may hold one
            "model": route.replace("\0", ""),
            "arm": arm,
            "stream": exchange.stream,
            "documents": exchange.size if exchange.endpoint.unit == "documents" else None,
            "tokens_in": estimated,
        }
        self._journal.begin(record, first)
        return record

    def finished(self, record: Record, ending: Ending) -> None:
        """Record that an exchange has ended. A second call replaces the ending."""
        started = ending.exchange.started
        first = ending.first_token_at
        usage = ending.usage
        record |= {
            "outcome": ending.outcome,
            "status": _status(ending),
            "engine": ending.engine,
            "tokens_in": ending.tokens_in,
            "tokens_out": ending.tokens_out,
            "cached": usage.cached if usage else 0,
            **_amount(ending),
            "exact": ending.exact,
            "queued_ms": ending.queued_ms,
            "ttft_ms": round((first - started) * 1000) if first is not None else None,
            "duration_ms": round((ending.ended - started) * 1000),
            "attempts": ending.attempts,
            "resumes": ending.resumes,
            "amends": "outcome" in record,
        }
        self._journal.end(record)

    async def charged(self, row: str) -> int:
        """Return the tokens, in and out, that the store has of a row; 0 where it has none, or can't be asked."""
        try:
            return await asyncio.to_thread(self._book.tokens, row)
        except StoreUnavailable:
            return 0

    async def _tell_running(self) -> None:
        told = False
        while True:
            await asyncio.sleep(EVERY)
            relays = self._running()
            if (relays or told) and self._journal.directory is not None:
                with suppress(OSError):
                    running.tell(self._journal.directory, relays)
                told = bool(relays)

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.wait(EVERY):
            self._work()
        self._work()
        self._journal.close()

    def _work(self) -> None:
        try:
            self._journal.drain(self._book.add)
            adopt(self._home, partial(_adopted, self._book))
            self._prune()
        except (StoreUnavailable, OSError) as exc:
            self._tell(f"{exc.__cause__ or exc}")
        except Exception:
            log.exception("a bug: the usage cannot be saved")
        else:
            self._tell("")
        if dropped := self._journal.dropped - self._dropped:
            self._dropped += dropped
            self._metrics.usage_dropped(dropped)
            logs.event("usage_dropped", {"count": dropped}, "warning")

    def _prune(self) -> None:
        if time.monotonic() >= self._prune_at:
            steps = self._book.prune(time.time_ns() // 1_000_000 - self._retention * DAY)
            if len(list(islice(steps, PRUNE_STEPS))) < PRUNE_STEPS:
                self._prune_at = time.monotonic() + PRUNE_EVERY

    def _tell(self, trouble: str) -> None:
        """Log once that the trouble has begun, and once that it is over."""
        if trouble and not self._trouble:
            log.error("the usage cannot be saved, and waits in the journal: %s", trouble)
        elif self._trouble and not trouble:
            log.info("the usage is saved again")
        if bool(trouble) != bool(self._trouble):
            self._metrics.store_trouble(present=bool(trouble))
        self._trouble = trouble


def recover(settings: Settings) -> None:
    """Save the records that an earlier gateway has left, if the store is available. Called before a worker counts what
    was used."""
    store = open_store(settings)
    book = UsageBook(store)
    try:
        adopt(settings.journals, partial(_adopted, book))
    except (StoreUnavailable, OSError) as exc:
        log.error("the usage from before the start cannot be saved yet: %s", exc.__cause__ or exc)  # noqa: TRY400  no bug of ours
    finally:
        store.close()


def _adopted(book: UsageBook, records: list[Record], directory: Path) -> None:
    """Save the records of a dead process. The requests without an end were lost with their worker. Their tokens so far
    are those that the worker reported once a second."""
    told = {it.row: it for it in running.read(directory)}
    for record in records:
        if "outcome" not in record:
            record |= {"outcome": LOST, "exact": False}
            if it := told.get(record["id"]):
                record |= {"engine": it.engine, "tokens_out": it.tokens, "duration_ms": round(it.seconds * 1000)}
    book.add(records)


def _amount(ending: Ending) -> dict[str, int]:
    """What it took in units of its own that are known at its end only, by the column."""
    amount, unit = ending.amount, ending.exchange.endpoint.unit
    if amount is None:
        return {}
    return {"audio_ms": round(amount * 1000)} if unit == "seconds" else {"characters": round(amount)}


def _status(ending: Ending) -> int:
    if ending.error is None or (ending.begun and not isinstance(ending.error, ClientLeft)):
        return 200
    return ending.error.status
