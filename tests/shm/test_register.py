"""The register in shared memory, where Python runs under its mutex."""

import os
import struct

import pytest

from coheld import NotOwnerError, Semaphore
from coheld.backends import beside, register


def test_a_handler_that_takes_the_last_permit_while_the_file_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    semaphore, grow = Semaphore(1), register.Register.grow
    memory = memoryview(semaphore._lock.readers.segment)
    struct.pack_into("=I", memory, beside.ROOM_AT, 0)

    def interrupted(self: register.Register) -> None:
        monkeypatch.setattr(register.Register, "grow", grow)
        assert semaphore.acquire(blocking=False)
        grow(self)

    monkeypatch.setattr(register.Register, "grow", interrupted)
    assert not semaphore.acquire(blocking=False)
    assert semaphore.free() == 0


def test_a_child_that_a_handler_forks_while_the_file_grows_has_no_permit(monkeypatch: pytest.MonkeyPatch) -> None:
    semaphore, grow, children = Semaphore(2), register.Register.grow, []
    struct.pack_into("=I", memoryview(semaphore._lock.readers.segment), beside.ROOM_AT, 0)

    def forked(self: register.Register) -> None:
        monkeypatch.setattr(register.Register, "grow", grow)
        grow(self)
        children.append(os.fork())

    monkeypatch.setattr(register.Register, "grow", forked)
    try:
        got = semaphore.acquire(blocking=False)
    except NotOwnerError:
        os._exit(1 if children[0] else 0)
    if not children[0]:
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0
    assert got and semaphore.free() == 1 and semaphore._lock.readers.counts()[0][::2] == (os.getpid(), 1)
