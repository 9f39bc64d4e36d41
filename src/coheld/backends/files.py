"""The files that cells live in: a directory per user, checked before anything in it is trusted.

    arena-<pid>-<start>-<random>   the anonymous locks that one process made
    name-<escaped name>            one named lock
    .new-<pid>-<start>-<random>    any of them, half made
    <one of the first two>~<offset>.<generation>    the shared state of one lock in it, see state/store.py
    stacks-<pid>-<start>           where one process shows its stacks, see stacks.py

Locks that files guard have theirs in the same directory, see file.py.

A header stands first in each file.  It is written before the file gets its name, and read before a cell is touched.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import stat
import string
import struct
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from .. import native
from ..errors import IncompatibleError, InsecureError
from ..process import start_of

MAGIC = b"\x93coheld\n"
ARENA, NAMED, SEMAPHORE = 1, 2, 3
_KINDS = {ARENA: "a place of anonymous locks", NAMED: "a lock", SEMAPHORE: "a semaphore"}
NAMED_CELL = 1024
"""Where the cell of a named lock is; an arena's begin at HEADER_SIZE."""
GATE_CELL = 1280
"""Where the second cell of a named semaphore is."""
_FIELDS = struct.Struct("<8sI8sI16s16sQ36sI255s")
_CHECK = struct.Struct("<I")
LONGEST = 255
"""Of a name, bytes."""
_SAFE = frozenset((string.ascii_letters + string.digits + "._-").encode())


@dataclass(frozen=True)
class Header:
    """What a file says of itself."""

    magic: bytes
    layout: int
    backend: bytes
    cell_size: int
    libc: bytes
    machine: bytes
    pid_namespace: int
    boot: bytes
    kind: int
    name: bytes

    def pack(self) -> bytes:
        fields = _FIELDS.pack(*(getattr(self, field) for field in self.__dataclass_fields__))
        return fields + _CHECK.pack(zlib.crc32(fields))


class Packed(Protocol):
    """What stands first in a file."""

    def pack(self) -> bytes: ...


def header_here(kind: int, name: str = "", *, backend: str, cell_size: int, libc: str, machine: str) -> Header:
    """The header that this process writes, and the only one that it accepts.  What does not matter is empty."""
    return Header(
        magic=MAGIC,
        layout=native.LAYOUT_VERSION,
        backend=backend.encode().ljust(8, b"\0"),
        cell_size=cell_size,
        libc=libc.encode().ljust(16, b"\0"),
        machine=machine.encode()[:16].ljust(16, b"\0"),
        pid_namespace=pid_namespace(),
        boot=boot_id(),
        kind=kind,
        name=name.encode().ljust(255, b"\0"),
    )


def pid_namespace() -> int:
    """That in which this process has its number; 0: there is only one."""
    return os.stat("/proc/self/ns/pid").st_ino if sys.platform == "linux" else 0


@functools.cache
def boot_id() -> bytes:
    """Elsewhere than on Linux nothing is written that a reboot makes wrong."""
    if sys.platform != "linux":
        return bytes(36)
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:
        return file.read().strip().ljust(36, b"\0")


HEADER_LENGTH = _FIELDS.size + _CHECK.size


def check_header(path: str, raw: bytes, size: int, here: Header) -> bool:
    """Can this process use the file of that size that begins so?  False: yes, but it was made before the last boot.

    Raises: IncompatibleError: if not; it says which field differs.
    """
    if size < native.HEADER_SIZE or raw[:8] != MAGIC:
        raise IncompatibleError(
            f"{path} is no lock of coheld, or damaged; if nobody uses it, remove the file", resource=path
        )
    if _CHECK.unpack_from(raw, _FIELDS.size)[0] != zlib.crc32(raw[: _FIELDS.size]):
        raise IncompatibleError(
            f"{path} is damaged: its header's checksum is wrong; if nobody uses it, remove the file", resource=path
        )
    found = Header(*_FIELDS.unpack_from(raw))
    for field in Header.__dataclass_fields__:
        theirs, ours = getattr(found, field), getattr(here, field)
        if theirs != ours and field == "kind":
            raise _of_another_kind(path, found.kind, here.kind)
        if theirs != ours and field != "boot":
            raise IncompatibleError(
                f"{path} was made with another {field.replace('_', ' ')}: {_shown(theirs)}, here {_shown(ours)}",
                resource=path,
            )
    return found.boot == here.boot


def check_kind(path: str, raw: bytes, wanted: int) -> None:
    """Raises: IncompatibleError: if the file that begins so is of another kind."""
    if (found := kind_in(raw)) != wanted:
        raise _of_another_kind(path, found, wanted)


def _of_another_kind(path: str, found: int, wanted: int) -> IncompatibleError:
    which = f"{_KINDS.get(found)}, not {_KINDS.get(wanted)}"
    return IncompatibleError(f"{path} was made with another kind: {which}", resource=path)


