"""Locks for tasks of asyncio: the same locks, and the same questions.

A task owns; the tasks that it makes do not inherit.  The loop never blocks: while a lock is held elsewhere, a thread of
coheld waits in the stead of all tasks of the process that wait for it.
"""

from __future__ import annotations

import asyncio
import functools
from asyncio import CancelledError
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from time import monotonic
from typing import Any, TypeVar
from weakref import WeakSet

from . import native, observing, waiting
from .backends import lookout, tasking
from .errors import NotLockedError, NotOwnerError
from .waiting import FOREVER, seconds_of

T = TypeVar("T")

__all__ = ["acquire", "wait_for"]


async def acquire(obj: object, timeout: float | None = None) -> bool:
    """Take the object's lock for the running task; True if the task holds it now, False if it could not be had. Of a
    Semaphore: take a permit, for the process.

    Waits for at most timeout seconds (None: for ever; zero or less: tries once), on the monotonic clock, and does not
    block the loop.  The task may take it again, and must release it as often: ``obj.release()``.  Cancelled, it does
    not hold it.  A task that ends with it, or whose loop is closed, counts as an owner that died.

    Raises: TypeError, ValueError: if timeout is no number of seconds.  RuntimeError: without a running asyncio task.
    DeadlockError: if the thread holds it around the loop.  NotInitializedError, and what a sync acquire raises.
    """
    seconds = seconds_of(timeout)
    deadline = FOREVER if seconds == FOREVER else monotonic() + seconds
    if isinstance(obj, native.SemaphoreBase):
        return await _take_permit(obj, deadline)
    lock = native.lock_of(obj)
    got = await _take(lock, obj, b"", deadline)
    if got and lock._record()[0] == 1:
        lock._entrusted(lock.task)
    return got


async def wait_for(obj: object, predicate: Callable[[], T], timeout: float | None = None) -> T:
    """As coheld.wait_for, for the task that holds the lock; the loop is not blocked.

    Cancelled, it takes the lock back first, so that ``async with`` can release it.
    """
    lock = native.lock_of(obj)
    seconds_of(timeout)
    if not (lock.attached and lock.task is not None and lock._mine()):
        raise NotLockedError(f"{lock.label}: aio.wait_for is for the task that holds the lock", resource=lock.label)
    value: T = await serve(lock._wait_steps(obj, predicate, timeout), lock)
    return value


async def enter(obj: object) -> None:
    """``async with``."""
    await _take(native.lock_of(obj), obj, b"", FOREVER)


async def leave(obj: object) -> None:
    """The end of it."""
    await _give(native.lock_of(obj))


def leave_for(obj: object, task: Any) -> None:
    """The end of it, in a coroutine that is destroyed, which that task has entered."""
    lock = native.lock_of(obj)
    _act_for(task, lock, lock._task_give)


@contextmanager
def _given_back(lock: Any, task: Any) -> Iterator[None]:
    """The body is that task's, which has the lock; one level of it goes back at the end, however that comes."""
    try:
        yield
    except GeneratorExit:
        _act_for(task, lock, lock._task_give)
        raise
    except BaseException:
        lock._task_give()
        raise
    lock._task_give()


def _act_for(task: Any, lock: Any, act: Callable[[], object]) -> None:
    """By who destroys a coroutine in which that task has taken the lock: act() is its end.  That may be the collector,
    in whichever task or thread has the lock by now.  Another task of the loop, as closes what an async generator has
    left open, acts as the one that has the lock still.  Of one that has ended, or of another loop, nothing is to be
    given back: that counts as an owner's death, and lets others in already."""
    running = tasking.current_task()
    with suppress(NotOwnerError):
        if running is task and task is not None:  # of none nothing is known: a thread may have the lock
            act()
        elif lock.task is task and not task.done() and tasking.running_loop() is (loop := task.get_loop()):
            if running is not None:
                asyncio._leave_task(loop, running)
            asyncio._enter_task(loop, task)
            try:
                act()
            finally:
                asyncio._leave_task(loop, task)
                if running is not None:
                    asyncio._enter_task(loop, running)


async def _give(lock: Any) -> None:
    """One level back.  A store is told of the last one by a thread, and the loop goes on meanwhile."""
    if not lock.far:
        lock._task_give()
        return
    with _given_back(lock, lock.task):
        await _depart(lock, lock.away.departure(loud=True))


