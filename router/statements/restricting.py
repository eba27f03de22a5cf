"""The text of a read for a shard that holds rows of others meanwhile: copies of a move that is not finished, or rows
that were given away and are not erased yet.

Each split table becomes a sub-select of the rows that the shard owns. The text is cut and joined at tokens, never
written anew: what the client wrote stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from router.statements.actions import NOT_SUPPORTED, CopyOut, Part, Place, Planned, Refusal
from router.statements.lexer import Token, quoted, text_of, tokens
from router.statements.values import Unreadable
from shardmove.domain import hashing
from shardmove.domain.keys import Key, KeyRange, KeyType, key_text
from shardmove.domain.moves import Scheme


def restricted(planned: Planned, ranges: Mapping[str, Sequence[KeyRange]]) -> bytes:
    """The text with its split tables restricted to the ranges of their keyspaces (of none: no row).

    Raises Unreadable where a table stands in a place that no sub-select can take.
    """
    text = text_of(planned.text)
    places: list[Place] = []
    found = list(tokens(text))
    for part in planned.plan.parts:
        if part.copy_out is not None:
            return _copied(text, found, part.copy_out, ranges).encode("utf-8", "surrogateescape")
        places.extend(_places(part))
    pieces: list[str] = []
    position = 0
    for place in sorted(places, key=lambda p: p.start):
        start, end = found[place.start].start, found[place.end - 1].end
        pieces.append(text[position:start])
        alias = "" if place.has_alias else f" AS {place.alias}"
        pieces.append(
            f"(SELECT * FROM {text[start:end]} WHERE {_predicate(place, ranges.get(place.keyspace, ()))}){alias}"
        )
        position = end
    pieces.append(text[position:])
    return "".join(pieces).encode("utf-8", "surrogateescape")


def _copied(text: str, found: Sequence[Token], copy: CopyOut, ranges: Mapping[str, Sequence[KeyRange]]) -> str:
    """COPY t (a, b) TO … becomes COPY (SELECT a, b FROM t WHERE …) TO …

    Where no columns are named, generated ones come too, which COPY of a table leaves out.
    """
    place = copy.place
    start, end = found[place.start].start, found[place.end - 1].end
    rest = end
    if copy.columns is not None:
        rest = next(token.end for token in found[place.end :] if token.text == ")")
    columns = "*" if copy.columns is None else ", ".join(map(quoted, copy.columns))
    predicate = _predicate(place, ranges.get(place.keyspace, ()))
    return f"{text[:start]}(SELECT {columns} FROM {text[start:end]} WHERE {predicate}){text[rest:]}"


def _places(part: Part) -> Sequence[Place]:
    while part.inner is not None:
        part = part.inner
    if not part.keyspaces:
        return ()
    if part.places is None:
        raise Unreadable(
            Refusal(
                NOT_SUPPORTED,
                "a shard holds rows of others while keys move, and the statement cannot be restricted to its own",
                "name the key, or write the tables without their schema and without TABLESAMPLE",
            )
        )
    return part.places


def _predicate(place: Place, ranges: Sequence[KeyRange]) -> str:
    column = quoted(place.column)
    if place.scheme is Scheme.HASH:
        subject, type_ = hashing.SQL[place.key_type].format(column), KeyType.BIGINT
    else:
        subject, type_ = column, place.key_type
        if type_ is KeyType.TEXT:
            subject = f'{column} COLLATE pg_catalog."C"'
    pieces = [_within(subject, type_, range_) for range_ in ranges]
    return " OR ".join(pieces) if pieces else "false"


def _within(subject: str, type_: KeyType, range_: KeyRange) -> str:
    conditions = []
    if range_.lower is not None:
        conditions.append(f"{subject} OPERATOR(pg_catalog.>=) {_literal(range_.lower, type_)}")
    if range_.upper is not None:
        conditions.append(f"{subject} OPERATOR(pg_catalog.<) {_literal(range_.upper, type_)}")
    return f"({' AND '.join(conditions)})" if conditions else "true"


def _literal(key: Key, type_: KeyType) -> str:
    text = key_text(key).replace("'", "''")
    if "\\" in text:
        text = text.replace("\\", "\\\\")
        return f"E'{text}'::pg_catalog.{_SQL_TYPES[type_]}"
    return f"'{text}'::pg_catalog.{_SQL_TYPES[type_]}"


_SQL_TYPES: Mapping[KeyType, str] = {
    KeyType.SMALLINT: "int2",
    KeyType.INTEGER: "int4",
    KeyType.BIGINT: "int8",
    KeyType.TEXT: "text",
    KeyType.UUID: "uuid",
    KeyType.DATE: "date",
    KeyType.TIMESTAMPTZ: "timestamptz",
}
