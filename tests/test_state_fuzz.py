"""A short run of tests/fuzz/states.py; that runs for as long as one likes."""

import random

from coheld.testing.support import delays
from fuzz import states


def test_damaged_states_are_survived(rng: random.Random) -> None:
    fuzzer = states.Fuzzer(rng.randrange(2**32))
    report = fuzzer.run(seconds=5 * delays.SCALE)
    print(report.cases, dict(report.outcomes))
    assert not report.findings
    assert report.outcomes["was refused"] and report.outcomes["went well"]
