"""The plain C lock without Python: under a race detector, under sanitizers, and with processes that die owning it."""

import subprocess
from pathlib import Path

import pytest

from support import delays

pytestmark = pytest.mark.source_tree

ROOT = Path(__file__).parent.parent
BUILDS = {
    "plain": [],
    "thread": ["-fsanitize=thread"],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}


def build(directory: Path, flags: list[str]) -> Path:
    program = directory / "drive_lock"
    source = ROOT / "tests" / "native" / "drive_lock.c"
    warnings = ["-Wall", "-Wextra", "-Wconversion", "-Werror", "-Wno-unused-function"]
    subprocess.run(
        ["cc", "-std=gnu11", "-O1", "-g", *warnings, *flags, "-pthread", f"-I{ROOT}/src/coheld", "-o", program, source],
        check=True,
    )
    return program


@pytest.mark.parametrize("flags", BUILDS.values(), ids=BUILDS)
def test_threads_and_dying_processes(tmp_path: Path, flags: list[str]) -> None:
    program = build(tmp_path, flags)
    for arguments in (["threads", "4", "20000"], ["deaths", "4", "350"]):
        subprocess.run([str(program), *arguments], check=True, timeout=delays.HANG)
