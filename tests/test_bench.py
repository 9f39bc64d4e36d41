"""The benchmark's table: every row of it is there and well-formed. How fast anything is, is not asked."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coheld.testing.support import delays

ROOT = Path(__file__).resolve().parents[1]
PEERS = {
    "call": {"pyATS", "threading.RLock", "mp.RLock", "filelock", "fasteners"},
    "throughput": {"pyATS", "mp.RLock", "filelock", "fasteners"},
    "turns": {"mp.RLock"},
    "death": {"pyATS", "mp.RLock", "filelock", "fasteners"},
    "making": {"pyATS", "mp.RLock"},
    "million": {"", "mp.RLock"},
    "state": {
        "mp.Value",
        "Manager().Namespace",
        "property",
        "encode, decode twice",
        "without the list",
        "no shared fields",
    },
    "tasks": {"", "asyncio.Lock", "filelock async", "without us"},
    "readers": {"one process", "fasteners readers", "filelock readers"},
    "permits": {"", "mp.Semaphore"},
    "deadlock": {""},
    "listing": {""},
    "redis": {"", "redis-py Lock"},
    "postgresql": {"", "psycopg by hand"},
    "import": {"", "pyATS", "mp.RLock", "filelock", "fasteners"},
}
BARS = {
    "call": 3,
    "throughput": 4,
    "turns": 3,
    "death": 2,
    "making": 1,
    "million": 3,
    "state": 7,
    "tasks": 5,
    "readers": 3,
    "permits": 2,
    "deadlock": 3,
    "listing": 2,
    "redis": 5,
    "postgresql": 3,
    "import": 2,
}

pytestmark = [pytest.mark.source_tree, pytest.mark.hang_limit(3 * delays.HANG)]


def run_bench(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", "--quick", "--rounds", "1", *options]
    timeout = 2 * delays.HANG
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture
def table(tmp_path: Path, coheld_dir: Path) -> tuple[dict[str, Any], str]:
    """One quick run of everything: its figures and what it printed."""
    done = run_bench("--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    assert list(coheld_dir.iterdir()) == []
    return json.loads((tmp_path / "figures.json").read_text()), done.stdout


def check_line(line: dict[str, Any]) -> None:
    """A line has our figure, and a verdict exactly where it has a bar and what that needs was measured."""
    assert line["ours"] >= 0 or "over" in line["what"]
    bar = line["bar"]
    value = bar and line["ours" if bar["absolute"] else "ratio"]
    if bar is None:
        assert line["verdict"] == ""
    elif value is None:
        assert (line["verdict"], line["theirs"]) == ("not measured", None)
    else:
        met = value >= bar["limit"] if bar["at_least"] else value <= bar["limit"]
        assert line["verdict"] == ("meets" if met else "misses")


def test_whole_table(table: tuple[dict[str, Any], str]) -> None:
    figures, printed = table
    rows = figures["rows"]
    assert {name: {line["peer"] for line in lines} for name, lines in rows.items()} == PEERS
    assert {name: sum(line["bar"] is not None for line in lines) for name, lines in rows.items()} == BARS
    for line in (line for lines in rows.values() for line in lines):
        check_line(line)
        assert any(text.split() == " ".join(line["cells"]).split() for text in printed.splitlines()), line
    for name, value in figures["machine"].items():
        assert f"{name}: {value}" in printed


def test_one_row(coheld_dir: Path) -> None:
    done = run_bench("--only", "making")
    assert (done.returncode, done.stderr) == (0, "measuring: making\n")
    assert {"making"} == {line.split()[0] for line in done.stdout.partition("---")[2].splitlines()[1:]}


def test_unknown_row_is_an_error() -> None:
    done = run_bench("--only", "nothing")
    assert done.returncode == 2
    assert "invalid choice: 'nothing'" in done.stderr
