"""The command as a whole: its options, its errors, and what it does not import."""

import subprocess
import tomllib
from pathlib import Path

import pytest

import coheld as package
from cli.commands import COHELD, coheld
from coheld.cli import exits
from coheld.testing.support import procs

SOURCE = Path(package.__file__).parent
HEAVY = {"rich", "textual", "asyncio", "multiprocessing", "subprocess", "tempfile", "msgspec", "redis", "psycopg"}


def test_version() -> None:
    done = coheld("--version")
    assert (done.returncode, done.stdout) == (0, f"coheld {package.__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["run", "--help"], ["rm", "--help"], ["demo", "-h"], ["top", "--help"], ["graph", "-h"]],
    ids=" ".join,
)
def test_help(arguments: list[str]) -> None:
    done = coheld(*arguments)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: coheld")
    assert not done.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "COMMAND"),
        (["nonsense"], "nonsense"),
        (["--nonsense"], "COMMAND"),
        (["rm"], "NAME"),
        (["rm", "a", "b"], "b"),
        (["ps", "a", "--stack", "b"], "--stack"),
        (["graph", "--svg"], "--svg"),
        (["graph", "--svg", "x", "--mermaid"], "--mermaid"),
        (["top", "a"], "a"),
        (["demo", "--workers", "0"], "--workers"),
        (["demo", "--kills", "-1"], "--kills"),
        (["demo", "--seconds", "nan"], "--seconds"),
        (["demo", "--seconds", "0"], "--seconds"),
        (["run"], "NAME"),
        (["run", "name"], "CMD"),
        (["run", "name", "--"], "CMD"),
        (["run", "--", "name"], "CMD"),
        (["run", "--nonsense", "name", "true"], "--nonsense"),
        (["run", "--time", "1", "name", "true"], "--time"),
        (["run", "--timeout", "name", "true"], "--timeout"),
        (["run", "--timeout", "nan", "name", "true"], "--timeout"),
        (["run", "--timeout", "1", "--no-wait", "name", "true"], "--no-wait"),
        (["run", "", "true"], "NAME"),
    ],
    ids=repr,
)
def test_wrong_usage_is_our_own_failure(arguments: list[str], complaint: str) -> None:
    done = coheld(*arguments)
    assert done.returncode == exits.FAILED
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["run", "x" * 256, "true"], {}),
        (["rm", "x" * 256], {}),
        (["run", "name", "true"], {"COHELD_DIR": "/dev/null/nowhere"}),
        (["demo"], {"COHELD_DIR": "/dev/null/nowhere"}),
        (["run", "name", "true"], {"COHELD_BACKEND": "nonsense:"}),
    ],
    ids=repr,
)
def test_errors_are_one_line(
    arguments: list[str], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = coheld(*arguments)
    assert done.returncode == exits.FAILED
    assert done.stderr.startswith("coheld: ")
    assert done.stderr.count("\n") == 1


def test_a_wrapper_imports_nothing_heavy() -> None:
    source = "import sys; import coheld.cli; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = set(procs.run(source).split())
    assert not loaded & HEAVY


def test_a_wrapper_imports_nothing_heavy_while_it_runs() -> None:
    source = (
        "import sys; from coheld.cli import main\n"
        "assert main(['run', 'name', 'true']) == 0\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    loaded = set(procs.run(source).split())
    assert not loaded & HEAVY


@pytest.mark.source_tree
def test_the_tests_run_the_same_command_as_a_user() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["coheld"] == "coheld.cli:main"
    assert COHELD[1:] == ["-m", "coheld"] and "from coheld.cli import main\n" in (SOURCE / "__main__.py").read_text()


def test_who_reads_may_have_enough(coheld_dir: Path) -> None:
    """As head has."""
    locks = [package.Lockable(lock_name=f"bed-{number}") for number in range(1000)]  # more than a pipe takes
    with subprocess.Popen([*COHELD, "ps", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command:
        assert command.stdout and command.stderr and b"bed-" in command.stdout.readline()
        command.stdout.close()
        assert command.stderr.read() == b""
    assert command.returncode == exits.FAILED and locks
