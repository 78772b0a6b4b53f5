"""Promptbook: store prompts, every version of each, and the keys and models that use them.

A prompt is never changed. Setting it again makes the next version, which then applies wherever no version was named.
"""

import time
from typing import Annotated, Literal, NamedTuple

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator

from gateway.errors import BadRequest, NotFound
from gateway.keys import book as keybook
from gateway.keys.entries import Moment, Text
from gateway.prompts.render import Prompt, TemplateRefusedError, check
from gateway.store.revisions import metadata
from gateway.store.store import Store
from gateway.validation import WORD

Name = Annotated[str, Field(pattern=WORD)]
Of = Literal["key", "model"]
Number = Annotated[int, Field(ge=1, lt=1 << 31)]

versions = sa.Table(
    "prompts",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("template", sa.Text, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
)
uses = sa.Table(
    "prompt_uses",
    metadata,
    sa.Column("of", sa.String(8), primary_key=True),  # key or model
    sa.Column("target", sa.String(200), primary_key=True),  # a key's id, or a model's name in this gateway
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("version", sa.Integer),  # null: the newest
)


class Template(BaseModel):
    """The text of a prompt: a template with the variables of gateway.prompts.render."""

    model_config = ConfigDict(extra="forbid")

    template: str


class Use(BaseModel):
    """Which prompt applies. Without a version, the newest one always applies."""

    model_config = ConfigDict(extra="forbid")

    name: Name
    version: Annotated[int, Field(ge=1)] | None = None


class Version(BaseModel):
    """One version of a stored prompt."""

    name: Name
    version: Number
    template: str
    created_at: Moment


class Newest(BaseModel):
    """The newest version of a stored prompt, without its text."""

    name: Name
    version: Number
    created_at: Moment


class Kept(Version):
    """A stored version whose template is valid."""

    @field_validator("template")
    @classmethod
    def _usable(cls, template: str) -> str:
        check(template)
        return template


class Holds(BaseModel):
    """The key or model that uses a prompt."""

    of: Of
    target: Text
    name: Name
    version: Number | None


class InForce(NamedTuple):
    """What workers hold in memory: prompts by key id, and by model."""

    by_key: dict[str, Prompt]
    by_model: dict[str, Prompt]

    def dump(self) -> bytes:
        """Return these as JSON."""
        return _IN_FORCE.dump_json(self)

    @staticmethod
    def load(data: bytes) -> "InForce":
        """Return what was dumped. Raises ValueError for other bytes."""
        return _IN_FORCE.validate_json(data)


_IN_FORCE = TypeAdapter(InForce)


class Promptbook:
    """Read and write the prompts in a store. Raises NotFound, BadRequest, StoreUnavailable."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def set(self, name: str, template: str) -> Version:
        """Store the next version of a prompt, which is its first if there is none."""
        try:
            check(template)
        except TemplateRefusedError as exc:
            raise BadRequest(str(exc), param="template") from None
        with self._store.change("prompts") as connection:
            newest = sa.select(sa.func.max(versions.c.version)).where(versions.c.name == name)
            number = (connection.execute(newest).scalar() or 0) + 1
            row = {"name": name, "version": number, "template": template, "created_at": int(time.time())}
            connection.execute(versions.insert().values(row))
        return Version.model_validate(row)

    def newest(self) -> list[Version]:
        """Return the newest version of each prompt."""
        return self._versions(versions.c.version == _newest(versions.c.name))

    def page(self, after: str, most: int) -> tuple[list[Newest], bool]:
        """Return one page of the prompts by name, and whether there are more. A page has at most `most` prompts.
        `after` is the last name of the previous page."""
        of_page = sa.select(versions.c.name, sa.func.max(versions.c.version).label("version"))
        of_page = of_page.where(versions.c.name > after).group_by(versions.c.name)
        it = of_page.order_by(versions.c.name).limit(most + 1).subquery()
        query = sa.select(versions.c.name, versions.c.version, versions.c.created_at).order_by(versions.c.name)
        query = query.join(it, sa.and_(versions.c.name == it.c.name, versions.c.version == it.c.version))
        with self._store.read() as connection:
            found = [Newest.model_validate(dict(row)) for row in connection.execute(query).mappings()]
        return found[:most], len(found) > most

    def names(self, most: int) -> list[str]:
        """Return the first names of prompts, at most so many."""
        query = sa.select(versions.c.name).distinct().order_by(versions.c.name).limit(most)
        with self._store.read() as connection:
            return list(connection.execute(query).scalars())

    def latest(self, name: str) -> Version | None:
        """Return the newest version of that prompt; None if there is no such prompt."""
        found = self._versions(versions.c.name == name, versions.c.version == _newest(versions.c.name))
        return found[0] if found else None

    def show(self, name: str) -> list[Version]:
        """Return all versions of a prompt, the oldest first."""
        found = self._versions(versions.c.name == name)
        if not found:
            raise _unknown(name)
        return found

    def delete(self, name: str) -> None:
        """Delete all versions of a prompt. Refused while a key or model uses it."""
        with self._store.change("prompts") as connection:
            held = connection.execute(sa.select(uses).where(uses.c.name == name)).first()
            if held is not None:
                raise BadRequest(
                    f"The {held.of} '{held.target}' uses the prompt '{name}'. Give it another prompt first.",
                    param="name",
                )
            if connection.execute(versions.delete().where(versions.c.name == name)).rowcount == 0:
                raise _unknown(name)

    def uses(self) -> list[Holds]:
        """Return which key or model uses which prompt."""
        with self._store.read() as connection:
            rows = connection.execute(sa.select(uses).order_by(uses.c.of, uses.c.target)).mappings()
            return [Holds.model_validate(dict(row)) for row in rows]

    def used_by(self, of: Of, target: str) -> Holds | None:
        """Which prompt holds for that key or model; None if none does."""
        query = sa.select(uses).where(uses.c.of == of, uses.c.target == target)
        with self._store.read() as connection:
            row = connection.execute(query).mappings().first()
        return None if row is None else Holds.model_validate(dict(row))

    def use(self, of: Of, target: str, use: Use) -> Holds:
        """Make a key or a model use a prompt, in place of the one it used before."""
        row = {"of": of, "target": target, "name": use.name, "version": use.version}
        with self._store.change("prompts") as connection:
            there = sa.select(versions.c.version).where(versions.c.name == use.name)
            numbers = set(connection.execute(there).scalars())
            if not numbers:
                raise _unknown(use.name)
            if use.version is not None and use.version not in numbers:
                raise BadRequest(f"The prompt '{use.name}' has no version {use.version}.", param="version")
            if of == "key" and not keybook.exists(connection, target):
                raise keybook.unknown(target)
            connection.execute(uses.delete().where(uses.c.of == of, uses.c.target == target))
            connection.execute(uses.insert().values(row))
        return Holds.model_validate(row)

    def stop(self, of: Of, target: str, *also: str) -> None:
        """Make a target use no prompt any more. `also` are its other names."""
        with self._store.change("prompts") as connection:
            done = connection.execute(uses.delete().where(uses.c.of == of, uses.c.target.in_((target, *also))))
            if done.rowcount == 0:
                raise NotFound(f"The {of} '{target[:200]}' uses no prompt.")

    def in_force(self) -> InForce:
        """Return what workers hold in memory. Versions that nobody uses are not read."""
        used = sa.select(uses.c.name, uses.c.version).distinct().subquery()
        version = sa.func.coalesce(used.c.version, _newest(used.c.name))
        query = sa.select(versions).join(used, sa.and_(versions.c.name == used.c.name, versions.c.version == version))
        with self._store.read() as connection:
            rows = connection.execute(query.order_by(versions.c.version))
            there = {(it.name, it.version): Prompt(it.name, it.version, it.template) for it in rows}
            newest = {name: prompt for (name, _), prompt in there.items()}
            found: dict[str, dict[str, Prompt]] = {"key": {}, "model": {}}
            for it in connection.execute(sa.select(uses)):
                prompt = newest.get(it.name) if it.version is None else there.get((it.name, it.version))
                # A missing prompt stays in the result, so that requests fail and are not answered without it
                if it.of in found:
                    found[it.of][it.target] = prompt or Prompt(str(it.name), it.version or 0, None)
            return InForce(found["key"], found["model"])

    def _versions(self, *where: sa.ColumnElement[bool]) -> list[Version]:
        with self._store.read() as connection:
            query = sa.select(versions).where(*where).order_by(versions.c.name, versions.c.version)
            return [Version.model_validate(dict(row)) for row in connection.execute(query).mappings()]


def _newest(name: sa.ColumnElement[str]) -> sa.ScalarSelect[int]:
    """The number of the newest version of the prompt of an enclosing query's row."""
    other = versions.alias()
    return sa.select(sa.func.max(other.c.version)).where(other.c.name == name).scalar_subquery()


def _unknown(name: str) -> NotFound:
    return NotFound(f"There is no prompt '{name[:64]}'. `stack prompts list` lists all prompts.")
