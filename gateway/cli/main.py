"""Cli: the `stack` command: keys, limits, prompts and usage, from a terminal or a script.

The command works directly on the store, which it finds by the gateway's own settings. It therefore runs where the
gateway runs: in its container, or from a checkout (scripts/stack). Running gateways notice every change within a
second.
"""

import typer

from gateway.cli import keys, limits, prompts, reports
from gateway.cli.doctor import examine
from gateway.cli.output import written

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Manage keys, limits and prompts of this gateway, and show their usage.",
)
app.add_typer(keys.app, name="keys")
app.add_typer(prompts.app, name="prompts")
app.add_typer(reports.usage, name="usage")
app.command("top")(reports.top)
app.command("backup")(reports.backup)
app.command("restore")(reports.restore)
app.command("limits")(limits.limits)
app.command("doctor", hidden=True)(examine.doctor)


def main() -> None:
    """Run the `stack` command. Exits 1 with a message if a command fails, and 2 if its arguments are wrong."""
    with written():
        app(prog_name="stack")
