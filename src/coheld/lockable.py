"""Lockable: the class that users inherit, and its decorator.

The model is Hoare's monitor, in the form that Ada calls a protected object; the interface is that of
``pyats.async_.synchronize.Lockable``.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar, overload

from . import mutex as _mutex
from . import native, state
from .backends.base import Handle
from .backends.tasking import current_task
from .errors import CoheldError, DeadlockError, NotInitializedError, NotLockedError

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
_MISSING: Any = object()


class _Exit:
    """The end of async with.  Python looks it up as the block begins, so it knows in which task: whoever ends the block
    may be the collector, in another."""

    def __get__(self, obj: Lockable | None, _type: type | None = None) -> Callable[..., Coroutine[Any, Any, None]]:
        return _leave if obj is None else functools.partial(_leave, obj, _entered=current_task())


async def _leave(
    obj: Lockable, kind: type[BaseException] | None = None, *_exception: object, _entered: Any = None
) -> None:
    from . import aio

    if kind is GeneratorExit:
        aio.leave_for(obj, _entered or current_task())
    else:
        await aio.leave(obj)


class Lockable(native.LockableBase):
    """An object whose locked methods run one at a time, over every thread and process that has a copy of it.

    Inherit it, call ``super().__init__()``, and decorate the methods that must not overlap with ``@Lockable.locked``.
    Without a name the lock reaches other processes by fork, spawn or pickle; with ``lock_name`` any process of this
    user finds it.

    Two methods of the class are called under the lock where it has them: ``__create__(self)`` once, in the process
    that makes the resource (again in the next one, if it did not return), and ``__recover__(self, dead)`` in the first
    owner after one that died while it held the lock (again, until it returns); dead is an Owner.

    Raises: TypeError, ValueError: if lock_name is not text of 1 to 255 bytes of UTF-8, or lock_backend no known URL.
    InsecureError, IncompatibleError: if what is there under that name must not or cannot be used.  OSError: if there is
    no room for the lock.
    """

    __lock__: Handle

    def __init__(
        self, *args: Any, lock_name: str | None = None, lock_backend: str | None = None, **kwargs: Any
    ) -> None:
        if state.unsettled and (settle := state.unsettled.get(id(type(self)))):
            settle()
        lock = _hang_lock(self, lock_name, lock_backend)
        init = super().__init__
        if getattr(init, "__objclass__", None) is not object or type(self).__new__ is object.__new__:
            init(*args, **kwargs)  # else object's, which would refuse what __new__ has consumed
        lock.create(self)

    @overload
    @staticmethod
    def locked(fn: F, /) -> F: ...

    # One option at least: if obj.locked(): must not be true.
    @overload
    @staticmethod
    def locked(
        *,
        timeout: float | None,
        when: Callable[[Any], object] | None = ...,
        atomic: bool = ...,
        exclusive: bool = ...,
    ) -> Callable[[F], F]: ...

    @overload
    @staticmethod
    def locked(
        *,
        when: Callable[[Any], object] | None,
        timeout: float | None = ...,
        atomic: bool = ...,
        exclusive: bool = ...,
    ) -> Callable[[F], F]: ...

    @overload
    @staticmethod
    def locked(
        *,
        atomic: bool,
        timeout: float | None = ...,
        when: Callable[[Any], object] | None = ...,
        exclusive: bool = ...,
    ) -> Callable[[F], F]: ...

    @overload
    @staticmethod
    def locked(
        *,
        exclusive: bool,
        timeout: float | None = ...,
        when: Callable[[Any], object] | None = ...,
        atomic: bool = ...,
    ) -> Callable[[F], F]: ...

    @staticmethod
    def locked(fn: Any = _MISSING, /, **options: Any) -> Any:
        """Decorate a method so that it runs with its object locked; the lock is given back when it returns or raises.

        A locked method may call others of the same object.  A call blocks until the lock is held: for ever, or for
        timeout seconds, then it raises LockTimeout and the method has not run.

        when: a guard, a function of the object.  It is called under the lock and may only look; where it is false, the
        lock is given up, and the guard is called again whenever another caller has given the lock back, or has died
        with it.  The timeout is that of both.  A false guard where the caller has the lock already raises
        DeadlockError: nobody else could make it true.

        atomic: if the method raises, the shared fields are again as they were when it was called.

        exclusive=False: a reading call. Any number of them, of whatever threads, tasks and processes, run together, and
        never with an exclusive one: for what lies outside of the object, a file or a device (shared fields have
        coheld.snapshot).  An exclusive call waits for the readers of the moment, and later ones wait behind it.
        A reading call inside of an exclusive one, or of a reading one, is fine; an exclusive call inside of a reading
        one raises DeadlockError.  It does not own the lock: shared fields are read as without it.

        A coroutine function becomes another one: the task that awaits it owns the lock, and the loop does not block.

        Raises: TypeError: if what is decorated is not a plain function, coroutine function or callable: a generator
        function (its body would run unlocked), a staticmethod, classmethod or property; or if an option is none.
        ValueError: if exclusive=False is given with when or atomic.  DeadlockError: by a call that would block the loop
        while a task of that loop holds the lock, or reads.
        """
        if not options:
            return _locked(fn)
        if fn is not _MISSING:
            raise TypeError("use @Lockable.locked(timeout=…) on its own, without the function")
        _check_options(**options)  # a bad one shows here, not at the first call
        return functools.partial(_locked, **options)

    async def __aenter__(self) -> Self:
        """Take the lock for the running asyncio task, without blocking the loop; see coheld.aio.acquire."""
        from . import aio

        await aio.enter(self)
        return self

    if TYPE_CHECKING:

        async def __aexit__(self, kind: type[BaseException] | None, *_exception: object) -> None: ...

    else:
        __aexit__ = _Exit()

    def __init_subclass__(cls, *, max_state: int | None = None, **kwargs: Any) -> None:
        """max_state: how large the shared state may be, in bytes of MessagePack; default 64 MiB."""
        super().__init_subclass__(**kwargs)
        state.declare(cls, max_state)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        lock = native.peek(self)
        if isinstance(reduced, str) or lock is None:
            return reduced
        if schema := state.schema_of(type(self)):
            _bind_quietly(schema, lock)  # the lock then knows how to copy its state
        make, args, *rest = reduced
        return (_rebuild, (lock, make, args), *rest)


def _hang_lock(obj: Lockable, name: str | None, backend: str | None) -> Handle:
    """Give the object its lock.  One that has a lock keeps it, unless another is named: a diamond may call __init__
    twice, and others may hold it by now."""
    if name is None and backend is not None:
        raise TypeError("lock_backend needs a lock_name: anonymous locks live in this machine's memory")
    lock: Handle | None = native.peek(obj)
    if name is not None:
        lock = _mutex.named(name, backend)
    elif not isinstance(lock, Handle):
        lock = _mutex.anonymous(type(obj))
    native.hang(obj, lock)
    return lock


def _rebuild(lock: Handle, make: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Load a pickled or copied object; it has its lock before its items and state are set."""
    obj = make(*args)
    native.hang(obj, lock)
    return obj


