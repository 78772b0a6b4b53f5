"""Limits: `stack limits`, and the options for limits that `stack keys` has too."""

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from gateway.cli.console import Json, opened, out, print_json, valid, whole
from gateway.keys.book import Keybook
from gateway.keys.configured import defaults, listed_ids
from gateway.keys.entries import KeyFields
from gateway.keys.limit_fields import LimitFields, Limits
from gateway.limits.rules import quotas_used
from gateway.usage.rows import UsageBook

Limit = Annotated[str | None, typer.Option(metavar="N", help="a whole number, or 'default'")]


def takes_limits(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each limit, in place of its keyword `limits`. It gets there what was given: None is
    'default'. Raises typer.BadParameter for other words than a whole number.
    """
    signature, names = inspect.signature(command, eval_str=True), tuple(LimitFields.model_fields)
    options = [inspect.Parameter(it, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Limit) for it in names]
    parameters = [it for own in signature.parameters.values() for it in (options if own.name == "limits" else [own])]

    @functools.wraps(command)
    def taking(*args: Any, **given: Any) -> None:
        words = {name: given.pop(name) for name in names}
        command(*args, limits=_limit_values(words), **given)

    taking.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    taking.__annotations__ = {it.name: it.annotation for it in parameters}
    return taking


@takes_limits
def limits(
    key_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="a key's id; without an id: the defaults")
    ] = None,
    *,
    each_user: Annotated[
        bool, typer.Option("--each-user", help="the limits of each user, of a key that tells its users apart")
    ] = False,
    limits: dict[str, int | None],
    as_json: Json = False,
) -> None:
    """Show or change the limits of a key. Without an ID, show or change the defaults, for keys without limits of
    their own. The value 'default' removes a limit: for a key, the default then applies; for a default, the setting
    (STACK_LIMIT_…). The headers of an engine's answers show what is left of a minute's limit."""
    if each_user and key_id is None:
        raise typer.BadParameter("--each-user needs the ID of a key")
    asked = valid(KeyFields, {"limits": limits}).limits
    used: dict[str, int] = {}
    with opened() as (store, settings):
        book = Keybook(store, listed_ids(settings))
        if key_id is None:
            own, source, other = book.set_defaults(asked) if limits else book.defaults(), "the store", "the settings"
            general = defaults(settings)
        elif each_user:
            entry = book.change(key_id, KeyFields(user_limits=asked)) if limits else book.show(key_id)
            own, source, other, general = entry.user_limits, "the key", "-", Limits()
        else:
            entry = book.change(key_id, KeyFields(limits=asked)) if limits else book.show(key_id)
            own, source, other = entry.limits, "the key", "the defaults"
            general = book.defaults().over(defaults(settings))
            used = quotas_used(UsageBook(store), key_id)
    in_force = asdict(own.over(general))
    if as_json:
        return print_json({"in_force": in_force, "own": own.model_dump(exclude_none=True), "used": used})
    table = Table("limit", "in force", "from", "used", box=None)
    for name, value in in_force.items():
        whence = other if getattr(own, name) is None else source
        table.add_row(name.replace("_", " "), _number(value), whence, f"{used[name]:,}" if name in used else "")
    out.print(whole(table, "limit", "from"))
    return None


def _limit_values(words: dict[str, str | None]) -> dict[str, int | None]:
    """Read the options of limits. Those that are left out are not in the result; None is 'default'. Raises
    typer.BadParameter."""
    limits: dict[str, int | None] = {}
    for name, word in words.items():
        if word is None:
            continue
        if word != "default" and not re.fullmatch(r"[0-9]{1,99}", word):
            raise typer.BadParameter(f"--{name.replace('_', '-')} {word}: it must be a whole number or 'default'")
        limits[name] = None if word == "default" else int(word)
    return limits


def brief(limits: LimitFields, none: str = "the defaults") -> str:
    """Write limits on one line."""
    given = limits.model_dump(exclude_none=True)
    return ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in given.items()) or none


def _number(value: int | None) -> str:
    return "none" if value is None else f"{value:,}"
