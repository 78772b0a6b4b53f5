"""Cli: the `stack` command: keys, limits and usage, from a terminal or a script.

It works on the store itself, which it finds by the gateway's own settings: so it is run where the gateway is, in its
container or from a checkout (scripts/stack). Running gateways learn of every change within a second.
"""

import datetime as dt
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from io import TextIOWrapper
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError
from rich.table import Table

from gateway import complaints, reports
from gateway.console import Json, confirmed, day, opened, out, print_json, seconds, whole
from gateway.keybook import Entry, Keybook, KeyFields, LimitFields, NewKeyFields
from gateway.keys import defaults, listed_ids
from gateway.limits import quotas_used
from gateway.promptbook import Of, Promptbook, Use
from gateway.usage import UsageBook

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Keys, limits and usage of this gateway.")
keys = typer.Typer(no_args_is_help=True, help="Make, show, change and take back API keys.")
app.add_typer(keys, name="keys")
prompts = typer.Typer(no_args_is_help=True, help="Text of yours that stands before what a key, or a model, is asked.")
app.add_typer(prompts, name="prompts")
app.add_typer(reports.usage, name="usage")
app.command("top")(reports.top)
app.command("backup")(reports.backup)
app.command("restore")(reports.restore)

Fields = TypeVar("Fields", bound=BaseModel)

Id = Annotated[str, typer.Argument(metavar="ID", help="the key's id, as `stack keys list` shows it")]
Owner = Annotated[str | None, typer.Option(help="whose it is")]
Expires = Annotated[
    str | None, typer.Option(help="when it ends: in 12h, 30d, 8w; on 2027-01-31 (UTC, its beginning); or never")
]
Models = Annotated[list[str] | None, typer.Option("--model", help="a model it may use; repeat it; 'all' for all")]
Priority = Annotated[int | None, typer.Option(help="its weight in the queue of a busy engine, 1 to 100")]
Labels = Annotated[list[str] | None, typer.Option("--label", metavar="NAME=VALUE", help="repeat it; 'none' for none")]
Limit = Annotated[str | None, typer.Option(metavar="N", help="a whole number, or 'default'")]


@keys.command("create")
def create(
    name: Annotated[str, typer.Argument(help="by which you know it again")],
    *,
    owner: Owner = None,
    expires: Expires = None,
    model: Models = None,
    priority: Priority = None,
    label: Labels = None,
    requests_per_minute: Limit = None,
    tokens_per_minute: Limit = None,
    concurrent: Limit = None,
    tokens_per_day: Limit = None,
    tokens_per_month: Limit = None,
    as_json: Json = False,
) -> None:
    """Make a key and print its secret, which can't be had again."""
    limits = _limits(requests_per_minute, tokens_per_minute, concurrent, tokens_per_day, tokens_per_month)
    fields = _fields(name, owner, expires, model, priority, label) | {"limits": limits}
    with _book() as book:
        _say_secret(*book.create(_valid(NewKeyFields, fields)), as_json=as_json)


@keys.command("list")
def list_keys(*, as_json: Json = False) -> None:
    """All keys, without their secrets."""
    with _book() as book:
        entries = book.list()
    if as_json:
        return print_json([_as_json(entry) for entry in entries])
    table = Table("id", "name", "owner", "state", "expires", "models", "limits", box=None)
    for it in entries:
        models = "all" if it.models is None else ", ".join(it.models)
        table.add_row(it.id, it.name, it.owner, it.state, _when(it.expires_at), models, _brief(it.limits))
    out.print(
        whole(table, "name", "owner", "models", "limits")
        if entries
        else "There are no keys yet: stack keys create NAME"
    )
    return None


@keys.command("show")
def show(key_id: Id, *, as_json: Json = False) -> None:
    """One key, with all that is known of it."""
    with _book() as book:
        _say(book.show(key_id), as_json=as_json)


@keys.command("set")
def change(
    key_id: Id,
    *,
    name: Annotated[str | None, typer.Option(help="its new name")] = None,
    owner: Owner = None,
    expires: Expires = None,
    model: Models = None,
    priority: Priority = None,
    label: Labels = None,
    as_json: Json = False,
) -> None:
    """Change what is given; the rest stays. Labels are replaced all together. Limits: `stack limits`."""
    fields = _fields(name, owner, expires, model, priority, label)
    if not fields:
        raise typer.BadParameter("say what to change: see `stack keys set --help`")
    with _book() as book:
        _say(book.change(key_id, _valid(KeyFields, fields)), as_json=as_json)


@keys.command("rotate")
def rotate(
    key_id: Id,
    *,
    grace: Annotated[str, typer.Option(help="for how long the old secret goes on working: 0, 12h, 7d")] = "1d",
    as_json: Json = False,
) -> None:
    """Make a new secret; the old one works for a while beside it. The key must not be disabled, nor have expired."""
    lasts = seconds(grace, years=1)
    with _book() as book:
        _say_secret(*book.rotate(key_id, lasts), as_json=as_json)


