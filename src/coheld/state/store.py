"""The file of a state: one generation of it, beside the file of the resource.

    <resource's file>~<offset of its cell>.<generation>

slots.py says what is in it, and _state.h who may write what, and when; header and schema never change.  Nothing that is
read here is trusted before it was checked.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from .. import native
from ..backends import files
from ..errors import IncompatibleError
from .slots import (
    BEGIN,
    CHECK,
    CHECKED,
    HEAD,
    MAPPED,
    SHORT,
    CheckedFile,
    Entry,
    Head,
    MappedFile,
    StateFile,
    TornError,
    aligned,
    damaged,
    slot_size,
)

_PATIENCE = 8
"""Looks in a row that a reader may find overtaken, before it gives way in between."""
_DOUBTS = 8
"""Looks that may fail although nothing was committed meanwhile, before that is taken for damage: what another core has
stored may be on its way."""
_DOUBT = 0.001
_PAGE = 4096
_KINDS = (CHECKED,) if native.missing else (CHECKED, MAPPED)


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


def path_of(resource: str, offset: int, generation: int) -> str:
    return f"{resource}~{offset}.{generation}"


def consistently(word: Callable[[], int], copied: Callable[[int], T], give_way: Callable[[], object]) -> tuple[int, T]:
    """What copied(word) finds under one word, and the word; give_way() is called where many looks were overtaken.

    Raises: FileNotFoundError, TornError: what copied() raises while the word stays: the state is damaged.
    """
    tries = doubts = 0
    while True:
        before = word()
        try:
            found = copied(before)
        except (FileNotFoundError, TornError):
            if word() == before:
                doubts += 1
                if doubts > _DOUBTS:
                    raise
                time.sleep(_DOUBT)
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
        if not _is_of(head, identity, generation):
            raise IncompatibleError(f"{path} is the state of another resource", resource=path)
        return _file_of(path, fd, head)
    finally:
        os.close(fd)


def _is_of(head: Head, identity: tuple[int, int], generation: int) -> bool:
    """On a disk a state outlives a restart, after which the disk may have another number."""
    device = head.device if head.magic == CHECKED else identity[0]
    return (head.device, head.inode, head.generation) == (device, identity[1], generation)


def _file_of(path: str, fd: int, head: Head) -> StateFile:
    """The descriptor stays the caller's."""
    if head.magic == CHECKED:
        return CheckedFile(path, head)
    segment = native.Segment(os.dup(fd), head.size, head.size)
    segment.close()
    return MappedFile(path, head, segment)


def _head_of(path: str, fd: int) -> Head:
    raw = os.read(fd, BEGIN)
    if len(raw) < BEGIN or raw[:8] not in _KINDS:
        raise damaged(path, "it does not begin as one")
    head = Head(*HEAD.unpack_from(raw))
    record = os.read(fd, head.schema) if head.schema <= 1 << 24 else b""
    if CHECK.unpack_from(raw, HEAD.size)[0] != zlib.crc32(raw[: HEAD.size] + record):
        raise damaged(path, "the checksum of its header is wrong")
    if head.layout != native.LAYOUT_VERSION:
        raise IncompatibleError(f"{path} has layout {head.layout}, here {native.LAYOUT_VERSION}", resource=path)
    slot = slot_size(head.magic, head.count)
    fits = BEGIN + head.schema <= head.first <= head.first + slot <= head.second <= head.second + slot <= head.heap
    if not fits or head.heap > head.size or head.first != aligned(head.first) or head.second != aligned(head.second):
        raise damaged(path, "its parts do not lie in it")
    if os.fstat(fd).st_size < head.size:
        raise damaged(path, "it was cut")
    return Head(**{**vars(head), "record": record})


def made(
    resource: str,
    identity: tuple[int, int],
    offset: int,
    word: int,
    record: bytes,
    fields: Sequence[tuple[int, bytes]],
    former: int,
    magic: bytes,
) -> StateFile:
    """A new generation with these stamps and bytes in the slot that the word, which nobody knows yet, names live.
    former: bytes of the heap that was too small.  magic: the kind of file.

    Raises: OSError: if there is no room for it; nothing has changed.
    """
    generation = generation_of(word)
    head = _laid_out(identity, generation, record, [raw for _, raw in fields], former, magic)
    path = path_of(resource, offset, generation)
    with files.new_file(os.path.dirname(resource), head.size, head) as (aside, fd):
        try:
            state = _file_of(aside, fd, head)
        finally:
            os.close(fd)  # not every system gives a new name to a file that is open
        state.put_entries(word, _stored(state, fields))
        os.replace(aside, path)
        state.path = path
    return state


def _laid_out(
    identity: tuple[int, int], generation: int, record: bytes, raws: Sequence[bytes], former: int, magic: bytes
) -> Head:
    """Room for what is stored, for as much again, which the next commit writes beside it, and some to grow.  What lies
    between two places may be too small for a third: so never less than before, or the same need would come back."""
    slot = slot_size(magic, len(raws))
    first = aligned(BEGIN + len(record))
    heap = first + 2 * slot
    stored = sum(aligned(len(raw)) for raw in raws if len(raw) > SHORT)
    size = -(-(heap + max(2 * stored + stored // 2, former + former // 4)) // _PAGE) * _PAGE
    return Head(
        magic,
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
        entries.append(state.store(stamp, raw, begin))
        if len(raw) > SHORT:
            begin = aligned(begin + len(raw))
    return entries


def remove(resource: str, offset: int, generation: int) -> None:
    """Remove a generation of a cell's state, and those before it that a killed owner has left: not by a look at the
    directory, which may hold the states of many.  One that somebody has just open may stay, where that is so."""
    with suppress(FileNotFoundError, *[PermissionError] if files.IN_USE_STAYS else []):
        for number in range(generation, 0, -1):
            os.unlink(path_of(resource, offset, number))
