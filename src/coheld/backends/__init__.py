"""Where locks live: a URL names the backend."""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType

from .. import native
from ..errors import IncompatibleError

_SCHEMES = ("shm",)


def backend_of(url: str | None) -> ModuleType:
    """The backend of a URL, of COHELD_BACKEND where that is None, else shared memory.

    Raises: TypeError: if url is not a string.  ValueError: if no backend has its scheme.
    """
    if url is None:
        url = os.environ.get("COHELD_BACKEND") or "shm:"
    if not isinstance(url, str):
        raise TypeError(f"lock_backend must be a URL such as 'shm:', not {type(url).__name__}")
    scheme, colon, _ = url.partition(":")
    if not colon or scheme not in _SCHEMES:
        known = ", ".join(f"{name}:" for name in _SCHEMES)
        raise ValueError(f"no backend for {url!r}; known: {known}")
    return of_scheme(scheme)


def of_scheme(scheme: str) -> ModuleType:
    """The backend of a scheme, imported when it is first asked for.

    Raises: IncompatibleError: if it needs the extension, and this process has none.
    """
    if scheme == "shm" and native.missing:
        raise IncompatibleError(f"shm: needs the C extension, and this process runs without it: {native.missing}")
    return import_module(f"{__name__}.{scheme}")
