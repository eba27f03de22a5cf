"""SELECT and DML: which keys a statement touches, and whether the shards' answers can be put together.

`contexts` has the theory. Here a tree is walked once: each reference of a split table becomes a node in the context in
which it stands; conditions become facts; in the end each reference is bound to keys, or is not. Every table in the tree
has to have been met on the way: a construct that hides one refuses the statement, instead of being misread.

What cannot be seen: tables in functions, views and triggers.
"""

from __future__ import annotations

from typing import Any, Final

from sqlglot import exp

from router.statements.actions import NOT_SUPPORTED, Action, Keys, MergePlan, Origin, Part, Refusal, Term, Unnamed
from router.statements.contexts import Closure
from router.statements.functions import HARMLESS, UNEQUAL, UNEQUAL_WORDS
from router.statements.levels import level_obstacle
from router.statements.lexer import Token
from router.statements.naming import named_in
from router.statements.ordering import merge_plan
from router.statements.parsing import ColumnsUnknown, Unplannable, parsed
from router.statements.placing import places_of
from router.statements.scopes import Rows, Scope
from router.statements.statement import Statement
from router.statements.tables import Split
from router.statements.terms import with_shared
from router.statements.trees import parameter_counts
from router.statements.writing import Writing

QUERY_WORDS: Final = frozenset({"SELECT", "INSERT", "UPDATE", "DELETE", "WITH", "VALUES", "TABLE", "MERGE"})
_SEVERAL: Final = "the statement names no single key, and cannot be answered by several shards: "
_KEY_HINT: Final = "compare the key of every split table with a constant, or join it with one that is"
_NAME_IT: Final = "say whose it is: /* shardmove: key=… */ before the statement, or SET shardmove.key"

_SYSTEM_COLUMNS: Final = frozenset({"ctid", "xmin", "xmax", "cmin", "cmax", "tableoid"})
_UNEQUAL_CALLS: Final = frozenset(
    """
    age any_value array_agg current_database current_setting inet_server_addr inet_server_port json_agg
    json_agg_strict json_arrayagg json_object_agg json_objectagg jsonb_agg jsonb_agg_strict jsonb_object_agg
    string_agg version xmlagg
    """.split()  # noqa: SIM905
)
"""Besides those that differ at every call: servers' own, and aggregates whose result depends on the rows' order."""
_UNEQUAL_WORDS: Final = frozenset(
    """
    CURRENT_CATALOG CURRENT_DATE FETCH LIMIT OFFSET OVER REGCLASS REGOPER REGOPERATOR REGPROC REGPROCEDURE REGTYPE
    REGROLE REGNAMESPACE TABLESAMPLE
    """.split()  # noqa: SIM905
)


def query_part(statement: Statement) -> Part:
    """Never raises for what a client wrote."""
    setting = _set_config(statement)
    if setting is not None:
        return setting
    try:
        tree = parsed(statement)
        return Walk(statement, tree).part()
    except Unplannable as error:
        return _unplanned(statement, error)
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError):
        # sqlglot makes trees of texts that are no SQL, in shapes that no walk can foresee.
        return _unplanned(statement, Unplannable("the router cannot read the statement"))


def _set_config(statement: Statement) -> Part | None:
    """`SELECT set_config('name', value, is_local)` sets, as SET does, and answers with a row."""
    position = 1
    if statement.words(1, 1) == ("PG_CATALOG",) and statement.token(2).text == ".":
        position = 3
    name, value, is_local = (statement.token(position + step) for step in (2, 4, 6))
    punctuation = [statement.token(position + step).text for step in (1, 3, 5, 7)]
    is_that = statement.word(0) == "SELECT" and statement.word(position) == "SET_CONFIG"
    if not is_that or punctuation != ["(", ",", ",", ")"] or len(statement.tokens) > position + 11:
        return None
    if is_local.word not in ("TRUE", "FALSE") or {name.kind, value.kind} - {"string", "parameter"}:
        return None
    if len(statement.tokens) > position + 8 and statement.word(position + 8) not in ("AS", ""):
        return None
    (setting, name_term), (text, value_term) = _text_or_term(statement, name), _text_or_term(statement, value)
    return Part(
        Action.SET,
        name=(setting or "").lower(),
        name_term=name_term,
        value=text,
        value_term=value_term,
        is_local=is_local.word == "TRUE",
        is_query=True,
    )


def _text_or_term(statement: Statement, token: Token) -> tuple[str | None, Term | None]:
    if token.kind == "parameter":
        return None, Term(Origin.PARAMETER, int(token.text[1:]) - 1)
    return statement.literal(token).text, None


def _unplanned(statement: Statement, error: Unplannable) -> Part:
    """A statement that names no table of a keyspace goes home unread; others have to be understood."""
    tables, keyspaces = named_in(statement)
    if not tables and error.sqlstate != "54001":
        return Part(Action.HOME, is_write=True, is_opaque=True)
    refusal = Refusal(error.sqlstate, error.message, error.hint or _NAME_IT)
    return Part(
        Action.REFUSED,
        is_write=True,
        keyspaces=keyspaces,
        tables=tables,
        wants=error.table if isinstance(error, ColumnsUnknown) else None,
        refusal=refusal,
        is_opaque=True,
    )


