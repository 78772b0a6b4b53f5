"""Plots: draw lines over time as SVG, with no style of its own but the classes of the style sheet.

A plot is a picture for the eye. The page has a table with the same numbers below it, for everybody else.
"""

import datetime as dt
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from markupsafe import Markup

WIDTH, HEIGHT = 640, 200  # units of the drawing
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 10, 24  # margins around the lines
MOST = 7  # lines in a plot; the style sheet has a class for each
_TICKS = 4
_LABELS = 6
_DAY = 86_400_000  # milliseconds


class Line(NamedTuple):
    """The values of one name, one for each part of the time. None is a gap."""

    label: str
    values: Sequence[float | None]


def draw(title: str, times: Sequence[int], part: int, lines: Sequence[Line], words: Callable[[float], str]) -> Markup:
    """Draw the lines. `times` are the beginnings of the parts, in milliseconds since 1970, and `words` says what a
    value on the axis is called."""
    most = _round_up(max((it for line in lines for it in line.values if it is not None), default=0.0))
    drawn = [_axis(most, words), _days(times, part)]
    drawn += [_line(number, line, most, len(times)) for number, line in enumerate(lines[:MOST])]
    box = f"0 0 {WIDTH} {HEIGHT}"
    return Markup('<svg class="plot" viewBox="{}" role="img" aria-label="{}">{}</svg>').format(
        box, title, Markup("").join(drawn)
    )


def _line(number: int, line: Line, most: float, count: int) -> Markup:
    """One line: a path with gaps, and a dot for each value that stands alone."""
    path, dots, before = [], [], False
    for at, value in enumerate(line.values):
        if value is None:
            before = False
            continue
        x, y = _x(at, count), _y(value, most)
        path.append(f"{'L' if before else 'M'}{x:.1f} {y:.1f}")
        alone = not before and (at + 1 == count or line.values[at + 1] is None)
        if alone:
            dots.append(Markup('<circle cx="{}" cy="{}" r="3"/>').format(f"{x:.1f}", f"{y:.1f}"))
        before = True
    return Markup('<g class="line line-{}"><title>{}</title><path d="{}"/>{}</g>').format(
        number, line.label, " ".join(path), Markup("").join(dots)
    )


def _axis(most: float, words: Callable[[float], str]) -> Markup:
    drawn = []
    for tick in range(_TICKS + 1):
        value = most * tick / _TICKS
        y = _y(value, most)
        drawn.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/><text class="value" x="{}" y="{}">{}</text>'
            ).format(LEFT, WIDTH - RIGHT, f"{y:.1f}", f"{y:.1f}", LEFT - 6, f"{y + 4:.1f}", words(value))
        )
    return Markup("").join(drawn)


def _days(times: Sequence[int], part: int) -> Markup:
    form = "%H:%M" if len(times) * part <= 2 * _DAY else "%d %b"
    every = max(1, math.ceil(len(times) / _LABELS))
    drawn = []
    for at in range(0, len(times), every):
        words = dt.datetime.fromtimestamp(times[at] / 1000, dt.UTC).strftime(form)
        place = Markup('<text class="time" x="{}" y="{}">{}</text>')
        drawn.append(place.format(f"{_x(at, len(times)):.1f}", HEIGHT - 6, words))
    return Markup("").join(drawn)


def _x(at: int, count: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (at / (count - 1) if count > 1 else 0.5)


def _y(value: float, most: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(1.0, value / most)


def _round_up(value: float) -> float:
    """The next number with one digit that is 1, 2, 4 or 8, so that the axis has round numbers."""
    if value <= 0:
        return 4.0
    size = 10 ** math.floor(math.log10(value))
    return float(next(it * size for it in (1, 2, 4, 8, 10) if it * size >= value * (1 - 1e-9)))
