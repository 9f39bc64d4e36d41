"""coheld run when its runner is killed: the command dies too, and nobody gets the lock while it is still there."""

import contextlib
import mmap
import os
import platform
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from cli.commands import COHELD, PYTHON, coheld, really_gone, wait_for_line
from coheld import InsecureError, Lockable, _native, holder, mutex, ward
from coheld.cli import exits, relay, run
from coheld.testing.support import delays, effort, procs, states

# Says who it is, and stays. The second form outlives its runner: it takes the kernel's promise back.
STAY = ["sh", "-c", 'echo $$ > "$0"; exec sleep 1000']
SURVIVE = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, 0)
open(sys.argv[1], "w").write(f"{os.getpid()}\\n")
while True: signal.pause()
"""


def test_the_command_dies_with_its_runner(tmp_path: Path) -> None:
    with procs.command([*COHELD, "run", "name", *STAY, str(tmp_path / "pid")]) as runner:
        command = int(wait_for_line(tmp_path / "pid"))
        runner.kill()
        states.wait_until(lambda: really_gone(command), "the command is gone")
    lock = Lockable(lock_name="name")
    assert lock.acquire(timeout=delays.LONG)
    lock.release()


def test_the_next_run_waits_until_the_command_is_gone(tmp_path: Path) -> None:
    """Even one that the kernel did not kill with its runner."""
    with procs.command([*COHELD, "run", "name", *PYTHON, SURVIVE, str(tmp_path / "pid")]) as runner:
        command = int(wait_for_line(tmp_path / "pid"))
        runner.kill()
        assert not really_gone(command)
        look = f"cut -d' ' -f3 /proc/{command}/stat 2>&1 | grep -v '^[ZX]$' | grep -v 'No such file'"
        done = coheld("run", "name", "sh", "-c", look)
    assert done.stdout == ""
    assert really_gone(command)


def test_a_waiting_run_waits_until_the_command_is_gone(tmp_path: Path) -> None:
    """It gets the lock in the moment of the death."""
    with procs.command([*COHELD, "run", "name", *PYTHON, SURVIVE, str(tmp_path / "pid")]) as runner:
        command = int(wait_for_line(tmp_path / "pid"))
        with procs.command([*COHELD, "run", "name", "sh", "-c", "echo inside; read line"]) as other:
            other.wait_until_blocked()
            runner.kill()
            other.expect("inside")
            assert really_gone(command)
            other.tell("end now")


def test_a_program_that_waits_gets_the_lock_when_the_command_is_gone(tmp_path: Path) -> None:
    """Not only runs: any Lockable of that name."""
    lock = Lockable(lock_name="name")
    with procs.command([*COHELD, "run", "name", *PYTHON, SURVIVE, str(tmp_path / "pid")]) as runner:
        command = int(wait_for_line(tmp_path / "pid"))
        runner.kill()
        with lock:
            assert really_gone(command)


def test_a_program_that_does_not_wait_does_not_get_the_lock_before(tmp_path: Path) -> None:
    lock = Lockable(lock_name="name")
    with procs.command([*COHELD, "run", "name", *PYTHON, SURVIVE, str(tmp_path / "pid")]) as runner:
        command = int(wait_for_line(tmp_path / "pid"))
        runner.kill()
        states.wait_until(lambda: lock.acquire(blocking=False), "the lock is had")
        assert really_gone(command)
        lock.release()


def test_processes_that_the_command_started_are_its_own_affair(tmp_path: Path) -> None:
    """As README and help say: only the command itself dies with its runner."""
    source = 'sleep 1000 & echo $! > "$0"; wait'
    with procs.command([*COHELD, "run", "name", "sh", "-c", source, str(tmp_path / "pid")]) as runner:
        grandchild = int(wait_for_line(tmp_path / "pid"))
        (command,) = states.children(runner.pid)
        runner.kill()
        states.wait_until(lambda: really_gone(command), "the command is gone")
        assert coheld("run", "name", "true").returncode == 0
        assert not really_gone(grandchild)
        os.kill(grandchild, signal.SIGKILL)


def run_with_a_slow_start(link: procs.Link, command: list[str]) -> None:
    """The process that is to be the command asks for its death signal when its runner is dead already."""
    from coheld.cli import bond, main

    die_with = bond.die_with

    def die_with_the_dead(parent: int) -> bool:
        states.wait_until(lambda: os.getppid() != parent, "the runner is dead")
        return die_with(parent)

    bond.die_with = die_with_the_dead
    main(["run", "name", *command])


def test_a_command_whose_runner_died_before_it_started_does_not_start(tmp_path: Path) -> None:
    with procs.start(run_with_a_slow_start, ["touch", str(tmp_path / "ran")]) as runner:
        states.wait_until(lambda: attends(runner.pid), "the gate is open")
        (command,) = states.children(runner.pid)
        runner.kill()
        states.wait_until(lambda: really_gone(command), "it is gone")
    assert not (tmp_path / "ran").exists()


# ---- the record ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", ["", "1", "{pid}", "{pid} {start}", "{pid} {later}\n", "4194304 1\n"])
def test_a_record_that_names_nobody_harms_nobody(record: str, coheld_dir: Path) -> None:
    """Cut short, or of a process that has ended and whose number is somebody else's now."""
    with procs.command(["cat"]) as bystander:
        found = states.task(bystander.pid)
        assert found is not None
        text = record.format(pid=bystander.pid, start=found.start, later=found.start + 1)
        (coheld_dir / "ward-name").write_text(text)
        (coheld_dir / "ward-name").chmod(0o600)
        with Lockable(lock_name="name") as lock:
            lock.__lock__._flag(_native.WARDED, True)
        assert coheld("run", "name", "true").returncode == 0
        bystander.tell("still there")
        bystander.expect("still there")
        bystander.process.communicate()
    assert [path.name for path in coheld_dir.iterdir()] == ["name-name"]


