"""How long to wait, as users say it and as a loop needs it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

FOREVER = math.inf
_AGES = 9e9  # seconds; 285 years and more are for ever, and no clock can count them in nanoseconds
_FIRST_NAP, LONGEST_NAP = 0.0002, 0.005
_MISSING: Any = object()


def seconds_of(timeout: object) -> float:
    """A time-out in seconds: None is FOREVER, and whatever is not above zero is 0: try once.

    Raises: TypeError, ValueError: if it is no number of seconds.
    """
    if timeout is None:
        return FOREVER
    if not any(hasattr(type(timeout), how) for how in ("__float__", "__index__")):
        raise TypeError(f"timeout must be a number of seconds or None, not {type(timeout).__name__}")
    seconds = float(timeout)  # type: ignore[arg-type]  # it has one of the two
    if math.isnan(seconds):
        raise ValueError("timeout must not be NaN")
    return max(0.0, seconds) if seconds < _AGES else FOREVER


def patience(blocking: object, timeout: object, block: object = _MISSING) -> float:
    """How long the arguments of an acquire ask to wait, seconds. block is what pyATS calls blocking."""
    seconds = seconds_of(timeout)
    return seconds if (blocking if block is _MISSING else block) else 0.0


def naps() -> Iterator[float]:
    """How long to sleep between looks, seconds: short, then longer, within a bound of some milliseconds."""
    nap = _FIRST_NAP
    while True:
        yield nap
        nap = min(nap * 1.5, LONGEST_NAP)


def left(deadline: float) -> float:
    """Seconds until that time.monotonic(); not above zero once it is there."""
    return deadline - time.monotonic()
