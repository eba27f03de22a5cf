"""Partitioned and inherited tables."""

from __future__ import annotations

from typing import Any, Final

from tests.kinds.shapes import PLAIN, refused
from tests.support.cases import Case

PARTED: Final = (
    "INSERT INTO things VALUES ($key, 1000 + $n, 1 + $n % 30, 'new')",
    "UPDATE things SET note = note || $n WHERE tenant = $key AND id <= 5",
    "UPDATE things SET day = 1 + (day + 10) % 30 WHERE tenant = $key AND id % 7 = $n % 7",
    "DELETE FROM things WHERE tenant = $key AND id = 997 + $n",
)


def parted(kind: str, by: str, partitions: str, **more: Any) -> Case:
    """Rows of 30 days; an update of the day takes a row from partition to partition."""
    head = more.pop("head", "tenant bigint, id bigint, day int, note text, PRIMARY KEY (tenant, id, day)")
    return Case(
        kind=kind,
        schema=f"CREATE TABLE things ({head}) PARTITION BY {by}; {partitions}",
        rows="INSERT INTO things SELECT t, i, 1 + i % 30, 'loaded'"
        " FROM generate_series(95, 104) t, generate_series(1, 30) i",
        **{
            "writes": PARTED,
            "keys": ("99", "100", "101"),
            "moving": "100:",
            "group": "Partitions and inheritance",
            **more,
        },
    )


PARTITIONS: Final = (
    parted(
        "partitioned by range, with a default partition",
        "RANGE (day)",
        "CREATE TABLE things_1 PARTITION OF things FOR VALUES FROM (0) TO (10);"
        " CREATE TABLE things_2 PARTITION OF things FOR VALUES FROM (10) TO (20);"
        " CREATE TABLE things_rest PARTITION OF things DEFAULT",
        says="the root is named in the configuration; its partitions move with it",
    ),
    parted(
        "partitioned by list",
        "LIST (day)",
        "CREATE TABLE things_1 PARTITION OF things FOR VALUES IN (1, 3, 5, NULL);"
        " CREATE TABLE things_rest PARTITION OF things DEFAULT",
    ),
    parted(
        "partitioned by hash",
        "HASH (tenant, day)",
        " ".join(
            f"CREATE TABLE things_{rest} PARTITION OF things FOR VALUES WITH (MODULUS 3, REMAINDER {rest});"
            for rest in range(3)
        ),
    ),
    parted(
        "partitions of partitions, one with its columns in another order",
        "RANGE (tenant)",
        "CREATE TABLE things_low PARTITION OF things FOR VALUES FROM (MINVALUE) TO (100);"
        " CREATE TABLE things_high PARTITION OF things FOR VALUES FROM (100) TO (MAXVALUE) PARTITION BY LIST (day);"
        " CREATE TABLE things_odd (note text, gone int, day int NOT NULL, id bigint NOT NULL, tenant bigint NOT NULL);"
        " ALTER TABLE things_odd DROP COLUMN gone;"
        " ALTER TABLE things_high ATTACH PARTITION things_odd FOR VALUES IN (1, 3, 5, 7, 9, 11);"
        " CREATE TABLE things_even PARTITION OF things_high DEFAULT PARTITION BY HASH (id);"
        " CREATE TABLE things_even_0 PARTITION OF things_even FOR VALUES WITH (MODULUS 2, REMAINDER 0);"
        " CREATE TABLE things_even_1 PARTITION OF things_even FOR VALUES WITH (MODULUS 2, REMAINDER 1)",
    ),
    parted(
        "a partition that is added while the table moves",
        "RANGE (day)",
        "CREATE TABLE things_1 PARTITION OF things FOR VALUES FROM (0) TO (40)",
        ddl="CREATE TABLE things_2 PARTITION OF things FOR VALUES FROM (40) TO (80)",
        later=(*PARTED, "UPDATE things SET day = 40 + $n % 40 WHERE tenant = $key AND id % 5 = $n % 5"),
        says="on the target first; then `run` goes on, and compares everything anew",
    ),
    Case(
        kind="inherited tables",
        group="Partitions and inheritance",
        schema=f"{PLAIN}; CREATE TABLE big_things (size int, PRIMARY KEY (tenant, id)) INHERITS (things)",
        tables={"things": "tenant", "big_things": "tenant"},
        rows="INSERT INTO things SELECT t, i, 'loaded' FROM generate_series(95, 104) t, generate_series(1, 20) i;"
        " INSERT INTO big_things SELECT t, i, 'loaded', i FROM generate_series(95, 104) t, generate_series(10, 40) i",
        keys=("99", "100", "101"),
        writes=(
            "INSERT INTO things VALUES ($key, 1000 + $n, 'new');"
            " INSERT INTO big_things VALUES ($key, 1000 + $n, 'new', $n)",
            "UPDATE things SET note = note || $n WHERE tenant = $key AND id % 7 = $n % 7",
            "UPDATE ONLY things SET note = 'parent ' || $n WHERE tenant = $key AND id % 5 = $n % 5",
            "DELETE FROM things WHERE tenant = $key AND id = 998 + $n",
        ),
        says="parent and children are named in the configuration, each moves its own rows",
    ),
    refused(
        "an inherited table whose parent or child is not named",
        f"{PLAIN}; CREATE TABLE big_things (size int, PRIMARY KEY (tenant, id)) INHERITS (things)",
        "inherits from things and is not in the keyspace: its rows stay",
        group="Partitions and inheritance",
    ),
    refused(
        "a partition that is named instead of the root",
        "CREATE TABLE root (tenant bigint, id bigint, PRIMARY KEY (tenant, id)) PARTITION BY RANGE (tenant);"
        " CREATE TABLE things PARTITION OF root DEFAULT",
        "is a partition of root",
        group="Partitions and inheritance",
    ),
    parted(
        "a foreign table as a partition",
        "RANGE (day)",
        "CREATE TABLE things_1 PARTITION OF things FOR VALUES FROM (0) TO (40);"
        " CREATE FOREIGN TABLE things_far PARTITION OF things FOR VALUES FROM (40) TO (80) SERVER far",
        prepared="CREATE FOREIGN DATA WRAPPER nothing; CREATE SERVER far FOREIGN DATA WRAPPER nothing;"
        " GRANT USAGE ON FOREIGN SERVER far TO PUBLIC",
        refused="is a foreign table",
        head="tenant bigint NOT NULL, id bigint NOT NULL, day int NOT NULL, note text",
    ),
)
