"""A plugin of pytest, ``-p coheld.pytest``: what tests of locks should say when they fail, or do not end.

lock order      is checked as with COHELD_CHECK_ORDER=1, in pytest's own process. A test in which locks are first
                taken in an order that contradicts another, of the same test or of an earlier one, fails, with both
                places. (A thread that goes on after its test may do it in the next one.)
time-outs       before a test times out, by faulthandler_timeout or pytest-timeout, the locks that somebody has or
                waits for are written to standard error, as coheld ps shows them: with pytest-timeout's method
                signal when it does, else a moment before, by a thread
failures        by LockTimeout or DeadlockError get the same table as a section of their report
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import suppress
from typing import Any, TypeVar

import pytest

from . import ordering
from .cli import ps
from .errors import CoheldError, DeadlockError, LockTimeout
from .inspecting import resources

T = TypeVar("T")
Wrapper = Generator[None, T, T]
_TITLE = "coheld: who has what"


class _Session:
    """Of one run of pytest.  seen: so many inversions have made a test fail.  started: it has begun to check.  stderr:
    that of the run, and not what pytest captures."""

    closed = False

    def __init__(self) -> None:
        self.seen = 0
        self.started = False
        self.stderr = os.dup(_stderr())
        self.writing = threading.RLock()  # a timer may be about to write when the run ends
        self.timers: dict[str, threading.Timer] = {}

    def news(self) -> str:
        """Inversions since the last look, as text."""
        found = ordering.inversions()
        new, self.seen = found[self.seen :], len(found)
        return "\n\n".join(map(str, new))

    def tell(self, test: str) -> None:
        """Who has what, at once: the process may not live for long."""
        lines = ["", f"+++ {_TITLE}, as {test} times out +++", *_table(), ""]
        with self.writing:
            if not self.closed:  # else the number may be another file's
                os.write(self.stderr, "\n".join(lines).encode(errors="replace"))

    def tell_before(self, seconds: float, test: str, why: str) -> None:
        """Tell a moment before these seconds are over, unless it is called off."""
        timer = threading.Timer(seconds - min(1.0, seconds / 10), self.tell, [test])
        timer.daemon = True
        self.timers[why] = timer
        timer.start()

    def call_off(self, why: str) -> None:
        """Nothing happens if it has been told."""
        if (timer := self.timers.pop(why, None)) is not None:
            timer.cancel()

    def close(self) -> None:
        for why in list(self.timers):
            self.call_off(why)
        with self.writing:
            if not self.closed:
                self.closed = True
                os.close(self.stderr)


_session = pytest.StashKey[_Session]()


def _stderr() -> int:
    with suppress(AttributeError, OSError, ValueError):  # what stands there may be no file
        return sys.stderr.fileno()
    return 2


def _table() -> list[str]:
    try:
        busy = [one for one in resources() if one.busy]
    except (CoheldError, OSError) as error:
        return [f"locks cannot be looked at: {error}"]
    return ps.lines_of(busy) if busy else ["nobody has a lock, or waits for one"]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_session] = _Session()
    config.stash[_session].started = ordering.start()


def pytest_unconfigure(config: pytest.Config) -> None:
    if _session in config.stash:
        if config.stash[_session].started:  # else it is that of a run around this one
            ordering.stop()
        config.stash[_session].close()
        del config.stash[_session]


# ---- the order of locks --------------------------------------------------------------------------------------------


def _checked(item: pytest.Item, phase: str) -> Wrapper[T]:
    """A phase of a test, that fails where it has taken locks in a wrong order; one that fails anyway says so, too."""
    session = item.config.stash[_session]
    try:
        result = yield
    except BaseException:
        if new := session.news():
            item.add_report_section(phase, "lock order", new)
        raise
    if new := session.news():
        pytest.fail(new, pytrace=False)
    return result


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Wrapper[object]:
    return (yield from _checked(item, "setup"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Wrapper[object]:
    return (yield from _checked(item, "call"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Wrapper[object]:
    return (yield from _checked(item, "teardown"))


# ---- who has what --------------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[Any]) -> Wrapper[pytest.TestReport]:
    report = yield
    if report.failed and call.excinfo is not None and any(map(_is_of_locks, _with_causes(call.excinfo.value))):
        report.sections.append((_TITLE, "\n".join(_table())))
    return report


def _is_of_locks(error: BaseException) -> bool:
    return isinstance(error, LockTimeout | DeadlockError)


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """The exception, and those that it came from or is a group of."""
    found = [error]
    for one in found:
        yield one
        more = [one.__cause__, one.__context__, *(one.exceptions if isinstance(one, BaseExceptionGroup) else ())]
        found += [another for another in more if another is not None and all(another is not old for old in found)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Wrapper[object]:
    session, seconds = item.config.stash[_session], _faulthandler_timeout(item.config)
    if seconds > 0:
        session.tell_before(seconds, item.nodeid, "faulthandler")
    try:
        return (yield)
    finally:
        session.call_off("faulthandler")


def _faulthandler_timeout(config: pytest.Config) -> float:
    if not config.pluginmanager.hasplugin("faulthandler"):
        return 0.0
    return float(config.getini("faulthandler_timeout") or 0.0)


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> Wrapper[object]:
    """Of pytest-timeout, whose handler of SIGALRM ends the test: ours comes before it."""
    done = yield
    session = item.config.stash[_session]
    if sys.platform == "win32" or settings.method != "signal":
        session.tell_before(settings.timeout, item.nodeid, "timeout")
        return done
    theirs = signal.getsignal(signal.SIGALRM)

    def tell_and_end(number: int, frame: Any) -> None:
        __tracebackhide__ = True
        session.tell(item.nodeid)
        if callable(theirs):
            theirs(number, frame)

    signal.signal(signal.SIGALRM, tell_and_end)
    return done


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_timeout_cancel_timer(item: pytest.Item) -> Wrapper[object]:
    item.config.stash[_session].call_off("timeout")
    return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_enter_pdb(config: pytest.Config) -> None:
    """Nothing times out in a debugger."""
    for why in ("faulthandler", "timeout"):
        config.stash[_session].call_off(why)
