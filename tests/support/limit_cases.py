"""The cases for the arithmetic of limits, which is there twice: in Python and in PostgreSQL."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gateway.keys.limit_fields import Limits


class Ask(NamedTuple):
    """A request with so many tokens. `gets` is "in"; or the limit that refuses it, with the seconds to wait, if any."""

    tokens: int = 1
    gets: str = "in"


class Enter(NamedTuple):
    """The first step of a request alone: its body is not read yet."""


class SetAside(NamedTuple):
    """The second step of the request that entered last."""

    tokens: int
    gets: str = "in"


class End(NamedTuple):
    """The request of that number, from 0, took so many tokens."""

    number: int
    tokens: int


class Pass(NamedTuple):
    """So many seconds pass. The clock on the wall is also set forward or back by so many days. PostgreSQL's book
    remembers for a second that a key has nothing left."""

    seconds: float = 0
    days: int = 0


class Change(NamedTuple):
    """The key has these limits from now on."""

    limits: Limits


class Recorded(NamedTuple):
    """The store's records know a request of that long ago, before this key was first seen."""

    days_ago: float
    tokens_in: int | None
    tokens_out: int | None


LimitStep = Ask | Enter | SetAside | End | Pass | Change | Recorded

# The clock on the wall begins at noon on the 30th of a month.
LIMITS: Mapping[str, tuple[Limits, Sequence[LimitStep]]] = {
    "a bucket of requests holds its limit and refills evenly": (
        Limits(requests_per_minute=3),
        [
            Ask(),
            Ask(),
            Ask(),
            Ask(gets="requests per minute 20"),
            Pass(19.9),
            Ask(gets="requests per minute 0.1"),
            Pass(0.1),
            Ask(),
            Ask(gets="requests per minute 20"),
        ],
    ),
    "a thirtieth of a minute is exact in floats": (
        Limits(requests_per_minute=7),
        [
            *[Ask()] * 7,
            Pass(60 / 7),
            Ask(),
            Pass(60 / 7),
            Ask(),
            Pass(60 / 7 - 0.01),
            Ask(gets="requests per minute 0.01"),
        ],
    ),
    "a full bucket holds no more than its limit": (
        Limits(requests_per_minute=2),
        [Pass(3600), Ask(), Ask(), Ask(gets="requests per minute 30")],
    ),
    "tokens that were set aside too many come back": (
        Limits(tokens_per_minute=100),
        [Ask(60), Ask(60, "tokens per minute 12"), End(0, 10), Ask(60), End(1, 60), Ask(60, "tokens per minute 18")],
    ),
    "a debt is paid before the next request": (
        Limits(tokens_per_minute=100),
        [Ask(100), End(0, 300), Ask(1, "tokens per minute 120.6"), Pass(120.6), Ask(1)],
    ),
    "a request of more than a whole bucket is let in when that is full": (
        Limits(tokens_per_minute=100),
        [Ask(1), End(0, 1), Ask(5000, "tokens per minute 0.6"), Pass(0.6), Ask(5000), End(1, 100), Pass(60), Ask(5000)],
    ),
    "while a request runs nobody waits longer than a minute for tokens": (
        Limits(tokens_per_minute=100),
        [Ask(500), Ask(1, "tokens per minute 60"), End(0, 500), Ask(1, "tokens per minute 240.6")],
    ),
    "concurrent requests": (
        Limits(concurrent=2),
        [Ask(), Ask(), Ask(gets="concurrent requests 0.5"), End(0, 1), Ask(), Ask(gets="concurrent requests 0.5")],
    ),
    "of several limits the longest wait is told": (
        Limits(requests_per_minute=2, concurrent=2),
        [Ask(), Ask(), Ask(gets="requests per minute 30"), Pass(29.8), Ask(gets="concurrent requests 0.5")],
    ),
    "the last request of a quota may exceed it and is waited for": (
        Limits(tokens_per_day=100),
        [
            Ask(60),
            Ask(60),
            Ask(1, "tokens per day, and all of them are used or reserved for its running requests 0.5"),
            End(0, 60),
            Ask(1, "tokens per day, and all of them are used or reserved for its running requests 1"),
            End(1, 60),
            Ask(1, "spent"),
        ],
    ),
    "what a running request did not need comes back to the quota": (
        Limits(tokens_per_month=100),
        [Ask(100), End(0, 99), Ask(1), End(1, 1), Ask(1, "spent")],
    ),
    "a quota begins again with the day and the month": (
        Limits(tokens_per_day=100, tokens_per_month=150),
        [
            Ask(100),
            End(0, 100),
            Ask(1, "spent"),
            Pass(2, days=1),
            Ask(100),
            End(1, 100),
            Pass(2, days=1),
            Ask(50),
            End(2, 50),
            Pass(2, days=1),
            Ask(1, "spent"),
            Pass(2, days=29),
            Ask(1),
        ],
    ),
    "a clock that is set back begins no day and what is used stays used": (
        Limits(tokens_per_day=100),
        [
            Ask(10),
            End(0, 10),
            Pass(2, days=1),
            Ask(60),
            End(1, 60),
            Pass(2, days=-1),
            Ask(1000),
            End(2, 30),
            Ask(10),
            End(3, 10),
            Ask(1, "spent"),
            Pass(2, days=1),
            Ask(1, "spent"),
            Pass(2, days=1),
            Ask(1),
        ],
    ),
    "a request that ends on another day is counted where it was charged": (
        Limits(tokens_per_day=100),
        [
            Ask(50),
            Pass(2, days=1),
            Ask(50),
            End(0, 5000),
            Ask(49),
            End(1, 50),
            End(2, 49),
            Ask(1),
            End(3, 1),
            Ask(1, "spent"),
        ],
    ),
    "a request whose body comes after midnight is counted once": (
        Limits(tokens_per_day=100),
        [
            Enter(),
            Pass(2, days=1),
            Ask(10),
            End(1, 10),
            SetAside(500),
            End(0, 20),
            Ask(69),
            End(2, 69),
            Ask(1),
            End(3, 1),
            Ask(1, "spent"),
        ],
    ),
    "a changed limit keeps the account": (
        Limits(tokens_per_minute=100),
        [
            Ask(50),
            End(0, 50),
            Change(Limits(tokens_per_minute=1000)),
            Ask(501, "tokens per minute 0.06"),
            Ask(500),
            End(1, 500),
            Change(Limits(concurrent=1)),
            Ask(),
            Ask(gets="concurrent requests 1"),
        ],
    ),
    "records of before count whatever the engine told": (
        Limits(tokens_per_day=100, tokens_per_month=1000),
        [
            Recorded(0.1, 30, None),
            Recorded(0.2, None, 30),
            Recorded(0.3, 30, 9),
            Recorded(0.6, 800, 100),
            Recorded(31, 9999, 1),
            Ask(1),
            End(0, 1),
            Ask(1, "spent"),
            Pass(2, days=1),
            Ask(1),
        ],
    ),
    "records of before count in the month": (
        Limits(tokens_per_month=1000),
        [
            Recorded(0.1, 99, None),
            Recorded(3, None, 800),
            Recorded(29.4, 100, None),
            Recorded(29.6, 9999, 1),
            Ask(1),
            End(0, 1),
            Ask(1, "spent"),
        ],
    ),
}
