"""Tokens of a text, and what is left of it without its literals.

Bytes that a client sends are in an encoding of which only this is taken for granted: ASCII is ASCII in it. Outside of
literals that is enough. `standard_conforming_strings` is taken to be on (setting it off is refused): a backslash means
something in E'…' only. What is said here follows PostgreSQL's manual, 4.1 Lexical Structure.

`cut` runs for each text that is not known byte for byte, and is one pass of one compiled expression; `tokens` is for
texts that have to be planned.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

MARK: Final = "\x01"
"""Stands for a literal in a shape. A text may have it, too: outside of its literals it is no SQL, or in a name."""

_STRING: Final = r"'(?:[^']|'')*'"
_ESCAPED: Final = r"'(?:[^'\\]|\\.|'')*'"
_GOES_ON: Final = r"[ \t\f\r\v]*\n\s*"
"""Between two strings that are one: white space with a line's end in it."""
_INNER: Final = r"/\*(?:[^*/]|\*(?!/)|/(?!\*))*\*/"
_BLOCK: Final = rf"/\*(?:[^*/]|\*(?!/)|/(?!\*)|{_INNER})*\*/"
_COMMENT: Final = rf"--[^\n\r]*|{_BLOCK}"
"""Comments nest; one level is what is met, and deeper ones are found out as unterminated."""
_NUMBER: Final = (
    r"0[xX][0-9a-fA-F_]+|0[oO][0-7_]+|0[bB][01_]+|(?:\d[\d_]*(?:\.(?!\.)[\d_]*)?|\.\d[\d_]*)(?:[eE][+-]?\d[\d_]*)?"
)
_LETTER: Final = r"A-Za-z_\u0080-\U0010ffff"
_WORD: Final = rf"[{_LETTER}][{_LETTER}0-9$]*"
_NO_WORD: Final = rf"(?<![{_LETTER}0-9$])"

_STRINGS: Final = (
    rf"{_NO_WORD}[eE]{_ESCAPED}(?:{_GOES_ON}{_ESCAPED})*"
    rf"|(?:{_NO_WORD}(?:[uU]&|[bBxXnN]))?{_STRING}(?:{_GOES_ON}{_STRING})*"
    rf"|{_NO_WORD}\$(?P<tag>(?:[{_LETTER}][{_LETTER}0-9]*)?)\$.*?\$(?P=tag)\$"
)
_IDENTIFIER: Final = rf'(?:{_NO_WORD}[uU]&)?"(?:[^"]|"")+"'

# What has to be taken out, or stepped over as a whole, to see the shape of a text. All of it begins with one of a few
# characters: the search for those is what makes it fast, and what follows looks back at which one it was.
_BEFORE: Final = rf"[{_LETTER}0-9$]"
_CUT: Final = re.compile(
    r"['\"$0-9.\-/](?:"
    rf"(?P<string>(?<=')(?:(?<=[eE]')(?<!{_BEFORE}[eE]'){_ESCAPED[1:]}(?:{_GOES_ON}{_ESCAPED})*"
    rf"|(?:(?<![eE]')|(?<={_BEFORE}[eE]')){_STRING[1:]}(?:{_GOES_ON}{_STRING})*))"
    rf'|(?P<identifier>(?<=")(?:[^"]|"")+")'
    rf"|(?P<dollar>(?<=\$)(?<!{_BEFORE}\$)(?P<tag>(?:[{_LETTER}][{_LETTER}0-9]*)?)\$.*?\$(?P=tag)\$)"
    rf"|(?P<parameter>(?<=\$)(?<!{_BEFORE}\$)\d+)"
    rf"|(?P<number>(?<=[0-9])(?<!{_BEFORE}[0-9])(?:(?<=0)(?:[xX][0-9a-fA-F_]+|[oO][0-7_]+|[bB][01_]+)"
    rf"|[\d_]*(?:\.(?!\.)[\d_]*)?(?:[eE][+-]?\d[\d_]*)?)"
    rf"|(?<=\.)(?<!{_BEFORE}\.)\d[\d_]*(?:[eE][+-]?\d[\d_]*)?)"
    rf"|(?P<comment>(?<=-)-[^\n\r]*|(?<=/){_BLOCK[1:]})"
    r"|(?P<odd>(?<=['\"])|(?<=/)\*))",
    re.DOTALL,
)
_TOKEN: Final = re.compile(
    rf"(?P<space>\s+|{_COMMENT})|(?P<string>{_STRINGS})|(?P<identifier>{_IDENTIFIER})|(?P<parameter>\$\d+)"
    rf"|(?P<number>{_NUMBER})|(?P<word>{_WORD})|(?P<odd>['\"]|/\*)|(?P<operator>::|:=|[-+*/<>=~!@#%^&|`?]+?|.)",
    re.DOTALL,
)


class Literal(NamedTuple):
    """A constant of a text. `kind`: n number, s string, o one of the kinds of which no key is read (bits, U&)."""

    kind: str
    text: str


class Token(NamedTuple):
    kind: str
    """string, identifier, parameter, number, word, operator or odd."""
    text: str
    start: int
    end: int
    literal: int = -1
    """Which literal of the text it is."""

    @property
    def word(self) -> str:
        """A keyword in capitals; "" for all that is no bare word."""
        return self.text.upper() if self.kind == "word" else ""

    @property
    def name(self) -> str:
        """The name that an identifier means."""
        return folded(self.text)


class Cut(NamedTuple):
    """A text without its literals: equal shapes have equal plans."""

    shape: str
    literals: tuple[Literal, ...]
    is_odd: bool
    """A string, identifier or comment has no end."""


