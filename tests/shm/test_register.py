"""The register in shared memory, where Python runs under its mutex."""

import struct

import pytest

from coheld import Semaphore
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