def give_away(record: Path) -> None:
    """To another user; who is not root can but let others write."""
    if os.geteuid() == 0:
        os.chown(record, 54321, 54321)
    else:
        record.chmod(0o620)


@pytest.mark.parametrize("spoil", [give_away, lambda record: record.chmod(0o602)], ids=["foreign", "writable"])
def test_a_record_that_others_could_have_written_is_not_followed(
    spoil: Callable[[Path], None], coheld_dir: Path
) -> None:
    record, lock = coheld_dir / "ward-name", Lockable(lock_name="name")
    with procs.command(["cat"]) as bystander:
        with lock:
            lock.__lock__.entrust(bystander.pid)
        spoil(record)
        for _ in range(2):
            with pytest.raises(InsecureError, match="ward-name"):
                lock.acquire()
        assert holder(lock) is None and not really_gone(bystander.pid)
        record.unlink()
        with lock:
            pass
        bystander.process.communicate()


@pytest.mark.parametrize("mask", [0o000, 0o777], ids=oct)
def test_a_record_is_for_its_owner_whatever_the_umask(mask: int, coheld_dir: Path) -> None:
    """And a new file, where somebody has put one in its place."""
    record = coheld_dir / "ward-name"
    record.write_text("somebody's")
    record.chmod(0o666)
    before = os.umask(mask)
    try:
        with Lockable(lock_name="name") as lock:
            lock.__lock__.entrust(os.getpid())
            assert record.stat().st_mode & 0o7777 == 0o600
            lock.__lock__.reclaim()
    finally:
        os.umask(before)
    assert not record.exists()


def run_that_cannot_kill(link: procs.Link) -> int:
    from coheld.cli import main

    signal.pidfd_send_signal = lambda *_: None  # as for a command of another user
    return main(["run", "--timeout", str(delays.SHORT), "name", "echo", "ran"])


def test_a_command_that_does_not_end_in_time_is_waited_for_by_the_next(tmp_path: Path, coheld_dir: Path) -> None:
    with procs.command([*COHELD, "run", "name", *PYTHON, SURVIVE, str(tmp_path / "pid")]) as runner:
        command = int(wait_for_line(tmp_path / "pid"))
        runner.kill()
    with procs.start(run_that_cannot_kill) as other:
        assert other.result() == exits.NOT_GOT
    assert not really_gone(command)
    assert holder(Lockable(lock_name="name")) is None
    assert coheld("run", "name", "true").returncode == 0
    assert really_gone(command)


