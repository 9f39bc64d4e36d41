"""How a runner passes signals on, follows its command into a stop, and learns its end.

The command stays in the runner's process group, so a terminal reaches both at once. The runner therefore

    passes on   what was sent to it alone: kill(1), a supervisor, a shell that continues a job;
    drops       what the terminal has sent (si_code SI_KERNEL) while the command is in the same group: it has it
                already, and two Ctrl-C are not one;
    follows     a command that was stopped by the terminal, so that the shell sees the job stop. Not one stopped by
                SIGSTOP: that is how a debugger or cpulimit works, which will only continue the command.

A signal sent with kill(2) to the whole group cannot be told from one to the runner alone: the command gets it twice.

All of them stay blocked, and are taken one by one with sigwaitinfo: no handler runs, and the runner outlives its
command unless it is killed by SIGKILL. Nothing but the status of the child ends the loop. Threads that renew a lease
have all of them blocked as well (process.keep_signals): what is sent to the process comes here.
"""

import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from coheld.cli import exits

assert sys.platform == "linux"  # type checkers for other systems stop here

GRACE = 5.0
"""For how long a command that is to end may do so by itself, seconds."""
_SI_KERNEL = 0x80
_OUR_OWN = {signal.SIGCHLD, signal.SIGKILL, signal.SIGSTOP}
_OUR_FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP, signal.SIGSYS}
_JOB_CONTROL = {signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
_BY_TERMINAL = {signal.SIGINT, signal.SIGQUIT, signal.SIGWINCH, *_JOB_CONTROL}

PASSED_ON = signal.valid_signals() - _OUR_OWN - _OUR_FAULTS


def block() -> set[int]:
    """Hold every signal back from now on; returns the mask that the command must get."""
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, {*PASSED_ON, signal.SIGCHLD}))


def pass_on_pending(child: int) -> None:
    """Pass on all that came so far. The child still blocks: what the terminal gave it as well merges into one.

    A signal of the terminal that came before the fork has reached the runner only; here none of them is dropped.
    """
    while (info := signal.sigtimedwait(PASSED_ON, 0)) is not None:
        _send(child, info.si_signo)


def attend(child: int, ends: Callable[[], bool]) -> int:
    """Pass signals on until the child has ended, and reap it; returns the exit status to report.  Once ends() is true,
    which is looked at after each SIGCHLD, the child is ended: SIGTERM, and SIGKILL if it is there after GRACE."""
    kill_at = math.inf
    while True:
        if kill_at == math.inf and ends():
            kill_at = time.monotonic() + GRACE
            _send(child, signal.SIGTERM)
            _send(child, signal.SIGCONT)  # one that is stopped would not see the other
        if (info := _next(kill_at)) is None:
            _send(child, signal.SIGKILL)
            kill_at = -math.inf  # and no more: it is waited for
        elif info.si_signo == signal.SIGCONT:
            _continue(child)
        elif info.si_signo != signal.SIGCHLD:
            if not _has_it_already(child, info):
                _send(child, info.si_signo)
        elif (status := _look_at(child)) is not None:
            return status


def _next(deadline: float) -> signal.struct_siginfo | None:
    """Blocks; None: it is that time.monotonic()."""
    if math.isinf(deadline):
        return signal.sigwaitinfo({*PASSED_ON, signal.SIGCHLD})
    return signal.sigtimedwait({*PASSED_ON, signal.SIGCHLD}, max(0.0, deadline - time.monotonic()))


def _continue(child: int) -> None:
    """Pass SIGCONT on. Where it was for the whole group, the command goes on already, and may have been stopped again
    by now: what that was (it is pending here, too) must not be undone."""
    _send(child, signal.SIGCONT)
    for number in signal.sigpending() & _JOB_CONTROL:
        _send(child, number)


def _send(child: int, number: int) -> None:
    with suppress(PermissionError):  # a command that runs as somebody else, by set-user-ID
        os.kill(child, number)  # not reaped yet: the number is its own


def _has_it_already(child: int, info: signal.struct_siginfo) -> bool:
    if info.si_code != _SI_KERNEL or info.si_signo not in _BY_TERMINAL:
        return False
    return os.getpgid(child) == os.getpgrp()


def _look_at(child: int) -> int | None:
    """Its exit status if it has ended. Several changes may stand behind one SIGCHLD."""
    while (change := os.waitid(os.P_PID, child, os.WEXITED | os.WSTOPPED | os.WNOHANG)) is not None:
        if change.si_code == os.CLD_EXITED:
            return change.si_status
        if change.si_code != os.CLD_STOPPED:
            return exits.BY_SIGNAL + change.si_status
        if change.si_status in _JOB_CONTROL:
            _stop_by(change.si_status)
    return None


def _stop_by(number: int) -> None:
    """Stop as the command did; returns once continued (at once where no shell is there to do it)."""
    os.kill(os.getpid(), number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})
