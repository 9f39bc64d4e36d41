"""What some tests need, and the ordinary environment does not have."""

import shutil
from importlib import metadata


def version_of(distribution: str) -> str | None:
    """Its version; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


PYATS = version_of("pyats")
"""Cisco's, not the distribution in compat/. Without it tests/with_pyats, and the examples that are marked so, are left
to `.ci/run pyats`; the header of a run says which it is."""

VALGRIND = shutil.which("valgrind")
"""Without it tests/with_valgrind is left to `.ci/run analysis`, which installs it."""
