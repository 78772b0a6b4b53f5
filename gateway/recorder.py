"""Recorder: from what a worker does to rows in the store. A journal holds what isn't there yet.

Nothing here waits on the event loop: a request's beginning and end are a line each in the journal, and a thread moves
what has ended into the store, once a second. While the store can't be used, they wait in the journal.
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

from gateway import live, logs
from gateway.errors import ClientLeft, StoreUnavailable
from gateway.exchange import Ending, Exchange, Running
from gateway.journal import Journal, Record, adopt
from gateway.metrics import Metrics
from gateway.settings import Settings
from gateway.store import open_store
from gateway.usage import DAY, UsageBook

EVERY = 1.0  # seconds between two looks at the journal
PRUNE_EVERY = 3600.0  # seconds; each worker does, and mostly finds nothing
PRUNE_STEPS = 10  # at a time, then the journal is looked at again
FAREWELL = 3.0  # seconds for the last rows when the worker ends; what is left, the next one saves

log = logging.getLogger("stack")


class Recorder:
    """One worker's. Use it with `async with`."""

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
        self._dropped = 0  # of the journal's, those that were told
        self._trouble = ""
        self._prune_at = 0.0

    async def __aenter__(self) -> Self:
        with suppress(OSError):  # the thread goes on trying
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

    def started(self, exchange: Exchange, route: str, arm: str | None, estimated: int) -> Record:
        """An exchange with an engine begins, with a prompt of so many tokens, as far as one can tell. What is returned
        is for `finished`, which must follow."""
        record: Record = {
            "at": time.time_ns() // 1_000_000,
            "request_id": exchange.request_id,
            "key_id": exchange.key_id,
            "kind": exchange.kind,
            "model": route.replace("\0", ""),  # PostgreSQL's texts hold none; an engine may call a model so
            "arm": arm,
            "stream": exchange.stream,
            "tokens_in": estimated,
        }
        self._journal.begin(record)
        return record

    def finished(self, record: Record, ending: Ending) -> None:
        """It is over. A second time: it is, and ended otherwise."""
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
            "exact": usage is not None,
            "queued_ms": ending.queued_ms,
            "ttft_ms": round((first - started) * 1000) if first is not None else None,
            "duration_ms": round((ending.ended - started) * 1000),
            "attempts": ending.attempts,
            "resumes": ending.resumes,
            "amends": "outcome" in record,
        }
        self._journal.end(record)

    async def _tell_running(self) -> None:
        told = False
        while True:
            await asyncio.sleep(EVERY)
            running = self._running()
            if (running or told) and self._journal.directory is not None:
                with suppress(OSError):
                    live.tell(self._journal.directory, running)
                told = bool(running)

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
            log.exception("a bug: the usage can't be saved")
        else:
            self._tell("")
        if dropped := self._journal.dropped - self._dropped:
            self._dropped += dropped
            self._metrics.usage_dropped(dropped)
            logs.event("usage_dropped", {"count": dropped})

    def _prune(self) -> None:
        if time.monotonic() >= self._prune_at:
            steps = self._book.prune(time.time_ns() // 1_000_000 - self._retention * DAY)
            if len(list(islice(steps, PRUNE_STEPS))) < PRUNE_STEPS:
                self._prune_at = time.monotonic() + PRUNE_EVERY

    def _tell(self, trouble: str) -> None:
        """Once when it begins, and once when it is over."""
        if trouble and not self._trouble:
            log.error("the usage can't be saved, and waits in the journal: %s", trouble)
        elif self._trouble and not trouble:
            log.info("the usage is saved again")
        self._trouble = trouble


def recover(settings: Settings) -> None:
    """Save what an earlier gateway has left, where the store can be used: before any worker counts what was used."""
    store = open_store(settings)
    book = UsageBook(store)
    try:
        adopt(settings.journals, partial(_adopted, book))
    except (StoreUnavailable, OSError) as exc:
        log.error("the usage of before can't be saved yet: %s", exc.__cause__ or exc)  # noqa: TRY400  no bug of ours
    finally:
        store.close()


def _adopted(book: UsageBook, records: list[Record], directory: Path) -> None:
    """Those that have no end were lost with their worker; what was made of their answers, it said once a second."""
    running = {it.row: it for it in live.read(directory)}
    for record in records:
        if "outcome" not in record:
            record |= {"outcome": "worker_lost", "exact": False}
            if it := running.get(record["id"]):
                record |= {"engine": it.engine, "tokens_out": it.tokens, "duration_ms": round(it.seconds * 1000)}
    book.add(records)


def _status(ending: Ending) -> int:
    if ending.error is None or (ending.begun and not isinstance(ending.error, ClientLeft)):
        return 200
    return ending.error.status
