"""Utility statements, told apart by their first words: sqlglot reads many of them wrongly, and without a word of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, TypeAlias

from router.statements.actions import NOT_SUPPORTED, SYNTAX_ERROR, Action, Origin, Part, Refusal, Term
from router.statements.copies import copy_part
from router.statements.lexer import quoted
from router.statements.naming import named_in
from router.statements.statement import Statement
from router.statements.values import OID_OF

PartOf: TypeAlias = Callable[[Statement], Part]


def utility_part(statement: Statement, part_of: PartOf) -> Part:
    """A statement that begins with no word that is known goes home: the server there says what is wrong with it."""
    word = statement.word(0)
    reader = _READERS.get(word)
    if reader is not None:
        return reader(statement)
    if word in _WITHIN:
        return _WITHIN[word](statement, part_of)
    if word in _DDL:
        return _ddl(statement)
    return Part(Action.HOME, is_write=True, is_opaque=True)


# Transactions


def _begin(s: Statement) -> Part:
    position = 2 if s.word(1) in ("TRANSACTION", "WORK") else 1
    return _modes(s, position, Action.BEGIN)


def _modes(s: Statement, position: int, action: Action) -> Part:
    """ISOLATION LEVEL …, READ ONLY, [NOT] DEFERRABLE, with or without commas."""
    isolation: str | None = None
    is_read_only: bool | None = None
    is_deferrable: bool | None = None
    while position < len(s.tokens):
        words = s.words(position, 4)
        if words[:2] == ("ISOLATION", "LEVEL"):
            count = 2 if words[2] in ("READ", "REPEATABLE") else 1
            isolation = " ".join(s.words(position + 2, count)).lower()
            position += 2 + count
        elif words[0] == "READ" and words[1] in ("ONLY", "WRITE"):
            is_read_only = words[1] == "ONLY"
            position += 2
        elif words[:2] == ("NOT", "DEFERRABLE"):
            is_deferrable = False
            position += 2
        elif words[0] == "DEFERRABLE":
            is_deferrable = True
            position += 1
        elif s.token(position).text == ",":
            position += 1
        else:
            return _wrong(s)
    return Part(action, isolation=isolation, is_read_only=is_read_only, is_deferrable=is_deferrable)


def _start(s: Statement) -> Part:
    return _modes(s, 2, Action.BEGIN) if s.word(1) == "TRANSACTION" else _wrong(s)


def _commit(s: Statement) -> Part:
    if s.word(1) == "PREPARED":
        return _prepared(s, "COMMIT PREPARED", 2)
    return _end(s, Action.COMMIT)


def _rollback(s: Statement) -> Part:
    if s.word(1) == "PREPARED":
        return _prepared(s, "ROLLBACK PREPARED", 2)
    position = 2 if s.word(1) in ("TRANSACTION", "WORK") else 1
    if s.word(position) == "TO":
        position += 2 if s.word(position + 1) == "SAVEPOINT" and len(s.tokens) > position + 2 else 1
        return _savepoint_named(s, position, "ROLLBACK TO")
    return _end(s, Action.ROLLBACK)


def _end(s: Statement, action: Action) -> Part:
    position = 2 if s.word(1) in ("TRANSACTION", "WORK") else 1
    rest = tuple(token.word for token in s.tokens[position:])
    if rest not in ((), ("AND", "CHAIN"), ("AND", "NO", "CHAIN")):
        return _wrong(s)
    return Part(action, is_chained=rest == ("AND", "CHAIN"))


def _prepared(s: Statement, kind: str, position: int) -> Part:
    token = s.token(position)
    if token.kind != "string" or len(s.tokens) != position + 1:
        return _wrong(s)
    return Part(Action.PREPARED_TRANSACTION, kind=kind, name=s.literal(token).text, is_write=True)


def _savepoint(s: Statement) -> Part:
    return _savepoint_named(s, 1, "SAVEPOINT")


def _release(s: Statement) -> Part:
    return _savepoint_named(s, 2 if s.word(1) == "SAVEPOINT" and len(s.tokens) > 2 else 1, "RELEASE")


def _savepoint_named(s: Statement, position: int, kind: str) -> Part:
    if not _is_name(s, position) or len(s.tokens) != position + 1:
        return _wrong(s)
    return Part(Action.SAVEPOINT, kind=kind, name=s.token(position).name)


# Settings


def _set(s: Statement) -> Part:
    position, is_local = 1, False
    if s.word(1) in ("LOCAL", "SESSION") and s.token(2).text not in ("=", "TO") and s.word(2) not in ("TO",):
        if s.words(1, 2) == ("SESSION", "CHARACTERISTICS"):
            return replace(_modes(s, 5, Action.SET), name="session characteristics", kind="SESSION CHARACTERISTICS")
        if s.words(1, 2) == ("SESSION", "AUTHORIZATION"):
            return _set_value(s, 3, "session_authorization", is_local=False)
        position, is_local = 2, s.word(1) == "LOCAL"
        if s.words(2, 2) == ("SESSION", "AUTHORIZATION"):
            return _set_value(s, 4, "session_authorization", is_local=is_local)
    word, following = s.word(position), s.word(position + 1)
    if word == "TRANSACTION":
        if following == "SNAPSHOT":
            return Part(Action.SET_TRANSACTION, kind="SNAPSHOT", stays=True)
        return _modes(s, position + 1, Action.SET_TRANSACTION)
    if word == "CONSTRAINTS":
        return Part(Action.SET_TRANSACTION, kind="CONSTRAINTS", name="constraints")
    if word == "TIME" and following == "ZONE":
        return _set_value(s, position + 2, "timezone", is_local=is_local)
    if word == "ROLE":
        return _set_value(s, position + 1, "role", is_local=is_local)
    if word == "NAMES":
        return _set_value(s, position + 1, "client_encoding", is_local=is_local)
    if word == "SCHEMA":
        return _set_value(s, position + 1, "search_path", is_local=is_local)
    if word == "XML" and following == "OPTION":
        return _set_value(s, position + 2, "xmloption", is_local=is_local)
    name, position = _setting_name(s, position)
    if not name or not (s.token(position).text == "=" or s.word(position) == "TO"):
        return _wrong(s)
    return _set_value(s, position + 1, name, is_local=is_local)


def _setting_name(s: Statement, position: int) -> tuple[str, int]:
    parts: list[str] = []
    while _is_name(s, position):
        parts.append(s.token(position).name)
        position += 1
        if s.token(position).text != ".":
            break
        position += 1
    return ".".join(parts).lower(), position


def _set_value(s: Statement, position: int, name: str, *, is_local: bool) -> Part:
    values: list[str] = []
    for token in s.tokens[position:]:
        if token.kind in ("string", "number"):
            values.append(s.literal(token).text)
        elif token.kind in ("word", "identifier"):
            values.append(token.name)
        elif token.text == "," or token.text in "+-.":
            values.append(token.text)
        else:
            return _wrong(s)
    if not values:
        return _wrong(s)
    is_default = len(s.tokens) == position + 1 and s.word(position) in ("DEFAULT", "LOCAL") and name != "shardmove.key"
    if name in _LISTS_OF_NAMES and len(values) > 1:
        values = [
            one if one == "," or (one.replace("_", "a").isalnum() and one.islower()) else quoted(one) for one in values
        ]
    value = None if is_default else "".join(", " if one == "," else one for one in values)
    if name.startswith("shardmove."):
        return _hint_setting(name, value, is_local=is_local)
    if name == "standard_conforming_strings" and (value or "on").lower() not in ("on", "true", "yes", "1"):
        return _refuse(
            "the router reads strings as standard_conforming_strings = on tells", "write E'…' for backslashes"
        )
    return Part(Action.SET, name=name, value=value, is_local=is_local)


_LISTS_OF_NAMES: Final = frozenset(
    {"search_path", "temp_tablespaces", "local_preload_libraries", "session_preload_libraries"}
)
"""Settings whose value is a list of names: those that need quotes have them in the value."""


def _hint_setting(name: str, value: str | None, *, is_local: bool) -> Part:
    if name not in ("shardmove.key", "shardmove.keyspace"):
        return Part(Action.REFUSED, refusal=Refusal("42704", f'unrecognized configuration parameter "{name}"', _HINTS))
    return Part(Action.KEY_HINT, name=name, value=value, is_local=is_local)


_HINTS: Final = "the router has shardmove.key and shardmove.keyspace"


def _reset(s: Statement) -> Part:
    if s.word(1) == "ALL":
        return Part(Action.RESET)
    if s.words(1, 2) == ("SESSION", "AUTHORIZATION"):
        return Part(Action.RESET, name="session_authorization")
    if s.words(1, 2) == ("TIME", "ZONE"):
        return Part(Action.RESET, name="timezone")
    name, position = _setting_name(s, 1)
    if not name or position != len(s.tokens):
        return _wrong(s)
    if name.startswith("shardmove."):
        return _hint_setting(name, None, is_local=False)
    return Part(Action.RESET, name=name)


def _show(s: Statement) -> Part:
    if s.words(1, 2) == ("TIME", "ZONE"):
        return Part(Action.SHOW, name="timezone")
    if s.words(1, 3) == ("TRANSACTION", "ISOLATION", "LEVEL"):
        return Part(Action.SHOW, name="transaction_isolation")
    if s.words(1, 2) == ("SESSION", "AUTHORIZATION"):
        return Part(Action.SHOW, name="session_authorization")
    name, position = _setting_name(s, 1)
    if not name or position != len(s.tokens):
        return _wrong(s)
    return Part(Action.SHOW_HINT if name.startswith("shardmove.") else Action.SHOW, name=name)


def _discard(s: Statement) -> Part:
    kind = s.word(1)
    return Part(Action.DISCARD, kind=kind) if kind in ("ALL", "PLANS", "SEQUENCES", "TEMP", "TEMPORARY") else _wrong(s)


# Prepared statements and cursors


def _prepare(s: Statement, part_of: PartOf) -> Part:
    if s.word(1) == "TRANSACTION" and s.token(2).kind == "string":
        return _prepared(s, "PREPARE TRANSACTION", 2)
    position, types = 2, []
    if s.token(2).text == "(":
        end = _closing(s, 2)
        types = [_type_oid(s, begin, stop) for begin, stop in _listed(s, 3, end)]
        position = end + 1
    if not _is_name(s, 1) or s.word(position) != "AS":
        return _wrong(s)
    inner = part_of(s.after(position + 1))
    return Part(Action.PREPARE, name=s.token(1).name, inner=_placed(inner, s, position + 1), types=tuple(types))


def _type_oid(s: Statement, begin: int, stop: int) -> int:
    text = " ".join(token.name for token in s.tokens[begin:stop])
    plain = {
        "int": "integer", "int4": "integer", "int8": "bigint", "int2": "smallint", "decimal": "numeric",
        "character varying": "varchar", "timestamp with time zone": "timestamptz",
    }.get(text, text)  # fmt: skip
    return OID_OF.get(plain, _UNKNOWN_OID)


_UNKNOWN_OID: Final = 2249
"""Of a type of which no key is read: `record`, which no parameter has."""


def _placed(inner: Part, s: Statement, position: int) -> Part:
    return replace(inner, start=s.first + position, end=s.first + len(s.tokens))


def _closing(s: Statement, position: int) -> int:
    """Where the parenthesis that opens at the position closes, or the statement ends."""
    depth = 0
    for ahead in range(position, len(s.tokens)):
        text = s.token(ahead).text
        depth += (text in ("(", "[")) - (text in (")", "]"))
        if depth == 0:
            return ahead
    return len(s.tokens)


def _listed(s: Statement, begin: int, end: int) -> list[tuple[int, int]]:
    """The items between commas outside of parentheses."""
    items: list[tuple[int, int]] = []
    depth, first = 0, begin
    for position in range(begin, end):
        text = s.token(position).text
        depth += (text in ("(", "[")) - (text in (")", "]"))
        if text == "," and depth == 0:
            items.append((first, position))
            first = position + 1
    if end > first:
        items.append((first, end))
    return items


def _execute(s: Statement) -> Part:
    if not _is_name(s, 1):
        return _wrong(s)
    arguments: tuple[Term | None, ...] = ()
    if s.token(2).text == "(":
        arguments = tuple(_argument(s, begin, end) for begin, end in _listed(s, 3, _closing(s, 2)))
    return Part(Action.EXECUTE, name=s.token(1).name, arguments=arguments)


def _argument(s: Statement, begin: int, end: int) -> Term | None:
    tokens = s.tokens[begin:end]
    is_negative = len(tokens) == 2 and tokens[0].text == "-" and tokens[1].kind == "number"
    if is_negative:
        tokens = tokens[1:]
    if len(tokens) != 1:
        return None
    token = tokens[0]
    if token.word == "NULL":
        return Term(Origin.NULL)
    if token.kind == "parameter":
        return Term(Origin.PARAMETER, int(token.text[1:]) - 1)
    if token.kind in ("string", "number"):
        return Term(Origin.LITERAL, token.literal, is_negative=is_negative)
    return None


def _deallocate(s: Statement) -> Part:
    position = 2 if s.word(1) == "PREPARE" and len(s.tokens) > 2 else 1
    if s.word(position) == "ALL":
        return Part(Action.DEALLOCATE)
    return Part(Action.DEALLOCATE, name=s.token(position).name) if _is_name(s, position) else _wrong(s)


def _declare(s: Statement, part_of: PartOf) -> Part:
    position = next((n for n in range(2, len(s.tokens)) if s.word(n) == "FOR"), 0)
    if not _is_name(s, 1) or not position:
        return _wrong(s)
    is_held = any(s.words(n, 2) == ("WITH", "HOLD") for n in range(2, position))
    inner = _placed(part_of(s.after(position + 1)), s, position + 1)
    return Part(
        Action.DECLARE, name=s.token(1).name, inner=inner, kind="HOLD" if is_held else "", keyspaces=inner.keyspaces
    )


def _fetch(s: Statement) -> Part:
    """The cursor's name is the last word of it."""
    action = Action.FETCH if s.word(0) == "FETCH" else Action.MOVE
    last = len(s.tokens) - 1
    return Part(action, name=s.token(last).name, stays=True) if last > 0 and _is_name(s, last) else _wrong(s)