# ---- killed at every step --------------------------------------------------------------------------------------------

STEPS = {module.__file__ for module in (run, relay, ward, mutex)}
SIGTIMEDWAIT = {"x86_64": "128", "aarch64": "137"}[platform.machine()]


def run_killed_at(step: int, command: list[str], child: memoryview, running: Path) -> int:
    """coheld run, killed by SIGKILL before it executes its step-th line; notes which process its command is.

    Once its gate is open, the command gets as far as to make the file `running` before its runner is killed.
    """
    from coheld.cli import main

    me, done, fork = os.getpid(), 0, os.fork

    def noting_fork() -> int:
        if pid := fork():
            child[0] = pid
        return pid

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal done
        if os.getpid() != me or frame.f_code.co_filename not in STEPS:
            return None
        done += event == "line"
        if done == step:
            if frame.f_code is relay.attend.__code__:
                states.wait_until(lambda: running.exists() or really_gone(child[0]), "the command runs")
            os.kill(me, signal.SIGKILL)
        return trace

    os.fork = noting_fork
    sys.settrace(trace)
    return main(["run", "name", *command])


def attends(pid: int) -> bool:
    """Does the runner wait for signals?"""
    try:
        return Path(f"/proc/{pid}/syscall").read_text().split()[0] == SIGTIMEDWAIT
    except (FileNotFoundError, ProcessLookupError):
        return False


def attempt(step: int, running: Path) -> tuple[int, int]:
    """A runner that is killed at that step: its exit status, and the process that its command was to be, or 0.

    One that gets as far as to wait for signals is sent one to pass on, which ends its command.
    """
    running.unlink(missing_ok=True)
    child = memoryview(mmap.mmap(-1, 8)).cast("q")
    if not (runner := os.fork()):
        os._exit(run_killed_at(step, [*PYTHON, SURVIVE, str(running)], child, running))
    states.wait_until(
        lambda: (attends(runner) and running.exists()) or states.gone(runner), "the runner attends, or is dead"
    )
    with contextlib.suppress(ProcessLookupError):
        os.kill(runner, signal.SIGTERM)
    _, status = os.waitpid(runner, 0)
    return os.waitstatus_to_exitcode(status), child[0]


def check_nobody_overlaps(command: int, tmp_path: Path) -> None:
    """While the next owner works, the command is gone; and it stays so."""
    seen = tmp_path / "seen"
    look = 'cat "/proc/$0/stat" > "$1" 2>/dev/null; true'
    if not (owner := os.fork()):
        from coheld.cli import main

        os._exit(main(["run", "--timeout", str(delays.LONG), "name", "sh", "-c", look, str(command), str(seen)]))
    assert os.waitstatus_to_exitcode(os.waitpid(owner, 0)[1]) == 0
    state = seen.read_text().rpartition(")")[2].split()
    assert not state or state[0] in "ZX", f"the command {command} worked beside the next owner"


@pytest.mark.hang_limit(300)
def test_killed_at_any_step_no_command_outlives_the_exclusion(tmp_path: Path) -> None:
    """Every line of the runner in turn, until one run gets through."""
    for step in effort.steps():
        status, command = attempt(step, tmp_path / "running")
        check_nobody_overlaps(command, tmp_path)
        if status != -signal.SIGKILL:
            break
    assert status == 128 + signal.SIGTERM
    assert step > 50, "the steps were not counted"


@pytest.mark.hang_limit(300)
def test_killed_while_it_waits_for_an_older_command(tmp_path: Path) -> None:
    """The runner of that was killed too: the third owner waits for both."""
    for step in effort.steps():
        (tmp_path / "pid").unlink(missing_ok=True)
        with procs.command([*COHELD, "run", "name", *PYTHON, SURVIVE, str(tmp_path / "pid")]) as runner:
            older = int(wait_for_line(tmp_path / "pid"))
            runner.kill()
        status, command = attempt(step, tmp_path / "running")
        check_nobody_overlaps(older, tmp_path)
        check_nobody_overlaps(command, tmp_path)
        if command:  # it was past the waiting
            break
    assert status == -signal.SIGKILL or (effort.STRIDE > 1 and status == 128 + signal.SIGTERM)
    assert step > 20, "the steps were not counted"
