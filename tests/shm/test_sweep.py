"""How arenas go away: when the last process that uses them ends, or with the next start where it was killed."""

import fcntl
import multiprocessing
import os
import pickle
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from coheld import BackendError, Lockable
from coheld.backends import shm, sweeping
from coheld.process import start_of
from coheld.testing.contract import killpoints
from coheld.testing.contract.places import all_in, arenas_of, had, took
from coheld.testing.support import delays, effort, procs, states
from shm import roles, runs

# ---- nothing is left after a normal run --------------------------------------------------------------------


@contextmanager
def all_of_it_has_ended() -> Iterator[None]:
    """The children of the body's programs, whom we adopt if they outlive their parents, end before it is left."""
    before = set(states.descendants(os.getpid()))

    def running() -> list[int]:
        return [pid for pid in states.descendants(os.getpid()) if pid not in before and not roles.has_let_go(pid)]

    yield
    states.wait_until(lambda: not running(), "all children have ended")


def end_well(script: Path, source: str) -> None:
    """Run a program, and whatever it forks, to an end that has nothing to say."""
    script.write_text(source)
    complaints = script.with_suffix(".err")
    command = [sys.executable, str(script)]
    with all_of_it_has_ended(), complaints.open("wb") as stderr, procs.command(command, stderr=stderr):
        pass
    assert complaints.read_text() == ""


@pytest.mark.parametrize("first", runs.FIRSTS)
@pytest.mark.parametrize("run", runs.NORMAL)
def test_nothing_is_left_after_a_normal_run(coheld_dir: Path, tmp_path: Path, run: str, first: str) -> None:
    end_well(tmp_path / "program.py", runs.source_of(run, first))
    assert all_in(coheld_dir) == []


# ---- what killed processes left goes with the next start ---------------------------------------------------


def start(_: procs.Link) -> None:
    """What every process that uses locks does first."""
    assert took(Lockable())


def start_with_a_name(_: procs.Link) -> None:
    assert took(Lockable(lock_name="a name that nobody has"))


def next_start(what: Callable[[procs.Link], None] = start) -> None:
    """One more process, from its start to its end."""
    with procs.start(what):
        pass


def forget_names(directory: Path) -> list[str]:
    return [name for name in all_in(directory) if not name.startswith("name-")]


@pytest.mark.parametrize("what", [start, start_with_a_name])
def test_the_next_start_removes_what_a_killed_process_left(
    coheld_dir: Path, what: Callable[[procs.Link], None]
) -> None:
    with roles.maker() as maker:
        left = arenas_of(coheld_dir, maker.pid)
        maker.kill()
    assert all_in(coheld_dir) == left != []
    next_start(what)
    assert not set(left) & set(all_in(coheld_dir))


def test_it_is_removed_while_the_killed_process_is_a_zombie(coheld_dir: Path) -> None:
    with roles.maker() as maker:
        maker.kill()
        task = states.task(maker.pid)
        assert task and task.state == "Z"
        next_start()
        assert all_in(coheld_dir) == []


def test_what_live_processes_use_is_never_removed(coheld_dir: Path) -> None:
    with roles.maker() as running, roles.maker() as stopped, roles.maker() as closed:
        stopped.worker.stop()
        closed.ask("close")
        there = all_in(coheld_dir)
        for _ in range(10):
            next_start()
            next_start(start_with_a_name)
        assert set(there) <= set(all_in(coheld_dir)) and len(there) == 3
        stopped.worker.cont()
        for one in (running, stopped, closed):
            with roles.attached(one.lock) as other:
                assert roles.one_lock(one, other)


def left_by(pid: int, start: int | None, kind: str) -> str:
    return f"{kind}-{pid}-{start}-0123abcd"


