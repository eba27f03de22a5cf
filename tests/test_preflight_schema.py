"""Tables as they are defined, and their rows: each line fails on what it is for, and passes once its advice is taken.

A case makes one line fail. Where the advice is SQL, it is run as it stands, word for word; where it is another entry of
the configuration, or anything else, the case does that, and says how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import pytest
from psycopg import errors

from shardmove.catalog.store import Catalog
from shardmove.coordinator import ending
from shardmove.coordinator.checks.data import DATA
from shardmove.coordinator.checks.schema import SCHEMA
from shardmove.coordinator.checks.site import Note
from shardmove.coordinator.cutover import cut_over
from shardmove.coordinator.hold import hold
from shardmove.coordinator.preflight import checklist
from shardmove.coordinator.progress import Progress
from shardmove.coordinator.run import run
from shardmove.domain.moves import Direction, State, TableName
from tests.support.engine import until
from tests.support.preflight import ORDERS, MakePlan, Plan, line
from tests.support.twins import spawn
from workers.executors import InlineExecutor

KEYS: Final = "every table has a key column of the keyspace's type"
KEYSET: Final = "every table has a unique key to cut batches by"
THERE: Final = "every table is there on both shards"
KIND: Final = "every table is of a kind that we can move"
ALIKE: Final = "the schema is the same on both shards"
REFERENCE: Final = "reference tables are there, and the same, on both shards"
EXTENSIONS: Final = "the target has the extensions that the tables need"
COLLATIONS: Final = "unique texts are unique alike on both shards"
UNIQUE: Final = "unique constraints hold the key column"
FOREIGN: Final = "foreign keys stay inside the keyspace"
TRIGGERS: Final = "no trigger or rule fires for replicas"
ONE_SIDED: Final = "triggers and policies are the same on both shards"
SEQUENCES: Final = "sequences have their like and room for the margin"
EMPTY: Final = "the target holds no row of the range"
UNPROVEN: Final = "no row breaks a constraint that is NOT VALID"
LARGE: Final = "no column names large objects"
NAMES: Final = "what columns name by reg* types is on the target"
READABLE: Final = "every column's type is read by the servers"
DELETABLE: Final = "rows can be deleted on both shards"
EVENTS: Final = "event triggers let our objects pass"
TAKES: Final = "the target takes rows of every table"

FUNCTION: Final = "CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"


@dataclass(frozen=True)
class Case:
    """What makes a line fail.

    Attributes:
        says: parts of the message, in which tables and objects are named.
        advice: what is done besides, or instead of, the SQL of the hint; None: the SQL is all.
        is_note: the line passes, with a note.
        old: on the older servers, which are built with more.
        mixed: from an older server to a newer one.
    """

    check: str
    schema: str = ORDERS
    says: tuple[str, ...] = ()
    tables: Mapping[str, str] = field(default_factory=lambda: {"orders": "tenant_id"})
    target: str | None = None
    setup: Callable[[Plan], object] = lambda plan: None
    advice: Callable[[Plan], object] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    is_note: bool = False
    servers: str = "new"


def rows(*statements: str, shard: str = "s1") -> Callable[[Plan], object]:
    return lambda plan: [plan.execute(shard, statement) for statement in statements]


def both(*statements: str) -> Callable[[Plan], object]:
    return lambda plan: [plan.execute(shard, each) for shard in ("s1", "s2") for each in statements]


def tables(**changed: str | None) -> Callable[[Plan], object]:
    """The keyspace names other tables: None takes one out."""

    def change(plan: Plan) -> None:
        now = {str(name): key for name, key in plan.move.keyspace.tables.items()} | changed
        named = {TableName.parse(name): key for name, key in now.items() if key is not None}
        plan.move = replace(plan.move, keyspace=replace(plan.move.keyspace, tables=named))

    return change


def setting(**limits: Any) -> Callable[[Plan], object]:
    def change(plan: Plan) -> None:
        plan.config = replace(plan.config, limits=replace(plan.config.limits, **limits))

    return change


def detach_and_die(plan: Plan) -> None:
    """DETACH CONCURRENTLY that did not come to its end: a reader held it up, and somebody lost patience."""
    reader = plan.session("s1")
    reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    reader.execute("SELECT FROM orders")
    detaching = plan.session("s1")
    ended = spawn(lambda: detaching.execute("ALTER TABLE orders DETACH PARTITION orders_1 CONCURRENTLY"))
    until(lambda: plan.execute("s1", "SELECT 1 FROM pg_inherits WHERE inhdetachpending") != [])
    plan.execute("s1", f"SELECT pg_cancel_backend({detaching.info.backend_pid})")
    with pytest.raises(errors.QueryCanceled):
        ended.result(60)
    reader.execute("ROLLBACK")


PARTED: Final = """
    CREATE TABLE orders (tenant_id bigint, id bigint, note text, PRIMARY KEY (tenant_id, id))
        PARTITION BY RANGE (tenant_id);
    CREATE TABLE orders_1 PARTITION OF orders FOR VALUES FROM (0) TO (150);
    CREATE TABLE orders_2 PARTITION OF orders DEFAULT;
"""
FOREIGN_TABLE: Final = "CREATE FOREIGN DATA WRAPPER w; CREATE SERVER f FOREIGN DATA WRAPPER w;"
LINES: Final = """
    CREATE TABLE orders (tenant_id bigint, id bigint, PRIMARY KEY (tenant_id, id));
    CREATE TABLE lines (tenant_id bigint, id bigint, order_id bigint, PRIMARY KEY (tenant_id, id){});
