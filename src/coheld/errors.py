"""Every exception of coheld, split by who must act.

*You* misused the lock: NotInitializedError, NotOwnerError, TooManyLocksError, DeadlockError; or the state:
NotLockedError, StateError; or a semaphore: PermitError.  *Somebody else* has it: LockTimeout.
*The place* is not what it should be: IncompatibleError, InsecureError, BackendError.  *Time*: LeaseLostError.

Each is a CoheldError and the builtin that fits.  The fields are None where they do not apply; errors pickle with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .owner import Owner


class CoheldError(Exception):
    """The root of all that coheld raises on its own account.

    resource: what was locked, as text.  owner: who holds it.  waited: for how long it was waited, seconds.
    """

    def __init__(
        self,
        message: str = "",
        *,
        resource: str | None = None,
        owner: Owner | None = None,
        waited: float | None = None,
    ) -> None:
        super().__init__(message)
        self.resource = resource
        self.owner = owner
        self.waited = waited


class NotInitializedError(CoheldError, RuntimeError):
    """A locked call, or acquire, on an object whose Lockable.__init__ has not run.

    Not an AttributeError: hasattr would swallow that.
    """


class NotOwnerError(CoheldError, AssertionError, RuntimeError):
    """A release by a thread that does not hold the lock; nothing has changed.

    An AssertionError, as multiprocessing.RLock raises, and a RuntimeError, as threading.RLock does.
    """


class TooManyLocksError(CoheldError, RuntimeError):
    """One lock more than can be held; nothing has changed.

    The thread holds so many that the kernel could not free them all if it died, or, on locks of files, the process has
    no open file left for another.
    """


@dataclass(frozen=True, slots=True)
class Member:
    """One that waits in a cycle of waits.

    pid, command: its process, and what that runs.  thread: the thread's name, or task: the task's.  holds, waits_for:
    resources, as messages name them.  held_in, waits_in: the locked methods, "" for acquire and with.
    """

    pid: int
    command: str
    thread: str
    task: str
    holds: str
    held_in: str
    waits_for: str
    waits_in: str

    def __str__(self) -> str:
        command = f" ({self.command})" if self.command else ""
        who = f"task {self.task}" if self.task else f"thread {self.thread}"
        held, waits = (f" in {method}" if method else "" for method in (self.held_in, self.waits_in))
        return f"process {self.pid}{command}, {who} holds {self.holds}{held}, and waits for {self.waits_for}{waits}"


class DeadlockError(CoheldError, RuntimeError):
    """A wait that could never end: it did not begin, or it was given up.

    cycle: who waits for whom, where several wait for each other: the one who was told first, then whom it waits for,
    and so on; empty otherwise.
    """

    cycle: tuple[Member, ...] = ()


class PermitError(CoheldError, ValueError):
    """More permits given back than the process holds; nothing has changed.

    A ValueError, as threading.BoundedSemaphore raises."""


class NotLockedError(CoheldError, RuntimeError):
    """A change of shared state without the lock, which would be lost or lose another; nothing has changed."""


class StateError(CoheldError, ValueError):
    """A value that the type of its shared field does not allow, or a state that is too large; the last commit stands.

    Raised by the assignment, or where the lock is given back, which it is."""


class LockTimeout(CoheldError, TimeoutError):
    """The lock was not got within the time; unlike the others, trying again may well work."""


class LeaseLostError(CoheldError, RuntimeError):
    """The caller had the lock, or a permit, or a resource of a pool, and has lost it: another may have it. What it has
    changed under the lock is not committed.

    Not an OSError: that would be taken for "connect again and go on"."""


class IncompatibleError(CoheldError, RuntimeError):
    """What is there was made by another version, libc, machine, container or backend, or is damaged."""


class InsecureError(CoheldError, PermissionError):
    """The place is one that other users could change; nothing in it was used."""


class BackendError(CoheldError, ConnectionError):
    """The place where the lock lives cannot be reached, or no longer has it."""
