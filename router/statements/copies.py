"""COPY: which rows come or go, and where their keys stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from router.statements.actions import NOT_SUPPORTED, Action, CopyOut, CopySpec, Part, Place, Refusal, Unnamed
from router.statements.lexer import Token
from router.statements.naming import named_in
from router.statements.parsing import NAME_COLUMNS
from router.statements.statement import Statement
from router.statements.tables import Split


def copy_part(s: Statement, part_of: Callable[[Statement], Part]) -> Part:
    if s.token(1).text == "(":
        return _copy_query(s, part_of)
    is_old_binary = s.word(1) == "BINARY" and _is_name(s.token(2)) and s.word(2) not in ("FROM", "TO")
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
    if options is None:
        if split is not None and split.column is not None:
            return _UNKNOWN_OPTION
        options = {}  # its server knows
    if is_old_binary:
        options["format"] = ("binary",)
    if direction == "TO":
        return _copy_out(s, split, options, (first, name_end), columns)
    return _copy_in(s, split, (name_end - 1, columns), options)


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
    if options is None:
        if inner.keyspaces:
            return _UNKNOWN_OPTION
        options = {}
    return Part(
        Action.COPY_OUT,
        obstacle=_unjoinable(options),
        inner=inner,
        is_write=inner.is_write,
        keyspaces=inner.keyspaces,
        tables=inner.tables,
        kind=_text(options, "format", "text"),
    )


def _unjoinable(options: Options) -> Refusal | None:
    """Rows in binary have a head and an end, and a header is no row: shards' answers cannot just be put together."""
    is_binary = _text(options, "format", "text").lower() == "binary"
    if not is_binary and not _has_header(options):
        return None
    what = "binary rows" if is_binary else "a header"
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


Options = dict[str, tuple[str, ...]]
"""By name: the option's value, the columns that it names (_ALL for `*`), or nothing."""
_ALL: Final = ""
_KNOWN: Final = frozenset(
    """
    format freeze delimiter null default header quote escape encoding force_quote force_null force_not_null
    on_error log_verbosity reject_limit
    """.split()  # noqa: SIM905
)
_VALUED: Final = frozenset({"DELIMITER", "NULL", "QUOTE", "ESCAPE", "ENCODING"})
_UNREAD: Final = -1
"""The position behind what cannot be read: no token is there."""


def _options(s: Statement, position: int) -> Options | None:
    """Both spellings: `(FORMAT csv, HEADER)` and `CSV HEADER`. None where not all of it is known."""
    options: Options = {}
    if s.word(position) == "USING":
        position += 1
    if s.word(position) == "DELIMITERS":
        options["delimiter"], position = _value(s, position + 1)
    if s.word(position) == "WITH":
        position += 1
    position = (_listed if s.token(position).text == "(" else _spelled)(s, position, options)
    if not options.keys() <= _KNOWN:
        return None
    if s.word(position) == "WHERE":
        return {**options, "where": ()}
    return options if position == len(s.tokens) else None


def _listed(s: Statement, position: int, options: Options) -> int:
    """Reads a list in parentheses; where it ends."""
    while True:
        token = s.token(position + 1)
        if not _is_name(token):
            return _UNREAD
        options[token.name], position = _value(s, position + 2)
        if s.token(position).text == ")":
            return position + 1
        if s.token(position).text != ",":
            return _UNREAD


def _spelled(s: Statement, position: int, options: Options) -> int:
    """Reads words one after the other; where they end."""
    while 0 <= position < len(s.tokens) and s.word(position) != "WHERE":
        word = s.word(position)
        if word in ("CSV", "BINARY"):
            options["format"], position = (word.lower(),), position + 1
        elif word in ("HEADER", "FREEZE"):
            options[word.lower()], position = (), position + 1
        elif word in _VALUED:
            options[word.lower()], position = _value(s, position + (2 if s.word(position + 1) == "AS" else 1))
        elif word == "FORCE":
            count = 3 if s.word(position + 1) == "NOT" else 2
            name = "_".join(s.words(position, count)).lower()
            options[name], position = _names(s, position + count)
        else:
            return _UNREAD
    return position


def _value(s: Statement, position: int) -> tuple[tuple[str, ...], int]:
    """An option's value, if it has one, and where that ends."""
    token = s.token(position)
    if token.text in (",", ")"):
        return (), position
    if token.text == "*":
        return _names(s, position)
    if token.text == "(":
        names, end = _names(s, position + 1)
        return names, end + 1 if s.token(end).text == ")" else _UNREAD
    if _is_name(token):
        return (token.name,), position + 1
    if token.literal >= 0 and (literal := s.literal(token)).kind != "o":
        return (literal.text,), position + 1
    return (), _UNREAD


