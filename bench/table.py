"""The table: its lines, the bars they are held against, and how they are printed."""

import math
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Any

import coheld
from bench import peers
from bench.measure import Samples, typical_ratio


@dataclass(frozen=True)
class Bar:
    """What must be reached: a limit on the ratio to the peer, or (`absolute`) on our own figure."""

    limit: float
    at_least: bool = False
    absolute: bool = False

    def met_by(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True)
class Line:
    """One line. Figures are in `unit`; None: not measured. `math.inf` seconds: it never happened."""

    what: str
    unit: str
    ours: float | None
    peer: str = ""
    theirs: float | None = None
    ratio: float | None = None
    bar: Bar | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """`meets`, `misses`, `not measured`, or nothing where no bar is set."""
        if self.bar is None:
            return ""
        value = self.ours if self.bar.absolute else self.ratio
        if value is None:
            return "not measured"
        return "meets" if self.bar.met_by(value) else "misses"

    def cells(self) -> list[str]:
        theirs = "not installed" if self.peer and self.theirs is None else shown(self.theirs, self.unit)
        ratio = "" if self.ratio is None else f"{self.ratio:.3g}"
        ours, bar = shown(self.ours, self.unit), self._bar_text()
        return [self.what, ours, self.peer, theirs, ratio, bar, self.verdict, self.note]

    def _bar_text(self) -> str:
        if self.bar is None:
            return ""
        limit = shown(self.bar.limit, self.unit) if self.bar.absolute else f"{self.bar.limit:.2f}"
        return (">= " if self.bar.at_least else "<= ") + limit


DISTRIBUTIONS = ["pyats", "filelock", "fasteners"]
HEADINGS = ["what", "ours", "peer", "peer's", "ratio", "bar", "verdict", ""]


def against(what: str, unit: str, samples: Samples, bars: Mapping[str, Bar | None]) -> list[Line]:
    """One line for each peer in `bars`: medians over the rounds, and the median of the rounds' ratios."""
    return [_compared(what, unit, samples, peer, bar) for peer, bar in bars.items()]


def _compared(what: str, unit: str, samples: Samples, peer: str, bar: Bar | None) -> Line:
    ratio = typical_ratio(samples, peers.COHELD, peer) if peer in samples else None
    return Line(what, unit, median(samples, peers.COHELD), peer, median(samples, peer), ratio, bar)


def beside(what: str, unit: str, samples: Samples, others: Sequence[str], bar: Bar | None) -> list[Line]:
    """One line for each of `others`, with medians alone; the bar, on our own figure, stands on the first."""
    ours = median(samples, peers.COHELD)
    lines = [Line(what, unit, ours, peer, median(samples, peer)) for peer in others]
    return [replace(lines[0], bar=bar), *lines[1:]]


def median(samples: Samples, name: str) -> float | None:
    """The median of one peer's rounds; None if it was not measured."""
    return statistics.median(samples[name]) if samples.get(name) else None


def shown(value: float | None, unit: str) -> str:
    """A figure for people: seconds, calls per second and bytes are scaled, other units stand as they are."""
    if value is None:
        return ""
    if math.isinf(value):
        return "never"
    return _SCALES[unit](value) if unit in _SCALES else f"{value:,.3g} {unit}".strip()


def _seconds(value: float) -> str:
    for size, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if abs(value) >= size:
            return f"{value / size:.3g} {name}" if abs(value) < 1000 * size else f"{value / size:,.0f} {name}"
    return f"{value / 1e-9:.3g} ns"


def _rate(value: float) -> str:
    millions = value / 1e6
    return f"{millions:.2f} M/s" if millions > 0.1 else f"{value / 1e3:.3g} k/s"


_SCALES: dict[str, Callable[[float], str]] = {
    "s": _seconds,
    "/s": _rate,
    "bytes": lambda value: f"{value / 1e6:.0f} MB",
    "%": lambda value: f"{value:.1f} %",
    "locks": lambda value: f"{value:,.0f}",
}


def render(lines: Sequence[Line]) -> str:
    """The lines as text in columns, under their headings."""
    cells = [HEADINGS] + [line.cells() for line in lines]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADINGS))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def as_json(line: Line) -> dict[str, Any]:
    """One line for a program: numbers (null: never, or not measured), the verdict, the cells as printed."""
    fields = {name: None if value == math.inf else value for name, value in asdict(line).items()}
    return fields | {"verdict": line.verdict, "cells": line.cells()}


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    libc = " ".join(platform.libc_ver())
    return {
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "CPU": f"{os.cpu_count()} x {_cpu_model()}",
        "kernel": f"{platform.system()} {platform.release()}, {libc}",
        "load": _load(),
        "coheld": coheld.__version__,
        "peers": ", ".join(f"{name} {_version(name)}" for name in DISTRIBUTIONS),
    }


def _load() -> str:
    """Processes that ran or wanted to in the last 1, 5 and 15 minutes; other work blurs the rows of several."""
    load = os.getloadavg()
    busy = " (busy: rows with several processes say little)" if load[0] > (os.cpu_count() or 1) / 2 else ""
    return "{:.2f} {:.2f} {:.2f}".format(*load) + busy


def _cpu_model() -> str:
    with open("/proc/cpuinfo") as file:
        models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
