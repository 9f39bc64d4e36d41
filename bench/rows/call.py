"""A locked method that does nothing, without contention: its time over that of the plain call."""

from collections.abc import Callable

from bench import peers
from bench.measure import Plan, calibrated, in_rounds
from bench.table import Bar, Line, against

BARS = {
    peers.PYATS: Bar(0.50),
    peers.RLOCK: Bar(0.45),
    peers.MP_RLOCK: Bar(0.15),
    peers.FILELOCK: None,
    peers.FASTENERS: None,
}


def measure(plan: Plan) -> list[Line]:
    names = peers.installed(peers.COHELD, *BARS)
    measures = {name: _over_plain(peers.new(name), plan.loop) for name in names}
    return against("locked no-op method, over the plain call", "s", in_rounds(measures, plan.rounds), BARS)


def _over_plain(device: peers.Device, target: float) -> Callable[[], float]:
    """Seconds of a locked call minus seconds of a plain one, the two loops one after the other."""
    locked = calibrated("it.locked()", device, target)
    plain = calibrated("it.plain()", device, target)
    return lambda: locked() - plain()
