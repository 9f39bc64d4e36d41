"""The plain C lock without Python under valgrind: its memory, and two detectors of races that are not the compiler's.

The detectors follow threads, and know nothing of an owner's death (EOWNERDEAD); so processes that die are for memcheck.
"""

import subprocess
from pathlib import Path

import pytest

from coheld.testing.support import delays
from tools import native

pytestmark = pytest.mark.source_tree

FOUND = 99
THREADS, DEATHS, UNLOCKED = ["threads", "4", "2000"], ["deaths", "4", "140"], ["unlocked", "4", "2000"]


def under(tool: str, program: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run it under a tool; ends with FOUND if that complains."""
    options = [f"--tool={tool}", f"--error-exitcode={FOUND}", "--quiet", "--fair-sched=yes"]
    options += ["--leak-check=full", "--trace-children=yes"] if tool == "memcheck" else []
    command = ["valgrind", *options, f"--suppressions={native.DIRECTORY}/valgrind.supp", str(program), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=delays.HANG)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native.build(tmp_path_factory.mktemp("native"), ["-DVALGRIND", "-fno-inline"])


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [("memcheck", THREADS), ("memcheck", DEATHS), ("helgrind", THREADS), ("drd", THREADS)],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_valgrind_finds_nothing(program: Path, tool: str, arguments: list[str]) -> None:
    done = under(tool, program, arguments)
    assert not done.returncode, done.stderr
    assert " 0 overlaps" in done.stdout


@pytest.mark.parametrize("tool", ["helgrind", "drd"])
def test_the_detectors_see_who_does_not_take_the_lock(program: Path, tool: str) -> None:
    done = under(tool, program, UNLOCKED)
    assert done.returncode == FOUND
    assert "body (drive_lock.c" in done.stderr