@pytest.mark.parametrize("kind", [".new", "arena"])
def test_only_what_dead_processes_left_is_removed(coheld_dir: Path, kind: str) -> None:
    me, start = os.getpid(), start_of(os.getpid()) or 0
    mine = left_by(me, start, kind)
    for name in (mine, left_by(me, start - 1, kind), left_by(2**22 + 1, 1, kind)):
        (coheld_dir / name).write_bytes(b"")
        (coheld_dir / name).chmod(0o600)
    next_start()
    assert all_in(coheld_dir) == [mine]


def test_what_is_not_ours_is_not_touched(coheld_dir: Path, tmp_path: Path) -> None:
    """Names that no arena has, and what is no plain file of this user."""
    treasure = tmp_path / "treasure"
    treasure.write_bytes(b"")
    number = iter(range(100))

    def name() -> Path:
        return coheld_dir / f"arena-{2**22 + 1}-1-{next(number):x}"

    for other in (
        "notes",
        "arena",
        "arena-",
        "arena-x-1-ab",
        "arena-1-x-ab",
        "arena-4194305-1-ab.bak",
        "arena--1-1-ab",
    ):
        (coheld_dir / other).write_bytes(b"")
    name().symlink_to(treasure)
    name().mkdir()
    os.mkfifo(name())
    writable = name()
    writable.write_bytes(b"")
    writable.chmod(0o666)
    there = all_in(coheld_dir)
    next_start()
    assert all_in(coheld_dir) == there and treasure.exists()


# ---- what is still in use stays, whoever made it -----------------------------------------------------------


@pytest.mark.parametrize("end", roles.ENDS)
def test_a_forked_child_keeps_the_lock_of_a_parent_that_has_ended(coheld_dir: Path, end: str) -> None:
    with all_of_it_has_ended(), roles.orphan(end) as child:
        for _ in range(3):
            next_start()
        with roles.attached(child.lock) as other:
            assert roles.one_lock(child, other)
            other.end()
        next_start()
        with roles.attached(child.lock) as other:
            assert roles.one_lock(child, other)
            other.kill()
        child.end()
    assert all_in(coheld_dir) == []


@pytest.mark.parametrize("end", [roles.Actor.kill, roles.Actor.end])
def test_an_attached_process_keeps_the_lock_of_a_maker_that_has_ended(
    coheld_dir: Path, end: Callable[[roles.Actor], None]
) -> None:
    with roles.maker() as maker, roles.attached(maker.lock) as user:
        end(maker)
        next_start()
        with roles.attached(user.lock) as other:
            assert roles.one_lock(user, other)
            other.end()
        next_start()
        with roles.attached(user.lock) as other:
            assert roles.one_lock(user, other)
            user.end()
            assert other.ask("try") == "True"
            other.end()
    assert all_in(coheld_dir) == []


@pytest.mark.parametrize("end", roles.ENDS)
def test_the_last_user_may_be_killed_too(coheld_dir: Path, end: str) -> None:
    with all_of_it_has_ended(), roles.orphan(end) as child, roles.attached(child.lock) as user:
        child.kill()
        next_start()
        assert user.ask("try") == "True" and all_in(coheld_dir)
        user.kill()
        next_start()
        assert all_in(coheld_dir) == []


def is_locked(path: Path) -> bool:
    """Has any process a flock on it?"""
    with path.open() as file, suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    return True


def test_each_process_that_uses_an_arena_has_a_share_of_its_flock(coheld_dir: Path) -> None:
    """Also where nobody may look at what it maps."""
    with roles.maker() as maker, roles.attached(maker.lock) as user:
        (arena,) = coheld_dir.iterdir()
        assert is_locked(arena)
        user.kill()
        assert is_locked(arena)
        with roles.attached(maker.lock) as other:
            maker.kill()
            assert is_locked(arena)
            other.kill()
        assert not is_locked(arena)


def test_a_forked_child_has_a_share_of_its_parents_flock(coheld_dir: Path) -> None:
    with all_of_it_has_ended(), roles.orphan("killed") as child:
        (arena,) = coheld_dir.iterdir()
        assert is_locked(arena)
        child.kill()
        assert not is_locked(arena)


