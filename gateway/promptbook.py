"""Promptbook: the prompts as they are kept, every version of each, and whom they hold for.

A prompt is never changed: setting it again makes the next version, which then holds wherever no version was named.
"""

import time
from typing import Annotated, Literal

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field

from gateway import keybook
from gateway.complaints import WORD
from gateway.errors import BadRequest, NotFound
from gateway.prompts import Prompt, TemplateRefusedError, check
from gateway.store import Store, metadata

Name = Annotated[str, Field(pattern=WORD)]
Of = Literal["key", "model"]

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
    sa.Column("target", sa.String(200), primary_key=True),  # a key's id, or a model's name here
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("version", sa.Integer),  # null: the newest
)


class Template(BaseModel):
    """What a prompt says: a template with the variables of gateway.prompts."""

    model_config = ConfigDict(extra="forbid")

    template: str


class Use(BaseModel):
    """Which prompt holds; without a version always the newest."""

    model_config = ConfigDict(extra="forbid")

    name: Name
    version: Annotated[int, Field(ge=1)] | None = None


class Version(BaseModel):
    """One version of a prompt as it is kept."""

    name: str
    version: int
    template: str
    created_at: int


class Holds(BaseModel):
    """For whom a prompt holds."""

    of: Of
    target: str
    name: str
    version: int | None


class Promptbook:
    """The prompts in a store. Raises NotFound, BadRequest, StoreUnavailable."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def set(self, name: str, template: str) -> Version:
        """Make the next version of a prompt, its first where there is none."""
        try:
            check(template)
        except TemplateRefusedError as exc:
            raise BadRequest(str(exc), param="template") from None
        with self._store.change() as connection:
            newest = sa.select(sa.func.max(versions.c.version)).where(versions.c.name == name)
            number = (connection.execute(newest).scalar() or 0) + 1
            row = {"name": name, "version": number, "template": template, "created_at": int(time.time())}
            connection.execute(versions.insert().values(row))
        return Version.model_validate(row)

    def newest(self) -> list[Version]:
        """Every prompt's newest version."""
        return list({it.name: it for it in self._versions()}.values())

    def show(self, name: str) -> list[Version]:
        """All versions, the oldest first."""
        found = self._versions(versions.c.name == name)
        if not found:
            raise _unknown(name)
        return found

    def delete(self, name: str) -> None:
        """All versions. Refused while it holds for anybody."""
        with self._store.change() as connection:
            held = connection.execute(sa.select(uses).where(uses.c.name == name)).first()
            if held is not None:
                raise BadRequest(
                    f"The prompt '{name}' holds for the {held.of} '{held.target}': give that another one first.",
                    param="name",
                )
            if connection.execute(versions.delete().where(versions.c.name == name)).rowcount == 0:
                raise _unknown(name)

    def uses(self) -> list[Holds]:
        """For whom which prompt holds."""
        with self._store.read() as connection:
            rows = connection.execute(sa.select(uses).order_by(uses.c.of, uses.c.target)).mappings()
            return [Holds.model_validate(dict(row)) for row in rows]

    def use(self, of: Of, target: str, use: Use) -> Holds:
        """Let a prompt hold for a key or a model, in place of what held before."""
        row = {"of": of, "target": target, "name": use.name, "version": use.version}
        with self._store.change() as connection:
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

    def stop(self, of: Of, target: str) -> None:
        """Let none hold any more."""
        with self._store.change() as connection:
            done = connection.execute(uses.delete().where(uses.c.of == of, uses.c.target == target))
            if done.rowcount == 0:
                raise NotFound(f"No prompt holds for the {of} '{target[:200]}'.")

    def in_force(self) -> tuple[dict[str, Prompt], dict[str, Prompt]]:
        """What workers hold in memory: prompts by key id, and by model."""
        with self._store.read() as connection:
            rows = connection.execute(sa.select(versions).order_by(versions.c.version))
            there = {(it.name, it.version): Prompt(it.name, it.version, it.template) for it in rows}
            newest = {name: prompt for (name, _), prompt in there.items()}
            found: dict[str, dict[str, Prompt]] = {"key": {}, "model": {}}
            for it in connection.execute(sa.select(uses)):
                prompt = newest.get(it.name) if it.version is None else there.get((it.name, it.version))
                if prompt is not None:
                    found[it.of][it.target] = prompt
            return found["key"], found["model"]

    def _versions(self, *where: sa.ColumnElement[bool]) -> list[Version]:
        with self._store.read() as connection:
            query = sa.select(versions).where(*where).order_by(versions.c.name, versions.c.version)
            return [Version.model_validate(dict(row)) for row in connection.execute(query).mappings()]


def _unknown(name: str) -> NotFound:
    return NotFound(f"There is no prompt '{name[:64]}'. `stack prompts list` shows those there are.")
