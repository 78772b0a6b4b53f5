"""Keepsake: the form in which the keys lie in a file, for a worker that starts while the store is unreachable.

The file is JSON: one line with all keys, then a line for each change. Each is checked field by field when it is read.
Nothing in it is ever executed.
"""

from typing import Annotated, Any

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field

from gateway.keys.entries import DIGEST, SIGNING, Changes, Contents, Entry, Id, Moment
from gateway.keys.limit_fields import LimitFields

_Secrets = dict[bytes, tuple[Entry, int | None]]


class _Secret(BaseModel):
    model_config = ConfigDict(extra="forbid")

    digest: Annotated[str, Field(pattern=DIGEST)]
    key_id: Id
    ends: Moment | None


class _State(BaseModel):
    model_config = ConfigDict(extra="forbid")

    number: int
    mark: int | None
    defaults: LimitFields
    entries: dict[Id, Entry]
    signing: dict[Id, Annotated[str, Field(pattern=SIGNING)]]
    secrets: list[_Secret]
    broken: tuple[str, ...]

    def found(self) -> _Secrets:
        """Return the secrets with their keys. Raises ValueError."""
        if unknown := {it.key_id for it in self.secrets} - self.entries.keys():
            raise ValueError(f"secrets of {len(unknown)} keys that are not there")
        entries = self.entries | {
            key_id: self.entries[key_id].model_copy(update={"signing": it}) for key_id, it in self.signing.items()
        }
        return {bytes.fromhex(it.digest): (entries[it.key_id], it.ends) for it in self.secrets}


class _Kept(_State):
    also: Base64Bytes


class _Changed(_State):
    mark: int
    ids: list[str]
    also: Base64Bytes | None


def dump(contents: Contents, also: bytes) -> bytes:
    """Return both as the first line of the file."""
    return _Kept.model_construct(**_state(contents), also=also).model_dump_json().encode()


def dump_changes(changes: Changes, also: bytes | None) -> bytes:
    """Return a further line of the file. `also` is None if it has not changed."""
    return _Changed.model_construct(**_state(changes), ids=sorted(changes.ids), also=also).model_dump_json().encode()


def load(data: bytes) -> tuple[Contents, bytes]:
    """Return what is true after all lines. Raises ValueError for other bytes."""
    first, *further = data.split(b"\n")
    kept = _Kept.model_validate_json(first)
    found = Contents(kept.number, kept.defaults, kept.found(), kept.broken, kept.mark)
    also, late = kept.also, dict[str, _Secrets]()  # what each changed key has in the end
    for line in further:
        it = _Changed.model_validate_json(line)
        changes = Changes(it.number, it.mark, frozenset(it.ids), it.defaults, it.found(), it.broken)
        late |= {key_id: {} for key_id in changes.ids}
        for digest, (entry, ends) in changes.secrets.items():
            late[entry.id][digest] = entry, ends
        also = also if it.also is None else it.also
        found = Contents(it.number, it.defaults, found.secrets, changes.still_broken(found.broken), it.mark)
    if late:
        there = {digest: it for digest, it in found.secrets.items() if it[0].id not in late}
        found = found._replace(secrets={digest: it for some in (there, *late.values()) for digest, it in some.items()})
    return found, also


def _state(of: Contents | Changes) -> dict[str, Any]:
    entries = {entry.id: entry for entry, _ in of.secrets.values()}
    return {
        "number": of.number,
        "mark": of.mark,
        "defaults": of.defaults,
        "entries": entries,
        "signing": {key_id: it.signing for key_id, it in entries.items() if it.signing is not None},
        "secrets": [
            _Secret.model_construct(digest=digest.hex(), key_id=entry.id, ends=ends)
            for digest, (entry, ends) in of.secrets.items()
        ],
        "broken": of.broken,
    }
