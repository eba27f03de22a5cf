"""What the demo prints: the commands as they are typed, and the numbers at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shardmove.demo import shop

if TYPE_CHECKING:
    from shardmove.demo.story import Result

ISOLATION = {"READ_COMMITTED": "read committed", "REPEATABLE_READ": "repeatable read", "SERIALIZABLE": "serializable"}


def say(console: Console, text: str) -> None:
    console.print(f"[dim]·[/dim] {escape(text)}", highlight=False)


def typed(console: Console, words: Sequence[str]) -> None:
    console.print(f"[bold cyan]$ shardmove {escape(' '.join(words))}[/bold cyan]", highlight=False)


def asked(console: Console, statement: str) -> None:
    console.print(f"[bold cyan]shop=> {escape(statement)};[/bold cyan]", highlight=False)


def printed(console: Console, text: str) -> None:
    for line in text.rstrip().splitlines():
        console.print(f"    {line.rstrip()}", highlight=False, markup=False, overflow="ellipsis", no_wrap=True)


def configuration(catalog_dsn: str, shards: Mapping[str, str]) -> str:
    """cluster.toml: every tenant belongs to the first shard. Half of the processors are left to the clients."""
    lines = ["[catalog]", f"dsn = {json.dumps(catalog_dsn)}"]
    for name, dsn in shards.items():
        lines += [f"[shards.{name}]", f"dsn = {json.dumps(dsn)}"]
    lines += [f"[keyspaces.{shop.KEYSPACE}]", 'key_type = "bigint"', f"[keyspaces.{shop.KEYSPACE}.tables]"]
    lines += [f"{table} = {json.dumps(column)}" for table, column in shop.KEY_COLUMNS.items()]
    lines += [f"[[keyspaces.{shop.KEYSPACE}.routes]]", 'range = ":"', f"shard = {json.dumps(next(iter(shards)))}"]
    lines += ["[limits]", f"workers = {max(1, min(4, (os.cpu_count() or 2) // 2))}"]
    return "\n".join(lines) + "\n"


def show(console: Console, result: Result) -> None:
    """The numbers, and the verdict."""
    console.print()
    console.print(_tables(result))
    console.print()
    console.print(_steps(result))
    console.print()
    console.print(_stalls(result))
    console.print()
    console.print(_clients(result))
    console.print()
    _verdict(console, result)


def _table(title: str, left: str, *right: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column(left)
    for head in right:
        table.add_column(head, justify="right")
    return table


def _tables(result: Result) -> Table:
    table = _table("rows of the moved range, read again on both sides", "table", "moved", "verified", "different")
    for each in result.tables:
        differences = each["missing"] + each["extra"] + each["different"]
        table.add_row(each["table"], f"{each['rows_source']:,}", f"{each['rows_target']:,}", f"{differences:,}")
    return table


def _steps(result: Result) -> Table:
    heads = ("seconds", "writes", "writes/s", *ISOLATION.values(), "p99 ms")
    table = _table("acknowledged writes into the moving range, per step", "step", *heads)
    for step, window in result.steps:
        is_slow = step.name in result.slow_steps
        rate = f"{window.rate_s:,.0f}"
        table.add_row(
            step.name,
            f"{window.seconds:.1f}",
            f"{window.acknowledged:,}",
            f"[red]{rate}[/red]" if is_slow else rate,
            *(f"{window.by_isolation.get(name, 0):,}" for name in ISOLATION),
            f"{window.p99_ms:.1f}",
        )
    return table


def _stalls(result: Result) -> Table:
    table = _table("write stall of each cutover, as the clients measured it", "cutover", "stall ms", "writes meanwhile")
    for each, stall in result.stalls:
        cells = ("not seen", "") if stall is None else (f"{stall.stall_ms:.1f}", str(stall.disturbed))
        table.add_row(f"{each.step.name} to {each.new_owner}", *cells)
    p50, p99, longest = (result.stall_ms(percent) for percent in (50, 99, 100))
    table.add_row(f"[bold]p50 {p50:.1f}   p99 {p99:.1f}   max {longest:.1f}[/bold]")
    return table


def _clients(result: Result) -> Table:
    seen, routed = result.clients, result.routed
    table = _table("what the clients were told, through the router", "", "acknowledged", "errors", "told to try again")
    table.add_row("single statements", f"{seen.singles:,}", f"{seen.single_errors:,}", "0")
    again = f"{seen.collided} by each other, {seen.fenced_first + seen.fenced} by cutovers"
    errors = result.report.failed - seen.single_errors
    table.add_row("transactions", f"{seen.transactions:,}", f"{errors:,}", again)
    table.add_row("  that began with a write to the range", "", "", f"{seen.fenced_first} of them by cutovers")
    table.add_row(f"[dim]held by the router: {routed['held_total']:,} of {routed['statements']:,} statements[/dim]")
    return table


def _verdict(console: Console, result: Result) -> None:
    report = result.report
    for detail in (*report.details, *result.errors):
        console.print(f"[red]{escape(detail)}[/red]", highlight=False)
    if result.slow_steps:
        names = ", ".join(dict.fromkeys(result.slow_steps))
        console.print(f"[yellow]fewer than 500 writes/s on this machine in: {names}[/yellow]", highlight=False)
    colour = "green" if result.ok else "red"
    console.print(
        f"{report.acknowledged:,} acknowledged writes, {report.rows_checked:,} rows checked: [bold {colour}]lost"
        f" {report.lost}, different {report.different}, unexpected {report.unexpected}[/bold {colour}];"
        f" {report.failed} errors at clients; {result.elapsed_s:.0f} s",
        highlight=False,
    )
