"""Share an object between threads, processes and hosts: one caller at a time, and nobody hangs when a holder is killed.

    errors.py      every exception
    process.py     what the system says of a process: does it live, since when, what does it run
    owner.py       who: process and thread
    ward.py        a process that works on behalf of an owner, and is waited for if that is killed
    waiting.py     how long to wait; waiting until something holds: one generator of steps, and who serves it
    _lock.h        the robust mutex, in plain C, with its states
    _segment.h     mapped files of cells, in plain C
    _state.h       shared state in plain words: its states, its cache, the commit
    _register.h    which processes are in, and how many times: readers, holders of permits
    _native.c      the Python types over them, and the fast path of a locked call; parts of it: _lockable.h, _field.h,
                   _locked.h for Lockable, shared fields and locked methods, _shared.h guards, _task.h and _entrust.h
                   tasks as owners, _wait.h waits, with _table.h for who is to know of them, _observe.h observers,
                   _reading.h readers, _permits.h semaphores
    _portable.py   the same types in Python, for where there is no extension
    native.py      the one or the other, as all others import it
    observing.py   who hears of locks that are taken and given back
    backends/      where locks live: a URL names one; base.py what each has to give, and the handle of a lock: what is
                   said and done off the fast path; monitor.py guards and atomic calls; tasking.py and lookout.py tasks
                   as owners, and the threads that wait in their stead; files.py the directory; shm.py shared memory,
                   with sweeping.py and leaving.py for its end; file.py locks that files guard, with polled.py,
                   stateful.py, called.py, claims.py and record.py for how; beside.py who reads or has permits, with
                   register.py in shared memory, and tally.py and permits.py for files; waiters.py who waits for what;
                   classes.py whose locks they are; survey.py a look at all of it; deadlock.py the search for cycles
                   of waits.  Of other hosts: store.py what a store gives; remote.py and away.py a local lock and a
                   store's grant, with memo.py for what a host's processes know of it, and renewing.py for leases;
                   sessions.py the lease of what a process has there for longer, permits for one;
                   engine.py and server.py what any server's store is besides its verbs; redis.py and redis.lua those
                   of a Redis or Valkey server, postgresql.py and postgresql.sql those of a PostgreSQL server, with
                   libpq.py for its connections
    state/         shared(): fields, their encoding, files, growth; snapshot; for both kinds of locks
    aio.py         the same for tasks of asyncio
    mutex.py       locks by what names them
    leases.py      what a holder asks of a lock that a store has: token, lost, ensure_held
    lockable.py    Lockable and @Lockable.locked
    roll.py        who has the permits of a semaphore that a store has
    semaphore.py   Semaphore
    ledger.py      who has what of a pool, and who waits
    pool.py        Pool: leases of any free one
    lessees.py     who has leases of pools, by who only looks
    inspecting.py  holder, statistics and resources
    sight.py       a resource in words, with those who have it and wait for it
    history.py     how resources have been used in the last minute: for coheld top
    graph.py       who has what and who waits for it, as a graph, with its cycles
    ordering.py    locks that are taken in orders that contradict each other: COHELD_CHECK_ORDER
    otel.py        metrics of locks, by OpenTelemetry
    stacks.py      what a process that allows it does now: for coheld ps --stack
    pyats.py       pyATS's own connections get this lock: adopt
    cli/           the command: run, ps, top, graph, rm, show, demo; `python -m coheld` is the same
    pytest.py      a plugin of pytest: the order of locks, and who has them when a test times out
    testing/       public: the contract of a backend as tests, and what they are made with

Each imports only what stands above it.
"""

from importlib import import_module as _import_module
from os import environ as _environ
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from ._version import __version__
from .backends import at_first_use as _at_first_use
from .backends.survey import Resource
from .backends.waiters import Waiter
from .errors import (
    BackendError,
    CoheldError,
    DeadlockError,
    IncompatibleError,
    InsecureError,
    LeaseLostError,
    LockTimeout,
    Member,
    NotInitializedError,
    NotLockedError,
    NotOwnerError,
    PermitError,
    StateError,
    TooManyLocksError,
)
from .inspecting import Statistics, holder, resources, statistics, waiters
from .leases import ensure_held, lost, token, when_lost
from .lockable import Lockable, wait_for
from .owner import Owner
from .semaphore import Semaphore
from .state import shared, snapshot

if _TYPE_CHECKING:
    from .pool import Pool

__all__ = [
    "BackendError",
    "CoheldError",
    "DeadlockError",
    "IncompatibleError",
    "InsecureError",
    "LeaseLostError",
    "LockTimeout",
    "Lockable",
    "Member",
    "NotInitializedError",
    "NotLockedError",
    "NotOwnerError",
    "Owner",
    "PermitError",
    "Pool",
    "Resource",
    "Semaphore",
    "StateError",
    "Statistics",
    "TooManyLocksError",
    "Waiter",
    "__version__",
    "ensure_held",
    "holder",
    "lost",
    "resources",
    "shared",
    "snapshot",
    "statistics",
    "token",
    "wait_for",
    "waiters",
    "when_lost",
]

for _name in __all__:
    _public = globals().get(_name)
    if isinstance(_public, type) or callable(_public):
        _public.__module__ = __name__  # so that tracebacks and pickles show the public name
del _name, _public


def _switched_on(variable: str) -> bool:
    return _environ.get(variable, "0") not in ("", "0")


if _switched_on("COHELD_CHECK_ORDER"):
    _import_module(f"{__name__}.ordering").start()
if _switched_on("COHELD_OTEL"):
    _at_first_use.append(lambda: _import_module(f"{__name__}.otel").start_or_tell())
if _switched_on("COHELD_STACKS"):
    _at_first_use.append(lambda: _import_module(f"{__name__}.stacks").serve_or_tell())


def __getattr__(name: str) -> _Any:
    """What is imported where it is used: asyncio, and what a Pool's state is made of, take longer than all of this."""
    if name == "aio":
        return _import_module(f"{__name__}.aio")
    if name == "Pool":
        return _import_module(f"{__name__}.pool").Pool
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