def kind_of(path: str) -> int:
    """Of the file there; 0: it does not say, or there is none."""
    with suppress(OSError), os.fdopen(os.open(path, os.O_RDONLY | CAREFULLY), "rb") as file:
        return kind_in(file.read(HEADER_LENGTH))
    return 0


def kind_in(raw: bytes) -> int:
    """Of a file that begins so; 0: it does not say."""
    return header.kind if (header := header_of(raw)) else 0


def header_of(raw: bytes) -> Header | None:
    """What a file that begins so says of itself; None: it does not, or is damaged."""
    if len(raw) < HEADER_LENGTH or raw[:8] != MAGIC:
        return None
    sound = _CHECK.unpack_from(raw, _FIELDS.size)[0] == zlib.crc32(raw[: _FIELDS.size])
    return Header(*_FIELDS.unpack_from(raw)) if sound else None


def _shown(value: bytes | int) -> str:
    return repr(value.rstrip(b"\0").decode(errors="replace")) if isinstance(value, bytes) else str(value)


def lock_directory() -> str:
    """The directory of this user's locks, made if it is missing: $COHELD_DIR, /dev/shm/coheld-<uid> or in $TMPDIR.

    Raises: InsecureError: if it is a link, another user's, or writable by others; the one that COHELD_DIR names is
    taken as it is.  OSError: if it cannot be made.
    """
    directory = directory_here()
    make_directory(directory)
    return directory


def directory_here() -> str:
    """The same, whether it is there or not."""
    return _named_directory() or os.path.join(_base_directory(), _default_name())


def make_directory(directory: str) -> None:
    """The same for one that is known: session managers remove all that a user has in shared memory at logout."""
    _make_private(directory)
    if directory == _named_directory() or os.path.basename(directory) != _default_name():
        return
    found = os.lstat(directory)
    if not stat.S_ISDIR(found.st_mode):
        raise InsecureError(f"{directory} is not a directory; remove it, or set COHELD_DIR", resource=directory)
    check_owner(directory, found)


def _make_private(directory: str) -> None:
    if os.path.lexists(directory):
        return
    os.makedirs(os.path.dirname(directory), exist_ok=True)
    with suppress(FileExistsError):
        os.mkdir(directory, 0o700)
        os.chmod(directory, 0o700)  # the umask may have taken more away


_meant: dict[str, str] = {}
"""By each value of COHELD_DIR that this process has had: that directory.  A relative one is settled at its first use: a
process's names are not to become other locks when it changes its working directory.  A child of a fork goes on with it.
"""


def _named_directory() -> str | None:
    named = os.environ.get("COHELD_DIR")
    return (_meant.get(named) or _meant.setdefault(named, os.path.abspath(named))) if named else None


def _default_name() -> str:
    if sys.platform == "win32":
        return "coheld"  # there each user has a temporary directory
    return f"coheld-{os.geteuid()}"


def _base_directory() -> str:
    if sys.platform == "linux" and os.access("/dev/shm", os.W_OK | os.X_OK):
        return "/dev/shm"
    import tempfile  # dear to import, and hardly ever needed

    try:
        return tempfile.gettempdir()
    except FileNotFoundError as error:
        why = "no place for locks: neither /dev/shm nor a temporary directory can be written; set COHELD_DIR"
        raise FileNotFoundError(error.errno, why) from error


def check_owner(path: str, found: os.stat_result) -> None:
    if sys.platform == "win32":
        return  # access lists decide there, and a user's temporary directory is closed to others
    if found.st_uid != os.geteuid():
        raise InsecureError(f"{path} belongs to user {found.st_uid}, not to you ({os.geteuid()})", resource=path)
    if found.st_mode & 0o022:
        raise InsecureError(f"{path} can be written by other users (mode {found.st_mode & 0o7777:o})", resource=path)


CAREFULLY = sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_BINARY", "O_NOINHERIT"))
_NOT_MINE = {errno.ELOOP, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENXIO, errno.ENODEV}


def open_checked(path: str) -> int:
    """Open a lock file that exists; the descriptor is the caller's.

    Raises: FileNotFoundError: if there is none.  InsecureError: if it is a link or no plain file, another user's, or
    writable by others.
    """
    try:
        fd = os.open(path, os.O_RDWR | CAREFULLY)
    except OSError as error:
        if error.errno not in _NOT_MINE:
            raise
        raise InsecureError(f"{path} cannot be opened as a file of yours: {error.strerror}", resource=path) from error
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise InsecureError(f"{path} is not a plain file", resource=path)
        check_owner(path, found)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_to_look(path: str) -> BinaryIO:
    """For one who only reads.  Raises: OSError: also if it is no plain file of this user's."""
    file = os.fdopen(os.open(path, os.O_RDONLY | CAREFULLY), "rb", buffering=0)
    try:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise InsecureError(f"{path} is not a plain file", resource=path)
        check_owner(path, found)
    except BaseException:
        file.close()
        raise
    return file


