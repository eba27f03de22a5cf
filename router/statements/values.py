"""Keys as PostgreSQL reads them, from literals and parameters, for every type that a shard key may have.

A value that PostgreSQL versions or settings read differently, or that changes on its way (a cast that rounds, a text
that is padded), is refused: `Unreadable`. A value that no key can equal is no key: a comparison with it finds no row,
and a row with it is refused by the server, whichever it is.

Source: PostgreSQL's manual, 4.1.2 Constants, 8 Data Types; 55.7 for the formats of Bind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta, timezone
from struct import Struct
from typing import Any, Final
from uuid import UUID
from zoneinfo import ZoneInfo

from router.statements.actions import NOT_SUPPORTED, Arguments, Facts, Origin, Refusal, Term
from router.statements.lexer import Literal
from shardmove.domain.keys import Key, KeyType


class Unreadable(Exception):
    """The value may be a key, and which one is not certain."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


def unreadable(what: str, hint: str | None = None) -> Unreadable:
    return Unreadable(Refusal(NOT_SUPPORTED, f"the router cannot read the shard key: {what}", hint))


INTEGERS: Final = frozenset({KeyType.SMALLINT, KeyType.INTEGER, KeyType.BIGINT})
_BITS: Final = {KeyType.SMALLINT: 15, KeyType.INTEGER: 31, KeyType.BIGINT: 63}

# Numbers of types, of pg_type. Their binary forms are the same in every version of PostgreSQL.
_INTEGER_OIDS: Final = {21: 2, 23: 4, 20: 8}
_OIDS: Final[Mapping[int, str]] = {
    21: "smallint", 23: "integer", 20: "bigint", 26: "oid", 1700: "numeric", 700: "real", 701: "double precision",
    25: "text", 1043: "varchar", 705: "unknown", 2950: "uuid", 1082: "date", 1184: "timestamptz", 1114: "timestamp",
}  # fmt: skip
_ARRAY_OIDS: Final[Mapping[int, int]] = {
    1005: 21, 1007: 23, 1016: 20, 1231: 1700, 1009: 25, 1015: 1043, 2951: 2950, 1182: 1082, 1185: 1184, 1115: 1114,
}  # fmt: skip
OID_OF: Final[Mapping[str, int]] = {name: oid for oid, name in _OIDS.items()}

_FAMILY: Final[Mapping[KeyType, frozenset[str]]] = {
    **dict.fromkeys(INTEGERS, frozenset({"smallint", "integer", "bigint", "numeric"})),
    KeyType.TEXT: frozenset({"text", "varchar"}),
    KeyType.UUID: frozenset({"uuid"}),
    KeyType.DATE: frozenset({"date"}),
    KeyType.TIMESTAMPTZ: frozenset({"timestamptz"}),
}
"""The types that a value of the key's type may be cast to without becoming another."""
_FAMILY_OR_TEXT: Final = {key_type: family | {"text", "varchar"} for key_type, family in _FAMILY.items()}
"""Of a string, which stays as it is on its way through these."""

_SPACE: Final = " \t\n\r\v\f"
_INTEGER: Final = re.compile(r"[+-]?[0-9]+")
_NUMERIC: Final = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")


def keys_of(
    term: Term,
    key_type: KeyType,
    literals: Sequence[Literal],
    arguments: Arguments | None,
    facts: Facts,
    is_assigned: bool,
) -> Sequence[Key]:
    """The keys that a term stands for: one, none where it can be no key, or those of an array. Raises Unreadable."""
    if term.origin is Origin.PARAMETER:
        return _of_parameter(term, key_type, arguments, facts, is_assigned)
    if term.origin is Origin.NULL:
        return ()
    literal = literals[term.index]
    if literal.kind == "o":
        raise unreadable("it is written in a form that depends on the server's settings")
    if literal.kind == "n":
        return _of_number(literal.text, term, key_type, is_assigned)
    _require_decodable(literal.text, facts)
    if term.is_array:
        elements = array_elements(literal.text)
        texts = (text for text in elements if text is not None)
        return [key for text in texts for key in _of_text(text, term, key_type, facts, is_assigned)]
    if term.is_negative:
        raise unreadable("the minus before a string")
    return _of_text(literal.text, term, key_type, facts, is_assigned)


