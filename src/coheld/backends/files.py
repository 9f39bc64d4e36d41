"""The files that cells live in: a directory per user, checked before anything in it is trusted.

    arena-<pid>-<start>-<random>   the anonymous locks that one process made
    name-<escaped name>            one named lock
    .new-<pid>-<start>-<random>    either of them, half made

A header stands first in each file.  It is written before the file gets its name, and read before a cell is touched.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import string
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from .. import _native
from ..errors import IncompatibleError, InsecureError
from ..owner import start_of

MAGIC = b"\x93coheld\n"
ARENA, NAMED = 1, 2
NAMED_CELL = 1024
"""Where the cell of a named lock is; an arena's begin at HEADER_SIZE."""
_FIELDS = struct.Struct("<8sII16s16sQ36sI255s")
_CHECK = struct.Struct("<I")
_SAFE = frozenset((string.ascii_letters + string.digits + "._-").encode())
_MADE_BY = re.compile(r"(?:arena|\.new)-(\d+)-(\d+)-[0-9a-f]+\Z")


@dataclass(frozen=True)
class Header:
    """What a file says of itself."""

    magic: bytes
    layout: int
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


def header_here(kind: int, name: str = "") -> Header:
    """The header that this process writes, and the only one that it accepts."""
    return Header(
        magic=MAGIC,
        layout=_native.LAYOUT_VERSION,
        cell_size=_native.CELL_SIZE,
        libc=_native.LIBC.encode().ljust(16, b"\0"),
        machine=os.uname().machine.encode()[:16].ljust(16, b"\0"),
        pid_namespace=os.stat("/proc/self/ns/pid").st_ino,
        boot=_boot_id(),
        kind=kind,
        name=name.encode().ljust(255, b"\0"),
    )


def _boot_id() -> bytes:
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:
        return file.read().strip().ljust(36, b"\0")


def check_header(path: str, fd: int, kind: int, name: str = "") -> bool:
    """Is the file one that this process can use?  False: yes, but it was made before the last boot.

    Raises: IncompatibleError: if not; it says which field differs.
    """
    raw = os.pread(fd, _FIELDS.size + _CHECK.size, 0)
    if os.fstat(fd).st_size < _native.HEADER_SIZE or raw[:8] != MAGIC:
        raise IncompatibleError(
            f"{path} is no lock of coheld, or damaged; if nobody uses it, remove the file", resource=path
        )
    if _CHECK.unpack_from(raw, _FIELDS.size)[0] != zlib.crc32(raw[: _FIELDS.size]):
        raise IncompatibleError(
            f"{path} is damaged: its header's checksum is wrong; if nobody uses it, remove the file", resource=path
        )
    found, here = Header(*_FIELDS.unpack_from(raw)), header_here(kind, name)
    for field in Header.__dataclass_fields__:
        theirs, ours = getattr(found, field), getattr(here, field)
        if theirs != ours and field != "boot":
            raise IncompatibleError(
                f"{path} was made with another {field.replace('_', ' ')}: {_shown(theirs)}, here {_shown(ours)}",
                resource=path,
            )
    return found.boot == here.boot


def _shown(value: bytes | int) -> str:
    return repr(value.rstrip(b"\0").decode(errors="replace")) if isinstance(value, bytes) else str(value)


def lock_directory() -> str:
    """The directory of this user's locks, made if it is missing: $COHELD_DIR, /dev/shm/coheld-<uid> or in $TMPDIR.

    Raises: InsecureError: if it is a link, another user's, or writable by others; the one that COHELD_DIR names is
    taken as it is.  OSError: if it cannot be made.
    """
    if named := os.environ.get("COHELD_DIR"):
        os.makedirs(named, mode=0o700, exist_ok=True)
        return os.path.abspath(named)
    path = os.path.join(_base_directory(), f"coheld-{os.geteuid()}")
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise InsecureError(f"{path} is not a directory; remove it, or set COHELD_DIR", resource=path)
    _check_owner(path, found)
    return path


def _base_directory() -> str:
    if os.access("/dev/shm", os.W_OK | os.X_OK):
        return "/dev/shm"
    import tempfile  # dear to import, and hardly ever needed

    return tempfile.gettempdir()


def _check_owner(path: str, found: os.stat_result) -> None:
    if found.st_uid != os.geteuid():
        raise InsecureError(f"{path} belongs to user {found.st_uid}, not to you ({os.geteuid()})", resource=path)
    if found.st_mode & 0o022:
        raise InsecureError(f"{path} can be written by other users (mode {found.st_mode & 0o7777:o})", resource=path)


