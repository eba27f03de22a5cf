"""Cuts rows out of the data of a COPY … FROM STDIN, and reads their keys.

CopyData messages may cut the data anywhere. A row is cut out whole, as it came, with its line's end. What PostgreSQL
would read differently from what is done here is refused (`Unreadable`) rather than guessed.

Source: PostgreSQL's manual, COPY, File Formats.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from struct import Struct
from typing import Final

from router.statements.actions import Arguments, CopySpec, Facts, Origin, Refusal, Term
from router.statements.values import Unreadable, keys_of, unreadable
from shardmove.domain.keys import Key, KeyType

SIGNATURE: Final = b"PGCOPY\n\xff\r\n\0"
_HEAD: Final = Struct("!ii")
_COUNT: Final = Struct("!h")
_LENGTH: Final = Struct("!i")
_ESCAPE: Final = re.compile(rb"\\(?:([0-7]{1,3})|x([0-9a-fA-F]{1,2})|(.))", re.DOTALL)
_SIMPLE: Final = {b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v"}
_NOTHING: Final = Facts()


class CopyKeys:
    """Fed with CopyData in whatever pieces it came; gives rows whole, with their keys.

    A key of None is NULL, or no key that its type could hold: the row may go to any shard, whose server refuses it.
    Header, binary head and the marker of the end are no rows. `row_bytes_max` bounds the memory: a row has to be whole.
    """

    def __init__(self, spec: CopySpec, facts: Facts = _NOTHING, *, row_bytes_max: int = 1 << 30) -> None:
        self._spec = spec
        self._facts = facts
        self._column = spec.column
        self._rest = bytearray()  # what is behind its rows is cheap to keep: only its head is moved
        self._scanned = 0
        self._is_quoted = False
        self._row_bytes_max = row_bytes_max
        self._is_before_rows = spec.has_header or spec.format == "binary"
        self._is_over = False
        self._delimiter = spec.delimiter.encode()
        self._quote = spec.quote.encode()
        self._escape = spec.escape.encode()
        self._stop = re.compile(b"[\n\r" + re.escape(self._quote + self._escape) + b"]")
        self._null = spec.null.encode()
        self._end = self._line_end if spec.format != "csv" else self._csv_line_end

    def feed(self, data: bytes) -> Iterator[tuple[bytes, Key | None]]:
        """The rows that are whole now. Raises Unreadable for a row whose key cannot be told."""
        if len(self._rest) > self._row_bytes_max:
            raise unreadable("a row of COPY is too long", "raise [router] message_bytes_max")
        self._rest += data
        return self._binary_rows() if self._spec.format == "binary" else self._lines(is_last=False)

    def finish(self) -> Iterator[tuple[bytes, Key | None]]:
        """The row that came without a line's end before CopyDone, if any."""
        if self._spec.format == "binary":
            if self._rest:
                raise Unreadable(Refusal("22P04", "unexpected end of COPY data"))
            return
        yield from self._lines(is_last=True)

    # Lines

    def _lines(self, *, is_last: bool) -> Iterator[tuple[bytes, Key | None]]:
        position = 0
        while position < len(self._rest):
            end = self._end(position)
            if end < 0:
                if not is_last:
                    break
                end = len(self._rest)
            row = bytes(self._rest[position:end])
            position, self._scanned, self._is_quoted = end, 0, False
            if self._is_over:
                if self._spec.format == "csv":  # PostgreSQL 18 takes the marker for a row, and reads on
                    raise unreadable("rows of COPY behind an end-of-data marker")
            elif self._is_before_rows:
                self._is_before_rows = False
                self._line(row)
            elif row.rstrip(b"\r\n") == b"\\.":
                self._is_over = True
            else:
                del self._rest[:position]
                position = 0
                yield row, self._key_of_line(row)
        del self._rest[:position]

    def _line_end(self, start: int) -> int:
        """After the newline that ends a text row: one behind a backslash is data, and a lone \\r ends no row here."""
        position = start + self._scanned
        while True:
            end = self._rest.find(b"\n", position)
            if end < 0:
                self._scanned = max(0, len(self._rest) - start)
                return -1
            before = end
            while before > start and self._rest[before - 1 : before] == b"\\":
                before -= 1
            if (end - before) % 2 == 0:
                return end + 1
            position = end + 1

    def _csv_line_end(self, start: int) -> int:
        """After the newline outside of quotes. Where quote and escape are one, a doubled one is just two changes."""
        position = start + self._scanned
        rest, quote = self._rest, self._quote
        escape = self._escape if self._escape != quote else b""
        while position < len(rest):
            byte = rest[position : position + 1]
            if self._is_quoted and escape and byte == escape:
                if position + 1 >= len(rest):
                    break
                follows = rest[position + 1 : position + 2]
                position += 2 if follows in (quote, escape) else 1
                continue
            if byte == quote:
                self._is_quoted = not self._is_quoted
            elif byte == b"\n" and not self._is_quoted:
                return position + 1
            elif byte == b"\r" and not self._is_quoted:
                if position + 1 >= len(rest):
                    break
                if rest[position + 1 : position + 2] != b"\n":
                    raise _lone_return()
            found = self._stop.search(rest, position + 1)
            position = len(rest) if found is None else found.start()
        self._scanned = position - start
        return -1

    def _line(self, row: bytes) -> bytes:
        """Without its end. Servers take the first line's end for that of all lines; a lone \\r is none here."""
        line = row[:-1] if row.endswith(b"\n") else row
        line = line[:-1] if line.endswith(b"\r") else line
        if b"\r" in line and self._spec.format == "text":
            raise _lone_return()
        return line

    def _key_of_line(self, row: bytes) -> Key | None:
        line = self._line(row)
        value = self._csv_value(line) if self._spec.format == "csv" else self._text_value(line)
        return None if value is None else self._key(value, is_binary=False)

    def _text_value(self, line: bytes) -> bytes | None:
        if self._delimiter in b"\\":
            raise unreadable("a backslash as COPY's delimiter")
        fields = line.split(self._delimiter) if b"\\" not in line else _split_escaped(line, self._delimiter)
        if len(fields) <= self._column:
            return None  # the server refuses the row
        field = fields[self._column]
        if field == self._null:
            return None
        return _ESCAPE.sub(_unescaped, field) if b"\\" in field else field

    def _csv_value(self, line: bytes) -> bytes | None:
        """The key's field; quoted parts may stand anywhere in it."""
        position = 0
        for _ in range(self._column):
            position = self._csv_field(line, position)[1]
            if position > len(line):
                return None
        value, _end, was_quoted = self._csv_field(line, position)
        is_null = self._spec.force_null if was_quoted else not self._spec.force_not_null
        return None if is_null and value == self._null else value

    def _csv_field(self, line: bytes, position: int) -> tuple[bytes, int, bool]:
        """A field's value, where the next one begins, and whether some of it was quoted."""
        quote, escape, delimiter = self._quote, self._escape, self._delimiter
        end = line.find(delimiter, position)
        first_quote = line.find(quote, position)
        if first_quote < 0 or (0 <= end < first_quote):
            end = len(line) if end < 0 else end
            return line[position:end], end + 1, False
        pieces: list[bytes] = []
        is_quoted = False
        while position < len(line):
            byte = line[position : position + 1]
            follows = line[position + 1 : position + 2]
            if is_quoted and byte == escape and follows in (quote, escape):
                pieces.append(follows)
                position += 2
                continue
            if byte == quote:
                is_quoted = not is_quoted
            elif byte == delimiter and not is_quoted:
                return b"".join(pieces), position + 1, True
            else:
                pieces.append(byte)
            position += 1
        return b"".join(pieces), len(line) + 1, True

    # Binary rows

    def _binary_rows(self) -> Iterator[tuple[bytes, Key | None]]:
        while True:
            if self._is_over:
                self._rest.clear()
                return
            if self._is_before_rows:
                if not self._take_head():
                    return
                continue
            found = self._binary_row()
            if found is None:
                return
            row, value = found
            del self._rest[: len(row)]
            if len(row) == 2:
                self._is_over = True
                continue
            yield row, None if value is None else self._key(value, is_binary=True)

    def _take_head(self) -> bool:
        length = len(SIGNATURE) + _HEAD.size
        if len(self._rest) < length:
            return False
        _flags, extension = _HEAD.unpack_from(self._rest, len(SIGNATURE))
        if not self._rest.startswith(SIGNATURE) or extension < 0:
            raise Unreadable(Refusal("22P04", "COPY file signature not recognized"))
        if len(self._rest) < length + extension:
            return False
        del self._rest[: length + extension]
        self._is_before_rows = False
        return True

    def _binary_row(self) -> tuple[bytes, bytes | None] | None:
        rest = self._rest
        if len(rest) < 2:
            return None
        (count,) = _COUNT.unpack_from(rest)
        if count == -1:
            return bytes(rest[:2]), None
        if count < 0:
            raise Unreadable(Refusal("22P04", "a row of COPY with a negative number of fields"))
        position, value = 2, None
        for number in range(count):
            if len(rest) < position + 4:
                return None
            (length,) = _LENGTH.unpack_from(rest, position)
            position += 4
            if length < -1:
                raise Unreadable(Refusal("22P04", "a field of COPY with a negative length"))
            if length > 0 and len(rest) < position + length:
                return None
            if number == self._column and length >= 0:
                value = bytes(rest[position : position + length])
            position += max(length, 0)
        return bytes(rest[:position]), value

    def _key(self, value: bytes, *, is_binary: bool) -> Key | None:
        is_text = not is_binary or self._spec.key_type is KeyType.TEXT
        if is_text and not self._facts.is_utf8 and not value.isascii():
            raise unreadable("letters outside of ASCII in another encoding than UTF-8", "use client_encoding UTF8")
        arguments = Arguments((1,) if is_binary else (), (value,))
        keys = keys_of(_THE_VALUE, self._spec.key_type, (), arguments, self._facts, True)
        return keys[0] if keys else None


def _lone_return() -> Unreadable:
    return unreadable("a carriage return alone, within a row of COPY or at its end", "end rows with a newline")


_THE_VALUE: Final = Term(Origin.PARAMETER)


def _split_escaped(line: bytes, delimiter: bytes) -> list[bytes]:
    """Fields between delimiters that have no backslash before them."""
    fields: list[bytes] = []
    piece = b""
    for part in line.split(delimiter):
        piece += part
        backslashes = len(piece) - len(piece.rstrip(b"\\"))
        if backslashes % 2:
            piece += delimiter
        else:
            fields.append(piece)
            piece = b""
    if piece:
        fields.append(piece)
    return fields


def _unescaped(found: re.Match[bytes]) -> bytes:
    octal, hexadecimal, other = found.groups()
    if other is not None:
        return _SIMPLE.get(other, other)
    return bytes([int(octal, 8) & 0xFF if octal else int(hexadecimal, 16)])
