"""A short run of what deadlocks/prove.py does for as long as one likes."""

from coheld.testing.support import seeds
from deadlocks import prove


def test_rings_and_crowds() -> None:
    report = prove.prove(count=3, seconds=2, seed=seeds.SEED)
    assert report.rings == 3 and report.turns and report.deaths and report.forks and report.looks, report