def _close(s: Statement) -> Part:
    if s.word(1) == "ALL":
        return Part(Action.CLOSE, stays=True)
    return Part(Action.CLOSE, name=s.token(1).name, stays=True) if _is_name(s, 1) else _wrong(s)


def _explain(s: Statement, part_of: PartOf) -> Part:
    position, is_analyzed = 1, False
    if s.token(1).text == "(" and s.word(2) not in ("SELECT", "WITH", "VALUES", "TABLE") and s.token(2).text != "(":
        end = _closing(s, 1)
        for begin, stop in _listed(s, 2, end):
            if s.word(begin) in ("ANALYZE", "ANALYSE"):
                value = s.token(begin + 1)
                text = s.literal(value).text if value.literal >= 0 else value.text
                is_analyzed = stop == begin + 1 or text.lower() in ("on", "true", "1", "yes")
        position = end + 1
    else:
        while s.word(position) in ("ANALYZE", "ANALYSE", "VERBOSE"):
            is_analyzed = is_analyzed or s.word(position) != "VERBOSE"
            position += 1
    if position >= len(s.tokens):
        return _wrong(s)
    inner = _placed(part_of(s.after(position)), s, position)
    return Part(
        Action.EXPLAIN,
        inner=inner,
        kind="ANALYZE" if is_analyzed else "",
        is_write=is_analyzed and inner.is_write,
        keyspaces=inner.keyspaces,
    )


