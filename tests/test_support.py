"""The tests' own tools: a checker that cannot fail would prove nothing."""

import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from coheld import Lockable
from coheld.testing.support import delays, hygiene, procs, states
from coheld.testing.support.exclusion import Exclusion, Overlap

# ---- exclusion ---------------------------------------------------------------------------------------------


def dwell(link: procs.Link, exclusion: Exclusion, worker: int) -> None:
    with exclusion.inside(worker):
        link.say("inside")
        link.wait_for("leave")


@pytest.mark.parametrize("method", procs.METHODS)
def test_overlap_is_seen_across_processes(tmp_path: Path, method: str) -> None:
    exclusion = Exclusion(tmp_path)
    with procs.start(dwell, exclusion, 1, method=method) as worker:
        worker.expect("inside")
        with pytest.raises(Overlap), exclusion.inside():
            pass
        worker.tell("leave")
    exclusion.check(calls=1)


def test_overlap_is_seen_between_threads(tmp_path: Path) -> None:
    exclusion, errors = Exclusion(tmp_path), []

    def enter() -> None:
        try:
            with exclusion.inside(1):
                pass
        except Overlap as error:
            errors.append(error)

    with exclusion.inside():
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert len(errors) == 1


def test_the_counter_alone_sees_an_overlap(tmp_path: Path) -> None:
    exclusion = Exclusion(tmp_path)
    with pytest.raises(Overlap, match="counter moved from 0 to 1"), exclusion.inside(0):
        (tmp_path / "exclusion-marker").unlink()
        with exclusion.inside(1):
            pass


def test_a_lost_increment_is_seen(tmp_path: Path) -> None:
    exclusion = Exclusion(tmp_path)
    for _ in range(3):
        with exclusion.inside():
            pass
    exclusion.check(calls=3)
    exclusion._words[0] = 2
    with pytest.raises(AssertionError, match="3 made, 2 counted"):
        exclusion.check(calls=3)


def test_one_who_died_inside_is_no_overlap(tmp_path: Path) -> None:
    exclusion = Exclusion(tmp_path)
    with procs.start(dwell, exclusion, 1) as worker:
        worker.expect("inside")
        worker.kill()
        with exclusion.inside():
            pass
    assert exclusion.found_dead == 1
    exclusion.check(calls=1, deaths=1)


# ---- processes ---------------------------------------------------------------------------------------------


def fail(link: procs.Link) -> None:
    raise ValueError("the reason")


def wait_for_ever(link: procs.Link) -> None:
    link.say("waiting")
    link.wait_for("never")


@pytest.mark.parametrize("method", procs.METHODS)
def test_a_failed_worker_fails_the_test_with_its_traceback(method: str) -> None:
    with pytest.raises(procs.WorkerFailed, match="ValueError: the reason"), procs.start(fail, method=method):
        pass


def test_a_silent_worker_fails_the_test_and_dumps_its_stacks(capfd: pytest.CaptureFixture[str]) -> None:
    with procs.program("import time; time.sleep(1000)") as worker:
        with pytest.raises(procs.WorkerFailed, match="said nothing"):
            worker.hear(timeout=delays.MEDIUM)
        assert not worker.alive()
    assert "Current thread" in capfd.readouterr().err


def test_a_status_that_is_not_expected_fails_the_test() -> None:
    with pytest.raises(procs.WorkerFailed, match="ended with 3, not 0"), procs.program("raise SystemExit(3)"):
        pass
    with procs.program("raise SystemExit(3)") as worker:
        worker.end(expected=3)


def test_stop_and_continue() -> None:
    with procs.start(wait_for_ever) as worker:
        worker.expect("waiting")
        worker.stop()
        assert states.stopped(worker.pid)
        worker.cont()
        states.wait_until(lambda: not states.stopped(worker.pid), "it runs again")
        worker.kill()
        assert states.gone(worker.pid)


def test_a_program_talks_in_lines() -> None:
    with procs.program("import sys; print(sys.argv[1]); print(input())", "ready") as worker:
        worker.expect("ready")
        worker.tell("go")
        worker.expect("go")


# ---- states ------------------------------------------------------------------------------------------------


def test_a_wait_that_is_in_vain_says_what_for() -> None:
    with pytest.raises(AssertionError, match="the impossible"):
        states.wait_until(lambda: False, "the impossible", timeout=delays.SHORT)


def test_only_a_wait_that_processes_share_counts_as_one() -> None:
    private = threading.Lock()
    private.acquire()
    thread = threading.Thread(target=private.acquire)
    thread.start()
    syscall = Path(f"/proc/self/task/{thread.native_id}/syscall")
    states.wait_until(lambda: syscall.read_text().split()[0] == str(states.SYS_FUTEX), "the thread waits")
    assert states.blocked_in_futex(os.getpid(), thread.native_id) is None
    private.release()
    thread.join()
    shared = "import multiprocessing as m; lock = m.Lock(); lock.acquire(); print('go'); lock.acquire()"
    with procs.program(shared) as worker:
        worker.expect("go")
        assert worker.wait_until_blocked() == worker.pid
        worker.kill()