"""
TWO: Final = {"orders": "tenant_id", "lines": "tenant_id"}


def key(column: str, *, declared: str = "PRIMARY KEY (tenant_id, id)") -> str:
    return f"CREATE TABLE orders (tenant_id {column}, id bigint NOT NULL, note text, {declared})"


CASES: Final[Mapping[str, Case]] = {
    # which tables
    "missing on the target": Case(
        THERE, target="SELECT", says=("orders does not exist on s2",), advice=rows(ORDERS, shard="s2")
    ),
    "missing on the source": Case(
        THERE,
        tables={"orders": "tenant_id", "ordres": "tenant_id"},
        says=("ordres does not exist on s1",),
        advice=tables(ordres=None),
    ),
    "a partition": Case(
        THERE,
        PARTED,
        tables={"orders_1": "tenant_id"},
        says=("orders_1 on s1 is a partition of orders",),
        advice=tables(orders_1=None, orders="tenant_id"),
    ),
    "a view": Case(
        THERE,
        f"{ORDERS}; CREATE VIEW seen AS SELECT * FROM orders",
        tables={"orders": "tenant_id", "seen": "tenant_id"},
        says=("seen on s1 is a view",),
        advice=tables(seen=None),
    ),
    "in our own schema": Case(
        THERE,
        f"CREATE SCHEMA shardmove; SET search_path = shardmove; {ORDERS}",
        tables={"shardmove.orders": "tenant_id"},
        says=("shardmove.orders on s1 is in the schema of our own objects",),
        advice=tables(**{"shardmove.orders": None, "orders": "tenant_id"}),
    ),
    "unlogged": Case(KIND, ORDERS.replace("TABLE", "UNLOGGED TABLE"), says=("orders on s1 is unlogged", "on s2")),
    "an unlogged partition": Case(
        KIND,
        PARTED.replace("TABLE orders_1", "UNLOGGED TABLE orders_1"),
        says=("orders_1 on s1 is unlogged",),
    ),
    "a foreign partition": Case(
        KIND,
        FOREIGN_TABLE
        + PARTED.replace("TABLE orders_2 PARTITION OF orders DEFAULT", "TABLE orders_2 PARTITION OF orders DEFAULT")
        .replace("PRIMARY KEY (tenant_id, id)", "CHECK (id > 0)")
        .replace(
            "CREATE TABLE orders_2 PARTITION OF orders DEFAULT",
            "CREATE FOREIGN TABLE orders_2 PARTITION OF orders DEFAULT SERVER f",
        ),
        says=("orders_2 of orders on s1 is a foreign table",),
    ),
    "a partition half detached": Case(
        KIND,
        PARTED.replace(
            "orders_2 PARTITION OF orders DEFAULT", "orders_2 PARTITION OF orders FOR VALUES FROM (150) TO (900)"
        ),
        setup=detach_and_die,
        says=("orders_1 on s1 is half detached",),
    ),
    "an heir that is not named": Case(
        KIND,
        f"{ORDERS}; CREATE TABLE late (PRIMARY KEY (tenant_id, id)) INHERITS (orders);"
        " CREATE TABLE later (PRIMARY KEY (tenant_id, id)) INHERITS (late)",
        says=("late on s1 inherits from orders", "later on s1 inherits from late"),
        advice=tables(late="tenant_id", later="tenant_id"),
    ),
    "a foreign heir": Case(
        KIND,
        f"{FOREIGN_TABLE} {ORDERS.replace('PRIMARY KEY', 'UNIQUE')};"
        " CREATE FOREIGN TABLE late () INHERITS (orders) SERVER f",
        says=("late on s1 inherits from orders",),
    ),
    # key columns
    "no such column": Case(
        KEYS, tables={"orders": "tenant"}, says=("no column tenant in orders on s1",), advice=tables(orders="tenant_id")
    ),
    "a key of another type": Case(KEYS, key("text"), says=("tenant_id of orders on s1 is text", "on s2 is text")),
    "a wider key": Case(
        KEYS, options={"keyspace": {"key_type": "integer"}}, says=("is bigint, the keyspace's keys are integer",)
    ),
    "a blank-padded key": Case(
        KEYS, key("character(5)"), options={"keyspace": {"key_type": "text"}}, says=("is character(5)",)
    ),
    "a key that may be NULL": Case(
        KEYS, key("bigint", declared="UNIQUE (tenant_id, id)"), says=("tenant_id of orders on s1 may be NULL",)
    ),
    "rows without a key": Case(
        KEYS,
        key("bigint", declared="UNIQUE (tenant_id, id)"),
        setup=rows("INSERT INTO orders VALUES (NULL, 1), (NULL, 2), (1, 1)"),
        says=("tenant_id of orders on s1 may be NULL, and is in 2 rows",),
        advice=rows("DELETE FROM orders WHERE tenant_id IS NULL"),
    ),
    "NOT NULL that nobody has proven": Case(
        KEYS,
        "CREATE TABLE orders (tenant_id bigint, id bigint NOT NULL, note text, UNIQUE (tenant_id, id));"
        " ALTER TABLE orders ADD CONSTRAINT known NOT NULL tenant_id NOT VALID",
        says=("tenant_id of orders on s1 may be NULL",),
    ),
    "a generated key": Case(
        KEYS,
        key("bigint GENERATED ALWAYS AS (id % 8) STORED NOT NULL"),
        says=("tenant_id of orders on s1 is generated",),
    ),
    "a key that is generated when it is read": Case(
        KEYS,
        "CREATE TABLE orders (tenant_id bigint GENERATED ALWAYS AS (id % 8) NOT NULL, id bigint PRIMARY KEY)",
        says=("tenant_id of orders on s1 is generated",),
    ),
    "a lenient key": Case(
        KEYS,
        "CREATE COLLATION lenient (provider = icu, locale = 'und-u-ks-level2', deterministic = false);"
        + key("text COLLATE lenient"),
        options={"keyspace": {"key_type": "text"}},
        says=("collation that takes different texts for equal",),
        servers="old",
    ),
    # keysets
    "no unique key": Case(
        KEYSET, key("bigint NOT NULL", declared="CHECK (id > 0)"), says=("the table orders has no primary key",)
    ),
    "a unique key that may be NULL": Case(
        KEYSET,
        "CREATE TABLE orders (tenant_id bigint NOT NULL, id bigint, UNIQUE (tenant_id, id))",
        says=("the table orders has no primary key",),
    ),
    "a unique key not proven NOT NULL": Case(
        KEYSET,
        "CREATE TABLE orders (tenant_id bigint NOT NULL, id bigint, UNIQUE (tenant_id, id));"
        " ALTER TABLE orders ADD CONSTRAINT known NOT NULL id NOT VALID",
        says=("the table orders has no primary key",),
    ),
    "the journal's own column": Case(
        KEYSET,
        "CREATE TABLE orders (tenant_id bigint, shardmove_xid bigint, PRIMARY KEY (tenant_id, shardmove_xid))",
        says=("a column shardmove_xid of its own, and orders",),
    ),
    "a key of an extension's type": Case(
        KEYSET,
        "CREATE EXTENSION ltree; CREATE TABLE orders (tenant_id bigint, path ltree, PRIMARY KEY (tenant_id, path))",
        says=("the key of orders on s1 (tenant_id, path) cannot be compared",),
        servers="old",
        advice=both(
            "ALTER TABLE orders DROP CONSTRAINT orders_pkey, ADD COLUMN id bigint GENERATED BY DEFAULT AS IDENTITY,"
            " ADD PRIMARY KEY (tenant_id, id)"
        ),
    ),
    "no index in the order of bytes": Case(
        KEYSET,
        key('text COLLATE "und-x-icu"'),
        options={"keyspace": {"key_type": "text"}},
        says=("no index of orders on s1",),
        is_note=True,
        servers="old",
    ),
    "a key of names": Case(
        KEYSET,
        "CREATE TABLE orders (tenant_id bigint, what regclass, id bigint NOT NULL, PRIMARY KEY (tenant_id, what))",
        says=("the table orders has no primary key and no unique index",),
    ),
    # the same on both sides
    "a column that is missing": Case(
        ALIKE, target=ORDERS.replace("note text, ", ""), says=("orders has only on s1: column note text",)
    ),
    "constraints that are missing": Case(
        ALIKE,
        f"{ORDERS}; ALTER TABLE orders ADD CHECK (id > 0), ADD UNIQUE (tenant_id, note), ALTER note SET DEFAULT 'x',"
        " ALTER note SET NOT NULL; CREATE UNIQUE INDEX ON orders (tenant_id, (id % 7))",
        target=ORDERS,
        says=("CHECK ((id > 0))", "UNIQUE (tenant_id, note)", "default of note", "not null", "((id % (7)::bigint))"),
    ),
    "a foreign key that is missing": Case(
        ALIKE,
        LINES.format(", FOREIGN KEY (tenant_id, order_id) REFERENCES orders ON DELETE CASCADE DEFERRABLE"),
        target=LINES.format(""),
        tables=TWO,
        says=("lines has only on s1: foreign key FOREIGN KEY (tenant_id, order_id)",),
    ),
    "an enum of other words": Case(
        ALIKE,
        "CREATE TYPE mood AS ENUM ('sad', 'ok'); " + key("bigint, mood mood"),
        target="CREATE TYPE mood AS ENUM ('sad'); " + key("bigint, mood mood"),
        says=("enum public.mood of 'sad', 'ok'",),
        advice=rows("ALTER TYPE mood ADD VALUE 'ok'", shard="s2"),
    ),
    "a partition's own constraint": Case(
        ALIKE,
        PARTED,
        target=PARTED + "ALTER TABLE orders_1 ADD CHECK (id > 0)",
        says=("CHECK ((id > 0)) in the partition",),
        advice=rows("ALTER TABLE orders_1 DROP CONSTRAINT orders_1_id_check", shard="s2"),
    ),
    "a reference table that is missing": Case(
        REFERENCE,
        f"{ORDERS}; CREATE TABLE currencies (code text PRIMARY KEY)",
        target=ORDERS,
        options={"keyspace": {"reference_tables": ["currencies"]}},
        says=("the table currencies does not exist on s2",),
        advice=rows("CREATE TABLE currencies (code text PRIMARY KEY)", shard="s2"),
    ),
    "a reference table that differs": Case(
        REFERENCE,
        f"{ORDERS}; CREATE TABLE currencies (code text PRIMARY KEY, name text)",
        target=f"{ORDERS}; CREATE TABLE currencies (code text PRIMARY KEY)",
        options={"keyspace": {"reference_tables": ["currencies"]}},
        says=("currencies has only on s1: column name text",),
    ),
    "an extension that is missing": Case(
        EXTENSIONS,
        "CREATE EXTENSION citext; " + key("bigint, email citext"),
        target="SELECT",
        says=("the extension citext is missing on s2",),
        servers="old",
    ),
    "an extension of another release": Case(
        EXTENSIONS,
        "CREATE EXTENSION citext; " + key("bigint, email citext"),
        target="CREATE EXTENSION citext VERSION '1.5'; " + key("bigint, email citext"),
        says=("the extension citext is 1.6 on s1 and 1.5 on s2",),
        is_note=True,
        servers="old",
    ),
    "a collation that differs": Case(
        COLLATIONS,
        "CREATE COLLATION named (provider = icu, locale = 'und'); "
        + key("bigint, name text COLLATE named, UNIQUE (tenant_id, name)"),
        target="CREATE COLLATION named (provider = icu, locale = 'und-u-ks-level2', deterministic = false); "
        + key("bigint, name text COLLATE named, UNIQUE (tenant_id, name)"),
        says=("the collation public.named of a unique index is",),
        advice=rows(
            'ALTER TABLE orders ALTER name TYPE text COLLATE "C"; DROP COLLATION named;'
            " CREATE COLLATION named (provider = icu, locale = 'und'); ALTER TABLE orders ALTER name TYPE text COLLATE named",  # noqa: E501
            shard="s2",
        ),
        is_note=True,
        servers="old",
    ),
    # what ties rows to each other
    "a primary key without the key": Case(
        UNIQUE, key("bigint NOT NULL", declared="PRIMARY KEY (id)"), says=("orders_pkey of orders on s1",)
    ),
    "unique indexes without the key": Case(
        UNIQUE,
        f"{ORDERS}; CREATE UNIQUE INDEX low ON orders (lower(note)) WHERE id > 5;"
        " ALTER TABLE orders ADD UNIQUE NULLS NOT DISTINCT (note)",
        says=("low of orders on s1", "orders_note_key of orders on s1", "on s2"),
    ),
    "a unique key that others rest on": Case(
        UNIQUE,
        LINES.format("").replace("id bigint, PRIMARY KEY", "id bigint UNIQUE, PRIMARY KEY", 1)
        + "ALTER TABLE lines ADD FOREIGN KEY (order_id) REFERENCES orders (id)",
        tables=TWO,
        says=("orders_id_key of orders on s1",),
    ),
    "an exclusion constraint that does not compare the key": Case(
        UNIQUE,
        "CREATE EXTENSION btree_gist; "
        "CREATE TABLE orders (tenant_id bigint, id bigint, during tstzrange, PRIMARY KEY (tenant_id, id),"
        " CONSTRAINT alone EXCLUDE USING gist (tenant_id WITH <>, during WITH &&))",
        says=("the exclusion constraint alone of orders on s1",),
        servers="old",
    ),
    "an exclusion constraint without the key": Case(
        UNIQUE,
        f"{ORDERS}; ALTER TABLE orders ADD CONSTRAINT alone EXCLUDE USING btree (id WITH =)",
        says=("the exclusion constraint alone of orders on s1",),
    ),
    "an exclusion constraint without the key, over ranges": Case(
        UNIQUE,
        "CREATE TABLE orders (tenant_id bigint, id bigint, during tstzrange, PRIMARY KEY (tenant_id, id),"
        " CONSTRAINT alone EXCLUDE USING gist (during WITH &&) WHERE (id > 5) DEFERRABLE)",
        says=("the exclusion constraint alone of orders on s1",),
        servers="old",
    ),
    "a period without the key": Case(
        UNIQUE,
        "CREATE TABLE orders (tenant_id bigint, id bigint, slot int4range, during tstzrange,"
        " PRIMARY KEY (tenant_id, id), CONSTRAINT times UNIQUE (slot, during WITHOUT OVERLAPS))",
        says=("times of orders on s1",),
        advice=both("ALTER TABLE orders DROP CONSTRAINT times"),  # with the key it takes btree_gist, which is not there
    ),
    "a lenient unique key": Case(
        UNIQUE,
        "CREATE COLLATION lenient (provider = icu, locale = 'und-u-ks-level2', deterministic = false);"
        + key("text")
        + "; CREATE UNIQUE INDEX mild ON orders (tenant_id COLLATE lenient, id)",
        options={"keyspace": {"key_type": "text"}},
        says=("mild of orders on s1",),
        servers="old",
    ),
    "a partition's own unique index": Case(
        UNIQUE, PARTED + "CREATE UNIQUE INDEX own ON orders_1 (id)", says=("own of orders_1 on s1",)
    ),
    "a foreign key from outside": Case(
        FOREIGN,
        LINES.format(", FOREIGN KEY (tenant_id, order_id) REFERENCES orders"),
        says=("lines_tenant_id_order_id_fkey on s1 ties lines to orders, and lines does not move", "on s2"),
    ),
    "a foreign key from outside, named": Case(
        FOREIGN,
        LINES.format(", FOREIGN KEY (tenant_id, order_id) REFERENCES orders"),
        says=("lines_tenant_id_order_id_fkey on s1 ties lines to orders",),
        advice=tables(lines="tenant_id"),
    ),
    "a foreign key to the outside": Case(
        FOREIGN,
        LINES.format(", FOREIGN KEY (tenant_id, order_id) REFERENCES orders"),
        tables={"lines": "tenant_id"},
        says=("ties lines to orders, and orders does not move",),
    ),
    "a foreign key of a reference table": Case(
        FOREIGN,
        LINES.format(", FOREIGN KEY (tenant_id, order_id) REFERENCES orders"),
        options={"keyspace": {"reference_tables": ["lines"]}},
        says=("ties lines to orders, and lines does not move",),
    ),
    "a foreign key of one partition": Case(
        FOREIGN,
        PARTED
        + "CREATE TABLE notes (id bigint PRIMARY KEY); ALTER TABLE orders_1 ADD FOREIGN KEY (id) REFERENCES notes",
        says=("ties orders_1 to notes, and notes does not move",),
    ),
    "a foreign key that does not tie the key": Case(
        FOREIGN,
        """
        CREATE TABLE orders (tenant_id bigint, id bigint, "of" bigint, PRIMARY KEY (tenant_id, id));
        ALTER TABLE orders ADD CONSTRAINT "Of" FOREIGN KEY ("of", id) REFERENCES orders (tenant_id, id)
            ON DELETE CASCADE DEFERRABLE INITIALLY DEFERRED
        """,
        says=('"Of" of orders on s1 does not tie tenant_id to orders.tenant_id',),
    ),
    "a foreign key to a unique key without the key": Case(
        FOREIGN,
        LINES.format("").replace("id bigint, PRIMARY KEY", "id bigint UNIQUE, PRIMARY KEY", 1)
        + "ALTER TABLE lines ADD FOREIGN KEY (order_id) REFERENCES orders (id)",
        tables=TWO,
        says=("lines_order_id_fkey of lines on s1 does not tie tenant_id",),
    ),
    # what happens by itself
    "a trigger that always fires": Case(
        TRIGGERS,
        f'{FUNCTION} {ORDERS}; CREATE TRIGGER "Loud" AFTER INSERT ON orders EXECUTE FUNCTION nothing();'
        ' ALTER TABLE orders ENABLE ALWAYS TRIGGER "Loud"',
        says=('the trigger "Loud" of orders on s1', "on s2"),
    ),
    "a partition's trigger for replicas": Case(
        TRIGGERS,
        f"{FUNCTION} {PARTED} CREATE TRIGGER shardmove_like AFTER INSERT ON orders_1 FOR EACH ROW"
        " EXECUTE FUNCTION nothing(); ALTER TABLE orders_1 ENABLE REPLICA TRIGGER shardmove_like",
        says=("the trigger shardmove_like of orders_1 on s1",),
    ),
    "a foreign key's trigger that always fires": Case(
        TRIGGERS,
        LINES.format(", FOREIGN KEY (tenant_id, order_id) REFERENCES orders ON DELETE CASCADE")
        + """DO $$ DECLARE t record; BEGIN
            FOR t IN SELECT tgname FROM pg_trigger WHERE tgrelid = 'orders'::regclass LOOP
                EXECUTE format('ALTER TABLE orders ENABLE ALWAYS TRIGGER %I', t.tgname);
            END LOOP; END $$""",
        tables=TWO,
        says=('the trigger "RI_ConstraintTrigger_a_',),
    ),
    "a rule that always fires": Case(
        TRIGGERS,
        f"{ORDERS}; CREATE RULE stay AS ON DELETE TO orders DO INSTEAD NOTHING;"
        " ALTER TABLE orders ENABLE ALWAYS RULE stay",
        says=("the rule stay of orders on s1",),
    ),
    "a trigger on one side": Case(
        ONE_SIDED,
        f"{FUNCTION} {ORDERS}; CREATE TRIGGER audit AFTER INSERT ON orders FOR EACH ROW EXECUTE FUNCTION nothing()",
        target=f"{FUNCTION} {ORDERS}",
        says=("the trigger audit of public.orders (public.nothing()) is on s1 and not on s2",),
        is_note=True,
    ),
    "policies on one side": Case(
        ONE_SIDED,
        f"{ORDERS}; ALTER TABLE orders ENABLE ROW LEVEL SECURITY;"
        " CREATE POLICY own ON orders FOR UPDATE TO PUBLIC USING (tenant_id = 7) WITH CHECK (tenant_id > 5)",
        target=ORDERS,
        says=("row security of public.orders", "the policy own of public.orders"),
        is_note=True,
    ),
    "a published table without a replica identity": Case(
        DELETABLE,
        "CREATE TABLE orders (tenant_id bigint NOT NULL, id bigint NOT NULL, UNIQUE (tenant_id, id));"
        " CREATE PUBLICATION every FOR ALL TABLES",
        says=("rows of orders cannot be deleted on s1: ", "does not have a replica identity", "on s2: "),
    ),
    "a published partition without a replica identity": Case(
        DELETABLE,
        PARTED + "CREATE PUBLICATION roots FOR TABLE orders WITH (publish_via_partition_root);"
        " ALTER TABLE orders_1 REPLICA IDENTITY NOTHING",
        says=("rows of orders_1 cannot be deleted on s1: ",),
    ),
    "a publication with a filter": Case(
        DELETABLE,
        f"{ORDERS}; CREATE PUBLICATION a_few FOR TABLE orders WHERE (note > 'a')",
        says=("rows of orders cannot be deleted on s1: ",),
    ),
    "an event trigger that refuses": Case(
        EVENTS,
        f"{ORDERS}; CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS"
        " $$BEGIN RAISE EXCEPTION 'no changes on Fridays'; END$$;"
        " CREATE EVENT TRIGGER fridays ON ddl_command_end WHEN TAG IN ('CREATE TRIGGER') EXECUTE FUNCTION refuse()",
        says=("an event trigger on s1 (fridays) refuses", "no changes on Fridays"),
    ),
    # sequences
    "a sequence on one side": Case(
        SEQUENCES,
        "CREATE TABLE orders (tenant_id bigint, id bigserial, PRIMARY KEY (tenant_id, id))",
        target=ORDERS.replace("note text, ", ""),
        says=("the column orders.id has a sequence on s1 and none on s2",),
    ),
    "an identity on one side": Case(
        SEQUENCES,
        ORDERS,
        target=ORDERS.replace("id bigint, note", "id bigint GENERATED ALWAYS AS IDENTITY, note"),
        says=("the column orders.id has a sequence on s2 and none on s1",),
    ),
    "sequences that count apart": Case(
        SEQUENCES,
        key("bigint, number bigint GENERATED ALWAYS AS IDENTITY"),
        target=key("bigint, number bigint GENERATED ALWAYS AS IDENTITY (INCREMENT -1)"),
        says=("the sequences of orders.number count up on one shard and down on the other",),
    ),
    "no room for the margin": Case(
        SEQUENCES,
        "CREATE TABLE orders (tenant_id bigint, id smallserial, PRIMARY KEY (tenant_id, id))",
        says=("the sequence of orders.id on s1 ends at 32767",),
    ),
    "a smaller margin": Case(
        SEQUENCES,
        "CREATE TABLE orders (tenant_id bigint, id smallserial, PRIMARY KEY (tenant_id, id))",
        says=("the sequence of orders.id on s1 ends at 32767",),
        advice=setting(sequence_margin=16_383),
    ),
    # rows
    "rows on the target": Case(
        EMPTY,
        setup=rows("INSERT INTO orders SELECT 90 + n, n FROM generate_series(1, 20) AS n", shard="s2"),
        says=("s2 holds 11 rows of 100:200 in orders",),
    ),
    "rows in a partition of the target": Case(
        EMPTY,
        PARTED,
        setup=rows("INSERT INTO orders VALUES (120, 1), (180, 1)", shard="s2"),
        says=("s2 holds 2 rows of 100:200 in orders",),
    ),
    "rows that break a check": Case(
        UNPROVEN,
        ORDERS,
        setup=both(
            "INSERT INTO orders VALUES (150, 1, 'bad'), (50, 1, 'bad')",
            "ALTER TABLE orders ADD CONSTRAINT \"Good\" CHECK (note LIKE 'good%') NOT VALID",
        ),
        says=("rows of orders on s1 break the constraint Good",),
    ),
    "rows that break a check, mended": Case(
        UNPROVEN,
        ORDERS,
        setup=both(
            "INSERT INTO orders VALUES (150, 1, 'bad'), (50, 1, 'bad')",
            "ALTER TABLE orders ADD CONSTRAINT good CHECK (note LIKE 'good%') NOT VALID",
        ),
        says=("rows of orders on s1 break the constraint good",),
        advice=rows("UPDATE orders SET note = 'good' WHERE tenant_id = 150"),
    ),
    "NULL where it is not allowed any more": Case(
        UNPROVEN,
        ORDERS,
        setup=both(
            "INSERT INTO orders VALUES (150, 1, NULL)", "ALTER TABLE orders ADD CONSTRAINT said NOT NULL note NOT VALID"
        ),
        says=("rows of orders on s1 break the constraint said",),
    ),
    "rows of a partition that break its check": Case(
        UNPROVEN,
        PARTED,
        setup=both(
            "INSERT INTO orders VALUES (120, 1, 'bad')",
            "ALTER TABLE orders_1 ADD CONSTRAINT good CHECK (note LIKE 'good%') NOT VALID",
        ),
        says=("rows of orders_1 on s1 break the constraint good",),
    ),
    "values that break their domain": Case(
        UNPROVEN,
        "CREATE DOMAIN word AS text; " + key("bigint, words word[]"),
        setup=both(
            "INSERT INTO orders VALUES (150, '{bad,good}', 1)",
            "ALTER DOMAIN word ADD CONSTRAINT good CHECK (VALUE LIKE 'good%') NOT VALID",
        ),
        says=("rows of orders on s1 break the constraint good",),
    ),
    "large objects": Case(
        LARGE,
        key("bigint, picture oid"),
        setup=rows("SELECT lo_from_bytea(0, 'x')"),
        says=("orders.picture on s1 may name large objects", "some on s1"),
    ),
    "large objects, carried as bytes": Case(
        LARGE,
        "CREATE DOMAIN lo AS oid; " + key("bigint, picture lo"),
        setup=rows("INSERT INTO orders VALUES (150, lo_from_bytea(0, 'x'), 1)"),
        says=("orders.picture on s1 may name large objects",),
        advice=both("ALTER TABLE orders ALTER picture TYPE bytea USING lo_get(picture)"),
    ),
    "names of what is not there": Case(
        NAMES,
        key("bigint, what regclass, who regrole[]"),
        setup=rows(
            "CREATE TABLE only_here ()",
            "INSERT INTO orders VALUES (150, 'only_here', '{postgres}', 1), (150, 4711, NULL, 2),"
            " (50, 'orders', '{postgres}', 1), (150, 'orders', '{postgres}', 3)",
            "DROP TABLE IF EXISTS unknown",
        ),
        says=("rows of orders hold in what what s2 does not have: public.only_here",),
    ),
    "names of what is not there, made": Case(
        NAMES,
        key("bigint, what regclass"),
        setup=rows("CREATE TABLE only_here ()", "INSERT INTO orders VALUES (150, 'only_here', 1)"),
        says=("public.only_here",),
        advice=rows("CREATE TABLE only_here ()", shard="s2"),
    ),
    "a type that nobody reads": Case(
        READABLE, key("bigint, tree pg_node_tree"), says=("orders.tree on s1 is pg_node_tree", "on s2")
    ),
    "xml where it is not read": Case(
        READABLE, key("bigint, document xml"), says=("orders.document on s2 is xml",), servers="mixed"
    ),
    "functions that look around": Case(
        TAKES,
        "CREATE TABLE lucky (n bigint); INSERT INTO lucky VALUES (1), (2);"
        " CREATE FUNCTION is_lucky(n bigint) RETURNS boolean LANGUAGE sql STABLE AS"
        " 'SELECT EXISTS (SELECT FROM lucky WHERE lucky.n = $1)';"
        f"{ORDERS}; ALTER TABLE orders ADD CHECK (is_lucky(id))",
        setup=rows("INSERT INTO orders VALUES (150, 1)"),
        says=("s2 does not take the rows of orders", '"lucky" does not exist'),
    ),
    "rows that only the target refuses": Case(
        TAKES,
        f"CREATE FUNCTION is_good(note text) RETURNS boolean LANGUAGE sql AS 'SELECT true'; {ORDERS};"
        " ALTER TABLE orders ADD CONSTRAINT good CHECK (is_good(note))",
        setup=rows("INSERT INTO orders VALUES (150, 1, 'x')"),
        target=f"CREATE FUNCTION is_good(note text) RETURNS boolean LANGUAGE sql AS 'SELECT false'; {ORDERS};"
        " ALTER TABLE orders ADD CONSTRAINT good CHECK (is_good(note))",
        says=('"orders" violates check constraint "good"',),
        advice=rows(
            "CREATE OR REPLACE FUNCTION is_good(note text) RETURNS boolean LANGUAGE sql AS 'SELECT true'", shard="s2"
        ),
    ),
}


@pytest.fixture
def planned(request: pytest.FixtureRequest, make_plan: MakePlan) -> Callable[[Case], Plan]:
    """The move of a case, on the servers that it needs."""

    def make(case: Case) -> Plan:
        options: dict[str, Any] = {"tables": case.tables, "target_schema": case.target, **case.options}
        if (case.options.get("keyspace") or {}).get("key_type") == "text":
            options.setdefault("range_", "b:d")
        if case.servers != "new":
            old = request.getfixturevalue("old_databases")("old1", "old2")
            new = request.getfixturevalue("databases")("cat", "s2")
            options["dsns"] = {
                "cat": new["cat"],
                "s1": old["old1"],
                "s2": old["old2"] if case.servers == "old" else new["s2"],
            }
        plan = make_plan(case.schema, **options)
        case.setup(plan)
        return plan

    return make


@pytest.mark.parametrize("name", CASES)
def test_a_line_fails_and_passes_once_its_advice_is_taken(name: str, planned: Callable[[Case], Plan]) -> None:
    case = CASES[name]
    plan = planned(case)
    found = line(plan.site(), case.check)
    assert found.problem is not None
    assert isinstance(found.problem, Note) is case.is_note, found.problem
    for part in case.says:
        assert part in found.problem.message
    assert found.problem.hint
    if case.advice is None:
        plan.follow(found)
    else:
        case.advice(plan)
        if case.check in (KEYS, THERE) and "on s1: " in found.problem.hint:
            plan.follow(found)
    after = line(plan.site(), case.check)
    assert after.problem is None, after.problem


def test_every_line_has_cases() -> None:
    assert {case.check for case in CASES.values()} == {text for text, _ in (*SCHEMA, *DATA)}


def test_a_line_names_all_that_it_finds_up_to_some(make_plan: MakePlan) -> None:
    tables = {f"t{n:02}": "tenant_id" for n in range(12)}
    plan = make_plan(
        "; ".join(ORDERS.replace("orders", name) for name in tables), tables=tables, target_schema="SELECT"
    )
    found = line(plan.site(), THERE).problem
    assert found is not None
    assert [f"the table t{n:02} does not exist on s2" in found.message for n in range(12)] == [True] * 10 + [False] * 2
    assert found.message.endswith("; and 2 more")


RICH: Final = """
    CREATE SCHEMA "Lager";
    CREATE TYPE mood AS ENUM ('sad', 'ok');
    CREATE TYPE place AS (street text, mood mood);
    CREATE DOMAIN id_of_tenant AS bigint CHECK (VALUE >= 0);
    CREATE DOMAIN word AS varchar(40) CHECK (VALUE <> '');
    CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
    CREATE FUNCTION low(t text) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT lower(t)';
    CREATE TABLE currencies (code text PRIMARY KEY, name text);

    CREATE TABLE tenants (
        tenant_id id_of_tenant PRIMARY KEY, name word, main_order bigint,
        UNIQUE NULLS NOT DISTINCT (tenant_id, name), CHECK (low(name) <> 'x')
    );
    CREATE TABLE "Lager"."Orders of a Tenant" (
        "Tenant Id" id_of_tenant NOT NULL, id bigint GENERATED ALWAYS AS IDENTITY, parent bigint, no serial,
        currency text REFERENCES currencies, feeling mood DEFAULT 'ok', words word[], place place, places place[],
        during tstzrange, price numeric(10, 2), note text COLLATE "C",
        twice numeric GENERATED ALWAYS AS (price * 2) STORED, state text, position int, old int, what regclass,
        PRIMARY KEY ("Tenant Id", id),
        UNIQUE ("Tenant Id", no) DEFERRABLE INITIALLY DEFERRED,
        EXCLUDE USING btree ("Tenant Id" WITH =, state WITH =) WHERE (state = 'open') DEFERRABLE,
        FOREIGN KEY ("Tenant Id") REFERENCES tenants ON DELETE CASCADE,
        FOREIGN KEY ("Tenant Id", parent) REFERENCES "Lager"."Orders of a Tenant" DEFERRABLE INITIALLY DEFERRED
    );
    ALTER TABLE "Lager"."Orders of a Tenant" DROP COLUMN old, ADD CHECK (price > 0) NOT VALID;
    CREATE UNIQUE INDEX ON "Lager"."Orders of a Tenant" ("Tenant Id", low(note)) WHERE note IS NOT NULL;
    CREATE TRIGGER nothing BEFORE INSERT ON "Lager"."Orders of a Tenant" FOR EACH ROW EXECUTE FUNCTION nothing();
    CREATE TRIGGER never AFTER TRUNCATE ON "Lager"."Orders of a Tenant" EXECUTE FUNCTION nothing();
    ALTER TABLE "Lager"."Orders of a Tenant" DISABLE TRIGGER never;
    CREATE RULE plain AS ON UPDATE TO "Lager"."Orders of a Tenant" WHERE false DO INSTEAD NOTHING;
    ALTER TABLE "Lager"."Orders of a Tenant" ENABLE ROW LEVEL SECURITY;
    CREATE POLICY own ON "Lager"."Orders of a Tenant" USING (true);
    ALTER TABLE tenants ADD FOREIGN KEY (tenant_id, main_order) REFERENCES "Lager"."Orders of a Tenant"
        DEFERRABLE INITIALLY DEFERRED NOT VALID;

    CREATE TABLE events (
        tenant bigint NOT NULL, at timestamptz NOT NULL, kind mood NOT NULL, data jsonb, PRIMARY KEY (tenant, at, kind)
    ) PARTITION BY RANGE (at);
    CREATE TABLE events_2025 PARTITION OF events FOR VALUES FROM ('2025-01-01 00:00Z') TO ('2026-01-01 00:00Z')
        PARTITION BY LIST (kind);
    CREATE TABLE "Lager".events_2025_sad PARTITION OF events_2025 FOR VALUES IN ('sad');
    CREATE TABLE events_2025_others PARTITION OF events_2025 DEFAULT;
    CREATE TABLE events_hash PARTITION OF events DEFAULT PARTITION BY HASH (tenant);
    CREATE TABLE events_hash_0 PARTITION OF events_hash FOR VALUES WITH (MODULUS 2, REMAINDER 0);
    CREATE TABLE events_hash_1 PARTITION OF events_hash FOR VALUES WITH (MODULUS 2, REMAINDER 1);
    CREATE UNIQUE INDEX ON events_hash_0 (tenant, at);
    ALTER TABLE events ADD FOREIGN KEY (tenant) REFERENCES tenants;
    CREATE INDEX ON events (kind);

    CREATE TABLE animals (tenant int NOT NULL, id bigint NOT NULL DEFAULT 0, PRIMARY KEY (tenant, id));
    CREATE TABLE cats (lives int, PRIMARY KEY (tenant, id)) INHERITS (animals);
    CREATE TABLE kittens (shardmove_xid int, PRIMARY KEY (id, tenant)) INHERITS (cats);
    CREATE SEQUENCE shared; ALTER TABLE animals ALTER id SET DEFAULT nextval('shared');
    ALTER TABLE cats ALTER id SET DEFAULT nextval('shared');

    CREATE TABLE "{long}" ("{long}" smallint, "a""b.c" uuid, "state" text, PRIMARY KEY ("a""b.c", "{long}"));
    CREATE TABLE keyed_by_index (tenant bigint NOT NULL, a date NOT NULL, b inet NOT NULL, o money);
    CREATE UNIQUE INDEX ON keyed_by_index (a, tenant, b);