def _done_by_thread(lock: Any, work: Callable[[], T]) -> asyncio.Future[T]:
    """By one of the store's.  Those of the loop may all be busy with calls that wait for just this lock."""
    return asyncio.wrap_future(lock.away.store.done_by_thread(work))


async def _depart(lock: Any, work: Callable[[], object] | None) -> None:
    """By the owner.  Cancelled, it waits on: what the store is told cannot be taken back."""
    if work is None:
        return
    future = _done_by_thread(lock, work)
    cancelled = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except CancelledError as error:
            cancelled = error
    try:
        future.result()
    except BaseException:
        lock._discard()
        raise
    if cancelled is not None:
        raise cancelled


async def by_thread(lock: Any, work: Callable[[], T], undo: Callable[[T], object] = id) -> T:
    """What work() returns or raises, in a thread: it asks the store of that lock.  Cancelled, or destroyed, it works on
    to its end; undo: called with what came of it then, by whichever thread; never blocks."""
    errand = _Errand(work, undo)
    future = _done_by_thread(lock, errand.run)
    cancelled = None
    try:
        while not future.done():
            try:
                await asyncio.wait([future])
            except CancelledError as error:
                cancelled = error
        result: T = future.result()
    except GeneratorExit:
        errand.drop()
        raise
    if cancelled is not None:
        errand.drop()
        raise cancelled
    return result


class _Errand:
    """Of by_thread.  One of the two that want to know of each other, run and drop, is the second, and undoes."""

    def __init__(self, work: Callable[[], Any], undo: Callable[[Any], object]) -> None:
        self.work, self.undo = work, undo
        self.results: list[Any] = []
        self.dropped: list[None] = []

    def run(self) -> Any:
        result = self.work()
        self.results.append(result)
        if self.dropped:
            self._undo()
        return result

    def drop(self) -> None:
        self.dropped.append(None)
        self._undo()

    def _undo(self) -> None:
        with suppress(IndexError):  # there is none yet, or the other was first
            self.undo(self.results.pop())


def locked(
    fn: Any, label: bytes, timeout: float | None, when: Callable[[Any], object] | None, atomic: bool, exclusive: bool
) -> Any:
    """What @Lockable.locked makes of a coroutine function: another one."""
    seconds = seconds_of(timeout)
    if not exclusive:
        return _reading(fn, label, seconds)

    async def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        lock = native.task_enter(self, label) or await _take_in_time(self, label, seconds)
        task = lock.task
        try:
            result = await fn(self, *args, **kwargs)
        except GeneratorExit:  # it can wait for nothing any more
            _act_for(task, lock, lock._task_give)
            raise
        except BaseException:
            with suppress(NotOwnerError):  # what the call raised is what the caller sees
                await _give(lock)
            raise
        if lock.far:
            await _give(lock)
        else:
            lock._task_give()
        return result

    async def careful_call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        deadline = FOREVER if seconds == FOREVER else monotonic() + seconds
        lock = native.task_enter(self, label) or await _take_in_time(self, label, seconds)
        task = lock.task
        try:
            if when is not None:
                await serve(lock._guard_steps(when, self, deadline, timeout), lock)
            result = await (_atomically(lock, fn, self, args, kwargs) if atomic else fn(self, *args, **kwargs))
        except GeneratorExit:
            _act_for(task, lock, lock._task_give)
            raise
        except BaseException:
            with suppress(NotOwnerError):
                await _give(lock)
            raise
        await _give(lock)
        return result

    return functools.update_wrapper(careful_call if when is not None or atomic else call, fn)


def _reading(fn: Any, label: bytes, seconds: float) -> Any:
    async def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        lock, task = native.lock_of(self), tasking.current_task()
        if task is None:
            lock._no_task()
        how = await _read(lock, self, label, FOREVER if seconds == FOREVER else monotonic() + seconds)
        if how is None:
            lock._timed_out(seconds)
        if how is lock:  # the task has it for itself
            with _given_back(lock, task):
                return await fn(self, *args, **kwargs)
        readers = tasking.reading.setdefault(lock, tasking.Readers())
        try:
            readers.setdefault(task, WeakSet()).add(how)
            return await fn(self, *args, **kwargs)
        finally:
            how.leave()  # first, and whatever comes: readers knows no task any more that is collected
            if (ins := readers.get(task)) is not None:
                ins.discard(how)
                if not ins:
                    readers.pop(task, None)

    return functools.update_wrapper(call, fn)


