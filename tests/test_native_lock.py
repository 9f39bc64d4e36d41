"""The plain C lock without Python: under a race detector, under sanitizers, and with processes that die owning it.

The same under valgrind: tests/with_valgrind.
"""

import subprocess
from pathlib import Path

import pytest

from coheld.testing.support import delays
from tools import native

pytestmark = pytest.mark.source_tree

BUILDS = {
    "plain": [],
    "thread": ["-fsanitize=thread"],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}


@pytest.mark.parametrize("flags", BUILDS.values(), ids=BUILDS)
def test_threads_and_dying_processes(tmp_path: Path, flags: list[str]) -> None:
    program = native.build(tmp_path, flags)
    for arguments in (["threads", "4", "20000"], ["deaths", "4", "350"]):
        subprocess.run([str(program), *arguments], check=True, timeout=delays.HANG)


def test_the_race_detector_sees_who_does_not_take_the_lock(tmp_path: Path) -> None:
    program = native.build(tmp_path, BUILDS["thread"])
    command = [program, "unlocked", "4", "20000"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=delays.HANG)
    assert done.returncode
    assert "data race" in done.stderr
