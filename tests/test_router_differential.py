"""The same messages to a bare PostgreSQL and through the router: a client must not see a difference.

Each sequence is played in three ways: step by step (the client waits for what it asked), all at once without reading in
between, and byte by byte. What comes back is compared message for message, and so are the tables afterwards.

What may differ, by design, is left out of the sequences or of the comparison:

    process numbers, secrets, OIDs of a database's own objects      each server has its own
    when an asynchronous message comes                              any time, says the protocol
    the greeting's ParameterStatus                                  compared by the tests of the greeting
    BEGIN, and an END that no shard saw, are answered by the router no shard is known yet
    an error in a transaction that no shard has seen                same message, made by whichever shard fails it
    the FATAL after a message that is none                          the router's words
    a refusal of the router's (Bind with a bad key)                 ParseComplete of the messages before it is left out
    names of SQL's PREPARE and of Parse                             apart in transaction pooling: "(session)" below
    EXPLAIN                                                         a notice says the route
    application_name, where the client gave none                    the router's

Random sequences: SHARDMOVE_PROTOCOL is their number, and the seed is the run's then; else they are always the same.
"""

# ruff: noqa: E501  (a sequence is a line)
from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, TypeAlias

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from shardmove.postgres.embedded import Cluster
from shardmove.wire import messages as wire
from tests.support.rawclient import RawClient, told
from tests.support.routed import SCHEMA, Routed, standing
from tests.support.router import Router

RANDOM: Final = int(os.environ.get("SHARDMOVE_PROTOCOL", "40"))
SEED: Final = os.environ.get("SHARDMOVE_SEED", "1") if "SHARDMOVE_PROTOCOL" in os.environ else "1"
BOUND_S: Final = float(os.environ.get("SHARDMOVE_PROTOCOL_BOUND_S", "60"))
ALIKE: Final = """
    CREATE TABLE t (a integer PRIMARY KEY, b text, c integer REFERENCES t (a) DEFERRABLE INITIALLY DEFERRED);
    CREATE TABLE empty ();
    CREATE FUNCTION say(what text) RETURNS integer LANGUAGE plpgsql AS
        $$BEGIN RAISE NOTICE 'said %', what; RETURN length(what); END$$;
"""
RESET: Final = """
    TRUNCATE t, items, empty;
    INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, 5) i;
    INSERT INTO items (tenant_id, id, note) SELECT 7, i, 'note ' || i FROM generate_series(1, 5) i;
    INSERT INTO empty DEFAULT VALUES;
    INSERT INTO empty DEFAULT VALUES;
"""
LEFT: Final = (
    "SELECT (SELECT array_agg(t ORDER BY a)::text FROM t), (SELECT array_agg(i ORDER BY i)::text FROM items i)"
)

Script: TypeAlias = Sequence[bytes | str]
"""Messages; a text is a wait for the first message of one of its kinds."""

Q = wire.query
S, H, X, c = wire.SYNC, wire.FLUSH, wire.TERMINATE, wire.COPY_DONE
d, f, E = wire.copy_data, wire.copy_fail, wire.execute


def P(text: str, name: bytes = b"", oids: Sequence[int] = ()) -> bytes:
    return wire.parse(name, text, oids)


def B(
    name: bytes = b"",
    *values: bytes | None,
    portal: bytes = b"",
    formats: Sequence[int] = (),
    results: Sequence[int] = (),
) -> bytes:
    return wire.bind(portal, name, values, formats=formats, result_formats=results)


def DS(name: bytes = b"") -> bytes:
    return wire.describe(b"S", name)


def DP(name: bytes = b"") -> bytes:
    return wire.describe(b"P", name)


def CS(name: bytes = b"") -> bytes:
    return wire.close(b"S", name)


def CP(name: bytes = b"") -> bytes:
    return wire.close(b"P", name)


def F(oid: int, *values: bytes | None) -> bytes:
    return wire.function_call(oid, values)


E0 = E(b"")
PBE = (P("SELECT a FROM t ORDER BY a"), B(), DP(), E0)
BAD = (P("SELECT 1/a FROM (VALUES (0)) v (a)"), B(), E0)
ONE = "SELECT $1::integer + 1"