""".replace("{long}", "T" * 63)
RICH_TABLES: Final = {
    "tenants": "tenant_id",
    "Lager.Orders of a Tenant": "Tenant Id",
    "events": "tenant",
    "animals": "tenant",
    "cats": "tenant",
    "kittens": "tenant",
    "T" * 63: "T" * 63,
    "keyed_by_index": "tenant",
}
RICH_ROWS: Final = """
    INSERT INTO currencies VALUES ('EUR', 'Euro');
    INSERT INTO tenants SELECT n, 'tenant ' || n FROM generate_series(90, 210) AS n;
    INSERT INTO "Lager"."Orders of a Tenant" ("Tenant Id", parent, currency, words, place, places, during, price, what)
        SELECT n, NULL, 'EUR', '{a,b}', '(s,ok)', '{"(s,sad)"}', '[2026-01-01,)', n, 'tenants'
        FROM generate_series(90, 210) AS n;
    INSERT INTO events SELECT n, '2025-06-01', 'sad' FROM generate_series(90, 210) AS n;
    INSERT INTO events SELECT n, now(), 'ok' FROM generate_series(90, 210) AS n;
    INSERT INTO animals SELECT n FROM generate_series(90, 210) AS n;
    INSERT INTO kittens SELECT n FROM generate_series(90, 210) AS n;
    INSERT INTO "{long}" SELECT n, gen_random_uuid() FROM generate_series(90, 210) AS n;
    INSERT INTO keyed_by_index SELECT n, now(), '::1', '12.34' FROM generate_series(90, 210) AS n;
