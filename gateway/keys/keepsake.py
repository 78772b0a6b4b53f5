"""Keepsake: the form in which the keys lie in a file, for a worker that starts while the store is unreachable.

The file is JSON, which is checked field by field when it is read. Nothing in it is ever executed.
"""

from typing import Annotated

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field

from gateway.keys.entries import DIGEST, Contents, Entry, Id, Moment
from gateway.keys.limit_fields import LimitFields


class _Secret(BaseModel):
    model_config = ConfigDict(extra="forbid")

    digest: Annotated[str, Field(pattern=DIGEST)]
    key_id: Id
    ends: Moment | None


class _Kept(BaseModel):
    model_config = ConfigDict(extra="forbid")

    number: int
    defaults: LimitFields
    entries: dict[Id, Entry]
    secrets: list[_Secret]
    broken: tuple[str, ...]
    also: Base64Bytes


def dump(contents: Contents, also: bytes) -> bytes:
    """Return both as the bytes of the file."""
    kept = _Kept.model_construct(
        number=contents.number,
        defaults=contents.defaults,
        entries={entry.id: entry for entry, _ in contents.secrets.values()},
        secrets=[
            _Secret.model_construct(digest=digest.hex(), key_id=entry.id, ends=ends)
            for digest, (entry, ends) in contents.secrets.items()
        ],
        broken=contents.broken,
        also=also,
    )
    return kept.model_dump_json().encode()


def load(data: bytes) -> tuple[Contents, bytes]:
    """Return what `dump` was given. Raises ValueError for other bytes."""
    kept = _Kept.model_validate_json(data)
    if unknown := {it.key_id for it in kept.secrets} - kept.entries.keys():
        raise ValueError(f"secrets of {len(unknown)} keys that are not there")
    secrets = {bytes.fromhex(it.digest): (kept.entries[it.key_id], it.ends) for it in kept.secrets}
    return Contents(kept.number, kept.defaults, secrets, kept.broken), kept.also