SCRIPTS: dict[str, Script] = {
    # --- simple queries
    "select": [Q("SELECT 1")],
    "rows": [Q("SELECT * FROM t ORDER BY a")],
    "rows of a split table": [Q("SELECT * FROM items WHERE tenant_id = 7 ORDER BY id")],
    "empty query": [Q(""), Q(" ;; "), Q("-- nothing")],
    "several statements": [Q("SELECT 1; SELECT 2; SELECT 'three'")],
    "several with writes": [Q("INSERT INTO t VALUES (10); UPDATE t SET b = 'x' WHERE a = 10; SELECT * FROM t WHERE a = 10")],
    "error in the middle of several": [Q("INSERT INTO t VALUES (10); SELECT 1/0; INSERT INTO t VALUES (11)"), Q("SELECT 1")],
    "syntax error": [Q("SELEKT 1"), Q("SELECT 1")],
    "syntax error in several": [Q("SELECT 1; SELEKT 2"), Q("SELECT 1")],
    "unknown table": [Q("SELECT * FROM nowhere"), Q("SELECT 1")],
    "unknown column of a split table": [Q("SELECT wrong FROM items WHERE tenant_id = 7"), Q("SELECT 1")],
    "unique violation": [Q("INSERT INTO items (tenant_id, id) VALUES (7, 1)"), Q("SELECT count(*) FROM items WHERE tenant_id = 7")],
    "nulls": [Q("SELECT NULL, '', NULL::integer, ARRAY[NULL, 1]")],
    "no columns": [Q("SELECT FROM t"), Q("SELECT"), Q("SELECT * FROM empty")],
    "no rows": [Q("SELECT * FROM t WHERE false")],
    "many rows": [Q("SELECT i, repeat('x', i % 50) FROM generate_series(1, 5000) i")],
    "a huge row": [Q("SELECT repeat('x', 3000000), 1, repeat('y', 2000000)"), Q("SELECT 1")],
    "huge rows": [Q("SELECT repeat('x', 200000) FROM generate_series(1, 12)"), Q("SELECT 1")],
    "a huge query": [Q(f"SELECT length('{'x' * 1_000_000}')"), Q("SELECT 1")],
    "notices": [Q("SELECT say('a'), say('bb')"), Q("DO $$BEGIN RAISE WARNING 'w'; RAISE INFO 'i'; END$$")],
    "values of all sorts": [Q("SELECT true, 1.5::float8, 'é', '\\x00ff'::bytea, now() IS NULL, '{\"a\":1}'::jsonb, int4range(1,3)")],
    # --- transactions, simple
    "begin commit": [Q("BEGIN"), Q("INSERT INTO t VALUES (10)"), Q("COMMIT"), Q("SELECT count(*) FROM t")],
    "begin rollback": [Q("BEGIN"), Q("INSERT INTO t VALUES (10)"), Q("ROLLBACK"), Q("SELECT count(*) FROM t")],
    "begin and its end alone": [Q("BEGIN"), Q("COMMIT"), Q("START TRANSACTION"), Q("ROLLBACK"), Q("BEGIN WORK"), Q("END"), Q("BEGIN"), Q("ABORT")],
    "begin with options": [Q("BEGIN ISOLATION LEVEL SERIALIZABLE, READ ONLY"), Q("SHOW transaction_isolation"), Q("INSERT INTO t VALUES (10)"), Q("COMMIT")],
    "begin twice": [Q("BEGIN"), Q("SELECT 1"), Q("BEGIN"), Q("COMMIT")],
    "begin twice at once": [Q("BEGIN"), Q("BEGIN"), Q("COMMIT")],
    "commit of nothing": [Q("COMMIT"), Q("ROLLBACK"), Q("SELECT 1")],
    "error in a transaction": [Q("BEGIN"), Q("SELECT 1/0"), Q("SELECT 1"), Q("SELEKT"), Q("ROLLBACK"), Q("SELECT 1")],
    "commit of a failed one": [Q("BEGIN"), Q("INSERT INTO t VALUES (10)"), Q("SELECT 1/0"), Q("COMMIT"), Q("SELECT count(*) FROM t")],
    "commit that fails": [Q("BEGIN"), Q("INSERT INTO t VALUES (10, 'x', 99)"), Q("COMMIT"), Q("SELECT count(*) FROM t")],
    "commit and chain": [Q("BEGIN ISOLATION LEVEL REPEATABLE READ"), Q("INSERT INTO t VALUES (10)"), Q("COMMIT AND CHAIN"), Q("SHOW transaction_isolation"), Q("INSERT INTO t VALUES (11)"), Q("ROLLBACK AND CHAIN"), Q("SELECT count(*) FROM t"), Q("COMMIT AND NO CHAIN")],
    "chain at once": [Q("BEGIN ISOLATION LEVEL REPEATABLE READ"), Q("COMMIT AND CHAIN"), Q("SHOW transaction_isolation"), Q("ROLLBACK")],
    "chain of nothing": [Q("COMMIT AND CHAIN"), Q("SELECT 1")],
    "savepoints": [Q("BEGIN"), Q("SAVEPOINT a"), Q("INSERT INTO t VALUES (10)"), Q("ROLLBACK TO a"), Q("SAVEPOINT b"), Q("INSERT INTO t VALUES (11)"), Q("RELEASE b"), Q("COMMIT"), Q("SELECT a FROM t ORDER BY a")],
    "savepoint after an error": [Q("BEGIN"), Q("SAVEPOINT a"), Q("SELECT 1/0"), Q("SELECT 1"), Q("ROLLBACK TO SAVEPOINT a"), Q("SELECT 2"), Q("ROLLBACK TO nowhere"), Q("COMMIT")],
    "savepoint outside": [Q("SAVEPOINT a"), Q("RELEASE a"), Q("SELECT 1")],
    "begin in several": [Q("BEGIN; INSERT INTO t VALUES (10); SELECT 1"), Q("INSERT INTO t VALUES (11)"), Q("ROLLBACK"), Q("SELECT count(*) FROM t")],
    "begin in several without a table": [Q("BEGIN; SELECT 1"), Q("INSERT INTO items (tenant_id, id) VALUES (8, 1)"), Q("ROLLBACK"), Q("SELECT count(*) FROM items WHERE tenant_id = 8")],
    "commit in several": [Q("BEGIN"), Q("INSERT INTO t VALUES (10)"), Q("COMMIT; SELECT count(*) FROM t; BEGIN"), Q("INSERT INTO t VALUES (11)"), Q("ROLLBACK; SELECT count(*) FROM t")],
    "error behind a commit in several": [Q("BEGIN; INSERT INTO t VALUES (10); COMMIT; SELECT 1/0"), Q("SELECT count(*) FROM t")],
    "error in several in a transaction": [Q("BEGIN"), Q("SELECT 1; SELECT 1/0; SELECT 2"), Q("COMMIT")],
    "set transaction": [Q("BEGIN"), Q("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"), Q("SHOW transaction_isolation"), Q("SELECT count(*) FROM t"), Q("SET TRANSACTION ISOLATION LEVEL READ COMMITTED"), Q("ROLLBACK")],
    "read only": [Q("BEGIN READ ONLY"), Q("INSERT INTO items (tenant_id, id) VALUES (8, 1)"), Q("COMMIT")],
    # --- settings
    "set and show": [Q("SET work_mem = '8MB'"), Q("SHOW work_mem"), Q("RESET work_mem"), Q("SHOW work_mem")],
    "set to": [Q("SET TimeZone TO 'Asia/Tokyo'"), Q("SHOW timezone"), Q("SET TIME ZONE 'UTC'"), Q("SHOW timezone")],
    "set rolled back": [Q("SET work_mem = '8MB'"), Q("BEGIN"), Q("SET work_mem = '9MB'"), Q("SHOW work_mem"), Q("ROLLBACK"), Q("SHOW work_mem")],
    "set committed": [Q("BEGIN"), Q("SET work_mem = '9MB'"), Q("COMMIT"), Q("SHOW work_mem")],
    "set of a failed transaction": [Q("BEGIN"), Q("SET work_mem = '9MB'"), Q("SELECT 1/0"), Q("COMMIT"), Q("SHOW work_mem")],
    "set local": [Q("BEGIN"), Q("SET LOCAL work_mem = '9MB'"), Q("SHOW work_mem"), Q("COMMIT"), Q("SHOW work_mem"), Q("SET LOCAL work_mem = '7MB'")],
    "set rolled back to a savepoint": [Q("BEGIN"), Q("SAVEPOINT a"), Q("SET work_mem = '9MB'"), Q("ROLLBACK TO a"), Q("COMMIT"), Q("SHOW work_mem"), Q("SELECT count(*) FROM items WHERE tenant_id = 7"), Q("SHOW work_mem")],
    "set in several": [Q("SET work_mem = '9MB'; SET search_path = pg_catalog, public"), Q("SHOW work_mem; SHOW search_path"), Q("SELECT count(*) FROM items WHERE tenant_id = 7"), Q("SHOW work_mem")],
    "set in several that fail": [Q("SET work_mem = '9MB'; SELECT 1/0"), Q("SHOW work_mem")],
    "set of nonsense": [Q("SET nonsense = 1"), Q("SET work_mem = 'x'"), Q("SET a.b = 'c'"), Q("SHOW a.b"), Q("SHOW work_mem")],
    "set config": [Q("SELECT set_config('work_mem', '9MB', false)"), Q("SHOW work_mem"), Q("BEGIN"), Q("SELECT set_config('work_mem', '7MB', true)"), Q("SHOW work_mem"), Q("COMMIT"), Q("SHOW work_mem")],
    "set config rolled back": [Q("BEGIN"), Q("SELECT set_config('work_mem', '9MB', false)"), Q("ROLLBACK"), Q("SHOW work_mem")],
    "reset all": [Q("SET work_mem = '9MB'"), Q("SET DateStyle = 'German'"), Q("RESET ALL"), Q("SHOW work_mem"), Q("SHOW DateStyle")],
    "discard all": [Q("SET work_mem = '9MB'"), P("SELECT 1", b"s"), S, Q("DISCARD ALL"), Q("SHOW work_mem"), Q("SHOW DateStyle"), B(b"s"), E0, S, P("SELECT 2", b"s"), B(b"s"), E0, S],
    "reported settings": [Q("SET application_name = 'one'"), Q("SET DateStyle = 'German'"), Q("SELECT '2020-02-03'::date"), Q("RESET DateStyle")],
    "reported settings rolled back": [Q("SET application_name = 'one'"), Q("BEGIN"), Q("SET application_name = 'two'"), Q("ROLLBACK"), Q("SHOW application_name")],
    "a value with quotes": [Q("SET application_name = 'it''s \\ E'"), Q("SHOW application_name"), Q("SELECT count(*) FROM items WHERE tenant_id = 7"), Q("SHOW application_name")],
    "set of a list": [Q('SET search_path = "$user", public, pg_temp'), Q("SHOW search_path"), Q("SELECT count(*) FROM t")],
    "set role": [Q("SET ROLE pg_monitor"), Q("SELECT current_user"), Q("SELECT count(*) FROM t"), Q("RESET ROLE"), Q("SELECT current_user")],
    "extended set": [P("SET work_mem = '9MB'"), B(), E0, S, Q("SHOW work_mem"), P("SHOW work_mem"), B(), DP(), E0, S],
    "extended set config": [P("SELECT set_config($1, $2, false)"), B(b"", b"work_mem", b"9MB"), DP(), E0, S, Q("SHOW work_mem")],
    "extended set config of a name": [P("SELECT set_config('Work_Mem', $1, false)"), B(b"", b"9MB"), E0, S, Q("SELECT count(*) FROM items WHERE tenant_id = 7"), Q("SHOW work_mem"), P("SELECT set_config($1, '8MB', true)"), B(b"", b"work_mem"), E0, S, Q("SHOW work_mem")],
    "extended set config of nothing": [P("SELECT set_config($1, $2, false)"), B(b"", None, b"9MB"), DP(), E0, S, B(b"", b"work_mem", None), E0, S, Q("SHOW work_mem"), B(b"", b"nonsense", b"1"), E0, S, Q("SHOW work_mem")],
    # --- the extended protocol
    "extended": [*PBE, S],
    "extended of a split table": [P("SELECT note FROM items WHERE tenant_id = $1 ORDER BY id"), DS(), S, B(b"", b"7"), E0, S],
    "prepare alone": [P("SELECT 1", b"s"), S, DS(b"s"), S, B(b"s"), E0, S],
    "named": [P(ONE, b"s"), S, B(b"s", b"1"), E0, S, B(b"s", b"2"), DP(), E0, S, CS(b"s"), S, B(b"s", b"3"), E0, S],
    "named again": [P(ONE, b"s"), S, P("SELECT 2", b"s"), S, B(b"s", b"2"), E0, S],
    "named again at once": [P(ONE, b"s"), P("SELECT 2", b"s"), S, B(b"s", b"2"), E0, S],
    "named again after close": [P(ONE, b"s"), S, CS(b"s"), P("SELECT 'x'", b"s"), S, B(b"s"), E0, S],
    "close of unknown names": [CS(b"x"), CP(b"x"), CS(), CP(), S],
    "close of the unnamed": [P(ONE), CS(), B(b"", b"1"), E0, S],
    "parse error then the same name": [P("SELEKT", b"s"), S, "Z", P("SELECT 1", b"s"), B(b"s"), E0, S, "Z"],
    "parse error drops the unnamed": [P("SELECT 1"), S, P("SELEKT"), S, B(), E0, S],
    "a query drops the unnamed": [P("SELECT 1"), S, Q("SELECT 2"), B(), E0, S],
    "the unnamed lives on": [P("SELECT 1"), S, B(), E0, S, B(), E0, S],
    "a skipped parse is none": [*BAD, P("SELECT 1", b"s"), S, B(b"s"), E0, S, P("SELECT 2", b"s"), B(b"s"), E0, S],
    "a skipped close is none": [P("SELECT 1", b"s"), S, *BAD, CS(b"s"), S, B(b"s"), E0, S, P("SELECT 2", b"s"), S],
    "a prepared statement survives the error behind it": [P("SELECT 1", b"s"), *BAD, S, B(b"s"), E0, S, P("SELECT 2", b"s"), S],
    "a prepared statement survives a rollback": [Q("BEGIN"), P("SELECT 1", b"s"), S, Q("ROLLBACK"), B(b"s"), E0, S],
    "a close survives a rollback": [P("SELECT 1", b"s"), S, Q("BEGIN"), CS(b"s"), S, Q("ROLLBACK"), B(b"s"), E0, S],
    "error until sync": [*BAD, *PBE, S, *PBE, S],
    "error then flush": [*BAD, H, "E", *PBE, H, S, "Z", *PBE, S, "Z"],
    "error seen, then names": [*BAD, H, "E", P("SELECT 1", b"s"), CS(b"s"), S, "Z", B(b"s"), E0, S, "Z", P("SELECT 2", b"s"), S, "Z"],
    "several syncs": [*PBE, S, S, S, *PBE, S],
    "several units at once": [P(ONE, b"s"), B(b"s", b"1"), E0, S, B(b"s", b"x"), E0, S, B(b"s", b"3"), E0, S],
    "bind to unknown": [B(b"x"), E0, S, *PBE, S],
    "describe unknown": [DS(b"x"), S, DP(b"x"), S, DS(), S, *PBE, S],
    "execute unknown": [E(b"x"), S, E0, S, *PBE, S],
    "wrong number of values": [P(ONE), B(b"", b"1", b"2"), E0, S, P(ONE), B(), E0, S],
    "wrong number for a key": [P("SELECT id FROM items WHERE tenant_id = $1"), B(), E0, S, Q("SELECT 1")],
    "several statements in a parse": [P("SELECT 1; SELECT 2"), S, *PBE, S],
    "parse of nothing": [P(""), B(), DP(), E0, S, P("", b"e"), DS(b"e"), S],
    "values of known types": [P("SELECT $1, $2, $3", b"", (23, 25, 0)), DS(), B(b"", b"1", None, b"x"), DP(), E0, S],
    "binary": [P("SELECT $1::integer, $2::text", b"s"), B(b"s", b"\0\0\0\7", b"x", formats=(1, 0), results=(1,)), DP(), E0, S],
    "binary key": [P("SELECT id, note FROM items WHERE tenant_id = $1 ORDER BY id"), B(b"", b"\0\0\0\0\0\0\0\7", formats=(1,), results=(1, 0)), DP(), E0, S],
    "a big value": [P("SELECT length($1::text), $1::text"), B(b"", b"x" * 2_000_000), E0, S, *PBE, S],
    "no columns, extended": [P("SELECT FROM t"), DS(), B(), DP(), E0, S],
    "writes": [P("INSERT INTO items (tenant_id, id, note) VALUES ($1, $2, $3)"), DS(), B(b"", b"8", b"1", b"a"), DP(), E0, B(b"", b"8", b"2", None), E0, S],
    "returning": [P("INSERT INTO items (tenant_id, id) VALUES ($1, $2) RETURNING *"), B(b"", b"8", b"1"), DP(), E0, S],
    "an error takes back the unit": [P("INSERT INTO t (a) VALUES ($1)"), B(b"", b"10"), E0, B(b"", b"10"), E0, S, Q("SELECT count(*) FROM t")],
    "a unit of both kinds": [P("INSERT INTO t (a) VALUES (10)"), B(), E0, P("SELECT count(*) FROM t"), B(), E0, S],
    "flush": [P("SELECT a FROM t ORDER BY a"), H, "1", B(), H, "2", DP(), H, "T", E0, H, "C", S, "Z"],
    "flush of a write": [P("INSERT INTO items (tenant_id, id) VALUES ($1, 1)"), H, "1", DS(), H, "n", B(b"", b"8"), H, "2", DP(), H, "n", E0, H, "C", S, "Z"],
    "flush of nothing": [H, H, S, "Z", H, Q("SELECT 1"), "Z"],
    "query in the middle": [P("SELECT 1", b"s"), Q("SELECT 2"), S, B(b"s"), E0, Q("SELECT 3"), S],
    "query in the middle of a write": [P("INSERT INTO t (a) VALUES (10)"), B(), E0, Q("SELECT count(*) FROM t"), S],
    "query after a failed message": [P("SELEKT", b"s"), Q("SELECT 2"), S, "Z", Q("SELECT 3"), "Z"],
    "query after an error seen": [*BAD, H, "E", Q("SELECT 2"), S, "Z", Q("SELECT 3"), "Z"],
    "call after a failed message": [*BAD, F(1598, b"-2"), S, "Z", Q("SELECT 3"), "Z"],
    "call in the middle": [P("SELECT 1", b"s"), F(1397, b"-2"), S, Q("SELECT 3")],
    "function call": [F(1397, b"-2"), F(1397, None), F(1397, b"x"), F(99999999), Q("SELECT 1")],
    "function call in a transaction": [Q("BEGIN"), F(1397, b"-2"), F(1397, b"x"), F(1397, b"-2"), Q("ROLLBACK")],
    # --- portals
    "portal with a limit": [P("SELECT a FROM t ORDER BY a"), B(), E(b"", 2), E(b"", 2), E(b"", 2), E(b"", 2), S],
    "portal suspended, then gone": [P("SELECT a FROM t ORDER BY a"), B(portal=b"p"), E(b"p", 2), S, E(b"p", 2), S],
    "named portals in a transaction": [Q("BEGIN"), P("SELECT a FROM t ORDER BY a", b"s"), B(b"s", portal=b"p"), B(b"s", portal=b"q"), E(b"p", 2), S, E(b"q", 3), S, E(b"p", 2), DP(b"p"), S, CP(b"p"), E(b"p", 1), S, Q("ROLLBACK")],
    "portal over units of a split table": [Q("BEGIN"), P("SELECT id FROM items WHERE tenant_id = $1 ORDER BY id"), B(b"", b"7", portal=b"p"), E(b"p", 2), S, E(b"p", 2), S, E(b"p", 2), S, Q("COMMIT"), E(b"p", 2), S],
    "closing a portal leaves the statement": [P(ONE, b"s"), B(b"s", b"1", portal=b"p"), CP(b"p"), B(b"s", b"2", portal=b"p"), E(b"p"), S, B(b"s", b"3"), E0, S],
    "portal name twice": [Q("BEGIN"), P(ONE, b"s"), B(b"s", b"1", portal=b"p"), B(b"s", b"2", portal=b"p"), S, Q("ROLLBACK"), Q("SELECT 1")],
    "executed twice": [P(ONE, b"s"), B(b"s", b"1"), E0, E0, S],
    "closing a statement under its portal": [Q("BEGIN"), P("SELECT a FROM t ORDER BY a", b"s"), B(b"s", portal=b"p"), CS(b"s"), E(b"p", 2), S, E(b"p", 2), S, Q("COMMIT")],
    # --- transactions, extended
    "extended transaction": [P("BEGIN"), B(), E0, S, P("INSERT INTO t (a) VALUES ($1)"), B(b"", b"10"), E0, S, P("COMMIT"), B(), E0, S, Q("SELECT count(*) FROM t")],
    "extended transaction in one unit": [P("BEGIN"), B(), E0, P("INSERT INTO t (a) VALUES (10)"), B(), E0, P("ROLLBACK"), B(), E0, S, Q("SELECT count(*) FROM t")],
    "extended transaction on a split table": [P("BEGIN"), B(), DP(), E0, S, P("INSERT INTO items (tenant_id, id) VALUES ($1, 1)"), B(b"", b"8"), E0, S, P("ROLLBACK"), B(), E0, S, P("SELECT count(*) FROM items WHERE tenant_id = 8"), B(), E0, S],
    "extended begin, never used": [P("BEGIN", b"b"), B(b"b"), E0, S, P("COMMIT", b"c"), B(b"c"), E0, S, B(b"b"), E0, S, B(b"c"), E0, S],
    "extended errors in a transaction": [P("BEGIN"), B(), E0, S, *BAD, S, *PBE, S, P("ROLLBACK"), B(), E0, S, *PBE, S],
    "error in a unit with begin": [P("BEGIN"), B(), E0, *BAD, S, Q("ROLLBACK"), *PBE, S],
    "extended savepoints": [Q("BEGIN"), P("SAVEPOINT a"), B(), E0, S, *BAD, S, P("ROLLBACK TO a"), B(), E0, S, *PBE, S, P("COMMIT"), B(), E0, S],
    "prepared rollback in a failed transaction": [P("ROLLBACK", b"r"), S, Q("BEGIN"), Q("SELECT 1/0"), B(b"r"), E0, S, Q("SELECT 1")],
    "implicit transaction and begin behind it": [P("INSERT INTO t (a) VALUES (10)"), B(), E0, P("BEGIN"), B(), E0, S, Q("ROLLBACK"), Q("SELECT count(*) FROM t")],
    "commit in a unit": [Q("BEGIN"), P("INSERT INTO t (a) VALUES (10)"), B(), E0, P("COMMIT"), B(), E0, P("INSERT INTO t (a) VALUES (10)"), B(), E0, S, Q("SELECT count(*) FROM t")],
    # --- statements of SQL
    "prepare and execute": [Q("PREPARE p AS SELECT $1::integer + 1"), Q("EXECUTE p(1)"), Q("EXECUTE p(2)"), Q("DEALLOCATE p"), Q("EXECUTE p(3)")],
    "prepare and bind": [Q("PREPARE p AS SELECT $1::integer + 1"), DS(b"p"), B(b"p", b"1"), E0, S, CS(b"p"), S, Q("EXECUTE p(3)")],
    "parse and execute (session)": [P(ONE, b"p"), S, Q("EXECUTE p(3)"), Q("DEALLOCATE p"), B(b"p", b"1"), E0, S],
    "parse and prepare (session)": [P(ONE, b"p"), S, Q("PREPARE p AS SELECT 1"), Q("SELECT 1")],
    "prepare and parse (session)": [Q("PREPARE p AS SELECT 1"), P(ONE, b"p"), S, Q("EXECUTE p")],
    "deallocate": [P(ONE, b"p"), S, Q("DEALLOCATE p"), P("SELECT 'x'", b"p"), B(b"p"), E0, S, Q("DEALLOCATE p"), Q("DEALLOCATE p")],
    "deallocate, extended": [P(ONE, b"p"), S, P("DEALLOCATE p"), B(), E0, S, P("SELECT 'x'", b"p"), B(b"p"), E0, S],
    "deallocate in a transaction": [P(ONE, b"p"), S, Q("BEGIN"), Q("DEALLOCATE p"), Q("ROLLBACK"), B(b"p", b"1"), E0, S],
    "deallocate all": [P(ONE, b"p"), P("SELECT 2", b"q"), S, Q("DEALLOCATE ALL"), B(b"p", b"1"), S, P("SELECT 3", b"q"), B(b"q"), E0, S],
    "deallocate of nothing": [Q("DEALLOCATE nothing"), Q("DEALLOCATE ALL"), Q("SELECT 1")],
    "cursors": [Q("BEGIN"), Q("DECLARE c CURSOR FOR SELECT a FROM t ORDER BY a"), Q("FETCH 2 FROM c"), Q("MOVE 1 FROM c"), Q("FETCH ALL FROM c"), Q("CLOSE c"), Q("FETCH c"), Q("COMMIT")],
    "cursor of a split table": [Q("BEGIN"), Q("DECLARE c CURSOR FOR SELECT id FROM items WHERE tenant_id = 7 ORDER BY id"), Q("FETCH 2 FROM c"), Q("COMMIT"), Q("FETCH 2 FROM c")],
    "cursor with hold": [Q("BEGIN"), Q("DECLARE c CURSOR WITH HOLD FOR SELECT a FROM t ORDER BY a"), Q("COMMIT"), Q("FETCH 2 FROM c"), Q("SELECT count(*) FROM items WHERE tenant_id = 7"), Q("FETCH 2 FROM c"), Q("CLOSE c")],
    "temporary table": [Q("CREATE TEMP TABLE mine (a integer)"), Q("INSERT INTO mine VALUES (1)"), Q("SELECT * FROM mine"), Q("BEGIN"), Q("DELETE FROM mine"), Q("ROLLBACK"), Q("SELECT * FROM mine")],
    "advisory lock": [Q("SELECT pg_advisory_lock(4711)"), Q("SELECT pg_advisory_unlock(4711)"), Q("SELECT pg_advisory_unlock(4711)")],
    "do": [Q("DO $$BEGIN INSERT INTO t VALUES (10); END$$"), Q("SELECT count(*) FROM t")],
    "lock and update": [Q("BEGIN"), Q("SELECT * FROM items WHERE tenant_id = 7 AND id = 1 FOR UPDATE"), Q("UPDATE items SET note = 'x' WHERE tenant_id = 7 AND id = 1 RETURNING note"), Q("COMMIT")],
    # --- COPY
    "copy in": [Q("COPY t (a, b) FROM STDIN"), "G", d(b"10\tx\n11\t"), d(b"y\n"), c, "Z", Q("SELECT a, b FROM t ORDER BY a"), "Z"],
    "copy in of nothing": [Q("COPY t FROM STDIN"), "G", c, "Z", Q("SELECT count(*) FROM t"), "Z"],
    "copy in that the client fails": [Q("COPY t (a) FROM STDIN"), "G", d(b"10\n"), f("no more"), "Z", Q("SELECT count(*) FROM t"), "Z"],
    "copy in that the server fails": [Q("COPY t (a) FROM STDIN"), "G", d(b"10\n"), d(b"x\n"), "Z", d(b"11\n"), d(b"12\n"), c, Q("SELECT count(*) FROM t"), "Z"],
    "copy in that fails at its end": [Q("COPY t (a) FROM STDIN"), "G", d(b"10\n"), d(b"10\n"), c, "Z", Q("SELECT count(*) FROM t"), "Z"],
    "copy in of an unknown table": [Q("COPY nowhere FROM STDIN"), "Z", d(b"10\n"), c, Q("SELECT 1"), "Z"],
    "copy in and sync": [Q("COPY t (a) FROM STDIN"), "G", S, H, d(b"10\n"), H, S, c, "Z", Q("SELECT count(*) FROM t"), "Z"],
    "copy in, extended": [P("COPY t (a) FROM STDIN"), B(), E0, "", H, "G", d(b"10\n"), c, S, "Z", Q("SELECT count(*) FROM t"), "Z"],
    "copy in, extended, with an early sync": [P("COPY t (a) FROM STDIN"), B(), E0, S, "G", d(b"10\n"), c, S, "Z", Q("SELECT count(*) FROM t"), "Z"],
    "copy in, extended, failed by the client": [P("COPY t (a) FROM STDIN"), B(), E0, S, "G", d(b"10\n"), f("no"), S, "Z", *PBE, S, "Z"],
    "copy in, extended, failed by the server": [P("COPY t (a) FROM STDIN"), B(), E0, S, "G", d(b"x\n"), d(b"11\n"), c, S, "Z", *PBE, S, "Z"],
    "copy in, extended, failed and seen": [P("COPY t (a) FROM STDIN"), B(), E0, S, "G", d(b"x\n"), H, "E", d(b"11\n"), c, S, "Z", *PBE, S, "Z"],
    "copy in, extended, failed and sync": [P("COPY t (a) FROM STDIN"), B(), E0, S, "G", d(b"x\n"), S, "Z", *PBE, S, "Z"],
    "copy in, extended, and more in the unit": [P("COPY t (a) FROM STDIN"), B(), E0, H, "G", d(b"10\n"), c, P("SELECT count(*) FROM t"), B(), E0, S, "Z"],
    "a query in copy in": [Q("COPY t (a) FROM STDIN"), "G", d(b"10\n"), Q("SELECT 1"), "Z", Q("SELECT count(*) FROM t"), "Z"],
    "a parse in copy in": [P("COPY t (a) FROM STDIN"), B(), E0, S, "G", d(b"10\n"), P("SELECT 1"), S, "Z", Q("SELECT count(*) FROM t"), "Z"],
    "copy in in a transaction": [Q("BEGIN"), "Z", Q("COPY t (a) FROM STDIN"), "G", d(b"10\n"), c, "Z", Q("SELECT count(*) FROM t"), "Z", Q("ROLLBACK"), "Z"],
    "copy in failed in a transaction": [Q("BEGIN"), "Z", Q("COPY t (a) FROM STDIN"), "G", d(b"x\n"), c, "Z", Q("SELECT 1"), "Z", Q("ROLLBACK"), "Z"],
    "copy in several statements": [Q("INSERT INTO t VALUES (9); COPY t (a) FROM STDIN; SELECT count(*) FROM t"), "G", d(b"10\n"), c, "Z"],
    "two copies in one query": [Q("COPY t (a) FROM STDIN; COPY t (a) FROM STDIN"), "G", d(b"10\n"), c, "G", d(b"11\n"), c, "Z", Q("SELECT count(*) FROM t"), "Z"],
    "copy into a split table": [Q("COPY items (tenant_id, id) FROM STDIN"), "G", d(b"8\t1\n8"), d(b"\t2\n"), c, "Z", Q("SELECT id FROM items WHERE tenant_id = 8 ORDER BY id"), "Z"],
    "copy of nothing into a split table": [Q("COPY items (tenant_id, id) FROM STDIN"), "G", c, "Z", Q("SELECT count(*) FROM items WHERE tenant_id = 8"), "Z"],
    "copy into a split table, extended": [P("COPY items (tenant_id, id) FROM STDIN"), B(), DP(), E0, S, "G", d(b"8\t1\n8"), d(b"\t2\n"), c, S, "Z", Q("SELECT id FROM items WHERE tenant_id = 8 ORDER BY id"), "Z"],
    "copy into a split table that fails": [Q("COPY items (tenant_id, id) FROM STDIN"), "G", d(b"8\t1\n8\tx\n"), d(b"8\t2\n"), c, "Z", d(b"8\t2\n"), c, Q("SELECT count(*) FROM items WHERE tenant_id = 8"), "Z"],
    "copy into a split table failed by the client": [Q("COPY items (tenant_id, id) FROM STDIN"), "G", d(b"8\t1\n"), f("no"), "Z", Q("SELECT count(*) FROM items WHERE tenant_id = 8"), "Z"],
    "copy in csv": [Q("COPY items (tenant_id, id, note) FROM STDIN (FORMAT csv, HEADER)"), "G", d(b'tenant_id,id,note\n8,1,"a\n'), d(b'b"\n8,2,\n'), c, "Z", Q("SELECT note FROM items WHERE tenant_id = 8 ORDER BY id"), "Z"],
    "copy out": [Q("COPY (SELECT a, b FROM t ORDER BY a) TO STDOUT"), Q("COPY t TO STDOUT (FORMAT csv)")],
    "copy out of a split table": [Q("COPY (SELECT id FROM items WHERE tenant_id = 7 ORDER BY id) TO STDOUT"), Q("SELECT 1")],
    "copy out, extended": [P("COPY (SELECT a FROM t ORDER BY a) TO STDOUT"), B(), DP(), E0, S, *PBE, S],
    "copy out that fails": [Q("COPY (SELECT 1/(3-a) FROM t ORDER BY a) TO STDOUT"), P("COPY (SELECT 1/(3-a) FROM t ORDER BY a) TO STDOUT"), B(), E0, *PBE, S, *PBE, S],
    "copy out of much": [Q("COPY (SELECT repeat('x', 1000) FROM generate_series(1, 1000)) TO STDOUT"), Q("SELECT 1")],
    "copy data out of place": [d(b"x"), c, f("x"), Q("SELECT 1"), "Z", P("SELECT 1"), d(b"x"), B(), c, E0, f("x"), S, "Z"],
    # --- notifications
    "listen and notify": [Q("LISTEN channel"), Q("NOTIFY channel, 'one'"), Q("SELECT 1"), Q("UNLISTEN channel"), Q("NOTIFY channel, 'two'"), Q("SELECT 1")],
    "notify in a transaction": [Q("LISTEN channel"), Q("BEGIN"), Q("NOTIFY channel, 'one'"), Q("SELECT 1"), Q("COMMIT"), Q("UNLISTEN *")],
    "notify, extended": [Q("LISTEN channel"), P("SELECT pg_notify('channel', 'x')"), B(), E0, S, P("SELECT 1"), B(), E0, S],
}  # fmt: skip