""".replace("{long}", "T" * 63)


def failures(plan: Plan) -> list[str]:
    """What does not pass; how full the disk will be is said of every move."""
    notes = "there is room on the target's disk"
    return [str(each) for each in checklist(plan.site()) if each.problem is not None and each.check != notes]


def columns_the_other_way_round(plan: Plan) -> None:
    """The target's tables may have had another history: columns in another order, and dropped ones."""
    for statement in (
        "ALTER TABLE events ADD COLUMN gone int",
        "ALTER TABLE events DROP COLUMN gone",
        "ALTER TABLE events DROP COLUMN data",
        "ALTER TABLE events ADD COLUMN data jsonb",
        "ALTER TABLE tenants DROP COLUMN main_order",
        "ALTER TABLE tenants ADD COLUMN main_order bigint, ADD FOREIGN KEY (tenant_id, main_order) REFERENCES"
        ' "Lager"."Orders of a Tenant" DEFERRABLE INITIALLY DEFERRED NOT VALID',
    ):
        plan.execute("s2", statement)


@pytest.mark.parametrize("scheme", ["range", "hash"])
@pytest.mark.parametrize("between", ["new", "mixed"])
def test_what_is_legal_passes(between: str, scheme: str, planned: Callable[[Case], Plan]) -> None:
    keyspace = {"scheme": scheme, "reference_tables": ["currencies"]}
    range_ = "100:200" if scheme == "range" else "0:"
    plan = planned(
        Case("", RICH, tables=RICH_TABLES, options={"keyspace": keyspace, "range_": range_}, servers=between)
    )
    columns_the_other_way_round(plan)
    plan.execute("s1", RICH_ROWS)
    plan.execute("s2", "INSERT INTO currencies VALUES ('EUR', 'Euro')")
    assert failures(plan) == []
    there_and_back(plan)


