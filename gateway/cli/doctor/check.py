"""Check: one result of `make doctor`."""

from typing import Literal, NamedTuple


class Check(NamedTuple):
    """What was checked, and what came of it. `skipped`: it could not be checked, and the finding says why."""

    state: Literal["ok", "failed", "skipped"]
    name: str
    finding: str
    advice: str = ""

    def line(self) -> str:
        return "\t".join(" ".join(it.split()) for it in self) + "\n"
