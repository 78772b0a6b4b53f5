"""Configured: what the settings say about keys: the keys of STACK_API_KEYS, and the default limits."""

from gateway.keys import secret
from gateway.keys.limit_fields import Limits
from gateway.settings import Settings


def listed_ids(settings: Settings) -> frozenset[str]:
    """Return the ids of the keys in STACK_API_KEYS."""
    return frozenset(listed_id(secret.digest(key.encode())) for key in settings.accepted_keys())


def listed_id(digest: bytes) -> str:
    return digest.hex()[:8]


def defaults(settings: Settings) -> Limits:
    """Return the limits of keys that have none of their own, unless the store has other ones."""
    return Limits(
        requests_per_minute=settings.stack_limit_requests_per_minute,
        tokens_per_minute=settings.stack_limit_tokens_per_minute,
        concurrent=settings.stack_limit_concurrent,
        tokens_per_day=settings.stack_limit_tokens_per_day,
        tokens_per_month=settings.stack_limit_tokens_per_month,
    )