# Others


def _listen(s: Statement) -> Part:
    return Part(Action.LISTEN, name=s.token(1).name) if _is_name(s, 1) else _wrong(s)


def _unlisten(s: Statement) -> Part:
    if s.token(1).text == "*":
        return Part(Action.UNLISTEN)
    return Part(Action.UNLISTEN, name=s.token(1).name) if _is_name(s, 1) else _wrong(s)


def _notify(s: Statement) -> Part:
    payload = s.token(3)
    value = s.literal(payload).text if s.token(2).text == "," and payload.kind == "string" else None
    return Part(Action.NOTIFY, name=s.token(1).name, value=value) if _is_name(s, 1) else _wrong(s)


def _lock(s: Statement) -> Part:
    if not named_in(s).tables:
        return Part(Action.HOME, locks_rows=True, is_write=True)
    return _refused_with(
        s,
        "LOCK of a split or reference table would lock it on one shard only",
        "lock the rows of one key: SELECT … FOR UPDATE",
    )


def _effects(s: Statement) -> Part:
    """DO and CALL: what they touch is not seen, so they go home, or where a hint sends them."""
    return Part(Action.HOME, is_write=True, is_opaque=True, kind=s.word(0))


def _copy(s: Statement, part_of: PartOf) -> Part:
    return copy_part(s, part_of)


