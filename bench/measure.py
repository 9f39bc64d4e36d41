"""Timing on a shared, noisy machine: calibrated loops, peers alternating inside each round, medians."""

import gc
import math
import statistics
import timeit
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
Samples = Mapping[str, list[float]]
"""For each peer, one figure a round; figures at the same index belong to the same round."""


@dataclass(frozen=True)
class Plan:
    """How much to measure. Times in seconds."""

    rounds: int = 15
    """Rounds of the timed loops and of the interpreters started."""
    loop: float = 0.02
    """Length that a timed loop is calibrated to."""
    bursts: int = 21
    """Rounds of the throughput rows."""
    burst: float = 0.1
    """Length of one throughput measurement."""
    turns: float = 3.0
    """Length of one run of processes that take turns."""
    runs: int = 3
    """Runs of processes that take turns, and of the million."""
    deaths: int = 20
    """Holders killed."""
    patience: float = 1.0
    """How long a waiter may sleep behind a dead holder before that counts as never."""
    crowd: int = 1_000_000
    """Live locks in one process."""
    peer_crowd: int = 100_000
    """Where to stop counting live locks of a peer."""


QUICK = Plan(
    rounds=3,
    loop=0.005,
    bursts=1,
    burst=0.05,
    turns=0.2,
    runs=1,
    deaths=2,
    patience=0.2,
    crowd=20_000,
    peer_crowd=500,
)
"""A look at the shape of the table. Its times mean little."""


@contextmanager
def gc_off() -> Iterator[None]:
    """Keep the garbage collector out of a timed loop."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def in_rounds(measures: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Call every measure once a round, in reverse order every other round: drift hits all of them alike."""
    samples: dict[str, list[T]] = {name: [] for name in measures}
    names = list(measures)
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            samples[name].append(measures[name]())
    return samples


def calibrated(statement: str, subject: object, target: float) -> Callable[[], float]:
    """A loop of about `target` seconds over `statement`, where `it` is the subject; answers seconds per pass.

    Each loop is code of its own (timeit compiles it), since the interpreter adapts code to the types that it
    meets: in a loop shared by several classes all would be slow. timeit switches the garbage collector off.
    """
    timer = timeit.Timer(statement, "it = subject", globals={"subject": subject})
    number = 1
    while (taken := timer.timeit(number)) < target / 4:
        number *= 4
    number = max(1, round(number * target / taken))
    return lambda: timer.timeit(number) / number


def typical_ratio(samples: Samples, ours: str, peer: str) -> float:
    """The median over the rounds of ours over the peer's in the same round."""
    pairs = zip(samples[ours], samples[peer], strict=True)
    return statistics.median(a / b if b else math.inf for a, b in pairs)
