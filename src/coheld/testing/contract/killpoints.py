"""Kill a process at line N of coheld, for N = 1, 2, … until it comes to its end: between any two steps."""

import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import coheld
from coheld.testing.support import effort

PACKAGE = str(Path(coheld.__file__).parent)
TESTS = str(Path(__file__).parents[1])  # in the package, and none of its lines
TIMES = 3
INTERRUPTED = 3  # the status of a child that was, and did well afterwards
MOST = 2_000  # lines that one action may take; more is an action that loops


class _Tracer:
    """Calls `strike` when the process is about to execute its line number `line` of the package.

    In a loop, a line counts the first times only.
    """

    def __init__(self, line: int, strike: Callable[[], None]) -> None:
        self._left, self._strike = line, strike
        self._visits: Counter[tuple[CodeType, int]] = Counter()

    def __call__(self, frame: FrameType, event: str, _arg: Any) -> Any:
        path = frame.f_code.co_filename
        if not path.startswith(PACKAGE) or path.startswith(TESTS):
            return None
        if event == "line":
            self._visits[frame.f_code, frame.f_lineno] += 1
            self._left -= self._visits[frame.f_code, frame.f_lineno] <= TIMES
            if not self._left:
                self._strike()
        return self


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _interrupt() -> None:
    sys.settrace(None)
    raise KeyboardInterrupt


def forked(action: Callable[[], object]) -> int:
    """Run the action in a forked child: its exit status, or minus the signal that killed it."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _traced(action: Callable[[], object], line: int, strike: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        sys.settrace(_Tracer(line, strike))
        action()
        sys.settrace(None)

    return run


def killed_at_each_line(action: Callable[[], object]) -> Iterator[int]:
    """Run the action in a child that is SIGKILLed before line 1, line 2, …; yields the line after each death."""
    for line in effort.steps():
        status = forked(_traced(action, line, _die))
        if status == 0:
            assert line > 1, "nothing of the package was executed"
            return
        assert status == -signal.SIGKILL, f"the child ended with {status} before its line {line}"
        assert line < MOST, "the action does not come to an end"
        yield line


def interrupted_at_each_line(action: Callable[[], object], afterwards: Callable[[int], object]) -> Iterator[int]:
    """In a child each: Ctrl-C before line 1, line 2, … of the action, then `afterwards(line)`; yields the line."""
    for line in effort.steps():
        reached = forked(_interrupted(action, line, partial(afterwards, line)))
        assert reached in (0, INTERRUPTED), f"the child interrupted before line {line} ended with {reached}"
        if reached == 0:
            return
        assert line < MOST, "the action does not come to an end"
        yield line


def _interrupted(action: Callable[[], object], line: int, afterwards: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        if _raises_interrupt(_traced(action, line, _interrupt)):
            afterwards()  # outside of the handler, where nothing keeps the frames of the action
            os._exit(INTERRUPTED)

    return run


def _raises_interrupt(action: Callable[[], object]) -> bool:
    try:
        action()
    except KeyboardInterrupt:
        return True
    return False
