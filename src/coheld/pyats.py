"""Give pyATS's own ``Lockable``, and so every connection that inherits it, the lock of coheld.

Only two names of Cisco's class change.  Its ``locked`` stays: it may decorate what ours refuses (a coroutine function),
and classes that exist already were decorated with it; it takes whatever lock it finds in ``__lock__``.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from . import native
from .backends.base import Handle
from .errors import IncompatibleError
from .lockable import Lockable
from .mutex import anonymous

_MODULE = "pyats.async_.synchronize"


def adopt() -> None:
    """Make ``pyats.async_.synchronize.Lockable`` use coheld's lock, in this process and those it forks from now on.

    Every object of it that is made afterwards survives a killed holder, of classes that exist already too.  Objects
    made before keep the lock they have, since others may hold it; and who passes ``lock=…`` gets that one.  Any
    thread may call this, as often as it likes; it does not block.  Where the class is coheld's own already (the
    distribution coheld-pyats-compat, on machines without pyATS) nothing is left to do.

    Raises: ImportError: if pyATS cannot be imported.  IncompatibleError: if its Lockable is not the class we know;
    nothing has changed then.
    """
    cisco = _cisco()
    if issubclass(cisco, Lockable) or isinstance(vars(cisco).get("acquire"), _Acquire):
        return
    _check(cisco)
    # No lock around these: two threads at once, or a child forked between them, wrap twice, and the outer one asks the
    # inner one for the same. Each name is whole at any moment, and right without the other.
    cisco.__init__ = _init_over(cisco, cisco.__init__)
    cisco.acquire = _Acquire(cisco.acquire)


def _cisco() -> Any:
    try:
        module = importlib.import_module(_MODULE)
    except ImportError as error:
        raise ImportError(
            f"there is no pyATS to adopt ({error}): pip install pyats packaging", name=error.name, path=error.path
        ) from error
    return module.Lockable


def _check(cisco: Any) -> None:
    """Look before anything is changed. Raises: IncompatibleError: if a call that we pass on would not fit."""
    wanted = {"__init__": {"lock"}, "acquire": {"block", "timeout"}}
    for name, arguments in wanted.items():
        if missing := arguments - set(inspect.signature(getattr(cisco, name)).parameters):
            raise IncompatibleError(f"{_MODULE}.Lockable.{name} of this pyATS takes no {', '.join(sorted(missing))}")


def _init_over(cisco: type, original: Callable[..., None]) -> Callable[..., None]:
    """The reference's constructor, but for the lock that is made where none is asked for."""

    def __init__(self: Any, *, lock: Callable[[], Any] = anonymous, **kwargs: Any) -> None:  # noqa: N807
        """Make the lock. lock: what makes it, if not coheld's is wanted, which survives a killed holder."""
        hung = native.peek(self)
        if lock is anonymous and isinstance(hung, Handle):
            original(self, lock=lambda: hung, **kwargs)  # made by a Lockable of ours in front: it may have a name
        elif lock is anonymous and Lockable in _behind(cisco, type(self)):
            Lockable.__init__(self, **kwargs)  # the original would never get to it
        else:
            original(self, lock=lock, **kwargs)

    return __init__


def _behind(base: type, cls: type) -> tuple[type, ...]:
    """The bases of cls that super() reaches from base."""
    return cls.__mro__[cls.__mro__.index(base) + 1 :]


class _Acquire:
    """The method acquire of Cisco's class.  Objects of ours are locked by ours, which also takes ``blocking`` and runs
    ``__recover__``.

    A descriptor and no function around both: what it gives is called by the caller itself, so that there is no
    bytecode of ours between taking the lock and saying so, where an interrupt would leave it held.
    """

    def __init__(self, original: Any) -> None:
        self.original = original

    def __get__(self, obj: Any, owner: type | None = None) -> Any:
        acquire = native.LockableBase.acquire if isinstance(obj, Lockable) else self.original
        return acquire.__get__(obj, owner)
