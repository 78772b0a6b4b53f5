"""Retry after: when a request that can't be let in may come back. Each key's promises are a line of their own, as
fast as that key's share of the engine. `stack_promise` in store/functions.sql is the same arithmetic."""

import mmap
import random

ENGINES = 128  # more than twice as many as a gateway may have with their GPUs, because a reload may bring others
CELLS = 4096  # keys that are remembered for each engine
PROMISES = 8192  # promises that are remembered for each engine
LINES = 512  # keys of an engine that have promises at a time; further keys do not count in the pace of the lines
SLOWER = 1.25  # a line moves at the measured pace divided by this, so that returning requests do not pile up
GRACE = 5.0  # seconds for which a promise is kept after its time
EARLY = 0.05  # seconds by which a returning request may be early
KEEPS = 512  # promises that a key may have at a time; fewer beside many other keys, so that there is memory for all
LONGEST = 600.0  # seconds from the first possible promise of a key to its last


class Promises:
    """Hold the promises of all engines, in memory that workers share, under the lock of the caller (Places).

    A key is identified by its cell, which is counted over all engines. Times are seconds of the caller's clock.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, ENGINES * (CELLS * 8 + PROMISES * 16 + LINES * 10 + 16))
        view = memoryview(self._memory)
        at = 0

        def take(size: int) -> memoryview:
            nonlocal at
            at += ENGINES * size
            return view[at - ENGINES * size : at]

        def numbers(count: int) -> "memoryview[float]":
            return take(8 * count).cast("d")

        self._line = numbers(CELLS)  # the end of each key's line
        self._due = numbers(PROMISES)
        self._made, self._lined = numbers(1), numbers(1)
        self._weights = numbers(LINES)
        self._marks_at = at
        self._marks = take(8 * PROMISES).cast("Q")
        self._lines = take(2 * LINES).cast("H")  # the cells of keys that have promises: `_lined` of them

    def promise(
        self, cell: int, weight: int, weights: dict[int, float], apart: float, now: float, fits: float, mark: int
    ) -> float:
        """Promise a time to the request with this `mark`, at the end of its key's line, and return it. Empty lines
        begin at `fits`.

        Two promises of a key are as far apart as the engine needs to serve every key once by weight, at `apart` seconds
        or more for each turn. `weights` are those of the waiting keys, by cell. A key that has all the promises it may
        have is told the time of its last one, without a new promise. The new promise replaces the engine's oldest one.
        """
        engine = cell // CELLS
        weights = weights | self.lined(engine, now)
        share, apart = shares(weights, cell, weight), SLOWER * apart
        due = self._line[cell]
        if due > fits:
            keeps = min(KEEPS, PROMISES // 2 // max(1, len(weights)))
            if due - fits > min(LONGEST, keeps * apart * share):
                return due
            due += apart * share
        else:  # random, so that keys that begin together do not return together
            due = fits + apart * (share + (share - 1) * (random.random() - 0.5))  # noqa: S311
        self._line[cell] = due
        self._line_up(engine, cell % CELLS, weight)
        number = int(self._made[engine])
        self._made[engine] = number + 1
        self._due[engine * PROMISES + number % PROMISES] = due
        self._marks[engine * PROMISES + number % PROMISES] = mark
        return due

    def keep(self, engine: int, mark: int, now: float) -> bool:
        """Return whether a request with this mark was told to return about now, and use up that promise."""
        first, last = (self._marks_at + 8 * PROMISES * it for it in (engine, engine + 1))
        looked = mark.to_bytes(8, "little")
        while (found := self._memory.find(looked, first, last)) >= 0:
            first = found + 1
            number, rest = divmod(found - self._marks_at, 8)
            if rest:
                continue  # the match is made of parts of two other marks
            due = self._due[number]
            if now < due - EARLY:
                break  # and later promises are early too
            self._marks[number] = 0
            if now < due + GRACE:
                return True
        return False

    def lined(self, engine: int, now: float) -> dict[int, float]:
        """Return the weights of the keys that have promises, by their cells in the engine."""
        first, found, number = engine * LINES, {}, 0
        while number < self._lined[engine]:
            at = first + number
            cell = self._lines[at]
            if self._line[engine * CELLS + cell] > now:
                found[cell] = self._weights[at]
                number += 1
            else:  # remove this key: the last one moves to its place
                last = int(self._lined[engine]) - 1
                self._lines[at], self._weights[at] = self._lines[first + last], self._weights[first + last]
                self._lined[engine] = last
        return found

    def forget_key(self, cell: int) -> None:
        """Remove the promises of a cell that another key gets now."""
        self._line[cell] = 0.0

    def forget_engine(self, engine: int) -> None:
        """Remove the promises of a number that another engine gets now."""
        self._lined[engine] = 0.0

    def _line_up(self, engine: int, cell: int, weight: int) -> None:
        """Note that this key has promises from now on."""
        first, count = engine * LINES, int(self._lined[engine])
        there = self._lines[first : first + count].tolist()
        if cell in there:
            self._weights[first + there.index(cell)] = weight
        elif count < LINES:
            self._lines[first + count], self._weights[first + count] = cell, weight
            self._lined[engine] = count + 1


def shares(weights: dict[int, float], cell: int, weight: int) -> float:
    """Return how many turns of all keys go to one turn of a key that has this weight."""
    return sum((weights | {cell % CELLS: weight}).values()) / weight
