"""The peers: one small class each, written as its users write it.

Every class has the same three methods: `plain` takes no lock, `locked` takes it around nothing, `held` takes
it around a given piece of work. Libraries are imported at first use, so that one which is not installed costs
only its own lines.
"""

import functools
import importlib
import logging
import os
import tempfile
from collections.abc import Callable
from typing import Any, Protocol

COHELD = "coheld"
RLOCK = "threading.RLock"
MP_RLOCK = "mp.RLock"
PYATS = "pyATS"
FILELOCK = "filelock"
FASTENERS = "fasteners"


class Device(Protocol):
    """What every peer's class answers."""

    def plain(self) -> None: ...

    def locked(self) -> None: ...

    def held(self, work: Callable[[], Any]) -> Any: ...


def _lockable(module: str) -> type[Device]:
    """A class that inherits the module's `Lockable`: coheld's and the reference's are used alike."""
    base: Any = importlib.import_module(module).Lockable

    class Inherits(base):  # type: ignore[misc]
        def plain(self) -> None:
            pass

        @base.locked  # type: ignore[untyped-decorator]
        def locked(self) -> None:
            pass

        @base.locked  # type: ignore[untyped-decorator]
        def held(self, work: Callable[[], Any]) -> Any:
            return work()

    return Inherits


def _pyats() -> type[Device]:
    name = "pyats.async_.synchronize"
    inherits = _lockable(name)
    # It would write a warning at every contended call: spare it that.
    logging.getLogger(name).setLevel(logging.ERROR)
    return inherits


class _WithLock:
    """`with self._lock` written inside the methods; the subclass makes the lock."""

    _lock: Any

    def plain(self) -> None:
        pass

    def locked(self) -> None:
        with self._lock:
            pass

    def held(self, work: Callable[[], Any]) -> Any:
        with self._lock:
            return work()


def _threading_rlock() -> type[Device]:
    import threading

    class ThreadingRLock(_WithLock):
        def __init__(self) -> None:
            self._lock = threading.RLock()

    return ThreadingRLock


def _filelock() -> type[Device]:
    import filelock

    class FileLock(_WithLock):
        def __init__(self) -> None:
            self._path = _new_path()
            self._open()
            os.register_at_fork(after_in_child=self._open)  # it refuses an instance from before a fork

        def _open(self) -> None:
            self._lock = filelock.FileLock(self._path)

    return FileLock


def _fasteners() -> type[Device]:
    library: Any = importlib.import_module("fasteners")

    class Fasteners(_WithLock):
        def __init__(self) -> None:
            self._lock = library.InterProcessLock(_new_path())

    return Fasteners


def _new_path() -> str:
    """A new path for a lock file; it goes away with the run's scratch directory."""
    return tempfile.mkdtemp() + "/lock"


def _under_lock(method: Callable[..., Any]) -> Callable[..., Any]:
    """The decorator that most programs write by hand."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return method(self, *args, **kwargs)

    return call


def _mp_rlock() -> type[Device]:
    import multiprocessing

    class MultiprocessingRLock:
        def __init__(self) -> None:
            self._lock = multiprocessing.get_context("fork").RLock()

        def plain(self) -> None:
            pass

        @_under_lock
        def locked(self) -> None:
            pass

        @_under_lock
        def held(self, work: Callable[[], Any]) -> Any:
            return work()

    return MultiprocessingRLock


_CLASSES: dict[str, Callable[[], type[Device]]] = {
    COHELD: lambda: _lockable("coheld"),
    RLOCK: _threading_rlock,
    MP_RLOCK: _mp_rlock,
    PYATS: _pyats,
    FILELOCK: _filelock,
    FASTENERS: _fasteners,
}


@functools.cache
def device_class(name: str) -> type[Device]:
    """The class of one peer. Raises: ImportError: if its library is not installed."""
    return _CLASSES[name]()


def new(name: str) -> Device:
    """A new device of one peer, with a lock of its own. Raises: ImportError: as `device_class`."""
    return device_class(name)()


def installed(*names: str) -> list[str]:
    """Those of `names` whose library can be imported, in the same order."""
    return [name for name in names if _importable(name)]


def _importable(name: str) -> bool:
    try:
        device_class(name)
    except ImportError:
        return False
    return True