async def _read(lock: Any, obj: object, method: bytes, deadline: float) -> Any:
    """How the running task is in, or the lock, if it owns that; None: not by the deadline."""
    if lock._mine() and lock.task is None:
        lock._stuck()
    how = lock._read(obj, method, lock._task_reads())
    while how is None and deadline > monotonic():
        how = await lookout.turn(lock, method, deadline, reads=True) or None
        if how is not None and lock.flags & native.RECOVERING:  # that takes the lock itself
            how.leave()
            how = None
            if await _take(lock, obj, method, deadline):
                lock._task_give()
    return how


async def _atomically(lock: Any, fn: Any, obj: Any, args: Any, kwargs: Any) -> Any:
    task, saved = lock.task, lock._enter_atomic()
    try:
        result = await fn(obj, *args, **kwargs)
    except GeneratorExit:
        _act_for(task, lock, partial(lock._leave_atomic, saved, False))
        raise
    except BaseException:
        lock._leave_atomic(saved, False)
        raise
    lock._leave_atomic(saved, True)
    return result


async def _take_in_time(obj: object, method: bytes, seconds: float) -> Any:
    """Its lock. Raises: LockTimeout."""
    lock = native.lock_of(obj)
    if not await _take(lock, obj, method, FOREVER if seconds == FOREVER else monotonic() + seconds):
        lock._timed_out(seconds)
    return lock


async def _take(lock: Any, obj: object, method: bytes, deadline: float, keep: bool = False) -> bool:
    patient = deadline > monotonic()
    if lock._task_take(obj, method, patient):
        return True
    if not patient:
        return False
    if lock._task_reads():
        lock._reads_itself(True)
    begun = monotonic()
    if not await lookout.turn(lock, method, deadline, keep=keep):
        observing.timed_out(lock)
        return False
    try:
        if lock.flags & native.RECOVERING:
            lock._recover(obj)
        lock.create(obj)
        if observing.observed():
            lock._observe(obj, monotonic() - begun)
    except BaseException:
        lock._task_give()
        raise
    return True


async def _take_permit(semaphore: Any, deadline: float) -> bool:
    semaphore._check_initialized()
    patient = deadline > monotonic()
    counts, gate = semaphore._counts, semaphore._gate_lock
    if (task := tasking.current_task()) is None:
        gate._no_task()
    if not patient:
        return await _try_once(semaphore, deadline)
    if not semaphore._lock.far and counts._idle() and counts._try() is None:
        return True
    patience = semaphore._patience()
    if not await _take(gate, semaphore, b"", deadline):
        return False
    with _given_back(gate, task):
        taken: bool = await serve(semaphore._steps(deadline, patience), semaphore._lock)
    return taken


async def _try_once(semaphore: Any, deadline: float) -> bool:
    if semaphore._lock.far:
        return bool(await serve(semaphore._counts.one_step(), semaphore._lock))
    return await _attempt(semaphore, deadline) is None


async def _attempt(semaphore: Any, deadline: float) -> int | None:
    """See waiting.Attempt."""
    found: int | None = semaphore._counts._try()
    if found is False:
        found = await lookout.attempt(semaphore, monotonic() + waiting.moments(deadline))
    return found


async def serve(steps: waiting.Steps[T], lock: Any) -> T:
    """Serve the steps by suspending the task, to their end."""
    act: Callable[[], waiting.Step] = partial(next, steps)
    while True:
        try:
            step = act()
        except StopIteration as end:
            value: T = end.value
            return value
        try:
            act = partial(steps.send, await _come_of(step, lock))
        except BaseException as error:
            act = partial(steps.throw, error)


async def _come_of(step: waiting.Step, lock: Any) -> Any:
    if isinstance(step, waiting.Sleep):
        return await lookout.news(lock, step.epoch, step.until, step.timed, step.method)
    if isinstance(step, waiting.Attempt):
        return await _attempt(step.semaphore, step.deadline)
    if isinstance(step, waiting.Inquiry):
        return await by_thread(lock, step.ask, step.undo)
    if isinstance(step, waiting.Depart):
        return await _depart(lock, lock.away.departure(step.loud, suspends=True))
    cancelled = None
    while True:
        try:
            got = await _take(lock, step.obj, step.method.encode(), step.deadline, step.keep)
            break
        except CancelledError as error:
            if not step.keep:
                raise
            cancelled = error  # once it has the lock
    if got and step.levels > 1:
        lock._task_deepen(step.levels - 1)
    if cancelled is not None:
        raise cancelled
    return got
