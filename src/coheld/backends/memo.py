"""What the processes of a host know of the grant that one of them has: a file beside the local lock of the resource.

Only the owner of the local lock writes it (others look who has it); who renews the lease does so under the guard of
Away, while its process is that owner.  A word is written as a whole.  A death between two of them:

    valid       goes down first and up last: HELD alone is a grant to pass on; else the next owner asks the store.
                LEAVING: the owner has it, and is giving it back
    asked       the nonce may be the store's last one, and who asked for it was killed: the next owner asks with it
                again, and need not wait for the end of a lease that nobody has
    version     UNKNOWN before the store is told of a change, and the number of it once the local state has it: in
                between, the next owner has the state sent again
    passes      goes up before the body that has this number begins: no two owners have one token

It is of one boot: the clock of `until` begins anew with the next.
"""

from __future__ import annotations

import functools
import mmap
import os
import struct
import time
import zlib
from contextlib import suppress
from typing import Any

from .. import native
from . import files
from .store import UNKNOWN, Known

_SIZE = 4096
_MAGIC = 0x6F6D654D_65686F63
_FIRST_WORDS = struct.Struct("=3q")
HELD, LEAVING = 1, 2
MOST_PASSES = (1 << 12) - 1
"""Of one grant: the low bits of a token."""
LONGEST_STAY = 0.1
"""For how long a grant passes among the processes of one host before the others may have it, seconds."""


def _mapped(fd: int) -> memoryview:
    """The descriptor stays the caller's."""
    if native.missing:
        return memoryview(mmap.mmap(fd, _SIZE))  # which keeps a file open for as long: as the local lock does
    segment = native.Segment(os.dup(fd), _SIZE, _SIZE)
    segment.close()
    return memoryview(segment)  # type: ignore[arg-type]  # a buffer, from 3.12 on


def path_beside(path: str, inode: int) -> str:
    """Of the memo of the lock in that file."""
    return f"{path}~grant.{inode}"


def is_here(path: str) -> bool:
    """Has this host the grant?  By anybody, who maps nothing, as the memo there says."""
    with suppress(OSError, struct.error), files.open_to_look(path) as file:
        magic, boot, valid = _FIRST_WORDS.unpack(file.read(_FIRST_WORDS.size))
        return bool(magic == _MAGIC and boot == _boot() and valid)
    return False


@functools.cache
def _boot() -> int:
    return zlib.crc32(files.boot_id())


class _Word:
    def __init__(self, index: int) -> None:
        self.index = index

    def __get__(self, memo: Memo, _owner: Any = None) -> Any:
        return memo.words[self.index]

    def __set__(self, memo: Memo, value: int) -> None:
        memo.words[self.index] = value


class Memo:
    """It, mapped."""

    magic, boot, valid, token, passes = map(_Word, range(5))
    until, since, created, recovers, asked = map(_Word, range(5, 10))
    _version = _Word(10)

    def __init__(self, path: str) -> None:
        """By the owner: it is made if it is missing, or not of this boot."""
        self._map(files.open_or_create(path))
        if not self._is_of_this_boot():
            self.valid = self.asked = 0
            self._version = UNKNOWN
            self.magic, self.boot = _MAGIC, _boot()

    @classmethod
    def seen(cls, path: str) -> Memo | None:
        """By anybody, to look at; None: there is none of this boot."""
        memo = cls.__new__(cls)
        try:
            memo._map(files.open_checked(path))
        except FileNotFoundError:
            return None
        return memo if memo._is_of_this_boot() else None

    def _map(self, fd: int) -> None:
        """It takes the descriptor."""
        try:
            if os.fstat(fd).st_size < _SIZE:
                os.ftruncate(fd, _SIZE)
            self.map = _mapped(fd)
        finally:
            os.close(fd)
        self.words = self.map.cast("q")

    def _is_of_this_boot(self) -> bool:
        return bool(self.magic == _MAGIC and self.boot == _boot())

    @property
    def nonce(self) -> bytes:
        return bytes(self.map[128:144])

    @property
    def known(self) -> Known:
        """The state that the local one is a copy of."""
        version = self._version
        return Known(bytes(self.map[144:160]), version) if version != UNKNOWN else Known()

    def mirrors(self, known: Known) -> None:
        """The local state is a copy of that from here on."""
        self._version = UNKNOWN
        self.map[144:160] = known.incarnation.ljust(16, b"\0")
        self._version = known.version

    def forget_state(self) -> None:
        """Nobody knows what the local state is a copy of."""
        self._version = UNKNOWN

    def ask(self) -> bytes:
        """The nonce to ask with."""
        self.valid = 0
        if not self.asked:
            self.map[128:144] = os.urandom(16)
            self.asked = 1
        return self.nonce

    def begin(self, token: int, until: float) -> None:
        """What was asked for is this host's."""
        self.token, self.passes, self.since = token, 0, time.monotonic_ns()
        self.until = int(until * 1e9)
        self.valid = HELD

    def pause(self) -> None:
        """It goes back: who is killed before the store has answered leaves nobody believing that it is still here."""
        self.valid = LEAVING

    def end(self) -> None:
        """It is not, any more."""
        self.valid = self.asked = 0

    def passes_on(self, lease: float) -> bool:
        """Is there a grant that can be had without the store being asked, with what it guards?"""
        left = self.until - time.monotonic_ns()
        return bool(
            self.valid == HELD and self._version != UNKNOWN and self.passes < MOST_PASSES and left > lease * 0.5e9
        )

    def is_kept(self, nonce: bytes, passes: int) -> bool:
        """Is it that grant, which nobody here has taken since that pass?"""
        return bool(self.valid == HELD and self.nonce == nonce and self.passes == passes)

    def may_stay(self, lease: float) -> bool:
        """Can it be left for the next of this host?"""
        return self.passes_on(lease) and time.monotonic_ns() - self.since < LONGEST_STAY * 1e9
