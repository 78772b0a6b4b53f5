"""The report: a table for people and a dictionary for programs, with ratios to nginx and the aims beside them."""

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

Rounds = dict[str, dict[str, list[float]]]  # subject → figure → one value per round


@dataclass(frozen=True)
class Figure:
    """A line of the table. On a machine where nginx takes `floor`, the aim itself applies; on any other, the ratio of
    the two does."""

    title: str
    digits: int
    aim: float | None = None
    floor: float = 1
    of_chat: float | None = None  # the largest value that is allowed, as a multiple of a chat completions stream


FIGURES = {
    "blocking_cpu_ms": Figure("CPU per blocking request, ms", 3, 0.25, 0.012),
    "stream_cpu_ms": Figure("CPU per 64-token stream at once, ms", 3, 0.40, 0.079),
    "responses_cpu_ms": Figure("the same stream by Responses, ms", 3, of_chat=1.5),
    "messages_cpu_ms": Figure("the same stream by Messages, ms", 3, of_chat=1.5),
    "paced_cpu_us": Figure("CPU per token of a paced stream, µs", 1, 30, 8),
    "blocking_per_s": Figure("blocking requests/s, 32 connections", 0),
    "alone_per_s": Figure("blocking requests/s, 1 connection", 0),
    "alone_p50_ms": Figure("blocking p50 in ms, 1 connection", 2),
    "rss_mb": Figure("RSS of all processes, MB", 0),
    "log_lines": Figure("log lines per blocking request", 1),
}


def table(rounds: Rounds) -> str:
    """Medians, half the spread of the rounds in percent, ratios to nginx, and whether the gateway meets the aims."""
    others = [name for name in rounds if name != "nginx"] if "nginx" in rounds else []
    lines = [_line("one worker on one core", [*rounds, *(f"{name}/nginx" for name in others)], "aim")]
    for key, figure in FIGURES.items():
        value = {name: median(figures[key]) for name, figures in rounds.items() if figures.get(key)}
        if not value:
            continue
        cells = [
            f"{value[name]:.{figure.digits}f} ±{_spread(rounds[name][key]):2.0f}%" if name in value else ""
            for name in rounds
        ]
        cells += [f"{value[name] / value['nginx']:.2f}x" if value.get("nginx") else "" for name in others]
        lines.append(_line(figure.title, cells, _aim(figure, value) or _of_chat(figure, value, rounds)))
    return "\n".join(lines)


def _line(title: str, cells: list[str], note: str) -> str:
    return f"{title:37}{''.join(f'{cell:>15}' for cell in cells)}   {note}".rstrip()


def _spread(values: list[float]) -> float:
    return (max(values) - min(values)) / 2 / median(values) * 100 if median(values) else 0


def _aim(figure: Figure, value: dict[str, float]) -> str:
    if figure.aim is None or not {"gateway", "nginx"} <= value.keys():
        return ""
    ratio, ours = figure.aim / figure.floor, value["gateway"]
    by_ratio = "met" if ours <= ratio * value["nginx"] else "MISSED"
    return f"{ratio:.2f}x of nginx: {by_ratio} · {figure.aim:g}: {'met' if ours <= figure.aim else 'MISSED'}"


def _of_chat(figure: Figure, value: dict[str, float], rounds: Rounds) -> str:
    chat = rounds.get("gateway", {}).get("stream_cpu_ms")
    if figure.of_chat is None or not chat:
        return ""
    ratio = value["gateway"] / median(chat)
    return f"{ratio:.2f}x of the chat stream, {figure.of_chat:g}: {'met' if ratio <= figure.of_chat else 'MISSED'}"


def as_json(rounds: Rounds) -> dict[str, Any]:
    """Medians, each round, ratios to nginx, aims, when and where. Units are in the names."""
    medians = {
        name: {key: median(figures[key]) for key in FIGURES if figures.get(key)} for name, figures in rounds.items()
    }
    floor = medians.get("nginx", {})
    return {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {"cpu": _cpu(), "kernel": platform.release(), "python": platform.python_version()},
        "load_1m": os.getloadavg()[0],
        "median": medians,
        "ratio_to_nginx": {
            name: {key: of[key] / floor[key] for key in floor if floor[key]} for name, of in medians.items()
        },
        "aims": {key: {"value": f.aim, "ratio_to_nginx": f.aim / f.floor} for key, f in FIGURES.items() if f.aim},
        "rounds": rounds,
    }


def _cpu() -> str:
    names = (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    return next(names, "").partition(": ")[2] or platform.machine()
