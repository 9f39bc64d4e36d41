"""Share an object between threads and processes: one caller at a time, and nobody hangs when a holder is killed.

    errors.py      every exception
    owner.py       who: process and thread; are they still alive
    ward.py        a process that works on behalf of an owner, and is waited for if that is killed
    _lock.h        the robust mutex, in plain C, with its states
    _segment.h     mapped files of cells, in plain C
    _native.c      the Python types over it, and the fast path of a locked call
    _portable.py   the last two in Python, for where there is no extension
    native.py      the one of both that runs here, as all others import it
    process.py     what the system says of a process
    waiting.py     time-outs, and the naps of who polls
    backends/      where locks live: a URL names one; base.py what each has to give, and the handle of a lock: what is
                   said and done off the fast path; files.py the directory, shm.py shared memory, file.py locks
                   of files (polled.py takes and gives back, claims.py its threads, record.py its cells), sweeping.py
                   and leaving.py what the dead and those who end leave
    mutex.py       locks by what names them
    lockable.py    Lockable and @Lockable.locked
    inspecting.py  holder and statistics
    pyats.py       pyATS's own connections get this lock: adopt
    cli/           the command: run, rm, demo

Each imports only what stands above it.
"""

from ._version import __version__
from .errors import (
    BackendError,
    CoheldError,
    IncompatibleError,
    InsecureError,
    LockTimeout,
    NotInitializedError,
    NotOwnerError,
    TooManyLocksError,
)
from .inspecting import Statistics, holder, statistics
from .lockable import Lockable
from .owner import Owner

__all__ = [
    "BackendError",
    "CoheldError",
    "IncompatibleError",
    "InsecureError",
    "LockTimeout",
    "Lockable",
    "NotInitializedError",
    "NotOwnerError",
    "Owner",
    "Statistics",
    "TooManyLocksError",
    "__version__",
    "holder",
    "statistics",
]

for _name in __all__:
    _public = globals()[_name]
    if isinstance(_public, type) or callable(_public):
        _public.__module__ = __name__  # so that tracebacks and pickles show the public name
del _name, _public
