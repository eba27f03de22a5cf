"""Constraints, triggers, rules and row security."""

from __future__ import annotations

from typing import Final

from tests.kinds.shapes import OLD, PLAIN, refused, shaped
from tests.support.cases import Case

CONSTRAINTS: Final = (
    Case(
        kind="a foreign key to the same table",
        group="Constraints and triggers",
        schema="CREATE TABLE things (tenant bigint, id bigint, parent bigint, note text, PRIMARY KEY (tenant, id),"
        " FOREIGN KEY (tenant, parent) REFERENCES things ON DELETE CASCADE ON UPDATE CASCADE)",
        rows="INSERT INTO things SELECT t, i, CASE WHEN i > 3 THEN i / 3 END, 'loaded'"
        " FROM generate_series(95, 104) t, generate_series(1, 60) i",
        keys=("99", "100", "101"),
        writes=(
            "INSERT INTO things VALUES ($key, 1000 + $n, 1 + $n % 60, 'new'), ($key, 5000 + $n, 1000 + $n, 'newer')",
            "UPDATE things SET id = 100000 + $n WHERE tenant = $key AND id = 1000 + $n",
            "UPDATE things SET parent = (parent + $n) % 60 + 1 WHERE tenant = $key AND id BETWEEN 40 AND 60",
            "DELETE FROM things WHERE tenant = $key AND id = 99998 + $n",
        ),
        says="a role that moves tables with foreign keys needs `SET ON PARAMETER session_replication_role`",
    ),
    Case(
        kind="foreign keys in a circle, deferrable, initially deferred",
        group="Constraints and triggers",
        schema="CREATE TABLE things (tenant bigint, id bigint, best bigint, PRIMARY KEY (tenant, id));"
        " CREATE TABLE parts (tenant bigint, id bigint, thing bigint NOT NULL, PRIMARY KEY (tenant, id),"
        " FOREIGN KEY (tenant, thing) REFERENCES things DEFERRABLE INITIALLY DEFERRED);"
        " ALTER TABLE things ADD FOREIGN KEY (tenant, best) REFERENCES parts DEFERRABLE INITIALLY DEFERRED",
        tables={"things": "tenant", "parts": "tenant"},
        rows="BEGIN; INSERT INTO things SELECT t, i, i FROM generate_series(95, 104) t, generate_series(1, 40) i;"
        " INSERT INTO parts SELECT t, i, i FROM generate_series(95, 104) t, generate_series(1, 40) i; COMMIT",
        keys=("99", "100", "101"),
        writes=(
            "INSERT INTO things VALUES ($key, 1000 + $n, 1000 + $n);"
            " INSERT INTO parts VALUES ($key, 1000 + $n, 1000 + $n)",
            "UPDATE things SET best = 1 + (best + $n) % 40 WHERE tenant = $key AND id <= 40",
            "DELETE FROM things WHERE tenant = $key AND id = 998 + $n;"
            " DELETE FROM parts WHERE tenant = $key AND id = 998 + $n",
        ),
    ),
    Case(
        kind="a foreign key to a reference table",
        group="Constraints and triggers",
        schema="CREATE TABLE countries (code text PRIMARY KEY, name text);"
        " CREATE TABLE things (tenant bigint, id bigint, country text REFERENCES countries ON UPDATE CASCADE,"
        " PRIMARY KEY (tenant, id))",
        everywhere="INSERT INTO countries VALUES ('nl', 'Nederland'), ('dk', 'Danmark'), ('is', NULL)",
        reference_tables=("countries",),
        rows="INSERT INTO things SELECT t, i, (ARRAY['nl', 'dk', 'is', NULL])[1 + i % 4]"
        " FROM generate_series(95, 104) t, generate_series(1, 40) i",
        keys=("99", "100", "101"),
        writes=(
            "INSERT INTO things VALUES ($key, 1000 + $n, 'nl')",
            "UPDATE things SET country = CASE country WHEN 'nl' THEN 'dk' ELSE 'nl' END"
            " WHERE tenant = $key AND id % 9 = $n % 9",
            "DELETE FROM things WHERE tenant = $key AND id = 998 + $n",
        ),
        says="the reference table is named in `reference_tables`",
    ),
    refused(
        "a foreign key to a table that does not move",
        "CREATE TABLE countries (code text PRIMARY KEY);"
        " CREATE TABLE things (tenant bigint, id bigint, country text REFERENCES countries, PRIMARY KEY (tenant, id))",
        "ties things to countries, and countries does not move",
        group="Constraints and triggers",
    ),
    refused(
        "a foreign key without the key column",
        f"{PLAIN}; ALTER TABLE things ADD UNIQUE (id);"
        " CREATE TABLE parts (tenant bigint, id bigint, thing bigint REFERENCES things (id), PRIMARY KEY (tenant, id))",
        "does not tie tenant to things.tenant",
        tables={"things": "tenant", "parts": "tenant"},
        group="Constraints and triggers",
    ),
    refused(
        "a unique constraint without the key column",
        "CREATE TABLE things (tenant bigint, id bigint, mail text UNIQUE, PRIMARY KEY (tenant, id))",
        "does not hold the key column tenant",
        group="Constraints and triggers",
    ),
    Case(
        kind="an exclusion constraint with the key column",
        group="Constraints and triggers",
        prepared="CREATE EXTENSION btree_gist",
        schema="CREATE TABLE things (tenant bigint, id bigint, slot int8range, PRIMARY KEY (tenant, id),"
        " EXCLUDE USING gist (tenant WITH =, slot WITH &&))",
        rows="INSERT INTO things SELECT t, i, int8range(10 * i, 10 * i + 10)"
        " FROM generate_series(95, 104) t, generate_series(1, 40) i",
        keys=("99", "100", "101"),
        writes=(
            "INSERT INTO things VALUES ($key, 1000 + $n, int8range(5000 + $n, 5001 + $n))",
            "UPDATE things SET slot = 'empty' WHERE tenant = $key AND id IN (5, 35);"
            " UPDATE things SET slot = int8range(10 * place, 10 * place + 10)"
            " FROM (VALUES (5, 5 + 30 * ($n % 2)), (35, 35 - 30 * ($n % 2))) AS p(of, place)"
            " WHERE tenant = $key AND id = of",
            "DELETE FROM things WHERE tenant = $key AND id = 998 + $n",
        ),
        servers=OLD,
    ),
    refused(
        "an exclusion constraint without the key column",
        "CREATE TABLE things (tenant bigint, id bigint, slot int8range, PRIMARY KEY (tenant, id),"
        " EXCLUDE USING gist (slot WITH &&))",
        "does not hold the key column tenant",
        group="Constraints and triggers",
    ),
    shaped(
        "checks; partial, expression and `NULLS NOT DISTINCT` unique indexes; a deferred unique constraint",
        "",
        "",
        rows="t, i, i, CASE i % 3 WHEN 0 THEN NULL ELSE 'M' || i END",
        group="Constraints and triggers",
        schema="CREATE TABLE things (tenant bigint, id bigint, place bigint NOT NULL CHECK (place <> 0), mail text,"
        " PRIMARY KEY (tenant, id), UNIQUE (tenant, place) DEFERRABLE INITIALLY DEFERRED,"
        " UNIQUE NULLS NOT DISTINCT (tenant, mail, id));"
        " CREATE UNIQUE INDEX ON things (tenant, lower(mail));"
        " CREATE UNIQUE INDEX ON things (tenant, mail) WHERE place > 10",
        writes=(
            "UPDATE things SET place = 26 - place WHERE tenant = $key AND id <= 25",
            "INSERT INTO things VALUES ($key, 1000 + $n, 1000 + $n, NULL)",
            "UPDATE things SET mail = 'x' || mail WHERE tenant = $key AND id % 5 = $n % 5 AND length(mail) < 20",
            "DELETE FROM things WHERE tenant = $key AND id = 998 + $n",
        ),
    ),
    refused(
        "rows that break a constraint which is `NOT VALID`",
        f"{PLAIN}; ALTER TABLE things ADD CONSTRAINT good CHECK (note <> 'bad') NOT VALID",
        "break the constraint good, which is NOT VALID",
        rows="ALTER TABLE things DROP CONSTRAINT good; INSERT INTO things VALUES (100, 1, 'bad');"
        " ALTER TABLE things ADD CONSTRAINT good CHECK (note <> 'bad') NOT VALID",
        group="Constraints and triggers",
    ),
    shaped(
        "constraints that are `NOT ENFORCED`, and rows that break them",
        "tenant bigint, id bigint, parent bigint CHECK (parent > 0) NOT ENFORCED, PRIMARY KEY (tenant, id),"
        " FOREIGN KEY (tenant, parent) REFERENCES things NOT ENFORCED",
        "$key, 1000 + $n, -$n",
        "UPDATE things SET parent = parent - 1 WHERE tenant = $key AND id % 7 = $n % 7",
        "DELETE FROM things WHERE tenant = $key AND id = 998 + $n",
        rows="t, i, i - 12",
        group="Constraints and triggers",
    ),
    Case(
        kind="triggers and rules of the application",
        group="Constraints and triggers",
        schema=f"{PLAIN};"
        " CREATE TABLE changes (tenant bigint, id bigint, times int, said text, PRIMARY KEY (tenant, id));"
        " CREATE TABLE copies (tenant bigint, id bigint, note text, PRIMARY KEY (tenant, id));"
        " CREATE FUNCTION note_change() RETURNS trigger LANGUAGE plpgsql AS $f$ BEGIN"
        " INSERT INTO changes AS c VALUES (coalesce(NEW.tenant, OLD.tenant), coalesce(NEW.id, OLD.id), 1, TG_OP)"
        " ON CONFLICT (tenant, id) DO UPDATE SET times = c.times + 1, said = c.said || TG_OP; RETURN NULL; END $f$;"
        " CREATE FUNCTION shout() RETURNS trigger LANGUAGE plpgsql AS $f$ BEGIN"
        " NEW.note := NEW.note || '!'; RETURN NEW; END $f$;"
        " CREATE TRIGGER shout BEFORE INSERT OR UPDATE ON things FOR EACH ROW EXECUTE FUNCTION shout();"
        " CREATE TRIGGER z AFTER INSERT OR UPDATE OR DELETE ON things FOR EACH ROW EXECUTE FUNCTION note_change();"
        " CREATE RULE r AS ON INSERT TO things DO ALSO INSERT INTO copies VALUES (NEW.tenant, NEW.id, NEW.note)",
        tables={"things": "tenant", "changes": "tenant", "copies": "tenant"},
        rows="INSERT INTO things SELECT t, i, 'loaded' FROM generate_series(95, 104) t, generate_series(1, 30) i",
        keys=("99", "100", "101"),
        writes=(
            "INSERT INTO things VALUES ($key, 1000 + $n, 'new')",
            "UPDATE things SET note = left(note, 20) || $n WHERE tenant = $key AND id <= 4",
            "DELETE FROM things WHERE tenant = $key AND id = 998 + $n",
        ),
        says="they fire once, for the application's own statement",
    ),
    refused(
        "a trigger that fires for replicas, too (`ENABLE ALWAYS` or `REPLICA`)",
        f"{PLAIN}; CREATE TRIGGER t BEFORE UPDATE ON things FOR EACH ROW"
        " EXECUTE FUNCTION suppress_redundant_updates_trigger();"
        " ALTER TABLE things ENABLE ALWAYS TRIGGER t",
        "fires for replicas too",
        group="Constraints and triggers",
    ),
    Case(
        kind="row security, also where it is forced",
        group="Constraints and triggers",
        schema=f"{PLAIN}; ALTER TABLE things ENABLE ROW LEVEL SECURITY;"
        " CREATE POLICY p ON things USING (note <> 'hidden') WITH CHECK (true);"
        " CREATE TABLE parts (tenant bigint, id bigint, note text, PRIMARY KEY (tenant, id));"
        " ALTER TABLE parts ENABLE ROW LEVEL SECURITY; ALTER TABLE parts FORCE ROW LEVEL SECURITY;"
        " CREATE POLICY p ON parts USING (note <> 'hidden') WITH CHECK (true)",
        tables={"things": "tenant", "parts": "tenant"},
        rows="".join(
            f"INSERT INTO {table} SELECT t, i, CASE i % 2 WHEN 0 THEN 'seen' ELSE 'hidden' END"
            " FROM generate_series(95, 104) t, generate_series(1, 30) i;"
            for table in ("things", "parts")
        ),
        keys=("99", "100", "101"),
        writes=(
            "INSERT INTO things VALUES ($key, 1000 + $n, 'new'); INSERT INTO parts VALUES ($key, 1000 + $n, 'hidden')",
            "UPDATE things SET note = left(note, 20) || $n WHERE tenant = $key AND id <= 4",
            "UPDATE parts SET note = left(note, 20) || $n WHERE tenant = $key AND id <= 4",
            "DELETE FROM things WHERE tenant = $key AND id = 998 + $n",
        ),
        says="where it is forced, the role that moves needs `BYPASSRLS`",
    ),
)
