"""Keys: `stack keys`."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.table import Table

from gateway.cli.console import Json, confirmed, day, opened, out, print_json, seconds, valid, when, whole
from gateway.cli.limits import brief, takes_limits
from gateway.cli.output import discard
from gateway.keys.book import Keybook
from gateway.keys.configured import listed_ids
from gateway.keys.entries import Entry, KeyFields, NewKeyFields
from gateway.keys.secret import pseudonym

app = typer.Typer(no_args_is_help=True, help="Create, show, change and revoke API keys.")

Id = Annotated[str, typer.Argument(metavar="ID", help="the key's id, as `stack keys list` shows it")]
Owner = Annotated[str | None, typer.Option(help="the person or team that uses the key")]
Expires = Annotated[
    str | None,
    typer.Option(help="when the key expires: after 12h, 30d or 8w; at the start of 2027-01-31 (UTC); or never"),
]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", help="a model that the key may use (repeatable); 'all' allows every model"),
]
Priority = Annotated[int | None, typer.Option(help="the key's weight in the queue of a busy engine, 1 to 100")]
Labels = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="NAME=VALUE", help="a label (repeatable); 'none' removes all labels"),
]


@app.command("create")
@takes_limits
def create(
    name: Annotated[str, typer.Argument(help="a name that tells you what the key is for")],
    *,
    owner: Owner = None,
    expires: Expires = None,
    model: Models = None,
    priority: Priority = None,
    label: Labels = None,
    users: Annotated[
        bool, typer.Option("--users", help="tell the key's users apart, by a header that their front end signs")
    ] = False,
    limits: dict[str, int | None],
    as_json: Json = False,
) -> None:
    """Create a key and print its secret. The secret cannot be shown again."""
    fields = _fields(name, owner, expires, model, priority, label) | {"limits": limits, "users": users}
    with _book() as book:
        entry, text = book.create(valid(NewKeyFields, fields))
    _say_secret(entry, text, entry.signing, as_json=as_json)


@app.command("list")
def list_keys(*, as_json: Json = False) -> None:
    """List all keys, without their secrets."""
    with _book() as book:
        entries = book.list()
    if as_json:
        return print_json([_as_json(entry) for entry in entries])
    table = Table("id", "name", "owner", "state", "expires", "models", "limits", box=None)
    for it in entries:
        models = "all" if it.models is None else ", ".join(it.models)
        table.add_row(it.id, it.name, it.owner, it.state, when(it.expires_at), models, brief(it.limits))
    out.print(
        whole(table, "name", "owner", "models", "limits")
        if entries
        else "There are no keys yet. Create one: stack keys create NAME"
    )
    return None


@app.command("show")
def show(key_id: Id, *, as_json: Json = False) -> None:
    """Show everything about one key, except its secret."""
    with _book() as book:
        _say(book.show(key_id), as_json=as_json)


@app.command("set")
def change(
    key_id: Id,
    *,
    name: Annotated[str | None, typer.Option(help="the key's new name")] = None,
    owner: Owner = None,
    expires: Expires = None,
    model: Models = None,
    priority: Priority = None,
    label: Labels = None,
    as_json: Json = False,
) -> None:
    """Change the given fields of a key, and keep the others. New labels replace all old ones. For limits, see `stack
    limits`."""
    fields = _fields(name, owner, expires, model, priority, label)
    if not fields:
        raise typer.BadParameter("name at least one field to change: see `stack keys set --help`")
    with _book() as book:
        _say(book.change(key_id, valid(KeyFields, fields)), as_json=as_json)


@app.command("rotate")
def rotate(
    key_id: Id,
    *,
    grace: Annotated[str, typer.Option(help="how long the old secret continues to work: 0, 12h, 7d")] = "1d",
    as_json: Json = False,
) -> None:
    """Create a new secret for a key. The old secret works for a grace period; that of a disabled key ends at once. An
    expired key cannot be rotated."""
    lasts = seconds(grace, years=1)
    with _book() as book:
        _say_secret(*book.rotate(key_id, lasts), as_json=as_json)


@app.command("users")
def users(
    key_id: Id,
    *,
    off: Annotated[bool, typer.Option("--off", help="do not tell its users apart any more")] = False,
    find: Annotated[
        str | None, typer.Option(metavar="NAME", help="change nothing, and print the pseudonym of this user")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell the users of a key apart: create a signing secret for their front end, and print it. An older one ends at
    once. For the limits of each user, see `stack limits`."""
    with _book() as book:
        if find is not None:
            key_id, called = book.show(key_id).id, pseudonym(key_id, find)
            return print_json({"user": called}) if as_json else out.print(called)
        entry = book.tell_users_apart(key_id, on=not off)
    with _once(entry, f"stack keys users {entry.id}"):
        if as_json:
            return print_json({"key": _as_json(entry), "signing_secret": entry.signing})
        if entry.signing:
            return _say_signing(entry.signing)
        return out.print(f"{entry.id} ({entry.name}) does not tell its users apart.")


