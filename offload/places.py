"""Where the keys of a TOML file stand: line and column, which tomllib does not say.

A scan for text that tomllib has read without complaint: it follows headers, dotted keys and inline
tables, and steps over strings, arrays and comments.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

_TOKEN: Final = re.compile(
    r'"""(?:\\.|[^\\])*?"""+'
    r"|'''.*?'''+"
    r'|"(?:\\.|[^"\\])*"'
    r"|'[^']*'"
    r"|\#[^\n]*"
    r"|[\[\]{}=,\n]"
    r"""|[^\s"'#\[\]{}=,]+""",
    re.DOTALL,
)
_SYNTAX: Final = re.compile(r"(?P<what>.*) \(at line (?P<line>\d+), column (?P<column>\d+)\)")


class Place(NamedTuple):
    """A piece of one line.

    Attributes:
        line: From 1.
        column: In characters, from 1.
        length: In characters, at least 1.
    """

    line: int
    column: int
    length: int


class Entry(NamedTuple):
    """Where a key stands, and where its value does. For the header of a table both are its name."""

    key: Place
    value: Place


def entries(text: str) -> dict[str, Entry]:
    """Every header and every key, by its full name (`memory.gpu`), and the tables they imply.

    Args:
        text: TOML without mistakes. What its arrays hold has no name, and is left out.
    """
    scan = _Scan(text)
    for token in _TOKEN.finditer(text + "\n"):  # the end of the last line
        if not token[0].startswith("#"):
            scan.take(token)
    return scan.found


def place_of_mistake(message: str, text: str) -> tuple[str, Place]:
    """What tomllib says of text that is not TOML, and where.

    Args:
        message: Of its error. Without a line and a column it means the end of the text.
        text: What it was given.
    """
    found = _SYNTAX.fullmatch(message)
    if found is None:
        return message, _place(text, len(text.rstrip()), len(text.rstrip()))
    return found["what"], Place(int(found["line"]), int(found["column"]), 1)


def excerpt(text: str, place: Place) -> str:
    """The line of a place, its number before it and carets below: two lines of text."""
    lines = text.split("\n")
    line = lines[place.line - 1].rstrip() if place.line <= len(lines) else ""
    # A file that is not TOML may hold anything, also what a terminal obeys. A tab is one column.
    shown = "".join(c if c.isprintable() else " " for c in line)
    number = str(place.line)
    carets = " " * (place.column - 1) + "^" * place.length
    return f"  {number} | {shown}\n  {' ' * len(number)} | {carets}"


class _Scan:
    """What has been read so far, token by token."""

    def __init__(self, text: str) -> None:
        self.found: dict[str, Entry] = {}
        self._text = text
        self._table = ""  # of the last header
        self._open: list[str | None] = []  # the key of each inline table, None for an array
        self._words: list[re.Match[str]] = []  # of a key or a header
        self._reads = self._key
        self._name = ""

    def take(self, token: re.Match[str]) -> None:
        self._reads(token)

    def _key(self, token: re.Match[str]) -> None:
        sign = token[0]
        if sign == "=":
            self._name = self._note((self._open[-1] if self._open else self._table) or "")
            self._reads = self._value
        elif sign == "[":
            self._reads = self._header
        elif sign == "}":
            self._close()
        elif sign not in ("\n", ","):
            self._words.append(token)

    def _header(self, token: re.Match[str]) -> None:
        if token[0] == "\n":
            self._table = self._note("")
            self._reads = self._key
        elif token[0] not in ("[", "]"):
            self._words.append(token)

    def _value(self, token: re.Match[str]) -> None:
        """The first token of a value."""
        if self._name:
            place = _place(self._text, token.start(), token.end())
            self.found[self._name] = self.found[self._name]._replace(value=place)
        self._reads = self._rest
        if token[0] == "{":
            self._open.append(self._name)
            self._reads = self._key
        elif token[0] == "[":
            self._open.append(None)

    def _rest(self, token: re.Match[str]) -> None:
        """What follows in a value: the end of its line, of its table, or more of its array."""
        sign = token[0]
        in_array = bool(self._open) and self._open[-1] is None
        if sign in ("]", "}"):
            self._close()
        elif in_array and sign in ("[", "{"):
            self._name = ""
            self._value(token)
        elif not in_array and sign == ("," if self._open else "\n"):
            self._reads = self._key

    def _close(self) -> None:
        self._open.pop()
        self._reads = self._rest

    def _note(self, above: str) -> str:
        """Files the words read under their full name, and returns it; nothing within an array."""
        words, self._words = self._words, []
        if None in self._open:
            return ""
        place = _place(self._text, words[0].start(), words[-1].end())
        name = above
        for part in "".join(word[0].strip("\"'") for word in words).split("."):
            name = f"{name}.{part}" if name else part
            self.found.setdefault(name, Entry(place, place))
        return name


def _place(text: str, start: int, stop: int) -> Place:
    begin = text.rfind("\n", 0, start) + 1
    end = text.find("\n", start)
    stop = min(stop, end) if end >= 0 else stop
    return Place(text.count("\n", 0, start) + 1, start - begin + 1, max(1, stop - start))
