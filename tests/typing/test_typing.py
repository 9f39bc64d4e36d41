"""The type checkers see what a user writes as it is meant: samples/ passes, and what must not pass is complained of."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import coheld
from coheld.testing.support import delays

pytestmark = pytest.mark.source_tree  # and the tools of who works on it
SAMPLES = Path(__file__).parent / "samples"


@dataclass(frozen=True)
class Verdict:
    """What a checker says of the sources: its exit status, and its complaints."""

    status: int
    complaints: list[str]


def mypy(directory: Path) -> list[str]:
    """Strict, which includes a complaint about every comment that silences nothing."""
    config = directory / "mypy.ini"
    config.write_text(f"[mypy]\nstrict = true\nmypy_path = {directory}\ncache_dir = {directory / 'cache'}\n")
    return ["mypy", "--config-file", str(config), str(directory / "sources")]


def pyright(directory: Path) -> list[str]:
    """Strict, with the same complaint; mypy's names in the comments do not bother it."""
    options = {
        "include": ["sources"],
        "extraPaths": ["."],
        "typeCheckingMode": "strict",
        "reportUnnecessaryTypeIgnoreComment": "error",
    }
    (directory / "pyrightconfig.json").write_text(json.dumps(options))
    return ["pyright", "--pythonpath", sys.executable, "-p", str(directory)]


def verdict(checker: Callable[[Path], list[str]], directory: Path) -> Verdict:
    """Let it check directory/sources, beside the package that these tests import."""
    (directory / "coheld").symlink_to(coheld.__path__[0])
    command = [sys.executable, "-m", *checker(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=delays.HANG, cwd=directory, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    return Verdict(done.returncode, [line for line in lines if ": error" in line or "- error" in line])


every_checker = pytest.mark.parametrize("checker", [mypy, pyright])


@every_checker
@pytest.mark.hang_limit(2 * delays.HANG)
def test_the_samples_pass(checker: Callable[[Path], list[str]], tmp_path: Path) -> None:
    shutil.copytree(SAMPLES, tmp_path / "sources")
    assert verdict(checker, tmp_path) == Verdict(0, [])


@every_checker
@pytest.mark.hang_limit(2 * delays.HANG)
def test_what_does_not_pass_is_complained_of(checker: Callable[[Path], list[str]], tmp_path: Path) -> None:
    (tmp_path / "sources").mkdir()
    wrong = "from coheld import Lockable\nLockable().acquire()  # type: ignore[call-arg]\nLockable().release(1)\n"
    (tmp_path / "sources" / "wrong.py").write_text(wrong)
    found = verdict(checker, tmp_path)
    assert found.status == 1 and len(found.complaints) == 2
    for line, complaint in zip((2, 3), found.complaints, strict=True):
        assert f"wrong.py:{line}:" in complaint
