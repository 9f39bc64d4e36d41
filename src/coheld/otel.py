"""Metrics of locks, by OpenTelemetry: how long callers wait, how long they hold, how many wait or gave up, how many
owners died; and, as a look shows them, reading calls, and permits that are taken or waited for.

An observer (observing.py) keeps, for each lock that a thread or its tasks hold, since when; what is known is recorded
after the release, where nobody waits for it.  So a call that never ends is in no histogram: the number of those that
wait for it is what tells.

Who has the entry of a hold: the thread.  A lock is released by the thread that took it, and a task's by the thread of
its loop; between the release and the news of it another thread may take the lock, and its entry is another one.  An
entry whose end nobody said (a task that was destroyed, a fork) is replaced at that thread's next acquire of the lock.

The OpenTelemetry API is imported by start(), and by nothing before it.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from time import monotonic
from typing import TYPE_CHECKING, Any

from . import observing
from ._version import __version__
from .backends import files
from .backends.base import Gatekeeping, handles
from .process import at_fork

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation

    from .backends.base import Handle

_SECONDS = [0.00001, 0.0001, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 300.0, 3600.0]
_WAITS = [0.0, *_SECONDS]  # the first bucket are those that found the lock free
_Key = tuple[str, str]
"""What a lock is called in an attribute, and its backend."""


def start(meter_provider: MeterProvider | None = None) -> None:
    """Record the locks of this process from now on, with the meters of that provider (None: the global one, also if it
    is set later).  Done again, what was started before ends.  Forked children go on; what their SDK needs is its own.

    Raises: ImportError: if the OpenTelemetry API is not installed.
    """
    try:
        from opentelemetry.metrics import get_meter
    except ImportError as error:
        raise ImportError(f"coheld.otel needs the OpenTelemetry API: pip install 'coheld[otel]' ({error})") from error
    with _process.guard:
        former, _process.recorder = _process.recorder, _Recorder(get_meter("coheld", __version__, meter_provider))
        observing.start(_process.recorder)
        if former is not None:
            observing.stop(former)


def start_or_tell() -> None:
    """The same with the global provider, where nobody could do anything about an error: a log line says it."""
    try:
        start()
    except Exception as error:  # the API's own as well: it loads what its environment names
        logging.getLogger("coheld").warning("no metrics of locks: %s", error)


class _Since(threading.local):
    """Of this thread: since when it, or a task of its loop, holds a lock, and how long that had to wait."""

    def __init__(self) -> None:
        self.held: weakref.WeakKeyDictionary[Handle, tuple[float, float]] = weakref.WeakKeyDictionary()


class _Recorder:
    """An observer."""

    def __init__(self, meter: Any) -> None:
        self.since = _Since()
        self.keys: weakref.WeakKeyDictionary[Handle, _Key] = weakref.WeakKeyDictionary()
        self.waits = meter.create_histogram(
            "coheld.lock.wait.duration",
            unit="s",
            description="How long a caller waited for a lock that it got; 0 if it was free",
            explicit_bucket_boundaries_advisory=_WAITS,
        )
        self.holds = meter.create_histogram(
            "coheld.lock.hold.duration",
            unit="s",
            description="How long a caller held a lock",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self.recoveries = meter.create_counter(
            "coheld.lock.recoveries",
            unit="{recovery}",
            description="Locks that this process took over from an owner that died",
        )
        self.timeouts = meter.create_counter(
            "coheld.lock.timeouts",
            unit="{timeout}",
            description="Callers of this process that waited for a lock for as long as they were ready to, in vain",
        )
        for name, look, unit, what in (
            ("lock.waiters", self.waiters, "{waiter}", "How many wait for a lock"),
            ("lock.readers", self.readers, "{call}", "How many reading calls run"),
            ("semaphore.permits", self.permits, "{permit}", "How many permits are taken"),
            ("semaphore.waiters", self.queues, "{waiter}", "How many wait for a permit"),
        ):
            meter.create_observable_gauge(
                f"coheld.{name}", [look], unit=unit, description=f"{what} now, in all processes"
            )

    def acquired(self, lock: Handle, waited: float) -> None:
        self.key_of(lock)
        self.since.held[lock] = monotonic(), waited

    def released(self, lock: Handle) -> None:
        now = monotonic()
        if (found := self.since.held.pop(lock, None)) is not None:
            begun, waited = found
            attributes = _attributes(self.key_of(lock))
            self.waits.record(waited, attributes)
            self.holds.record(now - begun, attributes)

    def recovered(self, lock: Handle) -> None:
        self.recoveries.add(1, _attributes(self.key_of(lock)))

    def timed_out(self, lock: Handle) -> None:
        self.timeouts.add(1, _attributes(self.key_of(lock)))

    def key_of(self, lock: Handle) -> _Key:
        if (found := self.keys.get(lock)) is None or found[0] == _ANONYMOUS:
            found = self.keys[lock] = _name_of(lock), lock.resource.scheme
        return found

    def waiters(self, _options: CallbackOptions) -> Iterable[Observation]:
        return self.seen(self.known(), lambda lock: lock._counters()[3])

    def readers(self, _options: CallbackOptions) -> Iterable[Observation]:
        return self.seen((lock for lock in self.known() if lock.readers is not None), _inside)

    def permits(self, _options: CallbackOptions) -> Iterable[Observation]:
        mutexes = (lock for lock in _named(files.SEMAPHORE) if not isinstance(lock, Gatekeeping))
        return self.seen((lock for lock in mutexes if lock.readers is not None), _inside)

    def queues(self, _options: CallbackOptions) -> Iterable[Observation]:
        """Who has the gate waits, and whoever waits for the gate."""
        gates = (lock for lock in _named(files.SEMAPHORE) if isinstance(lock, Gatekeeping))
        return self.seen(gates, _before)

    def seen(self, locks: Iterable[Handle], count: Callable[[Handle], int]) -> Iterable[Observation]:
        from opentelemetry.metrics import Observation

        if _process.recorder is not self:
            return []
        counts = Counter[_Key]()
        for lock in locks:
            counts[self.key_of(lock)] += count(lock)
        return [Observation(number, _attributes(key)) for key, number in counts.items()]

    def known(self) -> Iterator[Handle]:
        """The named locks that this process has now, and the anonymous ones that it has held."""
        held = (lock for reference in self.keys.keyrefs() if (lock := reference()) is not None and lock.attached)
        locks = {*held, *(lock for lock in _named(files.NAMED) if lock.attached)}
        return (lock for lock in locks if getattr(lock.resource, "kind", None) != files.SEMAPHORE)


def _named(kind: int) -> Iterator[Handle]:
    """Those that this process has now."""
    return (lock for lock in handles() if getattr(lock.resource, "kind", None) == kind)


def _inside(lock: Handle) -> int:
    """Reading calls, or permits, by its register."""
    return sum(count for _, _, count in lock.readers.living())


def _before(gate: Handle) -> int:
    """Who waits for a permit, by the gate: one that this process has not looked for yet has nobody of it."""
    return gate._counters()[3] + (gate._owner() is not None) if gate.attached else 0


_ANONYMOUS = "anonymous"


def _name_of(lock: Handle) -> str:
    """A name, or the class of the object: each anonymous lock by itself would be a series without end."""
    if lock.resource.named:
        return str(lock.resource.name)  # type: ignore[attr-defined]  # what is found by a name has it
    cls = observing.class_of(lock)
    return f"{cls.__module__}.{cls.__qualname__}" if cls is not None else _ANONYMOUS


def _attributes(key: _Key) -> dict[str, str]:
    return {"coheld.lock.name": key[0], "coheld.lock.backend": key[1]}


class _Process:
    """Of this process."""

    def __init__(self) -> None:
        self.recorder: _Recorder | None = None
        self.begin()

    def begin(self) -> None:
        self.guard = threading.Lock()  # a forked child must not inherit it locked


_process = _Process()
at_fork(child=_process.begin)