def there_and_back(plan: Plan) -> None:
    """The move itself: to the target, back, and its rows off the target again."""
    with (
        Catalog.connect(plan.config.catalog_dsn) as catalog,
        hold(
            plan.config,
            catalog,
            plan.move.id,
            holder="test",
            make_executor=lambda: InlineExecutor(2),
            progress=Progress(),
        ) as held,
    ):
        run(held, State.READY)
        cut_over(held, Direction.FORWARD)
        cut_over(held, Direction.BACK)
        ending.roll_back(held)


@pytest.mark.parametrize("scheme", ["range", "hash"])
@pytest.mark.parametrize(
    ("key_type", "declared", "range_", "values"),
    [
        ("smallint", "smallint", "3:5", "3, 4, 9"),
        ("integer", "smallint", "3:5", "3, 4, 9"),
        ("bigint", "integer", "3:5000000000", "3, 4, -9"),
        ("text", "text", "b:d", "'b', 'c', 'ä'"),
        ("text", "varchar(20)", "b:d", "'b', 'c', 'ä'"),
        ("uuid", "uuid", ":7fffffff-0000-0000-0000-000000000000", "gen_random_uuid(), gen_random_uuid()"),
        ("date", "date", "2026-01-01:", "'2026-01-01', 'infinity', '-infinity', '0044-03-15 BC'"),
        ("timestamptz", "timestamptz", '"2026-01-01 00:00:00+00:00":', "'2026-01-01', 'infinity', '-infinity'"),
    ],
)
def test_keys_of_every_type_pass(
    key_type: str, declared: str, range_: str, values: str, scheme: str, planned: Callable[[Case], Plan]
) -> None:
    """Also as a domain over a domain of the type."""
    schema = f"""
        CREATE DOMAIN inner_key AS {declared}; CREATE DOMAIN key AS inner_key CHECK (VALUE IS NOT NULL);
        CREATE TABLE plain (k {declared}, id bigint, PRIMARY KEY (k, id)); CREATE TABLE tamed (k key PRIMARY KEY);
        INSERT INTO plain SELECT k, 1 FROM unnest(ARRAY[{values}]::{declared}[]) AS k;
        INSERT INTO tamed SELECT k FROM plain
    """
    options = {
        "keyspace": {"key_type": key_type, "scheme": scheme},
        "range_": range_ if scheme == "range" else "-5:5",
    }
    plan = planned(Case("", schema, tables={"plain": "k", "tamed": "k"}, options=options))
    plan.execute("s2", "TRUNCATE plain, tamed")
    assert failures(plan) == []
    there_and_back(plan)


