"""A clock that stands still until a test moves it."""


class Clock:
    """Call it for the time in seconds, as time.monotonic()."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds
