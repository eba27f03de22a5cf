"""The entry point. Worker processes import this module when they start: all that is heavy is imported by `main`."""

from __future__ import annotations


def main() -> None:
    """Runs the command of `sys.argv`, and exits with its code (see `exits`)."""
    from shardmove import faults
    from shardmove.cli.verbs import app

    faults.arm_as_ordered("command")
    app(prog_name="shardmove")
