"""The contract as a package: what it needs, what it leaves, and that a failure is one."""

import ast
import compileall
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import coheld
from coheld import testing
from coheld.testing import __main__ as kit
from coheld.testing.support import delays

DIRECTORY = Path(testing.__path__[0])
PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run it in a directory of its own, after a line of Python of the test's."""

    def call(*arguments: str, first: str = "", **environment: str) -> "subprocess.CompletedProcess[str]":
        source = f"import runpy, sys\n{first}\nrunpy.run_module('coheld.testing', run_name='__main__', alter_sys=True)"
        command = [sys.executable, "-c", source, *arguments]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=delays.HANG,
            check=False,
        )

    return call


def test_a_part_of_it_runs_and_nothing_is_written(run: Run, tmp_path: Path) -> None:
    copy = tmp_path / "installed" / "coheld"
    shutil.copytree(coheld.__path__[0], copy, ignore=shutil.ignore_patterns("__pycache__"))
    compileall.compile_dir(copy, quiet=1)  # as an installer does
    before = sorted(copy.rglob("*"))
    done = run("contract/test_arguments.py", "-k", "timeout", PYTHONPATH=str(copy.parent))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"from {copy}" in done.stdout and "contract/test_arguments.py ..." in done.stdout
    assert sorted(copy.rglob("*")) == before


def test_without_a_path_all_of_it_is_chosen(run: Run) -> None:
    done = run("--collect-only", "-q")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert found == {str(path.relative_to(DIRECTORY)) for path in DIRECTORY.rglob("test_*.py")}


@pytest.mark.parametrize(
    "body",
    [
        "assert False",
        "import warnings; warnings.warn('a warning')",
        "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()",
    ],
    ids=["a failure", "a warning", "a thread is left behind"],
)
def test_what_fails_fails(run: Run, tmp_path: Path, body: str) -> None:
    (tmp_path / "test_it.py").write_text(f"def test_it():\n    {body}\n")
    done = run(str(tmp_path / "test_it.py"))
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr


def test_what_it_needs_and_does_not_find_is_said_in_one_line(run: Run) -> None:
    done = run(first="sys.modules.update(dict.fromkeys(['pytest', 'hypothesis']))")
    assert (done.returncode, done.stdout) == (kit.USAGE_ERROR, "")
    (line,) = done.stderr.splitlines()
    assert "not installed: hypothesis, pytest; pip install 'coheld[contract]'" in line


def test_what_it_needs_is_what_it_imports() -> None:
    imported = {name for path in DIRECTORY.rglob("*.py") for name in packages(ast.parse(path.read_text()))}
    by_command = {"sphinx"}
    assert set(kit.NEEDED) == imported - set(sys.stdlib_module_names) - {"coheld", "msgspec", "test"} | by_command


def packages(tree: ast.AST) -> set[str]:
    """The first part of every name that is imported."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    found_from = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = [alias.name for node in found for alias in node.names] + [node.module or "" for node in found_from]
    return {name.partition(".")[0] for name in names}


@pytest.mark.source_tree
def test_the_extra_brings_what_it_needs() -> None:
    extra = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]["contract"]
    assert set(kit.NEEDED) <= {re.split(r"[>\[]", one)[0] for one in extra}
