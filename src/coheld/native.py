"""The C extension, or its twin in Python where there is none.  No other module imports either of them.

missing: why this process runs without the extension; None: it has it.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from . import _portable

if TYPE_CHECKING:
    from ._native import (
        CELL_SIZE,
        CREATED,
        GUARDED,
        HEADER_SIZE,
        HELD_LIMIT,
        LAYOUT_VERSION,
        LIBC,
        READERS,
        RECOVERING,
        REMOVED,
        WARDED,
        Field,
        LockableBase,
        LockedMethod,
        Mutex,
        Register,
        Segment,
        SemaphoreBase,
        View,
        delist,
        enlist,
        generation,
        hang,
        hasten,
        install,
        lock_of,
        observe,
        peek,
        task_enter,
        tell_after,
    )

__all__ = [
    "CELL_SIZE",
    "CREATED",
    "GUARDED",
    "HEADER_SIZE",
    "HELD_LIMIT",
    "LAYOUT_VERSION",
    "LIBC",
    "READERS",
    "RECOVERING",
    "REMOVED",
    "WARDED",
    "Field",
    "LockableBase",
    "LockedMethod",
    "Mutex",
    "Register",
    "Segment",
    "SemaphoreBase",
    "View",
    "delist",
    "enlist",
    "generation",
    "hang",
    "hasten",
    "install",
    "lock_of",
    "missing",
    "observe",
    "peek",
    "task_enter",
    "tell_after",
]


def _choose() -> tuple[ModuleType, str | None]:
    """What runs here, and why it is not the extension."""
    try:
        from . import _native
    except ImportError as error:
        return _portable, str(error)
    if not _native.SUPPORTED:
        return _portable, "the mutex of this libc does not work as it has to"
    return _native, None


_here, missing = _choose()
globals().update({name: getattr(_here, name) for name in __all__ if hasattr(_here, name)})
