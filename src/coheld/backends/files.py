"""The files that cells live in: a directory per user, checked before anything in it is trusted.

    arena-<pid>-<start>-<random>   the anonymous locks that one process made
    name-<escaped name>            one named lock
    .new-<pid>-<start>-<random>    any of them, half made
    <one of the first two>~<offset>.<generation>    the shared state of one lock in it, see state/store.py

A header stands first in each file.  It is written before the file gets its name, and read before a cell is touched.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import stat
import string
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from .. import native
from ..errors import BackendError, IncompatibleError, InsecureError
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


class Packed(Protocol):
    """What stands first in a file."""

    def pack(self) -> bytes: ...


def header_here(kind: int, name: str = "") -> Header:
    """The header that this process writes, and the only one that it accepts."""
    return Header(
        magic=MAGIC,
        layout=native.LAYOUT_VERSION,
        cell_size=native.CELL_SIZE,
        libc=native.LIBC.encode().ljust(16, b"\0"),
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
    if os.fstat(fd).st_size < native.HEADER_SIZE or raw[:8] != MAGIC:
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
    directory = _named_directory() or os.path.join(_base_directory(), _default_name())
    make_directory(directory)
    return directory


def make_directory(directory: str) -> None:
    """The same for one that is known: session managers remove all that a user has in shared memory at logout."""
    _make_private(directory)
    if directory == _named_directory() or os.path.basename(directory) != _default_name():
        return
    found = os.lstat(directory)
    if not stat.S_ISDIR(found.st_mode):
        raise InsecureError(f"{directory} is not a directory; remove it, or set COHELD_DIR", resource=directory)
    _check_owner(directory, found)


def _make_private(directory: str) -> None:
    if os.path.lexists(directory):
        return
    os.makedirs(os.path.dirname(directory), exist_ok=True)
    with suppress(FileExistsError):
        os.mkdir(directory, 0o700)
        os.chmod(directory, 0o700)  # the umask may have taken more away


def _named_directory() -> str | None:
    named = os.environ.get("COHELD_DIR")
    return os.path.abspath(named) if named else None


def _default_name() -> str:
    return f"coheld-{os.geteuid()}"


def _base_directory() -> str:
    if os.access("/dev/shm", os.W_OK | os.X_OK):
        return "/dev/shm"
    import tempfile  # dear to import, and hardly ever needed

    try:
        return tempfile.gettempdir()
    except FileNotFoundError as error:
        why = "no place for locks: neither /dev/shm nor a temporary directory can be written; set COHELD_DIR"
        raise FileNotFoundError(error.errno, why) from error


def _check_owner(path: str, found: os.stat_result) -> None:
    if found.st_uid != os.geteuid():
        raise InsecureError(f"{path} belongs to user {found.st_uid}, not to you ({os.geteuid()})", resource=path)
    if found.st_mode & 0o022:
        raise InsecureError(f"{path} can be written by other users (mode {found.st_mode & 0o7777:o})", resource=path)


_NOT_MINE = {errno.ELOOP, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENXIO, errno.ENODEV}


def open_checked(path: str) -> int:
    """Open a lock file that exists; the descriptor is the caller's.

    Raises: FileNotFoundError: if there is none.  InsecureError: if it is a link or no plain file, another user's, or
    writable by others.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno not in _NOT_MINE:
            raise
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
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.fchmod(fd, 0o600)  # the umask may have taken more away
        os.posix_fallocate(fd, 0, size)
        os.pwrite(fd, header.pack(), 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextmanager
def directory_locked(directory: str) -> Iterator[None]:
    """Names are taken away by one process at a time: blocks while another does (for moments); a killed one's turn
    ends with it."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flock_soon(fd, fcntl.LOCK_EX, directory)
        yield
    finally:
        _unlock_and_close(fd)


def flock_soon(fd: int, operation: int, path: str) -> None:
    """Take a flock that others have for moments only; blocks for a second at most.

    Raises: BackendError: if it is not to be had: who has it was stopped.
    """
    deadline = time.monotonic() + 1.0
    while True:
        try:
            return fcntl.flock(fd, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise BackendError(f"{path} is kept locked by a process that does not go on", resource=path) from None
            time.sleep(0.001)


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

    return f"{text[:120]}={sha256(name).hexdigest()}"  # "=" stands in no shorter one


def same_file(path: str, identity: tuple[int, int]) -> bool:
    """Does the path still lead to that (device, inode)?  A mapped file's inode is not used again."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == identity


# -- sweeping ---------------------------------------------------------------------------------------------------------
#
# Who uses an arena has a shared flock on it, so one that can be locked exclusively is in nobody's use, but for two: a
# daemon that closed its descriptors, and a process that is just leaving.  Both still map it.  The second has signed off
# before it closed its own: of several that leave at once, the last to look finds that all the others have.  The look
# takes a while, in which neither may be missed: a process that is forked by one not looked at yet, which then ends (the
# processes are listed again until there is no new one); and one that attaches and closes its descriptors (it has set
# the time of the file).  The flock is not kept meanwhile, since who leaves and does not get it trusts that whoever has
# it has not begun to look yet.  tests/models searches all of this.


def sweep(directory: str) -> None:
    """Remove what dead processes left; never blocks on a live one, never raises for what others remove meanwhile."""
    _remove_unused(directory, [path for path, pid, start in _made_in(directory) if start_of(pid) != start])


def leave(directory: str, used: set[str], shared: bool) -> None:
    """The same by a process that has signed off and closed its descriptors, and for what it made or used as well.

    shared: others may map what it made; if not, the look at all processes is spared.
    """
    candidates = []
    me = os.getpid(), start_of(os.getpid())
    for path, pid, start in _made_in(directory):
        mine = (pid, start) == me
        if mine and not shared:
            _unlink_unused(path)
        elif mine or path in used or start_of(pid) != start:
            candidates.append(path)
    _remove_unused(directory, candidates)


def sign_off() -> object:
    """Tell, in this process's list of mappings, that it is leaving; true as long as the result lives."""
    fd = os.memfd_create(_SIGNED_OFF)
    try:
        os.ftruncate(fd, mmap.PAGESIZE)
        told = mmap.mmap(fd, mmap.PAGESIZE)
    finally:
        os.close(fd)
    told.madvise(mmap.MADV_DONTFORK)
    return told


_SIGNED_OFF = "coheld-left"


def _made_in(directory: str) -> Iterator[tuple[str, int, int]]:
    """Path, and number and start of its maker, of each arena and half-made file."""
    for entry in os.listdir(directory):
        if maker := _MADE_BY.match(entry):
            yield os.path.join(directory, entry), int(maker[1]), int(maker[2])


def _remove_unused(directory: str, paths: list[str]) -> None:
    times = {path: _time_if_unused(path) for path in paths}
    while times := {path: time for path, time in times.items() if time is not None}:
        mapped = _mapped_files(directory)
        free = {path: time for path, time in times.items() if os.path.basename(path) not in mapped}
        changed = [path for path, time in free.items() if _unlink_unless_touched(path, time)]
        times = {path: _time_if_unused(path) for path in changed}


def _time_if_unused(path: str) -> int | None:
    """The time of the file, which each who attaches sets; None if a process has a flock on it, or it is gone."""
    with _exclusively(path) as fd:
        return None if fd is None else os.fstat(fd).st_mtime_ns


def _unlink_unless_touched(path: str, time: int) -> bool:
    """Remove the file if no process has a flock on it; has somebody attached since that time instead?"""
    with _exclusively(path) as fd:
        if fd is None:
            return False
        touched = os.fstat(fd).st_mtime_ns != time
        if not touched:
            unlink_whole(path)
        return touched


def touch(fd: int) -> None:
    """By one who attaches and has its flock: a look at all processes that has begun before does not count."""
    now = time.time_ns()  # the clock of the file system is too coarse to tell two apart
    os.utime(fd, ns=(now, now))


def _unlink_unused(path: str) -> None:
    with _exclusively(path) as fd:
        if fd is not None:
            unlink_whole(path)


def unlink_whole(path: str) -> None:
    """Remove a file of cells, after the states of its cells: a removal that is broken off is begun anew by the next."""
    directory, name = os.path.split(path)
    for entry in os.listdir(directory):
        if entry.startswith(f"{name}~"):
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(directory, entry))
    with suppress(FileNotFoundError):
        os.unlink(path)


