"""Virtual environments of a test's own, and the distributions that are installed in them."""

import os
import subprocess
import sys
from pathlib import Path

import coheld
from coheld.testing.support import delays

COMPAT = Path(__file__).parents[2] / "compat"


def run(*command: str, timeout: float = delays.HANG / 2) -> str:
    """What it prints; it must end well. It does not see PYTHONPATH."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout.decode()
    return done.stdout.decode()


def build(source: Path, directory: Path) -> Path:
    """Build a wheel with what is installed here: nothing is downloaded."""
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(directory)]
    run(sys.executable, "-m", "pip", "wheel", "-q", *options, str(source))
    (built,) = directory.glob("*.whl")
    return built


class Environment:
    """A new environment in that directory, which has this very coheld in it, and nothing else."""

    def __init__(self, directory: Path) -> None:
        run(sys.executable, "-m", "venv", str(directory))
        self._python = str(directory / "bin" / "python")
        beside = directory / "beside"
        beside.mkdir()
        (beside / "coheld").symlink_to(coheld.__path__[0])
        site = Path(self.python("import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        (site / "this-coheld.pth").write_text(f"{beside}\n")

    def python(self, source: str, *arguments: str) -> str:
        """What the program prints; warnings are errors."""
        return run(self._python, "-W", "error", "-c", source, *arguments)

    def pip(self, *arguments: str) -> None:
        """Run pip; with the package index, unless told otherwise."""
        run(self._python, "-m", "pip", "-q", "--disable-pip-version-check", *arguments, timeout=delays.HANG)

    def install_wheel(self, wheel: Path) -> None:
        """That one alone, and nothing that it needs."""
        self.pip("install", "--no-deps", "--no-index", str(wheel))
