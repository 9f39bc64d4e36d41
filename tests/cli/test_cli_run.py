"""coheld run: the command line, exit statuses, what the command keeps, and when the lock is had and free."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from cli.commands import COHELD, PYTHON, can_be_had, coheld
from coheld import Lockable, holder
from coheld.cli import exits
from coheld.testing.support import delays, procs

SHOW_ARGUMENTS = [*PYTHON, "import json, sys; print(json.dumps(sys.argv[1:]))"]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A directory with files that cannot be run, each for another reason."""
    (tmp_path / "plain").write_text("#!/bin/sh\n")
    (tmp_path / "no-interpreter").write_text("#!/nowhere/interpreter\n")
    (tmp_path / "no-format").write_bytes(b"\0\1\2\3")
    for name in ("no-interpreter", "no-format"):
        (tmp_path / name).chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["true"], 0),
        (["false"], 1),
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "exit 255"], 255),
        (["sh", "-c", "kill -KILL $$"], 128 + signal.SIGKILL),
        (["sh", "-c", "kill -TERM $$"], 128 + signal.SIGTERM),
        (["sh", "-c", "ulimit -c 0; kill -SEGV $$"], 128 + signal.SIGSEGV),
        (["no-such-command-anywhere"], exits.NOT_FOUND),
        (["/no/such/directory/command"], exits.NOT_FOUND),
        (["/dev/null/command"], exits.NOT_FOUND),
        ([""], exits.NOT_FOUND),
        (["./no-interpreter"], exits.NOT_FOUND),
        (["./plain"], exits.NOT_EXECUTABLE),
        (["./no-format"], exits.NOT_EXECUTABLE),
        (["/"], exits.NOT_EXECUTABLE),
    ],
    ids=repr,
)
def test_exit_status(command: list[str], status: int, script: Path) -> None:
    done = coheld("run", "name", "--", *command, cwd=script)
    assert done.returncode == status
    assert not done.stdout
    assert done.stderr.count("\n") == (status in (exits.NOT_FOUND, exits.NOT_EXECUTABLE)), done.stderr
    assert can_be_had(Lockable(lock_name="name"))


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (["name"], []),
        (["name"], ["a", "b c", ""]),
        (["name"], ["--timeout", "nonsense", "--no-wait", "-h", "--version", "--=x"]),
        (["name"], ["--", "x"]),
        (["name", "--"], ["a"]),
        (["name", "--"], ["--", "--", "a"]),
        (["--", "name"], ["--", "a"]),
        (["--", "name", "--"], ["a", "--"]),
        (["--timeout", "9", "name"], ["--timeout", "1"]),
        (["--timeout=9", "--", "name", "--"], ["--no-wait"]),
        (["--timeout", "-1", "name"], []),
        (["--no-wait", "name"], ["-"]),
        (["--", "-name"], ["a"]),
    ],
    ids=repr,
)
def test_options_end_at_the_name(options: list[str], arguments: list[str]) -> None:
    done = coheld("run", *options, *SHOW_ARGUMENTS, *arguments)
    assert json.loads(done.stdout) == arguments


def test_the_command_keeps_standard_input() -> None:
    assert coheld("run", "name", "cat", stdin=None, input="through\n").stdout == "through\n"


def test_the_command_keeps_group_session_directory_and_environment(tmp_path: Path) -> None:
    source = "import os; print(os.getpgrp(), os.getsid(0), os.getcwd(), os.environ['MARK'])"
    done = coheld("run", "name", *PYTHON, source, cwd=tmp_path, env={**os.environ, "MARK": "kept"})
    assert done.stdout.split() == [str(os.getpgrp()), str(os.getsid(0)), str(tmp_path), "kept"]


def test_the_command_inherits_no_descriptor_of_ours() -> None:
    done = coheld("run", "name", *PYTHON, "import os; print(sorted(os.listdir('/proc/self/fd'), key=int))")
    assert done.stdout == "['0', '1', '2', '3']\n"  # 3: of the listing itself


SHOW_SIGNALS = ["grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"]


def shown_signals(output: str) -> list[set[int]]:
    """What that shows: the signals blocked, and those ignored. Two belong to libc, and are nobody's business."""
    masks = [int(text, 16) for text in output.split()[1::2]]
    return [{number for number in signal.valid_signals() if mask >> number - 1 & 1} for mask in masks]


def test_the_command_gets_signals_as_they_were() -> None:
    """Nothing is blocked, and nothing ignored that Python ignores, as SIGPIPE."""
    assert shown_signals(coheld("run", "name", *SHOW_SIGNALS).stdout) == [set(), set()]


def test_the_command_keeps_what_is_blocked_and_ignored() -> None:
    def nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})

    shown = shown_signals(coheld("run", "name", *SHOW_SIGNALS, preexec_fn=nohup).stdout)
    assert shown == [{signal.SIGUSR1}, {signal.SIGHUP, signal.SIGINT}]


