"""How a name ends: removed under its lock, or by somebody who knows nothing of locks. It never means two locks."""

import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from coheld import Lockable, LockTimeout, holder
from coheld.mutex import remove
from coheld.testing.contract import killpoints
from coheld.testing.contract.observe import LOCAL
from coheld.testing.contract.places import all_in, file_called, had, inode_of, live_once, took
from coheld.testing.support import delays, effort, procs, states
from coheld.testing.support.exclusion import Exclusion

# ---- remove ------------------------------------------------------------------------------------------------


def test_the_file_goes(coheld_dir: Path) -> None:
    Lockable(lock_name="x")
    other = Lockable(lock_name="y")
    assert remove("x") is True
    assert all_in(coheld_dir) == [file_called("y")] and took(other)
    assert remove("x") is False


def test_there_was_none(coheld_dir: Path) -> None:
    assert remove("x") is False
    assert all_in(coheld_dir) == []
    assert took(Lockable(lock_name="x"))


@pytest.mark.parametrize(("name", "error"), [(1, TypeError), ("", ValueError), ("a\0", ValueError)])
def test_a_bad_name(name: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        remove(name)


def hold_by_name(link: procs.Link, name: str = "x") -> None:
    obj = Lockable(lock_name=name)
    with obj:
        link.say(inode_of(obj))
        link.wait_for("leave")


@pytest.mark.parametrize("timeout", [0, -1, delays.SHORT])
def test_a_held_lock_is_not_removed(coheld_dir: Path, timeout: float) -> None:
    with procs.start(hold_by_name) as other:
        other.hear()
        with pytest.raises(LockTimeout, match=f"held by process {other.pid}") as caught:
            remove("x", timeout)
        assert caught.value.owner and caught.value.owner.pid == other.pid
        assert all_in(coheld_dir) == [file_called("x")] and not took(Lockable(lock_name="x"))
        other.tell("leave")
    assert remove("x")


@pytest.mark.parametrize("timeout", [delays.LONG, None])
def test_it_waits_for_the_holder(coheld_dir: Path, timeout: float | None) -> None:
    with procs.start(hold_by_name) as other:
        other.hear()

        def remove_it(_: procs.Link) -> bool:
            return remove("x", timeout)

        with procs.start(remove_it) as remover:
            remover.wait_until_blocked()
            other.tell("leave")
            assert remover.result() is True
    assert all_in(coheld_dir) == []


def test_its_own_holder_cannot_remove_it(coheld_dir: Path) -> None:
    """He would go on under a lock that others get anew."""
    obj = Lockable(lock_name="x")
    with obj:
        with pytest.raises(LockTimeout):
            remove("x")
        owner = holder(obj)
        assert owner and owner.depth == 1
    assert all_in(coheld_dir) == [file_called("x")] and took(obj)


def test_a_dead_holder_does_not_keep_it(coheld_dir: Path) -> None:
    with procs.start(hold_by_name) as other:
        other.hear()
        other.kill()
    assert remove("x") is True
    assert all_in(coheld_dir) == []


# ---- what becomes of those who use it ----------------------------------------------------------------------


def remove_in_steps(link: procs.Link) -> bool:
    """Stop after the lock is taken and marked, and again after its name is gone."""
    retire = LOCAL.Named.retire

    def retire_in_steps(resource: Any, segment: Any) -> None:
        link.say("marked")
        link.wait_for("unlink")
        retire(resource, segment)
        link.say("unlinked")
        link.wait_for("release")

    Lockable(lock_name="x")
    LOCAL.Named.retire = retire_in_steps
    return remove("x", None)


@contextmanager
def removing() -> Iterator[procs.FunctionWorker]:
    """Another process is within `remove`; it goes on when it is told to."""
    with procs.start(remove_in_steps) as remover:
        remover.expect("marked")
        yield remover
        assert remover.result() is True


def enter_by_name(link: procs.Link, exclusion: Exclusion, worker: int) -> tuple[int, int]:
    obj = Lockable(lock_name="x")
    before = inode_of(obj)
    link.say("here")
    with obj, exclusion.inside(worker):
        pass
    return before, inode_of(obj)


def test_those_who_wait_move_on_to_the_new_file(coheld_dir: Path, tmp_path: Path) -> None:
    exclusion = Exclusion(tmp_path)
    old = inode_of(Lockable(lock_name="x"))
    with (
        removing() as remover,
        procs.start(enter_by_name, exclusion, 0) as first,
        procs.start(enter_by_name, exclusion, 1) as second,
    ):
        for worker in (first, second):
            worker.expect("here")
            worker.wait_until_blocked()
        remover.tell("unlink")
        remover.expect("unlinked")
        remover.tell("release")
        moves = [first.result(), second.result()]
    assert {before for before, _ in moves} == {old} and len({after for _, after in moves} - {old}) == 1
    assert moves[0][1] == moves[1][1] == inode_of(Lockable(lock_name="x"))
    exclusion.check(calls=2)


def test_those_who_come_when_the_name_is_gone_make_it_anew_at_once(coheld_dir: Path) -> None:
    with removing() as remover:
        remover.tell("unlink")
        remover.expect("unlinked")
        with procs.start(hold_by_name) as holding:
            new = holding.hear()
            with procs.start(wait_by_name) as waiting:
                waiting.expect(new)
                waiting.wait_until_blocked()
                remover.tell("release")
                holding.tell("leave")
                waiting.expect(new)
    assert all_in(coheld_dir) == [file_called("x")]


def wait_by_name(link: procs.Link) -> None:
    obj = Lockable(lock_name="x")
    link.say(inode_of(obj))
    with obj:
        link.say(inode_of(obj))


def test_those_who_know_the_lock_attach_anew(coheld_dir: Path) -> None:
    objs = [Lockable(lock_name="x"), pickle.loads(pickle.dumps(Lockable(lock_name="x")))]
    with procs.start(remove_now) as remover:
        assert remover.result()
    assert all_in(coheld_dir) == []
    for obj in objs:
        assert took(obj)
    with procs.start(hold_by_name) as other:
        assert {other.hear()} == {inode_of(obj) for obj in objs}
        assert not any(took(obj) for obj in objs)
        other.tell("leave")


def remove_now(_: procs.Link) -> bool:
    return remove("x", delays.LONG)


@pytest.mark.parametrize("step", ["marked", "unlinked"])
def test_a_thread_beside_the_remover_makes_the_name_anew(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """In one process, whose objects share one handle."""
    retire, made = LOCAL.Named.retire, []

    def make_meanwhile() -> None:
        thread = threading.Thread(target=lambda: made.append(Lockable(lock_name="x")))
        thread.start()
        thread.join(delays.LONG)

    def retire_beside(resource: Any, segment: Any) -> None:
        monkeypatch.setattr(LOCAL.Named, "retire", retire)
        make_meanwhile() if step == "marked" else None
        retire(resource, segment)
        make_meanwhile() if step == "unlinked" else None

    with procs.start(enter_when_free) as waiting:
        assert Lockable(lock_name="x").acquire(timeout=delays.LONG)
        obj = Lockable(lock_name="x")
        waiting.wait_until_blocked()
        monkeypatch.setattr(LOCAL.Named, "retire", retire_beside)
        obj.release()
        assert remove("x", delays.LONG) is True
        waiting.result()
    assert len(made) == 1 and took(made[0]) and took(obj)


def enter_when_free(_: procs.Link) -> None:
    states.wait_until(lambda: not took(Lockable(lock_name="x")), "the test holds it")
    with Lockable(lock_name="x"):
        pass


# ---- one name is never two locks ---------------------------------------------------------------------------


def call_by_name(link: procs.Link, exclusion: Exclusion, worker: int, calls: int) -> None:
    for _ in range(calls):
        with Lockable(lock_name="x"), exclusion.inside(worker):
            pass


def remove_again_and_again(link: procs.Link, count: int) -> int:
    return sum(remove("x", None) for _ in range(count))


@pytest.mark.hang_limit(180)
@pytest.mark.parametrize("calls", [400])
def test_exclusion_holds_while_the_name_is_removed_again_and_again(
    coheld_dir: Path, tmp_path: Path, calls: int
) -> None:
    exclusion = Exclusion(tmp_path)
    with (
        procs.start(call_by_name, exclusion, 0, calls),
        procs.start(call_by_name, exclusion, 1, calls),
        procs.start(remove_again_and_again, calls // 2) as first,
        procs.start(remove_again_and_again, calls // 2) as second,
    ):
        assert first.result(delays.HANG) + second.result(delays.HANG) > 0
    exclusion.check(calls=2 * calls)


@pytest.mark.hang_limit(180)
@pytest.mark.parametrize("calls", [300])
def test_so_it_does_between_threads(tmp_path: Path, calls: int) -> None:
    exclusion, failures = Exclusion(tmp_path), []

    def call(worker: int) -> None:
        try:
            for _ in range(calls):
                with Lockable(lock_name="x"), exclusion.inside(worker):
                    pass
                remove("x", None)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=[worker]) for worker in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(delays.HANG)
    assert not failures
    exclusion.check(calls=3 * calls)


def remove_x() -> None:
    assert remove("x", delays.LONG)


def enter_x() -> None:
    with Lockable(lock_name="x"):
        pass


def remove_and_enter() -> None:
    remove_x()
    enter_x()


@pytest.mark.hang_limit(180)
def test_a_remover_that_is_killed_at_any_step_is_in_nobodys_way(coheld_dir: Path) -> None:
    seen = set()
    known = Lockable(lock_name="x")
    for _ in killpoints.killed_at_each_line(remove_x):
        seen.add(bool(all_in(coheld_dir)))
        assert had(known)
        assert killpoints.forked(enter_x) == 0
        with procs.start(hold_by_name) as other:
            other.expect(inode_of(known))
            assert not took(known)
            other.tell("leave")
        assert killpoints.forked(live_once) == 0  # for the table of waiters that it may have left half made
        assert all_in(coheld_dir) == [file_called("x")]
    assert effort.are_met(seen, {True, False})


@pytest.mark.hang_limit(180)
def test_one_who_attaches_anew_may_be_killed_at_any_step_too(coheld_dir: Path) -> None:
    known = Lockable(lock_name="x")
    for _ in killpoints.killed_at_each_line(remove_and_enter):
        assert killpoints.forked(enter_x) == 0
        assert had(known) and inode_of(known) == (coheld_dir / file_called("x")).stat().st_ino


ABOUT_A_SECOND = max(3, 3 * delays.SCALE)


# ---- removed by somebody who knows nothing of locks --------------------------------------------------------


def unlink_it(directory: Path) -> None:
    (directory / file_called("x")).unlink()


def remove_all(directory: Path) -> None:
    """What a session manager does at logout."""
    shutil.rmtree(directory)


def use_by_name(link: procs.Link) -> None:
    obj = Lockable(lock_name="x")
    while link.hear() != "end":
        with obj:
            link.say(inode_of(obj))


def used(worker: procs.FunctionWorker) -> int:
    """Which file another process has just locked."""
    worker.tell("use")
    return int(worker.hear())


@pytest.mark.parametrize("remove_externally", [unlink_it, remove_all])
def test_all_agree_on_one_lock_within_about_a_second(
    coheld_dir: Path, remove_externally: Callable[[Path], None]
) -> None:
    with procs.start(use_by_name) as first, procs.start(use_by_name) as second:
        assert used(first) == used(second)
        remove_externally(coheld_dir)
        with procs.start(use_by_name) as third:
            workers = [first, second, third]
            states.wait_until(lambda: len(set(map(used, workers))) == 1, "all agree", ABOUT_A_SECOND)
            assert used(first) == (coheld_dir / file_called("x")).stat().st_ino
            for worker in workers:
                worker.tell("end")


@pytest.mark.parametrize("remove_externally", [unlink_it, remove_all])
def test_they_agree_though_one_held_it_meanwhile_and_others_waited(
    coheld_dir: Path, remove_externally: Callable[[Path], None]
) -> None:
    with procs.start(hold_by_name) as holding:
        old = holding.hear()
        with procs.start(wait_and_use) as waiting:
            waiting.wait_until_blocked()
            remove_externally(coheld_dir)
            holding.tell("leave")
            assert waiting.hear() is True
            new = Lockable(lock_name="x")
            states.wait_until(lambda: used(waiting) == used_here(new), "both agree", ABOUT_A_SECOND)
            assert inode_of(new) != old
            waiting.tell("end")


def wait_and_use(link: procs.Link) -> None:
    link.say(had(Lockable(lock_name="x")))
    use_by_name(link)


def used_here(obj: Lockable) -> int:
    with obj:
        return inode_of(obj)


def test_one_that_another_file_has_replaced_is_left_for_that(coheld_dir: Path) -> None:
    with procs.start(use_by_name) as worker:
        old = used(worker)
        unlink_it(coheld_dir)
        new = Lockable(lock_name="x")
        states.wait_until(lambda: used(worker) == inode_of(new), "it has moved on", ABOUT_A_SECOND)
        assert inode_of(new) != old
        worker.tell("end")


def test_a_lock_that_is_held_is_given_back_though_its_file_is_gone(coheld_dir: Path) -> None:
    obj = Lockable(lock_name="x")
    with obj:
        with obj:
            unlink_it(coheld_dir)
        owner = holder(obj)
        assert owner and owner.depth == 1
    assert holder(obj) is None and took(obj)


def test_remove_takes_the_lock_that_is_there_now(coheld_dir: Path) -> None:
    """Not the one that this process still knows."""
    known = Lockable(lock_name="x")
    unlink_it(coheld_dir)
    with procs.start(hold_by_name, method="spawn") as other:
        other.hear()
        with pytest.raises(LockTimeout):
            remove("x")
        other.tell("leave")
    assert remove("x") and all_in(coheld_dir) == []
    assert had(known)
