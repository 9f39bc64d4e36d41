"""A child that dies with its parent."""

import ctypes
import os
import signal
import sys

assert sys.platform == "linux"  # type checkers for other systems stop here

_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl


def die_with(parent: int) -> bool:
    """In a forked child: be killed by SIGKILL when the parent dies. False if it is dead already.

    It is kept over exec, but not where that changes the user or gains capabilities; children do not inherit it.
    """
    _prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    return os.getppid() == parent  # dead before the call: no signal would come
