"""What a statement is, and where it goes: the words that planning and deciding share.

A `Plan` is what can be said of a text without its literals and parameters: one `Part` per statement. A `Planned` is a
plan with the literals of one text. A `Decision` is where one execution of it goes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple, Protocol

from router.statements.lexer import Literal, text_of, tokens
from router.statements.tables import Tables
from shardmove.domain.keys import KeyType
from shardmove.domain.moves import Scheme, TableName
from shardmove.domain.routes import Route, RouteTable

NOT_SUPPORTED = "0A000"
SYNTAX_ERROR = "42601"


class Action(Enum):
    KEYED = auto()
    """Goes to the shard that owns its keys."""
    SCATTER = auto()
    """A read whose answer is the plain union of the shards' answers, merged as `Merge` says."""
    REFERENCE_READ = auto()
    """Reads tables that every shard holds whole: any shard will do."""
    REFERENCE_WRITE = auto()
    """Goes to every shard."""
    HOME = auto()
    """Tables of no keyspace, or functions of which nothing is known."""
    FREE = auto()
    """No table and no effect: any server will do, also one that is in no transaction."""
    DDL = auto()
    """Goes to every shard."""
    EMPTY = auto()
    BEGIN = auto()
    COMMIT = auto()
    ROLLBACK = auto()
    SAVEPOINT = auto()
    """SAVEPOINT, RELEASE or ROLLBACK TO: `kind` says which, `name` is the savepoint's."""
    SET_TRANSACTION = auto()
    SET = auto()
    RESET = auto()
    SHOW = auto()
    DISCARD = auto()
    PREPARE = auto()
    EXECUTE = auto()
    DEALLOCATE = auto()
    LISTEN = auto()
    UNLISTEN = auto()
    NOTIFY = auto()
    DECLARE = auto()
    FETCH = auto()
    MOVE = auto()
    CLOSE = auto()
    COPY_IN = auto()
    COPY_OUT = auto()
    PREPARED_TRANSACTION = auto()
    """PREPARE TRANSACTION, COMMIT PREPARED or ROLLBACK PREPARED: `kind` says which."""
    KEY_HINT = auto()
    """SET or RESET of a setting `shardmove.*`: for the router alone. `value` is None for RESET."""
    SHOW_HINT = auto()
    EXPLAIN = auto()
    REFUSED = auto()


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a statement is not carried out: an error for the client."""

    sqlstate: str
    message: str
    hint: str | None = None


class Origin(Enum):
    LITERAL = auto()
    """`index` counts the literals of the text from 0."""
    PARAMETER = auto()
    """`index` is the parameter's number less one."""
    NULL = auto()


@dataclass(frozen=True, slots=True)
class Term:
    """Where a value stands: which literal or parameter of the statement, and what is done to it on its way."""

    origin: Origin
    index: int = 0
    casts: tuple[str, ...] = ()
    """The types it is cast to, innermost first, by their plain names."""
    is_array: bool = False
    """Each element of it is a value."""
    is_negative: bool = False
    is_shared: bool = False
    """A parameter that stands in other places too: PostgreSQL may have taken its type from there."""


NULL = Term(Origin.NULL)


@dataclass(frozen=True, slots=True)
class Keys:
    """A bound of one table reference: only rows with one of these keys are touched."""

    keyspace: str
    terms: tuple[Term, ...]
    is_assigned: bool = False
    """They become keys of rows, rather than being compared with them."""


@dataclass(frozen=True, slots=True)
class OrderColumn:
    """One column of ORDER BY. Its place in the result is `position` from 0, or that of the one column called `name`."""

    position: int | None
    name: str
    is_descending: bool
    is_nulls_first: bool
    is_c_collated: bool


@dataclass(frozen=True, slots=True)
class Merge:
    order: tuple[OrderColumn, ...] = ()
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class MergePlan:
    """A merge before the literals are known."""

    order: tuple[OrderColumn, ...] = ()
    limit: Term | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a split table is named in a text, in tokens."""

    start: int
    end: int
    alias: str
    """As it has to be written."""
    has_alias: bool
    keyspace: str
    column: str
    key_type: KeyType
    scheme: Scheme


@dataclass(frozen=True, slots=True)
class CopySpec:
    """COPY … FROM STDIN of a split table: how to find the key in its rows."""

    keyspace: str
    key_type: KeyType
    column: int
    """The key's position among the columns that are sent, from 0."""
    format: str
    delimiter: str
    null: str
    quote: str
    escape: str
    has_header: bool
    force_null: bool = False
    force_not_null: bool = False


@dataclass(frozen=True, slots=True)
class CopyOut:
    """COPY table TO STDOUT of a split table: restricted, it becomes COPY (SELECT columns FROM table WHERE …)."""

    place: Place
    columns: tuple[str, ...] | None


class Unnamed(NamedTuple):
    """Columns that the text does not name: they are written behind the token of that number."""

    token: int
    columns: tuple[str, ...]


