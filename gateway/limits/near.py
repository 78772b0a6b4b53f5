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
    """One worker's. A key is looked at when it sends a request. `recheck` looks again at those that were found, because
    they may send no other one."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._period = Period(0, 0)
        # By key: the share, and the tokens of which it is one
        self._found: dict[str, dict[str, tuple[int, int]]] = {quota: {} for quota in QUOTAS}
        self._seen: object = None
        for quota in QUOTAS:
            self._count(quota)

    def look(self, key_id: str, limits: Limits, state: State, period: Period) -> None:
        """Note how much of its quotas a key has used in that period."""
        if limits.tokens_per_day is None and limits.tokens_per_month is None:
            return
        self._turn_over(period)
        for quota, used in zip(QUOTAS, (state.day_tokens, state.month_tokens), strict=True):
            if self._note(key_id, quota, getattr(limits, quota), used):
                self._count(quota)

    def recheck(self, state: object, limits_of: Callable[[str], Limits | None], period: Period) -> None:
        """Forget the keys that have ended, and those of another day or month, and compare the others with their present
        limits. `state` is what the last look at the keys depends on: nothing is done while it is the same."""
        self._turn_over(period)
        if state == self._seen:
            return
        self._seen = state
        for quota, found in self._found.items():
            used = [(key_id, limits_of(key_id) or Limits(), tokens) for key_id, (_, tokens) in found.items()]
            changed = [self._note(key_id, quota, getattr(limits, quota), tokens) for key_id, limits, tokens in used]
            if any(changed):
                self._count(quota)

    def _note(self, key_id: str, quota: str, limit: int | None, used: int) -> bool:
        """Note what a key has used of a quota. Returns whether the counts have changed."""
        share = max((it for it in SHARES if limit and used * 100 >= it * limit), default=0)
        found = self._found[quota]
        before, _ = found.pop(key_id, (0, 0))
        if share:
            found[key_id] = share, used
            if len(found) > MOST:
                del found[next(iter(found))]
        if share > before:
            logs.event("quota_near", {"key": key_id, "quota": quota, "percent": share}, "warning")
        return share != before

    def _turn_over(self, period: Period) -> None:
        """Forget the keys of an earlier day or month, or of one that is more than a day ahead: a clock was wrong."""
        if self._period.day - 1 <= period.day <= self._period.day:
            return
        self._found["tokens_per_day"].clear()
        if period.month != self._period.month:
            self._found["tokens_per_month"].clear()
        self._period = period
        for quota in QUOTAS:
            self._count(quota)

    def _count(self, quota: str) -> None:
        for share in SHARES:
            self._tell(quota, share, sum(it >= share for it, _ in self._found[quota].values()))