NAMES_ALLOWED: Final = ("100% cotton", 'the "best"', "back\\slash", "Straße", "new", "state", "move_id", "tg_op")
TYPES_OF_KEYSETS: Final = {
    "mood": "'sad', 'ok'",
    "integer[]": "'{1,2}', '{}', '{NULL}'",
    "double precision": "'NaN', '-0', '1e308', '0.1'",
    "numeric": "'1.0', '1.10', 'NaN', 'Infinity'",
    "character(5)": "'a', 'b  c'",
    '"char"': "'a', 'b'",
    "bytea": "'a', '\\x00ff'",
    "interval": "'1 mon', '1 year -2 days'",
    "timestamp": "'2026-01-01', '-infinity', '0044-03-15 BC'",
    "timetz": "'10:00+02', '10:00-02'",
    "inet": "'::1', '10.0.0.0/8'",
    "jsonb": "'{}', '[1.0]'",
    "int4range": "'[1,2)', 'empty'",
    "numbers": "'(1,2)', '(,)'",
    "oid": "'1', '4000000000'",
    "pg_lsn": "'0/0', 'F/F'",
    "money": "'1.23', '-1'",
    "boolean": "'t', 'f'",
    "bit varying(4)": "'1', '0101'",
    "text": "'', E'\\n', ' a'",
}


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def test_names_and_keysets_of_every_kind_pass(planned: Callable[[Case], Plan]) -> None:
    tables = {f"{quoted(name)}.{quoted(name)}": name for name in NAMES_ALLOWED}
    named = "".join(
        f"CREATE SCHEMA {quoted(name)}; CREATE TABLE {quoted(name)}.{quoted(name)}"
        f" ({quoted(name)} bigint, {quoted('a' + name)} bigint, old text,"
        f" PRIMARY KEY ({quoted(name)}, {quoted('a' + name)}));"
        for name in NAMES_ALLOWED
    )
    typed = "CREATE TYPE mood AS ENUM ('sad', 'ok'); CREATE TYPE numbers AS (a int, b numeric);" + "".join(
        f"CREATE TABLE t{number} (tenant_id bigint, id {declared}, PRIMARY KEY (id, tenant_id));"
        for number, declared in enumerate(TYPES_OF_KEYSETS)
    )
    tables |= {f"t{number}": "tenant_id" for number, _ in enumerate(TYPES_OF_KEYSETS)}
    plan = planned(Case("", named + typed, tables=tables))
    for name in NAMES_ALLOWED:
        plan.execute("s1", f"INSERT INTO {quoted(name)}.{quoted(name)} SELECT n, n FROM generate_series(90, 210) AS n")
    for number, (declared, values) in enumerate(TYPES_OF_KEYSETS.items()):
        listed = f"unnest(ARRAY[{values}]::text[])"
        plan.execute("s1", f"INSERT INTO t{number} SELECT 150, id::{declared} FROM {listed} AS id")
    assert failures(plan) == []
    there_and_back(plan)


