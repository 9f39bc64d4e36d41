"""A wait that lasts is told of, once, with who has what it waits for."""

import os
import re
import subprocess
import time

import pytest

from coheld.testing.contract.observe import label_of, where
from coheld.testing.support import delays, procs

SOURCE = """
import logging, sys
from coheld import Lockable
class Router(Lockable):
    @Lockable.locked
    def configure(self):
        print("in", flush=True)
        sys.stdin.readline()
    @Lockable.locked(exclusive=False)
    def read(self):
        print("in", flush=True)
        sys.stdin.readline()
router = Router(lock_name="r1")  # the first one says so if there is no extension: before there is a handler
logging.basicConfig(format="%(levelname)s %(name)s %(message)s", stream=sys.stdout)
"""


@pytest.mark.parametrize(
    ("act", "said"),
    [
        ("configure", "held by process {}.* in Router.configure"),
        pytest.param("read", "read by process {}", marks=where("readers")),
    ],
)
def test_one_line_tells_of_it(act: str, said: str) -> None:
    environment = os.environ | {"COHELD_WARN_AFTER": str(delays.SHORT)}
    with procs.program(f"{SOURCE}router.{act}()") as holder:
        holder.expect("in")
        with procs.program(f"{SOURCE}with router: print('got it')", env=environment) as waiter:
            line = waiter.hear()
            assert re.match(
                rf"WARNING coheld {re.escape(label_of('r1'))}: waited for [\d.e-]+ s so far; {said.format(holder.pid)}",
                line,
            ), line
            assert line.endswith("coheld ps shows more")
            holder.tell("leave")
            waiter.expect("got it")


def test_a_short_wait_is_not_told_of_and_none_is_where_that_is_wished() -> None:
    for wish in ("0", str(delays.HANG)):
        with procs.program(f"{SOURCE}router.configure()") as holder:
            holder.expect("in")
            attempt = f"print('waits', router.acquire(timeout={2 * delays.SHORT}), flush=True)"
            source = f"{SOURCE}{attempt}\nwith router: print('got it')"
            with procs.program(source, env=os.environ | {"COHELD_WARN_AFTER": wish}) as waiter:
                waiter.expect("waits False")
                holder.tell("leave")
                waiter.expect("got it")


def test_what_is_no_number_is_said_and_ten_it_is() -> None:
    source = f"{SOURCE}from coheld.waiting import TOLD_AFTER\nprint(TOLD_AFTER)"
    said = procs.run(source, env=os.environ | {"COHELD_WARN_AFTER": "soon"}, stderr=subprocess.STDOUT)
    assert "COHELD_WARN_AFTER is no number of seconds" in said and said.splitlines()[-1] == "10.0"


# ---- waits for more than the lock ------------------------------------------------------------------------------------

MORE = """
import asyncio, logging, sys
import coheld
from coheld import Lockable, Pool, Semaphore, aio
class Router(Lockable):
    go = coheld.shared(False)
    go: bool
    @Lockable.locked(when=lambda self: self.go)
    def guarded(self):
        pass
    @Lockable.locked(when=lambda self: self.go)
    async def guarded_async(self):
        pass
    @Lockable.locked
    async def work(self, go):
        await go.wait()
    @Lockable.locked
    def change(self):
        self.go = True
router = Router(lock_name="r1")
with router:  # a store is connected by the first who wants something: that is no part of the wait
    pass
def hold():
    print("in", flush=True)
    sys.stdin.readline()
def change():
    hold()
    router.change()
def semaphore():
    return Semaphore(1, "s1")
def pool():
    return Pool(["a"], "p1")
def permit():
    with semaphore(): hold()
def lease():
    with pool().lease(): hold()
async def permit_async():
    async with semaphore(): pass
async def lease_async():
    async with pool().lease(): pass
def take_permit():
    with semaphore(): pass
def take_lease():
    with pool().lease(): pass
def await_change():
    with router: coheld.wait_for(router, lambda: router.go)
"""

AWAITED = f"{re.escape(label_of('r1'))}: .*it is not yet so; nobody holds it"
PERMITS = re.escape(label_of("s1")) + ": .*all permits are with process {}"
LEASES = re.escape(label_of("p1")) + ": .*what would do is with process {}"


@pytest.mark.parametrize(
    ("act", "wait", "said"),
    [
        ("change", "router.guarded()", AWAITED),
        ("change", "asyncio.run(router.guarded_async())", AWAITED),
        ("change", "await_change()", AWAITED),
        pytest.param("permit", "take_permit()", PERMITS, marks=where("semaphores")),
        pytest.param("permit", "asyncio.run(permit_async())", PERMITS, marks=where("semaphores")),
        pytest.param("lease", "take_lease()", LEASES, marks=where("semaphores")),
        pytest.param("lease", "asyncio.run(lease_async())", LEASES, marks=where("semaphores")),
    ],
)
def test_waits_for_guards_permits_and_leases_are_told_of_once(act: str, wait: str, said: str) -> None:
    logs = "logging.basicConfig(format='%(levelname)s %(name)s %(message)s', stream=sys.stdout)"
    environment = os.environ | {"COHELD_WARN_AFTER": str(delays.SHORT)}
    with procs.program(f"{MORE}{act}()") as holder:
        holder.expect("in")
        with procs.program(f"{MORE}{logs}\n{wait}\nprint('got it')", env=environment) as waiter:
            line = waiter.hear()
            assert re.match(f"WARNING coheld {said.format(holder.pid)}.*; coheld ps shows more", line), line
            time.sleep(3 * delays.SHORT)
            holder.tell("go on")
            waiter.expect("got it")


ONE_BY_ONE = """
import asyncio, logging, sys
from coheld import Lockable
class Router(Lockable):
    @Lockable.locked
    async def work(self, seconds):
        await asyncio.sleep(seconds)
async def main():
    router = Router(lock_name="r1")
    logging.basicConfig(format="%(levelname)s %(name)s %(message)s", stream=sys.stdout)
    await asyncio.gather(*(router.work(float(sys.argv[1])) for _ in range(8)))
asyncio.run(main())
"""


def test_the_clock_of_a_task_goes_on_while_others_are_served_before_it() -> None:
    environment = os.environ | {"COHELD_WARN_AFTER": str(4 * delays.SHORT)}
    lines = procs.run(ONE_BY_ONE, str(1.6 * delays.SHORT), env=environment).splitlines()
    assert 1 <= len(lines) <= 7, lines
    assert all(f"{label_of('r1')}: waited for" in line and "in Router.work" in line for line in lines)