def _of_number(text: str, term: Term, key_type: KeyType, is_assigned: bool) -> Sequence[Key]:
    if key_type not in INTEGERS or term.is_array:
        raise unreadable(f"a number where the key is of type {key_type}")
    if not _NUMERIC.fullmatch(text):
        raise unreadable(f"versions of PostgreSQL read {text} differently")
    return _integer("-" + text if term.is_negative else text, term, key_type, is_assigned)


def _integer(text: str, term: Term, key_type: KeyType, is_assigned: bool) -> Sequence[Key]:
    """Of the text of a number. A comparison with a number that is not whole finds nothing; assigned, it is rounded."""
    if _INTEGER.fullmatch(text):
        value = int(text) if len(text) < 400 else 10**400
    else:
        whole = _whole(text)
        if whole is None:
            if is_assigned or term.casts:
                raise unreadable(f"{text} would be rounded")
            return ()
        value = whole
    _check_casts(term, _FAMILY[key_type])
    return _in_range(value, key_type)


def _in_range(value: int, key_type: KeyType) -> Sequence[Key]:
    bits = _BITS[key_type]
    return (value,) if -(1 << bits) <= value < 1 << bits else ()


def _whole(text: str) -> int | None:
    """The integer that a decimal number is, or None."""
    mantissa, _, exponent_text = text.lower().partition("e")
    exponent = int(exponent_text or 0)
    sign = -1 if mantissa.startswith("-") else 1
    whole, _, fraction = mantissa.lstrip("+-").partition(".")
    digits, scale = whole + fraction, exponent - len(fraction)
    if len(digits) > 400:
        return None if digits.strip("0") and scale < 0 else 10**400
    value = int(digits or 0)
    if scale >= 0:
        power: int = 10 ** min(scale, 400)
        return sign * value * power
    quotient, rest = divmod(value, 10 ** min(-scale, 5000))
    return None if rest else sign * quotient


def _check_casts(term: Term, harmless: frozenset[str]) -> None:
    for cast in term.casts:
        if cast not in harmless:
            raise unreadable(f"the cast to {cast}")


def _of_text(text: str, term: Term, key_type: KeyType, facts: Facts, is_assigned: bool) -> Sequence[Key]:
    """Of a string, which PostgreSQL reads as the first type it is cast to, or as the key's own."""
    _check_casts(term, _FAMILY_OR_TEXT[key_type])
    if is_assigned and key_type is KeyType.TEXT and text.endswith(" "):
        raise unreadable(f"{text[:40]!r} ends in a blank, which a column of varchar(n) may leave out")
    return _READ[key_type](text, key_type, term, facts)


def _read_integer(text: str, key_type: KeyType, term: Term, facts: Facts) -> Sequence[Key]:
    """As int8in does up to PostgreSQL 15; what only later versions read (0x1F, 1_000) is an error or a number there."""
    bare = text.strip(_SPACE)
    if _INTEGER.fullmatch(bare):
        return _in_range(int(bare) if len(bare) < 400 else 10**400, key_type)
    if "numeric" in term.casts and _NUMERIC.fullmatch(bare):
        return _integer(bare, term, key_type, True)
    raise Unreadable(
        Refusal(
            "22P02",
            f"{text!r} is no shard key of type {key_type} that every version of PostgreSQL reads alike",
            "write the key in decimal digits",
        )
    )


def _read_text(text: str, key_type: KeyType, term: Term, facts: Facts) -> Sequence[Key]:
    return (text,)


_UUID: Final = re.compile(r"(?:[0-9a-fA-F]{4}-?){7}[0-9a-fA-F]{4}")


def _read_uuid(text: str, key_type: KeyType, term: Term, facts: Facts) -> Sequence[Key]:
    """As uuid_in does: a hyphen after any group of four digits, in braces or not, no blanks."""
    bare = text[1:-1] if text.startswith("{") and text.endswith("}") else text
    if not _UUID.fullmatch(bare):
        raise Unreadable(Refusal("22P02", f"{text!r} is no shard key of type uuid"))
    return (UUID(bare.replace("-", "")),)


_DATE: Final = re.compile(r"(\d{4})-(\d{1,2})-(\d{1,2})")