class Hint(NamedTuple):
    """A key that the client names itself; the keyspace may stay unsaid where there is one."""

    key: str
    keyspace: str | None


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One statement of a text. Which of the fields say something depends on the action."""

    action: Action
    start: int = 0
    end: int = 0
    """Its tokens in the text: texts of one plan differ in their literals, and their characters stand elsewhere."""
    keys: tuple[Keys, ...] = ()
    """Every one of them has to be on the shard that the statement goes to."""
    is_write: bool = False
    locks_rows: bool = False
    needs_home: bool = False
    """It also names tables of no keyspace."""
    stays: bool = False
    """It goes where the transaction is, and nowhere else: WHERE CURRENT OF, FETCH."""
    obstacle: Refusal | None = None
    """Why it cannot be answered by several shards; None: the plain union is right."""
    merge: MergePlan = MergePlan()
    places: tuple[Place, ...] | None = None
    """Where split tables are named; None where a restriction cannot be written."""
    keyspaces: tuple[str, ...] = ()
    """Of the split tables that are named."""
    tables: tuple[TableName, ...] = ()
    """The tables of keyspaces that are named, reference tables included."""
    name: str = ""
    """Of a setting, savepoint, prepared statement, cursor, channel or transaction; "" for all of them."""
    name_term: Term | None = None
    """Of a setting whose name is a parameter (`set_config`)."""
    value: str | None = None
    """Of a setting, as text; None for DEFAULT."""
    value_term: Term | None = None
    """Of a setting whose value is a parameter (`set_config`)."""
    is_local: bool = False
    is_query: bool = False
    """SET by `SELECT set_config(…)`, which answers with a row."""
    kind: str = ""
    is_chained: bool = False
    isolation: str | None = None
    """`read committed`, …; None where it is not said."""
    is_read_only: bool | None = None
    is_deferrable: bool | None = None
    inner: Part | None = None
    """What is prepared, explained or declared."""
    types: tuple[int, ...] = ()
    """The parameter types that PREPARE declares; 0 is a type whose number is not known here."""
    arguments: tuple[Term | None, ...] = ()
    """Of EXECUTE; None for what is no constant."""
    copy: CopySpec | None = None
    copy_out: CopyOut | None = None
    hint: Hint | None = None
    unnamed: tuple[Unnamed, ...] = ()
    wants: TableName | None = None
    """It is refused because this table's columns are not known."""
    refusal: Refusal | None = None
    is_opaque: bool = False
    """It runs code of which nothing is known: what that leaves in the session is not known either."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What can be said of a text whatever its literals are."""

    parts: tuple[Part, ...]
    needs_literals: bool = False
    """It rests on the literals' values: another text needs a plan of its own."""
    is_opaque: bool = False
    """One of its parts is, or what that explains, declares or prepares."""
    may_commit: bool = False
    """It ends a transaction, or calls what may: said again, it would do again what is committed."""

    @property
    def unnamed(self) -> tuple[Unnamed, ...]:
        return tuple(each for part in _with_inner(self.parts) for each in part.unnamed)

    @property
    def wants(self) -> tuple[TableName, ...]:
        return tuple(part.wants for part in _with_inner(self.parts) if part.wants is not None)

    @property
    def refusal(self) -> Refusal | None:
        return next((part.refusal for part in self.parts if part.refusal is not None), None)


def _with_inner(parts: Sequence[Part]) -> Iterator[Part]:
    for part in parts:
        yield part
        if part.inner is not None:
            yield from _with_inner((part.inner,))


class Added(NamedTuple):
    """What was put into a text: where, in its characters, and how many."""

    position: int
    length: int


class Planned(NamedTuple):
    """`text` is what servers are told: the client's own, but for columns that it did not name (`added`)."""

    plan: Plan
    literals: Sequence[Literal]
    text: bytes
    added: tuple[Added, ...] = ()
    wants: tuple[TableName, ...] = ()

    def within(self, part: Part) -> Planned:
        """The statement that the part prepares, explains or declares, as a planned text of its own."""
        assert part.inner is not None
        return Planned(Plan((part.inner,)), self.literals, self.text)

    def statement(self, part: Part) -> bytes:
        """The part's own text."""
        text = text_of(self.text)
        found = list(tokens(text))[part.start : part.end]
        return text[found[0].start : found[-1].end].encode("utf-8", "surrogateescape") if found else b""


@dataclass(frozen=True, slots=True)
class Arguments:
    """Of a Bind message, as they came. `oids` are those of the Parse (or of the ParameterDescription, if known)."""

    formats: Sequence[int]
    values: Sequence[bytes | None]
    oids: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Facts:
    """What the session has set, as far as it changes how a key is read. Never guessed: None is unknown."""

    time_zone: str | None = None
    is_utf8: bool = True
    hint: Hint | None = None
    """`SET shardmove.key`: every statement goes to that key's shard."""


class View(Protocol):
    """What is known of the shards at one moment."""

    @property
    def routes(self) -> RouteTable: ...
    @property
    def tables(self) -> Tables: ...
    @property
    def home(self) -> str: ...
    @property
    def shards(self) -> Sequence[str]: ...


class Decision(NamedTuple):
    """Where one execution goes. `shards` is empty where any will do; of several each gets the statement."""

    action: Action
    shards: tuple[str, ...] = ()
    routes: tuple[Route, ...] = ()
    """Those that the keys met: of a scatter all of them."""
    is_write: bool = False
    locks_rows: bool = False
    refusal: Refusal | None = None
    merge: Merge | None = None
    part: Part | None = None
    value: str | None = None
    """Of SET: the value, also where it came as a parameter."""
    stays: bool = False
    is_hinted: bool = False
    """The client's own word says where it goes: what rows it touches is not known."""
