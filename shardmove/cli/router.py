"""Verbs of the router: serve, say where a statement would go, make a verifier."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from getpass import getpass
from typing import Annotated

import typer

from shardmove.cli.desk import Desk, Document, verb
from shardmove.cli.exits import Exit
from shardmove.cli.root import app
from shardmove.config import Address, Config
from shardmove.domain.errors import ConfigurationError
from shardmove.wire.scram import Verifier

router = typer.Typer(help="The PostgreSQL proxy that applications connect to.", no_args_is_help=True)
app.add_typer(router, name="router")


@verb(router)
def serve(
    desk: Desk,
    listen: Annotated[
        str | None, typer.Option(metavar="ADDRESSES", help="host:port or a socket's directory; instead of the file's.")
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, metavar="N", help="Instead of the file's.")] = None,
    until_eof: Annotated[
        bool, typer.Option("--until-eof", help="End with standard input, too: when whoever started it dies.")
    ] = False,
) -> None:
    """Route the statements of clients to the shards. Until SIGTERM or Ctrl-C; the second one ends it at once."""
    from router.processes import run  # a loop, TLS, the parser: for nobody else

    def load() -> Config:
        config = desk.config()
        changes = {name: value for name, value in (("listen", listen), ("processes", processes)) if value is not None}
        return replace(config, router=replace(config.router, **changes))  # type: ignore[arg-type]

    def tell(addresses: Sequence[Address]) -> None:
        if desk.as_json:
            print(json.dumps({"ready": True, "addresses": [str(each) for each in addresses]}), flush=True)
        else:
            print(f"shardmove: router ready on {', '.join(map(str, addresses))}", file=sys.stderr, flush=True)

    if until_eof:
        threading.Thread(target=_stop_at_eof, daemon=True).start()
    run(load, on_ready=tell)


def _stop_at_eof() -> None:
    while os.read(0, 4096):  # not sys.stdin: a thread that waits in it keeps the interpreter from ending
        pass
    os.kill(os.getpid(), signal.SIGTERM)


@verb(router)
def route(desk: Desk, sql: Annotated[str, typer.Argument(metavar="SQL", help="With its literals, not $1.")]) -> None:
    """Say where a statement would go by the routes of now, and change nothing."""
    from router.dry import routed

    config = desk.config()
    with desk.catalog(config) as catalog:
        document = routed(config, catalog.routes(), sql)
    desk.show(document, _rendered)
    if document["refusal"] is not None:
        raise typer.Exit(Exit.REFUSED)


def _rendered(document: Document) -> str:
    lines = [f"{document['action']} → {', '.join(document['shards']) or 'any shard'}"]
    lines += [f"  {each['range']} on {each['shard']}{' (held)' if each['held'] else ''}" for each in document["routes"]]
    if (refusal := document["refusal"]) is not None:
        lines = [f"refused ({refusal['sqlstate']}): {refusal['message']}"]
        lines += [f"  hint: {refusal['hint']}"] if refusal["hint"] else []
    return "\n".join(lines)


@verb(router)
def verifier(desk: Desk) -> None:
    """Make the verifier of a password, for [router.users]. Reads the password from the terminal, or a line of input."""
    made = str(Verifier.make(_password()))
    desk.show({"verifier": made}, lambda document: str(document["verifier"]))


def _password() -> str:
    if not sys.stdin.isatty():
        password = sys.stdin.readline().rstrip("\r\n")
    elif (password := getpass("Password: ")) != getpass("Again: "):
        raise ConfigurationError("the passwords are not the same")
    if not password:
        raise ConfigurationError("an empty password lets nobody in")
    return password