def _read_date(text: str, key_type: KeyType, term: Term, facts: Facts) -> Sequence[Key]:
    found = _DATE.fullmatch(text.strip(_SPACE))
    if found is None or not found[0].isascii():
        raise unreadable(f"{text!r} may be read in several ways as a date", "write YYYY-MM-DD")
    try:
        return (date(*map(int, found.groups())),)
    except ValueError:
        raise Unreadable(Refusal("22008", f"{text!r} is no shard key of type date")) from None


_TIMESTAMP: Final = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)(?:[T ]\s*(\d\d):(\d\d)(?::(\d\d)(?:\.(\d{1,6}))?)?)?"
    r"\s*(Z|z|[+-]\d\d(?::?\d\d(?::?\d\d)?)?)?"
)


def _read_timestamptz(text: str, key_type: KeyType, term: Term, facts: Facts) -> Sequence[Key]:
    found = _TIMESTAMP.fullmatch(text.strip(_SPACE))
    if found is None or not found[0].isascii():
        raise unreadable(f"{text!r} may be read in several ways as a time", "write YYYY-MM-DD HH:MM:SS+00")
    *fields, fraction, offset = found.groups()
    if offset is not None and fields[3] is None:
        raise unreadable(f"{text!r} is no complete time", "write YYYY-MM-DD HH:MM:SS+00")
    try:
        year, month, day, hour, minute, second = (int(part or 0) for part in fields)
        local = datetime(year, month, day, hour, minute, second, int((fraction or "").ljust(6, "0")))
        return (_at_offset(local, offset, text, facts).astimezone(UTC),)
    except (ValueError, OverflowError):
        raise Unreadable(Refusal("22008", f"{text!r} is no shard key of type timestamptz")) from None


def _at_offset(local: datetime, offset: str | None, text: str, facts: Facts) -> datetime:
    if offset is None:
        return _in_zone(local, text, facts)
    if offset in "Zz":
        return local.replace(tzinfo=UTC)
    digits = offset[1:].replace(":", "")
    minutes, seconds = int(digits[2:4] or 0), int(digits[4:6] or 0)
    if minutes > 59 or seconds > 59 or int(digits[:2]) > 15:
        raise ValueError(offset)
    distance = timedelta(hours=int(digits[:2]), minutes=minutes, seconds=seconds)
    return local.replace(tzinfo=timezone(-distance if offset[0] == "-" else distance))


_PLAIN_ZONES: Final = frozenset({"utc", "gmt", "etc/utc", "uct", "zulu", "etc/gmt"})


def _in_zone(local: datetime, text: str, facts: Facts) -> datetime:
    """A time without an offset is one of the session's time zone, if that says which: an hour may be twice or never."""
    if facts.time_zone is None:
        raise unreadable(f"{text!r} depends on the session's TimeZone", "write the offset: …+00")
    if facts.time_zone.lower() in _PLAIN_ZONES:
        return local.replace(tzinfo=UTC)
    try:
        zone = ZoneInfo(facts.time_zone)
    except (KeyError, ValueError, OSError):
        raise unreadable(f"{text!r} depends on the time zone {facts.time_zone}", "write the offset: …+00") from None
    here = local.replace(tzinfo=zone)
    if here.utcoffset() != here.replace(fold=1).utcoffset():
        raise unreadable(f"{text!r} is within a change of {facts.time_zone}", "write the offset: …+00")
    return here


_READ: Final[Mapping[KeyType, Callable[[str, KeyType, Term, Facts], Sequence[Key]]]] = {
    **dict.fromkeys(INTEGERS, _read_integer),
    KeyType.TEXT: _read_text,
    KeyType.UUID: _read_uuid,
    KeyType.DATE: _read_date,
    KeyType.TIMESTAMPTZ: _read_timestamptz,
}


def _require_decodable(text: str, facts: Facts) -> None:
    if text.isascii():
        return
    if not facts.is_utf8:
        raise unreadable("letters outside of ASCII in another encoding than UTF-8", "use client_encoding UTF8")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unreadable(Refusal("22021", "the shard key is no valid UTF-8")) from None


# Parameters


