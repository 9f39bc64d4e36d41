"""The course of the demo: workers call devices, holders are killed, successors come, and the books are settled."""

import os
import random
import signal
import sys
import time
from contextlib import suppress
from types import FrameType

import coheld
from coheld.cli import testbed
from coheld.cli.crew import Crew
from coheld.cli.display import View
from coheld.cli.report import DeviceResult, Moment, Plan, Report, Use, WorkerResult
from coheld.mutex import remove

assert sys.platform == "linux"  # type checkers for other systems stop here

_TICK = 0.05  # seconds between two looks
_GRACE = 5.0  # seconds more, if there was nobody to kill in the time
_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Scenario:
    """One run. This process takes no lock while the workers run: it looks, kills, and hires."""

    def __init__(self, plan: Plan, view: View) -> None:
        self.plan = plan
        self.view = view
        self.chance = random.Random(plan.seed)
        self.board = testbed.Board(plan.devices, plan.workers)
        self.names = [f"demo-{os.getpid()}/{name}" for name in testbed.device_names(plan.devices)]
        onlooker = testbed.Worker(testbed.NOBODY, self.board)
        self.devices = [testbed.Device(name, row, self.board, onlooker) for row, name in enumerate(self.names)]
        self.crew = Crew(self._work)
        self.kills_in = [0] * plan.devices
        self.kills_of = [0] * plan.workers
        self.unrecovered: dict[int, int] = {}  # when the last holder was killed, monotonic ns; by row
        self.strangers = 0  # kills by somebody else
        self.mishaps: list[str] = []
        self.ended_by = 0  # a signal
        self.started = time.monotonic()

    def _work(self, place: int, number: int) -> None:
        testbed.work(testbed.Worker(place, self.board), self.names, f"{self.plan.seed}:{number}")

    def play(self) -> Report:
        """The whole course; blocks until all workers are gone. Signals that ask this process to end shorten it."""
        for number in _ENDINGS:
            signal.signal(number, self._end_early)
        try:
            for place in range(self.plan.workers):
                self.crew.hire(place)
            self._run()
            self.board.stop[0] = True
            self._note_ends(self.crew.await_end())
            self.mishaps += [f"{_label(place)} did not end" for place in self.crew.kill_all()]
            return self._report()
        finally:
            self.crew.kill_all()
            for name in self.names:
                with suppress(coheld.CoheldError):
                    remove(name)

    def _end_early(self, number: int, frame: FrameType | None) -> None:
        self.ended_by = number

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def _run(self) -> None:
        while not self._is_over():
            while self._kill_is_due() and self._kill_somebody():
                pass
            for place in self._note_ends(self.crew.reap()):
                self.crew.hire(place)
            self._note_recoveries()
            self.view.show(self._moment())
            time.sleep(_TICK)

    def _is_over(self) -> bool:
        rest = self.plan.seconds - self.elapsed
        return self.ended_by != 0 or rest <= (0 if sum(self.kills_in) == self.plan.kills else -_GRACE)

    # -- kills ---------------------------------------------------------------------------------------------------------

    def _kill_is_due(self) -> bool:
        """The kills are spread evenly over the time."""
        made, wanted = sum(self.kills_in), self.plan.kills
        return made < wanted and self.elapsed >= self.plan.seconds * (made + 1) / (wanted + 1)

    def _kill_somebody(self) -> bool:
        rows = range(self.plan.devices)
        return any(self._kill_holder_of(row) for row in self.chance.sample(rows, len(rows)))

    def _kill_holder_of(self, row: int) -> bool:
        """Kill the worker that holds the device, if one truly does; and hire its successor."""
        owner = coheld.holder(self.devices[row])
        if owner is None or (place := self.crew.places.get(owner.pid)) is None:
            return False
        killed_at = self.crew.kill_if(owner.pid, lambda: self._pid_of_holder(row) == owner.pid)
        if killed_at is None:
            return False
        self.unrecovered[row] = killed_at
        self.kills_in[row] += 1
        self.kills_of[place] += 1
        self._note(
            f"SIGKILL {_label(place)} (process {owner.pid}) inside {_short(owner.method)} of {self._device(row)}"
        )
        self.crew.hire(place)
        return True

    def _pid_of_holder(self, row: int) -> int | None:
        # The owner is written down after the lock is taken, and wiped before it is given back.
        owner = coheld.holder(self.devices[row])
        return owner.pid if owner else None

    # -- what is seen --------------------------------------------------------------------------------------------------

    def _note(self, text: str) -> None:
        self.view.note(self.elapsed, text)

    def _note_ends(self, ended: list[tuple[int, int]]) -> list[int]:
        """Tell of workers that did not end as they should; returns the places of all."""
        for place, status in ended:
            if status < 0:
                self.strangers += 1
                self._note(f"{_label(place)} was killed by {signal.Signals(-status).name}, not by this demo")
            elif status or not self.board.stop[0]:
                self.mishaps.append(f"{_label(place)} failed")
        return [place for place, _ in ended]

    def _note_recoveries(self) -> None:
        for row, killed in list(self.unrecovered.items()):
            place, recovered, asked = (self.board.recovered[row, column] for column in range(3))
            if recovered > killed:
                del self.unrecovered[row]
                how = f"{(recovered - killed) / 1e6:.1f} ms later" if asked < killed else "at its next call"
                self._note(f"recovered {self._device(row)} by {_label(place)}, {how}")

    def _device(self, row: int) -> str:
        return self.names[row].partition("/")[2]

    def _moment(self) -> Moment:
        uses = tuple(self._use(row) for row in range(self.plan.devices))
        return Moment(self.elapsed, sum(self.kills_in), uses)

    def _use(self, row: int) -> Use:
        owner = coheld.holder(self.devices[row])
        seen = coheld.statistics(self.devices[row])
        place = self.crew.places.get(owner.pid) if owner else None
        return Use(
            device=self._device(row),
            worker=_label(place) if place is not None else "",
            pid=owner.pid if owner else 0,
            method=_short(owner.method) if owner else "",
            held=max(0.0, time.monotonic() - owner.since) if owner else 0.0,
            waiters=seen.waiters,
            calls=self.board.counted[row],
            recoveries=seen.recoveries,
        )

    # -- the books -----------------------------------------------------------------------------------------------------

    def _report(self) -> Report:
        for device in self.devices:
            with device:  # a holder may have been killed with nobody after him: recover now
                pass
        self._note_recoveries()
        devices = tuple(self._device_result(row) for row in range(self.plan.devices))
        workers = tuple(self._worker_result(place) for place in range(self.plan.workers))
        return Report(devices, workers, (*self.mishaps, *self._missing(devices)))

    def _device_result(self, row: int) -> DeviceResult:
        made = sum(self.board.made[place, row] for place in range(self.plan.workers))
        recoveries = coheld.statistics(self.devices[row]).recoveries
        return DeviceResult(self._device(row), made, self.board.counted[row], self.kills_in[row], recoveries)

    def _worker_result(self, place: int) -> WorkerResult:
        made = sum(self.board.made[place, row] for row in range(self.plan.devices))
        return WorkerResult(_label(place), made, self.kills_of[place], self.board.waited[place] / 1e9)

    def _missing(self, devices: tuple[DeviceResult, ...]) -> list[str]:
        """Deaths of holders that nobody noticed, and recoveries without a death."""
        kills, recoveries = sum(self.kills_in), sum(device.recoveries for device in devices)
        if kills <= recoveries <= kills + self.strangers:
            return []
        return [f"{kills} holders were killed, but {recoveries} recoveries counted"]


def _label(place: int) -> str:
    return f"w{place + 1}" if place != testbed.NOBODY else "the demo itself"


def _short(method: str) -> str:
    return method.rpartition(".")[2]
