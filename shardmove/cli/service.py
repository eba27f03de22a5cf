"""Verbs that stay: the attendant and the demo."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from typing import Annotated

import structlog
import typer
from rich.console import Console
from typer.testing import CliRunner

from shardmove.cli.desk import Desk, stdout, verb
from shardmove.cli.root import app
from shardmove.cli.signals import stoppable
from shardmove.coordinator.attending import attend


@verb(app)
def serve(
    desk: Desk,
    until_eof: Annotated[
        bool, typer.Option("--until-eof", help="End with standard input, too: when whoever started it dies.")
    ] = False,
) -> None:
    """Attend every move in the background: mirror both ways, finish abandoned cutovers. Until Ctrl-C."""
    config, log = desk.config(), structlog.get_logger("shardmove")
    desk.catalog(config).close()  # a configuration that cannot work ends here, and not in an attendant's log
    with stoppable() as stop:
        if until_eof:
            threading.Thread(target=_stop_at_eof, args=(stop,), daemon=True).start()
        log.info("attending", shards=sorted(config.shards))
        attend(config, lambda: desk.catalog(config), stop)
        log.info("stopped")


def _stop_at_eof(stop: threading.Event) -> None:
    sys.stdin.buffer.read()
    stop.set()


@verb(app)
def demo(desk: Desk, rows: Annotated[int, typer.Option(help="Rows of the shop before it is split.")] = 150_000) -> None:
    """Split a shop under load on embedded servers, and check that nothing was lost."""
    from shardmove.demo.story import Done, tell  # its servers come with an extra of the package

    def typist(words: Sequence[str]) -> Done:
        ended = CliRunner().invoke(app, list(words), prog_name="shardmove")
        return Done(ended.exit_code, ended.stdout, ended.stderr)

    result = tell(Console(stderr=True) if desk.as_json else stdout(), typist, rows=rows)
    if desk.as_json:
        desk.show(result.document(), str)