def _of_parameter(
    term: Term, key_type: KeyType, arguments: Arguments | None, facts: Facts, is_assigned: bool
) -> Sequence[Key]:
    if arguments is None or term.index >= len(arguments.values):
        raise Unreadable(Refusal("42P02", f"there is no parameter ${term.index + 1}"))
    data = arguments.values[term.index]
    if data is None:
        return ()
    oid = arguments.oids[term.index] if term.index < len(arguments.oids) else 0
    if not _is_binary(arguments.formats, term.index):
        if (
            oid in (0, 20, 23, 21)
            and key_type in INTEGERS
            and not term.is_array
            and not term.is_shared
            and data.isdigit()
            and len(data) < 10
        ):
            return _fast_integer(int(data), key_type, term)
        return _of_parameter_text(data, oid, term, key_type, facts, is_assigned)
    return _of_parameter_bytes(data, oid, term, key_type, facts, is_assigned)


def _fast_integer(value: int, key_type: KeyType, term: Term) -> Sequence[Key]:
    _check_casts(term, _FAMILY_OR_TEXT[key_type])
    return (value,) if key_type is not KeyType.SMALLINT or value < 32768 else ()


def _is_binary(formats: Sequence[int], index: int) -> bool:
    if not formats:
        return False
    if len(formats) == 1:
        return formats[0] == 1
    return index < len(formats) and formats[index] == 1


def _of_parameter_text(
    data: bytes, oid: int, term: Term, key_type: KeyType, facts: Facts, is_assigned: bool
) -> Sequence[Key]:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise Unreadable(Refusal("22021", "the shard key is no valid UTF-8")) from None
    _require_decodable(text, facts)
    if term.is_array:
        element = _ARRAY_OIDS.get(oid, 0 if oid in (0, 705) else -1)
        texts = [part for part in array_elements(text) if part is not None]
    else:
        element, texts = oid, [text]
    keys: list[Key] = []
    for one in texts:
        keys.extend(_of_typed_text(one, element, term, key_type, facts, is_assigned))
    return keys


def _of_typed_text(
    text: str, oid: int, term: Term, key_type: KeyType, facts: Facts, is_assigned: bool
) -> Sequence[Key]:
    name = "" if oid in (0, 705) else _OIDS.get(oid)
    if name is None or (name and name not in _FAMILY[key_type] and not _is_text_cast(name, term)):
        raise unreadable(f"a parameter of type {name or oid} where the key is of type {key_type}")
    if name == "" and term.is_shared:
        _require_same_everywhere(text, key_type, is_converted=is_assigned or bool(term.casts))
    if name == "numeric":
        bare = text.strip(_SPACE)
        if not _NUMERIC.fullmatch(bare):
            raise unreadable(f"{text!r} as a number")
        return _integer(bare, term, key_type, is_assigned)
    return _of_text(text, term, key_type, facts, is_assigned)


def _is_text_cast(name: str, term: Term) -> bool:
    """A text that the statement itself casts is read like a string."""
    return name in ("text", "varchar") and bool(term.casts)


def _require_same_everywhere(text: str, key_type: KeyType, *, is_converted: bool) -> None:
    """A parameter of no declared type takes it from where it stands first, which may not be the key.

    As a real, integers of up to seven digits are themselves; a number that is cast to text, or stored as one, is not.
    """
    is_same = True
    if key_type in INTEGERS:
        is_same = len(text) <= 7
    elif key_type is KeyType.TEXT:
        is_same = not is_converted and not text.endswith(" ") and len(text) < 64
    elif key_type is KeyType.TIMESTAMPTZ:
        is_same = False
    if not is_same:
        raise unreadable("its parameter stands in other places, which may give it another type", "declare its type")


_SHORT, _LONG, _LONG_LONG = Struct("!h").unpack, Struct("!i").unpack, Struct("!q").unpack
_INTEGER_UNPACK: Final[Mapping[int, Callable[[bytes], tuple[Any, ...]]]] = {2: _SHORT, 4: _LONG, 8: _LONG_LONG}


def _of_parameter_bytes(
    data: bytes, oid: int, term: Term, key_type: KeyType, facts: Facts, is_assigned: bool
) -> Sequence[Key]:
    elements = _binary_elements(data) if term.is_array else [(oid or _implied_oid(term, key_type), data)]
    keys: list[Key] = []
    for element_oid, element in elements:
        keys.extend(_of_bytes(element, element_oid, term, key_type, facts, is_assigned))
    return keys


def _implied_oid(term: Term, key_type: KeyType) -> int:
    if term.is_shared:
        raise unreadable("its parameter stands in other places, which may give it another type", "declare its type")
    return OID_OF.get(term.casts[0], -1) if term.casts else OID_OF[key_type]