def test_a_user_that_drops_the_lock_leaves_nothing_when_it_ends(coheld_dir: Path) -> None:
    with roles.maker() as maker, roles.attached(maker.lock) as user:
        maker.end()
        user.ask("drop")
        user.end()
    assert all_in(coheld_dir) == []


def test_a_lock_that_nobody_uses_any_more_is_gone_and_says_so(coheld_dir: Path) -> None:
    with roles.maker() as maker:
        data = bytes.fromhex(maker.lock)
        maker.end()
    obj = pickle.loads(data)
    with pytest.raises(BackendError, match="gone"):
        obj.acquire()
    assert all_in(coheld_dir) == []


# ---- a daemon that has closed all its descriptors ----------------------------------------------------------


def check_that_it_stays(daemon: roles.Actor) -> None:
    """Whoever starts, attaches, ends or is killed: the daemon's lock can be attached to."""
    for end in (roles.Actor.end, roles.Actor.kill, roles.Actor.end):
        next_start()
        with roles.attached(daemon.lock) as other:
            assert roles.one_lock(daemon, other)
            end(other)
    assert daemon.ask("make") == "True"


def test_a_maker_that_closed_its_descriptors_keeps_its_lock(coheld_dir: Path) -> None:
    with roles.maker() as daemon:
        daemon.ask("close")
        check_that_it_stays(daemon)
        daemon.end()
    assert all_in(coheld_dir) == []


@pytest.mark.parametrize("end", roles.ENDS)
def test_a_forked_daemon_that_closed_its_descriptors_keeps_its_lock(coheld_dir: Path, end: str) -> None:
    with all_of_it_has_ended(), roles.orphan(end) as daemon:
        daemon.ask("close")
        check_that_it_stays(daemon)
        daemon.end()
    assert all_in(coheld_dir) == []


def test_a_forked_daemon_keeps_its_lock_if_it_closed_its_descriptors_before_its_parent_ended(
    coheld_dir: Path,
) -> None:
    source = (
        roles.SERVE
        + """
obj = Lockable()
read, write = os.pipe()
if not os.fork():
    close_descriptors()
    serve(obj)
os.close(write)
os.read(read, 1)
"""
    )
    with all_of_it_has_ended(), roles.actor(source) as daemon:
        daemon.worker.end()
        check_that_it_stays(daemon)
        daemon.end()
    assert all_in(coheld_dir) == []


@pytest.mark.parametrize("end", [roles.Actor.kill, roles.Actor.end])
def test_an_attached_daemon_that_closed_its_descriptors_keeps_its_lock(
    coheld_dir: Path, end: Callable[[roles.Actor], None]
) -> None:
    with roles.maker() as maker, roles.attached(maker.lock) as daemon:
        daemon.ask("close")
        end(maker)
        check_that_it_stays(daemon)
        daemon.end()
    assert all_in(coheld_dir) == []


def test_a_killed_daemon_that_closed_its_descriptors_leaves_nothing_for_good(coheld_dir: Path) -> None:
    with roles.maker() as daemon:
        daemon.ask("close")
        assert daemon.ask("many") == "True"
        assert len(all_in(coheld_dir)) == 2
        daemon.kill()
    next_start()
    assert all_in(coheld_dir) == []


# ---- a child whose threads go on after its function --------------------------------------------------------


def test_a_thread_that_outlives_its_process_function_can_still_hand_its_lock_on(coheld_dir: Path) -> None:
    """multiprocessing runs exit handlers before it waits for threads."""
    ours, theirs = multiprocessing.Pipe()

    def hand_on(obj: Lockable) -> None:
        threading.main_thread().join()
        theirs.send(pickle.dumps(obj).hex())
        theirs.poll(delays.LONG)

    def run(_: procs.Link) -> None:
        threading.Thread(target=hand_on, args=[Lockable()]).start()

    with procs.start(run):
        assert ours.poll(delays.LONG)
        with roles.attached(ours.recv()) as other:
            assert other.ask("try") == "True"
            other.end()
        ours.send("end")
    for end in (ours, theirs):
        end.close()
    next_start()
    assert all_in(coheld_dir) == []


