"""coheld rm."""

from pathlib import Path

from cli.commands import can_be_had, coheld
from coheld import Lockable
from coheld.cli import exits
from coheld.testing.support import procs


def test_removed(coheld_dir: Path) -> None:
    Lockable(lock_name="name")
    done = coheld("rm", "name")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(coheld_dir.iterdir()) == []


def test_no_such_resource(coheld_dir: Path) -> None:
    done = coheld("rm", "name")
    assert (done.returncode, done.stderr) == (exits.NO_SUCH_RESOURCE, "coheld: no resource named 'name'\n")
    assert list(coheld_dir.iterdir()) == []


def hold(link: procs.Link, name: str) -> None:
    with Lockable(lock_name=name):
        link.say("holding")
        link.wait_for("go on")


def test_held() -> None:
    lock = Lockable(lock_name="name")
    with procs.start(hold, "name") as other:
        other.expect("holding")
        done = coheld("rm", "name")
        assert done.returncode == exits.NOT_GOT
        assert done.stderr.startswith("coheld: 'name'")
        assert f"process {other.pid} " in done.stderr
        assert not lock.acquire(blocking=False)
        other.tell("go on")
    assert coheld("rm", "name").returncode == 0


def test_whoever_has_it_open_meets_the_others_again() -> None:
    old = Lockable(lock_name="name")
    assert coheld("rm", "name").returncode == 0
    with procs.start(hold, "name") as other:
        other.expect("holding")
        assert not old.acquire(blocking=False)
        other.tell("go on")
    assert can_be_had(old)