_PARTIAL: Final = "it would hold the rows of one shard only"


def _ddl(s: Statement) -> Part:
    """Goes to every shard, with these exceptions: what lives in a session, or is made of a query's rows."""
    tables, keyspaces = named_in(s)
    words = tuple(token.word for token in s.tokens[:3])
    names = [token.name for token in s.tokens[:8] if token.kind in ("word", "identifier")]
    if "pg_temp" in names or _is_temporary(s):
        return (
            _refused_with(s, "a temporary table of a split table's rows", _PARTIAL)
            if keyspaces
            else Part(Action.HOME, is_write=True, is_opaque=True)
        )
    is_table = words[:2] == ("CREATE", "TABLE") or words == ("CREATE", "UNLOGGED", "TABLE")
    if is_table and _has_query(s):
        return (
            _refused_with(s, "CREATE TABLE AS of a split table's rows", _PARTIAL)
            if keyspaces
            else Part(Action.HOME, is_write=True, is_opaque=True)
        )
    if words == ("CREATE", "MATERIALIZED", "VIEW") and keyspaces:
        return _refused_with(s, "a materialized view of a split table", _PARTIAL)
    if keyspaces and _has_view(s):
        return _refused_with(
            s,
            "a view of a split table would be read on the home shard only",
            "query the table itself, or create the view on each shard directly",
        )
    return Part(
        Action.DDL,
        is_write=True,
        kind=" ".join(words[: 2 if words[0] in ("CREATE", "ALTER", "DROP") else 1]),
        tables=tables,
        keyspaces=keyspaces,
    )


