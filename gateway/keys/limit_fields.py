"""Limits: the limits that a key may have, one field for each. The package `limits` enforces them."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1, le=10**15)] | None
LimitName = Literal["requests_per_minute", "tokens_per_minute", "concurrent", "tokens_per_day", "tokens_per_month"]


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a key; None is no limit. Limits per minute are token buckets. Quotas are for calendar days and
    months in UTC."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None


class LimitFields(BaseModel):
    """The limits of a key, as a request sets them."""

    model_config = ConfigDict(extra="forbid")

    requests_per_minute: Count = None
    tokens_per_minute: Count = None
    concurrent: Count = None
    tokens_per_day: Count = None
    tokens_per_month: Count = None

    def over(self, defaults: Limits) -> Limits:
        """Return these limits, with those of `defaults` in place of missing ones."""
        return replace(defaults, **self.model_dump(exclude_none=True))
