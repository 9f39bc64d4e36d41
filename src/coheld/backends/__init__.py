"""Where locks live: a URL names the backend, by its scheme: one of coheld's own, or of another distribution that has it
as an entry point of the group ``coheld.backends`` (docs/howto/backends.md)."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any, NoReturn

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
    backend = of_scheme(scheme) if colon else _unknown(scheme)
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


def of_scheme(scheme: str) -> Any:
    """The backend of a scheme, imported when it is first asked for: a module, or what has the same names.

    Raises: IncompatibleError: if it needs the extension, and this process has none; or if another distribution has it,
    and it is none.  ValueError: if there is none.
    """
    if scheme == "shm" and native.missing:
        raise IncompatibleError(f"shm: needs the C extension, and this process runs without it: {native.missing}")
    tell_what_is_missing()
    _begin()
    return import_module(f"{__name__}.{_SCHEMES[scheme]}") if scheme in _SCHEMES else _of_others(scheme)


_GROUP = "coheld.backends"


@functools.cache
def _of_others(scheme: str) -> Any:
    from importlib import metadata  # takes its time

    entries = {
        (entry.value, entry.dist and entry.dist.name): entry
        for entry in metadata.entry_points(group=_GROUP, name=scheme)
    }
    if not entries:
        _unknown(f"{scheme}:")
    what = f"the backend for {scheme}: of {' and of '.join(str(name) for _, name in entries)}"
    if len(entries) > 1:
        raise IncompatibleError(f"{what}: one of them can be installed")
    [entry] = entries.values()
    try:
        backend = entry.load()
    except Exception as error:
        raise IncompatibleError(
            f"{what} cannot be imported, as {entry.value}: {type(error).__name__}: {error}"
        ) from error
    needed = ["Mutex", "anonymous", "resource", *(() if hasattr(backend, "at") else ("named", "existing", "semaphore"))]
    if missing := [name for name in needed if not hasattr(backend, name)]:
        raise IncompatibleError(f"{what} is none: {entry.value} has no {', '.join(missing)}")
    if (own := getattr(backend, "scheme", scheme)) != scheme:
        raise IncompatibleError(f"{what} is one for {own}: and its entry point has another name")
    return backend


def _unknown(what: str) -> NoReturn:
    """Without what follows, which may be a secret."""
    from importlib import metadata

    others = metadata.entry_points(group=_GROUP).names - _SCHEMES.keys()
    known = ", ".join(f"{name}:" for name in (*_SCHEMES, *sorted(others)))
    raise ValueError(f"no backend for {what!r}; known: {known}")
