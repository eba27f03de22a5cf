"""COPY: which rows come or go, and where their keys stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from router.statements.actions import NOT_SUPPORTED, Action, CopyOut, CopySpec, Part, Place, Refusal
from router.statements.naming import named_in
from router.statements.statement import Statement
from router.statements.tables import Split


def copy_part(s: Statement, part_of: Callable[[Statement], Part]) -> Part:
    if s.token(1).text == "(":
        return _copy_query(s, part_of)
    is_old_binary = (
        s.word(1) == "BINARY" and s.token(2).kind in ("word", "identifier") and s.word(2) not in ("FROM", "TO")
    )
    first = position = 2 if is_old_binary else 1
    schema = None
    if s.token(position + 1).text == ".":
        schema, position = s.token(position).name, position + 2
    split = s.tables.find(schema, s.token(position).name)
    name_end = position + 1
    columns, position = _columns(s, name_end)
    direction, place = s.word(position), s.word(position + 1)
    if direction not in ("FROM", "TO"):
        return _refused("42601", "the router cannot read this COPY statement")
    if place not in ("STDIN", "STDOUT"):
        if split is not None:
            return _refused(NOT_SUPPORTED, "COPY of a file reads or writes one server's files", "use STDIN and STDOUT")
        return Part(Action.HOME, is_write=direction == "FROM")
    options = _options(s, position + 2)
    if is_old_binary:
        options["format"] = "binary"
    if direction == "TO":
        return _copy_out(s, split, options, (first, name_end), columns)
    return _copy_in(s, split, columns, options)


def _copy_query(s: Statement, part_of: Callable[[Statement], Part]) -> Part:
    """COPY (SELECT …) TO STDOUT goes where the query goes."""
    depth, end = 0, 1
    for end in range(1, len(s.tokens)):
        depth += (s.token(end).text == "(") - (s.token(end).text == ")")
        if depth == 0:
            break
    inner = replace(part_of(s.slice(2, end)), start=s.first + 2, end=s.first + end)
    if s.words(end + 1, 2) != ("TO", "STDOUT"):
        if inner.keyspaces:
            return _refused(NOT_SUPPORTED, "COPY to a file writes one server's files", "use STDOUT")
        return Part(Action.HOME, is_write=True)
    options = _options(s, end + 3)
    return Part(
        Action.COPY_OUT,
        obstacle=_unjoinable(options),
        inner=inner,
        is_write=inner.is_write,
        keyspaces=inner.keyspaces,
        tables=inner.tables,
        kind=options.get("format", "text"),
    )


def _unjoinable(options: dict[str, str]) -> Refusal | None:
    """Rows in binary have a head and an end, and a header is no row: shards' answers cannot just be put together."""
    if options.get("format") != "binary" and not _is_on(options.get("header", "false")):
        return None
    what = "binary rows" if options.get("format") == "binary" else "a header"
    return Refusal(NOT_SUPPORTED, f"COPY with {what} from several shards", "use text or CSV without HEADER")


def _columns(s: Statement, position: int) -> tuple[list[str] | None, int]:
    if s.token(position).text != "(":
        return None, position
    names: list[str] = []
    position += 1
    while position < len(s.tokens) and s.token(position).text != ")":
        if s.token(position).text != ",":
            names.append(s.token(position).name)
        position += 1
    return names, position + 1


_FLAGS = frozenset({"HEADER", "FREEZE", "CSV", "BINARY", "TEXT"})


def _options(s: Statement, position: int) -> dict[str, str]:
    """Both spellings: `(FORMAT csv, HEADER)` and `CSV HEADER`. Names in small letters, values as text."""
    options: dict[str, str] = {}
    is_list = False
    while position < len(s.tokens):
        token, word = s.token(position), s.word(position)
        if word == "WITH" or token.text in ("(", ",", ")"):
            is_list = is_list or token.text == "("
            if word == "WITH" and s.word(position + 1) in ("CSV", "BINARY"):
                is_list = False
            position += 1
            continue
        if word == "WHERE":
            options["where"] = "true"
            break
        if word in ("CSV", "BINARY") and not is_list:
            options["format"] = word.lower()
            position += 1
            continue
        if word in ("FORCE_NULL", "FORCE_NOT_NULL", "FORCE_QUOTE") or (word == "FORCE" and not is_list):
            position, name = _force(s, position, word)
            options[name] = "true"
            continue
        position += 1
        following = s.token(position)
        if following.word == "AS" and not is_list:
            position += 1
            following = s.token(position)
        if following.text in (",", ")", "") or (word in _FLAGS and not is_list):
            options[word.lower()] = "true"
            continue
        options[word.lower()] = s.literal(following).text if following.literal >= 0 else following.name
        position += 1
    return options