# ---- hygiene -----------------------------------------------------------------------------------------------


def test_a_process_that_is_left_is_ended_and_reported() -> None:
    orphan = "import os, subprocess, sys; subprocess.Popen(['sleep', '1000'], stdout=2); print('started')"
    report = pytest.raises(AssertionError, match=r"left behind: process .*sleep 1000")
    with report, hygiene.nothing_left(), procs.program(orphan) as worker:
        worker.expect("started")
    assert not [pid for pid in states.descendants(os.getpid()) if "sleep" in hygiene._describe(pid)]


def test_a_thread_that_is_left_is_reported() -> None:
    event = threading.Event()
    thread = threading.Thread(target=event.wait, name="straggler")
    with pytest.raises(AssertionError, match="thread straggler"), hygiene.nothing_left():
        thread.start()
    event.set()
    thread.join()


def test_a_lock_that_is_still_held_is_reported() -> None:
    locks = [Lockable() for _ in range(3)]
    with pytest.raises(AssertionError, match="left behind: 3 locks that this thread holds"), hygiene.nothing_left():
        for lock in locks:
            lock.acquire()
    with hygiene.nothing_left():
        for lock in locks:
            lock.release()


def test_a_file_outside_of_the_private_directory_is_reported(tmp_path: Path) -> None:
    stray = tmp_path / "coheld-0" / "arena-1-2-3"
    stray.parent.mkdir()
    with pytest.raises(AssertionError, match=stray.name), hygiene.nothing_left([tmp_path]):
        stray.touch()


def test_the_private_directory_is_this_users_alone(coheld_dir: Path) -> None:
    assert stat.S_IMODE(coheld_dir.stat().st_mode) == 0o700
    assert procs.run("import os; print(os.environ['COHELD_DIR'])").strip() == str(coheld_dir)


# ---- the hang limit ----------------------------------------------------------------------------------------

HANGING = """
import threading, pytest
from coheld.testing import plugin
from coheld.testing.support import procs

def hang_in_the_child(link):
    link.say("here")
    threading.Event().wait()

@pytest.mark.parametrize("method", procs.METHODS)
def test_that_hangs(method, request):
    with procs.start(hang_in_the_child, method=method) as worker:
        worker.expect("here")
        request.config.stash[plugin.watchdog_key].arm(0, request.node.nodeid)
        threading.Event().wait()

@pytest.mark.hang_limit(0.1)
def test_that_hangs_alone():
    threading.Event().wait()

def wait_for_ever():
    threading.Event().wait()

def test_that_leaves_a_thread():
    threading.Thread(target=wait_for_ever).start()
"""


@pytest.fixture
def hanging(tmp_path: Path) -> Callable[[str], str]:
    """Run one of the tests above by a pytest of its own, check its end by SIGABRT, and return its stderr."""
    (tmp_path / "test_hanging.py").write_text(HANGING)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "coheld.testing.plugin"]

    def run(name: str) -> str:
        arguments = [*command, f"test_hanging.py::{name}"]
        with procs.command(arguments, cwd=tmp_path, stderr=subprocess.PIPE) as worker:
            assert worker.process.stderr is not None
            with worker.process.stderr as stderr:
                stacks = str(stderr.read().decode())
            worker.end(expected=-signal.SIGABRT)
        assert not list(Path("/dev/shm").glob(f"{hygiene.PREFIX}{worker.pid}-*"))
        return stacks

    return run


@pytest.mark.parametrize("method", procs.METHODS)
def test_a_hang_dumps_the_stacks_of_all_processes_and_ends_the_run(hanging: Callable[[str], str], method: str) -> None:
    stacks = hanging(f"test_that_hangs[{method}]")
    assert f"HANG in test_hanging.py::test_that_hangs[{method}]: the stacks" in stacks
    assert stacks.rstrip().endswith(f"=== that was the HANG in test_hanging.py::test_that_hangs[{method}] ===")
    assert "in hang_in_the_child" in stacks, stacks
    assert "in test_that_hangs" in stacks, stacks


def test_a_thread_that_is_left_cannot_keep_the_run_from_its_end(
    hanging: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COHELD_TEST_SCALE", "0.05")
    stacks = hanging("test_that_leaves_a_thread")
    assert "HANG in the end of the run" in stacks
    assert "in wait_for_ever" in stacks, stacks


def test_a_test_may_have_a_limit_of_its_own(hanging: Callable[[str], str]) -> None:
    assert "in test_that_hangs_alone" in hanging("test_that_hangs_alone")
