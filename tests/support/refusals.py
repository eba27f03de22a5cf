"""What preflight has to refuse: each a further table of a schema that is sound without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardmove.domain.keys import KeyType
from shardmove.domain.moves import TableName
from tests.support.columns import quoted, value


@dataclass(frozen=True, slots=True)
class Refusal:
    """Statements on both shards, then on one of them only; `rows`, on the source. The key column of the table is k."""

    name: str
    table: str
    schema: tuple[str, ...] = ()
    source: tuple[str, ...] = ()
    target: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()


def refusals(schema: str, key_type: KeyType, keys: Sequence[str]) -> list[Refusal]:
    """All of them. `keys`: the first is in the range that moves."""
    t, outside = f"{quoted(schema)}.extra", f"{quoted(schema)}.outside"
    type_, key = str(key_type), value(keys[0], str(key_type))
    bare = f"CREATE TABLE {t} (k {type_} NOT NULL, n integer NOT NULL"
    plain, check = f"{bare}, PRIMARY KEY (k, n))", f"ALTER TABLE {t} ADD CHECK (n > 5) NOT VALID"

    def refusal(
        name: str,
        *statements: str,
        source: tuple[str, ...] = (),
        target: tuple[str, ...] = (),
        rows: tuple[str, ...] = (),
    ) -> Refusal:
        return Refusal(name, str(TableName(schema, "extra")), statements, source, target, rows)

    return [
        refusal("no unique key", f"{bare})"),
        refusal("a key that may be NULL", f"CREATE TABLE {t} (k {type_}, n integer, UNIQUE (k, n))"),
        refusal("unique without the key", plain, f"CREATE UNIQUE INDEX ON {t} (n) WHERE n < 0"),
        refusal("exclusion without the key", f"{bare}, PRIMARY KEY (k, n), EXCLUDE (n WITH =) WHERE (n < 0))"),
        refusal(
            "foreign key from outside",
            plain,
            f"CREATE TABLE {outside} (k {type_}, n integer, FOREIGN KEY (k, n) REFERENCES {t})",
        ),
        refusal(
            "foreign key to the outside",
            plain,
            f"CREATE TABLE {outside} (n integer PRIMARY KEY)",
            f"ALTER TABLE {t} ADD FOREIGN KEY (n) REFERENCES {outside}",
        ),
        refusal(
            "foreign key that does not tie the key",
            f"{bare}, k2 {type_}, n2 integer, PRIMARY KEY (k, n), FOREIGN KEY (k2, n2) REFERENCES {t} (k, n))",
        ),
        refusal("unlogged", plain, f"ALTER TABLE {t} SET UNLOGGED"),
        refusal(
            "trigger ENABLE ALWAYS",
            plain,
            f"CREATE FUNCTION {t}_f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
            f"CREATE TRIGGER always BEFORE UPDATE ON {t} FOR EACH ROW EXECUTE FUNCTION {t}_f()",
            f"ALTER TABLE {t} ENABLE ALWAYS TRIGGER always",
        ),
        refusal(
            "rule ENABLE REPLICA",
            plain,
            f"CREATE RULE copies AS ON DELETE TO {t} DO INSTEAD NOTHING",
            f"ALTER TABLE {t} ENABLE REPLICA RULE copies",
        ),
        refusal("a sequence that is too small", f"{bare}, s smallserial, PRIMARY KEY (k, n))"),
        refusal("a child that is not named", plain, f"CREATE TABLE {outside} () INHERITS ({t})"),
        refusal(
            "a generated key",
            f"CREATE TABLE {t} (b {type_}, n integer, k {type_} GENERATED ALWAYS AS (b) STORED NOT NULL,"
            " PRIMARY KEY (k, n))",
        ),
        refusal("a key of another type", f"CREATE TABLE {t} (k boolean, n integer, PRIMARY KEY (k, n))"),
        refusal(
            "a published table without replica identity",
            f"{bare})",
            f"CREATE UNIQUE INDEX ON {t} (k, n)",
            f"CREATE PUBLICATION followed FOR TABLE {t}",
        ),
        refusal("a column that the target lacks", plain, source=(f"ALTER TABLE {t} ADD COLUMN more text",)),
        refusal("rows of the range on the target", plain, target=(f"INSERT INTO {t} VALUES ({key}, 5)",)),
        refusal(
            "a name that the target does not have",
            f"{bare}, what regclass, PRIMARY KEY (k, n))",
            source=(f"CREATE TABLE {outside} (n integer)",),
            rows=(f"INSERT INTO {t} VALUES ({key}, 5, '{outside}')",),
        ),
        refusal(
            "a constraint NOT VALID that rows break",
            plain,
            target=(check,),
            rows=(f"INSERT INTO {t} VALUES ({key}, 1)", check),
        ),
    ]