@app.command("disable")
def disable(key_id: Id, *, as_json: Json = False) -> None:
    """Disable a key: refuse its requests, and end those that run. `enable` reverses this, for the newest secret."""
    with _book() as book:
        _say(book.change(key_id, KeyFields(disabled=True)), as_json=as_json)


@app.command("enable")
def enable(key_id: Id, *, as_json: Json = False) -> None:
    """Enable a disabled key again."""
    with _book() as book:
        _say(book.change(key_id, KeyFields(disabled=False)), as_json=as_json)


@app.command("delete")
def delete(
    key_id: Id, *, yes: Annotated[bool, typer.Option("--yes", help="do not ask for confirmation")] = False
) -> None:
    """Delete a key permanently. Its usage stays, with its name. To be able to reverse this, use `disable`."""
    with _book() as book:
        name = book.name(key_id)
        if not confirmed(f"Delete the key {key_id} ({name}) permanently?", yes=yes):
            sys.exit("Nothing was deleted. To delete it, use --yes or answer y.")
        book.delete(key_id)
    out.print(f"{key_id} ({name}) is deleted.")


# -- the store --------------------------------------------------------------------------------------------------------


@contextmanager
def _book() -> Iterator[Keybook]:
    with opened() as (store, settings):
        yield Keybook(store, listed_ids(settings))


# -- from options to values -------------------------------------------------------------------------------------------


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
            raise typer.BadParameter("--model all cannot be combined with other models")
        fields["models"] = None if models == ["all"] else models
    if labels == ["none"]:
        fields["labels"] = {}
    elif labels:
        pairs = [label.partition("=") for label in labels]
        if wrong := [label for label, (_, equals, _) in zip(labels, pairs, strict=True) if not equals]:
            raise typer.BadParameter(f"--label {wrong[0]}: write it as NAME=VALUE")
        fields["labels"] = {label: value for label, _, value in pairs}
    return fields


def _moment(words: str) -> int | None:
    """Read '30d' from now, '2027-01-31', or 'never' (None). Returns seconds since 1970."""
    if words == "never":
        return None
    if (moment := day(words)) is not None:
        if moment <= time.time():
            raise typer.BadParameter(f"{words} is in the past")
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
        "created": when(entry.created_at),
        "expires": when(entry.expires_at),
        "models": "all" if entry.models is None else ", ".join(entry.models),
        "limits": brief(entry.limits),
        "users": f"told apart; limits of each: {brief(entry.user_limits, 'none')}" if entry.users else "not told apart",
        "priority": str(entry.priority),
        "labels": ", ".join(f"{name}={value}" for name, value in entry.labels.items()) or "-",
        "secrets": "; ".join(
            f"created {when(it['created_at'])}, expires {when(it['expires_at'])}" for it in entry.secrets
        ),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    out.print(whole(table, "said"))
    return None


@contextmanager
def _once(entry: Entry, again: str) -> Iterator[None]:
    """Write what is shown only once. If that is impossible, exit and say which command replaces it."""
    try:
        yield
        sys.stdout.flush()
    except OSError as exc:
        discard()
        sys.exit(
            f"{entry.id} ({entry.name}) has a new secret, which could not be written: {exc.strerror}. "
            f"To replace it: {again}"
        )


def _say_secret(entry: Entry, text: str, signing: str | None = None, *, as_json: bool) -> None:
    with _once(entry, f"stack keys rotate {entry.id} --grace 0"):
        _tell(entry, text, signing, as_json=as_json)


def _tell(entry: Entry, text: str, signing: str | None, *, as_json: bool) -> None:
    if as_json:
        also = {"signing_secret": signing} if signing else {}
        return print_json({"key": _as_json(entry), "secret": text} | also)
    out.print(f"{entry.id} ({entry.name}). This is its secret, which is shown only once:\n\n{text}\n")
    if signing:
        _say_signing(signing)
    if entry.disabled:
        out.print(f"The key is disabled. To enable it: stack keys enable {entry.id}")
    return None


def _say_signing(signing: str) -> None:
    out.print(f"Its front end signs the names of users with this secret, which is shown only once:\n\n{signing}\n")


def _as_json(entry: Entry) -> dict[str, Any]:
    return entry.model_dump() | {"state": entry.state}
