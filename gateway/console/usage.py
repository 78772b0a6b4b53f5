"""Usage: the pages that show who used what, from the sums of hours and days (gateway.usage.sums). An operator sees all
of it, and a key's owner that of the key, with its limits.
"""

import csv
import io
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import NamedTuple

from markupsafe import Markup
from starlette.responses import Response

from gateway.console.ask import Ask
from gateway.console.pages import Pages, answer, count, moment, seconds, short
from gateway.console.plots import MOST, Line, draw
from gateway.errors import BadRequest
from gateway.keys.known import Key
from gateway.limits.rules import quotas_used
from gateway.usage.rows import LISTED, UsageBook, inert
from gateway.usage.sums import BYS, DAY, HOUR, By, Span, Sums, Total, begins

TABLE = 100  # rows of the page's table
FILE = 10_000  # rows of its CSV, which takes less than a second
ALL = "all requests"
WORDS = {"24h": "24 hours", "7d": "7 days", "month": "this month", "last": "last month", "year": "12 months"}
NOT_OF_KEYS = ("year",)  # there may be 100,000 keys or users, each with its sums
COLUMNS = "requests", "finished", "failed", "tokens_in", "tokens_out", "mean_ms", "longest_ms", "mean_ttft_ms"
_values = attrgetter(*COLUMNS)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a visitor wants to see: the sums for the table, and those for the plots. `over_time`: a file has those for
    the plots."""

    by: By
    name: str  # of the span
    table: Span
    plots: Span
    over_time: bool


class Plot(NamedTuple):
    """A drawing, its title, the names of its lines, and the same values in rows: when each part of the time begins, and
    the value of each line."""

    title: str
    drawing: Markup
    labels: tuple[str, ...]
    rows: list[tuple[str, list[str]]]


def asked(query: Mapping[str, str], now: Callable[[], float] = time.time) -> Asked:
    """Return what the query of a page asks for. Raises BadRequest."""
    by, name, over = query.get("by", "all"), query.get("span", "24h"), query.get("over", "")
    found = next((it for it in BYS if it == by), None)
    if found is None or name not in WORDS or over not in ("", "time"):
        raise BadRequest(
            f"'by' is one of {', '.join(BYS)}, 'span' is one of {', '.join(WORDS)}, and 'over' is empty or 'time'."
        )
    if found in ("key", "user") and name in NOT_OF_KEYS:
        raise BadRequest(f"Usage by {found} covers at most a month. Choose a shorter range.")
    return Asked(found, name, *_spans(name, int(now() * 1000)), over == "time")


def _spans(name: str, now: int) -> tuple[Span, Span]:
    """What the table and the plots of a span are read from."""
    today, month = begins("day", now), begins("month", now)
    if name == "24h":
        hour = begins("hour", now)
        hours = Span("hour", tuple(range(hour - 23 * HOUR, hour + 1, HOUR)), HOUR)
        return hours, hours
    if name == "7d":
        days = Span("day", tuple(range(today - 6 * DAY, today + 1, DAY)), DAY)
        return days, days
    if name == "year":
        days = Span("day", tuple(range(today - 364 * DAY, today + 1, DAY)), 7 * DAY)
        return days, days
    end = today + DAY
    if name == "last":
        end, month = month, begins("month", month - 1)
    return Span("month", (month,), DAY), Span("day", tuple(range(month, end, DAY)), DAY)


class UsagePages:
    """Show usage. Runs in the console's process. `listed` are the ids of the keys of STACK_API_KEYS."""

    def __init__(self, sums: Sums, usage: UsageBook, listed: frozenset[str], pages: Pages) -> None:
        self._sums = sums
        self._usage = usage
        self._listed = listed
        self._pages = pages

    def show(self, ask: Ask) -> Response:
        """Return everybody's usage, for operators."""
        it = asked(ask.query)
        table = self._table(it)
        drawn = self._plots(it, table)
        return self._pages.page("usage", ask.visitor, table=table, plots=drawn, asked=it, words=WORDS, bys=BYS)

    def csv(self, ask: Ask) -> Response:
        """Return everybody's usage as CSV."""
        it = asked(ask.query)
        return _file(f"usage-{it.by}-{it.name}", it, self._csv(it))

    def own(self, ask: Ask) -> Response:
        """Return the usage, limits and quotas of the visitor's key."""
        key = _key(ask)
        it = asked({**ask.query, "by": "key"})
        table = self._table(it, 1, key.id)
        return self._pages.page(
            "own", ask.visitor, key=key, limits=asdict(key.limits), used=quotas_used(self._usage, key.id),
            plots=self._plots(it, table), table=table, asked=it, words=WORDS, not_of_keys=NOT_OF_KEYS,
        )  # fmt: skip

    def own_csv(self, ask: Ask) -> Response:
        """Return the usage of the visitor's key as CSV."""
        it = asked({**ask.query, "by": "key"})
        return _file(f"usage-{it.name}", it, self._csv(it, _key(ask).id))

    def _table(self, it: Asked, most: int = TABLE, only: str | None = None) -> list[tuple[str, Total]]:
        """The totals by name, those with the most requests first, each with what a person calls it."""
        return [(self._label(it.by, total), total) for total in self._sums.top(it.by, it.table, most, only)]

    def _plots(self, it: Asked, table: list[tuple[str, Total]]) -> list[Plot]:
        """Requests, tokens, failures and latencies over time, of the first names in the table."""
        first = table[:MOST]
        found = self._sums.over_time(it.by, it.plots, [total.name for _, total in first])
        times, none = it.plots.parts(), Total("")
        labels = tuple(label for label, _ in first)

        def lines(value: Callable[[Total], float | None]) -> list[Line]:
            return [Line(label, [value(found[of.name].get(at, none)) for at in times]) for label, of in first]

        begins = [_begins(at, it.plots) for at in times]

        def plot(
            title: str, drawn: list[Line], axis: Callable[[float], str], words: Callable[[float | None], str]
        ) -> Plot:
            rows = [(at, [words(line.values[row]) for line in drawn]) for row, at in enumerate(begins)]
            return Plot(title, draw(title, times, it.plots.part, drawn, axis), labels, rows)

        return [
            plot("Requests", lines(lambda of: of.requests), short, count),
            plot("Tokens of prompts and answers", lines(lambda of: of.tokens_in + of.tokens_out), short, count),
            plot("Failed requests", lines(lambda of: of.failed), short, count),
            plot("Mean duration of a request", lines(lambda of: of.mean_ms), seconds, seconds),
            plot("Mean time to the first token", lines(lambda of: of.mean_ttft_ms), seconds, seconds),
        ]

    def _csv(self, it: Asked, only: str | None = None) -> str:
        """The whole table as CSV; or, over time, each part of the time of the names with the most requests. A text that
        a spreadsheet would take for a formula has an apostrophe before it."""
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")

        def write(label: str, total: Total, name: str, *begins: str) -> None:
            lines.writerow([*begins, inert(name), inert(label), *map(_whole, _values(total))])

        lines.writerow([*(["begins"] if it.over_time else []), it.by, "name", *COLUMNS])
        if not it.over_time:
            for label, total in self._table(it, FILE, only):
                write(label, total, total.name)
            return text.getvalue()
        table, none = self._table(it, TABLE, only), Total("")
        found = self._sums.over_time(it.by, it.plots, [total.name for _, total in table])
        for at in it.plots.parts():
            for label, of in table:
                write(label, found[of.name].get(at, none), of.name, _begins(at, it.plots))
        return text.getvalue()

    def _label(self, by: By, total: Total) -> str:
        if by == "all":
            return ALL
        if by == "key" and total.name in self._listed:
            return f"{LISTED} ({total.name})"
        return total.label or (f"({total.name})" if total.name else "(none)")


def _key(ask: Ask) -> Key:
    if ask.visitor.key is None:
        raise TypeError("only a key's owner has an own usage")  # the routes see to it
    return ask.visitor.key


def _file(name: str, it: Asked, text: str) -> Response:
    full = f"{name}-over-time.csv" if it.over_time else f"{name}.csv"
    disposition = {"content-disposition": f'attachment; filename="{full}"'}
    return answer(text.encode(), "text/csv; charset=utf-8", more=disposition)


def _begins(at: int, span: Span) -> str:
    """Return the UTC time at which a part of the span begins, or its day."""
    return moment(at)[:16] if span.part < DAY else moment(at)[:10]


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)
