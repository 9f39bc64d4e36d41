"""The seed of this run: random unless COHELD_TEST_SEED names one. The pytest header prints it."""

import os
import random

SEED = int(os.environ.get("COHELD_TEST_SEED") or random.SystemRandom().randrange(2**32))


def for_test(name: str) -> random.Random:
    """A generator that depends on the seed and the name of the test, not on the tests before it."""
    return random.Random(f"{SEED}:{name}")
