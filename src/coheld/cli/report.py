"""What the demo has to show: frozen values, made by the scenario, drawn by a display."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """What was asked for."""

    workers: int
    devices: int
    seconds: float
    kills: int
    seed: str
    place: str  # the backend, and where the locks are


@dataclass(frozen=True)
class Use:
    """A device at one moment."""

    device: str
    worker: str  # who holds it; "" if nobody does
    pid: int
    method: str
    held: float  # seconds
    waiters: int
    calls: int
    recoveries: int


@dataclass(frozen=True)
class Moment:
    """The testbed at one moment."""

    elapsed: float  # seconds
    kills: int
    uses: tuple[Use, ...]


@dataclass(frozen=True)
class DeviceResult:
    """What a device has seen in the end."""

    device: str
    made: int  # calls, as the workers say
    counted: int  # calls, as the device says
    kills: int  # of those who held it
    recoveries: int


@dataclass(frozen=True)
class WorkerResult:
    """What a worker and its successors have done."""

    worker: str
    made: int
    kills: int
    waited: float  # the longest time, seconds


@dataclass(frozen=True)
class Report:
    """The end table. `mishaps`: what else went wrong, one line each."""

    devices: tuple[DeviceResult, ...]
    workers: tuple[WorkerResult, ...]
    mishaps: tuple[str, ...]

    @property
    def made(self) -> int:
        """Calls that the workers have made."""
        return sum(worker.made for worker in self.workers)

    @property
    def counted(self) -> int:
        """Calls that the devices have counted."""
        return sum(device.counted for device in self.devices)

    @property
    def kills(self) -> int:
        """Holders killed."""
        return sum(device.kills for device in self.devices)

    @property
    def recoveries(self) -> int:
        """Times that somebody got the lock of a dead holder."""
        return sum(device.recoveries for device in self.devices)

    @property
    def waited(self) -> float:
        """The longest time that a worker has waited, seconds."""
        return max(worker.waited for worker in self.workers)

    @property
    def exact(self) -> bool:
        """Every device has counted what was made."""
        return all(device.made == device.counted for device in self.devices)

    @property
    def good(self) -> bool:
        """Nothing to complain about."""
        return self.exact and not self.mishaps

    def share(self, worker: WorkerResult) -> float:
        """Its part of all calls, 0..1."""
        return worker.made / self.made if self.made else 0.0
