"""The file of a state: one generation of it, beside the file of the resource.

    <resource's file>~<offset of its cell>.<generation>

A header, the schema, two slots of entries, and a heap for what is too long for an entry.  _state.h says who may write
what, and when; header and schema never change.  Nothing that is read here is trusted before it was checked.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from .. import native
from ..backends import files
from ..errors import IncompatibleError

MAGIC = b"\x93coheldS"
SHORT = 20
ENTRY = struct.Struct("=QI20s")
_PLACE = struct.Struct("=Q")
_HEAD = struct.Struct("=8sIIQQQQIQQQ")
_CHECK = struct.Struct("=I")
_BEGIN = _HEAD.size + _CHECK.size
_PATIENCE = 8
"""Looks in a row that a reader may find overtaken, before it gives way in between."""
_ALIGN = 8
_PAGE = 4096
_schema_of = msgspec.msgpack.Decoder(list[tuple[str, str]]).decode


def number_of(word: int) -> int:
    """Of the commit that the word of a cell speaks of."""
    return word & ((1 << 48) - 1)


def generation_of(word: int) -> int:
    """Of the file that it is in; 0: there is none."""
    return word >> 49


def is_made(word: int) -> bool:
    """Has __create__ returned, and was its state committed?"""
    return bool(word >> 48 & 1)


def next_word(word: int, made: bool, grown: bool = False) -> int:
    """The word of the next commit."""
    return (word + 1 | made << 48) + (grown << 49)


GENERATIONS = (1 << 15) - 1
"""How many a word can count.  Each is a quarter larger than the one before, at least: there are never so many."""

T = TypeVar("T")

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


def short(stamp: int, raw: bytes) -> Entry:
    return Entry(stamp, len(raw), raw)


def long(stamp: int, raw: bytes, begin: int) -> Entry:
    return Entry(stamp, len(raw), _PLACE.pack(begin))


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
        fields = _HEAD.pack(*(getattr(self, name) for name in list(Head.__dataclass_fields__)[:-1]))
        return fields + _CHECK.pack(zlib.crc32(fields + self.record)) + self.record


def path_of(resource: str, offset: int, generation: int) -> str:
    return f"{resource}~{offset}.{generation}"


class StateFile:
    """One generation of a state, mapped."""

    def __init__(self, path: str, segment: Any, head: Head) -> None:
        self.path, self.head = path, head
        self.segment = segment
        self.memory = memoryview(segment)
        self.slots = head.first, head.second
        try:
            self.fields = dict(_schema_of(head.record))
        except UNDECODABLE as error:
            raise _damaged(path, f"its schema: {error}") from None
        if len(self.fields) != head.count:
            raise _damaged(path, "its schema names other fields than it has")

    def entries(self, slot: int) -> list[Entry]:
        begin = self.slots[slot]
        raw = bytes(self.memory[begin : begin + self.head.count * ENTRY.size])
        return [Entry(*one) for one in ENTRY.iter_unpack(raw)]

    def raw(self, entry: Entry) -> bytes:
        """The bytes of an entry. Raises: TornError: if they lie nowhere."""
        if 0 < entry.length <= SHORT:
            return entry.data[: entry.length]
        begin, end = entry.place
        if not self.head.heap <= begin < end <= self.head.size:
            raise TornError(f"{self.path}: an entry of {entry.length} bytes at {begin} lies outside of the heap")
        return bytes(self.memory[begin:end])

    def room_for(self, live: Iterable[Entry], raws: Sequence[bytes]) -> list[int] | None:
        """Places for these bytes that do not touch what is live: first fit. None: they do not all fit."""
        taken = sorted(entry.place for entry in live if entry.length > SHORT)
        places: list[int] = []
        for raw in raws:
            begin = self.head.heap
            for low, high in taken:
                if begin + len(raw) <= low:
                    break
                begin = max(begin, _aligned(high))
            if begin + len(raw) > self.head.size:
                return None
            places.append(begin)
            taken = sorted([*taken, (begin, begin + len(raw))])
        return places

    def put(self, begin: int, raw: bytes) -> None:
        self.memory[begin : begin + len(raw)] = raw

    def put_entries(self, slot: int, entries: Iterable[Entry]) -> None:
        self.put(self.slots[slot], b"".join(entry.pack() for entry in entries))


def consistently(word: Callable[[], int], copied: Callable[[int], T], give_way: Callable[[], object]) -> tuple[int, T]:
    """What copied(word) finds under one word, and the word; give_way() is called where many looks were overtaken.

    Raises: FileNotFoundError, TornError: what copied() raises while the word stays: the state is damaged.
    """
    tries = 0
    while True:
        before = word()
        try:
            found = copied(before)
        except (FileNotFoundError, TornError):
            if word() == before:
                raise
        else:
            if word() == before:
                return before, found
        tries += 1
        if tries >= _PATIENCE and tries % 2 == 0:
            give_way()


def opened(resource: str, identity: tuple[int, int], offset: int, generation: int) -> StateFile:
    """A generation that the word speaks of.

    Raises: FileNotFoundError: if it is there no more.  IncompatibleError: if it is damaged, or another resource's.
    """
    path = path_of(resource, offset, generation)
    fd = files.open_checked(path)
    try:
        head = _head_of(path, fd)
    except BaseException:
        os.close(fd)
        raise
    if (head.device, head.inode, head.generation) != (*identity, generation):
        os.close(fd)
        raise IncompatibleError(f"{path} is the state of another resource", resource=path)
    return _mapped(path, fd, head)


def _mapped(path: str, fd: int, head: Head) -> StateFile:
    segment = native.Segment(fd, head.size, head.size)
    segment.close()
    return StateFile(path, segment, head)


def _head_of(path: str, fd: int) -> Head:
    raw = os.read(fd, _BEGIN)
    if len(raw) < _BEGIN or raw[:8] != MAGIC:
        raise _damaged(path, "it does not begin as one")
    head = Head(*_HEAD.unpack_from(raw))
    record = os.read(fd, head.schema) if head.schema <= 1 << 24 else b""
    if _CHECK.unpack_from(raw, _HEAD.size)[0] != zlib.crc32(raw[: _HEAD.size] + record):
        raise _damaged(path, "the checksum of its header is wrong")
    if head.layout != native.LAYOUT_VERSION:
        raise IncompatibleError(f"{path} has layout {head.layout}, here {native.LAYOUT_VERSION}", resource=path)
    slot = head.count * ENTRY.size
    fits = _BEGIN + head.schema <= head.first <= head.first + slot <= head.second <= head.second + slot <= head.heap
    if not fits or head.heap > head.size or head.first % _ALIGN or head.second % _ALIGN:
        raise _damaged(path, "its parts do not lie in it")
    if os.fstat(fd).st_size < head.size:
        raise _damaged(path, "it was cut")
    return Head(**{**vars(head), "record": record})


def _damaged(path: str, why: str) -> IncompatibleError:
    return IncompatibleError(
        f"{path} is no state of coheld, or damaged: {why}; if nobody uses the resource, remove it", resource=path
    )


def made(
    resource: str,
    identity: tuple[int, int],
    offset: int,
    word: int,
    record: bytes,
    fields: Sequence[tuple[int, bytes]],
    former: int,
) -> StateFile:
    """A new generation with these stamps and bytes in the slot that the word, which nobody knows yet, names live.
    former: bytes of the heap that was too small.

    Raises: OSError: if there is no room for it; nothing has changed.
    """
    generation = generation_of(word)
    head = _laid_out(identity, generation, record, [raw for _, raw in fields], former)
    path = path_of(resource, offset, generation)
    with files.new_file(os.path.dirname(resource), head.size, head) as (aside, fd):
        state = _mapped(path, fd, head)
        state.put_entries(word & 1, _stored(state, fields))
        os.rename(aside, path)
    return state


def _laid_out(identity: tuple[int, int], generation: int, record: bytes, raws: Sequence[bytes], former: int) -> Head:
    """Room for what is stored, for as much again, which the next commit writes beside it, and some to grow.  What lies
    between two places may be too small for a third: so never less than before, or the same need would come back."""
    slot = len(raws) * ENTRY.size
    first = _aligned(_BEGIN + len(record))
    heap = first + 2 * slot
    stored = sum(_aligned(len(raw)) for raw in raws if len(raw) > SHORT)
    size = -(-(heap + max(2 * stored + stored // 2, former + former // 4)) // _PAGE) * _PAGE
    return Head(
        MAGIC,
        native.LAYOUT_VERSION,
        len(raws),
        generation,
        size,
        *identity,
        len(record),
        first,
        first + slot,
        heap,
        record,
    )


def _stored(state: StateFile, fields: Sequence[tuple[int, bytes]]) -> list[Entry]:
    entries, begin = [], state.head.heap
    for stamp, raw in fields:
        if len(raw) <= SHORT:
            entries.append(short(stamp, raw))
            continue
        state.put(begin, raw)
        entries.append(long(stamp, raw, begin))
        begin = _aligned(begin + len(raw))
    return entries


def _aligned(place: int) -> int:
    return -(-place // _ALIGN) * _ALIGN


def remove(resource: str, offset: int, generation: int) -> None:
    """Remove a generation of a cell's state, and those before it that a killed owner has left: not by a look at the
    directory, which may hold the states of many."""
    with suppress(FileNotFoundError):
        for number in range(generation, 0, -1):
            os.unlink(path_of(resource, offset, number))