def _force(s: Statement, position: int, word: str) -> tuple[int, str]:
    name = word.lower()
    if word == "FORCE":
        count = 3 if s.word(position + 1) == "NOT" else 2
        name = "_".join(s.words(position, count)).lower()
        position += count - 1
    position += 1
    if s.token(position).text == "(":
        while position < len(s.tokens) and s.token(position).text != ")":
            position += 1
        return position + 1, name
    while position < len(s.tokens) and (s.token(position + 1).text == "," or s.token(position).text == ","):
        position += 1
    return position + 1, name


def _copy_out(
    s: Statement, split: Split | None, options: dict[str, str], named: tuple[int, int], columns: list[str] | None
) -> Part:
    kind = options.get("format", "text")
    if split is None:
        return Part(Action.COPY_OUT, kind=kind)
    if split.column is None:
        return Part(Action.COPY_OUT, kind=kind, tables=(split.table,))
    place = Place(
        s.first + named[0], s.first + named[1], s.token(named[1] - 1).text, False,
        split.keyspace.name, split.column, split.key_type, split.scheme,
    )  # fmt: skip
    return Part(
        Action.COPY_OUT,
        kind=kind,
        tables=(split.table,),
        keyspaces=(split.keyspace.name,),
        obstacle=_unjoinable(options),
        copy_out=CopyOut(place, tuple(columns) if columns is not None else None),
    )


def _is_on(value: str) -> bool:
    return value.lower() in ("true", "on", "1", "match", "yes")


def _copy_in(s: Statement, split: Split | None, columns: list[str] | None, options: dict[str, str]) -> Part:
    if split is None:
        return Part(Action.COPY_IN, is_write=True)
    if split.column is None:
        return Part(Action.COPY_IN, is_write=True, tables=named_in(s).tables)
    known = columns if columns is not None else s.tables.columns.get(split.table)
    if known is None:
        return _refused(NOT_SUPPORTED, f"COPY of {split.table} does not name its columns", "name the columns")
    if split.column not in known:
        return _refused(
            NOT_SUPPORTED, f"COPY of {split.table} does not give the key {split.column}", "give the key of every row"
        )
    if "where" in options or "default" in options:
        return _refused(NOT_SUPPORTED, "COPY of a split table with WHERE or DEFAULT", "leave it out")
    spec = _spec(split, list(known), options)
    if isinstance(spec, Part):
        return spec
    return Part(
        Action.COPY_IN,
        is_write=True,
        tables=(split.table,),
        keyspaces=(split.keyspace.name,),
        copy=spec,
        kind=spec.format,
    )


def _spec(split: Split, columns: list[str], options: dict[str, str]) -> CopySpec | Part:
    assert split.column is not None
    format_ = options.get("format", "text").lower()
    is_csv = format_ == "csv"
    if format_ not in ("text", "csv", "binary"):
        return _refused("22023", f'COPY format "{format_}" not recognized')
    encoding = options.get("encoding", "utf8").lower().replace("-", "").replace("_", "")
    if encoding not in ("utf8", "unicode", "sqlascii"):
        return _refused(NOT_SUPPORTED, "COPY in another encoding than UTF-8", "send UTF-8")
    quote = options.get("quote", '"')
    spec = CopySpec(
        keyspace=split.keyspace.name,
        key_type=split.key_type,
        column=columns.index(split.column),
        format=format_,
        delimiter=options.get("delimiter", "," if is_csv else "\t"),
        null=options.get("null", "" if is_csv else "\\N"),
        quote=quote,
        escape=options.get("escape", quote),
        has_header=_is_on(options.get("header", "false")) and format_ != "binary",
        force_null="force_null" in options,
        force_not_null="force_not_null" in options,
    )
    if any(len(one) != 1 or not one.isascii() for one in (spec.delimiter, spec.quote, spec.escape)):
        return _refused("22023", "COPY delimiter, quote and escape are single one-byte characters")
    return spec


def _refused(sqlstate: str, message: str, hint: str | None = None) -> Part:
    return Part(Action.REFUSED, is_write=True, refusal=Refusal(sqlstate, message, hint))