def text_of(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def folded(text: str) -> str:
    """A name as PostgreSQL keeps it: bare ones in small letters (ASCII's), quoted ones as they are; 63 bytes."""
    if text.startswith('"'):
        name = text[1:-1].replace('""', '"')
    else:
        name = text.lower() if text.isascii() else "".join(c.lower() if c.isascii() else c for c in text)
    return name if len(name) < 16 else _shortened(name)


def quoted(name: str) -> str:
    """The identifier that means the name."""
    return '"' + name.replace('"', '""') + '"'


def as_literal(text: str) -> str:
    """The constant that means the text, whatever standard_conforming_strings says, and whatever it stands behind."""
    escaped = text.replace("'", "''").replace("\\", "\\\\")
    return f" E'{escaped}'"


def _shortened(name: str) -> str:
    data = name.encode("utf-8", "surrogateescape")
    return name if len(data) <= 63 else data[:63].decode("utf-8", "ignore")


def cut(text: str) -> Cut:
    literals: list[Literal] = []
    pieces: list[str] = []
    is_odd = False
    position = 0
    for found in _CUT.finditer(text):
        kind = found.lastgroup
        if kind == "number":
            literals.append(Literal("n", found[0]))
            mark = "\x01n"
        elif kind == "string" or kind == "dollar":
            start = found.start()
            before = text[start - 1] if start else " "
            literals.append(string_of(found[0] if before not in _PREFIXES else _with_prefix(text, start, found[0])))
            mark = "\x01s"
        else:
            is_odd = is_odd or kind == "odd"
            continue
        pieces.append(text[position : found.start()])
        pieces.append(mark)
        position = found.end()
    pieces.append(text[position:])
    return Cut("".join(pieces), tuple(literals), is_odd)


_PREFIXES: Final = frozenset("eEbBxXnN&")
_PREFIX: Final = re.compile(rf"{_NO_WORD}(?:[eEbBxXnN]|[uU]&)\Z")


def _with_prefix(text: str, start: int, token: str) -> str:
    """E'…' and the like: the letter stays in the shape."""
    found = _PREFIX.search(text, max(0, start - 3), start)
    return token if found is None else found[0] + token


def tokens(text: str) -> Iterator[Token]:
    """Every token but white space and comments. Literals count as in `cut`."""
    literal = 0
    for found in _TOKEN.finditer(text):
        kind = found.lastgroup or ""
        if kind == "space":
            continue
        if kind == "tag":
            kind = "string"
        if kind in ("string", "number"):
            yield Token(kind, found[0], found.start(), found.end(), literal)
            literal += 1
        else:
            yield Token(kind, found[0], found.start(), found.end())


_ONE_STRING: Final = re.compile(_STRING)
_ONE_ESCAPED: Final = re.compile(_ESCAPED, re.DOTALL)
_ESCAPE: Final = re.compile(
    r"\\(?:([0-7]{1,3})|x([0-9a-fA-F]{1,2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL
)
_SIMPLE: Final = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


def string_of(token: str) -> Literal:
    """The value of a string token."""
    first = token[0]
    if first == "'":
        if token.count("'") == 2:
            return Literal("s", token[1:-1])
        return Literal("s", "".join(part[1:-1].replace("''", "'") for part in _ONE_STRING.findall(token)))
    if first == "$":
        length = token.index("$", 1) + 1
        return Literal("s", token[length:-length])
    if first in "eE":
        return _unescaped(token)
    return Literal("o", token)


def _unescaped(token: str) -> Literal:
    """Escapes that make bytes rather than characters may be any encoding's: of those no key is read."""
    is_plain = True

    def value(found: re.Match[str]) -> str:
        nonlocal is_plain
        octal, hexadecimal, short, long, other = found.groups()
        if other is not None:
            return _SIMPLE.get(other, other)
        code = int(octal, 8) if octal else int(hexadecimal or short or long, 16)
        is_plain = is_plain and 0 < code < 128
        return chr(code) if code < 0x110000 else ""

    inner = (part[1:-1] for part in _ONE_ESCAPED.findall(token))
    text = "".join(_ESCAPE.sub(value, part.replace("''", "'")) for part in inner)
    return Literal("s", text) if is_plain else Literal("o", token)


_HINT: Final = re.compile(r"/\*\s*shardmove:(.*?)\*/", re.DOTALL)
_SETTING: Final = re.compile(r"\s*(key|keyspace)\s*=\s*(?:'((?:[^']|'')*)'|([^\s,;']+))\s*,?")


def hint_settings(comment: str) -> dict[str, str] | None:
    """`key` and `keyspace` of a comment `/* shardmove: key=… */`; None where it is none, {} where it is unreadable."""
    found = _HINT.fullmatch(comment)
    if found is None:
        return None
    settings: dict[str, str] = {}
    position, text = 0, found[1].rstrip()
    while position < len(text):
        setting = _SETTING.match(text, position)
        if setting is None:
            return {}
        settings[setting[1]] = setting[2].replace("''", "'") if setting[2] is not None else setting[3]
        position = setting.end()
    return settings


def outer_comments(text: str) -> Iterator[str]:
    """The comments before the first token and after the last."""
    found_tokens = list(_TOKEN.finditer(text))
    for side in (found_tokens, reversed(found_tokens)):
        for found in side:
            if found.lastgroup != "space":
                if found[0] == ";":
                    continue
                break
            if found[0].startswith("/*"):
                yield found[0]
