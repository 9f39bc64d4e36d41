"""The last that a process does: give back what only it uses.

multiprocessing joins its children at exit, which may still have to attach, so it is done after that; and it ends its
own children without atexit.
"""

from __future__ import annotations

import atexit
import sys
import threading
from collections.abc import Callable
from typing import Any

from ..process import at_fork


class _Process:
    """What belongs to this process alone."""

    def __init__(self) -> None:
        self.leavers: list[Callable[[], None]] = []  # a forked child uses what its parent did
        self.begin()

    def begin(self) -> None:
        self.finalizer: Any = None


_process = _Process()
at_fork(child=_process.begin)


def at_exit(leave: Callable[[], None]) -> None:
    """Call it at the end of this process, and of those forked from it; once, however often it is asked for."""
    if leave not in _process.leavers:
        _process.leavers.append(leave)
    util = sys.modules.get("multiprocessing.util")
    if util and not (_process.finalizer and _process.finalizer.still_active()):  # a new child clears them
        _process.finalizer = util.Finalize(None, _leave, exitpriority=-100)


@atexit.register
def _at_exit() -> None:
    if not (_process.finalizer and _process.finalizer.still_active()):
        _leave()


def _leave() -> None:
    """Where its threads go on without it (multiprocessing waits for them after this), what they use stays, until its
    parent leaves or another process starts."""
    if any(map(_goes_on, threading.enumerate())):
        return
    for leave in _process.leavers:
        leave()


def _goes_on(thread: threading.Thread) -> bool:
    return not thread.daemon and thread not in (threading.main_thread(), threading.current_thread())
