"""docs/preflight.md is made from the checklist: `python -m tests.test_preflight_page` writes it anew.

Why a line is asked is the docstring of its check, or stands in WHY where that has none; ADVICE says in short what the
line itself says with names and complete SQL.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from shardmove.coordinator.checks.data import DATA
from shardmove.coordinator.checks.schema import SCHEMA
from shardmove.coordinator.checks.site import Check
from shardmove.coordinator.preflight import CHECKS

PAGE: Final = Path(__file__).parents[1] / "docs" / "preflight.md"

WHY: Final[Mapping[str, str]] = {
    "the catalog and both shards answer": "Nobody can be asked anything else.",
    "both servers run a version that we know": "Older servers lack what triggers and fences are made of.",
    "all are reached without a transaction pooler": (
        "Session settings and advisory locks have to hold from one transaction to the next."
    ),
    "all are primaries": "A standby cannot be written to.",
    "the target can hold every text of the source": (
        "A character that the target's encoding lacks cannot be carried; text keys are placed by their bytes in UTF-8."
    ),
    "nobody follows the changes of the tables": "Consumers of a publication see copies and erasures as changes.",
    "there is room for our sessions": "A move that is refused a session half way stops.",
    "our role may keep its records on both shards": "Journal, fence and triggers are kept in the schema shardmove.",
    "our role may use the schemas of the tables": "What is in a schema that the role may not use cannot be named.",
    "our role owns the tables and their partitions": "Only an owner makes triggers.",
    "our role may read and set the sequences": "The target's have to be ahead of the source's.",
    "our role may read the reference tables, and fill them": "Every shard holds them whole.",
    "our role may execute the functions behind the tables": "Checks, indexes and generated columns call them.",
    "our role may apply rows as a replica, where something would fire": (
        "Triggers and foreign keys would do their work once more for each row that is carried."
    ),
    "our role sees every row": "Rows that a policy hides would not be carried.",
    "our role sees who is in its way": "A move that waits can then say for whom.",
    "our role may write to the catalog": "Every step is recorded there.",
}

ADVICE: Final[Mapping[str, str]] = {
    "every table is there on both shards": (
        "`shardmove run ID --create-schema` makes it on the target; name the root of a partition; take out what is no"
        " table"
    ),
    "every table is of a kind that we can move": (
        "`SET LOGGED`; `DETACH PARTITION` of a foreign table, `FINALIZE` where it stopped half way; name the tables"
        " that inherit in the keyspace"
    ),
    "every table has a key column of the keyspace's type": (
        "narrower integers, varchar and domains will do; else `ALTER … TYPE`, `SET NOT NULL`, `VALIDATE CONSTRAINT`,"
        " `DROP EXPRESSION`"
    ),
    "every table has a unique key to cut batches by": (
        "`SET NOT NULL` on the columns of a unique index, or a numbered column with one; a note: `CREATE UNIQUE INDEX"
        ' CONCURRENTLY … (a COLLATE "C", …)`'
    ),
    "the schema is the same on both shards": "`ALTER TABLE … ADD …`, `CREATE UNIQUE INDEX …` where it is missing",
    "reference tables are there, and the same, on both shards": "as above",
    "the target has the extensions that the tables need": "`CREATE EXTENSION`; a note: `ALTER EXTENSION … UPDATE`",
    "unique texts are unique alike on both shards": "a note: make the collation the same, and `REINDEX`",
    "unique constraints hold the key column": "make each anew with the key column first, in an exclusion one `WITH =`",
    "foreign keys stay inside the keyspace": (
        "name the table in the keyspace, or as a reference table; make the constraint anew with the keys of both sides;"
        " or drop it"
    ),
    "no trigger or rule fires for replicas": "`ALTER TABLE … ENABLE TRIGGER …`, `ENABLE RULE …`",
    "triggers and policies are the same on both shards": "a note: the statement that makes it on the other side",
    "sequences have their like and room for the margin": (
        "make the sequence that is missing; `TYPE bigint` for column and sequence, or a smaller `[limits]"
        " sequence_margin`"
    ),
    "the target holds no row of the range": "look whose they are; plan another range, or `DELETE` them",
    "no row breaks a constraint that is NOT VALID": "mend the rows, or `DROP CONSTRAINT` on both shards",
    "no column names large objects": "`TYPE bytea USING lo_get(…)`, or `TYPE bigint` where it names none",
    "what columns name by reg* types is on the target": "make it there, or `TYPE text`",
    "every column's type is read by the servers": "`TYPE text`, or a server that was built with libxml",
    "rows can be deleted on both shards": "`REPLICA IDENTITY FULL`",
    "event triggers let our objects pass": "`ALTER EVENT TRIGGER … DISABLE` while the move lasts",
    "the target takes rows of every table": "`ALTER FUNCTION … SET search_path = …`; mend what the server names",
}

_HEAD: Final = """\
# The checklist

`shardmove preflight ID` asks all of it and changes nothing: what is tried is rolled back. `run` asks it again before a
move begins. A line passes, passes with a note, or fails; one that fails stops the move before anything is touched. Each
names every table and object at fault (ten, and counts the rest) and says what to do: where that is SQL, the statements
are complete, and following them to the letter makes the line pass.

This page is made from the code: `python -m tests.test_preflight_page`.

| what holds | why | what to do where it does not |
|---|---|---|
"""


def page() -> str:
    return _HEAD + "".join(f"| {text} | {why(text, check)} | {advice(text)} |\n" for text, check in CHECKS)


def why(text: str, check: Check) -> str:
    said = " ".join((inspect.getdoc(check) or "").split())
    return (said or WHY.get(text, "")).replace("|", "\\|")


def advice(text: str) -> str:
    return ADVICE.get(text, "as the line says").replace("|", "\\|")


def test_the_page_is_that_of_the_checklist() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "`python -m tests.test_preflight_page` writes it anew"


def test_every_line_of_tables_and_rows_says_why_and_what_to_do() -> None:
    for text, check in (*SCHEMA, *DATA):
        assert why(text, check), text
        assert text in ADVICE, text
    lines = {text for text, _ in CHECKS}
    assert set(ADVICE) | set(WHY) <= lines


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
