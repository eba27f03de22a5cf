"""The application that the verbs are added to."""

from __future__ import annotations

from typing import Annotated

import typer

from shardmove import __version__

app = typer.Typer(
    help="Moves key ranges between plain PostgreSQL servers: online, verified row for row, reversible.",
    epilog="Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 differences, 4 refused, 5 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 120},
)

Id = Annotated[str, typer.Argument(metavar="ID", help="A plan's or a move's id.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List the steps; change nothing.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"shardmove {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="The release, and nothing else.")
    ] = False,
) -> None:
    """Options of the application itself."""
