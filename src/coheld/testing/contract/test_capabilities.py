"""What a backend declares, asserted both ways where no other file does it: how its waiters wait, and if tasks own."""

import re
import time
from pathlib import Path

from coheld import Lockable
from coheld.backends.base import Capabilities
from coheld.testing.contract.observe import CAPABILITIES, is_free
from coheld.testing.support import delays, procs, states


class Bed(Lockable):
    @Lockable.locked
    async def use(self) -> bool:
        return is_free(self)


def test_they_are_declared() -> None:
    assert isinstance(CAPABILITIES, Capabilities)


def take(link: procs.Link, bed: Bed) -> None:
    link.wait_for("go")
    with bed:
        link.say("got it")


def sleeps_of(pid: int) -> int:
    """How often its main thread has gone to sleep so far."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"^voluntary_ctxt_switches:\s*(\d+)", text, re.MULTILINE)[0])


def test_who_waits_sleeps_or_looks_again_as_declared() -> None:
    bed, few = Bed(), 5
    with procs.start(take, bed) as waiter:
        with bed:
            waiter.tell("go")
            waiter.wait_until_blocked()
            before, since = sleeps_of(waiter.pid), time.monotonic()
            if CAPABILITIES.wakes_without_polling:
                states.wait_until(lambda: time.monotonic() > since + delays.MEDIUM, "the time is over")
                assert sleeps_of(waiter.pid) <= before + few * delays.SCALE
            else:
                states.wait_until(lambda: sleeps_of(waiter.pid) > before + few, "it looks again")
        waiter.expect("got it")
