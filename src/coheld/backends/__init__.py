"""Where locks live: a URL names the backend."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from .. import native
from ..errors import IncompatibleError

_SCHEMES = {"shm": "shm", "file": "file", "redis": "redis", "rediss": "redis", "postgresql": "postgresql"}
"""And the module of each here."""


def backend_of(url: str | None) -> Any:
    """The backend of a URL, of COHELD_BACKEND where that is None, else the default of this process.

    Raises: TypeError: if url is not a string.  ValueError: if no backend has its scheme.
    """
    if url is None:
        url = default()
    if not isinstance(url, str):
        raise TypeError(f"lock_backend must be a URL such as 'shm:', not {type(url).__name__}")
    scheme, colon, _ = url.partition(":")
    if not colon or scheme not in _SCHEMES:
        known = ", ".join(f"{name}:" for name in _SCHEMES)
        raise ValueError(f"no backend for {scheme + colon!r}; known: {known}")  # what follows may be a secret
    backend = of_scheme(scheme)
    return backend.at(url) if hasattr(backend, "at") else backend


def default() -> str:
    """The URL of COHELD_BACKEND; without it shared memory, or where the extension is missing, files."""
    return os.environ.get("COHELD_BACKEND") or ("file:" if native.missing else "shm:")


at_first_use: list[Callable[[], object]] = []
"""What the environment switches on: each is called once per process, before its first lock."""


@functools.cache
def _begin() -> None:
    for call in at_first_use:
        call()


@functools.cache
def tell_what_is_missing() -> None:
    """Once per process: its locks are slower than they could be, and why."""
    if native.missing:
        logging.getLogger("coheld").warning(
            "running without the C extension, on locks of files: calls are slower, and waits poll: %s", native.missing
        )


def of_scheme(scheme: str) -> ModuleType:
    """The backend of a scheme, imported when it is first asked for.

    Raises: IncompatibleError: if it needs the extension, and this process has none.
    """
    if scheme == "shm" and native.missing:
        raise IncompatibleError(f"shm: needs the C extension, and this process runs without it: {native.missing}")
    tell_what_is_missing()
    _begin()
    return import_module(f"{__name__}.{_SCHEMES[scheme]}")