def open_or_create(path: str) -> int:
    """An empty file of one's own, in a directory of one's own; the descriptor is the caller's."""
    return os.open(path, os.O_RDWR | os.O_CREAT | CAREFULLY, 0o600)


SOCKET = "stacks-"
_SOCKET_OF = re.compile(r"stacks-(\d+)-(\d+)\Z")


_spared: dict[str, int] = {}
"""How many more names are made in a directory before it is looked through again."""


def is_sweep_due(directory: str) -> bool:
    """By who makes a name there.  A large one is looked through at one name of many: else each would cost more than the
    one before."""
    if left := _spared.get(directory, 0):
        _spared[directory] = left - 1
        return False
    _spared[directory] = len(os.listdir(directory)) // 25
    return True


def sweep_sockets(directory: str) -> None:
    """Remove those of dead processes.  No living one has the number and the start of one that is dead."""
    for entry in os.listdir(directory):
        if (made := _SOCKET_OF.match(entry)) and start_of(int(made[1])) != int(made[2]):
            with suppress(OSError):
                os.unlink(os.path.join(directory, entry))


IN_USE_STAYS = sys.platform == "win32"
"""A file that somebody has open, or mapped, cannot be removed."""


def publish(made: str, path: str) -> None:
    """Give a half-made file its name, whole from its first moment.  Raises: FileExistsError: if that is taken."""
    if sys.platform == "win32":
        os.rename(made, path)  # refuses to replace, there alone
        return
    os.link(made, path)
    os.unlink(made)


@contextmanager
def new_file(directory: str, size: int, header: Packed) -> Iterator[tuple[str, int]]:
    """A half-made file with its pages reserved and its header written: its path, and its descriptor, which is the
    caller's.  It is removed if the body fails.

    Raises: OSError: if the file system is full, or the process may not have more; nothing is left behind.
    """
    path = os.path.join(directory, f".new-{os.getpid()}-{start_of(os.getpid())}-{os.urandom(4).hex()}")
    try:
        yield path, _reserved(path, size, header)
    except BaseException as error:
        with suppress(FileNotFoundError):
            os.unlink(path)
        if not isinstance(error, OSError) or isinstance(error, FileExistsError):
            raise
        raise OSError(error.errno, f"no lock can be made: {error.strerror}", directory) from error


def _reserved(path: str, size: int, header: Packed) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | CAREFULLY, 0o600)
    try:
        if sys.platform == "linux":
            os.fchmod(fd, 0o600)  # the umask may have taken more away
            os.posix_fallocate(fd, 0, size)
            os.pwrite(fd, header.pack(), 0)
        else:
            os.write(fd, header.pack().ljust(size, b"\0"))
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_name(name: object) -> None:
    """Raises: TypeError: if name is no string.  ValueError: if it is empty, has a NUL, or over 255 bytes of UTF-8."""
    if not isinstance(name, str):
        raise TypeError(f"lock_name must be a string, not {type(name).__name__}")
    try:
        size = len(name.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"lock_name {name!r} cannot be written as UTF-8") from error
    if not 0 < size <= LONGEST or "\0" in name:
        raise ValueError(f"lock_name must have 1 to 255 bytes of UTF-8 and no NUL; {name!r} has {size}")


def is_name(text: str) -> bool:
    """Can a lock be called so?"""
    with suppress(ValueError):
        check_name(text)
        return True
    return False


def name_there(where: str, name: str) -> str:
    """What the local lock is called of a name that a store has: no user can call one so.  Where that is too long it is
    cut, and has a hash of the whole."""
    whole = f"{where}\0{name}"
    if len(whole.encode()) <= LONGEST:
        return whole
    from hashlib import sha256

    end = f"={sha256(whole.encode()).hexdigest()}"
    return whole.encode()[: LONGEST - len(end)].decode(errors="ignore") + end


def where_and_name(name: str) -> tuple[str, str]:
    """Of a name in a header: the store, or nothing, and what users call it."""
    where, _, called = name.rpartition("\0")
    return where, called


def file_name(name: str) -> str:
    """The name of a named lock's file."""
    return f"name-{_escaped(name.encode())}"


def _escaped(name: bytes) -> str:
    text = "".join(chr(byte) if byte in _SAFE else f"%{byte:02X}" for byte in name)
    if len(text) <= 200:
        return text
    from hashlib import sha256  # only for names that would be too long for a file

    return f"{text[:120]}={sha256(name).hexdigest()}"  # "=" stands in no shorter one


def same_file(path: str, identity: tuple[int, int]) -> bool:
    """Does the path still lead to that (device, inode)?  A mapped file's inode is not used again."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == identity


def unlink_whole(path: str) -> None:
    """Remove a file of cells, after the states of its cells: a removal that is broken off is begun anew by the next."""
    directory, name = os.path.split(path)
    for entry in os.listdir(directory):
        if entry.startswith(f"{name}~"):
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(directory, entry))
    with suppress(FileNotFoundError):
        os.unlink(path)