@dataclass(frozen=True)
class Field:
    """Where the sequences are played."""

    routed: Routed
    bare_port: int
    bare_dsn: str
    routers: dict[str, Router]

    def doors(self) -> dict[str, tuple[int, str]]:
        """For each, the port and the database."""
        bare = str(conninfo_to_dict(self.bare_dsn)["dbname"])
        return {"bare": (self.bare_port, bare)} | {
            name: (router.port, self.routed.dbname) for name, router in self.routers.items()
        }

    def reset(self) -> None:
        for dsn in (self.bare_dsn, self.routed.dsns["s1"]):
            with psycopg.connect(dsn, autocommit=True) as connection:
                connection.execute(RESET.encode())

    def left(self, door: str) -> object:
        with psycopg.connect(self.bare_dsn if door == "bare" else self.routed.dsns["s1"]) as connection:
            return connection.execute(LEFT).fetchone()


@pytest.fixture(scope="module")
def field(servers: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    with standing(servers, tmp_path_factory.mktemp("differential")) as routed:
        bare = routed.databases("s1")["s1"]
        routed.execute("s1", ALIKE)
        with psycopg.connect(bare, autocommit=True) as connection:
            connection.execute((SCHEMA + ALIKE).encode())
        routers_of = {pooling: routed.router(pooling=pooling) for pooling in ("session", "transaction")}
        yield Field(routed, servers["s1"].port, bare, routers_of)


def play(door: tuple[int, str], script: Script, way: str) -> list[str]:
    """What the client is told, up to the end of the connection; the last word says why there is no more of it."""
    with RawClient(door[0], dbname=door[1], bound_s=BOUND_S) as client:
        found = []
        end = [S, Q("SELECT 'the end'"), X]
        try:
            if way == "steps":
                for step in with_waits(script):
                    if isinstance(step, bytes):
                        client.send(step)
                    elif step:
                        found += client.until(step.encode())
                client.send(*end)
            else:
                whole = b"".join(step for step in [*script, *end] if isinstance(step, bytes))
                client.trickle(whole) if way == "bytes" else client.send(whole)
            found += client.messages(keep_max=1 << 30)
        except TimeoutError:
            return [*told(found), "silence"]
        except ConnectionError:
            return [*told(found), "reset"]
        return told(found)


def with_waits(script: Script) -> Script:
    """Where a sequence does not say where it waits: after each message that ReadyForQuery answers."""
    if any(isinstance(step, str) for step in script):
        return script
    return [each for step in script for each in ([step, "Z"] if step[:1] in (b"Q", b"S", b"F") else [step])]


def in_order(said: list[str]) -> list[str]:
    """Notifications may come between any two messages: they are compared for themselves."""
    return [each for each in said if each[0] != "A"] + [each for each in said if each[0] == "A"]


def up_to_a_reset(*results: list[str]) -> list[list[str]]:
    """As far as all of them were told anything, and what was left."""
    heard = [[each for each in said if each != "reset"] for said in results]
    if heard == list(results):
        return heard
    shortest = min(map(len, heard)) - 1
    return [[*said[:shortest], said[-1]] for said in heard]


def compare(field: Field, name: str, script: Script, way: str, *, may_be_cut: bool = False) -> None:
    results = {}
    for where, door in field.doors().items():
        field.reset()
        results[where] = [*in_order(play(door, script, way)), f"left: {field.left(where)}"]
    bare = results.pop("bare")
    for pooling, routed in results.items():
        if pooling not in name.partition("(")[2] and "(" in name:
            continue
        said, wanted = up_to_a_reset(routed, bare) if may_be_cut else (routed, bare)
        assert said == wanted, f"{pooling} pooling, {way}"


BIG: Final = 10_000
ONLY_IN_STEPS: Final = {"copy in, extended, failed and sync"}
"""A Sync that a client sends before it can know that its row failed the COPY."""

RESETS: Final = {"a query in copy in", "a parse in copy in"}
"""The server ends the connection with bytes unread: that resets it, and may take its last words away, or may not."""
TRIES: Final = 5
"""To see it end without a reset; after that as much is compared as was told."""


@pytest.mark.parametrize("way", ["steps", "at once", "bytes"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_client_sees_no_difference(field: Field, name: str, way: str) -> None:
    script = SCRIPTS[name]
    if way == "bytes" and sum(len(step) for step in script if isinstance(step, bytes)) > BIG:
        pytest.skip("too long to send byte by byte")
    if way != "steps" and name in ONLY_IN_STEPS:
        pytest.skip("is another sequence, if nobody waits")
    for _ in range(TRIES if name in RESETS else 0):
        with suppress(AssertionError):
            compare(field, name, script, way)
            return
    compare(field, name, script, way, may_be_cut=name in RESETS)


# --- random sequences

NAMES: Final = [b"", b"s", b"q"]
PORTALS: Final = [b"", b"", b"p"]
TEXTS: Final = [
    ONE,
    "SELECT a FROM t ORDER BY a",
    "SELECT id FROM items WHERE tenant_id = 7 ORDER BY id",
    "INSERT INTO t (a) VALUES ($1)",
    "INSERT INTO items (tenant_id, id) VALUES (8, $1)",
    "DELETE FROM t WHERE a = 2",
    "SELECT 1/0",
    "SELEKT",
    "",
    "BEGIN",
    "COMMIT",
    "ROLLBACK",
    "SAVEPOINT x",
    "ROLLBACK TO x",
    "SET work_mem = '9MB'",
    "SET LOCAL work_mem = '7MB'",
    "SHOW work_mem",
    "RESET work_mem",
    "SELECT say('x')",
]
SCRIPTED: Final = [
    "SELECT 1; SELECT 2",
    "BEGIN; INSERT INTO t (a) VALUES (20)",
    "INSERT INTO t (a) VALUES (21); SELECT 1/0",
    "COMMIT; SELECT 3",
    "SET work_mem = '8MB'; SELECT 1",
    "COPY (SELECT a FROM t ORDER BY a) TO STDOUT",
    "COMMIT AND CHAIN",
]


def sequence(rng: random.Random) -> list[bytes]:
    """A sequence of messages, most of which make sense."""
    found: list[bytes] = []
    for _ in range(rng.randrange(3, 14)):
        found += rng.choices([_whole, _odd, _simple, _copied], [5, 4, 4, 1])[0](rng)
    return [*found, S]


def _whole(rng: random.Random) -> list[bytes]:
    text = rng.choice(TEXTS)
    name, portal = rng.choice(NAMES), rng.choice(PORTALS)
    values = [str(rng.randrange(1, 40)).encode()] * text.count("$1")
    parts = [CS(name)] * (rng.random() < 0.7) + [P(text, name)] + [DS(name)] * (rng.random() < 0.3)
    parts += [B(name, *values, portal=portal), *[DP(portal)] * (rng.random() < 0.5), E(portal, rng.choice([0, 0, 2]))]
    return parts + [H] * (rng.random() < 0.2) + [S] * (rng.random() < 0.8)


def _odd(rng: random.Random) -> list[bytes]:
    name, portal = rng.choice(NAMES), rng.choice(PORTALS)
    one = [
        lambda: P(rng.choice(TEXTS), name),
        lambda: B(name, *[b"3"] * rng.randrange(2), portal=portal),
        lambda: E(portal, rng.randrange(3)),
        lambda: DS(name),
        lambda: DP(portal),
        lambda: CS(name),
        lambda: CP(portal),
        lambda: S,
        lambda: H,
        lambda: d(b"30\n"),
        lambda: c,
        lambda: F(1397, b"-2"),
    ]
    return [rng.choice(one)() for _ in range(rng.randrange(1, 4))]


def _simple(rng: random.Random) -> list[bytes]:
    texts = [text for text in TEXTS if "$" not in text]
    return [Q(rng.choice(texts + SCRIPTED))]


def _copied(rng: random.Random) -> list[bytes]:
    """COPY … FROM STDIN: whatever happened before, its rows end it, or are dropped."""
    begin = rng.choice([[S, Q("COPY t (a) FROM STDIN")], [S, CS(), P("COPY t (a) FROM STDIN"), B(), E0, S]])
    rows = [d(b"%d\n" % rng.randrange(30, 90)) for _ in range(rng.randrange(3))]
    return [*begin, *rows, rng.choice([c, f("no"), c]), S]


@pytest.mark.parametrize("number", range(RANDOM))
def test_random_sequences_are_answered_alike(field: Field, number: int) -> None:
    rng = random.Random(f"{SEED} sequence {number}")
    script = sequence(rng)
    print(f"sequence {number} of seed {SEED}:", *script, sep="\n  ")
    compare(field, "", script, rng.choice(["at once", "bytes"]))
