"""Outcome: how a request ends, as its caller sees it and as log and metrics say it."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Outcome:
    """A status, and the code of an error. With 200 and a code, the answer had begun: it ended with an error event, and
    the connection was closed inside the body. `told` is what log and metrics say, where that is another word. `early`:
    before there was an exchange that could finish."""

    status: int
    code: str | None = None
    told: str | None = field(default=None, compare=False)
    early: bool = field(default=False, compare=False)

    @property
    def word(self) -> str:
        return self.told or self.code or "finished"


WHOLE = Outcome(200)
LEFT = Outcome(499, "client_left")  # the caller was gone; so it stands in the log
LOST = Outcome(0, "connection broken")  # an exception in the caller's client, and no clean end


def error(status: int, code: str | None, told: str | None = None) -> Outcome:
    """An error with a status of its own: nothing of an answer had been sent."""
    return Outcome(status, code, told)


def cut(code: str) -> Outcome:
    """What came before stands; then an error event and a cut connection."""
    return Outcome(200, code)


BROKEN, FAILED, SILENT = "engine_broken_stream", "engine_error", "engine_timeout"
UNREACHABLE = error(503, "engine_unavailable")
OVERLOADED = error(503, "server_is_overloaded")
REFUSED = error(422, "x", told="engine_refused")
NEVER_CAME = Outcome(499, "client_left", early=True)