def _of_bytes(data: bytes, oid: int, term: Term, key_type: KeyType, facts: Facts, is_assigned: bool) -> Sequence[Key]:
    name = _OIDS.get(oid)
    if name is None or (name not in _FAMILY[key_type] and not _is_text_cast(name, term)) or name == "numeric":
        raise unreadable(f"a binary parameter of type {name or oid} where the key is of type {key_type}")
    if oid in _INTEGER_OIDS:
        if len(data) != _INTEGER_OIDS[oid]:
            raise Unreadable(Refusal("22P03", f"a {name} of {len(data)} bytes"))
        value: int = _INTEGER_UNPACK[len(data)](data)[0]
        _check_casts(term, _FAMILY[key_type])
        return _in_range(value, key_type)
    if name in ("text", "varchar"):
        text = data.decode("utf-8", "surrogateescape")
        _require_decodable(text, facts)
        return _of_text(text, term, key_type, facts, is_assigned)
    return _BINARY[oid](data)


_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)


def _uuid_bytes(data: bytes) -> Sequence[Key]:
    if len(data) != 16:
        raise Unreadable(Refusal("22P03", f"a uuid of {len(data)} bytes"))
    return (UUID(bytes=data),)


def _date_bytes(data: bytes) -> Sequence[Key]:
    if len(data) != 4:
        raise Unreadable(Refusal("22P03", f"a date of {len(data)} bytes"))
    try:
        return (_EPOCH.date() + timedelta(days=_LONG(data)[0]),)
    except OverflowError:
        raise unreadable("a date outside of the years 1 to 9999") from None


def _timestamptz_bytes(data: bytes) -> Sequence[Key]:
    if len(data) != 8:
        raise Unreadable(Refusal("22P03", f"a timestamptz of {len(data)} bytes"))
    try:
        return (_EPOCH + timedelta(microseconds=_LONG_LONG(data)[0]),)
    except OverflowError:
        raise unreadable("a time outside of the years 1 to 9999") from None


_BINARY: Final[Mapping[int, Callable[[bytes], Sequence[Key]]]] = {
    2950: _uuid_bytes,
    1082: _date_bytes,
    1184: _timestamptz_bytes,
}

# Arrays

_ELEMENT: Final = re.compile(
    r'[ \t\n\r\v\f]*(?:"((?:[^"\\]|\\.)*)"|([^",{}\\ \t\n\r\v\f](?:[^",{}\\]*[^",{}\\ \t\n\r\v\f])?))'
    r"[ \t\n\r\v\f]*(,|\Z)",
    re.DOTALL,
)


def array_elements(text: str) -> list[str | None]:
    """The elements of a one-dimensional array's text. Raises Unreadable for all other forms."""
    bare = text.strip(_SPACE)
    if not (bare.startswith("{") and bare.endswith("}")):
        raise unreadable(f"{text[:40]!r} is no simple array")
    inner = bare[1:-1]
    if not inner.strip(_SPACE):
        return []
    elements: list[str | None] = []
    position = 0
    while True:
        found = _ELEMENT.match(inner, position)
        if found is None:
            raise unreadable(f"{text[:40]!r} is no simple array")
        quoted, plain, end = found.groups()
        if quoted is not None:
            elements.append(re.sub(r"\\(.)", r"\1", quoted, flags=re.DOTALL))
        else:
            elements.append(None if plain.upper() == "NULL" else plain)
        position = found.end()
        if end != ",":
            return elements


_ARRAY_HEAD: Final = Struct("!iiI")
_DIMENSION: Final = Struct("!ii")


def _binary_elements(data: bytes) -> list[tuple[int, bytes]]:
    try:
        dimensions, _has_null, oid = _ARRAY_HEAD.unpack_from(data)
        if dimensions == 0:
            return []
        count, _ = _DIMENSION.unpack_from(data, 12)
        position, elements = 20, []
        for _ in range(count):
            (length,) = _LONG(data[position : position + 4])
            position += 4
            if length >= 0:
                elements.append((oid, data[position : position + length]))
                position += length
    except Exception as error:
        raise Unreadable(Refusal("22P03", "an array that is no array")) from error
    if dimensions != 1 or position != len(data):
        raise unreadable("an array of several dimensions")
    return elements
