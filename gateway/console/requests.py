"""Requests: the pages that list the last requests, and tell what happened to one of them."""

from typing import Any
from urllib.parse import quote

from starlette.responses import Response

from gateway.console.ask import Ask
from gateway.console.door import PATH
from gateway.console.now import WAITS
from gateway.console.pages import Pages, redirect
from gateway.errors import GatewayBusy, StoreUnavailable
from gateway.exchange import Running
from gateway.keys.book import Keybook
from gateway.recent.captures import Capture
from gateway.recent.recent import Memory
from gateway.settings import Settings
from gateway.shared_memory import BusyError
from gateway.usage import running
from gateway.usage.rows import UsageBook

LOOKED = 1000  # of the last requests are looked through
ROWS = 50  # of them are listed
ID = 64  # characters of a request's id
# What each step is called. A step whose name is not here is shown by its own.
STEPS = {
    "asked": "sent to the engine",
    "retry": "retried at the same engine",
    "fallback": "sent to another engine",
    "waited": "waited until an engine was back",
    "queued_again": "put back into the queue, because the engine was full",
    "resume": "broke off, and another engine is to continue it",
    "resume_ended": "the continuation ended",
}
ORDERS = {"newest": "the newest", "slowest": "the slowest", "failed": "the failed ones"}


class RequestPages:
    """Show requests. Runs in the console's process."""

    def __init__(self, settings: Settings, recent: Memory, usage: UsageBook, book: Keybook, pages: Pages) -> None:
        self._home = settings.journals
        self._recent = recent
        self._usage = usage
        self._book = book
        self._pages = pages

    def listing(self, ask: Ask) -> Response:
        """Return the page of the last requests. With an id, redirect to the page of that request."""
        if wanted := ask.query.get("id", "").strip():
            return redirect(f"{PATH}/requests/{quote(wanted[:ID], safe='')}")
        order = ask.query.get("order", "newest")
        found = self._latest()
        if order == "slowest":
            found.sort(key=lambda it: -it["duration_ms"])
        elif order == "failed":
            found = [it for it in found if it["outcome"] not in ("finished", "client_left")]
        found = found[:ROWS]
        called = self._called([it["key"] for it in found])
        return self._pages.page(
            "requests", ask.visitor, requests=found, called=called, order=order, orders=ORDERS, looked=LOOKED
        )

    def show(self, ask: Ask) -> Response:
        """Return the page of one request: its steps, its running state or its usage row, whichever exists."""
        wanted = ask.path["request_id"][:ID]
        course = self._course(wanted)
        runs = None if course else next((it for it in running.look(self._home) if it.request_id == wanted), None)
        row, away = None, False
        try:
            if course is None or course["row"]:
                row = self._usage.of_request(wanted, course["row"] if course else None)
        except StoreUnavailable:
            if not (course or runs or self._capture(wanted, None)):
                raise
            away = True
        key = course["key"] if course else runs.key_id if runs else row["key_id"] if row else None
        capture = self._capture(wanted, key)
        called = self._called([key] if key else [])
        status = 200 if course or runs or row else 404
        return self._pages.page(
            "request", ask.visitor, status, wanted=wanted, course=course, runs=runs, row=row, key=key, called=called,
            facts=_facts(course, row, runs), steps=STEPS, capture=capture, away=away, waits=WAITS,
        )  # fmt: skip

    def _latest(self) -> list[dict[str, Any]]:
        try:
            return self._recent.courses.latest(LOOKED)
        except BusyError as exc:
            raise GatewayBusy("The gateway is too busy. Try again shortly.") from exc

    def _course(self, wanted: str) -> dict[str, Any] | None:
        try:
            return self._recent.courses.of(wanted)
        except BusyError as exc:
            raise GatewayBusy("The gateway is too busy. Try again shortly.") from exc

    def _capture(self, wanted: str, key: str | None) -> Capture | None:
        try:
            return self._recent.captures.of(wanted, key)
        except BusyError as exc:
            raise GatewayBusy("The gateway is too busy. Try again shortly.") from exc

    def _called(self, ids: list[str]) -> dict[str, tuple[str, str]]:
        try:
            return self._book.called(set(ids))
        except StoreUnavailable:
            return {}


def _facts(course: dict[str, Any] | None, row: dict[str, Any] | None, runs: Running | None) -> dict[str, Any]:
    """What is told of a request in either place, by the same names."""
    if course is not None:
        return course
    if row is not None:
        return row
    if runs is not None:
        return {"model": runs.model, "engine": runs.engine, "kind": runs.kind, "stream": runs.stream}
    return {}
