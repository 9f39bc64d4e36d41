"""How thorough what is repeated is: COHELD_TEST_STRIDE=N kills and interrupts at every Nth step, and repeats an Nth as
often. 1 is the default: all of it. Sanitizers, under which each process is several times as dear, take a sample, which
the seed of the run chooses.
"""

import os
import random
from collections.abc import Collection, Iterator
from itertools import count

from coheld.testing.support import seeds

STRIDE = int(os.environ.get("COHELD_TEST_STRIDE", "1"))


def steps() -> Iterator[int]:
    """The numbers of the steps to strike at, from 1 on; their end is the user's to find."""
    return count(1 + random.Random(seeds.SEED).randrange(STRIDE), STRIDE)


def rounds(number: int) -> int:
    """How often to repeat what is to be repeated that often; once at least."""
    return -(-number // STRIDE)


def are_met(found: Collection[object], known: Collection[object]) -> bool:
    """Have the steps met with all of that, and nothing else?  Of a part of the steps: with some of it."""
    return set(found) == set(known) if STRIDE == 1 else bool(found) and set(found) <= set(known)
