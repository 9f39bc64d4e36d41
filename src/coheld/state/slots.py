"""One generation of a state as its bytes: a header, the schema, two slots of entries, and a heap for what is too long
for an entry.

A file beside a native cell is mapped, and whoever reads it does so by the rules of _state.h.  One beside a cell of
Python is a CheckedFile: it is read and written by calls, and a reader believes what its checksums confirm.
"""

from __future__ import annotations

import os
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ..backends import files
from ..errors import IncompatibleError

MAPPED, CHECKED = b"\x93coheldS", b"\x93coheldC"
"""How a file begins, by its kind."""
SHORT = 20
ENTRY = struct.Struct("=QI20s")
HEAD = struct.Struct("=8sIIQQQQIQQQ")
CHECK = struct.Struct("=I")
BEGIN = HEAD.size + CHECK.size
_PLACE = struct.Struct("=Q")
_CHECKED_PLACE = struct.Struct("=QI")
_SUM = struct.Struct("=Q")
_ALIGN = 8
_schema_of = msgspec.msgpack.Decoder(list[tuple[str, str]]).decode

UNDECODABLE = (ValueError, TypeError, RecursionError, msgspec.MsgspecError)
"""What msgspec raises for bytes that are not what they should be, its own or Python's."""


class TornError(Exception):
    """What was read makes no sense: it was overwritten meanwhile, or is damaged."""


@dataclass(frozen=True)
class Entry:
    """One field in a slot: the number of the commit that wrote it, its length, and its bytes or their place."""

    stamp: int
    length: int
    data: bytes

    @property
    def place(self) -> tuple[int, int]:
        """Where in the heap it begins and ends; (0, 0): nowhere."""
        if self.length <= SHORT:
            return 0, 0
        begin: int = _PLACE.unpack_from(self.data)[0]
        return begin, begin + self.length

    def pack(self) -> bytes:
        return ENTRY.pack(self.stamp, self.length, self.data)


@dataclass(frozen=True)
class Head:
    """What a file says of itself.  device, inode, offset: whose state it is."""

    magic: bytes
    layout: int
    count: int
    generation: int
    size: int
    device: int
    inode: int
    schema: int
    first: int
    second: int
    heap: int
    record: bytes = b""

    def pack(self) -> bytes:
        fields = HEAD.pack(*(getattr(self, name) for name in list(Head.__dataclass_fields__)[:-1]))
        return fields + CHECK.pack(zlib.crc32(fields + self.record)) + self.record


def slot_size(magic: bytes, count: int) -> int:
    """Of a slot with so many entries, bytes."""
    return count * ENTRY.size + _SUM.size * (magic == CHECKED)