def open_checked(path: str) -> int:
    """Open a lock file that exists; the descriptor is the caller's.

    Raises: FileNotFoundError: if there is none.  InsecureError: if it is a link or no plain file, another user's, or
    writable by others.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InsecureError(f"{path} cannot be opened as a file of yours: {error.strerror}", resource=path) from error
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise InsecureError(f"{path} is not a plain file", resource=path)
        _check_owner(path, found)
    except BaseException:
        os.close(fd)
        raise
    return fd


def new_file(directory: str, size: int, header: Header) -> tuple[str, int]:
    """A half-made file with its pages reserved and its header written: its path and descriptor.

    Raises: OSError: if the file system is full; nothing is left behind.
    """
    path = os.path.join(directory, f".new-{os.getpid()}-{start_of(os.getpid())}-{os.urandom(4).hex()}")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.posix_fallocate(fd, 0, size)
        os.pwrite(fd, header.pack(), 0)
    except OSError as error:
        os.close(fd)
        os.unlink(path)
        raise OSError(error.errno, f"no lock can be made: {os.strerror(error.errno or 0)}", directory) from error
    return path, fd


@contextmanager
def directory_locked(directory: str) -> Iterator[None]:
    """Names are given and taken by one process at a time: blocks while another does (for moments); a killed one's
    turn ends with it."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        _unlock_and_close(fd)


def _unlock_and_close(fd: int) -> None:
    """A child that another thread forks meanwhile has the descriptor too: closing ours would leave the flock there."""
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def check_name(name: object) -> None:
    """Raises: TypeError: if name is no string.  ValueError: if it is empty, has a NUL, or over 255 bytes of UTF-8."""
    if not isinstance(name, str):
        raise TypeError(f"lock_name must be a string, not {type(name).__name__}")
    try:
        size = len(name.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"lock_name {name!r} cannot be written as UTF-8") from error
    if not 0 < size <= 255 or "\0" in name:
        raise ValueError(f"lock_name must have 1 to 255 bytes of UTF-8 and no NUL; {name!r} has {size}")


def file_name(name: str) -> str:
    """The name of a named lock's file."""
    return f"name-{_escaped(name.encode())}"


def _escaped(name: bytes) -> str:
    text = "".join(chr(byte) if byte in _SAFE else f"%{byte:02X}" for byte in name)
    if len(text) <= 200:
        return text
    from hashlib import sha256  # only for names that would be too long for a file

    return f"{text[:120]}%{sha256(name).hexdigest()}"


def same_file(path: str, identity: tuple[int, int]) -> bool:
    """Does the path still lead to that (device, inode)?  A mapped file's inode is not used again."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == identity


def leave(directory: str, mine: set[str]) -> None:
    """Remove the files that this process, about to end, has used and nobody else does; and what the dead left.

    Whoever else maps a file has a shared flock on it; the own descriptors are closed before.  Never blocks, never
    raises for what others remove meanwhile.
    """
    for path in mine:
        _unlink_unused(path)
    sweep(directory)


def sweep(directory: str) -> None:
    """Remove what dead processes left; never blocks on a live one, never raises for what others remove meanwhile."""
    mapped: set[str] | None = None
    for path in _orphans(directory):
        if mapped is None:
            mapped = _mapped_files(directory)
        if path not in mapped:
            _unlink_unused(path)


def _orphans(directory: str) -> Iterator[str]:
    """Files whose maker is dead; a child that it forked may still use them."""
    for entry in os.listdir(directory):
        maker = _MADE_BY.match(entry)
        if maker and start_of(int(maker[1])) != int(maker[2]):
            yield os.path.join(directory, entry)


def _unlink_unused(path: str) -> None:
    """Remove the file if no process has a flock on it.  An attacher that gets its own only after that finds that the
    path is gone (shm.attach_arena)."""
    with suppress(FileNotFoundError, BlockingIOError, InsecureError):
        fd = open_checked(path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        finally:
            _unlock_and_close(fd)


def _mapped_files(directory: str) -> set[str]:
    """The files that any process maps: a daemon that closed its descriptors has lost its flock, not its locks."""
    needle = f" {directory}/".encode()
    found: set[str] = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{pid}/maps", "rb") as file:
            found.update(os.fsdecode(line[line.index(b"/") :].strip()) for line in file if needle in line)
    return found
