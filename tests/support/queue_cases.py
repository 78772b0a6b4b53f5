"""The cases for the arithmetic of queues, which is there twice: in Python and in PostgreSQL."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tests.support.limit_cases import Pass


class Queue(NamedTuple):
    """A request of a key. `gets` is "slot", "waits", or the reason of a refusal with the seconds to wait."""

    key: str
    gets: str = "waits"
    weight: int = 1
    wait: float = 60
    mark: int = 0
    ahead: bool = False
    model: int = 0


class Loaded(NamedTuple):
    """A model was loaded, in that many seconds, and displaced others; or its load `failed` in that time. That gives
    slots to requests of these keys."""

    model: int
    displaced: Sequence[int] = ()
    took: float = 10.0
    gives: str = ""
    failed: bool = False


class Look(NamedTuple):
    """A worker looks whether requests can get slots by now. That gives slots to the requests of these keys."""

    gives: str = ""


class Leave(NamedTuple):
    """The request of that number, from 0 and without those that were refused, is over, or waits no longer. Its leaving
    gives slots to the requests of these keys."""

    number: int
    gives: str = ""
    served: bool = True


class Again(NamedTuple):
    """A request of a key has waited in vain, and is told to come back after so many seconds."""

    key: str
    after: float
    weight: int = 1
    mark: int = 0


QueueStep = Queue | Loaded | Look | Leave | Again | Pass
WAITING = 8  # requests that may wait
_FULL = [Queue("h", "slot"), *(Queue(str(number)) for number in range(WAITING))]
_SCARCE = [Loaded(1), Pass(20), Loaded(2, [1]), Pass(20)]
_SLOW = [Queue("h", "slot"), Pass(10), Leave(0)]  # a request takes ten seconds

# By the name of a case: the engine's slots, and what happens.
QUEUES: Mapping[str, tuple[int, Sequence[QueueStep]]] = {
    "a request waits only while all slots are taken": (
        2,
        [Queue("a", "slot"), Queue("a", "slot"), Queue("b"), Leave(0, "b"), Leave(1), Queue("c", "slot")],
    ),
    "a new key comes before the second request of a flood": (
        1,
        [
            Queue("h", "slot"),
            Queue("f"),
            Queue("f"),
            Queue("f"),
            Queue("n"),
            Leave(0, "f"),
            Leave(1, "n"),
            Leave(4, "f"),
            Leave(2, "f"),
            Leave(3),
        ],
    ),
    "the users of a key share its turns, and take none of another key's": (
        1,
        [
            Queue("h", "slot"),
            *[Queue("k/a")] * 2,
            Queue("k/b"),  # comes before a's second one, and gets its turn
            Queue("o"),
            Queue("o"),
            Leave(0, "k/a"),
            Leave(1, "o"),
            Leave(4, "k/b"),
            Leave(3, "o"),
            Leave(5, "k/a"),
        ],
    ),
    "a user who sends one request after another is served in turn with one who floods": (
        1,
        [
            Queue("k/a", "slot"),
            *[Queue("k/a")] * 2,
            Queue("k/b"),
            Leave(0, "k/b"),
            Queue("k/b"),  # it has had a turn
            Leave(3, "k/a"),
            Leave(1, "k/b"),
            Leave(4, "k/a"),
        ],
    ),
    "a user's flood leaves places for the other users of its key": (
        1,
        [
            Queue("h", "slot"),
            *[Queue("k/a")] * 3,
            Queue("k/a", "share 1.25"),
            Queue("k/b"),
            Queue("o"),
        ],
    ),
    "turns go by weight": (
        1,
        [
            Queue("h", "slot"),
            Queue("l"),
            Queue("l"),
            *[Queue("w", weight=4)] * 3,
            Leave(0, "l"),
            Leave(1, "w"),
            Leave(3, "w"),
            Leave(4, "w"),
            Leave(5, "l"),
        ],
    ),
    "a request that resumes comes before all and past the bounds": (
        1,
        [*_FULL, Queue("r", ahead=True), Queue("9", "full 11.25"), Leave(0, "r"), Leave(9, "0")],
    ),
    "a request that waited too long gets no slot": (
        1,
        [Queue("h", "slot"), Queue("a", wait=5), Queue("b"), Pass(5), Leave(0, "b")],
    ),
    "a request that leaves the queue moves its key's others up": (
        1,
        [
            Queue("h", "slot"),
            Queue("a"),
            Queue("a"),
            Queue("a"),
            Queue("b"),
            Queue("b"),
            Leave(1),
            Leave(2),
            Leave(0, "a"),
            Leave(3, "b"),
            Leave(4, "b"),
        ],
    ),
    "a key may have as many places as it leaves free": (
        1,
        [
            Queue("h", "slot"),
            *[Queue("f")] * 4,
            Queue("f", "share 1.25"),
            Queue("f", "share 2.5"),
            Queue("n"),
            Queue("n"),
            Queue("n", "share 2.5"),
            Queue("o"),
            Queue("p"),
            Queue("q", "full 6.25"),
        ],
    ),
    "a request that would not be served in time is refused": (
        1,
        [
            *_SLOW,
            Queue("h", "slot"),
            Queue("a", wait=10),
            Queue("b", "deadline 31.7", wait=19),
            Queue("b", "deadline 56.7", wait=20),
            Queue("b", wait=29),
            Queue("c", "deadline 46.5", wait=30),
        ],
    ),
    "a request that comes back as promised is let in once": (
        1,
        [*_FULL, Queue("r", "full 11.25", mark=7), Pass(11.25), Queue("r", mark=7), Queue("r", "full 11.25", mark=7)],
    ),
    "a promise is kept a little early": (
        1,
        [*_FULL, Queue("r", "full 11.25", mark=7), Pass(11.2), Queue("r", mark=7)],
    ),
    "a promise is not kept too early": (
        1,
        [*_FULL, Queue("r", "full 11.25", mark=7), Pass(11.15), Queue("r", "full 11.35", mark=7)],
    ),
    "a promise lasts five seconds": (
        1,
        [*_FULL, Queue("r", "full 11.25", mark=7), Pass(16.2), Queue("r", mark=7)],
    ),
    "a promise is over after five seconds": (
        1,
        [*_FULL, Queue("r", "full 11.25", mark=7), Pass(16.25), Queue("r", "full 11.25", mark=7)],
    ),
    "a promise is of one key and one body": (
        1,
        [
            *_FULL,
            Queue("r", "full 11.25", mark=7),
            Pass(11.25),
            Queue("s", "full 11.25", mark=7),
            Queue("r", "full 12.5", mark=8),
            Queue("r", mark=7),
        ],
    ),
    "a promise outlasts a request that needed none": (
        1,
        [
            *_FULL,
            Queue("r", "full 11.25", mark=7),
            *(Leave(number) for number in range(1, 9)),
            Leave(0),
            Pass(11.25),
            Queue("r", "slot", mark=7),
            *(Queue(f"x{number}") for number in range(WAITING)),
            Queue("r", mark=7),
        ],
    ),
    "each key has a line of promises of its own": (
        1,
        [
            *_FULL,
            Queue("r", "full 11.25", mark=1),
            Queue("r", "full 22.5", mark=2),
            Queue("s", "full 12.5"),
            Queue("r", "full 35", mark=3),
            Queue("w", "full 3.75", weight=5),
            Queue("w", "full 7.5", weight=5),
        ],
    ),
    "a key's weight is its newest in its line": (
        1,
        [
            Queue("h", "slot"),
            Queue("a", weight=4),
            Queue("a", weight=4),
            *(Queue(str(it)) for it in range(6)),
            Queue("b", "full 13.75"),
            Queue("b", "full 18.125", weight=4, mark=1),
            Queue("c", "full 18.75"),
        ],
    ),
    "promises are bounded in time": (
        1,
        [
            Queue("h", "slot"),
            Pass(400),
            Leave(0),
            Queue("h", "slot"),
            Queue("a", wait=4000),
            Queue("b", "deadline 1730", wait=100),
            Queue("b", "deadline 1730", wait=100),
            Queue("c", "deadline 2230", wait=100),
        ],
    ),
    "a request that waited in vain is promised a moment": (
        2,
        [
            *_SLOW,
            Queue("h", "slot"),
            Queue("h", "slot"),
            Queue("a"),
            Again("b", 12.5, mark=3),
            Again("b", 25, mark=4),
            Again("a", 12.5, weight=1),
        ],
    ),
    "a request that the engine refused says nothing of its pace": (
        1,
        [*_SLOW, Queue("h", "slot"), Pass(0.01), Leave(1, served=False), Queue("h", "slot"), Again("a", 12.5)],
    ),
    "the loaded model is served until another one has waited for as long as it may": (
        2,
        [
            *_SCARCE,
            Queue("a", "slot", model=2),
            Queue("b", model=1),
            Queue("c", "slot", model=2),
            Queue("d", model=2),
            Queue("e", model=2),
            Queue("f", model=1),
            Pass(29.9),
            Leave(0, "d"),
            Pass(0.2),
            Look(),
            Leave(2),
            Leave(3, "b"),
            Pass(10),
            Loaded(1, [2], gives="f"),
            Leave(1),
            Leave(5, "e"),
        ],
    ),
    "an idle engine loads another model at once unless the last two stays were short": (
        1,
        [
            *_SCARCE,
            Queue("a", "slot", model=1),
            Pass(10),
            Loaded(1, [2]),
            Leave(0),
            Queue("b", "slot", model=2),
            Pass(10),
            Loaded(2, [1]),
            Queue("c", model=1),
            Leave(1),
            Pass(19.9),
            Look(),
            Pass(0.2),
            Look("c"),
        ],
    ),
    "an engine that could not load a model serves the others": (
        1,
        [
            *_SCARCE,
            Queue("a", "slot", model=1),
            Queue("b", model=2),
            Pass(10),
            Loaded(1, [1, 2], failed=True),
            Leave(0, "b"),
        ],
    ),
    "a request for which nothing has to be loaded is served with the loaded model": (
        2,
        [*_SCARCE, Queue("a", "slot", model=2), Queue("b", "slot"), Queue("c"), Queue("d", model=1), Leave(0, "c")],
    ),
    "a request is told of the stay and the load before it": (
        1,
        [
            *_SCARCE,
            Queue("a", "slot", model=2),
            Queue("b", "deadline 27.75", wait=5, model=1),
            *(Queue(str(number), model=2) for number in range(WAITING)),
            Queue("c", "full 42.5", model=1),
        ],
    ),
    "a request is told how long its model's load still takes": (
        1,
        [
            *_SCARCE,
            Queue("a", "slot", wait=5, model=1),  # the engine is idle, so its load begins
            Pass(4),
            Queue("b", "deadline 3.75", wait=5, model=1),
            Pass(4),
            Queue("b", wait=5, model=1),
            Queue("c", "waits", wait=5, model=2),  # it is not known when the other model has to go
        ],
    ),
    "models that fit are served in turn": (
        1,
        [Loaded(1), Loaded(2), Queue("a", "slot", model=1), Queue("b", model=2), Queue("c", model=1), Leave(0, "b")],
    ),
    "the pace is a mean of 32": (
        1,
        [
            *[it for number in range(40) for it in (Queue("h", "slot"), Pass(10), Leave(number))],
            Queue("h", "slot"),
            Pass(42),
            Leave(40),
            Queue("h", "slot"),
            Again("a", 13.75),
        ],
    ),
}