def aligned(place: int) -> int:
    """The next place where an entry, or a value in the heap, may begin."""
    return -(-place // _ALIGN) * _ALIGN


class StateFile(ABC):
    """One generation of a state."""

    def __init__(self, path: str, head: Head) -> None:
        self.path, self.head = path, head
        self.slots = head.first, head.second
        try:
            self.fields = dict(_schema_of(head.record))
        except UNDECODABLE as error:
            raise damaged(path, f"its schema: {error}") from None
        if len(self.fields) != head.count:
            raise damaged(path, "its schema names other fields than it has")

    @abstractmethod
    def entries(self, word: int) -> Sequence[Entry]:
        """Those of the slot that the word names. Raises: TornError, FileNotFoundError."""

    @abstractmethod
    def confirm(self, word: int, entries: Sequence[Entry]) -> None:
        """The word is there, and names these."""

    @abstractmethod
    def put(self, begin: int, raw: bytes) -> None:
        """By the owner: these bytes, there."""

    @abstractmethod
    def placed(self, stamp: int, raw: bytes, begin: int) -> Entry:
        """The entry of a value in the heap."""

    @abstractmethod
    def _seal(self, word: int, raw: bytes) -> bytes:
        """What stands behind these entries in a slot."""

    @abstractmethod
    def _read(self, entry: Entry) -> bytes:
        """The bytes in the heap. Raises: TornError, FileNotFoundError."""

    def put_entries(self, word: int, entries: Iterable[Entry]) -> None:
        """By the owner: into the slot that the word, which is not there yet, will name."""
        raw = b"".join(entry.pack() for entry in entries)
        self.put(self.slots[word & 1], raw + self._seal(word, raw))

    def raw(self, entry: Entry) -> bytes:
        """The bytes of an entry. Raises: TornError: if they lie nowhere."""
        if 0 < entry.length <= SHORT:
            return entry.data[: entry.length]
        begin, end = entry.place
        if not self.head.heap <= begin < end <= self.head.size:
            raise TornError(f"{self.path}: an entry of {entry.length} bytes at {begin} lies outside of the heap")
        return self._read(entry)

    def store(self, stamp: int, raw: bytes, begin: int) -> Entry:
        """By the owner: the entry of a value, which is put into the heap there if it is too long for the entry."""
        if len(raw) <= SHORT:
            return Entry(stamp, len(raw), raw)
        self.put(begin, raw)
        return self.placed(stamp, raw, begin)

    def room_for(self, live: Iterable[Entry], raws: Sequence[bytes]) -> list[int] | None:
        """Places for these bytes that do not touch what is live: first fit. None: they do not all fit."""
        taken = sorted(entry.place for entry in live if entry.length > SHORT)
        places: list[int] = []
        for raw in raws:
            begin = self.head.heap
            for low, high in taken:
                if begin + len(raw) <= low:
                    break
                begin = max(begin, aligned(high))
            if begin + len(raw) > self.head.size:
                return None
            places.append(begin)
            taken = sorted([*taken, (begin, begin + len(raw))])
        return places


class MappedFile(StateFile):
    """Beside a native cell."""

    def __init__(self, path: str, head: Head, segment: Any) -> None:
        super().__init__(path, head)
        self.segment = segment
        self.memory = memoryview(segment)

    def entries(self, word: int) -> Sequence[Entry]:
        begin = self.slots[word & 1]
        raw = bytes(self.memory[begin : begin + self.head.count * ENTRY.size])
        return [Entry(*one) for one in ENTRY.iter_unpack(raw)]

    def confirm(self, word: int, entries: Sequence[Entry]) -> None:
        """It is looked at again."""

    def put(self, begin: int, raw: bytes) -> None:
        self.memory[begin : begin + len(raw)] = raw

    def placed(self, stamp: int, raw: bytes, begin: int) -> Entry:
        return Entry(stamp, len(raw), _PLACE.pack(begin))

    def _seal(self, word: int, raw: bytes) -> bytes:
        return b""

    def _read(self, entry: Entry) -> bytes:
        begin, end = entry.place
        return bytes(self.memory[begin:end])


class CheckedFile(StateFile):
    """Beside a cell of Python, which has no fences: what is copied without the lock may be a mixture of several
    commits, and the word may say nothing of it.  So

        a slot      ends in a checksum of its entries, of the word that names it live, and of the file's header
        an entry    that leads to the heap has a checksum of the bytes there

    and what a reader accepts under a word is what that commit has stored, but for one mixture in 2**32.  Nothing is
    assumed of the order in which stores become visible, but that they do, within some milliseconds: store.consistently
    takes no earlier look for damage.  A machine of 32 bits may store the word itself in halves: none fits what is half
    another.  What was confirmed once stays right: a word names one commit for ever.

    Between owners there is order: the lock of a file is given and taken by the kernel.
    tests/models/checked_model.py searches this, on a machine that orders nothing else.

    The file is opened for each look and each change, which is cheap beside taking the lock.  So an object with shared
    state keeps no descriptor, and the file can be replaced and removed also where one that is mapped cannot.
    """

    def __init__(self, path: str, head: Head) -> None:
        super().__init__(path, head)
        self.begins = head.pack()
        self._seed = zlib.crc32(self.begins)
        self._known: tuple[int, Sequence[Entry]] = (-1, ())  # of the last word that was looked at

    def entries(self, word: int) -> Sequence[Entry]:
        known = self._known
        if known[0] == word:
            return known[1]
        found = self._copied(self.slots[word & 1], self.head.count * ENTRY.size + _SUM.size)
        raw, seal = found[: -_SUM.size], found[-_SUM.size :]
        if seal != self._seal(word, raw):
            raise TornError(f"{self.path}: the checksum of a slot is wrong")
        entries = [Entry(*one) for one in ENTRY.iter_unpack(raw)]
        self.confirm(word, entries)
        return entries

    def confirm(self, word: int, entries: Sequence[Entry]) -> None:
        self._known = word, entries

    def put(self, begin: int, raw: bytes) -> None:
        """Raises: FileNotFoundError: if the file has gone, or is another by now."""
        fd = files.open_checked(self.path)
        try:
            if os.read(fd, len(self.begins)) != self.begins:
                raise FileNotFoundError(2, "the state is gone, and there is another one's", self.path)
            os.lseek(fd, begin, os.SEEK_SET)
            rest = memoryview(raw)
            while rest:
                rest = rest[os.write(fd, rest) :]
        finally:
            os.close(fd)

    def placed(self, stamp: int, raw: bytes, begin: int) -> Entry:
        return Entry(stamp, len(raw), _CHECKED_PLACE.pack(begin, zlib.crc32(raw)))

    def _read(self, entry: Entry) -> bytes:
        begin, checksum = _CHECKED_PLACE.unpack_from(entry.data)
        raw = self._copied(begin, entry.length)
        if zlib.crc32(raw) != checksum:
            raise TornError(f"{self.path}: the checksum of a value is wrong")
        return raw

    def _copied(self, begin: int, length: int) -> bytes:
        fd = files.open_checked(self.path)
        try:
            os.lseek(fd, begin, os.SEEK_SET)
            raw = os.read(fd, length)
            while len(raw) < length and (more := os.read(fd, length - len(raw))):
                raw += more
        finally:
            os.close(fd)
        if len(raw) < length:
            raise TornError(f"{self.path}: it was cut")
        return raw

    def _seal(self, word: int, raw: bytes) -> bytes:
        return _SUM.pack(zlib.crc32(raw, zlib.crc32(_SUM.pack(word), self._seed)))


def damaged(path: str, why: str) -> IncompatibleError:
    return IncompatibleError(
        f"{path} is no state of coheld, or damaged: {why}; if nobody uses the resource, remove it", resource=path
    )
