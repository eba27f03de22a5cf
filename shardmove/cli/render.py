"""What people read: the documents of `documents`, as tables and lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from shardmove.cli.display import duration

Document = Mapping[str, Any]

_PASSED, _NOTED, _FAILED = "[green]✓[/green]", "[yellow]![/yellow]", "[red]✗[/red]"


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in heads:
        table.add_column(head, justify="right" if head in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape("" if cell is None else str(cell)) for cell in row))
    return table


def applied(document: Document) -> RenderableType:
    return Group(*document["changes"] or ["nothing to change"], Text(), _shard_table(document["shards"]))


def shards(document: Document) -> RenderableType:
    return _shard_table(document["shards"])


def _shard_table(listed: Sequence[Document]) -> Table:
    def owned(each: Document) -> str:
        return ", ".join(f"{entry['keyspace']} {entry['range']}" for entry in each.get("ranges", ()))

    return _table(
        ("shard", "PostgreSQL", "owns", "dsn", ""),
        [(each["name"], each["server_version"], owned(each), each["dsn"], each["error"]) for each in listed],
    )


def routes(document: Document) -> RenderableType:
    rows = [
        (each["keyspace"], each["range"], each["shard"], each["move"], "held" if each["held"] else "")
        for each in document["ranges"]
    ]
    return Group(f"epoch {document['epoch']}", _table(("keyspace", "range", "shard", "move", ""), rows))


def plan(document: Document) -> RenderableType:
    several = {move["keyspace"] for move in document["moves"]}
    heads = (
        *(["keyspace"] if len(several) > 1 else []),
        "move",
        "ranges",
        "from",
        "to",
        "state",
        "rows",
        "size",
        "time",
    )
    rows = [
        (
            *([move["keyspace"]] if len(several) > 1 else []),
            *(move["id"], ", ".join(move["ranges"]), move["source"], move["target"], move["state"]),
            *_expected(move["estimate"]),
        )
        for move in document["moves"]
    ]
    return Group(
        f"plan [bold]{document['id']}[/bold]: {escape(document['description'])}",
        _table(heads, rows, right=("rows", "size", "time")),
        *_estimated(document),
        f"next: shardmove preflight {document['id']}, then shardmove run {document['id']}",
    )


def _expected(estimate: Document | None) -> Sequence[str]:
    if estimate is None:
        return ("?", "?", "?")
    return f"~{estimate['rows']:,}", f"~{decimal(estimate['bytes'])}", f"~{duration(estimate['seconds'])}"


_RATES: Mapping[str, str] = {"--rate": "as --rate says", "default": "a guess: no move was completed yet, see --rate"}


def _estimated(document: Document) -> Iterable[str]:
    """What it takes, and what could not be said."""
    for reason in dict.fromkeys(move["estimate_error"] for move in document["moves"] if move["estimate_error"]):
        yield f"not estimated: {escape(reason)}"
    estimate = document["estimate"]
    if estimate is not None:
        rows, size, time = _expected(estimate)
        whence = _RATES.get(estimate["rate_from"], f"as {estimate['rate_from']} did")
        rate = f"{estimate['rate_rows_s']:,.0f} rows/s ({whence})"
        order = " one after the other" if len(document["moves"]) > 1 else ""
        yield f"in all {rows} rows, {size}, {time} of copying{order} at {rate}"
    disk = [f"{shard} {decimal(needed)}" for shard, needed in document["disk_bytes"].items() if needed is not None]
    if disk:
        yield f"disk needed: {', '.join(disk)}"


def checklists(document: Document) -> RenderableType:
    lines: list[str] = []
    for move in document["moves"]:
        lines.append(f"[bold]{move['id']}[/bold]")
        for check in move["checks"]:
            lines += _check(check)
    return Group(*lines)


def _check(check: Document) -> list[str]:
    mark = _FAILED if not check["passed"] else _NOTED if check["note"] else _PASSED
    lines = [f"  {mark} {escape(check['check'])}"]
    if check["problem"]:
        lines.append(f"      {escape(check['problem'])}")
    if check["note"]:
        lines.append(f"      [dim]note:[/dim] {escape(check['note'])}")
    if check["hint"]:
        first, *others = check["hint"].splitlines()
        lines.append(f"      [dim]{'what to do' if check['passed'] else 'how to fix'}:[/dim] {escape(first)}")
        lines += [f"        {escape(other)}" for other in others]
    return lines


def steps(document: Document) -> RenderableType:
    lines: list[str] = []
    for move in document["moves"]:
        lines.append(f"[bold]{move['id']}[/bold]")
        lines += [f"  {number:2} {escape(text)}" for number, text in enumerate(move["steps"], 1)]
    return Group(*lines, "dry run: nothing was changed")


def moves(document: Document) -> RenderableType:
    """The outcome of a verb: where each move is now, and what can come next."""
    return Group(*[_outcome(move) for move in document["moves"]])


def _outcome(move: Document) -> str:
    line = f"move [bold]{move['id']}[/bold] is [bold]{move['state']}[/bold]"
    if move["paused"]:
        line += ", paused"
    if move["phase"] in (3, 4):
        line += f", in phase {move['phase']}: {'; '.join(_reads(move))}"
    longest_ms = move["stall_ms"]["max"]
    if longest_ms is not None:
        line += f"; its cutovers held up writes for {longest_ms:.0f} ms at most"
    next_ = _NEXT.get(move["state"])
    return line + (f"; next: {next_.format(id=move['id'])}" if next_ else "")


_NEXT: Mapping[str, str] = {
    "pending": "shardmove run {id}",
    "ready": "shardmove cutover {id}",
    "switched": "shardmove complete {id}, or back: shardmove revert {id}",
}


def statuses(document: Document) -> RenderableType:
    if not document["moves"]:
        return Group("no move is unfinished", *_routers(document))
    rows = [_status_row(move) for move in document["moves"]]
    heads = (
        "move",
        "ranges",
        "from",
        "to",
        "state",
        "phase",
        "for",
        "rows",
        "size",
        "rows/s",
        "ETA",
        "backlog",
        "notes",
    )
    table = _table(heads, rows, right=("phase", "for", "rows", "size", "rows/s", "ETA", "backlog"))
    return Group(table, *_routers(document))


def _routers(document: Document) -> list[Text]:
    """A line for all of them; those that do not go by the newest epoch, or are silent, say so."""
    if not document["routers"]:
        return []
    told = [
        f"{each['name']} (silent for {each['silent_s']:.0f} s)"
        if not each["is_live"]
        else each["name"] + (f" (epoch {each['epoch']})" if each["epoch"] < document["epoch"] else "")
        for each in document["routers"]
    ]
    return [Text(f"epoch {document['epoch']}; routers: {', '.join(told)}")]


def _status_row(move: Document) -> Sequence[object]:
    copied, estimate = move["rows_copied"], move["rows_estimate"]
    return (
        move["id"],
        ", ".join(move["ranges"]),
        move["source"],
        move["target"],
        move["state"],
        move["phase"],
        duration((datetime.now(UTC) - datetime.fromisoformat(move["state_since"])).total_seconds()),
        ""
        if copied is None
        else f"{copied:,}" + (f" of ~{estimate:,}" if move["state"] == "copying" and estimate is not None else ""),
        "" if move["bytes_copied"] is None else decimal(move["bytes_copied"]),
        "" if move["rate_rows_s"] is None else f"{move['rate_rows_s']:,.0f}",
        duration(move["eta_s"]),
        "" if move["journal_backlog"] is None else f"{move['journal_backlog']:,}",
        "; ".join(_notes(move)),
    )


def _notes(move: Document) -> list[str]:
    notes = ["paused"] if move["paused"] else []
    notes += ["unattended"] if move["unattended"] else []
    notes += _reads(move)
    notes += [f"held by {move['holder']}"] if move["holder"] else []
    if move["stall_ms"]["max"] is not None:
        notes.append(f"stall {move['stall_ms']['max']:.0f} ms at most")
    return notes + ([f"error: {move['error']}"] if move["error"] else [])


def _reads(move: Document) -> list[str]:
    """Who is read, where that is not as in every move."""
    match move["phase"]:
        case 3:
            counted = f"{move['reads_differing']:,} of {move['reads_compared']:,} reads differed"
            return [f"{move['sample_rate']:.0%} of the reads compared: {counted}"]
        case 4:
            return [f"{move['read_share']:.0%} of the sessions read from {move['target']}"]
        case _:
            return []


def verdicts(document: Document) -> RenderableType:
    heads = ("", "move", "table", "rows source", "rows target", "missing", "extra", "different", "digest")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in heads:
        table.add_column(head, justify="left" if head in ("", "move", "table", "digest") else "right")
    for each in document["tables"]:
        equal = each["digest_source"] == each["digest_target"]
        digest = each["digest_source"][:16] + ("" if equal else f" ≠ {each['digest_target'][:16]}")
        counts = [each[name] for name in ("rows_source", "rows_target", "missing", "extra", "different")]
        cells = [each["move"], escape(each["table"]), *(f"{count:,}" for count in counts), digest]
        table.add_row(_PASSED if equal else _FAILED, *cells)
    repaired = [f"{document['repaired']} keys were repaired before"] if document["repaired"] else []
    return Group(table, *repaired, "equal" if document["equal"] else "[red]the two sides differ[/red]")


def event(document: Document) -> RenderableType:
    detail = " ".join(f"{name}={value}" for name, value in document["detail"].items())
    about = document["move"] or document["plan"] or ""
    return Text(f"{document['at'][:23]}  {about:6} {document['kind']:18} {detail}", overflow="fold")


def events(document: Document) -> RenderableType:
    return Group(*[event(each) for each in document["events"]])


def findings(document: Document) -> RenderableType:
    lines: list[str] = []
    for each in document["findings"]:
        lines.append(f"{_FAILED} [bold]{each['subject']}[/bold]: {escape(each['problem'])}")
        lines.append(f"    [dim]mend:[/dim] {escape(each['mend'])}")
    return Group(*lines or ["all is well"])


def objects(document: Document) -> RenderableType:
    table = _table(("where", "kind", "name"), [(e["place"], e["kind"], e["name"]) for e in document["objects"]])
    return Group(table, "dry run: nothing was removed" if document["dry_run"] else "all of it was removed")


def grants(document: Document) -> RenderableType:
    """SQL: whatever is no statement is a comment, and no line is folded."""
    lines: list[str] = []
    for each in document["grants"]:
        lines.append(f"-- {each['place']}")
        if not each["role_exists"]:
            name = document["role"].replace('"', '""')
            lines.append(f'-- the role is to be made first: CREATE ROLE "{name}" LOGIN;')
        lines += each["statements"] or ["-- nothing is missing"]
    return Text("\n".join(lines), no_wrap=True, overflow="ignore")