@contextmanager
def _exclusively(path: str) -> Iterator[int | None]:
    """The open file, if it is there and no process has a flock on it; nobody gets one meanwhile.  An attacher that gets
    its own only after that finds that the path is gone (shm.attach_arena)."""
    fd = _open_if_unused(path)
    try:
        yield fd
    finally:
        if fd is not None:
            _unlock_and_close(fd)


def _open_if_unused(path: str) -> int | None:
    with suppress(FileNotFoundError, BlockingIOError, InsecureError), ExitStack() as opened:
        fd = open_checked(path)
        opened.callback(os.close, fd)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        opened.pop_all()
        return fd
    return None


def _mapped_files(directory: str) -> set[str]:
    """The files that any process maps, but for those that have signed off."""
    needle = b" " + os.fsencode(os.path.realpath(directory)) + b"/"  # as the kernel spells it
    gone = f"/memfd:{_SIGNED_OFF} ".encode()
    found: set[str] = set()
    for pid in _processes():
        with suppress(OSError), open(f"/proc/{pid}/maps", "rb") as file:
            maps = file.read()
            if needle in maps and gone not in maps:
                found.update(_path_of(line) for line in maps.splitlines() if needle in line)
    return found


def _processes() -> Iterator[str]:
    """All processes, and those that they have forked by the time that one has looked at each."""
    seen: set[str] = set()
    while new := set(filter(str.isdigit, os.listdir("/proc"))) - seen:
        yield from new
        seen |= new


def _path_of(line: bytes) -> str:
    return os.path.basename(os.fsdecode(line[line.index(b"/") :]))