def _is_temporary(s: Statement) -> bool:
    """CREATE [OR REPLACE] [GLOBAL | LOCAL] TEMP …: behind these words it is a name, a column's for one."""
    position = 3 if s.words(1, 2) == ("OR", "REPLACE") else 1
    position += s.word(position) in ("GLOBAL", "LOCAL")
    return s.word(0) == "CREATE" and s.word(position) in ("TEMP", "TEMPORARY")


def _has_view(s: Statement) -> bool:
    """CREATE [OR REPLACE] [RECURSIVE] VIEW, and CREATE SCHEMA with views in it."""
    position = 3 if s.words(1, 2) == ("OR", "REPLACE") else 1
    position += s.word(position) == "RECURSIVE"
    is_schema = s.word(1) == "SCHEMA" and any(s.words(n, 2) == ("CREATE", "VIEW") for n in range(2, len(s.tokens)))
    return s.word(0) == "CREATE" and (s.word(position) == "VIEW" or is_schema)


def _has_query(s: Statement) -> bool:
    """CREATE TABLE … AS SELECT: an AS outside of parentheses."""
    depth = 0
    for position, token in enumerate(s.tokens):
        depth += (token.text == "(") - (token.text == ")")
        if (
            depth == 0
            and token.word == "AS"
            and (s.word(position + 1) in _QUERIES or s.token(position + 1).text == "(")
        ):
            return True
    return False


_QUERIES: Final = frozenset({"SELECT", "WITH", "VALUES", "TABLE", "EXECUTE"})


def _is_name(s: Statement, position: int) -> bool:
    return s.token(position).kind in ("word", "identifier")


def _wrong(s: Statement) -> Part:
    what = s.word(0) or s.token(0).text
    return Part(Action.REFUSED, refusal=Refusal(SYNTAX_ERROR, f"the router cannot read this {what} statement"))


def _refuse(message: str, hint: str) -> Part:
    return Part(Action.REFUSED, refusal=Refusal(NOT_SUPPORTED, message, hint))


def _refused_with(s: Statement, message: str, hint: str) -> Part:
    tables, keyspaces = named_in(s)
    return replace(
        _refuse(message, hint),
        is_write=True,
        locks_rows=s.word(0) == "LOCK",
        tables=tables,
        keyspaces=keyspaces,
    )


_READERS: Final[Mapping[str, Callable[[Statement], Part]]] = {
    "BEGIN": _begin, "START": _start, "COMMIT": _commit, "END": lambda s: _end(s, Action.COMMIT), "ROLLBACK": _rollback,
    "ABORT": lambda s: _end(s, Action.ROLLBACK), "SAVEPOINT": _savepoint, "RELEASE": _release, "SET": _set,
    "RESET": _reset, "SHOW": _show, "DISCARD": _discard, "EXECUTE": _execute, "DEALLOCATE": _deallocate,
    "FETCH": _fetch, "MOVE": _fetch, "CLOSE": _close, "LISTEN": _listen, "UNLISTEN": _unlisten, "NOTIFY": _notify,
    "LOCK": _lock, "DO": _effects, "CALL": _effects, "LOAD": _effects,
}  # fmt: skip
_WITHIN: Final[Mapping[str, Callable[[Statement, PartOf], Part]]] = {
    "PREPARE": _prepare, "DECLARE": _declare, "EXPLAIN": _explain, "COPY": _copy,
}  # fmt: skip
_DDL: Final = frozenset(
    """
    ALTER ANALYZE ANALYSE CHECKPOINT CLUSTER COMMENT CREATE DROP GRANT IMPORT REASSIGN REFRESH REINDEX REPACK
    REVOKE SECURITY TRUNCATE VACUUM
    """.split()  # noqa: SIM905
)