def test_a_runner_with_sigchld_ignored_still_has_the_status() -> None:
    def ignore() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    assert coheld("run", "name", "sh", "-c", "exit 3", preexec_fn=ignore).returncode == 3


def test_the_lock_is_held_while_the_command_runs() -> None:
    lock = Lockable(lock_name="name")
    with procs.command([*COHELD, "run", "name", "sh", "-c", "echo inside; read line"]) as runner:
        runner.expect("inside")
        owner = holder(lock)
        assert owner is not None
        assert owner.pid == runner.pid
        assert not lock.acquire(timeout=delays.SHORT)
        runner.tell("go on")
    assert can_be_had(lock)


def test_runs_of_one_name_wait_for_each_other(tmp_path: Path) -> None:
    source = "mkdir inside && sleep 0.01 && rmdir inside && echo x >> log"
    runners = [subprocess.Popen([*COHELD, "run", "name", "sh", "-c", source], cwd=tmp_path) for _ in range(8)]
    assert [runner.wait(delays.LONG) for runner in runners] == [0] * 8
    assert (tmp_path / "log").read_text() == 8 * "x\n"


@pytest.mark.parametrize("options", [["--no-wait"], ["--timeout", "0"], ["--timeout", "0.05"]], ids=" ".join)
def test_not_got(options: list[str], tmp_path: Path) -> None:
    lock = Lockable(lock_name="name")
    with procs.start(hold, "name") as other:
        other.expect("holding")
        done = coheld("run", *options, "name", "touch", str(tmp_path / "ran"))
        other.tell("go on")
    assert done.returncode == exits.NOT_GOT
    assert done.stderr.startswith("coheld: 'name'")
    assert f"process {other.pid} " in done.stderr
    assert not (tmp_path / "ran").exists()
    assert can_be_had(lock)


def hold(link: procs.Link, name: str) -> None:
    with Lockable(lock_name=name):
        link.say("holding")
        link.wait_for("go on")


def test_a_run_waits_as_long_as_it_takes() -> None:
    with procs.start(hold, "name") as other:
        other.expect("holding")
        with procs.command([*COHELD, "run", "--timeout", str(delays.LONG), "name", "echo", "inside"]) as runner:
            runner.wait_until_blocked()
            other.tell("go on")
            runner.expect("inside")


NESTED = [
    ["name"],
    ["name", "sh", "-c", '"$@"; exit', "-"],
    ["name", *COHELD, "run", "other"],
    ["name", "setsid", "-w"],
]


@pytest.mark.parametrize("outer", NESTED, ids=["directly", "by a shell", "by another run", "from another session"])
def test_a_nested_run_of_the_same_name_fails_at_once(outer: list[str], tmp_path: Path) -> None:
    done = coheld("run", *outer, *COHELD, "run", "name", "touch", str(tmp_path / "ran"))
    assert done.returncode == exits.FAILED
    assert "'name' is held by an ancestor" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_run_below_a_program_that_holds_the_name_fails_at_once() -> None:
    with Lockable(lock_name="name"):
        done = coheld("run", "name", "true")
    assert done.returncode == exits.FAILED
    assert f"process {os.getpid()} " in done.stderr


def test_a_nested_run_of_another_name_runs() -> None:
    assert coheld("run", "name", *COHELD, "run", "other", "sh", "-c", "exit 5").returncode == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_while_waiting_for_the_lock_ends_the_wait(number: int, tmp_path: Path) -> None:
    with procs.start(hold, "name") as holding:
        holding.expect("holding")
        with procs.command([*COHELD, "run", "name", "touch", str(tmp_path / "ran")]) as runner:
            runner.wait_until_blocked()
            runner.signal(number)
            runner.end(-number)
        holding.tell("go on")
    assert not (tmp_path / "ran").exists()


def test_no_file_is_left_but_the_resource(coheld_dir: Path) -> None:
    assert coheld("run", "name", "true").returncode == 0
    assert coheld("run", "name", "false").returncode == 1
    assert coheld("run", "name", "no-such-command-anywhere").returncode == exits.NOT_FOUND
    assert [path.name for path in coheld_dir.iterdir()] == ["name-name"]


def test_the_runner_needs_no_room_to_fail_clearly(coheld_dir: Path) -> None:
    """Where the record cannot be written the command does not run, and the lock is free."""
    (coheld_dir / "ward-name").mkdir()
    done = coheld("run", "name", "echo", "ran")
    assert (done.returncode, done.stdout) == (exits.FAILED, "")
    assert done.stderr.startswith("coheld: ")
    assert can_be_had(Lockable(lock_name="name"))


def test_a_stopped_waiter_is_not_a_problem_of_others() -> None:
    with procs.start(hold, "name") as holding:
        holding.expect("holding")
        with procs.command([*COHELD, "run", "name", "true"]) as waiter:
            waiter.wait_until_blocked()
            waiter.stop()
            holding.tell("go on")
            holding.end()
            assert coheld("run", "--timeout", str(delays.LONG), "name", "true").returncode == 0
            waiter.cont()
