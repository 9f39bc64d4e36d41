"""The searches hold a million small states, and no cycles: the collector would go through all of them in vain."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def without_a_collector() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