def _names(s: Statement, position: int) -> tuple[tuple[str, ...], int]:
    """Columns, and where their list ends."""
    if s.token(position).text == "*":
        return (_ALL,), position + 1
    names: list[str] = []
    while _is_name(s.token(position)):
        names.append(s.token(position).name)
        if s.token(position + 1).text != ",":
            return tuple(names), position + 1
        position += 2
    return (), _UNREAD


def _is_name(token: Token) -> bool:
    return token.kind in ("word", "identifier")


def _text(options: Options, name: str, default: str) -> str:
    values = options.get(name)
    return values[0] if values else default


def _copy_out(
    s: Statement, split: Split | None, options: Options, named: tuple[int, int], columns: list[str] | None
) -> Part:
    kind = _text(options, "format", "text")
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


_ON: Final = ("true", "on", "1", "match")
_OFF: Final = ("false", "off", "0")


def _has_header(options: Options) -> bool:
    return "header" in options and _text(options, "header", "true").lower() in _ON


def _copy_in(s: Statement, split: Split | None, named: tuple[int, list[str] | None], options: Options) -> Part:
    last, columns = named
    if split is None:
        return Part(Action.COPY_IN, is_write=True)
    if split.column is None:
        return Part(Action.COPY_IN, is_write=True, tables=named_in(s).tables)
    unnamed: tuple[Unnamed, ...] = ()
    if columns is None:
        known = s.tables.columns.get(split.table)
        if known is None:
            part = _refused(NOT_SUPPORTED, f"COPY of {split.table} does not name its columns", NAME_COLUMNS)
            return replace(part, wants=split.table)
        columns = [name for name in known.names if name not in known.generated]
        unnamed = (Unnamed(s.first + last, tuple(columns)),)
    if split.column not in columns:
        return _refused(
            NOT_SUPPORTED, f"COPY of {split.table} does not give the key {split.column}", "give the key of every row"
        )
    if "where" in options or "default" in options:
        return _refused(NOT_SUPPORTED, "COPY of a split table with WHERE or DEFAULT", "leave it out")
    spec = _spec(split, columns, options)
    if isinstance(spec, Part):
        return spec
    return Part(
        Action.COPY_IN,
        is_write=True,
        tables=(split.table,),
        keyspaces=(split.keyspace.name,),
        copy=spec,
        kind=spec.format,
        unnamed=unnamed,
    )


def _spec(split: Split, columns: list[str], options: Options) -> CopySpec | Part:
    assert split.column is not None
    format_ = _text(options, "format", "text").lower()
    is_csv = format_ == "csv"
    if format_ not in ("text", "csv", "binary"):
        return _refused("22023", f'COPY format "{format_}" not recognized')
    encoding = _text(options, "encoding", "utf8").lower().replace("-", "").replace("_", "")
    if encoding not in ("utf8", "unicode", "sqlascii"):
        return _refused(NOT_SUPPORTED, "COPY in another encoding than UTF-8", "send UTF-8")
    if _text(options, "header", "true").lower() not in (*_ON, *_OFF):
        return _refused(NOT_SUPPORTED, "COPY with a HEADER of more than one line, or of none that is known")
    quote = _text(options, "quote", '"')
    spec = CopySpec(
        keyspace=split.keyspace.name,
        key_type=split.key_type,
        column=columns.index(split.column),
        format=format_,
        delimiter=_text(options, "delimiter", "," if is_csv else "\t"),
        null=_text(options, "null", "" if is_csv else "\\N"),
        quote=quote,
        escape=_text(options, "escape", quote),
        has_header=_has_header(options) and format_ != "binary",
        force_null=_names_column(options, "force_null", split.column),
        force_not_null=_names_column(options, "force_not_null", split.column),
    )
    if any(len(one) != 1 or not one.isascii() or one in "\r\n" for one in (spec.delimiter, quote, spec.escape)):
        return _refused("22023", "COPY delimiter, quote and escape are single one-byte characters")
    return spec


def _names_column(options: Options, name: str, column: str) -> bool:
    return any(each in (_ALL, column) for each in options.get(name, ()))


def _refused(sqlstate: str, message: str, hint: str | None = None) -> Part:
    return Part(Action.REFUSED, is_write=True, refusal=Refusal(sqlstate, message, hint))


_UNKNOWN_OPTION: Final = _refused(
    NOT_SUPPORTED, "COPY of a split table with an option that the router does not know", "leave it out"
)
