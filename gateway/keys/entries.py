"""Entries: the fields of a key, as a request sets them and as the store keeps them, with their checks.

Times are whole seconds since 1970 in UTC.
"""

import time
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, computed_field

from gateway.keys.limit_fields import LimitFields, LimitName
from gateway.validation import NO_CONTROLS


def _to_come(moment: int) -> int:
    if moment <= time.time():
        raise ValueError("it is in the past; to end a key now, disable it")
    return moment


def _visible(name: str) -> str:
    if not name.strip():
        raise ValueError("it must not be empty or only spaces")
    return name


Text = Annotated[str, Field(max_length=200, pattern=NO_CONTROLS)]
Name = Annotated[Text, Field(min_length=1), AfterValidator(_visible)]
YEAR = 366 * 86_400
LAST = 253_402_300_799  # the last second of the year 9999, the last year of Python's calendar
KEY, SECRET, DEFAULT = "the key ", "a secret of the key ", "the default limit "  # how an invalid row is named
ID = r"^[0-9A-Za-z]{1,16}$"
DIGEST = r"^[0-9a-f]{64}$"
SIGNING = r"^[!-~]{32,200}$"
Id = Annotated[str, Field(pattern=ID)]
Moment = Annotated[int, Field(ge=0, le=LAST)]
Models = Annotated[list[Annotated[Text, Field(min_length=1)]], Field(min_length=1, max_length=200)]
Priority = Annotated[int, Field(ge=1, le=100)]
Labels = Annotated[dict[Annotated[Text, Field(min_length=1)], Text], Field(max_length=50)]


class KeyFields(BaseModel):
    """The fields of a key that a change may set. A field that is left out stays as it is."""

    model_config = ConfigDict(extra="forbid")

    name: Name = ""
    owner: Text = ""
    expires_at: Annotated[int, Field(ge=0, le=LAST), AfterValidator(_to_come)] | None = Field(
        None, description="A future time in seconds since 1970; null: never."
    )
    models: Models | None = Field(None, description="Models that the key may use, by name; null: all.")
    limits: LimitFields = LimitFields()
    user_limits: LimitFields = Field(LimitFields(), description="The limits of each user, if users are told apart.")
    priority: Priority = Field(1, description="The key's weight in the queue of a busy engine.")
    labels: Labels = {}
    disabled: bool = False


class NewKeyFields(KeyFields):
    """The fields of a new key."""

    name: Name
    users: bool = Field(
        False, description="Tell the key's users apart, by a header that its front end signs with a secret of its own."
    )


class Entry(BaseModel):
    """A stored key."""

    id: Id
    name: Name
    owner: Text
    created_at: Moment
    expires_at: Moment | None
    disabled: bool
    models: Models | None
    limits: LimitFields
    user_limits: Annotated[LimitFields, BeforeValidator(lambda it: LimitFields() if it is None else it)] = LimitFields()
    priority: Priority
    labels: Labels
    # Excluded, because it is shown only once.
    signing: Annotated[str, Field(pattern=SIGNING)] | None = Field(None, exclude=True, repr=False)
    secrets: list[dict[str, int | None]] = Field([], description="When each secret was created, and when it ends.")

    @computed_field  # type: ignore[prop-decorator]  # pydantic's own way
    @property
    def users(self) -> bool:
        """Whether the key's users are told apart."""
        return self.signing is not None

    @property
    def state(self) -> str:
        """The key's state: active, disabled or expired."""
        if self.disabled:
            return "disabled"
        return "expired" if self.expires_at is not None and self.expires_at <= time.time() else "active"


class KeptSecret(BaseModel):
    """A stored secret."""

    model_config = ConfigDict(extra="forbid", strict=True)

    digest: Annotated[str, Field(pattern=DIGEST)]
    key_id: Id
    created_at: Moment
    expires_at: Moment | None


class KeptName(BaseModel):
    """The name of a deleted key."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: Id
    name: Name


class KeptDefault(BaseModel):
    """A stored default limit."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: LimitName
    value: Annotated[int, Field(ge=1, le=10**15)]


class Contents(NamedTuple):
    """Everything that a worker keeps in memory: each secret's digest, its key, and when it ends. `number` is the
    store's revision, and `mark` the mark of that revision. `broken` names the invalid rows, whose keys cannot be
    used."""

    number: int
    defaults: LimitFields
    secrets: dict[bytes, tuple[Entry, int | None]]
    broken: tuple[str, ...] = ()
    mark: int | None = None


class Changes(NamedTuple):
    """The difference between two revisions: the keys with these `ids` have changed, and have these `secrets` now. A
    key that was deleted, or whose row is invalid, has none. `number`, `mark` and `defaults` are those of the later
    revision. `prompts`: prompts have changed, too."""

    number: int
    mark: int
    ids: frozenset[str]
    defaults: LimitFields
    secrets: dict[bytes, tuple[Entry, int | None]]
    broken: tuple[str, ...] = ()
    prompts: bool = False

    def still_broken(self, before: tuple[str, ...]) -> tuple[str, ...]:
        """Return the invalid rows of the later revision. `before` are those of the earlier one."""
        read = [DEFAULT, *(f"{which}{key_id} (" for which in (KEY, SECRET) for key_id in self.ids)]
        return (*(it for it in before if not it.startswith(tuple(read))), *self.broken)
