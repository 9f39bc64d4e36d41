"""Resources as they might be, for pictures and tests of them: nobody has to run, wait or hold anything."""

import time
from dataclasses import dataclass

from coheld import Owner, Resource, Waiter

COMMANDS = {
    4711: "python -m nightly",
    4802: "pytest tests/lab",
    4840: "python -m lab.flash",
    4855: "python -m lab.soak",
}


class Actor(Owner):
    @property
    def command(self) -> str:
        return COMMANDS.get(self.pid, "")


class Caller(Waiter):
    @property
    def command(self) -> str:
        return COMMANDS.get(self.pid, "")


@dataclass
class Scene:
    """At a time of time.monotonic()."""

    now: float

    def holder(self, pid: int, method: str = "", held: float = 0.0, tid: int = 0, task_id: int = 0) -> Owner:
        return Actor(pid, 1, tid or pid, method, self.now - held, 1, task_id, thread="MainThread")

    def waiter(
        self, pid: int, method: str = "", waited: float = 0.0, tid: int = 0, task_id: int = 0, **other: object
    ) -> Waiter:
        task, thread = (f"task-{task_id}", "") if task_id else ("", "MainThread" if tid in (0, pid) else f"t-{tid}")
        given = {"waits_for": "lock", "timed": False, **other}
        return Caller(pid, 1, tid or pid, thread, task, method, self.now - waited, task_id=task_id, **given)  # type: ignore[arg-type]


def resource(name: str, holder: Owner | None = None, *waiting: Waiter, **other: object) -> Resource:
    """On shared memory."""
    given = {"kind": "lock", "backend": "shm", "place": f"/dev/shm/coheld/name-{name}:4096", **other}
    return Resource(name, holder=holder, waiting=waiting, waiters=len(waiting), **given)  # type: ignore[arg-type]


def lab(now: float | None = None) -> list[Resource]:
    """Two who wait for each other, and others who wait for them."""
    scene = Scene(time.monotonic() if now is None else now)
    configure, ping, flash = "Router.configure", "Router.ping", "Bed.flash"
    return [
        resource(
            "lab/r1",
            scene.holder(4711, configure, 184),
            scene.waiter(4802, ping, 131),
            scene.waiter(4840, flash, 118, timed=True),
            acquisitions=5712,
            contended=318,
            recoveries=1,
        ),
        resource(
            "lab/bed-1",
            scene.holder(4802, "Bed.book", 172),
            scene.waiter(4711, configure, 125),
            acquisitions=911,
            contended=40,
        ),
        resource("lab/bed-2", scene.holder(4840, flash, 144), acquisitions=877, contended=12),
        resource("gpus", None, scene.waiter(4855, "", 102), kind="semaphore", permits=2, inside={4711: 1, 4802: 1}),
        resource("lab/report", acquisitions=67),
    ]
