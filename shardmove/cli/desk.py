"""What every verb works at: the options that all of them have, the configuration, the catalog, and standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec, TypeAlias, get_type_hints

import typer
from rich.console import Console, RenderableType

from shardmove.catalog.store import Catalog
from shardmove.cli import logs
from shardmove.cli.exits import reported
from shardmove.config import Config, find, load

Arguments = ParamSpec("Arguments")
Document: TypeAlias = Mapping[str, Any]

PIPE_WIDTH = 200
"""Columns of a table that nobody's terminal bounds."""


@dataclass(frozen=True, slots=True)
class Desk:
    """The common options, and what follows from them."""

    config_file: Path | None
    as_json: bool
    debug: bool

    def config(self) -> Config:
        """Raises ConfigurationError that names the entry at fault."""
        return load(find(None if self.config_file is None else str(self.config_file)))

    def catalog(self, config: Config) -> Catalog:
        """Raises what `Catalog.connect` raises."""
        return Catalog.connect(config.catalog_dsn, routes_file=config.routes_file)

    def show(self, document: Document, render: Callable[[Document], RenderableType]) -> None:
        """Prints a command's result: the document itself with --json, else what `render` makes of it."""
        if self.as_json:
            print(json.dumps(document, indent=2, ensure_ascii=False), flush=True)
        else:
            stdout().print(render(document))

    def show_line(self, document: Document, render: Callable[[Document], RenderableType]) -> None:
        """The same for one of many results that come one by one: a line each."""
        if self.as_json:
            print(json.dumps(document, ensure_ascii=False), flush=True)
        else:
            stdout().print(render(document))


def stdout() -> Console:
    """Standard output as it is now."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


ConfigFile = Annotated[
    Path | None,
    typer.Option("-c", "--config", metavar="FILE", help="The configuration: else SHARDMOVE_CONFIG, else cluster.toml."),
]
AsJson = Annotated[bool, typer.Option("--json", help="The result as JSON on standard output, alone.")]
LogLevel = Annotated[
    logs.Level | None,
    typer.Option("--log-level", help="Logs go to standard error; info, but warning on a terminal."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from.")]

_COMMON: Mapping[str, tuple[Any, Any]] = {
    "config_file": (ConfigFile, None),
    "as_json": (AsJson, False),
    "log_level": (LogLevel, None),
    "debug": (Debug, False),
}


def verb(
    app: typer.Typer, name: str | None = None
) -> Callable[[Callable[Concatenate[Desk, Arguments], None]], Callable[Concatenate[Desk, Arguments], None]]:
    """Makes a command of a function whose first argument is the Desk: adds the options that every command has, and
    ends it with the exit code of whatever it raises."""

    def register(
        function: Callable[Concatenate[Desk, Arguments], None],
    ) -> Callable[Concatenate[Desk, Arguments], None]:
        @wraps(function)
        def command(*, config_file: Path | None, as_json: bool, log_level: logs.Level | None, debug: bool, **own: Any):  # type: ignore[no-untyped-def]
            with reported(as_json=as_json, debug=debug):
                logs.configure(log_level)
                function(Desk(config_file, as_json, debug), **own)  # type: ignore[call-arg]

        _give_signature(command, function)
        app.command(name)(command)
        return function

    return register


def _give_signature(command: Any, function: Callable[..., None]) -> None:
    """The command's parameters are the function's own, without the desk, and the common ones."""
    hints = get_type_hints(function, include_extras=True)
    own = [each.replace(annotation=hints[each.name]) for each in list(signature(function).parameters.values())[1:]]
    common = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in _COMMON.items()
    ]
    parameters = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in own] + common
    command.__signature__ = signature(function).replace(parameters=parameters)
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    del command.__wrapped__
