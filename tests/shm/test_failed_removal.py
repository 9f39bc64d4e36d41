"""A name that cannot be taken off stays what it was."""

import pytest

from coheld import Lockable, holder, native
from coheld.backends import shm
from coheld.mutex import remove
from coheld.testing.support import procs


def fail_to_remove(link: procs.Link) -> None:
    """The name cannot be taken off.  Stop after the look that finds it still there, before the mark is taken back."""
    look = shm.Mutex._linked

    def refuse(segment: shm.Segment) -> None:
        raise PermissionError(segment.path)

    def look_and_stop(mutex: shm.Mutex) -> bool:
        linked = look(mutex)
        if mutex.flags & native.REMOVED:
            link.say("marked")
            link.wait_for("go on")
        return linked

    Lockable(lock_name="x")
    shm.unlink_named, shm.Mutex._linked = refuse, look_and_stop
    with pytest.raises(PermissionError):
        remove("x", None)


def test_a_removal_that_fails_makes_no_second_lock_of_the_name() -> None:
    """Whoever asks for the name meanwhile sees a mark that is taken back."""
    obj = Lockable(lock_name="x")
    with procs.start(hold_when_told) as other:
        other.expect("here")
        with procs.start(fail_to_remove) as remover:
            remover.expect("marked")
            again = Lockable(lock_name="x")
            assert holder(obj)
            remover.tell("go on")
        other.tell("hold")
        other.expect("holding")
        assert not again.acquire(blocking=False)
        assert not obj.acquire(blocking=False)
        other.tell("leave")


def hold_when_told(link: procs.Link) -> None:
    obj = Lockable(lock_name="x")
    link.say("here")
    link.wait_for("hold")
    with obj:
        link.say("holding")
        link.wait_for("leave")