def _locked(
    fn: Any, timeout: float | None = None, when: Any = None, atomic: bool = False, exclusive: bool = True
) -> Any:
    _refuse(fn)
    name = getattr(fn, "__qualname__", type(fn).__qualname__).rpartition("<locals>.")[2]
    label = name.encode(errors="replace")[-32:]
    if inspect.iscoroutinefunction(_body_of(fn)):
        from . import aio

        return aio.locked(fn, label, timeout, when, atomic, exclusive)
    body = _run_at_once(fn) if _may_run_later(fn) else fn
    method = native.LockedMethod(body, timeout, label, when, atomic, exclusive)
    return functools.update_wrapper(method, fn)


_LATER = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)


def _may_run_later(fn: Any) -> bool:
    """Does another decorator stand between us and a function whose call only makes what runs its body?  It may run
    that itself, and may not."""
    try:
        inner = inspect.unwrap(fn)
    except ValueError:  # in a ring
        return False
    return inner is not fn and any(is_such(inner) for is_such in _LATER)


def _run_at_once(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same; what it returns must not be a body that has not run."""

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = fn(*args, **kwargs)
        if inspect.iscoroutine(result) or inspect.isgenerator(result) or inspect.isasyncgen(result):
            if not inspect.isasyncgen(result):
                result.close()
            raise TypeError(
                f"{call.__qualname__}: what is decorated between @Lockable.locked and its def returns a "
                f"{type(result).__name__}, whose body would run unlocked: put @Lockable.locked next to the def"
            )
        return result

    return call


def _check_options(
    timeout: float | None = None, when: Any = None, atomic: bool = False, exclusive: bool = True
) -> None:
    native.LockedMethod(id, timeout, b"")
    if when is not None and not callable(when):
        raise TypeError(f"when must be a function of the object, not {type(when).__name__}")
    if inspect.iscoroutinefunction(when):
        raise TypeError("when must be a plain function: what a coroutine function returns is always true")
    for name, option in {"atomic": atomic, "exclusive": exclusive}.items():
        if not isinstance(option, bool):
            raise TypeError(f"{name} must be True or False, not {type(option).__name__}")
    if not exclusive and (atomic or when is not None):
        raise ValueError(
            "exclusive=False goes with timeout alone: a reading call changes nothing, and no guard is for it"
        )


def _bind_quietly(schema: Any, lock: Any) -> None:
    """Loading and copying never raise for a lock that cannot be reached; the first call says why."""
    with suppress(CoheldError, OSError):
        schema.bind(lock)


def wait_for(obj: object, predicate: Callable[[], T], timeout: float | None = None) -> T:
    """Wait, with the object's lock held, until predicate() is true; its value.

    The calling thread must hold the lock. While the predicate is false, the lock is given up, however many levels of it
    are held, and what was changed so far becomes visible to others; predicate is called again, with the lock, whenever
    another caller has given the lock back, or has died with it.  It may only look.  The lock is held again when this
    returns or raises.  Containers that were read before the wait are detached: read them again.  timeout in seconds;
    None: for ever.

    Raises: LockTimeout: if it does not come true in that time.  NotLockedError: if the lock is not held.
    DeadlockError: inside of an atomic call that has changed something, or for a task, whose loop it would block: see
    coheld.aio.wait_for.
    """
    lock: Handle = native.lock_of(obj)
    native.LockedMethod(id, timeout, b"")  # a bad timeout raises
    if not (lock.attached and lock._mine()):
        raise NotLockedError(f"{lock.label}: wait_for is for who holds the lock", resource=lock.label)
    if lock.task is not None:
        raise DeadlockError(f"{lock.label}: a task holds it: await coheld.aio.wait_for(…)", resource=lock.label)
    return lock.wait_for(obj, predicate, timeout)


def _refuse(fn: Any) -> None:
    """Raises: TypeError: if locking fn would not lock what it does."""
    if fn is _MISSING:
        raise TypeError("use @Lockable.locked without parentheses, or with timeout=…")
    if isinstance(fn, staticmethod | classmethod):
        raise TypeError(f"a {type(fn).__name__} has no object to lock; decorate a method of the object instead")
    if isinstance(fn, property | functools.cached_property):
        raise TypeError(f"put @{type(fn).__name__} above @Lockable.locked, not below it")
    if not callable(fn):
        raise TypeError(f"@Lockable.locked decorates a method, not {type(fn).__name__}")
    name = getattr(fn, "__qualname__", repr(fn))
    body = _body_of(fn)
    if inspect.isgeneratorfunction(body) or inspect.isasyncgenfunction(body):
        raise TypeError(
            f"{name} is a generator function: its body would run after the lock is given back; "
            "collect what it yields in a list, or take the lock where it is iterated: with obj: …"
        )


def _body_of(fn: Any) -> Any:
    """The function whose kind says when the body runs: that of a callable object, or of a context manager."""
    wrapped = getattr(fn, "__wrapped__", None)
    made_by_contextlib = getattr(fn, "__globals__", {}).get("__name__") == "contextlib"
    if made_by_contextlib and (inspect.isgeneratorfunction(wrapped) or inspect.isasyncgenfunction(wrapped)):
        return wrapped
    return fn if inspect.isroutine(fn) or isinstance(fn, functools.partial | type) else type(fn).__call__


def _reduce_locked(method: Any, protocol: int) -> Any:
    """A locked method pickles by its name, as functions do; by value where functions do."""
    if _pickled_by_value(method):
        return (
            _locked_again,
            (method.__wrapped__, method.timeout, method.when, method.atomic, method.exclusive),
            method.__dict__,
        )
    return method.__qualname__


def _locked_again(fn: Any, *options: Any) -> Any:
    return _locked(fn, *options)


def _pickled_by_value(method: Any) -> bool:
    """Does who pickles us now (cloudpickle, dill) ship what __main__ or a function defines by value?  Nothing that
    __reduce_ex__ is given says so; the calling frames do."""
    by_value = method.__module__ == "__main__" or "<locals>" in method.__qualname__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if "cloudpickle" in module or module.partition(".")[0] == "dill":
            return by_value or method.__module__ in frame.f_globals.get("list_registry_pickle_by_value", set)()
        if module not in ("pickle", __name__, native.LockedMethod.__module__):
            return False
        frame = frame.f_back
    return False


def _not_initialized(obj: Any) -> NoReturn:
    cls = type(obj).__qualname__
    if not isinstance(obj, Lockable):
        raise NotInitializedError(f"{cls} has locked methods but does not inherit Lockable")
    if (lock := native.peek(obj)) is not None:
        raise NotInitializedError(f"{cls}: its __lock__ is {lock!r}, not a lock of coheld")
    raise NotInitializedError(f"{cls} has no lock, because Lockable.__init__ has not run: {_remedy(type(obj))}")


def _remedy(cls: type) -> str:
    call = "super().__init__()"
    if hasattr(cls, "__dataclass_fields__"):
        if "__slots__" in vars(cls):  # the decorator has made another class of it, which super() does not know
            call = "Lockable.__init__(self)"
        return f"give the dataclass a __post_init__ that calls {call}"
    if hasattr(cls, "__attrs_attrs__"):
        return f"give the class an __attrs_post_init__ that calls {call}"
    in_front = [base for base in cls.__mro__[1 : cls.__mro__.index(Lockable)] if "__init__" in vars(base)]
    if in_front:
        name = in_front[0].__qualname__
        return f"{name}.__init__ must pass it on; put Lockable in front of {name}, or call Lockable.__init__(self)"
    return f"its __init__ must call {call}"


Handle.find_schema = staticmethod(state.schema_of)
native.install(Handle, _not_initialized, _reduce_locked)
