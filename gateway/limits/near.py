"""Near: which keys have nearly used a quota, for operators: a metric and a log line."""

from collections.abc import Callable

from gateway import logs
from gateway.keys.limit_fields import Limits
from gateway.limits.rules import Period, State

SHARES = (75, 95)  # percent
QUOTAS = ("tokens_per_day", "tokens_per_month")
MOST = 10_000  # keys that are remembered
Tell = Callable[[str, int, int], object]  # a quota, a share in percent, and how many keys have used that much of it


class Near:
    """One worker's. A key is looked at when it sends a request; a new day or month forgets those of the old one."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._period = Period(0, 0)
        self._found: dict[str, dict[str, int]] = {quota: {} for quota in QUOTAS}  # the share, by key
        for quota in QUOTAS:
            self._count(quota)

    def look(self, key_id: str, limits: Limits, state: State, period: Period) -> None:
        """Note how much of its quotas a key has used in that period."""
        if limits.tokens_per_day is None and limits.tokens_per_month is None:
            return
        if period > self._period:
            self._turn_over(period)
        self._note(key_id, "tokens_per_day", limits.tokens_per_day, state.day_tokens)
        self._note(key_id, "tokens_per_month", limits.tokens_per_month, state.month_tokens)

    def _note(self, key_id: str, quota: str, limit: int | None, used: int) -> None:
        share = max((it for it in SHARES if limit and used * 100 >= it * limit), default=0)
        found = self._found[quota]
        before = found.pop(key_id, 0)
        if share:
            found[key_id] = share
            if len(found) > MOST:
                del found[next(iter(found))]
        if share != before:
            self._count(quota)
        if share > before:
            logs.event("quota_near", {"key": key_id, "quota": quota, "percent": share}, "warning")

    def _turn_over(self, period: Period) -> None:
        self._found["tokens_per_day"].clear()
        if period.month != self._period.month:
            self._found["tokens_per_month"].clear()
        self._period = period
        for quota in QUOTAS:
            self._count(quota)

    def _count(self, quota: str) -> None:
        for share in SHARES:
            self._tell(quota, share, sum(it >= share for it in self._found[quota].values()))