@keys.command("disable")
def disable(key_id: Id, *, as_json: Json = False) -> None:
    """Refuse it from now on; `enable` takes that back."""
    with _book() as book:
        _say(book.change(key_id, KeyFields(disabled=True)), as_json=as_json)


@keys.command("enable")
def enable(key_id: Id, *, as_json: Json = False) -> None:
    """Accept it again."""
    with _book() as book:
        _say(book.change(key_id, KeyFields(disabled=False)), as_json=as_json)


@keys.command("delete")
def delete(key_id: Id, *, yes: Annotated[bool, typer.Option("--yes", help="don't ask")] = False) -> None:
    """Delete it for good; its usage stays, with its name. To be able to take that back, `disable` it."""
    with _book() as book:
        entry = book.show(key_id)
        if not confirmed(f"Delete the key {entry.id} ({entry.name}) for good?", yes=yes):
            sys.exit("Nothing was deleted: say --yes, or answer y.")
        book.delete(key_id)
    out.print(f"{entry.id} ({entry.name}) is deleted.")


@app.command("limits")
def limits(
    key_id: Annotated[str | None, typer.Argument(metavar="[ID]", help="a key's id; without one: the defaults")] = None,
    *,
    requests_per_minute: Limit = None,
    tokens_per_minute: Limit = None,
    concurrent: Limit = None,
    tokens_per_day: Limit = None,
    tokens_per_month: Limit = None,
    as_json: Json = False,
) -> None:
    """Show or change what a key may use, or with no ID what keys may use that have no limits of their own. 'default'
    gives a key's limit back to those, and one of those back to the settings (STACK_LIMIT_…). What is left of a minute's
    limit is said by the headers of every answer."""
    words = _limits(requests_per_minute, tokens_per_minute, concurrent, tokens_per_day, tokens_per_month)
    asked = _valid(KeyFields, {"limits": words}).limits
    used: dict[str, int] = {}
    with opened() as (store, settings):
        book = Keybook(store, listed_ids(settings))
        if key_id is None:
            own, source, other = book.set_defaults(asked) if words else book.defaults(), "the store", "the settings"
            general = defaults(settings)
        else:
            entry = book.change(key_id, KeyFields(limits=asked)) if words else book.show(key_id)
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


@prompts.command("set")
def set_prompt(
    name: Annotated[str, typer.Argument(help="letters, digits, '.', '_' and '-'")],
    file: Annotated[typer.FileText, typer.Argument(help="the template; '-' reads it from standard input")],
) -> None:
    """Make a prompt, or its next version. It may use {{ key_name }}, {{ owner }}, {{ labels.NAME }}, {{ model }} and
    {{ date }}."""
    named = _valid(Use, {"name": name})
    with opened() as (store, _):
        made = Promptbook(store).set(named.name, file.read())
    out.print(f"{made.name} version {made.version}")


@prompts.command("list")
def list_prompts(*, as_json: Json = False) -> None:
    """Every prompt, and whom it holds for."""
    with opened() as (store, _):
        found, held = Promptbook(store).newest(), Promptbook(store).uses()
    if as_json:
        return print_json({"data": [it.model_dump() for it in found], "uses": [it.model_dump() for it in held]})
    table = Table("name", "newest", "made", "holds for", box=None)
    for it in found:
        whom = [
            f"{u.of} {u.target}" + (f" (version {u.version})" if u.version else "") for u in held if u.name == it.name
        ]
        table.add_row(it.name, str(it.version), _when(it.created_at), ", ".join(whom) or "nobody")
    out.print(whole(table, "name", "holds for") if found else "There are no prompts yet: stack prompts set NAME FILE")
    return None


@prompts.command("show")
def show_prompt(
    name: Annotated[str, typer.Argument()],
    *,
    version: Annotated[int | None, typer.Option(help="not the newest")] = None,
) -> None:
    """Print a prompt's template."""
    with opened() as (store, _):
        found = Promptbook(store).show(name)
    wanted = [it for it in found if version in (None, it.version)]
    if not wanted:
        sys.exit(f"The prompt '{name}' has no version {version}.")
    sys.stdout.write(wanted[-1].template)


@prompts.command("use")
def use_prompt(
    name: Annotated[str, typer.Argument()],
    *,
    key: Annotated[str | None, typer.Option(metavar="ID", help="for this key")] = None,
    model: Annotated[str | None, typer.Option(help="for this model, whoever asks it")] = None,
    version: Annotated[int | None, typer.Option(help="this one for good, not the newest")] = None,
) -> None:
    """Let a prompt hold for a key or a model."""
    of, target = _whom(key, model)
    use = _valid(Use, {"name": name, "version": version})
    with opened() as (store, _):
        Promptbook(store).use(of, target, use)
    out.print(f"{name} holds for the {of} {target}.")


@prompts.command("stop")
def stop_prompt(
    *,
    key: Annotated[str | None, typer.Option(metavar="ID", help="for this key")] = None,
    model: Annotated[str | None, typer.Option(help="for this model")] = None,
) -> None:
    """Let none hold any more."""
    of, target = _whom(key, model)
    with opened() as (store, _):
        Promptbook(store).stop(of, target)
    out.print(f"No prompt holds for the {of} {target} any more.")


