"""Prompts: `stack prompts`."""

import sys
from contextlib import suppress
from typing import Annotated

import typer
from rich.table import Table

from gateway import config
from gateway.cli.console import Json, opened, out, print_json, valid, when, whole
from gateway.errors import StackError
from gateway.prompts.book import Of, Promptbook, Use
from gateway.upstream.model_names import look_up

app = typer.Typer(
    no_args_is_help=True,
    help="Manage the texts that the gateway puts before the requests of a key, or before the requests to a model.",
)


@app.command("set")
def set_prompt(
    name: Annotated[str, typer.Argument(help="letters, digits, '.', '_' and '-'")],
    file: Annotated[
        typer.FileText, typer.Argument(help="the file with the template; '-' reads standard input", encoding="utf-8")
    ],
) -> None:
    """Create a prompt, or its next version. The template may use {{ key_name }}, {{ owner }}, {{ labels.NAME }},
    {{ model }} and {{ date }}."""
    named = valid(Use, {"name": name})
    try:
        template = file.read()
    except UnicodeDecodeError:
        sys.exit("The file with the template is not UTF-8 text.")
    with opened() as (store, _):
        made = Promptbook(store).set(named.name, template)
    out.print(f"{made.name} version {made.version}")


@app.command("list")
def list_prompts(*, as_json: Json = False) -> None:
    """List all prompts, with the keys and models that use them."""
    with opened() as (store, _):
        found, held = Promptbook(store).newest(), Promptbook(store).uses()
    if as_json:
        return print_json({"data": [it.model_dump() for it in found], "uses": [it.model_dump() for it in held]})
    table = Table("name", "newest", "created", "used by", box=None)
    for it in found:
        whom = [
            f"{u.of} {u.target}" + (f" (version {u.version})" if u.version else "") for u in held if u.name == it.name
        ]
        table.add_row(it.name, str(it.version), when(it.created_at), ", ".join(whom) or "nobody")
    out.print(
        whole(table, "name", "used by")
        if found
        else "There are no prompts yet. Create one: stack prompts set NAME FILE"
    )
    return None


@app.command("show")
def show_prompt(
    name: Annotated[str, typer.Argument()],
    *,
    version: Annotated[int | None, typer.Option(help="a version other than the newest")] = None,
) -> None:
    """Print a prompt's template."""
    with opened() as (store, _):
        found = Promptbook(store).show(name)
    wanted = [it for it in found if version in (None, it.version)]
    if not wanted:
        sys.exit(f"The prompt '{name}' has no version {version}.")
    sys.stdout.write(wanted[-1].template)


@app.command("use")
def use_prompt(
    name: Annotated[str, typer.Argument()],
    *,
    key: Annotated[str | None, typer.Option(metavar="ID", help="for this key")] = None,
    model: Annotated[str | None, typer.Option(help="for this model, for all keys")] = None,
    version: Annotated[int | None, typer.Option(help="always this version; default: the newest")] = None,
) -> None:
    """Use a prompt for a key or a model."""
    of, target = _whom(key, model)
    use = valid(Use, {"name": name, "version": version})
    with opened() as (store, settings):
        if of == "model":
            target = look_up(config.load(settings), target, listed=config.names_no_models(settings))
        Promptbook(store).use(of, target, use)
    out.print(f"The {of} {target} now uses the prompt {name}.")


@app.command("stop")
def stop_prompt(
    *,
    key: Annotated[str | None, typer.Option(metavar="ID", help="for this key")] = None,
    model: Annotated[str | None, typer.Option(help="for this model")] = None,
) -> None:
    """Use no prompt for a key or a model any more."""
    of, target = _whom(key, model)
    with opened() as (store, settings):
        also = []
        with suppress(StackError):  # a model that was removed may still have a prompt
            if of == "model":
                also = [look_up(config.load(settings), target, listed=config.names_no_models(settings))]
        Promptbook(store).stop(of, target, *also)
    out.print(f"The {of} {target} uses no prompt any more.")


@app.command("delete")
def delete_prompt(name: Annotated[str, typer.Argument()]) -> None:
    """Delete a prompt that no key or model uses, with all its versions."""
    with opened() as (store, _):
        Promptbook(store).delete(name)
    out.print(f"{name} is deleted.")


def _whom(key: str | None, model: str | None) -> tuple[Of, str]:
    if (key is None) == (model is None):
        raise typer.BadParameter("give either --key ID or --model NAME")
    return ("key", key) if key is not None else ("model", model or "")