# ---- under a parent that lives long ------------------------------------------------------------------------


def die(_: procs.Link) -> None:
    assert took(Lockable())
    os.kill(os.getpid(), signal.SIGKILL)


def leave_at_once(_: procs.Link) -> None:
    assert took(Lockable())
    os._exit(0)


@pytest.mark.parametrize("last_words", [die, leave_at_once])
def test_dead_childrens_arenas_do_not_pile_up(coheld_dir: Path, last_words: Callable[[procs.Link], None]) -> None:
    obj = Lockable()
    for _ in range(20):
        with procs.start(last_words) as child:
            states.wait_until(partial(states.gone, child.pid), "the child has ended")
            child.kill()
        assert len(all_in(coheld_dir)) <= 2
    assert took(obj)


# ---- many at once ------------------------------------------------------------------------------------------

RUN = """\
import os, signal, sys
def wait(fd):
    return os.read(fd, 1)
number, go, end = map(int, sys.argv[1:])
os.write(1, b".")
wait(go)
from coheld import Lockable
obj, name = Lockable(), Lockable(lock_name="everybody's")
with obj, name:
    pass
child = number % 4 == 1 and not os.fork()
with Lockable():
    os.write(1, b".")
    wait(end)
    if number % 4 == 2 and {kill}:
        os.kill(os.getpid(), signal.SIGKILL)
"""