@prompts.command("delete")
def delete_prompt(name: Annotated[str, typer.Argument()]) -> None:
    """Delete a prompt that holds for nobody, with all its versions."""
    with opened() as (store, _):
        Promptbook(store).delete(name)
    out.print(f"{name} is deleted.")


def _whom(key: str | None, model: str | None) -> tuple[Of, str]:
    if (key is None) == (model is None):
        raise typer.BadParameter("say --key ID or --model NAME")
    return ("key", key) if key is not None else ("model", model or "")


def main() -> None:
    """The `stack` command. Exits 1 with a sentence where something can't be done, 2 where the words are wrong."""
    if isinstance(sys.stdout, TextIOWrapper):  # what a terminal can't show is no reason to show nothing
        sys.stdout.reconfigure(errors="backslashreplace")
    app(prog_name="stack")


# -- the store --------------------------------------------------------------------------------------------------------


@contextmanager
def _book() -> Iterator[Keybook]:
    with opened() as (store, settings):
        yield Keybook(store, listed_ids(settings))


# -- from words to values ---------------------------------------------------------------------------------------------


def _fields(
    name: str | None,
    owner: str | None,
    expires: str | None,
    models: list[str] | None,
    priority: int | None,
    labels: list[str] | None,
) -> dict[str, Any]:
    given: dict[str, Any] = {"name": name, "owner": owner, "priority": priority}
    fields = {field: value for field, value in given.items() if value is not None}
    if expires is not None:
        fields["expires_at"] = _moment(expires)
    if models:
        if "all" in models and len(models) > 1:
            raise typer.BadParameter("--model all stands alone: it is every model")
        fields["models"] = None if models == ["all"] else models
    if labels == ["none"]:
        fields["labels"] = {}
    elif labels:
        pairs = [label.partition("=") for label in labels]
        if wrong := [label for label, (_, equals, _) in zip(labels, pairs, strict=True) if not equals]:
            raise typer.BadParameter(f"--label {wrong[0]}: write it as NAME=VALUE")
        fields["labels"] = {label: value for label, _, value in pairs}
    return fields


def _limits(*words: str | None) -> dict[str, int | None]:
    limits: dict[str, int | None] = {}
    for name, word in zip(LimitFields.model_fields, words, strict=True):
        if word is None:
            continue
        if word != "default" and not re.fullmatch(r"[0-9]{1,99}", word):
            raise typer.BadParameter(f"--{name.replace('_', '-')} {word}: a whole number, or 'default'")
        limits[name] = None if word == "default" else int(word)
    return limits


def _valid(model: type[Fields], fields: dict[str, Any]) -> Fields:
    try:
        return model.model_validate(fields)
    except ValidationError as exc:
        raise typer.BadParameter(": ".join(complaints.first(exc, model))) from None


def _moment(words: str) -> int | None:
    """'30d' from now, '2027-01-31', or 'never'; seconds since 1970."""
    if words == "never":
        return None
    if (moment := day(words)) is not None:
        if moment <= time.time():
            raise typer.BadParameter(f"{words} is over")
        return moment
    return int(time.time()) + seconds(words, years=100)


# -- from values to words ---------------------------------------------------------------------------------------------


def _say(entry: Entry, *, as_json: bool) -> None:
    if as_json:
        return print_json(_as_json(entry))
    table = Table("what", "said", box=None, show_header=False)
    rows = {
        "id": entry.id,
        "name": entry.name,
        "owner": entry.owner or "-",
        "state": entry.state,
        "made": _when(entry.created_at),
        "expires": _when(entry.expires_at),
        "models": "all" if entry.models is None else ", ".join(entry.models),
        "limits": _brief(entry.limits),
        "priority": str(entry.priority),
        "labels": ", ".join(f"{name}={value}" for name, value in entry.labels.items()) or "-",
        "secrets": "; ".join(
            f"made {_when(it['created_at'])}, until {_when(it['expires_at'])}" for it in entry.secrets
        ),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    out.print(whole(table, "said"))
    return None


def _say_secret(entry: Entry, text: str, *, as_json: bool) -> None:
    if as_json:
        return print_json({"key": _as_json(entry), "secret": text})
    out.print(f"{entry.id} ({entry.name}). Its secret, shown this once:\n\n{text}\n")
    if entry.disabled:
        out.print(f"It is disabled: `stack keys enable {entry.id}` puts it in force.")
    return None


def _as_json(entry: Entry) -> dict[str, Any]:
    return entry.model_dump() | {"state": entry.state}


def _when(moment: int | None) -> str:
    if moment is None:
        return "never"
    return dt.datetime.fromtimestamp(moment, dt.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _brief(limits: LimitFields) -> str:
    given = limits.model_dump(exclude_none=True)
    return ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in given.items()) or "the defaults"


def _number(value: int | None) -> str:
    return "none" if value is None else f"{value:,}"


if __name__ == "__main__":
    main()
