"""A wait that lasts is told of, once, with who has the lock."""

import os
import re
import subprocess

import pytest

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
    ("act", "said"), [("configure", "held by process {}.* in Router.configure"), ("read", "read by process {}")]
)
def test_one_line_tells_of_it(act: str, said: str) -> None:
    environment = os.environ | {"COHELD_WARN_AFTER": str(delays.SHORT)}
    with procs.program(f"{SOURCE}router.{act}()") as holder:
        holder.expect("in")
        with procs.program(f"{SOURCE}with router: print('got it')", env=environment) as waiter:
            line = waiter.hear()
            assert re.match(rf"WARNING coheld 'r1': waited for [\d.e-]+ s so far; {said.format(holder.pid)}", line), (
                line
            )
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