COLLATED: Final = """
    CREATE EXTENSION citext;
    CREATE TABLE people (name varchar(20) COLLATE "und-x-icu", mail citext, note text, PRIMARY KEY (name, mail));
    CREATE UNIQUE INDEX ON people (name COLLATE "C", mail COLLATE "C");
    CREATE TABLE visits (at date NOT NULL, name text COLLATE "de-x-icu" NOT NULL, id int NOT NULL,
                         PRIMARY KEY (id, name)) PARTITION BY RANGE (id);
    CREATE TABLE visits_1 (id int NOT NULL, gone int, name text COLLATE "de-x-icu" NOT NULL, at date NOT NULL);
    ALTER TABLE visits_1 DROP COLUMN gone;
    ALTER TABLE visits ATTACH PARTITION visits_1 FOR VALUES FROM (0) TO (9);
"""


def test_collated_keys_and_partitions_with_another_past_pass(planned: Callable[[Case], Plan]) -> None:
    options = {"keyspace": {"key_type": "text"}, "range_": "B:d"}
    plan = planned(Case("", COLLATED, tables={"people": "name", "visits": "name"}, options=options, servers="old"))
    plan.execute("s1", "INSERT INTO people SELECT n, n || '@' FROM unnest('{a,b,c,B,C,ä,Ä,ç,ca,Ca}'::text[]) AS n")
    plan.execute("s1", "INSERT INTO visits SELECT now(), name, 8 FROM people")
    assert [each for each in failures(plan) if "Note(" not in each] == []
    there_and_back(plan)


def test_a_trial_fires_nothing_of_the_applications(make_plan: MakePlan) -> None:
    """Statement triggers fire for no row at all, and what they do elsewhere would not be rolled back."""
    plan = make_plan(
        ORDERS + ";"
        " CREATE SEQUENCE fired;"
        " CREATE FUNCTION fire() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM nextval('public.fired'); RAISE 'no deletes'; END $$;"
        " CREATE TRIGGER fire BEFORE INSERT OR DELETE ON orders EXECUTE FUNCTION fire();"
    )
    assert plan.look("rows can be deleted").passed
    assert plan.look("the target takes rows").passed
    for shard in ("s1", "s2"):
        assert plan.execute(shard, "SELECT is_called FROM fired") == [(False,)]