class Walk(Writing):
    """One statement, from its tree to its plan."""

    def part(self) -> Part:
        root = self.tree.root
        rows: Rows | None = None
        if isinstance(root, (exp.Insert, exp.Update, exp.Delete, exp.Merge)):
            self.write(root, Scope())
        else:
            rows = self.query(root, Scope(), None, is_top=True, is_result=True)
        for query in self.queries:
            if not query.is_used and query.rows is None:
                self.query(query.body, query.scope, None)
        self._require_all_met()
        return self._classified(rows)

    def _require_all_met(self) -> None:
        for table in self.tree.root.find_all(exp.Table):
            if id(table) not in self.met:
                raise Unplannable("the router cannot tell what a table in the statement is read for")

    def _classified(self, rows: Rows | None) -> Part:
        splits = [leaf.split for leaf in self.leaves]
        named = {split.table: split for _, split in self.refs if split is not None}
        named.update({split.table: split for split in self.written if split is not None})
        is_opaque = not self.unknown_calls <= HARMLESS
        common: dict[str, Any] = {
            "is_write": bool(self.written) or is_opaque,
            "locks_rows": self.locks_rows,
            "is_opaque": is_opaque,
            "unnamed": tuple(Unnamed(*each) for each in self.unnamed.items()),
            "tables": tuple(named),
            "keyspaces": tuple(dict.fromkeys(s.keyspace.name for s in named.values() if s.column is not None)),
        }
        written = [split for split in self.written if split is not None]
        if any(split.column is None for split in written):
            return self._reference_write(common, splits)
        if splits or written:
            return self._keyed(common, rows)
        common["needs_home"] = self.names_home
        if named and not self.names_home:
            is_harmless = not self.locks_rows and not self.unknown_calls and not self.names_catalog and not self.written
            return Part(Action.REFERENCE_READ if is_harmless else Action.HOME, **common)
        is_free = not (
            self.names_home or self.names_catalog or self.unknown_calls or self.written or self.tree.is_current_of
        )
        return Part(Action.FREE if is_free else Action.HOME, **common)

    def _reference_write(self, common: dict[str, Any], splits: list[Split]) -> Part:
        if any(split is None or split.column is not None for split in self.written) or splits or self.names_home:
            why = "a write of a reference table goes to every shard, and not all have what else it names"
            return Part(Action.REFUSED, refusal=Refusal(NOT_SUPPORTED, why, "write the values themselves"), **common)
        unequal = self._unequal()
        if unequal or self.tree.is_current_of:
            why = f"a reference table is written on every shard, where {', '.join(unequal) or 'a cursor'} may differ"
            return Part(Action.REFUSED, refusal=Refusal(NOT_SUPPORTED, why, "send the value itself"), **common)
        return Part(Action.REFERENCE_WRITE, **common)

    def _unequal(self) -> list[str]:
        """What may be another on every shard: values, and which of a reference table's rows are taken."""
        tokens = self.statement.tokens
        unequal = sorted(self.unknown_calls | {call for call in self.calls if call in UNEQUAL | _UNEQUAL_CALLS})
        unequal += sorted({token.word for token in tokens} & (UNEQUAL_WORDS | _UNEQUAL_WORDS))
        unequal += sorted({token.name for token in tokens if token.kind in ("word", "identifier")} & _SYSTEM_COLUMNS)
        if self.locks_rows:
            unequal.append("a lock")
        if self.names_catalog:
            unequal.append("a catalog")
        if any(one.args.get("on") is not None for one in self.tree.root.find_all(exp.Distinct)):
            unequal.append("DISTINCT ON")
        return unequal

    def _keyed(self, common: dict[str, Any], rows: Rows | None) -> Part:
        places = places_of(self.statement, self.tree, self.refs) if not self.written else None
        common |= {"places": places, "needs_home": self.names_home}
        keys = None if self.tree.is_current_of else self._keys()
        if self.tree.is_current_of:
            return Part(Action.KEYED, stays=True, **common)
        obstacle = self._obstacle(rows)
        merge = MergePlan()
        if obstacle is None:
            planned = merge_plan(self.tree.root, self.terms, self.statement)
            if isinstance(planned, str):
                obstacle = planned
            else:
                merge = planned
        refusal = None if obstacle is None else Refusal(NOT_SUPPORTED, _SEVERAL + obstacle, _KEY_HINT)
        if keys is not None:
            return Part(Action.KEYED, keys=keys, obstacle=refusal, merge=merge, **common)
        return Part(Action.SCATTER, obstacle=refusal, merge=merge, **common)

    def _keys(self) -> tuple[Keys, ...] | None:
        """Of all references; None where one is bound to none."""
        shared = self.terms.shared(parameter_counts(self.statement))
        keys: dict[Keys, None] = {}
        for leaf in self.leaves:
            terms = Closure(leaf.anchor.context).terms(leaf.anchor.node)
            if terms is None:
                return None
            keys[Keys(leaf.split.keyspace.name, with_shared(terms, shared))] = None
        for split, node, context in self.linked:
            linked = Closure(context).terms(node)
            if linked is None:
                return None
            keys[Keys(split.keyspace.name, with_shared(linked, shared), True)] = None
        for keyspace, terms in self.assigned:
            keys[Keys(keyspace, with_shared(terms, shared), True)] = None
        return tuple(keys)

    def _obstacle(self, rows: Rows | None) -> str | None:
        """Why the shards' answers, put together, would not be the answer."""
        if self.written or rows is None:
            return "it writes"
        if self.locks_rows:
            return "it locks rows"
        if self.obstacle is not None:
            return self.obstacle
        if len({leaf.split.keyspace.name for leaf in self.leaves}) > 1:
            return "it names tables of several keyspaces, and rows of one key may be on two shards"
        if self.unknown_calls:
            return f"nothing is known of the function {min(self.unknown_calls)}"
        if self.is_unsure:
            return "it has aggregates in an unusual place"
        return next((why for level in self.levels if (why := level_obstacle(level)) is not None), None)