class Crowd:
    """A hundred interpreters that start, and end, when they are told to, and all at once."""

    SIZE = 100 if effort.STRIDE == 1 else 20

    def __init__(self, source: str) -> None:
        self._said, said = os.pipe()
        go, self._go = os.pipe()
        end, self._end = os.pipe()
        self._running = [
            subprocess.Popen(
                [sys.executable, "-c", source, str(number), str(go), str(end)], stdout=said, pass_fds=(go, end)
            )
            for number in range(self.SIZE)
        ]
        for fd in (said, go, end):
            os.close(fd)

    def wait_for(self, words: int) -> None:
        """Return when so many of them have said a word."""
        deadline = time.monotonic() + delays.HANG
        while words:
            ready, _, _ = select.select([self._said], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{words} of them have said nothing"
            words -= len(os.read(self._said, words))

    def start(self) -> None:
        """All start."""
        os.close(self._go)

    def end(self) -> list[int]:
        """All end; returns how."""
        os.close(self._end)
        statuses = [one.wait(delays.HANG) for one in self._running]
        os.close(self._said)
        return statuses


@pytest.mark.hang_limit(180)
@pytest.mark.parametrize("kill", [False, True])
def test_nothing_is_left_after_many_runs_that_start_and_end_at_once(coheld_dir: Path, kill: bool) -> None:
    with all_of_it_has_ended():
        crowd = Crowd(RUN.format(kill=kill))
        crowd.wait_for(Crowd.SIZE)
        crowd.start()
        crowd.wait_for(Crowd.SIZE * 5 // 4)  # every fourth forks a child
        assert len(forget_names(coheld_dir)) == Crowd.SIZE * 5 // 4
        statuses = crowd.end()
    assert statuses == [-signal.SIGKILL if kill and number % 4 == 2 else 0 for number in range(Crowd.SIZE)]
    if kill:
        next_start()
    assert forget_names(coheld_dir) == []


def test_of_many_names_that_are_made_one_after_the_other_few_look_through_the_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = []
    monkeypatch.setattr(sweeping, "sweep", looks.append)
    locks = [Lockable(lock_name=f"bed-{number}") for number in range(1000)]
    assert len(locks) == 1000 and 20 < len(looks) < 200


# ---- at every step -----------------------------------------------------------------------------------------


def make_and_share() -> None:
    """A process's first lock, which others may get."""
    assert took(pickle.loads(pickle.dumps(Lockable())))


def live_and_end() -> None:
    """A process's whole life with anonymous locks."""
    make_and_share()
    shm._leave()


@pytest.mark.hang_limit(180)
def test_a_process_that_is_killed_at_any_step_leaves_nothing_for_good(coheld_dir: Path) -> None:
    left = set()
    for _ in killpoints.killed_at_each_line(live_and_end):
        left |= {name.partition("-")[0] for name in all_in(coheld_dir)}
        assert killpoints.forked(live_and_end) == 0
        assert all_in(coheld_dir) == []
    assert effort.are_met(left, {".new", "arena"})


@pytest.mark.hang_limit(180)
def test_after_ctrl_c_at_any_step_the_next_lock_works_and_nothing_is_left_at_the_end(coheld_dir: Path) -> None:
    def go_on(line: int) -> None:
        live_and_end()
        assert all_in(coheld_dir) == [], f"interrupted before line {line}"

    for _ in killpoints.interrupted_at_each_line(make_and_share, go_on):
        assert all_in(coheld_dir) == []


# ---- races -------------------------------------------------------------------------------------------------

ROUNDS = effort.rounds(25)


def make_and_end(link: procs.Link) -> None:
    """Make a lock, hand it out, and end while others attach to it."""
    obj = Lockable()
    link.say(pickle.dumps(obj))
    link.wait_for("go")
    assert had(obj)


def attach_and_end(link: procs.Link) -> None:
    """Attach to a lock if it is still there, say so, and keep it."""
    data = link.hear()
    link.say("ready")
    link.wait_for("go")
    obj = pickle.loads(data)
    try:
        link.say(had(obj))
    except BackendError:
        link.say("gone")
    link.wait_for("go")


def sweep_all_the_time(link: procs.Link) -> None:
    """As if processes started one after the other."""
    while not told(link):
        sweeping.sweep(os.environ["COHELD_DIR"])


def told(link: procs.Link) -> bool:
    try:
        return bool(link.hear(0))
    except TimeoutError:
        return False


@contextmanager
def sweepers(count: int = 2) -> Iterator[None]:
    with ExitStack() as stack:
        all_of_them = [stack.enter_context(procs.start(sweep_all_the_time)) for _ in range(count)]
        yield
        for one in all_of_them:
            one.tell("end")


def at_once(rng: random.Random, workers: list[procs.FunctionWorker], kill: bool = False) -> None:
    """Tell all to go on, in any order; the first of them is killed instead, if `kill`."""
    for worker in rng.sample(workers, len(workers)):
        worker.kill() if kill and worker is workers[0] else worker.tell("go")


def load_and_enter(data: bytes) -> None:
    with pickle.loads(data):
        pass


@pytest.mark.parametrize("kill", [False, True])
def test_attaching_while_the_maker_ends_and_others_start(coheld_dir: Path, rng: random.Random, kill: bool) -> None:
    """All of those who attach find it, or none of them, and whoever has it can hand it on."""
    with sweepers():
        for _ in range(ROUNDS):
            with procs.start(make_and_end) as maker, ExitStack() as stack:
                users = [stack.enter_context(procs.start(attach_and_end)) for _ in range(2)]
                data = maker.hear()
                for user in users:
                    user.tell(data)
                    user.expect("ready")
                at_once(rng, [maker, *users], kill)
                answers = {user.hear() for user in users}
                assert answers in ({True}, {"gone"})
                late = killpoints.forked(partial(load_and_enter, data))
                assert late == (answers == {"gone"})
                at_once(rng, users)
    if kill:
        next_start()
    assert all_in(coheld_dir) == []


def test_one_who_attaches_while_it_is_swept_is_told_that_it_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file was there when it was opened, and a sweeper had the flock."""
    flock = sweeping.flock_soon

    def flock_after_the_sweeper(fd: int, operation: int, path: str) -> None:
        os.unlink(path)
        flock(fd, operation, path)

    with roles.maker() as maker:
        monkeypatch.setattr(sweeping, "flock_soon", flock_after_the_sweeper)
        obj = pickle.loads(bytes.fromhex(maker.lock))
        with pytest.raises(BackendError, match="gone"):
            obj.acquire()


def sweep_while(monkeypatch: pytest.MonkeyPatch, directory: Path, event: Callable[[], None]) -> None:
    """Sweep; the event comes when the first look at what all processes map is over."""
    look, events = sweeping._mapped_files, [event]

    def look_and_then(directory: str) -> set[str]:
        mapped = look(directory)
        if events:
            events.pop()()
        return mapped

    with monkeypatch.context() as patch:
        patch.setattr(sweeping, "_mapped_files", look_and_then)
        sweeping.sweep(str(directory))
    assert not events, "there was nothing to look for"


def test_one_who_attaches_during_a_sweep_and_closes_its_descriptors_keeps_the_lock(
    coheld_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look has begun before it came, and it has no flock when the look is over."""
    with ExitStack() as stack, roles.maker() as maker:
        maker.kill()
        came: list[roles.Actor] = []

        def attach_and_close() -> None:
            came.append(stack.enter_context(roles.attached(maker.lock)))
            came[0].ask("close")

        sweep_while(monkeypatch, coheld_dir, attach_and_close)
        check_that_it_stays(came[0])
        came[0].end()
    assert all_in(coheld_dir) == []


def test_one_who_attaches_during_a_sweep_and_is_killed_leaves_nothing(
    coheld_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with roles.maker() as maker:
        maker.kill()

        def attach_and_die() -> None:
            with roles.attached(maker.lock) as other:
                other.kill()

        sweep_while(monkeypatch, coheld_dir, attach_and_die)
    assert all_in(coheld_dir) == []


def test_one_who_is_forked_during_a_sweep_by_a_daemon_that_ends_keeps_the_lock(
    coheld_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the sweeper comes to the daemon it is gone, and its child was not there when it listed the processes."""
    processes = sweeping._processes

    def processes_of_which_one_forks() -> Iterator[str]:
        parent = daemon.pid
        for pid in processes():
            if int(pid) == parent:
                daemon.become_its_child()
            yield pid

    with all_of_it_has_ended(), roles.orphan("killed") as daemon:
        daemon.ask("close")
        parent = daemon.pid
        with monkeypatch.context() as patch:
            patch.setattr(sweeping, "_processes", processes_of_which_one_forks)
            sweeping.sweep(str(coheld_dir))
        assert daemon.pid != parent
        check_that_it_stays(daemon)
        daemon.end()
    assert all_in(coheld_dir) == []


def fork_and_end(link: procs.Link, data: bytes) -> None:
    """End, as a forked child does at the same time."""
    obj = pickle.loads(data) if data else Lockable()
    gate, opens = os.pipe()
    if not os.fork():
        os.close(opens)
        os.read(gate, 1)
        shm._leave()
        os._exit(0)
    link.say(pickle.dumps(obj))
    link.wait_for("go")
    os.close(opens)


def test_nothing_is_left_when_all_users_of_a_lock_end_at_once(coheld_dir: Path, rng: random.Random) -> None:
    for _ in range(ROUNDS):
        with all_of_it_has_ended(), sweepers(), procs.start(fork_and_end, b"") as maker:
            data = maker.hear()
            with procs.start(fork_and_end, data) as first, procs.start(fork_and_end, data) as second:
                for user in (first, second):
                    user.hear()
                at_once(rng, [maker, first, second])
        assert all_in(coheld_dir) == []
