"""Of which class the objects are whose anonymous locks are in a file of cells: shown to who looks, used by nobody.

The names stand in the page of the file's header, behind that, and each cell has the number of its own; 0: it has none.
A name is written once, by the process that makes the locks, before a cell has its number.
"""

from __future__ import annotations

from itertools import count
from typing import Any

from ..process import printable

_FIRST, _SIZE, _MOST = 512, 64, 56


class Classes:
    """Of one file, by the process that makes its locks; any of its threads, and a handler in the middle of that."""

    def __init__(self, memory: Any) -> None:
        self._memory = memory
        self._numbers: dict[tuple[str, str], int] = {}
        self._next = count(1)

    def number(self, cls: type) -> int:
        """0: others have all the room."""
        name = cls.__module__, cls.__qualname__
        try:
            return self._numbers.get(name) or self._add(name)
        except TypeError:  # a module's name may be anything
            return 0

    def _add(self, name: tuple[str, str]) -> int:
        """Two that add the same name at once have two numbers for it, of which both are right."""
        if len(self._numbers) >= _MOST or (number := next(self._next)) > _MOST:
            return 0
        at = _FIRST + (number - 1) * _SIZE
        self._memory[at : at + _SIZE] = ".".join(name).encode(errors="replace")[-_SIZE:].ljust(_SIZE, b"\0")
        return self._numbers.setdefault(name, number)


def name_in(raw: bytes, number: int) -> str:
    """In a file that begins so, for display: in one line; empty where there is none."""
    at = _FIRST + (number - 1) * _SIZE
    return printable(raw[at : at + _SIZE].rstrip(b"\0").decode(errors="ignore")) if 1 <= number <= _MOST else ""
