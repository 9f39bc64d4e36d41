"""A value of a shared field for who does not know its type."""

from __future__ import annotations

from typing import Any

import msgspec

from .slots import UNDECODABLE

_FIXED = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8}
_FIXED |= {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_FIXED |= {0xD4: 2, 0xD5: 3, 0xD6: 5, 0xD7: 9, 0xD8: 17}
"""How many bytes come after these first ones."""
_COUNTED = {0xC4: (1, 0), 0xC5: (2, 0), 0xC6: (4, 0), 0xC7: (1, 1), 0xC8: (2, 1), 0xC9: (4, 1)}
_COUNTED |= {0xD9: (1, 0), 0xDA: (2, 0), 0xDB: (4, 0)}
"""The size of the number that says how many, and how many more."""
_ARRAYS, _MAPS = {0xDC: 2, 0xDD: 4}, {0xDE: 2, 0xDF: 4}
"""The size of the number of items."""


class Pairs(list[tuple[Any, Any]]):
    """The items of a map that no dict can be: its keys are records, or have some in them."""

    def __repr__(self) -> str:
        return f"{{{', '.join(f'{key!r}: {value!r}' for key, value in self)}}}"


def decoded(raw: bytes) -> Any:
    """A record is a dict or a list of its fields, a set is a list. Raises: UNDECODABLE: if it is no value."""
    try:
        return msgspec.msgpack.decode(raw)
    except UNDECODABLE:  # among them: keys that are no keys for Python
        walk = _Walk(raw)
        value = walk.value()
        if walk.at != len(raw):
            raise ValueError(f"there are {len(raw)} bytes, and the value has {walk.at}") from None
        return value


class _Walk:
    """Over MessagePack, with maps of any keys."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 0

    def number(self, size: int) -> int:
        self.at += size
        return int.from_bytes(self.raw[self.at - size : self.at], "big")

    def value(self, key: bool = False) -> Any:
        """The next one.  key: of a map, where an array is a tuple."""
        begin, first = self.at, self.number(1)
        if 0x80 <= first <= 0x8F or first in _MAPS:
            return self.items(self.number(_MAPS[first]) if first in _MAPS else first & 0x0F)
        if 0x90 <= first <= 0x9F or first in _ARRAYS:
            count = self.number(_ARRAYS[first]) if first in _ARRAYS else first & 0x0F
            array = [self.value(key) for _ in range(count)]
            return tuple(array) if key else array
        if 0xA0 <= first <= 0xBF:
            self.at += first & 0x1F
        elif first in _COUNTED:
            size, more = _COUNTED[first]
            length = self.number(size)
            self.at += length + more
        else:
            self.at += _FIXED.get(first, 0)
        return msgspec.msgpack.decode(self.raw[begin : self.at])

    def items(self, count: int) -> dict[Any, Any] | Pairs:
        pairs = [(self.value(key=True), self.value()) for _ in range(count)]
        try:
            return dict(pairs)
        except TypeError:
            return Pairs(pairs)
