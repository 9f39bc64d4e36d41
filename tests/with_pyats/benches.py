"""Classes as users of pyATS write them, all of them before adopt() is called."""

from typing import Any

from pyats.async_.synchronize import Lockable as CiscosLockable
from pyats.connections import BaseConnection

import coheld
from coheld import Owner
from coheld.testing.support.exclusion import Exclusion


class Minimal(BaseConnection):
    """The least that pyATS takes for a connection."""

    up = False

    def connect(self) -> None:
        self.up = True

    def disconnect(self) -> None:
        self.up = False

    @property
    def connected(self) -> bool:
        return self.up

    @CiscosLockable.locked
    def execute(self, command: Any) -> Any:
        return command() if callable(command) else command


class Counter:
    """Its subclass locks `count`."""

    exclusion: Exclusion

    def often(self, worker: int) -> int:
        for _ in range(200):
            self.count(worker)
        return worker

    def count(self, worker: int) -> None:
        raise NotImplementedError


class OurCounter(Counter, coheld.Lockable):
    @coheld.Lockable.locked
    def count(self, worker: int) -> None:
        with self.exclusion.inside(worker):
            pass


class CiscosCounter(Counter, CiscosLockable):
    @CiscosLockable.locked
    def count(self, worker: int) -> None:
        with self.exclusion.inside(worker):
            pass


class _Both:
    """What both orders have in common."""

    recovered: list[int]

    @CiscosLockable.locked
    def by_cisco(self) -> int:
        return depth(self)

    @coheld.Lockable.locked
    def by_us(self) -> int:
        return self.by_cisco()

    def __create__(self) -> None:
        self.created = True

    def __recover__(self, dead: Owner) -> None:
        self.recovered = [*getattr(self, "recovered", []), dead.pid]


class OursFirst(_Both, coheld.Lockable, Minimal):
    pass


class CiscosFirst(_Both, Minimal, coheld.Lockable):
    pass


def depth(obj: object) -> int:
    """How many times the lock is held, by whomever."""
    return owner.depth if (owner := coheld.holder(obj)) else 0
