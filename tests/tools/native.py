"""The plain C lock as a program of its own (tests/native/drive_lock.c), built as a test wants it."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

DIRECTORY = Path(__file__).resolve().parents[1] / "native"
SOURCES = DIRECTORY.parents[1] / "src" / "coheld"
WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Werror", "-Wno-unused-function"]


def build(directory: Path, flags: Sequence[str]) -> Path:
    """Compile it into the directory; the source tree must be there."""
    program = directory / "drive_lock"
    options = ["-std=gnu11", "-O1", "-g", *WARNINGS, *flags, "-pthread", f"-I{SOURCES}"]
    subprocess.run(["cc", *options, "-o", program, DIRECTORY / "drive_lock.c"], check=True)
    return program
