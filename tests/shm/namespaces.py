"""A process with a /dev/shm of its own: private mounts, entered by a forked child of a test.

Root may mount; anybody else first becomes root of a user namespace that knows nobody but him.
"""

import ctypes
import os
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
STRANGER = 54321  # a user number that nobody has

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def private_mounts() -> None:
    """From now on mounts of this process are seen by it and its children only, and end with them."""
    user, group = os.geteuid(), os.getegid()
    _checked(_libc.unshare(CLONE_NEWNS if user == 0 else CLONE_NEWNS | CLONE_NEWUSER), "unshare")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _mount(None, "/", None, MS_REC | MS_PRIVATE)


def tmpfs(path: str, options: str = "mode=1777") -> None:
    """An empty file system in memory at `path`."""
    _mount("tmpfs", path, "tmpfs", 0, options)


def private_shm(options: str = "mode=1777") -> None:
    """An empty /dev/shm that only this process and its children see; and no COHELD_DIR: the default is used."""
    private_mounts()
    tmpfs("/dev/shm", options)
    os.environ.pop("COHELD_DIR", None)


def read_only(path: str) -> None:
    """What is mounted at `path` cannot be written any more."""
    _mount(path, path, None, MS_BIND | MS_REC)
    _mount(None, path, None, MS_REMOUNT | MS_BIND | MS_RDONLY)


def foreign_directory(path: str) -> None:
    """A directory at `path` that belongs to another user."""
    os.mkdir(path, 0o700)
    if os.geteuid() == 0:
        os.chown(path, STRANGER, STRANGER)
    else:
        _mount("/usr", path, None, MS_BIND | MS_REC)  # the real root is another user here


def become_stranger() -> int:
    """Give up being root, for good, and be another user; who is not root already stays who he is.  The user number."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(STRANGER, STRANGER, STRANGER)
        os.setresuid(STRANGER, STRANGER, STRANGER)
    return os.geteuid()


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [text.encode() if text is not None else None for text in (source, target, kind)]
    data = options.encode() if options else None
    _checked(_libc.mount(*texts, ctypes.c_ulong(flags), data), f"mount {target}")
